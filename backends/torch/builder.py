"""From an onnx_ir graph to an fx graph: what a converter of one operator is given, and what it calls.

A converter is a function ``(node: OperatorNode, graph: GraphBuilder) -> fx.Node | tuple``. It emits the
torch calls that compute the operator and hands back the fx nodes of its outputs, one alone or a tuple
(None for an output that nobody reads, see ``outputs_used``).

Integers that come from the shape of a tensor stay Python integers (symbolic ones where torch traces): a
chain ``Shape -> Gather -> Concat -> Reshape`` becomes ``x.reshape(x.shape[0], 12)``, and no tensor is read
back. Such a value is a *size array*: a NumPy array of objects, each an int, float, bool or an fx node that
makes one. :mod:`effic.backends.torch.sizes` carries them through the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from effic.backends.torch.functions.shape import from_sizes, to_ints
from effic.backends.torch.types import torch_dtype
from effic.ir.errors import UnsupportedError
from effic.ir.model import ONNX_DOMAINS, constant_tensor, describe
from effic.ir.tensors import borrow

Results = fx.Node | tuple[fx.Node | None, ...]
Converter = Callable[["OperatorNode", "GraphBuilder"], Results]

# Longer integer constants are data, not sizes.
MAX_SIZES = 1024


class OperatorNode:
    """One node of the ONNX graph, as a converter reads it.

    Attributes:
        node: the onnx_ir node.
        op_type: its operator.
        opset: the version of its operator set (that of its own domain).
        attributes: its attributes as Python values: int, float, str, lists of them, arrays for tensors,
            ``ir.Graph`` for subgraphs. Defaults are not filled in.
        inputs: one fx node per input; None where an optional input is left out. Trailing optional
            inputs may be absent altogether: :meth:`input` gives None for them.
        outputs_used: for each output, whether anybody reads it.
    """

    def __init__(self, node: ir.Node, graph: GraphBuilder) -> None:
        self.node = node
        self.op_type = node.op_type
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        self.opset = node.version or graph.opset_imports.get(domain, 1)
        self.attributes = {name: _python(attr) for name, attr in node.attributes.items()}
        self._graph = graph
        self.inputs: list[fx.Node | None] = [
            None if value is None else graph.tensor(value) for value in node.inputs
        ]
        self.outputs_used = [bool(out.uses()) or out.is_graph_output() for out in node.outputs]

    def input(self, index: int) -> fx.Node | None:
        """The input at ``index``, None when it is left out or past the end."""
        return self.inputs[index] if index < len(self.inputs) else None

    def value(self, index: int) -> ir.Value | None:
        """The onnx_ir value of an input, None when it is left out or past the end."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def constant(self, index: int) -> np.ndarray | None:
        """The value of an input that is known while building and is not trained, else None.

        Sub-byte integers come as int8 or uint8 (one per byte).
        """
        value = self.value(index)
        return None if value is None else self._graph.known(value)

    def is_fixed(self, index: int) -> bool:
        """Whether an input is a constant, or an initializer that is not trained. Does not read it."""
        value = self.value(index)
        if value is None:
            return False
        if value.is_initializer():
            return value in self._graph.store.known
        return constant_tensor(value) is not None

    def dtype(self, index: int) -> ir.DataType | None:
        """Element type of an input as the model declares or implies it, None when unknown or left out."""
        value = self.value(index)
        return None if value is None else value.dtype

    def output_dtype(self, index: int = 0) -> ir.DataType | None:
        """Element type of an output, None when unknown."""
        return self.node.outputs[index].dtype

    def rank(self, index: int) -> int | None:
        """Number of axes of an input, None when unknown or left out."""
        value = self.value(index)
        return None if value is None or value.shape is None else len(value.shape)

    def shape(self, index: int) -> tuple[int | None, ...] | None:
        """Declared dimensions of an input, None for each one that may vary."""
        value = self.value(index)
        if value is None or value.shape is None:
            return None
        return tuple(dim if isinstance(dim, int) else None for dim in value.shape)

    def refuse(self, reason: str) -> NoReturn:
        """Stop: this node cannot be built, because ``reason`` (a phrase: "has string inputs")."""
        raise UnsupportedError(f"{describe(self.node)} {reason}")


