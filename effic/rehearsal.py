"""Trying a sequence of passes out on a copy of a model, on one weight of each kind, to tell what the run will take."""

from __future__ import annotations

import dataclasses
import gc
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import onnx_ir as ir

from effic.backends.base import Backend
from effic.ir.cost import ModelCost, model_cost
from effic.ir.folding import folded_bytes
from effic.ir.memory import peak_memory, release_memory, reset_peak_memory
from effic.ir.model import Model
from effic.ir.onnx_format import raise_opset
from effic.ir.onnx_writer import file_bytes_of
from effic.ir.tensors import Scratch
from effic.ir.weights import WeightSite, weight_sites
from effic.partial import literal
from effic.passes.activations import operand
from effic.passes.base import Numerics, Pass, Remark, Remarks
from effic.passes.calibration import Calibration, RangeStatistics, SiteStatistics
from effic.passes.calibration_data import Arrays, held
from effic.passes.parts import STORE_BYTES
from effic.passes.pipeline import Progress, fingerprint, run_passes
from effic.passes.quantize.weight_only import matches_site
from effic.passes.spec import to_text

FEW = 2
"""Samples that passes are tried on: with two, what each more takes is known."""

MOST_KINDS = 24
"""Kinds of weights that are tried; the smallest beyond them are taken together."""

# Where weights are hardly alike, trying one of each kind is to do all the work: of more elements than these
# the largest few kinds are tried, and stand for the others by their elements.
_TRIED_WHOLE = 8 << 20
_FEW_KINDS = 4

_DIGITS = re.compile(r"\d+")


@dataclasses.dataclass
class Seen:
    """A remark, and at how many places it will be made."""

    remark: Remark
    count: int


@dataclasses.dataclass
class Part:
    """What one pass, or the lowering, will take and do.

    Attributes:
        name, text: of the pass; of the lowering ``lower`` and the target.
        item: the pass, or None for the lowering.
        changed: whether it will change the model.
        seconds: of the pass itself.
        once: of that, seconds that do not grow with the number of weights.
        memory: largest resident set of the process meanwhile, in bytes.
        peak: of that, what was seen while it looked at calibration data.
        temporary: bytes of temporary files after it.
        raises: whether it raises the opset and is exact, so that its check runs the model before it once more.
        weights, nodes: bytes of the weights and number of nodes after it.
        remarks: what it will say.
        tried: ``whole``, or ``one of each kind`` where only some weights were worked on.
    """

    name: str
    text: str
    item: Pass | None
    changed: bool = False
    seconds: float = 0.0
    once: float = 0.0
    memory: int = 0
    peak: int = 0
    temporary: float = 0.0
    raises: bool = False
    weights: float = 0.0
    nodes: float = 0.0
    remarks: list[Seen] = dataclasses.field(default_factory=list)
    tried: str = "whole"

    def count(self, kind: str) -> int:
        """Places it will change (``passed``) or leave alone (``missed``)."""
        return sum(seen.count for seen in self.remarks if seen.remark.kind == kind)


@dataclasses.dataclass
class Rehearsal:
    """What a sequence of passes and the lowering will take.

    Attributes:
        parts: one for each pass, then one for the lowering.
        file: bytes of the files that will be written.
        seconds: of all of it, without checks and saving.
        model: the lowered model where everything was tried whole, or None.
        folded: bytes that a runtime works out when it loads the file, see :func:`effic.ir.folding.folded_bytes`.
        kinds, weights: kinds of weights tried one of each, and how many weights they stand for.
    """

    parts: list[Part]
    file: float
    seconds: float
    model: Model | None
    folded: float = 0.0
    kinds: int = 0
    weights: int = 0


