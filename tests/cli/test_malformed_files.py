"""Every kind of broken or hostile file, through the command line: exit code 2 and one sentence."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from effic.cli.main import main
from effic.ir.errors import UsageError
from effic.ir.onnx_format import read_onnx
from effic.models import digits_path


def _load() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "malformed.py"
    spec = importlib.util.spec_from_file_location("effic_malformed_for_cli", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


malformed = _load()


@pytest.mark.parametrize("kind", malformed.CORPUS)
def test_one_sentence_and_nothing_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = malformed.CORPUS[kind](tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(
        main,
        ["optimize", str(path), "--passes", "eliminate-dead-code", "-o", str(tmp_path / "out.onnx")],
    )
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("effic: error: ")
    assert "Traceback" not in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["show", "compare", "bench"])
def test_the_other_commands_refuse_too(command: str, tmp_path: Path) -> None:
    for kind in list(malformed.CORPUS)[::8]:
        folder = tmp_path / kind.replace("/", "_").replace(" ", "_")
        folder.mkdir()
        path = str(malformed.CORPUS[kind](folder))
        result = CliRunner().invoke(main, [command, path, *([path] if command == "compare" else [])])
        assert result.exit_code == 2, (kind, result.output)
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_paths_that_onnx_cannot_name_are_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model\udcff.onnx").write_bytes(digits_path().read_bytes())
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    for argv in (
        ("show", "model\udcff.onnx"),
        ("optimize", "model\udcff.onnx", "-o", "out.onnx"),
        ("optimize", str(digits_path()), "-o", "out\udcff.onnx"),
    ):
        done = CliRunner().invoke(main, argv)
        assert done.exit_code == 2, done.output
        assert done.output.count("\n") == 1
        assert "is not valid UTF-8, as ONNX needs it; rename it" in done.output
    with pytest.raises(UsageError, match="not valid UTF-8"):
        read_onnx(digits_path()).save("out\udcff.onnx")
    assert sorted(os.listdir()) == before
