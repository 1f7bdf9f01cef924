"""fuse-lora-branches: parallel linear branches become part of the weight they stand beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import recognise
from effic.ir.model import Model, describe, sole_consumer
from effic.ir.tensors import borrow
from effic.passes.adapters.linear_paths import (
    LinearMap,
    Product,
    Step,
    check_alike,
    path_of,
    read_path,
    read_product,
    read_scale,
)
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.cleanup.scopes import is_unused, prune
from effic.passes.fuse.affine import rounded
from effic.passes.fuse.layers import finite
from effic.passes.fuse.reading import Refused, WeightRef, rank_of
from effic.passes.fuse.sum_tree import SUMS, is_inner, is_sum, terms_of


class Pair(NamedTuple):
    """The parts of two paths, from the terms up to the tensor that both read."""

    base: list[Step]
    branch: list[Step]


class Merged(NamedTuple):
    """What a branch did to a weight: its rank at most, and ``‖ΔW‖/‖W‖``."""

    weight: str
    rank: int
    relative: float
    cloned: bool


@dataclass(frozen=True)
class FuseLoRABranches(Pass):
    """Fold linear branches, such as unmerged adapters, into the weight of the layer beside them.

    Before:  y = Add(MatMul(x, w), Mul(MatMul(MatMul(x, a), b), scale))
    After:   y = MatMul(x, w2)              where w2 = w + scale * (a @ b)

    The base is a MatMul, Gemm, Conv or Gather (embedding); the branch is a row of such products from
    the same input, however low or high its rank: a convolution of the base's own kernel, strides and
    padding followed by 1x1 ones, a smaller table followed by a matrix, a plain product. Scalar scales
    anywhere, biases, casts between floats, Identity and Dropout may stand among them, and the sum may
    have other terms. What the branch adds as a constant stays as one Add. Several branches of one
    weight are folded one after another; products are formed in ``compute_dtype`` (float64 for float64
    weights) and rounded once. A weight that other nodes read as well is copied first.

    Missed when a, b or the scale are graph inputs (the adapter is switchable), when a tensor on the way
    is read elsewhere, when something between the products is not linear, when the branches read
    different inputs, or when the base weight is quantized (merge-lora requantizes).
    """

    name: ClassVar[str] = "fuse-lora-branches"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    compute_dtype: Literal["float32", "float64"] = option("float32", help="type the products are formed in")

    def apply(self, model: Model, remarks: Remarks) -> None:
        for root in model.nodes(*SUMS):
            if is_sum(root) and not is_inner(root) and not is_unused(root):
                self._merge_sum(root, model, remarks)

    def _merge_sum(self, root: ir.Node, model: Model, remarks: Remarks) -> None:
        paths = {term: path_of(term, root.graph, model) for term in terms_of(root)[1]}
        candidates = [t for t, path in paths.items() if any(s.role == "product" for s in path)]
        if len(candidates) < 2:
            return
        where, settled, refused, apart = describe(root), set(), [], []
        for base in candidates:
            for term in candidates:
                if term is base or term in settled or base in settled:
                    continue
                pair = match(paths[base], paths[term])
                if pair is None:
                    apart.append((base, term))
                    continue
                node = _product(pair.base).node
                try:
                    done = merge(pair, term, model, self.compute_dtype)
                except Refused as refusal:
                    refused.append((base, term, str(refusal)))
                    continue
                settled.add(term)
                copied = ", a copy of its own," if done.cloned else ""
                remarks.passed(
                    node,
                    f"a branch of rank {done.rank} went into '{done.weight}'{copied} and moved it by "
                    f"{100 * done.relative:.2g} %",
                    rank=done.rank,
                    relative=done.relative,
                )
        reasons = [why for base, term, why in refused if not {base, term} & settled]
        if reasons:
            remarks.missed(where, reasons[0])
        elif not settled:
            first = next(((b, t) for b, t in apart if _depth(paths[b]) <= _depth(paths[t])), apart[0])
            remarks.missed(where, why_apart(paths[first[0]], paths[first[1]], model))


def _depth(path: Sequence[Step]) -> int:
    return sum(step.role == "product" for step in path)


def _product(path: Sequence[Step]) -> Step:
    return next(step for step in path if step.role == "product")


def _inputs(path: Sequence[Step]) -> dict[ir.Value, int]:
    """The tensors that a path with one product may be said to start from: each with its end in the path."""
    found: dict[ir.Value, int] = {}
    products = 0
    for index, step in enumerate(path):
        products += step.role == "product"
        if products > 1:
            break
        if products:
            found.setdefault(step.source, index + 1)
    return found


def match(base: list[Step], branch: list[Step]) -> Pair | None:
    """The parts of two paths below the nearest tensor both come from, the base's with one product."""
    starts, products = _inputs(base), 0
    for index, step in enumerate(branch):
        products += step.role == "product"
        if products and step.source in starts:
            return Pair(base[: starts[step.source]], branch[: index + 1])
    return None


