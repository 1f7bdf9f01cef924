"""Batch norms without a layer beside them: a row of them becomes one, or Mul and Add."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, describe
from effic.passes.fuse.affine import AffineMap, rounded
from effic.passes.fuse.layers import finite
from effic.passes.fuse.reading import (
    Layout,
    Orphans,
    Refused,
    dtype_of,
    rank_of,
    read_map,
    read_norm,
    refuse_broadcast,
)
from effic.passes.fuse.steps import Step, steps_after, steps_before


def merge_norms(norm: ir.Node, model: Model, orphans: Orphans, as_mul_add: bool) -> str | None:
    """Merge ``norm`` with the scales and shifts around it.

    Args:
        norm: a batch norm, kept as the merged one.
        model: its model.
        orphans: takes the constants that are no longer read.
        as_mul_add: write the result as Mul and Add, even when the norm stands alone.

    Returns:
        What was done, or None when the norm stands alone and stays.

    Raises:
        Refused: the norm is in training mode or not constant, or the result would overflow.
    """
    found = read_norm(norm, model)
    rank = rank_of(norm.inputs[0])
    row, total = _row(norm, found, rank, model)
    if len(row) == 1 and not as_mul_add:
        return None
    graph, source, last = norm.graph, row[0].value, row[-1].node.outputs[0]
    if graph is None:
        return None
    if as_mul_add:
        result = _mul_add(norm, total, source, rank, model)
    else:
        _rewrite_norm(norm, total, model, orphans)
        norm.replace_input_with(0, source)
        result = norm.outputs[0]
    others = [step for step in row if as_mul_add or step.node is not norm]
    if result is not last:
        model.replace_value(last, result)
    for step in reversed(row):
        if step in others:
            orphans.remove_node(step.node)
        for node in reversed(step.crossed):
            orphans.remove_node(node)
    if as_mul_add:
        return "written as Mul and Add" if len(row) == 1 else f"{len(row)} in a row written as Mul and Add"
    return f"{len(row)} scales and shifts in a row became one: " + ", ".join(describe(s.node) for s in others)


def _row(norm: ir.Node, found: AffineMap, rank: int | None, model: Model) -> tuple[list[Step], AffineMap]:
    layout = Layout(found.channels, rank)
    arithmetic = rank is not None  # Without it, nobody can say which axis a constant lies on.
    before = steps_before(norm.outputs[0], model, arithmetic)
    row, total = [before[-1]] if before else [], found
    for step in reversed(before[:-1]):
        try:
            refuse_broadcast(step.node, step.value, layout)
            total = read_map(step.node, step.value, layout, model).then(total)
        except Refused:
            break
        row.insert(0, step)
    row = [Step(row[0].node, row[0].value), *row[1:]]
    for step in steps_after(norm.outputs[0], model, arithmetic):
        try:
            total = total.then(read_map(step.node, step.value, layout, model))
        except Refused:
            break
        row.append(step)
    return row, total


def _rewrite_norm(norm: ir.Node, total: AffineMap, model: Model, orphans: Orphans) -> None:
    graph = norm.graph
    if graph is None:
        return
    channels = total.channels
    parts = (total.scale, total.shift, np.zeros(channels), np.ones(channels))
    new = []
    for index, (array, label) in enumerate(zip(parts, ("scale", "bias", "mean", "var"), strict=True), 1):
        tensor = constant_tensor(norm.inputs[index])
        if tensor is None:
            raise Refused("its statistics reach it through other nodes")
        new.append((f"{norm.name or norm.outputs[0].name}.{label}_fused", array, tensor.dtype))
    arrays = [finite(rounded(array, dtype.numpy())) for _, array, dtype in new]
    for index, ((label, _, dtype), array) in enumerate(zip(new, arrays, strict=True), 1):
        orphans.add(norm.inputs[index])
        norm.replace_input_with(index, model.add_initializer(graph, label, array, dtype))
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)


def _mul_add(norm: ir.Node, total: AffineMap, source: ir.Value, rank: int | None, model: Model) -> ir.Value:
    dtype = dtype_of(norm.outputs[0]) or dtype_of(source)
    graph = norm.graph
    if rank is None or dtype is None or graph is None:
        raise Refused("the type and number of axes of its input are not known")
    shape = (total.channels, *[1] * (rank - 2))
    result, base = source, norm.name or norm.outputs[0].name
    for op, array, skip in (("Mul", total.scale, total.only_shifts), ("Add", total.shift, total.only_scales)):
        if skip and not (op == "Add" and result is source):
            continue
        constant = finite(rounded(array.reshape(shape), dtype.numpy()))
        value = model.add_initializer(
            graph, f"{base}.{'scale' if op == 'Mul' else 'shift'}_fused", constant, dtype
        )
        node = ir.Node("", op, [result, value], num_outputs=1, metadata_props=dict(norm.metadata_props))
        node.outputs[0].name = model.unique_name(f"{base}_{op.lower()}")
        node.outputs[0].type, node.outputs[0].shape = norm.outputs[0].type, norm.outputs[0].shape
        graph.insert_before(norm, node)
        result = node.outputs[0]
    return result