@dataclasses.dataclass
class Store:
    """What the module will hold, filled while the graph is built.

    Attributes:
        initializers: every initializer that became an attribute of the module, with its path.
        known: initializers whose values may be read while building (those that are not trained).
        baked: names of initializers whose values were read, and so are part of the code.
        constants: arrays that are buffers but no initializers, by path.
        missing: nodes without a converter, by their key in the table of operators.
        refusals: what cannot be built, each a phrase that names the node.
        modules: bodies of Loop, Scan and If, by path.
    """

    initializers: dict[ir.Value, str] = dataclasses.field(default_factory=dict)
    known: set[ir.Value] = dataclasses.field(default_factory=set)
    baked: set[str] = dataclasses.field(default_factory=set)
    constants: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    modules: dict[str, fx.GraphModule] = dataclasses.field(default_factory=dict)
    missing: dict[str, list[ir.Node]] = dataclasses.field(default_factory=dict)
    refusals: list[str] = dataclasses.field(default_factory=list)


class GraphBuilder:
    """Emits the fx graph of one onnx_ir graph (the main one, or the body of a Loop, Scan or If).

    State is held by the module of the main graph only: the graph of a body takes what it reads from
    outside, weights included, as arguments.
    """

    CONSTANTS = "effic_constants"
    BODIES = "effic_bodies"

    def __init__(
        self, store: Store, opset_imports: dict[str, int], outer: GraphBuilder | None = None
    ) -> None:
        self.store = store
        self.opset_imports = opset_imports
        self.outer = outer
        self.graph = fx.Graph()
        self.captured: dict[fx.Node, fx.Node] = {}
        self._tensors: dict[ir.Value, fx.Node] = {}
        self._sizes: dict[ir.Value, np.ndarray] = {}
        self._marks: dict[fx.Node, np.ndarray] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._last_input: fx.Node | None = None

    # -- for converters --------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a torch function, or of any function a torch compiler can look into."""
        return self.graph.call_function(function, args, kwargs)

    def method(self, name: str, receiver: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a tensor's method."""
        return self.graph.call_method(name, (receiver, *args), kwargs)

    def constant(self, array: np.ndarray | torch.Tensor) -> fx.Node:
        """A constant tensor: a buffer, so that it moves with the module. Not part of its state dict."""
        if self.outer is not None:
            return self.capture(self.outer.constant(array))
        path = f"{self.CONSTANTS}.c{len(self.store.constants)}"
        tensor = array if isinstance(array, torch.Tensor) else to_tensor(array)
        self.store.constants[path] = tensor
        return self.attribute(path)

    def device(self) -> fx.Node:
        """The device the module is on, for calls that make tensors."""
        return self.call(getattr, self.anchor(), "device")

    def anchor(self) -> fx.Node:
        """An empty buffer that lies where the module lies."""
        if self.outer is not None:
            return self.capture(self.outer.anchor())
        path = f"{self.CONSTANTS}.anchor"
        if path not in self.store.constants:
            self.store.constants[path] = torch.empty(0)
        return self.attribute(path)

    def sizes(self, node: OperatorNode, index: int) -> list[int | fx.Node] | fx.Node | None:
        """An integer-list input (a shape, axes, pads, starts) as Python integers.

        Returns:
            A list of integers and fx nodes that make one; an fx node that makes the whole list where
            the input is computed from values; None where it is left out.
        """
        value = node.value(index)
        if value is None:
            return None
        found = self.size_array(value)
        if found is not None:
            return list(found.reshape(-1))
        return self.call(to_ints, node.inputs[index])

    def mark_sizes(self, result: fx.Node, values: Sequence[Any] | np.ndarray) -> fx.Node:
        """Say that ``result`` (what a converter returns) holds these numbers: integers or fx nodes.

        Returns:
            ``result``.
        """
        if isinstance(values, np.ndarray):
            array = values.astype(object)
        else:
            array = np.empty(len(values), object)
            array[:] = list(values)
        self._marks[result] = array
        return result

    # -- values ----------------------------------------------------------------------------------

    def bind(self, value: ir.Value, result: fx.Node) -> None:
        """``value`` is what ``result`` makes."""
        self._tensors[value] = result
        if result in self._marks:
            self._sizes[value] = self._marks[result]

    def bind_sizes(self, value: ir.Value, sizes: np.ndarray) -> None:
        """``value`` holds these numbers; a tensor of them is made where one is read."""
        self._sizes[value] = sizes

    def tensor(self, value: ir.Value) -> fx.Node:
        """The fx node that makes ``value``."""
        if value in self._tensors:
            return self._tensors[value]
        result: fx.Node
        if value in self._sizes:
            result = self._from_sizes(value, self._sizes[value])
        elif self.outer is not None and self.outer.has(value):
            result = self.capture(self.outer.tensor(value))
        elif value in self.store.initializers:
            # A body's own initializers are attributes of the module as well.
            result = self.initializer(value)
        elif (tensor := constant_tensor(value)) is not None:
            with borrow(tensor) as array:
                result = self.constant(to_tensor(array, tensor.dtype))
        else:
            raise UnsupportedError(f"'{value.name}' is read before it is made; sort the graph first")
        self._tensors[value] = result
        return result

    def initializer(self, value: ir.Value) -> fx.Node:
        if self.outer is not None:
            return self.capture(self.outer.initializer(value))
        return self.attribute(self.store.initializers[value])

    def has(self, value: ir.Value) -> bool:
        """Whether ``value`` is made in this graph so far, or outside of it."""
        if value in self._tensors or value in self._sizes:
            return True
        return self.outer is not None and self.outer.has(value)

    def known(self, value: ir.Value) -> np.ndarray | None:
        """See :meth:`OperatorNode.constant`."""
        sizes = self._all_sizes(value)
        if sizes is not None and not any(isinstance(item, fx.Node) for item in sizes.flat):
            dtype = value.dtype or ir.DataType.INT64
            return np.array(sizes.tolist(), dtype=dtype.numpy()).reshape(sizes.shape)
        if value.is_initializer():
            if value not in self.store.known:
                return None
            self.store.baked.add(str(value.name))
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return None
        with borrow(tensor) as array:
            if tensor.dtype.is_integer() and tensor.dtype.bitwidth < 8:
                return array.astype(np.int8 if tensor.dtype.is_signed() else np.uint8)
            return np.array(array)

    def size_array(self, value: ir.Value) -> np.ndarray | None:
        """The numbers in ``value`` as a size array, None where they are computed or too many."""
        found = self._all_sizes(value)
        if found is not None:
            return found
        tensor = constant_tensor(value)
        if tensor is None or tensor.size > MAX_SIZES:
            return None
        if not (tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL) and tensor.size > 8:
            return None
        array = self.known(value)
        if array is None:
            return None
        result = np.empty(array.shape, object)
        result[...] = np.array(array.tolist(), object).reshape(array.shape)
        return result

    def any_sizes(self, values: Sequence[ir.Value | None]) -> bool:
        """Whether every one of the values is a size array or could be, and none has to be computed.

        Does not read any constant.
        """
        return all(value is None or self._may_be_sizes(value) for value in values)

    def _may_be_sizes(self, value: ir.Value) -> bool:
        if self._all_sizes(value) is not None:
            return True
        tensor = constant_tensor(value)
        if tensor is None or tensor.size > MAX_SIZES:
            return False
        if not (tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL):
            return False
        return not value.is_initializer() or value in self.store.known

    def size_rank(self, value: ir.Value) -> tuple[int, ...] | None:
        """The shape of a value that is a size array, else None."""
        found = self._all_sizes(value)
        return None if found is None else tuple(found.shape)

    def _all_sizes(self, value: ir.Value) -> np.ndarray | None:
        if value in self._sizes:
            return self._sizes[value]
        if self.outer is None or value in self._tensors:
            return None
        found = self.outer._all_sizes(value)
        if found is None:
            return None
        inner = np.empty(found.shape, object)
        for place, item in np.ndenumerate(found):
            inner[place] = self.capture(item) if isinstance(item, fx.Node) else item
        self._sizes[value] = inner
        return inner

    def _from_sizes(self, value: ir.Value, sizes: np.ndarray) -> fx.Node:
        dtype = value.dtype or ir.DataType.INT64
        if not any(isinstance(item, fx.Node) for item in sizes.flat):
            array = np.array(sizes.tolist(), dtype=dtype.numpy()).reshape(sizes.shape)
            return self.constant(array)
        return self.call(
            from_sizes, self.anchor(), list(sizes.reshape(-1)), list(sizes.shape), torch_dtype(dtype)
        )

    # -- arguments, attributes, bodies -----------------------------------------------------------

    def argument(self, name: str, **default: Any) -> fx.Node:
        """A new argument of the graph, after those there are. Give ``default_value`` for an optional one."""
        place = self._last_input
        if place is None:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(name, **default)
        else:
            with self.graph.inserting_after(place):
                node = self.graph.placeholder(name, **default)
        self._last_input = node
        return node

    def capture(self, outer: fx.Node) -> fx.Node:
        """An argument of this body for what ``outer`` makes in the graph around it."""
        if outer not in self.captured:
            self.captured[outer] = self.argument(f"captured_{len(self.captured)}")
        return self.captured[outer]

    def attribute(self, path: str) -> fx.Node:
        """The module's attribute at ``path``."""
        if path not in self._attributes:
            self._attributes[path] = self.graph.create_node("get_attr", path)
        return self._attributes[path]

    def body(self, graph: ir.Graph) -> tuple[fx.Node, list[fx.Node]]:
        """The graph of a Loop, Scan or If as a module of its own.

        Returns:
            The fx node of the module, and what to call it with after the graph's own inputs: what it
            reads from outside.
        """
        from effic.backends.torch.convert import convert_body

        module, captured = convert_body(graph, self)
        root: GraphBuilder = self
        while root.outer is not None:
            root = root.outer
        path = f"{self.BODIES}.b{len(self.store.modules)}"
        self.store.modules[path] = module
        return self._body_attribute(path), captured

    def _body_attribute(self, path: str) -> fx.Node:
        if self.outer is not None:
            return self.capture(self.outer._body_attribute(path))
        return self.attribute(path)


def to_tensor(array: np.ndarray, dtype: ir.DataType | None = None) -> torch.Tensor:
    """A tensor with the array's values in memory of its own; sub-byte integers one per byte.

    Raises:
        UnsupportedError: torch has no such element type.
    """
    dtype = dtype or ir.DataType.from_numpy(array.dtype)
    target = torch_dtype(dtype)
    if dtype.is_integer() and dtype.bitwidth < 8:
        array = array.astype(np.int8 if dtype.is_signed() else np.uint8)
    elif array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8")):
        # ml_dtypes: torch takes the bits.
        bits = np.uint8 if array.dtype.itemsize == 1 else np.uint16
        raw = torch.from_numpy(np.array(array, order="C").view(bits))
        return raw.view(target)
    return torch.from_numpy(np.array(array, order="C")).to(target)


def _python(attr: ir.Attr) -> Any:
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return np.array(tensor.numpy())
    if attr.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return list(attr.value)
    return attr.value
