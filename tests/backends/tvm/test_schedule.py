"""Scheduled functions: what legalized operators compute, whatever their shape, and nothing written outside."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm", reason="needs the tvm extra")

import tvm
from tvm import relax, tirx
from tvm.relax import op

from effic.backends.tvm.codegen import compile_kernel
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.schedule.pipeline import (
    compile_module,
    fuse_and_schedule,
    naive_functions,
)
from tests.backends.tvm.kernel_runs import CANARY, MARGIN, random

FEW = settings(max_examples=5, deadline=None)


@pytest.fixture(scope="module", params=[1, 2])
def cpu(request: pytest.FixtureRequest) -> Cpu:
    return Cpu.host(int(request.param))


@pytest.fixture(scope="module")
def host() -> Cpu:
    return Cpu.host(1)


def module_of(build: Callable[..., Any], *shapes: tuple[Any, ...], dtype: str = "float32") -> Any:
    """A module of one function of tensors of these shapes."""
    bb = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, shape in enumerate(shapes)]
    with bb.function("main", inputs):
        with bb.dataflow():
            out = bb.emit_output(build(*inputs))
        bb.emit_func_output(out)
    return bb.get()


def run(module: Any, cpu: Cpu, *inputs: np.ndarray) -> np.ndarray:
    """The result of the whole module; no function may have stayed naive."""
    executable, naive = compile_module(module, cpu)
    assert naive == {}
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result: np.ndarray = machine["main"](*map(tvm.runtime.tensor, inputs)).numpy()
    return result


def run_alone(module: Any, cpu: Cpu, inputs: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The module's only PrimFunc with its output between canaries, which must survive."""
    ready = fuse_and_schedule(cpu)(module)
    (function,) = [f for f in ready.functions.values() if isinstance(f, tirx.PrimFunc)]
    compiled = compile_kernel(function.with_attr("global_symbol", "alone"), cpu)
    size = math.prod(shape)
    room = np.full(size + 2 * MARGIN + 16, CANARY)
    whole = room[-room.ctypes.data % 64 // 4 :][: size + 2 * MARGIN]
    compiled(
        *map(tvm.runtime.tensor, inputs),
        tvm.runtime.from_dlpack(whole[MARGIN : MARGIN + size].reshape(shape)),
    )
    assert (whole[:MARGIN] == CANARY).all()
    assert (whole[MARGIN + size :] == CANARY).all()
    return whole[MARGIN : MARGIN + size].reshape(shape)


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x.astype(np.float64))


# -- element by element ---------------------------------------------------------------------------


@FEW
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    broadcast=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_broadcast(host: Cpu, shape: list[int], broadcast: list[bool]) -> None:
    small = tuple(1 if one else size for size, one in zip(shape, broadcast, strict=False))
    x, y = random(1, *shape), random(2, *small)
    module = module_of(lambda a, b: op.nn.relu(op.subtract(a, b)), x.shape, y.shape)
    got = run_alone(module, host, [x, y], x.shape)
    np.testing.assert_allclose(got, np.maximum(x - y, 0), rtol=1e-6, atol=1e-6)


def test_threads_share_a_long_row_and_many_rows(cpu: Cpu) -> None:
    for shape in ((40_003,), (3, 9_001), (300, 101)):
        x = random(0, *shape)
        got = run_alone(module_of(lambda a: op.negative(a), shape), cpu, [x], shape)
        np.testing.assert_array_equal(got, -x)


SPECIAL = np.array(
    [
        np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        88.7,
        89.5,
        -87.0,
        -104.5,
        200.0,
        -200.0,
        3e38,
        -3e38,
        1.0,
    ],
    np.float32,
)


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sigmoid", "erf"])
def test_functions_of_one_number(host: Cpu, name: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [SPECIAL, rng.uniform(-12, 12, 3000), np.exp(rng.uniform(-40, 4, 3003)) * rng.choice([-1, 1], 3003)]
    ).astype(np.float32)
    got = run(module_of(getattr(op, name), x.shape), host, x)
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        exact = {
            "exp": lambda: np.exp(wide),
            "log": lambda: np.log(wide),
            "tanh": lambda: np.tanh(wide),
            "sigmoid": lambda: 1 / (1 + np.exp(-wide)),
            "erf": lambda: erf(wide),
        }[name]()
        # What does not fit is infinite in single precision too; below 2**-126 the error is absolute.
        np.testing.assert_allclose(got, exact.astype(np.float32), rtol=1e-6, atol=2e-38)


