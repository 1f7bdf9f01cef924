"""LSTM, GRU and RNN: one product for what the inputs add at all steps, then one kernel per direction.

Weights that are constants are packed while the model is built; others are laid out in each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.kernels.dense import DenseMatMul
from effic.backends.tvm.kernels.recurrent import Recurrent
from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of

_DEFAULTS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}


def recurrent(lowering: Lowering, node: ir.Node) -> None:
    """LSTM, GRU or RNN over a sequence of known length."""
    _Layer(lowering, node).convert()


@dataclass
class _Layer:
    """One node."""

    lowering: Lowering
    node: ir.Node

    def convert(self) -> None:
        lowering, node, op = self.lowering, self.node, relax.op
        if lowering.cpu is None:
            lowering.refuse(node, "has a kernel for CPUs only")
        x = lowering.tensor(node.inputs[0])
        if dtype_of(x) != "float32":
            lowering.refuse(node, f"computes in {dtype_of(x)}; its kernel is for float32")
        if node.attributes.get_int("input_forget", 0):
            lowering.refuse(node, "couples its input and forget gates")
        batch_first = bool(node.attributes.get_int("layout", 0))
        if batch_first:
            x = lowering.emit(op.permute_dims(x, [1, 0, 2]))
        if not all(isinstance(size, int) for size in shape_of(x)):
            lowering.refuse(node, "reads a sequence or a batch whose size is left open; pin it with shapes")
        whole = [self._direction(x, number, spec) for number, spec in enumerate(self._specs(x))]
        steps = shape_of(x)[0]
        for index, (low, high) in enumerate([(0, steps), (steps, steps + 1), (steps + 1, steps + 2)]):
            value = node.outputs[index] if index < len(node.outputs) else None
            if value is None or not (value.uses() or value.is_graph_output()):
                continue
            # [directions][steps or 1, batch, hidden]
            parts = [lowering.emit(op.strided_slice(one, [0], [low], [high])) for one in whole]
            if index:
                y = parts[0] if len(parts) == 1 else lowering.emit(op.concat(parts, 0))
                order = [1, 0, 2]
            else:
                parts = [lowering.emit(op.expand_dims(part, 1)) for part in parts]
                y = parts[0] if len(parts) == 1 else lowering.emit(op.concat(parts, 1))
                order = [2, 0, 1, 3]
            lowering.set(value, op.permute_dims(y, order) if batch_first else y)

    def _specs(self, x: Any) -> list[Recurrent]:
        """The kernels of all directions."""
        node, cell = self.node, self.node.op_type
        get = node.attributes
        direction = get.get_string("direction", "forward")
        backwards = {"forward": [False], "reverse": [True]}.get(direction or "", [False, True])
        hidden = shape_of(self.lowering.value(node.inputs[2]))[2]
        names = [name.lower() for name in get["activations"].as_strings()] if "activations" in get else []
        names = names or list(_DEFAULTS[cell]) * len(backwards)
        each = len(names) // len(backwards)
        for alpha in ("activation_alpha", "activation_beta"):
            if alpha in get and get[alpha].as_floats():
                self.lowering.refuse(node, "has activations with factors of their own")
        steps, batch, _ = shape_of(x)
        specs = [
            Recurrent(
                cell,
                steps,
                batch,
                hidden,
                tuple(names[number * each : (number + 1) * each]),
                reverse,
                self._lengths(steps) is not None,
                cell == "LSTM" and self._given(7) is not None,
                cell == "GRU" and bool(get.get_int("linear_before_reset", 0)),
                get.get_float("clip", 0.0) or 0.0,
            )
            for number, reverse in enumerate(backwards)
        ]
        for spec in specs:
            if reason := spec.why_not():
                self.lowering.refuse(node, f"has no kernel: {reason}")
        return specs

    def _given(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def _lengths(self, steps: int) -> ir.Value | None:
        """The lengths of the rows, None where all are whole."""
        value = self._given(4)
        known = None if value is None else self.lowering.array(value)
        return None if known is not None and (known == steps).all() else value

    def _direction(self, x: Any, number: int, spec: Recurrent) -> Any:
        """``[steps + 2, batch, hidden]``: see the kernel."""
        lowering, emit = self.lowering, self.lowering.emit
        steps, batch, width = spec.steps, spec.batch, spec.gates * spec.width
        size = shape_of(x)[2]
        bias, inner = self._biases(number, spec)
        flat = emit(relax.op.reshape(x, (steps * batch, size)))
        given = self.node.inputs[1]
        known = lowering.array(given)
        if known is not None and known.dtype == np.float32:
            dense = DenseMatMul(steps * batch, size, width)
            matrix = _rows(known[number], spec.gates, spec.width)
            key = ("recurrent", id(given), number, dense.name)
            packed = lowering.weights(key, f"{_name(given)}.{number}", lambda: dense.pack(matrix.T))
            y = lowering.call(dense, [flat, *packed], (steps * batch, width), "float32")
        else:
            turned = emit(relax.op.permute_dims(self._laid_out(given, number, spec), [1, 0]))
            y = emit(relax.op.matmul(flat, turned))
        if bias is not None:
            y = emit(relax.op.add(y, bias))
        arguments = [emit(relax.op.reshape(y, (steps, batch, width))), self._recurrence(number, spec)]
        arguments.append(self._state(5, number, spec))
        if spec.cell == "LSTM":
            arguments.append(self._state(6, number, spec))
        if spec.peepholes:
            arguments.append(self._vector(self._given(7), number, 3, 0, 3, spec))
        if spec.after:
            arguments.append(self._zeros((spec.width,)) if inner is None else inner)
        if spec.lengths:
            arguments.append(lowering.tensor(self._given(4)))
        return lowering.call(spec, arguments, (steps + 2, batch, spec.hidden), "float32")

    def _recurrence(self, number: int, spec: Recurrent) -> Any:
        lowering, given = self.lowering, self.node.inputs[2]
        known = lowering.array(given)
        if known is not None and known.dtype == np.float32:
            matrix = _rows(known[number], spec.gates, spec.width)
            key = ("recurrence", id(given), number)
            return lowering.weights(key, f"{_name(given)}.{number}", lambda: spec.pack(matrix))[0]
        matrix = self._laid_out(given, number, spec)
        blocks = lowering.emit(relax.op.reshape(matrix, (spec.gates * spec.width // 16, 16, spec.hidden)))
        return lowering.emit(relax.op.permute_dims(blocks, [0, 2, 1]))

    def _laid_out(self, value: ir.Value | None, number: int, spec: Recurrent) -> Any:
        """The computed weight of a direction, ``[gates · width, size]``."""
        emit, whole = self.lowering.emit, self.lowering.tensor(value)
        size = shape_of(whole)[2]
        one = emit(relax.op.strided_slice(whole, [0], [number], [number + 1]))
        one = emit(relax.op.reshape(one, (spec.gates, spec.hidden, size)))
        one = self._wide(one, 1, spec)
        return emit(relax.op.reshape(one, (spec.gates * spec.width, size)))

    def _biases(self, number: int, spec: Recurrent) -> tuple[Any | None, Any | None]:
        """What is added to all gates, ``[gates · width]``, and what is inside of the reset gate, ``[width]``."""
        value, gates = self._given(3), spec.gates
        if value is None:
            return None, None
        outer = self._vector(value, number, 2 * gates, 0, gates, spec)
        if not spec.after:
            inner = self._vector(value, number, 2 * gates, gates, 2 * gates, spec)
            return self.lowering.emit(relax.op.add(outer, inner)), None
        inner = self._vector(value, number, 2 * gates, gates, 2 * gates - 1, spec)
        nothing = self._zeros((spec.width,))
        inner = self.lowering.emit(relax.op.concat([inner, nothing], 0))
        last = self._vector(value, number, 2 * gates, 2 * gates - 1, 2 * gates, spec)
        return self.lowering.emit(relax.op.add(outer, inner)), last

    def _vector(
        self, value: ir.Value | None, number: int, parts: int, low: int, high: int, spec: Recurrent
    ) -> Any:
        """Some of the ``parts`` pieces of one number per unit, ``[(high - low) · width]``."""
        emit = self.lowering.emit
        one = emit(relax.op.strided_slice(self.lowering.tensor(value), [0], [number], [number + 1]))
        one = emit(relax.op.reshape(one, (parts, spec.hidden)))
        one = emit(relax.op.strided_slice(one, [0], [low], [high]))
        return emit(relax.op.reshape(self._wide(one, 1, spec), ((high - low) * spec.width,)))

    def _state(self, index: int, number: int, spec: Recurrent) -> Any:
        """The first state of a direction, ``[batch, width]``; zeros without."""
        emit, value = self.lowering.emit, self._given(index)
        if value is None:
            return self._zeros((spec.batch, spec.width))
        axis = 1 if self.node.attributes.get_int("layout", 0) else 0
        one = emit(relax.op.strided_slice(self.lowering.tensor(value), [axis], [number], [number + 1]))
        return self._wide(emit(relax.op.reshape(one, (spec.batch, spec.hidden))), 1, spec)

    def _wide(self, value: Any, axis: int, spec: Recurrent) -> Any:
        """The units along an axis padded to whole vectors."""
        if spec.width == spec.hidden:
            return value
        pads = [0, 0] * len(shape_of(value))
        pads[2 * axis + 1] = spec.width - spec.hidden
        return self.lowering.emit(relax.op.nn.pad(value, pads))

    def _zeros(self, shape: Sequence[int]) -> Any:
        return self.lowering.emit(relax.op.zeros(tuple(shape), "float32"))


def _rows(matrix: np.ndarray, gates: int, width: int) -> np.ndarray:
    """``[gates · H, K]`` with the units of each gate padded: ``[gates · width, K]``."""
    parts = matrix.reshape(gates, -1, matrix.shape[1])
    full = np.zeros((gates, width, matrix.shape[1]), np.float32)
    full[:, : parts.shape[1]] = parts
    return full.reshape(gates * width, -1)


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or "weight"
