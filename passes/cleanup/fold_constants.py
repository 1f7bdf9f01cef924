"""Compute ahead what does not depend on the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.cleanup.constant_groups import GroupFolder
from effic.passes.cleanup.inline_branches import inline_branches
from effic.passes.cleanup.scopes import Scope, detach, is_standard, prune, scopes
from effic.passes.cleanup.shape_values import ShapeValues
from effic.passes.cleanup.shapes import Dim, Shapes

# Every round learns shapes from what the one before it folded; models nest a few deep.
MAX_ROUNDS = 8
# Shape arithmetic ends in vectors as long as a rank; longer ones are data, and bounded as such.
MAX_STORED = 16


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute nodes with constant inputs, shape arithmetic, and branches that are always taken.

    Before:  s = Shape(x);  n = Gather(s, 0);  t = Concat(Unsqueeze(n), [8], [64]);  y = Reshape(x, t)
    After:   y = Reshape(x, [0, 8, 64])

    Constant nodes become initializers; an If with a constant condition becomes its branch; sizes
    read from several values that are known to be equal are read once. The file never grows: a
    result is stored only where it, with what names it, takes no more bytes than the nodes and
    constants it replaces (plus ``max_growth``). Weights that are only moved (transposed, sliced)
    are streamed through disk.

    Missed when the result would be larger (a mask, a table of positions), when a constant feeds a
    DequantizeLinear and would be stored in a wider type, when ONNX Runtime cannot compute the
    node, and when a Reshape needs a -1 that fails for empty inputs. Random operators and the
    decoding of compressed weights (DequantizeLinear and all behind it) are left alone.
    """

    name: ClassVar[str] = "fold-constants"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    max_growth: int = option(0, help="bytes a folded result may add to the file, for each result", ge=0)

    def apply(self, model: Model, remarks: Remarks) -> None:
        for scope in scopes(model):
            if not scope.in_function:
                _lift_constants(scope, remarks)
        for _ in range(MAX_ROUNDS):
            # Reasons are those of the last round: an earlier one may have been overcome.
            missed: dict[ir.Node, str] = {}
            known = ShapeValues(Shapes(model))
            everything = scopes(model)
            changed = _fold_shapes(everything, model, known, remarks, missed)
            groups = GroupFolder(model, known, self.max_growth, remarks, missed)
            changed += groups.fold(everything)
            inlined = inline_branches(model, remarks)
            if not inlined and not (changed and (known.unknown or groups.unknown)):
                break
        for node, reason in missed.items():
            if node.graph is not None:
                remarks.missed(node, reason)


def _lift_constants(scope: Scope, remarks: Remarks) -> None:
    """Turn the Constant nodes of a graph into initializers of the same names."""
    lifted = 0
    for node in list(scope.graph):
        if node.op_type != "Constant" or not is_standard(node):
            continue
        output = node.outputs[0]
        tensor = constant_tensor(output)
        if tensor is None or output.is_graph_output() or not output.name:
            continue
        value = ir.Value(
            name=output.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        output.replace_all_uses_with(value)
        output.name = None
        detach(node)
        if value.uses():
            scope.graph.register_initializer(value)
        lifted += 1
    if lifted:
        remarks.passed(
            f"graph '{scope.graph.name}'", f"{lifted} Constant nodes became initializers", nodes=lifted
        )


def _fold_shapes(
    everything: list[Scope],
    model: Model,
    known: ShapeValues,
    remarks: Remarks,
    missed: dict[ir.Node, str],
) -> int:
    """Replace shape arithmetic by constants, or by an equal size read elsewhere."""
    static: dict[ir.Node, np.ndarray] = {}
    alike: list[dict[tuple[object, ...], list[ir.Node]]] = []
    reshapes: list[tuple[ir.Node, list[int]]] = []
    for scope in everything:
        same: dict[tuple[object, ...], list[ir.Node]] = {}
        alike.append(same)
        for node in scope.graph:
            known.visit(node, scope)
            if len(node.outputs) != 1 or not is_standard(node):
                continue
            if node.op_type == "Reshape":
                target = _constant_target(node, known, missed)
                if target is not None:
                    reshapes.append((node, target))
            output = node.outputs[0]
            data, rank = known.data(output), known.rank(output)
            dtype = known.shapes.dtype(output) if data is not None else None
            if data is None or dtype is None or node.op_type == "Constant" or _names_an_output(node):
                continue
            if all(isinstance(entry, int) for entry in data):
                if len(data) <= MAX_STORED:
                    shape = () if rank == 0 else (len(data),)
                    static[node] = np.array(data, dtype=dtype.numpy()).reshape(shape)
            elif None not in data and not output.is_graph_output():
                same.setdefault((dtype, rank, data), []).append(node)
    for node, array in static.items():
        output = node.outputs[0]
        # Only what something else reads is stored; the steps to it die with it.
        if output.is_graph_output() or any(use.node not in static for use in output.uses()):
            assert node.graph is not None
            model.replace_value(output, model.add_initializer(node.graph, output.name or "shape", array))
            remarks.passed(node, f"computed ahead: {array.tolist()}")
    for node, target in reshapes:
        assert node.graph is not None
        feeder = node.inputs[1]
        name = f"{node.outputs[0].name}_shape"
        node.replace_input_with(1, model.add_initializer(node.graph, name, np.array(target, dtype=np.int64)))
        node.attributes.pop("allowzero", None)
        remarks.passed(node, f"its target is the constant {target}")
        prune([feeder.producer() if feeder is not None else None])
    merged = sum(_read_once(nodes, remarks) for same in alike for nodes in same.values())
    prune(static)
    return len(static) + len(reshapes) + merged


def _read_once(nodes: list[ir.Node], remarks: Remarks) -> int:
    """Let the first of nodes that yield the same sizes stand for the others."""
    first: ir.Value | None = None
    count = 0
    for node in nodes:
        output = node.outputs[0]
        if node.graph is None or not output.uses():
            continue
        if first is None:
            first = output
            continue
        output.replace_all_uses_with(first)
        remarks.passed(node, f"holds the same sizes as '{first.name}', which is read instead")
        prune([node])
        count += 1
    return count


def _names_an_output(node: ir.Node) -> bool:
    return node.op_type == "Identity" and node.outputs[0].is_graph_output()


def _constant_target(node: ir.Node, known: ShapeValues, missed: dict[ir.Node, str]) -> list[int] | None:
    """A constant that does for a Reshape whose target is computed, or None.

    Known sizes are written, a size equal to the input's at the same place is a 0 (copied). One
    unknown size may be a -1, but only beside known ones: with an empty input it cannot be told.
    """
    wanted = known.data(node.inputs[1])
    if wanted is None or all(isinstance(dim, int) for dim in wanted):
        # Nothing is known, or it is a constant already or about to become one.
        return None
    before, after = known.dims(node.inputs[0]), known.dims(node.outputs[0])
    if after is None or any(dim == 0 for dim in after):
        return None
    target: list[int] = []
    for axis, dim in enumerate(after):
        have: Dim = before[axis] if before is not None and axis < len(before) else None
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if dim is not None and dim == have else -1)
    if target.count(-1) > 1:
        return None
    if -1 in target and 0 in target:
        missed[node] = "its target stays computed: beside a size of the input, a -1 fails for empty inputs"
        return None
    return target
