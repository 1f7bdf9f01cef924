"""Integers that shape arithmetic computes, with names for the sizes only known at run time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import onnx_ir as ir

from effic.ir.model import constant_tensor
from effic.passes.cleanup.identities import argument, ints
from effic.passes.cleanup.scopes import Scope, int_attribute, is_standard
from effic.passes.cleanup.shapes import Dim, Dims, Shapes

# Arithmetic on shapes is on vectors as long as a rank; longer ones are data.
MAX_ELEMENTS = 64
# Names of computed sizes ("n*8") are compared as text; beyond this length they are given up.
MAX_NAME = 120

# A dimension may have any text for a name, "n*2" included: only plain ones are used as they are.
PLAIN_NAME = re.compile(r"[A-Za-z_]\w*")

INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


class ShapeValues:
    """What integer values hold, entry by entry: a number, the name of a size, or None.

    Call :meth:`visit` for every node in order, outer graphs before inner ones. Every name stands
    for a number >= 0: a dimension, or sums and products of dimensions.

    Attributes:
        unknown: whether something could not be told for want of a shape.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.unknown = False
        self._data: dict[ir.Value, Dims] = {}
        self._rank: dict[ir.Value, int] = {}
        self._dims: dict[ir.Value, Dims] = {}
        # A size that inference could only name, once arithmetic has told what it is.
        self._bound: dict[str, Dim] = {}

    def dims(self, value: ir.Value | None) -> Dims | None:
        """The shape of a value, with what was learnt while visiting."""
        if value is None:
            return None
        found = self._dims.get(value)
        if found is None:
            found = self._inferred(value)
        return None if found is None else tuple(self._resolve(dim) for dim in found)

    def _inferred(self, value: ir.Value) -> Dims | None:
        found = self.shapes.dims(value)
        if found is None:
            return None
        return tuple(
            dim if not isinstance(dim, str) or PLAIN_NAME.fullmatch(dim) else "text_" + dim.encode().hex()
            for dim in found
        )

    def data(self, value: ir.Value | None) -> Dims | None:
        """The entries of an integer scalar or vector, or None."""
        if value is None:
            return None
        known = self._data.get(value)
        if known is not None:
            return known
        tensor = constant_tensor(value)
        if tensor is None or len(tensor.shape) > 1 or tensor.size > MAX_ELEMENTS:
            return None
        return ints(value)

    def rank(self, value: ir.Value | None) -> int | None:
        """0 for a scalar, 1 for a vector."""
        if value is None:
            return None
        if value in self._rank:
            return self._rank[value]
        tensor = constant_tensor(value)
        return None if tensor is None else len(tensor.shape)

    def _resolve(self, dim: Dim) -> Dim:
        for _ in range(8):
            if not isinstance(dim, str) or dim not in self._bound:
                return dim
            dim = self._bound[dim]
        return dim

    def visit(self, node: ir.Node, scope: Scope) -> None:
        """Learn what a node computes, from what is known of its inputs."""
        if not is_standard(node) or len(node.outputs) != 1:
            return
        if node.op_type == "Reshape":
            self._reshape(node)
        rule = _RULES.get(node.op_type)
        if rule is None:
            return
        result = rule(self, node, scope)
        if result is None:
            return
        rank, data = result
        # Beyond 32 bits the result may have wrapped around, unless the type is known to be wide.
        limit = 2**63 if self.shapes.dtype(node.outputs[0]) == ir.DataType.INT64 else 2**31
        if any(isinstance(entry, int) and abs(entry) >= limit for entry in data):
            return
        if len(data) <= MAX_ELEMENTS and (not data or any(entry is not None for entry in data)):
            self._data[node.outputs[0]] = data
            self._rank[node.outputs[0]] = rank

    def _reshape(self, node: ir.Node) -> None:
        """The output shape as its target tells; names that inference gave it are bound to it."""
        target, source = self.data(node.inputs[1]), self.dims(node.inputs[0])
        if target is None or int_attribute(node, "allowzero", 0) != 0:
            return
        result: list[Dim] = []
        for axis, want in enumerate(target):
            if want == 0:
                result.append(source[axis] if source is not None and axis < len(source) else None)
            else:
                result.append(want)
        if -1 in result:
            at = result.index(-1)
            result[at] = remaining(source, result[:at] + result[at + 1 :])
        inferred = self._inferred(node.outputs[0])
        if inferred is not None and len(inferred) == len(result):
            for axis, (mine, theirs) in enumerate(zip(result, inferred, strict=True)):
                theirs = self._resolve(theirs)
                if mine is None:
                    result[axis] = theirs
                elif isinstance(theirs, str) and isinstance(mine, int) and theirs not in self._bound:
                    self._bound[theirs] = mine
        self._dims[node.outputs[0]] = tuple(result)


