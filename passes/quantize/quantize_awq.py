"""quantize-awq: weight-only quantization that protects the channels with large activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from effic.ir.encodings import Encoding, code_type, decode
from effic.ir.model import Model
from effic.ir.weights import WeightSite
from effic.passes.base import CalibratedPass, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.finished import FinishedSites
from effic.passes.quantize.affine import Grid, quantize
from effic.passes.quantize.awq import Layer, clipped, search, search_clipping
from effic.passes.quantize.fold_scales import ScaleFlow, Scaling, per_input_channel
from effic.passes.quantize.quantize_rtn import encode
from effic.passes.quantize.weight_only import WeightOnly, decibels, encoding_of, report, sentence

# Rows of the sketch by which output errors are judged: good to a few percent, at a cost per try of
# that many multiplications per weight.
_SKETCH = 512


@dataclass(frozen=True)
class QuantizeAWQ(CalibratedPass, WeightOnly):
    """Store weights in few bits, input channels with large activations scaled up before rounding.

    Before:  h = Mul(n, g);    y = MatMul(h, w)
    After:   h = Mul(n, g/s);  y = MatMul(h, DequantizeLinear(w.codes, w.scales))     w.codes = round(w*s)

    ``s = mean|x|^r`` per input channel; ``r`` is the best of 0, 0.05 ... 0.95 by the squared error of the
    outputs of all layers that read the channels (AWQ, Lin et al. 2024, arXiv 2306.00978). ``r = 0`` is
    rounding to nearest, so that on the data the error is never larger than that of quantize-rtn.
    ``1/s`` goes into the norm or the layer that makes the channels, whose function with its readers
    stays the same. Where there is none, weights are rounded to nearest, and the remark says why.
    Then the ranges of groups are clipped where that lowers the error of the outputs (``clip``).

    Missed for the reasons of quantize-rtn.
    """

    name: ClassVar[str] = "quantize-awq"

    # Perplexity of stories260k (fp32 6.55) with groups of 32, by rounding to nearest, scaled, and scaled
    # and clipped: 7.16, 7.05, 6.99 at 4 bits and 12.55, 11.01, 10.15 at 3; asymmetric 7.21, 7.09, 7.00 and
    # 12.55, 11.15, 9.73. With one scale per row, 7.42, 7.57, 7.31 at 4 bits: scaling alone can lose there.
    clip: bool = option(True, help="also search how far each group's range may shrink")

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        if calibration is None:
            return  # It always needs data, so apply_with has refused.
        sites = list(self.sites(model, remarks))
        flow = ScaleFlow(model, sites)
        groups: dict[Scaling | WeightSite, _Group] = {}
        choices: dict[WeightSite, _Choice] = {}
        for site in sites:
            unseen, found = calibration.why_not(site), flow.find(site)
            choices[site] = _Choice(self.grid(site), unseen or (found if isinstance(found, str) else None))
            if unseen is None:
                key = site if isinstance(found, str) else found
                group = groups.setdefault(key, _Group(None if isinstance(found, str) else found))
                group.sites.append(site)
        finished = remarks.finished
        if finished is not None:
            finished.expect(len(groups))
        of = {
            site: group
            for group in groups.values()
            if finished is None or not group.recall(choices, finished)
            for site in group.sites
        }
        for site, statistics in calibration.walk(model, list(of), second_moment=False, sketch=_SKETCH):
            of[site].add(Layer(site, of[site].channels_of(site), choices[site].grid, statistics))
            if len(of[site].layers) == len(of[site].sites):
                of[site].choose(choices, self.clip)
                if finished is not None:
                    of[site].keep(choices, finished)
        # Folding waits for the end of the walk: a layer may be scaled on both sides.
        for group in groups.values():
            group.fold(model, choices)
        for site, choice in choices.items():
            write(model, site, choice, remarks)


@dataclass(eq=False)
class _Choice:
    """What was decided for a weight.

    Attributes:
        grid: how to quantize it.
        reason: why its input channels are not scaled, or None.
        ratio: ``r``.
        producer: what takes the factors in.
        rtn, error, signal: mean squared output error of rounding to nearest and of the choice, and mean
            squared output; None when its inputs were not seen.
        shares: of each group's range that is kept, ``[out, groups]``, or None.
    """

    grid: Grid
    reason: str | None = None
    ratio: float = 0.0
    producer: str | None = None
    rtn: float | None = None
    error: float | None = None
    signal: float | None = None
    shares: np.ndarray | None = None


@dataclass(eq=False)
class _Group:
    """Weights that share their input channels, and what was found for them together."""

    scaling: Scaling | None
    sites: list[WeightSite] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    factor: np.ndarray | None = None

    def channels_of(self, site: WeightSite) -> np.ndarray:
        """The shared channel of each input channel of a weight."""
        item = self.scaling.consumer_of(site) if self.scaling is not None else None
        if item is not None:
            return item.channels
        # Nobody to share with: the channels are the weight's own, and none of them is free.
        shape, grouped = site.shape, site.uses[0].node.op_type == "Conv"
        return np.arange(shape[1] * site.groups if grouped else site.shape_oi[1])

    def add(self, layer: Layer) -> None:
        """Take in a weight whose statistics have come."""
        self.layers.append(layer)

    def choose(self, choices: dict[WeightSite, _Choice], clip: bool) -> None:
        """Search once all statistics are there, and let go of them."""
        count = self._channels()
        free = self.scaling.free if self.scaling is not None else np.zeros(count, bool)
        loudness, seen = np.zeros(count), np.zeros(count)
        for layer in self.layers:
            values = per_input_channel(layer.site, layer.statistics.mean_abs).mean(axis=1)
            np.add.at(loudness, layer.channels, values)
            np.add.at(seen, layer.channels, 1)
        loudness /= np.maximum(seen, 1)
        result = search(self.layers, loudness, free)
        for layer, rtn, error, signal in zip(
            self.layers, result.rtn, result.errors, result.signals, strict=True
        ):
            choice = choices[layer.site]
            choice.ratio, choice.rtn, choice.error, choice.signal = result.ratio, rtn, error, signal
            if clip:
                choice.shares, choice.error = search_clipping(layer, result.factor, error)
        self.factor = result.factor
        self.layers = []

    def keep(self, choices: dict[WeightSite, _Choice], finished: FinishedSites) -> None:
        """Keep what was found, for a run that goes on where this one is interrupted."""
        if self.factor is None:
            return
        chosen = [choices[site] for site in self.sites]
        shares = {f"shares{i}": one.shares for i, one in enumerate(chosen) if one.shares is not None}
        row = {"found": [[one.ratio, one.rtn, one.error, one.signal] for one in chosen]}
        finished.put(self._key(finished), row, {"factor": self.factor, **shares})

    def recall(self, choices: dict[WeightSite, _Choice], finished: FinishedSites) -> bool:
        """Take what an earlier run had found, and say whether there was something."""
        kept = finished.get(self._key(finished))
        if kept is None:
            return False
        found, arrays = kept[0].get("found"), kept[1]
        factor = np.array(arrays.get("factor"))
        if factor.dtype != np.float64 or factor.shape != (self._channels(),) or not (factor > 0).all():
            return False
        if not isinstance(found, list) or len(found) != len(self.sites):
            return False
        shares = {}
        for i, (site, row) in enumerate(zip(self.sites, found, strict=True)):
            if not isinstance(row, list) or [type(each) for each in row] != [float] * 4:
                return False
            if f"shares{i}" in arrays:
                shares[site] = np.array(arrays[f"shares{i}"])
                rows, length = site.shape_oi
                groups = -(-length // (choices[site].grid.block(length) or length))
                if shares[site].dtype != np.float32 or shares[site].shape != (rows, groups):
                    return False
        for site, (ratio, rtn, error, signal) in zip(self.sites, found, strict=True):
            choice = choices[site]
            choice.ratio, choice.rtn, choice.error, choice.signal = ratio, rtn, error, signal
            choice.shares = shares.get(site)
        self.factor = factor
        finished.taken += 1
        return True

    def _channels(self) -> int:
        return self.scaling.free.size if self.scaling is not None else self.channels_of(self.sites[0]).size

    def _key(self, finished: FinishedSites) -> dict[str, Any]:
        free = None if self.scaling is None else np.flatnonzero(~self.scaling.free).tolist()
        weights = [[site.name, finished.weight(site), self.channels_of(site).tolist()] for site in self.sites]
        return {"scales of": weights, "fixed": free}

    def fold(self, model: Model, choices: dict[WeightSite, _Choice]) -> None:
        """Put the factors into the weights and what makes their inputs."""
        if self.scaling is None or self.factor is None:
            return
        reason = self.scaling.fold(model, self.factor) if (self.factor != 1).any() else None
        for site in self.sites:
            choice = choices[site]
            choice.producer = self.scaling.name
            if reason is not None:
                choice.reason, choice.ratio, choice.error, choice.shares = reason, 0.0, choice.rtn, None


def write(model: Model, site: WeightSite, choice: _Choice, remarks: Remarks) -> None:
    """Quantize a weight as it was decided, with a remark."""
    encoded, sqnr, sampled = (
        encode(model, site, choice.grid, "oc")
        if choice.shares is None
        else encode_clipped(model, site, choice.grid, choice.shares)
    )
    if encoded is None:
        remarks.missed(site.name, "holds a weight that is infinite or not a number")
        return
    before = int(site.elements * site.dtype.bitwidth // 8)
    site.write(model, encoded)
    more: dict[str, Any] = {}
    if choice.error is not None and choice.rtn is not None and choice.signal is not None:
        more["output_sqnr_db"] = round_or_none(decibels(choice.signal, choice.error))
        more |= {"error_rtn": choice.rtn, "error_awq": choice.error}
    figures = report(encoded, "oc", before, sqnr, sqnr_sampled=sampled, ratio=choice.ratio, **more)
    if choice.reason is not None:
        how = f"no scaling: {choice.reason}"
    else:
        how = f"r = {choice.ratio:.2f}, scaled in {choice.producer}"
        figures["producer"] = choice.producer
    if choice.shares is not None:
        figures["clipped_fraction"] = round(float((choice.shares < 1).mean()), 4)
        how += f", {100 * figures['clipped_fraction']:.0f} % of the groups clipped"
    remarks.passed(site.name, f"{sentence(figures)}; {how}", method="awq", **figures)


def round_or_none(value: float | None) -> float | None:
    """Two decimals, or None."""
    return None if value is None else round(value, 2)


def encode_clipped(
    model: Model, site: WeightSite, grid: Grid, shares: np.ndarray
) -> tuple[Encoding | None, float | None, bool]:
    """As :func:`effic.passes.quantize.quantize_rtn.encode`, with the ranges of groups cut to shares."""
    run, storage = site.run_axis("oc"), code_type(grid.bits, grid.symmetric, site.opset)
    with site.matrix() as matrix:
        turned = matrix if site.in_axis == 1 else matrix.T
        held = clipped(turned, shares, grid)
        held = np.ascontiguousarray(held if site.in_axis == 1 else held.T)
    done = quantize(held, run, grid, storage)
    if done is None:
        return None, None, False
    encoding = encoding_of(
        model, site, grid, "oc", done.packed, done.scales, done.zero_points, packed=storage.bitwidth < 8
    )
    with site.matrix() as matrix:
        # Against the weight as it was: what was clipped is lost as well.
        exact = matrix.astype(np.float32).reshape(-1)
        lost = exact - decode(encoding).astype(np.float32).reshape(-1)
    with np.errstate(over="ignore"):
        return encoding, decibels(float(np.dot(exact, exact)), float(np.dot(lost, lost))), False
