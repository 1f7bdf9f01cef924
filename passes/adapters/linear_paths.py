"""Rows of linear operators from one tensor to a term of a sum: found, and read as one matrix.

A path is walked from the term upwards. Its products (MatMul, Gemm, Conv, and Gather from a table, which
is a product with a one-hot vector) may stand among scalar scales, constant shifts, casts between floats,
Identity and Dropout. A matrix of a path is ``[in, out]``; a convolution's ``in`` is ``I·k…``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import recognise
from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, describe, sole_consumer
from effic.ir.tensors import borrow
from effic.passes.fuse.reading import (
    FLOATS,
    Layout,
    Refused,
    WeightRef,
    float_attr,
    int_attr,
    is_pass_through,
    other_operand,
    per_channel,
    rank_of,
    read_vector,
    read_weight,
    read_window,
)

PRODUCTS = ("MatMul", "Gemm", "Conv", "Gather")

# Two products with a scale, a shift and a cast around each take ten; the limit keeps a model that is one
# long chain from being walked again for each of its sums.
MAX_STEPS = 24

Role = Literal["product", "scale", "shift", "pass"]


@dataclass(frozen=True, eq=False)
class Step:
    """One node of a path: ``value`` is what it makes of ``source``."""

    node: ir.Node
    source: ir.Value
    role: Role

    @property
    def value(self) -> ir.Value:
        """What the node makes."""
        return self.node.outputs[0]

    @property
    def is_shared(self) -> bool:
        """Whether more than one node reads what it makes."""
        return sole_consumer(self.value) is None


@dataclass(frozen=True, eq=False)
class Product:
    """A node that multiplies by a constant.

    Attributes:
        node: MatMul, Gemm, Conv or Gather.
        weight: the constant.
        turned: whether the node sees the matrix as ``[out, in]``.
        factor: Gemm's alpha.
    """

    node: ir.Node
    weight: WeightRef
    turned: bool = False
    factor: float = 1.0

    @property
    def kind(self) -> Literal["matrix", "conv", "table"]:
        """What it needs its input to be."""
        return {"Conv": "conv", "Gather": "table"}.get(self.node.op_type, "matrix")  # type: ignore[return-value]

    @property
    def outputs(self) -> int:
        """Output channels."""
        shape = self.weight.shape
        return int(shape[0] if self.turned or self.kind == "conv" else shape[-1])

    def matrix(self, dtype: type[np.floating]) -> np.ndarray:
        """The weight as ``[…, in, out]`` in ``dtype``."""
        with borrow(self.weight.tensor) as array:
            seen = array.transpose(self.weight.perm)
            if self.kind == "conv":
                seen = seen.reshape(len(seen), -1)
            if self.turned or self.kind == "conv":
                seen = np.swapaxes(seen, -1, -2)
            return np.array(seen, dtype=dtype, order="C")

    def as_stored(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix ``[…, in, out]`` laid out as the constant behind the node is."""
        if self.turned or self.kind == "conv":
            matrix = np.swapaxes(matrix, -1, -2)
        return matrix.reshape(self.weight.shape).transpose(np.argsort(self.weight.perm))

    def bias(self) -> np.ndarray | None:
        """What the node adds to each output channel, in float64.

        Raises:
            Refused: it is no constant, or differs within a channel.
        """
        value = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if value is None or self.node.op_type not in ("Gemm", "Conv"):
            return None
        if self.node.op_type == "Conv":
            return read_vector(value, "bias")
        layout = Layout(self.outputs, 2, last=True)
        return float_attr(self.node, "beta", 1.0) * per_channel(read_weight(value, "bias"), layout)


@dataclass(frozen=True, eq=False)
class LinearMap:
    """What a path does: ``y = factor · x @ (the product of the matrices) + shift``.

    Attributes:
        products: from the source on.
        matrices: theirs, likewise.
        factor: all scales.
        shift: ``[out]`` in float64, or None.
    """

    products: list[Product]
    matrices: list[np.ndarray]
    factor: float
    shift: np.ndarray | None

    @property
    def rank(self) -> int:
        """An upper bound of the rank of :meth:`matrix`."""
        return min(int(min(m.shape[-2:])) for m in self.matrices)

    def matrix(self) -> np.ndarray:
        """The one matrix ``[…, in, out]`` that all are.

        Raises:
            Refused: their shapes do not fit one another.
        """
        first, *others = self.matrices
        # The factor goes to the smallest, so that nothing the size of a weight is multiplied twice.
        smallest = min(self.matrices, key=lambda m: m.size)
        product = first * first.dtype.type(self.factor) if first is smallest else first
        for matrix in others:
            if product.shape[-1] != matrix.shape[-2]:
                raise Refused("the shapes of its products do not fit one another")
            product = product @ (matrix * matrix.dtype.type(self.factor) if matrix is smallest else matrix)
        return product


