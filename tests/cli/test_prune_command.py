"""``effic optimize`` with pruning passes, and what ``explain`` and ``show`` say of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from effic.cli.main import main
from effic.ir.model import Model
from effic.models.builders import BUILDERS


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Model(BUILDERS["encoder"]()).save("encoder.onnx")
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_pruning_is_reported_and_shown(encoder: Path) -> None:
    args = ["--passes", "prune-wanda{n=2,m=4}", "--calib", "random", "-o", "out.onnx", "--report", "r.json"]
    result = invoke("optimize", "encoder.onnx", *args)
    assert result.exit_code == 0, result.output
    remarks = json.loads(Path("r.json").read_text())["steps"][0]["remarks"]
    pruned = [r for r in remarks if r["kind"] == "passed"]
    assert len(pruned) == 13
    for remark in pruned:
        assert remark["data"]["pattern"] == "2:4"
        assert remark["data"]["density"] == 0.5
        assert 0.5 < remark["data"]["kept_energy"] < 1
        assert remark["data"]["output_sqnr_db"] > 0
    assert any("get no faster" in r["text"] for r in remarks)
    shown = invoke("show", "out.onnx")
    assert "sparse weights of" in shown.output
    assert "2:4" in shown.output


def test_masks_from_a_file(encoder: Path) -> None:
    mask = np.arange(64) % 4 < 2
    np.savez("masks.npz", **{"pooler.weight": np.broadcast_to(mask[:, None], (64, 64))})
    result = invoke("optimize", "encoder.onnx", "--passes", "apply-masks{masks=masks.npz}", "-o", "out.onnx")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["prune-magnitude", "prune-wanda", "prune-sparsegpt", "apply-masks"])
def test_explain(name: str) -> None:
    result = invoke("explain", name)
    assert result.exit_code == 0
    for word in ("Before", "After", "Missed", "n of every m" if name != "apply-masks" else "masks"):
        assert word in result.output


def test_what_cannot_be_is_refused_before_anything_is_done(encoder: Path) -> None:
    for passes, reason in (
        ("prune-wanda", "prune-wanda needs calibration data"),
        ("prune-magnitude{n=4,m=4}", "4:4 is no sparsity pattern"),
        ("prune-magnitude{density=0.5,m=8}", "m does nothing with density=0.5"),
        ("apply-masks{masks=none.npz}", "cannot read the masks in none.npz"),
    ):
        result = invoke("optimize", "encoder.onnx", "--passes", passes, "-o", "out.onnx")
        assert result.exit_code == 2, result.output
        assert reason in " ".join(result.stderr.split())
        assert not Path("out.onnx").exists()
