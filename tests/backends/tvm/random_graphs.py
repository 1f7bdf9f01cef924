"""Random small graphs: every node is made of values that are there, and checked to be what ONNX allows.

A node is kept when ONNX's reference implementation computes it, so that a graph is valid by construction;
its values are known, and the next nodes can be chosen to fit them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from effic.ir.model import Model
from tests.backends.tvm.random_nodes import MAKERS, MOST

OPSET = 20
_LARGE = 1e4

_PRIMES = (1, 1, 2, 3, 5, 7, 8, 16, 17, 33)


class RandomGraph:
    """A graph of ``count`` nodes or fewer, from a seed.

    Attributes:
        model: with its outputs; every value that nothing reads is one.
        feeds: inputs by name.
        values: what ONNX's reference implementation makes of each value.
    """

    def __init__(self, seed: int, count: int = 8, special: bool = False) -> None:
        """With ``special`` the inputs hold a NaN, infinities and a zero."""
        self.rng = np.random.default_rng(seed)
        self.values: dict[str, np.ndarray] = {}
        self.feeds: dict[str, np.ndarray] = {}
        self.constants: list[TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self._number, self._special = 0, special
        for number in range(int(self.rng.integers(1, 4))):
            self._input(f"x{number}", special)
        tries = 0
        while len(self.nodes) < count and tries < 20 * count:
            tries += 1
            self._try(MAKERS[self.below(len(MAKERS))])
        self.model = self._model()

    # -- values ------------------------------------------------------------------------------------

    def _input(self, name: str, special: bool) -> None:
        rank = int(self.rng.choice([1, 2, 2, 3, 3, 4, 4]))
        shape = [self.size() for _ in range(rank)]
        while np.prod(shape) > MOST:
            shape[int(np.argmax(shape))] = 2
        kind = self.rng.choice(
            ["float", "float", "float", "float", "int64", "int32", "bool", "int8", "uint8"]
        )
        array: np.ndarray
        if kind == "float":
            array = self.rng.standard_normal(shape).astype(np.float32)
            if special:
                flat = array.reshape(-1)
                for value in (np.nan, np.inf, -np.inf, 0.0, -0.0):
                    flat[int(self.rng.integers(flat.size))] = value
        elif kind == "bool":
            array = self.rng.random(shape) < 0.5
        else:
            low = 0 if kind == "uint8" else -9
            array = self.rng.integers(low, 10, shape).astype(kind)
        self.values[name] = self.feeds[name] = array

    def size(self) -> int:
        return int(self.rng.choice(_PRIMES))

    def pick(self, fits: Callable[[np.ndarray], bool] = lambda a: True) -> str | None:
        """A value that fits, the newer the likelier."""
        names = [name for name, array in self.values.items() if fits(array)]
        if not names:
            return None
        weights = np.arange(1, len(names) + 1) ** 1.5
        return str(self.rng.choice(names, p=weights / weights.sum()))

    def constant(self, array: np.ndarray) -> str:
        self._number += 1
        name = f"c{self._number}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def normal(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def chance(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, names: str) -> str:
        return str(self.rng.choice(names.split()))

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def axis(self, array: np.ndarray) -> int:
        axis = self.below(array.ndim)
        return axis - array.ndim if self.chance(0.3) else axis

    # -- nodes -------------------------------------------------------------------------------------

    def _try(self, make: Callable[[RandomGraph], onnx.NodeProto | None]) -> None:
        before = len(self.constants)
        node = make(self)
        if node is None or not self._append(node):
            del self.constants[before:]

    def _append(self, node: onnx.NodeProto) -> bool:
        known = {c.name: numpy_helper.to_array(c) for c in self.constants}
        feeds = {name: self.values.get(name, known.get(name)) for name in node.input if name}
        self._number += 1
        outputs = [f"v{self._number}_{i}" for i in range(len(node.output))]
        del node.output[:]
        node.output.extend(outputs)
        node.name = f"{node.op_type}_{self._number}"
        graph = helper.make_graph(
            [node],
            "g",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in feeds.items()
            ],
            [helper.make_empty_tensor_value_info(n) for n in outputs],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                found = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # noqa: BLE001 - it raises anything for what ONNX does not allow
            return False
        if not all(isinstance(a, np.ndarray) or np.isscalar(a) for a in found):
            return False
        arrays = [np.asarray(a) for a in found]
        if any(a.size > MOST or a.size == 0 for a in arrays):
            return False
        for a in arrays:
            finite = a[np.isfinite(a)] if a.dtype.kind == "f" else a
            if finite.size and a.dtype.kind in "fi" and np.abs(finite.astype(np.float64)).max() > _LARGE:
                return False
        if not self._special and any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in arrays):
            return False
        self.nodes.append(node)
        self.values.update(zip(outputs, arrays, strict=True))
        return True

    def _model(self) -> Model:
        read = {name for node in self.nodes for name in node.input}
        made = [name for node in self.nodes for name in node.output]
        outputs = [name for name in made if name not in read]
        info = {
            name: helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in self.values.items()
        }
        graph = helper.make_graph(
            self.nodes, "g", [info[n] for n in self.feeds], [info[n] for n in outputs], self.constants
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        return Model(ir.from_proto(proto))

    def __str__(self) -> str:
        lines = [f"{n}: {a.dtype}{list(a.shape)}" for n, a in self.feeds.items()]
        lines += [
            f"{c.name} = {numpy_helper.to_array(c).tolist() if np.prod(c.dims) < 17 else list(c.dims)}"
            for c in self.constants
        ]
        for node in self.nodes:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            shapes = [f"{self.values[o].dtype}{list(self.values[o].shape)}" for o in node.output]
            lines.append(
                f"{list(node.output)} {shapes} = {node.op_type}({', '.join(node.input)}) {attributes}"
            )
        return "\n".join(lines)
