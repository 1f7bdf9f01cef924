"""What adapters add to weights: the invariants of each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.passes.adapters.adapter_files import AdapterModule, Kind
from effic.passes.adapters.deltas import bias_delta, dora_norms, l4q_merged, low_rank, module_delta

seeds = st.integers(0, 10_000)
kinds = st.sampled_from(["linear", "conv", "embedding", "expert"])
quick = settings(max_examples=25, deadline=None)

OUT, INTO, RANK, EXPERTS = 7, 12, 3, 4
WIDE = {"dtype": np.float64}


def lora(rng: np.random.Generator, kind: Kind = "linear", rank: int = RANK, **fields: Any) -> AdapterModule:
    """A module with random factors in float64, for the weight of :func:`weight`."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "linear": ((rank, INTO), (OUT, rank)),
        "conv": ((rank, 3, 2, 2), (OUT, rank, 1, 1)),
        "embedding": ((rank, OUT), (INTO, rank)),
        "expert": ((EXPERTS * rank, INTO), (OUT, rank * EXPERTS)),
    }
    a, b = (rng.normal(size=shape) for shape in shapes[kind])
    told = {"path": "net.fc", "adapter": "mine", "rank": rank, "alpha": 6.0, "scaling": 6.0 / rank}
    return AdapterModule(
        **{**told, "kind": kind, "a": a, "b": b, "experts": EXPERTS if kind == "expert" else 1, **fields}  # type: ignore[arg-type]
    )


def weight(rng: np.random.Generator, kind: Kind = "linear", dtype: Any = np.float64) -> np.ndarray:
    base: np.ndarray = rng.normal(size=(EXPERTS, OUT, INTO) if kind == "expert" else (OUT, INTO))
    base.flat[:: INTO + 1] = -0.0
    return base.astype(dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# -- LoRA ------------------------------------------------------------------------------------------


@quick
@given(seeds)
def test_each_kind_by_its_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    m = lora(rng)
    assert m.a is not None
    assert m.b is not None
    assert np.allclose(module_delta(m, weight(rng), **WIDE), 2 * m.b @ m.a, atol=1e-10)
    m = lora(rng, "embedding")
    assert m.a is not None
    assert m.b is not None
    assert np.allclose(module_delta(m, weight(rng), **WIDE), 2 * (m.b @ m.a).T, atol=1e-10)
    m = lora(rng, "conv")
    assert m.a is not None
    assert m.b is not None
    wanted = 2 * np.einsum("or,rckl->ockl", m.b[:, :, 0, 0], m.a)
    assert np.allclose(module_delta(m, weight(rng), **WIDE), wanted.reshape(OUT, -1), atol=1e-10)
    m = lora(rng, "expert")
    assert m.a is not None
    assert m.b is not None
    a, b = m.a.reshape(EXPERTS, RANK, INTO), m.b.reshape(OUT, RANK, EXPERTS)
    wanted = 2 * np.einsum("ore,eri->eoi", b, a)
    assert np.allclose(module_delta(m, weight(rng, "expert"), **WIDE), wanted, atol=1e-10)


@quick
@given(seeds, kinds, st.sampled_from([np.float32, np.float64, np.float16]))
def test_b_zero_leaves_every_bit(seed: int, kind: Kind, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    m = lora(rng, kind)
    assert m.b is not None
    base = weight(rng, kind, dtype)
    merged = base + module_delta(dataclasses.replace(m, b=0 * m.b), base)
    assert same_bits(merged.astype(dtype), base)


@quick
@given(seeds, st.sampled_from(["linear", "conv", "embedding"]), st.integers(1, 4))
def test_rank_of_the_delta_is_at_most_r(seed: int, kind: Kind, rank: int) -> None:
    rng = np.random.default_rng(seed)
    assert np.linalg.matrix_rank(module_delta(lora(rng, kind, rank), weight(rng), **WIDE)) <= rank


@quick
@given(seeds)
def test_merge_order_is_irrelevant_and_unmerging_restores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, one, two = weight(rng, dtype=np.float32), lora(rng), lora(rng)
    first, second = module_delta(one, base), module_delta(two, base)
    assert np.allclose((base + first) + second, (base + second) + first, atol=1e-5)
    restored = (base + first) - first
    assert (np.abs(restored - base) <= np.spacing(np.maximum(np.abs(base), np.abs(base + first)))).all()


def test_merged_equals_unmerged_in_the_forward_pass() -> None:
    rng = np.random.default_rng(0)
    base, m, x = weight(rng), lora(rng), rng.normal(size=(5, INTO))
    assert m.a is not None
    assert m.b is not None
    branch = x @ base.T + m.scaling * (x @ m.a.T) @ m.b.T
    assert np.allclose(x @ (base + module_delta(m, base, **WIDE)).T, branch, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "expert"])
def test_a_weight_of_another_shape_is_refused(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match=r"module 'net.fc' of adapter 'mine' is for"):
        module_delta(lora(rng, kind), rng.normal(size=(3, OUT, INTO + 1) if kind == "expert" else (OUT, 5)))


def test_bias_of_b_is_scaled() -> None:
    m = lora(np.random.default_rng(0), lora_bias=np.arange(OUT, dtype=np.float32))
    bias = bias_delta(m)
    assert bias is not None
    assert np.array_equal(bias, 2.0 * np.arange(OUT))
    assert bias_delta(dataclasses.replace(m, lora_bias=None)) is None


# -- DoRA ------------------------------------------------------------------------------------------


@quick
@given(seeds, st.sampled_from(["linear", "conv", "embedding"]))
def test_dora_norms_of_the_result_are_the_magnitudes(seed: int, kind: Kind) -> None:
    rng = np.random.default_rng(seed)
    axis = 0 if kind == "embedding" else 1
    m = rng.uniform(0.5, 2, INTO if kind == "embedding" else OUT)
    module, base = lora(rng, kind, magnitude=m.reshape(1, -1, 1, 1) if kind == "conv" else m), weight(rng)
    merged = base + module_delta(module, base, **WIDE)
    assert np.allclose(np.linalg.norm(merged, axis=axis), m, atol=1e-10)
    # And it is taken away again with the norms of before.
    left, right = low_rank(module, base, dtype=np.float64)
    back = merged / np.expand_dims(m / dora_norms(module, base, dtype=np.float64), axis) - (left @ right)[0]
    assert np.allclose(back, base, atol=1e-10)


def test_dora_leaves_a_channel_of_norm_zero() -> None:
    rng = np.random.default_rng(0)
    module, base = lora(rng, magnitude=np.ones(OUT)), weight(rng)
    assert module.b is not None
    b = module.b.copy()
    b[2], base[2] = 0, 0
    module = dataclasses.replace(module, b=b)
    assert np.array_equal(module_delta(module, base)[2], np.zeros(INTO))
    assert dora_norms(module, base)[2] == 0


def test_dora_is_refused_on_experts_and_with_other_magnitudes() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="DoRA on a stack"):
        module_delta(lora(rng, "expert", magnitude=np.ones(OUT)), weight(rng, "expert"))
    with pytest.raises(UsageError, match="5 magnitudes"):
        module_delta(lora(rng, magnitude=np.ones(5)), weight(rng))


