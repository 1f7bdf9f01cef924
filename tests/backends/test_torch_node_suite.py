"""ONNX's own test cases of single nodes, for every operator the torch backend knows.

The cases come with the onnx package and are made in memory. Each is run twice: as it is, and with all
inputs but the first as constants, which takes other ways through the converters.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as node_cases
import onnx.numpy_helper
import onnx_ir as ir
import pytest
import torch
from onnx.backend.test.case.test_case import TestCase

from effic.backends.torch.builder import to_tensor
from effic.backends.torch.operators import OPERATORS
from effic.backends.torch.to_module import to_module
from effic.ir.model import ONNX_DOMAINS, Model

# What is not run: words of case names, and the reason.
EXCEPTIONS = {
    "bernoulli": "draws random numbers; see test_torch_operators",
    "training_dropout": "draws random numbers",
    "FLOAT4E2M1": "torch has no 4-bit floats; refused",
    "float4e2m1": "torch has no 4-bit floats; refused",
    "FLOAT8E8M0": "torch cannot compute with powers of two as a type; refused",
    "equal_string": "torch has no strings; refused",
    "scan_sum": "Scan of opset 8 has a batch axis that no later one has; refused",
    "downsample_scales_linear_align_corners": "a fractional size, where ONNX Runtime and torch take the whole one",
    "downsample_scales_cubic_align_corners": "a fractional size, where ONNX Runtime and torch take the whole one",
}
# Axes that are computed by the graph are refused where they decide the rank of the result.
CONSTANTS_ONLY = ("reduce_sum_empty_axes_input_noop",)

# Two steps of the last place.
HALVES = {ir.DataType.FLOAT16: 2**-9, ir.DataType.BFLOAT16: 2**-6}

# Operators without a case here: each has a test of its own in test_torch_operators.py.
TESTED_THERE = {
    "AveragePool",
    "Bernoulli",
    "ConcatFromSequence",
    "GlobalLpPool",
    "LpPool",
    "MaxPool",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "SequenceErase",
    "SimplifiedLayerNormalization",
    "com.microsoft::BiasGelu",
    "com.microsoft::FastGelu",
    "com.microsoft::GatherBlockQuantized",
    "com.microsoft::Gelu",
    "com.microsoft::MatMulNBits",
    "com.microsoft::QuickGelu",
    "com.microsoft::SimplifiedLayerNormalization",
    "com.microsoft::SkipLayerNormalization",
    "com.microsoft::SkipSimplifiedLayerNormalization",
}


# Making these takes four times as long as making all others: their expected outputs are computed in
# loops over every window, in Python. Pooling is compared with ONNX Runtime in test_torch_operators.py.
SLOW_TO_MAKE = ("averagepool", "lppool", "maxpool")


def load_cases() -> dict[str, TestCase]:
    """The cases by name. Inputs of many are random: seeded here."""
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(node_cases.__path__, f"{node_cases.__name__}."):
            if module.name.rpartition(".")[2] not in SLOW_TO_MAKE:
                importlib.import_module(module.name)
    return {case.name: case for case in node_cases._NodeTestCases}


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """The operators of a graph and its subgraphs, as the table has them."""
    for node in graph.node:
        yield node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}::{node.op_type}"
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from operators(inner)


def is_run(case: TestCase) -> bool:
    assert case.model is not None
    known = not case.model.functions and set(operators(case.model.graph)) <= OPERATORS.keys()
    return known and not any(word in case.name for word in EXCEPTIONS)


CASES = load_cases()
COVERED = {name: case for name, case in CASES.items() if is_run(case)}


def as_array(value: Any) -> Any:
    """Arrays of types NumPy lacks are written as protobuf tensors in the cases."""
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def as_torch(value: Any, type_: ir.TypeProtocol | None) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        return [as_torch(item, None) for item in value]
    value = as_array(value)
    dtype = type_.dtype if isinstance(type_, ir.TensorType) else None
    return to_tensor(np.asarray(value), dtype)


def as_numpy(value: Any) -> np.ndarray:
    value = value.detach()
    if value.dtype in (torch.bfloat16, torch.float16) or "float8" in str(value.dtype):
        value = value.to(torch.float32)
    return np.asarray(value.numpy())


def check(found: Any, expected: Any, case: TestCase) -> None:
    if expected is None:
        assert found is None
        return
    if isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check(one, other, case)
        return
    expected = np.asarray(as_array(expected))
    array = as_numpy(found)
    assert array.shape == expected.shape
    kind = ir.DataType.from_numpy(expected.dtype)
    assert found.dtype == to_tensor(np.zeros(0, expected.dtype), kind).dtype
    if kind.is_integer() or kind == ir.DataType.BOOL:
        wide = np.uint64 if kind == ir.DataType.UINT64 else np.int64
        np.testing.assert_array_equal(array.astype(wide), expected.astype(wide))
        return
    # Sums near zero have no relative accuracy; half precision is rounded differently on the way.
    rtol = max(case.rtol, HALVES.get(kind, 0.0))
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore"):  # NumPy warns of NaN in ml_dtypes' casts
        found, wanted = array.astype(wide), expected.astype(wide)
    np.testing.assert_allclose(found, wanted, rtol, 1e-6)


def run(case: TestCase, *, constants: bool) -> None:
    assert case.model is not None
    assert case.data_sets is not None
    for inputs, outputs in case.data_sets:
        model = Model(ir.from_proto(case.model))
        graph = model.graph
        feeds = {}
        for index, (value, array) in enumerate(zip(list(graph.inputs), inputs, strict=True)):
            array = as_array(array)
            if constants and index and isinstance(array, np.ndarray) and array.dtype.kind not in "OSU":
                graph.inputs.remove(value)
                value.const_value = ir.Tensor(array, dtype=value.dtype, name=value.name)
                graph.register_initializer(value)
            else:
                feeds[value.name] = as_torch(array, value.type)
        module = to_module(model, trainable=False)
        arguments = module.meta["effic"].inputs
        with torch.no_grad():
            found = module(**{arguments[name]: tensor for name, tensor in feeds.items()})
        made = found if len(graph.outputs) > 1 else (found,)
        for one, other in zip(made, outputs, strict=True):
            check(one, other, case)


@pytest.mark.parametrize("name", COVERED)
def test_case(name: str) -> None:
    case = COVERED[name]
    if not any(word in name for word in CONSTANTS_ONLY):
        run(case, constants=False)
    # An expanded case spells the operator out in others, which have cases of their own.
    if "_expanded" not in name:
        run(case, constants=True)


def test_every_operator_of_the_table_is_tested() -> None:
    here = {operator for case in COVERED.values() for operator in operators(case.model.graph)}
    assert OPERATORS.keys() - here == TESTED_THERE
    own = (Path(__file__).parent / "test_torch_operators.py").read_text()
    lacking = [key for key in TESTED_THERE if f'"{key.rpartition(":")[2]}"' not in own]
    assert not lacking


@pytest.mark.parametrize("word", [*EXCEPTIONS, *CONSTANTS_ONLY])
def test_exceptions_are_of_cases_there_are(word: str) -> None:
    assert any(word in name for name in CASES)
