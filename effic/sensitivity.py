"""How much each site of a pass costs alone: which weights to leave out, or to give more bits."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effic.backends import get_backend
from effic.guard import Accuracy
from effic.ir.errors import MissingExtraError, UsageError
from effic.ir.evaluate import load_inputs
from effic.ir.model import Model
from effic.ir.whole_files import write_whole
from effic.optimize import load
from effic.partial import literal, partial
from effic.passes.base import Pass
from effic.passes.calibration import SAMPLES, Calibration
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes, to_text
from effic.trial import Trial

Progress = Callable[[str, int, int], None]

PICTURES = (".png", ".svg", ".pdf")
# Bars that can be read beside each other on one picture.
_MOST_BARS = 60


@dataclass(frozen=True)
class SiteCost:
    """What a pass costs at one site alone.

    Attributes:
        site: the weight, or what the pass calls the place.
        max_rel: largest difference of an output, relative to its largest magnitude.
        sqnr_db: signal-to-noise ratio of the outputs, the worst of them; infinite when equal.
        score: the metric, where one was asked for.
        worse: by how much it is worse than the original's.
        bytes_saved: bytes the pass saves at this site, where its report says so.
    """

    site: str
    max_rel: float
    sqnr_db: float
    score: float | None
    worse: float | None
    bytes_saved: int | None


@dataclass(frozen=True)
class Sensitivity:
    """Sites of a pass, the costliest first.

    Attributes:
        step: text form of the pass.
        number: of the pass in the sequence, from 1.
        rows: one per site.
        metric: text form of the metric, or None.
        original: the original's score, or None.
        passes: the sequence, as text.
    """

    step: str
    number: int
    rows: tuple[SiteCost, ...]
    metric: str | None
    original: float | None
    passes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    def spare(self, count: int) -> tuple[str, str | None]:
        """The sequence with the costliest sites left out, and with 8 bits for them where the pass knows widths.

        Args:
            count: how many sites.
        """
        (item,) = parse_passes(self.step)
        worst = [literal(row.site) for row in self.rows[:count]]
        skipped = dataclasses.replace(item, skip=(*getattr(item, "skip", ()), *worst))  # type: ignore[call-arg]
        finer = None
        if any(field.name == "overrides" for field in dataclasses.fields(item)) and hasattr(item, "bits"):
            wider = tuple(f"{name}=8" for name in worst)
            finer = self._with(dataclasses.replace(item, overrides=(*wider, *item.overrides)))  # type: ignore
        return self._with(skipped), finer

    def _with(self, item: Pass) -> str:
        texts = list(self.passes)
        texts[self.number - 1] = to_text(item)
        return ",".join(texts)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """The rows as a table: ``site,max_rel,sqnr_db,score,worse,bytes_saved``."""
        names = [field.name for field in dataclasses.fields(SiteCost)]
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in self.rows)
        write_whole(path, text.getvalue().encode())

    def draw(self, path: str | os.PathLike[str]) -> None:
        """A bar for each of the costliest sites, as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            UsageError: another suffix.
            MissingExtraError: matplotlib is not installed.
        """
        check_picture(path)
        from matplotlib.figure import Figure

        rows = self.rows[:_MOST_BARS][::-1]
        by_score = self.metric is not None
        figure = Figure(figsize=(9, 1.2 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        values = [(row.worse if by_score else row.max_rel) or 0.0 for row in rows]
        finite = [v if math.isfinite(v) else 0.0 for v in values]
        bars = axes.barh([row.site for row in rows], finite, color="#3b6ea5")
        axes.bar_label(bars, [f"{v:.2g}" for v in values], padding=3, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.margins(x=0.12, y=0.01)
        axes.set_xlabel(
            f"{self.metric} lost" if by_score else "largest difference of the outputs, of their range"
        )
        more = f", {len(rows)} of {len(self.rows)} sites" if len(self.rows) > len(rows) else ""
        axes.set_title(f"{self.step}: each site alone{more}", fontsize=10, loc="left")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=120, format=os.fspath(path).rpartition(".")[2])
        write_whole(path, drawn.getvalue())


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse a picture that could not be drawn, before the work is done.

    Raises:
        UsageError: its suffix is none of :data:`PICTURES`.
        MissingExtraError: matplotlib is not installed.
    """
    if not os.fspath(path).endswith(PICTURES):
        raise UsageError(f"the picture {os.fspath(path)} is none of {', '.join(PICTURES)}; name it so")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "drawing the picture") from error


