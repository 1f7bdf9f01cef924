"""quantize-int8: weights and activations in 8 bits, for integer kernels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model
from effic.passes.base import CalibratedPass, Numerics, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.quantize import bias_correction
from effic.passes.quantize.integer_forms import pad_convolutions, pool_means
from effic.passes.quantize.integer_layers import integer_weight
from effic.passes.quantize.placement import KINDS, Layer, between, ends, layers, place
from effic.passes.quantize.qdq import weight_encoding, write_activations, write_bias
from effic.passes.quantize.ranges import ByteGrid, Method, Thresholds, thresholds
from effic.passes.quantize.scale_groups import shared_thresholds
from effic.passes.quantize.weight_only import decibels, report, say_unmatched, sentence

# Samples on which the error of each layer's output is measured, after all is done.
_MEASURED = 2


@dataclass(frozen=True)
class QuantizeInt8(CalibratedPass):
    """Run layers in 8-bit integers: static scales for convolutional models, dynamic for transformers.

    Before:  y = Relu(Conv(x, w, b))
    After:   y = DQ(Q(Conv(DQ(Q(x)), DQ(w.codes), DQ(b.codes))))     Q, DQ: QuantizeLinear, DequantizeLinear

    ``mode=static`` fixes the range of every activation by calibration: unsigned bytes with a zero point,
    signed bytes per output channel for weights, 32 bits for biases. Each activation has one pair of Q and
    DQ, which all its readers share; a Relu or Clip is done by the range of the codes. Residual sums,
    products, concatenation and pooling between two layers follow; what only moves elements shares the
    scale. What lies before the first layer or after the last stays in floating point.
    ``mode=dynamic`` needs no data: activations get their range at run time, in MatMul and Gemm.

    Missed when the weight is computed at run time, shared with something that stays in floating point,
    encoded already or not finite, when a bias is no constant per channel, inside subgraphs and
    functions, and for operators that have no integer kernels (ConvTranspose, batch norms that
    fuse-conv-bn left).
    """

    name: ClassVar[str] = "quantize-int8"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    needs_opset: ClassVar[int] = 13

    mode: Literal["static", "dynamic"] = option("static", help="ranges from calibration, or at run time")
    ranges: Literal["minmax", "percentile", "entropy", "mse"] = option(
        "mse", help="how the range of an activation is chosen: nothing clipped, or less rounding"
    )
    percentile: float = option(99.99, help="share of the values kept by ranges=percentile", ge=50, le=100)
    per_channel: bool = option(True, help="a weight scale per output channel, else one for all")
    first: Literal["int8", "float"] = option("int8", help="the layers that read the model's inputs")
    last: Literal["int8", "float"] = option("int8", help="the layers that give the model's outputs")
    equalize: bool = option(False, help="equalise the channels between layers first, as equalize-layers does")
    bias_correction: bool = option(True, help="give back to the biases the means that rounding shifted")
    reduce_range: bool = option(
        False, help="mode=dynamic: 7-bit weights, for x86 processors without VNNI, whose sums saturate"
    )
    skip: tuple[str, ...] = option(
        (), help="what to leave alone: patterns of weight or node names, or kind:Conv"
    )
    kinds: tuple[str, ...] = option(KINDS, help="operators to quantize", choices=KINDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "static":
            self.refuse_idle("mode=static", "reduce_range")
        else:
            static = ("ranges", "percentile", "per_channel", "first", "last", "equalize", "bias_correction")
            self.refuse_idle("mode=dynamic", *static)
        if self.ranges != "percentile":
            self.refuse_idle(f"ranges={self.ranges}", "percentile")

    @property
    def needs_data(self) -> bool:
        return self.mode == "static"

    def stays(self) -> float:
        """8 of 32 bits."""
        return 0.25

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        say_unmatched(model, "skip", self.skip, remarks)
        if self.mode == "dynamic" or calibration is None:
            from effic.passes.quantize.dynamic_int8 import quantize_dynamic

            quantize_dynamic(model, remarks, kinds=self.kinds, skip=self.skip, reduce_range=self.reduce_range)
            return
        found = self._layers(model, remarks)
        if not found:
            if all(item.where == "the model" for item in remarks.items):
                remarks.missed("the model", "has no Conv, Gemm or MatMul that could run in 8 bits")
            return
        if self.equalize:
            from effic.passes.quantize.equalize_layers import EqualizeLayers

            EqualizeLayers().apply(model, remarks)
            found = self._layers(model, Remarks())
        pad_convolutions([layer.node for layer in found if layer.node.op_type == "Conv"], remarks)
        pool_means(model, between(model, found), remarks)
        _Static(self, model, calibration, found, remarks).run()

    def _layers(self, model: Model, remarks: Remarks) -> list[Layer]:
        found = layers(model, self.kinds, self.skip, remarks)
        first, last = ends(model, found)
        left = (first if self.first == "float" else set()) | (last if self.last == "float" else set())
        for layer in found:
            if layer.node in left:
                remarks.missed(layer.node, "is a first or last layer, left in floating point on request")
        # A weight is in 8 bits for all its layers or for none.
        sites = {layer.site for layer in found if layer.node in left}
        return [layer for layer in found if layer.site not in sites]


class _Static:
    """One run of the static mode."""

    def __init__(
        self,
        options: QuantizeInt8,
        model: Model,
        calibration: Calibration,
        found: list[Layer],
        remarks: Remarks,
    ) -> None:
        self.options, self.model, self.calibration, self.remarks = options, model, calibration, remarks
        self.plan = place(model, found, options.kinds, options.skip, remarks)
        self.outputs = {layer: str(layer.node.outputs[0].name) for layer in found}
        self.grids: dict[ir.Value, ByteGrid] = {}
        self.scales: dict[Layer, np.ndarray] = {}

    def run(self) -> None:
        model, plan, options = self.model, self.plan, self.options
        # For comparison; tensors are shared, so that it costs next to nothing.
        original = model.clone()
        method: Method = options.ranges
        statistics = self.calibration.ranges(model, plan.values, remarks=self.remarks)
        own = {v: thresholds(statistics[str(v.name)], method, options.percentile) for v in plan.values}
        covered = shared_thresholds(plan, own)
        figures = self._write_weights(covered)
        corrected = self._correct(original) if options.bias_correction else {}
        measured = self._measure(original)
        for layer in plan.layers:
            data = figures[layer]
            data["output_sqnr_db"] = measured.get(layer)
            if layer in corrected:
                data["bias_correction"] = corrected[layer]
            low, high = data["input_range"]
            text = f"{sentence(data)}; inputs in {low:.4g} … {high:.4g}"
            self.remarks.passed(layer.node, text, method="int8", ranges=method, **data)
        for node in plan.others:
            self.remarks.passed(node, "works on 8-bit values", method="int8", bits=8)

    def _write_weights(self, covered: Mapping[ir.Value, Thresholds]) -> dict[Layer, dict[str, Any]]:
        """Write activations, weights and biases.

        Returns:
            Figures of each layer for its remark.
        """
        model, plan, options = self.model, self.plan, self.options
        inputs = {layer: covered[layer.input] for layer in plan.layers}
        self.grids = write_activations(model, plan, covered)
        figures: dict[Layer, dict[str, Any]] = {}
        by_site: dict[Any, list[Layer]] = {}
        for layer in plan.layers:
            by_site.setdefault(layer.site, []).append(layer)
        for site, uses in by_site.items():
            weight = site.read()
            steps = {layer: float(self.grids[layer.input].scale) for layer in uses}
            done = integer_weight(weight, [(steps[u], u.bias) for u in uses], per_channel=options.per_channel)
            noise = weight - done.codes * done.scales[:, None]
            sqnr = decibels(float(np.vdot(weight, weight)), float(np.vdot(noise, noise)))
            encoding = weight_encoding(model, site, done, per_channel=options.per_channel)
            before = int(site.elements * site.dtype.bitwidth // 8)
            site.write(model, encoding)
            more: dict[str, Any] = {}
            if done.widened:
                more["fallback"] = f"{done.widened} channels got a wider step, for their bias to fit 32 bits"
            for layer in uses:
                self.scales[layer] = done.scales
                if layer.bias is not None:
                    write_bias(model, layer, layer.bias, steps[layer], done.scales)
                figures[layer] = report(
                    encoding, "oc", before, sqnr, input_range=tuple(inputs[layer]), **more
                )
        return figures

    def _correct(self, original: Model) -> dict[Layer, float]:
        """Bias correction; MatMul has no bias to correct."""
        few = _few(self.calibration, bias_correction.SAMPLES)
        chosen = [layer for layer in self.plan.layers if layer.node.op_type != "MatMul"]
        means = bias_correction.channel_means(few, original, {layer: self.outputs[layer] for layer in chosen})

        def write(layer: Layer, bias: np.ndarray) -> None:
            write_bias(self.model, layer, bias, float(self.grids[layer.input].scale), self.scales[layer])

        return bias_correction.correct_biases(few, self.model, chosen, means, write)

    def _measure(self, original: Model) -> dict[Layer, float | None]:
        """Signal-to-noise ratio of each layer's output in dB, with all that is quantized before it."""
        few = _few(self.calibration, _MEASURED)
        before = {str(v.name): v for node in original.graph for v in node.outputs}
        signal: dict[Layer, float] = {}
        noise: dict[Layer, float] = {}
        want = few.record(original, [before[name] for name in self.outputs.values()])
        got = few.record(self.model, [layer.node.outputs[0] for layer in self.outputs])
        for exact, rounded in zip(want, got, strict=True):
            for layer, name in self.outputs.items():
                wanted = exact[name]
                error = wanted - rounded[str(layer.node.outputs[0].name)]
                signal[layer] = signal.get(layer, 0.0) + float(np.vdot(wanted, wanted))
                noise[layer] = noise.get(layer, 0.0) + float(np.vdot(error, error))
        return {layer: decibels(signal[layer], noise[layer]) for layer in signal}


def _few(calibration: Calibration, count: int) -> Calibration:
    """The first samples."""
    return Calibration.of(list(itertools.islice(calibration.feeds(), count)), source=calibration.source)
