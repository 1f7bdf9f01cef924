"""A tiny Llama with grouped queries: what effic merges is what peft merges, weights and outputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effic.ir.evaluate import start_session
from effic.ir.model import Model, constant_tensor
from effic.passes.base import Remarks
from effic.passes.spec import parse_passes

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

# peft asks transformers for what is renamed there; torch's tracer looks at transformers' caches.
pytestmark = pytest.mark.filterwarnings("ignore")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 8},
    "rslora": {"lora_alpha": 4, "use_rslora": True},
    "dora": {"lora_alpha": 4, "use_dora": True},
}


class Logits(torch.nn.Module):  # type: ignore[misc,name-defined]
    """A causal model that gives its logits and no cache."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
            use_cache=False,
        )
        self.model = transformers.LlamaForCausalLM(config).eval()

    def forward(self, input_ids: Any) -> Any:
        return self.model(input_ids=input_ids, use_cache=False).logits


IDS = np.random.default_rng(1).integers(0, 128, (2, 10))


@pytest.fixture(scope="module")
def captured() -> dict[bool, Model]:
    from effic.ir.torch_capture import capture

    def one(double: bool) -> Model:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = Logits().double() if double else Logits()
            return capture(module.eval(), (torch.from_numpy(IDS),))

    return {double: one(double) for double in (False, True)}


def adapted(folder: Path, double: bool, **config: Any) -> Any:
    """The model in peft's wrapper, with a random adapter that is saved to a folder."""
    module = Logits()
    if double:
        module = module.double()
    wrapped = peft.get_peft_model(module.eval(), peft.LoraConfig(r=4, target_modules=PROJECTIONS, **config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(0.5 + torch.rand(value.shape, generator=generator))
            elif "lora_" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


def merged(model: Model, folder: Path, **options: str) -> Model:
    more = "".join(f",{key}={value}" for key, value in options.items())
    (item,) = parse_passes(f'merge-lora{{adapters=["{folder}"]{more}}}')
    remarks, result = Remarks(), model.clone()
    item.apply(result, remarks)
    result.forget_names()
    assert remarks.count("passed") == 14
    assert not remarks.count("missed")
    return result


@pytest.mark.parametrize("name", CONFIGS)
def test_onnxruntime_computes_what_pefts_merged_model_does(
    captured: dict[bool, Model], tmp_path: Path, name: str
) -> None:
    wrapped = adapted(tmp_path / "adapter", False, **CONFIGS[name])
    merged(captured[False], tmp_path / "adapter").save(tmp_path / "m.onnx")
    (got,) = start_session(str(tmp_path / "m.onnx"), optimized=True).run(None, {"input_ids": IDS})
    with torch.no_grad():
        base = Logits()(torch.from_numpy(IDS)).numpy()
        want = wrapped.merge_and_unload()(torch.from_numpy(IDS)).numpy()
    assert np.abs(want - base).max() > 0.1 * np.abs(base).max(), "the adapter does something"
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_pefts_in_double_precision(
    captured: dict[bool, Model], tmp_path: Path, name: str
) -> None:
    wrapped = adapted(tmp_path / "adapter", True, **CONFIGS[name])
    model = merged(captured[True], tmp_path / "adapter", compute_dtype="float64")
    want = wrapped.merge_and_unload().state_dict()
    found = 0
    for key, value in want.items():
        if key.split(".")[-2] not in PROJECTIONS:
            continue
        tensor = constant_tensor(model.graph.initializers[key])
        assert tensor is not None
        wanted = value.numpy()
        assert np.abs(tensor.numpy() - wanted).max() <= 1e-10 * np.abs(wanted).max(), key
        found += 1
    assert found == 14
