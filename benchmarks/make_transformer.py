"""A transformer as torch's older exporter writes it: shapes computed node by node, weights in the file."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

VOCAB = 11000
POSITIONS = 512


class Attention(nn.Module):
    """Multi-head self-attention, written with shapes read from the input as people write it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, sequence, dim] in and out."""
        batch, sequence, dim = x.shape
        size = dim // self.heads
        q, k, v = (
            project(x).view(batch, sequence, self.heads, size).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(size)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, sequence, dim))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, sequence, dim] in and out."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Token and position embeddings, the layers, a norm, a small classifier of each token."""

    def __init__(self, layers: int, dim: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, dim)
        self.positions = nn.Embedding(POSITIONS, dim)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 64)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [batch, sequence] to logits [batch, sequence, 64]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1), device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def transformer_torchscript(
    path: str | os.PathLike[str], layers: int = 12, dim: int = 512, heads: int = 8, seed: int = 0
) -> Path:
    """Export a seeded transformer with torch's torchscript exporter into one file.

    The default size is 175 MB. Input ``ids`` int64 [batch, sequence], sequence at most 512; output
    ``logits`` float32 [batch, sequence, 64].

    Returns:
        The path written.
    """
    torch.manual_seed(seed)
    module = Transformer(layers, dim, heads).eval()
    ids = torch.randint(0, VOCAB, (2, 16))
    names = {0: "batch", 1: "sequence"}
    with warnings.catch_warnings():
        # The exporter says that a newer one exists; the older one's graphs are the point here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (ids,),
            str(path),
            input_names=["ids"],
            output_names=["logits"],
            dynamic_axes={"ids": names, "logits": names},
            opset_version=17,
            dynamo=False,
        )
    return Path(path)
