"""What tuning found, on disk: one line of JSON per candidate that was tried, and one per choice.

Lines are appended whole, so a run that is killed loses at most the batch it was measuring; a line that was cut
short is passed over. A record counts for one kernel (its sizes, without what it adds and clamps in the end), one
kind of CPU, a number of threads and the versions that made the code: the *key*. Where any of them differs the
kernel is made as if there were no record.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from effic.ir.errors import UsageError

if TYPE_CHECKING:
    from effic.backends.tvm.cpu import Cpu

FILE = "kernels.jsonl"
"""The file of records in a log's folder."""

TILES: dict[str, tuple[str, ...]] = {
    "DenseMatMul": ("panel", "rows", "k_tile"),
    "BatchMatMul": ("rows",),
    "Conv2d": ("blocks", "columns", "c_tile", "bands"),
    "DepthwiseConv2d": ("columns",),
}
"""The fields of each family that change how fast a kernel is and nothing else; None leaves a field to it."""

SCHEDULE = "Schedule"
"""The family of functions that have no kernel of effic's; what :mod:`effic.backends.tvm.tune_schedule` makes."""

_MOST_SPACES, _MOST_DECISIONS, _MOST_SIZES, _LARGEST = 1 << 10, 256, 16, 1 << 30

# What is added and clamped in the end costs the same in every tile.
_EPILOGUE = ("bias", "residual", "activation", "low", "high", "scale")

Decision = int | list[int]
Tile = dict[str, Any]
"""Of a kernel: its fields of :data:`TILES` that are not None. Of a function: ``space``, the number of one of
MetaSchedule's spaces, and ``decisions``, a :data:`Decision` for each of its instructions that takes one."""
Status = Literal["timed", "crashed", "refused", "wrong"]
Spec = TypeVar("Spec")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate that was tried.

    Attributes:
        key: of the kernel, see :func:`key_of`.
        tile: what was tried; empty for a function whose spaces could not be written.
        status: ``timed``; ``crashed``: the process died of it; ``refused``: TVM does not compile it; ``wrong``:
            its result is not the default's.
        speedup: time of the default by its time, 0 where it was not timed.
    """

    key: str
    tile: Tile
    status: Status
    speedup: float = 0.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """The tile to use for a kernel: measured again beside the default, and faster beyond the noise.

    ``speedup``, ``low``, ``high``: time of the default by its time, median and quartiles. An empty tile is the
    default.
    """

    key: str
    tile: Tile
    speedup: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Base:
    """How long one call of a kernel takes in its default tile, in seconds."""

    key: str
    seconds: float


Row = Trial | Choice | Base
_ROWS: dict[str, type[Row]] = {"trial": Trial, "choice": Choice, "base": Base}


def key_of(spec: Any, cpu: Cpu) -> str:
    """What a record of a kernel is found by: a line of JSON."""
    family = type(spec).__name__
    left_out = (*TILES[family], *_EPILOGUE)
    fields = {
        field.name: _plain(getattr(spec, field.name))
        for field in dataclasses.fields(spec)
        if field.name not in left_out
    }
    where = dataclasses.asdict(cpu)
    made_by = {name: version(name) for name in ("effic", "apache-tvm")}
    return json.dumps([family, fields, where, made_by], sort_keys=True, separators=(",", ":"))


def tile_of(spec: Any) -> Tile:
    """The tile fields of a spec that are not None."""
    found = {name: getattr(spec, name) for name in TILES[type(spec).__name__]}
    return {name: value for name, value in found.items() if value is not None}


def with_tile(spec: Spec, tile: Mapping[str, int]) -> Spec:
    """The spec in this tile; fields that it does not name are left to the kernel."""
    fields = dict.fromkeys(TILES[type(spec).__name__])
    return dataclasses.replace(spec, **{**fields, **tile})  # type: ignore[type-var]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


class Records:
    """The records of a folder.

    Attributes:
        path: the file.
        trials: what was tried, by key, in order.
        choices: what was chosen last, by key.
        bases: times of the defaults, by key.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read what is there; a folder that does not exist has no records yet."""
        self.path = Path(folder) / FILE
        self.trials: dict[str, list[Trial]] = {}
        self.choices: dict[str, Choice] = {}
        self.bases: dict[str, Base] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                row = _read(line)
                if row is not None:
                    self._take(row)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to the file, all of them in one write.

        Raises:
            OSError: the folder cannot be written to.
        """
        rows = list(rows)
        if not rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # It begins with the end of a line: the last one may have been cut short.
        text = "".join(f"\n{line_of(row)}" for row in rows) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, text.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        for row in rows:
            self._take(row)

    def tried(self, key: str) -> list[Tile]:
        """The tiles of a kernel that need not be tried again."""
        return [trial.tile for trial in self.trials.get(key, ())]

    def chosen(self, key: str) -> Tile:
        """The tile to use; empty where the default is the best that is known."""
        found = self.choices.get(key)
        return {} if found is None else found.tile

    def add_text(self, text: str) -> None:
        """Append rows that another process has written down as lines."""
        self.add(row for line in text.splitlines() if (row := _read(line)) is not None)

    def _take(self, row: Row) -> None:
        if isinstance(row, Trial):
            self.trials.setdefault(row.key, []).append(row)
        elif isinstance(row, Choice):
            self.choices[row.key] = row
        else:
            self.bases[row.key] = row


