from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.passes.quantize.ranges import (
    LEVELS,
    Thresholds,
    byte_grid,
    candidates,
    squared_error,
    thresholds,
)
from effic.passes.statistics import RangeAccumulator, RangeStatistics

METHODS = ("minmax", "percentile", "entropy", "mse")


def statistics_of(*arrays: np.ndarray) -> RangeStatistics:
    sums = RangeAccumulator(2048)
    for array in arrays:
        sums.add(np.asarray(array, np.float32))
    return sums.finish()


kinds = st.sampled_from(
    ["normal", "rectified", "long tail", "constant", "negative", "uniform", "one outlier"]
)


def draw(kind: str, seed: int, scale: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.standard_normal(4000),
        "rectified": np.maximum(rng.standard_normal(4000), 0),
        "long tail": rng.standard_t(2, 4000),
        "constant": np.full(100, 0.7),
        "negative": -np.abs(rng.standard_normal(1000)) - 1,
        "uniform": rng.uniform(-1, 3, 4000),
        "one outlier": np.append(rng.standard_normal(4000), 300.0),
    }[kind]
    return (values * scale).astype(np.float32)


tensors = st.builds(draw, kinds, st.integers(0, 50), st.sampled_from([1e-6, 0.1, 1.0, 1e4]))


@settings(deadline=None, max_examples=80)
@given(tensors, st.sampled_from(METHODS))
def test_every_range_holds_zero_and_stays_within_what_was_seen(array: np.ndarray, method: str) -> None:
    low, high = thresholds(statistics_of(array), method)  # type: ignore[arg-type]
    assert min(float(array.min()), 0.0) <= low <= 0 <= high <= max(float(array.max()), 0.0)


@settings(deadline=None, max_examples=60)
@given(tensors, st.floats(50, 100), st.floats(50, 100))
def test_a_smaller_percentile_is_a_narrower_range(array: np.ndarray, one: float, other: float) -> None:
    statistics = statistics_of(array)
    narrow = thresholds(statistics, "percentile", min(one, other))
    wide = thresholds(statistics, "percentile", max(one, other))
    assert wide.low <= narrow.low + 1e-12
    assert narrow.high <= wide.high + 1e-12


@settings(deadline=None, max_examples=60)
@given(tensors)
def test_mse_is_least_among_the_candidates(array: np.ndarray) -> None:
    statistics = statistics_of(array)
    found = thresholds(statistics, "mse")
    widest = thresholds(statistics, "minmax")
    lows, highs = candidates(widest)
    errors = squared_error(statistics, lows[:, None], highs[None])
    mine = squared_error(statistics, np.array(found.low), np.array(found.high))
    assert float(mine) <= float(errors.min()) * (1 + 1e-9) + 1e-30


@pytest.mark.parametrize("kind", ["normal", "long tail", "uniform", "one outlier"])
def test_the_squared_error_is_about_what_rounding_really_makes(kind: str) -> None:
    array = draw(kind, 0, 1.0)
    statistics = statistics_of(array)
    for low, high in ((-1.0, 1.5), (-3.0, 3.0)):
        grid = byte_grid(Thresholds(low, high))
        codes = np.clip(np.rint(array / grid.scale) + int(grid.zero_point), 0, 255)
        real = float(np.sum((array - (codes - int(grid.zero_point)) * grid.scale) ** 2))
        estimate = float(squared_error(statistics, np.array(low), np.array(high)))
        assert estimate == pytest.approx(real, rel=0.1)


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_zero_is_exact_and_the_ends_are_within_half_a_step(low: float, high: float) -> None:
    grid = byte_grid(Thresholds(low, high))
    scale, zero = float(grid.scale), int(grid.zero_point)
    assert scale > 0
    assert np.isfinite(scale)
    assert 0 <= zero <= 255
    assert (zero - zero) * scale == 0
    if high - low >= 1e-10:
        assert scale == pytest.approx((high - low) / LEVELS, rel=1e-6)
        assert abs(-zero * scale - low) <= scale * 0.501
        assert abs((255 - zero) * scale - high) <= scale * 0.501


def test_an_activation_that_is_always_zero_gets_a_grid_all_the_same() -> None:
    for method in METHODS:
        found = thresholds(statistics_of(np.zeros((2, 3))), method)  # type: ignore[arg-type]
        assert found == (0, 0)
    grid = byte_grid(Thresholds(0.0, 0.0))
    assert (float(grid.scale), int(grid.zero_point)) == (pytest.approx(1 / 255), 0)


def test_rectified_values_have_zero_as_their_lowest_code() -> None:
    for method in METHODS:
        found = thresholds(statistics_of(draw("rectified", 1, 2.0)), method)  # type: ignore[arg-type]
        assert found.low == 0
        assert byte_grid(found).zero_point == 0


def test_one_outlier_is_clipped_by_all_but_minmax() -> None:
    statistics = statistics_of(draw("one outlier", 0, 1.0))
    widths = {m: thresholds(statistics, m, 99.9).high for m in METHODS}  # type: ignore[arg-type]
    assert widths["minmax"] == 300
    assert widths["percentile"] < 250
    assert widths["mse"] <= 300
    assert widths["entropy"] < 300