def path_of(term: ir.Value, graph: object, model: Model) -> list[Step]:
    """Steps from a term of a sum upwards for as long as its graph is linear."""
    steps: list[Step] = []
    value = term
    while len(steps) < MAX_STEPS:
        node = value.producer()
        step = None if node is None or node.graph is not graph else _step(node, model)
        if step is None:
            break
        steps.append(step)
        value = step.source
    return steps


def _step(node: ir.Node, model: Model) -> Step | None:
    if node.domain not in ONNX_DOMAINS or not node.inputs or node.inputs[0] is None:
        return None
    first = node.inputs[0]
    if is_pass_through(node, model) or _casts_to_float(node):
        return Step(node, first, "pass")
    if node.op_type == "Neg":
        return Step(node, first, "scale")
    if node.op_type == "Gather":
        indices = node.inputs[1]
        return Step(node, indices, "product") if indices is not None and _is_table(first) else None
    if node.op_type in PRODUCTS:
        return Step(node, first, "product")
    if node.op_type not in ("Mul", "Div", "Add") or len(node.inputs) != 2:
        return None
    if "axis" in node.attributes or "broadcast" in node.attributes:
        return None  # Broadcasting the way operator sets before 7 did.
    fixed = [v for v in node.inputs if constant_tensor(v) is not None or _is_switch(v)]
    if node.op_type == "Add":
        fixed = [v for v in fixed if constant_tensor(v) is not None]
    if len(fixed) != 1 or (node.op_type == "Div" and fixed[0] is first):
        return None
    source = other_operand(node, fixed[0]) if fixed[0] is not None else None
    return None if source is None else Step(node, source, "shift" if node.op_type == "Add" else "scale")


def _is_table(value: ir.Value) -> bool:
    """Whether a value is a table of floats, and not one of the shapes that Gathers move about."""
    if recognise(value) is not None:
        return True
    try:
        return read_weight(value).tensor.dtype in FLOATS
    except Refused:
        return _given(value) is not None


def _casts_to_float(node: ir.Node) -> bool:
    to = node.attributes.get("to") if node.op_type == "Cast" else None
    return to is not None and not to.is_ref() and to.as_int() in FLOATS


def _is_switch(value: ir.Value | None) -> bool:
    """Whether a value is a number that the caller may give."""
    if value is None or not value.is_graph_input() or value.shape is None:
        return False
    return all(dim == 1 for dim in value.shape)


def read_path(steps: Sequence[Step], dtype: type[np.floating]) -> LinearMap:
    """The map of a path.

    Args:
        steps: from the term upwards.
        dtype: of the matrices.

    Raises:
        Refused: something in it is no constant, or is not the same for all of a channel.
    """
    products: list[Product] = []
    matrices: list[np.ndarray] = []
    factor, shift = 1.0, None
    for step in reversed(steps):
        if step.role == "product":
            product = read_product(step.node)
            matrix = product.matrix(dtype)
            if products and shift is not None:
                if matrix.ndim != 2 or shift.size != matrix.shape[0]:
                    raise Refused("the shapes of its products do not fit one another")
                shift = product.factor * (shift @ matrix.astype(np.float64))
            bias = product.bias()
            if bias is not None:
                shift = bias if shift is None else shift + bias
            products.append(product)
            matrices.append(matrix)
            factor *= product.factor
        elif step.role == "scale":
            scale = read_scale(step)
            factor *= scale
            shift = None if shift is None else shift * scale
        elif step.role == "shift":
            if not products:
                raise Refused(f"{describe(step.node)} shifts its input")
            added = _read_shift(step, products[-1])
            shift = added if shift is None else shift + added
    if not np.isfinite(factor):
        raise Refused("its scale is not finite")
    return LinearMap(products, matrices, factor, shift)


def read_product(node: ir.Node) -> Product:
    """The constant a product multiplies by.

    Raises:
        Refused: it is none, or the node is of a form that is not understood.
    """
    if node.op_type == "Gather":
        table = _weight(node, 0)
        if len(table.shape) != 2 or int_attr(node, "axis", 0) not in (0, -2):
            raise Refused(f"{describe(node)} does not take whole rows of a table")
        return Product(node, table)
    if node.op_type == "MatMul" and constant_tensor(node.inputs[0]) is not None:
        raise Refused(f"{describe(node)} multiplies its weight from the left")
    weight = _weight(node, 1)
    if node.op_type == "Conv":
        if len(weight.shape) < 3:
            raise Refused(f"the weight of {describe(node)} has {len(weight.shape)} axes")
        return Product(node, weight)
    if len(weight.shape) < 2:
        raise Refused(f"the weight of {describe(node)} is a vector")
    if node.op_type == "MatMul":
        return Product(node, weight)
    if int_attr(node, "transA", 0):
        raise Refused(f"{describe(node)} transposes its input")
    return Product(node, weight, bool(int_attr(node, "transB", 0)), float_attr(node, "alpha", 1.0))