def test_nan_passes_relu_and_clip(host: Cpu) -> None:
    x = np.array([np.nan, -1, 0, 7, np.inf, -np.inf], np.float32)
    module = module_of(lambda a: op.nn.relu(op.clip(a, -2.0, 5.0)), x.shape)
    np.testing.assert_array_equal(run(module, host, x), [np.nan, 0, 0, 5, 5, 0])


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, -1.0, 0.5, 2.5])
def test_powers(host: Cpu, exponent: float) -> None:
    x = np.abs(random(0, 37)) + np.float32(0.1)
    module = module_of(lambda a: op.power(a, relax.const(exponent, "float32")), x.shape)
    np.testing.assert_allclose(run(module, host, x), x.astype(np.float64) ** exponent, rtol=1e-6)


def test_whole_numbers_and_truth(host: Cpu) -> None:
    x, y = (np.random.default_rng(seed).integers(-50, 50, (5, 37)) for seed in (1, 2))
    module = module_of(
        lambda a, b: op.where(op.greater(a, b), a, op.subtract(b, a)), (5, 37), (5, 37), dtype="int64"
    )
    np.testing.assert_array_equal(run(module, host, x, y), np.where(x > y, x, y - x))


# -- moving -----------------------------------------------------------------------------------------


@FEW
@given(
    shape=st.lists(st.integers(1, 37), min_size=2, max_size=4),
    order=st.permutations(range(4)),
)
def test_transpose(host: Cpu, shape: list[int], order: list[int]) -> None:
    axes = [axis for axis in order if axis < len(shape)]
    x = random(0, *shape)
    out = tuple(shape[axis] for axis in axes)
    module = module_of(lambda a: op.negative(op.permute_dims(a, axes)), x.shape)
    np.testing.assert_array_equal(run_alone(module, host, [x], out), -x.transpose(axes))


@FEW
@given(
    shape=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    axis=st.integers(0, 2),
    sizes=st.lists(st.integers(1, 35), min_size=1, max_size=3),
)
def test_concatenation(host: Cpu, shape: list[int], axis: int, sizes: list[int]) -> None:
    shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for size in [shape[axis], *sizes]]
    inputs = [random(i, *one) for i, one in enumerate(shapes)]
    exact = np.concatenate(inputs, axis)
    module = module_of(lambda *given: op.concat(list(given), axis), *shapes)
    np.testing.assert_array_equal(run_alone(module, host, inputs, exact.shape), exact)


def concatenated_in_heads(heads: int, half: int) -> tuple[Any, list[tuple[int, ...]]]:
    """Rotary positions, which concatenate the halves of each head, and put the heads beside each other."""
    wide = (2, 3, heads * 2 * half)

    def build(x: Any, cos: Any, sin: Any) -> Any:
        halves = op.split(op.reshape(x, (2, 3, heads, 2 * half)), 2, 3)
        left = op.subtract(op.multiply(halves[0], cos), op.multiply(halves[1], sin))
        right = op.add(op.multiply(halves[0], sin), op.multiply(halves[1], cos))
        return op.reshape(op.concat([left, right], 3), wide)

    return build, [wide, (2, 3, 1, half), (2, 3, 1, half)]


@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("half", [1, 2, 4, 5, 8, 16, 24])
def test_halves_of_heads_are_concatenated_and_put_back(host: Cpu, heads: int, half: int) -> None:
    build, shapes = concatenated_in_heads(heads, half)
    x, cos, sin = (random(i, *shape) for i, shape in enumerate(shapes))
    left, right = np.split(x.reshape(2, 3, heads, 2 * half), 2, 3)
    exact = np.concatenate([left * cos - right * sin, left * sin + right * cos], 3).reshape(x.shape)
    module = module_of(build, *shapes)
    np.testing.assert_allclose(
        run_alone(module, host, [x, cos, sin], exact.shape), exact, rtol=1e-5, atol=1e-5
    )


def test_conditions_are_decided_outside_of_vectors(host: Cpu) -> None:
    build, shapes = concatenated_in_heads(4, 32)
    for module in (
        module_of(build, *shapes),
        module_of(lambda a, b: op.concat([a, b], 1), (3, 20), (3, 17)),
        module_of(lambda a: op.nn.pad(op.add(a, a), [0, 0, 3, 5]), (3, 20)),
    ):
        text = str(fuse_and_schedule(host)(module))
        assert "T.vectorized" in text
        assert "if_then_else" not in text
        assert "% T.int64(64)" not in text  # each half is read by neighbours


@FEW
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(1, 40)),
    pads=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_padding(host: Cpu, shape: tuple[int, int, int], pads: list[int]) -> None:
    x = random(0, *shape)
    exact = np.pad(x, list(zip(pads[::2], pads[1::2], strict=True)), constant_values=1.5)
    # The first addition keeps a function when nothing is padded.
    module = module_of(lambda a: op.nn.pad(op.add(a, a), pads, pad_value=3.0), x.shape)
    np.testing.assert_array_equal(run(module, host, x), 2 * exact)


