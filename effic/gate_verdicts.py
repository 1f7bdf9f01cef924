"""What ``effic gate`` found: one verdict for each budget of each model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "broken", "error", "unmeasured", "info"]
Unit = Literal["bytes", "count", "score", "points", "%", "ratio", "dB", "ms", "difference"]

WORDS: dict[Status, str] = {
    "ok": "kept",
    "broken": "broken",
    "error": "failed",
    "unmeasured": "not measured",
    "info": "for information",
}
REPORT_VERSION = 1


@dataclass(frozen=True)
class Mover:
    """A tensor, node or operator and what it contributes, in the baseline (None: was not there) and now.

    Attributes:
        kind: what it is.
        name: its name.
        before, after: what it contributes.
        reader: of a tensor, the node that reads it in the end, where that is known.
        said: what passes said of it, in order, by the record of the build, where there is one.
    """

    kind: Literal["tensor", "node", "operator"]
    name: str
    before: int | None
    after: int
    reader: str | None = None
    said: tuple[str, ...] = ()

    @property
    def grew(self) -> int:
        return self.after - (self.before or 0)


@dataclass(frozen=True)
class PassMover:
    """A pass that does something else now than in the baseline.

    Attributes:
        name: the pass.
        before, after: its text form then and now; None where it did not run.
        saved_before, saved: bytes of weights that it took away then and now.
    """

    name: str
    before: str | None
    after: str | None
    saved_before: int
    saved: int


@dataclass(frozen=True)
class Verdict:
    """One budget held against one model.

    Attributes:
        model: path as in the baseline (relative to the configuration's folder).
        metric: what was measured; of a component, ``weight_bytes of *.attention.*``.
        bound: which bound; a lower one begins with ``min``.
        key: the configuration key to edit.
        line: its line in the configuration, from 1, where it was found.
        status: ``"ok"``; ``"broken"``; ``"error"``, the model or what it is compared with cannot be used;
            ``"unmeasured"``; or ``"info"``, which nothing depends on.
        unit: of the figures.
        value: the measured figure, or None.
        limit: the worst figure allowed, or None when it depends on a missing baseline.
        baseline: the baseline's figure, where there is one to tell.
        noise: how far ``value`` may be off: half the interquartile range of a ratio, the standard error of
            a drop in a score.
        why: the reason for ``"error"`` and ``"unmeasured"``, and what to do; else what is worth knowing.
        movers: for ``"broken"``, what grew most, or (``grown`` False) what is largest.
        grown: whether the movers are what grew since the baseline.
        others: how much the movers not listed contribute together.
        shrunk: how much went away elsewhere since the baseline.
        passes: for ``"broken"``, passes that do something else than in the baseline.
    """

    model: str
    metric: str
    bound: str
    key: str
    status: Status
    line: int | None = None
    unit: Unit = "count"
    value: float | None = None
    limit: float | None = None
    baseline: float | None = None
    noise: float | None = None
    why: str = ""
    movers: tuple[Mover, ...] = ()
    grown: bool = False
    others: int = 0
    shrunk: int = 0
    passes: tuple[PassMover, ...] = ()

    @property
    def over(self) -> float | None:
        """By how much the limit is exceeded, or missed if it is a lower one (negative: the room left)."""
        if self.value is None or self.limit is None:
            return None
        return self.limit - self.value if self.bound.startswith("min") else self.value - self.limit


@dataclass
class GateReport:
    """All verdicts of one run.

    Attributes:
        config: the file with the budgets.
        baseline: the baseline file.
        headroom: the share by which the baseline's figures may be exceeded.
        verdicts: in the order of the configuration.
        updated: models that were written to the baseline.
        notes: what the reader should know, each a sentence.
    """

    config: Path
    baseline: Path
    headroom: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 when a budget is broken, else 2 when a model cannot be used, else 3 when something was not
        measured, else 0: what is certain outweighs what is not known."""
        found = {verdict.status for verdict in self.verdicts}
        return 1 if "broken" in found else 2 if "error" in found else 3 if "unmeasured" in found else 0

    @property
    def summary(self) -> str:
        """``3 kept, 1 broken``."""
        counts = {status: sum(v.status == status for v in self.verdicts) for status in WORDS}
        return ", ".join(f"{count} {WORDS[status]}" for status, count in counts.items() if count)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data; its form is ``effic/schemas/gate.schema.json``."""
        return {
            "effic_gate": REPORT_VERSION,
            "config": str(self.config),
            "baseline": str(self.baseline),
            "headroom": self.headroom,
            "exit_code": self.exit_code,
            "updated": self.updated,
            "notes": self.notes,
            "verdicts": [{**dataclasses.asdict(v), "over": v.over} for v in self.verdicts],
        }


# -- figures for people --------------------------------------------------------------------------


def exact(value: float, unit: Unit) -> str:
    """A figure in full: ``200,000 B``, ``0.9822``, ``1.083``."""
    if not math.isfinite(value):
        return str(value)
    if unit in ("bytes", "count"):
        text = f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"
        return f"{text} B" if unit == "bytes" else text
    texts: dict[Unit, Callable[[float], str]] = {
        "score": lambda v: f"{v:.4f}" if abs(v) < 100 else f"{v:.5g}",
        "points": lambda v: f"{v:.2f} points",
        "%": lambda v: f"{v:.2f}%",
        "ratio": lambda v: f"{v:.3f}",
        "dB": lambda v: f"{v:.1f} dB",
        "ms": lambda v: f"{v:.3g} ms",
        "difference": lambda v: f"{v:.3g}",
    }
    return texts[unit](value)


def subject(verdict: Verdict) -> str:
    """What is judged: ``nodes``, or ``accuracy top1 (max_drop)`` where the bound says what of it."""
    if verdict.unit in ("bytes", "count") or verdict.bound in ("min", "max"):
        return verdict.metric
    return f"{verdict.metric} ({verdict.bound})"


def headline(verdict: Verdict) -> str:
    """A verdict in one sentence: ``m.onnx: nodes is 3 over its limit (12, at most 9 allowed)``."""
    about = f"{verdict.model}: {subject(verdict)}"
    if verdict.status == "broken" and verdict.value is not None and verdict.limit is not None:
        lower = verdict.bound.startswith("min")
        most = "at least" if lower else "at most"
        figures = f"{exact(verdict.value, verdict.unit)}, {most} {exact(verdict.limit, verdict.unit)} allowed"
        over = verdict.over
        if over is None or not math.isfinite(over):
            return f"{about} breaks its limit ({figures})"
        return f"{about} is {exact(over, verdict.unit)} {'under' if lower else 'over'} its limit ({figures})"
    if verdict.status == "broken":
        return f"{about} breaks its limit: {verdict.why}"
    if verdict.status in ("error", "unmeasured"):
        word = "not measured" if verdict.status == "unmeasured" else "cannot be judged"
        return f"{verdict.model}: {verdict.metric} ({verdict.bound}) {word}: {verdict.why}"
    if verdict.value is None:
        return f"{about}: {verdict.why}"
    return f"{about} is {exact(verdict.value, verdict.unit)}" + (f" ({verdict.why})" if verdict.why else "")
