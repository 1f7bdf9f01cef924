"""Operators that mean something else in older opsets or for other types: the oracle's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.models.sketch import Sketch

torch = pytest.importorskip("torch")

from effic.backends.torch.names import state_keys  # noqa: E402
from effic.backends.torch.to_module import to_module  # noqa: E402

RNG = np.random.default_rng(0)
CUBE = RNG.standard_normal((2, 3, 4)).astype(np.float32)
COUNTS = np.array([-7, -1, 0, 5, 9], np.int64)


def check(
    op_type: str,
    *inputs: np.ndarray,
    opset: int = 18,
    outputs: int = 1,
    constants: tuple[int, ...] = (),
    exact: bool = False,
    **attributes: Any,
) -> None:
    """One node, its inputs from the caller except for those that are constants."""
    g = Sketch(0, opset)
    feeds, values = {}, []
    for i, array in enumerate(inputs):
        if i in constants:
            values.append(g.weight(f"c{i}", array))
        else:
            dims = [f"d{i}{axis}" for axis in range(array.ndim)]
            values.append(g.input(f"x{i}", dims, ir.DataType.from_numpy(array.dtype)))
            feeds[f"x{i}"] = array
    made = g.multi(op_type, *values, outputs=outputs, at="n", **attributes)
    ends = []
    for i, value in enumerate(made):
        value.name = f"y{i}"
        ends.append(value)
    graph = ir.Graph(
        g.inputs, ends, nodes=g.nodes, initializers=g.initializers, opset_imports={"": opset}, name="main"
    )
    model = Model(ir.Model(graph, ir_version=8))
    want = Oracle(_typed(model)).run(feeds)
    got = to_module(model)(*[torch.from_numpy(array) for array in feeds.values()])
    got = got if isinstance(got, tuple) else (got,)
    for expected, tensor in zip(want.values(), got, strict=True):
        array = tensor.detach().numpy()
        assert array.dtype == expected.dtype
        assert array.shape == expected.shape
        if exact or expected.dtype.kind in "biu":
            np.testing.assert_array_equal(array, expected)
        else:
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)


def _typed(model: Model) -> Model:
    """The oracle wants types on outputs: those that inference finds."""
    from onnx_ir.passes import common

    copy = model.clone()
    common.ShapeInferencePass()(copy.ir)
    return copy


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_softmax_flattens_before_opset_13(op_type: str, opset: int, axis: int | None) -> None:
    check(op_type, CUBE, opset=opset, **({} if axis is None else {"axis": axis}))


@pytest.mark.parametrize("opset", [8, 11, 13])
def test_clip_has_bounds_as_attributes_or_inputs(opset: int) -> None:
    if opset < 11:
        check("Clip", CUBE, opset=opset, min=-0.5, max=0.5)
        return
    low, high = np.array(-0.5, np.float32), np.array(0.5, np.float32)
    check("Clip", CUBE, low, high, opset=opset, constants=(1, 2))
    check("Clip", CUBE, low, high, opset=opset)
    check("Clip", CUBE, low, opset=opset, constants=(1,))


def test_integers_divide_towards_zero() -> None:
    check("Div", COUNTS, np.array([2, 2, 3, -2, 4], np.int64))
    check("Div", COUNTS.astype(np.int32), np.array([3], np.int32), constants=(1,))


def test_mod_takes_the_sign_of_the_divisor_or_with_fmod_of_the_dividend() -> None:
    divisor = np.array([3, -3, 4, -4, 2], np.int64)
    check("Mod", COUNTS, divisor)
    check("Mod", COUNTS, divisor, fmod=1)
    check("Mod", CUBE, np.array([0.3], np.float32), fmod=1)


def test_pow_has_the_type_of_its_base() -> None:
    check("Pow", np.array([1, 2, 3], np.int64), np.array([2.0], np.float32))
    check("Pow", np.array([1.5, 2, 3], np.float32), np.array([2], np.int64))


@pytest.mark.parametrize("to", ["INT8", "UINT8", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE"])
def test_cast_truncates(to: str) -> None:
    values = np.array([-1.9, -0.5, 0.0, 0.5, 1.9, 100.7], np.float32)
    check("Cast", values if to != "UINT8" else np.abs(values), to=int(ir.DataType[to]))
    check("Cast", COUNTS, to=int(ir.DataType[to]))


def test_reshape_copies_dimensions_for_zero() -> None:
    check("Reshape", CUBE, np.array([0, -1], np.int64), constants=(1,), exact=True)
    check("Reshape", CUBE, np.array([0, 4, 3], np.int64), exact=True)
    empty = np.zeros((0, 3), np.float32)
    check("Reshape", empty, np.array([3, 0], np.int64), constants=(1,), exact=True, allowzero=1)


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ([-1], [-9999], [2], [-1]),
        ([3, 0], [0, 9999], [2, 1], [-2, 2]),
        ([1], [-1], [-1], [1]),
        ([9], [0], [1], [-1]),
        ([0], [2**62], [0], [1]),
        ([2], [1], [2], [1]),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_slices(
    starts: list[int], ends: list[int], axes: list[int], steps: list[int], constant: bool
) -> None:
    given_ = [np.array(part, np.int64) for part in (starts, ends, axes, steps)]
    check("Slice", CUBE, *given_, constants=(1, 2, 3, 4) if constant else (), exact=True)


def test_slice_had_attributes() -> None:
    check("Slice", CUBE, opset=9, starts=[1, 0], ends=[3, -1], axes=[1, 2], exact=True)


@pytest.mark.parametrize(
    "op_type", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"]
)
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions_have_axes_as_attribute_or_input(op_type: str, keepdims: int) -> None:
    check(op_type, CUBE, opset=11, axes=[0, -1], keepdims=keepdims)
    check(op_type, CUBE, opset=11, keepdims=keepdims)
    check(op_type, CUBE, np.array([1], np.int64), opset=18, constants=(1,), keepdims=keepdims)
    check(op_type, CUBE, opset=18, keepdims=keepdims, noop_with_empty_axes=1)


def test_split_in_equal_and_in_named_parts() -> None:
    check("Split", CUBE, opset=11, outputs=2, axis=2)
    check("Split", CUBE, opset=11, outputs=2, axis=2, split=[1, 3])
    check("Split", CUBE, np.array([3, 1], np.int64), opset=13, outputs=2, axis=-1, constants=(1,))
    check("Split", CUBE, opset=18, outputs=2, axis=1, num_outputs=2)


def test_expand_broadcasts_both_ways() -> None:
    for constant in ((1,), ()):
        check("Expand", CUBE[:, :1], np.array([5, 1], np.int64), constants=constant, exact=True)
        check("Expand", CUBE, np.array([2, 1, 3, 1], np.int64), constants=constant, exact=True)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization_of_all_ages(opset: int) -> None:
    x = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    parameters = [RNG.uniform(0.5, 1.5, 3).astype(np.float32) for _ in range(4)]
    check("BatchNormalization", x, *parameters, opset=opset, constants=(1, 2, 3, 4), epsilon=1e-3)


def test_gemm_in_all_its_forms() -> None:
    a, b = RNG.standard_normal((4, 3)).astype(np.float32), RNG.standard_normal((5, 4)).astype(np.float32)
    for c in (np.ones((3, 5), np.float32), np.arange(5, dtype=np.float32), np.ones((3, 1), np.float32)):
        check("Gemm", a, b, c, transA=1, transB=1, alpha=0.5, beta=2.0)
        check("Gemm", a.T.copy(), b, c, transB=1)
        check("Gemm", a.T.copy(), b.T.copy(), c)
    check("Gemm", a.T.copy(), b, transB=1)


def test_flatten_at_any_axis() -> None:
    for axis in (0, 1, 2, 3, -1):
        check("Flatten", CUBE, axis=axis, exact=True)


def test_dropout_passes_everything_on() -> None:
    check("Dropout", CUBE, opset=10, ratio=0.9, exact=True)
    check("Dropout", CUBE, np.array(0.9, np.float32), opset=13, constants=(1,), exact=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab._/g", min_size=1, max_size=6), unique=True, max_size=8))
def test_state_keys_are_different_and_can_all_be_held(names: list[str]) -> None:
    """Whatever the names: a module takes all the keys, and hands them out again."""
    from effic.backends.torch.to_module import _attach

    keys = state_keys(names)
    assert set(keys) == set(names)
    module = torch.fx.GraphModule({}, torch.fx.Graph())
    for number, key in enumerate(keys.values()):
        _attach(module, key, torch.tensor(float(number)))
    state = module.state_dict()
    assert set(state) == set(keys.values())
    assert [state[key].item() for key in keys.values()] == list(range(len(names)))
