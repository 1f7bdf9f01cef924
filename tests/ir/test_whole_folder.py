from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from effic.ir.errors import UsageError
from effic.ir.whole_folder import WholeFolder, why_not_replace


def fill(place: WholeFolder, text: str) -> None:
    Path(place.path, "mark").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with WholeFolder(tmp_path / "out") as place:
        fill(place, "new")
        assert names(tmp_path) == [Path(place.path).name]
        place.commit()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "mark").read_text() == "new"
    with pytest.raises(FileNotFoundError), WholeFolder(tmp_path / "other") as place:
        Path(place.path, "lacking").read_text()
    assert names(tmp_path) == ["out"]


def test_an_older_one_is_replaced_when_asked_for_and_ours(tmp_path: Path) -> None:
    for text, force in (("old", False), ("new", True)):
        with WholeFolder(tmp_path / "out") as place:
            fill(place, text)
            called: list[str] = []
            place.commit(mark="mark", force=force, before=lambda new: called.append(*new))  # noqa: B023
        assert called == [str(tmp_path / "out")]
    assert (tmp_path / "out" / "mark").read_text() == "new"
    assert names(tmp_path) == ["out"]
    with WholeFolder(tmp_path / "out") as place, pytest.raises(UsageError, match="--force"):
        place.commit(mark="mark")
    with WholeFolder(tmp_path / "out") as place, pytest.raises(UsageError, match="has no manifest"):
        place.commit(mark="manifest", force=True)
    assert (tmp_path / "out" / "mark").read_text() == "new"


def test_a_file_or_a_link_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in (why_not_replace(tmp_path / "file", "mark", True) or "")
    (tmp_path / "link").symlink_to(tmp_path)
    assert why_not_replace(tmp_path / "link", None, True) is not None
    assert why_not_replace(tmp_path / "nothing", "mark", False) is None


KILLED = """
import sys, time
from effic.ir.whole_folder import WholeFolder
with WholeFolder(sys.argv[1]) as place:
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        (left,) = names(tmp_path)
        with WholeFolder(tmp_path / "mine"):
            assert left in names(tmp_path)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    with WholeFolder(tmp_path / "mine") as place:
        assert names(tmp_path) == [Path(place.path).name]
