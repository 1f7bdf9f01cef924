"""reparameterize-branches: every block against its branches, every refusal with its reason."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from effic.ir.evaluate import Oracle, runnable_inputs
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.models.builders import BUILDERS
from effic.passes.base import Remarks
from effic.passes.fuse.fuse_conv_bn import FuseConvBN
from effic.passes.fuse.reparameterize_branches import ReparameterizeBranches

P1 = "pads = [1, 1, 1, 1]"


class Block:
    """A block in the ONNX text format, whose weights are drawn as its lines ask for them."""

    def __init__(self, channels: int = 6, seed: int = 0, size: int = 9) -> None:
        self.rng = np.random.default_rng(seed)
        self.channels, self.size = channels, size
        self.lines: list[str] = []
        self.weights: dict[str, np.ndarray] = {}
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def weight(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = array.astype(np.float32)
        return name

    def op(self, op: str, *inputs: str, out: str | None = None) -> str:
        out = out or self.name()
        self.lines.append(f"{out} = {op}({', '.join(inputs)})")
        return out

    def conv(
        self,
        x: str,
        outs: int,
        ins: int,
        *kernel: int,
        bias: bool = False,
        attributes: str = "",
        group: int = 1,
    ) -> str:
        inputs = [x, self.weight(self.rng.standard_normal((outs, ins // group, *kernel)))]
        if bias:
            inputs.append(self.weight(self.rng.standard_normal(outs)))
        return self.op(f"Conv<group = {group}{', ' if attributes else ''}{attributes}>", *inputs)

    def norm(self, x: str, channels: int | None = None, shift: bool = True) -> str:
        n = channels or self.channels
        values = [self.rng.uniform(0.5, 2, n), self.rng.standard_normal(n) * shift]
        values += [self.rng.standard_normal(n) * shift, self.rng.uniform(0.2, 3, n)]
        return self.op("BatchNormalization", x, *(self.weight(v) for v in values))

    def model(self, last: str, extra: str = "", axes: int = 2, opset: int = 19) -> Model:
        self.op("Relu", last, out="y")
        dims = f"N,{self.channels}" + f",{self.size}" * axes
        text = (
            f'<ir_version: 8, opset_import: ["": {opset}]> g (float[{dims}] x) => '
            f"(float[N{',?' * (axes + 1)}] y{extra}) {{ " + "\n".join(self.lines) + " }"
        )
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in self.weights.items())
        return Model(ir.from_proto(proto))

    def repvgg(self, group: int = 1, stride: int = 1, identity: bool = True, joined: str = "Add") -> str:
        step, c = f"strides = [{stride}, {stride}]", self.channels
        terms = [
            self.norm(self.conv("x", c, c, 3, 3, attributes=f"{P1}, {step}", group=group)),
            self.norm(self.conv("x", c, c, 1, 1, attributes=step, group=group)),
            *([self.norm("x")] if identity else []),
        ]
        if joined == "Sum":
            return self.op("Sum", *terms)
        out = terms[0]
        for term in terms[1:]:
            out = self.op("Add", out, term)
        return out


def merge(model: Model, **options: bool) -> Remarks:
    """Run the pass; check structure, outputs (before the final Relu cut them), and a second run."""
    (relu,) = (n for n in model.graph if n.outputs[0].name == "y")
    shape = [2, *(d if isinstance(d, int) else 1 for d in model.graph.inputs[0].shape.dims[1:])]
    inputs = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    relu.op_type = "Identity"
    want = Oracle(model).run(inputs)["y"]
    relu.op_type = "Relu"
    remarks = Remarks()
    ReparameterizeBranches(**options).apply(model, remarks)
    verify(model)
    relu.op_type = "Identity"
    got = Oracle(model).run(inputs)["y"]
    relu.op_type = "Relu"
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    again = Remarks()
    text = ir.to_proto(model.ir).SerializeToString()
    ReparameterizeBranches(**options).apply(model, again)
    assert again.count("passed") == 0
    assert ir.to_proto(model.ir).SerializeToString() == text
    return remarks


def ops(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.nodes())


def missed(remarks: Remarks) -> str:
    return " | ".join(item.text for item in remarks.items if item.kind == "missed")


def parameters(model: Model) -> int:
    return sum(int(np.prod(v.shape.numpy())) for v in model.graph.initializers.values())


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize(("stride", "identity"), [(1, True), (1, False), (2, False)])
@pytest.mark.parametrize("joined", ["Add", "Sum"])
def test_repvgg_block(group: int, stride: int, identity: bool, joined: str) -> None:
    block = Block()
    model = block.model(block.repvgg(group, stride, identity, joined))
    remarks = merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}
    assert parameters(model) == 6 * (6 // group) * 9 + 6
    assert remarks.count("passed") == 1


def test_repvgg_block_after_fuse_conv_bn() -> None:
    block = Block()
    model = block.model(block.repvgg())
    FuseConvBN().apply(model, Remarks())
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_plain_identity_and_norm_after_the_sum() -> None:
    block = Block()
    total = block.op("Add", "x", block.conv("x", 6, 6, 3, 3, attributes=P1))
    model = block.model(block.norm(total))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_asymmetric_branches() -> None:
    def build() -> tuple[Block, str]:
        block = Block()
        row = block.norm(block.conv("x", 6, 6, 1, 3, attributes="pads = [0, 1, 0, 1]"))
        column = block.norm(block.conv("x", 6, 6, 3, 1, attributes="pads = [1, 0, 1, 0]"))
        return block, block.op("Add", row, column)

    block, total = build()
    square = block.norm(block.conv("x", 6, 6, 3, 3, attributes=P1))
    model = block.model(block.op("Add", square, total))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}

    block, total = build()
    model = block.model(total)
    assert "would be larger" in missed(merge(model))
    merge(model, grow=True)
    assert ops(model) == {"Conv": 1, "Relu": 1}


@pytest.mark.parametrize("group", [1, 3])
def test_average_pooling(group: int) -> None:
    block = Block()
    pool = block.op(f"AveragePool<kernel_shape = [3, 3], count_include_pad = 1, {P1}>", "x")
    conv = block.conv("x", 6, 6, 3, 3, attributes=P1, group=group)
    model = block.model(block.op("Add", block.norm(pool), conv))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_average_pooling_without_padding_counts_nothing_else() -> None:
    block = Block()
    pool = block.op("AveragePool<kernel_shape = [3, 3]>", "x")
    model = block.model(block.op("Add", pool, block.conv("x", 6, 6, 3, 3)))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_a_pointwise_before_and_after_a_convolution() -> None:
    block = Block()
    inner = block.norm(block.conv("x", 10, 6, 1, 1), 10, shift=False)
    first = block.norm(block.conv(inner, 6, 10, 3, 3, attributes=P1))
    inner = block.norm(block.conv("x", 10, 6, 3, 3, attributes=P1, bias=True), 10)
    second = block.conv(inner, 6, 10, 1, 1, bias=True)
    inner = block.conv("x", 6, 6, 1, 1)
    third = block.norm(block.op(f"AveragePool<kernel_shape = [3, 3], count_include_pad = 1, {P1}>", inner))
    fourth = block.op(f"AveragePool<kernel_shape = [3, 3], count_include_pad = 1, {P1}>", "x")
    fourth = block.conv(block.norm(fourth), 6, 6, 1, 1, bias=True)
    model = block.model(block.op("Sum", first, second, third, fourth))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}
    assert parameters(model) == 6 * 6 * 9 + 6


def test_dilation_and_other_ranks() -> None:
    block = Block(size=12)
    wide = block.conv("x", 6, 6, 3, 3, attributes="pads = [2, 2, 2, 2], dilations = [2, 2]")
    model = block.model(block.op("Sum", wide, block.conv("x", 6, 6, 1, 1), "x"))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}
    for axes in (1, 3):
        block = Block()
        conv = block.conv("x", 6, 6, *[3] * axes, attributes=f"pads = {[1] * 2 * axes}")
        model = block.model(block.op("Sum", conv, block.conv("x", 6, 6, *[1] * axes), "x"), axes=axes)
        merge(model)
        assert ops(model) == {"Conv": 1, "Relu": 1}


def test_uneven_and_automatic_padding() -> None:
    block = Block()
    even = block.conv("x", 6, 6, 2, 4, attributes='auto_pad = "SAME_UPPER"')
    model = block.model(block.op("Sum", even, block.conv("x", 6, 6, 1, 1), "x"))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}
    block = Block()
    step = ", strides = [2, 2]"
    auto = block.conv("x", 6, 6, 3, 3, attributes='auto_pad = "SAME_LOWER"' + step)
    model = block.model(block.op("Add", auto, block.conv("x", 6, 6, 1, 1, attributes="strides = [2, 2]")))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_terms_from_elsewhere_stay_in_the_sum() -> None:
    block = Block()
    other = block.op("Sigmoid", "x")
    model = block.model(block.op("Add", block.op("Add", block.repvgg(), other), other))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1, "Sigmoid": 1, "Add": 2}


def test_graph_output_keeps_its_name() -> None:
    block = Block()
    total = block.repvgg()
    model = block.model(total, extra=f", float[N,?,?,?] {total}")
    merge(model)
    assert [v.name for v in model.graph.outputs] == ["y", total]
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_two_blocks_in_a_row() -> None:
    block = Block()
    first = block.op("Relu", block.repvgg())
    second = block.op("Add", block.norm(block.conv(first, 6, 6, 3, 3, attributes=P1)), block.norm(first))
    model = block.model(second)
    assert merge(model).count("passed") == 2
    assert ops(model) == {"Conv": 2, "Relu": 2}


def test_shared_weights_stay() -> None:
    block = Block()
    weight = block.weight(block.rng.standard_normal((6, 6, 3, 3)))
    one = block.op(f"Conv<{P1}>", "x", weight)
    total = block.op("Relu", block.op("Add", one, "x"))
    model = block.model(block.op(f"Conv<{P1}>", total, weight))
    merge(model)
    assert ops(model) == {"Conv": 2, "Relu": 2}
    assert weight in model.graph.initializers


def refused(block: Block, *terms: str) -> str:
    model = block.model(block.op("Sum", *terms))
    before = ops(model)
    reason = missed(merge(model))
    assert ops(model) == before
    return reason


def test_refused_misaligned() -> None:
    # Both give four outputs for eight inputs, but five and four for nine.
    block = Block(size=8)
    step = ", strides = [2, 2]"
    large = block.conv("x", 6, 6, 3, 3, attributes=P1 + step)
    small = block.conv("x", 6, 6, 2, 2, attributes="pads = [0, 0, 0, 0]" + step)
    assert "misaligned" in refused(block, large, small)


def test_kernels_side_by_side_need_a_larger_one() -> None:
    def build() -> Model:
        block = Block()
        left = block.conv("x", 6, 6, 3, 3, attributes="pads = [2, 2, 0, 0]")
        return block.model(
            block.op("Add", left, block.conv("x", 6, 6, 3, 3, attributes="pads = [0, 0, 2, 2]"))
        )

    assert "merged kernel 5x5 would be larger" in missed(merge(build()))
    model = build()
    merge(model, grow=True)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_a_corner_kernel_fits_anywhere_inside_the_larger_one() -> None:
    block = Block()
    corner = block.conv("x", 6, 6, 2, 2, attributes="pads = [1, 1, 0, 0]")
    model = block.model(block.op("Add", corner, block.conv("x", 6, 6, 3, 3, attributes=P1)))
    merge(model)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_refused_dilated_off_the_grid() -> None:
    block = Block()
    wide = block.conv("x", 6, 6, 3, 3, attributes="pads = [2, 2, 2, 2], dilations = [2, 2]")
    near = block.conv("x", 6, 6, 3, 3, attributes=P1)
    assert "dilated by [1, 2]" in refused(block, wide, near)


def test_refused_groups_and_identity_with_a_step() -> None:
    block = Block()
    grouped = block.conv("x", 6, 6, 3, 3, attributes=P1, group=2)
    assert "groups" in refused(block, grouped, block.conv("x", 6, 6, 1, 1))
    # Broadcasting makes the sum of sizes 1 and 1 legal whatever the step.
    block = Block(size=1)
    stepped = block.conv("x", 6, 6, 3, 3, attributes=P1 + ", strides = [2, 2]")
    assert "step by [1, 2]" in refused(block, stepped, "x")


def test_refused_reused_branch() -> None:
    block = Block()
    conv = block.conv("x", 6, 6, 3, 3, attributes=P1)
    other = block.op("Sigmoid", conv)
    assert "read elsewhere" in refused(block, block.norm(conv), block.norm("x"), other)


def test_refused_activation_in_a_branch() -> None:
    block = Block()
    conv = block.conv(block.op("Relu", block.conv("x", 6, 6, 3, 3, attributes=P1)), 6, 6, 3, 3, attributes=P1)
    assert "through linear operators alone" in refused(block, conv, "x")


def test_refused_pooling() -> None:
    block = Block()
    conv = block.conv("x", 6, 6, 3, 3, attributes=P1)
    pool = block.op(f"AveragePool<kernel_shape = [3, 3], {P1}>", "x")
    assert "count_include_pad=0" in refused(block, conv, pool)
    block = Block()
    conv = block.conv("x", 6, 6, 3, 3, attributes=P1)
    pool = block.op(f"AveragePool<kernel_shape = [3, 3], count_include_pad = 1, ceil_mode = 1, {P1}>", "x")
    assert "ceil_mode" in refused(block, conv, pool)
    block = Block()
    assert not refused(block, "x", block.op("Relu", "x"))


def test_refused_border_of_a_shift() -> None:
    block = Block()
    inner = block.norm(block.conv("x", 10, 6, 1, 1), 10)
    branch = block.conv(inner, 6, 10, 3, 3, attributes=P1)
    assert "does not reach the border" in refused(block, branch, block.conv("x", 6, 6, 3, 3, attributes=P1))


def test_refused_two_large_kernels_in_a_row() -> None:
    block = Block()
    branch = block.conv(block.conv("x", 6, 6, 3, 3, attributes=P1), 6, 6, 3, 3, attributes=P1)
    assert "two convolutions in a row" in refused(block, branch, "x")


def test_refused_channels_that_only_broadcast() -> None:
    block = Block()
    narrow = block.conv("x", 1, 6, 3, 3, attributes=P1)
    assert "channels" in refused(block, narrow, block.conv("x", 6, 6, 3, 3, attributes=P1))


def test_refused_weight_at_run_time() -> None:
    block = Block()
    weight = block.op("Relu", block.weight(block.rng.standard_normal((6, 6, 3, 3))))
    assert "computed at run time" in refused(block, block.op(f"Conv<{P1}>", "x", weight), "x")


@pytest.mark.parametrize("name", list(BUILDERS))
def test_builders_keep_their_outputs(name: str) -> None:
    model = Model(BUILDERS[name]())
    inputs, want = runnable_inputs(model, Oracle(model))
    ReparameterizeBranches().apply(model, Remarks())
    verify(model)
    got = Oracle(model).run(inputs)
    for key, array in want.items():
        assert np.abs(got[key].astype(np.float64) - array).max() <= 1e-4 * max(1e-6, np.abs(array).max())


def test_inside_a_branch_with_a_captured_source() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
    g (bool b, float[2,4,5,5] x) => (float[2,4,5,5] y) {
      y = If(b) <then_branch = t () => (float[2,4,5,5] yt) { c = Conv<pads = [1, 1, 1, 1]>(x, w) yt = Add(c, x) },
                 else_branch = e () => (float[2,4,5,5] yo) { yo = Relu(x) }>
    }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    proto.graph.initializer.append(
        numpy_helper.from_array(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), "w")
    )
    model = Model(ir.from_proto(proto))
    inputs = {"b": np.array(True), "x": rng.standard_normal((2, 4, 5, 5)).astype(np.float32)}
    want = Oracle(model).run(inputs)["y"]
    ReparameterizeBranches().apply(model, Remarks())
    verify(model)
    assert ops(model) == {"If": 1, "Conv": 1, "Relu": 1}
    assert np.abs(Oracle(model).run(inputs)["y"] - want).max() <= 1e-4 * np.abs(want).max()


def test_weights_are_summed_in_double_precision_for_half_models() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
    g (float16[1,1,1,1] x) => (float16[1,1,1,1] y) {
      a = Conv(x, p) b = Conv(x, q) c = Conv(x, r) y = Sum(a, b, c)
    }"""
    proto = onnx.parser.parse_model(text)
    # In float16, 2048 + 1 + 1 added one by one stays 2048.
    for name, value in (("p", 2048.0), ("q", 1.0), ("r", 1.0)):
        proto.graph.initializer.append(
            numpy_helper.from_array(np.full((1, 1, 1, 1), value, np.float16), name)
        )
    model = Model(ir.from_proto(proto))
    ReparameterizeBranches().apply(model, Remarks())
    (conv,) = model.nodes()
    assert conv.inputs[1].const_value.numpy().item() == 2050.0
