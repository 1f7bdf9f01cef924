"""smooth-activations: outliers of activations go into the weights, where they hurt less (SmoothQuant)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from effic.ir.model import Model
from effic.ir.weights import weight_sites
from effic.passes.base import CalibratedPass, Numerics, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.quantize.fold_scales import (
    LINEARS,
    ScaleFlow,
    Scaling,
    channel_ranges,
    per_input_channel,
)
from effic.passes.quantize.weight_only import matches_site, say_unmatched

# The least factor, and the least range a weight counts as having (the authors' code has both).
_LEAST = 1e-5

# Factors nearer to 1 than this are the rounding of an earlier run.
_WORTH_IT = 1e-2


@dataclass(frozen=True)
class SmoothActivations(CalibratedPass):
    """Move outliers of activations into the weights, so that 8 bits can hold the activations.

    Before:  h = LayerNormalization(x, g, b);      q = MatMul(h, wq);    k = MatMul(h, wk)
    After:   h = LayerNormalization(x, g/s, b/s);  q = MatMul(h, wq*s);  k = MatMul(h, wk*s)

    Per channel ``s = max|x|^alpha / max|w|^(1-alpha)``, where ``w`` are the weights of all layers that
    read the channel (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438). The function stays the same;
    it is a preparation for quantize-int8. Factors go into norms (with or without an operator of
    their own) and, with ``producers=all``, into the rows of the layer before as well.

    A channel that was silent on the data, or that no weight reads, is left alone: the formula would
    make it as loud as the arithmetic allows.

    Missed when the norm's output is read by anything but layers (a residual Add), when a weight is
    shared, encoded or computed at run time, when no norm or layer that could take the factors makes
    the input, and when the channels are even already.
    """

    name: ClassVar[str] = "smooth-activations"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    alpha: float = option(0.5, help="how much of an outlier goes into the weights: 0 none, 1 all", ge=0, le=1)
    producers: Literal["norms", "all"] = option("norms", help="fold into norms only, or into layers as well")
    kinds: tuple[str, ...] = option(
        ("MatMul", "Gemm"), help="operators whose inputs are smoothed", choices=LINEARS
    )
    skip: tuple[str, ...] = option((), help="weights whose inputs stay: patterns of weight or node names")

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        if calibration is None:
            return  # It always needs data, so apply_with has refused.
        say_unmatched(model, "skip", self.skip, remarks)
        sites = [site for site in weight_sites(model, self.kinds) if site.shape]
        flow = ScaleFlow(model, sites)
        scalings: dict[Scaling, None] = {}
        for site in sites:
            found = flow.find(site)
            reason = found if isinstance(found, str) else self.why_not(found)
            reason = reason or calibration.why_not(site)
            if reason is not None:
                remarks.missed(site.name, reason)
            elif isinstance(found, Scaling):
                scalings[found] = None
        loudest = observe(model, calibration, list(scalings))
        # From the last to the first: the factors of a layer's inputs depend on how wide its weights are,
        # and those of its outputs change that.
        for scaling in reversed(list(scalings)):
            self.smooth(model, scaling, loudest[scaling], remarks)

    def smooth(self, model: Model, scaling: Scaling, loudest: np.ndarray, remarks: Remarks) -> None:
        """Fold the factors of one producer, given ``max|x|`` of its channels."""
        factor = scaling.whole(smoothing_factors(loudest, widest_weights(scaling), self.alpha))
        where = scaling.producer.node
        if np.abs(np.log(factor)).max(initial=0.0) < _WORTH_IT:
            remarks.missed(where, "the channels of its output are even already")
            return
        if reason := scaling.fold(model, factor):
            remarks.missed(where, reason)
            return
        before, after = outlier_ratio(loudest), outlier_ratio(loudest / factor)
        names = ", ".join(item.site.name for item in scaling.consumers)
        remarks.passed(
            where,
            f"loudest channel {before:.1f} times the median, now {after:.1f}; folded into {names}",
            outlier_ratio_before=round(before, 3),
            outlier_ratio_after=round(after, 3),
            alpha=self.alpha,
        )

    def why_not(self, scaling: Scaling) -> str | None:
        """Why a scaling is left alone, or None."""
        if self.producers == "norms" and scaling.producer.site is not None:
            return f"its input is made by {scaling.name}, which is no norm; producers=all folds into layers"
        for item in scaling.consumers:
            if matches_site(item.site, self.skip):
                return f"'{item.site.name}' is named in skip"
            if not item.site.kinds & set(self.kinds):
                return (
                    f"its input is read by '{item.site.name}', whose {item.site.kind} is not named in kinds"
                )
        return None


def observe(model: Model, calibration: Calibration, scalings: list[Scaling]) -> dict[Scaling, np.ndarray]:
    """``max|x|`` of the channels of each producer, over all its consumers that can be observed."""
    loudest = {scaling: np.zeros(scaling.free.size) for scaling in scalings}
    owners = {item.site: (scaling, item) for scaling in scalings for item in scaling.consumers}
    seen = [site for site in owners if calibration.why_not(site) is None]
    for site, statistics in calibration.walk(model, seen, second_moment=False):
        scaling, item = owners[site]
        values = per_input_channel(site, statistics.abs_max).max(axis=1)
        np.maximum.at(loudest[scaling], item.channels, values)
    return loudest


def widest_weights(scaling: Scaling) -> np.ndarray:
    """``max|w|`` of each of the producer's channels over all weights that read it."""
    widest = np.zeros(scaling.free.size)
    for item in scaling.consumers:
        np.maximum.at(widest, item.channels, channel_ranges(item.site).max(axis=1).reshape(-1))
    return widest


def smoothing_factors(loudest: np.ndarray, widest: np.ndarray, alpha: float) -> np.ndarray:
    """SmoothQuant's factors; activations are divided by them and weights multiplied.

    Args:
        loudest: ``max|x|`` per channel.
        widest: ``max|w|`` per channel, over all layers that read it.
        alpha: migration strength.

    Returns:
        ``max(loudest^alpha / widest^(1-alpha), 1e-5)``, float64, with 1 for channels where either is 0.
    """
    alive = (loudest > 0) & (widest > 0)
    loudest, widest = np.where(alive, loudest, 1.0), np.where(alive, np.maximum(widest, _LEAST), 1.0)
    return np.where(alive, np.maximum(loudest**alpha / widest ** (1 - alpha), _LEAST), 1.0)


def outlier_ratio(loudest: np.ndarray) -> float:
    """The loudest channel over the median of those that are not silent (1 when all are alike)."""
    alive = loudest[loudest > 0]
    return float(alive.max() / np.median(alive)) if alive.size else 1.0
