"""Budgets on model files: read them from a project's configuration, measure, compare, explain.

The configuration lies in ``effic.toml``, or in ``pyproject.toml`` under ``[tool.effic.gate]``::

    [gate]
    baseline = "effic-baseline.json"

    [gate.models."models/*.onnx"]
    file_bytes = { max = "2 MB", max_growth = "5%" }
    nodes = { max_growth = 0 }

``max`` is absolute. ``max_growth`` is relative to the baseline file, which is committed and rewritten
by ``effic gate --update``: a share (``"5%"``) or an amount (``0``, ``"10 kB"``). What cannot be
measured (a model or a baseline entry that is not there, a figure nobody can compute) is reported as
such and never passes.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from effic.ir.errors import NotMeasuredError, UsageError
from effic.measure import METRICS, Measurement, measure
from effic.passes import near

CONFIG_NAMES = ("effic.toml", "pyproject.toml")
BOUNDS = ("max", "max_growth")
BASELINE_NAME = "effic-baseline.json"
BASELINE_VERSION = 1

EXAMPLE = '[gate.models."model.onnx"] with file_bytes = { max = "2 MB", max_growth = "5%" }'

Status = Literal["ok", "broken", "unmeasured"]


@dataclass(frozen=True)
class Budget:
    """One bound of the configuration.

    Attributes:
        pattern: the model file or glob, as written.
        metric: one of :data:`effic.measure.METRICS`.
        bound: ``"max"`` or ``"max_growth"``.
        limit: the number: bytes or a count; a share (0.05) when ``relative``.
        relative: whether ``limit`` is a share of the baseline.
        key: where to edit it: ``gate.models."a.onnx".nodes.max``.
    """

    pattern: str
    metric: str
    bound: str
    limit: float
    relative: bool
    key: str


@dataclass(frozen=True)
class GateConfig:
    """A project's budgets.

    Attributes:
        path: the file they were read from; model and baseline paths are relative to its folder.
        baseline: path of the baseline file.
        budgets: in the order of the file.
    """

    path: Path
    baseline: Path
    budgets: tuple[Budget, ...]


@dataclass(frozen=True)
class Mover:
    """A tensor, node or operator and what it contributes, in the baseline (None: was not there) and now."""

    kind: Literal["tensor", "node", "operator"]
    name: str
    before: int | None
    after: int

    @property
    def grew(self) -> int:
        return self.after - (self.before or 0)


@dataclass(frozen=True)
class Verdict:
    """One budget held against one model.

    Attributes:
        model: path as in the baseline (relative to the configuration's folder).
        metric: what was measured.
        bound: which bound.
        key: the configuration key to edit.
        status: ``"ok"``, ``"broken"`` or ``"unmeasured"``.
        value: the measured figure, or None.
        limit: the largest figure allowed, or None when it depends on a missing baseline.
        baseline: the baseline's figure, for ``max_growth``.
        why: for ``"unmeasured"``, the reason and what to do.
        movers: for ``"broken"``, what grew most, or (``grown`` False) what is largest.
        grown: whether the movers are what grew since the baseline.
        others: how much the movers not listed contribute together.
        shrunk: how much went away elsewhere since the baseline.
    """

    model: str
    metric: str
    bound: str
    key: str
    status: Status
    value: int | None = None
    limit: float | None = None
    baseline: int | None = None
    why: str = ""
    movers: tuple[Mover, ...] = ()
    grown: bool = False
    others: int = 0
    shrunk: int = 0

    @property
    def over(self) -> float | None:
        """By how much the limit is exceeded (negative: the room left)."""
        return None if self.value is None or self.limit is None else self.value - self.limit


@dataclass
class GateReport:
    """All verdicts of one run, and whether the baseline was rewritten."""

    config: Path
    baseline: Path
    verdicts: list[Verdict] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 when a budget is broken, else 3 when something was not measured, else 0."""
        found = {verdict.status for verdict in self.verdicts}
        return 1 if "broken" in found else 3 if "unmeasured" in found else 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "config": str(self.config),
            "baseline": str(self.baseline),
            "exit_code": self.exit_code,
            "updated": self.updated,
            "verdicts": [{**dataclasses.asdict(v), "over": v.over} for v in self.verdicts],
        }


# -- configuration -------------------------------------------------------------------------------


