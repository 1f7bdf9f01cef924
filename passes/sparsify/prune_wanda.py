"""prune-wanda: keep the weights that move the outputs most, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from effic.ir.model import Model
from effic.ir.weights import WeightSite
from effic.passes.base import CalibratedPass, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.sparsify.one_shot import SKETCH, Before, OneShot, Target, prune, report, say_dense
from effic.passes.sparsify.scores import NotFiniteError


@dataclass(frozen=True)
class PruneWanda(CalibratedPass, OneShot):
    """Keep the n of every m weights that are largest times the norm of their input, and zero the others.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, w2), in each column of w2 at most n of every m weights not zero

    The score of a weight is its magnitude times the root mean square of its input on the calibration
    data (Wanda, Sun et al., ICLR 2024, arXiv 2306.11695): what zeroing it alone does to the output.
    Weights that stay are not changed. Where inputs are uncorrelated no mask has less output error. With
    ``propagate`` each layer sees what the pruned layers before it give. With ``density`` the weights of
    one output compete with each other, wherever they lie. Groups, ties, what is stored and what it does
    for speed are as in prune-magnitude.

    Missed for the reasons of prune-magnitude, and when the inputs of the weight cannot be observed:
    inside a subgraph or function, or multiplied with a constant.
    """

    name: ClassVar[str] = "prune-wanda"

    propagate: bool = option(True, help="calibrate each layer behind the pruned ones before it")

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        if calibration is None:
            return  # It always needs data, so apply_with has refused.
        targets: dict[WeightSite, Target] = {}
        for site, target in self.sites(model, remarks):
            if reason := calibration.why_not(site):
                remarks.missed(site.name, reason)
            else:
                targets[site] = target
        walk = calibration.walk(
            model,
            list(targets),
            second_moment=False,
            sketch=SKETCH,
            propagate=self.propagate,
            remarks=remarks,
        )
        for site, statistics in walk:
            norm, fallback = np.sqrt(statistics.mean_square), None
            if not norm.any():
                norm, fallback = None, "pruned by magnitude: its inputs were zero on all the data"
            before = Before(site, statistics)
            try:
                kept = prune(model, site, targets[site], norm, "row")
            except NotFiniteError:
                remarks.missed(site.name, "holds a weight that is infinite or not a number")
                continue
            report(remarks, site, targets[site], kept, "wanda", before, fallback=fallback)
        say_dense(remarks)
