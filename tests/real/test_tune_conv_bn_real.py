"""tune_conv_bn on a trained network: eval mode's logits and gradients, less memory."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import effic

torch = pytest.importorskip("torch")


def test_resnet20_tuned_is_resnet20_in_eval_mode(data_dir: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("PIL")
    spec = importlib.util.spec_from_file_location("effic_tune_data", data_dir / "load.py")
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    module = load.cifar_resnet(20)
    images, labels = load.cifar10("eval_lossless")
    x, y = load.cifar_preprocess(images[:256]), torch.from_numpy(labels[:256])
    tuned = copy.deepcopy(module)
    report = effic.tune_conv_bn(tuned, (x,))
    assert len(report.pairs) == 19
    assert report.skipped == {}
    assert report.activation_bytes == 4 * 256 * (7 * 16 * 32 * 32 + 6 * 32 * 16 * 16 + 6 * 64 * 8 * 8)
    with torch.no_grad():
        want, got = module(x), tuned(x)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert np.array_equal(got.argmax(1), want.argmax(1))
    for net in (module, tuned):
        torch.nn.functional.cross_entropy(net(x[:32]), y[:32]).backward()
    for (name, p), q in zip(module.named_parameters(), tuned.parameters(), strict=True):
        assert (q.grad - p.grad).abs().max() <= 1e-3 * max(p.grad.abs().max(), 1e-6), name
