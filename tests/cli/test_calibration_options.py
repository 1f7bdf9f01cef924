"""``effic optimize`` with calibration data and options of the target."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from effic.cli.main import main
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.models.builders import BUILDERS

PASS = "quantize-gptq{group_size=16,min_size=0,kinds=[Conv,Gemm,MatMul]}"


@pytest.fixture
def cnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = Model(BUILDERS["cnn"]())
    model.save("cnn.onnx")
    shape = [d if isinstance(d, int) else 6 for d in model.graph.inputs[0].shape or ()]
    name = str(model.graph.inputs[0].name)
    rng = np.random.default_rng(0)
    np.savez("data.npz", **{name: rng.standard_normal(shape).astype(np.float32)})
    return tmp_path


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["optimize", *args])


def refused(*args: str, code: int = 2) -> str:
    result = invoke("cnn.onnx", *args, "-o", "out.onnx")
    assert result.exit_code == code, result.output
    assert not Path("out.onnx").exists()
    assert result.stdout == ""
    text = " ".join(result.stderr.split())
    assert text.startswith("effic: error: ")
    assert "Traceback" not in text
    return text


def test_data_are_used_recorded_and_reported(cnn: Path) -> None:
    args = ("--passes", PASS, "--calib", "data.npz", "--calib-samples", "4", "-o", "out.onnx")
    result = invoke("cnn.onnx", *args, "--report", "report.json")
    assert result.exit_code == 0, result.output
    assert "note: calibrated on data.npz, 4 samples" in result.stderr
    assert re.search(r"note: quantize-gptq calibrated: 4 samples, \d+ parts, about \d+ MB", result.stderr)
    report = json.loads(Path("report.json").read_text())
    assert report["calibration"]["source"] == "data.npz, 4 samples"
    assert report["calibration"]["random"] is False
    digest = report["calibration"]["digest"]
    assert report["steps"][0]["data"] == digest
    assert report["steps"][-1]["data"] is None
    (record,) = read_onnx("out.onnx").record
    assert record.data == digest


def test_the_seed_chooses_the_samples(cnn: Path) -> None:
    digests = []
    for seed in ("0", "0", "5"):
        args = ("--passes", PASS, "--calib", "data.npz", "--calib-samples", "3", "--seed", seed, "--json")
        digests.append(json.loads(invoke("cnn.onnx", *args).stdout)["calibration"]["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_the_check_runs_on_the_first_sample(cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effic.passes import pipeline

    seen: list[dict[str, np.ndarray]] = []
    start = pipeline.Checker.__init__

    def watch(self: pipeline.Checker, model: Model, inputs=None, seed: int = 0) -> None:
        seen.append(inputs)
        start(self, model, inputs, seed)

    monkeypatch.setattr(pipeline.Checker, "__init__", watch)
    assert invoke("cnn.onnx", "--passes", PASS, "--calib", "data.npz").exit_code == 0
    with np.load("data.npz") as data:
        ((name, array),) = seen[0].items()
        np.testing.assert_array_equal(array, data[name][:1])


def test_random_data_are_said_loudly(cnn: Path) -> None:
    made_up = ("--passes", PASS, "--calib", "random", "--calib-samples", "2")
    result = invoke("cnn.onnx", *made_up, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["calibration"]["random"] is True
    assert any("RANDOM NUMBERS" in note for note in report["notes"])
    assert "RANDOM NUMBERS" in invoke("cnn.onnx", *made_up).stderr


def test_a_pass_that_needs_data_stops_before_anything_is_read(cnn: Path) -> None:
    result = invoke("no-such-model.onnx", "--passes", f"fuse-conv-bn,{PASS}", "-o", "out.onnx")
    assert result.exit_code == 2
    assert "quantize-gptq needs calibration data; give some with --calib DATA" in result.stderr


def test_data_that_no_pass_looks_at_are_refused(cnn: Path) -> None:
    text = refused("--passes", "fuse-conv-bn", "--calib", "data.npz")
    assert "no pass of this run looks at calibration data; leave --calib out" in text


@pytest.mark.parametrize("flag", ["--calib-samples", "--calib-window"])
def test_options_of_no_data_are_refused(cnn: Path, flag: str) -> None:
    text = refused("--passes", "fuse-conv-bn", flag, "4")
    assert "does nothing without calibration data" in text


def test_data_that_do_not_fit_are_refused(cnn: Path) -> None:
    with np.load("data.npz") as data:
        ((name, array),) = dict(data).items()
    np.savez("layout.npz", **{name: array.transpose(0, 2, 3, 1)})
    np.savez("bytes.npz", **{name: array.astype(np.uint8)})
    bad = array.copy()
    bad[0, 0, 0, 0] = np.nan
    np.savez("nan.npz", **{name: bad})
    np.save("pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save("ids.npy", np.arange(99, dtype=np.uint16))
    Path("empty").mkdir()
    for source, reason in (
        ("layout.npz", f"(layout.npz, sample 0) give the input '{name}' the shape"),
        ("bytes.npz", "scale and normalize them"),
        ("nan.npz", f"array '{name}' of sample 0 holds values that are infinite or not numbers"),
        ("pickle.npy", "Python objects, which are never loaded"),
        ("ids.npy", f"give the input '{name}' the shape [99]"),
        ("empty", "the folder empty has no calibration data in it"),
        ("missing.npz", "do not exist"),
        ("cnn.onnx", "of no known kind"),
    ):
        assert reason in refused("--passes", PASS, "--calib", source), source
    assert "samples is 0, the least is 1" in refused(
        "--passes", PASS, "--calib", "data.npz", "--calib-samples", "0"
    )
    assert "is no row of token ids" in refused("--passes", PASS, "--calib", "data.npz", "--calib-window", "8")


def test_a_recipe_may_name_the_data(cnn: Path) -> None:
    lines = ['calib = "data.npz"', "calib_samples = 2", "[[pass]]", 'name = "quantize-gptq"', "min_size = 0"]
    Path("recipe.toml").write_text("\n".join(lines))
    result = invoke("cnn.onnx", "--recipe", "recipe.toml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calibration"]["source"] == "data.npz, 2 samples"
    result = invoke("cnn.onnx", "--recipe", "recipe.toml", "--calib-samples", "3", "--json")
    assert json.loads(result.stdout)["calibration"]["samples"] == 3
    Path("recipe.toml").write_text("\n".join(["calib_samples = true", *lines[2:]]))
    assert "calib_samples is True, expected int" in refused("--recipe", "recipe.toml")


def test_tokens_calibrate_a_language_model(cnn: Path) -> None:
    Model(BUILDERS["llama"]()).save("llama.onnx")
    np.save("ids.npy", (np.arange(100) % 50).astype(np.uint16))
    args = ("--passes", "quantize-gptq{min_size=0}", "--calib", "ids.npy", "--calib-window", "16", "--json")
    result = invoke("llama.onnx", *args)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calibration"]["source"] == "ids.npy, 6 windows of 16"


# -- --lower ---------------------------------------------------------------------------------------


def target(*args: str) -> str:
    result = invoke("cnn.onnx", "--passes", "fuse-conv-bn", *args, "--json")
    assert result.exit_code == 0, result.output
    return str(json.loads(result.stdout)["target"])


def test_lower_adds_options_to_the_target(cnn: Path) -> None:
    assert target("--lower", "decode=call") == "ort-cpu{decode=call}"
    both = ("--target", "ort-cpu{accuracy_level=0}", "--lower", "decode=call")
    assert target(*both) == "ort-cpu{accuracy_level=0,decode=call}"
    assert target("--target", "ort-cpu{decode=call}", "--lower", "decode=call") == "ort-cpu{decode=call}"
    Path("recipe.toml").write_text('target = "ort-cpu{accuracy_level=0}"\n[[pass]]\nname = "fuse-conv-bn"\n')
    result = invoke("cnn.onnx", "--recipe", "recipe.toml", "--lower", "decode=call", "--json")
    assert json.loads(result.stdout)["target"] == "ort-cpu{accuracy_level=0,decode=call}"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--lower", "decode"), "--lower: 'decode' is not of the form NAME=VALUE"),
        (("--lower", "decod=call"), "ort-cpu has no option 'decod' (did you mean 'decode'?)"),
        (("--lower", "decode=never"), "decode is 'never', allowed are load, call"),
        (("--lower", "decode=load", "--lower", "decode=call"), "decode is said to be both load and call"),
        (
            ("--target", "ort-cpu{decode=load}", "--lower", "decode=call"),
            "decode is said to be both load and call; say one of them",
        ),
        (("--target", "portable", "--lower", "decode=call"), "portable has no option 'decode'"),
    ],
)
def test_options_that_cannot_be_are_refused(cnn: Path, args: tuple[str, ...], reason: str) -> None:
    assert reason in refused("--passes", "fuse-conv-bn", *args)
