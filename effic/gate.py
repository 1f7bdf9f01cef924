"""Budgets on model files: measure, compare with the baseline, judge, and tell the cause.

The budgets are read by :mod:`effic.gate_config`. What has to be run (scores, agreement, speed) is in
:mod:`effic.gate_checks`. What cannot be measured (a model or a baseline entry that is not there, a figure
nobody can compute) is reported as such and never passes; a model file that cannot be read is an error of
its own budgets and stops no other.
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from effic.gate_baseline import Baseline, PassBytes, Subject, look_at, read_baseline, write_baseline
from effic.gate_checks import (
    Scored,
    failed,
    failed_check,
    judge_accuracy,
    judge_agreement,
    judge_latency,
    run_accuracy,
    unmeasured,
)
from effic.gate_config import AccuracyCheck, AgreementCheck, Budget, Check, GateConfig
from effic.gate_verdicts import GateReport, Mover, PassMover, Unit, Verdict
from effic.ir.errors import EfficError, NotMeasuredError, UsageError
from effic.measure import METRICS, Contributor
from effic.op_coverage import Operator, covers

Progress = Callable[[str, int, int], None]


def gate(
    config: GateConfig,
    *,
    update: bool = False,
    headroom: float = 0.0,
    allow_unlike: bool = False,
    top: int = 5,
    progress: Progress | None = None,
) -> GateReport:
    """Measure every configured model and hold it against its budgets.

    Args:
        config: the budgets, from :func:`effic.gate_config.read_config`.
        update: rewrite the baseline with what is measured now, then check against it.
        headroom: with ``update``, the share by which the baseline's figures may be exceeded before a
            ``max_growth`` begins to count; kept in the baseline file.
        allow_unlike: compare with a baseline of another source model, or a score of other data, runtime or
            machine, all the same.
        top: how many movers a broken budget names.
        progress: called with what is done, and how far.

    Raises:
        UsageError: the baseline file is malformed, or ``headroom`` is given without ``update``.
        NotMeasuredError: ``update``, and a configured model is not there.
        EfficError: ``update``, and a model cannot be measured.
    """
    if headroom and not update:
        raise UsageError("headroom is written with the baseline; give it together with --update")
    if headroom < 0:
        raise UsageError(f"the headroom is {headroom:g}; it must be at least 0")
    run = _Run(config, allow_unlike or config.allow_unlike, top, progress)
    run.measure()
    report = GateReport(config.path, config.baseline)
    if update:
        report.updated = run.update(headroom)
    baseline = read_baseline(config.baseline)
    report.headroom = 0.0 if baseline is None else baseline.headroom
    report.verdicts = run.judge(baseline)
    if run.allow_unlike and (other := run.other_sources(baseline)):
        report.notes.append(
            f"compared with a baseline of another source model, as allowed: {', '.join(other)}"
        )
    return report


@dataclass
class _Run:
    """One run: what was measured, and the judging of it."""

    config: GateConfig
    allow_unlike: bool
    top: int
    progress: Progress | None

    def measure(self) -> None:
        """Look at every model; what cannot be read is kept with its reason."""
        folder = self.config.path.parent
        self.files = {pattern: _files(folder, pattern) for pattern in self.config.patterns}
        self.found: dict[str, Subject | EfficError] = {}
        self.scores: dict[tuple[str, str], Scored | EfficError] = {}
        names = sorted({name for names in self.files.values() for name in names})
        parts = [(b.component, b.metric) for b in self.config.budgets if b.component is not None]
        for number, name in enumerate(names):
            self._tell(f"measuring {name}", number, len(names))
            try:
                self.found[name] = look_at(folder / name, dict.fromkeys(parts))
            except EfficError as error:
                self.found[name] = error
            except OSError as error:
                self.found[name] = UsageError(f"cannot read {folder / name}: {error.strerror or error}")

    def update(self, headroom: float) -> list[str]:
        """Rewrite the baseline, all of it or nothing; the models it holds."""
        for pattern, names in self.files.items():
            if not names:
                raise NotMeasuredError(
                    f"the baseline was not rewritten: no file matches '{pattern}' of {self.config.path}; "
                    f"build the model first or edit the path"
                )
        subjects: dict[str, Subject] = {}
        for name, found in self.found.items():
            if isinstance(found, EfficError):
                raise found
            subjects[name] = found
        for check in self.config.checks:
            if isinstance(check, AccuracyCheck):
                for name in self.files[check.pattern]:
                    scored = self._score(check, name)
                    if isinstance(scored, EfficError):
                        raise scored
                    subjects[name].scores[scored.after.metric] = scored.recorded
        write_baseline(self.config.baseline, Baseline(subjects, headroom))
        return sorted(subjects)

    def judge(self, baseline: Baseline | None) -> list[Verdict]:
        """Every budget and check on every model that its pattern names."""
        verdicts: list[Verdict] = []
        for item in (*self.config.budgets, *self.config.checks):
            names = self.files[item.pattern]
            if not names:
                why = f"no file matches '{item.pattern}'; build the model first or edit the path"
                missing = NotMeasuredError(why)
                verdicts += self._failed(item, item.pattern, missing)
            for name in names:
                found = self.found[name]
                if isinstance(found, EfficError):
                    verdicts += self._failed(item, name, found)
                elif isinstance(item, Budget):
                    verdicts.append(self._budget(item, name, found, baseline))
                else:
                    verdicts += self._check(
                        item, name, None if baseline is None else baseline.models.get(name)
                    )
        return verdicts

    def other_sources(self, baseline: Baseline | None) -> list[str]:
        """Models whose baseline was built from another model."""
        before = {} if baseline is None else baseline.models
        return [
            name
            for name, found in self.found.items()
            if isinstance(found, Subject) and _other_source(before.get(name), found)
        ]

    def _tell(self, text: str, number: int, total: int) -> None:
        if self.progress is not None:
            self.progress(text, number, total)

    def _failed(self, item: Budget | Check, name: str, error: EfficError) -> list[Verdict]:
        if isinstance(item, Budget):
            return [failed(name, _title(item), item.bound, item.place, error)]
        return failed_check(item, name, error)

    # -- budgets ---------------------------------------------------------------------------------

    def _budget(self, budget: Budget, name: str, now: Subject, baseline: Baseline | None) -> Verdict:
        before = None if baseline is None else baseline.models.get(name)
        try:
            value, why = _figure(budget, now)
        except EfficError as error:
            return failed(name, _title(budget), budget.bound, budget.place, error)
        if value is None:
            return unmeasured(name, _title(budget), budget.bound, budget.place, why)
        unit: Unit = "bytes" if budget.metric in METRICS and METRICS[budget.metric].is_bytes else "count"
        base = None if before is None else _figure(budget, before, stored=True)[0]
        limit = budget.limit
        if budget.bound == "max_growth":
            why = self._why_not_growth(budget, now, before, base, baseline)
            if why or base is None or baseline is None:
                return _with_value(
                    unmeasured(name, _title(budget), budget.bound, budget.place, why), value, unit
                )
            start = base * (1 + baseline.headroom)
            limit = start * (1 + budget.limit) if budget.relative else start + budget.limit
        # Floating point may put 105% of a round number a hair under it; figures are whole, and so is the limit.
        limit = float(math.floor(round(limit, 6)))
        shown = base if budget.bound == "max_growth" else None
        common = (budget.place.line, unit, value, limit, shown)
        if value <= limit:
            return Verdict(name, _title(budget), budget.bound, budget.key, "ok", *common)
        movers, grown, shrunk = _movers(budget, now, before)
        return Verdict(
            name,
            _title(budget),
            budget.bound,
            budget.key,
            "broken",
            *common,
            movers=tuple(dataclasses.replace(m, said=_said(m, now.said)) for m in movers[: self.top]),
            grown=grown,
            others=sum(mover.grew for mover in movers[self.top :]),
            shrunk=shrunk,
            passes=() if before is None else tuple(_pass_movers(before.passes, now.passes)),
        )

    def _why_not_growth(
        self,
        budget: Budget,
        now: Subject,
        before: Subject | None,
        base: int | None,
        baseline: Baseline | None,
    ) -> str:
        where = self.config.baseline
        if base is None:
            missing = (
                f"there is no baseline '{where}'"
                if baseline is None
                else f"the baseline '{where}' has no {_title(budget)} of this model"
            )
            return f"{missing}; run 'effic gate --update' and commit the file"
        if not self.allow_unlike and _other_source(before, now):
            then = before.source if before is not None else ""
            return (
                f"the baseline is of a build from another source model ({(then or '')[:8]}, now "
                f"{(now.source or '')[:8]}); run 'effic gate --update', or compare all the same with --allow-unlike"
            )
        return ""

    # -- what has to be run ------------------------------------------------------------------------

    def _check(self, check: Check, name: str, before: Subject | None) -> list[Verdict]:
        path = self.config.path.parent / name
        if isinstance(check, AccuracyCheck):
            scored = self._score(check, name)
            return judge_accuracy(check, name, scored, before, self.config.baseline, self.allow_unlike)
        if isinstance(check, AgreementCheck):
            self._tell(f"comparing {name}", 0, 1)
            return judge_agreement(check, path, name)
        return judge_latency(check, path, name, lambda done, total: self._tell(f"timing {name}", done, total))

    def _score(self, check: AccuracyCheck, name: str) -> Scored | EfficError:
        key = check.place.key, name
        if key not in self.scores:
            path = self.config.path.parent / name
            try:
                self.scores[key] = run_accuracy(
                    check, path, lambda text, done, total: self._tell(f"{text} of {name}", done, total)
                )
            except EfficError as error:
                self.scores[key] = error
        return self.scores[key]


def _files(folder: Path, pattern: str) -> list[str]:
    if (folder / pattern).is_file():
        return [pattern]
    found = glob.glob(pattern, root_dir=folder, recursive=True)
    return sorted(Path(name).as_posix() for name in found if (folder / name).is_file())


def _title(budget: Budget) -> str:
    return budget.metric if budget.component is None else f"{budget.metric} of {budget.component}"


def _with_value(verdict: Verdict, value: int, unit: Unit) -> Verdict:
    return dataclasses.replace(verdict, value=value, unit=unit)


def _other_source(before: Subject | None, now: Subject) -> bool:
    """Whether both tell what they were built from, and it is not the same."""
    return before is not None and None not in (before.source, now.source) and before.source != now.source


# -- figures and what they are made of ----------------------------------------------------------------


def _figure(budget: Budget, subject: Subject, *, stored: bool = False) -> tuple[int | None, str]:
    """The figure a budget is about, or None and why; ``stored``: of the baseline."""
    found = subject.measurement
    if budget.component is not None:
        figure = subject.components.get(budget.component, {}).get(budget.metric)
        if figure is None and not stored and found.component(budget.component, budget.metric)[1]:
            return None, f"{budget.metric} cannot be computed: {found.why_not(budget.metric)}"
        return figure, f"no tensor or node is called '{budget.component}'; correct the name pattern"
    if budget.metric.startswith("ops."):
        return found.ops.get(budget.metric.removeprefix("ops."), 0), ""
    if budget.metric == "ops_allowed":
        return (None, "") if stored else (len(found.outside(_allowed(budget))), "")
    figure = found.metric(budget.metric)
    return figure, f"{METRICS[budget.metric].title} cannot be computed: {found.why_not(budget.metric)}"


def _allowed(budget: Budget) -> Callable[[Operator], bool]:
    allowed = budget.allowed
    if isinstance(allowed, str):
        return lambda operator: covers(allowed, operator)
    return lambda operator: operator.label in allowed


def _rows(
    budget: Budget, now: Subject, before: Subject | None
) -> tuple[Contributor, dict[str, int], dict[str, int]]:
    """What a budget's figure is made of: the kind of contributor, and the figures now and then."""
    found, was = now.measurement, None if before is None else before.measurement
    if budget.component is not None:
        pattern = budget.component
        _, after = found.component(pattern, budget.metric)
        kind, then = ("tensor", {}) if was is None else was.contributions(budget.metric)
        # The baseline keeps names of tensors and nodes, without who reads whom.
        then = {k: v for k, v in then.items() if k in after or fnmatchcase(_bare(k), pattern)}
        return ("tensor" if budget.metric == "weight_bytes" else "node"), after, then
    if budget.metric.startswith("ops."):
        label = budget.metric.removeprefix("ops.")
        return "node", found.outside(lambda operator: operator.label != label), {}
    if budget.metric == "ops_allowed":
        return "node", found.outside(_allowed(budget)), {}
    kind, after = found.contributions(budget.metric)
    return kind, after, {} if was is None else was.contributions(budget.metric)[1]


