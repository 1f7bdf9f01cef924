"""lower-encodings: weight-only quantized MatMul, Gemm and Gather on ONNX Runtime's n-bit kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.backends.ort.block_store import BlockStore
from effic.backends.ort.blocks import INT8_ACTIVATIONS, Layout
from effic.backends.ort.lower_gather import lower_gather
from effic.backends.ort.scenes import (
    MICROSOFT,
    EncodedInput,
    copy_note,
    encoded_input,
    graph_of,
    import_domain,
    put,
    put_named,
    remove_unread,
    statically_quantized,
    take_over,
)
from effic.ir.encodings import Encoding
from effic.ir.model import Model, constant_array
from effic.passes.base import Numerics, Pass, Remarks, option


@dataclass(frozen=True)
class LowerEncodings(Pass):
    """Run weight-only quantized matrices on ONNX Runtime's n-bit kernels.

    Before:  w = DequantizeLinear(codes, scales[, zero_points]);  y = MatMul(x, w)
    After:   y = com.microsoft::MatMulNBits(x, blocks, scales[, zero_points])

    Gemm is the same with a bias; Gather(w, ids) becomes com.microsoft::GatherBlockQuantized. The
    result does not depend on the session's options. A scale that covers more than the largest block
    is repeated, 3-bit codes run as 4-bit ones, nodes that share a weight share its blocks.

    Missed when the groups run along the output channels, when no block size divides the group, when
    weights are kept beside the codes, and where the runtime's kernel would decode the whole weight
    at every call (8 bits below accuracy level 4).
    """

    name: ClassVar[str] = "lower-encodings"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    accuracy_level: int = option(
        INT8_ACTIVATIONS,
        ge=0,
        le=4,
        help="4: activations rounded to 8 bits per block; 0 to 3: fp32 arithmetic",
    )

    def apply(self, model: Model, remarks: Remarks) -> None:
        store = BlockStore(model, self.accuracy_level)
        for node in model.nodes("MatMul", "Gemm"):
            for index in (1, 0):
                weight = encoded_input(node.inputs[index])
                if weight is not None:
                    _lower_matmul(store, node, index, weight, remarks)
                    break
        for node in model.nodes("Gather"):
            weight = encoded_input(node.inputs[0])
            if weight is None:
                continue
            others = sorted({use.node.op_type for use in weight.value.uses()} - {"Gather"})
            if others:
                # Then the whole table is decoded anyway; a second copy of it would only cost space.
                remarks.missed(node, f"its table '{weight.name}' is decoded for {', '.join(others)} as well")
            else:
                lower_gather(model, node, weight, store.shared(weight), remarks)


def _lower_matmul(
    store: BlockStore, node: ir.Node, index: int, weight: EncodedInput, remarks: Remarks
) -> None:
    model = store.model
    if reason := _why_not(node, index):
        remarks.missed(node, reason)
        return
    linear = _read_linear(node)
    # The node computes x @ W with W = [K, N]; each exchange of W's axes moves K.
    k_axis = int(weight.transposed) ^ int(linear.transposed)
    blocks = store.blocks(weight, k_axis, linear.alpha)
    if isinstance(blocks, str):
        remarks.missed(node, f"no fast kernel holds its compressed weight '{weight.name}': {blocks}")
        return
    layout, source = blocks.layout, weight.dequantize
    bias, rest = _bias(model, node, linear, layout.outputs, weight.encoding)
    attributes = {
        "K": layout.inputs,
        "N": layout.outputs,
        "bits": layout.bits,
        "block_size": layout.block,
        "accuracy_level": store.level,
    }
    inputs = [node.inputs[0], blocks.codes, blocks.scales, blocks.zero_points, None, bias]
    new = put(node, "MatMulNBits", inputs, attributes, domain=MICROSOFT, like=node)
    copy_note(source, new)
    import_domain(model, new)
    result = new.outputs[0]
    if rest is not None:
        result = _add_rest(model, node, result, rest, linear.beta)
    read = node.inputs[index]
    chain = [read.producer()] if read is not None else []
    take_over(model, node, result)
    remove_unread([step for step in chain if step is not None])
    remarks.passed(new, _outcome(weight.encoding, layout, store.level), **dataclasses.asdict(layout))


@dataclass(frozen=True)
class _Linear:
    """A MatMul or Gemm in one form: ``y = alpha * (x @ W) + beta * c``."""

    transposed: bool = False
    alpha: float = 1.0
    beta: float = 1.0


def _read_linear(node: ir.Node) -> _Linear:
    if node.op_type == "MatMul":
        return _Linear()
    return _Linear(
        bool(node.attributes.get_int("transB", 0)),
        node.attributes.get_float("alpha", 1.0),
        node.attributes.get_float("beta", 1.0),
    )


def _why_not(node: ir.Node, index: int) -> str | None:
    if statically_quantized(node):
        return "its activations are quantized as well: left for the runtime to fuse into an integer kernel"
    if index == 0:
        return "the compressed weight is the left operand, the kernel takes it on the right"
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "its attributes come from the caller of a function"
    if node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0)):
        return "it transposes its activations (transA=1); run canonicalize-linear first"
    return None


def _bias(
    model: Model, node: ir.Node, linear: _Linear, outputs: int, encoding: Encoding
) -> tuple[ir.Value | None, ir.Value | None]:
    """Gemm's third input as the kernel's bias, or as something to add afterwards."""
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


def _add_rest(model: Model, node: ir.Node, product: ir.Value, rest: ir.Value, beta: float) -> ir.Value:
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


def _outcome(encoding: Encoding, layout: Layout, level: int) -> str:
    text = f"MatMulNBits, {layout.bits} bits, blocks of {layout.block}, accuracy level {level}"
    if encoding.bits < layout.bits:
        text += f"; {encoding.bits}-bit codes stored as {layout.bits}"
    if layout.block < layout.group:
        text += f"; each scale repeated for {-(-layout.group // layout.block)} blocks"
    return text
