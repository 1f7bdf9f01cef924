"""Calibration: the samples a pass may look at, and what it may ask about the model's values on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.ir.errors import NotMeasuredError, UnsupportedError, UsageError
from effic.ir.model import Model
from effic.ir.probe import Probe, constant_values
from effic.ir.weights import WeightSite
from effic.passes.activations import Activation, Rows, activations, operand, why_unseen
from effic.passes.base import Remarks
from effic.passes.calibration_data import Arrays, Progress, Samples, held, load_samples
from effic.passes.parts import PART_BYTES, Part, Parts
from effic.passes.pipeline import fingerprint
from effic.passes.statistics import (
    BUFFER_BYTES,
    BUFFER_ROWS,
    LARGEST,
    Accumulator,
    RangeAccumulator,
    RangeStatistics,
    SiteStatistics,
    combine,
)

__all__ = ["Calibration", "Plan", "Probe", "RangeStatistics", "SiteStatistics"]

Key = tuple[str, Rows]

SAMPLES = 128
"""Samples that are used of what there is, unless the caller says otherwise."""

_NOTHING = Accumulator(1, 0, second_moment=False, sketch=0).finish()
"""Statistics of what nobody asks for."""

CACHE_BYTES = 64 << 20
"""Statistics that are kept for the next pass over an unchanged model."""


@dataclass(frozen=True)
class Plan:
    """What a walk will take, known before it starts.

    Attributes:
        samples: how many are run.
        parts: how many parts the model is run in.
        bytes: memory it will take at most, about.
    """

    samples: int
    parts: int
    bytes: int

    @property
    def megabytes(self) -> int:
        """The memory in megabytes, at least one."""
        return max(1, round(self.bytes / 1e6))

    def __str__(self) -> str:
        samples = "1 sample" if self.samples == 1 else f"{self.samples} samples"
        parts = "1 part" if self.parts == 1 else f"{self.parts} parts"
        return f"{samples}, {parts}, about {self.megabytes} MB"


class Calibration:
    """Samples, and statistics of a model's values on them.

    One sample is one feed of the whole model, batch included. The model is run in parts over all
    samples, so that neither its weights nor its values are in memory together.

    Attributes:
        source: where the samples are from, for people: ``"ids_calib.npy, 18 windows of 512"``.
        digest: sha256 of the data as used.
        random: whether they are made up.
        count: how many there are.
        progress: called with what is being done, how far it is and how far it goes; may be replaced.
        plans: what each walk since the list was last emptied was expected to take.
        share: part of the weights that a pass is tried on, 1 in earnest; a pass that chooses its way by how
            much there is to do has to choose as for all of them.
    """

    share: float = 1.0

    def __init__(self, samples: Samples, progress: Progress | None = None) -> None:
        self._samples = samples
        self.source, self.digest, self.random = samples.source, samples.digest, samples.random
        self.count = samples.count
        self.progress = progress
        self.plans: list[Plan] = []
        self.part_bytes = PART_BYTES
        self._cache = _Cache()
        self._names = set(next(samples.feeds()))
        self._constants: tuple[ir.Graph, int, set[ir.Value]] | None = None

    @classmethod
    def load(
        cls,
        data: Any,
        model: Model,
        *,
        samples: int = SAMPLES,
        seed: int = 0,
        window: int | None = None,
        progress: Progress | None = None,
    ) -> Calibration:
        """Samples that fit a model.

        Args:
            data: a path (``.npz``, ``.npy``, ``.safetensors`` or a folder of them),
                ``"package.module:function"`` or a function that returns an iterable of mappings,
                a mapping from input names to arrays, an iterable of such, one array for a model with one
                input, or ``"random"``.

                Arrays of more rows than the model's batch are cut into samples along axis 0, and
                one-dimensional integers for a model of token ids into windows; what a folder, a
                function or an iterable holds are feeds as they are.
            model: whose inputs they are for.
            samples: at most so many, chosen at random (by ``seed``) and kept in order; of an iterator
                the first.
            seed: of the choice, and of made-up data.
            window: tokens of a sample; by default what the model fixes, or 512.
            progress: see the class.

        Raises:
            UsageError: no such data, or data that do not fit the model.
        """
        return cls(
            load_samples(data, model, samples=samples, seed=seed, window=window, progress=progress), progress
        )

    @classmethod
    def of(cls, feeds: Sequence[Mapping[str, np.ndarray]], *, source: str = "arrays") -> Calibration:
        """Samples in memory, as they are; they have to fit the model that is asked about."""
        return cls(held(feeds, source))

    def feeds(self) -> Iterator[Arrays]:
        """The samples, the same every time."""
        return self._samples.feeds()

    def to_dict(self) -> dict[str, Any]:
        """What a report says of the data, JSON-able."""
        return {
            "source": self.source,
            "digest": self.digest,
            "samples": self.count,
            "random": self.random,
        }

    # -- weights ---------------------------------------------------------------------------------

    def why_not(self, site: WeightSite) -> str | None:
        """Why nothing is known of a weight's inputs, as a phrase that follows its name, or None."""
        graph = next((u.node.graph for u in site.uses if u.node.op_type != "Gather"), None)
        if not isinstance(graph, ir.Graph) or not self._is_main(graph):
            return why_unseen(site, None, set())
        if self._constants is None or self._constants[:2] != (graph, graph.num_nodes()):
            self._constants = graph, graph.num_nodes(), constant_values(graph)
        return why_unseen(site, graph, self._constants[2])

    def _is_main(self, graph: ir.Graph) -> bool:
        """Whether the samples are for this graph: functions and subgraphs have other inputs, or
        inputs without a type."""
        inputs = [v for v in graph.inputs if not v.is_initializer()]
        return bool(inputs) and all(v.name in self._names and v.type is not None for v in inputs)

    def plan(
        self,
        model: Model,
        sites: Sequence[WeightSite],
        *,
        second_moment: bool = True,
        sketch: int = 0,
        propagate: bool = False,
    ) -> Plan:
        """What :meth:`walk` with the same arguments will take."""
        wanted = _Wanted(sites)
        breaks = wanted.first_readers() if propagate else []
        parts = self._parts(model, wanted.activations, second_moment, sketch, breaks)
        return self._plan(parts, cached=not propagate)

    def kept(
        self,
        model: Model,
        sites: Sequence[WeightSite],
        *,
        second_moment: bool = True,
        sketch: int = 0,
        propagate: bool = False,
    ) -> int:
        """About how many bytes :meth:`walk` with the same arguments keeps of each sample between parts."""
        wanted = _Wanted(sites)
        breaks = wanted.first_readers() if propagate else []
        return self._parts(model, wanted.activations, second_moment, sketch, breaks).kept(next(self.feeds()))

    def walk(
        self,
        model: Model,
        sites: Sequence[WeightSite],
        *,
        second_moment: bool = True,
        sketch: int = 0,
        propagate: bool = False,
        progress: Progress | None = None,
        remarks: Remarks | None = None,
    ) -> Iterator[tuple[WeightSite, SiteStatistics]]:
        """Statistics of the inputs of weights, in the order of the graph, each weight once.

        The caller may rewrite a weight (:meth:`WeightSite.write`) before it takes the next one.
        Statistics of a weight with several uses are over the rows of all of them; weights with the
        same input share theirs, so they must not be changed.

        Args:
            model: the model.
            sites: weights of it for which :meth:`why_not` gives None.
            second_moment: whether to compute it (the expensive part: K² per row).
            sketch: rows of the sketch, 0 for none.
            propagate: whether statistics are those of the model as rewritten so far, with quantized
                weights upstream; otherwise those of the model as it was at the start.
            progress: instead of :attr:`progress`.
            remarks: given by a pass that is done with a weight when it takes the next one. A weight that
                an earlier run had finished is then put back on its turn and not handed out, and nothing
                is gathered for it; see :mod:`effic.passes.finished`.

        Raises:
            UnsupportedError: nothing can be known of a site's inputs.
            NotMeasuredError: the model does not run on the samples, or values are not finite.
        """
        for site in sites:
            if reason := self.why_not(site):
                raise UnsupportedError(f"weight '{site.name}' {reason}, so it cannot be calibrated")
        tell = progress or self.progress or (lambda text, number, total: None)
        wanted = _Wanted(sites)
        finished = None if remarks is None else remarks.finished
        over: set[WeightSite] = set()
        if finished is not None:
            finished.expect(len(sites))
            over = {site for site in sites if finished.has(site)}
        idle = wanted.only_for(over)
        done: dict[Key, SiteStatistics] = {}
        if not propagate:
            self._cache.of(model)
            done = self._cache.found(wanted.activations, second_moment, sketch)
        if propagate or len(done) < len(wanted.activations):
            # What the caller rewrites must not be seen by what is still to come.
            running = model if propagate else model.clone()
            missing = {k: a for k, a in wanted.activations.items() if k not in done}
            breaks = wanted.first_readers() if propagate else []
            parts = self._parts(running, missing, second_moment, sketch, breaks)
            plan = self._plan(parts, cached=not propagate)
            self.plans.append(plan)
            tell(f"calibrating: {plan}", 0, len(parts.parts))
            size = f"about {plan.megabytes} MB"
            steps = self._run(
                parts, missing, idle, second_moment, sketch, lambda t, i, n: tell(f"{t}, {size}", i, n)
            )
        else:
            steps = iter([{}])
        for new in steps:
            if not propagate:
                known = {key: statistics for key, statistics in new.items() if key not in idle}
                self._cache.add(known, second_moment, sketch)
            done.update(new)
            new.clear()  # or they would live on while the next part runs
            for site, keys in wanted.ready(done):
                if finished is None or remarks is None:
                    yield site, combine([done[key] for key in keys])
                elif site not in over:
                    begun = finished.begin(site, remarks)
                    yield site, combine([done[key] for key in keys])
                    finished.keep(model, site, begun, remarks)
                elif not finished.put_back(model, site, remarks):
                    raise UsageError(
                        f"what {finished.folder} holds of '{site.name}' changed while it was read; run again"
                    )
            done = {key: statistics for key, statistics in done.items() if wanted.needs(key)}

    def _run(
        self,
        parts: Parts,
        missing: Mapping[Key, Activation],
        idle: set[Key],
        second_moment: bool,
        sketch: int,
        tell: Progress,
    ) -> Iterator[dict[Key, SiteStatistics]]:
        """Statistics of the activations that each part makes, part by part; empty ones for ``idle``."""
        by_value: dict[str, list[Key]] = {}
        for key in missing:
            by_value.setdefault(key[0], []).append(key)
        here = [[key for v in part.wanted for key in by_value[str(v.name)]] for part in parts.parts]
        # Parts behind the last that is asked for anything need not be run; those before give it its values.
        last = max((n for n, keys in enumerate(here) if not idle.issuperset(keys)), default=-1)
        try:
            for number, part in enumerate(parts.parts):
                if number > last:
                    yield dict.fromkeys(here[number], _NOTHING)
                    continue
                asked = {key: missing[key].rows for key in here[number] if key not in idle}
                sums = {
                    key: Accumulator(rows.groups, rows.width, second_moment=second_moment, sketch=sketch)
                    for key, rows in asked.items()
                }
                for sample, values in enumerate(parts.run(part)):
                    text = f"calibrating, part {number + 1} of {len(parts.parts)}"
                    tell(text, sample, self.count)
                    for key, rows in asked.items():
                        if not sums[key].add(rows.of(values[key[0]])):
                            raise NotMeasuredError(
                                f"on calibration sample {sample} (from {self.source}) the value '{key[0]}' becomes "
                                f"infinite, not a number or larger than {LARGEST:g}, so nothing can be calibrated "
                                "on it; give other samples"
                            )
                yield {key: sums.pop(key).finish() if key in asked else _NOTHING for key in here[number]}
        finally:
            parts.close()

    def _parts(
        self,
        model: Model,
        found: Mapping[Key, Activation],
        second_moment: bool,
        sketch: int,
        breaks: Sequence[ir.Node],
    ) -> Parts:
        costs: dict[str, int] = {}
        for name, rows in found:
            costs[name] = costs.get(name, 0) + _statistics_bytes(rows, second_moment, sketch)
        values = _same_values(model, [a.value for a in found.values()])
        return self._cut(model, values, costs, breaks)

    def _plan(self, parts: Parts, cached: bool) -> Plan:
        most = parts.memory(next(self.feeds()))
        return Plan(self.count, len(parts.parts), most + (min(CACHE_BYTES, parts.costs) if cached else 0))

    def _cut(
        self,
        model: Model,
        values: Sequence[ir.Value],
        costs: Mapping[str, int] | None = None,
        breaks: Sequence[ir.Node] = (),
    ) -> Parts:
        return Parts(
            model,
            values,
            self._fed(model),
            self.feeds,
            self.count,
            costs=costs,
            breaks=breaks,
            part_bytes=self.part_bytes,
        )

    def _fed(self, model: Model) -> list[str]:
        first = next(self.feeds())
        wanted = [str(v.name) for v in model.graph.inputs if not v.is_initializer()]
        if lacking := [name for name in wanted if name not in first]:
            raise UsageError(
                f"the calibration data from {self.source} lack the model's input '{lacking[0]}'; "
                f"they have {', '.join(first) or 'none'}"
            )
        return [str(v.name) for v in model.graph.inputs if v.name in first]

    # -- values ----------------------------------------------------------------------------------

    def record(self, model: Model, values: Sequence[ir.Value]) -> Iterator[Arrays]:
        """Values of the main graph for every sample, by name, one dict per sample.

        They are those of the model as it is now, whatever is done to it meanwhile.
        """
        running = model.clone()
        parts = self._cut(running, _same_values(running, values))
        names = [str(v.name) for v in values]
        try:
            for values_of_part in parts.gather():
                yield {name: values_of_part[name] for name in names}
        finally:
            parts.close()

    def ranges(
        self, model: Model, values: Sequence[ir.Value], *, bins: int = 2048, remarks: Remarks | None = None
    ) -> dict[str, RangeStatistics]:
        """Extremes and histogram of values of the main graph over all samples, by name.

        Args:
            model: the model.
            values: of its main graph, floats or integers.
            bins: of a histogram, at most.
            remarks: of the pass that asks, once: what an earlier run had measured for it is not measured again.

        Raises:
            NotMeasuredError: the model does not run on the samples, or values are not finite.
        """
        if not values:
            return {}
        self._cache.of(model)
        found = {str(v.name): s for v in values if (s := self._cache.range(str(v.name), bins)) is not None}
        missing = [v for v in values if str(v.name) not in found]
        if missing:
            tell = self.progress or (lambda text, number, total: None)
            parts = self._cut(model, missing)
            finished = None if remarks is None else remarks.finished
            known = {} if finished is None else finished.ranges((str(v.name) for v in missing), bins)
            open_ = [any(str(v.name) not in known for v in part.wanted) for part in parts.parts]
            last = max((number for number, one in enumerate(open_) if one), default=-1)
            try:
                for number, part in enumerate(parts.parts):
                    text = f"measuring ranges, part {number + 1} of {len(parts.parts)}"
                    asked = [name for v in part.wanted if (name := str(v.name)) not in known]
                    new = {name: known[name] for v in part.wanted if (name := str(v.name)) in known}
                    if number <= last:
                        new |= self._ranges(
                            parts,
                            part,
                            asked,
                            bins,
                            lambda i, t=text: tell(t, i, self.count),  # type: ignore[misc]
                        )
                    if finished is not None:
                        for name in asked:
                            finished.keep_range(name, bins, new[name])
                    for name, statistics in new.items():
                        self._cache.add_range(name, bins, statistics)
                    found.update(new)
            finally:
                parts.close()
        return {str(v.name): found[str(v.name)] for v in values}

    def _ranges(
        self, parts: Parts, part: Part, names: Sequence[str], bins: int, tell: Callable[[int], None]
    ) -> dict[str, RangeStatistics]:
        sums = {name: RangeAccumulator(bins) for name in names}
        for sample, values in enumerate(parts.run(part)):
            tell(sample)
            for name, one in sums.items():
                if not one.add(values[name]):
                    raise NotMeasuredError(
                        f"on calibration sample {sample} (from {self.source}) the value '{name}' becomes "
                        "infinite or not a number, so it has no range; give other samples"
                    )
        return {name: one.finish() for name, one in sums.items()}