def rehearse(
    model: Model,
    sequence: Sequence[Pass],
    backend: Backend,
    calibration: Calibration | None,
    *,
    external: bool | None = None,
    progress: Progress | None = None,
) -> Rehearsal:
    """Try a sequence out.

    Passes are applied to a copy, whole, up to the first one that works on each weight by itself. From there on
    one weight of each kind (same shape, operators and reasons) is worked on at a time, by every pass that can
    leave weights alone, and what that took beyond doing none counts as often as there are such weights.
    Calibrated passes see two samples; what all of them will take follows from the second.

    Args:
        model: is left as it is.
        sequence: the passes.
        backend: what to lower for.
        calibration: all the samples, or None.
        external: as for saving.
        progress: called with what is being done, the number and how many there are.

    Raises:
        EfficError: what the run itself would raise.
    """
    items = [item.rehearsed() for item in sequence]
    trial = _Trial(backend, calibration, external)
    first = next((i for i, item in enumerate(items) if _by_weight(item)), None)
    tell = progress or (lambda text, number, total: None)
    tell("trying the passes", 0, 1)
    if first is None:
        return _whole(trial.run(model, items))
    before = trial.run(model, items[:first], lower=False)
    kinds = _kinds(before.model, items[first:])
    groups = sum(len(kind) for kind in kinds)
    names = [name for kind in kinds for group in kind for name in group]
    elements = {site.name: site.elements for site in weight_sites(before.model)}
    if 2 * len(kinds) > groups:
        if sum(elements[name] for name in names) <= _TRIED_WHOLE:
            return _joined(before, _whole(trial.run(before.model, items[first:])))
        kinds = _merged(kinds, _FEW_KINDS)
    none = trial.run(before.model, items[first:], leave=names)
    total = _whole(dataclasses.replace(none, parts=[_copied(part) for part in none.parts]))
    total.model, total.kinds, total.weights = None, len(kinds), len(names)
    for number, kind in enumerate(kinds):
        tried = kind[0]
        tell(f"trying {tried[0]}", number, len(kinds))
        sizes = [sum(elements[name] for name in group) for group in kind]
        one = trial.run(
            before.model,
            items[first:],
            leave=[name for name in names if name not in tried],
            all_of=names,
            share=sizes[0] / max(1, sum(elements[name] for name in names)),
        )
        _add(total, none, one, len(kind), sum(sizes) / max(1, sizes[0]))
    _settle(total, set(names))
    return _joined(before, total)


@dataclasses.dataclass
class _Run:
    """One run of passes on a copy."""

    parts: list[Part]
    model: Model
    file: int
    seconds: float
    folded: int = 0


class _Trial:
    """Runs passes on copies of models, and measures."""

    def __init__(self, backend: Backend, calibration: Calibration | None, external: bool | None) -> None:
        self.backend, self.external = backend, external
        self.watch = None if calibration is None else _Watch(calibration)

    def run(
        self,
        model: Model,
        items: Sequence[Pass],
        *,
        leave: Sequence[str] = (),
        all_of: Sequence[str] = (),
        share: float = 1.0,
        lower: bool = True,
    ) -> _Run:
        """Apply passes to a copy.

        Args:
            model: is left as it is.
            items: the passes.
            leave: weights that passes with candidates leave alone.
            all_of: weights that the run proper will look at together, where this one looks at a group.
            share: of the elements of those weights, what this one works on.
            lower: whether to lower the result, and tell the bytes of its file.
        """
        # Graphs are full of cycles: what earlier runs left would count as this one's.
        gc.collect()
        release_memory()
        copy = model.clone()
        copy.scratch = Scratch()
        skip = tuple(map(literal, leave))
        tried = [_leaving(item, skip) if leave and _by_weight(item) else item for item in items]
        parts: list[Part] = []
        watch, opset = self.watch, [copy.opset]

        def begin(number: int) -> None:
            if watch is not None and number < len(items):
                watch.begin(to_text(items[number]), all_of, share)

        def note(model: Model, item: Pass, number: int) -> None:
            part = Part(item.name, to_text(items[number]), items[number], temporary=model.scratch.stored)
            exact = part.item is not None and part.item.numerics is Numerics.EXACT
            opset[0], part.raises = model.opset, exact and model.opset > opset[0]
            if watch is not None:
                part.once, part.memory, part.peak = watch.once, watch.memory, watch.peak
                part.seconds = watch.expected + watch.once - watch.inside
                part.temporary += watch.temporary
            parts.append(part)
            begin(number + 1)

        begin(0)
        began = time.perf_counter()
        result = run_passes(copy, tried, check="off", calibration=watch, after_pass=note)
        seconds = time.perf_counter() - began + sum(part.seconds for part in parts)
        for part, step in zip(parts, result.steps, strict=True):
            part.changed, part.remarks = step.changed, [Seen(remark, 1) for remark in step.remarks]
            part.weights, part.nodes = step.bytes_after, step.nodes_after
            part.seconds += step.seconds
            part.memory += max(part.peak, step.peak_memory)
        file = 0
        if lower:
            parts.append(self._lower(copy, result.after))
            seconds += parts[-1].seconds
            file = file_bytes_of(copy, self.external)
        return _Run(parts, copy, file, seconds, folded_bytes(copy) if lower else 0)

    def _lower(self, model: Model, cost: ModelCost) -> Part:
        part, remarks, mark = Part("lower", self.backend.text, None), Remarks(), fingerprint(model)
        reset_peak_memory()
        began = time.perf_counter()
        self.backend.lower(model, remarks)
        part.seconds, part.memory = time.perf_counter() - began, peak_memory()
        model.forget_names()
        part.changed = fingerprint(model) != mark
        if part.changed:
            # Shapes that are known are handed on: to infer them anew is to work out compressed weights.
            cost = model_cost(model, shapes=cost.shapes)
        part.weights, part.nodes, part.temporary = cost.weight_bytes, cost.nodes, model.scratch.stored
        part.remarks = [Seen(remark, 1) for remark in remarks.items]
        return part


