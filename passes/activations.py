"""Where a weight's input is in the graph, and how its rows are taken from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.ir.model import constant_tensor, describe
from effic.ir.weights import WeightSite, WeightUse

# Of a large feature map this many positions are used per sample, evenly spread: neighbouring
# windows share most of their pixels and say little that is new.
MOST_POSITIONS = 4096
MOST_BYTES = 32 << 20
CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows ``[n, G, K]`` are taken from an activation.

    Attributes:
        kind: ``last``: the last axis holds a row; ``first``: the one before it; ``pixels``: axis 1
            (ConvTranspose); ``windows``: what lies under a kernel.
        groups: G.
        width: K.
        kernel, strides, dilations, pads: of a convolution; pads as ONNX orders them.
        auto_pad: of a convolution.
    """

    kind: str
    groups: int
    width: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"

    def of(self, array: np.ndarray) -> np.ndarray:
        """The rows of an activation, ``[n, G, K]``."""
        if self.kind == "windows":
            return self._windows(array)
        if self.kind == "pixels":
            return np.moveaxis(array, 1, -1).reshape(-1, self.groups, self.width)
        if self.kind == "first" and array.ndim > 1:
            array = np.swapaxes(array, -1, -2)
        return array.reshape(-1, self.groups, self.width)

    def _windows(self, array: np.ndarray) -> np.ndarray:
        begin, end = self._padding(array.shape[2:])
        if any(begin) or any(end):
            array = np.pad(array, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
        rank = len(self.kernel)
        spans = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        if any(size < span for size, span in zip(array.shape[2:], spans, strict=True)):
            return np.zeros((0, self.groups, self.width), array.dtype)
        axes = tuple(range(2, 2 + rank))
        view = np.lib.stride_tricks.sliding_window_view(array, spans, axis=axes)
        inner = [slice(None, None, d) for d in self.dilations]
        view = view[(slice(None), slice(None), *[slice(None, None, s) for s in self.strides], *inner)]
        # [N, C, positions…, kernel…] → [N, positions…, C, kernel…], still a view.
        view = np.moveaxis(view, 1, 1 + rank)
        sizes = view.shape[: 1 + rank]
        total = math.prod(sizes)
        size = self.groups * self.width
        most = max(1, min(MOST_POSITIONS, MOST_BYTES // (4 * size))) * max(1, array.shape[0])
        if total > most:
            picked = np.linspace(0, total - 1, most).astype(np.int64)
            view = view[np.unravel_index(picked, sizes)]
        return np.ascontiguousarray(view).reshape(-1, self.groups, self.width)

    def _padding(self, sizes: tuple[int, ...]) -> tuple[list[int], list[int]]:
        rank = len(self.kernel)
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            begin, end = [], []
            for size, k, s, d in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
                total = max(0, (math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size)
                less, more = total // 2, total - total // 2
                begin.append(less if self.auto_pad == "SAME_UPPER" else more)
                end.append(more if self.auto_pad == "SAME_UPPER" else less)
            return begin, end
        if self.auto_pad == "VALID":
            return [0] * rank, [0] * rank
        return list(self.pads[:rank]), list(self.pads[rank:])


@dataclasses.dataclass(frozen=True)
class Activation:
    """What one use of a weight is multiplied with."""

    value: ir.Value
    rows: Rows

    @property
    def key(self) -> tuple[str, Rows]:
        """Equal for uses that share their statistics."""
        return str(self.value.name), self.rows


def activations(site: WeightSite) -> list[Activation]:
    """What the weight is multiplied with, at every use but look-ups in a table."""
    found = {}
    for use in site.uses:
        if use.node.op_type != "Gather" and (value := operand(use)) is not None:
            activation = Activation(value, _rows(site, use))
            found[activation.key] = activation
    return list(found.values())


def operand(use: WeightUse) -> ir.Value | None:
    """The other operand of a use."""
    inputs = use.node.inputs
    index = 0 if use.node.op_type in CONVOLUTIONS else 1 - use.index
    return inputs[index] if index < len(inputs) else None


def why_unseen(site: WeightSite, main: ir.Graph | None, constants: set[ir.Value]) -> str | None:
    """Why nothing can be said of a weight's inputs, as a phrase, or None.

    Args:
        site: a weight.
        main: the main graph, or None when the weight is known to lie elsewhere.
        constants: values of the main graph that depend on no graph input.
    """
    if site.why_not is not None and not site.shape:
        return site.why_not
    uses = [use for use in site.uses if use.node.op_type != "Gather"]
    if not uses:
        return "is a table of rows, which no activation multiplies"
    if len(site.shape) != 2 and site.kind not in CONVOLUTIONS:
        return f"has rank {len(site.shape)}, so its inputs have no rows of one matrix"
    for use in uses:
        if main is None or use.node.graph is not main:
            return (
                f"is used by {describe(use.node)} inside a subgraph or function, "
                "where its input cannot be observed"
            )
        value = operand(use)
        if value is None or value in constants or constant_tensor(value) is not None:
            return f"is multiplied with a constant by {describe(use.node)}"
        if use.in_axis != site.in_axis or (use.node.op_type in CONVOLUTIONS) != (site.kind in CONVOLUTIONS):
            return f"is read both ways round, by {describe(uses[0].node)} and {describe(use.node)}"
    return None


def _rows(site: WeightSite, use: WeightUse) -> Rows:
    node = use.node
    width = site.shape_oi[1]
    if node.op_type == "MatMul":
        return Rows("last" if use.index == 1 else "first", 1, width)
    if node.op_type == "Gemm":
        other = 1 - use.index
        turned = node.attributes.get_int("transB" if other else "transA", 0) == 1
        # A row runs along the summed axis: axis 1 of A, axis 0 of B.
        return Rows("last" if (other == 0) != turned else "first", 1, width)
    if node.op_type == "ConvTranspose":
        return Rows("pixels", site.groups, width // site.groups)
    kernel = site.shape[2:]
    ones = [1] * len(kernel)
    return Rows(
        "windows",
        site.groups,
        width,
        kernel,
        tuple(_ints(node, "strides", ones)),
        tuple(_ints(node, "dilations", ones)),
        tuple(_ints(node, "pads", [0] * (2 * len(kernel)))),
        node.attributes.get_string("auto_pad", "NOTSET") or "NOTSET",
    )


def _ints(node: ir.Node, name: str, default: list[int]) -> Any:
    return node.attributes.get_ints(name, default)
