"""lower-cuda: weight-only quantized MatMul and Gemm on the n-bit kernels of ONNX Runtime's CUDA provider."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effic.backends.ort.blocks import (
    Layout,
    block_codes,
    block_scales,
    block_size,
    block_zero_points,
    pack_rows,
    rows_of_groups,
)
from effic.backends.ort.input_groups import InputGroups, groups_of_linear
from effic.backends.ort.linear import add_rest, read_linear, why_not_linear
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
from effic.ir.encodings import Encoding, code_type, decode
from effic.ir.model import Model
from effic.ir.tensors import SPILL_BYTES
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.quantize.affine import Grid, quantize

FAST_BLOCKS = (128, 64, 32)
"""Blocks that the provider's fast kernels (fpA_intB) take."""

COLUMNS = {4: 64, 8: 32}
"""What the output channels have to be a multiple of there, by bits."""

REQUANTIZED_BITS, REQUANTIZED_BLOCK = 8, 64


@dataclass(frozen=True)
class LowerCuda(Pass):
    """Run weight-only quantized matrices on the n-bit kernels of ONNX Runtime's CUDA provider.

    Before:  w = DequantizeLinear(codes, scales[, zero_points]);  y = MatMul(x, w)
    After:   y = Cast(Slice(com.microsoft::MatMulNBits(Cast<fp16>(x), blocks, scales[, zero_points])))

    The provider's fast kernels take fp16 activations, blocks of 32, 64 or 128, input channels that are a
    multiple of the block and output channels that are a multiple of 64 (8 bits: 32): the weight is padded,
    and what is too much cut off. A weight with groups per input channel is put in 8 bits, blocks of 64 per
    output channel; one symmetric group per input channel is moved to the activations instead. A bias is
    added afterwards, in the model's own type.

    Missed when the codes are no matrix, and when exact weights lie beside them: such weights are decoded
    when the file is loaded.
    """

    name: ClassVar[str] = "lower-cuda"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    precision: Literal["fp16", "model"] = option(
        "fp16", help="fp16: activations and scales cast to fp16; model: the model's own type (slower kernels)"
    )
    ic: Literal["requantize", "exact"] = option(
        "requantize", help="per-input-channel groups: put in 8 bits per output channel, or decoded at load"
    )

    def apply(self, model: Model, remarks: Remarks) -> None:
        job = _Job(model, remarks, self)
        for node in model.nodes("MatMul", "Gemm"):
            for index in (1, 0):
                weight = encoded_input(node.inputs[index])
                if weight is not None:
                    job.lower(node, index, weight)
                    break


@dataclass(frozen=True, eq=False)
class _Stored:
    """A weight in the kernel's form, in the graph.

    Attributes:
        layout: of its blocks.
        columns: output channels, padding included.
        codes, scales, zero_points: constants.
        factor: what the activations are multiplied by first, ``[K]``, or None.
        text: what was done, for the remark.
    """

    layout: Layout
    columns: int
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    factor: ir.Value | None
    text: str


