"""Raise a model's standard operator set, node by node, with onnx's version converter.

The converter takes whole models, and loses what it does not know: functions, metadata, weights over
2 GiB, the insides of subgraphs. So it is given one node at a time, as a model of its own, and what
comes back replaces that node where it differs. Everything else is left exactly as it was.
"""

from __future__ import annotations

import onnx
import onnx.helper
import onnx.version_converter
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, describe

# Constants up to this size are shown to the converter (axes, pads, scales); weights never matter.
_SHOWN_BYTES = 1024
# The first opset the checks of onnx's converter are complete for; older files are read, not raised.
_OLDEST = 7
_SOFTMAX = ("Softmax", "LogSoftmax", "Hardmax")


def raise_opset(model: Model, version: int) -> str | None:
    """Raise the standard operator set to ``version``, all or nothing.

    Args:
        model: changed in place; names of inputs, outputs and initializers stay.
        version: the opset wanted. A model that has it or a newer one is left alone.

    Returns:
        None when the model is at ``version`` or above, else a sentence: why it cannot be raised.
    """
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        return f"opset {version} is newer than the installed onnx knows ({newest})"
    converter = _Converter(version)
    jobs: list[tuple[ir.Node, ir.Model | ir.Attr]] = []
    raised: list[dict[str, int]] = []
    owners: list[ir.Graph | ir.Function] = [model.ir.graph, *model.ir.functions.values()]
    for owner in owners:
        current = owner.opset_imports.get("", 0)
        if not current or current >= version:
            continue
        if current < _OLDEST:
            return f"opset {current} is older than the converter is trusted with ({_OLDEST})"
        raised.append(owner.opset_imports)
        for node in owner.all_nodes():
            converted = converter.convert(node, current)
            if isinstance(converted, str):
                return converted
            if converted is not None:
                jobs.append((node, converted))
    for node, new in jobs:
        if isinstance(new, ir.Attr):
            node.attributes.add(new)
        else:
            _replace(model, node, new, version)
    for imports in raised:
        imports[""] = version
    if raised:
        needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
        model.ir.ir_version = max(model.ir.ir_version or 0, needed)
    return None


class _Converter:
    def __init__(self, version: int) -> None:
        self.version = version
        # Nodes are given to the converter under the same value names, so equal ones are equal bytes.
        self._done: dict[tuple[bytes, int], onnx.ModelProto | str] = {}

    def convert(self, node: ir.Node, current: int) -> ir.Model | ir.Attr | str | None:
        """What the node becomes: a small model, itself with another attribute, None if it stays as it
        is, or the reason why it cannot be raised."""
        if node.domain != "":
            return None
        try:
            old = onnx.defs.get_schema(node.op_type, current, "")
            new = onnx.defs.get_schema(node.op_type, self.version, "")
        except onnx.defs.SchemaError:
            return f"onnx does not know the operator of {describe(node)}"
        if old.since_version == new.since_version and not new.deprecated:
            return None
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            # If, Loop and Scan changed only in the types they take, but for Scan before 9.
            return (
                f"{describe(node)} changed its form in opset 9"
                if old.since_version < 9 == new.since_version
                else None
            )
        if _same_form(old, new):
            return None
        if any(a.is_ref() for a in node.attributes.values()):
            return (
                f"{describe(node)} takes an attribute of its function and has another form in {self.version}"
            )
        if (axis := _last_axis(node, current)) is not None and self.version >= 13:
            if node.attributes.get_int("axis", None) == axis:
                return None
            return ir.AttrInt64("axis", axis)
        proto = ir.to_proto(_alone(node, current))
        key = (proto.SerializeToString(), current)
        if key not in self._done:
            self._done[key] = _call(proto, self.version)
        result = self._done[key]
        if isinstance(result, str):
            return f"onnx's converter cannot raise {describe(node)} to opset {self.version}: {result}"
        if _unchanged(proto, result):
            return None
        converted = ir.from_proto(result)
        if node.op_type == "Upsample" or (node.op_type == "Resize" and current < 11):
            nearest = node.attributes.get_string("mode", "nearest") == "nearest"
            rounding = _rounding(node) if nearest else None
            if nearest and rounding is None:
                return f"{describe(node)} takes the nearest pixel at scales that are not known to be all up or all down"
            _keep_sampling(converted, rounding)
        return converted


def _call(proto: onnx.ModelProto, version: int) -> onnx.ModelProto | str:
    try:
        return onnx.version_converter.convert_version(proto, version)
    except (RuntimeError, onnx.version_converter.ConvertError) as error:
        # The sentence follows the C++ source position and the failed assertion.
        return str(error).strip().splitlines()[0].split("failed: ")[-1][:200]


