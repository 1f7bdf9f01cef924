"""Every form of the products with 2- to 8-bit weights against NumPy on the decoded weight."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm", reason="the kernels are TVM's")

from effic.backends.tvm.codegen import compile_kernel  # noqa: E402
from effic.backends.tvm.cpu import Cpu  # noqa: E402
from effic.backends.tvm.kernels.quantized import Outliers, QuantizedMatMul  # noqa: E402
from effic.ir.errors import UsageError  # noqa: E402
from tests.backends.tvm.kernel_runs import check_shapes  # noqa: E402

CANARY = np.float32(12345.678)
MARGIN = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays of a spec: what is packed, x, and the weight they stand for in float64."""

    spec: QuantizedMatMul
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    outliers: Outliers | None
    bias: np.ndarray | None
    x: np.ndarray

    @property
    def packed(self) -> list[np.ndarray]:
        return self.spec.pack(self.codes, self.scales, self.zeros, self.outliers, self.bias)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """A scale or zero point per code, ``[K, N]``."""
        spec, group = self.spec, self.spec.group_size
        if spec.grouping == "oc":
            return np.repeat(values, spec.k if group == -1 else group, axis=1)[:, : spec.k].T
        return np.repeat(values, spec.n if group == -1 else group, axis=1)[:, : spec.n]

    def zero(self) -> np.ndarray:
        """Zero point of every code ``[K, N]``."""
        zeros = np.zeros(self.scales.shape) if self.zeros is None else self.zeros
        return self.spread(zeros.astype(np.float64))

    def weight(self, outliers: bool = True) -> np.ndarray:
        codes = self.codes.astype(np.float64)
        if self.outliers is not None:
            codes[self.outliers.rows, self.outliers.columns] = 0
        weight = (codes - self.zero()) * self.spread(self.scales.astype(np.float64))
        if self.outliers is not None:
            weight[self.outliers.rows, self.outliers.columns] = self.outliers.values if outliers else 0
        return weight

    def exact(self) -> np.ndarray:
        """``x @ W + bias`` in float64."""
        product: np.ndarray = self.x.astype(np.float64) @ self.weight()
        return product if self.bias is None else product + self.bias

    def rounded(self) -> np.ndarray:
        """The product as the integer forms mean it: x, or x times the scales of a group, in 8 bits."""
        spec = self.spec
        length, pieces = spec.k_group, spec.pieces
        cut = -(-length // (pieces * 16)) * 16
        edges = [
            (min(g * length + p * cut, (g + 1) * length), min(g * length + (p + 1) * cut, (g + 1) * length))
            for g in range(spec.k_groups)
            for p in range(pieces)
        ]
        y = np.zeros((spec.m, spec.n))
        scales, zero = self.spread(self.scales.astype(np.float32)), self.zero()
        codes = self.codes.astype(np.float64)
        if self.outliers is not None:
            # What lies below an outlier decodes to zero.
            codes[self.outliers.rows, self.outliers.columns] = zero[self.outliers.rows, self.outliers.columns]
        for begin, end in edges:
            part = slice(begin, min(end, spec.k))
            for n in range(0, spec.n, spec.n_group):
                columns = slice(n, n + spec.n_group)
                a = self.x[:, part]
                if not a.size:
                    continue
                if spec.grouping == "ic":
                    a = a * scales[part, n]
                peak = np.abs(a).max(axis=1, keepdims=True)
                inverse = np.where(
                    peak < 1e-36, np.float32(0), np.float32(127) / np.maximum(peak, np.float32(1e-36))
                )
                q = np.rint(a * inverse).astype(np.float64)
                dots = q @ (codes - zero)[part, columns] * (peak / np.float32(127))
                y[:, columns] += dots * scales[begin, columns] if spec.grouping == "oc" else dots
        if self.outliers is not None:
            rows, places, values = self.outliers
            for row, place, value in zip(rows, places, values, strict=True):
                y[:, place] += self.x[:, row].astype(np.float64) * float(value)
        return y if self.bias is None else y + self.bias


def make(spec: QuantizedMatMul, seed: int, signed: bool = True, outliers_of: int = 20) -> Case:
    """Random arrays of a spec; of its weights one in ``outliers_of`` is an outlier."""
    rng = np.random.default_rng(seed)
    half = 1 << (spec.bits - 1)
    low, kind = (-half, np.int8) if signed else (0, np.uint8)
    codes = rng.integers(low, low + 2 * half, (spec.k, spec.n)).astype(kind)
    shape = (spec.n, spec.k_groups) if spec.grouping == "oc" else (spec.k, -(-spec.n // spec.n_group))
    scales = ((rng.random(shape) + 0.1) / half).astype(np.float32)
    zeros = None if spec.symmetric else rng.integers(low, low + 2 * half, shape).astype(kind)
    outliers = bias = None
    if spec.outliers:
        count = max(1, spec.k * spec.n // outliers_of)
        rows, columns = np.divmod(rng.choice(spec.k * spec.n, count, replace=False), spec.n)
        outliers = Outliers(rows, columns, (4 * rng.standard_normal(count)).astype(np.float32))
        codes[rows, columns] = 0
    if spec.bias:
        bias = rng.standard_normal(spec.n).astype(np.float32)
    return Case(
        spec, codes, scales, zeros, outliers, bias, rng.standard_normal((spec.m, spec.k)).astype(np.float32)
    )


def built(spec: QuantizedMatMul, cpu: Cpu) -> Any:
    return compile_kernel(spec.prim_func(cpu), cpu)


def run(case: Case, cpu: Cpu) -> np.ndarray:
    y = tvm.runtime.tensor(np.full((case.spec.m, case.spec.n), np.nan, np.float32))
    function, arrays = case.spec.prim_func(cpu), (case.x, *case.packed)
    check_shapes(function, [*(array.shape for array in arrays), y.shape])
    compile_kernel(function, cpu)(*map(tvm.runtime.tensor, arrays), y)
    return np.asarray(y.numpy())


def error(got: np.ndarray, want: np.ndarray, case: Case) -> float:
    """Largest difference beside the size of a sum of that many products."""
    size = (
        np.abs(want).max()
        + np.linalg.norm(case.x, axis=1).max() * np.linalg.norm(case.weight(), axis=0).max()
    )
    return float(np.abs(got - want).max() / size)


@st.composite
def specs(draw: st.DrawFn) -> tuple[QuantizedMatMul, int, int, bool]:
    k, n = (
        draw(st.sampled_from([1, 15, 64, 129, 300, 600])),
        draw(st.sampled_from([1, 17, 64, 128, 200, 333])),
    )
    symmetric = draw(st.booleans())
    spec = QuantizedMatMul(
        m=draw(st.sampled_from([1, 2, 4, 5, 13, 16, 37])),
        k=k,
        n=n,
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        group_size=draw(st.sampled_from([-1, 16, 20, 32, 64, 100, 128, 300])),
        grouping=draw(st.sampled_from(["oc", "ic"])),
        symmetric=symmetric,
        activations=draw(st.sampled_from(["fp32", "int8"])),
        outliers=draw(st.booleans()),
        bias=draw(st.booleans()),
        portable=draw(st.booleans()),
    )
    return spec, draw(st.integers(0, 99)), draw(st.sampled_from([1, 2])), symmetric or draw(st.booleans())


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs())
def test_against_the_decoded_weight(drawn: tuple[QuantizedMatMul, int, int, bool]) -> None:
    spec, seed, cores, signed = drawn
    case = make(spec, seed, signed)
    got = run(case, Cpu.host(cores))
    if spec.activations == "fp32":
        assert error(got, case.exact(), case) < 1e-6
        return
    assert error(got, case.rounded(), case) < 1e-6
    # An activation is off by at most 1/254 of the largest, evenly: far below that when summed.
    assert error(got, case.exact(), case) < 4e-3


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("grouping", ["oc", "ic"])
@pytest.mark.parametrize("m", [1, 7])
def test_the_portable_form_is_the_same(m: int, grouping: Any, activations: Any) -> None:
    spec = QuantizedMatMul(m, 300, 200, 4, 64, grouping, False, activations, True, True)
    case = make(spec, 3)
    fast = run(case, Cpu.host(1))
    plain = run(dataclasses.replace(case, spec=dataclasses.replace(spec, portable=True)), Cpu.host(1))
    assert error(fast, plain.astype(np.float64), case) < 1e-6
    other = run(case, Cpu("x86-64-v3"))
    assert error(fast, other.astype(np.float64), case) < 1e-6


@pytest.mark.parametrize("grouping", ["oc", "ic"])
def test_fp32_activations_are_as_exact_in_bytes_as_in_floats(grouping: Any) -> None:
    """With channels a hundred times as large as the others: steps of 2^-23 of the largest leave as much."""
    spec = QuantizedMatMul(5, 1024, 128, 4, 128, grouping, False)
    case = make(spec, 8)
    case.x[:, ::128] *= 100
    floats = dataclasses.replace(case, spec=dataclasses.replace(spec, portable=True))
    off = [np.linalg.norm(run(one, Cpu.host(1)) - case.exact()) for one in (case, floats)]
    assert off[0] < 4 * off[1]
    assert off[1] < 1e-6 * np.linalg.norm(case.exact())


@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_what_is_no_number_stays_none(activations: Any) -> None:
    spec = QuantizedMatMul(3, 64, 32, 4, 32, "oc", True, activations)
    case = make(spec, 4)
    case.x[0, 5], case.x[1, 40] = np.nan, -np.inf
    got = run(case, Cpu.host(1))
    assert not np.isfinite(got[:2]).any()
    assert np.isfinite(got[2]).all()


def before_a_guard(array: np.ndarray) -> np.ndarray:
    """A copy that ends where memory that may not be touched begins."""
    page = mmap.PAGESIZE
    room = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    begin = np.frombuffer(memory, np.uint8).ctypes.data
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(begin + room), page, 0):
        pytest.skip("the system protects no page")
    copy = np.frombuffer(memory, array.dtype, array.size, room - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("grouping", ["oc", "ic"])
@pytest.mark.parametrize(("m", "k"), [(2, 88), (16, 77)])
def test_nothing_is_written_or_read_outside(m: int, k: int, grouping: Any, activations: Any) -> None:
    """x ends at a guard page, y lies amid numbers that must stay."""
    spec = QuantizedMatMul(m, k, 150, 4, 20, grouping, False, activations, True, True)
    case = make(spec, 5)
    function = built(spec, Cpu.host(1))
    packed = [tvm.runtime.tensor(a) for a in case.packed]
    want = tvm.runtime.tensor(np.full((m, spec.n), np.nan, np.float32))
    function(tvm.runtime.tensor(case.x), *packed, want)
    around = before_a_guard(np.full((m * spec.n + 2 * MARGIN) // 16 * 16, CANARY, np.float32))
    y = around[MARGIN : MARGIN + m * spec.n].reshape(m, spec.n)
    function(tvm.runtime.from_dlpack(before_a_guard(case.x)), *packed, tvm.runtime.from_dlpack(y))
    np.testing.assert_array_equal(y, want.numpy())
    assert (around[:MARGIN] == CANARY).all()
    assert (around[MARGIN + m * spec.n :] == CANARY).all()


def test_zero_and_huge_activations() -> None:
    spec = QuantizedMatMul(4, 256, 64, 4, 64, "oc", True, "int8")
    case = make(spec, 1)
    case.x[0] = 0
    case.x[1] *= np.float32(1e30)
    case.x[2] = 1e-42
    got = run(case, Cpu.host(1))
    assert (got[0] == 0).all()
    assert (np.abs(got[2]) < 1e-37).all()
    np.testing.assert_allclose(got[1] / 1e30, case.exact()[1] / 1e30, atol=0.5)


def test_quantized_activations_in_the_zero_point_term() -> None:
    """Zero points far from the middle: taking them off the exact activations would leave the rounding in."""
    spec = QuantizedMatMul(1, 1024, 128, 4, 128, "ic", False, "int8")
    case = make(spec, 0, signed=False)
    assert case.zeros is not None
    case.zeros[:] = 15
    case.codes[:] = np.maximum(case.codes, 13)
    got, want = run(case, Cpu.host(1))[0], case.exact()[0]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.01


def test_packing_is_the_same_for_every_m_and_either_orientation() -> None:
    spec = QuantizedMatMul(1, 130, 70, 4, 32, "oc", True)
    case = make(spec, 2)
    other = dataclasses.replace(spec, m=64, activations="int8", portable=True)
    turned = np.ascontiguousarray(case.codes.T).T
    for one, two in zip(case.packed, other.pack(turned, np.asfortranarray(case.scales)), strict=True):
        assert one.flags.c_contiguous
        np.testing.assert_array_equal(one, two)


def test_packed_words_by_hand() -> None:
    spec = QuantizedMatMul(1, 16, 16, 4)
    codes = np.zeros((16, 16), np.int8) - 8
    codes[:8, 3] = np.arange(8) - 8
    words = spec.pack(codes, np.ones((16, 1), np.float32))[0]
    assert words.shape == (1, 2, 8, 16)
    assert words[0, 0, 0, 3] == 0x73625140
    assert np.count_nonzero(words) == 1


def test_a_zero_point_that_no_code_has() -> None:
    """Below an outlier nothing decodes to zero then; what is left must be taken off."""
    spec = QuantizedMatMul(1, 32, 16, 2, -1, "oc", False, "fp32", True)
    case = make(spec, 0, signed=False)
    assert case.zeros is not None
    case.zeros[:] = 7
    assert error(run(case, Cpu.host(1)), case.exact(), case) < 1e-6


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_all_a_byte_holds(bits: int, activations: Any) -> None:
    """Their sums are taken 64 at a time, and of what is left of a segment (160 k) 16."""
    spec = QuantizedMatMul(2, 300, 70, bits, 32, "ic", False, activations)
    case = make(spec, 9)
    assert case.zeros is not None
    case.zeros.flat[:] = np.random.default_rng(0).permutation(
        np.resize(np.arange(-128, 128), case.zeros.size)
    )
    got = run(case, Cpu.host(1))
    assert error(got, case.exact() if activations == "fp32" else case.rounded(), case) < 1e-6


@pytest.mark.parametrize("m", [1, 7])
def test_one_function_serves_any_number_of_outliers(m: int) -> None:
    spec = QuantizedMatMul(m, 64, 150, outliers=True)
    function = built(spec, Cpu.host(1))
    for outliers_of in (spec.k * spec.n, 50, 3):
        case = make(spec, 6, outliers_of=outliers_of)
        y = tvm.runtime.tensor(np.full((m, spec.n), np.nan, np.float32))
        function(*map(tvm.runtime.tensor, (case.x, *case.packed)), y)
        assert error(y.numpy(), case.exact(), case) < 1e-6


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"m": 0}, "no elements"),
        ({"bits": 5}, "codes of 5 bits"),
        ({"group_size": 0}, "groups of 0 codes"),
        ({"grouping": "no"}, "neither oc nor ic"),
        ({"activations": "fp16"}, "neither fp32 nor int8"),
    ],
)
def test_what_the_family_cannot_hold(fields: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(QuantizedMatMul(1, 32, 32), **fields)
    assert reason in str(spec.why_not())
    with pytest.raises(UsageError, match=reason):
        spec.prim_func(Cpu("x86-64-v3"))
    assert QuantizedMatMul(1, 32, 32).why_not() is None


def test_arrays_that_do_not_fit() -> None:
    spec = QuantizedMatMul(1, 32, 16, 4, 16, bias=True)
    codes, scales = np.zeros((32, 16), np.int8), np.ones((16, 2), np.float32)
    bias = np.zeros(16, np.float32)

    def refused(match: str, *arrays: Any, spec: QuantizedMatMul = spec) -> None:
        with pytest.raises(UsageError, match=match):
            spec.pack(*arrays)

    refused("codes are int8", codes.T, scales, None, None, bias)
    refused("codes are int32", codes.astype(np.int32), scales, None, None, bias)
    refused("scales are", codes, scales.T, None, None, bias)
    refused("no zero points", codes, scales, np.zeros((16, 2), np.int8), None, bias)
    refused("signed codes", codes.view(np.uint8), scales, None, None, bias)
    refused("more than 4 bits", codes + np.int8(8), scales, None, None, bias)
    refused("bias of none", codes, scales)
    refused("1 outliers", codes, scales, None, Outliers(*np.zeros((3, 1), np.int64)), bias)
    one = dataclasses.replace(spec, outliers=True, bias=False)
    refused("0 outliers", codes, scales, spec=one)
    refused("outside", codes, scales, None, Outliers(np.array([32]), np.array([0]), np.ones(1)), spec=one)
    loose = dataclasses.replace(spec, symmetric=False, bias=False)
    refused("zero points are uint8", codes, scales, np.zeros((16, 2), np.uint8), spec=loose)
    refused("out of reach", codes.view(np.uint8), scales, np.full((16, 2), 255, np.uint8), spec=loose)
