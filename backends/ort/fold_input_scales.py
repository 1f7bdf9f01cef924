"""Scales of input channels, moved into whatever makes the activations."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model
from effic.ir.weights import weight_sites
from effic.passes.quantize.fold_scales import ScaleFlow, Scaling


def fold_input_scales(model: Model, scales: Mapping[ir.Node, np.ndarray]) -> set[ir.Node]:
    """Multiply activations by the scales of the weights that read them, where they are made.

    A norm's or linear layer's output channels can take factors if all who read them want the same.

    Args:
        model: rewritten in place; the weights' own scales are left for the caller to take away.
        scales: for MatMul and Gemm nodes the factor of each input channel, ``[K]``.

    Returns:
        The nodes whose input carries its factors now.
    """
    if not scales:
        return set()
    sites = weight_sites(model, ("MatMul", "Gemm"))
    flow = ScaleFlow(model, sites, encoded=True)
    done: set[ir.Node] = set()
    for site in sites:
        node = site.uses[0].node
        if len(site.uses) > 1 or node not in scales or node in done:
            continue
        scaling = flow.find(site)
        if isinstance(scaling, str):
            continue
        factor = _common(scaling, scales)
        if factor is not None and scaling.scale_producer(model, factor) is None:
            done.update(item.site.uses[0].node for item in scaling.consumers)
    return done


def _common(scaling: Scaling, scales: Mapping[ir.Node, np.ndarray]) -> np.ndarray | None:
    """Factors of the producer's channels that serve every reader, or None."""
    factor = np.ones(scaling.producer.channels)
    known = np.zeros(factor.size, bool)
    for item in scaling.consumers:
        wanted = scales.get(item.site.uses[0].node) if len(item.site.uses) == 1 else None
        if wanted is None or wanted.size != item.channels.size:
            return None
        clash = known[item.channels] & (factor[item.channels] != wanted)
        factor[item.channels] = wanted
        known[item.channels] = True
        # Two input channels may carry the same channel of the producer.
        if clash.any() or (factor[item.channels] != wanted).any():
            return None
    if (factor[~scaling.free] != 1).any() or (scaling.positive and (factor <= 0).any()):
        return None
    return factor
