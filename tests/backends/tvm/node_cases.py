"""ONNX's own test cases of single nodes on TVM: many of them in one module, compiled once.

A case comes in two forms: as it is, and with all inputs but the first as constants, which is how shapes,
axes and weights reach a compiler.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as node_cases
import onnx.numpy_helper
import onnx_ir as ir
import tvm
import tvm_ffi
from onnx.backend.test.case.test_case import TestCase
from tvm import relax

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.relax_builder import Signature, build_relax
from effic.backends.tvm.schedule.pipeline import compile_module
from effic.ir.errors import UnsupportedError
from effic.ir.model import Model

CPU = Cpu.host(1)

ALL = os.environ.get("EFFIC_ALL_NODE_CASES", "") == "1"
"""Whether all cases are run, which takes a quarter of an hour; else some of each operator."""

# Making these takes four times as long as making all others: expected outputs in loops over every window.
SLOW_TO_MAKE = ("averagepool", "lppool", "maxpool")

HALVES = {"float16": 2**-8}
"""Four steps of the last place."""


def load_cases() -> dict[str, TestCase]:
    """The cases by name. Inputs of many are random: seeded here."""
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(node_cases.__path__, f"{node_cases.__name__}."):
            if ALL or module.name.rpartition(".")[2] not in SLOW_TO_MAKE:
                importlib.import_module(module.name)
    return {case.name: case for case in node_cases._NodeTestCases if case.model is not None}


@dataclass
class Form:
    """A case to be run: a model, what goes in, and what has to come out."""

    name: str
    model: Model
    inputs: dict[str, np.ndarray]
    expected: list[np.ndarray]
    rtol: float


def form(case: TestCase, *, constants: bool) -> Form | None:
    """A case in one of its forms; None where inputs or outputs are no tensors of NumPy's types."""
    assert case.model is not None
    assert case.data_sets is not None
    arrays, expected = ([_array(value) for value in side] for side in case.data_sets[0])
    if any(array is None for array in [*arrays, *expected]):
        return None
    model = Model(ir.from_proto(case.model))
    graph, inputs = model.graph, {}
    for index, (value, array) in enumerate(zip(list(graph.inputs), arrays, strict=True)):
        if constants and index:
            graph.inputs.remove(value)
            value.const_value = ir.Tensor(array, dtype=value.dtype, name=value.name)
            graph.register_initializer(value)
        else:
            inputs[value.name or ""] = array
    suffix = "constants" if constants else "inputs"
    return Form(f"{case.name}[{suffix}]", model, inputs, expected, case.rtol)


def _array(value: Any) -> np.ndarray | None:
    value = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
    if not isinstance(value, (np.ndarray, np.generic, int, float)):
        return None
    return np.asarray(value)


def lowered(form: Form) -> tuple[Any, dict[str, np.ndarray], Signature] | UnsupportedError:
    """The module of a case, its parameters and how it is called; the error where it is refused."""
    try:
        return build_relax(form.model, CPU)
    except UnsupportedError as error:
        return error


class Group:
    """Cases that are compiled together."""

    def __init__(self, forms: Iterable[Form]) -> None:
        self.refused: dict[str, str] = {}
        self.forms = {form.name: form for form in forms}
        found = {name: lowered(form) for name, form in self.forms.items()}
        functions: dict[Any, Any] = {}
        built = {}
        for number, (name, one) in enumerate(found.items()):
            if isinstance(one, UnsupportedError):
                self.refused[name] = str(one)
            else:
                _add(functions, one[0], f"case_{number}")
                built[name] = (f"case_{number}_main_0", one[1], one[2].buckets[0])
        self.machine: Any = None
        if functions:
            executable, _ = compile_module(tvm.IRModule(functions), CPU)
            self.machine = relax.VirtualMachine(executable, tvm.cpu())
        self.built = built

    def run(self, name: str) -> list[np.ndarray]:
        """What a case that is not refused makes of its inputs."""
        entry, parameters, bucket = self.built[name]
        given = [np.array(self.forms[name].inputs[one.name], order="C") for one in bucket.inputs]
        weights = [parameters[one] for one in bucket.parameters]
        result = self.machine[entry](*(tvm.runtime.tensor(a) for a in [*given, *weights]))
        return [one.numpy() for one in ([result] if len(bucket.outputs) == 1 else result)]


def _add(functions: dict[Any, Any], module: Any, prefix: str) -> None:
    """Add a module's functions under names of their own."""
    renamed = {}
    for variable, _ in module.functions_items():
        name = f"{prefix}_{variable.name_hint}"
        renamed[variable.name_hint] = new = tvm.ir.GlobalVar(name)
        relax.expr._update_type(new, variable.ty)
    for variable, function in module.functions_items():
        function = tvm_ffi.structural_map(function, (tvm.ir.GlobalVar, lambda v: renamed.get(v.name_hint, v)))
        new = renamed[variable.name_hint]
        functions[new] = function.with_attr("global_symbol", new.name_hint)


def check(form: Form, found: list[np.ndarray]) -> None:
    """Hold outputs against what ONNX says, with the case's own tolerance."""
    assert len(found) == len(form.expected)
    for array, expected in zip(found, form.expected, strict=True):
        assert array.shape == expected.shape
        assert array.dtype == expected.dtype
        if expected.dtype.kind in "biu":
            np.testing.assert_array_equal(array, expected)
            continue
        # Sums near zero have no relative accuracy; half precision is rounded differently on the way.
        rtol = max(form.rtol, HALVES.get(str(expected.dtype), 0.0))
        np.testing.assert_allclose(array.astype(np.float64), expected.astype(np.float64), rtol, 1e-6)
