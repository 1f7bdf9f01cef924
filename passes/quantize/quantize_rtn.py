"""quantize-rtn: weight-only quantization by rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from effic.ir.encodings import Encoding, code_type
from effic.ir.model import Model
from effic.ir.weights import WeightSite
from effic.passes.base import Remarks, option
from effic.passes.quantize.affine import Grid, quantization_noise, quantize
from effic.passes.quantize.weight_only import (
    WeightOnly,
    decibels,
    encoding_of,
    predicted_bytes,
    report,
    sentence,
)


@dataclass(frozen=True)
class QuantizeRTN(WeightOnly):
    """Store weights in few bits, each rounded to the nearest level of its group's grid.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, DequantizeLinear(w.codes, w.scales))

    Needs no data and keeps activations in floating point. A group of ``group_size`` weights shares a
    scale; with ``axis=oc`` groups run along the inputs of one output channel, with ``axis=ic`` along
    the outputs of one input channel. At the same size more groups mean less error and more scales.
    3-bit codes, and 2-bit codes before opset 25, are stored in 4 bits, for want of a narrower type.

    Missed when the weight is computed at run time, may be overridden by the caller, is no matrix of
    floats, is encoded already, holds NaN or infinity, is read as something else too, or would not get
    smaller; and for embeddings (also those tied to the output layer) unless ``embeddings`` is on.
    """

    name: ClassVar[str] = "quantize-rtn"

    axis: Literal["oc", "ic"] = option("oc", help="groups within one output channel or one input channel")
    scale: Literal["full", "absmax"] = option(
        "full", help="symmetric scale: all levels, the largest weight exact, or one level less, none clipped"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric:
            self.refuse_idle("symmetric=false", "scale")

    def apply(self, model: Model, remarks: Remarks) -> None:
        for site in self.sites(model, remarks):
            encoded, sqnr, sampled = encode(model, site, self.grid(site), self.axis)
            if encoded is None:
                remarks.missed(site.name, "holds a weight that is infinite or not a number")
                continue
            before = int(site.elements * site.dtype.bitwidth // 8)
            site.write(model, encoded)
            figures = report(encoded, self.axis, before, sqnr, sqnr_sampled=sampled)
            remarks.passed(site.name, sentence(figures), method="rtn", **figures)

    def grid(self, site: WeightSite) -> Grid:
        width = self.width(site)
        return Grid(width.bits, width.group_size, self.symmetric, self.scale)

    def predicted_bytes(self, site: WeightSite) -> float:
        return predicted_bytes(site, self.grid(site), self.axis)


def encode(
    model: Model, site: WeightSite, grid: Grid, axis: Literal["oc", "ic"]
) -> tuple[Encoding | None, float | None, bool]:
    """Quantize a site's weight by rounding to nearest.

    Returns:
        The encoding, or None when the weight is not finite; the signal-to-noise ratio of the weight
        in dB (None when nothing was lost); whether that ratio is from a sample.
    """
    run, storage = site.run_axis(axis), code_type(grid.bits, grid.symmetric, site.opset)
    with site.matrix() as matrix:
        done = quantize(matrix, run, grid, storage, site.give_back)
        if done is None:
            return None, None, False
        signal, noise, sampled = quantization_noise(matrix, run, grid)
    encoding = encoding_of(
        model,
        site,
        grid,
        axis,
        done.packed,
        done.scales,
        done.zero_points,
        packed=storage.bitwidth < 8,
    )
    return encoding, decibels(signal, noise), sampled
