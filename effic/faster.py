"""Faster here? Each pass is timed on the target, and what made the model slower is undone."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effic.backends import get_backend
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
    tried on each kind alone, and what does not make it slower is kept. So a pass is built at most twice and
    once for each kind of weights, and each build gets :data:`TURNS` turns: however much else the machine
    does, that ends.

    Args:
        model: the original.
        backend: the target.
        inputs: arrays by name; seeded ones by default.
        threads: threads within one operator.
        calibration: what passes look at when they are tried on fewer sites.
        seed: of seeded inputs.
        tell: hears what is being built and timed.

    Attributes:
        rows: every comparison made, in order.
        total: the finished model beside the original, both on the target, once :meth:`finish` was called.
        beside: the same beside the original on :attr:`Backend.rival`; None where there is no such target.
    """

    model: dataclasses.InitVar[Model]
    backend: Backend
    inputs: Mapping[str, np.ndarray] | None = None
    threads: int = 1
    calibration: Calibration | None = None
    seed: int = 0
    tell: Callable[[str], None] = lambda _text: None
    rows: list[Timed] = field(default_factory=list)
    total: BenchResult | None = None
    beside: BenchResult | None = None

    def __post_init__(self, model: Model) -> None:
        self._scratch = Scratch()
        self._folders = 0
        self._first = self._best = self._lowered(model, "the original")
        self._rival = get_backend(self.backend.rival) if self.backend.rival else None
        # Written now, as passes will rewrite the model, and loaded when it is timed.
        self._rivals = "" if self._rival is None else self._built(model, self._rival, "the original")
        if self.inputs is None:
            self.inputs, _ = runnable_inputs(pinned(model, self.backend.sizes(model)), self._first, self.seed)

    def keep(self, before: Model, model: Model, item: Pass, step: Step) -> str | Instead | None:
        """Time a model after a pass; a reason to undo it, or the pass on fewer kinds of sites."""
        made = self._lowered(model, item.name)
        found = self._against(made, item.name)
        if not slower(found):
            self._note(step.text, found, kept=True)
            if self._best is not self._first:
                _remove(self._best)
            self._best = made
            return None
        self._note(step.text, found, kept=False)
        _remove(made)
        reason = f"slower on {self.backend.text}: {self.rows[-1].figures}"
        return self._fewer(before, item, reason) or reason

    def finish(self, model: Model, built: Artifact | None = None) -> None:
        """Time the finished model beside the original.

        Args:
            model: lowered.
            built: what the target made of it, where that is at hand.
        """
        made = built
        if made is None:
            made = self._load(self._written(model, self.backend, "the result"))
        self.total = self._time(self._first, made, "the result")
        if self._rival is not None:
            rival = self._rival.load(self._rivals, threads=self.threads)
            self.beside = self._time(rival, made, f"the result beside {self._rival.name}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "steps": [dataclasses.asdict(row) for row in self.rows],
            "total": None if self.total is None else self.total.to_dict(),
            "beside": None
            if self.beside is None
            else {"target": self.backend.rival, **self.beside.to_dict()},
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
            text = f"{item.name} on {kind} alone"
            made = self._lowered(copy, text)
            found = self._against(made, text)
            _remove(made)
            self._note(text, found, kept=not slower(found))
            if slower(found):
                bad.append(kind)
        if tried < 2 or not bad or len(bad) == tried:
            return None
        return Instead(_without(item, bad), f"{reason}; left {', '.join(bad)} alone")

    def _against(self, made: Artifact, what: str) -> BenchResult:
        return self._time(self._best, made, what)

    def _time(self, a: Artifact, b: Artifact, what: str) -> BenchResult:
        self.tell(f"timing {what}")
        return bench(a, b, self.inputs, repeats=TURNS)

    def _note(self, text: str, found: BenchResult, *, kept: bool) -> None:
        self.rows.append(Timed(text, *_figures(found), kept))

    def _lowered(self, model: Model, what: str) -> Artifact:
        return self._load(self._built(model, self.backend, what))

    def _built(self, model: Model, backend: Backend, what: str) -> str:
        copy = model.clone()
        backend.lower(copy, Remarks())
        return self._written(copy, backend, what)

    def _written(self, model: Model, backend: Backend, what: str) -> str:
        """A lowered model as the target takes it, in a folder of its own; the path."""
        self._folders += 1
        folder = os.path.join(self._scratch.folder, str(self._folders))
        os.mkdir(folder)
        path = os.path.join(folder, "built.tvm" if backend.is_folder else "built.onnx")
        backend.build(model, path, tell=lambda text, *_: self.tell(f"to time {what}: {text}"))
        return path

    def _load(self, path: str) -> Artifact:
        return self.backend.load(path, threads=self.threads)


def _remove(made: Artifact) -> None:
    """Let go of the files of what is not timed again, so that no more than a few builds lie on the disk."""
    shutil.rmtree(os.path.dirname(made.path), ignore_errors=True)


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
