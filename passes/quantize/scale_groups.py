"""Which activations share a scale, and what it is.

An operator that only moves elements (MaxPool, Reshape, Pad, …) hands the codes on, so its output has
the scale of its input. Concat hands them on too where its inputs can take the scale of its output. A
group of such values covers the union of their ranges.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from effic.ir.model import constant_tensor
from effic.passes.quantize.placement import MOVES, Plan, pad_value
from effic.passes.quantize.ranges import Thresholds

# A value that is read elsewhere too keeps a scale of its own where Concat's would cost it more than
# one of its 8 bits.
_ONE_BIT = 0.5


def shared_thresholds(plan: Plan, own: Mapping[ir.Value, Thresholds]) -> dict[ir.Value, Thresholds]:
    """The range of each value's codes; values of one group get equal ones.

    Args:
        plan: what is to be quantized.
        own: the range of each of the plan's values by itself.

    Returns:
        A range for each of the plan's values.
    """
    groups = _Groups(plan, own)
    moves = [node for node in plan.others if node.op_type in MOVES]
    for node in moves:
        source = node.inputs[0]
        if source is None or source not in own:
            continue
        for output in node.outputs:
            if output in own:
                groups.follow(source, output)
        if node.op_type == "Pad":
            filler = pad_value(node) or 0.0
            groups.widen(source, Thresholds(min(filler, 0.0), max(filler, 0.0)))
    # From the last one up: the inputs of a Concat of Concats take the scale of the outermost.
    for node in reversed(plan.others):
        if node.op_type != "Concat":
            continue
        output = _coded(plan, node.outputs[0])
        for value in node.inputs:
            if value is None or constant_tensor(value) is not None or value not in own:
                continue
            lone = all(use.node is node for use in value.uses())
            if groups.width(value) >= _ONE_BIT * groups.width(output) or lone:
                groups.join(value, output)
    return {value: groups.range_of(value) for value in plan.values}


def _coded(plan: Plan, value: ir.Value) -> ir.Value:
    return plan.rectified[value].output if value in plan.rectified else value


class _Groups:
    """Disjoint sets of values, each with the range of its codes and the bounds it must stay within."""

    def __init__(self, plan: Plan, own: Mapping[ir.Value, Thresholds]) -> None:
        self._parent: dict[ir.Value, ir.Value] = {value: value for value in plan.values}
        self._range = dict(own)
        # The range of a rectified value does the work of its Relu: wider, it would not.
        self._bounds = {
            r.output: (min(r.low, 0.0), max(r.high, 0.0)) for r in plan.rectified.values() if r.output in own
        }

    def _root(self, value: ir.Value) -> ir.Value:
        while self._parent[value] is not value:
            self._parent[value] = self._parent[self._parent[value]]
            value = self._parent[value]
        return value

    def range_of(self, value: ir.Value) -> Thresholds:
        return self._range[self._root(value)]

    def width(self, value: ir.Value) -> float:
        low, high = self.range_of(value)
        return high - low

    def follow(self, source: ir.Value, output: ir.Value) -> None:
        """Give ``output`` the codes of ``source``, whose range holds all that can come out."""
        self._parent[self._root(output)] = self._root(source)

    def widen(self, value: ir.Value, more: Thresholds) -> None:
        """Let the group's range cover ``more`` as well."""
        root = self._root(value)
        self._range[root] = self._range[root].union(more)

    def join(self, one: ir.Value, other: ir.Value) -> bool:
        """Make two groups one, unless the union of their ranges breaks the bounds of either."""
        first, second = self._root(one), self._root(other)
        if first is second:
            return True
        together = self._range[first].union(self._range[second])
        unbounded = (float("-inf"), float("inf"))
        low, high = self._bounds.get(first, unbounded)
        also_low, also_high = self._bounds.get(second, unbounded)
        low, high = max(low, also_low), min(high, also_high)
        if together.low < low or together.high > high:
            return False
        self._parent[first] = second
        self._range[second] = together
        self._bounds[second] = (low, high)
        return True
