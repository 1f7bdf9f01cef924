"""The configuration of ``effic gate``: which budgets a project has, and where each is written.

It lies in ``effic.toml`` under ``[gate]``, or in ``pyproject.toml`` under ``[tool.effic.gate]``::

    [gate]
    baseline = "effic-baseline.json"

    [gate.models."models/*.onnx"]
    file_bytes = { max = "2 MB", max_growth = "5%" }
    ops.Conv = { max = 12 }
    ops_allowed = "ort-cpu"
    accuracy = { metric = "top1", data = "val.npz", min = 0.98 }

``docs/gate.md`` tells of every key.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effic.compare import DEFAULT_COUNT, Bounds
from effic.guard import Accuracy
from effic.ir.errors import UsageError
from effic.measure import COMPONENT_METRICS, METRICS
from effic.metric_data import Images
from effic.metrics import Function, get_metric
from effic.op_coverage import TARGETS
from effic.passes import near
from effic.toml_lines import key_lines

CONFIG_NAMES = ("effic.toml", "pyproject.toml")
BOUNDS = ("max", "max_growth")
BASELINE_NAME = "effic-baseline.json"
TABLES = ("ops", "ops_allowed", "components", "accuracy", "agreement", "latency")
"""Keys of a model beside the metrics of :data:`effic.measure.METRICS`."""

EXAMPLE = '[gate.models."model.onnx"] with file_bytes = { max = "2 MB", max_growth = "5%" }'
_LOWEST = -sys.float_info.max  # a limit that is not finite would pass everything in silence
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Place:
    """Where something is written: its key (``gate.models."a.onnx".nodes.max``) and line, from 1."""

    key: str
    line: int | None = None


@dataclass(frozen=True)
class Budget:
    """One bound on a figure that is the same at every run.

    Attributes:
        pattern: the model file or glob, as written.
        metric: one of :data:`effic.measure.METRICS`, ``"ops.Conv"`` or ``"ops_allowed"``.
        bound: ``"max"`` or ``"max_growth"``; ``"allowed"`` of ``ops_allowed``.
        limit: the number: bytes or a count; a share (0.05) when ``relative``.
        relative: whether ``limit`` is a share of the baseline.
        place: where to edit it.
        component: the name pattern of the part of the model it is about; None for all of it.
        allowed: for ``ops_allowed``, the operators, or the name of a target.
    """

    pattern: str
    metric: str
    bound: str
    limit: float
    relative: bool
    place: Place
    component: str | None = None
    allowed: tuple[str, ...] | str = ()

    @property
    def key(self) -> str:
        """The configuration key to edit."""
        return self.place.key


@dataclass(frozen=True)
class AccuracyCheck:
    """A score to keep.

    Attributes:
        pattern: the model file or glob, as written.
        place: of the table.
        wanted: the metric, the data and the limits.
        reference: the model file to compare with, or None for the baseline's recorded score.
        limits: place of each limit by its name: ``min`` or ``max``, and ``max_drop``.
    """

    pattern: str
    place: Place
    wanted: Accuracy
    reference: str | None
    limits: Mapping[str, Place]


@dataclass(frozen=True)
class AgreementCheck:
    """How near the outputs must be to a reference model's.

    Attributes:
        pattern, place: as for :class:`AccuracyCheck`.
        reference: the model file.
        bounds: the limits.
        inputs: an ``.npz`` file, or None for seeded inputs.
        count: how many sets of seeded inputs.
        limits: place of each limit by its name.
    """

    pattern: str
    place: Place
    reference: str
    bounds: Bounds
    inputs: str | None
    count: int
    limits: Mapping[str, Place]


@dataclass(frozen=True)
class LatencyCheck:
    """How slow a model may be beside a reference model, in the same process and in turns.

    Attributes:
        pattern, place: as for :class:`AccuracyCheck`.
        reference: the model file, or None: then the time is told and nothing is judged.
        max_ratio: largest time of the model over the time of the reference, or None.
        floor: what is allowed beyond it at least, whatever the noise.
        threads, repeats: as :func:`effic.bench.bench` takes them.
        inputs: an ``.npz`` file, or None for seeded inputs.
        limits: place of each limit by its name.
    """

    pattern: str
    place: Place
    reference: str | None
    max_ratio: float | None
    floor: float
    threads: int
    repeats: int
    inputs: str | None
    limits: Mapping[str, Place]


Check = AccuracyCheck | AgreementCheck | LatencyCheck


@dataclass(frozen=True)
class GateConfig:
    """A project's budgets.

    Attributes:
        path: the file they were read from; paths in it are relative to its folder.
        baseline: path of the baseline file.
        budgets: in the order of the file.
        checks: what has to be run to be judged, in the order of the file.
        allow_unlike: whether to compare with a baseline of another source model, data or machine.
    """

    path: Path
    baseline: Path
    budgets: tuple[Budget, ...]
    checks: tuple[Check, ...] = ()
    allow_unlike: bool = False

    @property
    def patterns(self) -> list[str]:
        """The model files and globs, each once, in the order of the file."""
        return list(dict.fromkeys(item.pattern for item in (*self.budgets, *self.checks)))


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
            if path.is_file() and _section(path, _parse(path, _read(path))) is not None:
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
    text = _read(path)
    data = _parse(path, text)
    section = _section(path, data)
    prefix = ("tool", "effic", "gate") if path.name == "pyproject.toml" else ("gate",)
    name = ".".join(prefix)
    if section is None:
        hint = next((f", but '{key}': did you mean 'gate'?" for key in data if near(key, ["gate"])), "")
        raise UsageError(f"'{path}' has no [{name}] section{hint}; write for example {EXAMPLE}")
    reader = _Reader(path, data, text)
    reader.known(section, ("baseline", "models", "allow_unlike"), prefix)
    baseline = section.get("baseline", BASELINE_NAME)
    if not isinstance(baseline, str):
        raise UsageError(f"{path}: {name}.baseline must be the path of a file, not {baseline!r}")
    allow = section.get("allow_unlike", False)
    if not isinstance(allow, bool):
        raise UsageError(f"{path}: {name}.allow_unlike must be true or false, not {allow!r}")
    models = section.get("models", {})
    if not isinstance(models, dict) or not models:
        raise UsageError(f"{path}: [{name}] names no models; write for example {EXAMPLE}")
    items = [
        item
        for pattern, table in models.items()
        for item in reader.model((*prefix, "models", pattern), pattern, table)
    ]
    return GateConfig(
        path,
        path.parent / baseline,
        tuple(item for item in items if isinstance(item, Budget)),
        tuple(item for item in items if not isinstance(item, Budget)),
        allow,
    )


class _Reader:
    """Reads the tables of one file, and knows where each key is written."""

    def __init__(self, path: Path, data: Mapping[str, Any], text: str) -> None:
        self._path, self._lines = path, key_lines(text, data)

    def place(self, keys: tuple[str, ...]) -> Place:
        """The key as it is written, and the line of it or of the nearest table around it."""
        found = (keys[:size] for size in range(len(keys), 0, -1))
        return Place(_written(keys), next((self._lines[k] for k in found if k in self._lines), None))

    def refuse(self, keys: tuple[str, ...], what: str) -> UsageError:
        return UsageError(f"{self._path}: {_written(keys)} {what}")

    def known(self, table: Mapping[str, Any], known: Iterable[str], keys: tuple[str, ...]) -> None:
        for name in table:
            if name not in known:
                raise self.refuse(
                    keys,
                    f"has the unknown key '{name}'{near(name, list(known))} (known keys: {', '.join(known)})",
                )

    def table(self, value: Any, keys: tuple[str, ...], example: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            raise self.refuse(keys, f"must be a table such as {example}, not {value!r}")
        return value

    # -- a model -------------------------------------------------------------------------------

    def model(self, keys: tuple[str, ...], pattern: str, table: Any) -> Iterator[Budget | Check]:
        if not isinstance(table, dict) or not table:
            raise self.refuse(keys, f"sets no budget; the metrics are {', '.join((*METRICS, *TABLES))}")
        self.known(table, (*METRICS, *TABLES), keys)
        for name, value in table.items():
            here = (*keys, name)
            if name in METRICS:
                yield from self.bounds(here, pattern, name, value)
            elif name == "ops":
                for op, bounds in self.table(value, here, "{ Conv = { max = 12 } }").items():
                    yield from self.bounds((*here, op), pattern, f"ops.{op}", bounds)
            elif name == "ops_allowed":
                yield Budget(
                    pattern, name, "allowed", 0, False, self.place(here), allowed=self.ops(here, value)
                )
            elif name == "components":
                example = '{ "*.attention.*" = { weight_bytes = { max = "1 MB" } } }'
                for component, metrics in self.table(value, here, example).items():
                    inner = (*here, component)
                    self.table(metrics, inner, '{ weight_bytes = { max = "1 MB" } }')
                    self.known(metrics, COMPONENT_METRICS, inner)
                    for metric, bounds in metrics.items():
                        yield from self.bounds((*inner, metric), pattern, metric, bounds, component)
            else:
                yield self.check(name, here, pattern, value)

    def check(self, name: str, keys: tuple[str, ...], pattern: str, value: Any) -> Check:
        readers: dict[str, Callable[[tuple[str, ...], str, Any], Check]] = {
            "accuracy": self.accuracy,
            "agreement": self.agreement,
            "latency": self.latency,
        }
        try:
            return readers[name](keys, pattern, value)
        except UsageError as error:
            if str(error).startswith(f"{self._path}: "):
                raise
            # What the metric, the bounds or the images say of their own fields.
            raise UsageError(f"{self._path}: {_written(keys)}: {error}") from None

    def bounds(
        self, keys: tuple[str, ...], pattern: str, metric: str, value: Any, component: str | None = None
    ) -> Iterator[Budget]:
        bounds = self.table(value, keys, '{ max = 1000 } or { max_growth = "5%" }')
        self.known(bounds, BOUNDS, keys)
        is_bytes = metric in METRICS and METRICS[metric].is_bytes
        for bound, text in bounds.items():
            here = (*keys, bound)
            limit, relative = parse_limit(text, is_bytes, f"{self._path}: {_written(here)}")
            if relative and bound == "max":
                raise self.refuse(here, f"is a share; use max_growth = {text!r}, or an amount")
            yield Budget(pattern, metric, bound, limit, relative, self.place(here), component)

    def ops(self, keys: tuple[str, ...], value: Any) -> tuple[str, ...] | str:
        if isinstance(value, str):
            if value not in TARGETS:
                raise self.refuse(
                    keys,
                    f"names no target '{value}'{near(value, list(TARGETS))} (targets: {', '.join(TARGETS)}); "
                    'or list the operators: ["Conv", "Relu"]',
                )
            return value
        if isinstance(value, list) and value and all(isinstance(op, str) and op for op in value):
            return tuple(value)
        raise self.refuse(
            keys, f'must list operators, such as ["Conv", "com.microsoft::MatMulNBits"], or name a target '
            f"({', '.join(TARGETS)}), not {value!r}"
        )  # fmt: skip

    # -- what has to be run ----------------------------------------------------------------------

    def number(
        self,
        table: Mapping[str, Any],
        name: str,
        keys: tuple[str, ...],
        *,
        low: float = _LOWEST,
        whole: bool = False,
    ) -> Any:
        value = table.get(name)
        kinds = int if whole else (int, float)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, kinds) or not low <= value < math.inf
        ):
            what = "a whole number" if whole else "a number"
            at_least = f" of at least {low:g}" if low > _LOWEST else ""
            raise self.refuse((*keys, name), f"is {value!r}; it must be {what}{at_least}")
        return value

    def file(self, table: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> str | None:
        value = table.get(name)
        if value is not None and not (isinstance(value, str) and value):
            raise self.refuse((*keys, name), f"must be the path of a file, not {value!r}")
        return None if value is None else str(self._path.parent / value)

    def limits(
        self, table: Mapping[str, Any], names: Iterable[str], keys: tuple[str, ...]
    ) -> dict[str, Place]:
        return {name: self.place((*keys, name)) for name in names if name in table}

    def accuracy(self, keys: tuple[str, ...], pattern: str, value: Any) -> AccuracyCheck:
        table = self.table(value, keys, '{ metric = "top1", data = "val.npz", min = 0.98 }')
        names = ("metric", "data", "min", "max", "max_drop", "reference")
        self.known(table, (*names, "limit", "window", "tokenizer", "images"), keys)
        if not isinstance(table.get("metric"), str):
            raise self.refuse(keys, 'must name its metric, such as metric = "top1"')
        metric = get_metric(table["metric"])
        for bound, higher in (("min", True), ("max", False)):
            if bound in table and metric.higher_is_better is not higher:
                better = "higher" if metric.higher_is_better else "lower"
                other = "min" if metric.higher_is_better else "max"
                raise self.refuse(
                    (*keys, bound), f"bounds {metric.text}, of which {better} is better; use {other}"
                )
        data = table.get("data")
        if data is None and not isinstance(metric, Function):
            raise self.refuse(keys, 'must name its data, such as data = "val.npz"')
        if isinstance(data, str) and _FUNCTION.fullmatch(data) is None:
            data = self.file(table, "data", keys)
        elif data is not None and not isinstance(data, str):
            raise self.refuse((*keys, "data"), f"must be the path of a file or folder, not {data!r}")
        bound = self.number(table, "min" if metric.higher_is_better else "max", keys)
        reference = self.file(table, "reference", keys)
        if metric.needs_reference and reference is None:
            raise self.refuse(
                keys, f"compares with a reference model by {metric.text}; name it with reference"
            )
        if bound is None and table.get("max_drop") is None:
            limit = "min" if metric.higher_is_better else "max"
            raise self.refuse(keys, f"sets no limit; give {limit} or max_drop")
        wanted = Accuracy(
            table["metric"],
            data,
            max_drop=self.number(table, "max_drop", keys, low=0),
            bound=bound,
            on_drop="fail",
            limit=self.number(table, "limit", keys, low=1, whole=True),
            window=self.number(table, "window", keys, low=2, whole=True),
            tokenizer=self.file(table, "tokenizer", keys),
            images=self.images(table.get("images"), (*keys, "images")),
        )
        place = self.place(keys)
        return AccuracyCheck(
            pattern, place, wanted, reference, self.limits(table, ("min", "max", "max_drop"), keys)
        )

    def images(self, value: Any, keys: tuple[str, ...]) -> Images | None:
        if value is None:
            return None
        table = self.table(value, keys, "{ resize = 256, mean = [0.5], std = [0.5] }")
        self.known(table, ("resize", "mean", "std", "scale", "channels"), keys)
        fields: dict[str, Any] = {}
        for name, given in table.items():
            here = (*keys, name)
            if name == "channels":
                if given not in ("rgb", "bgr", "gray"):
                    raise self.refuse(here, f"is {given!r}, allowed are rgb, bgr, gray")
                fields[name] = given
            elif name in ("mean", "std"):
                if not isinstance(given, list) or not all(_is_number(v) for v in given) or not given:
                    raise self.refuse(here, f"must list numbers, not {given!r}")
                fields[name] = tuple(float(v) for v in given)
            else:
                fields[name] = self.number(table, name, keys, low=0, whole=name == "resize")
        return Images(**fields)

    def agreement(self, keys: tuple[str, ...], pattern: str, value: Any) -> AgreementCheck:
        names = ("max_abs", "rtol", "min_sqnr", "min_cosine", "min_top1")
        table = self.table(value, keys, '{ reference = "fp32.onnx", min_sqnr = 20 }')
        self.known(table, ("reference", *names, "inputs", "count"), keys)
        reference = self.file(table, "reference", keys)
        if reference is None:
            raise self.refuse(keys, 'must name its reference, such as reference = "fp32.onnx"')
        limits = self.limits(table, names, keys)
        if not limits:
            raise self.refuse(keys, f"sets no limit; give one of {', '.join(names)}")
        bounds = {name: self.number(table, name, keys) for name in limits}
        count = self.number(table, "count", keys, low=1, whole=True)
        inputs = self.file(table, "inputs", keys)
        if inputs is not None and count is not None:
            raise self.refuse((*keys, "count"), "does nothing beside inputs, which are used as they are")
        return AgreementCheck(
            pattern, self.place(keys), reference, Bounds(**bounds), inputs, count or DEFAULT_COUNT, limits
        )

    def latency(self, keys: tuple[str, ...], pattern: str, value: Any) -> LatencyCheck:
        table = self.table(value, keys, '{ reference = "base.onnx", max_ratio = 1.1 }')
        self.known(table, ("reference", "max_ratio", "floor", "threads", "repeats", "inputs"), keys)
        reference = self.file(table, "reference", keys)
        ratio = self.number(table, "max_ratio", keys, low=0)
        if ratio is not None and reference is None:
            raise self.refuse(
                (*keys, "max_ratio"),
                "needs a reference model to be timed beside; times of different runs cannot be compared",
            )
        floor = self.number(table, "floor", keys, low=0)
        return LatencyCheck(
            pattern,
            self.place(keys),
            reference,
            ratio,
            0.05 if floor is None else float(floor),
            self.number(table, "threads", keys, low=1, whole=True) or 1,
            self.number(table, "repeats", keys, low=4, whole=True) or 20,
            self.file(table, "inputs", keys),
            self.limits(table, ("max_ratio",), keys),
        )


# -- amounts -------------------------------------------------------------------------------------

_AMOUNT = re.compile(r"\+?([0-9][0-9_]*(?:\.[0-9]+)?)\s*(%|[A-Za-z]*)")
_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_limit(text: Any, is_bytes: bool, where: str) -> tuple[float, bool]:
    """``(number, is a share)`` of ``1000``, ``"2 MB"``, ``"1.5 MiB"``, ``"3 G"`` or ``"5%"``.

    Raises:
        UsageError: it is none of these; ``where`` says where it stands.
    """
    if _is_number(text) and 0 <= text < float("inf"):
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- the file ------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no configuration file '{path}'; check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not valid TOML: {error}; correct it there") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"'{path}' is not valid TOML: {error}; correct it there") from None


def _section(path: Path, data: dict[str, Any]) -> dict[str, Any] | None:
    keys = ("tool", "effic", "gate") if path.name == "pyproject.toml" else ("gate",)
    found: Any = data
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if found is not None and not isinstance(found, dict):
        raise UsageError(f"{path}: {'.'.join(keys)} must be a table; write for example {EXAMPLE}")
    return found


def _written(keys: Iterable[str]) -> str:
    """A key as TOML writes it, with quotes where they are needed."""
    return ".".join(key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else f'"{key}"' for key in keys)


def relative_to_here(path: str | os.PathLike[str]) -> str:
    """A path from the current folder, where that is shorter; always with forward slashes."""
    whole, here = Path(path).resolve(), Path.cwd().resolve()
    return (whole.relative_to(here) if whole.is_relative_to(here) else Path(path)).as_posix()
