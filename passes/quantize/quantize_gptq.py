"""quantize-gptq: weight-only quantization in which later inputs make up for the errors of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from effic.ir.encodings import dequantize
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.weights import WeightSite
from effic.passes.base import CalibratedPass, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.quantize.gptq import Factor, factorise, gptq, pruned
from effic.passes.quantize.quantize_rtn import encode
from effic.passes.quantize.weight_only import (
    WeightOnly,
    decibels,
    encoding_of,
    predicted_bytes,
    report,
    sentence,
)
from effic.passes.statistics import SiteStatistics

# Rows of the sketch that output errors are reported from: good to a few percent (a few tenths of
# a decibel), where the second moment would take as long as the quantization itself.
_SKETCH = 256


@dataclass(frozen=True)
class QuantizeGPTQ(CalibratedPass, WeightOnly):
    """Store weights in few bits, later inputs making up for the rounding errors of earlier ones.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, DequantizeLinear(w.codes, w.scales))

    The weights of one input after another are rounded, and those of the inputs that are left move so
    that the outputs on the calibration data change least (GPTQ, Frantar et al., ICLR 2023, arXiv
    2210.17323). Inputs with the largest activations come first (``act_order``); scales of ``axis=oc``
    are taken from the weight as it is (``static_groups``) or as its errors have moved it, those of
    ``axis=ic`` always as moved. With ``propagate`` each layer sees what the quantized layers before it
    give. Weights of inputs that are zero on all the data become zero. Where a second moment cannot be
    factored, damping grows tenfold up to three times, then weights are rounded to nearest; the remark
    says so. So it is with tables that Gather alone reads (``embeddings``). Zeros of a pruned weight stay
    zero: only the weights that are left make up for errors.

    Missed for the reasons of quantize-rtn, and when the inputs of the weight cannot be observed: inside
    a subgraph or function, or multiplied with a constant.
    """

    name: ClassVar[str] = "quantize-gptq"

    axis: Literal["oc", "ic"] = option("oc", help="groups within one output channel or one input channel")
    percdamp: float = option(
        0.01, help="fraction of the mean diagonal of the second moment that is added to it", ge=0, le=1
    )
    blocksize: int = option(128, help="inputs brought up to date at once; for speed only", ge=1)
    act_order: bool = option(True, help="inputs with the largest activations first")
    static_groups: bool = option(True, help="axis=oc: scales from the weight before any of it moves")
    propagate: bool = option(True, help="calibrate each layer behind the quantized ones before it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis == "ic":
            self.refuse_idle("axis=ic", "static_groups")
        if self.axis == "oc" and self.act_order and not self.static_groups:
            raise UsageError(
                f"{self.name}: act_order=true needs static_groups=true, since ONNX cannot say which group an "
                "input belongs to; turn the first off or the second on"
            )

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        if calibration is None:
            return  # It always needs data, so apply_with has refused.
        seen: list[WeightSite] = []
        for site in self.sites(model, remarks):
            if site.kinds == {"Gather"}:
                self._round_table(model, site, remarks)
            elif reason := calibration.why_not(site):
                remarks.missed(site.name, reason)
            else:
                seen.append(site)
        last: tuple[np.ndarray, Factor] | None = None
        walk = calibration.walk(model, seen, sketch=_SKETCH, propagate=self.propagate, remarks=remarks)
        for site, statistics in walk:
            moment = statistics.second_moment
            if moment is None:
                continue  # It was asked for.
            factor = None
            if len(moment) == 1:
                # Layers that read the same input (q, k and v) follow each other and share the factor.
                if last is None or last[0] is not moment:
                    last = moment, factorise(moment, percdamp=self.percdamp, act_order=self.act_order)
                factor = last[1]
            self._quantize(model, site, statistics, moment, factor, remarks)

    def predicted_bytes(self, site: WeightSite) -> float:
        return predicted_bytes(site, self.grid(site), self.axis)

    def _round_table(self, model: Model, site: WeightSite, remarks: Remarks) -> None:
        encoded, sqnr, sampled = encode(model, site, self.grid(site), self.axis)
        if encoded is None:
            remarks.missed(site.name, "holds a weight that is infinite or not a number")
            return
        before = int(site.elements * site.dtype.bitwidth // 8)
        site.write(model, encoded)
        fallback = "rounded to nearest: a table of rows, which no activation multiplies"
        figures = report(encoded, self.axis, before, sqnr, sqnr_sampled=sampled, fallback=fallback)
        remarks.passed(site.name, sentence(figures), method="rtn", **figures)

    def _quantize(
        self,
        model: Model,
        site: WeightSite,
        statistics: SiteStatistics,
        moment: np.ndarray,
        factor: Factor | None,
        remarks: Remarks,
    ) -> None:
        grid = self.grid(site)
        with site.matrix() as matrix:
            if not (np.isfinite(matrix.min()) and np.isfinite(matrix.max())):
                remarks.missed(site.name, "holds a weight that is infinite or not a number")
                return
            weight = matrix if site.in_axis == 1 else matrix.T
            result = gptq(
                weight,
                moment,
                grid,
                self.axis,
                percdamp=self.percdamp,
                blocksize=self.blocksize,
                act_order=self.act_order,
                static_groups=self.static_groups,
                scale_dtype=matrix.dtype,
                factor=factor,
                keep_zeros=pruned(matrix),
            )
            codes, scales = _as_stored(site, result.codes), _as_stored(site, result.scales)
            zeros = None if result.zero_points is None else _as_stored(site, result.zero_points)
            run = site.run_axis(self.axis)
            block = grid.block(site.matrix_shape[run])
            delta = dequantize(codes, scales, zeros, run if block else 1 - run, block)
            delta = np.subtract(matrix, delta, out=delta) if delta.dtype == np.float32 else matrix - delta
            figures = _quality(site, statistics, matrix, delta)
            del weight
        encoded = encoding_of(model, site, grid, self.axis, codes, scales, zeros)
        before = int(site.elements * site.dtype.bitwidth // 8)
        site.write(model, encoded)
        figures = report(encoded, self.axis, before, **figures)
        figures |= {"damping": result.damping, "fallback": result.fallback}
        remarks.passed(site.name, sentence(figures), method="gptq", **figures)


def _as_stored(site: WeightSite, array: np.ndarray) -> np.ndarray:
    """An array laid out for ``[out, K]``, turned as the file stores the weight."""
    return array if site.in_axis == 1 else np.ascontiguousarray(array.T)


def _quality(
    site: WeightSite, statistics: SiteStatistics, matrix: np.ndarray, delta: np.ndarray
) -> dict[str, Any]:
    """Signal-to-noise ratios in dB of the weight and of its outputs on the data.

    Args:
        site: the weight.
        statistics: of its inputs.
        matrix: the weight as stored.
        delta: what quantization took from it, float32.
    """
    exact = np.asarray(matrix, np.float32)
    energy = [float(np.einsum("ij,ij->", a, a, dtype=np.float64)) for a in (exact, delta)]
    outputs = [statistics.output_error(a if site.in_axis == 1 else a.T) for a in (exact, delta)]
    output = decibels(*outputs)
    return {
        "sqnr": decibels(*energy),
        "output_sqnr_db": None if output is None else round(output, 2),
    }
