"""Weights cut into groups of output channels, as constants of the graph, each written once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effic.backends.ort.block_store import add_scales
from effic.backends.ort.blocks import Layout
from effic.backends.ort.input_groups import InputGroups, group_blocks, group_layout, group_matrix
from effic.backends.ort.scenes import EncodedInput, graph_of, put_named
from effic.ir.model import Model
from effic.ir.tensors import SPILL_BYTES


@dataclass(frozen=True, eq=False)
class Parts:
    """The codes of each group of a weight.

    Attributes:
        codes: one constant per group.
        layouts: how each is laid out in blocks; empty for plain matrices.
        half: what was taken off unsigned codes.
    """

    codes: list[ir.Value]
    layouts: list[Layout]
    half: int


class GroupStore:
    """Groups of the weights met so far, so that tied weights and unit scales are written once."""

    def __init__(self, model: Model, level: int) -> None:
        self.model, self.level = model, level
        self._parts: dict[tuple[int, int], Parts] = {}
        self._units: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
        self._factors: dict[tuple[int, int, float], list[ir.Value]] = {}
        self._offsets: dict[tuple[int, int, float, bool], ir.Value | None] = {}

    def blocks(self, weight: EncodedInput, groups: InputGroups) -> Parts:
        """Each group's codes in the block layout of ``MatMulNBits``, uint8 ``[g, blocks, bytes]``."""
        key = (id(weight.value), groups.k_axis)
        if key not in self._parts:
            layouts = [group_layout(groups, start, self.level) for start in groups.starts]
            graph, name = graph_of(weight.dequantize), f"{weight.name}.blocks"
            codes = [
                self.model.add_initializer(graph, name, _blocks(groups, start, layout))
                for start, layout in zip(groups.starts, layouts, strict=True)
            ]
            self._parts[key] = Parts(codes, layouts, 1 << (layouts[0].bits - 1))
        return self._parts[key]

    def matrices(self, weight: EncodedInput, groups: InputGroups) -> Parts:
        """Each group's codes as int8 ``[K, g]``: stored in their own width, widened by a Cast.

        The runtime folds the Cast when it loads the file.
        """
        key = (id(weight.value), groups.k_axis)
        if key not in self._parts:
            codes = [self._matrix(weight, groups, start) for start in groups.starts]
            self._parts[key] = Parts(codes, [], 1 << (groups.encoding.stored_bits - 1))
        return self._parts[key]

    def _matrix(self, weight: EncodedInput, groups: InputGroups, start: int) -> ir.Value:
        before, name = weight.dequantize, f"{weight.name}.group"
        value = self.model.add_initializer(graph_of(before), name, group_matrix(groups, start))
        if value.dtype == ir.DataType.INT8:
            return value
        wide = put_named(self.model, f"{name}.int8", before, "Cast", [value], to=int(ir.DataType.INT8))
        wide.type, wide.shape = ir.TensorType(ir.DataType.INT8), value.shape
        return wide

    def factors(self, weight: EncodedInput, groups: InputGroups, alpha: float) -> list[ir.Value]:
        """Each group's scales times ``alpha``, float32 ``[K]``."""
        key = (id(weight.value), groups.k_axis, alpha)
        if key not in self._factors:
            rows = groups.scales() * np.float32(alpha)
            self._factors[key] = [add_scales(self.model, weight.dequantize, weight.name, row) for row in rows]
        return self._factors[key]

    def offsets(
        self, weight: EncodedInput, groups: InputGroups, half: int, alpha: float, folded: bool
    ) -> ir.Value | None:
        """What the zero points add, per input channel and group, float32 ``[K, G]``; None for nothing.

        Args:
            weight: the weight.
            groups: its groups.
            half: what was taken off unsigned codes.
            alpha: factor of the product.
            folded: whether the activations carry scales and ``alpha`` already.
        """
        key = (id(weight.value), groups.k_axis, alpha, folded)
        if key not in self._offsets:
            zeros, value = groups.zeros(half), None
            if zeros is not None:
                shift = -zeros if folded else -zeros * groups.scales() * np.float32(alpha)
                graph = graph_of(weight.dequantize)
                value = self.model.add_initializer(
                    graph, f"{weight.name}.offsets", np.ascontiguousarray(shift.T)
                )
            self._offsets[key] = value
        return self._offsets[key]

    def unit(self, home: ir.Graph, *shape: int) -> ir.Value:
        """Ones, float32, shared by all in the same graph who need as many."""
        key = (id(home), shape)
        if key not in self._units:
            self._units[key] = self.model.add_initializer(home, "unit_scales", np.ones(shape, np.float32))
        return self._units[key]


def _blocks(groups: InputGroups, start: int, layout: Layout) -> ir.TensorProtocol:
    """A group's blocks; those of a large weight are moved when they are written to a file."""
    if groups.encoding.codes.nbytes < SPILL_BYTES:
        return ir.Tensor(group_blocks(groups, start, layout))
    shape = ir.Shape((layout.outputs, layout.blocks, layout.block_bytes))
    return ir.LazyTensor(lambda: ir.Tensor(group_blocks(groups, start, layout)), ir.DataType.UINT8, shape)
