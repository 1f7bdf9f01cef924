"""A repository with a gate, built here: good and bad changes, and what the gate says to each."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

import effic
from effic.cli.main import main
from effic.models import digits_path, digits_test

QUANTIZE = "quantize-rtn{kinds=[Conv,MatMul,Gemm],min_size=0,group_size=-1,bits=8}"
CONFIG = """\
[gate]
baseline = "effic-baseline.json"

[gate.models."out/digits.onnx"]
file_bytes = { max = "125 kB", max_growth = "1%" }
nodes = { max_growth = 0 }
float_weights = { max = 0 }
decoded_weights = { max = 0 }
ops_allowed = "ort-cpu"
components."*fc*".weight_bytes = { max_growth = "1%" }
accuracy = { metric = "top1", data = "val.npz", min = 0.97, max_drop = 0.5, reference = "digits.onnx" }
agreement = { reference = "digits.onnx", min_sqnr = 20 }
"""


def build(passes: str = f"fuse-conv-bn,{QUANTIZE}", target: str = "ort-cpu") -> None:
    """What the repository's build does."""
    effic.optimize("digits.onnx", passes, output="out/digits.onnx", target=target, force=True, check="off")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, with a baseline of a good build."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(digits_path(), folder / "digits.onnx")
    images, labels = digits_test()
    np.savez(folder / "val.npz", images=images[:200], labels=labels[:200])
    (folder / "effic.toml").write_text(CONFIG)
    (folder / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build()
        shutil.copy("out/digits.onnx", "known_good.onnx")
        result = run("--update")
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def repository(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working copy of it."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(*options: str) -> Result:
    return CliRunner().invoke(main, ["gate", *options], catch_exceptions=False, env={"COLUMNS": "200"})


def verdicts(*options: str) -> dict[str, dict[str, Any]]:
    """By metric and bound."""
    report = json.loads(run("--json", *options).stdout)
    return {f"{v['metric']} {v['bound']}": v for v in report["verdicts"]}


def broken(found: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, verdict in found.items() if verdict["status"] == "broken"]


# -- good changes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda: None,
        lambda: build(),
        lambda: build(f"eliminate-identities,fuse-conv-bn,{QUANTIZE},eliminate-dead-code"),
        lambda: Path("README.md").write_text("words"),
    ],
    ids=["nothing", "built again", "passes that find nothing", "words"],
)
def test_a_good_change_is_kept(repository: Path, change: Callable[[], object]) -> None:
    change()
    result = run()
    assert result.exit_code == 0, result.output
    assert "budgets: 10 kept" in result.stdout


# -- bad changes -----------------------------------------------------------------------------------


def test_a_layer_doubled(repository: Path) -> None:
    """The last convolution is there twice; the second one copies its input, so that no output tells."""
    model = effic.read_onnx("digits.onnx")
    pool = next(model.nodes("AveragePool"))
    before = pool.inputs[0]
    assert before is not None
    delta = np.zeros((48, 48, 3, 3), np.float32)
    delta[range(48), range(48), 1, 1] = 1
    weight = model.add_initializer(model.graph, "block3.again.weight", delta)
    again = ir.node("Conv", [before, weight], {"pads": [1, 1, 1, 1]}, name="/block3/again/Conv")
    again.outputs[0].name, again.outputs[0].type = "again", before.type
    again.outputs[0].shape = before.shape
    model.graph.insert_before(pool, again)
    pool.replace_input_with(0, again.outputs[0])
    model.save("digits.onnx", force=True)
    build()
    found = verdicts()
    assert broken(found) == ["file_bytes max"]
    # The baseline is of a build from another model, which growth says nothing about unless told to.
    assert {n for n, v in found.items() if v["status"] == "unmeasured"} == {
        "file_bytes max_growth",
        "nodes max_growth",
        "weight_bytes of *fc* max_growth",
    }
    assert "another source model" in found["nodes max_growth"]["why"]
    assert run().exit_code == 1
    result = run("--allow-unlike", "--why")
    assert result.exit_code == 1
    assert "as allowed: out/digits.onnx" in result.stderr
    found = verdicts("--allow-unlike")
    assert set(broken(found)) == {"file_bytes max", "file_bytes max_growth", "nodes max_growth"}
    first = found["file_bytes max_growth"]["movers"][0]
    assert first["name"] == "block3.again.weight.codes"
    assert first["reader"] == "Conv '/block3/again/Conv'"
    assert first["before"] is None
    assert "Conv '/block3/again/Conv' → block3.again.weight.codes (new)" in result.stdout
    # The record beside the model tells which passes made it so, under the weight's name.
    assert [line.partition(":")[0] for line in first["said"]] == ["quantize-rtn", "lower"]
    assert first["said"][1] in " ".join(result.stdout.split())


