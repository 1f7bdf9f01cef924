"""Attention as exporters write it: MatMul, a factor, an added mask, Softmax, MatMul.

The pattern is read backwards from the second MatMul, when the values of all that feeds it are there; the
products and the softmax that the kernel makes needless are left to dead code elimination.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.kernels.attention import Attention
from effic.backends.tvm.lowering import Lowering, dtype_of, same_size, shape_of
from effic.ir.model import constant_array, sole_consumer


@dataclass(frozen=True)
class Scores:
    """What a softmax is taken of: ``scale * query @ keys + mask``, keys as ``[…, head_dim, keys]``."""

    query: ir.Value
    keys: ir.Value
    scale: float
    mask: ir.Value | None


def attention(lowering: Lowering, node: ir.Node) -> Any | None:
    """The result of a MatMul that ends an attention, by one kernel; None where it does not, or the kernel
    does not hold it."""
    weights, value = node.inputs
    if lowering.opset < 13:  # softmax flattened its input then
        return None
    if weights is None or value is None or (scores := _scores(weights)) is None:
        return None
    operands = [lowering.value(one) for one in (scores.query, scores.keys, value)]
    mask = None if scores.mask is None else lowering.value(scores.mask)
    given = [*operands, *([] if mask is None else [mask])]
    if any(dtype_of(one) != "float32" or len(shape_of(one)) != 4 for one in given):
        return None
    shapes = [shape_of(one) for one in given]
    first = shapes[0][0]
    if not isinstance(first, int):
        # Zero stands for the number of images that is open.
        shapes = [(0 if same_size(shape[0], first) else shape[0], *shape[1:]) for shape in shapes]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return None
    (batch, heads, queries, head_dim), turned, plain = shapes[:3]
    keys = turned[3]
    if turned != (batch, heads, head_dim, keys) or plain != (batch, heads, keys, head_dim):
        return None
    if mask is not None and shapes[3][3] != keys:
        return None
    spec = Attention(batch or None, heads, heads, queries, keys, head_dim, scale=scores.scale)
    if mask is not None:
        spec = replace(spec, mask="additive", mask_shape=shapes[3][:3])
    if spec.why_not() is not None:
        return None
    source = _turned_from(scores.keys)
    if source is None:
        # The transpose that made the keys is fused with this one: what remains is one copy, or none.
        given[1] = lowering.emit(relax.op.permute_dims(given[1], [0, 1, 3, 2]))
    else:
        given[1] = lowering.value(source)
        pair = [_once(lowering, one) for one in (source, value)]
        if all(one is not None and shape_of(one) == shape_of(pair[0]) for one in pair):
            given[1:3] = pair
            spec = replace(spec, kv_heads=shape_of(pair[0])[1])
    return lowering.call(spec, given, (first, heads, queries, head_dim), "float32")


def _turned_from(keys: ir.Value) -> ir.Value | None:
    """What a transpose of the last two axes made the keys from, None where something else made them."""
    node = keys.producer()
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type != "Transpose":
        return None
    return node.inputs[0] if tuple(node.attributes.get_ints("perm", ())) == (0, 1, 3, 2) else None


def _once(lowering: Lowering, repeated: ir.Value) -> Any | None:
    """Heads of keys or values as they were before each was repeated for the queries that share it.

    Repeated as exporters write it: an axis put in, expanded, and merged with the heads.

    Returns:
        ``[batch, kv_heads, keys, head_dim]``, None where they are not repeated that way.
    """
    merged = repeated.producer()
    expanded = None if merged is None or merged.op_type != "Reshape" else merged.inputs[0]
    node = None if expanded is None else expanded.producer()
    if expanded is None or node is None or node.op_type != "Expand" or node.inputs[0] is None:
        return None
    before, after, flat = (lowering.shape(one) for one in (node.inputs[0], expanded, repeated))
    if len(after) != 5 or len(before) != 5 or before != (*after[:2], 1, *after[3:]):
        return None
    if flat != (after[0], after[1] * after[2], *after[3:]):
        return None
    return lowering.emit(relax.op.reshape(lowering.value(node.inputs[0]), (*after[:2], *after[3:])))


def _made_by(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node of one of these operators that makes a value which nobody else reads."""
    node = None if value is None else value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in operators:
        return None
    return node if sole_consumer(node.outputs[0]) is not None else None


def _scores(weights: ir.Value) -> Scores | None:
    softmax = _made_by(weights, "Softmax")
    if softmax is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    summed, mask = softmax.inputs[0], None
    add = _made_by(summed, "Add")
    if add is not None:
        for index in (0, 1):
            if _made_by(add.inputs[index], "MatMul", "Mul", "Div") is not None:
                found = _product(add.inputs[index])
                if found is not None:
                    mask = add.inputs[1 - index]
                    return Scores(*found, mask)
        return None
    found = _product(summed)
    return None if found is None else Scores(*found, None)


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value, float] | None:
    """``query @ keys`` with a constant factor behind it, if any."""
    scale = 1.0
    factor = _made_by(value, "Mul", "Div")
    if factor is not None:
        left, right = factor.inputs
        number = _number(right)
        if number is None and factor.op_type == "Mul":
            left, number = right, _number(left)
        if number is None or (factor.op_type == "Div" and number == 0):
            return None
        scale = number if factor.op_type == "Mul" else 1 / number
        value = left
    product = _made_by(value, "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    return product.inputs[0], product.inputs[1], scale


def _number(value: ir.Value | None) -> float | None:
    array = None if value is None else constant_array(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None