def line_of(row: Row) -> str:
    """A row as it is written."""
    return json.dumps({"kind": type(row).__name__.lower(), **dataclasses.asdict(row)}, sort_keys=True)


def _read(line: str) -> Row | None:
    """A line as a row; None for what was cut short or written by something else."""
    try:
        fields = json.loads(line)
        row = _ROWS[fields.pop("kind")](**fields)
        tile = {} if isinstance(row, Base) else row.tile
        known = _is_tile(json.loads(row.key)[0], tile)
        if isinstance(row, Trial):
            known = known and isinstance(row.speedup, (int, float))
        elif isinstance(row, Choice):
            known = known and min(row.speedup, row.low, row.high) > 0
        else:
            known = known and row.seconds > 0
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    return row if known else None


def _is_tile(family: str, tile: Tile) -> bool:
    """Whether a tile is one in form: small numbers under the names that its family has."""
    if family != SCHEDULE:
        return set(tile) <= set(TILES[family]) and all(type(n) is int and n > 0 for n in tile.values())
    if not tile:
        return True
    decisions = tile["decisions"]
    return (
        set(tile) == {"space", "decisions"}
        and type(tile["space"]) is int
        and 0 <= tile["space"] < _MOST_SPACES
        and type(decisions) is list
        and len(decisions) <= _MOST_DECISIONS
        and all(
            0 < len(one) <= _MOST_SIZES and all(type(n) is int and 0 < n < _LARGEST for n in one)
            if type(one) is list
            else type(one) is int and abs(one) < _LARGEST
            for one in decisions
        )
    )


class TunedKernels:
    """What a build takes from the records of a folder.

    Attributes:
        folder: the folder.
        used: names of the kernels that were made by a record, and how much faster each had been measured.
        without: how often kernels without a record were asked for, by name.
        unfit: kernels and functions whose record is none that tuning would make, and why, by name.
        asked: names of the functions without a kernel that are not of open sizes.
        functions: how much faster the schedule of each of these had been measured; 1 where effic's own was the
            best, None where no candidate was tried.
    """

    def __init__(self, folder: str) -> None:
        """Read the folder.

        Raises:
            UsageError: it has no records.
        """
        self.folder = folder
        if not Path(folder, FILE).is_file():
            what = "holds no records of tuning" if Path(folder).is_dir() else "does not exist"
            raise UsageError(
                f"tuned={folder}: this folder {what}; make them with: effic tune MODEL --log {folder}"
            )
        self._records = Records(folder)
        self.used: dict[str, float] = {}
        self.without: Counter[str] = Counter()
        self.unfit: dict[str, str] = {}
        self.asked: set[str] = set()
        self.functions: dict[str, float | None] = {}

    def apply(self, spec: Spec, cpu: Cpu) -> Spec:
        """The spec in the tile that its record names, itself where there is none or it does not fit."""
        key = key_of(spec, cpu)
        name: str = spec.name  # type: ignore[attr-defined]
        if key not in self._records.trials:
            self.without[name] += 1
            return spec
        tile = self._records.chosen(key)
        if not tile:
            self.used[name] = 1.0
            return spec
        from effic.backends.tvm.tune_tiles import why_not_tile

        # A file of anyone's: only what tuning would try is made, for a tile of thousands compiles for hours.
        if (reason := why_not_tile(spec, cpu, tile)) is not None:
            self.unfit[name] = reason
            return spec
        tuned = with_tile(spec, tile)
        self.used[tuned.name] = self._records.choices[key].speedup  # type: ignore[attr-defined]
        return tuned

    def schedule(self, function: Any, name: str, cpu: Cpu) -> Any | None:
        """A function without a kernel in the schedule that its record names; None where effic's own stays."""
        from effic.backends.tvm.tune_schedule import REFUSALS, Spaces, UnfitScheduleError, key_of_function

        key = key_of_function(function, cpu)
        if key is None:
            return None
        self.asked.add(name)
        if key not in self._records.trials:
            if key in self._records.bases:
                self.functions[name] = None
            else:
                self.without[name] += 1
            return None
        if not (tile := self._records.chosen(key)):
            self.functions[name] = 1.0
            return None
        try:
            made = Spaces(function, cpu).scheduled(tile)
        except UnfitScheduleError as error:
            self.unfit[name] = str(error)
            return None
        except REFUSALS:
            self.unfit[name] = "MetaSchedule has no spaces for this function"
            return None
        self.functions[name] = self._records.choices[key].speedup
        return made
