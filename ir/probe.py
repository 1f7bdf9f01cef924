"""A part of a model, ready to run: some values go in, others come out, the rest is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import decode, encoding_nodes, recognise
from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.evaluate import Arrays, first_line, run_session, runtime_errors
from effic.ir.model import Model
from effic.ir.onnx_writer import to_proto
from effic.ir.tensors import drop_pages
from effic.ir.topology import read_values

# Weights of this size and these types are not handed to the runtime inside the model.
_LARGE = 1 << 16
_WEIGHTS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Probe:
    """The nodes between some values of a model's main graph, ready to run.

    The nodes are copied when the probe is made, so the model may change afterwards; weights are read
    from where they lie (the file map of a model that was read from a file) and are not copied.
    Encoded weights are decoded once, so that a run costs what it costs in floating point.

    Args:
        model: the model; it is not changed.
        inputs: values that will be given at every run: graph inputs, intermediate values, also
            initializers. What is not needed for the outputs may be left out of the run.
        outputs: values to compute.
        threads: of the runtime; 0 means all cores.

    Raises:
        UsageError: an output depends on a graph input that is not among ``inputs``, or a value is
            not one of the main graph.
    """

    def __init__(
        self, model: Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], *, threads: int = 0
    ) -> None:
        for value in (*inputs, *outputs):
            if value.graph is not model.graph:
                raise UsageError(f"the value '{value.name}' is not in the model's main graph")
        given = {id(value) for value in inputs}
        # What is given is handed on: a runtime's graph input cannot be its output as well.
        self._copied = [str(v.name) for v in outputs if id(v) in given]
        computed = [v for v in outputs if id(v) not in given]
        self._constants: dict[str, ir.TensorProtocol] = {}
        for value in [v for v in computed if v.is_initializer()]:
            if value.const_value is not None:
                self._constants[str(value.name)] = value.const_value
        computed = list({id(v): v for v in computed if not v.is_initializer()}.values())
        self.outputs = [str(v.name) for v in outputs]
        self._model: Model | None = None
        self._weights: dict[str, ir.TensorProtocol] = {}
        self._session: Any = None
        self._threads = threads
        self.inputs: list[str] = list(self._copied)
        if computed:
            self._model = _between(model, given, computed)
            names = [str(v.name) for v in self._model.graph.inputs]
            self._weights = _take_weights(self._model.graph)
            self.inputs = list(dict.fromkeys([*names, *self._copied]))

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs by name.

        Args:
            feeds: arrays by name, for every name in :attr:`inputs`; others are ignored.

        Raises:
            NotMeasuredError: the runtime cannot run this part of the model.
            UsageError: an input is missing.
        """
        results: Arrays = {}
        if self._model is not None:
            if self._session is None:
                self._start(feeds)
            weights = {name: tensor.numpy() for name, tensor in self._weights.items()}
            results = run_session(self._session, {**feeds, **weights})
        for name in self._copied:
            if name not in feeds:
                raise UsageError(f"the inputs lack '{name}'; given: {', '.join(sorted(feeds)) or 'none'}")
            results[name] = np.asarray(feeds[name])
        for name, tensor in self._constants.items():
            results[name] = np.array(tensor.numpy())
        return {name: results[name] for name in self.outputs}

    def close(self) -> None:
        """Give the runtime's memory and the weights' file pages back; a later run starts anew."""
        self._session = None
        for tensor in self._weights.values():
            if isinstance(tensor, ir.ExternalTensor):
                drop_pages(tensor)

    def _start(self, feeds: Mapping[str, np.ndarray]) -> None:
        model = self._model
        assert model is not None
        for value in model.graph.inputs:
            # Models need not declare the types of what lies between their nodes: the first feed tells.
            array = feeds.get(str(value.name))
            if array is not None and array.dtype.kind not in "OSU":
                value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self._session = _session(model, self._threads)


