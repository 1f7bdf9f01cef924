from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effic.models.builders import BUILDERS, cnn, llama


def feeds(session: ort.InferenceSession, seed: int, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = {"N": batch, "batch": batch, "sequence": 7}
    result = {}
    for spec in session.get_inputs():
        shape = [lengths.get(d, d) for d in spec.shape]
        if spec.type == "tensor(float)":
            result[spec.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            high = 2 if spec.name == "attention_mask" else 100
            result[spec.name] = rng.integers(0, high, shape)
    return result


def session_of(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", BUILDERS)
def test_valid_and_alive(name: str) -> None:
    model = BUILDERS[name]()
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    session = session_of(model)
    for batch in (1, 3):
        first = session.run(None, feeds(session, 1, batch))
        second = session.run(None, feeds(session, 2, batch))
        for spec, a, b in zip(session.get_outputs(), first, second, strict=True):
            lengths = {"N": batch, "batch": batch, "sequence": 7}
            assert list(a.shape) == [lengths.get(d, d) for d in spec.shape]
            assert np.isfinite(a).all()
            # Alive: neither saturated nor vanishing, different within and between inputs.
            assert 1e-2 < a.std() < 30
            assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("name", BUILDERS)
def test_same_seed_same_model(name: str) -> None:
    def data(seed: int) -> bytes:
        return ir.to_proto(BUILDERS[name](seed=seed)).SerializeToString(deterministic=True)

    assert data(3) == data(3)
    assert data(3) != data(4)


@pytest.mark.parametrize("opset", [9, 13, 18, 21])
def test_cnn_opsets(opset: int) -> None:
    model = cnn(opset=opset, batch=2, size=12)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    session = session_of(model)
    assert session.run(None, feeds(session, 0))[0].shape == (2, 10)


def test_if_takes_both_branches() -> None:
    session = session_of(BUILDERS["control_flow"]())
    x = np.abs(feeds(session, 0)["x"])
    positive, negative = (session.run(["y"], {"x": sign * x})[0] for sign in (np.float32(1), np.float32(-1)))
    assert np.abs(positive - negative).max() > 1e-2


def test_llama_ties_one_initializer() -> None:
    table = llama().graph.initializers["embed_tokens.weight"]
    assert sorted(use.node.op_type for use in table.uses()) == ["Gather", "Transpose"]
    assert "lm_head.weight" in llama(tied=False).graph.initializers


def test_llama_is_causal() -> None:
    session = session_of(llama(seed=1))
    ids = feeds(session, 0)["input_ids"]
    changed = ids.copy()
    changed[:, -1] = (changed[:, -1] + 1) % 100
    a, b = (session.run(None, {"input_ids": i})[0] for i in (ids, changed))
    np.testing.assert_array_equal(a[:, :-1], b[:, :-1])
    assert np.abs(a[:, -1] - b[:, -1]).max() > 1e-2
