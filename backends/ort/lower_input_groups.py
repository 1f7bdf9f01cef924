"""lower-input-groups: weights in groups along the output channels, on kernels that multiply integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effic.backends.ort.blocks import INT8_ACTIVATIONS
from effic.backends.ort.fold_input_scales import fold_input_scales
from effic.backends.ort.group_store import GroupStore, Parts
from effic.backends.ort.input_groups import TYPICAL_ROWS, InputGroups, groups_of_linear, speed, why_no_kernel
from effic.backends.ort.linear import Linear, add_rest, kernel_bias, read_linear, why_not_linear
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
from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks, option


@dataclass(frozen=True)
class LowerInputGroups(Pass):
    """Run weights whose groups lie along the output channels without decoding them.

    Before:  w = DequantizeLinear<axis=1, block_size=g>(codes, scales);  y = MatMul(x, w)
    After:   y = Concat(MatMulNBits(x * scales[0], codes[:, :g]), MatMulNBits(x * scales[1], …), …)

    A scale belongs to one input channel and ``g`` outputs, so the activations are multiplied by it
    instead, once per group. ``form=prefill`` multiplies with ``DynamicQuantizeMatMul``, which rounds
    all activations to 8 bits of one scale. What zero points take off comes from a MatMul with one
    column per group. With a single group the scales move into what makes ``x``, where all its readers
    agree on them.

    Missed when the weight is decoded for something else anyway (a look-up, a graph output), when no
    kernel has these codes, and when there are so many groups, or the matrix is so small, that the
    decoded weight is expected to be faster.
    """

    name: ClassVar[str] = "lower-input-groups"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    form: Literal["split", "prefill", "exact"] = option(
        "split", help="per group MatMulNBits, per group DynamicQuantizeMatMul, or left to be decoded"
    )
    accuracy_level: int = option(
        INT8_ACTIVATIONS, ge=0, le=4, help="of MatMulNBits; 4: activations rounded to 8 bits per block"
    )
    always: bool = option(False, help="also where the decoded weight is expected to be faster")

    def apply(self, model: Model, remarks: Remarks) -> None:
        if self.form == "exact":
            return
        sites = []
        for node in model.nodes("MatMul", "Gemm"):
            site = _read_site(node)
            if site is None:
                continue
            if reason := self._why_not(site):
                remarks.missed(node, reason)
            else:
                sites.append(site)
        # Before any node is replaced: who reads what is asked of the graph as it came.
        folded = fold_input_scales(model, {s.node: s.factor() for s in sites if s.can_fold()})
        store = GroupStore(model, self.accuracy_level)
        for site in sites:
            is_folded = site.node in folded
            parts = self._lower(store, site, is_folded)
            figures = {"form": self.form, "groups": site.groups.count, "group_size": site.groups.size}
            bits = parts.layouts[0].bits if parts.layouts else site.groups.encoding.stored_bits
            remarks.passed(
                site.name, self._outcome(site, parts, bits, is_folded), **figures, bits=bits, folded=is_folded
            )

    def _why_not(self, site: _Site) -> str | None:
        groups, name = site.groups, site.weight.name
        if reason := why_not_linear(site.node, 1):
            return reason
        if others := sorted(_other_readers(site.weight.value)):
            return f"its weight '{name}' is decoded for {', '.join(others)} as well"
        along = f"the groups of '{name}' run along the output channels"
        if reason := why_no_kernel(groups, self.form, self.accuracy_level):
            return f"{along}, and {reason}"
        rows = site.rows or TYPICAL_ROWS[self.form]
        gain = speed(groups, self.form, self.accuracy_level, rows)
        if gain >= 1 or self.always:
            return None
        count = "1 group" if groups.count == 1 else f"{groups.count} groups of {groups.size}"
        return (
            f"{along}: {count} in the {self.form} form are expected to run at {gain:.2f} times the speed of "
            f"the decoded weight for {rows} {'row' if rows == 1 else 'rows'} of activations"
        )

    def _lower(self, store: GroupStore, site: _Site, folded: bool) -> Parts:
        """Put the groups' kernels in the place of a node."""
        node, weight, groups, alpha = site.node, site.weight, site.groups, site.linear.alpha
        model, read, x = store.model, node.inputs[1], node.inputs[0]
        half = groups.encoding.dtype == ir.DataType.FLOAT16
        if half:
            # The kernels compute in fp32 anyway, and x * scale is often less than fp16 holds well.
            x = put_named(model, f"{site.name}.wide", node, "Cast", [x], to=int(ir.DataType.FLOAT))
        parts = store.blocks(weight, groups) if self.form == "split" else store.matrices(weight, groups)
        scaled: list[ir.Value | None] = [x] * groups.count
        if not folded:
            factors = store.factors(weight, groups, alpha)
            scaled = [put_named(model, f"{site.name}.scaled", node, "Mul", [x, s]) for s in factors]
        products = [self._product(store, site, parts, j, value) for j, value in enumerate(scaled)]
        offsets = store.offsets(weight, groups, parts.half, alpha, folded)
        if offsets is not None:
            products = _shifted(model, site, products, x, offsets)
        result = products[0]
        if len(products) > 1:
            result = put(node, "Concat", list(products), {"axis": -1}).outputs[0]
        if half:
            result = put(node, "Cast", [result], {"to": int(ir.DataType.FLOAT16)}).outputs[0]
        bias, rest = kernel_bias(model, node, site.linear, groups.outputs, groups.encoding)
        if bias is not None:
            result = add_rest(model, node, result, bias, 1.0)
        elif rest is not None:
            result = add_rest(model, node, result, rest, site.linear.beta)
        last = result.producer()
        if last is not None:
            last.name = node.name or last.name
            last.metadata_props.update(node.metadata_props)
        take_over(model, node, result)
        step = read.producer() if read is not None else None
        remove_unread([step] if step is not None else [])
        return parts

    def _product(
        self, store: GroupStore, site: _Site, parts: Parts, number: int, x: ir.Value | None
    ) -> ir.Value:
        """The product of scaled activations with the codes of one group."""
        node, home, codes = site.node, graph_of(site.weight.dequantize), parts.codes[number]
        if self.form == "split":
            layout = parts.layouts[number]
            unit = store.unit(home, layout.outputs, layout.blocks)
            attributes = {
                "K": layout.inputs,
                "N": layout.outputs,
                "bits": layout.bits,
                "block_size": layout.block,
                "accuracy_level": store.level,
            }
            new = put(node, "MatMulNBits", [x, codes, unit], attributes, domain=MICROSOFT)
        else:
            new = put(node, "DynamicQuantizeMatMul", [x, codes, store.unit(home)], domain=MICROSOFT)
        value = new.outputs[0]
        value.name = new.name = store.model.unique_name(f"{site.name}.group")
        copy_note(site.weight.dequantize, new)
        import_domain(store.model, new)
        return value

    def _outcome(self, site: _Site, parts: Parts, bits: int, folded: bool) -> str:
        groups = site.groups
        if self.form == "split":
            kernel = (
                f"MatMulNBits, {bits} bits, blocks of {parts.layouts[0].block}, accuracy level "
                f"{self.accuracy_level}"
            )
        else:
            kernel = (
                f"DynamicQuantizeMatMul, {bits} bits in the file, int8 in memory, all activations of a call on "
                "one 8-bit scale (about 1 % error, far more where one row or channel is much larger than the rest)"
            )
        if groups.count == 1:
            place = "folded into what makes them" if folded else "as a Mul"
            text = f"activations times the scales ({place}), then {kernel}"
        else:
            text = f"{self.form} into {groups.count} groups of {groups.size} output channels: {kernel}"
            text = text.replace("prefill into", "cut for prefill into")
        if groups.encoding.bits < bits:
            text += f"; {groups.encoding.bits}-bit codes stored as {bits}"
        gain = speed(groups, self.form, self.accuracy_level, site.rows or TYPICAL_ROWS[self.form])
        return f"{text}; expected speed {gain:.1f} times fp32"


