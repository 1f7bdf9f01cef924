"""``effic optimize``: what it writes, prints and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from effic.cli.main import main
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.models.builders import BUILDERS
from effic.show import inspect_model

FUSE = "eliminate-identities,fuse-conv-bn,eliminate-dead-code"


@pytest.fixture
def cnn(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Model(BUILDERS["cnn"]()).save("cnn.onnx")
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["optimize", *args])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_table_the_totals_and_the_file(cnn: Path) -> None:
    result = invoke("cnn.onnx", "--passes", FUSE, "--target", "portable", "-o", "out.onnx")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["pass", "changed", "missed", "weights", "nodes", "numerics", "time"]
    fused = next(line for line in lines if line.startswith("fuse-conv-bn"))
    assert "→" in fused
    assert "rounding" in fused
    assert any(line.startswith("total: weights ") and "outputs: rounding" in line for line in lines)
    assert lines[-1].startswith("wrote out.onnx (")
    assert all(len(line) <= 100 for line in lines[:5])
    assert "BatchNormalization" not in {n.op_type for n in read_onnx("out.onnx").nodes()}
    assert result.stderr == ""


def test_the_default_is_the_default_preset(cnn: Path) -> None:
    result = invoke("cnn.onnx", "-o", "out.onnx", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [step["name"] for step in report["steps"]][-2:] == ["eliminate-dead-code", "lower"]
    assert report["output"] == "out.onnx"
    assert report["file_bytes"][1] == (cnn / "out.onnx").stat().st_size
    preset = invoke("cnn.onnx", "--preset", "default", "-o", "again.onnx", "--json")
    assert json.loads(preset.stdout)["passes"] == report["passes"]


def test_the_report_file_has_all_of_it(cnn: Path) -> None:
    result = invoke("cnn.onnx", "--passes", FUSE, "-o", "out.onnx", "--report", "report.json", "-q")
    assert (result.exit_code, result.output) == (0, "")
    report = json.loads((cnn / "report.json").read_text())
    step = next(step for step in report["steps"] if step["name"] == "fuse-conv-bn")
    assert step["passed"] == len([r for r in step["remarks"] if r["kind"] == "passed"]) > 0
    assert {"bytes_before", "nodes_after", "macs", "seconds", "peak_memory", "verdict"} <= set(step)


def test_missed_reasons_are_grouped(cnn: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[N, 2, 4, 4] x, float[2, 2, 1, 1] w, float[2] s) => (float[N, 2, 4, 4] y)
    { c = Conv(x, w) y = BatchNormalization(c, s, s, s, s) }
    """
    Model(ir.from_onnx_text(text)).save("dynamic.onnx")
    result = invoke("dynamic.onnx", "--passes", "fuse-conv-bn,fuse-conv-bn", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "left alone:" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("  fuse-conv-bn: ")]
    assert "and 1 more: " in line


def test_nothing_is_written_without_an_output(cnn: Path) -> None:
    result = invoke("cnn.onnx", "--passes", FUSE)
    assert result.exit_code == 0
    assert "the model was not written; give -o" in result.stderr
    dry = invoke("cnn.onnx", "--passes", FUSE, "-o", "out.onnx", "--dry-run")
    assert "dry run: the model was not written" in dry.stderr
    assert files(cnn) == {"cnn.onnx"}


def test_recipes(cnn: Path) -> None:
    (cnn / "r.toml").write_text('target = "portable"\ncheck = "final"\n[[pass]]\nname = "fuse-conv-bn"\n')
    result = invoke("cnn.onnx", "--recipe", "r.toml", "-o", "out.onnx", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["passes"], report["target"]) == ("fuse-conv-bn", "portable")
    override = invoke("cnn.onnx", "--recipe", "r.toml", "--target", "ort-cpu", "--dry-run", "--json")
    assert json.loads(override.stdout)["target"] == "ort-cpu"


