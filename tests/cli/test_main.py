"""How every command starts and ends: cheap help, one sentence per error, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from effic.cli import main as cli
from effic.ir import errors

HEAVY = {"onnx_ir", "onnx", "onnxruntime", "torch", "tvm", "numpy", "rich", "networkx", "ml_dtypes"}


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.main, list(args))


def effic(*args: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "effic.cli.main", *args], capture_output=True, text=True, cwd="/", **options
    )


@pytest.mark.parametrize("args", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom effic.cli.main import main\n"
        f"try:\n    main({args})\nexcept SystemExit as e:\n    assert not e.code\n"
        "print('loaded:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert "effic" in done.stdout
    assert not HEAVY & set(done.stdout.partition("loaded:")[2].split())


def test_help_imports_no_metadata_and_no_command() -> None:
    code = (
        "import sys\nfrom effic.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "ours = [m for m in sys.modules if m.startswith('effic')]\n"
        "assert ours == ['effic', 'effic.cli', 'effic.cli.main'], ours\n"
        "assert 'importlib.metadata' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd="/")


def test_every_command_is_listed_and_has_help() -> None:
    listed = invoke("--help").stdout
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"{name}  " in listed
        result = invoke(name, "--help")
        assert result.exit_code == 0, result.output
        assert "Usage: main" in result.stdout or "Usage: effic" in result.stdout
        assert "--json" in result.stdout
        assert summary.endswith((".", ")."))


def test_the_program_runs_as_installed() -> None:
    done = effic("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("effic")


def test_a_mistyped_command_is_answered_with_the_near_miss() -> None:
    result = invoke("optimise", "model.onnx")
    assert result.exit_code == 2
    assert result.stderr.startswith("effic: error: there is no command 'optimise' (did you mean 'optimize'?)")
    assert result.stdout == ""


@pytest.mark.parametrize(
    "args",
    [["show"], ["show", "--nope", "m"], ["optimize", "m", "--check", "sometimes"], ["compare", "a"], ["-x"]],
)
def test_usage_errors_leave_with_two(args: list[str]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("effic: error: ")
    assert "--help'." in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("what, where, what to do"), 2),
        (errors.InvalidModelError("broken"), 2),
        (errors.CheckFailedError("moved"), 1),
        (errors.BudgetExceededError("over"), 1),
        (errors.NotMeasuredError("no"), 3),
        (errors.MissingExtraError("torch", "torch", "capture"), 3),
        (PermissionError(13, "Permission denied", "/x"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_ends_as_one_sentence(monkeypatch, error: BaseException, code: int) -> None:
    @click.command()
    @click.option("--json", is_flag=True)
    def failing(json: bool) -> None:
        raise error

    monkeypatch.setattr("effic.cli.show.show", failing)
    result = invoke("show", "--json")
    assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("effic: error: ")
    assert "Traceback" not in result.output
    printed = json.loads(result.stdout)
    assert printed == {"error": lines[0].removeprefix("effic: error: "), "exit_code": code}


def test_errors_print_no_json_unless_asked() -> None:
    result = invoke("show", "nowhere.onnx")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere.onnx" in result.stderr


def test_a_bug_is_not_dressed_up(monkeypatch) -> None:
    @click.command()
    def failing() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("effic.cli.show.show", failing)
    assert isinstance(invoke("show").exception, ZeroDivisionError)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "effic.cli.main", "passes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
        assert (process.wait(), complaint) == (0, b"")


def test_output_survives_a_narrow_encoding(tmp_path: Path) -> None:
    done = effic("passes", env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
