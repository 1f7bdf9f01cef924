"""GPTQ on arrays: the invariants of the method."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.encodings import dequantize
from effic.ir.errors import UsageError
from effic.passes.quantize.affine import Grid, quantize
from effic.passes.quantize.gptq import GptqResult, factorise, gptq

Axis = Literal["oc", "ic"]
axes = st.sampled_from(["oc", "ic"])
seeds = st.integers(0, 10_000)
quick = settings(max_examples=30, deadline=None)


def moment(rng: np.random.Generator, inputs: int, rows: int = 200, groups: int = 1) -> np.ndarray:
    """Second moment of correlated inputs of very different size."""
    out = []
    for _ in range(groups):
        mix = np.eye(inputs) + 0.5 * rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
        x = rng.standard_normal((rows, inputs)) @ mix * np.exp(rng.standard_normal(inputs))
        out.append(x.T @ x / rows)
    return np.array(out, np.float32)


def grid_of(rng: np.random.Generator, *, group: int | None = None) -> Grid:
    group = int(rng.choice([-1, 3, 8, 16, 50])) if group is None else group
    return Grid(int(rng.choice([2, 3, 4, 8])), group, bool(rng.integers(2)))


def decoded(result: GptqResult, grid: Grid, axis: Axis) -> np.ndarray:
    run = 1 if axis == "oc" else 0
    block = grid.block(result.codes.shape[run])
    return dequantize(result.codes, result.scales, result.zero_points, run if block else 1 - run, block)


def nearest(weight: np.ndarray, grid: Grid, axis: Axis) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    kind = ir.DataType.INT8 if grid.symmetric else ir.DataType.UINT8
    done = quantize(np.ascontiguousarray(weight), 1 if axis == "oc" else 0, grid, kind)
    assert done is not None
    codes = done.packed.view(np.int8 if grid.symmetric else np.uint8).reshape(weight.shape)
    return codes, done.scales, done.zero_points


def objective(delta: np.ndarray, second: np.ndarray, damping: float = 0.0) -> float:
    """``tr(D H Dᵀ)``, all groups together, in float64."""
    total = 0.0
    for part, h in zip(np.split(delta.astype(float), len(second)), second.astype(float), strict=True):
        h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
        total += float(np.sum((part @ h) * part))
    return total


def same_levels(result: GptqResult, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> bool:
    return (
        np.array_equal(result.codes, codes)
        and np.array_equal(result.scales, scales)
        and (zeros is None or np.array_equal(result.zero_points, zeros))  # type: ignore[arg-type]
    )


@quick
@given(seeds, axes, st.integers(1, 70), st.booleans(), st.booleans())
def test_block_form_equals_the_naive_form_for_every_blocksize(
    seed: int, axis: Axis, blocksize: int, act_order: bool, static: bool
) -> None:
    """The naive form (inverts the trailing Hessian each column) gives each column's value from what was
    chosen before; the codes must be the nearest to it, ties within float32 aside."""
    rng = np.random.default_rng(seed)
    static = static or act_order
    out, inputs = int(rng.integers(1, 20)), int(rng.integers(1, 60))
    weight = rng.standard_normal((out, inputs)).astype(np.float32)
    second, grid = moment(rng, inputs), grid_of(rng)
    result = gptq(weight, second, grid, axis, blocksize=blocksize, act_order=act_order, static_groups=static)
    chosen = decoded(result, grid, axis).astype(float)

    h = second[0].astype(float)
    h += 0.01 * np.mean(np.diag(h)) * np.eye(inputs)
    order = np.argsort(-np.diag(second[0]), kind="stable") if act_order else np.arange(inputs)
    values, left, loss = weight.astype(float), list(order), 0.0
    run = grid.block(inputs) or inputs
    while left:
        i = left[0]
        if axis == "oc" and not static and i % run == 0:
            group = values[:, i : i + run]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
            scale = result.scales if result.scales.ndim == 1 else result.scales[:, i // run]
            wide = np.maximum(high, -low) if grid.symmetric else high - low
            assert np.allclose(
                np.abs(scale) * (-grid.lowest if grid.symmetric else grid.highest), wide, rtol=1e-3
            )
        if axis == "ic":
            _, scales, _ = nearest(values[:, i : i + 1].astype(np.float32), grid, "ic")
            # The sign says which of two nearly equal extremes won.
            mine = result.scales[..., i : i + 1]
            assert np.allclose(np.abs(mine), np.abs(scales), rtol=1e-3, atol=1e-5)
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        error = (values[:, i] - chosen[:, i]) / inverse[0, 0]
        # No other level of the group is nearer.
        step = np.abs(levels_of(result, grid, axis, i))
        distance = np.abs(values[:, i] - chosen[:, i]) / step
        column = result.codes[:, i]
        inside = (column > grid.lowest) & (column < grid.highest)
        assert (distance[inside] <= 0.5 + 1e-2).all()
        loss += float(np.sum((values[:, i] - chosen[:, i]) ** 2 / inverse[0, 0]))
        values[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    assert result.loss == pytest.approx(loss, rel=1e-3, abs=1e-9)


def levels_of(result: GptqResult, grid: Grid, axis: Axis, column: int) -> np.ndarray:
    """Scale of each weight of a column."""
    out, inputs = result.codes.shape
    if axis == "oc":
        run = grid.block(inputs)
        return result.scales[:, column // run] if run else result.scales
    run = grid.block(out)
    scale = result.scales[:, column] if run else result.scales[column : column + 1]
    return np.repeat(scale, run or out)[:out]


@quick
@given(seeds, axes)
def test_every_blocksize_gives_the_same_codes(seed: int, axis: Axis) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((6, 45)).astype(np.float32)
    second, grid = moment(rng, 45), Grid(4, 8)
    results = [gptq(weight, second, grid, axis, blocksize=b) for b in (1, 7, 8, 32, 45, 128)]
    for other in results[1:]:
        # Sums in another order: a weight halfway between two levels may go the other way.
        assert other.loss == pytest.approx(results[0].loss, rel=0.05)
        assert np.mean(other.codes != results[0].codes) < 0.1


@quick
@given(seeds, axes, st.booleans(), st.floats(1e-3, 1e3))
def test_a_multiple_of_the_identity_gives_rounding_to_nearest(
    seed: int, axis: Axis, act_order: bool, factor: float
) -> None:
    rng = np.random.default_rng(seed)
    out, inputs = int(rng.integers(1, 40)), int(rng.integers(1, 60))
    weight = rng.standard_normal((out, inputs)).astype(np.float32)
    grid = grid_of(rng)
    second = np.eye(inputs, dtype=np.float32)[None] * np.float32(factor)
    assert same_levels(gptq(weight, second, grid, axis, act_order=act_order), *nearest(weight, grid, axis))


@quick
@given(seeds, axes, st.integers(-20, 20))
def test_scaling_the_data_changes_nothing(seed: int, axis: Axis, power: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((9, 30)).astype(np.float32)
    second, grid = moment(rng, 30), grid_of(rng)
    second[0, 4] = second[0, :, 4] = 0  # a dead input must not set the scale
    one = gptq(weight, second, grid, axis)
    other = gptq(weight, second * np.float32(2.0**power) ** 2, grid, axis)
    assert same_levels(other, one.codes, one.scales, one.zero_points)


@quick
@given(seeds, axes, st.booleans())
def test_the_sum_of_squared_errors_is_the_damped_objective(seed: int, axis: Axis, act_order: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 4))
    weight = rng.standard_normal((4 * groups, 30)).astype(np.float32)
    second, grid = moment(rng, 30, groups=groups), grid_of(rng)
    result = gptq(weight, second, grid, axis, act_order=act_order, percdamp=0.05)
    delta = weight - decoded(result, grid, axis)
    assert result.loss == pytest.approx(objective(delta, second, 0.05), rel=1e-3, abs=1e-9)


@quick
@given(seeds, axes, st.booleans())
def test_a_weight_on_the_grid_stays(seed: int, axis: Axis, act_order: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((20, 30)).astype(np.float32)
    second, grid = moment(rng, 30), grid_of(rng)
    on_grid = decoded(GptqResult(*nearest(weight, grid, axis), 0.0, None, 0.0), grid, axis)
    again = decoded(gptq(on_grid, second, grid, axis, act_order=act_order), grid, axis)
    assert np.allclose(again, on_grid, rtol=1e-5, atol=1e-6)


@quick
@given(seeds, st.booleans())
def test_relabelling_inputs_only_relabels_the_result(seed: int, symmetric: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((5, 30)).astype(np.float32)
    second, grid = moment(rng, 30), Grid(4, -1, symmetric)
    shuffle = rng.permutation(30)
    one = gptq(weight, second, grid, "oc", act_order=True)
    other = gptq(weight[:, shuffle], second[:, shuffle][:, :, shuffle], grid, "oc", act_order=True)
    assert same_levels(other, one.codes[:, shuffle], one.scales, one.zero_points)


@quick
@given(seeds, axes, st.booleans())
def test_no_worse_than_rounding_to_nearest_on_correlated_inputs(
    seed: int, axis: Axis, act_order: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((64, 96)).astype(np.float32)
    second, grid = moment(rng, 96), grid_of(rng, group=16)
    ours = weight - decoded(gptq(weight, second, grid, axis, act_order=act_order), grid, axis)
    plain = weight - decoded(GptqResult(*nearest(weight, grid, axis), 0.0, None, 0.0), grid, axis)
    assert objective(ours, second) <= 1.05 * objective(plain, second)


@pytest.mark.parametrize("axis", ["oc", "ic"])
def test_groups_that_are_not_static_see_values_brought_up_to_date(axis: Axis) -> None:
    """Groups smaller than, larger than and not dividing the block: scales fit the weights they round,
    so nothing is clipped when errors of earlier columns have moved weights a lot."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((8, 60)).astype(np.float32)
    base = rng.standard_normal((400, 4)) @ rng.standard_normal((4, 60)) + 0.1 * rng.standard_normal((400, 60))
    second = (base.T @ base / 400)[None].astype(np.float32)
    for group in (4, 16, 25, 60):
        grid = Grid(4, group)
        results = [
            gptq(weight, second, grid, axis, blocksize=b, act_order=False, static_groups=False)
            for b in (1, 5, 16, 128)
        ]
        for other in results:
            assert np.allclose(other.scales, results[0].scales, rtol=1e-3, atol=1e-4)


