"""Softmax, norms and attention: against NumPy in double precision, with special values, nothing written outside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.attention import Attention
from effic.backends.tvm.kernels.norm import GroupNorm, LayerNorm
from effic.backends.tvm.kernels.softmax import Softmax, softmax_of
from tests.backends.tvm.kernel_runs import random, run

FEW = settings(max_examples=6, deadline=None)
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def host() -> Cpu:
    return Cpu.host(1)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """By the definition; the largest is subtracted in the precision of x, as everybody does."""
    with np.errstate(all="ignore"):
        power = np.exp((x - x.max(axis=axis, keepdims=True)).astype(np.float64))
        return power / power.sum(axis=axis, keepdims=True)


def check_softmax(spec: Softmax, cpu: Cpu, x: np.ndarray) -> None:
    got = run(spec, cpu, [x], x.shape)
    exact = softmax(x, 1)
    if spec.log:
        np.testing.assert_allclose(got, np.log(exact), rtol=TOLERANCE, atol=2e-6)
    else:
        np.testing.assert_allclose(got, exact, rtol=TOLERANCE, atol=1e-37)


@FEW
@given(rows=st.integers(1, 5), columns=st.integers(1, 150), inner=st.integers(1, 40), log=st.booleans())
def test_softmax(host: Cpu, rows: int, columns: int, inner: int, log: bool) -> None:
    shape = (rows, columns) if inner == 1 else (rows, columns, inner)
    check_softmax(Softmax(rows, columns, inner, log), host, 4 * random(columns, *shape))


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 129])
def test_softmax_of_rows(host: Cpu, columns: int) -> None:
    check_softmax(Softmax(3, columns), host, 10 * random(columns, 3, columns))


@pytest.mark.parametrize("rows", [1, 4])
def test_softmax_of_rows_that_are_not_known(host: Cpu, rows: int) -> None:
    check_softmax(Softmax(None, 33), host, random(0, rows, 33))


def test_softmax_shares_large_work_between_threads() -> None:
    check_softmax(Softmax(70, 300), Cpu.host(2), random(0, 70, 300))


def test_softmax_of_special_values_is_as_defined(host: Cpu) -> None:
    x = random(0, 7, 40)
    x[0, 3] = np.nan
    x[1] = -np.inf
    x[2, 5] = np.inf
    x[3, :30] = -np.inf  # a masked row
    x[4] = 3e38
    x[5, 0] = 1000.0
    x[6] = np.float32(-3.4028235e38)  # the other way to mask
    got = run(Softmax(7, 40), host, [x], x.shape)
    np.testing.assert_allclose(got, softmax(x, 1), rtol=TOLERANCE, atol=1e-37)
    assert np.isnan(got[:3]).all()
    assert (got[3, :30] == 0).all()


def test_what_softmax_cannot_hold() -> None:
    assert Softmax(2, 0).why_not() == "a softmax of no elements"
    assert Softmax(2, 3).why_not() is None
    assert softmax_of([2, 3, 5], 1, False) == Softmax(2, 3, 5)
    assert softmax_of([2, 0, 5], 1, False) is None


@FEW
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 200),
    scale=st.booleans(),
    bias=st.booleans(),
    rms=st.booleans(),
)
def test_layer_norm(host: Cpu, rows: int, columns: int, scale: bool, bias: bool, rms: bool) -> None:
    x, g, b = random(1, rows, columns) + 3, random(2, columns), random(3, columns)
    spec = LayerNorm(rows, columns, 1e-5, scale, bias, rms)
    got = run(spec, host, [x, *([g] if scale else []), *([b] if bias else [])], x.shape)
    exact = x.astype(np.float64)
    if not rms:
        exact = exact - exact.mean(axis=1, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5)
    exact = exact * (g if scale else 1) + (b if bias else 0)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=2e-5)


def test_layer_norm_does_not_cancel(host: Cpu) -> None:
    """The mean of the squares less the square of the mean would be off by a half here."""
    x = random(0, 2, 96) * np.float32(0.01) + 1000
    got = run(LayerNorm(None, 96, 0.0, False, False), host, [x], x.shape)
    exact = x.astype(np.float64) - x.astype(np.float64).mean(axis=1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(got, exact, atol=0.02)


def test_a_nan_spoils_its_own_row_only(host: Cpu) -> None:
    x = random(0, 3, 50)
    x[1, 7] = np.nan
    got = run(LayerNorm(3, 50, 1e-5, False, False), host, [x], x.shape)
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


@FEW
@given(batch=st.integers(1, 3), groups=st.integers(1, 3), each=st.integers(1, 4), inner=st.integers(1, 70))
def test_group_norm(host: Cpu, batch: int, groups: int, each: int, inner: int) -> None:
    channels = groups * each
    x, g, b = random(1, batch, groups, each * inner), random(2, channels), random(3, channels)
    spec = GroupNorm(None if batch == 2 else batch, groups, channels, inner, 1e-5)
    got = run(spec, host, [x, g, b], x.shape)
    exact = x.astype(np.float64) - x.mean(axis=2, keepdims=True, dtype=np.float64)
    exact = exact / np.sqrt((exact**2).mean(axis=2, keepdims=True) + 1e-5)
    exact = exact.reshape(batch, channels, inner) * g[:, None] + b[:, None]
    np.testing.assert_allclose(got, exact.reshape(x.shape), rtol=1e-5, atol=2e-5)


def test_what_norms_cannot_hold() -> None:
    assert GroupNorm(1, 2, 3, 4, 0.0).why_not() == "3 channels do not fall into 2 groups"
    assert LayerNorm(1, 0, 0.0).why_not() == "a norm of no elements"
    assert GroupNorm(0, 1, 1, 1, 0.0).why_not() == "a norm of no elements"


def check_attention(spec: Attention, cpu: Cpu, batch: int, mask: np.ndarray | None = None) -> np.ndarray:
    q = random(1, batch, spec.heads, spec.queries, spec.head_dim)
    k, v = (random(seed, batch, spec.kv_heads, spec.keys, spec.head_dim) for seed in (2, 3))
    assert spec.why_not() is None
    got = run(spec, cpu, [q, k, v, *([] if mask is None else [mask])], q.shape)
    each = spec.heads // spec.kv_heads
    wide = [np.repeat(one.astype(np.float64), each, axis=1) for one in (k, v)]
    scores = spec.scale * q.astype(np.float64) @ wide[0].swapaxes(-1, -2)
    if mask is not None:
        scores = scores + mask
    if spec.causal:
        hidden = np.triu(np.ones((spec.queries, spec.keys), bool), spec.keys - spec.queries + 1)
        scores = np.where(hidden, -np.inf, scores)
    np.testing.assert_allclose(got, softmax(scores, -1) @ wide[1], rtol=1e-5, atol=1e-5)
    return got


@settings(max_examples=6, deadline=None)
@given(
    kv_heads=st.integers(1, 2),
    each=st.integers(1, 2),
    queries=st.integers(1, 9),
    more=st.integers(0, 40),
    head_dim=st.integers(1, 80),
    causal=st.booleans(),
)
def test_attention(
    host: Cpu, kv_heads: int, each: int, queries: int, more: int, head_dim: int, causal: bool
) -> None:
    spec = Attention(
        2, kv_heads * each, kv_heads, queries, queries + more, head_dim, causal=causal, scale=0.2
    )
    check_attention(spec, host, 2)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (1, 4, 1), (2, 4, 5)])
def test_attention_with_a_mask(host: Cpu, shape: tuple[int, int, int]) -> None:
    mask = np.where(np.random.default_rng(0).random((*shape, 21)) < 0.4, -np.inf, 0).astype(np.float32)
    mask[..., 0] = 0.5
    spec = Attention(2, 4, 2, 5, 21, 8, "additive", shape)
    check_attention(spec, host, 2, mask)


def test_attention_of_a_batch_that_is_not_known() -> None:
    mask = random(0, 3, 1, 1, 64)
    spec = Attention(None, 2, 1, 16, 64, 16, "additive", (0, 1, 1), scale=0.25)
    check_attention(spec, Cpu.host(2), 3, mask)


def test_a_row_that_sees_nothing_is_nan(host: Cpu) -> None:
    mask = np.zeros((1, 1, 5, 20), np.float32)
    mask[0, 0, 2] = -np.inf
    got = check_attention(Attention(1, 1, 1, 5, 20, 4, "additive", (1, 1, 5)), host, 1, mask)
    assert np.isnan(got[0, 0, 2]).all()
    assert np.isfinite(got[0, 0, [0, 1, 3, 4]]).all()


def test_what_attention_cannot_hold() -> None:
    assert Attention(1, 3, 2, 4, 4, 8).why_not() == "3 heads do not share 2 heads of keys evenly"
    assert "leave the first queries nothing" in (Attention(1, 1, 1, 4, 3, 8, causal=True).why_not() or "")
    assert "does not fit" in (Attention(1, 2, 2, 4, 4, 8, "additive", (1, 3, 1)).why_not() or "")
    assert Attention(1, 1, 1, 0, 4, 8).why_not() == "an attention of no elements"
