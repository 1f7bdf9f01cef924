"""Any model as an ``fx.GraphModule`` to train, run or export with torch."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import fx, nn

from effic.backends.torch.builder import GraphBuilder, Store, to_tensor
from effic.backends.torch.convert import convert_nodes
from effic.backends.torch.functions.control import default
from effic.backends.torch.names import argument_names, state_keys
from effic.backends.torch.types import TORCH_TYPES
from effic.ir.errors import UnsupportedError
from effic.ir.model import ONNX_DOMAINS, Model, describe
from effic.ir.tensors import borrow
from effic.ir.torch_capture import ROLE_KEY

RECORD = "effic"
"""Key in the module's ``meta``: the :class:`ModuleRecord`."""

_TRAINED = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# Inputs that are floats and no weights: statistics, scales of integer codes, bounds, factors, windows,
# states to start from.
_NEVER_TRAINED: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4),
    "Clip": (1, 2),
    "DequantizeLinear": (1,),
    "DynamicQuantizeLinear": (0,),
    "Dropout": (1,),
    "GRU": (5,),
    "GatherBlockQuantized": (2, 3),
    "LSTM": (5, 6),
    "MatMulNBits": (2, 3),
    "NonMaxSuppression": (3, 4),
    "OneHot": (2,),
    "Pad": (2,),
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "QuantizeLinear": (1,),
    "RNN": (5,),
    "Range": (0, 1, 2),
    "Resize": (1, 2),
    "STFT": (2,),
    "Upsample": (1,),
}
# A single number that these read is a constant of the formula (a square root, an epsilon).
_ARITHMETIC = ("Add", "Div", "Equal", "Greater", "Less", "Max", "Min", "Mod", "Mul", "Pow", "Sub", "Where")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an initializer lies: the graph (0 the main one, then its subgraphs in order) and its name."""

    graph: int
    name: str


@dataclasses.dataclass(frozen=True)
class ModuleRecord:
    """What a built module knows about the model it came from.

    Attributes:
        inputs: argument of ``forward`` by ONNX input name, in the order of the arguments.
        outputs: ONNX names of the outputs, in the order they are returned.
        keys: where each entry of the state dict comes from.
        types: the element type of each entry in the model.
        baked: keys whose values are part of the module's code (axes, shapes, bounds): changing one
            there does not change what the module computes.
    """

    inputs: dict[str, str]
    outputs: tuple[str, ...]
    keys: dict[str, Slot]
    types: dict[str, ir.DataType]
    baked: frozenset[str]


def to_module(
    model: Model, *, trainable: bool = True, device: torch.device | str | None = None
) -> fx.GraphModule:
    """Build a torch module that computes what the model computes.

    Float weights, biases and norm scales become parameters; running statistics, integers, scales of
    integer codes, bounds and single numbers in arithmetic become buffers (in a captured model, what was
    a parameter in torch is one again, and what was a buffer is one). The keys of the state dict are the
    names of the initializers, except for names torch cannot hold (see
    :func:`effic.backends.torch.names.state_keys`); ``module.meta["effic"]`` has both.

    ``forward`` takes the model's inputs in their order, optional ones last, by position or by name (a
    name that is no Python identifier is made one: ``module.meta["effic"].inputs``), and returns a tensor,
    or a tuple of them in the model's order when there are several.

    ``train()`` and ``eval()`` make no difference: an ONNX file says itself what it computes.
    BatchNormalization uses its running statistics and does not update them, Dropout passes everything
    on, unless the node itself asks for training. The weights are copied; the model is not touched.

    Args:
        model: any model; functions are inlined, subgraphs become modules.
        trainable: whether parameters ask for gradients.
        device: where the module is put; ``module.to`` moves it later.

    Raises:
        UnsupportedError: the model has operators that cannot be built; all of them are named, and
            nothing was built.
    """
    plan = _plan(model)
    if plan.refused:
        reasons = [
            f"no operator {key} (nodes {', '.join(repr(_name(node)) for node in nodes)})"
            for key, nodes in plan.store.missing.items()
        ]
        raise UnsupportedError(
            f"the torch backend cannot build this model: {'; '.join([*reasons, *plan.store.refusals])}"
        )
    module = fx.GraphModule({}, fx.Graph())
    parameters = plan.trained
    for value, path in plan.store.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise UnsupportedError(
                f"initializer '{value.name}' has no values; load the model with its weights"
            )
        with borrow(tensor) as array:
            loaded = to_tensor(array, tensor.dtype)
        if device is not None:
            loaded = loaded.to(device)
        _attach(
            module, path, nn.Parameter(loaded, requires_grad=trainable) if value in parameters else loaded
        )
    for path, constant in plan.store.constants.items():
        _attach(module, path, constant, persistent=False)
    for path, body in plan.store.modules.items():
        _attach(module, path, body)
    module.graph = plan.builder.graph
    module.recompile()
    module.meta[RECORD] = plan.record
    return module if device is None else module.to(device)


def coverage(model: Model) -> list[str]:
    """What keeps a model from being built: one phrase per node, naming it and the reason; [] when all can."""
    store = _plan(model).store
    lacks = [
        f"{describe(node)} is of an operator the torch backend lacks ({key})"
        for key, nodes in store.missing.items()
        for node in nodes
    ]
    return [*lacks, *store.refusals]


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name if node.outputs else "?")


# -- the plan: the graph without the weights -------------------------------------------------------


@dataclasses.dataclass
class _Plan:
    builder: GraphBuilder
    store: Store
    trained: set[ir.Value]
    record: ModuleRecord

    @property
    def refused(self) -> bool:
        return bool(self.store.missing or self.store.refusals)


def _plan(model: Model) -> _Plan:
    copy = model.clone()
    graphs = [copy.graph, *copy.graph.subgraphs()]
    slots = {
        value: Slot(i, name) for i, graph in enumerate(graphs) for name, value in graph.initializers.items()
    }
    if copy.ir.functions:
        common.InlinePass()(copy.ir)
    _infer_shapes(copy)

    values = _initializers(copy.graph)
    trained = {value for value in values if _is_trained(value)}
    names = _full_names(values, slots)
    keys = state_keys(names.values())
    store = Store(
        initializers={value: keys[names[value]] for value in values},
        known={v for v in values if v not in trained and not v.is_graph_input()},
    )
    imports = {("" if domain in ONNX_DOMAINS else domain): v for domain, v in copy.ir.opset_imports.items()}
    for value in values:
        if value.const_value is not None and value.const_value.dtype not in TORCH_TYPES:
            kind = value.const_value.dtype.name
            store.refusals.append(
                f"initializer '{value.name}' is of type {kind}, which torch tensors cannot hold"
            )
    builder = GraphBuilder(store, imports)
    inputs = _arguments(copy.graph, builder)
    convert_nodes(copy.graph, builder)
    results = (
        [] if store.refusals or store.missing else [builder.tensor(value) for value in copy.graph.outputs]
    )
    builder.graph.output(results[0] if len(results) == 1 else tuple(results))
    builder.graph.eliminate_dead_code()
    _forget_unread(builder, store)
    kept = {value: path for value, path in store.initializers.items() if value in slots}
    record = ModuleRecord(
        inputs=inputs,
        outputs=tuple(str(value.name) for value in copy.graph.outputs),
        keys={path: slots[value] for value, path in kept.items()},
        types={
            path: value.const_value.dtype for value, path in kept.items() if value.const_value is not None
        },
        baked=frozenset(store.initializers[v] for v in values if v.name in store.baked),
    )
    return _Plan(builder, store, trained, record)


def _infer_shapes(model: Model) -> None:
    # It warns, with a trace, of what it cannot infer; that is no concern here: types that stay unknown
    # are asked for at run time.
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    before, logger.disabled = logger.disabled, True
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model.ir)
    finally:
        logger.disabled = before


def _initializers(graph: ir.Graph) -> list[ir.Value]:
    return [value for inner in (graph, *graph.subgraphs()) for value in inner.initializers.values()]


def _full_names(values: list[ir.Value], slots: dict[ir.Value, Slot]) -> dict[ir.Value, str]:
    """Names by initializer. Those in two branches may be the same: the second is told apart by a number."""
    names: dict[ir.Value, str] = {}
    taken: set[str] = set()
    # The model's own before those that came with the bodies of functions.
    for value in sorted(values, key=lambda value: slots[value].graph if value in slots else len(slots)):
        name, number = str(value.name), 0
        while name in taken:
            number += 1
            name = f"{value.name}_{number}"
        taken.add(name)
        names[value] = name
    return names


def _is_trained(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _TRAINED:
        return False
    role = value.metadata_props.get(ROLE_KEY)
    if role is not None:
        return role == "parameter"
    uses = [(use.node, use.idx) for use in value.uses()]
    if all(i in _NEVER_TRAINED.get(n.op_type, ()) for n, i in uses):
        return not uses and not value.is_graph_input()
    single = tensor.size == 1
    return not (single and all(node.op_type in _ARITHMETIC for node, _ in uses))


def _arguments(graph: ir.Graph, builder: GraphBuilder) -> dict[str, str]:
    required = [value for value in graph.inputs if not value.is_initializer()]
    optional = [value for value in graph.inputs if value.is_initializer()]
    arguments = argument_names(str(value.name) for value in (*required, *optional))
    for value in required:
        builder.bind(value, builder.argument(arguments[str(value.name)]))
    given = [builder.argument(arguments[str(value.name)], default_value=None) for value in optional]
    for value, argument in zip(optional, given, strict=True):
        builder.bind(value, builder.call(default, argument, builder.initializer(value)))
    return arguments


def _forget_unread(builder: GraphBuilder, store: Store) -> None:
    """Drop constants that were made for a converter that then had no use for them."""
    read = {str(node.target) for node in builder.graph.nodes if node.op == "get_attr"}
    for held in (store.constants, store.modules):
        for path in [path for path in held if path not in read]:
            del held[path]


def _attach(module: nn.Module, path: str, item: Any, *, persistent: bool = True) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    if isinstance(item, nn.Parameter):
        module.register_parameter(leaf, item)
    elif isinstance(item, nn.Module):
        module.add_module(leaf, item)
    else:
        module.register_buffer(leaf, item, persistent=persistent)
