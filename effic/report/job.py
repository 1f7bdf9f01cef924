"""``effic report``: read results and their records, measure what was asked for, write one HTML file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.bench import bench, machine
from effic.guard import Accuracy, Guard
from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.evaluate import Oracle, load_inputs
from effic.ir.whole_files import write_whole
from effic.record import refuse_report
from effic.report.gather import Output, Source, match_sites, read_output, read_source
from effic.report.graph import graph_of
from effic.report.page import page, plotting_library

if TYPE_CHECKING:
    from effic.optimize import Report

Progress = Callable[[str, int, int], None]

_SEEDED_SETS = 4
_TURNS = 15
_MADE_UP = (
    f"compared with the original on {_SEEDED_SETS} sets of made-up inputs; what was calibrated on real data can "
    "look far worse on them than it is (give --inputs, or --metric and --data)"
)


@dataclasses.dataclass(frozen=True)
class ReportWritten:
    """What :func:`report` wrote.

    Attributes:
        path: the HTML file.
        bytes: its size.
        reference: the original's path, or None when there was none to look at.
        outputs: one row per output: its name, file bytes, quality (None when not known), speedup (None when
            not timed), number of weights, and notes.
        quality: what the quality is, as a phrase, or None.
        notes: what the reader should know of the whole, each a sentence.
    """

    path: str
    bytes: int
    reference: str | None
    outputs: tuple[dict[str, Any], ...]
    quality: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Measures:
    """What is measured for a report: a metric, or distances on some inputs; times, where threads are given."""

    accuracy: Accuracy | None = None
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None
    threads: int | None = None


def report(
    outputs: Sequence[str | os.PathLike[str]],
    html: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    accuracy: Accuracy | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    timed: bool = False,
    threads: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> ReportWritten:
    """Write a report on one result or several as one HTML file that needs no network.

    Args:
        outputs: ``.onnx`` files; what their records know is shown.
        html: the file to write.
        reference: the original; the one that all records name, where it is still there, when None.
        accuracy: a metric and its data, to score every output and the original by.
        inputs: arrays by name, or an ``.npz`` file, to compare outputs and original on where no metric is
            known of all of them; made-up ones when None.
        timed: time each output beside the original, in turns.
        threads: threads within one operator, for those timings.
        force: allow writing over an existing file.
        progress: called with what is being done, the number of the step and how many there are.

    Raises:
        UsageError: a file is missing, or the report would replace one.
        InvalidModelError: a model is broken.
        MissingExtraError: plotly is not installed.
        NotMeasuredError: a score or time was asked for and could not be taken.
    """
    _refuse(outputs, html, reference, force)
    if threads < 1:
        raise UsageError(f"threads is {threads}; it must be at least 1")
    found, originals = [], []
    steps = len(outputs) + 2
    for at, path in enumerate(outputs):
        _tell(progress, f"reading {Path(path).name}", at, steps)
        output, original = read_output(path)
        found.append(output)
        originals.append(original)
    notes: list[str] = []
    if reference is None:
        reference = _common(originals, notes)
    source = None if reference is None else read_source(reference)
    if source is None and (timed or accuracy is not None or inputs is not None):
        raise UsageError(
            "scores, distances and times are taken beside the original; name it with --reference"
        )
    if inputs is not None and accuracy is not None:
        raise UsageError(
            "inputs do nothing beside a metric, which has data of its own; leave one of them out"
        )
    measures = _Measures(accuracy, inputs, threads if timed else None)
    return _write(found, source, html, notes, measures, progress)


def report_run(
    run: Report, html: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
) -> ReportWritten:
    """Write a report on a run of :func:`effic.optimize` that has just ended and wrote its output.

    Args:
        run: what it returned.
        html: the file to write.
        force: allow writing over an existing file.
        progress: as for :func:`report`.

    Raises:
        UsageError: the run wrote no model.
        MissingExtraError: plotly is not installed.
    """
    from effic.optimize import measured

    if run.output is None:
        raise UsageError("the run wrote no model to report on; give it an output")
    check_html(html, run.output, force=force)
    _tell(progress, "writing the report", 0, 1)
    output, _ = read_output(run.output, measured(run))
    output.machine = machine()
    notes: list[str] = list(run.notes)
    # A model that was written over its own source is there no more.
    there = run.source.endswith(".onnx") and os.path.isfile(run.source)
    overwritten = there and os.path.samefile(run.source, run.output)
    source = read_source(run.source) if there and not overwritten else None
    return _write([output], source, html, notes, _Measures(), progress)


def check_html(html: str | os.PathLike[str], *models: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse a report that could not be written, before the work is done.

    Raises:
        UsageError: the file exists, would replace a model, or its folder is missing.
        MissingExtraError: plotly is not installed.
    """
    refuse_report(html, "report", models)
    if os.path.exists(html) and not force:
        raise UsageError(f"the report {os.fspath(html)} exists; give --force to write over it")
    plotting_library()