def _alone(node: ir.Node, current: int) -> ir.Model:
    """A model of the one node: its inputs as graph inputs, small constants as initializers."""
    stand_ins: dict[ir.Value, ir.Value] = {}
    initializers = []
    for value in node.inputs:
        if value is None or value in stand_ins:
            continue
        copy = ir.Value(name=f"i{len(stand_ins)}", type=value.type, shape=value.shape)
        stand_ins[value] = copy
        tensor = constant_tensor(value)
        if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes <= _SHOWN_BYTES:
            copy.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=copy.name)
            copy.type, copy.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            initializers.append(copy)
    alone = ir.Node(
        "",
        node.op_type,
        [None if v is None else stand_ins[v] for v in node.inputs],
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
    )
    for i, (copy, value) in enumerate(zip(alone.outputs, node.outputs, strict=True)):
        copy.name = f"o{i}" if value.name else ""
        copy.type, copy.shape = value.type, value.shape
    graph = ir.Graph(
        [v for v in stand_ins.values() if v.const_value is None],
        [v for v in alone.outputs if v.name],
        nodes=[alone],
        initializers=initializers,
        opset_imports={"": current},
        name="node",
    )
    return ir.Model(graph, ir_version=10)


def _unchanged(before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    if len(after.graph.node) != 1 or len(after.graph.initializer) != len(before.graph.initializer):
        return False
    old, new = before.graph.node[0], after.graph.node[0]
    return (
        old.op_type == new.op_type
        and list(old.input) == list(new.input)
        and list(old.output) == list(new.output)
        and {a.name: a.SerializeToString() for a in old.attribute}
        == {a.name: a.SerializeToString() for a in new.attribute}
    )


def _same_form(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    """Whether two versions of an operator differ in the types they take and nothing else.

    An attribute the older one does not have may have a default that is not what the older one did
    (RoiAlign 16), so it counts as another form.
    """
    return not new.deprecated and (
        [(i.name, i.option) for i in old.inputs] == [(i.name, i.option) for i in new.inputs]
        and [(o.name, o.option) for o in old.outputs] == [(o.name, o.option) for o in new.outputs]
        and {name: (a.type, a.required, a.default_value) for name, a in old.attributes.items()}
        == {name: (a.type, a.required, a.default_value) for name, a in new.attributes.items()}
    )


def _last_axis(node: ir.Node, current: int) -> int | None:
    """The axis of a softmax over the last dimension, which means the same in every opset.

    Before opset 13 it flattened its input around the axis; the converter writes that out as Flatten
    and Reshape, which nothing fuses.
    """
    if node.op_type not in _SOFTMAX or current >= 13:
        return None
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    rank = len(value.shape)
    axis = node.attributes.get_int("axis", 1)
    return rank - 1 if rank and axis in (rank - 1, -1) else None


def _rounding(node: ir.Node) -> str | None:
    """How Upsample and Resize 10 pick the nearest pixel: down when they enlarge, up when they shrink.

    None when that cannot be told, because the scales are computed or go both ways.
    """
    if node.op_type == "Upsample":
        return "floor"
    scales = constant_tensor(node.inputs[1])
    if scales is None:
        return None
    values = scales.numpy()
    if (values >= 1).all():
        return "floor"
    return "ceil" if (values <= 1).all() else None


def _keep_sampling(converted: ir.Model, rounding: str | None) -> None:
    """Resize 11 has other defaults than Upsample and Resize 10; write the old meaning out."""
    for resize in converted.graph:
        if resize.op_type == "Resize":
            resize.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
            if rounding is not None:
                resize.attributes.add(ir.AttrString("nearest_mode", rounding))


def _replace(model: Model, node: ir.Node, converted: ir.Model, version: int) -> None:
    """Put the nodes of ``converted`` in the place of ``node``."""
    graph = node.graph
    if graph is None:
        return
    base = node.outputs[0].name or node.op_type
    values: dict[ir.Value, ir.Value | None] = {}
    given = list(dict.fromkeys(v for v in node.inputs if v is not None))
    for value in [*converted.graph.inputs, *converted.graph.initializers.values()]:
        name = value.name or ""
        if name.startswith("i") and name[1:].isdecimal():
            values[value] = given[int(name[1:])]
        elif value.const_value is not None:
            values[value] = model.add_initializer(graph, f"{base}_opset{version}", value.const_value)
    finals: dict[str, ir.Value] = {}
    nodes = []
    for part in converted.graph:
        new = ir.Node(
            part.domain,
            part.op_type,
            [None if v is None else values[v] for v in part.inputs],
            list(part.attributes.values()),
            num_outputs=len(part.outputs),
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        for old, copy in zip(part.outputs, new.outputs, strict=True):
            values[old] = copy
            if old.is_graph_output():
                finals[old.name or ""] = copy
                new.name = node.name
            elif old.name:
                copy.name = model.unique_name(f"{base}_opset{version}")
                copy.type, copy.shape = old.type, old.shape
        nodes.append(new)
    old_values = [v for i, v in enumerate(node.outputs) if f"o{i}" in finals]
    new_values = [finals[f"o{i}"] for i, v in enumerate(node.outputs) if f"o{i}" in finals]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, old_values, new_values)
