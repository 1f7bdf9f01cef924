"""What ``effic gate`` knows of a model now, and the baseline file that keeps it for the next time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effic.ir.errors import UsageError
from effic.ir.whole_files import write_whole
from effic.measure import Measurement, measure_all

if TYPE_CHECKING:
    from effic.ir.model import Model

BASELINE_VERSION = 1


@dataclass(frozen=True)
class PassBytes:
    """A pass of the build, and the bytes of all weights before and after it."""

    name: str
    text: str
    bytes_before: int
    bytes_after: int

    @property
    def saved(self) -> int:
        """Bytes it took away."""
        return self.bytes_before - self.bytes_after


@dataclass(frozen=True)
class RecordedScore:
    """A score and what it holds for.

    Attributes:
        value: the score.
        count: samples.
        data: sha256 of the data, or None.
        onnxruntime: its version.
        machine: the processor and the system.
    """

    value: float
    count: int
    data: str | None
    onnxruntime: str
    machine: str


@dataclass
class Subject:
    """A model as it is, or as it was when the baseline was written.

    Attributes:
        measurement: its figures.
        components: figures of its parts: by name pattern, then by metric.
        source: sha256 of the model it was built from, where a record of the build tells.
        passes: what the build did, in order.
        scores: by the metric's text.
        said: what the build's passes said of a tensor or node, by its name; not kept in the baseline.
    """

    measurement: Measurement
    components: dict[str, dict[str, int | None]] = field(default_factory=dict)
    source: str | None = None
    passes: list[PassBytes] = field(default_factory=list)
    scores: dict[str, RecordedScore] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        row = self.measurement.to_dict()
        row["components"] = self.components
        row["source"] = self.source
        row["passes"] = [dataclasses.asdict(item) for item in self.passes]
        row["scores"] = {metric: dataclasses.asdict(score) for metric, score in self.scores.items()}
        return row

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Subject:
        """Undo :meth:`to_dict`; what an older baseline lacks is left empty.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: the data is something else.
        """
        source = data.get("source")
        return cls(
            Measurement.from_dict(data),
            {
                str(pattern): {str(k): None if v is None else int(v) for k, v in figures.items()}
                for pattern, figures in data.get("components", {}).items()
            },
            None if source is None else str(source),
            [
                PassBytes(str(p["name"]), str(p["text"]), int(p["bytes_before"]), int(p["bytes_after"]))
                for p in data.get("passes", [])
            ],
            {
                str(metric): RecordedScore(
                    float(s["value"]),
                    int(s["count"]),
                    None if s["data"] is None else str(s["data"]),
                    str(s["onnxruntime"]),
                    str(s["machine"]),
                )
                for metric, s in data.get("scores", {}).items()
            },
        )


@dataclass
class Baseline:
    """The baseline file.

    Attributes:
        models: by path, relative to the configuration's folder.
        headroom: share by which figures may be exceeded before a ``max_growth`` begins to count.
    """

    models: dict[str, Subject]
    headroom: float = 0.0


def look_at(path: Path, components: Iterable[tuple[str, str]]) -> Subject:
    """Measure a model file and read how it was made.

    Args:
        path: the file.
        components: name pattern and metric of every part that a budget is about.

    Raises:
        UsageError: it cannot be read.
        InvalidModelError: it is broken.
    """
    from effic.ir.cost import model_cost
    from effic.ir.onnx_format import read_onnx
    from effic.record import get_build

    model = read_onnx(path)
    found = Subject(measure_all(model, path, model_cost(model)))
    for pattern, metric in components:
        figure, _ = found.measurement.component(pattern, metric)
        found.components.setdefault(pattern, {})[metric] = figure
    build = get_build(model)
    if build is not None and build["source"]["files"]:
        found.source = build["source"]["files"][0]["sha256"]
    found.passes, found.said = _passes(model, path)
    return found


def _passes(model: Model, path: Path) -> tuple[list[PassBytes], dict[str, list[str]]]:
    """What the build did, and said of tensors and nodes by name.

    Of the record beside the file, lowering too; else of the file's own metadata, which has no remarks.
    """
    from effic.record import file_digest, read_record, record_path

    own = [PassBytes(r.text.partition("{")[0], r.text, r.bytes_before, r.bytes_after) for r in model.record]
    beside = record_path(path)
    if not beside.is_file():
        return own, {}
    try:
        record = read_record(beside)
        files = record["output"]["files"]
        if not files or files[0]["sha256"] != file_digest(path).sha256:
            return own, {}  # the record of another file
        steps = [step for step in record["measured"]["steps"] if not step.get("rolled_back")]
        passes = [
            PassBytes(str(s["name"]), str(s["text"]), int(s["bytes_before"]), int(s["bytes_after"]))
            for s in steps
        ]
        said: dict[str, list[str]] = {}
        for step in steps:
            for remark in step.get("remarks", ()):
                said.setdefault(str(remark["where"]), []).append(f"{step['name']}: {remark['text']}")
    except (UsageError, KeyError, TypeError, ValueError):
        return own, {}  # a record only explains; one that is malformed takes no verdict away
    return passes, said


def read_baseline(path: Path) -> Baseline | None:
    """The baseline file, or None when there is none.

    Raises:
        UsageError: it is malformed or of another version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        data = json.loads(text)
        version = data["effic_baseline"]
        if version == BASELINE_VERSION:
            models = {str(name): Subject.from_dict(row) for name, row in data["models"].items()}
            headroom = float(data.get("headroom", 0.0))
            if not 0 <= headroom < math.inf:
                raise ValueError(headroom)
            return Baseline(models, headroom)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UsageError(
            f"the baseline '{path}' is malformed; restore it, or run 'effic gate --update'"
        ) from None
    raise UsageError(
        f"the baseline '{path}' has format {version!r}, and this effic reads {BASELINE_VERSION}; "
        f"run 'effic gate --update'"
    )


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write atomically, one entry per line, so that a change reads well in a review."""
    models = []
    for name, subject in baseline.models.items():
        parts = []
        for key, value in subject.to_dict().items():
            if isinstance(value, dict) and value:
                rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                parts.append(f"   {json.dumps(key)}: {{\n{rows}\n   }}")
            elif isinstance(value, list) and value:
                rows = ",\n".join(f"    {json.dumps(v)}" for v in value)
                parts.append(f"   {json.dumps(key)}: [\n{rows}\n   ]")
            else:
                parts.append(f"   {json.dumps(key)}: {json.dumps(value)}")
        models.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    head = f'{{\n "effic_baseline": {BASELINE_VERSION},\n "headroom": {json.dumps(baseline.headroom)},\n'
    text = f'{head} "models": {{\n' + ",\n".join(models) + "\n }\n}\n"
    write_whole(path, text.encode())
