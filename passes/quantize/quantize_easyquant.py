"""quantize-easyquant: data-free quantization that keeps outliers exact (arXiv 2403.02775)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from effic.ir.encodings import Outliers, code_type, stored_bytes
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.weights import WeightSite
from effic.passes.base import Remarks, option
from effic.passes.finished import unfinished
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.easyquant import Search, easyquant
from effic.passes.quantize.weight_only import (
    WeightOnly,
    decibels,
    encoding_of,
    predicted_bytes,
    report,
    sentence,
)

_STEPS = {"exact": 1, "adam": 100}
"""Steps by optimizer: more than one alternation gains 0.02 dB; 100 is the paper's number for BLOOM."""


@dataclass(frozen=True)
class QuantizeEasyQuant(WeightOnly):
    """Store weights in few bits with optimised scales, and outliers exactly beside them; needs no data.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, ScatterElements(DequantizeLinear(w.codes, w.scales), positions, outliers))

    The data-free method of arXiv 2403.02775 (not the scale search of 2020 that has the same name). A
    weight that lies ``outlier_sigma`` standard deviations or more from the mean of its tensor is an
    outlier and stays as it is, bit for bit. The others share one scale per output channel, or per
    group, which is optimised so that their squared error is least; it is never larger than that of
    the first scale. Each outlier takes its value and four bytes for its position: at three standard
    deviations 0.27 % of Gaussian weights, 0.2 bits per weight. ``optimizer=adam`` is the paper's form;
    ``exact`` reaches a lower error in a tenth of the time.

    Missed when the weight is computed at run time, may be overridden by the caller, is no matrix of
    floats, is encoded already, holds NaN or infinity, is read as something else too, or would not get
    smaller, outliers included; and for embeddings (also those tied to the output layer) unless
    ``embeddings`` is on.
    """

    name: ClassVar[str] = "quantize-easyquant"

    group_size: int = option(-1, help="weights that share a scale; -1 for a whole channel", ge=-1)
    symmetric: bool = option(True, help="always true: the method has no zero points")
    outlier_sigma: float = option(
        3.0, help="standard deviations from the mean from which on a weight stays exact", ge=0
    )
    optimizer: Literal["exact", "adam"] = option("exact", help="how scales are optimised")
    steps: int = option(
        -1, help="steps of the optimizer: 0 keeps the first scale, -1 is 1 (exact) or 100 (adam)", ge=-1
    )
    lr: float = option(1e-3, help="step length of adam, as a part of the first scale", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric:
            raise UsageError(f"{self.name}: symmetric is false, but the method has no zero points")
        if self.optimizer == "exact":
            self.refuse_idle("optimizer=exact", "lr")
        elif self.steps == 0:
            self.refuse_idle("steps=0", "lr")

    def apply(self, model: Model, remarks: Remarks) -> None:
        steps = _STEPS[self.optimizer] if self.steps < 0 else self.steps
        search = Search(self.optimizer, steps, self.lr)
        for site in unfinished(model, self.sites(model, remarks), remarks):
            self._encode(model, site, search, remarks)

    def _encode(self, model: Model, site: WeightSite, search: Search, remarks: Remarks) -> None:
        grid = self.grid(site)
        storage = code_type(grid.bits, True, site.opset)
        with site.matrix() as matrix:
            done = easyquant(
                matrix, site.run_axis("oc"), grid, storage, self.outlier_sigma, search, site.give_back
            )
        if done is None:
            remarks.missed(site.name, "holds a weight that is infinite or not a number")
            return
        packed = storage.bitwidth < 8
        outliers = Outliers(done.indices, done.values) if done.indices.size else None
        encoding = encoding_of(
            model, site, grid, "oc", done.packed, done.scales, None, packed=packed, outliers=outliers
        )
        before = int(site.elements * site.dtype.bitwidth // 8)
        if stored_bytes(encoding) >= before:
            remarks.missed(
                site.name,
                f"would grow from {before} to {stored_bytes(encoding)} bytes: "
                f"{100 * done.indices.size / site.elements:.1f} % of its weights are outliers",
            )
            return
        site.write(model, encoding)
        figures = report(
            encoding,
            "oc",
            before,
            decibels(done.signal, done.noise),
            outlier_fraction=done.indices.size / site.elements,
        )
        remarks.passed(site.name, sentence(figures), method="easyquant", **figures)

    def grid(self, site: WeightSite) -> Grid:
        width = self.width(site)
        return Grid(width.bits, width.group_size, True, "absmax")

    def predicted_bytes(self, site: WeightSite) -> float:
        return predicted_bytes(site, self.grid(site), "oc")
