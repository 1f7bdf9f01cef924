"""What a run that was killed while its files took their names leaves: its own goes, anybody else's stays."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effic.ir.errors import UsageError
from effic.ir.onnx_format import read_onnx
from effic.ir.weights import weight_sites
from effic.optimize import Report
from tests.effic.test_resume import LAYERS, Stopped, begun, count, job

__all__ = ["begun", "count", "job"]


def killed_between(job: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """End a run after the data have their name, and before the model has."""
    replace = os.replace

    def replaced(old: Any, new: Any) -> None:
        if os.path.basename(new) == "out.onnx":
            raise Stopped
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        with pytest.raises(Stopped):
            job("quantize-easyquant", "out.onnx", calib=None, resume=True, external=True, **options)
    gc.collect()


def test_data_that_a_killed_run_left_goes(
    job: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    job("quantize-easyquant", "out.onnx", calib=None, external=True)
    want = Path("out.onnx").read_bytes(), Path("out.onnx.data").read_bytes()
    for path in Path().glob("out.*"):
        path.unlink()
    killed_between(job, monkeypatch)
    assert Path("out.onnx.data").exists()
    assert not Path("out.onnx").exists()
    job("quantize-easyquant", "out.onnx", calib=None, resume=True, external=True)
    assert (Path("out.onnx").read_bytes(), Path("out.onnx.data").read_bytes()) == want
    assert sorted(p.name for p in Path().glob("out.*")) == ["out.effic.json", "out.onnx", "out.onnx.data"]


def test_data_of_somebody_else_stay(job: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    killed_between(job, monkeypatch)
    Path("out.onnx.data").write_bytes(b"mine")
    job("quantize-easyquant", "out.onnx", calib=None, resume=True, external=True)
    assert Path("out.onnx.data").read_bytes() == b"mine"
    assert weight_sites(read_onnx("out.onnx"))


def test_what_a_killed_run_was_to_replace_is_replaced_and_nothing_else(
    job: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out.onnx").write_bytes(b"older")
    killed_between(job, monkeypatch, force=True)
    again = Path("out.onnx").stat()
    Path("out.onnx").write_bytes(b"other")
    os.utime("out.onnx", ns=(again.st_atime_ns, again.st_mtime_ns + 1))
    with pytest.raises(UsageError, match="give --force"):
        job("quantize-easyquant", "out.onnx", calib=None, resume=True, external=True)
    assert Path("out.onnx").read_bytes() == b"other"
    os.utime("out.onnx", ns=(again.st_atime_ns, again.st_mtime_ns))
    job("quantize-easyquant", "out.onnx", calib=None, resume=True, external=True)
    assert len(weight_sites(read_onnx("out.onnx"))) == LAYERS
    assert len(list(Path().glob("out.onnx*.data"))) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"out.onnx": 3}', '{"out.onnx": [[1], null, 7]}', "[" * 100_000])
def test_a_damaged_note_of_the_saving_allows_nothing(begun: Any, text: str) -> None:
    Path("out.onnx.progress/saving").write_text(text)
    Path("out.onnx").write_bytes(b"mine")
    with pytest.raises(UsageError, match="give --force"):
        begun()


def test_pipes_among_the_progress_are_not_waited_for(begun: Any) -> None:
    first, _ = sorted(Path("out.onnx.progress").glob("01-quantize-gptq-[0-9a-f]*.kept"))
    first.unlink()
    os.mkfifo(first)
    run = Path("out.onnx.progress/run.json")
    text = run.read_text()
    run.unlink()
    os.mkfifo(run)
    with pytest.raises(UsageError, match="is damaged"):
        begun()
    run.unlink()
    run.write_text(text)
    with pytest.raises(UsageError, match=r"kept"):
        begun()
    first.unlink()
    assert begun().output == "out.onnx"
