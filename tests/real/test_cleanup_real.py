"""The cleanup passes on every real ONNX file: same outputs, fewer nodes, nothing left to do."""

from __future__ import annotations

import pytest

from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.onnx_format import read_onnx
from effic.ir.verify import signature, verify
from effic.passes.base import Remarks
from effic.passes.presets import PRESETS
from effic.passes.spec import parse_passes

FILES = {
    "basic_pitch_nmp": 205,
    "mobilenet_v1_075_224": 88,
    "resnet20_cifar": 74,
    "stories260k": 369,
    "version-RFB-320": 160,
}


@pytest.mark.parametrize("name", FILES)
def test_cleanup(data_dir, tmp_path, name: str) -> None:
    path = data_dir / "onnx" / f"{name}.onnx"
    model = read_onnx(path)
    before = signature(model)
    oracle = Oracle(model)
    inputs, want = runnable_inputs(model, oracle)
    for item in parse_passes(PRESETS["cleanup"].text):
        item.apply(model, Remarks())
        model.forget_names()
        verify(model)
    assert signature(model) == before
    assert sum(len(graph) for graph in model.graphs()) <= FILES[name]
    distance = compare_outputs(want, Oracle(model).run(inputs))
    assert distance.shape_mismatch is None
    assert not distance.new_nonfinite
    assert not distance.wrong_integers
    assert distance.max_rel <= 1e-4
    model.save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size <= path.stat().st_size
    for item in parse_passes(PRESETS["cleanup"].text):
        again = Remarks()
        item.apply(model, again)
        assert not [r for r in again.items if r.kind == "passed"], item.name