def remaining(source: Dims | None, others: list[Dim]) -> Dim:
    """The size that -1 stands for: all of ``source`` over the other sizes, or None."""
    if source is None or None in source or None in others:
        return None
    names = [dim for dim in source if isinstance(dim, str)]
    for dim in others:
        if isinstance(dim, str):
            if dim not in names:
                return None
            names.remove(dim)
    numbers = math.prod(dim for dim in source if isinstance(dim, int))
    divisor = math.prod(dim for dim in others if isinstance(dim, int))
    if divisor <= 0 or numbers % divisor:
        return None
    return _product([numbers // divisor, *names])


def _product(factors: list[Dim]) -> Dim:
    if 0 in factors:
        return 0
    if None in factors:
        return None
    number = math.prod(factor for factor in factors if isinstance(factor, int))
    names = sorted(part for factor in factors if isinstance(factor, str) for part in factor.split("*"))
    if not names:
        return number
    if any("+" in name for name in names) or number < 0:
        return None
    numbers = [int(name) for name in names if name.isdecimal()]
    names = [name for name in names if not name.isdecimal()]
    number *= math.prod(numbers)
    text = "*".join(([str(number)] if number != 1 else []) + names)
    return text if len(text) <= MAX_NAME else None


# -- one rule per operator: (rank, entries) of the output, or None -------------------------------

_Result = tuple[int, Dims] | None
_Rule = Callable[[ShapeValues, ir.Node, Scope], _Result]


def _shape(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    dims = known.dims(node.inputs[0])
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", MAX_ELEMENTS)
    if dims is None:
        known.unknown = True
        return None
    known.unknown |= any(dim is None for dim in dims)
    return None if start is None or end is None else (1, dims[start:end])


def _size(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    dims = known.dims(node.inputs[0])
    return None if dims is None else (0, (_product(list(dims)),))


def _gather(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    data, at = known.data(node.inputs[0]), known.data(node.inputs[1])
    rank = known.rank(node.inputs[1])
    if data is None or at is None or rank is None or int_attribute(node, "axis", 0) not in (0, -1):
        return None
    if known.rank(node.inputs[0]) != 1:
        return None
    picked = []
    for index in at:
        if not isinstance(index, int) or not -len(data) <= index < len(data):
            return None
        picked.append(data[index])
    return rank, tuple(picked)


def _slice(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    data = known.data(node.inputs[0])
    starts, ends = argument(node, 1, "starts"), argument(node, 2, "ends")
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,)
    if data is None or known.rank(node.inputs[0]) != 1 or steps is None or starts is None or ends is None:
        return None
    if len(starts) != 1 or steps[0] < 1:
        return None
    return 1, data[starts[0] : ends[0] : steps[0]]


def _concat(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    entries: list[Dim] = []
    for value in node.inputs:
        data = known.data(value)
        if data is None or known.rank(value) != 1:
            # An unknown scalar in between would do no harm, if its length were known.
            dims = known.dims(value)
            if dims is None or len(dims) != 1 or not isinstance(dims[0], int) or dims[0] > MAX_ELEMENTS:
                return None
            data = (None,) * dims[0]
        entries.extend(data)
    return 1, tuple(entries)


def _unsqueeze(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    data, axes = known.data(node.inputs[0]), argument(node, 1, "axes")
    if data is None or known.rank(node.inputs[0]) != 0 or axes is None or len(axes) != 1:
        return None
    return 1, data


def _squeeze(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    data = known.data(node.inputs[0])
    return None if data is None or len(data) != 1 or known.rank(node.inputs[0]) != 1 else (0, data)


def _reshape(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    data, target = known.data(node.inputs[0]), ints(node.inputs[1])
    if data is None or target is None or len(target) > 1:
        return None
    return len(target), data


def _same(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    data, rank = known.data(node.inputs[0]), known.rank(node.inputs[0])
    return None if data is None or rank is None else (rank, data)


def _cast(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    # Sizes above 2^31 wrap in int32: only the wide type keeps names meaning what they say, and
    # numbers are checked.
    to = int_attribute(node, "to", 0)
    result = _same(known, node, scope)
    if result is None or to not in INTEGERS:
        return None
    return result if all(not isinstance(dim, int) or abs(dim) < 2**31 for dim in result[1]) else None


def _binary(combine: Callable[[Dim, Dim], Dim]) -> _Rule:
    def rule(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
        if len(node.inputs) != 2:
            return None
        a, b = known.data(node.inputs[0]), known.data(node.inputs[1])
        ranks = known.rank(node.inputs[0]), known.rank(node.inputs[1])
        if a is None or b is None or None in ranks:
            return None
        if len(a) != len(b) and 1 not in (len(a), len(b)):
            return None
        length = max(len(a), len(b)) if a and b else 0
        pairs = ((a[i % len(a)], b[i % len(b)]) for i in range(length))
        return max(rank for rank in ranks if rank is not None), tuple(combine(x, y) for x, y in pairs)

    return rule


def _add(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    if a == 0 or b == 0:
        return b if a == 0 else a
    if a is None or b is None or "+" in f"{a}{b}" or "-" in f"{a if isinstance(a, int) else b}":
        return None
    text = "+".join(sorted((str(a), str(b))))
    return text if len(text) <= MAX_NAME else None


def _subtract(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return a - b
    return a if b == 0 else None


def _divide(a: Dim, b: Dim) -> Dim:
    if b == 1:
        return a
    if isinstance(a, int) and isinstance(b, int) and b != 0:
        # Integer division in ONNX rounds towards zero.
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return None


def _larger(a: Dim, b: Dim) -> Dim:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else (a if a == b else None)


def _smaller(a: Dim, b: Dim) -> Dim:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else (a if a == b else None)


def _equal(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    if a is not None and a == b:
        return 1
    # A name stands for a size, which is never negative.
    negative = any(isinstance(dim, int) and dim < 0 for dim in (a, b))
    return 0 if negative and None not in (a, b) else None


def _where(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    parts = [known.data(value) for value in node.inputs]
    if any(part is None or not part for part in parts):
        return None
    given = [part for part in parts if part is not None]
    length = max(len(part) for part in given)
    if any(len(part) not in (1, length) for part in given):
        return None
    rows = zip(*((part * length if len(part) == 1 else part) for part in given), strict=True)
    entries = tuple(
        (yes if condition else no) if condition in (0, 1) else (yes if yes == no else None)
        for condition, yes, no in rows
    )
    return max(known.rank(value) or 0 for value in node.inputs), entries


def _constant_of_shape(known: ShapeValues, node: ir.Node, scope: Scope) -> _Result:
    target = known.data(node.inputs[0])
    attr = node.attributes.get("value")
    if target is None or len(target) != 1 or not isinstance(target[0], int) or target[0] > MAX_ELEMENTS:
        return None
    if attr is None or attr.is_ref() or attr.as_tensor().dtype not in INTEGERS:
        return None
    return 1, (int(attr.as_tensor().numpy().reshape(-1)[0]),) * target[0]


_RULES: dict[str, _Rule] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Identity": _same,
    "Cast": _cast,
    "Add": _binary(_add),
    "Sub": _binary(_subtract),
    "Mul": _binary(lambda a, b: _product([a, b])),
    "Div": _binary(_divide),
    "Max": _binary(_larger),
    "Min": _binary(_smaller),
    "Equal": _binary(_equal),
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
}
