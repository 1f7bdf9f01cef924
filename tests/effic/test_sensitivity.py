"""sensitivity: each site alone, ranked; the CSV, the picture and the texts it proposes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import effic
from effic.cli.main import main
from effic.compare import Bounds
from effic.guard import Accuracy
from effic.ir.errors import UsageError
from effic.models import digits_path, digits_test
from effic.sensitivity import Sensitivity, sensitivity
from effic.trial import Trial

DIGITS = digits_path()
COARSE = "fuse-conv-bn,quantize-rtn{bits=3,min_size=0,group_size=-1,kinds=[Conv,MatMul,Gemm]}"


@pytest.fixture(scope="module")
def unscored() -> Sensitivity:
    """By the outputs alone: ten runs of the pass and the model, which several tests look at."""
    return sensitivity(DIGITS, COARSE)


def scoring() -> Accuracy:
    images, labels = digits_test()
    return Accuracy("top1", {"x": images, "labels": labels})


def test_every_site_is_measured_alone() -> None:
    found = sensitivity(DIGITS, COARSE, accuracy=scoring())
    assert (found.number, len(found.rows)) == (2, 10)
    worst = found.rows[0]
    # The same by hand: the pass with everything else in skip.
    others = ",".join(f'"{row.site}"' for row in found.rows if row.site != worst.site)
    before = effic.read_onnx(DIGITS)
    effic.run_passes(before, effic.parse_passes("fuse-conv-bn"), check="off")
    alone = before.clone()
    text = COARSE.partition(",")[2].replace("}", f",skip=[{others}]}}")
    effic.run_passes(alone, effic.parse_passes(text), check="off")
    figures = Trial(before, bounds=Bounds(rtol=1))(alone).figures
    assert (worst.max_rel, worst.sqnr_db) == pytest.approx((figures["max_rel"], figures["sqnr_db"]))
    assert all(row.bytes_saved is not None and row.bytes_saved > 0 for row in found.rows)
    assert all(
        row.score is not None and row.worse == pytest.approx(found.original - row.score) for row in found.rows
    )
    order = [(row.worse, row.max_rel) for row in found.rows]
    assert order == sorted(order, reverse=True)


def test_leaving_the_costliest_out_helps_more_than_the_cheapest(unscored: Sensitivity) -> None:
    found = unscored
    trial = Trial(effic.read_onnx(DIGITS), bounds=Bounds(rtol=1))

    def distance(text: str) -> float:
        model = effic.read_onnx(DIGITS)
        effic.run_passes(model, effic.parse_passes(text), check="off")
        return trial(model).badness

    skipped, finer = found.spare(3)
    assert finer is not None
    cheapest = ",".join(f'"{row.site}"' for row in found.rows[-3:])
    assert distance(skipped) < distance(COARSE.replace("kinds", f"skip=[{cheapest}],kinds"))
    assert distance(finer) < distance(COARSE)


def test_files(tmp_path: Path, unscored: Sensitivity) -> None:
    pytest.importorskip("matplotlib")
    found = unscored
    found.write_csv(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["site"] for row in rows] == [row.site for row in found.rows]
    assert [float(row["max_rel"]) for row in rows] == [row.max_rel for row in found.rows]
    found.draw(tmp_path / "rows.svg")
    text = (tmp_path / "rows.svg").read_text()
    assert "quantize-rtn" in text or "<svg" in text
    found.draw(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.csv", "rows.png", "rows.svg"]
    with pytest.raises(UsageError, match="none of"):
        found.draw(tmp_path / "rows.txt")


def test_what_cannot_be_told_apart() -> None:
    with pytest.raises(UsageError, match="no pass of the sequence has sites"):
        sensitivity(DIGITS, "eliminate-dead-code")
    with pytest.raises(UsageError, match="no pass number 9"):
        sensitivity(DIGITS, COARSE, number=9)
    with pytest.raises(UsageError, match="pass 1 has sites"):
        sensitivity(DIGITS, "eliminate-dead-code", number=1)


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sensitivity", str(DIGITS), *args])
    return result.exit_code, result.output


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits_test()
    np.savez(tmp_path / "d.npz", x=images[:64], labels=labels[:64])
    metric = ("--metric", "top1", "--data", str(tmp_path / "d.npz"))
    code, text = run("--passes", COARSE, *metric, "--csv", str(tmp_path / "s.csv"), "--spare", "2")
    assert code == 0
    assert "each of its 10 sites alone" in text
    assert "to leave the 2 costliest sites out:" in text
    assert "=8" in text
    assert (tmp_path / "s.csv").is_file()
    code, text = run("--passes", COARSE, "--json")
    assert len(json.loads(text)["rows"]) == 10
    assert run()[0] == 2
    assert run("--passes", COARSE, "--spare", "0")[0] == 2
    assert run("--passes", COARSE, "--picture", "x.txt")[0] == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, text = run("--passes", COARSE, "--picture", str(tmp_path / "x.png"))
    assert (code, "effic[report]" in text) == (3, True)
