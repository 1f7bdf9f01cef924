"""Accuracy in the loop: what costs too much is undone or refused, and the file that is left scores as said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import effic
from effic.cli.main import main
from effic.guard import Accuracy
from effic.ir.errors import CheckFailedError, UsageError
from effic.metric_data import MetricData
from effic.metrics import score
from effic.models import digits_path, digits_test

DIGITS = digits_path()
COARSE = "quantize-rtn{bits=2,symmetric=false,min_size=0,group_size=-1,kinds=[Conv,MatMul,Gemm]}"
"""Costs thirty points of top-1."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = digits_test()
    path = tmp_path_factory.mktemp("digits") / "test.npz"
    np.savez(path, x=images, labels=labels)
    return path


def test_a_pass_that_costs_too_much_is_undone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    wanted = Accuracy("top1", data, max_drop=0.5)
    report = effic.optimize(
        DIGITS,
        f"fuse-conv-bn,{COARSE},quantize-rtn{{bits=8}}",
        output=out,
        accuracy=wanted,
        target="portable",
    )
    fused, coarse, fine, _ = report.steps
    assert (fused.rolled_back, fine.rolled_back) == (None, None)
    assert coarse.rolled_back is not None
    assert "a drop of" in coarse.rolled_back
    assert not coarse.changed
    assert coarse.bytes_after == coarse.bytes_before
    assert fine.changed
    # Nothing of the undone pass is left: the file is that of the run without it.
    plain = tmp_path / "plain.onnx"
    effic.optimize(DIGITS, "fuse-conv-bn,quantize-rtn{bits=8}", output=plain, target="portable")
    assert out.read_bytes() == plain.read_bytes()
    model = effic.read_onnx(out)
    assert [r.text for r in model.record] == [r.text for r in effic.read_onnx(plain).record]
    # And the score in the report is that of the file.
    artifact = effic.OrtArtifact.load(out)
    found = score("top1", artifact.run, MetricData.load(data, model))
    assert report.accuracy is not None
    assert report.accuracy["after"]["value"] == found.value


def test_or_the_run_fails_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    wanted = Accuracy("top1", data, max_drop=0.5, on_drop="fail")
    with pytest.raises(
        CheckFailedError, match=r"quantize-rtn\{bits=2.* costs too much: top1 0\.\d+ after 0\.9889"
    ):
        effic.optimize(DIGITS, COARSE, output=tmp_path / "out.onnx", accuracy=wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_metric_without_limits_only_measures(data: Path) -> None:
    report = effic.optimize(DIGITS, COARSE, accuracy=Accuracy("top1", data))
    assert report.steps[0].changed
    assert report.accuracy is not None
    assert report.accuracy["drop"] > 20


def test_what_lowering_costs_fails_the_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effic.backends.ort.targets import Portable

    def spoil(self: Portable, model: effic.Model, remarks: effic.Remarks) -> effic.Model:
        effic.run_passes(model, effic.parse_passes(COARSE), check="off")
        return model

    monkeypatch.setattr(Portable, "lower", spoil)
    wanted = Accuracy("top1", data, max_drop=0.5)
    with pytest.raises(CheckFailedError, match="the finished model lost too much"):
        effic.optimize(DIGITS, "eliminate-dead-code", target="portable", accuracy=wanted)


def test_bounds_hold_for_the_original_too(data: Path) -> None:
    with pytest.raises(CheckFailedError, match="the original model scores"):
        effic.optimize(DIGITS, "fuse-conv-bn", accuracy=Accuracy("top1", data, bound=0.999))
    report = effic.optimize(DIGITS, COARSE, accuracy=Accuracy("sqnr", data, bound=30))
    assert report.steps[0].rolled_back is not None
    assert "the bound is 30" in report.steps[0].rolled_back


def test_limits_that_mean_nothing(data: Path) -> None:
    with pytest.raises(UsageError, match="sqnr has no drop"):
        Accuracy("sqnr", data, max_drop=1)
    with pytest.raises(UsageError, match="at least 0"):
        Accuracy("top1", data, max_drop=-1)
    with pytest.raises(UsageError, match="needs data"):
        Accuracy("top1")


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, args)
    return result.exit_code, result.output


def test_the_command_line(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    common = ("optimize", str(DIGITS), "--metric", "top1", "--data", str(data), "--max-drop", "0.5")
    code, text = run(*common, "--passes", COARSE, "-o", str(out))
    assert code == 0
    assert "rolled back: quantize-rtn" in text
    assert "top1: 0.9889 → 0.9889 (the same), on 450" in text
    code, text = run(*common, "--passes", COARSE, "--on-drop", "fail", "-o", str(tmp_path / "no.onnx"))
    assert code == 1
    assert not (tmp_path / "no.onnx").exists()
    code, text = run(*common, "--passes", COARSE, "--require-change")
    assert code == 1
    assert "changed nothing" in text


def test_a_recipe_holds_limits(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[accuracy]\nmetric = "top1"\ndata = "{data}"\nmax_drop = 0.5\n'
        '[[pass]]\nname = "quantize-rtn"\nbits = 2\nmin_size = 0\ngroup_size = -1\nsymmetric = false\n'
        'kinds = ["Conv", "Gemm", "MatMul"]\n'
    )
    code, text = run("optimize", str(DIGITS), "--recipe", str(recipe), "--dry-run", "--json")
    assert code == 0
    assert json.loads(text[: text.rindex("}") + 1])["steps"][0]["rolled_back"]
    # The command line counts before the recipe.
    code, text = run("optimize", str(DIGITS), "--recipe", str(recipe), "--dry-run", "--max-drop", "90")
    assert "rolled back" not in text
    recipe.write_text('[accuracy]\nmetrics = "top1"\n[[pass]]\nname = "fuse-conv-bn"\n')
    code, text = run("optimize", str(DIGITS), "--recipe", str(recipe))
    assert (code, "did you mean 'metric'" in text) == (2, True)


def test_compare_scores_both(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "coarse.onnx"
    effic.optimize(DIGITS, COARSE, output=out)
    common = ("compare", str(DIGITS), str(out), "--metric", "top1", "--data", str(data))
    code, text = run(*common)
    assert code == 0
    assert "top1: 0.9889 → 0.6" in text
    assert run(*common, "--max-drop", "5")[0] == 1
    assert run(*common, "--bound", "0.6")[0] == 0
    code, text = run(
        "compare", str(DIGITS), str(out), "--metric", "agreement", "--data", str(data), "--bound", "0.9"
    )
    assert (code, "the bound is 0.9" in text) == (1, True)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--max-drop", "1"), "--max-drop does nothing without a metric"),
        (("--metric", "top1"), "needs data"),
        (("--metric", "top9", "--data", "x.npz"), "there is no metric 'top9'"),
        (("--metric", "top1", "--data", "no.npz"), "do not exist"),
        (
            ("--metric", "top1", "--data", "no.npz", "--on-drop", "fail"),
            "--on-drop does nothing without a limit",
        ),
        (("--metric", "top1", "--data", "no", "--images", "size=3"), "there is no 'size'"),
        (("--metric", "top1", "--data", "no", "--images", "mean=[a]"), "is no number"),
    ],
)
def test_wrong_options(args: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    code, text = run("optimize", str(DIGITS), *args, "-o", str(tmp_path / "o.onnx"))
    assert code == 2
    assert reason in text
    assert not (tmp_path / "o.onnx").exists()
