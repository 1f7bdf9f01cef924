"""Which layers stand at the ends of a network: pruning usually leaves them dense."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from effic.ir.model import Model
from effic.ir.topology import read_values, subgraphs
from effic.ir.weights import WeightSite, weight_sites


def first_convolutions(model: Model) -> set[ir.Node]:
    """Convolutions of the main graph before which nothing is multiplied with a weight.

    They see the image or the sound itself, through few input channels.
    """
    weighted = _weighted(model, weight_sites(model))
    behind: set[ir.Value] = set()
    found = set()
    for node in model.graph:
        # What a weight is read through (Transpose, DequantizeLinear) is not behind it.
        later = any(value in behind for value in read_values(node))
        if node.op_type == "Conv" and node in weighted and not later:
            found.add(node)
        if later or node in weighted:
            behind.update(node.outputs)
    return found


def vocabulary_heads(model: Model) -> set[ir.Node]:
    """The layers that turn a language model's last state into scores of its vocabulary.

    That is a MatMul or Gemm with as many outputs as an embedding table has rows, or one that reads the
    table itself, after which nothing is multiplied with a weight.
    """
    sites = weight_sites(model)
    words = {site.shape[0] for site in sites if "Gather" in site.kinds and site.shape}
    weighted = _weighted(model, sites)
    before: set[ir.Value] = set()
    last = set()
    for node in reversed(model.graph):
        earlier = any(value in before for value in node.outputs)
        if node in weighted and not earlier:
            last.add(node)
        if earlier or node in weighted:
            before.update(read_values(node))
    return {
        use.node
        for site in sites
        for use in site.uses
        if use.node in last
        and use.node.op_type in ("MatMul", "Gemm")
        and ("Gather" in site.kinds or (site.shape and site.shape_oi[0] in words))
    }


def _weighted(model: Model, sites: Sequence[WeightSite]) -> set[ir.Node]:
    """Nodes of the main graph that multiply with a weight, or have a subgraph that does."""
    # Products of two activations are no layers; look-ups in a table multiply nothing.
    direct = {u.node for s in sites for u in s.uses if s.shape and u.node.op_type != "Gather"}
    return {node for node in model.graph if _holds(node, direct)}


def _holds(node: ir.Node, wanted: set[ir.Node]) -> bool:
    return node in wanted or any(_holds(n, wanted) for graph in subgraphs(node) for n in graph)
