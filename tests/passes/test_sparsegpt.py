"""SparseGPT's mathematics against a plain float64 implementation of the paper, and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.sparsity import Pattern, density_mask, follows, nm_mask
from effic.passes.sparsify.sparsegpt import factor_in_order, order_of, sparsegpt


def correlated(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    mix = np.eye(size) + rng.standard_normal((size, size)) / np.sqrt(size)
    return (rng.standard_normal((rows, size)) @ mix).astype(np.float32)


def moment(x: np.ndarray) -> np.ndarray:
    return (x.T @ x / len(x))[None].astype(np.float32)


def reference(
    weight: np.ndarray, h: np.ndarray, target: Pattern | float, percdamp: float, blocksize: int
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of the paper as its authors wrote it, in float64: explicit inverse, plain loops."""
    w, h = weight.astype(np.float64), h.astype(np.float64).copy()
    dead = np.diag(h) == 0
    mean = np.diag(h).sum() / max(1, (~dead).sum())
    h[dead, dead] = mean
    w[:, dead] = 0
    h += percdamp * mean * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.zeros(w.shape, bool)
    size = w.shape[1]
    for start in range(0, size, blocksize):
        stop = min(start + blocksize, size)
        errors = np.zeros((len(w), stop - start))
        if not isinstance(target, Pattern):
            score = w[:, start:stop] ** 2 / np.diag(upper)[start:stop] ** 2
            mask[:, start:stop] = density_mask(score, target, compare="matrix")
        for i in range(start, stop):
            if isinstance(target, Pattern) and i % target.m == 0:
                group = slice(i, min(i + target.m, size))
                mask[:, group] = nm_mask(w[:, group] ** 2 / np.diag(upper)[group] ** 2, target)
            q = np.where(mask[:, i], w[:, i], 0)
            error = (w[:, i] - q) / upper[i, i]
            w[:, i:stop] -= np.outer(error, upper[i, i:stop])
            w[:, i] = q
            errors[:, i - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w, mask


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out, size = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    return (
        rng.standard_normal((out, size)).astype(np.float32),
        correlated(rng, draw(st.integers(1, 3)) * size + 5, size),
        rng,
    )


# The same examples every time: two scores that are equal in float32 alone would be another mask.
@settings(deadline=None, max_examples=60, derandomize=True)
@given(layers(), st.sampled_from(["2:4", "1:4", "4:8", "2:8", "1:16", "3:5"]), st.sampled_from([8, 40, 80]))
def test_sparsegpt_is_the_papers_algorithm(
    layer: tuple[np.ndarray, np.ndarray, np.random.Generator], text: str, blocksize: int
) -> None:
    weight, x, rng = layer
    if x.shape[1] > 1 and rng.random() < 0.3:
        x[:, rng.integers(x.shape[1])] = 0
    pattern, h = Pattern.parse(text), moment(x)
    factor = factor_in_order(h, weight.shape[1], 0.01)
    result = sparsegpt(weight, factor, pattern, weight.shape[1], blocksize=blocksize)
    # Blocks of the reference have to end where groups do.
    want, mask = reference(weight, h[0], pattern, 0.01, pattern.m * 2)
    np.testing.assert_array_equal(result.mask, mask)
    np.testing.assert_allclose(result.weight, want, rtol=2e-3, atol=2e-3)
    assert result.fallback is None


@settings(deadline=None, max_examples=30, derandomize=True)
@given(layers(), st.floats(0.1, 0.9), st.sampled_from([8, 32]))
def test_sparsegpt_to_a_density_is_the_papers_algorithm(
    layer: tuple[np.ndarray, np.ndarray, np.random.Generator], density: float, blocksize: int
) -> None:
    weight, x, _ = layer
    h = moment(x)
    factor = factor_in_order(h, weight.shape[1], 0.01)
    result = sparsegpt(weight, factor, density, weight.shape[1], blocksize=blocksize)
    want, mask = reference(weight, h[0], density, 0.01, blocksize)
    np.testing.assert_array_equal(result.mask, mask)
    np.testing.assert_allclose(result.weight, want, rtol=2e-3, atol=2e-3)


@settings(deadline=None, max_examples=40)
@given(layers(), st.floats(1e-3, 1e3))
def test_with_a_moment_like_the_identity_it_is_magnitude_and_kept_weights_do_not_change(
    layer: tuple[np.ndarray, np.ndarray, np.random.Generator], scale: float
) -> None:
    weight, _, _ = layer
    size = weight.shape[1]
    factor = factor_in_order(np.float32(scale) * np.eye(size, dtype=np.float32)[None], size, 0.01)
    result = sparsegpt(weight, factor, Pattern(2, 4), size)
    mask = nm_mask(np.abs(weight), Pattern(2, 4))
    np.testing.assert_array_equal(result.mask, mask)
    np.testing.assert_array_equal(result.weight, np.where(mask, weight, 0))


@settings(deadline=None, max_examples=40)
@given(layers(), st.sampled_from(["2:4", "1:4", "4:8"]))
def test_the_pattern_is_followed_with_exactly_n_bits(
    layer: tuple[np.ndarray, np.ndarray, np.random.Generator], text: str
) -> None:
    weight, x, _ = layer
    pattern, size = Pattern.parse(text), weight.shape[1]
    for update in (True, False):
        result = sparsegpt(weight, factor_in_order(moment(x), size, 0.01), pattern, size, update=update)
        assert follows(result.weight, pattern)
        full = size // pattern.m * pattern.m
        assert (result.mask[:, :full].reshape(len(weight), -1, pattern.m).sum(axis=2) == pattern.n).all()
        assert not result.weight[~result.mask].any()
        if not update:
            np.testing.assert_array_equal(result.weight, np.where(result.mask, weight, 0))


def test_output_error_is_ordered_sparsegpt_wanda_magnitude_on_correlated_inputs() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((48, 64)).astype(np.float32), correlated(rng, 512, 64)
    x *= np.exp(rng.standard_normal(64)).astype(np.float32)
    pattern = Pattern(2, 4)
    ours = sparsegpt(weight, factor_in_order(moment(x), 64, 0.01), pattern, 64).weight
    norm = np.linalg.norm(x, axis=0)
    wanda = np.where(nm_mask(np.abs(weight) * norm, pattern), weight, 0)
    magnitude = np.where(nm_mask(np.abs(weight), pattern), weight, 0)
    errors = [float(np.mean(((weight - w) @ x.T) ** 2)) for w in (ours, wanda, magnitude)]
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < 0.9 * errors[2]


def test_dead_inputs_lose_their_weights_and_an_unseen_layer_is_pruned_by_magnitude() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((5, 16)).astype(np.float32), correlated(rng, 64, 16)
    x[:, [0, 5, 6, 7]] = 0
    result = sparsegpt(weight, factor_in_order(moment(x), 16, 0.01), Pattern(2, 4), 16)
    assert not result.weight[:, [0, 5, 6, 7]].any()
    assert (result.mask.reshape(5, 4, 4).sum(axis=2) == 2).all()
    silent = sparsegpt(weight, factor_in_order(moment(x * 0), 16, 0.01), Pattern(2, 4), 16)
    np.testing.assert_array_equal(silent.weight, np.where(nm_mask(np.abs(weight), Pattern(2, 4)), weight, 0))
    assert silent.fallback == "pruned by magnitude: its inputs were zero on all the data"


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels", [8, 6])
def test_groups_of_a_convolution_run_along_channels(groups: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    places, outputs = 9, 4
    size = channels * places
    weight = rng.standard_normal((groups * outputs, size)).astype(np.float32)
    x = correlated(rng, 300, groups * size).reshape(300, groups, size)
    moments = np.stack([moment(x[:, g])[0] for g in range(groups)])
    order = order_of(size, channels)
    np.testing.assert_array_equal(order[:channels], np.arange(channels) * places)
    result = sparsegpt(weight, factor_in_order(moments, channels, 0.01), Pattern(2, 4), channels)
    rows = result.weight.reshape(-1, channels, places).transpose(0, 2, 1).reshape(-1, channels)
    assert follows(rows, Pattern(2, 4))
    if channels % 4 == 0:
        # The same as a plain layer whose inputs are in that order.
        for g in range(groups):
            part = slice(g * outputs, (g + 1) * outputs)
            want, mask = reference(
                weight[part][:, order], moments[g][order][:, order], Pattern(2, 4), 0.01, 8
            )
            np.testing.assert_array_equal(result.mask[part][:, order], mask)
            np.testing.assert_allclose(result.weight[part][:, order], want, rtol=2e-3, atol=2e-3)


def test_weights_near_the_end_of_float32_are_pruned_by_magnitude() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((4, 16)) * 1e38).astype(np.float32)
    x = correlated(rng, 64, 16) * np.float32(1.0) + 100
    result = sparsegpt(weight, factor_in_order(moment(x), 16, 1e-6), Pattern(1, 4), 16)
    assert np.isfinite(result.weight).all()
    assert follows(result.weight, Pattern(1, 4))