def _leaving(item: Pass, names: tuple[str, ...]) -> Pass:
    """A pass that leaves weights alone as well."""
    skip: tuple[str, ...] = getattr(item, "skip", ())
    return dataclasses.replace(item, skip=(*skip, *names))  # type: ignore[call-arg]


def _copied(part: Part) -> Part:
    return dataclasses.replace(part, remarks=list(part.remarks))


def _whole(run: _Run) -> Rehearsal:
    return Rehearsal(run.parts, run.file, run.seconds, run.model, run.folded)


def _joined(before: _Run, rest: Rehearsal) -> Rehearsal:
    """The passes of the beginning, then the others."""
    held = before.parts[-1].temporary if before.parts else 0
    for part in rest.parts:
        part.temporary += held
    rest.parts = [*before.parts, *rest.parts]
    rest.seconds += before.seconds
    return rest


def _by_weight(item: Pass) -> bool:
    """Whether a pass works weight by weight."""
    return item.candidates(Model(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)), Remarks()) is not None


# -- one weight of each kind -----------------------------------------------------------------------


def _kinds(model: Model, items: Sequence[Pass]) -> list[list[tuple[str, ...]]]:
    """Names of the weights that any of the passes would work on, those alike together, large ones first.

    Weights that multiply the same value (queries, keys and values) stay together: passes share work among them.
    """
    reasons: list[dict[str, str]] = []
    wanted: set[str] = set()
    for item in items:
        remarks, copy = Remarks(), model.clone()
        if item.needs_opset > copy.opset:
            raise_opset(copy, item.needs_opset)
        found = item.candidates(copy, remarks)
        if found is not None:
            wanted |= {site.name for site in found}
            reasons.append({remark.where: remark.text for remark in remarks.items})
    # Weights that are treated otherwise by name are of another kind.
    named = [text.rpartition("=")[0] for item in items for text in getattr(item, "overrides", ())]
    groups: dict[object, list[WeightSite]] = {}
    for site in weight_sites(model):
        if site.name in wanted:
            use = site.uses[0]
            value = None if use.node.op_type == "Gather" else operand(use)
            groups.setdefault(site.name if value is None else id(value), []).append(site)
    alike: dict[tuple[Any, ...], list[list[WeightSite]]] = {}
    for group in groups.values():
        key = tuple(
            (
                site.shape, site.in_axis, site.groups, site.dtype, tuple(sorted(site.kinds)), site.opset,
                site.encoding is None, *(found.get(site.name) for found in reasons),
                *(matches_site(site, (pattern,)) for pattern in named),
            )
            for site in group
        )  # fmt: skip
        alike.setdefault(key, []).append(group)
    ordered = sorted(alike.values(), key=lambda found: -sum(s.elements for group in found for s in group))
    return _merged([[tuple(site.name for site in group) for group in found] for found in ordered], MOST_KINDS)


def _merged(kinds: list[list[tuple[str, ...]]], most: int) -> list[list[tuple[str, ...]]]:
    """At most so many kinds: the last is all those beyond."""
    if len(kinds) <= most:
        return kinds
    return [*kinds[: most - 1], [group for kind in kinds[most - 1 :] for group in kind]]


def _add(total: Rehearsal, none: _Run, one: _Run, count: int, times: float) -> None:
    """Add what one group of weights took beyond none, as often as there are such groups.

    Args:
        total: so far.
        none: the run that left all of them alone.
        one: the run that worked on one group.
        count: how many there are.
        times: their elements, as multiples of those of the one.
    """
    total.file += times * (one.file - none.file)
    total.folded += times * (one.folded - none.folded)
    once = sum(part.once for part in one.parts)
    total.seconds += times * max(0.0, one.seconds - once - none.seconds) + once
    for part, base, more in zip(total.parts, none.parts, one.parts, strict=True):
        part.changed |= more.changed
        part.raises |= more.raises
        part.once += more.once
        part.seconds += times * max(0.0, more.seconds - more.once - base.seconds) + more.once
        part.memory = max(part.memory, more.memory)
        part.temporary += times * (more.temporary - base.temporary)
        part.weights += times * (more.weights - base.weights)
        part.nodes += times * (more.nodes - base.nodes)
        known = Counter((s.remark.kind, s.remark.where, s.remark.text) for s in base.remarks)
        for seen in more.remarks:
            remark = seen.remark
            if known[remark.kind, remark.where, remark.text] > 0:
                known[remark.kind, remark.where, remark.text] -= 1
            elif remark.where == "the model":
                # Said once of all weights; how many there are of something only the run itself can tell.
                bare = _DIGITS.sub("", remark.text)
                varies = any(_DIGITS.sub("", s.remark.text) == bare for s in base.remarks)
                like = [s for s in part.remarks if _DIGITS.sub("", s.remark.text) == bare]
                if varies:
                    part.remarks = [s for s in part.remarks if s not in like]
                elif not like:
                    part.remarks.append(seen)
            else:
                part.remarks.append(Seen(remark, count))
        if part.item is not None:
            part.tried = "one of each kind"


