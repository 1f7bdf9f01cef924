"""Products with N:M weights in every form against NumPy on the dense weight, alone and in lowered models."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm", reason="the kernels are TVM's")

from effic.backends.tvm.cpu import Cpu  # noqa: E402
from effic.backends.tvm.kernels.sparse import FLOAT, SparseMatMul  # noqa: E402
from effic.backends.tvm.operators.matmul_sparse import why_slower, zeros_of  # noqa: E402
from effic.ir.errors import UsageError  # noqa: E402
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs  # noqa: E402
from effic.ir.model import Model  # noqa: E402
from effic.ir.sparsity import Pattern, nm_mask  # noqa: E402
from effic.models.builders import encoder, llama  # noqa: E402
from effic.passes.pipeline import run_passes  # noqa: E402
from effic.passes.spec import parse_passes  # noqa: E402
from tests.backends.tvm import kernel_runs, module_runs  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays of a spec."""

    spec: SparseMatMul
    codes: np.ndarray
    scales: np.ndarray | None
    zeros: np.ndarray | None
    bias: np.ndarray | None
    x: np.ndarray

    @property
    def packed(self) -> list[np.ndarray]:
        return self.spec.pack(self.codes, self.scales, self.zeros, None, self.bias)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """A scale or zero point per code, ``[K, N]``."""
        spec = self.spec
        if spec.grouping == "oc":
            return np.repeat(values, spec.k_group, axis=1)[:, : spec.k].T
        return np.repeat(values, spec.n_group, axis=1)[:, : spec.n]

    def weight(self) -> np.ndarray:
        """What the arrays stand for, in float64."""
        weight = self.codes.astype(np.float64)
        if self.zeros is not None:
            weight -= self.spread(self.zeros)
        return weight if self.scales is None else weight * self.spread(self.scales)

    def exact(self, x: np.ndarray | None = None) -> np.ndarray:
        product: np.ndarray = (self.x if x is None else x).astype(np.float64) @ self.weight()
        return product if self.bias is None else product + self.bias

    def rounded(self) -> np.ndarray:
        """The product as the integer forms mean it: x, or x times the scales of a group, in 8 bits per segment."""
        spec = self.spec
        y = np.zeros((spec.m, spec.n))
        columns = spec.n if spec.grouping == "oc" else spec.n_group
        weight = self.weight()
        for n in range(0, spec.n, columns):
            part = slice(n, n + columns)
            factor = 1.0 if self.scales is None or spec.grouping == "oc" else self.spread(self.scales)[:, n]
            a = (self.x * np.float32(factor) if spec.grouping == "oc" else self.x * factor[None]).astype(
                np.float32
            )
            q = np.zeros(a.shape)
            where = spec._row(np.arange(spec.k)) // spec.segment
            for segment in np.unique(where):
                here = where == segment
                peak = np.abs(a[:, here]).max(axis=1, keepdims=True)
                inverse = np.float32(127) / np.maximum(peak, np.float32(1e-36))
                q[:, here] = np.rint(a[:, here] * inverse).astype(np.float64) * (peak / np.float32(127))
            divided = (
                weight[:, part] if spec.grouping == "oc" else weight[:, part] / np.asarray(factor)[:, None]
            )
            y[:, part] = q @ divided
        return y if self.bias is None else y + self.bias