class _Job:
    def __init__(self, model: Model, remarks: Remarks, options: LowerCuda) -> None:
        self.model, self.remarks, self.options = model, remarks, options
        self._stored: dict[tuple[int, int, float], _Stored | str] = {}
        self._cast: dict[tuple[int, int, ir.DataType], ir.Value] = {}

    def lower(self, node: ir.Node, index: int, weight: EncodedInput) -> None:
        """Put one product on the kernel, or remark why not."""
        model = self.model
        reason = why_not_linear(node, index)
        if reason is None and index == 1:
            linear = read_linear(node)
            k_axis = int(weight.transposed) ^ int(linear.transposed)
            key = id(weight.value), k_axis, linear.alpha
            if key not in self._stored:
                self._stored[key] = self._store(node, weight, k_axis, linear.alpha)
            stored = self._stored[key]
            if isinstance(stored, str):
                reason = stored
        if reason is not None:
            self.remarks.missed(node, f"its weight '{weight.name}' is decoded at load: {reason}")
            return
        assert isinstance(stored, _Stored)
        layout, source = stored.layout, weight.dequantize
        scale_type = stored.scales.dtype or weight.encoding.dtype
        x = node.inputs[0]
        assert x is not None
        if stored.factor is not None:
            x = put_named(model, f"{weight.name}.scaled", node, "Mul", [x, stored.factor])
            x.type = ir.TensorType(weight.encoding.dtype)
        narrow = scale_type != weight.encoding.dtype
        if narrow:
            x = self._as(x, scale_type, node)
        attributes = {
            "K": layout.inputs,
            "N": stored.columns,
            "bits": layout.bits,
            "block_size": layout.block,
        }
        new = put(
            node,
            "MatMulNBits",
            [x, stored.codes, stored.scales, stored.zero_points],
            attributes,
            domain=MICROSOFT,
            like=node,
        )
        copy_note(source, new)
        import_domain(model, new)
        result = new.outputs[0]
        result.name = model.unique_name(f"{weight.name}.product")
        if stored.columns != layout.outputs:
            bounds = [
                model.add_initializer(graph_of(node), f"{weight.name}.{role}", np.array([number], np.int64))
                for role, number in (("from", 0), ("to", layout.outputs), ("axis", -1))
            ]
            result = put_named(model, f"{weight.name}.real", node, "Slice", [result, *bounds])
        if narrow:
            kind = int(weight.encoding.dtype)
            result = put_named(model, f"{weight.name}.wide", node, "Cast", [result], to=kind)
        rest = node.inputs[2] if len(node.inputs) > 2 else None
        if rest is not None and linear.beta != 0:
            result = add_rest(model, node, result, rest, linear.beta)
        read = node.inputs[1]
        chain = [read.producer()] if read is not None else []
        take_over(model, node, result)
        remove_unread([step for step in chain if step is not None])
        self.remarks.passed(new, stored.text, **dataclasses.asdict(layout))

    def _as(self, x: ir.Value, kind: ir.DataType, node: ir.Node) -> ir.Value:
        """A value cast to fp16, once in a graph for all that read it."""
        key = id(x), id(graph_of(node)), kind
        if key not in self._cast:
            cast = put_named(self.model, f"{x.name}.half", node, "Cast", [x], to=int(kind))
            cast.type, cast.shape = ir.TensorType(kind), x.shape
            self._cast[key] = cast
        return self._cast[key]

    def _store(self, node: ir.Node, weight: EncodedInput, k_axis: int, alpha: float) -> _Stored | str:
        """The weight's constants, or why the kernel does not take it."""
        encoding, text, factor = weight.encoding, "", None
        if encoding.outliers is not None:
            return "it keeps exact weights beside the codes, which no kernel of the provider takes"
        groups = groups_of_linear(node, weight)
        if groups is not None:
            if self.options.ic == "exact":
                return "as asked (ic=exact)"
            if groups.count == 1 and encoding.zero_points is None and encoding.codes.dtype.is_signed():
                encoding, factor = _without_scales(groups), groups.scales()[0]
                text = "; the scale of each input channel is moved to the activations"
            else:
                encoding = _requantized(self.model, weight, k_axis)
                text = f"; its groups per input channel requantized to 8 bits, blocks of {REQUANTIZED_BLOCK}"
        layout = plan(encoding, k_axis)
        if isinstance(layout, str):
            return layout
        scales = block_scales(encoding, layout) * encoding.scales.dtype.type(alpha)
        if self.options.precision == "fp16":
            with np.errstate(over="ignore"):
                half = scales.astype(np.float16)
            if bool(np.all(np.isfinite(half))) and np.array_equal(half == 0, scales == 0):
                scales = half
            else:
                text += "; its scales are out of reach of fp16, so it stays in the model's type, on slower kernels"
        name, graph = weight.name, graph_of(weight.dequantize)
        columns = -(-layout.outputs // COLUMNS[layout.bits]) * COLUMNS[layout.bits]
        more = columns - layout.outputs
        zeros = block_zero_points(encoding, layout)
        points = None
        if zeros is not None:
            points = pack_rows(np.pad(zeros, ((0, more), (0, 0))), layout.bits)
        add = self.model.add_initializer
        return _Stored(
            layout,
            columns,
            add(graph, f"{name}.blocks", _blocks(encoding.codes, layout, more)),
            add(graph, f"{name}.block_scales", np.pad(scales, ((0, more), (0, 0)))),
            None if points is None else add(graph, f"{name}.block_zero_points", points),
            None if factor is None else add(graph, f"{name}.factors", factor.astype(encoding.scales.dtype)),
            _outcome(layout, more, scales.dtype) + text,
        )


def plan(encoding: Encoding, k_axis: int) -> Layout | str:
    """The layout an encoding per output channel has on the CUDA provider, or why ``MatMulNBits`` cannot hold it.

    The largest block of the fast kernels that divides a group and the input channels; where there is none,
    one that at least the provider's other kernels take.
    """
    group = rows_of_groups(encoding, k_axis)
    if isinstance(group, str):
        return group
    inputs, outputs = encoding.shape[k_axis], encoding.shape[1 - k_axis]
    bits = 4 if encoding.stored_bits <= 4 else 8
    whole = group >= inputs
    block = next((b for b in FAST_BLOCKS if inputs % b == 0 and (whole or group % b == 0)), None)
    block = block or next((b for b in FAST_BLOCKS if whole or group % b == 0), None)
    block = block or block_size(group, inputs, bits)
    if block is None:
        return f"blocks have 16, 32, 64, 128 or 256 codes, and none of these divides its groups of {group}"
    return Layout(bits, block, group, inputs, outputs, k_axis)


def _outcome(layout: Layout, more: int, dtype: np.dtype[np.floating]) -> str:
    text = f"MatMulNBits in {dtype.name}, {layout.bits} bits, blocks of {layout.block}"
    if more:
        text += f"; {more} output channels of padding, cut off again"
    if layout.inputs % layout.block or layout.block not in FAST_BLOCKS:
        text += f"; {layout.inputs} input channels in groups of {layout.group} are not for the provider's fast kernels"
    return text


def _blocks(codes: ir.TensorProtocol, layout: Layout, more: int) -> ir.TensorProtocol:
    """The codes in block layout with ``more`` output channels of zeros; a large weight's are made when saved."""

    def made() -> ir.TensorProtocol:
        return ir.Tensor(np.pad(block_codes(codes, layout), ((0, more), (0, 0), (0, 0))))

    if codes.nbytes < SPILL_BYTES:
        return made()
    shape = ir.Shape((layout.outputs + more, layout.blocks, layout.block_bytes))
    return ir.LazyTensor(made, ir.DataType.UINT8, shape)


def _without_scales(groups: InputGroups) -> Encoding:
    """The bare integers of a weight with one scale per input channel."""
    encoding = groups.encoding
    return dataclasses.replace(
        encoding,
        scales=np.ones(groups.outputs, encoding.scales.dtype),
        axis=1 - groups.k_axis,
        block_size=0,
    )


def _requantized(model: Model, weight: EncodedInput, k_axis: int) -> Encoding:
    """The weight in 8 bits, in blocks along the input channels."""
    encoding = weight.encoding
    grid = Grid(REQUANTIZED_BITS, REQUANTIZED_BLOCK)
    storage = code_type(REQUANTIZED_BITS, True, model.opset)
    done = quantize(decode(encoding), k_axis, grid, storage)
    assert done is not None  # a grid without a limit on its error takes every weight
    block = grid.block(encoding.shape[k_axis])
    return Encoding(
        codes=model.scratch.tensor(weight.name, done.packed.view(np.int8).reshape(encoding.shape), storage),
        scales=done.scales,
        zero_points=None,
        axis=k_axis if block else 1 - k_axis,
        block_size=block,
        bits=REQUANTIZED_BITS,
        shape=encoding.shape,
        weight=weight.name,
    )
