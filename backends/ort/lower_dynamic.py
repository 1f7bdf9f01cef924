"""lower-dynamic: linear layers with activations rounded at every call, on integer kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.backends.ort.input_groups import InputGroups, group_matrix, signed_type
from effic.backends.ort.linear import Linear, add_rest, kernel_bias, read_linear
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
    take_over,
)
from effic.ir.model import Model, constant_array, sole_consumer
from effic.ir.tensors import SPILL_BYTES
from effic.passes.base import Numerics, Pass, Remarks


@dataclass(frozen=True)
class LowerDynamic(Pass):
    """Multiply activations that are rounded at every call with weights per output channel as integers.

    Before:  r = DequantizeLinear(DynamicQuantizeLinear(x));  y = MatMul(r, DequantizeLinear(codes, scales)) + b
    After:   y = com.microsoft::DynamicQuantizeMatMul(x, codes, scales, b)

    Where several layers read the same ``r``, it is rounded once and each becomes a
    ``com.microsoft::MatMulIntegerToFloat``. The integers are the same; only the last rounding to fp32
    differs.

    Missed when the weight has several scales per output channel or is no matrix of fp32.
    """

    name: ClassVar[str] = "lower-dynamic"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def apply(self, model: Model, remarks: Remarks) -> None:
        sites = []
        for node in model.nodes("MatMul", "Gemm"):
            rounding = _dynamic(node.inputs[0])
            if rounding is None:
                continue
            weight = encoded_input(node.inputs[1])
            if reason := _why_not(node, weight):
                remarks.missed(node, reason)
            elif weight is not None:
                sites.append((node, rounding, weight))
        store = _Constants(model)
        for node, rounding, weight in sites:
            shared = sum(other is rounding for _, other, _ in sites) > 1
            _lower(store, node, rounding, weight, shared, remarks)


class _Constants:
    """Matrices of codes, so that tied weights are written once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: dict[tuple[int, int], tuple[ir.Value, ir.Value | None]] = {}

    def of(self, weight: EncodedInput, k_axis: int) -> tuple[ir.Value, ir.Value | None]:
        """Codes int8 ``[K, N]`` and zero points int8 ``[N]``."""
        key = (id(weight.value), k_axis)
        if key not in self._known:
            self._known[key] = self._make(weight, k_axis)
        return self._known[key]

    def _make(self, weight: EncodedInput, k_axis: int) -> tuple[ir.Value, ir.Value | None]:
        encoding, before = weight.encoding, weight.dequantize
        graph, stored = graph_of(before), before.inputs[0]
        groups = InputGroups(encoding, k_axis, encoding.shape[1 - k_axis])
        if encoding.codes.dtype == ir.DataType.INT8 and k_axis == 0 and stored is not None:
            codes = stored
        else:
            codes = self.model.add_initializer(graph, f"{weight.name}.matrix", _matrix(groups))
            if codes.dtype != ir.DataType.INT8:
                shape, to = codes.shape, int(ir.DataType.INT8)
                codes = put_named(self.model, f"{weight.name}.int8", before, "Cast", [codes], to=to)
                codes.type, codes.shape = ir.TensorType(ir.DataType.INT8), shape
        half = 0 if encoding.codes.dtype.is_signed() else 1 << (encoding.stored_bits - 1)
        zeros = encoding.zero_points
        if zeros is None and not half:
            return codes, None
        points = np.zeros(encoding.scales.shape, np.int16) if zeros is None else zeros.astype(np.int16)
        row = np.broadcast_to((points - half).astype(np.int8).reshape(-1), (groups.outputs,))
        return codes, self.model.add_initializer(graph, f"{weight.name}.column_zero_points", row.copy())


def _matrix(groups: InputGroups) -> ir.TensorProtocol:
    """Codes as ``[K, N]``; those of a large weight are moved when they are written to a file."""
    codes = groups.encoding.codes
    if codes.nbytes < SPILL_BYTES:
        return group_matrix(groups, 0)
    shape = ir.Shape((groups.inputs, groups.outputs))
    return ir.LazyTensor(lambda: group_matrix(groups, 0), signed_type(codes.dtype), shape)


