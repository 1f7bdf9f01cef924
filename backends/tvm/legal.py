"""Whether TVM can write the functions of what was lowered: asked before a build, node by node where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, Shared
from effic.backends.tvm.private_api import IMPORTER_ERRORS
from effic.ir.errors import UnsupportedError

Convert = Callable[[Lowering, ir.Node], object]


def why_not_legal(module: Any, lowering: Lowering) -> Exception | None:
    """What TVM says when it cannot write the functions of a module's operators."""
    from tvm.target import Target

    target = Target({"kind": "llvm"}) if lowering.cpu is None else lowering.cpu.target()
    try:
        with target:
            relax.transform.LegalizeOps()(module)
    except IMPORTER_ERRORS as error:
        return error
    return None


def illegal_nodes(
    lowering: Lowering, nodes: Iterable[ir.Node], convert: Convert
) -> Iterator[tuple[ir.Node, Exception]]:
    """The nodes that TVM cannot write functions for, each tried alone, with what TVM says.

    Args:
        lowering: of the finished function, which has the types of all values.
        nodes: that were lowered.
        convert: lowers one.
    """
    for node in nodes:
        module = _alone(lowering, node, convert)
        error = None if module is None else why_not_legal(module, lowering)
        if error is not None:
            yield node, error


def _alone(lowering: Lowering, node: ir.Node, convert: Convert) -> Any | None:
    """A module of one node; None for one that is lowered together with others."""
    bb = relax.BlockBuilder()
    alone = Lowering(lowering.model, bb, lowering.cpu, Shared(keep=False), lowering.options)
    arguments: dict[ir.Value, Any] = {}
    for value in node.inputs:
        kind = None if value is None else lowering.type_of(value)
        if value is not None and kind is not None and not lowering.is_constant(value):
            arguments[value] = relax.Var(alone.identifier(value.name or "x"), kind)
            alone.set(value, arguments[value])
    try:
        with bb.function("main"):
            with bb.dataflow():
                convert(alone, node)
                outputs = [
                    alone.tensor(value) for value in node.outputs if value.uses() or value.is_graph_output()
                ]
                result = bb.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            bb.emit_func_output(result, [*arguments.values(), *alone.variables.values()])
    except UnsupportedError:
        return None
    return bb.get()
