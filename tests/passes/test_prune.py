"""The one-shot pruning passes on graphs: what they prune, what they leave and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.ir.evaluate import run_session, start_session
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import Pattern, along_groups, by_reduction, declared, follows, nm_mask
from effic.ir.verify import problems
from effic.ir.weights import weight_sites
from effic.passes.base import CalibratedPass, Remark, Remarks
from effic.passes.calibration import Calibration
from effic.passes.sparsify.one_shot import OneShot
from effic.passes.sparsify.prune_magnitude import PruneMagnitude
from effic.passes.sparsify.prune_sparsegpt import PruneSparseGPT
from effic.passes.sparsify.prune_wanda import PruneWanda

METHODS: list[type[OneShot]] = [PruneMagnitude, PruneWanda, PruneSparseGPT]
LINEAR = "g (float[t, 48] x) => (float[t, 40] y) <float[48, 40] w = {0}> { y = MatMul(x, w) }"


def parse(text: str, **weights: np.ndarray) -> Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, array in weights.items():
            if name in graph.initializers:
                value = graph.initializers[name]
                value.const_value = ir.Tensor(array, name=name)
                value.shape = ir.Shape(array.shape)
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return Model(model)


def correlated(rng: np.random.Generator, *shape: int) -> np.ndarray:
    size = shape[-1]
    mix = np.eye(size) + rng.standard_normal((size, size)) / np.sqrt(size)
    return (rng.standard_normal(shape) @ mix * np.exp(rng.standard_normal(size))).astype(np.float32)


def weight(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def apply(item: OneShot, model: Model, data: Calibration | None) -> list[Remark]:
    remarks = Remarks()
    if isinstance(item, CalibratedPass):
        item.apply_with(model, data, remarks)
    else:
        item.apply(model, remarks)
    assert not list(problems(model))
    return [r for r in remarks.items if r.where != "the model"]


def values(model: Model, name: str = "w") -> np.ndarray:
    (site,) = [s for s in weight_sites(model) if s.name == name]
    with site.matrix() as matrix:
        return np.array(matrix).reshape(site.shape)


def output(model: Model, **inputs: np.ndarray) -> np.ndarray:
    session = start_session(ir.to_proto(model.ir).SerializeToString())
    return next(iter(run_session(session, inputs).values()))


FORMS = [
    LINEAR,
    "g (float[t, 48] x) => (float[t, 40] y) <float[40, 48] w = {0}> { y = Gemm <transB = 1> (x, w) }",
    "g (float[48, t] x) => (float[40, t] y) <float[40, 48] w = {0}> { y = MatMul(w, x) }",
    "g (float[48, t] x) => (float[t, 40] y) <float[48, 40] w = {0}> { y = Gemm <transA = 1> (x, w) }",
    "g (float[48, t] x) => (float[40, t] y) <float[48, 40] w = {0}> { y = Gemm <transA = 1> (w, x) }",
    "g (float[t, 48] x) => (float[t, 40] y) <float[40, 48] w = {0}> "
    "{ v = Transpose <perm = [1, 0]> (w) y = MatMul(x, v) }",
]


@pytest.mark.parametrize("density", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_weight_is_pruned_whichever_way_it_lies(method: type[OneShot], density: float) -> None:
    rng = np.random.default_rng(0)
    w, x = weight(rng, 40, 48), correlated(rng, 300, 48)
    found = []
    for text in FORMS:
        turned = "float[48, 40] w" in text
        model = parse(text, w=w.T.copy() if turned else w)
        feed = x.T.copy() if "[48, t] x" in text else x
        (remark,) = apply(method(density=density), model, Calibration.of([{"x": feed}]))
        assert remark.kind == "passed", remark.text
        pruned = values(model).T if turned else values(model)
        if not density:
            assert follows(pruned, Pattern(2, 4))
        assert remark.data["density"] == pytest.approx(0.5, abs=0.01)
        assert declared(model) == ({} if density else {"w": Pattern(2, 4)})
        result = output(model, x=feed)
        np.testing.assert_allclose(
            result.T if result.shape[0] == 40 else result, x @ pruned.T, rtol=1e-4, atol=1e-3
        )
        found.append(pruned)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_stay_in_their_type(method: type[OneShot], dtype: str) -> None:
    rng = np.random.default_rng(0)
    name = "bfloat16" if dtype == "bfloat16" else "float16"
    w = weight(rng, 48, 40, dtype=ir.DataType[name.upper()].numpy())
    text = LINEAR.replace("float[48, 40] w", f"{name}[48, 40] w").replace(
        "MatMul(x, w)", "Cast <to = 1> (w) "
    )
    text = text.replace(
        "y = Cast <to = 1> (w) ",
        f"h = Cast <to = {10 if name == 'float16' else 16}> (x) z = MatMul(h, w) y = Cast <to = 1> (z)",
    )
    model = parse(text, w=w)
    # Statistics need a runtime that multiplies in this type: only float16 has one here.
    if name == "bfloat16" and method is not PruneMagnitude:
        pytest.skip("no runtime on a CPU multiplies bfloat16, so nothing can be calibrated")
    (remark,) = apply(method(), model, Calibration.of([{"x": weight(rng, 64, 48)}]))
    assert remark.kind == "passed", remark.text
    got = values(model)
    assert got.dtype == w.dtype
    assert follows(got, Pattern(2, 4), axis=0)


CONVOLUTIONS = [
    ("Conv", 1, (24, 16, 3, 3)),
    ("Conv", 2, (24, 8, 3, 3)),
    ("ConvTranspose", 1, (16, 24, 3, 3)),
    ("ConvTranspose", 2, (16, 12, 3, 3)),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "groups", "shape"), CONVOLUTIONS)
def test_convolutions_are_pruned_along_input_channels_inside_their_group(
    kind: str, groups: int, shape: tuple[int, ...], method: type[OneShot]
) -> None:
    rng = np.random.default_rng(0)
    w = weight(rng, *shape)
    x = np.moveaxis(correlated(rng, 4, 8, 8, 16), -1, 1).copy()
    model = parse(
        f"g (float[n, 16, 8, 8] x) => (float[n, 24, h, v] y) <float{list(shape)} w = {{0}}> "
        f"{{ y = {kind} <group = {groups}> (x, w) }}",
        w=w,
    )
    exact = output(model, x=x)
    (remark,) = apply(method(first_conv=True), model, Calibration.of([{"x": x}]))
    assert remark.kind == "passed", remark.text
    got = values(model)
    by_channel = (
        got.transpose(0, 2, 3, 1)
        if kind == "Conv"
        else got.reshape(groups, -1, *shape[1:]).transpose(0, 2, 3, 4, 1)
    )
    counts = (by_channel.reshape(-1, by_channel.shape[-1] // 4, 4) != 0).sum(axis=-1)
    assert (counts == 2).all()
    if method is not PruneMagnitude:
        noise = np.mean((output(model, x=x) - exact) ** 2)
        if kind == "Conv":  # whose outputs see one row each
            assert remark.data["output_sqnr_db"] == pytest.approx(
                10 * np.log10(np.mean(exact**2) / noise), abs=0.3
            )
        model2 = parse(
            f"g (float[n, 16, 8, 8] x) => (float[n, 24, h, v] y) <float{list(shape)} w = {{0}}> "
            f"{{ y = {kind} <group = {groups}> (x, w) }}",
            w=w,
        )
        apply(PruneMagnitude(first_conv=True), model2, None)
        assert noise < np.mean((output(model2, x=x) - exact) ** 2)


def test_wanda_scores_by_the_norm_of_the_input() -> None:
    rng = np.random.default_rng(0)
    w, x = weight(rng, 48, 40), correlated(rng, 300, 48)
    model = parse(LINEAR, w=w)
    (remark,) = apply(PruneWanda(n=1), model, Calibration.of([{"x": x[:100]}, {"x": x[100:]}]))
    mask = nm_mask(np.abs(w) * np.linalg.norm(x, axis=0)[:, None], Pattern(1, 4), axis=0)
    np.testing.assert_array_equal(values(model), np.where(mask, w, 0))
    assert remark.data["kept_energy"] == pytest.approx((w[mask] ** 2).sum() / (w**2).sum(), rel=1e-4)
    error = ((x @ (w * ~mask)) ** 2).sum()
    assert remark.data["output_sqnr_db"] == pytest.approx(
        10 * np.log10(((x @ w) ** 2).sum() / error), abs=0.5
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 4), (1, 4), (4, 8)]))
def test_with_orthogonal_inputs_wanda_is_the_best_mask(seed: int, pattern: tuple[int, int]) -> None:
    """XᵀX diagonal: the output error is a sum over weights, so that no mask of the pattern has less."""
    rng = np.random.default_rng(seed)
    w, n, m = weight(rng, 16, 6), *pattern
    q, _ = np.linalg.qr(rng.standard_normal((64, 16)))
    x = (q * np.exp(2 * rng.standard_normal(16))).astype(np.float32)
    text = "g (float[t, 16] x) => (float[t, 6] y) <float[16, 6] w = {0}> { y = MatMul(x, w) }"
    errors = []
    for item in (PruneWanda(n=n, m=m, min_size=0), PruneMagnitude(n=n, m=m, min_size=0)):
        model = parse(text, w=w)
        apply(item, model, Calibration.of([{"x": x}]))
        errors.append(float(np.sum((x.astype(np.float64) @ (w - values(model))) ** 2)))
    for _ in range(5):
        mask = nm_mask(rng.random(w.shape), Pattern(n, m), axis=0)
        errors.append(float(np.sum((x.astype(np.float64) @ (w * ~mask)) ** 2)))
    assert errors[0] <= min(errors) * (1 + 1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 5)]))
def test_wanda_with_equal_norms_is_magnitude(seed: int, pattern: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    n, m = pattern
    w, x = weight(rng, 48, 40), rng.choice(np.array([-1.5, 1.5], np.float32), (32, 48))
    found = []
    for item in (PruneWanda(n=n, m=m), PruneMagnitude(n=n, m=m)):
        model = parse(LINEAR, w=w)
        apply(item, model, Calibration.of([{"x": x}]))
        found.append(values(model))
    np.testing.assert_array_equal(*found)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 4), (1, 4), (4, 8), (3, 5)]))
def test_magnitude_is_the_nearest_weight_of_the_pattern(seed: int, pattern: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    n, m = pattern
    w = np.round(weight(rng, 48, 40) * 2) / 2  # ties and zeros
    model = parse(LINEAR, w=w)
    apply(PruneMagnitude(n=n, m=m), model, None)
    pruned = values(model)
    best = 0.0
    for start in range(0, 48, m):
        group = np.sort(np.abs(w[start : start + m]), axis=0)[::-1]
        best += float((group[n:] ** 2).sum())
    assert float(((w - pruned) ** 2).sum()) == pytest.approx(best)
    assert not np.signbit(pruned[pruned == 0]).any() or np.signbit(w[w == 0]).any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_kept_energy_is_ordered_and_a_2_4_weight_follows_4_8(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = weight(rng, 48, 40)
    shares = []
    for item in (PruneMagnitude(), PruneMagnitude(n=4, m=8), PruneMagnitude(density=0.5)):
        model = parse(LINEAR, w=w)
        (remark,) = apply(item, model, None)
        shares.append(remark.data["kept_energy"])
        if item.m == 4 and not item.density:
            assert follows(values(model), Pattern(4, 8), axis=0)
            (remark,) = apply(PruneMagnitude(n=4, m=8), model, None)
            assert remark.text == "follows 4:8 already"
    assert shares == sorted(shares)


@pytest.mark.parametrize("options", [{}, {"n": 1}, {"density": 0.3}])
@pytest.mark.parametrize("method", METHODS)
def test_a_second_time_changes_nothing(method: type[OneShot], options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    model, data = parse(LINEAR, w=weight(rng, 48, 40)), Calibration.of([{"x": correlated(rng, 99, 48)}])
    apply(method(**options), model, data)
    before = values(model)
    (remark,) = apply(method(**options), model, data)
    assert remark.kind == "missed"
    assert "already" in remark.text
    np.testing.assert_array_equal(values(model), before)


def test_a_pruned_weight_that_nobody_declared_is_declared() -> None:
    w = np.random.default_rng(0).standard_normal((48, 40)).astype(np.float32)
    w[::2] = 0
    model = parse(LINEAR, w=w)
    apply(PruneMagnitude(), model, None)
    assert declared(model) == {"w": Pattern(2, 4)}


@pytest.mark.parametrize("method", [PruneWanda, PruneSparseGPT])
def test_dead_inputs_lose_their_weights_first(method: type[OneShot]) -> None:
    rng = np.random.default_rng(0)
    w, x = weight(rng, 48, 40), correlated(rng, 300, 48)
    x[:, [0, 5, 6]] = 0
    model = parse(LINEAR, w=w)
    apply(method(), model, Calibration.of([{"x": x}]))
    pruned = values(model)
    assert not pruned[[0, 5, 6]].any()
    assert ((pruned.reshape(12, 4, 40) != 0).sum(axis=1) == 2).all()
    silent = parse(LINEAR, w=w)
    (remark,) = apply(method(), silent, Calibration.of([{"x": x * 0}]))
    assert remark.data["fallback"] == "pruned by magnitude: its inputs were zero on all the data"
    np.testing.assert_array_equal(values(silent), np.where(nm_mask(np.abs(w), Pattern(2, 4), axis=0), w, 0))


@pytest.mark.parametrize("method", [PruneWanda, PruneSparseGPT])
def test_pruned_layers_feed_the_next(method: type[Any]) -> None:
    rng = np.random.default_rng(0)
    v, w = weight(rng, 48, 48), weight(rng, 48, 40)
    text = (
        "g (float[t, 48] x) => (float[t, 40] y) <float[48, 48] v = {0}, float[48, 40] w = {0}> "
        "{ a = MatMul(x, v) b = Relu(a) y = MatMul(b, w) }"
    )
    x = correlated(rng, 300, 48)
    found = {}
    for propagate in (True, False):
        model = parse(text, v=v, w=w)
        apply(method(propagate=propagate), model, Calibration.of([{"x": x}]))
        found[propagate] = values(model), values(model, "v")
    np.testing.assert_array_equal(found[True][1], found[False][1])
    assert (found[True][0] != found[False][0]).any()
    alone = parse("g (float[t, 48] b) => (float[t, 40] y) <float[48, 40] w = {0}> { y = MatMul(b, w) }", w=w)
    seen = np.maximum(x @ found[True][1], 0)
    apply(method(), alone, Calibration.of([{"b": seen}]))
    np.testing.assert_allclose(values(alone), found[True][0], rtol=1e-3, atol=1e-3)


def test_the_hessian_mask_alone_leaves_kept_weights_as_they_are() -> None:
    rng = np.random.default_rng(0)
    w, x = weight(rng, 48, 40), correlated(rng, 300, 48)
    model = parse(LINEAR, w=w)
    apply(PruneSparseGPT(update=False), model, Calibration.of([{"x": x}]))
    pruned = values(model)
    mask = pruned != 0
    assert (mask.reshape(12, 4, 40).sum(axis=1) == 2).all()
    np.testing.assert_array_equal(pruned[mask], w[mask])


def test_the_file_that_is_written_is_what_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = parse(LINEAR.replace("48", "1024").replace("40", "512"), w=weight(rng, 1024, 512))
    x = weight(rng, 7, 1024)
    apply(PruneMagnitude(), model, None)  # large enough to be written in blocks
    want = x @ values(model)
    model.save(tmp_path / "m.onnx")
    session = start_session(str(tmp_path / "m.onnx"))
    np.testing.assert_allclose(
        next(iter(run_session(session, {"x": x}).values())), want, rtol=1e-4, atol=1e-3
    )
    again = read_onnx(tmp_path / "m.onnx")
    (site,) = weight_sites(again)
    with site.matrix() as matrix:
        assert follows(along_groups(site, matrix), Pattern(2, 4), axis=1)
    assert follows(by_reduction(site, site.read()), Pattern(2, 4))
    assert declared(again) == {"w": Pattern(2, 4)}


# -- which weights --------------------------------------------------------------------------------


def refusal(text: str, item: OneShot | None = None, name: str = "w", **weights: np.ndarray) -> str:
    model = parse(text, **weights)
    before = {s.name: values(model, s.name) for s in weight_sites(model) if s.name in weights}
    remarks = [r for r in apply(item or PruneMagnitude(min_size=0), model, None) if r.where == name]
    assert [r.kind for r in remarks] == ["missed"], remarks
    np.testing.assert_array_equal(values(model, name), before[name])
    assert name not in declared(model)
    return remarks[0].text


def conv(channels: int, group: int = 1, then: str = "") -> str:
    return (
        f"g (float[n, {channels}, 8, 8] x) => (float[n, c, h, v] y) "
        f"<float[8, {channels // group}, 3, 3] w = {{0}}, float[8, 8, 3, 3] u = {{0}}> "
        f"{{ a = Conv <group = {group}> (x, w) y = Conv(a, u) }}"
    )


def test_what_is_left_dense_and_why() -> None:
    rng = np.random.default_rng(0)
    u = weight(rng, 8, 8, 3, 3)
    assert "first convolution" in refusal(conv(8), w=u, u=u)
    assert (
        refusal(conv(3), PruneMagnitude(first_conv=True, min_size=0), w=weight(rng, 8, 3, 3, 3), u=u)
        == "has 3 input channels, fewer than the 4 of a group"
    )
    depthwise = refusal(
        conv(8, 8), PruneMagnitude(first_conv=True, min_size=0), w=weight(rng, 8, 1, 3, 3), u=u
    )
    assert depthwise.startswith("is depthwise")
    w = weight(rng, 48, 40)
    assert refusal(LINEAR, PruneMagnitude(), w=w[:, :1].copy()) == "has 48 elements, fewer than min_size=1024"
    assert refusal(LINEAR, PruneMagnitude(skip=("w",)), w=w) == "is named in skip"
    assert refusal(LINEAR, PruneMagnitude(overrides=("w=dense",)), w=w) == "is left dense by overrides"
    w[3, 3] = np.nan
    assert refusal(LINEAR, w=w) == "holds a weight that is infinite or not a number"
    assert (
        refusal(LINEAR, PruneMagnitude(density=0.5), w=w) == "holds a weight that is infinite or not a number"
    )
    w[3, 3] = np.inf
    assert refusal(LINEAR, w=w) == "holds a weight that is infinite or not a number"
    square = weight(rng, 48, 48)
    text = "g (float[t, 48] x) => (float[t, 48] y) <float[48, 48] w = {0}> { a = MatMul(x, w) %s }"
    assert "read both ways round" in refusal(text % "y = Gemm <transB = 1> (a, w)", w=square)
    assert "read by Mul" in refusal(text % "b = Mul(a, a) y = Mul(b, w)", w=square[:48])
    assert "graph output 'w'" in refusal(
        "g (float[t, 48] x) => (float[t, 48] y, float[48, 48] w) <float[48, 48] w = {0}> { y = MatMul(x, w) }",
        w=square,
    )


def test_an_encoded_weight_is_left_alone() -> None:
    from effic.passes.quantize.quantize_rtn import QuantizeRTN

    model = parse(LINEAR, w=weight(np.random.default_rng(0), 48, 40))
    QuantizeRTN().apply(model, Remarks())
    (remark,) = apply(PruneMagnitude(), model, None)
    assert remark.text == "is already encoded, in 4 bits; prune first, then encode"


HEAD = (
    "g (int64[t] ids) => (float[t, 96] y) <float[96, 48] table = {0}, float[48, 48] w = {0}, float[48, 96] out = {0}> "
    "{ e = Gather(table, ids) a = MatMul(e, w) y = MatMul(a, out) }"
)
TIED = (
    "g (int64[t] ids) => (float[t, 96] y) <float[96, 48] table = {0}, float[48, 48] w = {0}> "
    "{ e = Gather(table, ids) a = MatMul(e, w) o = Transpose <perm = [1, 0]> (table) y = MatMul(a, o) }"
)


def test_embeddings_and_the_head_are_pruned_on_request() -> None:
    rng = np.random.default_rng(0)
    weights = {"table": weight(rng, 96, 48), "w": weight(rng, 48, 48), "out": weight(rng, 48, 96)}
    for item, kept in (
        (PruneMagnitude(), {"w"}),
        (PruneMagnitude(head=True), {"w", "out"}),
        (PruneMagnitude(embeddings=True), {"w", "table"}),
    ):
        model = parse(HEAD, **weights)
        texts = {r.where: r.text for r in apply(item, model, None)}
        assert set(declared(model)) == kept
        assert item.head or texts["out"] == "scores the vocabulary (the head); ask for it with head=true"
        assert item.embeddings or texts["table"] == "is an embedding table; ask for it with embeddings=true"
    tied = {"table": weights["table"], "w": weights["w"]}
    for item, kept in (
        (PruneMagnitude(head=True), {"w"}),
        (PruneMagnitude(embeddings=True), {"w"}),
        (PruneMagnitude(embeddings=True, head=True), {"w", "table"}),
    ):
        model = parse(TIED, **tied)
        apply(item, model, None)
        assert set(declared(model)) == kept
    model = parse(TIED, **tied)
    data = Calibration.of([{"ids": np.arange(96)}])
    apply(PruneWanda(embeddings=True, head=True), model, data)
    assert set(declared(model)) == {"w", "table"}


def test_overrides_and_kinds() -> None:
    rng = np.random.default_rng(0)
    text = (
        "g (float[t, 48] x) => (float[t, 48] y) <float[48, 48] a = {0}, float[48, 48] b = {0}, float[48, 48] c = {0},"
        " float[48, 48] d = {0}> { p = MatMul(x, a) q = MatMul(p, b) r = MatMul(q, c) y = Gemm(r, d) }"
    )
    weights = {name: weight(rng, 48, 48) for name in "abcd"}
    model = parse(text, **weights)
    apply(PruneMagnitude(overrides=("a=1:4", "b=dense", "c=0.25"), kinds=("MatMul",)), model, None)
    assert declared(model) == {"a": Pattern(1, 4)}
    assert np.mean(values(model, "c") != 0) == pytest.approx(0.25, abs=0.001)
    for name in "bd":
        np.testing.assert_array_equal(values(model, name), weights[name])


def test_weights_of_subgraphs_are_pruned_where_no_data_are_needed() -> None:
    rng = np.random.default_rng(0)
    w = weight(rng, 48, 40)
    text = (
        "g (float[t, 48] x, bool p) => (float[t, 40] y) { y = If (p) <"
        "then_branch = yes () => (float[t, 40] a) <float[48, 40] w = {0}> { a = MatMul(x, w) }, "
        "else_branch = no () => (float[t, 40] b) <float[48, 40] v = {0}> { b = MatMul(x, v) }> }"
    )
    model = parse(text, w=w, v=w * 2)
    apply(PruneMagnitude(), model, None)
    assert declared(model) == {"w": Pattern(2, 4), "v": Pattern(2, 4)}
    model = parse(text, w=w, v=w * 2)
    data = Calibration.of([{"x": weight(rng, 8, 48), "p": np.array(True)}])
    for remark in apply(PruneWanda(), model, data):
        assert remark.kind == "missed"
        assert "inside a subgraph or function" in remark.text


@pytest.mark.parametrize("method", [PruneWanda, PruneSparseGPT])
def test_a_weight_of_two_layers_sees_the_inputs_of_both(method: type[OneShot]) -> None:
    rng = np.random.default_rng(0)
    w, x, z = weight(rng, 48, 40), correlated(rng, 200, 48), correlated(rng, 200, 48)
    text = (
        "g (float[t, 48] x, float[t, 48] z) => (float[t, 40] y) <float[48, 40] w = {0}> "
        "{ a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b) }"
    )
    model = parse(text, w=w)
    apply(method(), model, Calibration.of([{"x": x, "z": z}]))
    alone = parse(LINEAR, w=w)
    apply(method(), alone, Calibration.of([{"x": np.concatenate([x, z])}]))
    np.testing.assert_allclose(values(model), values(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n": 4, "m": 4}, "4:4 is no sparsity pattern"),
        ({"density": 0.5, "n": 1}, "n does nothing with density=0.5"),
        ({"density": 1.5}, "density is 1.5, the most is 1"),
        ({"overrides": ("w",)}, "override 'w' is not"),
        ({"overrides": ("w=4:2",)}, "4:2 is no sparsity pattern"),
        ({"overrides": ("w=2",)}, "is not PATTERN=N:M"),
        ({"overrides": ("=dense",)}, "is not PATTERN=N:M"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        PruneMagnitude(**options)


def test_that_zeros_make_nothing_faster_is_said() -> None:
    model = parse(LINEAR, w=weight(np.random.default_rng(0), 48, 40))
    remarks = Remarks()
    PruneMagnitude().apply(model, remarks)
    assert [r.text for r in remarks.items if r.where == "the model"] == [
        "zeros are stored and multiplied like any number: ONNX Runtime's CPU kernels get no faster by them; "
        "compress-nm makes the file smaller"
    ]
