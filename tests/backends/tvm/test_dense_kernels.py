"""Dense products: each form against NumPy in double precision, nothing written outside the output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.dense import BatchMatMul, DenseMatMul
from tests.backends.tvm.kernel_runs import close, random, run, with_cores

FEW = settings(max_examples=15, deadline=None)


@pytest.fixture(scope="module")
def host() -> Cpu:
    return Cpu.host(2)


def check_dense(spec: DenseMatMul, cpu: Cpu, rows: int) -> None:
    x, w, b = random(1, rows, spec.k), random(2, spec.k, spec.n), random(3, spec.n)
    got = run(spec, cpu, [x, *spec.pack(w, b)], (rows, spec.n))
    exact = x.astype(np.float64) @ w + (b if spec.bias else 0)
    if spec.activation == "relu":
        exact = np.maximum(exact, 0)
    if spec.activation == "clip":
        exact = np.clip(exact, spec.low, spec.high)
    close(got, exact, np.abs(x.astype(np.float64)) @ np.abs(w) + 1)


@FEW
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 70),
    n=st.integers(1, 300),
    bias=st.booleans(),
    activation=st.sampled_from([None, "relu", "clip"]),
    k_tile=st.sampled_from([None, 16, 33]),
    cores=st.sampled_from([1, 2]),
    portable=st.booleans(),
)
def test_a_product_is_numpys_at_any_size(
    host: Cpu,
    m: int,
    k: int,
    n: int,
    bias: bool,
    activation: str | None,
    k_tile: int | None,
    cores: int,
    portable: bool,
) -> None:
    spec = DenseMatMul(m, k, n, bias, activation, low=-1.0, high=2.0, k_tile=k_tile, portable=portable)
    check_dense(spec, with_cores(host, cores), m)


@pytest.mark.parametrize(("m", "k", "n"), [(130, 257, 300), (1, 512, 1000), (9, 2500, 40), (64, 128, 32)])
def test_large_products_share_the_work_between_threads(host: Cpu, m: int, k: int, n: int) -> None:
    check_dense(DenseMatMul(m, k, n, bias=True), host, m)


@pytest.mark.parametrize("m", [9, 16, 27, 41])
@pytest.mark.parametrize("k_tile", [24, 63])
def test_sums_wait_between_many_pieces_of_the_inputs(host: Cpu, m: int, k_tile: int) -> None:
    check_dense(DenseMatMul(m, 125, 170, bias=True, activation="relu", k_tile=k_tile), with_cores(host, 1), m)


@pytest.mark.parametrize(("panel", "rows"), [(16, 8), (16, 28), (32, 12), (64, 6), (128, 1)])
def test_any_tile_gives_the_product(host: Cpu, panel: int, rows: int) -> None:
    check_dense(DenseMatMul(29, 37, 141, panel=panel, rows=rows), host, 29)


def test_the_portable_form_of_an_old_cpu_compiles() -> None:
    old = Cpu.named("x86-64-v2")
    assert not old.avx512
    check_dense(DenseMatMul(5, 20, 40), old, 5)


def test_nan_passes_an_activation(host: Cpu) -> None:
    x = np.full((1, 4), np.nan, np.float32)
    for activation in ("relu", "clip"):
        spec = DenseMatMul(1, 4, 16, activation=activation, low=0.0, high=6.0)
        assert np.isnan(run(spec, host, [x, *spec.pack(random(0, 4, 16))], (1, 16))).all()


def test_packing_takes_a_scalar_bias_and_pads_with_zeros() -> None:
    spec = DenseMatMul(8, 3, 33, bias=True)
    weight, bias = spec.pack(random(0, 3, 33), np.float32([2.0]))
    assert weight.shape == (2, 3, 32)
    assert not weight[1, :, 1:].any()
    assert (bias[:33] == 2).all()
    assert not bias[33:].any()
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in (weight, bias))


@FEW
@given(
    right=st.integers(1, 3),
    repeat=st.integers(1, 3),
    m=st.integers(1, 20),
    k=st.integers(1, 40),
    n=st.integers(1, 70),
    transposed=st.booleans(),
    cores=st.sampled_from([1, 2]),
    portable=st.booleans(),
)
def test_a_product_of_activations_is_numpys(
    host: Cpu,
    right: int,
    repeat: int,
    m: int,
    k: int,
    n: int,
    transposed: bool,
    cores: int,
    portable: bool,
) -> None:
    batch = right * repeat
    spec = BatchMatMul(batch, m, k, n, transposed, repeat, scale=0.5, portable=portable)
    x = random(1, batch, m, k)
    w = random(2, right, n, k) if transposed else random(2, right, k, n)
    got = run(spec, with_cores(host, cores), [x, w], (batch, m, n))
    plain = np.repeat(w.swapaxes(1, 2) if transposed else w, repeat, 0)
    close(got, 0.5 * (x.astype(np.float64) @ plain), np.abs(x.astype(np.float64)) @ np.abs(plain))


@pytest.mark.parametrize("transposed", [False, True])
def test_attention_sizes_run_on_two_threads(host: Cpu, transposed: bool) -> None:
    spec = BatchMatMul(4, 65, 64, 96, transposed)
    x, w = random(1, 4, 65, 64), random(2, 4, *((96, 64) if transposed else (64, 96)))
    got = run(spec, host, [x, w], (4, 65, 96))
    plain = w.swapaxes(1, 2) if transposed else w
    close(got, x.astype(np.float64) @ plain, np.abs(x.astype(np.float64)) @ np.abs(plain))


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (DenseMatMul(0, 4, 4), "no elements"),
        (DenseMatMul(4, 0, 4), "no elements"),
        (DenseMatMul(4, 4, 4, panel=24), "multiples of 16"),
        (DenseMatMul(4, 4, 4, activation="gelu"), "gelu"),
        (DenseMatMul(4, 4, 4, activation="clip", low=1.0, high=0.0), "empty"),
        (BatchMatMul(2, 4, 0, 4), "no elements"),
        (BatchMatMul(3, 4, 4, 4, repeat=2), "cannot share"),
    ],
)
def test_what_the_family_cannot_hold_is_said(spec: Any, word: str) -> None:
    assert word in spec.why_not()


def test_names_tell_specs_apart() -> None:
    specs = [
        DenseMatMul(1, 2, 3),
        DenseMatMul(12, 2, 3),
        DenseMatMul(1, 2, 3, bias=True),
        DenseMatMul(1, 2, 3, activation="clip", low=-1.5),
        DenseMatMul(1, 2, 3, activation="clip", low=1.5),
        DenseMatMul(1, 2, 3, portable=True),
        BatchMatMul(1, 2, 3, 4),
        BatchMatMul(1, 2, 3, 4, transpose_b=True),
    ]
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(spec.why_not() is None and spec.name.isidentifier() for spec in specs)