@FEW
@given(start=st.integers(0, 9), stop=st.integers(20, 40), step=st.integers(1, 4))
def test_slices(host: Cpu, start: int, stop: int, step: int) -> None:
    x = random(0, 3, 40)
    module = module_of(lambda a: op.negative(op.strided_slice(a, [1], [start], [stop], [step])), x.shape)
    exact = -x[:, start:stop:step]
    np.testing.assert_array_equal(run_alone(module, host, [x], exact.shape), exact)


def test_heads_are_cut_out_and_put_back(host: Cpu) -> None:
    x = random(0, 2, 19, 48)

    def build(a: Any) -> Any:
        heads = op.permute_dims(op.reshape(a, (2, 19, 3, 16)), [0, 2, 1, 3])
        return op.reshape(op.permute_dims(op.nn.relu(heads), [0, 2, 1, 3]), (2, 19, 48))

    np.testing.assert_array_equal(run(module_of(build, x.shape), host, x), np.maximum(x, 0))


# -- reducing ---------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(["sum", "mean", "max", "min", "prod"]),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    chosen=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_reductions(host: Cpu, name: str, shape: list[int], chosen: list[bool]) -> None:
    axes = [axis for axis in range(len(shape)) if chosen[axis]] or [len(shape) - 1]
    x = random(0, *shape)
    x = np.float32(1) + x / np.float32(100 * math.sqrt(x.size)) if name == "prod" else x
    got = run(module_of(lambda a: getattr(op, name)(a, axes, True), x.shape), host, x)
    exact = getattr(np, name)(x.astype(np.float64), tuple(axes), keepdims=True)
    scale = np.abs(x).sum(tuple(axes), keepdims=True) if name in ("sum", "mean") else np.abs(exact)
    # Every factor of a product may round once.
    rounding = 2**-24 * x.size if name == "prod" else 1e-6
    assert (np.abs(got - exact) <= 1e-6 * scale + rounding * np.abs(exact)).all()


@pytest.mark.parametrize("axes", [[0], [1], [0, 1]])
@pytest.mark.parametrize("name", ["max", "min"])
def test_nan_passes_the_largest_and_the_smallest(host: Cpu, name: str, axes: list[int]) -> None:
    x = random(0, 5, 67)
    x[2, [3, 40, 66]] = np.nan
    got = run(module_of(lambda a: getattr(op, name)(a, axes, True), x.shape), host, x)
    np.testing.assert_array_equal(got, getattr(np, name)(x, tuple(axes), keepdims=True))
    y = random(1, 5, 67)
    y[1, ::3] = np.nan
    pairs = module_of(lambda a, b: getattr(op, f"{name}imum")(a, b), x.shape, x.shape)
    np.testing.assert_array_equal(run(pairs, host, x, y), getattr(np, f"{name}imum")(x, y))


@pytest.mark.parametrize("name", ["max", "min"])
def test_rows_of_infinities_stay_infinite(host: Cpu, name: str) -> None:
    x = np.full((3, 40), -np.inf if name == "max" else np.inf, np.float32)
    for axis in (0, 1):
        got = run(module_of(lambda a, axis=axis: getattr(op, name)(a, axis), x.shape), host, x)
        np.testing.assert_array_equal(got, getattr(np, name)(x, axis))


@pytest.mark.parametrize("axis", [0, 1])
def test_where_the_largest_is(host: Cpu, axis: int) -> None:
    x = random(0, 33, 50)
    x[7] = x[9]  # the first of equals
    got = run(module_of(lambda a: op.argmax(a, axis), x.shape), host, x)
    np.testing.assert_array_equal(got, x.argmax(axis))


@FEW
@given(
    m=st.integers(1, 20),
    k=st.integers(1, 30),
    n=st.integers(1, 70),
    batch=st.integers(1, 3),
    turned=st.booleans(),
)
def test_products_of_matrices(host: Cpu, m: int, k: int, n: int, batch: int, turned: bool) -> None:
    x, y = random(1, batch, m, k), random(2, *((batch, n, k) if turned else (batch, k, n)))

    def build(a: Any, b: Any) -> Any:
        return op.matmul(a, op.permute_dims(b, [0, 2, 1]) if turned else b)

    got = run(module_of(build, x.shape, y.shape), host, x, y)
    exact = x.astype(np.float64) @ (y.swapaxes(1, 2) if turned else y)
    np.testing.assert_allclose(got, exact, atol=1e-5 * math.sqrt(k) + 1e-6)