# -- DyLoRA ----------------------------------------------------------------------------------------


@quick
@given(seeds, kinds)
def test_dylora_keeps_the_first_components(seed: int, kind: Kind) -> None:
    rng = np.random.default_rng(seed)
    module, base = lora(rng, kind), weight(rng, kind)
    assert same_bits(module_delta(module, base, rank=RANK), module_delta(module, base))
    assert same_bits(module_delta(module, base, rank=99), module_delta(module, base))
    kept = module_delta(module, base, rank=1, rank_scale="keep", **WIDE)
    assert np.allclose(module_delta(module, base, rank=1, **WIDE), RANK * kept, atol=1e-10)
    if kind == "linear":
        assert module.a is not None
        assert module.b is not None
        assert np.allclose(kept, 2 * np.outer(module.b[:, 0], module.a[0]), atol=1e-10)


@quick
@given(seeds)
def test_dylora_error_is_non_increasing_in_the_rank(seed: int) -> None:
    # Nested factors: orthogonal components, as a model trained for any rank orders them.
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(OUT, 6)))
    p, _ = np.linalg.qr(rng.normal(size=(INTO, 6)))
    sizes = np.sort(rng.uniform(0, 1, 6))[::-1]
    module = lora(rng, rank=6, a=p.T, b=q * sizes)
    base = weight(rng)
    full = module_delta(module, base, **WIDE)
    errors = [
        float(np.linalg.norm(full - module_delta(module, base, rank=b, rank_scale="keep", **WIDE)))
        for b in range(1, 7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_dylora_of_rslora_divides_by_the_root() -> None:
    rng = np.random.default_rng(0)
    module = lora(rng, rank=4, use_rslora=True, scaling=6.0 / 2.0)
    base = weight(rng)
    plain = module_delta(module, base, rank=1, rank_scale="keep", **WIDE)
    assert np.allclose(module_delta(module, base, rank=1, **WIDE), 2 * plain)


def test_a_rank_to_cut_to_needs_lora_and_a_number_from_one() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="from 1"):
        module_delta(lora(rng), weight(rng), rank=0)
    with pytest.raises(UsageError, match="no rank to cut"):
        module_delta(s2ft(rng, 0), weight(rng), rank=2)


# -- initialisations that changed the base ---------------------------------------------------------


def pissa_start(base: np.ndarray, module: AdapterModule) -> AdapterModule:
    u, s, vt = np.linalg.svd(base, full_matrices=False)
    root = np.sqrt(s[:RANK] / module.scaling)
    return dataclasses.replace(module, a=root[:, None] * vt[:RANK], b=u[:, :RANK] * root)


def olora_start(base: np.ndarray, module: AdapterModule) -> AdapterModule:
    q, r = np.linalg.qr(base)
    return dataclasses.replace(module, a=r[:RANK], b=q[:, :RANK])


@quick
@given(seeds, st.sampled_from([("pissa", pissa_start), ("olora", olora_start)]))
def test_three_rules_of_a_changed_base_agree(
    seed: int, init: tuple[str, Callable[..., AdapterModule]]
) -> None:
    rng = np.random.default_rng(seed)
    base = weight(rng)
    start = init[1](base, lora(rng))
    assert start.a is not None
    assert start.b is not None
    trained = dataclasses.replace(
        start, a=start.a + 0.1 * rng.normal(size=start.a.shape), b=start.b + 0.1, init=init[0]
    )
    residual = base - start.scaling * start.b @ start.a
    wanted = residual + module_delta(dataclasses.replace(trained, init=True), residual, **WIDE)
    recomputed = base + module_delta(trained, base, **WIDE)
    told = base + module_delta(dataclasses.replace(trained, initial=start), base, **WIDE)
    assert np.allclose(told, wanted, atol=1e-10)
    assert np.allclose(recomputed, wanted, atol=1e-9)
    # Training that changed nothing leaves the original weight.
    untrained = dataclasses.replace(start, init=init[0])
    assert np.abs(module_delta(untrained, base, **WIDE)).max() < 1e-10


def test_ba_lora_is_pissa_into_the_residual() -> None:
    rng = np.random.default_rng(3)
    base = weight(rng)
    start = pissa_start(base, lora(rng, alpha=RANK, scaling=1.0))
    assert start.a is not None
    assert start.b is not None
    residual = base - start.b @ start.a
    assert np.allclose(residual + module_delta(start, residual, **WIDE), base, atol=1e-10)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_what_cannot_be_recomputed_is_refused(init: str) -> None:
    rng = np.random.default_rng(0)
    module = lora(rng, init=init)
    with pytest.raises(UsageError, match=rf"'net.fc' .*init_lora_weights={init}.*residual model"):
        module_delta(module, weight(rng))
    start = lora(rng)
    delta = module_delta(dataclasses.replace(module, initial=start), weight(rng), **WIDE)
    plain = [module_delta(dataclasses.replace(m, init=True), weight(rng), **WIDE) for m in (module, start)]
    assert np.allclose(delta, plain[0] - plain[1], atol=1e-10)


def test_an_ambiguous_start_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="singular values 3 and 4"):
        module_delta(lora(rng, init="pissa"), np.eye(OUT, INTO))
    with pytest.raises(UsageError, match="first 3 columns"):
        module_delta(lora(rng, init="olora"), np.ones((OUT, INTO)))