def make(spec: SparseMatMul, seed: int, *, signed: bool = True, sparser: bool = True) -> Case:
    """Random arrays; with ``sparser`` a third of what may be kept is zero, and some groups have nothing."""
    rng = np.random.default_rng(seed)
    shape = spec.k, spec.n
    mask = nm_mask(rng.random(shape), Pattern(spec.kept, spec.of), axis=0)
    if sparser:
        mask &= rng.random(shape) > 1 / 3
        mask[: spec.of] &= rng.random(spec.n) > 0.5
    scales = zeros = None
    if spec.bits == FLOAT:
        codes = np.where(mask, rng.standard_normal(shape), 0).astype(np.float32)
    else:
        groups = (spec.n, spec.k_groups) if spec.grouping == "oc" else (spec.k, -(-spec.n // spec.n_group))
        scales = ((rng.random(groups) + 0.1) / spec.middle).astype(np.float32)
        numbers = rng.integers(-spec.middle, spec.middle, shape)
        zeros = None if signed else np.full(groups, spec.middle, np.uint8)
        kind = np.int8 if signed else np.uint8
        codes = (np.where(mask, numbers, 0) + (0 if signed else spec.middle)).astype(kind)
    bias = rng.standard_normal(spec.n).astype(np.float32) if spec.bias else None
    x = rng.standard_normal((spec.m, spec.k)).astype(np.float32)
    return Case(spec, codes, scales, zeros, bias, x)


def run(case: Case, cpu: Cpu, **changed: Any) -> np.ndarray:
    """The kernel's y, its canaries checked."""
    spec = dataclasses.replace(case.spec, **changed)
    return kernel_runs.run(spec, cpu, [case.x, *case.packed], (spec.m, spec.n))


def error(got: np.ndarray, want: np.ndarray, case: Case) -> float:
    """Largest difference beside the size of a sum of that many products."""
    norms = np.linalg.norm(case.x, axis=1).max() * np.linalg.norm(case.weight(), axis=0).max()
    return float(np.abs(got - want).max() / (np.abs(want).max() + norms + 1e-30))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    of = draw(st.sampled_from([2, 3, 4, 4, 5, 8, 11, 16]))
    kept = draw(st.integers(1, min(of - 1, 4)))
    bits = draw(st.sampled_from([4, 8, FLOAT]))
    spec = SparseMatMul(
        m=draw(st.sampled_from([1, 2, 5, 16, 33])),
        k=draw(st.sampled_from([1, 15, 64, 129, 300, 600])),
        n=draw(st.sampled_from([1, 17, 128, 200])),
        bits=bits,
        grouping="oc" if bits == FLOAT else draw(st.sampled_from(["oc", "ic"])),
        group_size=-1 if bits == FLOAT else draw(st.sampled_from([-1, 32, 64, 100])),
        activations=draw(st.sampled_from(["fp32", "int8"])),
        bias=draw(st.booleans()),
        portable=draw(st.booleans()),
        kept=kept,
        of=of,
    )
    if spec.why_not() is not None:
        spec = dataclasses.replace(spec, group_size=-1)
    case = make(spec, draw(st.integers(0, 99)), signed=draw(st.booleans()), sparser=draw(st.booleans()))
    return case, draw(st.sampled_from([1, 2]))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_against_the_dense_weight(drawn: tuple[Case, int]) -> None:
    case, cores = drawn
    got = run(case, Cpu.host(cores))
    if not case.spec.rounds:
        assert error(got, case.exact(), case) < 1e-6
        return
    assert error(got, case.rounded(), case) < 1e-6
    # An activation is off by at most 1/254 of the largest of its segment.
    assert error(got, case.exact(), case) < 6e-3


@pytest.mark.parametrize(
    ("kept", "of", "bits", "activations"),
    [
        (2, 4, 8, "fp32"),
        (2, 4, 8, "int8"),
        (1, 4, 4, "fp32"),
        (2, 8, 8, "fp32"),
        (2, 8, 4, "int8"),
        (2, 4, FLOAT, "fp32"),
    ],
)
def test_the_portable_form_is_the_same(kept: int, of: int, bits: int, activations: Any) -> None:
    spec = SparseMatMul(6, 320, 130, bits=bits, activations=activations, bias=True, kept=kept, of=of)
    case = make(spec, 3)
    fast = run(case, Cpu.host(1))
    assert error(fast, run(case, Cpu.host(1), portable=True).astype(np.float64), case) < 1e-6


def test_many_rows_of_a_dense_pattern_run_over_decoded_panels() -> None:
    case = make(SparseMatMul(40, 130, 70, bits=8, group_size=64), 4)
    assert error(run(case, Cpu.host(1)), case.exact(), case) < 1e-6


def test_what_is_not_kept_is_not_read() -> None:
    """NaN in x where all weights are zero: a dense product would be NaN everywhere."""
    case = make(SparseMatMul(2, 64, 128, bits=FLOAT, kept=1, of=4), 5, sparser=False)
    case.codes[1::4], case.codes[2::4], case.codes[3::4] = 0, 0, 0
    case.codes[::4] = 1
    want = case.exact()
    case.x[:, 3::4] = np.nan
    assert error(run(case, Cpu.host(1)), want, dataclasses.replace(case, x=np.nan_to_num(case.x))) < 1e-6


def test_a_weight_of_zeros() -> None:
    case = make(SparseMatMul(3, 70, 30, bits=8, activations="int8", bias=True), 1)
    case.codes[:] = 0
    assert case.bias is not None
    np.testing.assert_array_equal(run(case, Cpu.host(1)), np.broadcast_to(case.bias, (3, 30)))


def test_packing_is_the_same_for_every_m_and_either_orientation() -> None:
    case = make(SparseMatMul(1, 130, 70, bits=4, group_size=32), 2, signed=False)
    assert case.zeros is not None
    assert case.scales is not None
    other = dataclasses.replace(case.spec, m=64, activations="int8", portable=True)
    turned = np.ascontiguousarray(case.codes.T).T
    found = other.pack(turned, np.asfortranarray(case.scales), case.zeros)
    for one, two in zip(case.packed, found, strict=True):
        assert one.flags.c_contiguous
        np.testing.assert_array_equal(one, two)


def test_packed_words_by_hand() -> None:
    weight = np.zeros((4, 1), np.int8)
    weight[1], weight[3] = 5, -2
    values, places, scales, begun = SparseMatMul(1, 4, 1, bits=8).pack(weight, np.array([[0.5]]))
    assert values.shape == (1, 4, 8, 16)
    assert values[0, 0, 0, 0] == (5 | 0xFE << 8)
    assert places[0, 0, 0, 0] == (1 | 3 << 8)
    assert scales[0, 0, 0] == np.float32(0.5)
    assert begun[0, 0, 0] == -128 * (5 - 2)
    assert not values.reshape(-1)[1:].any()


def test_bytes_of_a_large_weight() -> None:
    spec = SparseMatMul(1, 2048, 256, bits=8)
    case = make(spec, 0)
    # 10 bits per kept weight of 2:4, a scale per column, and a sum per 256 codes.
    assert sum(one.nbytes for one in case.packed) == 2048 * 256 * 10 // 16 + 256 * 4 + 2048 * 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kept": 4, "of": 4}, "no pattern"),
        ({"kept": 1, "of": 17}, "no pattern"),
        ({"bits": 3}, "values of 3 bits"),
        ({"bits": FLOAT, "group_size": 32}, "no scales"),
        ({"symmetric": False}, "zero points"),
        ({"outliers": 2}, "outliers"),
        ({"k": 0}, "no elements"),
        ({"group_size": 24}, "not whole units"),
        ({"grouping": "both"}, "neither oc nor ic"),
    ],
)
def test_what_is_not_held(changed: dict[str, Any], said: str) -> None:
    spec = dataclasses.replace(SparseMatMul(1, 64, 32, bits=8), **changed)
    assert said in (spec.why_not() or "")
    with pytest.raises(UsageError, match=said):
        spec.prim_func(Cpu("x86-64-v3"))
    with pytest.raises(UsageError, match=said):
        spec.pack(np.zeros((spec.k, spec.n), np.int8), np.ones((spec.n, 1)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"codes": np.ones((8, 4), np.int8)}, "does not follow 2:4"),
        ({"codes": np.zeros((8, 5), np.int8)}, "are packed"),
        ({"codes": np.zeros((8, 4), np.float32)}, "are packed"),
        ({"codes": np.full((8, 4), 9, np.int8)}, "more than 4 bits"),
        ({"scales": None}, "no scales"),
        ({"scales": np.ones((4, 2))}, "scales are"),
        ({"zeros": np.zeros((4, 1), np.uint8)}, "zero points are uint8"),
        ({"bias": np.ones(4, np.float32)}, "a bias of"),
    ],
)
def test_arrays_that_do_not_fit(changed: dict[str, Any], said: str) -> None:
    spec = SparseMatMul(1, 8, 4, bits=4)
    given: dict[str, Any] = {
        "codes": np.zeros((8, 4), np.int8),
        "scales": np.ones((4, 1)),
        "zeros": None,
        "bias": None,
    }
    given |= changed
    with pytest.raises(UsageError, match=said):
        spec.pack(given["codes"], given["scales"], given["zeros"], None, given["bias"])


