"""lower-quantized: what ONNX Runtime needs to see to run a statically quantized model in integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.backends.ort.scenes import put_named
from effic.backends.ort.space_to_depth import spread_strides
from effic.ir.compressed import tensor_of
from effic.ir.encodings import recognise
from effic.ir.model import Model, constant_array, sole_consumer
from effic.passes.base import Numerics, Pass, Remarks
from effic.passes.cleanup.scopes import prune


@dataclass(frozen=True)
class LowerQuantized(Pass):
    """Let ONNX Runtime fuse every operator between DequantizeLinear and QuantizeLinear.

    Before:  y = QuantizeLinear(Pad(DequantizeLinear(x)));  z = Gemm(…, DequantizeLinear(w.codes, w.scales))
    After:   y = Pad(x);                z = Gemm(…, DequantizeLinear(w.codes, w.scales, w.zero_points))

    The runtime fuses the other operators by itself. It has no rule for Pad, and none for a Gemm whose
    weight has no explicit zero point. A convolution with a stride over an image reads blocks of pixels as
    channels (:mod:`effic.backends.ort.space_to_depth`), for which the runtime's kernel is much faster.

    Missed when the scales before and after a Pad differ.
    """

    name: ClassVar[str] = "lower-quantized"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def apply(self, model: Model, remarks: Remarks) -> None:
        for node in model.nodes("Pad"):
            _pad_codes(model, node, remarks)
        for node in model.nodes("Conv"):
            spread_strides(model, node, remarks)
        for node in model.nodes("Gemm"):
            _give_zero_points(model, node, remarks)


def _pad_codes(model: Model, pad: ir.Node, remarks: Remarks) -> None:
    before = pad.inputs[0].producer() if pad.inputs[0] is not None else None
    after = sole_consumer(pad.outputs[0])
    if before is None or before.op_type != "DequantizeLinear" or after is None:
        return
    if after.op_type != "QuantizeLinear" or tensor_of(before.inputs[0]) is not None:
        return
    scale, zero = _parameters(before)
    if (
        scale is None
        or zero is None
        or scale.size != 1
        or not _equal(_parameters(before), _parameters(after))
    ):
        remarks.missed(pad, "pads 8-bit values in floating point: the scales before and after it differ")
        return
    value = constant_array(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else None
    if value is None and len(pad.inputs) > 2 and pad.inputs[2] is not None:
        remarks.missed(pad, "pads with a value computed at run time")
        return
    limits = np.iinfo(zero.dtype)
    number = 0.0 if value is None else float(value.reshape(()))
    code = np.clip(np.rint(number / float(scale.reshape(()))) + int(zero.reshape(())), limits.min, limits.max)
    assert isinstance(pad.graph, ir.Graph)  # model.nodes hands out nodes of graphs
    filler = model.add_initializer(pad.graph, f"{pad.outputs[0].name}.filler", np.asarray(code, zero.dtype))
    inputs = [before.inputs[0], pad.inputs[1], filler, *pad.inputs[3:]]
    codes = put_named(model, f"{pad.outputs[0].name}.codes", pad, "Pad", inputs)
    new = codes.producer()
    assert new is not None  # put_named has just made it
    new.attributes.update(pad.attributes)
    old = after.outputs[0]
    codes.type, codes.shape = old.type, old.shape
    model.replace_value(old, codes)
    prune([after])
    remarks.passed(new, "pads the codes, not the values they stand for")


def _parameters(node: ir.Node) -> tuple[np.ndarray | None, np.ndarray | None]:
    scale = constant_array(node.inputs[1])
    zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    return scale, zero


def _equal(one: tuple[np.ndarray | None, ...], other: tuple[np.ndarray | None, ...]) -> bool:
    return all(
        a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def _give_zero_points(model: Model, gemm: ir.Node, remarks: Remarks) -> None:
    value = gemm.inputs[1] if len(gemm.inputs) > 1 else None
    node = value.producer() if value is not None else None
    activation = gemm.inputs[0].producer() if gemm.inputs[0] is not None else None
    encoding = recognise(value)
    if node is None or node.op_type != "DequantizeLinear" or encoding is None or encoding.block_size:
        return
    if activation is None or activation.op_type != "DequantizeLinear":
        return
    if encoding.codes.dtype != ir.DataType.INT8 or (len(node.inputs) > 2 and node.inputs[2] is not None):
        return
    if not isinstance(node.graph, ir.Graph):
        return
    zeros = np.zeros(encoding.scales.shape, np.int8)
    name = encoding.weight or value.name if value is not None else "weight"
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, model.add_initializer(node.graph, f"{name}.zero_points", zeros))
    remarks.passed(
        gemm, "its weight has an explicit zero point, without which it would run in floating point"
    )
