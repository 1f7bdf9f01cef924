"""lower-outliers: compressed matrices with exact weights beside the codes, on the n-bit kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effic.backends.ort.blocks import INT8_ACTIVATIONS, plan
from effic.backends.ort.linear import read_linear, why_not_linear
from effic.backends.ort.outlier_forms import (
    REQUANTIZED_BLOCK,
    Corrections,
    Emitter,
    corrections,
    costs,
    fastest,
    known_rows,
)
from effic.backends.ort.scenes import (
    EncodedInput,
    encoded_input,
    graph_of,
    put,
    put_named,
    remove_unread,
    take_over,
)
from effic.ir.encodings import Encoding, build, code_type, decode, encoding_nodes
from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.quantize.affine import Grid, quantize


@dataclass(frozen=True)
class LowerOutliers(Pass):
    """Take exact weights (outliers) out of a compressed matrix and add their share to the product.

    Before:  y = MatMul(x, ScatterElements(DequantizeLinear(codes, scales), places, outliers))
    After:   y = ScatterElements<add>(MatMul(x, DequantizeLinear(codes, scales)), columns,
             GatherElements(x, rows) * outliers)

    The matrix can then run on MatMulNBits. ``form`` says how the share is computed; ``auto`` takes what
    is expected to be fastest among the forms that keep the outliers exact, for the rows the model
    states, else for one row.

    Missed when the weight is decoded at load for something else anyway (a look-up, a left operand, a
    graph output), when MatMulNBits does not take the codes, and when decoding is expected to be faster.
    """

    name: ClassVar[str] = "lower-outliers"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    form: Literal["auto", "coo", "gather", "ell", "requantize", "fold"] = option(
        "auto",
        help="coo: element by element; gather: channels full of outliers; ell: rows of outliers per output; "
        "requantize: all in 8 bits; fold: decode at load",
    )
    accuracy_level: int = option(
        INT8_ACTIVATIONS, ge=0, le=4, help="of MatMulNBits; 4: activations rounded to 8 bits per block"
    )

    def apply(self, model: Model, remarks: Remarks) -> None:
        for weight, products in _weights(model):
            if reason := self._why_not(weight, products):
                remarks.missed(weight.name, f"its outliers are put in their places at load: {reason}")
                continue
            linear = {node: read_linear(node) for node in products}
            keys = {node: (_k_axis(node, weight), linear[node].alpha) for node in products}
            sparse = {key: corrections(weight.encoding, *key) for key in set(keys.values())}
            form, figures = self._choose(products, [sparse[keys[node]] for node in products])
            text = _comparison(form, figures, _rows(products), self.form != "auto")
            if form == "fold":
                remarks.missed(weight.name, f"its outliers are put in their places at load: {text}")
                continue
            if form == "requantize":
                _requantize(model, weight)
            else:
                _split(model, weight, products, form, keys, sparse)
            share = len(_outlier_values(weight.encoding)) / max(weight.encoding.elements, 1)
            remarks.passed(
                weight.name, f"{100 * share:.2f} % exact weights, {text}", form=form, expected_us=figures
            )

    def _why_not(self, weight: EncodedInput, products: list[ir.Node]) -> str | None:
        """Why the weight is decoded at load, or None."""
        encoding = weight.encoding
        if others := sorted(_other_readers(weight.value)):
            return f"the weight is decoded for {', '.join(others)} as well"
        if tuple(encoding.codes.shape) != encoding.shape or len(encoding.shape) != 2:
            return "it is no matrix of codes"
        for node in products:
            if reason := why_not_linear(node, 1):
                return reason
            if self.form == "requantize":
                if self.accuracy_level != INT8_ACTIVATIONS:
                    return (
                        f"at accuracy level {self.accuracy_level} the runtime has no fast kernel for 8 bits"
                    )
                continue
            bare = dataclasses.replace(encoding, outliers=None)
            layout = plan(bare, _k_axis(node, weight), self.accuracy_level)
            if isinstance(layout, str):
                return layout
        return None

    def _choose(self, products: list[ir.Node], sparse: list[Corrections]) -> tuple[str, dict[str, float]]:
        """The form, and what each form is expected to cost, in microseconds for all products."""
        total: dict[str, float] = {}
        for node, matrix in zip(products, sparse, strict=True):
            rows = known_rows(node.inputs[0])
            for form, cost in costs(matrix, 1 if rows is None else rows, self.accuracy_level).items():
                total[form] = total.get(form, 0.0) + cost
        figures = {form: round(cost, 1) for form, cost in total.items()}
        if self.form != "auto":
            return self.form, figures
        return fastest(total), figures


def _weights(model: Model) -> list[tuple[EncodedInput, list[ir.Node]]]:
    """Weights with outliers and the MatMuls and Gemms that read them, as any operand."""
    found: dict[int, tuple[EncodedInput, list[ir.Node]]] = {}
    for node in model.nodes("MatMul", "Gemm"):
        for value in node.inputs[:2]:
            weight = encoded_input(value)
            if weight is None or weight.encoding.outliers is None:
                continue
            entry = found.setdefault(id(weight.value), (weight, []))
            if node not in entry[1]:
                entry[1].append(node)
    return list(found.values())


def _other_readers(value: ir.Value) -> set[str]:
    """Who reads a decoded weight as something else than the right operand of a product."""
    found = {"the graph's output"} if value.is_graph_output() else set()
    for use in value.uses():
        if use.node.op_type == "Transpose":
            found |= _other_readers(use.node.outputs[0])
        elif use.node.op_type not in ("MatMul", "Gemm") or use.idx == 2:
            found.add(use.node.op_type)
        elif use.idx == 0:
            found.add(f"the left side of {use.node.op_type}")
    return found


def _k_axis(node: ir.Node, weight: EncodedInput) -> int:
    """Axis of the stored matrix that a product sums over."""
    seen = encoded_input(node.inputs[1])
    transposed = weight.transposed if seen is None else seen.transposed
    return int(transposed) ^ int(read_linear(node).transposed)


def _rows(products: list[ir.Node]) -> str:
    known = sorted({rows for node in products if (rows := known_rows(node.inputs[0])) is not None})
    if not known:
        return "1 row (the model does not say how many)"
    return "1 row" if known == [1] else f"{', '.join(map(str, known))} rows"


def _comparison(form: str, figures: dict[str, float], rows: str, asked: bool) -> str:
    others = ", ".join(f"{name} {cost:.0f}" for name, cost in figures.items() if name != form)
    why = "as asked" if asked else "the fastest to be expected" if form != "fold" else "expected to be faster"
    cost = f"{figures[form]:.0f} µs" if form in figures else "slow"
    return f"form {form}, {why}: {cost} for {rows}; {others} µs"


def _outlier_values(encoding: Encoding) -> np.ndarray:
    return np.empty(0) if encoding.outliers is None else encoding.outliers.values


def _split(
    model: Model,
    weight: EncodedInput,
    products: list[ir.Node],
    form: str,
    keys: dict[ir.Node, tuple[int, float]],
    sparse: dict[tuple[int, float], Corrections],
) -> None:
    """Let products read the codes alone and add the outliers' share to them."""
    emitter = Emitter(model, weight)
    emit = {"coo": emitter.coo, "gather": emitter.gather, "ell": emitter.ell}[form]
    chain = encoding_nodes(weight.value)
    weight.value.replace_all_uses_with(weight.dequantize.outputs[0])
    remove_unread(chain[:1])
    for node in products:
        matrix = sparse[keys[node]]
        if not matrix.values.size:
            continue
        x = node.inputs[0]
        assert x is not None
        bare = put(node, node.op_type, list(node.inputs), like=node)
        for attribute in node.attributes.values():
            bare.attributes.add(attribute)
        product, out = bare.outputs[0], node.outputs[0]
        product.name = model.unique_name(f"{out.name}.product")
        product.type, product.shape = out.type, out.shape
        # Sums in fp16 would lose what exact weights are kept for.
        half = weight.encoding.dtype == ir.DataType.FLOAT16
        name = f"{weight.name}.outliers"
        if half:
            x = put_named(model, f"{name}_x", node, "Cast", [x], to=int(ir.DataType.FLOAT))
            x.shape = node.inputs[0].shape if node.inputs[0] is not None else None
            product = put_named(model, f"{name}_y", node, "Cast", [product], to=int(ir.DataType.FLOAT))
        result = emit(node, x, product, keys[node], matrix)
        if half:
            result = put_named(model, f"{name}_half", node, "Cast", [result], to=int(ir.DataType.FLOAT16))
        result.type, result.shape = out.type, out.shape
        last = result.producer()
        assert last is not None
        last.metadata_props.update(node.metadata_props)
        take_over(model, node, result)


def _requantize(model: Model, weight: EncodedInput) -> None:
    """Put all weights, outliers included, on 8-bit grids of small blocks."""
    encoding, source = weight.encoding, weight.dequantize
    k_axis = next(
        _k_axis(node, weight)
        for node in model.nodes("MatMul", "Gemm")
        if (seen := encoded_input(node.inputs[1])) is not None and seen.value is weight.value
    )
    grid = Grid(8, REQUANTIZED_BLOCK)
    storage = code_type(8, True, model.opset)
    done = quantize(decode(encoding), k_axis, grid, storage)
    assert done is not None
    block = grid.block(encoding.shape[k_axis])
    coarse = Encoding(
        codes=model.scratch.tensor(weight.name, done.packed.view(np.int8).reshape(encoding.shape), storage),
        scales=done.scales,
        zero_points=None,
        axis=k_axis if block else 1 - k_axis,
        block_size=block,
        bits=8,
        shape=encoding.shape,
        weight=weight.name,
    )
    chain = encoding_nodes(weight.value)
    new = build(model, graph_of(source), coarse, weight.name, axis_name="oc", before=source)
    weight.value.replace_all_uses_with(new)
    remove_unread(chain[:1])
