"""Records of tuning: what is written is read again, what is not understood counts for nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends.tvm import tune_records
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.conv import Conv2d, Window
from effic.backends.tvm.kernels.conv_depthwise import DepthwiseConv2d
from effic.backends.tvm.kernels.dense import BatchMatMul, DenseMatMul
from effic.backends.tvm.tune_records import (
    FILE,
    TILES,
    Base,
    Choice,
    Records,
    Trial,
    TunedKernels,
    key_of,
    line_of,
    tile_of,
    with_tile,
)
from effic.backends.tvm.tune_tiles import cache_tiles, candidates, register_tiles, why_not_tile
from effic.ir.errors import UsageError

CPU = Cpu("cascadelake", 1, avx512=True, vnni=True)
OLD = Cpu("x86-64-v3", 4)
DENSE = DenseMatMul(8, 64, 48)


def conv(channels: int = 32, filters: int = 64, size: int = 14, kernel: int = 3, **more: Any) -> Conv2d:
    window = Window(size, size, (kernel, kernel), (1, 1), (kernel // 2,) * 4)
    return Conv2d(1, channels, filters, window, **more)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    key = key_of(DENSE, CPU)
    rows = [
        Base(key, 1e-6),
        Trial(key, {"panel": 48, "rows": 8}, "timed", 1.25),
        Trial(key, {"panel": 64, "rows": 4}, "crashed"),
        Choice(key, {"panel": 48, "rows": 8}, 1.2, 1.1, 1.3),
    ]
    Records(tmp_path / "new" / "log").add(rows[:2])
    Records(tmp_path / "new" / "log").add(rows[2:])
    found = Records(tmp_path / "new" / "log")
    assert found.trials == {key: rows[1:3]}
    assert found.choices == {key: rows[3]}
    assert found.bases == {key: rows[0]}
    assert found.tried(key) == [{"panel": 48, "rows": 8}, {"panel": 64, "rows": 4}]
    assert found.chosen(key) == {"panel": 48, "rows": 8}
    assert found.chosen("another") == {}


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    key = key_of(DENSE, CPU)
    records = Records(tmp_path)
    records.add([Trial(key, {"rows": 4}, "timed", 1.0)])
    whole = records.path.read_bytes()
    for length in range(1, len(whole) - 2):
        records.path.write_bytes(whole + whole.strip()[:length])
        Records(tmp_path).add([Trial(key, {"rows": 8}, "timed", 1.0)])
        tiles = Records(tmp_path).tried(key)
        assert tiles[0] == {"rows": 4}
        assert tiles[-1] == {"rows": 8}
        assert len(tiles) == 2 + (length == len(whole.strip()))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"tile": {"k": 64}},
        {"tile": {"rows": 0}},
        {"tile": {"rows": "8"}},
        {"tile": {"rows": True}},
        {"tile": [8]},
        {"key": "[]"},
        {"key": "{"},
        {"key": '["Unknown", {}, {}, {}]'},
        {"key": 3},
        {"speedup": "fast"},
        {"more": 1},
    ],
)
def test_rows_of_something_else_count_for_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    row = json.loads(line_of(Trial(key_of(DENSE, CPU), {"rows": 8}, "timed", 1.0)))
    (tmp_path / FILE).write_text(
        f"{json.dumps({**row, **change})}\n[1]\nnull\n7\n\n{line_of(Trial(**_kept(row)))}\n"
    )
    found = Records(tmp_path)
    assert [trial.tile for trials in found.trials.values() for trial in trials] == [{"rows": 8}]
    assert not found.choices


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "kind"}


def test_a_key_is_of_the_kernel_the_machine_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(DENSE, CPU)
    # What is added and clamped in the end costs the same in every tile; the tile is what is looked for.
    for same in ({"bias": True}, {"activation": "relu"}, {"panel": 64}, {"rows": 3, "k_tile": 32}):
        assert key_of(dataclasses.replace(DENSE, **same), CPU) == key
    for other in ({"m": 9}, {"k": 65}, {"n": 49}, {"portable": True}):
        assert key_of(dataclasses.replace(DENSE, **other), CPU) != key
    for change in ({"cores": 2}, {"mcpu": "znver5"}, {"vnni": False}):
        assert key_of(DENSE, dataclasses.replace(CPU, **change)) != key
    assert key_of(conv(), CPU) != key_of(conv(kernel=1), CPU)
    monkeypatch.setattr(tune_records, "version", lambda package: "9.9")
    assert key_of(DENSE, CPU) != key


def test_builds_take_the_choice_and_tell_what_has_none(tmp_path: Path) -> None:
    Records(tmp_path).add(
        [
            Trial(key_of(DENSE, CPU), {"panel": 48, "rows": 4}, "timed", 1.3),
            Choice(key_of(DENSE, CPU), {"panel": 48, "rows": 4}, 1.3, 1.2, 1.4),
            Trial(key_of(conv(), CPU), {"blocks": 4, "columns": 7}, "timed", 0.9),
        ]
    )
    tuned = TunedKernels(str(tmp_path))
    relu = dataclasses.replace(DENSE, activation="relu")
    assert tuned.apply(relu, CPU) == dataclasses.replace(relu, panel=48, rows=4)
    assert tuned.apply(conv(), CPU) == conv()  # tried, and the default was the best
    other = DenseMatMul(8, 64, 49)
    assert tuned.apply(other, CPU) == other
    assert tuned.apply(relu, OLD) == relu
    assert set(tuned.without) == {other.name, relu.name}
    assert list(tuned.used.values()) == [1.3, 1.0]


@pytest.mark.parametrize(
    "tile", [{"rows": 100_000}, {"panel": 17, "rows": 4}, {"panel": 48, "rows": 4, "k_tile": 3}]
)
def test_a_tile_that_nobody_would_try_is_not_made(tmp_path: Path, tile: dict[str, int]) -> None:
    Records(tmp_path).add(
        [Trial(key_of(DENSE, CPU), tile, "timed", 9.0), Choice(key_of(DENSE, CPU), tile, 9, 9, 9)]
    )
    tuned = TunedKernels(str(tmp_path))
    assert tuned.apply(DENSE, CPU) == DENSE
    assert list(tuned.unfit) == [DENSE.name]


def test_a_folder_without_records_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tuned=.*: this folder does not exist; make them with: effic tune"):
        TunedKernels(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="this folder holds no records of tuning") as caught:
        TunedKernels(str(tmp_path))
    assert caught.value.exit_code == 2


# -- candidates ---------------------------------------------------------------------------------------

SIZE = st.integers(1, 130)
DENSES = st.builds(DenseMatMul, SIZE, st.integers(1, 5000), SIZE)
BATCHES = st.builds(BatchMatMul, st.just(2), SIZE, SIZE, SIZE)
CONVS = st.builds(
    conv, st.integers(1, 70), st.integers(1, 200), st.integers(1, 60), st.sampled_from([1, 3, 5]),
    plain_input=st.booleans(),
)  # fmt: skip
DEPTHWISE = st.builds(lambda c, s: DepthwiseConv2d(1, c, Window(s, s, (3, 3), (1, 1), (1,) * 4)), SIZE, SIZE)


@settings(max_examples=150, deadline=None)
@given(DENSES | BATCHES | CONVS | DEPTHWISE, st.sampled_from([CPU, OLD]))
def test_candidates_are_few_distinct_and_of_the_kernel(spec: Any, cpu: Cpu) -> None:
    first = candidates(spec, cpu, {}, [])
    assert len(first) <= 20  # none, where a kernel's size leaves no choice
    assert all(tile and set(tile) <= set(TILES[type(spec).__name__]) for tile in first)
    assert len({json.dumps(tile) for tile in first}) == len(first)
    for tile in [*first, *cache_tiles(spec, cpu, first[0]), *cache_tiles(spec, cpu, {})]:
        assert why_not_tile(spec, cpu, tile) is None
        made = with_tile(spec, tile)
        assert tile_of(made) == tile
        assert with_tile(made, {}) == spec
        sums = tile.get("columns", tile.get("rows", 1)) * tile.get("blocks", tile.get("panel", 16) // 16)
        assert sums <= 28


@settings(max_examples=60, deadline=None)
@given(DENSES | CONVS, st.sampled_from([CPU, OLD]))
def test_register_tiles_come_first_and_nothing_twice(spec: Any, cpu: Cpu) -> None:
    tried: list[dict[str, int]] = []
    chosen = register_tiles(spec, cpu)[-1]
    while found := candidates(spec, cpu, chosen, tried):
        assert found[0] not in tried
        tried.append(found[0])
    assert tried == [*register_tiles(spec, cpu), *cache_tiles(spec, cpu, chosen)]
