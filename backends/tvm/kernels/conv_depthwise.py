"""Depthwise fp32 convolution in blocks of 16 channels: one filter per channel, all 16 lanes at once.

``y[n, c, i, j] = act(sum_{p, q} x[n, c, i·s + p·d - pad, j·s + q·d - pad] · w[c, p, q] + bias[c] +
residual[n, c, i, j])``. x and y are ``[N, ceil(C / 16), H, W, 16]``, the weight is ``[C / 16, kh, kw, 16]``.
A register tile is a run of pixels of one row; neighbouring pixels share what they load. Padding costs
nothing, as in :mod:`effic.backends.tvm.kernels.conv`.

Roofline: ``2·kh·kw`` flops for the 8 bytes of an input and an output element: bytes limit, from L2 or beyond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.conv import Window, why_not_zero
from effic.backends.tvm.kernels.lanes import (
    CHUNKS_PER_CORE,
    LANES,
    MIN_PARALLEL_FLOPS,
    argument,
    clamp,
    function,
    lanes,
    loop,
    registers,
    spec_name,
    splat,
    tiles,
    why_no_activation,
)

_MAX_UNROLLED = 7
"""Columns of a kernel that are written out, so that neighbouring pixels share their loads."""


@dataclass(frozen=True)
class DepthwiseConv2d:
    """A convolution of every channel with a filter of its own.

    Attributes:
        batch: images; None: known at run time only.
        channels: of x and of y.
        window: image, kernel, strides, pads, dilations.
        bias, residual, activation, low, high: as in :class:`effic.backends.tvm.kernels.conv.Conv2d`.
        columns: most pixels in a register tile; None chooses.
        portable: use the form for CPUs without AVX512.
    """

    batch: int | None
    channels: int
    window: Window
    bias: bool = False
    residual: bool = False
    activation: str | None = None
    low: float = -math.inf
    high: float = math.inf
    columns: int | None = None
    portable: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("depthwise", self)

    @property
    def filters(self) -> int:
        """Filters, as many as channels."""
        return self.channels

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of an image of y and of the residual."""
        return (-(-self.channels // LANES), *self.window.out, LANES)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if reason := self.window.why_not():
            return reason
        if min(1 if self.batch is None else self.batch, self.channels) < 1:
            return "a convolution of no images or channels has no elements"
        return why_no_activation(self.activation, self.low, self.high) or why_not_zero(self)

    def pack(self, weight: np.ndarray, bias: np.ndarray | None = None) -> list[np.ndarray]:
        """``[C, 1, kh, kw]`` and ``[C]`` in blocks of 16 channels, zeros past C."""
        blocks, kernel = -(-self.channels // LANES), self.window.kernel
        filters = np.zeros((blocks * LANES, *kernel), np.float32)
        filters[: self.channels] = weight.reshape(self.channels, *kernel)
        packed = filters.reshape(blocks, LANES, *kernel).transpose(0, 2, 3, 1)
        result = [np.ascontiguousarray(packed)]
        if self.bias:
            padded = np.zeros((blocks, LANES), np.float32)
            if bias is not None:
                padded.reshape(-1)[: self.channels] = bias
            result.append(padded)
        return result

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x, w, [bias[C / 16, 16]], [residual], y)``."""
        window, blocks = self.window, -(-self.channels // LANES)
        height, width = window.out
        kh, kw = window.kernel
        # Sums, and what neighbouring pixels share, fit the registers together; longer tiles measured slower.
        most = self.columns or max(2, registers(cpu, self.portable) // 4)
        length = tiles(width, most)[0]
        result: list[Any] = []
        with function(self.name, result) as T:
            batch = T.int64() if self.batch is None else self.batch
            x = argument(T, "x", (batch, blocks, window.height, window.width, LANES))
            w = argument(T, "w", (blocks, kh, kw, LANES))
            bias = argument(T, "bias", (blocks, LANES)) if self.bias else None
            residual = argument(T, "residual", (batch, *self.output_shape)) if self.residual else None
            y = argument(T, "y", (batch, *self.output_shape))
            # Bytes limit: an element costs as much as 8 multiply-adds.
            work = (self.batch or 1) * math.prod(self.output_shape) * 2 * max(8, kh * kw)
            parallel = cpu.cores > 1 and work >= MIN_PARALLEL_FLOPS
            pieces = (self.batch or 1) * blocks
            bands = min(height, -(-CHUNKS_PER_CORE * cpu.cores // pieces)) if parallel else 1

            def tile(image: Any, block: Any, row: Any, column: Any, columns: int) -> None:
                # Of no scope, unlike others: TVM takes those, and any of a kilobyte, from the heap, tile after tile.
                acc = T.alloc_buffer((columns * LANES,), "float32")
                # TVM unrolls these loops at the end: written out, each of its passes would visit every statement.
                with T.unroll(columns) as j:
                    start = splat(T, 0.0) if bias is None else bias[block, lanes(T, 0)]
                    T.buffer_store(acc, start, [lanes(T, j * LANES)])
                inside = not isinstance(column, int) or window.inside(column, columns)

                def tap(p: Any, q: Any, seen: range) -> None:
                    h = row * window.strides[0] - window.pads[0] + p * window.dilations[0]
                    with T.unroll(seen.start, seen.stop) as j:
                        at = (column + j) * window.strides[1] - window.pads[1] + q * window.dilations[1]
                        product = x[image, block, h, at, lanes(T, 0)] * w[block, p, q, lanes(T, 0)]
                        slot = lanes(T, j * LANES)
                        T.buffer_store(acc, acc[slot] + product, [slot])

                low, high = window.rows(T, row)
                with T.serial(high - low) as down:
                    if inside and kw > _MAX_UNROLLED:
                        with T.serial(kw) as q:
                            tap(low + down, q, range(columns))
                    else:
                        for q in range(kw):
                            seen = range(columns) if inside else window.seen(column, columns, q)
                            if seen:
                                tap(low + down, q, seen)
                with T.unroll(columns) as j:
                    value = acc[lanes(T, j * LANES)]
                    target = [image, block, row, column + j, lanes(T, 0)]
                    if residual is not None:
                        value = value + residual[tuple(target)]
                    T.buffer_store(y, clamp(T, value, self.activation, self.low, self.high), target)

            with loop(T, batch * blocks * bands, parallel) as piece:
                image, block, band = piece // bands // blocks, piece // bands % blocks, piece % bands
                top = height * band // bands
                with T.serial(height * (band + 1) // bands - top) as below:
                    for first, alike, columns in window.spans(length):
                        if alike == 1:
                            tile(image, block, top + below, first, columns)
                        else:
                            with T.serial(alike) as along:
                                tile(image, block, top + below, first + along * columns, columns)
        return result[0]
