"""Layer, root-mean-square, group and instance normalisation.

A row (what shares a mean) is read three times while it stays in a cache: the mean; the squares of what is
left after subtracting it, which does not cancel as the difference of the mean square and the squared mean
would; the result. Root mean square has no mean and two passes.

Roofline: 8 bytes per element from and to memory, 6 operations: memory limits, or the first-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.lanes import LANES, argument, function, loop, spec_name
from effic.backends.tvm.kernels.rows import MIN_PARALLEL_ELEMENTS, fold, indices, keep, partials, walk, wide

_SLOTS = 4


def _add(a: Any, b: Any) -> Any:
    return a + b


class _Row:
    """Statistics of one row that is read by ``load(indices)``."""

    def __init__(self, T: Any, load: Any, length: int) -> None:
        self.T, self.load, self.length = T, load, length

    def mean(self) -> Any:
        """The mean of the row, a scalar."""
        return self._sum(lambda value, _: value) / self.T.float32(self.length)

    def spread(self, center: Any | None, epsilon: float) -> Any:
        """1 / sqrt(mean of squared distances from ``center`` + epsilon), a scalar."""
        T = self.T

        def square(value: Any, width: int) -> Any:
            distance = value if center is None else value - wide(T, center, width)
            distance = keep(T, distance, width)
            return distance * distance

        variance = self._sum(square) / T.float32(self.length)
        return T.float32(1) / T.sqrt(variance + T.float32(epsilon))

    def _sum(self, of: Any) -> Any:
        T = self.T
        sums = partials(T, _SLOTS, 0.0)

        def step(slot: int, start: Any, width: int) -> None:
            at = indices(T, slot * LANES, width)
            T.buffer_store(sums, sums[at] + of(self.load(indices(T, start, width)), width), [at])

        walk(T, self.length, _SLOTS, step)
        return fold(T, sums, _SLOTS, _add)


@dataclass(frozen=True)
class LayerNorm:
    """``y[r, c] = (x[r, c] - mean_r) / sqrt(var_r + epsilon) * scale[c] + bias[c]`` in fp32.

    Attributes:
        rows: rows; None: known at run time only.
        columns: elements that share a mean.
        epsilon: added to the variance.
        scale, bias: which of the two follow x in the arguments.
        rms: no mean is subtracted, and the mean square takes the place of the variance.
    """

    rows: int | None
    columns: int
    epsilon: float
    scale: bool = True
    bias: bool = True
    rms: bool = False

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("layer_norm", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if self.columns < 1 or (self.rows is not None and self.rows < 1):
            return "a norm of no elements"
        return None

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x[rows, columns], [scale[columns]], [bias[columns]], y[rows, columns])``."""
        result: list[Any] = []
        with function(self.name, result) as T:
            rows = T.int64() if self.rows is None else self.rows
            x = argument(T, "x", (rows, self.columns))
            scale = argument(T, "scale", (self.columns,)) if self.scale else None
            bias = argument(T, "bias", (self.columns,)) if self.bias else None
            y = argument(T, "y", (rows, self.columns))
            enough = self.rows is None or self.rows * self.columns >= MIN_PARALLEL_ELEMENTS
            with loop(T, rows, cpu.cores > 1 and enough) as row:
                statistics = _Row(T, lambda at: x[row, at], self.columns)
                center = None if self.rms else keep(T, statistics.mean(), 1)
                factor = keep(T, statistics.spread(center, self.epsilon), 1)

                def finish(_: int, start: Any, width: int) -> None:
                    here = indices(T, start, width)
                    value = x[row, here]
                    if center is not None:
                        value = value - wide(T, center, width)
                    value = value * wide(T, factor, width)
                    value = value if scale is None else value * scale[here]
                    value = value if bias is None else value + bias[here]
                    T.buffer_store(y, value, [row, here])

                walk(T, self.columns, _SLOTS, finish)
        return result[0]


@dataclass(frozen=True)
class GroupNorm:
    """Normalisation of images in groups of channels: one group each is instance normalisation.

    ``y[n, c, i] = (x[n, c, i] - mean_g) / sqrt(var_g + epsilon) * scale[c] + bias[c]``, g the group of c.

    Attributes:
        batch: images; None: known at run time only.
        groups, channels: ``channels`` is a multiple of ``groups``.
        inner: pixels.
        epsilon: added to the variance.
    """

    batch: int | None
    groups: int
    channels: int
    inner: int
    epsilon: float

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("group_norm", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        if min(self.groups, self.channels, self.inner) < 1 or self.batch == 0:
            return "a norm of no elements"
        if self.channels % self.groups:
            return f"{self.channels} channels do not fall into {self.groups} groups"
        return None

    def prim_func(self, cpu: Cpu) -> Any:
        """``(x[batch, groups, channels / groups * inner], scale[channels], bias[channels], y like x)``."""
        each = self.channels // self.groups
        result: list[Any] = []
        with function(self.name, result) as T:
            batch = T.int64() if self.batch is None else self.batch
            shape = (batch, self.groups, each * self.inner)
            x = argument(T, "x", shape)
            scale, bias = argument(T, "scale", (self.channels,)), argument(T, "bias", (self.channels,))
            y = argument(T, "y", shape)
            enough = self.batch is None or self.batch * self.channels * self.inner >= MIN_PARALLEL_ELEMENTS
            with loop(T, batch * self.groups, cpu.cores > 1 and enough) as piece:
                image, group = piece // self.groups, piece % self.groups
                statistics = _Row(T, lambda at: x[image, group, at], each * self.inner)
                center = keep(T, statistics.mean(), 1)
                factor = keep(T, statistics.spread(center, self.epsilon), 1)
                with T.serial(each) as c:
                    slope = keep(T, factor * scale[group * each + c], 1)
                    offset = bias[group * each + c]

                    def finish(_: int, start: Any, width: int) -> None:
                        here = indices(T, c * self.inner + start, width)
                        value = x[image, group, here] - wide(T, center, width)
                        value = value * wide(T, slope, width) + wide(T, offset, width)
                        T.buffer_store(y, value, [image, group, here])

                    walk(T, self.inner, _SLOTS, finish)
        return result[0]