def why_apart(base: list[Step], branch: list[Step], model: Model) -> str:
    """Why no tensor feeds both paths, as a sentence."""
    starts, end = _inputs(base), branch[-1].source
    node = end.producer()
    for value in () if node is None else node.inputs:
        if node is not None and value is not None and node.graph is not None:
            above = path_of(value, node.graph, model)
            if value in starts or any(step.source in starts for step in above):
                return f"{describe(node)}, which is not linear, lies between the products of a branch"
    start = next(iter(starts))
    return f"its branches read different inputs ('{start.name}' and '{end.name}')"


def merge(pair: Pair, term: ir.Value, model: Model, compute_dtype: str) -> Merged:
    """Add a branch to the weight of its base, and take it out of the sum.

    Raises:
        Refused: it cannot be, with the reason; nothing was changed.
    """
    base = _read_base(pair.base)
    # What lies before the first product is the input, which others may read.
    inner = max(i for i, step in enumerate(pair.branch) if step.role == "product")
    for step in pair.branch[: inner + 1]:
        if step.is_shared:
            raise Refused(f"the output of {describe(step.node)} is read elsewhere")
    wide = compute_dtype == "float64" or base.weight.tensor.dtype == ir.DataType.DOUBLE
    found = read_path(pair.branch, np.float64 if wide else np.float32)
    check_alike(base, found.products)
    scale = base.factor * _scale(pair.base)
    if scale == 0 or not np.isfinite(scale):
        raise Refused(f"the base {describe(base.node)} is scaled by {scale:g}")
    _check_stack(base, found, pair.base[-1].source)
    delta = found.matrix()
    if scale != 1:
        delta = delta / delta.dtype.type(scale)
    shape = base.weight.shape
    whole = shape if base.kind == "matrix" and len(shape) > 2 else None
    expected = whole or _matrix_shape(base)
    if delta.shape[-2:] != expected[-2:] or not _broadcasts(delta.shape, expected):
        raise Refused(f"a branch of shape {list(delta.shape)} does not fit the weight {list(expected)}")
    new, relative = _added(base, np.broadcast_to(delta, expected))
    name, cloned = base.weight.name, False
    if new is not None:
        name, cloned = _store(base, new, model)
    _take_out(term, found.shift, base, pair, model)
    return Merged(name, found.rank, relative, cloned)


def _read_base(path: Sequence[Step]) -> Product:
    step = _product(path)
    for below in path[: path.index(step) + 1]:
        if below.is_shared:
            raise Refused(f"the output of {describe(below.node)} is read elsewhere")
    for above in path[path.index(step) + 1 :]:
        if above.role == "shift":
            raise Refused(f"{describe(above.node)} shifts the input of the base")
    try:
        return read_product(step.node)
    except Refused:
        index = 0 if step.node.op_type == "Gather" else 1
        if recognise(step.node.inputs[index]) is not None:
            raise Refused(
                f"the weight of {describe(step.node)} is quantized; "
                "merge-lora with its option requantize merges adapter files into such weights"
            ) from None
        raise


def _scale(path: Sequence[Step]) -> float:
    return float(np.prod([read_scale(step) for step in path if step.role == "scale"]))


