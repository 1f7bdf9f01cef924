"""Bias correction: layers give out the mean they gave before quantization.

Rounding weights shifts the mean of a layer's outputs, and with it everything behind. The shift is known
from calibration data and goes into the bias (Nagel et al., "Data-free quantization through weight
equalization and bias correction", ICCV 2019, arXiv 1906.04721, section 4.2; the empirical form, layer
by layer, each after those before it are corrected).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from effic.ir.model import Model
from effic.ir.probe import Probe
from effic.passes.calibration import Calibration
from effic.passes.parts import Parts
from effic.passes.quantize.placement import Layer

SAMPLES = 32
"""Samples a mean is taken over; each has many positions."""


def channel_means(
    calibration: Calibration, model: Model, outputs: Mapping[Layer, str]
) -> dict[Layer, np.ndarray]:
    """Mean of layers' outputs over samples and positions, float64 ``[channels]``.

    Args:
        calibration: the samples, all of which are run.
        model: the model, quantized or not.
        outputs: name of each layer's output in it.
    """
    named = {str(v.name): v for node in model.graph for v in node.outputs}
    sums = {layer: _Mean(layer) for layer in outputs}
    for values in calibration.record(model, [named[name] for name in outputs.values()]):
        for layer, name in outputs.items():
            sums[layer].add(values[name])
    return {layer: mean.value for layer, mean in sums.items()}


def correct_biases(
    calibration: Calibration,
    model: Model,
    layers: Sequence[Layer],
    means: Mapping[Layer, np.ndarray],
    write: Callable[[Layer, np.ndarray], None],
) -> dict[Layer, float]:
    """Give the quantized layers' biases what their means lack, each after those before it.

    The model is run once, in parts: when the input of a layer is known for all samples, the layer is
    corrected, and only then the next part is run.

    Args:
        calibration: the samples.
        model: the quantized model.
        layers: layers that can have a bias.
        means: of their outputs before quantization.
        write: puts a new bias ``[out]`` into the model.

    Returns:
        For each layer the largest correction of a channel.
    """
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(str(layer.input.name), []).append(layer)
    inputs = [found[0].input for found in readers.values()]
    names = {str(v.name) for v in model.graph.inputs}
    fed = [name for name in next(calibration.feeds()) if name in names]
    parts = Parts(
        model, inputs, fed, calibration.feeds, calibration.count, breaks=[layer.node for layer in layers]
    )
    largest: dict[Layer, float] = {}
    try:
        for part in parts.parts:
            here = [layer for value in part.wanted for layer in readers[str(value.name)]]
            probes = {layer: Probe(model, [layer.input], [layer.node.outputs[0]]) for layer in here}
            sums = {layer: _Mean(layer) for layer in here}
            for values in parts.run(part):
                for layer, probe in probes.items():
                    name = str(layer.node.outputs[0].name)
                    sums[layer].add(probe.run({n: values[n] for n in probe.inputs})[name])
            for layer in here:
                shift = means[layer] - sums[layer].value
                bias = np.zeros(len(shift), np.float32) if layer.bias is None else layer.bias
                write(layer, (bias + shift).astype(np.float32))
                largest[layer] = float(np.abs(shift).max(initial=0.0))
    finally:
        parts.close()
    return largest


class _Mean:
    """Mean of a layer's output for each channel, over all else."""

    def __init__(self, layer: Layer) -> None:
        self._axis, self._rows, self._sum = layer.channel_axis, 0, np.zeros(())

    def add(self, array: np.ndarray) -> None:
        """Take in an output."""
        flat = np.moveaxis(array, self._axis, -1).reshape(-1, array.shape[self._axis])
        self._sum = self._sum + flat.sum(axis=0, dtype=np.float64)
        self._rows += len(flat)

    @property
    def value(self) -> np.ndarray:
        """float64 ``[channels]``."""
        return np.asarray(self._sum / max(self._rows, 1))