def _between(model: Model, given: set[int], outputs: Sequence[ir.Value]) -> Model:
    """A model of its own with the nodes that the outputs need."""
    graph = model.graph
    needed: set[ir.Node] = set()
    inputs: dict[int, ir.Value] = {}
    initializers: dict[int, ir.Value] = {}
    decoded: dict[int, ir.Value] = {}
    todo: list[ir.Value] = list(outputs)
    while todo:
        value = todo.pop()
        if id(value) in given:
            inputs.setdefault(id(value), value)
        elif value.is_initializer():
            initializers.setdefault(id(value), value)
        elif (node := value.producer()) is None:
            names = ", ".join(str(v.name) for v in outputs[:3])
            raise UsageError(f"{names} cannot be computed without the graph input '{value.name}'")
        elif id(value) not in decoded and node not in needed:
            if node.graph is not graph:
                continue  # made inside a subgraph, for its own use
            if _decodable(value, given, outputs):
                decoded[id(value)] = value
            else:
                needed.add(node)
                todo.extend(read_values(node))
    nodes = [node for node in graph if node in needed]
    ends = {id(v): v for v in [*inputs.values(), *decoded.values()]}
    # A node with several outputs may have made one that is decoded or given here: it stays an input.
    made = {id(out) for node in nodes for out in node.outputs}
    ends = {key: value for key, value in ends.items() if key not in made}
    view = ir.GraphView(
        list(ends.values()),
        list(outputs),
        nodes=nodes,
        initializers=tuple(initializers.values()),
        opset_imports=graph.opset_imports,
        name=graph.name,
    )
    copy = view.clone()
    for value in list(copy.inputs):
        value.const_value = None
        value.shape = None  # what was declared may be wrong, and the runtime needs none
    for value in decoded.values():
        encoding = recognise(value)
        new = next(v for v in copy.inputs if v.name == value.name)
        copy.inputs.remove(new)
        if encoding is not None:
            array = decode(encoding)
            new.const_value = ir.Tensor(array, name=new.name)
            new.type, new.shape = ir.TensorType(new.const_value.dtype), ir.Shape(array.shape)
        copy.register_initializer(new)
    for value in copy.outputs:
        value.shape = None
    functions = [function.clone() for function in model.ir.functions.values()]
    return Model(ir.Model(copy, ir_version=model.ir.ir_version, functions=functions))


def _decodable(value: ir.Value, given: set[int], outputs: Sequence[ir.Value]) -> bool:
    """Whether an encoded weight can be put in as the floats it stands for."""
    node = value.producer()
    if node is None or node.op_type not in ("DequantizeLinear", "Reshape") or recognise(value) is None:
        return False
    inner = encoding_nodes(value)
    return not any(id(v) in given for n in inner for v in n.inputs) and not any(v is value for v in outputs)


def _take_weights(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Turn large weights into inputs, and return them by name.

    A runtime copies what it finds in a model, and what it is given stays where it lies: in the map
    of the file the model came from.
    """
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _WEIGHTS and tensor.nbytes >= _LARGE:
            weights[name] = tensor
            del graph.initializers[name]
            value.type, value.const_value = ir.TensorType(tensor.dtype), None
            if not value.is_graph_input():
                graph.inputs.append(value)
    return weights


def _session(model: Model, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Between two runs the caller works on the values: the runtime's threads must not spin meanwhile.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What the runtime rewrites at a higher level changes the numbers: a DequantizeLinear with a
    # MatMul becomes a kernel with 8-bit activations there.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return ort.InferenceSession(
            to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except runtime_errors() as error:
        raise NotMeasuredError(
            f"ONNX Runtime cannot load a part of the model: {first_line(error)}"
        ) from error


def constant_values(graph: ir.Graph, fed: Iterable[str] = ()) -> set[ir.Value]:
    """The values of a graph that depend on no graph input: initializers, and what follows from them.

    Args:
        graph: in topological order.
        fed: names of initializers that are given at every run, and so are no constants.
    """
    given = set(fed)
    found = {v for v in graph.initializers.values() if v.name not in given}
    for node in graph:
        if node.op_type.startswith(("Random", "Bernoulli", "Multinomial")):
            continue  # draws anew at every run
        if all(v in found for v in read_values(node)):
            found.update(node.outputs)
    return found