def test_looking_on(cnn: Path) -> None:
    result = invoke(
        "cnn.onnx",
        "--passes",
        FUSE,
        "--print-after",
        "fuse-conv-bn",
        "--dump-dir",
        "steps",
        "--dry-run",
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.count("--- after ") == 1
    assert "Conv" in result.stderr
    json.loads(result.stdout)
    assert files(cnn / "steps") == {
        "01-eliminate-identities.onnx", "02-fuse-conv-bn.onnx", "03-eliminate-dead-code.onnx",
    }  # fmt: skip
    assert read_onnx(cnn / "steps" / "02-fuse-conv-bn.onnx").graph


def test_external_data_on_request(cnn: Path) -> None:
    Model(BUILDERS["encoder"](vocab=2000)).save("big.onnx")
    assert (
        invoke("big.onnx", "--passes", "eliminate-dead-code", "--external-data", "-o", "e.onnx").exit_code
        == 0
    )
    assert (
        invoke("big.onnx", "--passes", "eliminate-dead-code", "--single-file", "-o", "s.onnx").exit_code == 0
    )
    assert {"e.onnx", "e.onnx.data", "s.onnx"} <= files(cnn)
    assert "s.onnx.data" not in files(cnn)
    assert inspect_model("e.onnx").measurement.file_bytes > 1.0 * inspect_model("e.onnx").cost.weight_bytes


@pytest.mark.parametrize(
    ("args", "code", "parts"),
    [
        (["nowhere.onnx"], 2, ["nowhere.onnx"]),
        ([".", "-o", "o.onnx"], 2, ["."]),
        (["cnn.onnx", "--passes", "fuse-conv-bm"], 2, ["did you mean 'fuse-conv-bn'?", "^"]),
        (["cnn.onnx", "--passes", "fuse-conv-bn{"], 2, ["expected", "^"]),
        (["cnn.onnx", "--passes", ""], 2, ["empty"]),
        (["cnn.onnx", "--preset", "defalt"], 2, ["did you mean 'default'?"]),
        (["cnn.onnx", "--preset", "int4", "--passes", "fuse-conv-bn"], 2, ["exclude each other"]),
        (["cnn.onnx", "--recipe", "none.toml"], 2, ["none.toml"]),
        (["cnn.onnx", "--target", "ort-cpy", "--passes", FUSE], 2, ["did you mean 'ort-cpu'?"]),
        (["cnn.onnx", "--passes", FUSE, "-o", "cnn.onnx"], 2, ["cnn.onnx exists", "--force"]),
        (["cnn.onnx", "--passes", FUSE, "-o", "no/where.onnx"], 2, ["folder no "]),
        (["cnn.onnx", "--passes", FUSE, "--report", "no/where.json"], 2, ["folder no "]),
        (["cnn.onnx", "--passes", FUSE, "--report", "."], 2, ["is a folder"]),
        (["cnn.onnx", "--passes", FUSE, "--inputs", "none.npz"], 2, ["none.npz"]),
        (
            ["cnn.onnx", "--passes", FUSE, "--print-after", "fuse-conv-bm"],
            2,
            ["did you mean 'fuse-conv-bn'?"],
        ),
        (["cnn.onnx", "--passes", "quantize-rtn{bits=5}"], 2, ["bits"]),
        (["cnn.onnx", "--passes", "fuse-conv-bn,fuse-conv-bn", "--require-change"], 1, ["changed nothing"]),
    ],
)
def test_refusals(cnn: Path, args: list[str], code: int, parts: list[str]) -> None:
    before = (cnn / "cnn.onnx").read_bytes()
    result = invoke(*args, "--json")
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("effic: error: ")
    for part in parts:
        assert part in result.stderr
    assert json.loads(result.stdout)["exit_code"] == code
    assert files(cnn) == {"cnn.onnx"}
    assert (cnn / "cnn.onnx").read_bytes() == before


def test_writing_over_the_input_by_force(cnn: Path) -> None:
    result = invoke("cnn.onnx", "--passes", FUSE, "-o", "cnn.onnx", "--force")
    assert result.exit_code == 0, result.output
    assert "BatchNormalization" not in {n.op_type for n in read_onnx("cnn.onnx").nodes()}


def test_what_cannot_be_run_leaves_with_three(cnn: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 20, "a" : 1]> net (float[4] x) => (float[4] y) { y = a.Odd(x) }'
    )
    Model(ir.from_onnx_text(text)).save("odd.onnx")
    result = invoke("odd.onnx", "--passes", "eliminate-dead-code", "-o", "out.onnx")
    assert result.exit_code == 3
    assert "out.onnx" not in files(cnn)
    assert (
        invoke("odd.onnx", "--passes", "eliminate-dead-code", "-o", "out.onnx", "--check", "off").exit_code
        == 0
    )


def test_given_inputs(cnn: Path) -> None:
    shape = (2, *[int(d) for d in read_onnx("cnn.onnx").graph.inputs[0].shape[1:]])  # type: ignore[index, arg-type]
    name = read_onnx("cnn.onnx").graph.inputs[0].name
    np.savez("data.npz", **{str(name): np.ones(shape, np.float32)})
    assert invoke("cnn.onnx", "--passes", FUSE, "--inputs", "data.npz", "--dry-run").exit_code == 0
    np.savez("other.npz", other=np.ones(shape, np.float32))
    wrong = invoke("cnn.onnx", "--passes", FUSE, "--inputs", "other.npz", "--dry-run")
    assert wrong.exit_code == 2
    assert str(name) in wrong.stderr


def test_the_whole_program(cnn: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "effic.cli.main",
        "optimize",
        "cnn.onnx",
        "--passes",
        FUSE,
        "-o",
        "out.onnx",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote out.onnx" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stdout == ""


@pytest.mark.parametrize("path", ["cnn.onnx", "./cnn.onnx", "out.onnx", "out.onnx.data"])
def test_a_report_never_replaces_a_model(cnn: Path, path: str) -> None:
    before = Path("cnn.onnx").read_bytes()
    result = invoke("cnn.onnx", "-o", "out.onnx", "--report", path)
    assert result.exit_code == 2
    assert "would replace a model's file" in result.stderr
    assert Path("cnn.onnx").read_bytes() == before
    assert files(cnn) == {"cnn.onnx"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seed", "-1"], "the seed is -1; it must be at least 0"),
        (["--dump-dir", "cnn.onnx"], "--dump-dir cnn.onnx is a file; name a folder"),
        (["--target", " "], "the target is empty (targets: "),
        (["--print-after", "nope"], "no pass of this run has that name"),
    ],
)
def test_bad_options_are_answered_before_any_work(cnn: Path, options: list[str], sentence: str) -> None:
    result = invoke("cnn.onnx", *options)
    assert result.exit_code == 2
    assert sentence in result.stderr


@pytest.mark.parametrize("flag", ["--force", "--external-data", "--single-file"])
def test_flags_about_the_output_need_one(cnn: Path, flag: str) -> None:
    result = CliRunner().invoke(main, ["optimize", "cnn.onnx", flag])
    assert result.exit_code == 2
    assert f"{flag} does nothing without an output" in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--check", "off", "--inputs", "x.npz"], "--inputs does nothing with --check off"),
        (["--check", "off", "--seed", "3"], "--seed does nothing here"),
        (["--inputs", "x.npz", "--seed", "3"], "--seed does nothing here"),
    ],
)
def test_flags_that_do_nothing_are_refused(cnn: Path, args: list[str], said: str) -> None:
    result = invoke("cnn.onnx", *args)
    assert result.exit_code == 2
    assert said in result.stderr
