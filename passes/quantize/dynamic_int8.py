"""Dynamic int8 in standard ONNX: activations rounded to 8 bits by their range in each call, int8 weights.

For transformers, whose activations differ too much between inputs for ranges fixed beforehand::

    x -> DynamicQuantizeLinear -> DequantizeLinear -> MatMul(., DequantizeLinear(int8 weight))

One scale and zero point for the whole of ``x`` (as ``DynamicQuantizeLinear`` is defined), one scale
per output channel of the weight. No calibration data is needed. All layers that read the same ``x``
share its rounding.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from effic.ir.model import Model
from effic.ir.weights import WeightSite, WeightUse, weight_sites
from effic.passes.base import Remarks
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.quantize_rtn import encode
from effic.passes.quantize.weight_only import matches_site, report, sentence

KINDS = ("MatMul", "Gemm")
"""Operators that have dynamic kernels worth using."""

OPSET = 13
"""Opset from which DequantizeLinear knows a scale per channel."""


def quantize_dynamic(
    model: Model,
    remarks: Remarks,
    *,
    kinds: Collection[str] = KINDS,
    skip: tuple[str, ...] = (),
    min_size: int = 1024,
    reduce_range: bool = False,
) -> None:
    """Quantize linear layers to 8 bits, the activations by their range in each call.

    Args:
        model: rewritten in place.
        remarks: gets one entry per weight.
        kinds: operators to quantize; those of :data:`KINDS` count.
        skip: patterns of weight or node names, or ``kind:Gemm``.
        min_size: weights with fewer elements are left alone.
        reduce_range: 7-bit weights, for processors whose 8-bit products saturate in 16 bits (x86
            without VNNI instructions).
    """
    grid = Grid(7 if reduce_range else 8, -1, True, "absmax")
    rounded: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}
    convolutions = len(weight_sites(model, ("Conv", "ConvTranspose")))
    if convolutions:
        count = f"{convolutions} convolution weights" if convolutions > 1 else "1 convolution weight"
        slow = "in dynamic int8 convolutions are slower than in fp32; use mode=static for them"
        remarks.missed("the model", f"{count} left in floating point: {slow}")
    for site in weight_sites(model, set(kinds) & set(KINDS)):
        if reason := why_not_dynamic(site, skip, min_size):
            remarks.missed(site.name, reason)
            continue
        encoding, sqnr, sampled = encode(model, site, grid, "oc")
        if encoding is None:
            remarks.missed(site.name, "holds a weight that is infinite or not a number")
            continue
        before = site.elements * site.dtype.bitwidth // 8
        site.write(model, encoding)
        for use in site.uses:
            x = use.node.inputs[0]
            graph = use.node.graph
            if x is None or not isinstance(graph, ir.Graph):
                continue
            key = (x, graph)
            if key not in rounded:
                rounded[key] = _round(model, x, graph)
            use.node.replace_input_with(0, rounded[key])
        figures = report(encoding, "oc", before, sqnr, sqnr_sampled=sampled)
        text = f"{sentence(figures)}; activations to 8 bits at every call"
        remarks.passed(site.name, text, method="int8-dynamic", **figures)


def why_not_dynamic(site: WeightSite, skip: tuple[str, ...], min_size: int) -> str | None:
    """Why a weight's layers are not quantized dynamically, as a phrase, or None."""
    if site.encoding is not None:
        return f"is already encoded, in {site.encoding.bits} bits"
    if site.why_not is not None:
        return site.why_not
    if matches_site(site, skip):
        return "is named in skip"
    if others := sorted(site.kinds - set(KINDS)):
        return f"is read by {others[0]} as well"
    if site.other_readers:
        return f"is read by {site.other_readers[0]} as well, so the original would have to stay"
    if site.elements < min_size:
        return f"has {site.elements} elements, fewer than min_size={min_size}"
    if site.dtype != ir.DataType.FLOAT:
        return f"is {site.dtype.name}, and DynamicQuantizeLinear takes fp32 activations only"
    if site.opset < OPSET:
        return f"lives in a function at opset {site.opset}; a scale per channel needs opset {OPSET}"
    if len({use.in_axis for use in site.uses}) > 1:
        return "is read both ways round, and its scales belong to the outputs of one of them"
    return next((reason for use in site.uses if (reason := _why_not_use(use))), None)


def _why_not_use(use: WeightUse) -> str | None:
    node = use.node
    if use.index != 1:
        return "is the left operand; dynamic kernels take the weight on the right"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "belongs to a node whose attributes come from the caller of a function"
    if node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0)):
        return "belongs to a Gemm with transA=1; run canonicalize-linear first"
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear" and not _is_dynamic(producer):
        return "is multiplied by activations that are quantized already"
    return None


def _is_dynamic(dequantize: ir.Node) -> bool:
    source = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    return source is not None and source.op_type == "DynamicQuantizeLinear"


def _round(model: Model, x: ir.Value, graph: ir.Graph) -> ir.Value:
    """``x`` rounded to 8 bits by its own range, as early as the graph has it."""
    name = x.name or "activations"
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    for value, role in zip(quantize.outputs, ("codes", "scale", "zero_point"), strict=True):
        value.name = model.unique_name(f"{name}.{role}")
    quantize.name = model.unique_name(f"{name}.quantize")
    dequantize = ir.node("DequantizeLinear", list(quantize.outputs))
    value = dequantize.outputs[0]
    value.name = dequantize.name = model.unique_name(f"{name}.rounded")
    value.type, value.shape = x.type, x.shape
    maker = x.producer()
    if maker is not None and maker.graph is graph:
        graph.insert_after(maker, [quantize, dequantize])
    else:
        graph.insert_before(graph[0], [quantize, dequantize])
    return value
