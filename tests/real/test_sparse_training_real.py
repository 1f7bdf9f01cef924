"""Learned masks on a language model read from ONNX, and a fine-tuned classifier, through ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import effic
from effic.ir import sparsity
from effic.ir.evaluate import start_session

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

from effic.backends.torch.sparse_training import SRSTE, STE, MaskLLM, learn_masks, masks_of  # noqa: E402


def test_masks_of_a_language_model_are_learned(load: ModuleType, data_dir: Path, tmp_path: Path) -> None:
    """A few steps already beat the one-shot mask they start from, on other text; no weight that stays moves."""
    model = effic.read_onnx(data_dir / "onnx" / "stories260k.onnx")
    pruned = model.clone()
    effic.run_passes(pruned, effic.parse_passes("prune-magnitude"), check="off")
    module = effic.to_module(model)

    def loss(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    other = torch.from_numpy(load.stories_ids("eval", seq=256)[:4])
    training = MaskLLM(steps=40).attach(module, prior=masks_of(pruned))
    assert training.patterns.keys() == sparsity.declared(pruned).keys()
    assert list(training.skipped.values()) == ["is an embedding"] * len(training.skipped)
    with torch.no_grad():
        one_shot = float(loss(effic.to_module(pruned), other))
    ids = torch.from_numpy(load.stories_ids("calib", seq=256))
    torch.manual_seed(0)
    learn_masks(training, ids.split(1), loss, rate=0.05)
    finished = training.finish()
    with torch.no_grad():
        learned = float(loss(module, other))
    assert learned < one_shot - 0.4

    trained = effic.read_back(model, module)
    assert finished.declare(trained) == []
    assert sparsity.broken(trained) == []
    assert sparsity.declared(trained) == sparsity.declared(pruned)
    original = model.graph.initializers
    for name, value in trained.graph.initializers.items():
        now, was = value.const_value.numpy(), original[name].const_value.numpy()
        assert np.array_equal(now, np.where(now == 0, now, was)), name
    path = tmp_path / "learned.onnx"
    effic.optimize(trained, "eliminate-dead-code", output=path, target="portable", check="off")
    (logits,) = start_session(str(path)).run(None, {"ids": other.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, module(other).numpy(), rtol=1e-3, atol=1e-3)


def test_a_short_fine_tune_recovers_most_of_what_pruning_cost(load: ModuleType) -> None:
    images, labels = load.cifar10("calib")
    x, y = load.cifar_preprocess(images[:640]), torch.from_numpy(labels[:640])
    other, right = load.cifar10("eval")
    other = load.cifar_preprocess(other[:300])

    def accuracy(module: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((module.eval()(other).argmax(1).numpy() == right[:300]).mean())

    pruned = load.cifar_resnet(20)
    STE().attach(pruned, skip=["linear.weight"]).finish()
    module = load.cifar_resnet(20)
    training = SRSTE().attach(module, skip=["linear.weight"])
    assert len(training.patterns) == 18
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    module.train()
    for i in range(0, len(x), 32):
        optimizer.zero_grad()
        functional.cross_entropy(module(x[i : i + 32]), y[i : i + 32]).backward()
        optimizer.step()
        training.step()
    training.finish()
    for name, parameter in module.named_parameters():
        if name in training.patterns:
            assert sparsity.follows(parameter.detach().numpy(), sparsity.Pattern(2, 4), axis=1)
    assert accuracy(module) > accuracy(pruned) + 0.1
