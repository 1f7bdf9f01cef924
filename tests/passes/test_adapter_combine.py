"""Several adapters on one weight: the invariants of every mode, and what peft makes of the same adapters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.passes.adapters import combine
from effic.passes.adapters.adapter_files import AdapterModule, read_adapter
from effic.passes.adapters.combine import agreed, combined_delta, largest, weighted
from effic.passes.adapters.deltas import module_delta

seeds = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)
OUT, INTO = 7, 12
MODES = ["delta_sum", "cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
WIDE = {"dtype": np.float64}
Items = list[tuple[AdapterModule, float]]


def adapters(seed: int, ranks: Sequence[int] = (3, 3, 3), **fields: Any) -> Items:
    rng = np.random.default_rng(seed)
    found: Items = []
    for i, rank in enumerate(ranks):
        a, b = rng.normal(size=(rank, INTO)), rng.normal(size=(OUT, rank))
        module = AdapterModule("fc", "linear", a, b, rank, scaling=0.5 + i, alpha=(0.5 + i) * rank)
        found.append((dataclasses.replace(module, adapter=f"a{i}", **fields), float(rng.normal())))
    return found


def base(seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 1]).normal(size=(OUT, INTO))


def total(items: Items, weight: np.ndarray) -> np.ndarray:
    return np.asarray(sum(w * module_delta(m, weight, **WIDE) for m, w in items))


# -- invariants ------------------------------------------------------------------------------------


@quick
@given(seeds)
def test_delta_sum_and_cat_are_the_weighted_sum(seed: int) -> None:
    items, w = adapters(seed, (1, 2, 4)), base(seed)
    for mode in ("delta_sum", "cat"):
        assert np.allclose(combined_delta(items, w, combine=mode, **WIDE), total(items, w), atol=1e-10)


@quick
@given(seeds, st.sampled_from(MODES), st.sampled_from(["delta", "factors"]), st.booleans())
def test_permuting_adapters_changes_nothing(seed: int, mode: Any, space: Any, compat: bool) -> None:
    items, w = adapters(seed), base(seed)
    found = [
        combined_delta(order, w, combine=mode, space=space, peft_compat=compat)
        for order in (items, items[::-1], [items[1], items[2], items[0]])
    ]
    assert found[0].dtype == np.float32
    assert all(np.array_equal(found[0], other) for other in found[1:])


@quick
@given(seeds)
def test_svd_error_is_the_tail_and_falls_with_the_rank(seed: int) -> None:
    items, w = adapters(seed, (2, 3, 1)), base(seed)
    wanted = total(items, w)
    values = np.linalg.svd(wanted, compute_uv=False)
    errors = []
    for rank in range(1, 8):
        found = combined_delta(items, w, combine="svd", svd_rank=rank, **WIDE)
        assert np.linalg.matrix_rank(found, tol=1e-9) <= rank
        errors.append(float(np.linalg.norm(found - wanted)))
        assert errors[-1] == pytest.approx(math.sqrt(np.square(values[rank:]).sum()), abs=1e-9)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    # By default the largest of the ranks.
    found = combined_delta(items, w, combine="svd", **WIDE)
    assert np.array_equal(found, combined_delta(items, w, combine="svd", svd_rank=3, **WIDE))


@quick
@given(seeds)
def test_svd_of_full_rank_is_delta_sum(seed: int) -> None:
    items, w = adapters(seed, (2, 1)), base(seed)
    assert np.array_equal(combined_delta(items, w, combine="svd", svd_rank=3), combined_delta(items, w))


@quick
@given(seeds, st.sampled_from(["delta", "factors"]))
def test_density_one_prunes_nothing(seed: int, space: Any) -> None:
    items, w = adapters(seed), base(seed)
    linear = total(items, w) if space == "delta" else combined_delta(items, w, combine="linear", **WIDE)
    for mode in ("dare_linear", "magnitude_prune"):
        found = combined_delta(items, w, combine=mode, space=space, density=1.0, **WIDE)  # type: ignore[arg-type]
        assert np.allclose(found, linear, atol=1e-10)
    ties, dare = (
        combined_delta(items, w, combine=mode, space=space, density=1.0, **WIDE)  # type: ignore[arg-type]
        for mode in ("ties", "dare_ties")
    )
    assert np.array_equal(ties, dare)


@quick
@given(seeds)
def test_ties_without_conflicts_is_the_mean_of_those_that_have_the_entry(seed: int) -> None:
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], (OUT, INTO))
    tensors = [signs * rng.integers(0, 3, (OUT, INTO)) for _ in range(3)]
    weights = [0.5, 2.0, 1.0]
    count = np.maximum(sum((t != 0).astype(float) for t in tensors), 1)
    for sign in ("total", "frequency"):
        assert np.allclose(agreed(tensors, weights, sign), weighted(tensors, weights) / count)


def test_ties_votes() -> None:
    tensors = [
        np.array([3.0, 1.0, -1.0, 0.0]),
        np.array([-1.0, -1.0, -1.0, 0.0]),
        np.array([-1.0, 0.0, 4.0, 0.0]),
    ]
    # Even sums and zeros count as positive; zeros are never kept.
    assert np.array_equal(agreed(tensors, [1, 1, 1], "total"), [3, 1, 4, 0])
    assert np.array_equal(agreed(tensors, [1, 1, 1], "frequency"), [-1, 1, -1, 0])
    assert np.array_equal(agreed(tensors, [1, 1, -2], "total"), [3, 1, -8, 0])


@quick
@given(seeds, st.floats(0.01, 1.0))
def test_the_largest_entries_are_kept(seed: int, density: float) -> None:
    tensor = np.random.default_rng(seed).integers(-4, 5, (5, 9)).astype(np.float32)
    kept = largest(tensor, density)
    count = int(density * tensor.size)
    where = kept != 0
    assert np.array_equal(kept[where], tensor[where])
    assert where.sum() == min(count, np.count_nonzero(tensor))
    if where.any() and not where.all():
        assert np.abs(tensor[where]).min() >= np.abs(tensor[~where]).max()


def test_dare_keeps_the_mean_and_the_density() -> None:
    items, w = adapters(3), base()
    drawn = [
        combined_delta(items[:1], w, combine="dare_linear", density=0.3, seed=seed, **WIDE)
        for seed in range(2000)
    ]
    share = float(np.mean([np.count_nonzero(d) / d.size for d in drawn]))
    assert share == pytest.approx(0.3, abs=0.005)
    wanted = total(items[:1], w)
    # Standard error: |ΔW|·√((1 - p)/p / n).
    assert (np.abs(np.mean(drawn, axis=0) - wanted) <= 5 * np.abs(wanted) * math.sqrt(0.7 / 0.3 / 2000)).all()


def test_a_seed_decides_and_adapters_draw_apart() -> None:
    items, w = adapters(3), base()
    one, again, other = (
        combined_delta(items, w, combine="dare_ties", seed=seed, density=0.5) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    masks = [combined_delta([(m, 1.0)], w, combine="dare_linear", seed=1) != 0 for m, _ in items[:2]]
    assert not np.array_equal(*masks)


@quick
@given(seeds, st.sampled_from(["delta_sum", "cat", "linear"]))
def test_one_adapter_is_merged_as_it_is(seed: int, mode: Any) -> None:
    items, w = adapters(seed, (3,)), base(seed)
    assert np.allclose(combined_delta(items, w, combine=mode, **WIDE), total(items, w), atol=1e-12)


def test_linear_has_cross_terms() -> None:
    (one, _), (two, _) = items = [(m, 1.0) for m, _ in adapters(5, (3, 3))]
    w = base()
    found = combined_delta(items, w, combine="linear", **WIDE)
    assert one.a is not None
    assert one.b is not None
    assert two.a is not None
    assert two.b is not None
    root = math.sqrt(one.scaling * two.scaling)
    cross = root * (one.b @ two.a + two.b @ one.a)
    assert np.allclose(found, total(items, w) + cross, atol=1e-10)


def test_experts_are_combined_one_by_one() -> None:
    rng = np.random.default_rng(0)
    items: Items = []
    for i in range(2):
        a, b = rng.normal(size=(4 * 2, INTO)), rng.normal(size=(OUT, 2 * 4))
        items.append((AdapterModule("e", "expert", a, b, 2, experts=4, adapter=f"a{i}"), 1.0 + i))
    w = rng.normal(size=(4, OUT, INTO))
    found = combined_delta(items, w, combine="svd", svd_rank=1, **WIDE)
    for e in range(4):
        u, s, vt = np.linalg.svd(total(items, w)[e])
        assert np.allclose(found[e], s[0] * np.outer(u[:, 0], vt[0]), atol=1e-10)
    for mode in PRUNING:
        assert combined_delta(items, w, combine=mode, space="factors").shape == w.shape  # type: ignore[arg-type]


def test_dora_is_merged_first_whatever_the_order() -> None:
    items, w = [(m, 1.0) for m, _ in adapters(1)], base()
    items[1] = (dataclasses.replace(items[1][0], magnitude=np.ones(OUT)), 1.0)
    dora = w + module_delta(items[1][0], w, **WIDE)
    merged = dora + total([items[0], items[2]], w)
    for order in (items, items[::-1]):
        assert np.allclose(w + combined_delta(order, w, **WIDE), merged, atol=1e-10)


def test_other_kinds_are_summed_with_lora() -> None:
    w = base()
    extra = {"paca_w": np.ones((OUT, 2)), "paca_indices": np.array([4, 1])}
    paca = AdapterModule("fc", rank=2, method="paca", extra=extra, adapter="p")
    items = [*adapters(2), (paca, 1.0)]
    assert np.allclose(combined_delta(items, w, **WIDE), total(items, w), atol=1e-10)
    assert np.allclose(combined_delta([(paca, 0.5)], w, **WIDE), total([(paca, 0.5)], w), atol=1e-10)
    with pytest.raises(UsageError, match="'fc' of adapter 'p' is of a paca adapter"):
        combined_delta(items, w, combine="ties", space="factors")


@quick
@given(seeds, st.sampled_from(["delta_sum", "svd", "ties"]))
def test_dylora_is_cut_before_it_is_combined(seed: int, mode: Any) -> None:
    items, w = adapters(seed), base(seed)
    short = [
        (dataclasses.replace(m, a=m.a[:1], b=m.b[:, :1], rank=1, scaling=m.alpha), weight)  # type: ignore[index]
        for m, weight in items
    ]
    found = combined_delta(items, w, combine=mode, rank=1, svd_rank=2 if mode == "svd" else None, **WIDE)
    wanted = combined_delta(short, w, combine=mode, svd_rank=2 if mode == "svd" else None, **WIDE)
    assert np.allclose(found, wanted, atol=1e-10)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "mean"}, "combine is 'mean'"),
        ({"combine": "ties", "space": "rows"}, "space is 'rows'"),
        ({"combine": "ties", "sign": "odd"}, "sign is 'odd'"),
        ({"combine": "ties", "density": 0.0}, "density is 0.0"),
        ({"combine": "ties", "density": 1.5}, "density is 1.5"),
        ({"combine": "svd", "svd_rank": 0}, "svd_rank is 0"),
        ({"combine": "cat", "svd_rank": 2}, "no rank to choose"),
        ({"combine": "ties", "space": "factors", "svd_rank": 2}, "no rank to choose"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        combined_delta(adapters(0), base(), **options)


@pytest.mark.parametrize("mode", ["linear", *PRUNING])
def test_factors_of_other_ranks_are_refused(mode: Any) -> None:
    with pytest.raises(UsageError, match=r"module 'fc' of adapter 'a\d' has rank \d, but"):
        combined_delta(adapters(0, (2, 3)), base(), combine=mode, space="factors")


def test_what_is_no_sum_is_refused() -> None:
    items = [(m, 1.0) for m, _ in adapters(1, magnitude=np.ones(OUT))]
    with pytest.raises(UsageError, match="'fc' of adapter 'a1' rescales its whole weight"):
        combined_delta(items, base())
    plain = [(m, 1.0) for m, _ in adapters(2)]
    with pytest.raises(UsageError, match="'fc' of adapter 'a0' has DoRA, whose change is no sum"):
        combined_delta([items[0], plain[1]], base(), combine="ties")
    with pytest.raises(UsageError, match="with weight 1"):
        combined_delta([(items[0][0], 0.5)], base())
    assert np.array_equal(
        combined_delta(items[:1], base(), combine="linear"), module_delta(items[0][0], base())
    )
    with pytest.raises(UsageError, match="which PEFT does not combine"):
        combined_delta(items[:1], base(), combine="linear", peft_compat=True)
    with pytest.raises(UsageError, match="at least one"):
        combined_delta([], base())
    with pytest.raises(UsageError, match="weight nan"):
        combined_delta([(plain[0][0], math.nan)], base())
    started = [(dataclasses.replace(m, init="pissa"), w) for m, w in plain]
    with pytest.raises(UsageError, match="init_lora_weights=pissa"):
        combined_delta(started, base(), combine="linear")


# -- against peft ----------------------------------------------------------------------------------

TARGETS = ["fc", "conv", "point", "table"]
ALPHAS = (8, 2, 5)
WEIGHTS = (0.7, -1.3, 0.4)


def tiny_net() -> Any:
    torch = pytest.importorskip("torch")
    net = torch.nn.Module()
    net.fc = torch.nn.Linear(10, 8)
    net.conv = torch.nn.Conv2d(4, 6, 3)
    net.point = torch.nn.Conv2d(4, 6, 1)
    net.table = torch.nn.Embedding(20, 6)
    return net


class Peft:
    """A model with adapters, saved to folders; combines them as peft does."""

    def __init__(self, folder: Path, double: bool, ranks: Sequence[int] = (4, 4, 4), **config: Any) -> None:
        torch = pytest.importorskip("torch")
        peft = pytest.importorskip("peft")
        torch.manual_seed(7)
        model = tiny_net().double() if double else tiny_net()
        self.before = {k: v.detach().numpy().copy() for k, v in model.state_dict().items()}
        self.double = double
        self.names = [f"a{i}" for i in range(len(ranks))]
        for name, rank, alpha in zip(self.names, ranks, ALPHAS, strict=False):
            told = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, **config)
            if name == "a0":
                self.model = peft.get_peft_model(model, told, adapter_name=name)
            else:
                self.model.add_adapter(name, told)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape, dtype=torch.float32))
        self.model.save_pretrained(str(folder))
        self.adapters = [read_adapter(folder / name) for name in self.names]
        self.weights = WEIGHTS[: len(ranks)]

    def combined(self, mode: str, **options: Any) -> dict[str, np.ndarray]:
        self.model.add_weighted_adapter(
            self.names, list(self.weights), "all", combination_type=mode, **options
        )
        self.model.set_adapter("all")
        merged = self.model.merge_and_unload().state_dict()
        return {k: v.detach().numpy() for k, v in merged.items()}

    def agrees(self, after: dict[str, np.ndarray], tolerance: float | None = None, **options: Any) -> None:
        for path in TARGETS:
            weight, wanted = self.before[f"{path}.weight"], after[f"{path}.weight"]
            items = [(a.modules[path], w) for a, w in zip(self.adapters, self.weights, strict=True)]
            delta = combined_delta(items, weight, dtype=np.float64 if self.double else np.float32, **options)
            error = np.abs(weight + delta.reshape(weight.shape) - wanted).max()
            assert not np.array_equal(weight, wanted)
            assert error <= (1e-10 if self.double else 1e-5) * np.abs(wanted).max(), path


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("mode", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_combined_as_peft_combines(tmp_path: Path, mode: Any, sign: Any, double: bool) -> None:
    told = {"density": 0.4} if mode in PRUNING else {}
    signs = {"majority_sign_method": sign} if mode == "ties" else {}
    other = Peft(tmp_path, double)
    after = other.combined(mode, **told, **signs)
    other.agrees(after, combine=mode, space="factors", sign=sign, peft_compat=True, **told)
    if mode in ("linear", "cat", "svd") and not double:
        # σ enters once here as there; without peft_compat only roundings of the weights differ.
        other.agrees(after, combine=mode)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("mode", ["svd", "ties", "magnitude_prune"])
def test_deltas_cut_to_a_rank_as_peft_cuts_them(tmp_path: Path, mode: Any, double: bool) -> None:
    told = {"density": 0.4} if mode in PRUNING else {}
    other = Peft(tmp_path, double, (2, 4, 3))
    after = other.combined(mode if mode == "svd" else f"{mode}_svd", svd_rank=3, **told)
    other.agrees(after, combine=mode, space="delta", svd_rank=3, peft_compat=True, **told)


@pytest.mark.parametrize("double", [False, True])
def test_ranks_that_differ_are_concatenated_as_by_peft(tmp_path: Path, double: bool) -> None:
    other = Peft(tmp_path, double, (2, 4, 3))
    after = other.combined("cat")
    other.agrees(after, combine="cat", peft_compat=True)
    other.agrees(after, combine="delta_sum")


@pytest.mark.parametrize("mode", ["linear", "cat", "svd"])
def test_rslora_as_peft_combines_it(tmp_path: Path, mode: Any) -> None:
    other = Peft(tmp_path, True, use_rslora=True)
    other.agrees(other.combined(mode), combine=mode, peft_compat=True)


@pytest.mark.parametrize("mode", ["ties", "svd"])
def test_a_single_adapter_as_peft_adds_it(tmp_path: Path, mode: Any) -> None:
    told = {"density": 0.4} if mode in PRUNING else {}
    other = Peft(tmp_path, False, (4,))
    other.agrees(other.combined(mode, **told), combine=mode, peft_compat=True, **told)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("space", ["delta", "factors"])
@pytest.mark.parametrize("mode", ["dare_linear", "dare_ties"])
def test_random_modes_as_peft_combines_with_its_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, space: Any, double: bool
) -> None:
    torch = pytest.importorskip("torch")
    other = Peft(tmp_path, double)
    real = torch.bernoulli
    drawn: list[np.ndarray] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        mask = real(*args, **kwargs)
        drawn.append(mask.numpy().astype(bool))
        return mask

    monkeypatch.setattr(torch, "bernoulli", recording)
    after = other.combined(mode if space == "factors" else f"{mode}_svd", density=0.6)
    # peft draws module by module, A before B, adapter by adapter.
    masks: dict[tuple[int, ...], np.ndarray] = {}
    queue = iter(drawn)
    for path in TARGETS:
        contents = [combine._content(adapter.modules[path]) for adapter in other.adapters]
        for part in (0, 1) if space == "factors" else (2,):
            for content in contents:
                masks[part, content] = next(queue)

    def replayed(shape: tuple[int, ...], density: float, seed: tuple[int, int, int]) -> np.ndarray:
        return masks[seed[1:]].reshape(shape)

    monkeypatch.setattr(combine, "_drawn", replayed)
    other.agrees(after, combine=mode, space=space, density=0.6, peft_compat=True)
