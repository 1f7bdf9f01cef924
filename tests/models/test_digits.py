from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effic.models import digits_path, digits_test


def logits_of(path: Path, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def test_data() -> None:
    images, labels = digits_test()
    assert images.shape == (450, 1, 8, 8)
    assert images.dtype == np.float32
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert labels.dtype == np.int64
    # Stratified: every digit is a tenth of the data, give or take what the data set has.
    assert all(43 <= count <= 47 for count in Counter(labels.tolist()).values())


def test_accuracy() -> None:
    images, labels = digits_test()
    predicted = logits_of(digits_path(), images).argmax(axis=1)
    right = int((predicted == labels).sum())
    assert right / len(labels) >= 0.97
    readme = digits_path().with_name("README.md").read_text()
    assert f"**{right / len(labels):.4f}** ({right} of {len(labels)})" in readme


def test_norms_are_unfused_and_names_are_those_of_the_state_dict() -> None:
    model = onnx.load(digits_path())
    onnx.checker.check_model(model, full_check=True)
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["BatchNormalization"] == ops["Conv"] == 8
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"stem.conv.weight", "block2.1.bn.running_var", "fc1.weight", "fc2.bias"} <= names
    assert digits_path().stat().st_size < 400_000


def test_training_is_reproducible() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    import torch

    from effic.models.train_digits import split, to_onnx, torch_logits, train

    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    try:
        (images, labels), test = split()
        few = images[:256], labels[:256]
        first, second, other = train(few, 1), train(few, 1), train(few, 1, seed=1)
        assert all(np.array_equal(first[name], second[name]) for name in first)
        assert not np.array_equal(first["fc1.weight"], other["fc1.weight"])
        model = ir.to_proto(to_onnx(first))
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        got = session.run(None, {"images": test[0]})[0]
        np.testing.assert_allclose(got, torch_logits(first, test[0]), atol=1e-4)
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def test_the_bundled_data_are_the_scripts_split() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from effic.models.train_digits import split

    training, test = split()
    for made, bundled in zip(test, digits_test(), strict=True):
        np.testing.assert_array_equal(made, bundled)
    seen = {image.tobytes() for image in training[0]}
    assert not any(image.tobytes() in seen for image in test[0])