def find_config(start: Path) -> Path:
    """The nearest ``effic.toml`` with ``[gate]`` or ``pyproject.toml`` with ``[tool.effic.gate]``.

    Args:
        start: folder to begin in; its parents follow.

    Raises:
        UsageError: there is none.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        for name in CONFIG_NAMES:
            path = folder / name
            if path.is_file() and _section(path, _read_toml(path)) is not None:
                return path
    raise UsageError(
        f"no effic.toml with [gate] and no pyproject.toml with [tool.effic.gate] in '{start}' or above; "
        f"write effic.toml, for example {EXAMPLE}"
    )


def read_config(path: Path) -> GateConfig:
    """Read the budgets of an ``effic.toml`` or ``pyproject.toml``.

    Raises:
        UsageError: no such file, not TOML, no gate section, an unknown key (with the near miss) or
            a limit that is no amount.
    """
    data = _read_toml(path)
    section = _section(path, data)
    prefix = "tool.effic.gate" if path.name == "pyproject.toml" else "gate"
    if section is None:
        hint = next((f", but '{key}': did you mean 'gate'?" for key in data if near(key, ["gate"])), "")
        raise UsageError(f"'{path}' has no [{prefix}] section{hint}; write for example {EXAMPLE}")
    _known(section, ("baseline", "models"), path, prefix)
    baseline = section.get("baseline", BASELINE_NAME)
    if not isinstance(baseline, str):
        raise UsageError(f"{path}: {prefix}.baseline must be the path of a file, not {baseline!r}")
    models = section.get("models", {})
    if not isinstance(models, dict) or not models:
        raise UsageError(f"{path}: [{prefix}] names no models; write for example {EXAMPLE}")
    budgets = tuple(
        budget
        for pattern, metrics in models.items()
        for budget in _budgets(path, f'{prefix}.models."{pattern}"', pattern, metrics)
    )
    return GateConfig(path, path.parent / baseline, budgets)


def _budgets(path: Path, key: str, pattern: str, metrics: Any) -> Iterable[Budget]:
    if not isinstance(metrics, dict) or not metrics:
        raise UsageError(f"{path}: {key} sets no budget; the metrics are {', '.join(METRICS)}")
    _known(metrics, METRICS, path, key)
    for metric, bounds in metrics.items():
        if not isinstance(bounds, dict) or not bounds:
            raise UsageError(
                f"{path}: {key}.{metric} must be a table such as {{ max = 1000 }} or "
                f'{{ max_growth = "5%" }}, not {bounds!r}'
            )
        _known(bounds, BOUNDS, path, f"{key}.{metric}")
        for bound, text in bounds.items():
            limit, relative = _limit(text, METRICS[metric].is_bytes, f"{path}: {key}.{metric}.{bound}")
            if relative and bound == "max":
                raise UsageError(
                    f"{path}: {key}.{metric}.max is a share; use max_growth = {text!r}, or an amount"
                )
            yield Budget(pattern, metric, bound, limit, relative, f"{key}.{metric}.{bound}")


_AMOUNT = re.compile(r"\+?([0-9][0-9_]*(?:\.[0-9]+)?)\s*(%|[A-Za-z]*)")
_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _limit(text: Any, is_bytes: bool, where: str) -> tuple[float, bool]:
    """``(number, is a share)`` of ``1000``, ``"2 MB"``, ``"1.5 MiB"``, ``"3 G"`` or ``"5%"``."""
    if isinstance(text, (int, float)) and not isinstance(text, bool) and text >= 0:
        return float(text), False
    units = _BYTE_UNITS if is_bytes else _COUNT_UNITS
    match = _AMOUNT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is not None:
        number, unit = float(match[1].replace("_", "")), match[2].lower()
        if unit == "%":
            return number / 100, True
        if unit in units:
            return number * units[unit], False
    example = '"200 kB", "1.5 MiB"' if is_bytes else '1000, "2.5 M"'
    raise UsageError(
        f'{where} is {text!r}, which is no amount; write for example {example} or "5%" for a share'
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no configuration file '{path}'; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not valid TOML: {error}; correct it there") from None


def _section(path: Path, data: dict[str, Any]) -> dict[str, Any] | None:
    keys = ("tool", "effic", "gate") if path.name == "pyproject.toml" else ("gate",)
    found: Any = data
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if found is not None and not isinstance(found, dict):
        raise UsageError(f"{path}: {'.'.join(keys)} must be a table; write for example {EXAMPLE}")
    return found


def _known(table: Mapping[str, Any], known: Iterable[str], path: Path, key: str) -> None:
    for name in table:
        if name not in known:
            raise UsageError(
                f"{path}: {key} has the unknown key '{name}'{near(name, list(known))} "
                f"(known keys: {', '.join(known)})"
            )


# -- the check -----------------------------------------------------------------------------------


def gate(config: GateConfig, *, update: bool = False, top: int = 5) -> GateReport:
    """Measure every configured model and hold it against its budgets.

    Args:
        config: the budgets, from :func:`read_config`.
        update: rewrite the baseline with what is measured now, then check against it.
        top: how many movers a broken budget names.

    Raises:
        UsageError: the baseline file is malformed.
        InvalidModelError: a model file is.
        NotMeasuredError: ``update``, and a configured model is not there.
    """
    folder = config.path.parent
    report = GateReport(config.path, config.baseline)
    files = {b.pattern: _files(folder, b.pattern) for b in config.budgets}
    now = {name: measure(folder / name) for name in sorted({n for names in files.values() for n in names})}
    if update:
        for pattern, names in files.items():
            if not names:
                raise NotMeasuredError(
                    f"the baseline was not rewritten: no file matches '{pattern}' of {config.path}; "
                    f"build the model first or edit the path"
                )
        report.updated = sorted(now)
        _write_baseline(config.baseline, now)
    baseline = _read_baseline(config.baseline)
    for budget in config.budgets:
        names = files[budget.pattern]
        if not names:
            why = f"no file matches '{budget.pattern}'; build the model first or edit the path"
            report.verdicts.append(_unmeasured(budget, budget.pattern, why))
        for name in names:
            before = None if baseline is None else baseline.get(name)
            report.verdicts.append(_judge(budget, name, now[name], before, config.baseline, baseline, top))
    return report


def _files(folder: Path, pattern: str) -> list[str]:
    if (folder / pattern).is_file():
        return [pattern]
    found = glob.glob(pattern, root_dir=folder, recursive=True)
    return sorted(Path(name).as_posix() for name in found if (folder / name).is_file())


def _judge(
    budget: Budget,
    name: str,
    now: Measurement,
    before: Measurement | None,
    baseline_path: Path,
    baseline: Mapping[str, Measurement] | None,
    top: int,
) -> Verdict:
    value = now.metric(budget.metric)
    if value is None:
        why = f"{METRICS[budget.metric].title} cannot be computed: {now.why_not(budget.metric)}"
        return _unmeasured(budget, name, why)
    limit, base = budget.limit, None
    if budget.bound == "max_growth":
        base = None if before is None else before.metric(budget.metric)
        if base is None:
            missing = (
                f"there is no baseline '{baseline_path}'"
                if baseline is None
                else f"the baseline '{baseline_path}' has no {budget.metric} of this model"
            )
            return dataclasses.replace(
                _unmeasured(budget, name, f"{missing}; run 'effic gate --update' and commit the file"),
                value=value,
            )
        limit = base * (1 + budget.limit) if budget.relative else base + budget.limit
    # Floating point may put 105% of a round number a hair under it; counts are whole, so round.
    limit = float(round(limit, 6))
    if value <= limit:
        return Verdict(name, budget.metric, budget.bound, budget.key, "ok", value, limit, base)
    movers, grown = _movers(budget.metric, now, before)
    return Verdict(
        name,
        budget.metric,
        budget.bound,
        budget.key,
        "broken",
        value,
        limit,
        base,
        movers=tuple(movers[:top]),
        grown=grown,
        others=sum(mover.grew for mover in movers[top:]),
        shrunk=_shrunk(budget.metric, now, before),
    )


def _unmeasured(budget: Budget, name: str, why: str) -> Verdict:
    return Verdict(name, budget.metric, budget.bound, budget.key, "unmeasured", why=why)


def _movers(metric: str, now: Measurement, before: Measurement | None) -> tuple[list[Mover], bool]:
    """What grew, most first, and True; without a baseline or growth what is largest, and False."""
    kind, after = now.contributions(metric)
    was = {} if before is None else before.contributions(metric)[1]
    movers = [
        Mover(kind, name, was.get(name), figure)
        for name, figure in after.items()
        if figure > was.get(name, 0)
    ]
    grown = before is not None and bool(movers)
    if not grown:
        movers = [Mover(kind, name, None, figure) for name, figure in after.items()]
    return sorted(movers, key=lambda mover: (-mover.grew, mover.name)), grown


def _shrunk(metric: str, now: Measurement, before: Measurement | None) -> int:
    if before is None:
        return 0
    was, after = before.contributions(metric)[1], now.contributions(metric)[1]
    return sum(max(0, figure - after.get(name, 0)) for name, figure in was.items())


# -- the baseline file ---------------------------------------------------------------------------


def _read_baseline(path: Path) -> dict[str, Measurement] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        data = json.loads(text)
        version = data["effic_baseline"]
        if version == BASELINE_VERSION:
            return {name: Measurement.from_dict(row) for name, row in data["models"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"the baseline '{path}' is malformed; restore it, or run 'effic gate --update'"
        ) from None
    raise UsageError(
        f"the baseline '{path}' has format {version!r}, and this effic reads {BASELINE_VERSION}; "
        f"run 'effic gate --update'"
    )


def _write_baseline(path: Path, measured: Mapping[str, Measurement]) -> None:
    """Write atomically, one entry per line, so that a change reads well in a review."""
    models = []
    for name, measurement in measured.items():
        parts = []
        for key, value in measurement.to_dict().items():
            if isinstance(value, dict) and value:
                rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                parts.append(f"   {json.dumps(key)}: {{\n{rows}\n   }}")
            else:
                parts.append(f"   {json.dumps(key)}: {json.dumps(value)}")
        models.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    text = f'{{\n "effic_baseline": {BASELINE_VERSION},\n "models": {{\n' + ",\n".join(models) + "\n }\n}\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