def _refuse(
    outputs: Sequence[str | os.PathLike[str]],
    html: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None,
    force: bool,
) -> None:
    if not outputs:
        raise UsageError("there is nothing to report on; name one .onnx file or several")
    seen: set[Path] = set()
    for path in [*outputs, *([] if reference is None else [reference])]:
        if os.path.isdir(path):
            raise UsageError(
                f"{os.fspath(path)} is a folder, and a report shows .onnx files; name one of them"
            )
    for path in outputs:
        if Path(path).resolve() in seen:
            raise UsageError(f"{os.fspath(path)} is named twice; name each output once")
        seen.add(Path(path).resolve())
    check_html(html, *outputs, *([] if reference is None else [reference]), force=force)


def _common(originals: Sequence[str | None], notes: list[str]) -> str | None:
    """The original that all records name, or None and why."""
    if None not in originals and len(set(originals)) == 1:
        return originals[0]
    if any(originals) and len(set(originals)) > 1:
        notes.append("The outputs' records name different originals, or none; name one with --reference.")
    else:
        notes.append("The original is not where the record says, or none is named; name it with --reference.")
    return None


def _write(
    outputs: list[Output],
    source: Source | None,
    html: str | os.PathLike[str],
    notes: list[str],
    measures: _Measures,
    progress: Progress | None,
) -> ReportWritten:
    steps = len(outputs) + 2
    for at, output in enumerate(outputs):
        name = output.source.name
        _check_source(output, source)
        match_sites(
            output,
            source,
            lambda done, of, name=name, at=at: _tell(  # type: ignore[misc]
                progress, f"comparing weights of {name}, {done} of {of}", at, steps
            ),
        )
    if measures.threads is not None and source is not None:
        _time(outputs, source, measures.threads, progress)
    _tell(progress, "measuring the outputs", steps - 2, steps)
    quality = _quality(outputs, source, measures, notes)
    _tell(progress, "writing the page", steps - 1, steps)
    title = ", ".join(output.source.name for output in outputs[:4]) + (
        f" and {len(outputs) - 4} more" if len(outputs) > 4 else ""
    )
    data = {
        "title": title,
        "notes": notes,
        "quality": quality,
        "reference": None
        if source is None
        else {**source.figures(), "graph": graph_of(source.model, source.shown.cost)},
        "outputs": [output.to_dict() for output in outputs],
    }
    content = page(_finite(json.loads(json.dumps(data, default=float))), f"effic report: {title}").encode()
    write_whole(html, content)
    return ReportWritten(
        os.fspath(html),
        len(content),
        None if source is None else source.path,
        tuple(
            {
                "name": output.source.name,
                "file_bytes": output.source.shown.measurement.file_bytes,
                "quality": output.quality,
                "speedup": None if output.speed is None else output.speed["speedup"],
                "weights": len(output.sites),
                "notes": tuple(output.notes),
            }
            for output in outputs
        ),
        None if quality is None else str(quality["title"]),
        tuple(notes),
    )