def test_mica_starts_from_nothing() -> None:
    rng = np.random.default_rng(0)
    module, base = lora(rng), weight(rng)
    assert same_bits(module_delta(dataclasses.replace(module, init="mica"), base), module_delta(module, base))


# -- PaCA ------------------------------------------------------------------------------------------


@quick
@given(seeds)
def test_paca_assigns_its_columns_and_leaves_the_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = weight(rng, dtype=np.float32)
    columns = rng.permutation(INTO)[:RANK]
    new = rng.normal(size=(OUT, RANK)).astype(np.float32)
    module = AdapterModule("net.fc", rank=RANK, scaling=0.5, method="paca", adapter="mine")
    module = dataclasses.replace(module, extra={"paca_w": new, "paca_indices": columns})
    merged = (base + module_delta(module, base, **WIDE)).astype(np.float32)
    others = np.setdiff1d(np.arange(INTO), columns)
    assert same_bits(merged[:, others], base[:, others])
    assert np.array_equal(merged[:, columns], new * np.float32(0.5))


def test_paca_out_of_range_is_refused() -> None:
    extra = {"paca_w": np.ones((OUT, 1)), "paca_indices": np.array([INTO])}
    with pytest.raises(UsageError, match=f"columns up to {INTO}"):
        module_delta(AdapterModule("fc", rank=1, method="paca", extra=extra), np.ones((OUT, INTO)))


