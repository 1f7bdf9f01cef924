"""Index spaces: which axes of which tensors carry the same channels, so that one order serves them all.

Every axis of every value and constant of the main graph has a :class:`Dim`. An operator says which of
these are the same (the columns of a weight and the channels of what it reads, the operands of an Add,
a batch norm's vectors and its input), which are made of others, and which must keep their order. What is
made of others is written as a *product* (a Reshape of ``[heads, size]`` to ``[heads·size]``: index
``h·size + s``) or as a *sum* (a Concat: one after the other). Two such descriptions of one axis are
brought to their common parts, as terms are unified (Robinson 1965).

What is left at the end are free channels: a leaf without a ``reason`` may be put into any order, as long
as every constant that has it on an axis is. Composite axes follow: permuting the dims of a head permutes
them alike in every head. The idea of coupled axes is DepGraph's (Fang et al. 2023, arXiv 2301.12900);
operators without a rule hold everything they touch in place.

The rules of the operators are in :mod:`effic.ir.channel_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, describe
from effic.ir.shapes import static_shapes
from effic.ir.tensors import borrow
from effic.ir.topology import read_values, subgraphs

# Sizes for dynamic dimensions (first axis, others, others of images): large primes, so that a Reshape
# is not mistaken for one that cuts channels where it moves the batch.
_FIRST, _OTHER, _PIXELS = 31, 29, 224


class Unfollowed(Exception):
    """An operator does something with channels that is not written down; the text says what."""


@dataclass(eq=False)
class Dim:
    """The indices of an axis.

    Attributes:
        size: how many.
        kind: ``"leaf"``, or how it is made of :attr:`parts`, outermost or first part first.
        parts: of a product or a sum.
        reason: why a leaf must keep its order, as a phrase about the channels, or None.
        mixed: nodes that compute over a leaf as a whole (norms, Softmax, means): an order does not
            matter to them, leaving indices out would.
    """

    size: int
    kind: Literal["leaf", "product", "sum"] = "leaf"
    parts: tuple[Dim, ...] = ()
    reason: str | None = None
    mixed: set[str] = field(default_factory=set)
    _same_as: Dim | None = None

    @property
    def root(self) -> Dim:
        """The dim that stands for this one and all that were found to be the same."""
        dim = self
        while dim._same_as is not None:
            dim = dim._same_as
        if dim is not self:
            self._same_as = dim
        return dim

    def leaves(self) -> Iterator[Dim]:
        """What it is made of in the end, in order; a leaf that occurs twice is handed out twice."""
        dim = self.root
        if dim.kind == "leaf":
            yield dim
        for part in dim.parts:
            yield from part.leaves()

    def freeze(self, reason: str) -> None:
        """Hold all its leaves in place; the first reason stays."""
        for leaf in self.leaves():
            leaf.reason = leaf.reason or reason

    def mix(self, where: str) -> None:
        """Note that a node computes over it as a whole."""
        for leaf in self.leaves():
            leaf.mixed.add(where)

    def split(self, kind: Literal["product", "sum"], sizes: Sequence[int]) -> None:
        """Make a leaf a composite of new leaves."""
        self.kind = kind
        self.parts = tuple(Dim(size, reason=self.reason, mixed=set(self.mixed)) for size in sizes)

    def order(self, orders: Mapping[Dim, np.ndarray]) -> np.ndarray | None:
        """Where each index comes from once leaves are permuted, or None when all stay.

        Args:
            orders: of each leaf that is permuted, old index by new one, int ``[leaf.size]``.
        """
        if not any(leaf in orders for leaf in self.leaves()):
            return None
        return self._order(orders)

    def _order(self, orders: Mapping[Dim, np.ndarray]) -> np.ndarray:
        dim = self.root
        if dim.kind == "leaf":
            return orders[dim] if dim in orders else np.arange(dim.size)
        inner = [part._order(orders) for part in dim.parts]
        if dim.kind == "sum":
            starts = np.cumsum([0, *(part.root.size for part in dim.parts[:-1])])
            return np.concatenate([part + start for part, start in zip(inner, starts, strict=True)])
        result = inner[0]
        for part in inner[1:]:
            result = (result[:, None] * len(part) + part).reshape(-1)
        return result

    def places(self, leaf: Dim) -> np.ndarray:
        """Where the indices of a leaf are on this axis.

        Returns:
            int ``[copies, leaf.size]``: a row per combination of the other parts' indices.
        """
        dim = self.root
        if dim is leaf:
            return np.arange(dim.size)[None]
        found = [np.zeros((0, leaf.size), int)]
        if dim.kind == "sum":
            start = 0
            for part in dim.parts:
                found.append(part.places(leaf) + start)
                start += part.root.size
        inner = dim.size
        for part in dim.parts if dim.kind == "product" else ():
            outer, inner = dim.size // inner, inner // part.root.size
            own = part.places(leaf)
            if len(own):
                before = np.arange(outer)[:, None, None, None] * (part.root.size * inner)
                after = np.arange(inner)[None, None, :, None]
                found.append((before + own[None, :, None, :] * inner + after).reshape(-1, leaf.size))
        return np.concatenate(found)


def product(dims: Iterable[Dim]) -> Dim:
    """The axis that a Reshape makes of several, outermost first."""
    parts = tuple(dim for dim in dims if dim.size != 1)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Dim(1)
    return Dim(math.prod(part.size for part in parts), "product", parts)


def total(dims: Iterable[Dim]) -> Dim:
    """The axis that a Concat makes of several."""
    parts = tuple(dim for dim in dims if dim.size)
    if len(parts) == 1:
        return parts[0]
    return Dim(sum(part.size for part in parts), "sum", parts) if parts else Dim(0)


def unify(one: Dim, other: Dim, where: str) -> None:
    """Note that two axes carry the same indices; what cannot be brought together is held in place.

    Args:
        one: an axis.
        other: another.
        where: the node that says so, for the reason.
    """
    a, b = one.root, other.root
    if a is b:
        return
    if a.size != b.size:
        raise Unfollowed(f"has {a.size} channels where {b.size} are expected")
    if a.kind != "leaf" and b.kind != "leaf":
        pairs = _common(a, b)
        if pairs is None:
            reason = f"are cut in two ways that do not go together at {where}"
            a.freeze(reason)
            b.freeze(reason)
            return
        for x, y in pairs:
            unify(x, y, where)
    elif b.kind == "leaf":
        a, b = b, a
    if a.kind == "leaf":
        if a.reason is not None:
            b.freeze(a.reason)
        for name in a.mixed:
            b.mix(name)
    a._same_as = b


def _common(a: Dim, b: Dim) -> list[tuple[Dim, Dim]] | None:
    """The parts two composites have in common, leaves cut where needed; None where there are none."""
    if a.kind != b.kind or a.kind == "leaf":
        return None
    kind: Literal["product", "sum"] = a.kind
    left, right = _flat(a, kind), _flat(b, kind)
    pairs = []
    # From the innermost, or last, part on: there both count from the same place.
    while left and right:
        x, y = _last(left, kind), _last(right, kind)
        if x.size == y.size:
            pairs.append((x, y))
            continue
        (small, _), (large, others) = sorted([(x, left), (y, right)], key=lambda item: item[0].size)
        if kind == "product" and large.size % small.size:
            return None
        rest = large.size // small.size if kind == "product" else large.size - small.size
        if large.kind != "leaf":
            return None
        large.split(kind, (rest, small.size))
        others.append(large.parts[0])
        pairs.append((small, large.parts[1]))
    return None if left or right else pairs


def _last(queue: list[Dim], kind: str) -> Dim:
    """Take the last part; one that was cut since it was queued is its parts by now."""
    queue.extend(_flat(queue.pop(), kind))
    return queue.pop()


def _flat(dim: Dim, kind: str) -> list[Dim]:
    """Parts of a composite, those of parts of the same kind included."""
    dim = dim.root
    if dim.kind != kind:
        return [dim]
    return [leaf for part in dim.parts for leaf in _flat(part, kind)]


Follow = Callable[[ir.Node, "Channels"], tuple[Collection[int], list[Sequence[Dim]]]]
"""What a node does: numbers of the inputs whose channels it follows, and the axes of its first outputs."""


class Channels:
    """The index spaces of a model's main graph.

    Subgraphs and functions are not looked into: what they read or make keeps its order.

    Args:
        model: not changed.
    """

    def __init__(self, model: Model) -> None:
        from effic.ir.channel_rules import follow

        self.model = model
        self._axes: dict[ir.Value, tuple[Dim, ...]] = {}
        self._shapes = _Shapes(model)
        for value in model.graph.inputs:
            self.freeze(value, f"come from the graph input '{value.name}'")
        for node in model.graph:
            self._visit(node, follow)
        # Last, when it is known which channels their values carry.
        for node in model.graph:
            for value in read_values(node) if subgraphs(node) else ():
                self.freeze(value, f"are read by {describe(node)}, into which channels are not followed")
        for value in model.graph.outputs:
            self.freeze(value, f"reach the graph output '{value.name}'")

    def axes(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """A dim for every axis of a value, outermost first; None when its rank is not known."""
        if value is None:
            return None
        if value not in self._axes:
            shape = self._shapes.of(value)
            if shape is None:
                return None
            self._axes[value] = tuple(Dim(size) for size in shape)
        return self._axes[value]

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """A value's shape, dynamic dimensions at some size; None when it is not known."""
        return self._shapes.of(value)

    def freeze(self, value: ir.Value | None, reason: str) -> None:
        """Hold all axes of a value in place."""
        for dim in self.axes(value) or ():
            dim.freeze(reason)

    def constants(self) -> dict[Dim, list[ir.Value]]:
        """For each leaf the constants that have it on an axis, in the order of their first reader."""
        found: dict[Dim, dict[ir.Value, None]] = {}
        for value, axes in self._axes.items():
            if constant_tensor(value) is not None and value.graph is self.model.graph:
                for dim in axes:
                    for leaf in dim.leaves():
                        if leaf.size > 1:
                            found.setdefault(leaf, {})[value] = None
        return {leaf: list(values) for leaf, values in found.items()}

    def permute(self, orders: Mapping[Dim, np.ndarray]) -> list[ir.Value]:
        """Put leaves into another order: every constant that has them is replaced by a permuted copy.

        The model computes the same, up to the order of summation. Constants keep their names, types
        and readers; each is copied once, however many of its axes move.

        Args:
            orders: old index by new one for each leaf, int ``[leaf.size]``.

        Returns:
            The constants replaced.

        Raises:
            ValueError: an order is no permutation, or its leaf must keep its order.
        """
        for leaf, order in orders.items():
            if leaf.root is not leaf or leaf.kind != "leaf" or leaf.reason is not None:
                raise ValueError(f"these channels {leaf.reason or 'are no leaf'}, so they cannot be permuted")
            if not np.array_equal(np.sort(order), np.arange(leaf.size)):
                raise ValueError(f"the order given for {leaf.size} channels is no permutation")
        values = dict.fromkeys(v for leaf, vs in self.constants().items() if leaf in orders for v in vs)
        for value in values:
            tensor = constant_tensor(value)
            if tensor is None:
                continue
            with borrow(tensor) as array:
                for axis, dim in enumerate(self._axes[value]):
                    moved = dim.order(orders)
                    if moved is not None:
                        array = np.take(array, moved, axis)
                new = self.model.scratch.tensor(value.name or "", array, tensor.dtype)
                del array
            node = value.producer()
            if node is None:
                value.const_value = new
            else:
                node.attributes.clear()
                node.attributes.add(ir.AttrTensor("value", new))
                if value.const_value is not None:
                    value.const_value = new
        return list(values)

    def _visit(self, node: ir.Node, follow: Follow) -> None:
        try:
            handled, results = follow(node, self)
            for value, dims in zip(node.outputs, results, strict=False):
                shape = self._shapes.of(value)
                if shape is not None and shape != tuple(dim.size for dim in dims):
                    raise Unfollowed("has a shape that was not expected")
                self._axes[value] = tuple(dims)
            for index, source in enumerate(node.inputs):
                if index not in handled:
                    self.freeze(source, f"are a parameter of {describe(node)}")
            rest = node.outputs[len(results) :]
        except (Unfollowed, IndexError, ValueError, ZeroDivisionError) as problem:
            # Axes and sizes come from a file, which may name some that are not there.
            reason = problem if isinstance(problem, Unfollowed) else "does not fit what it reads"
            for source in node.inputs:
                self.freeze(source, f"are read by {describe(node)}, which {reason}")
            rest = node.outputs
        for value in rest:
            self.freeze(value, f"are made by {describe(node)}, through which channels are not followed")


class _Shapes:
    """Shapes of the main graph's values, dynamic dimensions at some size."""

    def __init__(self, model: Model) -> None:
        sizes: dict[str, int] = {}
        for value in model.graph.inputs:
            for axis, dim in enumerate(value.shape or ()):
                if not isinstance(dim, int) and dim.value:
                    image = value.shape is not None and len(value.shape) > 3
                    sizes.setdefault(str(dim.value), _FIRST if axis == 0 else _PIXELS if image else _OTHER)
        self._sizes = sizes
        self._known = static_shapes(model, sizes)

    def of(self, value: ir.Value) -> tuple[int, ...] | None:
        tensor = constant_tensor(value)
        if tensor is not None:
            return tuple(int(size) for size in tensor.shape.numpy())
        declared = [d if isinstance(d, int) else self._sizes.get(str(d.value)) for d in value.shape or ()]
        if value.shape is not None and None not in declared:
            return tuple(size for size in declared if size is not None)
        return self._known.get(value.name or "")