def sensitivity(
    source: str | os.PathLike[str] | Model,
    passes: str | Sequence[Pass],
    *,
    number: int | None = None,
    accuracy: Accuracy | None = None,
    target: str | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    calib: Any = None,
    calib_samples: int | None = None,
    calib_window: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Apply a pass to each of its sites alone, and measure what that costs.

    Args:
        source: an ``.onnx`` file or a model, which is left as it is.
        passes: the sequence; the passes before the one looked at are applied in full.
        number: which pass, from 1; the last one with more than one site by default.
        accuracy: a metric and its data, beside the distance of the outputs.
        target: lower each model for it before it is run.
        inputs, calib, calib_samples, calib_window, seed, progress: as :func:`effic.optimize` takes them.

    Raises:
        UsageError: no pass of the sequence has sites that can be told apart.
        NotMeasuredError: the original cannot be run.
    """
    sequence = parse_passes(passes) if isinstance(passes, str) else list(passes)
    original = load(source)
    if number is not None and not 1 <= number <= len(sequence):
        raise UsageError(f"there is no pass number {number}; the sequence has {len(sequence)}")
    model = original.clone()
    backend = None if target is None else get_backend(target)
    arrays = load_inputs(inputs) if isinstance(inputs, (str, os.PathLike)) else inputs
    calibration = None
    if calib is not None:
        calibration = Calibration.load(
            calib,
            model,
            samples=SAMPLES if calib_samples is None else calib_samples,
            seed=seed,
            window=calib_window,
        )
    states = [original]
    result = run_passes(
        model,
        sequence,
        check="off",
        calibration=calibration,
        after_pass=lambda made, item, at: states.append(made.clone()),
        progress=progress,
    )
    for at in [number] if number is not None else range(len(sequence), 0, -1):
        parts = partial(sequence[at - 1], states[at - 1], states[at], calibration)
        if parts is not None and (len(parts.sites) > 1 or number is not None):
            break
    else:
        where = f"pass {number}" if number is not None else "no pass of the sequence"
        raise UsageError(f"{where} has sites that can be told apart; name a pass with an option skip")
    before = states[at - 1]
    trial = Trial(before, backend=backend, inputs=arrays, seed=seed, limits=False)
    judge = None if accuracy is None else Trial(original, accuracy=accuracy, backend=backend, limits=False)
    saved = {
        remark.where: remark.data["bytes_before"] - remark.data["bytes_after"]
        for remark in result.steps[at - 1].remarks
        if {"bytes_before", "bytes_after"} <= set(remark.data)
    }
    rows = []
    for done, site in enumerate(parts.sites):
        if progress is not None:
            progress(site, done, len(parts.sites))
        made = parts.apply({site})
        distance = trial(made).figures
        score = {} if judge is None else judge(made).figures
        rows.append(
            SiteCost(
                site,
                distance.get("max_rel", math.inf),
                distance.get("sqnr_db", -math.inf),
                score.get("score"),
                score.get("worse"),
                saved.get(site),
            )
        )
    # A metric moves in steps; the distance of the outputs tells ties apart.
    rows.sort(key=lambda row: (-(row.worse or 0.0), -row.max_rel))
    return Sensitivity(
        to_text(sequence[at - 1]),
        at,
        tuple(rows),
        None if accuracy is None else accuracy.metric,
        None if judge is None or judge.guard is None else judge.guard.before.value,
        tuple(to_text(item) for item in sequence),
    )
