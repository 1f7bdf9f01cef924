"""equalize-layers: channels that two layers in a row use alike, for one scale per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from effic.ir.model import Model
from effic.ir.weights import WeightSite, weight_sites
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.quantize.equalize import equalize
from effic.passes.quantize.fold_scales import LINEARS, ScaleFlow, Scaling, channel_ranges
from effic.passes.quantize.weight_only import matches_site, say_unmatched

# Factors nearer to 1 than this are the rounding of an earlier run.
_WORTH_IT = 1e-2


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Give the channels between two layers equal ranges, so that one scale per layer fits them all.

    Before:  z = Conv(Relu(Conv(x, w1, b1)), w2)
    After:   z = Conv(Relu(Conv(x, w1/s, b1/s)), w2*s)      s = sqrt(r1/r2) per channel

    ``r1`` and ``r2`` are the ranges of a channel's weights in the two layers (Nagel et al. 2019,
    section 4.1); pairs that share a layer are iterated until nothing moves. The function stays the
    same. It helps quantizers with one scale per layer; with one scale per output channel the first
    layer of a pair gains nothing. Batch norms must be folded first (fuse-conv-bn). Needs no data.

    Missed when what lies between is not positively homogeneous (Clip, and with it ReLU6; Sigmoid; a
    batch norm), when the value between is read by anything but layers (a residual Add) or is a graph
    output, when a weight is shared, encoded, computed at run time or not finite, and when the ranges are
    equal already.
    """

    name: ClassVar[str] = "equalize-layers"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    kinds: tuple[str, ...] = option(LINEARS, help="operators between which to equalise", choices=LINEARS)
    skip: tuple[str, ...] = option((), help="layers to leave alone: patterns of weight or node names")

    def apply(self, model: Model, remarks: Remarks) -> None:
        say_unmatched(model, "skip", self.skip, remarks)
        flow = ScaleFlow(model)
        pairs = []
        for site in weight_sites(model, self.kinds):
            if site.why_not is not None and not site.shape:
                continue  # A product of two activations is no layer.
            found = flow.made_by(site)
            reason = found if isinstance(found, str) else self.why_not(found)
            if reason is not None:
                remarks.missed(site.name, reason)
            elif isinstance(found, Scaling):
                pairs.append(found)
        for result in equalize(pairs):
            name = result.scaling.producer.site.name if result.scaling.producer.site else result.scaling.name
            if np.abs(np.log(result.scaling.whole(result.factor))).max() < _WORTH_IT:
                remarks.missed(name, "its channels have equal ranges already")
                continue
            reason = result.scaling.fold(model, result.factor)
            if reason is not None:
                remarks.missed(name, reason)
                continue
            others = ", ".join(item.site.name for item in result.scaling.consumers)
            remarks.passed(
                name,
                f"equalised with {others}: precision of its channels {result.before:.2f} -> {result.after:.2f}",
                precision_before=round(result.before, 4),
                precision_after=round(result.after, 4),
            )

    def why_not(self, pair: Scaling) -> str | None:
        """Why a pair is left alone, or None."""
        sites: list[WeightSite] = [item.site for item in pair.consumers]
        other = next((site for site in sites if not site.kinds & set(self.kinds)), None)
        if other is not None:
            return f"is followed by '{other.name}', a {other.kind}, which is not named in kinds"
        for site in (pair.producer.site, *sites):
            if site is not None and matches_site(site, self.skip):
                return f"'{site.name}' is named in skip"
            if site is not None and not np.isfinite(channel_ranges(site)).all():
                return f"'{site.name}' holds a weight that is infinite or not a number"
        return None
