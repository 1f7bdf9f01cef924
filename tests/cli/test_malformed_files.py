"""Every kind of broken or hostile file, through the command line: exit code 2 and one sentence."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from effic.cli.main import main


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
