"""Pooling of images in blocks of 16 channels.

x and y are ``[N, ceil(C / 16), H, W, 16]``. Windows at the border see only what lies in the image, so that no
padding is made: the tiles of pixels and the cut of rows are those of
:mod:`effic.backends.tvm.kernels.conv`.

Roofline: every kernel here reads x once and writes y once; bytes limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.conv import Window
from effic.backends.tvm.kernels.lanes import (
    LANES,
    MIN_PARALLEL_FLOPS,
    accumulators,
    argument,
    function,
    lanes,
    loop,
    registers,
    spec_name,
    splat,
    tiles,
)

_FLOPS_PER_ELEMENT = 8
"""What moving an element costs beside a multiply-add, for the decision to wake other threads."""


def _parallel(cpu: Cpu, elements: int) -> bool:
    return cpu.cores > 1 and elements * _FLOPS_PER_ELEMENT >= MIN_PARALLEL_FLOPS


@dataclass(frozen=True)
class Pool2d:
    """The maximum or the mean of every window.

    Attributes:
        batch: images; None: known at run time only.
        channels: of x and y.
        window: image, kernel, strides, pads, dilations.
        kind: ``max`` or ``mean``.
        count_pads: the mean divides by all places of the kernel, not only by those in the image.
        portable: use the form for CPUs without AVX512.
    """

    batch: int | None
    channels: int
    window: Window
    kind: str = "max"
    count_pads: bool = False
    portable: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("pool", self)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of an image of y."""
        return (-(-self.channels // LANES), *self.window.out, LANES)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if reason := self.window.why_not():
            return reason
        if min(1 if self.batch is None else self.batch, self.channels) < 1:
            return "no images or channels to pool"
        if self.kind not in ("max", "mean"):
            return f"the kind '{self.kind}' is none of max and mean"
        reach = [(k - 1) * d + 1 for k, d in zip(self.window.kernel, self.window.dilations, strict=True)]
        if any(pad >= reach[i % 2] for i, pad in enumerate(self.window.pads)):
            return f"padding {self.window.pads} leaves windows of {self.window.kernel} without a pixel"
        return None

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x, y)``."""
        window, blocks = self.window, -(-self.channels // LANES)
        height, width = window.out
        length = tiles(width, max(2, registers(cpu, self.portable) // 2))[0]
        result: list[Any] = []
        with function(self.name, result) as T:
            batch = T.int64() if self.batch is None else self.batch
            x = argument(T, "x", (batch, blocks, window.height, window.width, LANES))
            y = argument(T, "y", (batch, *self.output_shape))

            def tile(image: Any, block: Any, row: Any, column: Any, columns: int) -> None:
                acc = accumulators(T, columns)
                start = -math.inf if self.kind == "max" else 0.0
                # Loops that TVM unrolls at the end: written out, each of its passes would visit every statement.
                with T.unroll(columns) as j:
                    T.buffer_store(acc, splat(T, start), [lanes(T, j * LANES)])
                inside = not isinstance(column, int) or window.inside(column, columns)
                low, high = window.rows(T, row)
                with T.serial(high - low) as down:
                    h = row * window.strides[0] - window.pads[0] + (low + down) * window.dilations[0]
                    for q in range(window.kernel[1]):
                        seen = range(columns) if inside else window.seen(column, columns, q)
                        with T.unroll(seen.start, seen.stop) as j:
                            at = (column + j) * window.strides[1] - window.pads[1] + q * window.dilations[1]
                            slot = lanes(T, j * LANES)
                            value = x[image, block, h, at, lanes(T, 0)]
                            value = T.max(acc[slot], value) if self.kind == "max" else acc[slot] + value
                            T.buffer_store(acc, value, [slot])
                for j in range(columns):
                    value = acc[lanes(T, j * LANES)]
                    if self.kind == "mean":
                        taps: Any = window.kernel[1]
                        if not inside and not self.count_pads:
                            taps = sum(window.sees(column + j, q) for q in range(taps))
                        rows = window.kernel[0] if self.count_pads else high - low
                        value = value / T.broadcast(T.Cast("float32", T.int32(taps) * rows), LANES)
                    T.buffer_store(y, value, [image, block, row, column + j, lanes(T, 0)])

            elements = (self.batch or 1) * math.prod(self.output_shape)
            with loop(T, batch * blocks * height, _parallel(cpu, elements)) as piece:
                image, block, row = piece // height // blocks, piece // height % blocks, piece % height
                for first, alike, columns in window.spans(length):
                    if alike == 1:
                        tile(image, block, row, first, columns)
                    else:
                        with T.serial(alike) as along:
                            tile(image, block, row, first + along * columns, columns)
        return result[0]


@dataclass(frozen=True)
class GlobalMean:
    """The mean of every channel: ``[N, C / 16, H, W, 16]`` to ``[N, C / 16, 1, 1, 16]``.

    Attributes:
        batch: images; None: known at run time only.
        channels, pixels: sizes; ``pixels`` is H · W.
    """

    batch: int | None
    channels: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("global_mean", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if min(1 if self.batch is None else self.batch, self.channels, self.height, self.width) < 1:
            return "no pixels to take the mean of"
        return None

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x, y)``."""
        blocks, pixels, ways = -(-self.channels // LANES), self.height * self.width, 8
        result: list[Any] = []
        with function(self.name, result) as T:
            batch = T.int64() if self.batch is None else self.batch
            x = argument(T, "x", (batch, blocks, self.height, self.width, LANES))
            y = argument(T, "y", (batch, blocks, 1, 1, LANES))
            flat = T.decl_buffer((batch, blocks, pixels, LANES), "float32", data=x.data)
            parallel = _parallel(cpu, (self.batch or 1) * blocks * pixels * LANES)
            with loop(T, batch * blocks, parallel) as piece:
                image, block = piece // blocks, piece % blocks
                acc = accumulators(T, ways)

                def add(at: Any, way: int) -> None:
                    slot = lanes(T, way * LANES)
                    T.buffer_store(acc, acc[slot] + flat[image, block, at, lanes(T, 0)], [slot])

                for way in range(ways):
                    T.buffer_store(acc, splat(T, 0.0), [lanes(T, way * LANES)])
                with T.serial(pixels // ways) as group:
                    for way in range(ways):
                        add(group * ways + way, way)
                for way in range(pixels % ways):
                    add(pixels // ways * ways + way, way)
                total = [acc[lanes(T, way * LANES)] for way in range(ways)]
                while len(total) > 1:
                    total = [a + b for a, b in zip(total[::2], total[1::2], strict=True)]
                T.buffer_store(y, total[0] * splat(T, 1.0 / pixels), [image, block, 0, 0, lanes(T, 0)])
        return result[0]
