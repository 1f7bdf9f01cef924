"""Networks of convolutions through the whole lowering: the oracle's numbers, and which kernels do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.models.sketch import Sketch
from tests.backends.tvm.module_runs import Lowered

Draw = Callable[[Sketch, ir.Value], ir.Value]


def check(
    draw: Draw, shape: Sequence[int | str] = (1, 3, 12, 13), batch: int | None = None, opset: int = 18
) -> list[str]:
    """Draw a network, compile it, hold it against the oracle; return the names of the functions in it."""
    g = Sketch(0, opset)
    output = draw(g, g.input("x", list(shape)))
    model = Model(g.model(g.output(output, "y", None)))
    size = [batch or 1 if isinstance(d, str) else d for d in shape]
    x = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    want = Oracle(model).run({"x": x})["y"]
    lowered = Lowered(model)
    got = lowered.run({"x": x})["y"]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(np.abs(want).max())), rtol=0)
    return [variable.name_hint for variable in lowered.module.get_global_vars()]


def conv(g: Sketch, x: ir.Value, at: str, cin: int, cout: int, kernel: int = 3, **more: Any) -> ir.Value:
    return g.conv(x, at, cin, cout, kernel, **more)


def test_what_follows_a_convolution_is_part_of_its_kernel() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = g.op("Relu", g.norm(conv(g, x, "a", 3, 20), "n", 20))
        y = g.norm(conv(g, h, "b", 20, 20, bias=True), "m", 20)
        y = g.op("Relu", g.op("Add", h, y))
        shift = g.normal("shift", 24, 1, 1, fan_in=4)
        y = g.op("Add", conv(g, y, "c", 20, 24, 1), shift)
        return g.op("Clip", y, g.scalar("low", -0.5), g.scalar("high", 0.75))

    names = check(draw)
    assert sum(name.startswith("conv_") for name in names) == 3
    assert any("_residual_activationrelu" in name for name in names)
    assert any("plain_input" in name for name in names)
    assert any("activationclip" in name for name in names)


def test_a_value_that_others_read_is_not_fused_away() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        y = conv(g, x, "a", 3, 16, bias=True)
        z = g.op("Relu", y)
        return g.op("Add", g.op("Mul", z, z), y)

    check(draw)


def test_a_shortcut_that_is_made_later_is_added_by_its_own_convolution() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = g.op("Relu", conv(g, x, "a", 3, 16))
        y = conv(g, h, "b", 16, 32, stride=2)
        short = conv(g, h, "s", 16, 32, 1, stride=2)
        return g.op("Relu", g.op("Add", y, short))

    assert sum("_residual" in name for name in check(draw)) == 1


def test_a_sum_of_other_shapes_is_not_a_shortcut() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = conv(g, x, "a", 3, 16)
        pooled = g.op("GlobalAveragePool", h)
        return g.op("Add", conv(g, h, "b", 16, 16), conv(g, pooled, "c", 16, 16, 1))

    assert not any("_residual" in name for name in check(draw))


def test_what_lies_between_convolutions_stays_in_blocks() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = conv(g, x, "a", 3, 20)
        h = g.op("MaxPool", h, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        h = g.op("LeakyRelu", h, alpha=0.1)
        gate = g.op("Relu", conv(g, g.op("GlobalAveragePool", h), "e", 20, 8, 1, bias=True))
        gate = g.op("HardSigmoid", conv(g, gate, "f", 8, 20, 1))
        h = g.op("HardSwish", g.op("Mul", h, gate))
        h = g.norm(g.op("Sub", h, g.normal("s", 1, 20, 1, 1, fan_in=3)), "n", 20)
        h = g.op("AveragePool", h, kernel_shape=[2, 3], pads=[0, 1, 1, 1], strides=[1, 1])
        h = g.op("Sigmoid", g.op("Mul", h, g.scalar("half", 0.5)))
        return conv(g, h, "b", 20, 16)

    names = check(draw)
    assert any(name.startswith("pool_") and "kindmean" in name for name in names)
    assert any(name.startswith("global_mean") for name in names)


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pools_of_every_rounding(op: str, ceil: int, count: int) -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        more = {"count_include_pad": count} if op == "AveragePool" else {}
        h = conv(g, x, "a", 3, 16)
        return g.op(op, h, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 1], ceil_mode=ceil, **more)

    check(draw, (1, 3, 12, 12), opset=19)


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_name(pad: str) -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        weight = g.normal("w", 16, 3, 4, 3, fan_in=36)
        return g.op("Conv", x, weight, strides=[2, 1], auto_pad=pad)

    check(draw)


def test_a_pad_before_a_convolution_is_the_convolutions() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        def valid(x: ir.Value, at: str, cin: int) -> ir.Value:
            weight = g.normal(at, 16, cin, 3, 3, fan_in=cin * 9)
            return g.op("Conv", x, weight, strides=[2, 2], pads=[0, 0, 1, 0])

        h = valid(g.op("Pad", x, g.ints("p", 0, 0, 1, 0, 0, 0, 0, 2)), "a", 3)
        return valid(g.op("Pad", h, g.ints("q", 0, 0, 0, 1, 0, 0, 1, 1)), "b", 16)

    assert not any("pad" in name for name in check(draw))


def test_other_pads_are_done() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = conv(g, x, "a", 3, 16)
        one = g.op("Pad", h, g.ints("p", 0, 0, 1, 0, 0, 16, 0, 2))
        two = g.op("Pad", h, g.ints("q", 0, 3, 1, 0, 0, 13, 0, 2))
        three = conv(g, g.op("Pad", h, g.ints("r", 0, 0, 1, 0, 0, 0, 0, 0), g.scalar("v", 2.0)), "b", 16, 32)
        four = g.op("Slice", three, g.ints("s", 0), g.ints("e", 13), g.ints("ax", 2))
        return g.op("Add", g.op("Add", one, two), g.op("Pad", four, g.ints("t", 0, 0, 0, 0, 0, 0, 0, 2)))

    check(draw)


def test_slices_joins_and_channels_last() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = conv(g, x, "a", 3, 32)
        steps = (g.ints("s", 1, 0), g.ints("e", 99, -1), g.ints("ax", 2, 3), g.ints("st", 2, 2))
        small = g.op("Slice", h, *steps)
        joined = g.op("Concat", small, conv(g, small, "b", 32, 20), axis=1)
        ragged = g.op("Concat", conv(g, small, "c", 32, 20), joined, axis=1)
        y = conv(g, ragged, "d", 72, 18, 1)
        return g.op("Transpose", y, perm=[0, 2, 3, 1])

    check(draw)


@pytest.mark.parametrize("channels", [16, 20])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_classifier_on_the_mean_of_the_pixels(channels: int, keep: int) -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = g.op("ReduceMean", conv(g, x, "a", 3, channels), g.ints("ax", -1, 2), keepdims=keep)
        return g.linear(g.op("Flatten", h, axis=1), "fc", channels, 10, form="gemm")

    check(draw)


def test_groups_and_depthwise() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = conv(g, x, "a", 3, 24)
        h = g.op("Relu", conv(g, h, "b", 24, 24, 5, groups=24, stride=2, bias=True))
        h = conv(g, h, "c", 24, 48, groups=24)
        return conv(g, h, "d", 48, 36, groups=4, dilation=2)

    names = check(draw)
    assert any(name.startswith("depthwise") for name in names)
    assert sum(name.startswith("conv_") for name in names) == 3


def test_the_batch_may_stay_open() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = g.op("Relu", conv(g, x, "a", 3, 20))
        h = g.op("Relu", g.op("Add", h, conv(g, h, "b", 20, 20, groups=20)))
        h = g.op("MaxPool", conv(g, h, "c", 20, 32, 1), kernel_shape=[2, 2], strides=[2, 2])
        return g.op("GlobalAveragePool", h)

    check(draw, ("n", 3, 8, 8), batch=3)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (32, 1), (32, 32), (32, 2)])
def test_signals_are_images_of_one_row(channels: int, groups: int) -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        weight = g.normal("w", 32, channels // groups, 5, fan_in=5 * channels)
        bias, more = g.normal("b", 32, fan_in=4), {"pads": [2, 1], "strides": [2], "dilations": [1]}
        return g.op("Relu", g.op("Conv", x, weight, bias, group=groups, **more))

    names = check(draw, (2, channels, 31))
    assert any(name.startswith(("conv_", "depthwise")) for name in names)


def test_images_of_three_axes_are_the_importers() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        return g.op("Conv", x, g.normal("w", 4, 2, 2, 2, 2, fan_in=16))

    assert not any(name.startswith("conv_") for name in check(draw, (1, 2, 4, 5, 6)))


@pytest.mark.parametrize("groups", [1, 20, 2])
def test_a_weight_that_is_computed_is_packed_at_every_call(groups: int) -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        h = conv(g, x, "a", 3, 20)
        factor = g.op("GlobalAveragePool", conv(g, x, "f", 3, 1, 1))
        weight = g.op("Mul", g.normal("w", 20, 20 // groups, 3, 3, fan_in=30), factor)
        y = g.op("Conv", h, weight, g.normal("b", 20, fan_in=3), group=groups)
        return g.op("Relu", g.norm(y, "n", 20))

    check(draw)


def test_a_bias_that_is_computed_is_the_importers() -> None:
    def draw(g: Sketch, x: ir.Value) -> ir.Value:
        mean = g.op("Flatten", g.op("GlobalAveragePool", conv(g, x, "f", 3, 16, 1)), axis=1)
        bias = g.op("Squeeze", mean, g.ints("zero", 0))
        return g.op("Conv", x, g.normal("w", 16, 3, 3, 3, fan_in=27), bias)

    check(draw)