def _weight(node: ir.Node, index: int) -> WeightRef:
    value = node.inputs[index]
    try:
        return read_weight(value, "weight")
    except Refused as refusal:
        if value is not None and (given := _given(value)) is not None:
            raise Refused(
                f"the weight of {describe(node)} is the graph input '{given}', "
                "so the adapter can be switched at run time"
            ) from None
        raise Refused(f"{describe(node)}: {refusal}") from None


def _given(value: ir.Value) -> str | None:
    """Name of the graph input behind a value, through Identity and Transpose."""
    found: ir.Value | None = value
    while found is not None and (node := found.producer()) is not None:
        if node.op_type not in ("Identity", "Transpose", "Cast"):
            return None
        found = node.inputs[0]
    return str(found.name) if found is not None and found.is_graph_input() else None


def read_scale(step: Step) -> float:
    """The number a scale multiplies by.

    Raises:
        Refused: it is given by the caller, or is no single number.
    """
    if step.node.op_type == "Neg":
        return -1.0
    value = other_operand(step.node, step.source)
    tensor = constant_tensor(value)
    if tensor is None:
        name = value.name if value is not None else "?"
        raise Refused(f"its scale is the graph input '{name}', so the adapter can be switched at run time")
    rank = rank_of(step.source)
    if tensor.size != 1 or tensor.dtype not in FLOATS:
        raise Refused(f"its scale has {tensor.size} values, not one ({describe(step.node)})")
    if len(tensor.shape) > (0 if rank is None else rank) and len(tensor.shape) > 1:
        raise Refused(f"its scale (shape {tensor.shape}) may add an axis to the result")
    scale = float(np.asarray(tensor.numpy()).astype(np.float64).reshape(()))
    if step.node.op_type == "Div":
        scale = 1.0 / scale if scale else np.inf
    return scale


def _read_shift(step: Step, product: Product) -> np.ndarray:
    rank = len(product.weight.shape) if product.kind == "conv" else rank_of(step.source)
    layout = Layout(product.outputs, rank, last=product.kind != "conv")
    return per_channel(read_weight(other_operand(step.node, step.source), "shift"), layout)


def check_alike(base: Product, branch: Sequence[Product]) -> None:
    """Refuse a branch whose products cannot become one of the base's form.

    Args:
        base: the product that is to take the branch in.
        branch: the branch's, from the source on.

    Raises:
        Refused: with the reason.
    """
    first, *others = branch
    if base.kind != first.kind:
        raise Refused(f"{describe(first.node)} and {describe(base.node)} are of different kinds")
    if base.kind != "conv":
        if any(product.kind != "matrix" for product in others):
            raise Refused("a branch of matrix products goes through another kind of layer")
        return
    groups = int_attr(base.node, "group", 1)
    if groups != int_attr(first.node, "group", 1):
        raise Refused(f"{describe(first.node)} and {describe(base.node)} have different groups")
    if groups != 1 and others:
        raise Refused(f"the {groups} groups of {describe(base.node)} cannot hold a dense branch")
    if base.weight.shape[2:] != first.weight.shape[2:] or _sliding(base) != _sliding(first):
        raise Refused(
            f"{describe(first.node)} and {describe(base.node)} differ in kernel, strides, padding or dilation"
        )
    for product in others:
        if product.kind != "conv":
            raise Refused("a branch of convolutions goes through another kind of layer")
        window = read_window(product.node, product.weight.shape[2:], product.node.inputs[0])
        if not window.is_pointwise or int_attr(product.node, "group", 1) != 1:
            raise Refused(f"{describe(product.node)} is not a plain 1x1 convolution")


def _sliding(product: Product) -> tuple[object, ...]:
    """How a convolution slides, in a form that can be compared."""
    node, axes = product.node, len(product.weight.shape) - 2
    attr = node.attributes.get("auto_pad")
    auto_pad = "NOTSET" if attr is None or attr.is_ref() else attr.as_string()
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        # Both read the same tensor: the same words mean the same padding, whatever its size.
        plain = ("strides", "dilations")
        found = [tuple(a.as_ints()) if (a := node.attributes.get(key)) else (1,) * axes for key in plain]
        return (auto_pad, *found)
    return (read_window(node, product.weight.shape[2:], node.inputs[0]),)
