"""Models for measuring: a Llama-like file of over a gigabyte, and graphs of any number of nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from effic.models.builders import INT64, Decoder
from effic.models.sketch import Sketch

BLOCK = (1 << 20) + 7
"""Random numbers drawn once and written again and again (4 MB). A prime number of them, so that no
two rows or columns of a matrix begin at the same place of the block."""

ALIGNMENT = 4096
"""Weights begin at pages of the file, as onnx recommends for mapping them into memory."""

NODES_PER_BLOCK = 17


class StreamedSketch(Sketch):
    """A sketch whose random weights go straight to a file of external data.

    Args:
        path: the data file, written beside the model.
        file: the same file, open for writing.
        seed: of the weights.
    """

    def __init__(self, path: Path, file: BinaryIO, seed: int) -> None:
        super().__init__(seed)
        self.path, self.file = path, file
        self.block = self.rng.standard_normal(BLOCK, dtype=np.float32)

    def normal(self, name: str, *shape: int, fan_in: int, gain: float = 1.0) -> ir.Value:
        """As :meth:`Sketch.normal`; beyond :data:`BLOCK` elements the numbers repeat."""
        scaled = self.block * np.float32(gain / np.sqrt(fan_in))
        start = int(self.rng.integers(BLOCK))
        offset = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
        self.file.seek(offset)
        size = left = int(np.prod(shape))
        while left:
            piece = scaled[start : start + left]
            self.file.write(piece.data)
            left -= len(piece)
            start = 0
        tensor = ir.ExternalTensor(
            self.path.name,
            offset,
            size * scaled.itemsize,
            ir.DataType.FLOAT,
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.path.parent),
        )
        return self.weight(name, tensor)


def llama_like_file(
    path: str | os.PathLike[str],
    gigabytes: float = 1.35,
    seed: int = 0,
    *,
    dim: int = 2048,
    hidden: int = 5504,
    heads: int = 16,
    vocab: int = 32000,
) -> Path:
    """Write a float32 Llama-like decoder, its weights as external data in ``<name>.data``.

    The number of layers is what brings the file nearest to the size wanted, at least one. The default
    is four layers, 29 weights of MatMul in 1.07 GB and an embedding in 0.26 GB. Embedding and head are
    separate weights. Memory stays within tens of megabytes.

    Args:
        path: the ``.onnx`` file; the folder must exist.
        gigabytes: size wanted, in 10⁹ bytes.
        seed: of the weights.
        dim: width of the residual stream.
        hidden: width of the feed-forward.
        heads: heads of the attention, for queries, keys and values alike.
        vocab: number of tokens.

    Returns:
        The path of the ``.onnx`` file. Its input is ``input_ids`` int64 [batch, sequence], its output
        ``logits`` float32 [batch, sequence, vocab].
    """
    path = Path(path)
    per_layer = 4 * (4 * dim * dim + 3 * dim * hidden)
    layers = max(1, round((gigabytes * 1e9 - 4 * 2 * vocab * dim) / per_layer))
    data = path.with_name(f"{path.name}.data")
    with data.open("wb") as file:
        g = StreamedSketch(data, file, seed)
        ids = g.input("input_ids", ["batch", "sequence"], INT64)
        x = g.op("Gather", g.normal("embed_tokens.weight", vocab, dim, fan_in=1), ids, at="embed_tokens")
        decoder = Decoder(g, ids, dim=dim, hidden=hidden, heads=heads, kv_heads=heads)
        for i in range(layers):
            x = decoder.layer(x, f"layers.{i}")
        logits = g.linear(decoder.rms_norm(x, "norm"), "lm_head", dim, vocab, bias=False)
    model = g.model(g.output(logits, "logits", ["batch", "sequence", vocab]))
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def chain(nodes: int, seed: int = 0) -> ir.Model:
    """A long graph of about ``nodes`` nodes with work for every cleanup and fusion, to measure scaling.

    A block of 17 nodes is repeated: Conv and BatchNormalization, a MatMul behind a transposed weight
    with its Add, constant arithmetic, an Identity, a pair of Transposes that cancel, a Sigmoid computed
    twice, a node nobody reads, and a shortcut around it all.

    Input ``x`` float32 [N, 4, 6, 6]; output ``y`` of the same shape.
    """
    g = Sketch(seed)
    h = g.input("x", ["N", 4, 6, 6])
    half = g.scalar("half", 0.5)
    for i in range(max(1, round(nodes / NODES_PER_BLOCK))):
        at = f"block.{i}"
        y = g.norm(g.conv(h, f"{at}.conv", 4, 4, 1), f"{at}.bn", 4)
        y = g.op("Identity", g.op("Relu", y, at=at), at=at)
        g.op("Neg", y, at=at)
        y = g.linear(y, f"{at}.linear", 6, 6, form="transposed")
        gain = g.op(
            "Constant", at=at, value=ir.tensor(np.float32(g.rng.uniform(1.0, 2.0)), name=f"{at}.gain")
        )
        y = g.op("Mul", y, g.op("Mul", gain, half, at=at), at=at)
        y = g.op("Transpose", y, at=at, perm=[0, 2, 3, 1])
        y = g.op("Transpose", y, at=at, perm=[0, 3, 1, 2])
        y = g.op("Mul", g.op("Sigmoid", y, at=at), g.op("Sigmoid", y, at=at), at=at)
        h = g.op("Add", h, y, at=at) if i % 2 else g.op("Sub", h, y, at=at)
    return g.model(g.output(h, "y", ["N", 4, 6, 6]))
