"""fuse-conv-bn on real files: no norm left, outputs kept, accuracy kept."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.verify import verify
from effic.passes.base import Remarks
from effic.passes.fuse.fuse_conv_bn import FuseConvBN
from effic.passes.fuse.reparameterize_branches import ReparameterizeBranches

NORMS = {
    "resnet20_cifar.onnx": 19,
    "mobilenet_v1_075_224.onnx": 27,
    "version-RFB-320.onnx": 35,
    "stories260k.onnx": 0,
    "basic_pitch_nmp.onnx": 0,
}


def fused(path: Path) -> tuple[Model, Remarks]:
    model, remarks = read_onnx(path), Remarks()
    FuseConvBN().apply(model, remarks)
    verify(model)
    return model, remarks


@pytest.mark.parametrize("name", list(NORMS))
def test_outputs_stay_and_norms_go(data_dir: Path, name: str) -> None:
    path = data_dir / "onnx" / name
    original = read_onnx(path)
    oracle = Oracle(original)
    inputs, want = runnable_inputs(original, oracle)
    model, remarks = fused(path)
    distance = compare_outputs(want, Oracle(model).run(inputs))
    assert distance.max_rel <= 1e-4
    assert remarks.count("passed") == NORMS[name]
    counts = Counter(node.op_type for node in model.nodes())
    assert counts["BatchNormalization"] == 0
    assert len(list(model.nodes())) == len(list(original.nodes())) - NORMS[name]
    ReparameterizeBranches().apply(model, remarks)
    verify(model)
    assert compare_outputs(want, Oracle(model).run(inputs)).max_rel <= 1e-4


def test_accuracy_of_resnet20_is_unchanged(data_dir: Path) -> None:
    path = data_dir / "onnx" / "resnet20_cifar.onnx"
    load = _loader(data_dir)
    images, labels = load.cifar10("eval_lossless")
    x = load.cifar_preprocess(images).numpy()
    before, after = Oracle(read_onnx(path)), Oracle(fused(path)[0])
    want, got = _top1(before, x), _top1(after, x)
    assert np.mean(want == labels) == pytest.approx(0.9172, abs=5e-4)
    assert np.array_equal(want, got)


def _loader(data_dir: Path) -> ModuleType:
    for package in ("torch", "PIL", "safetensors"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("effic_test_data_load", data_dir / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _top1(oracle: Oracle, x: np.ndarray) -> np.ndarray:
    found = []
    for start in range(0, len(x), 128):
        (logits,) = oracle.run({"input": x[start : start + 128]}).values()
        found.append(logits.argmax(axis=1))
    return np.concatenate(found)
