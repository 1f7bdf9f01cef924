"""What AdaDim decides for one weight: the dimension, the quantized weight, and what both err."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effic.ir.weights import Axis, WeightSite
from effic.passes.quantize.adadim import (
    Candidate,
    Compensator,
    Errors,
    Judge,
    choose,
    rounded,
    undamped_error,
)
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.measured_blocks import Judgement
from effic.passes.quantize.weight_only import decibels
from effic.passes.statistics import SiteStatistics


@dataclass(eq=False)
class Decision:
    """How a weight is quantized, and what it was measured to do.

    Attributes:
        candidate: the result.
        error: what it does to the layer's own output and to the weight.
        power: of the layer's own output and of the weight.
        errors: those that were compared, by dimension, at the layer's output.
        judgement: those that were compared at the output of a block instead, or None.
        note: why there was no choice, or None.
        error_rtn: output error of rounding in the same dimension, with GPTQ.
        damping: with GPTQ.
        fallbacks: what was done otherwise than asked for.
    """

    candidate: Candidate
    error: Errors
    power: Errors
    errors: dict[Axis, float]
    judgement: Judgement | None = None
    note: str | None = None
    error_rtn: float | None = None
    damping: float | None = None
    fallbacks: list[str] = field(default_factory=list)

    @property
    def compared(self) -> dict[Axis, float]:
        """The errors that decided."""
        return self.errors if self.judgement is None else self.judgement.errors

    def figures(self) -> dict[str, Any]:
        """What goes into the remark's data."""
        sqnr = decibels(self.power.output, self.error.output)
        figures: dict[str, Any] = {
            "output_sqnr_db": None if sqnr is None else round(sqnr, 2),
            "error_oc": self.compared.get("oc"),
            "error_ic": self.compared.get("ic"),
            "output_error": self.error.output,
        }
        if self.judgement is not None:
            figures["measured_at"] = self.judgement.where
        if self.error_rtn is not None:
            figures["error_rtn"], figures["error_gptq"] = self.error_rtn, self.error.output
            figures["damping"] = self.damping
        if self.fallbacks:
            figures["fallback"] = "; ".join(self.fallbacks)
        return figures

    def verdict(self) -> str:
        """Which dimension won and by how much, as a phrase."""
        axis = self.candidate.axis
        other: Axis = "ic" if axis == "oc" else "oc"
        errors = self.compared
        if other not in errors:
            text = f"{axis}, for {self.note}" if self.note else f"{axis}, as asked for"
        elif errors[axis] == errors[other]:
            text = f"{axis}, for both err the same"
        else:
            less = 100 * (1 - errors[axis] / errors[other])
            text = f"{axis} errs {less:.1f} % less than {other}"
        if self.judgement is not None:
            text += f" at {self.judgement.where}"
        if self.error_rtn:
            change = 100 * (self.error.output / self.error_rtn - 1)
            text += f", GPTQ {abs(change):.1f} % {'more' if change > 0 else 'less'} than rounding"
        return text


def candidates(
    site: WeightSite,
    grid: Grid,
    axes: Sequence[Axis],
    statistics: SiteStatistics | None,
    worker: Compensator | None,
) -> dict[Axis, Candidate] | None:
    """A weight quantized along each dimension: by GPTQ where there are a worker and statistics with a
    second moment, else by rounding. None when a weight is not finite."""
    moment = None if worker is None else _moment(site, statistics)
    found: dict[Axis, Candidate] = {}
    with site.matrix() as matrix:
        for axis in axes:
            candidate = rounded(matrix, axis, site.in_axis, grid)
            if candidate is None:
                return None
            if worker is not None and moment is not None:
                candidate = worker.compensated(matrix, moment, axis, site.in_axis, grid)[0]
            found[axis] = candidate
    return found


def decide(
    site: WeightSite,
    grid: Grid,
    axes: Sequence[Axis],
    statistics: SiteStatistics | None,
    worker: Compensator | None,
    *,
    by_gptq: bool = False,
    exact: bool = True,
) -> Decision | None:
    """Choose the dimension of a weight by the error at its own output, and quantize it.

    Args:
        site: the weight; only read.
        grid: bits, group size, symmetry.
        axes: dimensions to choose from.
        statistics: of its inputs, or None when they are not seen.
        worker: for GPTQ, or None to round to nearest.
        by_gptq: compare what GPTQ makes of the dimensions, instead of rounding.
        exact: see :class:`~effic.passes.quantize.adadim.Judge`.

    Returns:
        None when a weight is infinite or not a number.
    """
    moment = None if worker is None else _moment(site, statistics)
    with site.matrix() as matrix:
        judge = Judge(statistics, site.in_axis, exact=exact)
        rtn: dict[Axis, Candidate] = {}
        rtn_errors: dict[Axis, Errors] = {}
        for axis in axes:
            candidate = rounded(matrix, axis, site.in_axis, grid)
            if candidate is None:
                return None
            rtn[axis], rtn_errors[axis] = candidate, judge.candidate(matrix, candidate)
        power = judge.weight(matrix)
        outputs: dict[Axis, float] = {axis: error.output for axis, error in rtn_errors.items()}
        axis = choose(outputs)
        if worker is None:
            return Decision(rtn[axis], rtn_errors[axis], power, outputs)
        if moment is None:
            reason = "rounded to nearest, since there is no second moment of its inputs for GPTQ"
            return Decision(rtn[axis], rtn_errors[axis], power, outputs, fallbacks=[reason])
        tried = {
            axis: worker.compensated(matrix, moment, axis, site.in_axis, grid)
            for axis in (axes if by_gptq else [axis])
        }
        errors = {axis: judge.candidate(matrix, found) for axis, (found, _) in tried.items()}
        if not exact and len(moment) == 1:
            # GPTQ puts its errors where inputs are correlated, which the approximation does not see.
            for axis, (_, result) in tried.items():
                if result.fallback is None:
                    change = errors[axis].weight
                    output = undamped_error(result, moment, change, matrix, site.in_axis)
                    errors[axis] = Errors(output, change)
        if by_gptq:
            outputs = {axis: error.output for axis, error in errors.items()}
            axis = choose(outputs)
    found, result = tried[axis]
    return Decision(
        found,
        errors[axis],
        power,
        outputs,
        error_rtn=rtn_errors[axis].output,
        damping=result.damping,
        fallbacks=[] if result.fallback is None else [result.fallback],
    )


def _moment(site: WeightSite, statistics: SiteStatistics | None) -> np.ndarray | None:
    """The second moment that fits the weight as GPTQ takes it, or None."""
    moment = None if statistics is None else statistics.second_moment
    # A ConvTranspose of several groups has its input channels side by side, not one after another.
    return None if moment is None or moment.shape[2] != site.shape_oi[1] else moment
