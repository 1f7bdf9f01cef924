"""Resizing, sampling, and blocks of pixels as channels."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch.nn.functional as F
from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import indexing, resizing, sampling
from effic.backends.torch.operators.arguments import rank, tensor

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# torch's name of linear interpolation by the number of spatial axes.
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resize(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    attributes = node.attributes
    size = rank(node, 0)
    upsample = node.op_type == "Upsample"
    mode = str(attributes.get("mode", "nearest"))
    options: dict[str, Any] = {
        "mode": "linear" if mode in ("linear", "bilinear") else mode,
        "coordinates": str(attributes.get("coordinate_transformation_mode", "half_pixel")),
        "nearest_mode": str(attributes.get("nearest_mode", "round_prefer_floor")),
        "cubic_coeff_a": attributes.get("cubic_coeff_a", -0.75),
        "antialias": bool(attributes.get("antialias", 0)),
        "exclude_outside": bool(attributes.get("exclude_outside", 0)),
        "extrapolation_value": attributes.get("extrapolation_value", 0.0),
        "policy": str(attributes.get("keep_aspect_ratio_policy", "stretch")),
    }
    sizes: Any = None
    if upsample or node.opset < 11:
        # Before opset 11 the coordinates of the outputs were divided by the scale, and rounded down.
        options |= {"coordinates": "asymmetric", "nearest_mode": "floor"}
        scales = attributes["scales"] if "scales" in attributes else graph.sizes(node, 1)
    else:
        scales = graph.sizes(node, 2)
        sizes = graph.sizes(node, 3)
        if options["coordinates"] == "tf_crop_and_resize":
            options["roi"] = graph.sizes(node, 1)
    if isinstance(sizes, list) and not sizes:
        sizes = None
    if sizes is not None:
        scales = None
    axes = [int(axis) % size for axis in attributes.get("axes", range(size))]
    as_torch = _interpolate(node, axes, sizes, scales, options, size)
    if as_torch is not None:
        return graph.call(F.interpolate, tensor(node, 0), **as_torch)
    if not options["cubic_coeff_a"]:
        options["cubic_coeff_a"] = 0.0
    return graph.call(resizing.resize, tensor(node, 0), axes=axes, sizes=sizes, scales=scales, **options)


def _interpolate(
    node: OperatorNode, axes: list[int], sizes: Any, scales: Any, options: dict[str, Any], size: int
) -> dict[str, Any] | None:
    """Arguments of torch's own interpolation where it does the same, else None."""
    spatial = size - 2
    if (
        spatial not in _LINEAR
        or node.dtype(0) not in _FLOATS
        or options["antialias"]
        or options["policy"] != "stretch"
    ):
        return None
    wanted = sizes if sizes is not None else scales
    if not isinstance(wanted, list):
        return None
    shape = node.shape(0) or ()
    order = dict(zip(axes, wanted, strict=True))
    for axis in (0, 1):
        # Batch and channels have to stay as they are.
        same = shape[axis] if sizes is not None else 1.0
        if axis in order and (isinstance(order[axis], fx.Node) or order[axis] != same):
            return None
    if any(axis not in order or isinstance(order[axis], fx.Node) for axis in range(2, size)):
        return None
    coordinates, mode = options["coordinates"], options["mode"]
    made: dict[str, Any]
    if mode == "nearest" and coordinates == "asymmetric" and options["nearest_mode"] == "floor":
        if sizes is None and any(float(order[axis]) != int(order[axis]) for axis in range(2, size)):
            return None  # torch multiplies by the reciprocal in single precision
        made = {"mode": "nearest"}
    elif mode == "linear" and coordinates in ("half_pixel", "align_corners"):
        made = {"mode": _LINEAR[spatial], "align_corners": coordinates == "align_corners"}
    else:
        return None
    if mode == "nearest" and sizes is not None:
        return None
    if mode == "linear" and sizes is None and any(float(order[a]) != int(order[a]) for a in range(2, size)):
        return None
    values = [order[axis] for axis in range(2, size)]
    return made | (
        {"size": tuple(values)} if sizes is not None else {"scale_factor": tuple(float(v) for v in values)}
    )


def grid_sample(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    mode = str(node.attributes.get("mode", "linear"))
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    padding = str(node.attributes.get("padding_mode", "zeros"))
    corners = bool(node.attributes.get("align_corners", 0))
    spatial = rank(node, 0) - 2
    if spatial == 2 or (spatial == 3 and mode != "cubic"):
        name = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
        return graph.call(
            F.grid_sample,
            tensor(node, 0),
            tensor(node, 1),
            mode=name,
            padding_mode=padding,
            align_corners=corners,
        )
    return graph.call(sampling.grid_sample, tensor(node, 0), tensor(node, 1), mode, padding, corners)


def affine_grid(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    corners = bool(node.attributes.get("align_corners", 0))
    return graph.call(F.affine_grid, tensor(node, 0), graph.sizes(node, 1), align_corners=corners)


def roi_align(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    attributes = node.attributes
    # Coordinates were those of pixels' corners before opset 16.
    default = "half_pixel" if node.opset >= 16 else "output_half_pixel"
    return graph.call(
        sampling.roi_align,
        *(tensor(node, i) for i in range(3)),
        output_height=int(attributes.get("output_height", 1)),
        output_width=int(attributes.get("output_width", 1)),
        sampling_ratio=int(attributes.get("sampling_ratio", 0)),
        spatial_scale=attributes.get("spatial_scale", 1.0),
        mode=str(attributes.get("mode", "avg")),
        half_pixel=attributes.get("coordinate_transformation_mode", default) == "half_pixel",
    )


def depth_to_space(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    block = int(node.attributes["blocksize"])
    if node.attributes.get("mode", "DCR") == "CRD" and rank(node, 0) == 4:
        return graph.call(F.pixel_shuffle, tensor(node, 0), block)
    return graph.call(indexing.depth_to_space, tensor(node, 0), block)


def space_to_depth(node: OperatorNode, graph: GraphBuilder) -> fx.Node:
    if node.attributes.get("mode", "DCR") == "CRD" and rank(node, 0) == 4:
        return graph.call(F.pixel_unshuffle, tensor(node, 0), int(node.attributes["blocksize"]))
    return graph.call(indexing.space_to_depth, tensor(node, 0), int(node.attributes["blocksize"]))
