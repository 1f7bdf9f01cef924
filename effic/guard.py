"""Accuracy in the loop: score the model after each pass, and undo or refuse what costs too much."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from effic.backends.base import Backend
from effic.ir.errors import CheckFailedError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.metric_data import Images, MetricData
from effic.metrics import Function, Metric, Reference, Run, Score, get_metric, paired_stderr, score
from effic.passes.base import Numerics, Pass, Remarks
from effic.passes.pipeline import Step

OnDrop = Literal["rollback", "fail"]


@dataclass(frozen=True)
class Accuracy:
    """What to score a model by, and how much of it may be lost.

    Attributes:
        metric: text form of the metric, see :func:`effic.metrics.get_metric`.
        data: what :meth:`effic.metric_data.MetricData.load` takes; None only for a function that brings
            its own.
        max_drop: how much worse than the original the result may score, in the metric's own unit: points
            (hundredths) for shares and correlations, per cent for perplexity. None only measures.
        bound: the worst score allowed, or None.
        on_drop: what happens to a pass that breaks one of the two: it is undone, or the run fails.
        limit, window, tokenizer, images: as :meth:`MetricData.load` takes them.
    """

    metric: str
    data: Any = None
    max_drop: float | None = None
    bound: float | None = None
    on_drop: OnDrop = "rollback"
    limit: int | None = None
    window: int | None = None
    tokenizer: str | os.PathLike[str] | None = None
    images: Images | None = None

    def __post_init__(self) -> None:
        metric = get_metric(self.metric)
        if self.max_drop is not None:
            if not self.max_drop >= 0:
                raise UsageError(f"the largest drop is {self.max_drop:g}; it must be at least 0")
            if not isinstance(metric, Function):
                metric.drop(1.0, 1.0)  # says why where the metric knows no drop
        if self.data is None and not isinstance(metric, Function):
            raise UsageError(f"the metric {metric.name} needs data; give some with --data")

    def load(self, model: Model) -> MetricData | None:
        """The data, fitted to a model's inputs.

        Raises:
            UsageError: they do not fit the model.
        """
        if self.data is None:
            return None
        return MetricData.load(
            self.data,
            model,
            limit=self.limit,
            window=self.window,
            tokenizer=self.tokenizer,
            images=self.images,
        )


@dataclass
class Guard:
    """Scores of a run.

    Attributes:
        metric: what is scored.
        data: on what.
        wanted: the limits.
        backend: lowers what is scored after a pass; None scores it as it is.
        reference: the original, for metrics that compare with it.
        before: the original's score.
        after: the finished model's, once it was taken.
    """

    metric: Metric
    data: MetricData | None
    wanted: Accuracy
    backend: Backend | None
    reference: Reference
    before: Score
    after: Score | None = None
    progress: Callable[[str, int, int], None] | None = None

    @classmethod
    def begin(
        cls,
        model: Model,
        wanted: Accuracy,
        backend: Backend | None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Guard:
        """Score the original.

        Raises:
            UsageError: the data do not fit the model or the metric.
            NotMeasuredError: the model cannot be run.
            CheckFailedError: the original is beyond ``bound`` already.
        """
        guard = cls.scored(wanted, model, _runner(model), backend, progress)
        metric, first = guard.metric, guard.before
        if wanted.bound is not None and metric.worse(first.value, wanted.bound):
            raise CheckFailedError(
                f"the original model scores {show_score(first)} already, and {wanted.bound:g} is the bound"
            )
        return guard

    @classmethod
    def scored(
        cls,
        wanted: Accuracy,
        model: Model,
        run: Run,
        backend: Backend | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Guard:
        """Score the reference, run in any way; ``model`` tells what inputs it takes."""
        metric, data, reference = get_metric(wanted.metric), wanted.load(model), Reference(run)
        first = score(metric, run, data, reference=reference, progress=progress)
        return cls(metric, data, wanted, backend, reference, first, progress=progress)

    def keep(self, before: Model, model: Model, item: Pass, step: Step) -> str | None:
        """Score a model after a pass; a reason to undo the pass, or None.

        A pass that is exact bit for bit is not scored. What is scored is what the target would run.

        Raises:
            CheckFailedError: the pass costs too much and ``on_drop`` is ``fail``.
        """
        if step.numerics is Numerics.EXACT:
            return None
        copy = model.clone()
        if self.backend is not None:
            self.backend.lower(copy, Remarks())
        found = self.score(_runner(copy))
        step.score = found.value
        if (reason := self.why_not(found)) is None:
            return None
        if self.wanted.on_drop == "fail":
            raise CheckFailedError(f"{step.text} costs too much: {reason}")
        return reason

    def finish(self, model: Model, run: Run | None = None) -> None:
        """Score the finished, lowered model; ``run`` is how, where it is no ONNX file.

        Raises:
            CheckFailedError: it lost too much.
        """
        self.after = self.score(_runner(model) if run is None else run)
        if reason := self.why_not(self.after):
            raise CheckFailedError(f"the finished model lost too much: {reason}")

    def score(self, run: Run) -> Score:
        """Score another model on the same data."""
        return score(self.metric, run, self.data, reference=self.reference, progress=self.progress)

    def why_not(self, found: Score) -> str | None:
        """What a score breaks, as a phrase, or None."""
        limit, bound = self.wanted.max_drop, self.wanted.bound
        if found.value != found.value:
            return f"{self.metric.text} is no number"
        if bound is not None and self.metric.worse(found.value, bound):
            return f"{show_score(found)}, and the bound is {bound:g}"
        if limit is None:
            return None
        drop = self.metric.drop(self.before.value, found.value)
        if drop <= limit:
            return None
        error = paired_stderr(self.before, found)
        spread = "" if error is None else f" ± {self.in_unit(error):.2g}"
        unit = "%" if self.metric.unit == "%" else " points"
        return (
            f"{show_score(found)} after {show_score(self.before, name=False)}, a drop of {drop:.2f}{spread}{unit}, "
            f"and {limit:g}{unit} is allowed"
        )

    def in_unit(self, difference: float) -> float:
        """A difference of two scores in the unit of a drop."""
        return 100 * difference / (1 if self.metric.unit == "points" else abs(self.before.value))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        drop = None
        if self.after is not None and self.metric.unit in ("points", "%"):
            drop = self.metric.drop(self.before.value, self.after.value)
        return {
            "metric": self.metric.text,
            "data": None if self.data is None else self.data.source,
            "before": self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "drop": drop,
            "max_drop": self.wanted.max_drop,
            "bound": self.wanted.bound,
        }


def show_score(found: Score, *, name: bool = True) -> str:
    """A score for people: ``top1 0.9889``."""
    text = f"{found.value:.4f}" if abs(found.value) < 100 else f"{found.value:.4g}"
    return f"{found.metric} {text}" if name else text


def _runner(model: Model) -> Run:
    return Oracle(model, optimized=True).run
