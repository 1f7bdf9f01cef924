"""Cross-layer equalisation: channels that two layers in a row use alike.

Nagel, van Baalen, Blankevoort and Welling, "Data-free quantization through weight equalization and
bias correction" (ICCV 2019, arXiv 1906.04721), section 4.1. Between two layers with nothing but a
positively homogeneous function in between, output channel ``i`` of the first may be divided by ``s_i``
and input channel ``i`` of the second multiplied by it. With ranges ``r1`` and ``r2`` of the two,
``s = sqrt(r1·r2) / r2`` makes both ranges ``sqrt(r1·r2)``, which is the best choice for layers that
are quantized with one scale each. Pairs that share a layer are iterated until nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effic.ir.weights import WeightSite
from effic.passes.quantize.fold_scales import Scaling, channel_ranges

# A sweep that moves no factor by more than this is the last one.
_CONVERGED = 1e-5
_MAX_SWEEPS = 1000

# A channel whose weights are this much smaller than the layer's largest is dead for all purposes:
# making it as large as the others would blow up its bias.
_DEAD = 1e-6


@dataclass(frozen=True, eq=False)
class Equalized:
    """One pair of layers (the second may be several).

    Attributes:
        scaling: the pair.
        factor: what the first layer's channels are to be divided by, float64 ``[channels]``.
        before, after: mean over channels of ``(r1/max r1)·(r2/max r2)``, the precision that the
            channels have left when each layer gets one scale; 1 is ideal (equation 8 of the paper).
    """

    scaling: Scaling
    factor: np.ndarray
    before: float
    after: float


def equalize(scalings: Sequence[Scaling]) -> list[Equalized]:
    """Factors that equalise pairs of layers; nothing is folded yet.

    Args:
        scalings: pairs whose producers are linear layers. A layer may occur in several.

    Returns:
        One result for each, in order.
    """
    ranges = _Ranges(scalings)
    before = [ranges.precision(pair) for pair in scalings]
    totals = [np.zeros(pair.free.size) for pair in scalings]
    for _ in range(_MAX_SWEEPS):
        largest = 0.0
        for pair, total in zip(scalings, totals, strict=True):
            step = ranges.step(pair)
            ranges.apply(pair, np.exp(step))
            total += step
            largest = max(largest, float(np.abs(step).max(initial=0.0)))
        if largest <= _CONVERGED:
            break
    return [
        Equalized(pair, np.exp(total), first, ranges.precision(pair))
        for pair, total, first in zip(scalings, totals, before, strict=True)
    ]


class _Ranges:
    """Ranges of all layers between their channels, scaled as the factors go."""

    def __init__(self, scalings: Sequence[Scaling]) -> None:
        self._of: dict[WeightSite, np.ndarray] = {}
        for pair in scalings:
            for site in (pair.producer.site, *(item.site for item in pair.consumers)):
                if site is not None and site not in self._of:
                    self._of[site] = channel_ranges(site).astype(np.float64)

    def pair(self, pair: Scaling) -> tuple[np.ndarray, np.ndarray]:
        """``r1`` and ``r2``: ranges of the producer's channels on its side and on the consumers'."""
        second = np.zeros(pair.free.size)
        for item in pair.consumers:
            np.maximum.at(second, item.channels, self._of[item.site].max(axis=1).reshape(-1))
        site = pair.producer.site
        first = np.zeros_like(second) if site is None else self._of[site].max(axis=2).reshape(-1)
        return first, second

    def step(self, pair: Scaling) -> np.ndarray:
        """Logarithm of the factors that equalise one pair as it is now."""
        first, second = self.pair(pair)
        alive = pair.free & (first > _DEAD * first.max(initial=0)) & (second > _DEAD * second.max(initial=0))
        ratio = np.divide(first, second, out=np.ones_like(first), where=alive)
        return np.asarray(0.5 * np.log(ratio))

    def apply(self, pair: Scaling, factor: np.ndarray) -> None:
        """Divide the producer's channels by factors and multiply the consumers' by them."""
        if pair.producer.site is not None:
            ranges = self._of[pair.producer.site]
            ranges /= factor.reshape(ranges.shape[0], -1, 1)
        for item in pair.consumers:
            ranges = self._of[item.site]
            ranges *= factor[item.channels].reshape(ranges.shape[0], 1, -1)

    def precision(self, pair: Scaling) -> float:
        """Mean of ``(r1/max r1)·(r2/max r2)`` over the channels that may be scaled."""
        shares = [r / max(float(r.max(initial=0)), 1e-30) for r in self.pair(pair)]
        return float((shares[0] * shares[1])[pair.free].mean()) if pair.free.any() else 1.0