def _settle(total: Rehearsal, names: set[str]) -> None:
    """Drop what was only said because a trial left weights alone."""
    for part in total.parts:
        part.remarks = [
            s for s in part.remarks if s.remark.where not in names or s.remark.text != "is named in skip"
        ]


# -- calibrated passes -----------------------------------------------------------------------------


class _Watch(Calibration):
    """A few of the samples; it measures what looking at them takes, and tells what all of them would.

    Attributes:
        inside: seconds that the pass spent waiting for what it asked.
        expected: seconds that looking takes in the run proper, as often as the pass is applied.
        once: the same for what the run proper does once for all weights.
        memory: bytes that the run proper keeps in memory for the other samples.
        temporary: bytes that it keeps in temporary files.
        peak: largest resident set so far, where the runner's own count was started anew.
    """

    def __init__(self, whole: Calibration) -> None:
        feeds = [feed for feed, _ in zip(whole.feeds(), range(FEW), strict=False)]
        super().__init__(held(feeds, whole.source))
        self._all, self._few_feeds = whole, feeds
        self._together: Sequence[str] = ()
        self._looked: set[tuple[object, ...]] = set()
        self._text = ""
        self._clear()

    def begin(self, text: str, together: Sequence[str], share: float) -> None:
        """Start a pass.

        Args:
            text: of the pass.
            together: weights that the run proper walks over in one go.
            share: see :class:`Calibration`.
        """
        self._text, self._together, self.share = text, together, share
        self._clear()

    def _clear(self) -> None:
        self.inside = self.expected = self.once = 0.0
        self.memory = self.temporary = self.peak = 0

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
        options: dict[str, Any] = {"second_moment": second_moment, "sketch": sketch, "propagate": propagate}
        began = time.perf_counter()
        key = (self._text, *options.values())
        if sites and (not self._together or key not in self._looked):
            self._looked.add(key)
            copy = model.clone()
            names = {site.name for site in sites} | set(self._together)
            found = [s for s in weight_sites(copy) if s.name in names and self.why_not(s) is None]
            self.once += self._expected(lambda some: _exhaust(some.walk(copy, found, **options)))
            self._keep(self.kept(copy, found, **options))
        # Between a few weights lie larger parts of the model than between all of them: what running those takes was
        # seen above, and is left out here.
        self.peak = max(self.peak, peak_memory())
        for pair in super().walk(model, sites, **options):
            self.inside += time.perf_counter() - began
            if self._together:
                release_memory()
                reset_peak_memory()
            yield pair
            self.peak = max(self.peak, peak_memory())
            began = time.perf_counter()
        if self._together:
            release_memory()
            reset_peak_memory()
        self.inside += time.perf_counter() - began

    def ranges(
        self, model: Model, values: Sequence[ir.Value], *, bins: int = 2048, remarks: Any = None
    ) -> dict[str, RangeStatistics]:
        began = time.perf_counter()
        self.once += self._expected(lambda some: some.ranges(model, values, bins=bins))
        found = super().ranges(model, values, bins=bins)
        self.inside += time.perf_counter() - began
        return found

    def record(self, model: Model, values: Sequence[ir.Value]) -> Iterator[Arrays]:
        began = last = time.perf_counter()
        first = each = 0.0
        for number, arrays in enumerate(super().record(model, values)):
            now = time.perf_counter()
            self.inside += now - began
            first, each = (now - last, 0.0) if not number else (first, now - last)
            yield arrays
            began = last = time.perf_counter()
        self.inside += time.perf_counter() - began
        self.expected += first + each * (self._all.count - 1)

    def _expected(self, look: Callable[[Calibration], object]) -> float:
        """Seconds of a look at all samples, from looks at one and at a few."""
        times = []
        for count in (1, len(self._few_feeds)):
            some = Calibration.of(self._few_feeds[:count], source=self.source)
            began = time.perf_counter()
            look(some)
            times.append(time.perf_counter() - began)
        more = max(1, len(self._few_feeds) - 1)
        return times[0] + max(0.0, times[1] - times[0]) / more * (self._all.count - 1)

    def _keep(self, kept: int) -> None:
        """Take note of bytes that are kept for each sample between parts of the model."""
        total = kept * self._all.count
        self.memory = max(self.memory, min(STORE_BYTES, total) - min(STORE_BYTES, kept * self.count))
        self.temporary = max(self.temporary, total - STORE_BYTES)


def _exhaust(things: Iterable[object]) -> None:
    for _ in things:
        pass
