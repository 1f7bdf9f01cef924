"""decode-at-load: weights no kernel reads compressed are decoded once, when the file is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effic.backends.ort.scenes import (
    copy_note,
    graph_of,
    put,
    put_named,
    remove_unread,
    statically_quantized,
    take_over,
)
from effic.ir.compressed import tensor_of
from effic.ir.encodings import Encoding, recognise
from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks, option

_DECODED = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16"}

_AT_EVERY_CALL = "this DequantizeLinear will run at every call"
_FUSED = (
    "the runtime makes it a MatMulNBits with 8-bit activations, whatever accuracy_level is, unless its session "
    "option session.qdq_matmulnbits_accuracy_level says otherwise"
)
_FUSED_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class DecodeAtLoad(Pass):
    """Write leftover encodings so that ONNX Runtime decodes them once, when it loads the file.

    Before:  w = DequantizeLinear(codes, scales, zero_points)
    After:   w = (Cast(codes) - Cast(zero_points)) * scales

    ONNX Runtime never folds a DequantizeLinear of constants, it runs it at every call; it does fold
    Cast, Sub and Mul. The file stays small, the weight takes the memory and has the speed of an
    uncompressed one. Blocks are spread over their axis by a Gather of scales with block numbers.

    Missed when the weight belongs to an operator with quantized activations, which the runtime
    fuses, and when the weight's type has no kernels (bfloat16).
    """

    name: ClassVar[str] = "decode-at-load"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    when: Literal["load", "call"] = option("load", help="load: rewrite; call: leave, and say what it costs")

    def apply(self, model: Model, remarks: Remarks) -> None:
        for node in runtime_dequantized(model):
            encoding = recognise(node.outputs[0])
            where = _weight_name(node, encoding)
            if encoding is None:
                remarks.missed(where, f"it is encoded in a way effic does not know; {_AT_EVERY_CALL}")
            elif self.when == "call":
                cost = _FUSED if _fused_by_runtime(node, encoding) else _AT_EVERY_CALL
                remarks.missed(where, f"left as asked (decode=call); {cost}")
            elif encoding.dtype not in _DECODED:
                remarks.missed(
                    where, f"the runtime has no {encoding.dtype.name} arithmetic; {_AT_EVERY_CALL}"
                )
            else:
                kind = _DECODED[encoding.dtype]
                decode(model, node, encoding)
                remarks.passed(
                    where,
                    f"decoded to {kind} once, when the file is loaded: small in the file, {kind} in memory and speed",
                    bits=encoding.bits,
                )


def runtime_dequantized(model: Model) -> list[ir.Node]:
    """DequantizeLinear nodes of constants that ONNX Runtime runs at every call.

    Those of operators with quantized activations are left out: the runtime fuses them.
    """
    found = []
    for node in model.nodes("DequantizeLinear"):
        codes = tensor_of(node.inputs[0])
        if codes is None or codes.dtype == ir.DataType.INT32:
            # int32 constants are the biases of statically quantized operators.
            continue
        readers = _readers(node.outputs[0])
        if readers and not any(statically_quantized(reader) for reader in readers):
            found.append(node)
    return found


def decode(model: Model, node: ir.Node, encoding: Encoding) -> None:
    """Replace a DequantizeLinear of constants by arithmetic the runtime folds."""
    graph = graph_of(node)
    name, kind = _weight_name(node, encoding), int(encoding.dtype)
    shape = encoding.codes.shape.numpy()
    spread = None
    if encoding.block_size:
        numbers = (np.arange(shape[encoding.axis]) // encoding.block_size).astype(np.int32)
        spread = model.add_initializer(graph, f"{name}.block_numbers", numbers)

    def parameters(value: ir.Value | None, role: str) -> ir.Value | None:
        if value is None:
            return None
        if spread is not None:
            return put_named(model, f"{name}.{role}", node, "Gather", [value, spread], axis=encoding.axis)
        if encoding.scales.ndim == 1 and len(shape) > 1:
            across = [-1 if axis == encoding.axis else 1 for axis in range(len(shape))]
            target = model.add_initializer(graph, f"{name}.{role}_shape", np.array(across, np.int64))
            return put_named(model, f"{name}.{role}", node, "Reshape", [value, target])
        return value

    current = put_named(model, f"{name}.values", node, "Cast", [node.inputs[0]], to=kind)
    if encoding.zero_points is not None:
        wide = put_named(model, f"{name}.offsets", node, "Cast", [node.inputs[2]], to=kind)
        current = put_named(model, f"{name}.centred", node, "Sub", [current, parameters(wide, "zeros")])
    product = put(node, "Mul", [current, parameters(node.inputs[1], "factors")], like=node)
    copy_note(node, product)
    inputs = [value.producer() for value in node.inputs if value is not None]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    take_over(model, node, product.outputs[0])
    remove_unread([step for step in inputs if step is not None])
    if zero is not None and zero.is_initializer() and not zero.uses() and not zero.is_graph_output():
        graph_of_zero = zero.graph
        if graph_of_zero is not None:
            graph_of_zero.initializers.pop(str(zero.name))


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read a decoded weight, through Transposes and the like."""
    readers = []
    for use in value.uses():
        if use.node.op_type in ("Transpose", "Reshape", "Identity", "ScatterElements") and use.idx == 0:
            readers.extend(_readers(use.node.outputs[0]))
        else:
            readers.append(use.node)
    return readers


def _weight_name(node: ir.Node, encoding: Encoding | None) -> str:
    if encoding is not None and encoding.weight:
        return encoding.weight
    codes = node.inputs[0]
    return (codes.name if codes is not None else None) or node.name or "weight"


def _fused_by_runtime(node: ir.Node, encoding: Encoding) -> bool:
    """Whether ONNX Runtime by itself puts a DequantizeLinear and its reader into one MatMulNBits."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].idx != 1 or uses[0].node.op_type not in ("MatMul", "Gemm"):
        return False
    if any(uses[0].node.attributes.get_int(name, 0) for name in ("transA", "transB")):
        return False
    if encoding.block_size:
        return encoding.axis == 0 and encoding.block_size in _FUSED_BLOCKS
    return encoding.scales.ndim == 0 or encoding.axis == 1