# -- lowering ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("1:4", "1:4"), ("2:8", "2:8"), ("2:4", "2:4"), ("1:2", "2:4"), ("3:6", "3:6"), ("3:4", None)],
)
def test_patterns_are_found_in_the_zeros(pattern: str, found: str | None) -> None:
    wanted = Pattern.parse(pattern)
    weight = np.random.default_rng(0).integers(1, 9, (480, 40))
    weight *= nm_mask(np.random.default_rng(1).random(weight.shape), wanted, axis=0)
    zeros = zeros_of(weight, {wanted.m} if wanted.m == 6 else frozenset())
    assert (None if zeros is None else str(zeros.pattern)) == found


def test_one_group_that_breaks_the_pattern() -> None:
    weight = np.tile(np.array([1, 0, 0, 0]), 4000)[:, None] * np.ones((1, 70))
    assert zeros_of(weight) is not None
    weight[-16:] = 1
    assert zeros_of(weight) is None
    # All of a weight with fewer inputs than a group has places.
    assert zeros_of(np.ones((8, 16), np.float32)) is None


def test_where_other_kernels_are_faster() -> None:
    wide, old = Cpu("cascadelake", 1, True, True), Cpu("x86-64-v3")
    spec = SparseMatMul(1, 512, 512, bits=FLOAT)
    assert why_slower(spec, wide, False) is None
    assert "AVX512" in (why_slower(spec, old, False) or "")
    assert why_slower(spec, old, True) is None
    assert why_slower(dataclasses.replace(spec, kept=1), old, False) is None
    assert "dense kernel" in (why_slower(dataclasses.replace(spec, kept=1, m=5), old, False) or "")
    assert why_slower(dataclasses.replace(spec, kept=1, m=5, bits=8), old, False) is None
    assert why_slower(dataclasses.replace(spec, m=16), wide, False) is None
    assert "dense kernel" in (why_slower(dataclasses.replace(spec, m=17), wide, False) or "")
    assert why_slower(dataclasses.replace(spec, m=17), wide, True) is None
    assert why_slower(dataclasses.replace(spec, m=128, kept=1), wide, False) is None
    assert why_slower(dataclasses.replace(spec, m=128, bits=8), wide, False) is None
    assert "more would be read" in (why_slower(dataclasses.replace(spec, n=10), wide, False) or "")
    rounding = dataclasses.replace(spec, bits=8, activations="int8")
    assert "VNNI" in (why_slower(rounding, Cpu("skylake-avx512", 1, True), False) or "")


