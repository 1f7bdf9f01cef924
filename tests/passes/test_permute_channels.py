"""permute-channels: the search finds what there is, scores never fall, outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import Pattern, nm_mask
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes.base import Pass, Remarks
from effic.passes.calibration import Calibration
from effic.passes.pipeline import Checker, run_passes
from effic.passes.sparsify.channel_scores import columns_of
from effic.passes.sparsify.permutation_search import kept_score, search
from effic.passes.sparsify.permute_channels import PermuteChannels
from effic.passes.sparsify.prune_magnitude import PruneMagnitude
from effic.passes.spec import parse_passes

MakeNet = Callable[..., Model]
Check = Callable[[Model, Pass], Remarks]
TWO_FOUR = Pattern(2, 4)


def heavy(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Weights whose columns differ in size, as trained ones do."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal(columns))).astype(np.float32)


def partitions(columns: tuple[int, ...], m: int) -> list[list[int]]:
    """Every way to cut columns into groups of m, as orders."""
    from itertools import combinations

    if not columns:
        return [[]]
    result = []
    for rest in combinations(columns[1:], m - 1):
        group = (columns[0], *rest)
        result += [[*group, *more] for more in partitions(tuple(c for c in columns if c not in group), m)]
    return result


# -- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "window", "count"), [(8, 2, 35), (12, 3, 5775)])
def test_a_window_as_wide_as_the_matrix_is_solved_exactly(columns: int, window: int, count: int) -> None:
    for seed in range(4 if columns == 8 else 1):
        score = np.abs(np.random.default_rng(seed).standard_normal((9, columns))).astype(np.float32)
        orders = partitions(tuple(range(columns)), 4)
        assert len(orders) == count
        best = max(kept_score(score, TWO_FOUR, np.array(order)) for order in orders)
        found = search(score, TWO_FOUR, window=window, escape_attempts=0)
        assert found.after == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "columns"), [(1, 2, 6), (1, 3, 9), (2, 4, 6), (3, 4, 7), (1, 4, 11)])
def test_other_patterns_and_ragged_ends_come_near_brute_force(n: int, m: int, columns: int) -> None:
    from itertools import permutations

    score = np.abs(heavy(7, columns))
    pattern = Pattern(n, m)
    found = search(score, pattern)
    if columns <= 7:
        best = max(kept_score(score, pattern, np.array(order)) for order in permutations(range(columns)))
        assert found.after == pytest.approx(best, rel=1e-6)
    assert found.after > found.before


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 26),
    pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 2), (2, 3)]),
    exhaustive=st.booleans(),
    window=st.sampled_from([2, 3]),
    seed=st.integers(0, 2**20),
)
def test_property_a_permutation_that_keeps_no_less_and_is_found_once(
    rows: int, columns: int, pattern: tuple[int, int], exhaustive: bool, window: int, seed: int
) -> None:
    score = np.abs(heavy(rows, columns, seed))
    score[np.random.default_rng(seed).random(score.shape) < 0.1] = 0
    what = Pattern(*pattern)
    options = {"exhaustive": exhaustive, "window": window, "escape_attempts": 5, "seed": seed}
    found = search(score, what, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.sort(found.order), np.arange(columns))
    assert found.before == pytest.approx(float(score[nm_mask(score, what)].sum(dtype=np.float64)), rel=1e-6)
    assert found.after == pytest.approx(kept_score(score, what, found.order), rel=1e-9)
    assert found.after >= found.before
    again = search(score, what, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.order, found.order)
    # On its own result, with rows in another order, it finds nothing worth the name.
    rest = search(score[::-1, found.order], what, **options)  # type: ignore[arg-type]
    assert rest.after - rest.before <= 1e-4 * max(rest.before, 1e-30)


def test_a_sampled_table_gains_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from effic.passes.sparsify import permutation_search

    score = np.abs(heavy(300, 96))
    whole = search(score, TWO_FOUR, escape_attempts=0)
    monkeypatch.setattr(permutation_search, "_PAIR_WORK", 0.0)
    monkeypatch.setattr(permutation_search, "_SWAP_WORK", 100 * 96**2)
    sampled = search(score, TWO_FOUR, escape_attempts=5)
    assert (whole.rows, sampled.rows) == (300, 100)
    assert sampled.after - sampled.before > 0.8 * (whole.after - whole.before)
    again = search(score[:, sampled.order], TWO_FOUR, escape_attempts=5)
    assert again.after - again.before <= 1e-4 * again.before


def test_columns_alone_in_their_groups_straddling_ones_and_whole_groups() -> None:
    alone = np.arange(8)[None]
    assert columns_of(alone, 8, 8, TWO_FOUR) is alone
    assert columns_of(alone + 4, 20, 20, TWO_FOUR) is not None
    assert isinstance(columns_of(alone + 2, 12, 12, TWO_FOUR), str)
    assert isinstance(columns_of(np.arange(6)[None], 12, 12, TWO_FOUR), str)
    # A ragged tail may be the channels' own.
    assert not isinstance(columns_of(np.arange(6)[None] + 4, 10, 10, TWO_FOUR), str)
    # Channels of 4 columns each move whole groups; of 2 columns each, halves.
    assert columns_of(np.arange(12).reshape(3, 4).T, 12, 12, TWO_FOUR) is None
    assert isinstance(columns_of(np.arange(12).reshape(6, 2).T, 12, 12, TWO_FOUR), str)
    # Groups begin anew in every convolution group.
    assert isinstance(columns_of(np.arange(12)[None], 12, 6, TWO_FOUR), str)


# -- the pass -------------------------------------------------------------------------------------


def mlp(make_net: MakeNet, **more: np.ndarray) -> Model:
    weights = {"w1": heavy(24, 64, 1), "b": heavy(1, 64, 2)[0], "w2": heavy(40, 64, 3).T.copy(), **more}
    return make_net(
        "(float[N,24] x) => (float[N,40] y)", "h = MatMul(x, w1) g = Add(h, b) a = Relu(g) y = MatMul(a, w2)", **weights
    )  # fmt: skip


def energy(model: Model) -> float:
    """Magnitude that 2:4 keeps of all weights that prune-magnitude takes by default."""
    remarks = Remarks()
    PruneMagnitude().apply(model, remarks)
    return sum(
        float(np.abs(site.read()).sum(dtype=np.float64))
        for site in weight_sites(model)
        if site.name in {r.where for r in remarks.items if r.kind == "passed"}
    )


def test_what_pruning_keeps_rises_and_the_outputs_stay(make_net: MakeNet, check: Check) -> None:
    model = mlp(make_net)
    before = energy(model.clone())
    remarks = check(model, PermuteChannels())
    (done,) = [r for r in remarks.items if r.kind == "passed"]
    assert done.where == "w2"
    assert done.data["kept_after"] > 1.02 * done.data["kept_before"]
    # w1 is pruned too, and reads the graph input: its score stays what it was.
    assert energy(model) - before == pytest.approx(
        done.data["kept_after"] - done.data["kept_before"], rel=1e-3
    )
    assert [(r.where, r.text) for r in remarks.items if r.kind == "missed"] == [
        ("w1", "24 input channels come from the graph input 'x'")
    ]


@pytest.mark.parametrize("built", ["cnn", "encoder", "llama"])
@pytest.mark.parametrize(
    "options", ["", "{search=channel_swap,escape_attempts=3}", "{n=1,m=8,escape_attempts=3}"]
)
def test_builders_keep_their_outputs_and_gain(built: str, options: str) -> None:
    model = Model(BUILDERS[built]())
    kept = energy(model.clone())
    (step,) = run_passes(model, parse_passes(f"permute-channels{options}"), checker=Checker(model)).steps
    assert step.passed
    assert all(r.data["kept_after"] > r.data["kept_before"] for r in step.remarks if r.kind == "passed")
    if not options:
        assert energy(model) > kept


def test_wanda_scores_count_the_inputs(make_net: MakeNet) -> None:
    model = mlp(make_net)
    data = Calibration.of([{"x": heavy(50, 24, 9)}])
    with pytest.raises(UsageError, match="calibration data"):
        run_passes(model.clone(), [PermuteChannels(score="wanda")], check="off")
    by_magnitude = model.clone()
    run_passes(by_magnitude, [PermuteChannels()], check="off")
    run_passes(model, [PermuteChannels(score="wanda")], checker=Checker(model), calibration=data)
    again = run_passes(model, [PermuteChannels(score="wanda")], check="off", calibration=data)
    assert not again.steps[0].changed

    def kept(net: Model) -> float:
        site = next(s for s in weight_sites(net) if s.name == "w2")
        ((_, seen),) = data.walk(net, [site], second_moment=False)
        return kept_score(np.abs(site.read()) * np.sqrt(seen.mean_square), TWO_FOUR)

    assert kept(model) > kept(by_magnitude)


def test_pruned_shared_and_skipped_weights(make_net: MakeNet, check: Check) -> None:
    model = mlp(make_net)
    run_passes(model, [PruneMagnitude()], check="off")
    remarks = check(model, PermuteChannels())
    assert not remarks.count("passed")
    assert any("pruned to 2:4 already; permute first" in r.text for r in remarks.items)
    remarks = check(mlp(make_net), PermuteChannels(skip=("w2",)))
    assert not remarks.count("passed")
    assert ("w2", "does not count: is named in skip") in [(r.where, r.text) for r in remarks.items]


def test_straddling_groups_whole_groups_and_not_finite(make_net: MakeNet, check: Check) -> None:
    wide = {"w1": heavy(24, 30), "w2": heavy(24, 34), "w3": heavy(64, 40)}
    net = (
        "(float[N,24] x) => (float[N,40] y)",
        "a = MatMul(x, w1) b = MatMul(x, w2) c = Concat <axis=1> (a, b) y = MatMul(c, w3)",
    )
    texts = [r.text for r in check(make_net(*net, **wide), PermuteChannels(skip=("w1", "w2"))).items]
    assert sum("share groups of 4 with channels that move apart" in text for text in texts) == 2
    bad = heavy(40, 64, 3).T.copy()
    bad[3, 3] = np.inf
    remarks = Remarks()
    PermuteChannels().apply(mlp(make_net, w2=bad), remarks)
    assert ("w2", "holds a weight that is infinite or not a number") in [
        (r.where, r.text) for r in remarks.items
    ]
    heads = make_net(
        net[0],
        "h = MatMul(x, w1) f = Reshape(h, s) t = Transpose <perm=[0,2,1]> (f) "
        "g = Reshape(t, m) y = MatMul(g, w2)",
        w1=heavy(24, 64), s=np.array([0, 4, 16]), m=np.array([0, 64]), w2=heavy(64, 40),
    )  # fmt: skip
    remarks = check(heads, PermuteChannels(skip=("w1",)))
    assert [r.text for r in remarks.items if "whole groups" in r.text or "one group" in r.text]


def test_grouped_and_transposed_convolutions_count_inside_their_groups(
    make_net: MakeNet, check: Check
) -> None:
    model = make_net(
        "(float[N,3,6,6] x) => (float[N,5,m,k] y)",
        "h = Conv(x, w1) d = ConvTranspose <group=2> (h, wt) e = Conv <group=2> (d, wg) y = Conv(e, w2)",
        w1=heavy(32, 3).reshape(32, 3, 1, 1), wt=heavy(32, 64, 4).reshape(32, 16, 2, 2),
        wg=heavy(24, 16 * 9, 5).reshape(24, 16, 3, 3), w2=heavy(5, 24).reshape(5, 24, 1, 1),
    )  # fmt: skip
    kept = energy(model.clone())
    remarks = check(model, PermuteChannels())
    assert {r.where for r in remarks.items if r.kind == "passed"} == {"wt", "wg"}
    assert energy(model) > kept


def test_subgraphs_are_said(check: Check) -> None:
    texts = [r.text for r in check(Model(BUILDERS["control_flow"]()), PermuteChannels()).items]
    assert texts
    assert all(text.startswith("does not count") for text in texts)


def test_large_scores_are_sampled_and_judged_whole(
    make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effic.passes.sparsify import permute_channels

    whole, part = mlp(make_net), mlp(make_net)
    results = []
    for model in (whole, part):
        (step,) = run_passes(model, [PermuteChannels()], checker=Checker(model)).steps
        results += [r.data for r in step.remarks if r.kind == "passed"]
        monkeypatch.setattr(permute_channels, "_MOST_SCORES", 15 * 64)
    assert results[1]["kept_before"] == pytest.approx(results[0]["kept_before"])
    assert results[0]["kept_before"] < results[1]["kept_after"] <= 1.01 * results[0]["kept_after"]
    assert results[1]["rows_in_table"] < results[0]["rows_in_table"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("permute-channels{n=4}", "4:4 is no sparsity pattern"),
        ("permute-channels{window=10}", "allowed are 8, 12"),
        ("permute-channels{search=channel_swap,window=12}", "does nothing with"),
        ("permute-channels{m=5,window=12}", "window does nothing with m=5"),
    ],
)
def test_options_are_checked(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_passes(text)


def test_the_file_runs_alike_and_pruning_it_keeps_more(make_net: MakeNet, tmp_path: Path) -> None:
    model = Model(BUILDERS["cnn"]())
    inputs, want = runnable_inputs(model, Oracle(model, optimized=True))
    run_passes(model, [PermuteChannels()], check="off")
    model.save(tmp_path / "out.onnx")
    again = read_onnx(tmp_path / "out.onnx")
    assert compare_outputs(want, Oracle(again, optimized=True).run(inputs)).max_rel < 1e-5
    run_passes(again, [PruneMagnitude()], check="off")
    plain = Model(BUILDERS["cnn"]())
    run_passes(plain, [PruneMagnitude()], check="off")

    def magnitude(net: Model) -> float:
        return sum(float(np.abs(site.read()).sum()) for site in weight_sites(net))

    assert magnitude(again) > magnitude(plain)