class _Wanted:
    """The weights of a walk, and which activations each is waiting for."""

    def __init__(self, sites: Sequence[WeightSite]) -> None:
        self.activations: dict[Key, Activation] = {}
        self._waiting: list[tuple[WeightSite, list[Key]]] = []
        for site in _in_order(sites):
            found = activations(site)
            for activation in found:
                self.activations.setdefault(activation.key, activation)
            self._waiting.append((site, [a.key for a in found]))

    def ready(self, done: Iterable[Key]) -> Iterator[tuple[WeightSite, list[Key]]]:
        """Weights all of whose activations are done; each is handed out once."""
        have = set(done)
        while (
            at := next((i for i, (_, keys) in enumerate(self._waiting) if have.issuperset(keys)), None)
        ) is not None:
            yield self._waiting.pop(at)

    def needs(self, key: Key) -> bool:
        """Whether a weight still waits for an activation."""
        return any(key in keys for _, keys in self._waiting)

    def only_for(self, sites: Collection[WeightSite]) -> set[Key]:
        """Activations that no other weights wait for."""
        needed = {key for site, keys in self._waiting if site not in sites for key in keys}
        return set(self.activations) - needed

    def first_readers(self) -> list[ir.Node]:
        """For every activation, the first node that multiplies it with one of the weights."""
        sites = [site for site, _ in self._waiting]
        places = _places(sites)
        readers = sorted(
            (use for site in sites for use in site.uses if use.node.op_type != "Gather"),
            key=lambda use: places[use.node],
        )
        first: dict[str, ir.Node] = {}
        for use in readers:
            value = operand(use)
            first.setdefault("" if value is None else str(value.name), use.node)
        return list(first.values())


