"""Run a model in parts over many samples, so that neither all weights nor all values are in memory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model
from effic.ir.probe import Probe, constant_values
from effic.ir.shapes import static_shapes
from effic.ir.tensors import Scratch
from effic.ir.topology import read_values

Arrays = dict[str, np.ndarray]

PART_BYTES = 128 << 20
"""Weights and statistics of one part, unless a single node has more."""

STORE_BYTES = 64 << 20
"""Values between parts that stay in memory; the others go to files."""

RUNTIME_BYTES = 16 << 20
"""What the runtime takes for itself."""

# Operators whose results are no tensors, and so cannot be kept between parts.
_NO_TENSORS = {
    "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceMap", "SplitToSequence",
    "Optional",
}  # fmt: skip


@dataclass
class Part:
    """Consecutive nodes of a model that are run together.

    Attributes:
        nodes: in order.
        wanted: values asked for that are made here (in the first part also graph inputs).
        kept: values that later parts read.
        weight_bytes: of the weights read here.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    wanted: list[ir.Value] = field(default_factory=list)
    kept: list[ir.Value] = field(default_factory=list)
    weight_bytes: int = 0


class Parts:
    """A model's main graph cut into parts, as far as some values need it.

    Args:
        model: the model. Between parts its weights may be rewritten: what follows sees it.
        wanted: values of the main graph to hand out, each in the part that makes it.
        fed: names of the graph inputs that samples give.
        feeds: the samples, anew at every call.
        count: how many there are.
        costs: bytes that handing out a value takes besides, by name (statistics).
        breaks: nodes that begin a part of their own.
        part_bytes: see :data:`PART_BYTES`.
    """

    def __init__(
        self,
        model: Model,
        wanted: Sequence[ir.Value],
        fed: Collection[str],
        feeds: Callable[[], Iterable[Mapping[str, np.ndarray]]],
        count: int,
        *,
        costs: Mapping[str, int] | None = None,
        breaks: Collection[ir.Node] = (),
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._model, self._fed, self._costs = model, set(fed), costs or {}
        self._feeds, self._count = feeds, count
        self._constants = constant_values(model.graph, fed)
        self._wanted = list({id(v): v for v in wanted}.values())
        needed = self._needed()
        reads = {node: [v for v in read_values(node) if self._flows(v)] for node in needed}
        self._last: dict[str, int] = {}
        self._place = {node: number for number, node in enumerate(needed)}
        for node, values in reads.items():
            for value in values:
                self._last[str(value.name)] = self._place[node]
        self.parts = self._cut(needed, reads, self._costs, set(breaks), part_bytes)
        self._store = _Store(model.scratch)

    @property
    def costs(self) -> int:
        """Bytes that handing out all wanted values takes besides."""
        return sum(self._costs.values())

    def memory(self, sample: Mapping[str, np.ndarray]) -> int:
        """About how many bytes running the parts takes at most, judged from one sample.

        Weights and statistics of the largest part, the values it hands out or keeps (once in the
        runtime and once outside), the largest values of a node, and what is kept between parts.
        """
        size = self._sizer(sample)
        most = 0
        for part in self.parts:
            handed = {id(v): v for v in (*part.wanted, *part.kept)}.values()
            here = max((size(n.outputs) + size(filter(None, n.inputs)) for n in part.nodes), default=0)
            costs = sum(self._costs.get(str(v.name), 0) for v in part.wanted)
            most = max(most, part.weight_bytes + costs + 2 * size(handed) + here)
        kept = len(self.parts) > 1
        return most + RUNTIME_BYTES + (STORE_BYTES if kept else 0)

    def kept(self, sample: Mapping[str, np.ndarray]) -> int:
        """About how many bytes of one sample's values are kept between parts, at most at a time."""
        size = self._sizer(sample)
        live: list[ir.Value] = []
        most = 0
        for part in self.parts:
            end = self._place[part.nodes[-1]] if part.nodes else -1
            live = [v for v in (*live, *part.kept) if self._last.get(str(v.name), -1) > end]
            most = max(most, size(live))
        return most

    def _sizer(self, sample: Mapping[str, np.ndarray]) -> Callable[[Iterable[ir.Value]], int]:
        """What tells the bytes of values for a sample."""
        dims: dict[str, int] = {}
        for value in self._model.graph.inputs:
            array = sample.get(str(value.name))
            if array is not None and value.shape is not None and len(value.shape) == array.ndim:
                for dim, length in zip(value.shape, array.shape, strict=True):
                    if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                        dims[str(dim.value)] = length
        shapes = static_shapes(self._model, dims)

        def size(values: Iterable[ir.Value]) -> int:
            return sum(4 * math.prod(shapes.get(str(v.name), ())) for v in values)

        return size

    def gather(self) -> Iterator[Arrays]:
        """Run all parts, and hand out all wanted values of a sample together."""
        if len(self.parts) == 1:
            yield from self.run(self.parts[0])
            return
        found = _Store(self._model.scratch)
        for part in self.parts:
            found.begin(str(v.name) for v in part.wanted)
            for values in self.run(part):
                for name, array in values.items():
                    found.put(name, array)
        names = found.names()
        for number in range(self._count):
            yield {name: found.get(name, number) for name in names}

    def run(self, part: Part) -> Iterator[Arrays]:
        """Run one part, which must be the next, over all samples.

        Args:
            part: one of :attr:`parts`.

        Yields:
            For each sample the wanted values that the part makes, by name.
        """
        graph = self._model.graph
        outside = [v for v in graph.inputs if v.name in self._fed]
        stored = [v for v in self._values_of(part) if v.name in self._store]
        probe = Probe(self._model, [*outside, *stored], [*part.wanted, *part.kept])
        from_store = [name for name in probe.inputs if name in self._store]
        wanted, kept = ([str(v.name) for v in values] for values in (part.wanted, part.kept))
        self._store.begin(kept)
        # Most parts see nothing of the sample itself: then it is not read again.
        fresh = [name for name in probe.inputs if name in self._fed]
        samples: Iterable[Mapping[str, np.ndarray]] = self._feeds() if fresh else [{}] * self._count
        try:
            for number, sample in enumerate(samples):
                feeds = {name: sample[name] for name in fresh}
                feeds.update((name, self._store.get(name, number)) for name in from_store)
                values = probe.run(feeds)
                for name in kept:
                    self._store.put(name, values[name])
                yield {name: values[name] for name in wanted}
        finally:
            probe.close()
        end = self._place[part.nodes[-1]] if part.nodes else -1
        for name in self._store.names():
            if self._last.get(name, -1) <= end:
                self._store.drop(name)

    def close(self) -> None:
        """Remove what is kept between parts."""
        for name in self._store.names():
            self._store.drop(name)

    def _values_of(self, part: Part) -> Iterator[ir.Value]:
        seen: set[int] = set()
        for node in part.nodes:
            for value in read_values(node):
                if id(value) not in seen:
                    seen.add(id(value))
                    if value.graph is self._model.graph:
                        yield value

    def _flows(self, value: ir.Value) -> bool:
        """Whether a value depends on the sample and is made by a node of the main graph."""
        return (
            value.producer() is not None and value.graph is self._model.graph and value not in self._constants
        )

    def _needed(self) -> list[ir.Node]:
        """The nodes that the wanted values need, but for those over constants alone."""
        todo = [v for v in self._wanted if self._flows(v)]
        found: set[ir.Node] = set()
        while todo:
            node = todo.pop().producer()
            if node is not None and node not in found:
                found.add(node)
                todo.extend(v for v in read_values(node) if self._flows(v))
        return [node for node in self._model.graph if node in found]

    def _cut(
        self,
        needed: list[ir.Node],
        reads: Mapping[ir.Node, list[ir.Value]],
        costs: Mapping[str, int],
        breaks: set[ir.Node],
        part_bytes: int,
    ) -> list[Part]:
        wanted = {id(v) for v in self._wanted}
        parts = [Part(wanted=[v for v in self._wanted if not self._flows(v)])]
        part, used = parts[0], sum(costs.get(str(v.name), 0) for v in parts[0].wanted)
        stuck = 0  # last place that reads a value which cannot be kept
        for place, node in enumerate(needed):
            weights = self._weights(node)
            extra = sum(costs.get(str(v.name), 0) for v in node.outputs if id(v) in wanted)
            full = used + weights + extra > part_bytes and part.nodes
            # A break before the first node still ends a part: what is asked of the graph inputs.
            if (full or node in breaks) and (place > stuck or not place):
                part = Part()
                parts.append(part)
                used = 0
            part.nodes.append(node)
            part.wanted.extend(v for v in node.outputs if id(v) in wanted)
            part.weight_bytes += weights
            used += weights + extra
            for value in node.outputs:
                if _no_tensor(value):
                    stuck = max(stuck, self._last.get(str(value.name), 0))
        for part in parts:
            end = self._place[part.nodes[-1]] if part.nodes else -1
            made = (v for node in part.nodes for v in node.outputs)
            part.kept = [v for v in made if self._last.get(str(v.name), -1) > end]
        return [part for part in parts if part.nodes or part.wanted]

    def _weights(self, node: ir.Node) -> int:
        """Bytes of the constants that a node reads, as floats where they are encoded."""
        total = 0
        todo = [v for v in read_values(node) if v.graph is self._model.graph and not self._flows(v)]
        seen: set[int] = set()
        while todo:
            value = todo.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            tensor = value.const_value
            if tensor is not None:
                wide = 1 if tensor.dtype.bitwidth >= 16 else 4
                total += tensor.size * wide if wide > 1 else tensor.nbytes
            elif (producer := value.producer()) is not None:
                todo.extend(v for v in producer.inputs if v is not None)
        return int(total)


def _no_tensor(value: ir.Value) -> bool:
    if value.type is not None:
        return not isinstance(value.type, ir.TensorType)
    node = value.producer()
    return node is not None and node.op_type in _NO_TENSORS


class _Store:
    """Arrays of all samples by name: in memory while they are few, else one file a name."""

    def __init__(self, scratch: Scratch, limit: int = STORE_BYTES) -> None:
        self._scratch, self._limit, self._held = scratch, limit, 0
        self._memory: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._layout: dict[str, list[tuple[int, np.dtype, tuple[int, ...]]]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._memory

    def names(self) -> list[str]:
        return list(self._memory)

    def begin(self, names: Iterable[str]) -> None:
        for name in names:
            self.drop(name)
            self._memory[name], self._layout[name] = [], []

    def put(self, name: str, array: np.ndarray) -> None:
        """Keep the array of the next sample."""
        array = np.asarray(array)
        rows = self._memory[name]
        if name not in self._files and (self._held + array.nbytes <= self._limit or array.dtype.hasobject):
            self._held += array.nbytes
            # A copy: what a runtime returns keeps its whole arena alive.
            rows.append(np.array(array))
            return
        if name not in self._files:
            path = os.path.join(
                self._scratch.folder, f"kept-{id(self)}-{len(self._files)}-{len(self._layout)}"
            )
            self._files[name] = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed in drop)
            os.unlink(path)  # gone with the last handle, whatever happens
        file = self._files[name]
        at = file.seek(0, os.SEEK_END)
        file.write(np.ascontiguousarray(array).tobytes())
        self._layout[name].append((at, array.dtype, array.shape))

    def get(self, name: str, number: int) -> np.ndarray:
        """The array of a sample."""
        rows = self._memory[name]
        if number < len(rows):
            return rows[number]
        at, dtype, shape = self._layout[name][number - len(rows)]
        file = self._files[name]
        array = np.empty(shape, dtype)
        file.seek(at)
        file.readinto(array.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
        return array

    def drop(self, name: str) -> None:
        """Forget the arrays of a name."""
        self._held -= sum(a.nbytes for a in self._memory.pop(name, []))
        self._layout.pop(name, None)
        file = self._files.pop(name, None)
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()
