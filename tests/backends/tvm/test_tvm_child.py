"""What happens in the child stays there: its crashes are sentences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from effic.backends.tvm.child import run_in_child
from effic.ir.errors import MissingToolError, NotMeasuredError

FUNCTIONS = """
import os, signal, sys, time
from effic.ir.errors import MissingToolError

def add(request, tell):
    tell("adding", 1, 2)
    print("what libraries say goes to a log")
    return {"sum": sum(request["numbers"])}

def crash(request, tell):
    tell("compiling", 0, 0)
    os.kill(os.getpid(), getattr(signal, request["signal"]))
    time.sleep(60)

def fail(request, tell):
    tell("linking", 0, 0)
    raise RuntimeError("nobody foresaw this")

def leave(request, tell):
    tell("loading", 0, 0)
    os._exit(7)

def refuse(request, tell):
    raise MissingToolError("there is no compiler")

def wait(request, tell):
    tell(str(os.getpid()), 0, 0)
    time.sleep(60)

def torch(request, tell):
    return {"torch": sys.modules.get("torch", 0) is None}
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "some_functions.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))


def test_stages_are_heard_of_and_the_result_comes_back(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    found = run_in_child(
        "the sum", "some_functions:add", {"numbers": [1, 2]}, tmp_path, lambda *a: heard.append(a)
    )
    assert found == {"sum": 3}
    assert heard == [("adding", 1, 2)]
    assert "goes to a log" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("function", "request_", "said"),
    [
        ("crash", {"signal": "SIGSEGV"}, r"the build for TVM crashed \(SIGSEGV\) while compiling$"),
        ("crash", {"signal": "SIGILL"}, r"crashed \(SIGILL\) while compiling$"),
        (
            "crash",
            {"signal": "SIGKILL"},
            r"was killed \(SIGKILL\), which most often means that memory ran out",
        ),
        ("fail", {}, r"failed \(exit code 1: RuntimeError: nobody foresaw this\) while linking$"),
        ("leave", {}, r"failed \(exit code 7: it said nothing\) while loading$"),
    ],
)
def test_a_crash_is_one_sentence_that_names_the_stage(
    tmp_path: Path, function: str, request_: dict[str, str], said: str
) -> None:
    with pytest.raises(NotMeasuredError, match=said) as caught:
        run_in_child("the build", f"some_functions:{function}", request_, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_refusal_keeps_its_class_and_text(tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match=r"^there is no compiler$") as caught:
        run_in_child("the build", "some_functions:refuse", {}, tmp_path)
    assert caught.value.exit_code == 3


def test_an_interrupt_ends_the_child(tmp_path: Path) -> None:
    started: list[int] = []

    def interrupt(text: str, *_: int) -> None:
        started.append(int(text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_child("the build", "some_functions:wait", {}, tmp_path, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_the_child_has_no_torch(tmp_path: Path) -> None:
    assert run_in_child("the build", "some_functions:torch", {}, tmp_path) == {"torch": True}
    assert json.loads((tmp_path / "request.json").read_text())["request"] == {}