def test_a_pass_skipped(repository: Path) -> None:
    build("fuse-conv-bn")
    found = verdicts()
    assert set(broken(found)) == {
        "file_bytes max",
        "file_bytes max_growth",
        "float_weights max",
        "weight_bytes of *fc* max_growth",
    }
    (mover,) = (m for m in found["file_bytes max"]["passes"] if m["name"] == "quantize-rtn")
    assert mover["after"] is None
    assert mover["saved_before"] > 200_000
    assert found["float_weights max"]["value"] == 10
    result = run("--why")
    assert result.exit_code == 1
    assert re.search(
        r"quantize-rtn\S* did not run; it took 2\d\d,\d\d\d B away in the baseline", result.stdout
    )
    assert (
        'to allow it, edit gate.models."out/digits.onnx".file_bytes.max in effic.toml, line 5'
        in result.stdout
    )


def test_an_unquantized_node_slipped_in(repository: Path) -> None:
    build(f"fuse-conv-bn,{QUANTIZE[:-1]},skip=[*fc2*]}}")
    found = verdicts()
    assert broken(found) == [
        "file_bytes max_growth",
        "float_weights max",
        "weight_bytes of *fc* max_growth",
    ]
    assert [m["name"] for m in found["float_weights max"]["movers"]] == ["Gemm '/fc2/Gemm'"]
    assert run().exit_code == 1


def test_a_slower_lowering(repository: Path) -> None:
    """Convolutions of 4 bits decoded at every run, 4 times as slow as decoded once."""
    four = f"fuse-conv-bn,{QUANTIZE.replace('bits=8', 'bits=4')}"
    build(four)
    shutil.copy("out/digits.onnx", "known_good.onnx")
    with (repository / "effic.toml").open("a") as file:
        file.write('latency = { reference = "known_good.onnx", max_ratio = 1.3, floor = 0.2 }\n')
    good = verdicts()
    assert good["latency max_ratio"]["status"] in ("ok", "unmeasured")  # a busy machine may be too noisy
    build(four, target="ort-cpu{decode=call}")
    found = next(v for _ in range(5) if (v := verdicts())["latency max_ratio"]["status"] != "unmeasured")
    assert {"decoded_weights max", "latency max_ratio"} <= set(broken(found))
    latency = found["latency max_ratio"]
    assert latency["value"] > latency["limit"] >= 1.5
    assert latency["limit"] == pytest.approx(1.3 + max(0.2, latency["noise"]))
    assert found["decoded_weights max"]["value"] == 8
    assert any("decode=call" in m["after"] for m in found["decoded_weights max"]["passes"])
    assert found["accuracy top1 min"]["status"] == "ok"
    assert run().exit_code == 1


def test_an_accuracy_loss(repository: Path) -> None:
    build(f"fuse-conv-bn,{QUANTIZE.replace('bits=8', 'bits=2')}")
    found = verdicts()
    assert broken(found) == ["accuracy top1 min", "accuracy top1 max_drop", "agreement min_sqnr"]
    drop = found["accuracy top1 max_drop"]
    assert drop["value"] == pytest.approx(100 * (0.99 - found["accuracy top1 min"]["value"]))
    assert drop["noise"] > 0
    result = run()
    assert result.exit_code == 1
    assert "UNDER  out/digits.onnx  accuracy top1" in result.stdout
    assert "line 11" in result.stdout


# -- what cannot be judged ---------------------------------------------------------------------------


def test_a_build_that_failed_is_no_pass(repository: Path) -> None:
    Path("out/digits.onnx").unlink()
    result = run()
    assert result.exit_code == 3
    assert "budgets: 10 not measured" in result.stdout


def test_a_build_that_was_cut_off_is_bad_input(repository: Path) -> None:
    path = Path("out/digits.onnx")
    path.write_bytes(path.read_bytes()[:5000])
    result = run()
    assert result.exit_code == 2
    assert "budgets: 10 failed" in result.stdout


def test_validation_data_that_went_missing(repository: Path) -> None:
    Path("val.npz").unlink()
    found = verdicts()
    assert {v["status"] for n, v in found.items() if n.startswith("accuracy")} == {"error"}
    assert found["agreement min_sqnr"]["status"] == "ok"
    assert run().exit_code == 2
