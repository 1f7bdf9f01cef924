"""From a model to a Relax module: one function per set of input shapes, weights as their parameters.

Every node of the specialized model goes through a converter: effic's own
(:mod:`effic.backends.tvm.operators`) or, where there is none, the one of TVM's ONNX importer. What no
converter can hold is collected first, over the whole graph, and named; see
:mod:`effic.backends.tvm.coverage`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import relax, tirx

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.legal import illegal_nodes, why_not_legal
from effic.backends.tvm.lowering import (
    Lowering,
    NotLoweredError,
    Parameters,
    Shared,
    dtype_of,
    is_read,
    relax_dtype,
    shape_of,
    why_no_type,
)
from effic.backends.tvm.operators import EXPANDED, find_converter, key_of, through_blocked
from effic.backends.tvm.operators.encoded import compressed_steps, decodes_weight
from effic.backends.tvm.operators.importer import by_importer
from effic.backends.tvm.private_api import IMPORTER_ERRORS, importer_knows
from effic.backends.tvm.specialize import Dims, open_dims, parse_shapes, specialize
from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.evaluate import first_line
from effic.ir.model import Model
from effic.ir.onnx_checks import schema_of

_MAX_NAMED, _MAX_SAID = 5, 160

# What inputs may be that are sizes or axes; what is computed with has more types than these.
_WHOLE = {"tensor(int32)", "tensor(int64)"}


@dataclass(frozen=True)
class Uncovered:
    """A node that the target cannot run.

    Attributes:
        node: its name, or its first output's.
        op: its operator, with the domain where that is not ONNX's.
        reason: why, a phrase without a full stop.
    """

    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} '{self.node}': {self.reason}"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that goes in or comes out: its name in the model, type as NumPy names it, and sizes.

    An open dimension is a string, equal strings are equal sizes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Bucket:
    """One function of the module.

    Attributes:
        function: its name: ``main_0``, ``main_1`` …
        inputs: its first arguments.
        parameters: names of the arrays it takes after them.
        outputs: what it returns: one tensor, or a tuple of several (or of none).
    """

    function: str
    inputs: tuple[TensorSpec, ...]
    parameters: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Way:
    """How a node was lowered.

    Attributes:
        node: its name, or its first output's.
        op: its operator, with the domain where that is not ONNX's.
        by: ``effic`` or ``importer``: whose converter it was.
        kernels: effic's kernels that it calls; none where it is left to the schedules.
        why: what its converter tells of its choice, a phrase or nothing.
    """

    node: str
    op: str
    by: str
    kernels: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Signature:
    """How the functions of a module are called, and how the nodes of the first were lowered."""

    buckets: tuple[Bucket, ...]
    ways: tuple[Way, ...] = ()


def build_relax(
    model: Model,
    cpu: Cpu | None,
    shapes: str = "",
    options: Mapping[str, Any] | None = None,
    *,
    weights: bool = True,
) -> tuple[Any, Parameters, Signature]:
    """Lower a model to Relax.

    Args:
        model: in canonical form; it is not changed.
        cpu: what kernels are made for; None leaves them out (for a GPU).
        shapes: the buckets, ``batch=1,seq=64;batch=8,seq=64``; see :func:`buckets_of`.
        options: options of the target that converters heed, by name (``activations``).
        weights: False for a trial: no weight is packed, and there are no parameters.

    Returns:
        The ``tvm.IRModule``; the parameters by name, large ones in files; and how the functions are called.

    Raises:
        UnsupportedError: nodes that cannot be lowered, named.
        UsageError: sizes of open dimensions are missing, or name none.
    """
    bb, shared, buckets = relax.BlockBuilder(), Shared(keep=weights), []
    # Once for all sizes: what does not depend on them is folded here, and shared.
    model = specialize(model, {})
    functions = []
    for number, dims in enumerate(buckets_of(model, cpu, shapes, options)):
        function = _Function(specialize(model, dims) if dims else model, bb, cpu, shared, options)
        functions.append(function)  # keeps its tensors alive: parameters are told apart by them
        bucket, uncovered = function.build(f"main_{number}")
        refuse_uncovered(uncovered)
        buckets.append(bucket)
    return bb.get(), Parameters(shared.parameters), Signature(tuple(buckets), tuple(functions[0].ways))


def buckets_of(
    model: Model, cpu: Cpu | None, shapes: str, options: Mapping[str, Any] | None = None
) -> list[Dims]:
    """The sets of sizes to make functions for.

    Without ``shapes`` a model whose only open dimension is the first one of its inputs keeps it open,
    where every operator can be lowered that way.

    Raises:
        UsageError: sizes are missing; the text names the dimensions.
    """
    dims = open_dims(model)
    buckets = parse_shapes(shapes)
    if buckets:
        for bucket in buckets:
            if missing := [name for name in dims if name not in bucket]:
                raise UsageError(
                    f"shapes gives no size for {_listed(missing)}; add {missing[0]}=SIZE to each set of sizes"
                )
        return buckets
    if not dims:
        return [{}]
    example = ",".join(f"{name}={1 if axes == {0} else 64}" for name, axes in dims.items())
    advice = f"pin them with shapes, as in shapes={example}"
    if len(dims) > 1 or next(iter(dims.values())) != {0}:
        raise UsageError(f"the inputs have open dimensions, {_listed(list(dims))}; {advice}")
    uncovered = try_bucket(model, {}, cpu, options)
    if uncovered:
        # Told apart: what no sizes help is refused with its own reason.
        refuse_uncovered(try_bucket(model, dict.fromkeys(dims, 1), cpu, options))
        raise UsageError(
            f"the open dimension {_listed(list(dims))} cannot stay open ({uncovered[0]}); "
            f"pin it with shapes, as in shapes={example}"
        )
    return [{}]


def try_bucket(
    model: Model, dims: Dims, cpu: Cpu | None, options: Mapping[str, Any] | None = None
) -> list[Uncovered]:
    """What cannot be lowered at these sizes; nothing is compiled."""
    return survey_bucket(model, dims, cpu, options)[1]


def survey_bucket(
    model: Model, dims: Dims, cpu: Cpu | None, options: Mapping[str, Any] | None = None
) -> tuple[list[Way], list[Uncovered]]:
    """How each node would be lowered at these sizes, and what cannot be; nothing is compiled."""
    function = _Function(specialize(model, dims), relax.BlockBuilder(), cpu, Shared(keep=False), options)
    _, uncovered = function.build("main")
    return function.ways, uncovered or function.illegal()


def refuse_uncovered(uncovered: list[Uncovered]) -> None:
    """Raise for nodes that cannot be lowered.

    Raises:
        UnsupportedError: there are some; the first ones are named.
    """
    if uncovered:
        named = "; ".join(str(one) for one in uncovered[:_MAX_NAMED])
        more = f"; and {len(uncovered) - _MAX_NAMED} more" if len(uncovered) > _MAX_NAMED else ""
        raise UnsupportedError(f"TVM cannot run {named}{more}; use the target ort-cpu for this model")


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


class _Function:
    """Builds one function of the module."""

    def __init__(
        self,
        model: Model,
        bb: relax.BlockBuilder,
        cpu: Cpu | None,
        shared: Shared,
        options: Mapping[str, Any] | None,
    ) -> None:
        self.lowering = Lowering(model, bb, cpu, shared, dict(options or {}))
        self.graph, self.bb = model.graph, bb
        self.uncovered: list[Uncovered] = []
        self.ways: list[Way] = []
        self._sizes: dict[str, Any] = {}

    def build(self, name: str) -> tuple[Bucket, list[Uncovered]]:
        """Emit the function; where something is uncovered, what it returns is of no use."""
        arguments = [self._input(value) for value in self.graph.inputs]
        inputs = [one for one in arguments if one is not None]
        outputs: list[Any] = []
        with self.bb.function(name):
            with self.bb.dataflow():
                later = compressed_steps(self.graph)
                for node in self.graph:
                    if node not in later:
                        self._convert(node)
                for value in self.graph.outputs:
                    outputs += self._output(value)
                whole = outputs[0] if len(outputs) == 1 else relax.Tuple(outputs)
                result = self.bb.emit_output(whole)
            variables = self.lowering.variables
            self.bb.emit_func_output(result, [*inputs, *variables.values()])
        specs = () if self.uncovered else self._specs(outputs)
        given = [value.name or "" for value in self.graph.inputs]
        taken = tuple(self._spec(n, v) for n, v in zip(given, arguments, strict=True) if v is not None)
        return Bucket(name, taken, tuple(variables), specs), self.uncovered

    def illegal(self) -> list[Uncovered]:
        """What TVM cannot write functions for, once everything was lowered."""
        error = why_not_legal(self.bb.get(), self.lowering)
        if error is None:
            return []
        found = [
            Uncovered(name_of(node), key_of(node), f"TVM cannot compile it: {_said(why)}")
            for node, why in illegal_nodes(self.lowering, self.graph, convert)
        ]
        return found or [Uncovered("the model", "model", f"TVM cannot compile it: {_said(error)}")]

    def _input(self, value: ir.Value) -> Any | None:
        """The argument of an input; None where it cannot be held."""
        reason = why_no_type(value.dtype) if isinstance(value.type, ir.TensorType) else "is no tensor"
        if reason is None and value.shape is None:
            reason = "has an unknown number of dimensions"
        if reason is None and value.shape is not None and 0 in value.shape and is_read(value):
            reason = "has no elements, and kernels are made for some"
        if reason is not None:
            self.uncovered.append(Uncovered(value.name or "?", "input", reason))
            self.lowering.give_up(value)
            return None
        assert value.shape is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else self._size(str(d.value)) for d in value.shape]
        kind = relax.TensorType(shape, relax_dtype(value.dtype))
        variable = relax.Var(self.lowering.identifier(value.name or "x"), kind)
        self.lowering.set(value, variable)
        return variable

    def _size(self, name: str) -> Any:
        if name not in self._sizes:
            self._sizes[name] = tirx.Var(self.lowering.identifier(name), "int64")
        return self._sizes[name]

    def _convert(self, node: ir.Node) -> None:
        called, told = len(self.lowering.called), len(self.lowering.told)
        name = name_of(node)
        try:
            by = convert(self.lowering, node)
        except NotLoweredError:
            # It reads what another node was to make: that one is blamed. Unless it has no converter itself.
            reason = why_no_converter(node)
        except UnsupportedError as error:
            reason = str(error).removeprefix(f"{node.op_type} '{node.name}' ")
        except IMPORTER_ERRORS as error:
            reason = _why_refused(self.lowering, node, error)
        else:
            if by is not None:
                kernels, why = tuple(self.lowering.called[called:]), "; ".join(self.lowering.told[told:])
                self.ways.append(Way(name, key_of(node), by, kernels, why))
            return
        for value in node.outputs:
            self.lowering.give_up(value)
        if reason is not None:
            self.uncovered.append(Uncovered(name, key_of(node), reason))

    def _output(self, value: ir.Value) -> list[Any]:
        try:
            return [self.lowering.tensor(value)]
        except NotLoweredError:
            return []
        except UnsupportedError as error:
            self.uncovered.append(Uncovered(value.name or "?", "output", str(error)))
            return []

    def _specs(self, outputs: list[Any]) -> tuple[TensorSpec, ...]:
        names = [value.name or "" for value in self.graph.outputs]
        return tuple(self._spec(n, v) for n, v in zip(names, outputs, strict=True))

    def _spec(self, name: str, variable: Any) -> TensorSpec:
        names = {variable: name for name, variable in self._sizes.items()}
        shape = tuple(d if isinstance(d, int) else names.get(d, str(d)) for d in shape_of(variable))
        return TensorSpec(name, dtype_of(variable), shape)


def name_of(node: ir.Node) -> str:
    """A node's name, or its first output's."""
    return node.name or next((v.name for v in node.outputs if v.name), None) or "?"


def why_no_converter(node: ir.Node) -> str | None:
    """Why an operator cannot be lowered whatever it reads, or None."""
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    ):
        return "control flow stays as it is where its condition is computed; there is no lowering for it"
    key = key_of(node)
    if find_converter(key) is None and (key in EXPANDED or not importer_knows(key)):
        return "there is no converter for this operator"
    return None


def convert(lowering: Lowering, node: ir.Node) -> str | None:
    """Lower one node.

    Returns:
        Whose converter it was, ``effic`` or ``importer``; None where there was nothing to do.

    Raises:
        UnsupportedError: it cannot be lowered.
        Exception: one of :data:`effic.backends.tvm.private_api.IMPORTER_ERRORS`.
    """
    if reason := why_no_converter(node):
        raise UnsupportedError(reason)
    if node.op_type == "Constant" or lowering.is_done(node) or decodes_weight(node):
        return None
    for value in node.outputs:
        if value.shape is not None and 0 in value.shape and is_read(value):
            raise UnsupportedError(f"'{value.name}' has no elements, and kernels are made for some")
    if through_blocked(lowering, node):
        return "effic"
    own = find_converter(key_of(node))
    if own is not None:
        own(lowering, node)
        return "effic"
    by_importer(lowering, node)
    return "importer"


def _why_refused(lowering: Lowering, node: ir.Node, error: BaseException) -> str:
    """Why the importer's converter raised: most often sizes or axes that are not known, which it says in its terms."""
    schema = schema_of(key_of(node), node.version or lowering.opset)
    for value, formal in zip(node.inputs, schema.inputs if schema is not None else (), strict=False):
        if value is not None and not lowering.is_constant(value) and formal.types <= _WHOLE:
            return f"takes '{value.name}' from the inputs' values"
    if any(v is not None and (v.shape is None or not v.shape.is_static()) for v in node.inputs):
        return "has inputs whose sizes are left open, which TVM's converter refuses; pin them with shapes"
    return f"TVM's converter refuses it: {_said(error)}"


def _said(error: BaseException) -> str:
    """What TVM says, without its stack of C++ frames and what it prints of its operators."""
    lines = [line.strip() for line in str(error).splitlines()]
    # Printed Relax, which names what an error is about, comes in lines of its own.
    told = [line for line in lines if line and not line.startswith(("#", "@", "from ", "R.", "import "))]
    text = told[-1] if told else type(error).__name__
    text = re.sub(r'^In ir\.Op\(.*?name="([\w.]+)".*?support_level=\d+\), ', r"\1: ", text)
    return first_line(ValueError(re.sub(r"T\.int64\((\d+)\)", r"\1", text)))[:_MAX_SAID]
