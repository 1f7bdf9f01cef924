"""Sketch: a pencil for drawing ONNX graphs by hand, with seeded weights.

The builders of this folder, and the export of the trained model, draw their graphs with it. It names
things as a torch export does (a weight by its state-dict name, a node by its module path), so that
what is drawn here looks to a pass like what people bring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

IR_VERSION = 10
"""Format version of the files: the first with 4-bit integers; every runtime since mid-2024 reads it."""

Dim = int | str


class Sketch:
    """One graph being drawn: the main graph, or a subgraph or function body drawn by a sketch of its own.

    Args:
        rng: source of the random weights; sketches of subgraphs share their parent's.
        opset: version of the standard operator set.
        name: name of the graph.
    """

    def __init__(self, rng: np.random.Generator | int = 0, opset: int = 18, name: str = "main_graph") -> None:
        self.rng = np.random.default_rng(rng)
        self.opset = opset
        self.name = name
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self._count: dict[str, int] = {}

    # -- values ----------------------------------------------------------------------------------

    def input(
        self, name: str, shape: Sequence[Dim] | None, dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """A graph input; a dimension given as a string is dynamic under that name."""
        value = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(list(shape))
        )
        self.inputs.append(value)
        return value

    def weight(self, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """An initializer holding ``array``."""
        tensor = ir.Tensor(array, name=name) if isinstance(array, np.ndarray) else array
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self.initializers.append(value)
        return value

    def normal(self, name: str, *shape: int, fan_in: int, gain: float = 1.0) -> ir.Value:
        """A weight drawn from N(0, gain²/fan_in), which keeps the variance of what flows through."""
        scale = gain / math.sqrt(fan_in)
        return self.weight(name, (self.rng.standard_normal(shape) * scale).astype(np.float32))

    def uniform(self, name: str, *shape: int, low: float, high: float) -> ir.Value:
        """A weight drawn evenly between ``low`` and ``high``."""
        return self.weight(name, self.rng.uniform(low, high, shape).astype(np.float32))

    def ints(self, name: str, *values: int) -> ir.Value:
        """An int64 vector: the axes, shapes and bounds that operators take as inputs."""
        return self.weight(name, np.array(values, dtype=np.int64))

    def scalar(self, name: str, value: float | int | bool) -> ir.Value:
        """A constant without dimensions: float32, int64 or bool after the Python type."""
        dtype = np.bool_ if isinstance(value, bool) else np.int64 if isinstance(value, int) else np.float32
        return self.weight(name, np.array(value, dtype=dtype))

    # -- nodes -----------------------------------------------------------------------------------

    def op(
        self, op_type: str, *inputs: ir.Value | None, at: str = "", domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output.

        Args:
            op_type: the operator.
            inputs: its inputs; None is an optional input left out.
            at: module path the node is named after.
            domain: operator domain (the function library's, for a call).
            attributes: ONNX attributes; a graph or an ``ir.RefAttr`` as it is.
        """
        return self.multi(op_type, *inputs, outputs=1, at=at, domain=domain, **attributes)[0]

    def multi(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        at: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """A node with several outputs; otherwise as :meth:`op`."""
        name = self._unique(f"/{at.replace('.', '/')}/{op_type}" if at else f"/{op_type}")
        given: Mapping[str, Any] = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(
            op_type,
            list(inputs),
            attributes=given,
            domain=domain,
            num_outputs=outputs,
            name=f"{self._prefix}{name}",
        )
        for i, output in enumerate(node.outputs):
            output.name = f"{self._prefix}{name}_output_{i}"
        self.nodes.append(node)
        return node.outputs

    @property
    def _prefix(self) -> str:
        # ONNX wants names that differ between a graph and the subgraphs that see its values.
        return "" if self.name == "main_graph" else self.name

    def _unique(self, name: str) -> str:
        number = self._count.get(name, 0)
        self._count[name] = number + 1
        return f"{name}_{number}" if number else name

    # -- layers ----------------------------------------------------------------------------------

    def conv(
        self,
        x: ir.Value,
        at: str,
        cin: int,
        cout: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
    ) -> ir.Value:
        """Conv with a random weight [cout, cin / groups, kernel, kernel] and "same" padding."""
        fan_in = cin // groups * kernel * kernel
        weight = self.normal(f"{at}.weight", cout, cin // groups, kernel, kernel, fan_in=fan_in, gain=1.4)
        more = [self.normal(f"{at}.bias", cout, fan_in=100)] if bias else []
        pad = dilation * (kernel // 2)
        return self.op(
            "Conv",
            x,
            weight,
            *more,
            at=at,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
            dilations=[dilation, dilation],
            group=groups,
        )

    def norm(self, x: ir.Value, at: str, channels: int) -> ir.Value:
        """BatchNormalization in inference form, with random but sane statistics.

        One scale in eight is negative, which trained models have and a fusion must survive.
        """
        scale = self.rng.uniform(0.6, 1.4, channels)
        scale[::8] *= -1.0
        weight = self.weight(f"{at}.weight", scale.astype(np.float32))
        bias = self.uniform(f"{at}.bias", channels, low=-0.3, high=0.3)
        mean = self.uniform(f"{at}.running_mean", channels, low=-0.5, high=0.5)
        var = self.uniform(f"{at}.running_var", channels, low=0.5, high=2.0)
        return self.op("BatchNormalization", x, weight, bias, mean, var, at=at, epsilon=1e-5)

    def linear(
        self, x: ir.Value, at: str, inputs: int, outputs: int, *, form: str = "matmul", bias: bool = True
    ) -> ir.Value:
        """A linear layer in one of the forms exporters write.

        Args:
            x: [..., inputs]; [N, inputs] for the ``gemm`` form.
            at: module path; the weight is ``{at}.weight``.
            inputs: input channels.
            outputs: output channels.
            form: ``matmul`` (weight [in, out]), ``transposed`` (weight [out, in] behind a Transpose) or
                ``gemm`` (weight [out, in], transB).
            bias: whether there is a bias [outputs].
        """
        shape = (inputs, outputs) if form == "matmul" else (outputs, inputs)
        weight = self.normal(f"{at}.weight", *shape, fan_in=inputs)
        offset = self.uniform(f"{at}.bias", outputs, low=-0.1, high=0.1) if bias else None
        if form == "gemm":
            return self.op("Gemm", x, weight, offset, at=at, transB=1)
        if form == "transposed":
            weight = self.op("Transpose", weight, at=at, perm=[1, 0])
        y = self.op("MatMul", x, weight, at=at)
        return y if offset is None else self.op("Add", y, offset, at=at)

    # -- the result ------------------------------------------------------------------------------

    def output(
        self, value: ir.Value, name: str, shape: Sequence[Dim] | None, dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """Name ``value`` and give it type and shape, as a graph output must have them."""
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = None if shape is None else ir.Shape(list(shape))
        return value

    def graph(self, *outputs: ir.Value) -> ir.Graph:
        """The graph drawn so far, with these outputs."""
        return ir.Graph(
            self.inputs,
            list(outputs),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": self.opset},
            name=self.name,
        )

    def model(self, *outputs: ir.Value, functions: Sequence[ir.Function] = ()) -> ir.Model:
        """The finished model; function domains are imported."""
        graph = self.graph(*outputs)
        for function in functions:
            graph.opset_imports[function.domain] = 1
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="effic.models", functions=functions)
