"""Real ONNX files as Relax modules, against the oracle: sizes that are shared, and ones that stay open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.backends.tvm.relax_builder import build_relax
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs, seeded_inputs
from effic.ir.onnx_format import read_onnx
from tests.backends.tvm.module_runs import CPU, Lowered

TOLERANCE = 1e-4

FILES = ["basic_pitch_nmp", "mobilenet_v1_075_224", "resnet20_cifar", "stories260k", "version-RFB-320"]


def test_no_real_file_was_added_without_being_tried(data_dir: Path) -> None:
    assert sorted(path.stem for path in (data_dir / "onnx").glob("*.onnx")) == FILES


def test_buckets_of_a_language_model_share_its_weights(data_dir: Path) -> None:
    model = read_onnx(data_dir / "onnx" / "stories260k.onnx")
    one = sum(a.nbytes for a in build_relax(model, CPU, "batch=1,seq=16")[1].values())
    lowered = Lowered(model, "batch=1,seq=16;batch=1,seq=32")
    assert sum(a.nbytes for a in lowered.parameters.values()) < 1.1 * one
    oracle = Oracle(model)
    for length in (16, 32):
        feeds = seeded_inputs(model, dims={"batch": 1, "seq": length})
        assert compare_outputs(oracle.run(feeds), lowered.run(feeds)).max_rel < TOLERANCE


def test_images_of_any_number(data_dir: Path) -> None:
    model = read_onnx(data_dir / "onnx" / "resnet20_cifar.onnx")
    lowered, oracle = Lowered(model), Oracle(model)
    inputs, _ = runnable_inputs(model, oracle)
    for count in (1, 3):
        feeds = {name: np.resize(array, (count, *array.shape[1:])) for name, array in inputs.items()}
        assert compare_outputs(oracle.run(feeds), lowered.run(feeds)).max_rel < TOLERANCE
