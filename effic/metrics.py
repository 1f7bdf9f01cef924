"""How good a model is: built-in metrics over data, or a function of the user's own.

A metric is named by text, with options as passes have them: ``top1``, ``perplexity{output=logits}``, or
``package.module:function`` for a callable of one's own. Metrics that need no labels (``agreement``,
``sqnr``, ``cosine``, ``max_abs``) compare with a reference model on the same data.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from effic.ir.errors import NotMeasuredError, UsageError
from effic.metric_data import Arrays, Batch, MetricData
from effic.passes import near
from effic.passes.base import option, option_problem, options_of
from effic.passes.named_function import named_function
from effic.passes.spec import build, option_text, parse_one

Run = Callable[[Mapping[str, np.ndarray]], Arrays]
"""Runs a model: outputs by name for inputs by name."""

Progress = Callable[[str, int, int], None]
Need = Literal["labels", "reference", "tokens", "pairs"]

# Outputs of the reference model are kept between scores up to this size, and made anew beyond it.
_KEPT_BYTES = 512 << 20
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Score:
    """A metric's value over data.

    Attributes:
        metric: text form of the metric.
        value: the score; shares lie between 0 and 1.
        count: samples (images, tokens, pairs) it was taken on.
        stderr: standard error of ``value`` over samples, or None where it is not known.
        data: sha256 of the data, or None for a callable that brings its own.
        per_sample: the value of each sample where the metric is a mean over them, for paired
            differences; never written to files.
    """

    metric: str
    value: float
    count: int
    stderr: float | None = None
    data: str | None = None
    per_sample: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; a value that is not finite is written as text."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "per_sample"}
        row["value"] = self.value if math.isfinite(self.value) else str(self.value)
        return row


class Tally(abc.ABC):
    """Gathers a metric batch by batch."""

    @abc.abstractmethod
    def add(self, batch: Batch, outputs: list[Arrays], reference: list[Arrays] | None) -> None:
        """Take in a batch.

        Args:
            batch: feeds and labels.
            outputs: of each of the batch's feeds.
            reference: the reference model's, where the metric needs one.
        """

    @abc.abstractmethod
    def result(self) -> tuple[float, int, float | None, np.ndarray | None]:
        """Value, samples, standard error, values per sample."""


@dataclass(frozen=True)
class Metric(abc.ABC):
    """A built-in metric: a frozen value whose fields are its options."""

    name: ClassVar[str]
    needs: ClassVar[Need]
    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "points"
    """What a drop is counted in: ``points`` (hundredths), or ``%`` of the score before."""

    output: str = option("", help="which output to look at; the first one by default")

    def __post_init__(self) -> None:
        for field, kind in options_of(type(self)):
            if problem := option_problem(field, kind, getattr(self, field.name)):
                raise UsageError(f"{self.name}: {field.name} {problem}")

    @property
    def text(self) -> str:
        """The text form, with the options that differ from their defaults."""
        return option_text(self.name, self)

    @property
    def needs_reference(self) -> bool:
        """Whether the metric compares with a reference model's outputs."""
        return self.needs == "reference"

    @property
    def needs_labels(self) -> bool:
        """Whether the data need labels."""
        return self.needs == "labels"

    def score(
        self, run: Run, data: MetricData, reference: Reference | None, progress: Progress | None
    ) -> Score:
        """Score a model; see :func:`score`."""
        if self.needs == "labels" and not data.labelled:
            raise UsageError(f"{self.name} needs labels, and {data.source} holds none; add an array 'labels'")
        if self.needs == "tokens" and data.kind == "pairs":
            raise UsageError(f"{self.name} needs token ids, and {data.source} holds pairs of sentences")
        if self.needs == "pairs" and data.kind != "pairs":
            raise UsageError(
                f"{self.name} needs pairs with a score, and {data.source} holds {data.kind}; give a .tsv of "
                "score, sentence, sentence"
            )
        if self.needs_reference and reference is None:
            raise UsageError(f"{self.name} compares with a reference model; name one")
        tally = self.tally()
        for batch in data.batches():
            if progress is not None:
                progress(self.name, batch.start, data.count)
            wanted = reference.outputs(batch) if reference is not None and self.needs_reference else None
            tally.add(batch, [batch.cut(run(feed)) for feed in batch.feeds], wanted)
        value, count, stderr, rows = tally.result()
        if count == 0:
            raise NotMeasuredError(f"{self.name}: there was nothing to score in {data.source}")
        return Score(self.text, value, count, stderr, data.digest, rows)

    def drop(self, before: float, after: float) -> float:
        """By how much ``after`` is worse than ``before`` (negative: better), in :attr:`unit`."""
        worse = before - after if self.higher_is_better else after - before
        return 100 * worse if self.unit == "points" else 100 * worse / abs(before)

    def worse(self, value: float, bound: float) -> bool:
        """Whether a score is on the wrong side of a bound; NaN always is."""
        return not (value >= bound if self.higher_is_better else value <= bound)

    @abc.abstractmethod
    def tally(self) -> Tally:
        """A new, empty tally."""

    def chosen(self, outputs: Arrays) -> np.ndarray:
        """The output that the metric looks at, in float64 where it is floating.

        Raises:
            UsageError: there is no output of that name.
        """
        name = self.output or next(iter(outputs))
        if name not in outputs:
            raise UsageError(
                f"{self.name}: the model has no output '{name}'{near(name, list(outputs))} "
                f"(outputs: {', '.join(outputs)})"
            )
        return outputs[name]

    def logits(self, outputs: Arrays) -> np.ndarray:
        """The output as rows of class scores ``[rows, classes]``.

        Raises:
            UsageError: it has no axis of classes.
        """
        found = self.chosen(outputs)
        if found.ndim < 2 or found.shape[-1] < 2:
            raise UsageError(
                f"{self.name}: the output has the shape {list(found.shape)}, which is no row of class scores; "
                f"name another with {self.name}{{output=NAME}}"
            )
        return np.asarray(found, np.float64).reshape(-1, found.shape[-1])


