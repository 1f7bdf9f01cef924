"""Faster here? Each pass is timed on the target, and what made the model slower is undone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effic.backends.base import Artifact, Backend
from effic.bench import BenchResult, bench
from effic.folder_build import pinned
from effic.ir.errors import NotMeasuredError
from effic.ir.evaluate import runnable_inputs
from effic.ir.model import Model
from effic.ir.tensors import Scratch
from effic.ir.weights import weight_sites
from effic.passes.base import Pass, Remarks
from effic.passes.calibration import Calibration
from effic.passes.pipeline import Instead, Step, run_passes

TURNS = 15
"""Turns that each of two models gets; see :func:`effic.bench.bench`."""

NOISE = 0.02
"""Slower by less than this share is no difference, whatever the quartiles say."""


@dataclass(frozen=True)
class Timed:
    """One comparison: the text of what was tried, and how fast it was beside the model before it."""

    text: str
    speedup: float
    low: float
    high: float
    kept: bool

    @property
    def figures(self) -> str:
        """For people: ``0.83 times as fast (quartiles 0.81 to 0.86)``."""
        return f"{self.speedup:.2f} times as fast (quartiles {self.low:.2f} to {self.high:.2f})"


@dataclass
class SpeedGuard:
    """Times the model after each pass, as the target runs it, beside the model before.

    A pass that makes the model slower is undone. Where it works on weights of several operators, it is
    tried on each kind alone, and what does not make it slower is kept.

    Args:
        model: the original.
        backend: the target.
        inputs: arrays by name; seeded ones by default.
        threads: threads within one operator.
        calibration: what passes look at when they are tried on fewer sites.
        seed: of seeded inputs.

    Attributes:
        rows: every comparison made, in order.
        total: the finished model beside the original, once :meth:`finish` was called.
    """

    model: dataclasses.InitVar[Model]
    backend: Backend
    inputs: Mapping[str, np.ndarray] | None = None
    threads: int = 1
    calibration: Calibration | None = None
    seed: int = 0
    rows: list[Timed] = field(default_factory=list)
    total: BenchResult | None = None

    def __post_init__(self, model: Model) -> None:
        self._scratch = Scratch()
        self._files = 0
        self._first = self._best = self._lowered(model)
        if self.inputs is None:
            self.inputs, _ = runnable_inputs(pinned(model, self.backend.sizes(model)), self._first, self.seed)

    def keep(self, before: Model, model: Model, item: Pass, step: Step) -> str | Instead | None:
        """Time a model after a pass; a reason to undo it, or the pass on fewer kinds of sites."""
        made = self._lowered(model)
        found = self._against(made)
        if not slower(found):
            self._note(step.text, found, kept=True)
            self._best = made
            return None
        self._note(step.text, found, kept=False)
        reason = f"slower on {self.backend.text}: {self.rows[-1].figures}"
        return self._fewer(before, item, reason) or reason

    def finish(self, model: Model) -> BenchResult:
        """Time the finished, lowered model beside the original."""
        self.total = self._time(self._first, self._artifact(model))
        return self.total

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "steps": [dataclasses.asdict(row) for row in self.rows],
            "total": None if self.total is None else self.total.to_dict(),
        }

    def _fewer(self, before: Model, item: Pass, reason: str) -> Instead | None:
        """The pass on those kinds of weights that it does not make slower, or None."""
        if not any(f.name == "skip" for f in dataclasses.fields(item)):
            return None
        # A pass that was restricted already is not taken apart again.
        skipped: tuple[str, ...] = getattr(item, "skip", ())
        if any(name.startswith("kind:") for name in skipped):
            return None
        kinds = list(dict.fromkeys(site.kind for site in weight_sites(before)))
        bad: list[str] = []
        tried = 0
        for kind in kinds:
            alone = _without(item, [k for k in kinds if k != kind])
            copy = before.clone()
            result = run_passes(copy, [alone], check="off", calibration=self.calibration)
            if not result.steps[0].changed:
                continue
            tried += 1
            found = self._against(self._lowered(copy))
            self._note(f"{item.name} on {kind} alone", found, kept=not slower(found))
            if slower(found):
                bad.append(kind)
        if tried < 2 or not bad or len(bad) == tried:
            return None
        return Instead(_without(item, bad), f"{reason}; left {', '.join(bad)} alone")

    def _against(self, made: Artifact) -> BenchResult:
        return self._time(self._best, made)

    def _time(self, a: Artifact, b: Artifact) -> BenchResult:
        return bench(a, b, self.inputs, repeats=TURNS)

    def _note(self, text: str, found: BenchResult, *, kept: bool) -> None:
        self.rows.append(Timed(text, *_figures(found), kept))

    def _lowered(self, model: Model) -> Artifact:
        copy = model.clone()
        self.backend.lower(copy, Remarks())
        return self._artifact(copy)

    def _artifact(self, model: Model) -> Artifact:
        self._files += 1
        ending = "tvm" if self.backend.is_folder else "onnx"
        path = os.path.join(self._scratch.folder, f"{self._files}.{ending}")
        self.backend.build(model, path)
        return self.backend.load(path, threads=self.threads)


def slower(found: BenchResult) -> bool:
    """Whether B is slower than A beyond the noise: even the better quartile of the turns is below 1."""
    speedup, _, high = _figures(found)
    return high < 1 and speedup < 1 - NOISE


def _figures(found: BenchResult) -> tuple[float, float, float]:
    if found.speedup is None or found.speedup_low is None or found.speedup_high is None:
        raise NotMeasuredError("one model alone was timed; two are needed to compare")
    return found.speedup, found.speedup_low, found.speedup_high


def _without(item: Pass, kinds: list[str]) -> Pass:
    skip: tuple[str, ...] = getattr(item, "skip", ())
    return dataclasses.replace(item, skip=(*skip, *(f"kind:{k}" for k in kinds)))  # type: ignore[call-arg]