@FEW
@given(
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    kernel=st.integers(1, 3),
    size=st.integers(5, 20),
)
def test_convolutions(host: Cpu, groups: int, stride: int, kernel: int, size: int) -> None:
    torch = pytest.importorskip("torch", reason="the reference")
    x, w = random(1, 2, 4, size, size + 3), random(2, 8, 4 // groups, kernel, kernel)
    module = module_of(lambda a, b: op.nn.conv2d(a, b, stride, 1, 1, groups), x.shape, w.shape)
    exact = torch.conv2d(torch.tensor(x).double(), torch.tensor(w).double(), None, stride, 1, 1, groups)
    np.testing.assert_allclose(run(module, host, x, w), exact.numpy(), atol=2e-5)


# -- kernels in place of operators ------------------------------------------------------------------


def test_softmax_and_norms_become_kernels(cpu: Cpu) -> None:
    def build(a: Any, g: Any, b: Any) -> Any:
        return op.nn.softmax(op.nn.layer_norm(a, g, b, [-1], 1e-5), 1)

    x, g, b = random(1, 3, 40, 65), random(2, 65), random(3, 65)
    module = module_of(build, x.shape, g.shape, b.shape)
    names = {variable.name_hint for variable in fuse_and_schedule(cpu)(module).get_global_vars()}
    assert any(name.startswith("layer_norm_") for name in names)
    assert any(name.startswith("softmax_") for name in names)
    exact = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * g + b
    exact = np.exp(exact - exact.max(1, keepdims=True))
    np.testing.assert_allclose(
        run(module, cpu, x, g, b), exact / exact.sum(1, keepdims=True), rtol=2e-5, atol=1e-7
    )


def test_a_norm_of_axes_apart_stays_an_operator(host: Cpu) -> None:
    x, g, b = random(1, 6, 4, 10), random(2, 6, 10), random(3, 6, 10)
    module = module_of(lambda a, s, t: op.nn.layer_norm(a, s, t, [0, 2], 1e-5), x.shape, g.shape, b.shape)
    got = run(module, host, x, g, b)
    exact = x - x.mean((0, 2), keepdims=True)
    exact = exact / np.sqrt((exact**2).mean((0, 2), keepdims=True) + 1e-5) * g[:, None] + b[:, None]
    np.testing.assert_allclose(got, exact, atol=1e-5)


# -- shapes that are not known ------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_an_open_batch(cpu: Cpu, batch: int) -> None:
    n = tirx.Var("n", "int64")

    def build(a: Any, g: Any, w: Any) -> Any:
        x = op.nn.softmax(op.nn.rms_norm(op.nn.gelu(a), g, [-1], 1e-6), -1)
        return op.mean(op.concat([op.permute_dims(op.matmul(x, w), [0, 2, 1]), x], 2), -1, True)

    x, g, w = random(1, batch, 20, 20), random(2, 20), random(3, 20, 20)
    got = run(module_of(build, (n, 20, 20), g.shape, w.shape), cpu, x, g, w)
    wide = x.astype(np.float64)
    y = wide * 0.5 * (1 + erf(wide / math.sqrt(2)))
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * g
    y = np.exp(y - y.max(-1, keepdims=True))
    y = y / y.sum(-1, keepdims=True)
    exact = np.concatenate([(y @ w).swapaxes(1, 2), y], 2).mean(-1, keepdims=True)
    np.testing.assert_allclose(got, exact, atol=1e-5)


def test_code_for_open_sizes_knows_that_buffers_lie_apart(host: Cpu) -> None:
    # The function that computes shapes is TVM's, and comes last.
    n = tirx.Var("n", "int64")
    executable, _ = compile_module(module_of(op.matmul, (n, 24), (24, 40)), host)
    (code,) = (one.inspect_source("ll") for one in _modules(executable.mod) if one.kind == "llvm")
    assert "shape_func" in code
    assert re.search(r"@matmul_compute_\([^)]*ptr noalias", code)


def _modules(module: Any) -> Iterator[Any]:
    yield module
    for one in module.imports:
        yield from _modules(one)


@pytest.mark.parametrize("length", [3, 16, 1000])
def test_an_open_last_axis(cpu: Cpu, length: int) -> None:
    n = tirx.Var("n", "int64")
    x = random(0, 4, length)
    got = run(module_of(lambda a: op.sum(op.tanh(a), -1), (4, n)), cpu, x)
    np.testing.assert_allclose(got, np.tanh(x.astype(np.float64)).sum(-1), rtol=1e-5, atol=1e-5)


# -- what stays as it was ----------------------------------------------------------------------------


def test_functions_that_stay_naive_are_told(host: Cpu) -> None:
    module = module_of(lambda a: op.cumsum(a, 0), (5, 6))
    x = random(0, 5, 6)
    executable, naive = compile_module(module, host)
    assert list(naive.values()) == ["it is not made of plain boxes of loops"]
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_allclose(got, x.cumsum(0), rtol=1e-5, atol=1e-6)


def test_a_schedule_that_is_there_is_kept(host: Cpu) -> None:
    module = fuse_and_schedule(host)(module_of(lambda a: op.negative(a), (8,)))
    again = fuse_and_schedule(host)(module)
    assert naive_functions(again) == {}
    tvm.ir.assert_structural_equal(again, module)
