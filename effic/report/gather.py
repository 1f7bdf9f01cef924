"""All that a report shows of one model file: its figures, its record, its weights, its graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.record import file_digest, read_record, record_path
from effic.report.graph import graph_of
from effic.report.rows import (
    PassRow,
    count,
    mapping,
    number,
    passes_of_file,
    passes_of_record,
    rows_of,
    text,
)
from effic.report.sites import Site, Stored, site_rows, stored_sites
from effic.show import Shown, inspect_model


@dataclass
class Source:
    """A model file that was read: the original, or a result before its record was looked at."""

    path: str
    model: Model
    shown: Shown
    stored: list[Stored]

    @property
    def name(self) -> str:
        """The file's name, without the folder: a report is handed on, and folders are nobody's business."""
        return Path(self.path).name

    def figures(self) -> dict[str, Any]:
        """The totals, as JSON-able data."""
        cost = self.shown.cost
        return {
            "name": self.name,
            "sha256": self.shown.sha256,
            "file_bytes": self.shown.measurement.file_bytes,
            "weight_bytes": cost.weight_bytes,
            "parameters": cost.parameters,
            "nodes": cost.nodes,
            "macs": cost.macs,
            "macs_unknown": cost.macs_unknown,
            "ops": dict(cost.ops),
        }


@dataclass
class Output:
    """One result: its figures, the passes, the weights, and what was measured.

    Attributes:
        source: the file.
        passes: what was done, as far as it is known.
        known: where the passes are known from: ``record``, ``file`` or empty.
        build: the record that is in the file or beside it, or empty.
        measured: figures of the record, or empty.
        machine: where it was built.
        sites: its weights beside the original's.
        quality: how good it is, by what was chosen for all outputs; None when not known.
        speed: how fast it is beside the original: ``speedup``, ``low``, ``high``, ``ms``, ``reference_ms``,
            ``threads``, ``when``; None when not timed.
        notes: what the reader should know, each a sentence.
    """

    source: Source
    passes: list[PassRow]
    known: str
    build: Mapping[str, Any]
    measured: Mapping[str, Any]
    machine: Mapping[str, Any]
    sites: list[Site] = field(default_factory=list)
    quality: float | None = None
    equal: bool = False
    speed: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> tuple[str, str, float, float] | None:
        """The recorded metric: its text, the data's digest, the original's score and this one's."""
        found = mapping(self.measured.get("accuracy"))
        before, after = mapping(found.get("before")), mapping(found.get("after"))
        scores = number(before.get("value")), number(after.get("value"))
        if scores[0] is None or scores[1] is None or before.get("data") != after.get("data"):
            return None
        return text(found.get("metric")), text(after.get("data")), scores[0], scores[1]

    @property
    def source_digests(self) -> list[str]:
        """Digests of the files it was made from, as the record has them."""
        return [text(row.get("sha256")) for row in rows_of(mapping(self.build.get("source")).get("files"))]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data for the page."""
        calibration = mapping(self.build.get("calibration"))
        distance = mapping(self.measured.get("distance"))
        return {
            **self.source.figures(),
            "known": self.known,
            "passes": [_row(row) for row in self.passes],
            "sites": [dict(vars(site)) for site in self.sites],
            "graph": graph_of(self.source.model, self.source.shown.cost),
            "verdict": text(self.measured.get("verdict")),
            "sqnr_db": number(distance.get("sqnr_db")),
            "distance_equal": bool(distance) and distance.get("max_abs") == 0,
            "seconds": number(self.measured.get("seconds")),
            "accuracy": self.accuracy,
            "quality": self.quality,
            "equal": self.equal,
            "speed": self.speed,
            "notes": self.notes,
            "made": {
                "passes": [text(item) for item in self.build.get("passes") or []],
                "target": text(self.build.get("target")),
                "seed": count(self.build.get("seed")),
                "source": self.source_digests,
                "calibration": text(calibration.get("digest")),
                "random": calibration.get("random") is True,
                "versions": {str(k): str(v) for k, v in mapping(self.build.get("versions")).items()},
                "machine": ", ".join(
                    str(self.machine[key]) for key in ("processor", "system") if self.machine.get(key)
                ),
            },
        }


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read a model file and describe it.

    Raises:
        UsageError: there is no such file.
        InvalidModelError: it is broken.
    """
    model, shown = read_onnx(path), inspect_model(path)
    return Source(os.fspath(path), model, shown, stored_sites(model, shown))


