"""Weights in block layout as constants of the graph, each written once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effic.backends.ort.blocks import (
    Layout,
    block_codes,
    block_scales,
    block_zero_points,
    pack_rows,
    plan,
)
from effic.backends.ort.scenes import EncodedInput, graph_of, put_named
from effic.backends.ort.sparse_blocks import lookup_blocks
from effic.ir.model import Model
from effic.ir.tensors import SPILL_BYTES


@dataclass(frozen=True, eq=False)
class Blocks:
    """Constants of one weight in block layout, in the graph that held its encoding.

    Attributes:
        layout: how they are laid out.
        codes: uint8 ``[N, blocks, block_bytes]``.
        scales: ``[N, blocks]``, in the weight's dtype (a Cast of fp16 values where that loses nothing).
        zero_points: packed uint8 ``[N, bytes]``, or None for the default, ``2 ** (bits - 1)``.
        zeros: the same unpacked, one per byte.
        decompressed: whether the runtime makes the codes when it loads the file, from a 2:4 weight.
    """

    layout: Layout
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    zeros: np.ndarray | None
    decompressed: bool = False


class BlockStore:
    """Blocks of the weights met so far, so that tied weights are written once."""

    def __init__(self, model: Model, level: int) -> None:
        self.model, self.level = model, level
        self._known: dict[tuple[int, int, float], Blocks | str] = {}

    def blocks(self, weight: EncodedInput, k_axis: int, factor: float = 1.0) -> Blocks | str:
        """The weight's blocks, times ``factor``, or why it has none."""
        key = (id(weight.value), k_axis, factor)
        if key not in self._known:
            self._known[key] = self._write(weight, k_axis, factor)
        return self._known[key]

    def shared(self, weight: EncodedInput) -> Blocks | None:
        """Blocks some MatMul already has of a table whose rows are its output channels."""
        found = self._known.get((id(weight.value), 1, 1.0))
        return found if isinstance(found, Blocks) else None

    def _write(self, weight: EncodedInput, k_axis: int, factor: float) -> Blocks | str:
        encoding, model = weight.encoding, self.model
        layout = plan(encoding, k_axis, self.level)
        if isinstance(layout, str):
            return layout
        before = weight.dequantize
        graph = graph_of(before)
        name = weight.name
        again = self._known.get((id(weight.value), k_axis, 1.0))
        zeros = block_zero_points(encoding, layout)
        spread = None if isinstance(again, Blocks) else lookup_blocks(model, weight, layout, zeros)
        if isinstance(again, Blocks):
            codes = again.codes
        elif spread is not None:
            codes = spread
        else:
            codes = model.add_initializer(graph, f"{name}.blocks", _tensor(encoding.codes, layout))
        scales = add_scales(
            model, before, name, block_scales(encoding, layout) * encoding.scales.dtype.type(factor)
        )
        points = None
        if zeros is not None:
            points = model.add_initializer(graph, f"{name}.block_zero_points", pack_rows(zeros, layout.bits))
        return Blocks(layout, codes, scales, points, zeros, codes.producer() is not None)


def _tensor(codes: ir.TensorProtocol, layout: Layout) -> ir.TensorProtocol:
    """The codes in block layout; those of a large weight are moved when they are written to a file.

    Moving them is about as fast as writing them, so that keeping the result on disk meanwhile would
    take more time than it saves.
    """
    if codes.nbytes < SPILL_BYTES:
        return ir.Tensor(block_codes(codes, layout))
    shape = ir.Shape((layout.outputs, layout.blocks, layout.block_bytes))
    return ir.LazyTensor(lambda: ir.Tensor(block_codes(codes, layout)), ir.DataType.UINT8, shape)


def add_scales(model: Model, before: ir.Node, name: str, scales: np.ndarray) -> ir.Value:
    """Scales as a constant; fp32 ones that fp16 holds exactly are stored so and widened by a Cast.

    The runtime folds the Cast when it loads the file.
    """
    graph = graph_of(before)
    # Most scales are not exact in fp16, and the first few tell.
    exact = scales.dtype == np.float32 and _as_half(scales.reshape(-1)[:256]) is not None
    half = _as_half(scales) if exact else None
    if half is None:
        return model.add_initializer(graph, f"{name}.block_scales", scales)
    narrow = model.add_initializer(graph, f"{name}.block_scales", half)
    wide = put_named(model, f"{name}.wide_scales", before, "Cast", [narrow], to=int(ir.DataType.FLOAT))
    wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(scales.shape)
    return wide


def _as_half(scales: np.ndarray) -> np.ndarray | None:
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scales) else None
