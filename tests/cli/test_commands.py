"""``effic show``, ``passes``, ``explain``, ``compare``, ``bench`` and ``gate``, as people see them."""

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
from effic.models.builders import BUILDERS
from effic.passes import PASSES, pass_names
from effic.passes.presets import PRESETS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def exp(path: str, body: str = "y = Exp(x)") -> str:
    text = f'<ir_version: 10, opset_import: ["" : 20]> net (float[B, 4] x) => (float[B, 4] y) {{ {body} }}'
    Model(ir.from_onnx_text(text)).save(path)
    return path


# -- show ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_show_fits_a_pipe(folder: Path, name: str) -> None:
    Model(BUILDERS[name]()).save("m.onnx")
    result = invoke("show", "m.onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("m.onnx: ")
    assert "weights of" in result.stdout
    for line in result.stdout.splitlines():
        # Sentences may be long; tables never are.
        assert len(line) <= 100 or line.startswith(("and ", "not to be rewritten", "note: ", "  ")), line


def test_show_top_and_json(folder: Path) -> None:
    Model(BUILDERS["cnn"]()).save("m.onnx")
    short = invoke("show", "m.onnx", "--top", "1").stdout
    assert "more nodes: --top" in short
    assert len(short) < len(invoke("show", "m.onnx", "--top", "50").stdout)
    data = json.loads(invoke("show", "m.onnx", "--json").stdout)
    assert {"inputs", "outputs", "ops", "sites", "nodes", "cost", "record", "notes", "file_bytes"} <= set(
        data
    )


def test_show_tells_how_a_file_was_made(folder: Path) -> None:
    Model(BUILDERS["cnn"]()).save("m.onnx")
    assert invoke("optimize", "m.onnx", "--passes", "fuse-conv-bn", "-o", "out.onnx").exit_code == 0
    shown = invoke("show", "out.onnx").stdout
    assert "made by effic with:" in shown
    assert "fuse-conv-bn  (" in shown


# -- passes and explain --------------------------------------------------------------------------


def test_passes_lists_everything(folder: Path) -> None:
    result = invoke("passes")
    assert result.exit_code == 0, result.output
    for name in pass_names():
        assert f"\n{name} " in f"\n{result.stdout}"
    for name, preset in PRESETS.items():
        assert f"preset {name}: " in result.stdout
        assert all(reason in result.stdout for _, reason in preset.lines)
    data = json.loads(invoke("passes", "--json").stdout)
    assert {row["name"] for row in data["passes"]} == set(pass_names())
    assert all(row["numerics"] in ("exact", "rounding", "lossy") for row in data["passes"])
    assert set(data["presets"]) == set(PRESETS)


@pytest.mark.parametrize("name", sorted(PASSES))
def test_explain_every_pass(name: str) -> None:
    result = invoke("explain", name)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{name} (")
    data = json.loads(invoke("explain", name, "--json").stdout)
    assert data["name"] == name
    for option in data["options"]:
        assert option["help"]
        assert f"  {option['name']}: " in result.stdout


def test_the_example_of_explain_can_be_run() -> None:
    from effic.passes.base import CalibratedPass
    from effic.passes.spec import parse_passes

    for name in PASSES:
        text = invoke("explain", name).stdout
        needs = json.loads(invoke("explain", name, "--json").stdout)["needs_data"]
        assert ("needs calibration data" in text.splitlines()[0]) == needs
        for line in text.splitlines():
            if line.startswith("For example: "):
                (item,) = parse_passes(line.split("'")[1])
                assert item.name == name
                assert not needs or (isinstance(item, CalibratedPass) and item.needs_data)
                assert (" --calib data.npz " in line) == needs


def test_explain_an_unknown_pass() -> None:
    result = invoke("explain", "quantise-rtn")
    assert result.exit_code == 2
    assert "did you mean 'quantize-rtn'?" in result.stderr


# -- compare -------------------------------------------------------------------------------------


def test_compare(folder: Path) -> None:
    a, b = exp("a.onnx"), exp("b.onnx", "c = Constant <value_float: float = 0.5> () e = Exp(x) y = Add(e, c)")
    equal = invoke("compare", a, a)
    assert equal.exit_code == 0
    assert "equal" in equal.stdout
    free = invoke("compare", a, b)
    assert (free.exit_code, free.stderr) == (0, "")
    assert "SQNR" in free.stdout
    bound = invoke("compare", a, b, "--max-abs", "0.1", "--min-sqnr", "60", "--rtol", "1e-6")
    assert bound.exit_code == 1
    assert bound.stderr.count("broken: output 'y'") == 3
    data = json.loads(invoke("compare", a, b, "--max-abs", "0.1", "--json").stdout)
    assert len(data["broken"]) == 1
    assert data["outputs"]["y"]["max_abs"] == pytest.approx(0.5, abs=1e-5)


def test_compare_refuses_other_inputs(folder: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> net (float[B, 5] x) => (float[B, 5] y) { y = Exp(x) }'
    Model(ir.from_onnx_text(text)).save("b.onnx")
    result = invoke("compare", exp("a.onnx"), "b.onnx")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "take different inputs" in result.stderr


def test_compare_what_cannot_be_run(folder: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 20, "x" : 1]> net (float[4] x) => (float[4] y) { y = x.Odd(x) }'
    )
    Model(ir.from_onnx_text(text)).save("odd.onnx")
    assert invoke("compare", "odd.onnx", "odd.onnx").exit_code == 3


# -- bench ---------------------------------------------------------------------------------------


def test_bench_one_and_two(folder: Path) -> None:
    a = exp("a.onnx")
    one = invoke("bench", a, "--repeats", "2")
    assert one.exit_code == 0, one.output
    assert "median" in one.stdout
    assert "times as fast" not in one.stdout
    two = invoke("bench", a, exp("b.onnx", "y = Relu(x)"), "--repeats", "3")
    assert "times as fast as A (quartiles " in two.stdout
    assert "onnxruntime " in two.stdout
    data = json.loads(invoke("bench", a, a, "--repeats", "2", "--json").stdout)
    assert data["speedup_low"] <= data["speedup"] <= data["speedup_high"]
    assert data["threads"] == 1


@pytest.mark.parametrize("args", [["nowhere.onnx"], ["a.onnx", "nowhere.onnx"], ["a.onnx", "--repeats", "0"]])
def test_bench_refusals(folder: Path, args: list[str]) -> None:
    exp("a.onnx")
    result = invoke("bench", *args)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_bench_on_given_inputs(folder: Path) -> None:
    np.savez("data.npz", x=np.zeros((5, 4), np.float32))
    data = json.loads(
        invoke("bench", exp("a.onnx"), "--inputs", "data.npz", "--repeats", "1", "--json").stdout
    )
    assert data["inputs"] == {"x": "float32[5, 4]"}


# -- gate ----------------------------------------------------------------------------------------


@pytest.fixture
def project(folder: Path) -> Path:
    Model(BUILDERS["cnn"]()).save("m.onnx")
    Path("effic.toml").write_text(
        '[gate.models."m.onnx"]\nfile_bytes = { max = "1 GB", max_growth = "1%" }\nnodes.max_growth = 0\n'
    )
    return folder


def test_gate_from_missing_to_broken(project: Path) -> None:
    missing = invoke("gate")
    assert missing.exit_code == 3
    assert "effic gate --update" in missing.stdout
    updated = invoke("gate", "--update")
    assert updated.exit_code == 0, updated.output
    assert "effic-baseline.json (1 model); commit it" in updated.stderr
    assert "budgets: 3 kept" in updated.stdout
    Model(BUILDERS["llama"]()).save("m.onnx", force=True)
    broken = invoke("gate")
    assert broken.exit_code == 1
    assert "OVER" in broken.stdout
    assert "what grew:" in broken.stdout
    assert 'to allow it, edit gate.models."m.onnx".nodes.max_growth in' in broken.stdout
    limits = [line for line in broken.stdout.splitlines() if line.startswith(("  limit", "  value", "  was"))]
    assert len(limits) == 6
    data = json.loads(invoke("gate", "--json").stdout)
    assert data["exit_code"] == 1
    assert data["verdicts"][1]["movers"]


def test_gate_mistakes(project: Path) -> None:
    assert invoke("gate", "--config", "nowhere.toml").exit_code == 2
    Path("effic.toml").write_text('[gate.models."m.onnx"]\nnode.max = 3\n')
    result = invoke("gate")
    assert result.exit_code == 2
    assert "did you mean 'nodes'?" in result.stderr


def test_gate_in_a_process_of_its_own(project: Path) -> None:
    command = [sys.executable, "-m", "effic.cli.main", "gate"]
    codes = []
    for step in (
        lambda: None,
        lambda: subprocess.run([*command, "--update"], check=True, capture_output=True),
    ):
        step()
        codes.append(subprocess.run(command, capture_output=True).returncode)
    Path("m.onnx").unlink()
    codes.append(subprocess.run(command, capture_output=True).returncode)
    Model(BUILDERS["llama"]()).save("m.onnx")
    codes.append(subprocess.run(command, capture_output=True).returncode)
    Path("effic.toml").write_text("[gate\n")
    codes.append(subprocess.run(command, capture_output=True).returncode)
    assert codes == [3, 0, 3, 1, 2]


# -- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array", [np.zeros((2, 5), np.float32), np.zeros(4, np.float32), np.zeros((2, 4), np.int64)]
)
def test_inputs_that_do_not_fit_are_bad_input(folder: Path, array: np.ndarray) -> None:
    exp("e.onnx")
    np.savez("bad.npz", x=array)
    for command in (["optimize"], ["bench"], ["compare", "e.onnx"]):
        result = invoke(*command, "e.onnx", "--inputs", "bad.npz")
        assert result.exit_code == 2, result.stderr
        assert "the input 'x' is tensor(" in result.stderr


def test_an_npy_file_is_no_set_of_inputs(folder: Path) -> None:
    np.save("x.npy", np.zeros((2, 4), np.float32))
    result = invoke("bench", exp("e.onnx"), "--inputs", "x.npy")
    assert result.exit_code == 2
    assert "holds one array without a name" in result.stderr


@pytest.mark.parametrize("bound", [["--max-abs", "nan"], ["--rtol", "-1"], ["--min-top1", "95"]])
def test_a_bound_that_makes_no_sense_is_refused(folder: Path, bound: list[str]) -> None:
    result = invoke("compare", exp("a.onnx"), exp("b.onnx"), *bound)
    assert result.exit_code == 2
    assert "it must lie between" in result.stderr


def test_no_arguments_print_the_help_page_and_no_error(folder: Path) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