@dataclass(frozen=True, eq=False)
class _Site:
    """A MatMul or Gemm with a weight in groups along its output channels."""

    node: ir.Node
    weight: EncodedInput
    groups: InputGroups
    linear: Linear

    @property
    def name(self) -> str:
        return self.node.name or str(self.node.outputs[0].name)

    @property
    def rows(self) -> int | None:
        """Rows of the activations as far as the model says, None when it says nothing."""
        x = self.node.inputs[0]
        if x is None or x.shape is None:
            return None
        known = [dim for dim in x.shape[:-1] if isinstance(dim, int)]
        rows = math.prod(known)
        # With one dimension open the product of the others is only the least there can be.
        return rows if len(known) == len(x.shape) - 1 or rows > 1 else None

    def can_fold(self) -> bool:
        """Whether another node might take the scales; fp16 would round them."""
        return self.groups.count == 1 and self.groups.encoding.dtype == ir.DataType.FLOAT

    def factor(self) -> np.ndarray:
        """What the activations are multiplied by when there is one group, ``[K]``."""
        factor: np.ndarray = self.groups.scales()[0] * np.float32(self.linear.alpha)
        return factor


def _read_site(node: ir.Node) -> _Site | None:
    weight = encoded_input(node.inputs[1])
    if weight is None:
        return None
    groups = groups_of_linear(node, weight)
    return None if groups is None else _Site(node, weight, groups, read_linear(node))


def _other_readers(value: ir.Value) -> set[str]:
    """Who reads a decoded weight as something else than the right operand of a product."""
    found = {"the graph's output"} if value.is_graph_output() else set()
    for use in value.uses():
        if use.node.op_type == "Transpose":
            found |= _other_readers(use.node.outputs[0])
        elif use.node.op_type not in ("MatMul", "Gemm") or use.idx != 1:
            found.add(use.node.op_type)
    return found


def _shifted(
    model: Model, site: _Site, products: list[ir.Value], x: ir.Value | None, offsets: ir.Value
) -> list[ir.Value]:
    """Products plus what the zero points add: ``x @ offsets``, a column per group."""
    node = site.node
    shift = put_named(model, f"{site.name}.shift", node, "MatMul", [x, offsets])
    shifts: list[ir.Value] = [shift]
    if len(products) > 1:
        count = len(products)
        split = ir.node("Split", [shift], attributes={"axis": -1, "num_outputs": count}, num_outputs=count)
        split.name = model.unique_name(f"{site.name}.shifts")
        graph_of(node).insert_before(node, split)
        shifts = list(split.outputs)
        for value in shifts:
            value.name = model.unique_name(f"{site.name}.shift")
    return [
        put_named(model, f"{site.name}.shifted", node, "Add", [product, value])
        for product, value in zip(products, shifts, strict=True)
    ]