def test_dead_inputs_get_zero_weights() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 20)).astype(np.float32)
    second = moment(rng, 20)
    second[0, [3, 7]] = second[0, :, [3, 7]] = 0
    for axis in ("oc", "ic"):
        for symmetric in (True, False):
            grid = Grid(4, 8, symmetric)
            result = gptq(weight, second, grid, axis)  # type: ignore[arg-type]
            assert not decoded(result, grid, axis)[:, [3, 7]].any()  # type: ignore[arg-type]
            assert result.fallback is None
    assert weight[:, 3].all(), "the weight given is not changed"


def test_a_layer_that_saw_only_zeros_is_rounded_to_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 20)).astype(np.float32)
    grid = Grid(4, 8)
    result = gptq(weight, np.zeros((1, 20, 20), np.float32), grid, "oc")
    assert same_levels(result, *nearest(weight, grid, "oc"))
    assert result.fallback == "rounded to nearest: its inputs were zero on all the data"


def test_a_singular_moment_is_damped() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 40)).astype(np.float32)
    weight = rng.standard_normal((8, 40)).astype(np.float32)
    result = gptq(weight, (x.T @ x)[None], Grid(4, 8), "oc")
    assert result.damping == 0.01
    assert result.fallback is None
    assert np.isfinite(result.scales).all()


