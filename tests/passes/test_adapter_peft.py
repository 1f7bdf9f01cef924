"""Deltas beside the peft library: the same adapter folder, merged by both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effic.passes.adapters.adapter_files import read_adapter
from effic.passes.adapters.deltas import bias_delta, module_delta


def merged_by_peft(
    make: Callable[[], Any], folder: Path, double: bool, **config: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A model with random adapters: saves the adapter, returns the weights before and after peft's merge."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    model = make().eval()
    if double:
        model = model.double()
    before = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(torch.rand_like(value) + 0.5)
            elif "lora_" in name:
                value.normal_(0, 0.3)
    wrapped.save_pretrained(str(folder))
    after = {name: value.detach().numpy() for name, value in wrapped.merge_and_unload().state_dict().items()}
    return before, after


def tiny_net() -> Any:
    torch = pytest.importorskip("torch")
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    net = torch.nn.Module()
    net.fc = torch.nn.Linear(10, 8)
    net.swapped = pytorch_utils.Conv1D(7, 10)
    torch.nn.init.normal_(net.swapped.weight)
    net.conv = torch.nn.Conv2d(4, 6, 3, padding=1)
    net.point = torch.nn.Conv2d(4, 6, 1)
    net.line = torch.nn.Conv1d(4, 6, 3)
    net.table = torch.nn.Embedding(20, 6)
    return net


def closer_than(got: np.ndarray, wanted: np.ndarray, double: bool) -> bool:
    scale = np.abs(wanted).max()
    return bool(np.abs(got - wanted).max() <= (1e-10 if double else 1e-5) * scale)


# peft takes the bias of B for a damaged factor, and asks transformers for what is renamed there.
noisy = pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA", "ignore:.is_gradient_checkpointing.")


@noisy
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("targets", "config"),
    [
        (["fc", "conv", "point", "line", "table"], {}),
        (["fc", "conv", "table"], {"use_rslora": True}),
        (["fc", "conv", "point", "line", "table"], {"use_dora": True}),
        (["swapped"], {"fan_in_fan_out": True}),
        (["swapped"], {"fan_in_fan_out": True, "use_dora": True}),
        (["fc"], {"lora_bias": True}),
        (["fc", "conv"], {"rank_pattern": {"conv": 2}, "alpha_pattern": {"fc": 3}}),
    ],
)
def test_merged_as_peft_merges(
    tmp_path: Path, targets: list[str], config: dict[str, Any], double: bool
) -> None:
    before, after = merged_by_peft(tiny_net, tmp_path, double, r=4, target_modules=targets, **config)
    adapter = read_adapter(tmp_path)
    assert set(adapter.modules) == set(targets)
    for path, module in adapter.modules.items():
        base, wanted = before[f"{path}.weight"], after[f"{path}.weight"]
        turned = base.T if module.fan_in_fan_out else base
        delta = module_delta(module, turned, dtype=np.float64 if double else np.float32)
        merged = base + (delta.T if module.fan_in_fan_out else delta.reshape(base.shape))
        assert not np.array_equal(base, wanted)
        assert closer_than(merged, wanted, double), path
        bias = bias_delta(module)
        if bias is not None:
            assert closer_than(before[f"{path}.bias"] + bias, after[f"{path}.bias"], double)


@noisy
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_tiny_transformers_merged_as_peft_merges(tmp_path: Path, config: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    before, after = merged_by_peft(
        lambda: transformers.BertModel(bert),
        tmp_path,
        False,
        r=4,
        target_modules=["query", "value", "dense", "word_embeddings"],
        **config,
    )
    modules = read_adapter(tmp_path).modules
    assert len(modules) == 7
    for path, module in modules.items():
        base = before[f"{path}.weight"]
        assert closer_than(base + module_delta(module, base), after[f"{path}.weight"], False), path


def test_expert_parameters_merged_as_peft_merges(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def make() -> Any:
        class Experts(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = torch.nn.Parameter(torch.randn(4, 6, 10))

        net = torch.nn.Module()
        net.experts = Experts()
        net.fc = torch.nn.Linear(6, 6)
        return net

    before, after = merged_by_peft(
        make, tmp_path, False, r=2, target_modules=[], target_parameters=["experts.up"]
    )
    (module,) = read_adapter(tmp_path).modules.values()
    assert (module.kind, module.experts) == ("expert", 4)
    base, wanted = before["experts.up"], after["experts.up"]
    # The parameter is [E, in, out] or [E, out, in]; A's width says which.
    assert module.a is not None
    turned = base if base.shape[2] == module.a.shape[1] else base.transpose(0, 2, 1)
    delta = module_delta(module, np.ascontiguousarray(turned))
    merged = turned + delta
    merged = merged if turned is base else merged.transpose(0, 2, 1)
    assert closer_than(merged, wanted, False)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_that_peft_changed(tmp_path: Path, init: str) -> None:
    """peft subtracts the start from the base it is given: merged into the original, effic finds it again."""
    before, after = merged_by_peft(
        tiny_net, tmp_path, False, r=3, target_modules=["fc"], init_lora_weights=init
    )
    module = read_adapter(tmp_path).modules["fc"]
    assert module.init == init
    assert closer_than(
        before["fc.weight"] + module_delta(module, before["fc.weight"]), after["fc.weight"], False
    )
