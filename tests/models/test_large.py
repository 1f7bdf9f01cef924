from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effic.models.large import BLOCK, chain, llama_like_file


def test_llama_like_file(tmp_path: Path) -> None:
    path = llama_like_file(tmp_path / "model.onnx", 0.02, dim=256, hidden=384, heads=4, vocab=6000)
    data = path.with_name("model.onnx.data")
    assert abs(path.stat().st_size + data.stat().st_size - 20e6) < 2e6
    assert BLOCK < 6000 * 256  # the embedding is long enough to repeat the block
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input_ids": np.arange(10)[None]})[0]
    assert logits.shape == (1, 10, 6000)
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3
    table = ir.load(path).graph.initializers["embed_tokens.weight"].const_value
    assert table is not None
    rows = table.numpy()
    assert len(np.unique(rows[:, 0])) > 5990  # rows differ although numbers repeat
    assert abs(rows.std() - 1.0) < 0.01


def test_llama_like_file_is_seeded(tmp_path: Path) -> None:
    size = {"dim": 64, "hidden": 96, "heads": 2, "vocab": 100}

    def written(name: str, seed: int) -> bytes:
        path = llama_like_file(tmp_path / name / "m.onnx", 0.001, seed, **size)
        return path.read_bytes() + path.with_name("m.onnx.data").read_bytes()

    for name in "abc":
        (tmp_path / name).mkdir()
    assert written("a", 1) == written("b", 1)
    assert written("a", 1) != written("c", 2)


@pytest.mark.parametrize("nodes", [17, 1000])
def test_chain(nodes: int) -> None:
    proto = ir.to_proto(chain(nodes))
    assert abs(len(proto.graph.node) - nodes) <= 8
    onnx.checker.check_model(proto, full_check=True)
    ops = Counter(node.op_type for node in proto.graph.node)
    assert ops["Conv"] == ops["BatchNormalization"] == ops["MatMul"] == ops["Identity"] == ops["Constant"]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    a, b = session.run(None, {"x": x})[0], session.run(None, {"x": -x})[0]
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() > 1e-2
