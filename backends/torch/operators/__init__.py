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
