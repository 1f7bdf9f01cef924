"""Write operators in the form that integer kernels exist for; the function stays the same."""

from __future__ import annotations

import onnx_ir as ir

from effic.ir.model import Model, constant_array, describe
from effic.passes.base import Remarks
from effic.passes.fuse.reading import rank_of


def pad_convolutions(convolutions: list[ir.Node], remarks: Remarks) -> None:
    """Let convolutions do the zero padding that a Pad before them does.

    Before:  y = Conv(Pad(x, [0,0,1,1,0,0,1,1]), w)
    After:   y = Conv(x, w, pads=[1,1,1,1])
    """
    for conv in convolutions:
        pad = conv.inputs[0].producer() if conv.inputs and conv.inputs[0] is not None else None
        if pad is None or pad.op_type != "Pad" or pad.domain != "":
            continue
        ends = _spatial_zeros(pad)
        own = _own_pads(conv, len(ends) if ends is not None else 0)
        if ends is None or own is None:
            continue
        source = pad.inputs[0]
        conv.attributes.pop("auto_pad", None)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, ends, strict=True)])
        conv.replace_input_with(0, source)
        remarks.passed(conv, f"does the padding of {describe(pad)}")
        if pad.graph is not None and not pad.outputs[0].uses() and not pad.outputs[0].is_graph_output():
            pad.graph.remove(pad, safe=True)


def _spatial_zeros(pad: ir.Node) -> list[int] | None:
    """What a Pad adds to each spatial axis, begins then ends, if it adds zeros there and nothing else."""
    mode = pad.attributes.get("mode")
    if mode is not None and (mode.is_ref() or mode.as_string() != "constant"):
        return None
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        return None
    amounts = constant_array(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if amounts is None or (amounts < 0).any():
        return None
    if len(pad.inputs) > 2 and pad.inputs[2] is not None:
        value = constant_array(pad.inputs[2])
        if value is None or value.any():
            return None
    begin, end = amounts.reshape(2, -1).tolist()
    if len(begin) < 3 or any(begin[:2]) or any(end[:2]):
        return None
    return [*begin[2:], *end[2:]]


def _own_pads(conv: ir.Node, count: int) -> list[int] | None:
    """The padding a convolution does itself, or None where it depends on the size of its input."""
    auto, pads = conv.attributes.get("auto_pad"), conv.attributes.get("pads")
    if any(attribute is not None and attribute.is_ref() for attribute in (auto, pads)):
        return None
    if auto is not None and auto.as_string() not in ("NOTSET", "VALID"):
        return None
    if pads is None or (auto is not None and auto.as_string() == "VALID"):
        return [0] * count
    own = list(pads.as_ints())
    return own if len(own) == count else None


def pool_means(model: Model, nodes: list[ir.Node], remarks: Remarks) -> None:
    """Write the mean over all pixels as a global pooling.

    Before:  y = ReduceMean(x, axes=[2, 3], keepdims=0)
    After:   y = Flatten(GlobalAveragePool(x))
    """
    for node in nodes:
        if node.op_type != "ReduceMean" or node.graph is None or node.inputs[0] is None:
            continue
        rank, axes = rank_of(node.inputs[0]), _axes(node)
        if rank is None or rank < 3 or axes is None:
            continue
        if sorted(axis % rank for axis in axes) != list(range(2, rank)):
            continue
        keep = node.attributes.get("keepdims")
        if keep is not None and keep.is_ref():
            continue
        pooled = ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name)
        last = pooled
        new = [pooled]
        if keep is not None and keep.as_int() == 0:
            last = ir.node(
                "Flatten", [pooled.outputs[0]], attributes={"axis": 1}, name=f"{node.name}.flatten"
            )
            pooled.outputs[0].name = model.unique_name(f"{node.outputs[0].name}.pooled")
            new.append(last)
        graph, old = node.graph, node.outputs[0]
        graph.insert_before(node, new)
        name = old.name
        if old.is_graph_output():
            model.replace_value(old, last.outputs[0])
        else:
            last.outputs[0].type, last.outputs[0].shape = old.type, old.shape
            old.replace_all_uses_with(last.outputs[0])
            old.name, last.outputs[0].name = None, name
        graph.remove(node, safe=True)
        remarks.passed(pooled, "computes the mean that a ReduceMean over all pixels did")


def _axes(node: ir.Node) -> list[int] | None:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant_array(node.inputs[1])
        return None if array is None else [int(axis) for axis in array.reshape(-1)]
    attribute = node.attributes.get("axes")
    return None if attribute is None or attribute.is_ref() else list(attribute.as_ints())