def _matrix_shape(base: Product) -> tuple[int, ...]:
    shape = base.weight.shape
    if base.kind == "conv":
        return int(np.prod(shape[1:])), shape[0]
    return (shape[1], shape[0]) if base.turned else shape


def _check_stack(base: Product, found: LinearMap, source: ir.Value) -> None:
    """Refuse stacks of matrices where the input may be a vector: its product has no row to broadcast."""
    stacked = any(len(product.weight.shape) > 2 and product.kind == "matrix" for product in found.products)
    stacked = stacked or (base.kind == "matrix" and len(base.weight.shape) > 2)
    if stacked and (rank_of(source) or 0) < 2:
        raise Refused("its weights are stacks of matrices, and its input may be a vector")
    if stacked and found.shift is not None:
        raise Refused("its weights are stacks of matrices, and the branch has a bias")


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _added(base: Product, delta: np.ndarray) -> tuple[np.ndarray | None, float]:
    """The constant plus the delta as it is stored (None: no change), and ``‖ΔW‖/‖W‖``."""
    laid_out = base.as_stored(delta)
    size = float(np.linalg.norm(delta.reshape(-1)))
    with borrow(base.weight.tensor) as array:
        wide = np.array(array, dtype=delta.dtype, order="C")
    norm = float(np.linalg.norm(wide.reshape(-1)))
    if size == 0:
        return None, 0.0
    # Zeros are not added: -0.0 keeps its sign, and untouched weights their bits.
    np.add(wide, laid_out, out=wide, where=laid_out != 0)
    return finite(rounded(wide, base.weight.tensor.dtype.numpy())), size / norm if norm else np.inf


def _store(base: Product, array: np.ndarray, model: Model) -> tuple[str, bool]:
    """Put the merged constant where the old one is, or beside it where others read that."""
    ref, node = base.weight, base.node
    dtype = ref.tensor.dtype
    if ref.shared:
        index = 0 if node.op_type == "Gather" else 1
        copy = model.add_initializer(
            ref.graph, ref.name, np.ascontiguousarray(array.transpose(ref.perm)), dtype
        )
        node.replace_input_with(index, copy)
        return str(copy.name), True
    constant = _constant(ref)
    name = str(constant.name)
    tensor = model.scratch.tensor(name, array, dtype)
    maker = constant.producer()
    if maker is not None:
        maker.attributes.add(ir.AttrTensor("value", tensor))
    constant.const_value = tensor
    return name, False


def _constant(ref: WeightRef) -> ir.Value:
    """The constant at the far end of Identity and Transpose nodes."""
    value = ref.value
    while (node := value.producer()) is not None and node.op_type != "Constant":
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value


def _take_out(term: ir.Value, shift: np.ndarray | None, base: Product, pair: Pair, model: Model) -> None:
    """Let the sum do without a term, or add what is constant of it."""
    node, maker = sole_consumer(term), term.producer()
    if node is None:
        return
    index = list(node.inputs).index(term)
    if shift is not None and shift.any():
        if base.kind == "conv":
            shift = shift.reshape(-1, *[1] * (len(base.weight.shape) - 2))
        dtype = _dtype(term, pair.branch, base)
        constant = model.add_initializer(
            base.weight.graph, f"{base.weight.name}.branch_bias", finite(rounded(shift, dtype.numpy())), dtype
        )
        node.replace_input_with(index, constant)
        prune([maker])
        return
    left = [value for i, value in enumerate(node.inputs) if i != index and value is not None]
    if len(left) == 1:
        model.replace_value(node.outputs[0], left[0])
        prune([node])
        return
    for i, value in enumerate(left):
        node.replace_input_with(i, value)
    node.resize_inputs(len(left))
    prune([maker])


def _dtype(term: ir.Value, branch: Sequence[Step], base: Product) -> ir.DataType:
    """Element type of a term: as stated, or as the last cast or the weights say."""
    if term.dtype is not None:
        return term.dtype
    for step in branch:
        if step.node.op_type == "Cast":
            return ir.DataType(step.node.attributes["to"].as_int())
        if step.role == "product":
            return read_product(step.node).weight.tensor.dtype
    return base.weight.tensor.dtype
