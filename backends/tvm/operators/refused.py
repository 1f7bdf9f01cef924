"""Operators that TVM's importer takes, and then has wrong or cannot compile: put right, or refused by name."""

from __future__ import annotations

import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of
from effic.backends.tvm.operators.importer import by_importer


def data_dependent(lowering: Lowering, node: ir.Node) -> None:
    """NonMaxSuppression, NonZero, Unique, Compress: how much comes out depends on the data."""
    lowering.refuse(node, "has outputs whose size depends on the values of its inputs")


def grid_sample(lowering: Lowering, node: ir.Node) -> None:
    """GridSample in the modes that TVM can compile."""
    get = node.attributes.get_string
    if get("mode", "linear") == "nearest" and get("padding_mode", "zeros") == "reflection":
        lowering.refuse(node, "reflects the nearest samples, which TVM cannot compile")
    by_importer(lowering, node)


def range_(lowering: Lowering, node: ir.Node) -> None:
    """Range that is left when sizes are fixed and constants are folded."""
    lowering.refuse(node, "counts to a number that depends on the values of its inputs")


def batch_normalization(lowering: Lowering, node: ir.Node) -> None:
    """BatchNormalization by the statistics of a trained model."""
    if node.attributes.get_int("training_mode", 0):
        lowering.refuse(node, "takes the statistics of its input, as in training")
    by_importer(lowering, node)


def roi_align(lowering: Lowering, node: ir.Node) -> None:
    """RoiAlign takes the mean of its samples here. Half a pixel is one of the image: regions are scaled first,
    which TVM's importer does last."""
    get = node.attributes
    if get.get_string("mode", "avg") != "avg":
        lowering.refuse(node, "takes the maximum of its samples, which TVM computes differently")
    x, rois, images = (lowering.tensor(value) for value in node.inputs)
    dtype, scale = dtype_of(rois), get.get_float("spatial_scale", 1.0)
    usual = "half_pixel" if (node.version or lowering.opset) >= 16 else "output_half_pixel"
    half = get.get_string("coordinate_transformation_mode", usual) == "half_pixel"
    if half:
        rois = lowering.emit(relax.op.subtract(rois, relax.const(0.5 / scale, dtype)))
    images = lowering.emit(relax.op.astype(lowering.emit(relax.op.expand_dims(images, 1)), dtype))
    found = relax.op.vision.roi_align(
        x,
        lowering.emit(relax.op.concat([images, rois], 1)),
        pooled_size=(get.get_int("output_height", 1), get.get_int("output_width", 1)),
        spatial_scale=scale,
        sample_ratio=get.get_int("sampling_ratio", 0),
        aligned=half,
        layout="NCHW",
        mode="avg",
    )
    if half and not get.get_int("sampling_ratio", 0):
        # As many samples as pixels: none of an empty region, of which TVM takes one.
        starts, ends = (lowering.emit(relax.op.strided_slice(rois, [1], [at], [at + 2])) for at in (0, 2))
        some = lowering.emit(relax.op.min(lowering.emit(relax.op.subtract(ends, starts)), 1))
        some = lowering.emit(relax.op.reshape(some, [-1, 1, 1, 1]))
        full = lowering.emit(relax.op.greater(some, relax.const(0, dtype)))
        found = relax.op.where(full, lowering.emit(found), relax.const(0, dtype_of(x)))
    lowering.set(node.outputs[0], found)


def space_to_depth(lowering: Lowering, node: ir.Node) -> None:
    """SpaceToDepth in the order depth, column, row."""
    if node.attributes.get_string("mode", "DCR") != "DCR":
        lowering.refuse(node, "has a mode of opset 26, which is not lowered")
    by_importer(lowering, node)


def top_k(lowering: Lowering, node: ir.Node) -> None:
    """TopK of the types that TVM sorts."""
    dtype = dtype_of(lowering.tensor(node.inputs[0]))
    if dtype in ("uint64", "uint16", "uint32", "int16", "float16"):
        lowering.refuse(node, f"sorts {dtype}, which TVM does not")
    if len(node.inputs) > 1 and (node.version or lowering.opset) < 11:
        lowering.refuse(node, "is in the form of opset 10")
    by_importer(lowering, node)


def with_constants(lowering: Lowering, node: ir.Node) -> None:
    """Operators whose further inputs (a shape, repeats, sizes) have to be constants."""
    for value in node.inputs[1:]:
        if value is not None and not lowering.is_constant(value):
            lowering.refuse(node, f"takes '{value.name}' from the inputs' values")
    by_importer(lowering, node)