def _in_order(sites: Sequence[WeightSite]) -> list[WeightSite]:
    """Sites by the first node that multiplies them, as the graph orders it."""
    places = _places(sites)

    def place(site: WeightSite) -> int:
        return min((places[u.node] for u in site.uses if u.node.op_type != "Gather"), default=0)

    return sorted(sites, key=place)


def _places(sites: Sequence[WeightSite]) -> dict[ir.Node, int]:
    graphs = {id(use.node.graph): use.node.graph for site in sites for use in site.uses}
    return {node: i for graph in graphs.values() if graph is not None for i, node in enumerate(graph)}


def _same_values(model: Model, values: Sequence[ir.Value]) -> list[ir.Value]:
    """The values of these names in the main graph of a model, which may be a copy of theirs."""
    graph = model.graph
    if all(v.graph is graph for v in values):
        return list(values)
    names = {str(v.name): v for v in (*graph.inputs, *graph.initializers.values())}
    names.update((str(v.name), v) for node in graph for v in node.outputs)
    lost = [v.name for v in values if v.name not in names]
    if lost:
        raise UsageError(f"the value '{lost[0]}' is not in the model's main graph")
    return [names[str(v.name)] for v in values]


def _statistics_bytes(rows: Rows, second_moment: bool, sketch: int) -> int:
    """Memory of the statistics of one activation while they are gathered."""
    size, width = rows.groups * rows.width, rows.width
    total = 28 * size + 4 * sketch * size
    if second_moment or 0 < sketch >= width:
        # The sum, a product to add to it, and rows that wait for it.
        total += 8 * size * width + min(BUFFER_BYTES, 4 * BUFFER_ROWS * size)
    return total


