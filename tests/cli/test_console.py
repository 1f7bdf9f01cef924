"""Figures, names and tables as people read them."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

from effic.cli import console


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_500, "1.00 MB"),
     (123_456_789, "123 MB"), (2.5e9, "2.50 GB"), (4e15, "4000 TB"), (-110_000, "-110 kB"), (None, "?")],
)  # fmt: skip
def test_size(count: float | None, text: str) -> None:
    assert console.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(9999, "9999"), (12_345, "12.3 k"), (4_510_000, "4.51 M"), (None, "?")]
)
def test_amount(count: float | None, text: str) -> None:
    assert console.amount(count) == text


@pytest.mark.parametrize(
    ("time", "text"),
    [(3e-6, "3.00 µs"), (0.00271, "2.71 ms"), (0.9996, "1.00 s"), (12.3, "12.3 s"), (90, "1.5 min")],
)
def test_seconds(time: float, text: str) -> None:
    assert console.seconds(time) == text


@pytest.mark.parametrize(
    ("low", "middle", "high", "text"),
    [
        (1.1, 1.25, 1.4, "B is 1.25 times as fast as A (quartiles 1.10 … 1.40, 9 turns each)"),
        (0.9, 1.25, 1.4, "no clear difference: B is 1.25 times as fast as A ("),
        (1.0, 1.0, 1.0, "no clear difference: B is 1.00 times as fast as A ("),
        (0.6, 0.7, 1.1, "no clear difference: B is 0.70 times as fast as A ("),
        (0.6, 0.7, 0.9, "B is slower: 0.70 times as fast as A ("),
    ],
)
def test_a_model_is_called_fast_where_the_spread_allows_it(
    low: float, middle: float, high: float, text: str
) -> None:
    found = {"speedup": middle, "speedup_low": low, "speedup_high": high, "repeats": 9}
    assert console.faster_text(found, "B", "A").startswith(text)


def test_change() -> None:
    assert console.change(100, 26) == "-74.0%"
    assert console.change(100, 100) == ""
    assert console.change(0, 5) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (1.23456e-5, "1.23e-05"), (float("nan"), "nan"), (float("-inf"), "-inf")],
)
def test_figure(value: float | None, text: str) -> None:
    assert console.figure(value) == text


def test_shorten_keeps_both_ends() -> None:
    name = "model.layers.17.self_attention.query_projection.weight"
    short = console.shorten(name, 30)
    assert len(short) == 30
    assert short.startswith("model.")
    assert short.endswith("projection.weight")
    assert console.shorten("short", 30) == "short"


def test_json_has_no_nan(capsys) -> None:
    console.print_json({"a": float("nan"), 1: [np.float32(2), np.arange(2), np.int64(3)], "t": (True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "1": [2.0, [0, 1], 3], "t": [True, None]}


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_tables_never_wrap(monkeypatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    rows = [["n" * 150, "1.00 MB", "text"], ["short", "2 B", "more"]]
    console.print_result(console.table("name", ">size", "what", rows=rows))
    lines = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3
    assert all(len(line) <= columns for line in lines)
    assert "1.00 MB" in lines[1]
    assert "text" in lines[1]


def test_a_pipe_is_a_hundred_columns_wide(monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert console.console().width == console.PIPED_WIDTH


def test_no_progress_bar_without_a_terminal(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.progress() as bar:
        assert bar is None
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_names_from_files_do_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[31mred\x07\x9b"
    console.print_result(f"{name} lüge → 2:4", console.table("weight", rows=[[name]]))
    console.note(name)
    out, err = capsys.readouterr()
    assert "?[31mred?? lüge → 2:4" in out
    assert not {"\x1b", "\x07", "\x9b"} & {*out, *err}
