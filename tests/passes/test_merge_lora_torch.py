"""A captured model with an adapter merged computes what the PEFT-wrapped module computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effic.ir.evaluate import Oracle
from effic.passes.base import Remarks
from effic.passes.spec import parse_passes

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("onnxscript")

# peft takes the bias of B for a damaged factor, and asks transformers for what is renamed there.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter 'default'. 1 LoRA", "ignore:.is_gradient_checkpointing."
)


class Tiny(torch.nn.Module):  # type: ignore[misc,name-defined]
    """Embedding, norm, linear layers with and without bias, a convolution and a classifier."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20, 12)
        self.norm = torch.nn.LayerNorm(12)
        self.up = torch.nn.Linear(12, 16)
        self.down = torch.nn.Linear(16, 12, bias=False)
        self.conv = torch.nn.Conv1d(12, 12, 3, padding=1) if convolution else torch.nn.Identity()
        self.head = torch.nn.Linear(12, 5)

    def forward(self, ids: Any) -> Any:
        x = self.norm(self.table(ids))
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["up", "down", "conv", "table"]},
    "rslora": {"target_modules": ["up", "down"], "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": ["up", "down", "conv", "table"], "use_dora": True},
    "patterns": {
        "target_modules": ["up", "down"],
        "rank_pattern": {"up": 5},
        "alpha_pattern": {"^down": 11},
    },
    "bias of B": {"target_modules": ["up"], "lora_bias": True},
    "all biases": {"target_modules": ["up", "down"], "bias": "all"},
    "their biases": {"target_modules": ["up", "down"], "bias": "lora_only"},
    "modules to save": {"target_modules": ["up"], "modules_to_save": ["head", "norm"]},
    "tokens": {"target_modules": ["up"], "trainable_token_indices": {"table": [3, 1]}},
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_computes_what_the_wrapped_module_does(tmp_path: Path, name: str, double: bool) -> None:
    from effic.ir.torch_capture import capture

    torch.manual_seed(3)
    # The runtime has no convolution in double precision.
    module = Tiny(convolution=not double).eval()
    if double:
        module = module.double()
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    model = capture(module, (ids,))
    settings = {"r": 4, **CONFIGS[name]}
    if double:
        settings["target_modules"] = [n for n in settings["target_modules"] if n != "conv"]
    wrapped = peft.get_peft_model(module, peft.LoraConfig(**settings))
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if "lora_magnitude" in key:
                value.mul_(torch.rand_like(value) + 0.5)
            elif value.requires_grad:
                value.add_(0.2 * torch.randn_like(value))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    (item,) = parse_passes(f'merge-lora{{adapters=["{tmp_path / "adapter"}"]}}')
    remarks = Remarks()
    item.apply(model, remarks)
    assert remarks.count("passed")
    assert not remarks.count("missed")
    got = next(iter(Oracle(model).run({"ids": ids.numpy()}).values()))
    want = wrapped.eval()(ids).detach().numpy()
    assert np.abs(got - want).max() <= (1e-10 if double else 1e-5) * np.abs(want).max()