# -- S²FT ------------------------------------------------------------------------------------------


def s2ft(
    rng: np.random.Generator,
    axis: int,
    order: np.ndarray | None = None,
    start: int = 1,
    count: int = 3,
    shape: tuple[int, int] = (OUT, INTO),
) -> AdapterModule:
    wanted = (count, shape[1]) if axis == 0 else (shape[0], count)
    extra = {"s2": rng.normal(size=wanted), "axis": np.array(axis), "start": np.array(start)}
    if order is not None:
        extra["order"] = order
    return AdapterModule("net.fc", rank=count, method="s2ft", adapter="mine", extra=extra)


def ffn(x: np.ndarray, up: np.ndarray, gate: np.ndarray, down: np.ndarray) -> np.ndarray:
    return np.asarray((np.tanh(x @ gate.T) * (x @ up.T)) @ down.T)


def attention(
    x: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, heads: int
) -> np.ndarray:
    def split(w: np.ndarray) -> np.ndarray:
        return np.asarray((x @ w.T).reshape(len(x), heads, -1).transpose(1, 0, 2))

    scores = np.exp(split(q) @ split(k).transpose(0, 2, 1))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ split(v)
    return np.asarray(mixed.transpose(1, 0, 2).reshape(len(x), -1) @ o.T)


