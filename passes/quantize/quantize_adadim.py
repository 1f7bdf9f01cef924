"""quantize-adadim: weight-only quantization that chooses per layer which way groups run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.weights import Axis, WeightSite
from effic.passes.base import CalibratedPass, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.finished import unfinished
from effic.passes.quantize.adadim import Candidate, Compensator, choose
from effic.passes.quantize.adadim_decision import Decision, candidates, decide
from effic.passes.quantize.measured_blocks import Judgement, batches, find_blocks, judge_blocks
from effic.passes.quantize.weight_only import (
    WeightOnly,
    decibels,
    encoding_of,
    predicted_bytes,
    report,
    sentence,
)
from effic.passes.statistics import SiteStatistics

# Operations that judging a whole model exactly may take: a few seconds on one core.
_EXACT_WORK = 2e11

# An input channel with fewer outputs than this has scales that weigh more than they help, and which
# make its error no fair comparison: bits per weight are equal at equal groups only.
_LEAST_IC = 16


@dataclass(frozen=True)
class QuantizeAdaDim(CalibratedPass, WeightOnly):
    """Store weights in few bits, in groups along inputs or outputs, whichever errs less at each layer.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, DequantizeLinear(w.codes, w.scales))    groups within an output channel (oc)
                                                                   or within an input channel (ic)

    Groups within an input channel confine what a channel of large weights or activations does to its
    own weights; which way is better is measured on data, layer by layer, and ties go to ``oc`` (AdaDim,
    Heo et al., ICLR 2024, arXiv 2309.15531). With ``scope=layer`` a layer is judged by its own outputs;
    with ``scope=block`` layers that share an input (q, k and v; gate and up) are judged one after the
    other where their paths have met again and one layer on, as the paper does. Tied weights are judged
    once, by the errors of all uses. The dimension is that of least error on the data, which is no
    promise for the whole model.

    With ``base=gptq`` the rounding errors of earlier inputs are made up for by later ones (GPTQ), within
    the dimension that rounding chose (``select=rtn``) or the one GPTQ itself errs less in
    (``select=gptq``). Its result is kept even where it errs more than rounding does.

    Missed for the reasons of quantize-rtn. A weight whose inputs are not seen (inside a Loop, or of a
    table) is judged by its own error.
    """

    name: ClassVar[str] = "quantize-adadim"

    base: Literal["rtn", "gptq"] = option("rtn", help="round to nearest, or make up for errors (GPTQ)")
    dim: Literal["auto", "oc", "ic"] = option(
        "auto", help="groups within an output or an input channel, or the better one"
    )
    scope: Literal["layer", "block"] = option(
        "layer", help="judge a layer at its own output, or those that share an input where they meet"
    )
    select: Literal["rtn", "gptq"] = option("rtn", help="with base=gptq: whose error chooses the dimension")
    sketch: int = option(
        128, help="rows that stand for a layer's inputs when a large model is judged; 0 for all", ge=0
    )
    percdamp: float = option(
        0.01,
        help="with base=gptq: fraction of the mean diagonal of the second moment added to it",
        ge=0,
        le=1,
    )
    blocksize: int = option(128, help="with base=gptq: inputs brought up to date at once", ge=1)
    act_order: bool = option(True, help="with base=gptq: inputs with the largest activations first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "gptq" and self.base != "gptq":
            raise UsageError(f"{self.name}: select=gptq needs base=gptq")
        if self.dim != "auto":
            self.refuse_idle(f"dim={self.dim}", "scope", "select")
        if self.base == "rtn":
            self.refuse_idle("base=rtn", "percdamp", "blocksize", "act_order")
        elif self.sketch:
            self.refuse_idle("base=gptq, unless it is 0", "sketch")

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        if calibration is None:
            return  # It always needs data, so apply_with has refused.
        unseen = {site: calibration.why_not(site) for site in self.sites(model, remarks)}
        seen = [site for site, reason in unseen.items() if reason is None]
        judged, reasons = self._judge_blocks(model, calibration, seen)
        exact = self._exact(seen, calibration.share)
        moment, sketch = exact or self.base == "gptq", self.sketch * (not exact and self.base == "rtn")
        worker = self._compensator()
        walk = calibration.walk(model, seen, second_moment=moment, sketch=sketch, remarks=remarks)
        for site, statistics in walk:
            decision = self._decide(site, statistics, judged.get(site), worker, exact)
            self._write(model, site, decision, reasons.get(site), remarks)
        rest = {site: reason for site, reason in unseen.items() if reason is not None}
        for site in unfinished(model, rest, remarks):
            decision = self._decide(site, None, None, worker, exact)
            self._write(model, site, decision, f"judged by its own error, since it {rest[site]}", remarks)

    def predicted_bytes(self, site: WeightSite) -> float:
        dims: tuple[Axis, ...] = ("oc", "ic") if self.dim == "auto" else (self.dim,)
        return min(predicted_bytes(site, self.grid(site), axis) for axis in dims)

    def axes(self, site: WeightSite) -> tuple[list[Axis], str | None]:
        """The dimensions a weight may take, and why the other one is out, or None."""
        if self.dim != "auto":
            return [self.dim], None
        if predicted_bytes(site, self.grid(site), "oc") >= site.elements * site.dtype.bitwidth / 8:
            return ["ic"], "oc would not get smaller"
        outputs, group = site.shape_oi[0], self.width(site).group_size
        if outputs < _LEAST_IC and not 0 < group <= outputs:
            return ["oc"], f"ic would take a scale for every {outputs} weights"
        if predicted_bytes(site, self.grid(site), "ic") >= site.elements * site.dtype.bitwidth / 8:
            return ["oc"], "ic would not get smaller"
        return ["oc", "ic"], None

    def _compensator(self) -> Compensator:
        return Compensator(percdamp=self.percdamp, blocksize=self.blocksize, act_order=self.act_order)

    def _exact(self, sites: Sequence[WeightSite], share: float) -> bool:
        """Whether weights are judged by all that is known of their inputs; ``share``: of all the sites."""
        work = sum(4.0 * site.elements * site.shape_oi[1] for site in sites)
        return self.sketch == 0 or work <= _EXACT_WORK * share

    def _judge_blocks(
        self, model: Model, calibration: Calibration, sites: Sequence[WeightSite]
    ) -> tuple[dict[WeightSite, Judgement], dict[WeightSite, str]]:
        """Errors of weights that share an input, and why others that do are judged alone."""
        judged: dict[WeightSite, Judgement] = {}
        if self.scope == "layer" or self.dim != "auto":
            return judged, {}
        blocks, reasons = find_blocks(model, sites)
        worker = self._compensator()
        for batch in batches(blocks):
            members = [site for block in batch for site in block.sites]
            found: dict[WeightSite, dict[Axis, Candidate] | None] = {}
            if self.select == "gptq":
                for site, statistics in calibration.walk(model, members):
                    found[site] = candidates(site, self.grid(site), self.axes(site)[0], statistics, worker)
            else:
                for site in members:
                    found[site] = candidates(site, self.grid(site), self.axes(site)[0], None, None)
            fine = {site: ways for site, ways in found.items() if ways is not None}
            whole = [block for block in batch if all(site in fine for site in block.sites)]
            judged.update(judge_blocks(model, calibration, whole, fine))
        return judged, {site: f"judged at its own output: {reason}" for site, reason in reasons.items()}

    def _decide(
        self,
        site: WeightSite,
        statistics: SiteStatistics | None,
        judgement: Judgement | None,
        worker: Compensator,
        exact: bool,
    ) -> Decision | None:
        axes, note = self.axes(site)
        if judgement is not None:
            axes = [choose(judgement.errors)]
        gptq = worker if self.base == "gptq" else None
        by_gptq = self.select == "gptq"
        decision = decide(site, self.grid(site), axes, statistics, gptq, by_gptq=by_gptq, exact=exact)
        return None if decision is None else replace(decision, judgement=judgement, note=note)

    def _write(
        self,
        model: Model,
        site: WeightSite,
        decision: Decision | None,
        fallback: str | None,
        remarks: Remarks,
    ) -> None:
        if decision is None:
            remarks.missed(site.name, "holds a weight that is infinite or not a number")
            return
        best, before = decision.candidate, int(site.elements * site.dtype.bitwidth // 8)
        encoded = encoding_of(
            model, site, self.grid(site), best.axis, best.codes, best.scales, best.zero_points
        )
        site.write(model, encoded)
        if fallback is not None:
            decision.fallbacks.append(fallback)
        figures = report(
            encoded,
            best.axis,
            before,
            decibels(decision.power.weight, decision.error.weight),
            **decision.figures(),
        )
        remarks.passed(
            site.name,
            f"{sentence(figures)}; {decision.verdict()}",
            method=f"adadim-{self.base}",
            scope=self.scope,
            **figures,
        )
