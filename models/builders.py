"""Seeded models for the tests: every shape of graph the passes must get right, from numpy alone.

Each builder returns a valid ``onnx_ir`` model that ONNX Runtime runs, the same one for the same
arguments. Batch and sequence lengths are dynamic; weights are scaled so that outputs are finite and
differ from input to input. Batch norms are never fused, linear layers come in all the forms that
exporters write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.models.sketch import Dim, Sketch

INT64 = ir.DataType.INT64
BOOL = ir.DataType.BOOL

POSITIONS = 128
"""Longest sequence of :func:`encoder`: more than any test feeds."""

MASKED = -1e4
"""Score of a masked position: far below any other, and finite so that a fully masked row is too."""


def cnn(seed: int = 0, size: int = 16, batch: Dim = "N", opset: int = 18) -> ir.Model:
    """A small residual network with a depthwise block, every convolution followed by a batch norm.

    Args:
        seed: of the weights.
        size: height and width of the image, at least 4.
        batch: batch size, or the name of the dynamic one.
        opset: 9 or later.

    Input ``x`` float32 [batch, 3, size, size]; output ``logits`` float32 [batch, 10].
    """
    g = Sketch(seed, opset)
    x = g.input("x", [batch, 3, size, size])

    def conv_bn(
        x: ir.Value, at: str, number: str, cin: int, cout: int, kernel: int = 3, **more: Any
    ) -> ir.Value:
        y = g.conv(x, f"{at}.conv{number}", cin, cout, kernel, **more)
        return g.norm(y, f"{at}.bn{number}", cout)

    h = g.op("Relu", conv_bn(x, "stem", "", 3, 16), at="stem")
    # A basic block: two convolutions around an identity shortcut.
    y = g.op("Relu", conv_bn(h, "layer1", "1", 16, 16), at="layer1")
    y = conv_bn(y, "layer1", "2", 16, 16)
    h = g.op("Relu", g.op("Add", y, h, at="layer1"), at="layer1")
    # An inverted bottleneck: expand, depthwise, project without an activation.
    y = g.op("Relu", conv_bn(h, "layer2", "1", 16, 48, 1), at="layer2")
    y = g.op("Relu", conv_bn(y, "layer2", "2", 48, 48, 3, stride=2, groups=48), at="layer2")
    h = conv_bn(y, "layer2", "3", 48, 32, 1)
    # A basic block whose shortcut is a convolution of its own; its first convolution has a bias.
    y = g.op("Relu", conv_bn(h, "layer3", "1", 32, 32, stride=2, bias=True), at="layer3")
    y = conv_bn(y, "layer3", "2", 32, 32)
    short = conv_bn(h, "layer3.downsample", "", 32, 32, 1, stride=2)
    h = g.op("Relu", g.op("Add", y, short, at="layer3"), at="layer3")
    h = g.op("Flatten", g.op("GlobalAveragePool", h, at="pool"), at="pool", axis=1)
    logits = g.linear(h, "fc", 32, 10, form="gemm")
    return g.model(g.output(logits, "logits", [batch, 10]))


def encoder(seed: int = 0, layers: int = 2, dim: int = 32, heads: int = 4, vocab: int = 100) -> ir.Model:
    """A transformer encoder in the manner of BERT, with a classifier on the first token.

    Projections of the attention lie behind a Transpose, those of the feed-forward do not, and the
    head is a Gemm: the three forms of a linear layer. GELU is written out with Erf.

    Inputs ``input_ids`` int64 [batch, sequence] in [0, vocab), ``attention_mask`` int64 [batch,
    sequence] (0 is masked), sequence at most 128; outputs ``last_hidden_state`` float32 [batch,
    sequence, dim] and ``logits`` float32 [batch, 3].
    """
    g = Sketch(seed)
    ids = g.input("input_ids", ["batch", "sequence"], INT64)
    mask = g.input("attention_mask", ["batch", "sequence"], INT64)
    first, step = g.scalar("zero", 0), g.scalar("one", 1)
    split = g.ints("split_heads", 0, 0, heads, dim // heads)
    merge = g.ints("merge_heads", 0, 0, dim)

    def layer_norm(x: ir.Value, at: str) -> ir.Value:
        scale = g.uniform(f"{at}.weight", dim, low=0.8, high=1.2)
        bias = g.uniform(f"{at}.bias", dim, low=-0.1, high=0.1)
        return g.op("LayerNormalization", x, scale, bias, at=at, axis=-1, epsilon=1e-5)

    def attention(x: ir.Value, hidden: ir.Value, at: str) -> ir.Value:
        q, k, v = (
            g.op("Reshape", g.linear(x, f"{at}.{part}", dim, dim, form="transposed"), split, at=at)
            for part in ("query", "key", "value")
        )
        q = g.op("Transpose", q, at=at, perm=[0, 2, 1, 3])
        k = g.op("Transpose", k, at=at, perm=[0, 2, 3, 1])
        v = g.op("Transpose", v, at=at, perm=[0, 2, 1, 3])
        scores = g.op("Div", g.op("MatMul", q, k, at=at), root, at=at)
        weights = g.op("Softmax", g.op("Add", scores, hidden, at=at), at=at, axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", weights, v, at=at), at=at, perm=[0, 2, 1, 3])
        mixed = g.op("Reshape", mixed, merge, at=at)
        return g.linear(mixed, f"{at}.output", dim, dim, form="transposed")

    def gelu(x: ir.Value, at: str) -> ir.Value:
        erf = g.op("Erf", g.op("Div", x, root2, at=at), at=at)
        return g.op("Mul", g.op("Mul", x, g.op("Add", erf, one, at=at), at=at), half, at=at)

    root = g.scalar("root_head_dim", math.sqrt(dim // heads))
    root2, one, half = g.scalar("root_2", math.sqrt(2.0)), g.scalar("one_f", 1.0), g.scalar("half", 0.5)

    tokens = g.op(
        "Gather", g.normal("embeddings.word.weight", vocab, dim, fan_in=1), ids, at="embeddings.word"
    )
    length = g.op(
        "Gather", g.op("Shape", ids, at="embeddings"), g.scalar("sequence_axis", 1), at="embeddings", axis=0
    )
    places = g.op("Range", first, length, step, at="embeddings")
    table = g.normal("embeddings.position.weight", POSITIONS, dim, fan_in=4)
    position = g.op("Gather", table, places, at="embeddings.position")
    x = layer_norm(g.op("Add", tokens, position, at="embeddings"), "embeddings.norm")

    seen = g.op(
        "Cast", g.op("Unsqueeze", mask, g.ints("mask_axes", 1, 2), at="mask"), at="mask", to=BOOL.value
    )
    hidden = g.op("Where", seen, g.scalar("visible", 0.0), g.scalar("masked", MASKED), at="mask")
    for i in range(layers):
        at = f"layer.{i}"
        x = layer_norm(g.op("Add", x, attention(x, hidden, f"{at}.attention"), at=at), f"{at}.attention.norm")
        y = gelu(g.linear(x, f"{at}.up", dim, 4 * dim), f"{at}.act")
        y = g.linear(y, f"{at}.down", 4 * dim, dim)
        x = layer_norm(g.op("Add", x, y, at=at), f"{at}.norm")
    start = g.op("Gather", x, g.scalar("first_token", 0), at="pooler", axis=1)
    pooled = g.op("Tanh", g.linear(start, "pooler", dim, dim, form="gemm"), at="pooler")
    logits = g.linear(pooled, "classifier", dim, 3, form="gemm")
    return g.model(
        g.output(x, "last_hidden_state", ["batch", "sequence", dim]), g.output(logits, "logits", ["batch", 3])
    )


def llama(
    seed: int = 0,
    layers: int = 2,
    dim: int = 64,
    hidden: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 128,
    tied: bool = True,
) -> ir.Model:
    """A Llama-style decoder: RMS norm, rotary positions, grouped-query attention, SwiGLU, causal mask.

    With ``tied``, one initializer ``embed_tokens.weight`` [vocab, dim] is the table of the embedding
    and, behind a Transpose, the weight of the head; else the head has ``lm_head.weight`` [dim, vocab].

    Input ``input_ids`` int64 [batch, sequence] in [0, vocab); output ``logits`` float32 [batch,
    sequence, vocab].
    """
    g = Sketch(seed)
    ids = g.input("input_ids", ["batch", "sequence"], INT64)
    table = g.normal("embed_tokens.weight", vocab, dim, fan_in=1 if not tied else dim, gain=1.0)
    x = g.op("Gather", table, ids, at="embed_tokens")
    decoder = Decoder(g, ids, dim=dim, hidden=hidden, heads=heads, kv_heads=kv_heads)
    for i in range(layers):
        x = decoder.layer(x, f"layers.{i}")
    x = decoder.rms_norm(x, "norm")
    if tied:
        head = g.op("Transpose", table, at="lm_head", perm=[1, 0])
        logits = g.op("MatMul", x, head, at="lm_head")
    else:
        logits = g.linear(x, "lm_head", dim, vocab, bias=False)
    return g.model(g.output(logits, "logits", ["batch", "sequence", vocab]))


class Decoder:
    """The layers of a Llama-style decoder, drawn on a sketch; what all layers share is drawn once.

    Args:
        g: the sketch.
        ids: token ids [batch, sequence], read for the sequence length.
        dim: width of the residual stream.
        hidden: width of the feed-forward.
        heads: query heads; ``dim / heads`` must be even.
        kv_heads: key and value heads, a divisor of ``heads``.
    """

    def __init__(self, g: Sketch, ids: ir.Value, *, dim: int, hidden: int, heads: int, kv_heads: int) -> None:
        self.g, self.dim, self.hidden, self.heads, self.kv_heads = g, dim, hidden, heads, kv_heads
        self.head_dim = dim // heads
        at = "rotary"
        zero, one = g.scalar("zero", 0), g.scalar("one", 1)
        length = g.op("Gather", g.op("Shape", ids, at=at), one, at=at, axis=0)
        places = g.op("Range", zero, length, one, at=at)
        column = g.op("Unsqueeze", places, g.ints("axis_1", 1), at=at)
        row = g.op("Unsqueeze", places, g.ints("axis_0", 0), at=at)
        # Rotary positions: angle[t, i] = t / 10000^(2i / head_dim), each frequency used by two halves.
        frequency = 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        inverse = g.weight("rotary.inv_freq", frequency[None].astype(np.float32))
        float_column = g.op("Cast", column, at=at, to=ir.DataType.FLOAT.value)
        half = g.op("MatMul", float_column, inverse, at=at)
        angle = g.op("Concat", half, half, at=at, axis=-1)
        self.cos, self.sin = g.op("Cos", angle, at=at), g.op("Sin", angle, at=at)
        future = g.op("Greater", row, column, at="mask")
        self.mask = g.op("Where", future, g.scalar("masked", MASKED), g.scalar("visible", 0.0), at="mask")
        self.two, self.eps = g.scalar("two", 2.0), g.scalar("norm_eps", 1e-5)
        self.root = g.scalar("root_head_dim", math.sqrt(self.head_dim))
        self.last_axis = g.ints("last_axis", -1)
        self.bounds = [g.ints(f"bound_{i}", v) for i, v in enumerate((0, self.head_dim // 2, self.head_dim))]
        self.merge = g.ints("merge_heads", 0, 0, dim)
        self.split_q = g.ints("split_q", 0, 0, heads, self.head_dim)
        if heads != kv_heads:
            self.split_kv = g.ints("split_kv", 0, 0, kv_heads, self.head_dim)
            self.group_axis = g.ints("group_axis", 2)
            self.groups = g.ints("groups", 1, 1, heads // kv_heads, 1, 1)
            self.ungroup = g.ints("ungroup", 0, heads, -1, self.head_dim)

    def rms_norm(self, x: ir.Value, at: str) -> ir.Value:
        """x / sqrt(mean(x²) + eps) · weight, written out."""
        g = self.g
        square = g.op("Pow", x, self.two, at=at)
        mean = g.op("ReduceMean", square, self.last_axis, at=at, keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, self.eps, at=at), at=at)
        weight = g.uniform(f"{at}.weight", self.dim, low=0.8, high=1.2)
        return g.op("Mul", g.op("Div", x, root, at=at), weight, at=at)

    def rotate(self, x: ir.Value, at: str) -> ir.Value:
        """Rotary positions on [batch, heads, sequence, head_dim]."""
        g = self.g
        low = g.op("Slice", x, self.bounds[0], self.bounds[1], self.last_axis, at=at)
        high = g.op("Slice", x, self.bounds[1], self.bounds[2], self.last_axis, at=at)
        turned = g.op("Concat", g.op("Neg", high, at=at), low, at=at, axis=-1)
        return g.op("Add", g.op("Mul", x, self.cos, at=at), g.op("Mul", turned, self.sin, at=at), at=at)

    def heads_of(self, x: ir.Value, at: str, heads: int) -> ir.Value:
        """A projection split into heads: [batch, heads, sequence, head_dim]."""
        y = self.g.linear(x, at, self.dim, heads * self.head_dim, bias=False)
        y = self.g.op("Reshape", y, self.split_q if heads == self.heads else self.split_kv, at=at)
        return self.g.op("Transpose", y, at=at, perm=[0, 2, 1, 3])

    def repeat(self, x: ir.Value, at: str) -> ir.Value:
        """Key or value heads repeated for the query heads that share them."""
        if self.heads == self.kv_heads:
            return x
        x = self.g.op("Unsqueeze", x, self.group_axis, at=at)
        return self.g.op("Reshape", self.g.op("Expand", x, self.groups, at=at), self.ungroup, at=at)

    def layer(self, x: ir.Value, at: str) -> ir.Value:
        """One decoder layer: x [batch, sequence, dim] in and out."""
        g, attn, mlp = self.g, f"{at}.self_attn", f"{at}.mlp"
        y = self.rms_norm(x, f"{at}.input_layernorm")
        q = self.rotate(self.heads_of(y, f"{attn}.q_proj", self.heads), attn)
        k = self.rotate(self.heads_of(y, f"{attn}.k_proj", self.kv_heads), attn)
        k = self.repeat(k, attn)
        v = self.repeat(self.heads_of(y, f"{attn}.v_proj", self.kv_heads), attn)
        scores = g.op("MatMul", q, g.op("Transpose", k, at=attn, perm=[0, 1, 3, 2]), at=attn)
        scores = g.op("Add", g.op("Div", scores, self.root, at=attn), self.mask, at=attn)
        mixed = g.op("MatMul", g.op("Softmax", scores, at=attn, axis=-1), v, at=attn)
        mixed = g.op("Reshape", g.op("Transpose", mixed, at=attn, perm=[0, 2, 1, 3]), self.merge, at=attn)
        x = g.op("Add", x, g.linear(mixed, f"{attn}.o_proj", self.dim, self.dim, bias=False), at=attn)
        y = self.rms_norm(x, f"{at}.post_attention_layernorm")
        gate = g.linear(y, f"{mlp}.gate_proj", self.dim, self.hidden, bias=False)
        gate = g.op("Mul", gate, g.op("Sigmoid", gate, at=mlp), at=mlp)
        up = g.op("Mul", gate, g.linear(y, f"{mlp}.up_proj", self.dim, self.hidden, bias=False), at=mlp)
        return g.op("Add", x, g.linear(up, f"{mlp}.down_proj", self.hidden, self.dim, bias=False), at=mlp)


def control_flow(seed: int = 0) -> ir.Model:
    """An If and a Loop with weights inside their subgraphs and weights captured from outside.

    The If tests the sign of the input's sum. Its then-branch holds a Conv and BatchNormalization with
    initializers of its own, its else-branch reads those of the main graph. The Loop runs three times over
    ``h = tanh(h @ W + b)``, W its own and b captured, and also stacks each step's ``h``.

    Input ``x`` float32 [N, 3, 8, 8]; outputs ``y`` float32 [N, 16] and ``steps`` float32 [3, N, 16].
    """
    g = Sketch(seed)
    x = g.input("x", ["N", 3, 8, 8])
    outer_weight = g.normal("outer.conv.weight", 16, 3, 3, 3, fan_in=27)
    outer_norm = [
        g.uniform("outer.bn.weight", 16, low=0.6, high=1.4),
        g.uniform("outer.bn.bias", 16, low=-0.3, high=0.3),
        g.uniform("outer.bn.running_mean", 16, low=-0.5, high=0.5),
        g.uniform("outer.bn.running_var", 16, low=0.5, high=2.0),
    ]

    then = Sketch(g.rng, g.opset, "then_branch")
    inner = then.norm(then.conv(x, "then.conv", 3, 16, bias=True), "then.bn", 16)
    other = Sketch(g.rng, g.opset, "else_branch")
    outer = other.op("Conv", x, outer_weight, at="else.conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    outer = other.op("BatchNormalization", outer, *outer_norm, at="else.bn")
    image: list[Dim] = ["N", 16, 8, 8]
    branches: dict[str, Any] = {
        "then_branch": then.graph(then.output(inner, "then_out", image)),
        "else_branch": other.graph(other.output(outer, "else_out", image)),
    }
    positive = g.op(
        "Greater", g.op("ReduceSum", x, at="cond", keepdims=0), g.scalar("zero_f", 0.0), at="cond"
    )
    chosen = g.op("If", positive, at="branch", **branches)
    pooled = g.op("GlobalAveragePool", g.op("Relu", chosen, at="branch"), at="pool")
    state = g.op("Flatten", pooled, at="pool", axis=1)

    bias = g.uniform("loop.bias", 16, low=-0.5, high=0.5)
    body = Sketch(g.rng, g.opset, "loop_body")
    body.input("iteration", [], INT64)
    going = body.input("going", [], BOOL)
    h = body.input("h", ["N", 16])
    product = body.op("MatMul", h, body.normal("loop.weight", 16, 16, fan_in=16, gain=1.5), at="loop")
    h = body.op("Tanh", body.op("Add", product, bias, at="loop"), at="loop")
    loop = body.graph(
        body.output(body.op("Identity", going, at="loop"), "going_out", [], BOOL),
        body.output(h, "h_out", ["N", 16]),
        body.output(body.op("Identity", h, at="loop"), "step_out", ["N", 16]),
    )
    y, steps = g.multi(
        "Loop", g.scalar("trips", 3), g.scalar("always", True), state, outputs=2, at="loop", body=loop
    )
    return g.model(g.output(y, "y", ["N", 16]), g.output(steps, "steps", [3, "N", 16]))


LIBRARY = "effic.test"
"""Domain of the functions of :func:`functions`."""


def functions(seed: int = 0) -> ir.Model:
    """Calls of model-local functions: weights as arguments, weights inside, attributes by reference.

    ``Dense(x, w, b) {slope}`` is MatMul, Add and a LeakyRelu whose ``alpha`` refers to ``slope``;
    ``ConvBlock(x) {slope}`` holds the weights of a Conv and BatchNormalization in Constant nodes and
    passes its ``slope`` on; both are called twice with different slopes, and ``Head`` calls ``Dense``
    from within a function.

    Input ``x`` float32 [N, 3, 8, 8]; output ``y`` float32 [N, 10].
    """
    g = Sketch(seed)

    def slope() -> ir.Attr:
        return ir.RefAttr("alpha", "slope", ir.AttributeType.FLOAT)

    def finish(f: Sketch, name: str, output: ir.Value, refers: bool = True) -> ir.Function:
        attributes = [ir.Attr("slope", ir.AttributeType.FLOAT, None)] if refers else []
        body = ir.Graph(f.inputs, [output], nodes=f.nodes, opset_imports={"": f.opset, LIBRARY: 1}, name=name)
        return ir.Function(LIBRARY, name, graph=body, attributes=attributes)

    f = Sketch(g.rng, g.opset, "dense")
    x, w, b = (f.input(name, None) for name in ("x", "w", "b"))
    y = f.op("Add", f.op("MatMul", x, w), b)
    dense = finish(f, "Dense", f.op("LeakyRelu", y, alpha=slope()))

    f = Sketch(g.rng, g.opset, "conv_block")

    def constant(name: str, array: np.ndarray) -> ir.Value:
        value = f.op("Constant", at=name, value=ir.tensor(array.astype(np.float32), name=name))
        value.name = name
        return value

    x = f.input("x", None)
    weight = constant("conv_weight", g.rng.standard_normal((3, 3, 3, 3)) / 3)
    y = f.op("Conv", x, weight, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    norm = [("scale", 0.6, 1.4), ("bias", -0.3, 0.3), ("mean", -0.5, 0.5), ("var", 0.5, 2.0)]
    parts = [constant(f"bn_{name}", g.rng.uniform(low, high, 3)) for name, low, high in norm]
    y = f.op("BatchNormalization", y, *parts)
    conv_block = finish(f, "ConvBlock", f.op("LeakyRelu", y, alpha=slope()))

    f = Sketch(g.rng, g.opset, "head")
    x, w, b = (f.input(name, None) for name in ("x", "w", "b"))
    y = f.op("Dense", x, w, b, domain=LIBRARY, slope=1.0)
    head = finish(f, "Head", f.op("Identity", y), refers=False)

    h = g.input("x", ["N", 3, 8, 8])
    for i, value in enumerate((0.1, 0.3)):
        h = g.op("ConvBlock", h, at=f"block.{i}", domain=LIBRARY, slope=value)
    h = g.op("Flatten", h, at="flatten", axis=1)
    for i, (inputs, outputs) in enumerate(((192, 32), (32, 32))):
        w = g.normal(f"dense.{i}.weight", inputs, outputs, fan_in=inputs)
        b = g.uniform(f"dense.{i}.bias", outputs, low=-0.1, high=0.1)
        h = g.op("Dense", h, w, b, at=f"dense.{i}", domain=LIBRARY, slope=0.1 * (i + 1))
    w = g.normal("head.weight", 32, 10, fan_in=32)
    y = g.op("Head", h, w, g.uniform("head.bias", 10, low=-0.1, high=0.1), at="head", domain=LIBRARY)
    return g.model(g.output(y, "y", ["N", 10]), functions=[dense, conv_block, head])


def shared_weights(seed: int = 0) -> ir.Model:
    """Initializers with several readers, which a pass must neither overwrite nor lose.

    One Conv weight serves three convolutions: two followed by batch norms of different statistics, one
    by none. One bias is shared by two of them. One MatMul weight is applied twice in a row, and once
    more transposed.

    Input ``x`` float32 [N, 8, 8, 8]; output ``y`` float32 [N, 16].
    """
    g = Sketch(seed)
    x = g.input("x", ["N", 8, 8, 8])
    weight = g.normal("shared.conv.weight", 8, 8, 3, 3, fan_in=72)
    bias = g.uniform("shared.conv.bias", 8, low=-0.2, high=0.2)

    def conv(x: ir.Value, at: str, *more: ir.Value) -> ir.Value:
        return g.op("Conv", x, weight, *more, at=at, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    a = g.op("Relu", g.norm(conv(x, "a.conv", bias), "a.bn", 8), at="a")
    b = g.op("Relu", g.norm(conv(a, "b.conv", bias), "b.bn", 8), at="b")
    c = g.op("Relu", conv(b, "c.conv"), at="c")
    h = g.op(
        "Flatten", g.op("GlobalAveragePool", g.op("Concat", a, c, at="join", axis=1), at="pool"), at="pool"
    )
    matrix = g.normal("shared.linear.weight", 16, 16, fan_in=16)
    h = g.op("Tanh", g.op("MatMul", h, matrix, at="linear.0"), at="linear.0")
    h = g.op("Tanh", g.op("MatMul", h, matrix, at="linear.1"), at="linear.1")
    flipped = g.op("Transpose", matrix, at="linear.2", perm=[1, 0])
    y = g.op("MatMul", h, flipped, at="linear.2")
    return g.model(g.output(y, "y", ["N", 16]))


def grouped_transposed(seed: int = 0) -> ir.Model:
    """Grouped, dilated, depthwise and transposed convolutions, each followed by a batch norm.

    A ConvTranspose weight is [in, out / groups, kh, kw]: its output channels lie on another axis than a
    Conv's and are spread over the groups, which is where fusions go wrong.

    Input ``x`` float32 [N, 8, 8, 8]; output ``y`` float32 [N, 4, 18, 18].
    """
    g = Sketch(seed)
    h = g.input("x", ["N", 8, 8, 8])

    def transposed(
        x: ir.Value, at: str, cin: int, cout: int, groups: int, bias: bool, **more: Any
    ) -> ir.Value:
        fan_in = cin // groups * 4
        weight = g.normal(f"{at}.weight", cin, cout // groups, 3, 3, fan_in=fan_in, gain=1.4)
        offset = g.uniform(f"{at}.bias", cout, low=-0.2, high=0.2) if bias else None
        return g.op("ConvTranspose", x, weight, offset, at=at, kernel_shape=[3, 3], group=groups, **more)

    def end(x: ir.Value, at: str, channels: int) -> ir.Value:
        return g.op("Relu", g.norm(x, at, channels), at=at)

    h = end(g.conv(h, "grouped", 8, 12, groups=4, bias=True), "grouped.bn", 12)
    h = end(g.conv(h, "dilated", 12, 12, groups=3, dilation=2), "dilated.bn", 12)
    h = end(g.conv(h, "depthwise", 12, 24, groups=12), "depthwise.bn", 24)
    h = end(
        transposed(h, "up", 24, 12, 3, False, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        "up.bn",
        12,
    )
    h = end(transposed(h, "up_depthwise", 12, 12, 12, True, pads=[1, 1, 1, 1]), "up_depthwise.bn", 12)
    y = g.norm(transposed(h, "up_dense", 12, 4, 1, True), "up_dense.bn", 4)
    return g.model(g.output(y, "y", ["N", 4, 18, 18]))


BUILDERS: dict[str, Callable[..., ir.Model]] = {
    "cnn": cnn,
    "encoder": encoder,
    "llama": llama,
    "control_flow": control_flow,
    "functions": functions,
    "shared_weights": shared_weights,
    "grouped_transposed": grouped_transposed,
}
"""The builders by name; each can be called without arguments."""
