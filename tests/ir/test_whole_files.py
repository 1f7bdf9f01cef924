"""Files appear whole, tell who wrote them by their stamps, and never take the name of a device."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from effic.ir.whole_files import Stamp, WholeFiles, stamp, why_no_file, write_whole


def test_stamps_are_those_the_files_will_have(tmp_path: Path) -> None:
    told: dict[str, Stamp] = {}

    def before(new: Mapping[str, Stamp]) -> None:
        assert not any((tmp_path / name).exists() for name in ("a", "b"))
        told.update(new)

    with WholeFiles() as files:
        files.create(tmp_path, "a").write(b"12")
        files.create(tmp_path, "b").write(b"123")
        files.commit(before)
    assert told == {str(tmp_path / name): stamp(tmp_path / name) for name in ("a", "b")}
    assert [told[str(tmp_path / name)][0] for name in ("a", "b")] == [2, 3]
    write_whole(tmp_path / "a", b"34")
    assert stamp(tmp_path / "a") != told[str(tmp_path / "a")], "another file of the same size"
    assert stamp(tmp_path / "none") is None


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for name in (pipe, tmp_path):
        assert why_no_file(name)
        with pytest.raises(OSError, match="device" if name == pipe else "directory"):
            write_whole(name, b"x")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]
    assert why_no_file(os.devnull)
    assert why_no_file(tmp_path / "new") is None
