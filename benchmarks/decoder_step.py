"""One step of a Llama-like decoder: a token in, its keys and values and the logits out, weights in matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from effic.models.sketch import Sketch

CHANNELS_LARGE, LARGE = 0.01, 12.0
"""Share of the input channels whose weights are larger, in half of the matrices, and how much larger."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder; ``past`` counts the tokens whose keys and values are there already."""

    dim: int = 2048
    hidden: int = 5504
    heads: int = 16
    kv_heads: int = 4
    layers: int = 4
    vocab: int = 8192
    past: int = 255

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    @property
    def matrices(self) -> int:
        """Weights of the products of a step."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.kv_heads * self.head
        return self.layers * (attention + 3 * self.dim * self.hidden) + self.dim * self.vocab


def write_step(path: Path, sizes: Sizes | None = None, seed: int = 0) -> Path:
    """Write the float32 step, its weights as external data.

    In every second layer a hundredth of the input channels have weights twelve times as large, as channels of
    trained decoders do: there groups within an input channel (AdaDim) err less, elsewhere groups within an
    output do.

    Inputs: ``x`` fp32 [1, 1, dim], ``position`` fp32 [1, 1], ``past_k.i`` and ``past_v.i`` fp32 [1, kv_heads,
    past, head]. Outputs: ``logits`` [1, 1, vocab], ``k.i`` and ``v.i`` [1, kv_heads, 1, head].
    """
    step = _Step(sizes or Sizes(), seed)
    ir.save(step.model(), path, external_data=f"{path.name}.data")
    return path


class _Step:
    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.g = sizes, Sketch(seed)
        g = self.g
        self.x = g.input("x", [1, 1, sizes.dim])
        position = g.input("position", [1, 1])
        frequency = 10000.0 ** (-np.arange(0, sizes.head, 2) / sizes.head)
        angle = g.op("Mul", position, g.weight("frequency", frequency[None].astype(np.float32)), at="rotary")
        angle = g.op("Concat", angle, angle, at="rotary", axis=-1)
        self.cos, self.sin = g.op("Cos", angle, at="rotary"), g.op("Sin", angle, at="rotary")
        self.two, self.eps = g.scalar("two", 2.0), g.scalar("eps", 1e-5)
        self.root = g.scalar("root", math.sqrt(sizes.head))
        self.last = g.ints("last", -1)
        self.bounds = [g.ints(f"bound_{i}", v) for i, v in enumerate((0, sizes.head // 2, sizes.head))]
        self.new: list[ir.Value] = []

    def model(self) -> ir.Model:
        """The step, drawn."""
        g, sizes, x = self.g, self.sizes, self.x
        for i in range(sizes.layers):
            x = self._layer(x, i)
        logits = g.linear(self._norm(x, "norm"), "lm_head", sizes.dim, sizes.vocab, bias=False)
        return g.model(g.output(logits, "logits", [1, 1, sizes.vocab]), *self.new)

    def _linear(self, x: ir.Value, at: str, inputs: int, outputs: int, large: bool) -> ir.Value:
        g = self.g
        weight = g.rng.standard_normal((inputs, outputs), np.float32) / np.float32(math.sqrt(inputs))
        if large:
            weight[g.rng.random(inputs) < CHANNELS_LARGE] *= np.float32(LARGE)
        return g.op("MatMul", x, g.weight(f"{at}.weight", weight), at=at)

    def _norm(self, x: ir.Value, at: str) -> ir.Value:
        g = self.g
        mean = g.op("ReduceMean", g.op("Pow", x, self.two, at=at), self.last, at=at, keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, self.eps, at=at), at=at)
        weight = g.uniform(f"{at}.weight", self.sizes.dim, low=0.8, high=1.2)
        return g.op("Mul", g.op("Div", x, root, at=at), weight, at=at)

    def _heads(self, x: ir.Value, at: str, heads: int) -> ir.Value:
        shape = self.g.ints(f"{at}.shape", 1, 1, heads, self.sizes.head)
        return self.g.op("Transpose", self.g.op("Reshape", x, shape, at=at), at=at, perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value, at: str) -> ir.Value:
        g = self.g
        low = g.op("Slice", x, self.bounds[0], self.bounds[1], self.last, at=at)
        high = g.op("Slice", x, self.bounds[1], self.bounds[2], self.last, at=at)
        turned = g.op("Concat", g.op("Neg", high, at=at), low, at=at, axis=-1)
        return g.op("Add", g.op("Mul", x, self.cos, at=at), g.op("Mul", turned, self.sin, at=at), at=at)

    def _with_past(self, x: ir.Value, name: str, at: str) -> ir.Value:
        """What was there and the new row, the heads repeated for the queries that share them."""
        g, s = self.g, self.sizes
        shape = [1, s.kv_heads, s.past, s.head]
        past = g.input(f"past_{name}", shape)
        self.new.append(g.output(g.op("Identity", x, at=at), name, [1, s.kv_heads, 1, s.head]))
        whole = g.op("Concat", past, x, at=at, axis=2)
        whole = g.op("Unsqueeze", whole, g.ints(f"{at}.{name}.axis", 2), at=at)
        groups = g.ints(f"{at}.{name}.groups", 1, 1, s.heads // s.kv_heads, 1, 1)
        flat = g.ints(f"{at}.{name}.flat", 1, s.heads, s.past + 1, s.head)
        return g.op("Reshape", g.op("Expand", whole, groups, at=at), flat, at=at)

    def _layer(self, x: ir.Value, number: int) -> ir.Value:
        g, s, large = self.g, self.sizes, number % 2 == 1
        attn, mlp = f"layers.{number}.attn", f"layers.{number}.mlp"
        y = self._norm(x, f"layers.{number}.norm1")
        narrow = s.kv_heads * s.head
        q = self._heads(self._linear(y, f"{attn}.q", s.dim, s.dim, large), f"{attn}.q", s.heads)
        k = self._heads(self._linear(y, f"{attn}.k", s.dim, narrow, large), f"{attn}.k", s.kv_heads)
        v = self._heads(self._linear(y, f"{attn}.v", s.dim, narrow, large), f"{attn}.v", s.kv_heads)
        k = self._with_past(self._rotate(k, f"{attn}.k"), f"k.{number}", attn)
        v = self._with_past(v, f"v.{number}", attn)
        scores = g.op(
            "MatMul", self._rotate(q, f"{attn}.q"), g.op("Transpose", k, at=attn, perm=[0, 1, 3, 2]), at=attn
        )
        scores = g.op("Div", scores, self.root, at=attn)
        mixed = g.op("MatMul", g.op("Softmax", scores, at=attn, axis=-1), v, at=attn)
        mixed = g.op("Transpose", mixed, at=attn, perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, g.ints(f"{attn}.merge", 1, 1, s.dim), at=attn)
        x = g.op("Add", x, self._linear(mixed, f"{attn}.o", s.dim, s.dim, large), at=attn)
        y = self._norm(x, f"layers.{number}.norm2")
        gate = self._linear(y, f"{mlp}.gate", s.dim, s.hidden, large)
        gate = g.op("Mul", gate, g.op("Sigmoid", gate, at=mlp), at=mlp)
        up = g.op("Mul", gate, self._linear(y, f"{mlp}.up", s.dim, s.hidden, large), at=mlp)
        return g.op("Add", x, self._linear(up, f"{mlp}.down", s.hidden, s.dim, large), at=mlp)
