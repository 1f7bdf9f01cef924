"""all-MiniLM-L6-v2 as a torch module to capture, and its score on STS through an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from effic.ir.evaluate import start_session


def minilm_module(folder: Path) -> tuple[Any, dict[str, Any], Any]:
    """The encoder (hidden states out), example inputs, dynamic batch and sequence."""
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(str(folder), attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    ones = torch.ones(2, 16, dtype=torch.int64)
    example = {"input_ids": ones, "attention_mask": ones, "token_type_ids": torch.zeros_like(ones)}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
    return Encoder().eval(), example, {name: {0: batch, 1: sequence} for name in example}


def spearman_of(path: Path, folder: Path, load: Any, baseline: Any) -> float:
    """Spearman correlation of cosine similarities with the gold scores of sts-test."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    session = start_session(str(path), optimized=True)
    wanted = {item.name for item in session.get_inputs()}

    class Output:
        def __init__(self, hidden: np.ndarray) -> None:
            self.last_hidden_state = torch.from_numpy(hidden)

    def model(**inputs: Any) -> Output:
        feeds = {k: v.numpy() for k, v in inputs.items() if k in wanted}
        return Output(session.run(None, feeds)[0])

    a, b, gold = load.sts("test")
    return float(baseline.spearman(baseline.minilm_similarity(model, tokenizer, a, b), gold))