@dataclass(frozen=True)
class Function(Metric):
    """A callable of the user's own: ``function(run, data) -> float``.

    ``run(feed)`` gives outputs by name for arrays by input name; ``data`` is a :class:`MetricData` or None.
    Its attributes ``higher_is_better`` (True) and ``unit`` (``"points"`` or ``"%"``) say how to read it.
    """

    name: ClassVar[str] = "function"
    needs: ClassVar[Need] = "labels"

    where: str = option("", help="package.module:function")
    call: Callable[[Run, MetricData | None], float] = dataclasses.field(default=lambda run, data: math.nan)

    def __post_init__(self) -> None:
        for name in ("higher_is_better", "unit"):
            if hasattr(self.call, name):
                object.__setattr__(self, name, getattr(self.call, name))
        if self.unit not in ("points", "%"):
            raise UsageError(
                f"the metric {self.where} has the unit {self.unit!r}; it must be 'points' or '%'"
            )

    @property
    def text(self) -> str:
        return self.where

    def score(
        self, run: Run, data: MetricData | None, reference: Reference | None, progress: Progress | None
    ) -> Score:
        if progress is not None:
            progress(self.where, 0, 1)
        value = self.call(run, data)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise UsageError(f"the metric {self.where} returned {type(value).__name__}, not a number")
        return Score(
            self.where,
            float(value),
            1 if data is None else data.count,
            None,
            None if data is None else data.digest,
        )

    def tally(self) -> Tally:
        raise UsageError(f"{self.where} is a function and has no tally")


METRICS: dict[str, str] = {
    "top1": "effic.metric_kinds:Top1",
    "top5": "effic.metric_kinds:Top5",
    "perplexity": "effic.metric_kinds:Perplexity",
    "spearman": "effic.metric_kinds:Spearman",
    "agreement": "effic.metric_kinds:Agreement",
    "sqnr": "effic.metric_kinds:SQNR",
    "cosine": "effic.metric_kinds:Cosine",
    "max_abs": "effic.metric_kinds:MaxAbs",
}
METRIC_NAMES = tuple(METRICS)


def get_metric(text: str) -> Metric:
    """The metric a text names: ``top1``, ``top1{output=logits}`` or ``package.module:function``.

    Importing a callable runs its module: it is named explicitly, and found from the current folder too.

    Raises:
        UsageError: no such metric (the nearest is proposed), option or function.
    """
    if _FUNCTION.fullmatch(text.strip()):
        return Function(where=text.strip(), call=named_function(text.strip(), "the metric"))
    if not text.strip():
        raise UsageError(f"the metric is empty (metrics: {', '.join(METRICS)}, or package.module:function)")
    name, at, options = parse_one(text)
    if name not in METRICS:
        raise UsageError(
            f"there is no metric '{name}'{near(name, list(METRICS))} "
            f"(metrics: {', '.join(METRICS)}, or package.module:function)"
        )
    module, _, attribute = METRICS[name].partition(":")
    found: type[Metric] = getattr(importlib.import_module(module), attribute)
    return build(found, name, options, text, at)


class Reference:
    """The reference model's outputs, made once for each batch where memory allows.

    Args:
        run: runs the reference model.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._kept, self._bytes = run, dict[int, list[Arrays]](), 0

    def outputs(self, batch: Batch) -> list[Arrays]:
        """Outputs of each of the batch's feeds, rows that only fill the batch cut off."""
        if batch.start in self._kept:
            return self._kept[batch.start]
        found = [batch.cut(self._run(feed)) for feed in batch.feeds]
        size = sum(array.nbytes for arrays in found for array in arrays.values())
        if self._bytes + size <= _KEPT_BYTES:
            self._kept[batch.start] = found
            self._bytes += size
        return found


def score(
    metric: Metric | str,
    run: Run,
    data: MetricData | None,
    *,
    reference: Reference | Run | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score a model.

    Args:
        metric: one of :func:`get_metric`, or its text.
        run: runs the model: outputs by name for inputs by name.
        data: what to score on; None only for a callable that brings its own.
        reference: runs the reference model, for metrics that compare with one; a :class:`Reference`
            keeps its outputs for the next score on the same data.
        progress: called with what is done, samples done and in all.

    Raises:
        UsageError: the data are not what the metric needs, or the output is of another shape.
        NotMeasuredError: there was nothing to score, or the model does not run.
    """
    metric = get_metric(metric) if isinstance(metric, str) else metric
    if data is None and not isinstance(metric, Function):
        raise UsageError(f"{metric.name} needs data; give some with --data")
    known = reference if isinstance(reference, Reference) or reference is None else Reference(reference)
    return metric.score(run, data, known, progress)  # type: ignore[arg-type]


def paired_stderr(a: Score, b: Score) -> float | None:
    """Standard error of ``b.value - a.value`` where both are means over the same samples, else None.

    Far smaller than the errors of the two would suggest: most samples fare alike in both.
    """
    if a.per_sample is None or b.per_sample is None or len(a.per_sample) != len(b.per_sample):
        return None
    if len(a.per_sample) < 2 or a.data != b.data:
        return None
    difference = b.per_sample - a.per_sample
    spread = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    # Perplexity is the exponential of a mean.
    return spread * b.value if a.metric.startswith("perplexity") else spread