@pytest.mark.parametrize(
    ("build", "passes", "options", "told"),
    [
        (encoder, "canonicalize-linear,prune-magnitude{n=2,m=4},compress-nm", {}, "2:4, fp32 values, sparse kernel"),
        (llama, "prune-magnitude{n=2,m=4},quantize-rtn{bits=4,axis=ic,group_size=64},compress-nm", {}, "2:4, int4"),
        (llama, "prune-magnitude{n=2,m=4},quantize-rtn{bits=8}", {"activations": "int8"}, "2:4, int8"),
    ],
)  # fmt: skip
def test_pruned_models(build: Any, passes: str, options: dict[str, Any], told: str) -> None:
    if not (module_runs.CPU.avx512 and module_runs.CPU.vnni):
        pytest.skip("without AVX512 and VNNI dense kernels are chosen")
    model = Model(build(dim=128, layers=1))
    run_passes(model, parse_passes(passes), check="off")
    inputs, expected = runnable_inputs(model, Oracle(model))
    lowered = module_runs.Lowered(model, module_runs.sizes_of(model, inputs), **options)
    distance = compare_outputs(expected, lowered.run(inputs))
    assert distance.max_rel < (0.05 if options else 1e-5)
    assert "sparse" in lowered.kernels
    ways = [way for way in lowered.signature.ways if told in way.why and "sparse kernel" in way.why]
    assert ways
    assert all(any(kernel.startswith("sparse") for kernel in way.kernels) for way in ways)