class _Cache:
    """Statistics of one state of a model, for the passes that look at it."""

    def __init__(self) -> None:
        self._mark: int | None = None
        self._model: Model | None = None
        self._sites: dict[tuple[Key, bool, int], SiteStatistics] = {}
        self._ranges: dict[tuple[str, int], RangeStatistics] = {}
        self._bytes = 0

    def of(self, model: Model) -> None:
        """Forget what was found for another state of the model."""
        mark = fingerprint(model)
        if mark != self._mark:
            self._mark, self._bytes = mark, 0
            # Tensors count by identity there, so those that were counted have to live on.
            self._model = model.clone()
            self._sites, self._ranges = {}, {}

    def found(self, keys: Iterable[Key], second_moment: bool, sketch: int) -> dict[Key, SiteStatistics]:
        """What is known of these activations."""
        known = ((key, self._sites.get((key, second_moment, sketch))) for key in keys)
        return {key: statistics for key, statistics in known if statistics is not None}

    def add(self, new: Mapping[Key, SiteStatistics], second_moment: bool, sketch: int) -> None:
        """Keep statistics, while there is room."""
        for key, statistics in new.items():
            if self._bytes + statistics.nbytes <= CACHE_BYTES:
                self._bytes += statistics.nbytes
                self._sites[key, second_moment, sketch] = statistics

    def range(self, name: str, bins: int) -> RangeStatistics | None:
        """What is known of a value's range."""
        return self._ranges.get((name, bins))

    def add_range(self, name: str, bins: int, statistics: RangeStatistics) -> None:
        """Keep a range."""
        self._ranges[name, bins] = statistics
