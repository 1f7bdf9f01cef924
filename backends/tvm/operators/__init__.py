"""The table of effic's own converters: operator -> ``module:function`` in this folder.

What is not here goes through the converters of TVM's ONNX importer, see
:mod:`effic.backends.tvm.private_api`. A converter raises
:class:`effic.ir.errors.UnsupportedError` (best by ``Lowering.refuse``) for what it cannot hold.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from effic.backends.tvm.lowering import Converter, Lowering

CONVERTERS: dict[str, str] = {
    "Acos": "elementwise:in_fp32",
    "Acosh": "elementwise:in_fp32",
    "ArgMax": "reduction:where_extreme",
    "ArgMin": "reduction:where_extreme",
    "Asin": "elementwise:in_fp32",
    "Asinh": "elementwise:in_fp32",
    "Atan": "elementwise:in_fp32",
    "Atanh": "elementwise:in_fp32",
    "BatchNormalization": "refused:batch_normalization",
    "BitCast": "elementwise:bit_cast",
    "BitShift": "elementwise:bit_shift",
    "CastLike": "elementwise:cast_like",
    "Celu": "elementwise:elu",
    "Compress": "refused:data_dependent",
    "Conv": "convolution:conv",
    "ConvInteger": "quantization:conv_integer",
    "ConvTranspose": "convolution:conv_transpose",
    "Cosh": "elementwise:cosh",
    "CumProd": "along:cum_prod",
    "DFT": "fourier:dft",
    "DequantizeLinear": "quantization:dequantize_linear",
    "Dropout": "elementwise:dropout",
    "Elu": "elementwise:elu",
    "Equal": "elementwise:equal",
    "Expand": "refused:with_constants",
    "EyeLike": "indexing:eye_like",
    "GRU": "recurrent:recurrent",
    "Gather": "indexing:gather",
    "Gemm": "matmul:gemm",
    "GridSample": "refused:grid_sample",
    "IsInf": "elementwise:is_inf",
    "LSTM": "recurrent:recurrent",
    "LpNormalization": "along:lp_normalization",
    "MatMul": "matmul:matmul",
    "MatMulInteger": "quantization:matmul_integer",
    "Max": "elementwise:several",
    "Mean": "elementwise:several",
    "Min": "elementwise:several",
    "Mish": "elementwise:in_fp32",
    "Mod": "elementwise:mod",
    "NonMaxSuppression": "refused:data_dependent",
    "NonZero": "refused:data_dependent",
    "Not": "elementwise:not_",
    "OneHot": "indexing:one_hot",
    "Pad": "convolution:pad",
    "Pow": "elementwise:pow_",
    "QLinearConv": "quantization:q_linear_conv",
    "QLinearMatMul": "quantization:q_linear_matmul",
    "QuantizeLinear": "quantization:quantize_linear",
    "RMSNormalization": "normalization:rms_normalization",
    "RNN": "recurrent:recurrent",
    "Range": "refused:range_",
    "ReduceL1": "reduction:of_no_axes",
    "ReduceL2": "reduction:of_no_axes",
    "ReduceLogSum": "reduction:of_no_axes",
    "ReduceLogSumExp": "reduction:log_sum_exp",
    "ReduceMax": "reduction:extreme",
    "ReduceMean": "reduction:mean",
    "ReduceMin": "reduction:extreme",
    "ReduceSumSquare": "reduction:of_no_axes",
    "Resize": "image:resize",
    "ReverseSequence": "along:reverse_sequence",
    "RoiAlign": "refused:roi_align",
    "STFT": "fourier:stft",
    "Selu": "elementwise:elu",
    "Sign": "elementwise:sign",
    "Sinh": "elementwise:sinh",
    "Slice": "indexing:slice_",
    "Softplus": "elementwise:in_fp32",
    "SpaceToDepth": "refused:space_to_depth",
    "Split": "indexing:split",
    "Sum": "elementwise:several",
    "TensorScatter": "along:tensor_scatter",
    "ThresholdedRelu": "elementwise:thresholded_relu",
    "Tile": "refused:with_constants",
    "TopK": "refused:top_k",
    "Unique": "refused:data_dependent",
    "Upsample": "image:resize",
}
"""By operator; those of other domains as ``domain::operator``."""

EXPANDED = frozenset({"Attention"})
"""Operators that the importer takes for others, or has wrong: written out as ONNX defines them."""

FIRST_OUTPUT_ONLY = frozenset({"LayerNormalization"})
"""Operators that the importer has one output of."""


def find_converter(key: str) -> Converter | None:
    """effic's own converter of an operator, None where there is none."""
    if key not in CONVERTERS:
        return None
    module, _, name = CONVERTERS[key].partition(":")
    found: Converter = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found


def key_of(node: ir.Node) -> str:
    """The operator as the table of converters has it: ``Relu``, ``com.microsoft::Gelu``."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def has_to_be_expanded(node: ir.Node) -> bool:
    """Whether a node has to be written out by ONNX's own definition of it, if there is one."""
    from effic.backends.tvm.private_api import importer_knows

    key = key_of(node)
    if find_converter(key) is not None:
        return False
    if key in EXPANDED:
        return True
    if key in FIRST_OUTPUT_ONLY:
        return any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    return not importer_knows(key)


def through_blocked(lowering: Lowering, node: ir.Node) -> bool:
    """Lower a node whose inputs lie in blocked layout without leaving it, where that can be done.

    Returns:
        Whether it was lowered; otherwise its converter reads plain layout.
    """
    if not any(lowering.is_blocked(value) for value in node.inputs):
        return False
    from effic.backends.tvm.operators.blocked import convert_blocked

    return convert_blocked(lowering, node)
