"""prune-sparsegpt: prune, and let the weights that stay make up for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from effic.ir.model import Model
from effic.ir.sparsity import Pattern, declare, reduction_length
from effic.ir.weights import WeightSite
from effic.passes.base import CalibratedPass, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.quantize.gptq import Factor
from effic.passes.sparsify.one_shot import Before, OneShot, Target, report, say_dense
from effic.passes.sparsify.scores import Kept
from effic.passes.sparsify.sparsegpt import factor_in_order, sparsegpt
from effic.passes.statistics import SiteStatistics


@dataclass(frozen=True)
class PruneSparseGPT(CalibratedPass, OneShot):
    """Zero all but n of every m weights, and let those that stay make up for the others.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, w2), in each column of w2 at most n of every m weights not zero

    Groups are pruned from the first input to the last; in each those weights stay that cost most to lose
    as they are by then, and the inputs that are left move so that the outputs on the calibration data
    change least (SparseGPT, Frantar and Alistarh, ICML 2023, arXiv 2301.00774). With ``update=false``
    weights that stay are not changed: the same second-order score, for a mask alone. With ``propagate``
    each layer sees what the pruned layers before it give. With ``density`` the weights of ``blocksize``
    inputs compete with each other. Weights of inputs that are zero on all the data become zero. Where a
    second moment cannot be factored, damping grows tenfold up to three times, then the largest weights
    stay; the remark says so. Groups, ties, what is stored and what it does for speed are as in
    prune-magnitude.

    Missed for the reasons of prune-magnitude, and when the inputs of the weight cannot be observed:
    inside a subgraph or function, or multiplied with a constant.
    """

    name: ClassVar[str] = "prune-sparsegpt"

    percdamp: float = option(
        0.01, help="fraction of the mean diagonal of the second moment that is added to it", ge=0, le=1
    )
    blocksize: int = option(
        128, help="inputs brought up to date at once; for speed, and with density those that compete", ge=1
    )
    update: bool = option(True, help="let the weights that stay make up for the others")
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
        last: tuple[np.ndarray, int, Factor] | None = None
        walk = calibration.walk(model, list(targets), propagate=self.propagate, remarks=remarks)
        for site, statistics in walk:
            moment, length = statistics.second_moment, reduction_length(site)
            if moment is None:
                continue  # It was asked for.
            # Layers that read the same input (q, k and v) follow each other and share the factor.
            if last is None or last[0] is not moment or last[1] != length:
                last = moment, length, factor_in_order(moment, length, self.percdamp)
            self._prune(model, site, targets[site], statistics, last[2], remarks)
        say_dense(remarks)

    def _prune(
        self,
        model: Model,
        site: WeightSite,
        target: Target,
        statistics: SiteStatistics,
        factor: Factor,
        remarks: Remarks,
    ) -> None:
        before = Before(site, statistics)
        groups, inputs = factor.order.shape
        kept = Kept()
        with site.matrix() as matrix:
            weight = _by_group(matrix if site.in_axis == 1 else matrix.T, groups, inputs)
            if not (np.isfinite(weight.min()) and np.isfinite(weight.max())):
                remarks.missed(site.name, "holds a weight that is infinite or not a number")
                return
            result = sparsegpt(
                weight, factor, target, reduction_length(site), blocksize=self.blocksize, update=self.update
            )
            found = _from_group(result.weight, site.shape_oi, groups)
            stored = found if site.in_axis == 1 else np.ascontiguousarray(found.T)
            _count(kept, np.asarray(weight, np.float32), result.mask)
            stored = _narrowed(stored, matrix.dtype).reshape(site.shape)
            del weight
        site.replace(model.scratch.tensor(site.name, stored, site.dtype))
        declare(model, site.name, target if isinstance(target, Pattern) else None)
        more = {"damping": result.damping, "fallback": result.fallback}
        report(remarks, site, target, kept, "sparsegpt", before, **more)


def _by_group(matrix: np.ndarray, groups: int, inputs: int) -> np.ndarray:
    """``[out, in]`` as ``[rows, K]``, the rows of one convolution group after those of another."""
    if matrix.shape[1] == inputs:
        return matrix
    return matrix.reshape(-1, groups, inputs).transpose(1, 0, 2).reshape(-1, inputs)


def _from_group(rows: np.ndarray, shape: tuple[int, int], groups: int) -> np.ndarray:
    """The inverse of :func:`_by_group`."""
    if rows.shape[1] == shape[1]:
        return rows
    return rows.reshape(groups, -1, rows.shape[1]).transpose(1, 0, 2).reshape(shape)


def _count(kept: Kept, weight: np.ndarray, mask: np.ndarray) -> None:
    kept.add(weight, np.where(mask, weight, np.float32(0)), int(np.count_nonzero(mask)))


def _narrowed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In the dtype of the weight; what has moved beyond its range becomes its largest value."""
    if dtype == np.float16:
        array = np.clip(array, -np.finfo(np.float16).max, np.finfo(np.float16).max)
    return array.astype(dtype, copy=False)
