"""A model at one set of input shapes: sizes pinned, shape arithmetic folded away, functions inlined.

TVM's kernels are made for exact shapes, and its importer fails where a Reshape takes its target from
arithmetic on shapes. Here that arithmetic is evaluated: sizes are written into the inputs, and effic's
own passes fold what follows from them. The work is done on a clone whose weights stay where they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from effic.backends.tvm.expand import expand
from effic.backends.tvm.operators import has_to_be_expanded
from effic.ir.compressed import COMPRESSED_KEY, recognise_compressed
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.shapes import static_shapes
from effic.passes.base import Remarks
from effic.passes.cleanup.eliminate_dead_code import EliminateDeadCode
from effic.passes.cleanup.eliminate_identities import EliminateIdentities
from effic.passes.cleanup.fold_constants import FoldConstants

# Masks and tables of positions become constants; they are as long as a sequence, perhaps squared.
_MAX_GROWTH = 16 << 20
# Each round folds what the shapes of the one before it made constant; models nest a few deep.
_MAX_ROUNDS = 6

Dims = dict[str, int]


def parse_shapes(text: str) -> list[Dims]:
    """The buckets that ``batch=1,seq=64;batch=8,seq=64`` names; none for an empty text.

    Raises:
        UsageError: the text is no list of sizes.
    """
    buckets: list[Dims] = []
    for part in filter(None, (one.strip() for one in text.split(";"))):
        dims: Dims = {}
        for item in part.split(","):
            name, equals, size = (piece.strip() for piece in item.rpartition("="))
            if not (name and equals and size.isdecimal() and int(size) < 1 << 31):
                raise UsageError(
                    f"'{item.strip()}' in shapes is no size; write name=size, as in batch=1,seq=64;batch=8,seq=64"
                )
            if name in dims:
                raise UsageError(
                    f"shapes names '{name}' twice in '{part}'; separate buckets with a semicolon"
                )
            dims[name] = int(size)
        if dims not in buckets:
            buckets.append(dims)
    return buckets


def open_dims(model: Model) -> dict[str, set[int]]:
    """Names of the inputs' dimensions without a size, with the axes they are on, in order.

    A dimension that has no name either is called after its input and axis: ``x.0``.
    """
    found: dict[str, set[int]] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                found.setdefault(dim_name(value, axis), set()).add(axis)
    return found


def dim_name(value: ir.Value, axis: int) -> str:
    """What the open dimension on an axis of an input is called."""
    assert value.shape is not None
    dim = value.shape[axis]
    return str(dim) if isinstance(dim, ir.SymbolicDim) and dim.value else f"{value.name}.{axis}"


def specialize(model: Model, dims: Mapping[str, int]) -> Model:
    """The model at the given sizes, as a clone that shares the weights.

    Args:
        model: it is not changed.
        dims: sizes of open dimensions by name (see :func:`open_dims`); what they leave out stays open.

    Returns:
        The main graph without functions, its inputs' shapes pinned, constants folded.

    Raises:
        UsageError: a name that no input has.
    """
    if unknown := sorted(dims.keys() - open_dims(model).keys()):
        have = ", ".join(open_dims(model)) or "none: all its shapes are fixed"
        raise UsageError(
            f"shapes gives a size for '{unknown[0]}', and the model's open dimensions are {have}"
        )
    result = model.clone()
    if result.ir.functions:
        InlinePass()(result.ir)
        result.forget_names()
    for value in result.graph.inputs:
        if value.shape is not None:
            named = [dim_name(value, i) for i in range(len(value.shape))]
            value.shape = ir.Shape(
                [d if isinstance(d, int) else dims.get(n, n) for d, n in zip(value.shape, named, strict=True)]
            )
    _forget_shapes(result)
    sizes = None
    for _ in range(_MAX_ROUNDS):
        with _sealed(result):
            FoldConstants(max_growth=_MAX_GROWTH).apply(result, Remarks())
            EliminateIdentities().apply(result, Remarks())
        EliminateDeadCode().apply(result, Remarks())
        result.forget_names()
        _write_shapes(result)
        expanded = expand(result, [node for node in result.graph if has_to_be_expanded(node)])
        dropped = _drop_empty(result)
        now = sum(1 for _ in result.graph)
        if now == sizes and not expanded and not dropped:
            break
        sizes = now
    return result


def _forget_shapes(model: Model) -> None:
    """Drop the sizes of computed values, which follow from the inputs' and may name open dimensions."""
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if value.shape is not None and not value.shape.is_static():
                    value.shape = None


def _write_shapes(model: Model) -> None:
    # A model that onnx's inference cannot read has the types that it declares: no traceback for that.
    logger = logging.getLogger(ShapeInferencePass.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        ShapeInferencePass(check_type=False, strict_mode=False)(model.ir)
    finally:
        logger.disabled = disabled
    tensors = all(isinstance(value.type, ir.TensorType) for value in model.graph.inputs)
    if open_dims(model) or not tensors:
        return
    shapes = static_shapes(model, {})
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])


def _drop_empty(model: Model) -> bool:
    """Take tensors without elements (the past of a first token, say) out of what they are concatenated with.

    Returns:
        Whether there were any.
    """
    found = False
    for node in model.graph:
        if node.op_type != "Concat" or node.domain not in ("", "ai.onnx"):
            continue
        some = [v for v in node.inputs if v is None or v.shape is None or 0 not in v.shape]
        if 0 < len(some) < len(node.inputs):
            for index, value in enumerate(some):
                node.replace_input_with(index, value)
            node.resize_inputs(len(some))
            found = True
    return found


@contextlib.contextmanager
def _sealed(model: Model) -> Iterator[None]:
    """Take compressed weights out of sight of passes that would decompress them: inputs stand for them."""
    graph = model.graph
    taken: list[tuple[ir.Value, ir.Value, list[ir.Node]]] = []
    for value in _compressed(graph):
        found = recognise_compressed(value)
        if found is None:
            continue
        stand_in = ir.Value(name=model.unique_name(f"{value.name}.sealed"), type=value.type)
        stand_in.shape = ir.Shape(found.shape)
        stand_in.type = ir.TensorType(found.dtype)
        value.replace_all_uses_with(stand_in)
        graph.inputs.append(stand_in)
        nodes = [node for node in graph if node in set(found.nodes)]
        graph.remove(nodes)
        taken.append((value, stand_in, nodes))
    constants = dict(graph.initializers) if taken else {}
    try:
        yield
    finally:
        for value, stand_in, nodes in reversed(taken):
            graph.inputs.remove(stand_in)
            stand_in.replace_all_uses_with(value)
            if len(graph):
                graph.insert_before(graph[0], nodes)
            else:
                graph.extend(nodes)
        for name, constant in constants.items():
            if name not in graph.initializers and constant.uses():
                graph.register_initializer(constant)


def _compressed(graph: ir.Graph) -> list[ir.Value]:
    """The values that compressed weights decompress to: the last of each chain that still is one."""
    found = []
    for node in graph:
        if COMPRESSED_KEY not in node.metadata_props:
            continue
        value, best = node.outputs[0], None
        while True:
            if recognise_compressed(value) is not None:
                best = value
            readers = {use.node for use in value.uses()}
            if len(readers) != 1:
                break
            (reader,) = readers
            if (
                len(reader.outputs) != 1
                or reader.inputs[0] is not value
                or reader.op_type == "DequantizeLinear"
            ):
                break
            if best is not None and recognise_compressed(reader.outputs[0]) is None:
                break
            value = reader.outputs[0]
        if best is not None:
            found.append(best)
    return found
