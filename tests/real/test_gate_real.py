"""``effic gate`` on real models: a language model by its perplexity, convolutions by their operators."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import effic
from effic.gate import gate
from effic.gate_config import read_config
from effic.gate_verdicts import GateReport
from effic.measure import measure
from effic.op_coverage import TARGETS, covers

STORIES = """\
[gate.models."out.onnx"]
weight_bytes = { max = "500 kB", max_growth = 0 }
peak_bytes = { max_growth = "1%" }
float_weights = { max = 1 }
ops_allowed = "ort-cpu"
accuracy = { metric = "perplexity", data = "ids.npy", limit = 4, max_drop = 2, reference = "in.onnx" }
agreement = { reference = "in.onnx", min_sqnr = 15 }
"""


@pytest.fixture
def stories(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(data_dir / "onnx" / "stories260k.onnx", tmp_path / "in.onnx")
    shutil.copy(data_dir / "stories" / "ids_eval.npy", tmp_path / "ids.npy")
    (tmp_path / "effic.toml").write_text(STORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(passes: str) -> None:
    effic.optimize("in.onnx", passes, output="out.onnx", force=True, check="off")


def check(*, update: bool = False) -> GateReport:
    return gate(read_config(Path("effic.toml")), update=update)


def test_a_language_model_by_its_perplexity(stories: Path) -> None:
    build("quantize-rtn{bits=8,min_size=0}")
    good = check(update=True)
    assert {v.status for v in good.verdicts} == {"ok"}, [v for v in good.verdicts if v.status != "ok"]
    build("quantize-rtn{bits=2,min_size=0}")
    bad = check()
    assert bad.exit_code == 1
    broken = {v.metric: v for v in bad.verdicts if v.status == "broken"}
    assert {"accuracy perplexity", "agreement"} <= set(broken)
    drop = broken["accuracy perplexity"]
    assert drop.unit == "%"
    assert drop.value is not None
    assert drop.value > 20


@pytest.mark.parametrize(
    ("name", "float_weights"),
    [("mobilenet_v1_075_224", 28), ("resnet20_cifar", 20), ("version-RFB-320", 52), ("basic_pitch_nmp", 32)],
)
def test_figures_of_real_models(data_dir: Path, name: str, float_weights: int) -> None:
    found = measure(data_dir / "onnx" / f"{name}.onnx")
    assert found.float_weights == float_weights
    assert found.decoded_weights == 0
    assert found.peak_bytes is not None
    assert found.peak_bytes > found.weight_bytes
    # CUDA kernels are listed only where onnxruntime-gpu is installed.
    targets = [target for target in TARGETS if target != "ort-cuda"]
    assert {target: found.outside(lambda o, t=target: covers(t, o)) for target in targets} == {  # type: ignore[misc]
        target: {} for target in targets
    }


def test_the_peak_of_mobilenet_by_hand(data_dir: Path) -> None:
    """The first pointwise convolution's output and its copy behind the activation, beside the image."""
    found = measure(data_dir / "onnx" / "mobilenet_v1_075_224.onnx")
    image, wide = 224 * 224 * 3 * 4, 112 * 112 * 48 * 4
    assert found.peak_bytes is not None
    activations = found.peak_bytes - found.weight_bytes
    assert activations == pytest.approx(image + 2 * wide, rel=0.01)
