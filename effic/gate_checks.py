"""Budgets that take a run of the model: its score, its agreement with a reference, its speed beside one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from effic.bench import bench, machine
from effic.compare import Bounds, compare
from effic.gate_baseline import RecordedScore, Subject
from effic.gate_config import AccuracyCheck, AgreementCheck, Check, LatencyCheck, Place
from effic.gate_verdicts import Status, Unit, Verdict
from effic.guard import Guard, show_score
from effic.ir.errors import EfficError, MissingExtraError, NotMeasuredError
from effic.ir.evaluate import load_inputs, run_session, start_session
from effic.ir.onnx_format import read_onnx
from effic.metrics import Score, get_metric, paired_stderr, score

Progress = Callable[[str, int, int], None]

TOO_NOISY = 0.25
"""Half the interquartile range of a ratio, as a share of the ratio, beyond which it tells nothing."""

_AGREEMENT: dict[str, tuple[str, Unit]] = {
    # bound: (attribute of a distance, unit)
    "max_abs": ("max_abs", "difference"),
    "rtol": ("max_rel", "difference"),
    "min_sqnr": ("sqnr_db", "dB"),
    "min_cosine": ("cosine", "score"),
    "min_top1": ("top1", "score"),
}


@dataclass(frozen=True)
class Scored:
    """A model's score, and the reference's where one was named."""

    after: Score
    before: Score | None

    @property
    def recorded(self) -> RecordedScore:
        """The score as the baseline keeps it."""
        return RecordedScore(
            self.after.value, self.after.count, self.after.data, version("onnxruntime"), machine_kind()
        )


def machine_kind() -> str:
    """The processor and the system, as far as they decide the last digits of a score."""
    found = machine()
    return f"{found['processor']}, {found['system']}"


def run_accuracy(check: AccuracyCheck, path: Path, progress: Progress | None = None) -> Scored:
    """Score a model, and the reference model if there is one.

    Raises:
        EfficError: the model, the reference or the data cannot be used, or a model does not run.
    """
    runs = _runner(path)
    if check.reference is not None:
        reference = read_onnx(check.reference)
        guard = Guard.scored(check.wanted, reference, _runner(Path(check.reference)), progress=progress)
        return Scored(guard.score(runs), guard.before)
    data = check.wanted.load(read_onnx(path))
    return Scored(score(get_metric(check.wanted.metric), runs, data, progress=progress), None)


def _runner(path: Path) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Runs a file as its users do."""
    session = start_session(str(path), optimized=True)
    return lambda inputs: run_session(session, inputs)


def judge_accuracy(
    check: AccuracyCheck,
    name: str,
    found: Scored | EfficError,
    before: Subject | None,
    baseline: Path,
    allow_unlike: bool,
) -> list[Verdict]:
    """Hold a score to its limits.

    Args:
        check: the limits.
        name: the model.
        found: its score, or why there is none.
        before: the model in the baseline.
        baseline: path of the baseline file.
        allow_unlike: compare with a score of other data, runtime or machine all the same.
    """
    metric, wanted = get_metric(check.wanted.metric), check.wanted
    title = f"accuracy {metric.text}"
    if isinstance(found, EfficError):
        return [failed(name, title, limit, place, found) for limit, place in check.limits.items()]
    verdicts = []
    recorded = None if before is None else before.scores.get(metric.text)
    for limit, place in check.limits.items():
        if limit in ("min", "max") and wanted.bound is not None:
            worse = metric.worse(found.after.value, wanted.bound)
            verdicts.append(
                Verdict(
                    name,
                    title,
                    limit,
                    place.key,
                    "broken" if worse else "ok",
                    place.line,
                    "score",
                    found.after.value,
                    wanted.bound,
                    None if recorded is None else recorded.value,
                    found.after.stderr,
                    f"on {found.after.count} samples",
                )
            )
        if limit == "max_drop" and wanted.max_drop is not None:
            verdicts.append(_drop(check, place, name, found, recorded, baseline, allow_unlike))
    return verdicts


def _drop(
    check: AccuracyCheck,
    place: Place,
    name: str,
    found: Scored,
    recorded: RecordedScore | None,
    baseline: Path,
    allow_unlike: bool,
) -> Verdict:
    metric = get_metric(check.wanted.metric)
    title, unit = f"accuracy {metric.text}", metric.unit
    noise = None
    if found.before is not None:
        first, where = found.before.value, f"of {Path(check.reference or '').name}"
        noise = paired_stderr(found.before, found.after)
        if noise is not None:
            noise *= 100 / (1 if unit == "points" else abs(first))
    elif recorded is None:
        return unmeasured(
            name,
            title,
            "max_drop",
            place,
            f"the baseline '{baseline}' has no {metric.text} of this model; run 'effic gate --update' and commit "
            "the file, or name a reference",
        )
    else:
        first, where = recorded.value, "in the baseline"
        reason = _unlike(recorded, found)
        if reason and not allow_unlike:
            return unmeasured(
                name,
                title,
                "max_drop",
                place,
                f"the baseline's {metric.text} was taken {reason}; run 'effic gate --update', or compare all the "
                "same with --allow-unlike",
            )
    drop = metric.drop(first, found.after.value)
    kept = drop <= (check.wanted.max_drop or 0)  # NaN is not
    return Verdict(
        name,
        title,
        "max_drop",
        place.key,
        "ok" if kept else "broken",
        place.line,
        "%" if unit == "%" else "points",
        drop,
        check.wanted.max_drop,
        None,
        noise,
        f"{show_score(found.after, name=False)} now, {first:.4f} {where}, on {found.after.count} samples",
    )


