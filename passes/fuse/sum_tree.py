"""Sums of branches: the tree of Adds, what it adds up, and the input its terms have in common."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, describe, sole_consumer
from effic.passes.fuse.reading import Refused, is_candidate, is_pass_through
from effic.passes.fuse.steps import data_input

SUMS = ("Add", "Sum")

# Published blocks have at most five linear operators in a branch (1x1, norm, K x K, norm, Identity).
# The limit keeps the search linear in the size of a model that is one long chain.
MAX_BRANCH_NODES = 12


@dataclass(frozen=True, eq=False)
class Point:
    """A value on the way from a term of the sum up to its source, and the node that makes it."""

    value: ir.Value
    node: ir.Node | None
    problem: str | None = None

    @property
    def is_linear_op(self) -> bool:
        """Whether a convolution, pooling or norm makes the value."""
        return self.node is not None and self.node.op_type in ("Conv", "AveragePool", "BatchNormalization")


def is_sum(node: ir.Node) -> bool:
    """Whether an Add or Sum adds computed values only; adding a constant is a shift, not a sum."""
    if node.op_type == "Add" and ("axis" in node.attributes or "broadcast" in node.attributes):
        return False
    return len(node.inputs) > 1 and all(v is not None and constant_tensor(v) is None for v in node.inputs)


def is_inner(node: ir.Node) -> bool:
    """Whether the sum is itself a term of a larger one."""
    reader = sole_consumer(node.outputs[0])
    return (
        reader is not None
        and reader.op_type in SUMS
        and reader.domain in ONNX_DOMAINS
        and reader.graph is node.graph
        and is_sum(reader)
    )


def terms_of(root: ir.Node) -> tuple[list[ir.Node], list[ir.Value]]:
    """The Adds of a sum, the outer before the inner ones, and what they add up."""
    tree, terms, stack = [root], [], [v for v in reversed(root.inputs) if v is not None]
    while stack:
        value = stack.pop()
        node = value.producer()
        if (
            node is not None
            and node.op_type in SUMS
            and node.domain in ONNX_DOMAINS
            and node.graph is root.graph
            and is_sum(node)
            and sole_consumer(value) is not None
        ):
            tree.append(node)
            stack += [v for v in reversed(node.inputs) if v is not None]
        else:
            terms.append(value)
    return tree, terms


def path_of(term: ir.Value, graph: object, model: Model) -> list[Point]:
    """Values from a term upwards for as long as linear operators make them, with what forbids each step."""
    path: list[Point] = []
    value: ir.Value | None = term
    while value is not None and len(path) < MAX_BRANCH_NODES:
        node = value.producer()
        data = None if node is None or node.graph is not graph else _data_of(node, model)
        if node is None or data is None:
            path.append(Point(value, None))
            break
        reused = sole_consumer(value) is None
        path.append(
            Point(value, node, f"the output of {describe(node)} is read elsewhere" if reused else None)
        )
        value = data
    return path


def _data_of(node: ir.Node, model: Model) -> ir.Value | None:
    if node.domain not in ONNX_DOMAINS or not node.inputs:
        return None
    if node.op_type in ("Conv", "AveragePool") or is_pass_through(node, model):
        return node.inputs[0]
    data = data_input(node)
    return data if data is not None and is_candidate(node, data) else None


def common_source(paths: list[list[Point]]) -> ir.Value | None:
    """The input that most branches share, the nearest of these; None when no two share one."""
    counts = Counter(value for path in paths for value in {point.value for point in path})
    best = max(counts.values(), default=0)
    if best < 2:
        return None
    depth: Counter[ir.Value] = Counter()
    for path in paths:
        for steps, point in enumerate(path):
            depth[point.value] += steps
    return min((value for value, count in counts.items() if count == best), key=lambda value: depth[value])


def part_below(path: list[Point], source: ir.Value) -> list[Point]:
    """The part of a path below its source, the term first."""
    part: list[Point] = []
    for point in path:
        if point.value is source:
            return part
        if point.problem is not None:
            raise Refused(point.problem)
        part.append(point)
    return part