def test_damping_is_retried_then_given_up() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 10)).astype(np.float32)
    second = moment(rng, 10)
    second[0] -= np.eye(10, dtype=np.float32) * (
        np.linalg.eigvalsh(second[0])[0] + 0.03 * np.diag(second[0]).mean()
    )
    tried = gptq(weight, second, Grid(4, -1), "oc")
    assert tried.damping == pytest.approx(0.1)
    assert tried.fallback is None
    second[0] = -np.abs(second[0])
    np.fill_diagonal(second[0], -1.0)
    given_up = gptq(weight, second, Grid(4, -1), "oc")
    assert same_levels(given_up, *nearest(weight, Grid(4, -1), "oc"))
    assert given_up.fallback is not None
    assert "no factor, with damping up to 10" in given_up.fallback
    second[:] = np.nan
    assert "no factor" in str(gptq(weight, second, Grid(4, -1), "ic").fallback)


@pytest.mark.parametrize("axis", ["oc", "ic"])
def test_convolution_groups_each_use_their_own_moment(axis: Axis) -> None:
    rng = np.random.default_rng(0)
    weight, second = rng.standard_normal((12, 9)).astype(np.float32), moment(rng, 9, groups=3)
    grid = Grid(4, 4)
    whole = gptq(weight, second, grid, axis, act_order=False)
    for g in range(3):
        part = gptq(weight[4 * g : 4 * g + 4], second[g : g + 1], grid, axis, act_order=False)
        assert np.array_equal(whole.codes[4 * g : 4 * g + 4], part.codes)
    # Groups of outputs may reach across convolution groups.
    across = gptq(weight, second, Grid(4, 5), "ic")
    assert across.scales.shape == (3, 9)
    assert np.isfinite(across.scales).all()
    # One that saw nothing is rounded to nearest, the others are not.
    second[1] = 0
    result = gptq(weight, second, grid, axis)
    assert result.fallback is not None
    assert result.fallback.startswith("1 of 3 groups rounded to nearest")
    codes, _, _ = nearest(weight, grid, axis)
    assert np.array_equal(result.codes[4:8], codes[4:8])


