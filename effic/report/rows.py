"""The rows of a report: passes as a record tells of them. Anybody may have written a record; nothing is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effic.ir.model import PassRecord


@dataclass(frozen=True)
class RemarkRow:
    """What a pass said about one place: ``passed`` or ``missed``, where, why, and figures."""

    kind: str
    where: str
    text: str
    data: dict[str, Any]


@dataclass
class PassRow:
    """What one pass did.

    Attributes:
        name, text: the pass, and its text form.
        lowering: whether it is the backend's work; ``text`` is the target then.
        numerics: how far it may move numbers; empty when not recorded.
        changed: whether the graph differs from before.
        passed, missed: places rewritten and left alone.
        bytes_before, bytes_after: of the weights.
        nodes_before, nodes_after: None when not recorded.
        seconds: time of the pass, or None.
        verdict: what the check of the numbers found, in words; empty when not recorded.
        equal: whether the outputs were the same bit for bit; None when not run.
        sqnr_db, cosine, max_rel, top1: the outputs' distance from those before the pass, or None.
        score: the metric after the pass, or None.
        rolled_back: why it was undone, or None.
        remarks: all of them, or none when only the file's own record tells of the pass.
        speedup: time before / time after, with quartiles, or None when not timed.
    """

    name: str
    text: str
    lowering: bool = False
    numerics: str = ""
    changed: bool = False
    passed: int = 0
    missed: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    nodes_before: int | None = None
    nodes_after: int | None = None
    seconds: float | None = None
    verdict: str = ""
    equal: bool | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    max_rel: float | None = None
    top1: float | None = None
    score: float | None = None
    rolled_back: str | None = None
    remarks: list[RemarkRow] = field(default_factory=list)
    speedup: tuple[float, float, float] | None = None


def number(found: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    try:
        value = float(found)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return value if math.isfinite(value) else None


def count(found: Any) -> int | None:
    """A count of something, or None."""
    value = number(found)
    return None if value is None or value < 0 else int(value)


def text(found: Any) -> str:
    """A text, or nothing."""
    return found if isinstance(found, str) else ""


def mapping(found: Any) -> Mapping[str, Any]:
    """A mapping, or an empty one."""
    return found if isinstance(found, Mapping) else {}


def rows_of(found: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list."""
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, (list, tuple)) else []


def passes_of_record(measured: Mapping[str, Any]) -> list[PassRow]:
    """The passes as a record's ``measured`` tells of them, those of the target's lowering last."""
    found = [_pass(step) for step in rows_of(measured.get("steps"))]
    timed = rows_of(mapping(measured.get("speed")).get("steps"))
    for row in found:
        # Trials on some kinds of weights alone stand among the timings too, under other texts.
        if row.lowering or (not row.changed and row.rolled_back is None):
            continue
        at = next((i for i, each in enumerate(timed) if each.get("text") == row.text), None)
        if at is not None:
            speeds = [number(timed[at].get(key)) for key in ("speedup", "low", "high")]
            del timed[: at + 1]
            if all(speed is not None and speed > 0 for speed in speeds):
                middle, low, high = (float(speed or 0.0) for speed in speeds)
                row.speedup = middle, low, high
    return found


def passes_of_file(record: Sequence[PassRecord]) -> list[PassRow]:
    """The passes as the model's own metadata tells of them: what they changed, and the bytes."""
    return [
        PassRow(
            name=row.text.partition("{")[0],
            text=row.text,
            changed=bool(row.passed or row.bytes_after != row.bytes_before),
            passed=row.passed,
            missed=row.missed,
            bytes_before=row.bytes_before,
            bytes_after=row.bytes_after,
        )
        for row in record
    ]


def _pass(step: Mapping[str, Any]) -> PassRow:
    distance = mapping(step.get("distance"))
    remarks = [
        RemarkRow(
            text(row.get("kind")), text(row.get("where")), text(row.get("text")), _flat(row.get("data"))
        )
        for row in rows_of(step.get("remarks"))
    ]
    equal = None
    if distance:
        equal = distance.get("max_abs") == 0 and not distance.get("wrong_integers")
    return PassRow(
        name=text(step.get("name")),
        text=text(step.get("text")),
        lowering=step.get("name") == "lower",
        numerics=text(step.get("numerics")),
        changed=step.get("changed") is True,
        passed=count(step.get("passed")) or 0,
        missed=count(step.get("missed")) or 0,
        bytes_before=count(step.get("bytes_before")) or 0,
        bytes_after=count(step.get("bytes_after")) or 0,
        nodes_before=count(step.get("nodes_before")),
        nodes_after=count(step.get("nodes_after")),
        seconds=number(step.get("seconds")),
        verdict=text(step.get("verdict")),
        equal=equal,
        sqnr_db=number(distance.get("sqnr_db")),
        cosine=number(distance.get("cosine")),
        max_rel=number(distance.get("max_rel")),
        top1=number(distance.get("top1")),
        score=number(step.get("score")),
        rolled_back=text(step.get("rolled_back")) or None,
        remarks=remarks,
    )


def _flat(data: Any) -> dict[str, Any]:
    """The plain figures of a remark."""
    return {
        key: value
        for key, value in mapping(data).items()
        if isinstance(value, (str, bool, int)) or number(value) is not None
    }
