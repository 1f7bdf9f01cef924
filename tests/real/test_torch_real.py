"""Real checkpoints captured from torch: the same numbers through ONNX Runtime."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effic.ir.model import Model
from effic.ir.torch_capture import capture

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")


def run(model: Model, **feeds: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = ir.to_proto(model.ir).SerializeToString()
    return ort.InferenceSession(data, options).run(None, feeds)


def assert_near(got: np.ndarray, want, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest value."""
    want = want.detach().numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def assert_state_dict(model: Model, module, tied: str | None = None) -> None:
    for name, tensor in module.state_dict().items():
        # The counter of training steps is read by nothing, a tied weight is there under its first name.
        if not name.endswith("num_batches_tracked") and name != tied:
            np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), tensor.numpy())


def test_resnet20(load: ModuleType) -> None:
    module = load.cifar_resnet(20)
    images, _ = load.cifar10("eval_lossless")
    x = load.cifar_preprocess(images[:16])
    model = capture(module, (x[:2],), dynamic_shapes={"x": {0: "batch"}})
    assert len(list(model.nodes("BatchNormalization"))) == 19
    assert_state_dict(model, module)
    assert_near(run(model, x=x.numpy())[0], module(x))


def test_mobilenet(load: ModuleType) -> None:
    module = load.mobilenet_v1()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = capture(module, (x,), dynamic_shapes={"x": {0: "batch"}})
    assert len(list(model.nodes("BatchNormalization"))) == 27
    assert_state_dict(model, module)
    assert_near(run(model, x=x[:1].numpy())[0], module(x[:1]))


def test_stories(load: ModuleType) -> None:
    module = load.stories_lm()
    ids = torch.from_numpy(load.stories_ids("eval"))[:2]
    model = capture(module, (ids[:, :16],), dynamic_shapes={"ids": {0: "batch", 1: "sequence"}})
    assert_state_dict(model, module, tied="output.weight")
    assert "output.weight" not in model.graph.initializers
    assert_near(run(model, ids=ids.numpy())[0], module(ids))


def test_minilm(minilm: tuple[Any, Any]) -> None:
    module, tokenizer = minilm
    example = dict(tokenizer(["a cat sits", "a quick brown fox"], padding=True, return_tensors="pt"))
    shapes = {name: {0: "batch", 1: "sequence"} for name in example}
    model = capture(module, example, dynamic_shapes=shapes)
    assert_state_dict(model, module)
    assert [v.name for v in model.graph.outputs] == ["last_hidden_state", "pooler_output"]
    texts = ["hello", "a much longer sentence about models, graphs and the passes over them"]
    for batch in (texts, texts[:1]):
        tokens = dict(tokenizer(batch, padding=True, return_tensors="pt"))
        want = module(**tokens)
        hidden, pooled = run(model, **{name: value.numpy() for name, value in tokens.items()})
        assert_near(hidden, want.last_hidden_state)
        assert_near(pooled, want.pooler_output)