@quick
@given(seeds)
def test_s2ft_permutation_leaves_the_function_unchanged(seed: int) -> None:
    """Trained in the permuted model, merged into the original one: the same function, before and after."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(5, 6))
    order = rng.permutation(10)
    up, gate, down = rng.normal(size=(10, 6)), rng.normal(size=(10, 6)), rng.normal(size=(6, 10))
    assert np.allclose(ffn(x, up[order], gate[order], down[:, order]), ffn(x, up, gate, down), atol=1e-10)
    rows, columns = s2ft(rng, 0, order, shape=up.shape), s2ft(rng, 1, order, shape=down.shape)
    trained_up, trained_down = up[order].copy(), down[:, order].copy()
    trained_up[1:4] += rows.extra["s2"]
    trained_down[:, 1:4] += columns.extra["s2"]
    merged = (up + module_delta(rows, up, **WIDE), gate, down + module_delta(columns, down, **WIDE))
    assert np.allclose(ffn(x, *merged), ffn(x, trained_up, gate[order], trained_down), atol=1e-10)

    heads, size = 4, 2
    order = (rng.permutation(heads)[:, None] * size + np.arange(size)).reshape(-1)
    q, k, v = (rng.normal(size=(heads * size, 6)) for _ in range(3))
    o = rng.normal(size=(6, heads * size))
    permuted = (q[order], k[order], v[order], o[:, order])
    assert np.allclose(attention(x, *permuted, heads), attention(x, q, k, v, o, heads), atol=1e-10)
    rows = s2ft(rng, 0, order, start=2, count=2, shape=v.shape)
    columns = s2ft(rng, 1, order, start=2, count=2, shape=o.shape)
    trained_v, trained_o = permuted[2].copy(), permuted[3].copy()
    trained_v[2:4] += rows.extra["s2"]
    trained_o[:, 2:4] += columns.extra["s2"]
    wanted = attention(x, permuted[0], permuted[1], trained_v, trained_o, heads)
    merged = (q, k, v + module_delta(rows, v, **WIDE), o + module_delta(columns, o, **WIDE))
    assert np.allclose(attention(x, *merged, heads), wanted, atol=1e-10)


@quick
@given(seeds, st.sampled_from([0, 1]), st.booleans())
def test_s2ft_touches_what_it_selected(seed: int, axis: int, permuted: bool) -> None:
    rng = np.random.default_rng(seed)
    base = weight(rng)
    order = rng.permutation(base.shape[axis]) if permuted else np.arange(base.shape[axis])
    module = s2ft(rng, axis, order if permuted else None)
    delta = module_delta(module, base, **WIDE)
    others = np.setdiff1d(order, order[1:4])
    assert same_bits(np.take(base + delta, others, axis), np.take(base, others, axis))
    assert np.array_equal(np.take(delta, order[1:4], axis), module.extra["s2"])
    assert np.linalg.matrix_rank(delta) <= 3


def test_s2ft_of_grouped_queries_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match=r"'net.fc' of adapter 'mine' orders 14 channels.*grouped-query"):
        module_delta(s2ft(rng, 0, rng.permutation(14)), weight(rng))
    with pytest.raises(UsageError, match="from channel 6"):
        module_delta(s2ft(rng, 0, start=6), weight(rng))


# -- SVFit -----------------------------------------------------------------------------------------


@quick
@given(seeds)
def test_svfit_changes_the_singular_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = weight(rng)
    u, s, vt = np.linalg.svd(base, full_matrices=False)
    trained = s.copy()
    trained[:RANK] += rng.uniform(0, 1, RANK)
    extra = {"u": u[:, :RANK], "v": vt[:RANK].T, "sigma": trained[:RANK], "sigma0": s[:RANK]}
    module = AdapterModule("fc", rank=RANK, method="svfit", extra=extra)
    merged = base + module_delta(module, base, **WIDE)
    assert np.allclose(merged, (u * trained) @ vt, atol=1e-10)
    # Signs of the vectors, which two decompositions may differ in, come from the file.
    flipped = {**extra, "u": -extra["u"], "v": -extra["v"]}
    del flipped["sigma0"]
    other = dataclasses.replace(module, extra=flipped)
    assert np.allclose(base + module_delta(other, base, **WIDE), merged, atol=1e-10)
    untouched = dataclasses.replace(module, extra={**extra, "sigma": s[:RANK]})
    assert same_bits(base + module_delta(untouched, base, **WIDE), base)


# -- L4Q -------------------------------------------------------------------------------------------


def l4q(rng: np.random.Generator, bits: int, groups: int) -> AdapterModule:
    module = lora(rng)
    assert module.a is not None
    assert module.b is not None
    scale = rng.uniform(0.1, 0.6, (OUT, groups)).astype(np.float32)
    offset = rng.normal(size=(OUT, groups)).astype(np.float32)
    return dataclasses.replace(
        module,
        method="l4q",
        a=module.a.astype(np.float32),
        b=module.b.astype(np.float32),
        extra={"scale": scale, "offset": offset, "bits": np.array(bits)},
    )


@quick
@given(seeds, st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2, 4]))
def test_l4q_export_is_the_training_forward_bit_for_bit(seed: int, bits: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    module, base = l4q(rng, bits, groups), weight(rng, dtype=np.float32)
    assert module.a is not None
    assert module.b is not None
    merged = base + (module.b * np.float32(module.scaling)) @ module.a
    scale, offset = (np.repeat(module.extra[key], INTO // groups, axis=1) for key in ("scale", "offset"))
    levels = np.rint(np.clip((merged - offset) / scale, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    found = l4q_merged(module, base)
    assert np.array_equal(found.codes, levels)
    assert same_bits(found.decode(), scale * levels + offset)
    assert same_bits((base + module_delta(module, base, **WIDE)).astype(np.float32), found.decode())
    zero = np.repeat(found.zero_point, INTO // groups, axis=1)
    assert np.allclose(scale * (found.codes - zero), found.decode(), atol=1e-5)


def test_l4q_needs_scales_that_fit() -> None:
    rng = np.random.default_rng(0)
    module, base = l4q(rng, 4, 5), weight(rng)
    # Groups of 3 make 4 of 12 inputs, not 5.
    with pytest.raises(UsageError, match="5 scales a row"):
        l4q_merged(module, base)
    module = l4q(rng, 4, 2)
    module.extra["scale"][0, 0] = 0
    with pytest.raises(UsageError, match="not above zero"):
        l4q_merged(module, base)
    with pytest.raises(UsageError, match="9 bits"):
        l4q_merged(l4q(rng, 9, 2), base)