def _check_source(output: Output, source: Source | None) -> None:
    """Say so when the record names another original than the one that is shown beside it."""
    named = output.source_digests
    if source is None or not named or source.shown.sha256 is None or named[0] == source.shown.sha256:
        return
    sampled = output.build["source"]["files"][0].get("sampled")
    if not sampled:
        output.notes.append(
            f"Its record says that it was made from another file than {source.name} (sha256 {named[0][:16]}…)."
        )


def _time(outputs: list[Output], source: Source, threads: int, progress: Progress | None) -> None:
    for at, output in enumerate(outputs):
        _tell(progress, f"timing {output.source.name}", at, len(outputs))
        found = bench(source.path, output.source.path, threads=threads, repeats=_TURNS)
        output.speed = {
            "speedup": found.speedup,
            "low": found.speedup_low,
            "high": found.speedup_high,
            "ms": None if found.b is None else found.b.median_ms,
            "reference_ms": found.a.median_ms,
            "threads": found.threads,
            "when": "for this report",
        }


def _quality(
    outputs: list[Output], source: Source | None, measures: _Measures, notes: list[str]
) -> dict[str, Any] | None:
    """Give every output a figure of one kind, and say which; None and why in the notes where there is none."""
    if measures.accuracy is not None and source is not None:
        return _score(outputs, source, measures.accuracy)
    recorded = [output.accuracy for output in outputs]
    first = recorded[0]
    if (
        measures.inputs is None
        and first is not None
        and all(row is not None and row[:3] == first[:3] for row in recorded)
    ):
        for output, row in zip(outputs, recorded, strict=True):
            output.quality = None if row is None else row[3]
        return {"title": first[0], "unit": "", "how": "as recorded by the builds", "reference": first[2]}
    if len(outputs) == 1 and measures.inputs is None:
        return None  # what its record says of the distance is shown with the passes
    if source is None:
        notes.append("Without the original, nothing tells how good the outputs are beside each other.")
        return None
    return _distances(outputs, source, measures.inputs, notes)


def _score(outputs: list[Output], source: Source, accuracy: Accuracy) -> dict[str, Any]:
    guard = Guard.scored(accuracy, source.model, Oracle(source.model, optimized=True).run)
    for output in outputs:
        output.quality = float(guard.score(Oracle(output.source.model, optimized=True).run).value)
    return {
        "title": guard.metric.text,
        "unit": "",
        "how": f"scored for this report on {guard.before.count} of {_data_name(accuracy.data)}",
        "reference": float(guard.before.value),
    }


def _data_name(data: Any) -> str:
    return Path(data).name if isinstance(data, (str, os.PathLike)) else "the data"


def _distances(
    outputs: list[Output],
    source: Source,
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None,
    notes: list[str],
) -> dict[str, Any] | None:
    """The outputs' signal-to-noise ratio beside the original's."""
    from effic.compare import compare

    arrays = load_inputs(inputs) if isinstance(inputs, (str, os.PathLike)) else inputs
    for output in outputs:
        try:
            rows = compare(
                source.path, output.source.path, inputs=arrays, count=_SEEDED_SETS
            ).outputs.values()
        except (NotMeasuredError, UsageError) as error:
            output.notes.append(f"Its outputs could not be compared with the original's: {error}.")
            continue
        if any(row.shape_mismatch or row.new_nonfinite for row in rows):
            output.notes.append("Its outputs have other shapes than the original's, or values that are NaN.")
            continue
        worst = min((row.sqnr_db for row in rows), default=math.inf)
        output.quality, output.equal = (worst, False) if math.isfinite(worst) else (None, True)
    if all(output.quality is None and not output.equal for output in outputs):
        notes.append("No output could be compared with the original; give --metric and --data.")
        return None
    return {
        "title": "SQNR of the outputs",
        "unit": "dB",
        "how": _MADE_UP if inputs is None else f"compared with the original on {_data_name(inputs)}",
        "reference": None,
    }


def _finite(data: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _tell(progress: Progress | None, what: str, number: int, total: int) -> None:
    if progress is not None:
        progress(what, number, total)