def _bare(label: str) -> str:
    """The name in ``Conv 'name'``."""
    return label.partition(" '")[2].removesuffix("'") or label


def _movers(budget: Budget, now: Subject, before: Subject | None) -> tuple[list[Mover], bool, int]:
    """What grew, most first, True, and how much shrank; without growth what is largest, and False."""
    kind, after, was = _rows(budget, now, before)
    readers = now.measurement.readers
    movers = [
        Mover(kind, name, was.get(name), figure, readers.get(name))
        for name, figure in after.items()
        if figure > was.get(name, 0)
    ]
    grown = bool(was) and bool(movers)
    if not grown:
        movers = [Mover(kind, name, None, figure, readers.get(name)) for name, figure in after.items()]
        return sorted(movers, key=lambda mover: -mover.after), False, 0
    shrunk = sum(max(0, figure - after.get(name, 0)) for name, figure in was.items())
    # Equal ones stay in order, which is that of their size.
    return sorted(movers, key=lambda mover: -mover.grew), True, shrunk


def _said(mover: Mover, said: Mapping[str, list[str]]) -> tuple[str, ...]:
    """What passes said of a tensor, of the weight whose part it is, or of the node that reads it."""
    parts = mover.name.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    known = (said[name] for name in (*names, _bare(mover.reader or mover.name)) if name in said)
    return tuple(dict.fromkeys(next(known, ())))


def _pass_movers(before: list[PassBytes], now: list[PassBytes]) -> list[PassMover]:
    """Passes that ran in one of two builds only, with other options, or that saved another amount."""
    then, today = _numbered(before), _numbered(now)
    movers = [
        PassMover(
            name,
            None if (a := then.get((name, number))) is None else a.text,
            None if (b := today.get((name, number))) is None else b.text,
            0 if a is None else a.saved,
            0 if b is None else b.saved,
        )
        for name, number in dict.fromkeys((*then, *today))
    ]
    changed = [m for m in movers if m.before != m.after or m.saved_before != m.saved]
    return sorted(changed, key=lambda m: -abs(m.saved_before - m.saved))


def _numbered(passes: list[PassBytes]) -> Mapping[tuple[str, int], PassBytes]:
    """Passes by name and how often it ran before."""
    found: dict[tuple[str, int], PassBytes] = {}
    for item in passes:
        number = 0
        while (item.name, number) in found:
            number += 1
        found[item.name, number] = item
    return found
