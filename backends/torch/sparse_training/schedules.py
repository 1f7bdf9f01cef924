"""What a mask is like at a moment of the training: plain functions of counted steps and epochs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from effic.ir.errors import UsageError
from effic.ir.sparsity import Pattern

Unit = Literal["step", "epoch"]
"""What a schedule counts: optimizer steps, or epochs."""


@dataclasses.dataclass
class Clock:
    """How far the training has come.

    Attributes:
        step: optimizer steps made.
        epoch: epochs ended.
        sparse: optimizer steps made since the first mask.
    """

    step: int = 0
    epoch: int = 0
    sparse: int = 0

    def now(self, unit: Unit) -> int:
        """The count that a schedule in this unit goes by."""
        return self.step if unit == "step" else self.epoch


@dataclasses.dataclass(frozen=True)
class Phase:
    """What the mask of a weight is like.

    Attributes:
        pattern: what it keeps; None while the weight is dense.
        beta: what the others are multiplied by.
    """

    pattern: Pattern | None
    beta: float = 0.0


def linear(start: float, end: float, now: int, total: int) -> float:
    """From ``start`` at 0 to ``end`` at ``total`` and from there on."""
    return start + (end - start) * min(max(now, 0), total) / total


def mask_decay(kind: Literal["linear", "exp"], rho: float, t: int) -> float:
    """What MdGf multiplies pruned weights by, ``t`` optimizer steps after sparsification began.

    Linear: max(1 - rho t, 0); exponential: exp(-rho t), which never is 0 (arXiv 2402.04744).
    """
    return max(1.0 - rho * t, 0.0) if kind == "linear" else math.exp(-rho * t)


def stepwise(pattern: Pattern) -> list[Pattern]:
    """(M-1):M, M/2:M, M/4:M … N:M: one pattern per interval, log2(M/N) + 1 of them.

    Raises:
        UsageError: M/N is no power of two.
    """
    ratio, rest = divmod(pattern.m, pattern.n)
    if rest or ratio & (ratio - 1):
        raise UsageError(f"a stepwise schedule halves its way to N:M, and {pattern} is no power of two away")
    halves = [Pattern(pattern.m >> i, pattern.m) for i in range(1, ratio.bit_length())]
    return [Pattern(pattern.m - 1, pattern.m), *halves]


def geometric(pattern: Pattern, k: int, length: int) -> list[Pattern]:
    """kN:kM, kN/2:kM/2 … N:M: the same density in ever shorter groups.

    Args:
        pattern: the last one.
        k: a power of two: how many times longer the first groups are.
        length: of the vectors that groups run along. Groups that do not divide it are left out; those
            of the schedule's first intervals are then as long as the longest that does.
    """
    found = [Pattern(pattern.n * f, pattern.m * f) for f in (k >> i for i in range(k.bit_length()))]
    best = next((one for one in found if length % one.m == 0), found[-1])
    return [one if one.m <= best.m else best for one in found]


def boundaries(count: int, start: int, end: int) -> list[int]:
    """Where each of ``count`` equally long intervals between ``start`` and ``end`` begins.

    Raises:
        UsageError: they would not even be one long.
    """
    if end - start < count:
        raise UsageError(
            f"{count} patterns take turns, for which {end - start} is too short; train longer, or take "
            "less for the dense and the last phase"
        )
    return [start + i * (end - start) // count for i in range(count)]


def last_begun(starts: Sequence[int], now: int) -> int | None:
    """The last interval that has begun, None before the first: right wherever a training is resumed."""
    return max((i for i, start in enumerate(starts) if start <= now), default=None)
