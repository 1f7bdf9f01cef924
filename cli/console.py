"""How everything is printed: figures, names, tables, JSON. Results on stdout, notes on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PIPED_WIDTH = 100
"""Columns when stdout is no terminal: wide enough for every table, narrow enough for a log."""

MIN_FLEXIBLE = 12
"""Characters of a name that a table keeps, however narrow the terminal is."""


def console(*, stderr: bool = False) -> Console:
    """A rich console of the terminal's width, or of :data:`PIPED_WIDTH` when piped."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            # rich would leave with 1, which means a broken budget here; the entry point knows better.
            raise BrokenPipeError

    stream: TextIO = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Screen(file=stream, width=width, highlight=False, emoji=False, markup=False, soft_wrap=False)


# What a terminal would obey rather than show, but for tab and new line: names come from files of anyone.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "?")


def tame(text: str) -> str:
    """A text in which a terminal finds nothing to obey."""
    return text.translate(_CONTROLS)


def print_result(*things: RenderableType) -> None:
    """Print tables and lines of text on stdout."""
    screen = console()
    for thing in things:
        if isinstance(thing, str):
            # Sentences are left to the terminal to wrap, so that a pipe gets whole lines.
            screen.print(tame(thing), soft_wrap=True)
        else:
            screen.print(thing)


def print_json(data: Any) -> None:
    """Print JSON on stdout; NaN and the infinities become null, which JSON has no words for."""
    click.echo(json.dumps(plain(data), indent=2, allow_nan=False))


def note(text: str) -> None:
    """One line for the reader on stderr."""
    click.echo(tame(text), err=True)


def plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, (str, bool, int)) or data is None:
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if hasattr(data, "item") and getattr(data, "ndim", None) == 0:
        return plain(data.item())
    if hasattr(data, "tolist"):
        return plain(data.tolist())
    return str(data)


def table(*columns: str, rows: Iterable[Sequence[str]], flexible: int = 0, title: str | None = None) -> Table:
    """A plain table whose cells are never wrapped.

    Args:
        columns: headings; one that begins with ``>`` is a column of figures, set to the right.
        rows: the cells.
        flexible: the column whose cells give way (their middles) when the line is too narrow.
        title: a line above it.
    """
    from rich.table import Table

    cells = [[tame(cell) for cell in row] for row in rows]
    headings = [column.removeprefix(">") for column in columns]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    others = sum(widths) - widths[flexible]
    gap = next((g for g in (2, 1) if console().width - others - g * (len(columns) - 1) >= MIN_FLEXIBLE), 1)
    room = console().width - others - gap * (len(columns) - 1)
    for row in cells:
        row[flexible] = shorten(row[flexible], max(room, MIN_FLEXIBLE))
    made = Table(
        box=None,
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        padding=(0, gap, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        made.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in cells:
        made.add_row(*row)
    return made


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Any]:
    """A progress bar on stderr, or None when stderr is no terminal or silence was asked for."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
    ) as bar:
        yield bar


def size(count: float | None) -> str:
    """Bytes for people, in decimal units as file managers and hubs print them: ``1.13 MB``."""
    if count is None:
        return "?"
    if abs(count) < 1000:
        return f"{count:.0f} B"
    return _scaled(count, ("kB", "MB", "GB", "TB"))


def amount(count: float | None) -> str:
    """A count for people: ``950``, ``12.3 k``, ``4.51 M``."""
    if count is None:
        return "?"
    if abs(count) < 10_000:
        return f"{count:.0f}"
    return _scaled(count, ("k", "M", "G", "T"))


def _scaled(count: float, units: tuple[str, ...]) -> str:
    power = next((p for p in range(1, len(units)) if abs(count) < 999.5 * 1000**p), len(units))
    count, unit = count / 1000**power, units[power - 1]
    return f"{_three_digits(count)} {unit}"


def _three_digits(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f}"


def change(before: float, after: float) -> str:
    """A relative change: ``-74.1%``, ``+3.0%``, or nothing when it rounds to nothing."""
    text = f"{100 * (after - before) / before:+.1f}%" if before else ""
    return "" if text in ("+0.0%", "-0.0%") else text


def seconds(time: float) -> str:
    """A duration with the unit that suits it."""
    if time < 0.9995e-3:
        return f"{_three_digits(time * 1e6)} µs"
    if time < 0.9995:
        return f"{_three_digits(time * 1e3)} ms"
    return f"{_three_digits(time)} s" if time < 60 else f"{time / 60:.1f} min"


def figure(value: float | None) -> str:
    """A measured quantity in three digits; ``-`` for what does not exist."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return "0" if value == 0 else f"{value:.3g}"


def shorten(name: str, width: int) -> str:
    """A name with its middle left out when it is long: both ends tell nodes apart."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def shape_text(shape: Iterable[Any]) -> str:
    """``[N, 3, 224, 224]``, with ``?`` for a dimension nobody knows."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def faster_text(found: Mapping[str, Any], b: str, a: str) -> str:
    """Which of two timed models is the faster one, or that none is, with the spread.

    Args:
        found: ``speedup``, ``speedup_low``, ``speedup_high`` (the median of A's time by B's, and its quartiles)
            and ``repeats``.
        b, a: what they are called.
    """
    middle, low, high = (found[key] for key in ("speedup", "speedup_low", "speedup_high"))
    says = f"{b} is {middle:.2f} times as fast as {a}"
    if high < 1:
        says = f"{b} is slower: {middle:.2f} times as fast as {a}"
    elif low <= 1:
        says = f"no clear difference: {says}"
    return f"{says} (quartiles {low:.2f} … {high:.2f}, {found['repeats']} turns each)"
