"""Merge a layout operator with the one that feeds it.

A merge rewrites the node in place so that it reads past its producer, and says what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model
from effic.passes.cleanup.identities import argument, has_argument
from effic.passes.cleanup.scopes import Scope, int_attribute, ints_attribute, is_standard

Merge = Callable[[ir.Node, Scope, Model], str | None]

# Operators that keep the elements in order: a Reshape after them does not need them.
ORDER_KEEPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def _producer(node: ir.Node, op_types: frozenset[str] | set[str]) -> ir.Node | None:
    source = node.inputs[0] if node.inputs else None
    producer = source.producer() if source is not None else None
    if producer is None or producer.op_type not in op_types or not is_standard(producer):
        return None
    return producer


def _transpose(node: ir.Node, scope: Scope, model: Model) -> str | None:
    first = _producer(node, {"Transpose"})
    if first is None:
        return None
    text = f"merged with {first.op_type} '{first.name or first.outputs[0].name}'"
    if "perm" not in first.attributes and "perm" not in node.attributes:
        # Both reverse all axes, however many there are.
        node.op_type = "Identity"
        node.replace_input_with(0, first.inputs[0])
        return text
    inner, outer = ints_attribute(first, "perm"), ints_attribute(node, "perm")
    if inner is None and "perm" not in first.attributes and outer is not None:
        inner = tuple(reversed(range(len(outer))))
    if outer is None and "perm" not in node.attributes and inner is not None:
        outer = tuple(reversed(range(len(inner))))
    if inner is None or outer is None or len(inner) != len(outer):
        return None
    node.attributes["perm"] = ir.AttrInt64s("perm", [inner[axis] for axis in outer])
    node.replace_input_with(0, first.inputs[0])
    return text


def _reshape(node: ir.Node, scope: Scope, model: Model) -> str | None:
    first = _producer(node, ORDER_KEEPING)
    target = argument(node, 1, "shape")
    # A 0 copies a size of the value in between, so that value must stay.
    if first is None or target is None or (0 in target and int_attribute(node, "allowzero", 0) != 1):
        return None
    node.replace_input_with(0, first.inputs[0])
    return f"reads past {first.op_type} '{first.name or first.outputs[0].name}', whose order it keeps"


def _squeeze(node: ir.Node, scope: Scope, model: Model) -> str | None:
    first = _producer(node, {"Squeeze", "Unsqueeze"})
    return None if first is None else _axes_pair(node, first, scope, model)


def _unsqueeze(node: ir.Node, scope: Scope, model: Model) -> str | None:
    first = _producer(node, {"Squeeze", "Unsqueeze"})
    return None if first is None else _axes_pair(node, first, scope, model)


def _axes_pair(node: ir.Node, first: ir.Node, scope: Scope, model: Model) -> str | None:
    if not (has_argument(node, 1, "axes") and has_argument(first, 1, "axes")):
        return None
    outer, inner = argument(node, 1, "axes"), argument(first, 1, "axes")
    if not outer or not inner:
        return None
    if node.op_type == first.op_type:
        merged = (merged_unsqueeze if node.op_type == "Unsqueeze" else merged_squeeze)(inner, outer)
        if merged is None:
            return None
        if scope.opset >= 13:
            axes = model.add_initializer(
                scope.graph, f"{node.outputs[0].name}_axes", np.array(merged, dtype=np.int64)
            )
            node.replace_input_with(1, axes)
        else:
            node.attributes["axes"] = ir.AttrInt64s("axes", merged)
        node.replace_input_with(0, first.inputs[0])
        return f"merged with {first.op_type} '{first.name or first.outputs[0].name}'"
    if sorted(outer) != sorted(inner):
        return None
    # The pair is an Identity; the rule of Identity removes it next.
    node.op_type = "Identity"
    node.attributes.clear()
    node.resize_inputs(1)
    node.replace_input_with(0, first.inputs[0])
    return f"undoes {first.op_type} '{first.name or first.outputs[0].name}'"


def merged_unsqueeze(inner: Sequence[int], outer: Sequence[int]) -> list[int] | None:
    """Axes of the one Unsqueeze that does ``inner``, then ``outer``; None with negative axes."""
    if min(*inner, *outer) < 0:
        return None
    # Where each new axis of the first lands among those the second makes room for.
    axes = sorted(outer)
    for axis in sorted(inner):
        for made in sorted(outer):
            if made <= axis:
                axis += 1
        axes.append(axis)
    return sorted(axes)


def merged_squeeze(inner: Sequence[int], outer: Sequence[int]) -> list[int] | None:
    """Axes of the one Squeeze that does ``inner``, then ``outer``; None with negative axes."""
    if min(*inner, *outer) < 0:
        return None
    axes = sorted(inner)
    for axis in sorted(outer):
        for gone in sorted(inner):
            if gone <= axis:
                axis += 1
        axes.append(axis)
    return sorted(axes)


MERGES: dict[str, Merge] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
"""Merge per standard operator."""
