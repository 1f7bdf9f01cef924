"""Good or bad: one verdict on a model against the original, by bounds on its outputs or by a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from effic.compare import Bounds
from effic.guard import Accuracy, Guard, show_score
from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.evaluate import Oracle, distances, runnable_inputs
from effic.ir.model import Model
from effic.passes.base import Remarks

if TYPE_CHECKING:
    from effic.backends.base import Backend


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        reason: what is broken, as a phrase, or None when all is within the bounds.
        badness: a number that grows with the damage: the drop of the metric, or the largest
            difference of an output relative to its range; infinite when outputs cannot be compared.
        text: the figures, for people.
        figures: the same by name: ``max_rel`` and ``sqnr_db``, or ``score`` and ``worse``.
    """

    reason: str | None
    badness: float
    text: str
    figures: dict[str, float] = field(default_factory=dict)


class Trial:
    """Judges models against the one it was made for, on the same inputs, and counts how often.

    Args:
        model: the original.
        bounds: how far outputs may lie apart, or
        accuracy: the metric, its data and its limits; one of the two.
        backend: lowers each model first; None runs it as it is written.
        inputs: arrays by name for ``bounds``; seeded ones by default.
        seed: of the seeded inputs.
        limits: whether something has to be given that can be broken; without, outputs are measured.

    Raises:
        UsageError: nothing that could be broken was given, or both kinds.
        NotMeasuredError: the original cannot be run.
    """

    def __init__(
        self,
        model: Model,
        *,
        bounds: Bounds | None = None,
        accuracy: Accuracy | None = None,
        backend: Backend | None = None,
        inputs: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
        limits: bool = True,
    ) -> None:
        if not limits:
            bounds = Bounds() if accuracy is None else None
        elif bounds is not None and bounds == Bounds():
            bounds = None
        if (bounds is None) == (accuracy is None):
            raise UsageError(
                "give bounds on the outputs (--rtol, --min-sqnr, …) or a metric with --max-drop or --bound, "
                "and not both"
            )
        if limits and accuracy is not None and accuracy.max_drop is None and accuracy.bound is None:
            raise UsageError("a metric without a limit breaks never; give --max-drop or --bound")
        self.evaluations = 0
        self.backend, self.bounds = backend, bounds
        self.guard = None if accuracy is None else Guard.begin(model, accuracy, None)
        self._inputs: Mapping[str, np.ndarray] = {}
        self._wanted: dict[str, np.ndarray] = {}
        if bounds is not None:
            oracle = Oracle(model, optimized=backend is not None)
            if inputs is None:
                self._inputs, self._wanted = runnable_inputs(model, oracle, seed)
            else:
                self._inputs, self._wanted = inputs, oracle.run(inputs)

    def inputs(self) -> Mapping[str, np.ndarray]:
        """What models are judged on; of data in batches, the first."""
        if self.guard is not None and self.guard.data is not None:
            return next(self.guard.data.batches()).feeds[0]
        return self._inputs

    def __call__(self, model: Model) -> Outcome:
        """Judge a model; it is not changed."""
        self.evaluations += 1
        copy = model
        if self.backend is not None:
            copy = model.clone()
            self.backend.lower(copy, Remarks())
        try:
            run = Oracle(copy, optimized=self.backend is not None).run
            return self._by_metric(run) if self.guard is not None else self._by_bounds(run)
        except NotMeasuredError as error:
            return Outcome(f"it does not run: {error}", math.inf, "does not run")

    def _by_metric(self, run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]) -> Outcome:
        guard = self.guard
        if guard is None:
            raise UsageError("there is no metric")
        found = guard.score(run)
        worse = guard.before.value - found.value
        if not guard.metric.higher_is_better:
            worse = -worse
        worse = math.inf if math.isnan(worse) else worse
        return Outcome(guard.why_not(found), worse, show_score(found), {"score": found.value, "worse": worse})

    def _by_bounds(self, run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]) -> Outcome:
        bounds = self.bounds or Bounds()
        broken: list[str] = []
        worst, sqnr = 0.0, math.inf
        for name, distance in distances(self._wanted, run(self._inputs)):
            broken += bounds.broken_by(name, distance)
            if distance.shape_mismatch or distance.new_nonfinite:
                worst = math.inf
            else:
                worst, sqnr = max(worst, distance.max_rel), min(sqnr, distance.sqnr_db)
        text = "equal" if worst == 0 else f"{worst:.2g} of the range, {sqnr:.1f} dB"
        return Outcome("; ".join(broken) or None, worst, text, {"max_rel": worst, "sqnr_db": sqnr})
