"""Direct fp32 convolution of images in blocks of 16 channels, with bias, residual and clamp in one pass.

``y[n, o, i, j] = act(sum_{c, p, q} x[n, c, i·s + p·d - pad, j·s + q·d - pad] · w[o, c, p, q] + bias[o]
+ residual[n, o, i, j])``. Images are ``[N, ceil(C / 16), H, W, 16]``, channels past C are zero; the input
of a first layer may be plain ``[N, C, H, W]``. The design is that of MLAS's NCHWc kernels.

Weight: ``[O / (16·r), C / 16, kh, kw, 16, 16·r]`` (plain input: no block of 16 c). A register tile holds
``columns`` neighbouring pixels of one row × r blocks of filters; for each (c, p, q) it loads r vectors of the
weight, one contiguous stream, and broadcasts ``columns`` floats of x. The tiles of a row that touch the
padding are separate code in which the products with padding do not exist, and rows of the kernel above
or below the image are cut off the loop: nothing is copied and nothing is tested in the inner loop. A 1x1
kernel sees several rows of the image as one long row. C is cut so that a tile's weights stay in L2;
partial sums wait in y.

Groups: the filters of one tile read a window of blocks of channels, and the weight has zeros where a
filter of one group meets channels of another; groups of 16 or more channels waste nothing.

Roofline: ``2·N·O·OH·OW·(C/groups)·kh·kw`` flops; bytes of x, w, y and residual, each about once. 3x3 kernels
and deep 1x1 are limited by multiply-adds, 1x1 of few channels by the bytes of x and y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.lanes import (
    CHUNKS_PER_CORE,
    LANES,
    MIN_PARALLEL_FLOPS,
    accumulators,
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

_L2 = 1 << 18
"""Bytes of weights or of image that are meant to stay in the second level: a quarter of the smallest L2
of a server, half of a desktop's."""

_MAX_UNROLLED = 16
"""Columns of a kernel that are written out for a plain image; wider kernels loop."""