def _lower(
    store: _Constants,
    node: ir.Node,
    rounding: ir.Node,
    weight: EncodedInput,
    shared: bool,
    remarks: Remarks,
) -> None:
    model, encoding, linear = store.model, weight.encoding, read_linear(node)
    k_axis = int(weight.transposed) ^ int(linear.transposed)
    outputs = encoding.shape[1 - k_axis]
    codes, zeros = store.of(weight, k_axis)
    factors = np.broadcast_to(encoding.scales.reshape(-1), (outputs,)) * np.float32(linear.alpha)
    scales = model.add_initializer(graph_of(weight.dequantize), f"{weight.name}.column_scales", factors)
    bias, rest = kernel_bias(model, node, linear, outputs, encoding)
    # A bias that is added by a node of its own becomes the kernel's.
    addition = _bias_addition(node, outputs, linear) if bias is None and rest is None else None
    if addition is not None:
        bias = addition[1]
    reads = [value.producer() for value in node.inputs[:2] if value is not None]
    if shared:
        op_type = "MatMulIntegerToFloat"
        rounded, scale, zero = rounding.outputs
        inputs = [rounded, codes, scale, scales, zero, zeros, bias]
    else:
        op_type = "DynamicQuantizeMatMul"
        inputs = [rounding.inputs[0], codes, scales, zeros, bias]
    new = put(node, op_type, inputs, domain=MICROSOFT, like=node)
    copy_note(weight.dequantize, new)
    import_domain(model, new)
    result = new.outputs[0]
    if rest is not None:
        result = add_rest(model, node, result, rest, linear.beta)
    take_over(model, node, result)
    if addition is not None:
        take_over(model, addition[0], new.outputs[0])
    remove_unread([step for step in reads if step is not None])
    if rounding.graph is not None and not any(output.uses() for output in rounding.outputs):
        graph_of(rounding).remove(rounding, safe=True)
    how = ", its activations rounded once for all who read them" if shared else ""
    held = (
        "int8 weight" if encoding.stored_bits == 8 else f"{encoding.stored_bits}-bit weight, int8 in memory"
    )
    remarks.passed(new, f"{op_type}, {held}{how}", bits=encoding.bits, form=op_type)


def _dynamic(value: ir.Value | None) -> ir.Node | None:
    """The DynamicQuantizeLinear a value comes from, dequantized again, or None."""
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
        return None
    source = dequantize.inputs[0].producer()
    if source is None or source.op_type != "DynamicQuantizeLinear":
        return None
    return source if list(dequantize.inputs) == list(source.outputs) else None


def _why_not(node: ir.Node, weight: EncodedInput | None) -> str | None:
    if weight is None:
        return "its activations are rounded to 8 bits at every call, its weight is not compressed"
    encoding = weight.encoding
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return "its attributes come from the caller of a function"
    if node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0)):
        return "it transposes its activations (transA=1); run canonicalize-linear first"
    if encoding.dtype != ir.DataType.FLOAT or len(encoding.codes.shape) != 2 or encoding.outliers is not None:
        return f"its weight '{weight.name}' is no plain matrix of fp32"
    k_axis = int(weight.transposed) ^ int(read_linear(node).transposed)
    if encoding.shape != tuple(encoding.codes.shape) or encoding.block_size or 0 in encoding.shape:
        return f"its weight '{weight.name}' has several scales per output channel; the kernel takes one"
    if encoding.scales.ndim and encoding.axis == k_axis:
        return f"its weight '{weight.name}' has scales per input channel; the kernel takes them per output channel"
    return None


def _bias_addition(node: ir.Node, outputs: int, linear: Linear) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a constant ``[N]`` that alone reads a product, with that constant."""
    add = sole_consumer(node.outputs[0])
    if (
        add is None
        or add.op_type != "Add"
        or add.domain not in ("", "ai.onnx")
        or add.graph is not node.graph
    ):
        return None
    for value in add.inputs:
        # A Constant node may lie behind the product.
        if value is None or not value.is_initializer() or value.shape is None:
            continue
        array = constant_array(value) if tuple(value.shape) == (outputs,) else None
        if array is not None and array.dtype == np.float32:
            return add, value
    return None
