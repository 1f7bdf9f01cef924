"""A merged weight back into the form its base was compressed in, or kept beside it as a branch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import Encoding, Outliers, code_tensor
from effic.ir.errors import UnsupportedError
from effic.ir.model import Model, describe
from effic.ir.weights import WeightUse
from effic.passes.cleanup.scopes import prune
from effic.passes.quantize.affine import Grid, parameters

Requantize = Literal["new_params", "keep_params", "none", "keep_branch"]

BRANCH_KEY = "effic.lora_branch"
"""Metadata of the sum that ends a branch: the merge it was made by, for taking it away again."""

_SIGNED = (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8)


def requantized(
    model: Model, encoding: Encoding, weight: np.ndarray, how: Literal["new_params", "keep_params"]
) -> Encoding:
    """Another weight in the layout of an encoding: same groups, same widths, same outlier positions.

    Args:
        model: whose scratch folder takes large codes.
        encoding: of the base.
        weight: of ``encoding.shape``, finite.
        how: ``new_params``: scales (and zero points, where there are some) computed anew, by the rule the
            old ones look like; ``keep_params``: rounded and clipped to the grid that is there.
    """
    values = np.array(weight, dtype=np.float32).reshape(-1)
    outliers = encoding.outliers
    if outliers is not None:
        outliers = Outliers(outliers.indices, values[outliers.indices].astype(outliers.values.dtype))
        values[outliers.indices] = 0
    values = values.reshape(encoding.codes.shape.numpy())
    signed = encoding.codes.dtype in _SIGNED
    lowest = -(1 << (encoding.bits - 1)) if signed else 0
    highest = lowest + (1 << encoding.bits) - 1
    scales, zeros = encoding.scales, encoding.zero_points
    if how == "new_params":
        # Only the rule that wastes no level gives negative scales.
        rule: Literal["full", "absmax"] = "full" if (scales < 0).any() else "absmax"
        grid = Grid(encoding.bits, -1, symmetric=signed and zeros is None, scale=rule)
        low = np.minimum(_per_group(values, encoding, np.minimum), 0)
        high = np.maximum(_per_group(values, encoding, np.maximum), 0)
        scales, found = parameters(low, high, grid, np.dtype(scales.dtype))
        scales = np.asarray(scales).reshape(low.shape)
        if found is not None:
            zeros = (found.astype(np.int16) + lowest).astype(np.int8 if signed else np.uint8)
            zeros = zeros.reshape(low.shape)
    codes = values / _spread(scales.astype(np.float32), encoding)
    np.rint(codes, out=codes)
    if zeros is not None:
        codes += _spread(zeros.astype(np.float32), encoding)
    np.clip(codes, lowest, highest, out=codes)
    tensor = code_tensor(codes.astype(np.int8 if signed else np.uint8), encoding.codes.dtype)
    tensor = (
        model.scratch.tensor(encoding.codes.name or "", tensor.numpy(), encoding.codes.dtype)
        if encoding.stored_bits == 8
        else tensor
    )
    if zeros is not None and not zeros.any():
        zeros = None
    return dataclasses.replace(encoding, codes=tensor, scales=scales, zero_points=zeros, outliers=outliers)


def _per_group(values: np.ndarray, encoding: Encoding, reduce: np.ufunc) -> np.ndarray:
    """The smallest or largest value of each group, in the shape of the scales."""
    if encoding.block_size:
        starts = np.arange(0, values.shape[encoding.axis], encoding.block_size)
        return np.asarray(reduce.reduceat(values, starts, axis=encoding.axis))
    if encoding.scales.ndim == 0:
        return np.asarray(reduce.reduce(values, axis=None))
    others = tuple(axis for axis in range(values.ndim) if axis != encoding.axis)
    return np.asarray(reduce.reduce(values, axis=others))


def _spread(parameter: np.ndarray, encoding: Encoding) -> np.ndarray:
    """A parameter per group as one that broadcasts against the codes."""
    shape = encoding.codes.shape.numpy()
    if encoding.block_size:
        repeated = np.repeat(parameter, encoding.block_size, axis=encoding.axis)
        return np.take(repeated, range(shape[encoding.axis]), axis=encoding.axis)
    if parameter.ndim == 0:
        return parameter
    return parameter.reshape([-1 if axis == encoding.axis else 1 for axis in range(len(shape))])


def why_no_branch(uses: Sequence[WeightUse]) -> str | None:
    """Why an adapter cannot be kept as a branch beside the nodes that read its weight, or None."""
    for use in uses:
        node = use.node
        if node.op_type not in ("MatMul", "Gemm"):
            return f"is read by {describe(node)}; branches are kept beside MatMul and Gemm only"
        if use.index != 1 or node.attributes.get_int("transA", 0) != 0:
            return f"is the left operand of {describe(node)}, or that turns its input"
        if node.inputs[0] is None or node.outputs[0].name is None:
            return f"is read by {describe(node)}, which has no input"
    return None


def add_branch(
    model: Model, uses: Sequence[WeightUse], name: str, a: np.ndarray, b: np.ndarray, mark: str
) -> None:
    """Write ``y = base(x) + (x·Aᵀ)·Bᵀ`` at every use of a weight.

    Args:
        model: rewritten in place.
        uses: MatMul and Gemm nodes, see :func:`why_no_branch`.
        name: the weight's name; the constants are called ``name.lora_A`` and ``name.lora_B``.
        a: ``[r, in]`` in the dtype of the weight.
        b: ``[out, r]``, σ and the adapter's weight in it.
        mark: what :func:`remove_branches` knows the branch by.

    Raises:
        UnsupportedError: no graph owns a node.
    """
    shared: dict[tuple[int, float], tuple[ir.Value, ir.Value]] = {}
    for use in uses:
        node, graph = use.node, use.node.graph
        if graph is None:
            raise UnsupportedError(f"{describe(node)} belongs to no graph")
        owner = graph if isinstance(graph, ir.Graph) else graph.graph
        alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
        key = (id(owner), alpha)
        if key not in shared:
            shared[key] = (
                model.add_initializer(owner, f"{name}.lora_A", np.ascontiguousarray(a.T)),
                model.add_initializer(
                    owner, f"{name}.lora_B", np.ascontiguousarray((b * b.dtype.type(alpha)).T)
                ),
            )
        first, second = shared[key]
        out = node.outputs[0]
        inner = ir.node("MatMul", [node.inputs[0], first], name=f"{name}.lora_A.MatMul")
        outer = ir.node("MatMul", [inner.outputs[0], second], name=f"{name}.lora_B.MatMul")
        add = ir.node("Add", [outer.outputs[0], outer.outputs[0]], name=f"{name}.lora.Add")
        for made in (inner, outer, add):
            # Of its own also where several nodes read the weight: runtimes take no two nodes of one name.
            made.name = made.outputs[0].name = model.unique_name(made.name or name)
            made.outputs[0].type = out.type
        outer.outputs[0].shape = add.outputs[0].shape = out.shape
        owner.insert_after(node, [inner, outer, add])
        add.metadata_props[BRANCH_KEY] = mark
        model.replace_value(out, add.outputs[0])
        if out.name is None:
            out.name = model.unique_name(f"{name}.base")
        add.replace_input_with(0, out)


def remove_branches(model: Model, mark: str) -> list[str]:
    """Take the branches of a mark away; the names of the nodes they stood beside."""
    found = [node for node in model.nodes("Add") if node.metadata_props.get(BRANCH_KEY) == mark]
    names = []
    for add in found:
        base, branch = add.inputs
        if base is None or branch is None:
            continue
        node = base.producer()
        names.append(describe(node) if node is not None else str(base.name))
        model.replace_value(add.outputs[0], base)
        prune([add])
    return names


def norm(array: np.ndarray) -> float:
    """Frobenius norm, summed in float64."""
    flat = array.reshape(-1)
    step = 1 << 18
    return math.sqrt(
        sum(
            float(np.dot(part, part))
            for at in range(0, flat.size, step)
            for part in (flat[at : at + step].astype(np.float64),)
        )
    )
