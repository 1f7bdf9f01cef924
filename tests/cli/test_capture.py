"""``effic capture``: files from factories and from .pt2, and one sentence when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from effic.cli.main import main

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

NETS = """
import torch
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (torch.randn(1, 1, 5, 5),), ({0: "batch"},)

def bad():
    class Bad(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Bad(), (torch.ones(1),)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch) -> str:
    name = f"cli_nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return name


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["capture", *args])


def test_a_factory_becomes_a_file(nets: str, tmp_path: Path) -> None:
    from effic.ir.onnx_format import read_onnx

    result = invoke(f"{nets}:tiny", "-o", "tiny.onnx")
    assert result.exit_code == 0, result.output
    assert "running your code" in result.stderr
    assert "eval mode" in result.stderr
    assert "tiny.onnx: 2 nodes" in result.stdout
    model = read_onnx(tmp_path / "tiny.onnx")
    assert [n.op_type for n in model.graph] == ["Conv", "BatchNormalization"]

    again = invoke(f"{nets}:tiny", "-o", "tiny.onnx")
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert "running your code" not in again.stderr

    forced = invoke(f"{nets}:tiny", "-o", "tiny.onnx", "--force", "--opset", "21", "--json")
    report = json.loads(forced.stdout)
    assert report["opset"] == 21
    assert report["nodes"] == 2
    assert report["inputs"] == {"input": ["batch", 1, 5, 5]}
    assert list(report["outputs"]) == ["output"]


def test_a_pt2_file_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "linear.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.randn(1, 3),)), path)
    result = invoke(str(path), "-o", str(tmp_path / "linear.onnx"))
    assert result.exit_code == 0, result.output
    assert "your code" not in result.stderr
    assert (tmp_path / "linear.onnx").is_file()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("NETS:bad", "control flow depends on the values in a tensor"),
        ("NETS:absent", "has no 'absent'"),
        ("model.pt2", "there is no file"),
        ("model", "write package.module:factory"),
    ],
)
def test_failures_are_one_sentence(nets: str, tmp_path: Path, source: str, sentence: str) -> None:
    result = invoke(source.replace("NETS", nets), "-o", "out.onnx")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out.onnx").exists()