@pytest.mark.parametrize("axis", ["oc", "ic"])
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e30, 1e-42])
def test_constant_weights_are_exact_enough_and_never_nan(axis: Axis, value: float) -> None:
    weight = np.full((8, 20), value, np.float32)
    for symmetric in (True, False):
        grid = Grid(4, 8, symmetric)
        result = gptq(weight, moment(np.random.default_rng(0), 20), grid, axis)
        assert np.allclose(decoded(result, grid, axis), weight, rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("axis", ["oc", "ic"])
def test_weights_near_the_end_of_float32_never_give_nan(axis: Axis) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((8, 20)) * 1e38).clip(-3e38, 3e38).astype(np.float32)
    result = gptq(weight, moment(rng, 20), Grid(4, 8), axis)
    assert np.isfinite(result.scales).all()
    assert np.isfinite(decoded(result, Grid(4, 8), axis)).all()


def test_scales_are_rounded_to_the_dtype_of_the_weight() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 20)).astype(np.float16).astype(np.float32)
    second, grid = moment(rng, 20), Grid(4, 8, False)
    result = gptq(weight, second, grid, "oc", scale_dtype=np.float16)
    assert result.scales.dtype == np.float16
    delta = weight - decoded(result, grid, "oc").astype(np.float32)
    assert result.loss == pytest.approx(objective(delta, second, 0.01), rel=1e-3)


def test_a_factor_may_be_shared_by_layers_with_the_same_input() -> None:
    rng = np.random.default_rng(0)
    weight, second = rng.standard_normal((8, 20)).astype(np.float32), moment(rng, 20)
    factor = factorise(second)
    for axis in ("oc", "ic"):
        plain = gptq(weight, second, Grid(4, 8), axis)  # type: ignore[arg-type]
        shared = gptq(weight, second, Grid(4, 8), axis, factor=factor)  # type: ignore[arg-type]
        assert np.array_equal(plain.codes, shared.codes)


def test_refused_act_order_with_groups_that_are_not_static() -> None:
    weight = np.ones((4, 8), np.float32)
    with pytest.raises(UsageError, match="act_order needs static_groups"):
        gptq(weight, np.eye(8, dtype=np.float32)[None], Grid(4, 4), "oc", static_groups=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refused_weight_that_is_not_finite(bad: float) -> None:
    weight = np.ones((4, 8), np.float32)
    weight[2, 3] = bad
    with pytest.raises(UsageError, match="infinity or NaN"):
        gptq(weight, np.eye(8, dtype=np.float32)[None], Grid(4, 4), "oc")