def _unlike(recorded: RecordedScore, found: Scored) -> str:
    now = found.recorded
    if recorded.data != now.data:
        return "on other data"
    if recorded.onnxruntime != now.onnxruntime:
        return f"with onnxruntime {recorded.onnxruntime}, and this is {now.onnxruntime}"
    if recorded.machine != now.machine:
        return f"on another machine ({recorded.machine}; this is {now.machine})"
    return ""


# -- agreement -----------------------------------------------------------------------------------


def judge_agreement(check: AgreementCheck, path: Path, name: str) -> list[Verdict]:
    """Hold a model's outputs to a reference model's."""
    try:
        found = compare(check.reference, path, inputs=check.inputs, count=check.count)
    except EfficError as error:
        return [failed(name, "agreement", limit, place, error) for limit, place in check.limits.items()]
    verdicts = []
    for limit, place in check.limits.items():
        attribute, unit = _AGREEMENT[limit]
        figures = [f for d in found.outputs.values() if (f := getattr(d, attribute)) is not None]
        wanted = getattr(check.bounds, limit)
        broken = [
            phrase
            for output, distance in found.outputs.items()
            for phrase in Bounds(**{limit: wanted}).broken_by(output, distance)
        ]
        if not figures and not broken:
            verdicts.append(
                unmeasured(
                    name, "agreement", limit, place, "no output has rows whose largest entries could agree"
                )
            )
            continue
        worst = (min if limit.startswith("min") else max)(figures) if figures else None
        why = "; ".join(broken) or f"with {Path(check.reference).name} on {found.inputs}"
        verdicts.append(
            Verdict(
                name,
                "agreement",
                limit,
                place.key,
                "broken" if broken else "ok",
                place.line,
                unit,
                worst,
                wanted,
                why=why,
            )
        )
    return verdicts


# -- latency -------------------------------------------------------------------------------------


def judge_latency(
    check: LatencyCheck, path: Path, name: str, progress: Callable[[int, int], None] | None = None
) -> list[Verdict]:
    """Time a model in turns with its reference, or alone, which is only told."""
    place = check.limits.get("max_ratio", check.place)
    bound = "max_ratio" if check.max_ratio is not None else "time"
    try:
        inputs = None if check.inputs is None else load_inputs(check.inputs)
        first, second = (path, None) if check.reference is None else (check.reference, path)
        found = bench(first, second, inputs, threads=check.threads, repeats=check.repeats, progress=progress)
    except EfficError as error:
        return [failed(name, "latency", bound, place, error)]
    threads = f"{check.threads} thread{'' if check.threads == 1 else 's'}"
    if found.b is None or not found.speedup or not found.speedup_low or not found.speedup_high:
        why = (
            f"quartiles {found.a.low_ms:.3g} to {found.a.high_ms:.3g} ms, {threads}; alone it breaks nothing"
        )
        return [
            Verdict(
                name,
                "latency",
                bound,
                place.key,
                "info",
                place.line,
                "ms",
                found.a.median_ms,
                noise=(found.a.high_ms - found.a.low_ms) / 2,
                why=why,
            )
        ]
    ratio, noise = 1 / found.speedup, (1 / found.speedup_low - 1 / found.speedup_high) / 2
    why = (
        f"{found.b.median_ms:.3g} ms beside {found.a.median_ms:.3g} ms of {Path(check.reference or '').name}, "
        f"± {noise:.3f}, {check.repeats} turns, {threads}"
    )
    status: Status = "info"
    limit = None
    if check.max_ratio is not None:
        limit = check.max_ratio + max(check.floor, noise)
        # Where the quarter of the turns that flatters the model most is beyond the limit, noise excuses nothing.
        if noise > TOO_NOISY * ratio and 1 / found.speedup_high <= limit:
            return [
                unmeasured(
                    name,
                    "latency",
                    bound,
                    place,
                    f"the ratio {ratio:.2f} is too noisy (± {noise:.2f}); run it on a quieter machine or with "
                    "more repeats",
                )
            ]
        status = "ok" if ratio <= limit else "broken"
        why += f"; {check.max_ratio:g} and {limit - check.max_ratio:.3f} for the noise are allowed"
    return [
        Verdict(
            name, "latency", bound, place.key, status, place.line, "ratio", ratio, limit, noise=noise, why=why
        )
    ]


# -- what could not be judged ----------------------------------------------------------------------


def failed(name: str, metric: str, bound: str, place: Place, error: EfficError) -> Verdict:
    """A verdict for what an error kept from being measured; bad input is told from a missing measurement."""
    status: Status = "unmeasured" if isinstance(error, (NotMeasuredError, MissingExtraError)) else "error"
    return Verdict(name, metric, bound, place.key, status, place.line, why=str(error))


def unmeasured(name: str, metric: str, bound: str, place: Place, why: str) -> Verdict:
    """A verdict for what was not measured."""
    return Verdict(name, metric, bound, place.key, "unmeasured", place.line, why=why)


def failed_check(check: Check, name: str, error: EfficError) -> list[Verdict]:
    """The verdicts of a check on a model that cannot be used."""
    titles = {AccuracyCheck: "accuracy", AgreementCheck: "agreement", LatencyCheck: "latency"}
    title = titles[type(check)]
    if isinstance(check, AccuracyCheck):
        title = f"accuracy {get_metric(check.wanted.metric).text}"
    limits = dict(check.limits) or {"time": check.place}
    return [failed(name, title, limit, place, error) for limit, place in limits.items()]