def read_output(
    path: str | os.PathLike[str], measured: Mapping[str, Any] | None = None
) -> tuple[Output, str | None]:
    """Read a result and what is recorded of it.

    Args:
        path: the ``.onnx`` file.
        measured: what a run that has just ended measured, in place of the record's.

    Returns:
        The output, without its weights' rows, and the path of the original where the record knows it.

    Raises:
        UsageError: there is no such file.
        InvalidModelError: it is broken.
    """
    source = read_source(path)
    build: Mapping[str, Any] = source.shown.build or {}
    machine: Mapping[str, Any] = {}
    notes, original = list(source.shown.notes), None
    beside = record_path(path)
    if measured is not None:
        known = "record"
    elif not beside.is_file():
        known, measured = "", {}
        notes.append(
            f"There is no record {beside.name} beside the file, so errors, times and reasons are not known."
        )
    else:
        known, measured = "record", {}
        try:
            record = read_record(beside)
        except UsageError as error:
            known = ""
            notes.append(f"The record beside the file cannot be used: {error}.")
        else:
            if _speaks_of(record, path):
                build, machine = record["build"], mapping(record.get("machine"))
                measured = mapping(record.get("measured"))
                original = _found(record, beside)
            else:
                known = ""
                notes.append(f"The record {beside.name} was made for another file and is left out.")
    passes = passes_of_record(measured) if known else []
    if not passes:
        passes = passes_of_file(source.shown.record)
        known = "file" if passes else ""
        if not passes:
            notes.append("Nothing in or beside the file tells how it was made.")
    output = Output(source, passes, known, build, measured, machine, notes=notes)
    output.speed = _recorded_speed(measured)
    return output, original


def match_sites(
    output: Output, reference: Source | None, progress: Callable[[int, int], None] | None = None
) -> None:
    """Fill in ``output.sites``."""
    before = None if reference is None else reference.stored
    output.sites = site_rows(before, output.source.stored, output.passes, progress)


def _speaks_of(record: Mapping[str, Any], path: str | os.PathLike[str]) -> bool:
    """Whether a record is of this very file."""
    files = record["output"]["files"]
    if not files or files[0]["bytes"] != os.stat(path).st_size:
        return False
    digest = file_digest(path, whole=not files[0].get("sampled"))
    return bool(digest.sha256 == files[0]["sha256"])


def _found(record: Mapping[str, Any], beside: Path) -> str | None:
    """The original's path, where it still is the ``.onnx`` file that the record names."""
    named = record["paths"].get("source")
    if not isinstance(named, str) or not named.endswith(".onnx"):
        return None
    path = Path(os.path.normpath(beside.parent / named))
    files = record["build"]["source"]["files"]
    if not path.is_file() or not files or path.stat().st_size != files[0]["bytes"]:
        return None
    digest = file_digest(path, whole=not files[0].get("sampled"))
    return str(path) if digest.sha256 == files[0]["sha256"] else None


def _recorded_speed(measured: Mapping[str, Any]) -> dict[str, Any] | None:
    total = mapping(mapping(measured.get("speed")).get("total"))
    found = {
        "speedup": number(total.get("speedup")),
        "low": number(total.get("speedup_low")),
        "high": number(total.get("speedup_high")),
        "ms": number(mapping(total.get("b")).get("median_ms")),
        "reference_ms": number(mapping(total.get("a")).get("median_ms")),
    }
    if any(value is None or value <= 0 for value in found.values()):
        return None
    return {**found, "threads": count(total.get("threads")), "when": "when it was built"}


def _row(row: PassRow) -> dict[str, Any]:
    return {**vars(row), "remarks": [vars(remark) for remark in row.remarks]}
