"""lower-encodings: weight-only quantized MatMul, Gemm and Gather on ONNX Runtime's n-bit kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from effic.backends.ort.block_store import BlockStore
from effic.backends.ort.blocks import INT8_ACTIVATIONS, Layout
from effic.backends.ort.input_groups import groups_of_linear
from effic.backends.ort.linear import add_rest, kernel_bias, read_linear, why_not_linear
from effic.backends.ort.lower_gather import lower_gather
from effic.backends.ort.scenes import (
    MICROSOFT,
    EncodedInput,
    copy_note,
    encoded_input,
    import_domain,
    put,
    remove_unread,
    take_over,
)
from effic.ir.encodings import Encoding
from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks, option


@dataclass(frozen=True)
class LowerEncodings(Pass):
    """Run weight-only quantized matrices on ONNX Runtime's n-bit kernels.

    Before:  w = DequantizeLinear(codes, scales[, zero_points]);  y = MatMul(x, w)
    After:   y = com.microsoft::MatMulNBits(x, blocks, scales[, zero_points])

    Gemm is the same with a bias; Gather(w, ids) becomes com.microsoft::GatherBlockQuantized. The
    result does not depend on the session's options. A scale that covers more than the largest block
    is repeated, 3-bit codes run as 4-bit ones, nodes that share a weight share its blocks.

    Weights whose groups run along the output channels are left to ``lower-input-groups``, those with
    exact weights beside the codes to ``lower-outliers``.

    Missed when no block size divides the group, and where the runtime's kernel would decode the whole
    weight at every call (8 bits below accuracy level 4).
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
                    # The others are lower-outliers' and lower-input-groups' to lower and to remark on.
                    if weight.encoding.outliers is None and (
                        index == 0 or groups_of_linear(node, weight) is None
                    ):
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
    if reason := why_not_linear(node, index):
        remarks.missed(node, reason)
        return
    linear = read_linear(node)
    # The node computes x @ W with W = [K, N]; each exchange of W's axes moves K.
    k_axis = int(weight.transposed) ^ int(linear.transposed)
    blocks = store.blocks(weight, k_axis, linear.alpha)
    if isinstance(blocks, str):
        remarks.missed(node, f"no fast kernel holds its compressed weight '{weight.name}': {blocks}")
        return
    layout, source = blocks.layout, weight.dequantize
    bias, rest = kernel_bias(model, node, linear, layout.outputs, weight.encoding)
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
        result = add_rest(model, node, result, rest, linear.beta)
    read = node.inputs[index]
    chain = [read.producer()] if read is not None else []
    take_over(model, node, result)
    remove_unread([step for step in chain if step is not None])
    text = _outcome(weight.encoding, layout, store.level)
    if blocks.decompressed:
        text += "; 2:4, decompressed when the file is loaded: 3 bits per weight there, 4 in memory"
    remarks.passed(new, text, **dataclasses.asdict(layout))


def _outcome(encoding: Encoding, layout: Layout, level: int) -> str:
    text = f"MatMulNBits, {layout.bits} bits, blocks of {layout.block}, accuracy level {level}"
    if encoding.bits < layout.bits:
        text += f"; {encoding.bits}-bit codes stored as {layout.bits}"
    if layout.block < layout.group:
        text += f"; each scale repeated for {-(-layout.group // layout.block)} blocks"
    return text