@dataclass(frozen=True)
class Window:
    """Where a kernel looks: sizes of the image, kernel, steps and padding.

    Attributes:
        height, width: of the input.
        kernel, strides, dilations: (vertical, horizontal).
        pads: (top, left, bottom, right).
    """

    height: int
    width: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        """Words of a function name."""
        numbers = (self.kernel, self.strides, self.pads, self.dilations)
        return "_".join([f"{self.height}x{self.width}", *("x".join(map(str, n)) for n in numbers)])

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        top, left, bottom, right = self.pads
        reach_h = (self.kernel[0] - 1) * self.dilations[0] + 1
        reach_w = (self.kernel[1] - 1) * self.dilations[1] + 1
        return (
            (self.height + top + bottom - reach_h) // self.strides[0] + 1,
            (self.width + left + right - reach_w) // self.strides[1] + 1,
        )

    def why_not(self) -> str | None:
        """What no kernel can run over, as a sentence."""
        if min(self.kernel) < 1 or min(self.strides) < 1 or min(self.dilations) < 1:
            return (
                f"a kernel of {self.kernel}, strides {self.strides}, dilations {self.dilations} is no window"
            )
        if min(self.pads) < 0:
            return f"negative padding {self.pads} would crop the image"
        if min(self.out) < 1:
            return f"a kernel of {self.kernel} finds no place in an image of {self.height} x {self.width}"
        return None

    def rows(self, T: Any, i: Any) -> tuple[Any, Any]:
        """First and one past the last row of the kernel that lies inside the image, at output row ``i``."""
        top, step, dilation, size = self.pads[0], self.strides[0], self.dilations[0], self.kernel[0]
        first: Any = 0
        last: Any = size
        # Both ends are cut to [0, size], where they can leave it; then the end is never before the start.
        lowest = (self.out[0] - 1) * step - top
        if top:
            first = T.max(0, (top - i * step + dilation - 1) // dilation)
            first = T.min(size, first) if top > (size - 1) * dilation else first
        if lowest + (size - 1) * dilation >= self.height:
            last = T.min(size, (self.height + top - i * step + dilation - 1) // dilation)
            last = T.max(0, last) if lowest >= self.height else last
        return first, last

    def spans(self, length: int) -> list[tuple[int, int, int]]:
        """The tiles of an output row: (first column, tiles alike that follow it, length of each).

        A run of several tiles is one that touches no padding; the others stand alone.
        """
        columns, found = self.out[1], list[tuple[int, int, int]]()
        for start in range(0, columns, length):
            size = min(length, columns - start)
            inside = self.inside(start, size)
            if inside and found and found[-1][2] == size and self.inside(found[-1][0], size):
                found[-1] = (found[-1][0], found[-1][1] + 1, size)
            else:
                found.append((start, 1, size))
        return found

    def inside(self, start: int, size: int) -> bool:
        """Whether the output columns [start, start + size) see no padding."""
        first = start * self.strides[1] - self.pads[1]
        last = (start + size - 1) * self.strides[1] - self.pads[1] + (self.kernel[1] - 1) * self.dilations[1]
        return first >= 0 and last < self.width

    def sees(self, column: int, q: int) -> bool:
        """Whether column ``q`` of the kernel, at output column ``column``, lies inside the image."""
        return 0 <= column * self.strides[1] - self.pads[1] + q * self.dilations[1] < self.width

    def seen(self, start: int, size: int, q: int) -> range:
        """Those of the output columns [start, start + size), from 0, whose column ``q`` lies inside the image."""
        inside = [j for j in range(size) if self.sees(start + j, q)]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


@dataclass(frozen=True)
class Conv2d:
    """A convolution of ``batch`` images into blocks of 16 filters.

    Attributes:
        batch: images; None: known at run time only.
        channels, filters: sizes.
        window: image, kernel, strides, pads, dilations.
        groups: of channels and filters.
        bias: whether a bias follows the weight.
        residual: whether an image of the output's shape is added before the activation.
        activation: None, ``relu``, or ``clip`` to ``low`` … ``high``.
        plain_input: x is ``[N, C, H, W]``.
        blocks: blocks of 16 filters in a register tile (a divisor of all blocks); None chooses.
        columns: most pixels in a register tile; None chooses.
        c_tile: blocks of channels (channels, if plain) per round; None chooses.
        bands: parts of the rows of the image, each done for all filters in turn; None chooses.
        portable: use the form for CPUs without AVX512.
    """

    batch: int | None
    channels: int
    filters: int
    window: Window
    groups: int = 1
    bias: bool = False
    residual: bool = False
    activation: str | None = None
    low: float = -math.inf
    high: float = math.inf
    plain_input: bool = False
    blocks: int | None = None
    columns: int | None = None
    c_tile: int | None = None
    bands: int | None = None
    portable: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("conv", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if reason := self.window.why_not():
            return reason
        if min(1 if self.batch is None else self.batch, self.channels, self.filters, self.groups) < 1:
            return "a convolution of no images, channels or filters has no elements"
        if self.channels % self.groups or self.filters % self.groups:
            return (
                f"{self.channels} channels and {self.filters} filters do not fall into {self.groups} groups"
            )
        if self.blocks is not None and -(-self.filters // LANES) % self.blocks:
            return f"{-(-self.filters // LANES)} blocks of filters do not fall into tiles of {self.blocks}"
        return why_no_activation(self.activation, self.low, self.high) or why_not_zero(self)

    # -- layout ----------------------------------------------------------------------------------

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an image of x."""
        size = (self.window.height, self.window.width)
        if self.plain_input:
            return (self.channels, *size)
        return (-(-self.channels // LANES), *size, LANES)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of an image of y and of the residual."""
        return (-(-self.filters // LANES), *self.window.out, LANES)

    @property
    def flat(self) -> Window:
        """The window as the loops see it: rows of a 1x1 kernel are joined into longer ones."""
        w = self.window
        if w.kernel != (1, 1) or w.strides != (1, 1) or any(w.pads):
            return w
        # Long enough for tiles of even length, short enough to stay near in L1 for the next filters.
        joined = next(
            (g for g in range(1, w.height + 1) if w.height % g == 0 and w.width * g >= 48), w.height
        )
        return Window(w.height // joined, w.width * joined)

    @property
    def tile(self) -> tuple[int, int]:
        """Blocks of filters and most pixels of the register tile, for AVX512."""
        # A plain image's broadcasts serve several columns of the kernel, which is written out: they stay in
        # registers as well.
        return self._tile(14 if self.plain_input and self.window.kernel[1] > 1 else 28)

    def _tile(self, vectors: int) -> tuple[int, int]:
        blocks, columns = -(-self.filters // LANES), self.flat.out[1]
        best, choice = math.inf, (1, 1)
        for r in range(1, 9):
            if blocks % r or (self.blocks is not None and r != self.blocks):
                continue
            most = min(vectors // r, self.columns or vectors)
            if most < 1:
                continue
            length, full, rest = tiles(columns, most)
            # Cycles of a step: two multiply-adds or two loads per cycle, a chain of sums waits 4.
            cost = sum(
                count * (max(size * r / 2, (size + r) / 2, 4) + 0.5)
                for size, count in ((length, full), (rest, int(rest > 0)))
            )
            cost *= blocks // r * self._window_size(r)
            if cost < best * 0.999:
                best, choice = cost, (r, length)
        return choice

    @property
    def filter_blocks(self) -> int:
        """Blocks of filters in the register tile, the last axis of the packed weight over 16.

        The weight is packed before the CPU is known to the caller: every CPU reads the same layout.
        """
        return self.blocks or self.tile[0]

    def _starts(self, r: int) -> list[tuple[int, int]]:
        """First and one past the last channel (block of channels) that the filters of each tile read."""
        per_filter, per_group = self.filters // self.groups, self.channels // self.groups
        unit = 1 if self.plain_input else LANES
        found = []
        for start in range(0, -(-self.filters // LANES) * LANES, r * LANES):
            stop = min(start + r * LANES, self.filters)
            first, last = start // per_filter, (stop - 1) // per_filter
            found.append((first * per_group // unit, -(-(last + 1) * per_group // unit)))
        return found

    def _window_size(self, r: int) -> int:
        return max(last - first for first, last in self._starts(r))

    def _first(self, T: Any, r: int, tile: Any) -> Any:
        """First channel (block) that a tile of filters reads, as in :meth:`_starts`, inside the image."""
        if self.groups == 1:
            return 0
        per_filter, per_group = self.filters // self.groups, self.channels // self.groups
        unit = 1 if self.plain_input else LANES
        first = (tile * (r * LANES) // per_filter) * per_group // unit
        return T.min(first, self.input_shape[0] - self._window_size(r))

    def pack(self, weight: np.ndarray, bias: np.ndarray | None = None) -> list[np.ndarray]:
        """``[filters, channels / groups, kh, kw]`` in the kernel's layout, and the bias in blocks."""
        r = self.filter_blocks
        size, starts = self._window_size(r), self._starts(r)
        unit = 1 if self.plain_input else LANES
        per_filter, per_group = self.filters // self.groups, self.channels // self.groups
        packed = np.zeros((len(starts), size * unit, *self.window.kernel, r * LANES), np.float32)
        for tile, (first, _) in enumerate(starts):
            first = min(first, self.input_shape[0] - size) * unit
            lane = 0
            while lane < r * LANES and tile * r * LANES + lane < self.filters:
                o = tile * r * LANES + lane
                group = o // per_filter
                count = min((group + 1) * per_filter, self.filters, (tile + 1) * r * LANES) - o
                at = group * per_group - first
                packed[tile, at : at + per_group, ..., lane : lane + count] = np.moveaxis(
                    weight[o : o + count], 0, -1
                )
                lane += count
        if not self.plain_input:
            kh, kw = self.window.kernel
            packed = packed.reshape(len(starts), size, LANES, kh, kw, r * LANES).transpose(0, 1, 3, 4, 2, 5)
        result = [np.ascontiguousarray(packed)]
        if self.bias:
            padded = np.zeros((-(-self.filters // LANES), LANES), np.float32)
            if bias is not None:
                padded.reshape(-1)[: self.filters] = bias
            result.append(padded)
        return result

    # -- code ------------------------------------------------------------------------------------

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x, w, [bias[O / 16, 16]], [residual], y)``."""
        r, flat = self.filter_blocks, self.flat
        held = registers(cpu, self.portable)
        per_tile = self.columns or self.tile[1]
        length = tiles(flat.out[1], min(per_tile, max(1, held // r)))[0]
        size, (kh, kw) = self._window_size(r), self.window.kernel
        count = -(-self.filters // LANES) // r
        result: list[Any] = []
        with function(self.name, result) as T:
            batch = T.int64() if self.batch is None else self.batch
            unit = () if self.plain_input else (LANES,)
            x = argument(T, "x", (batch, *self.input_shape))
            w = argument(T, "w", (count, size, kh, kw, *unit, r * LANES))
            bias = argument(T, "bias", (count * r, LANES)) if self.bias else None
            residual = argument(T, "residual", (batch, *self.output_shape)) if self.residual else None
            y = argument(T, "y", (batch, *self.output_shape))
            flops = (
                2 * (self.batch or 1) * math.prod(self.output_shape) * self.channels // self.groups * kh * kw
            )
            parallel = cpu.cores > 1 and flops >= MIN_PARALLEL_FLOPS
            bands = self._bands(count, cpu.cores * CHUNKS_PER_CORE if parallel else 1)
            height = flat.out[0]
            c_length, c_full, c_rest = tiles(size, self.c_tile or self._c_tile(r))
            code = _Code(T, self, flat, x, w, bias, residual, y)
            with loop(T, batch * bands * count, parallel) as piece:
                tile, band, image = piece % count, piece // count % bands, piece // count // bands
                for number in range(c_full + (c_rest > 0)):
                    start = number * c_length
                    stop = min(size, start + c_length)
                    top = height * band // bands
                    with T.serial(height * (band + 1) // bands - top) as below:
                        row = top + below
                        for first, alike, columns in flat.spans(length):
                            where = (image, tile, row)
                            if alike == 1:
                                code.run(where, first, columns, start, stop, size)
                            else:
                                with T.serial(alike) as along:
                                    at = first + along * columns
                                    code.run(where, at, columns, start, stop, size)
        return result[0]

    def _c_tile(self, r: int) -> int:
        unit = 1 if self.plain_input else LANES
        return max(1, 2 * _L2 // (4 * r * LANES * unit * math.prod(self.window.kernel)))

    def _bands(self, count: int, wanted: int) -> int:
        """Parts of the rows: enough for the cores; more when the image is then read from L2 instead."""
        height = self.flat.out[0]
        if self.bands is not None:
            return min(self.bands, height)
        image = 4 * math.prod(self.input_shape)
        weights = 4 * count * self._window_size(self.filter_blocks) * self.filter_blocks * LANES
        weights *= math.prod(self.window.kernel) * (1 if self.plain_input else LANES)
        bands = 1
        if image > 2 * _L2 and weights * -(-image // _L2) < image * (count - 1):
            bands = -(-image // _L2)
        return min(height, max(bands, -(-wanted // ((self.batch or 1) * count))))


def why_not_zero(spec: Any) -> str | None:
    """Why channels past the last would not stay zero: the clamp of a ragged block excludes zero."""
    if spec.activation == "clip" and not spec.low <= 0 <= spec.high and spec.filters % LANES:
        return f"the clip from {spec.low} to {spec.high} excludes zero, the value of channels past the last"
    return None


class _Code:
    """The register tile: pixels of a row × blocks of filters, over a range of channels."""

    def __init__(
        self, T: Any, spec: Conv2d, flat: Window, x: Any, w: Any, bias: Any, residual: Any, y: Any
    ) -> None:
        self.T, self.spec, self.flat, self.w, self.bias = T, spec, flat, w, bias
        # Joined rows of a 1x1 kernel: the same memory under another shape.
        if flat != spec.window:

            def joined(image: Any) -> Any:
                sizes = [*image.shape[:2], flat.height, flat.width, *image.shape[4:]]
                return T.decl_buffer(sizes, "float32", data=image.data)

            x, y, residual = joined(x), joined(y), None if residual is None else joined(residual)
        self.x, self.residual, self.y = x, residual, y
        self.r = spec.filter_blocks

    def run(
        self, where: tuple[Any, Any, Any], column: Any, columns: int, start: int, stop: int, size: int
    ) -> None:
        """One tile at (image, tile of filters, row), channels (blocks) [start, stop) of ``size``."""
        T, spec, r, flat = self.T, self.spec, self.r, self.flat
        image, tile, row = where
        acc = accumulators(T, columns * r)

        def target(j: Any, b: Any) -> list[Any]:
            return [image, tile * r + b, row, column + j, lanes(T, 0)]

        def slot(j: Any, b: Any) -> Any:
            return lanes(T, (j * r + b) * LANES)

        # TVM unrolls these loops at the end: statements written out here would go through each of its passes.
        with T.unroll(columns) as j, T.unroll(r) as b:
            if start:
                value = self.y[tuple(target(j, b))]
            elif self.bias is not None:
                value = self.bias[tile * r + b, lanes(T, 0)]
            else:
                value = splat(T, 0.0)
            T.buffer_store(acc, value, [slot(j, b)])

        first = spec._first(T, r, tile)
        edge = not isinstance(column, int) or flat.inside(column, columns)

        def step(c: Any, p: Any, q: Any, inner: tuple[Any, ...], seen: range) -> None:
            h = row * flat.strides[0] - flat.pads[0] + p * flat.dilations[0]
            with T.unroll(seen.start, seen.stop) as j, T.unroll(r) as b:
                at = (column + j) * flat.strides[1] - flat.pads[1] + q * flat.dilations[1]
                value = splat(T, self.x[(image, first + c, h, at, *inner)])
                weight = self.w[(tile, c, p, q, *inner, lanes(T, b * LANES))]
                T.buffer_store(acc, acc[slot(j, b)] + value * weight, [slot(j, b)])

        def taps(c: Any, p: Any) -> None:
            everything = range(columns)
            width = flat.kernel[1]
            if edge and width > 1 and not (spec.plain_input and width <= _MAX_UNROLLED):
                with T.serial(width) as q:
                    self._channels(lambda inner: step(c, p, q, inner, everything))
                return
            for q in range(width):
                seen = everything if edge else flat.seen(column, columns, q)
                if seen:
                    self._channels(lambda inner, q=q, seen=seen: step(c, p, q, inner, seen))  # type: ignore[misc]

        with T.serial(start, stop) as c:
            low, high = flat.rows(T, row)
            if isinstance(low, int) and isinstance(high, int) and high == 1:
                taps(c, 0)
            else:
                with T.serial(high - low) as p:
                    taps(c, low + p)

        with T.unroll(columns) as j, T.unroll(r) as b:
            value = acc[slot(j, b)]
            if stop == size:
                if self.residual is not None:
                    value = value + self.residual[tuple(target(j, b))]
                value = clamp(T, value, spec.activation, spec.low, spec.high)
            T.buffer_store(self.y, value, target(j, b))

    def _channels(self, body: Callable[[tuple[Any, ...]], None]) -> None:
        if self.spec.plain_input:
            body(())
        else:
            with self.T.serial(LANES) as lane:
                body((lane,))
