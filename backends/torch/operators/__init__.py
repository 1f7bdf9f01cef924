"""The operators the torch backend knows: one table, reading it is enough.

A family is a module of this package; its entries name, for each ONNX operator, the function in it that
converts the operator. Operators of other domains are written ``domain::Operator``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS

if TYPE_CHECKING:
    from effic.backends.torch.builder import Converter

FAMILIES: dict[str, dict[str, str]] = {
    # -- arithmetic, comparisons, activations, casts
    "elementwise": {
        "Abs": "unary",
        "Acos": "unary",
        "Acosh": "unary",
        "Asin": "unary",
        "Asinh": "unary",
        "Atan": "unary",
        "Atanh": "unary",
        "BitwiseNot": "unary",
        "Ceil": "unary",
        "Cos": "unary",
        "Cosh": "unary",
        "Erf": "unary",
        "Exp": "unary",
        "Floor": "unary",
        "HardSwish": "unary",
        "IsNaN": "unary",
        "Log": "unary",
        "Mish": "unary",
        "Neg": "unary",
        "Not": "unary",
        "Reciprocal": "unary",
        "Relu": "unary",
        "Round": "unary",
        "Sigmoid": "unary",
        "Sign": "unary",
        "Sin": "unary",
        "Sinh": "unary",
        "Softplus": "unary",
        "Softsign": "unary",
        "Sqrt": "unary",
        "Tan": "unary",
        "Tanh": "unary",
        "Add": "binary",
        "And": "binary",
        "BitwiseAnd": "binary",
        "BitwiseOr": "binary",
        "BitwiseXor": "binary",
        "Div": "binary",
        "Equal": "binary",
        "Greater": "binary",
        "GreaterOrEqual": "binary",
        "Less": "binary",
        "LessOrEqual": "binary",
        "Mul": "binary",
        "Or": "binary",
        "PRelu": "binary",
        "Pow": "binary",
        "Sub": "binary",
        "Xor": "binary",
        "Max": "variadic",
        "Min": "variadic",
        "Sum": "variadic",
        "Mean": "mean",
        "Mod": "mod",
        "BitShift": "bit_shift",
        "Where": "where",
        "Clip": "clip",
        "LeakyRelu": "activation",
        "Elu": "activation",
        "Celu": "activation",
        "Selu": "activation",
        "HardSigmoid": "activation",
        "ThresholdedRelu": "activation",
        "Shrink": "activation",
        "Swish": "activation",
        "Gelu": "activation",
        "IsInf": "is_inf",
        "Cast": "cast",
        "CastLike": "cast_like",
        "Identity": "identity",
        "Dropout": "dropout",
        "Constant": "constant",
        "com.microsoft::FastGelu": "fast_gelu",
        "com.microsoft::Gelu": "fast_gelu",
        "com.microsoft::BiasGelu": "fast_gelu",
        "com.microsoft::QuickGelu": "fast_gelu",
    },
    # -- shapes and views
    "shape": {
        "Shape": "shape",
        "Size": "size",
        "Reshape": "reshape",
        "Expand": "expand",
        "Tile": "tile",
        "Transpose": "transpose",
        "Squeeze": "squeeze",
        "Unsqueeze": "unsqueeze",
        "Flatten": "flatten",
        "Concat": "concat",
        "Split": "split",
        "Slice": "slice_",
        "ConstantOfShape": "constant_of_shape",
        "Range": "range_",
    },
    # -- sums, extrema, softmax
    "reduction": {
        "ReduceL1": "reduce",
        "ReduceL2": "reduce",
        "ReduceLogSum": "reduce",
        "ReduceLogSumExp": "reduce",
        "ReduceMax": "reduce",
        "ReduceMean": "reduce",
        "ReduceMin": "reduce",
        "ReduceProd": "reduce",
        "ReduceSum": "reduce",
        "ReduceSumSquare": "reduce",
        "ArgMax": "arg_extremum",
        "ArgMin": "arg_extremum",
        "CumSum": "running",
        "CumProd": "running",
        "Softmax": "softmax",
        "LogSoftmax": "softmax",
        "Hardmax": "softmax",
    },
    # -- products of matrices
    "linear": {
        "MatMul": "matmul",
        "Gemm": "gemm",
        "Einsum": "einsum",
        "Det": "det",
    },
    # -- normalizations
    "normalization": {
        "BatchNormalization": "batch",
        "LayerNormalization": "layer",
        "RMSNormalization": "rms",
        "SimplifiedLayerNormalization": "rms",
        "com.microsoft::SimplifiedLayerNormalization": "rms",
        "GroupNormalization": "group",
        "InstanceNormalization": "instance",
        "MeanVarianceNormalization": "mean_variance",
        "LpNormalization": "lp",
        "com.microsoft::SkipLayerNormalization": "skip",
        "com.microsoft::SkipSimplifiedLayerNormalization": "skip",
    },
    # -- attention and rotary embeddings
    "attention": {
        "Attention": "attention",
        "RotaryEmbedding": "rotary",
    },
    # -- convolutions
    "convolution": {
        "Col2Im": "col2im",
        "Conv": "conv",
        "ConvInteger": "conv_integer",
        "ConvTranspose": "conv_transpose",
        "DeformConv": "deform_conv",
        "QLinearConv": "qlinear_conv",
    },
    # -- pooling
    "pooling": {
        "AveragePool": "average_pool",
        "GlobalAveragePool": "global_pool",
        "GlobalLpPool": "global_pool",
        "GlobalMaxPool": "global_pool",
        "LRN": "local_response_norm",
        "LpPool": "lp_pool",
        "MaxPool": "max_pool",
        "MaxUnpool": "max_unpool",
    },
    # -- gathering, scattering, searching, padding
    "indexing": {
        "CenterCropPad": "center_crop_pad",
        "Compress": "compress",
        "EyeLike": "eye_like",
        "Gather": "gather",
        "GatherElements": "gather_elements",
        "GatherND": "gather_nd",
        "NonMaxSuppression": "non_max_suppression",
        "NonZero": "nonzero",
        "OneHot": "one_hot",
        "Pad": "pad",
        "ReverseSequence": "reverse_sequence",
        "Scatter": "scatter_elements",
        "ScatterElements": "scatter_elements",
        "ScatterND": "scatter_nd",
        "TopK": "top_k",
        "Trilu": "trilu",
        "Unique": "unique",
    },
    # -- resizing and sampling of images
    "image": {
        "AffineGrid": "affine_grid",
        "DepthToSpace": "depth_to_space",
        "GridSample": "grid_sample",
        "Resize": "resize",
        "RoiAlign": "roi_align",
        "SpaceToDepth": "space_to_depth",
        "Upsample": "resize",
    },
    # -- codes of few bits
    "quantization": {
        "DequantizeLinear": "dequantize_linear",
        "DynamicQuantizeLinear": "dynamic_quantize_linear",
        "MatMulInteger": "matmul_integer",
        "QLinearMatMul": "qlinear_matmul",
        "QuantizeLinear": "quantize_linear",
        "com.microsoft::GatherBlockQuantized": "gather_block_quantized",
        "com.microsoft::MatMulNBits": "matmul_nbits",
    },
    # -- recurrent layers
    "recurrent": {"GRU": "recurrent", "LSTM": "recurrent", "RNN": "recurrent"},
    # -- signals
    "audio": {
        "BlackmanWindow": "window",
        "DFT": "dft",
        "HammingWindow": "window",
        "HannWindow": "window",
        "MelWeightMatrix": "mel_weights",
        "STFT": "stft",
    },
    # -- random numbers
    "random": {
        "Bernoulli": "bernoulli",
        "Multinomial": "multinomial",
        "RandomNormal": "normal",
        "RandomNormalLike": "normal",
        "RandomUniform": "uniform",
        "RandomUniformLike": "uniform",
    },
    # -- sequences and optional values
    "sequence": {
        "ConcatFromSequence": "concatenate",
        "Optional": "optional",
        "OptionalGetElement": "get_element",
        "OptionalHasElement": "has_element",
        "SequenceAt": "at",
        "SequenceConstruct": "construct",
        "SequenceEmpty": "construct",
        "SequenceErase": "erase",
        "SequenceInsert": "insert",
        "SequenceLength": "length",
        "SplitToSequence": "split",
    },
    # -- If, Loop, Scan
    "control": {
        "If": "if_",
        "Loop": "loop",
        "Scan": "scan",
    },
}

OPERATORS: dict[str, str] = {
    operator: f"effic.backends.torch.operators.{family}:{function}"
    for family, members in FAMILIES.items()
    for operator, function in members.items()
}


def operator_key(node: ir.Node) -> str:
    """The key of a node's operator in :data:`OPERATORS`."""
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}::{node.op_type}"


def lookup(node: ir.Node) -> Converter | None:
    """The converter of a node's operator, None when there is none."""
    entry = OPERATORS.get(operator_key(node))
    if entry is None:
        return None
    module, _, function = entry.partition(":")
    converter: Converter = getattr(importlib.import_module(module), function)
    return converter
