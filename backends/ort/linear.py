"""MatMul and Gemm in one form, for the passes that put other kernels in their place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effic.backends.ort.scenes import graph_of, put, put_named, statically_quantized
from effic.ir.encodings import Encoding
from effic.ir.model import Model, constant_array


@dataclass(frozen=True)
class Linear:
    """A MatMul or Gemm in one form: ``y = alpha * (x @ W) + beta * c``."""

    transposed: bool = False
    alpha: float = 1.0
    beta: float = 1.0


def read_linear(node: ir.Node) -> Linear:
    """What a MatMul or Gemm computes."""
    if node.op_type == "MatMul":
        return Linear()
    return Linear(
        bool(node.attributes.get_int("transB", 0)),
        node.attributes.get_float("alpha", 1.0),
        node.attributes.get_float("beta", 1.0),
    )


def why_not_linear(node: ir.Node, index: int) -> str | None:
    """Why a MatMul or Gemm whose compressed weight is input ``index`` keeps its form, or None."""
    if statically_quantized(node):
        return "its activations are quantized as well: left for the runtime to fuse into an integer kernel"
    if index == 0:
        return "the compressed weight is the left operand, the kernel takes it on the right"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "its attributes come from the caller of a function"
    if node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0)):
        return "it transposes its activations (transA=1); run canonicalize-linear first"
    return None


def kernel_bias(
    model: Model, node: ir.Node, linear: Linear, outputs: int, encoding: Encoding
) -> tuple[ir.Value | None, ir.Value | None]:
    """Gemm's third input as the kernel's bias, or as something to add afterwards.

    Args:
        model: the model.
        node: a MatMul or Gemm.
        linear: what it computes.
        outputs: N.
        encoding: of its weight.

    Returns:
        A constant ``[N]`` with beta in it, or None; and a value for :func:`add_rest`, or None.
    """
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None or linear.beta == 0:
        return None, None
    array = constant_array(value) if value.shape is not None and _elements(value) <= outputs else None
    if array is None or array.dtype != encoding.scales.dtype or array.size not in (1, outputs):
        return None, value
    if array.ndim and array.shape[-1] != array.size:
        # One number per row, [M, 1].
        return None, value
    if linear.beta == 1 and array.shape == (outputs,):
        return value, None
    array = np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (outputs,))) * array.dtype.type(
        linear.beta
    )
    return model.add_initializer(_home(value, node), f"{value.name}.bias", array), None


def add_rest(model: Model, node: ir.Node, product: ir.Value, rest: ir.Value, beta: float) -> ir.Value:
    """``product + beta * rest`` before ``node``, whose place the result is to take."""
    name = node.name or str(node.outputs[0].name)
    old = node.outputs[0]
    product.name = model.unique_name(f"{name}.product")
    product.type, product.shape = old.type, old.shape
    if beta != 1 and old.dtype is not None:
        scale = model.add_initializer(_home(rest, node), f"{name}.beta", np.array(beta, old.dtype.numpy()))
        rest = put_named(model, f"{name}.scaled", node, "Mul", [rest, scale])
    return put(node, "Add", [product, rest]).outputs[0]


def _home(value: ir.Value, node: ir.Node) -> ir.Graph:
    """Where a constant that is made of ``value`` for ``node`` belongs."""
    return value.graph if value.is_initializer() and isinstance(value.graph, ir.Graph) else graph_of(node)


def _elements(value: ir.Value) -> int:
    return (
        int(np.prod([d if isinstance(d, int) else 1 for d in value.shape])) if value.shape is not None else 0
    )
