"""Real checkpoints captured from torch and built for TVM: torch's own outputs, and its classes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs the tvm extra")
torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("onnxscript", reason="needs the torch extra")

import effic  # noqa: E402
from effic.backends.tvm.artifact import TvmArtifact  # noqa: E402
from tests.backends.tvm.shipped_runs import build_here  # noqa: E402

TOLERANCE = 1e-4
BATCH, IMAGES = 16, 48


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    build_here(monkeypatch)


def built(module: Any, folder: Path, shapes: str, **captured: Any) -> TvmArtifact:
    target = f'tvm-cpu{{shapes="{shapes}"}}'
    effic.optimize(module, output=folder, target=target, check="off", record=False, **captured)
    return TvmArtifact.load(folder, threads=1)


def assert_near(got: np.ndarray, want: Any) -> None:
    """Within a share of the range of torch's output."""
    want = want.numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE * np.ptp(want)


@pytest.mark.parametrize("depth", [20, 56])
def test_classifiers_of_images(load: ModuleType, tmp_path: Path, depth: int) -> None:
    module = load.cifar_resnet(depth)
    images, labels = load.cifar10("eval_lossless")
    x = load.cifar_preprocess(images[:IMAGES])
    found = built(
        module, tmp_path / "out.tvm", f"batch={BATCH}",
        example_inputs=(x[:2],), dynamic_shapes={"x": {0: "batch"}},
    )  # fmt: skip
    with torch.no_grad():
        want = module(x)
    got = np.concatenate([next(iter(found.run({"x": part.numpy()}).values())) for part in x.split(BATCH)])
    assert_near(got, want)
    classes = got.argmax(1)
    np.testing.assert_array_equal(classes, want.argmax(1).numpy())
    assert (classes == labels[:IMAGES]).mean() > 0.9


def test_the_sentence_encoder(minilm: tuple[Any, Any], tmp_path: Path) -> None:
    module, tokenizer = minilm
    texts = ["hello", "a much longer sentence about models, graphs and the passes over them"]
    tokens = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    sizes = dict(zip(("batch", "sequence"), tokens["input_ids"].shape, strict=True))
    found = built(
        module, tmp_path / "out.tvm", ",".join(f"{name}={size}" for name, size in sizes.items()),
        example_inputs=tokens, dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in tokens},
    )  # fmt: skip
    with torch.no_grad():
        want = module(**tokens)
    got = found.run({name: value.numpy() for name, value in tokens.items()})
    assert_near(got["last_hidden_state"], want.last_hidden_state)
    assert_near(got["pooler_output"], want.pooler_output)
