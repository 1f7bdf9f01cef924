"""Convolutions and pools in blocks: against torch in double precision, nothing written outside the output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm", reason="needs the tvm extra")
torch = pytest.importorskip("torch", reason="needs the torch extra")

from effic.backends.tvm.cpu import Cpu  # noqa: E402
from effic.backends.tvm.kernels.conv import Conv2d, Window  # noqa: E402
from effic.backends.tvm.kernels.conv_depthwise import DepthwiseConv2d  # noqa: E402
from effic.backends.tvm.kernels.pool import GlobalMean, Pool2d  # noqa: E402
from tests.backends.tvm.kernel_runs import close, random, run, with_cores  # noqa: E402

FEW = settings(max_examples=8, deadline=None)
Conv = Conv2d | DepthwiseConv2d


@pytest.fixture(scope="module")
def host() -> Cpu:
    return Cpu.host(2)


def blocked(image: np.ndarray, past: float = 0.0) -> np.ndarray:
    """``[N, C, H, W]`` in blocks of 16 channels, ``past`` in channels past C."""
    n, c, h, w = image.shape
    blocks = -(-c // 16)
    whole = np.full((n, blocks * 16, h, w), past, np.float32)
    whole[:, :c] = image
    return np.ascontiguousarray(whole.reshape(n, blocks, 16, h, w).transpose(0, 1, 3, 4, 2))


def plain(image: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks as ``[N, C, H, W]``, and what lies past C."""
    n, blocks, h, w, _ = image.shape
    whole = image.transpose(0, 1, 4, 2, 3).reshape(n, blocks * 16, h, w)
    return whole[:, :channels], whole[:, channels:]


def exact_conv(spec: Conv, x: np.ndarray, w: np.ndarray, groups: int) -> np.ndarray:
    """The convolution alone, by torch in double precision."""
    top, left, bottom, right = spec.window.pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    found = torch.nn.functional.conv2d(
        torch.from_numpy(padded),
        torch.from_numpy(w.astype(np.float64)),
        stride=spec.window.strides,
        dilation=spec.window.dilations,
        groups=groups,
    )
    return np.asarray(found.numpy())


def check_conv(spec: Conv, cpu: Cpu, batch: int = 1) -> None:
    """Run a convolution and hold it against the exact one; channels past the last have to be zero."""
    assert spec.why_not() is None
    groups = spec.groups if isinstance(spec, Conv2d) else spec.channels
    x = random(1, batch, spec.channels, spec.window.height, spec.window.width)
    w = random(2, spec.filters, spec.channels // groups, *spec.window.kernel)
    b, shape = random(3, spec.filters), (batch, spec.filters, *spec.window.out)
    r = random(4, *shape)
    takes_plain = isinstance(spec, Conv2d) and spec.plain_input
    inputs = [x if takes_plain else blocked(x), *spec.pack(w, b)]
    if spec.residual:
        inputs.append(blocked(r))
    got, past = plain(run(spec, cpu, inputs, (batch, *spec.output_shape)), spec.filters)
    exact = exact_conv(spec, x, w, groups)
    exact = exact + (b[:, None, None] if spec.bias else 0) + (r if spec.residual else 0)
    if spec.activation == "relu":
        exact = np.maximum(exact, 0)
    if spec.activation == "clip":
        exact = np.clip(exact, spec.low, spec.high)
    close(got, exact, exact_conv(spec, np.abs(x), np.abs(w), groups) + 4)
    assert not past.any()


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Windows over small images, pads on each side of their own."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    window = Window(
        draw(st.integers(1, 12)),
        draw(st.integers(1, 40)),
        kernel,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        draw(st.tuples(*[st.integers(0, 3)] * 4)),
        draw(st.tuples(st.integers(1, 2), st.integers(1, 3))),
    )
    assume(window.why_not() is None)
    return window


endings = {
    "bias": st.booleans(),
    "residual": st.booleans(),
    "activation": st.sampled_from([None, "relu", "clip"]),
    "low": st.just(-1.0),
    "high": st.just(1.5),
    "portable": st.booleans(),
}


@FEW
@given(
    window=windows(),
    channels=st.integers(1, 40),
    filters=st.integers(1, 70),
    batch=st.integers(1, 2),
    cores=st.sampled_from([1, 2]),
    plain_input=st.booleans(),
    more=st.fixed_dictionaries(endings),
)
def test_a_convolution_is_torchs(
    host: Cpu,
    window: Window,
    channels: int,
    filters: int,
    batch: int,
    cores: int,
    plain_input: bool,
    more: dict[str, Any],
) -> None:
    spec = Conv2d(batch, channels, filters, window, plain_input=plain_input, **more)
    check_conv(spec, with_cores(host, cores), batch)


@FEW
@given(
    window=windows(),
    groups=st.integers(2, 5),
    per_group=st.sampled_from([1, 3, 8, 16, 20]),
    per_filter=st.sampled_from([1, 2, 5, 16, 24]),
    plain_input=st.booleans(),
)
def test_groups_of_any_size_see_their_own_channels(
    host: Cpu, window: Window, groups: int, per_group: int, per_filter: int, plain_input: bool
) -> None:
    spec = Conv2d(
        1, groups * per_group, groups * per_filter, window, groups, bias=True, plain_input=plain_input
    )
    check_conv(spec, host)


@FEW
@given(
    window=windows(),
    channels=st.integers(1, 40),
    batch=st.integers(1, 2),
    cores=st.sampled_from([1, 2]),
    more=st.fixed_dictionaries(endings),
)
def test_a_depthwise_convolution_is_torchs(
    host: Cpu, window: Window, channels: int, batch: int, cores: int, more: dict[str, Any]
) -> None:
    check_conv(DepthwiseConv2d(batch, channels, window, **more), with_cores(host, cores), batch)


SAME = (1, 1, 1, 1)


@pytest.mark.parametrize(
    "spec",
    [
        Conv2d(1, 3, 64, Window(30, 30, (7, 7), (2, 2), (3, 3, 3, 3)), plain_input=True, activation="relu"),
        Conv2d(1, 64, 64, Window(56, 56, (3, 3), (1, 1), SAME), bias=True, residual=True, bands=3),
        Conv2d(2, 48, 96, Window(14, 14), bias=True),
        Conv2d(1, 96, 32, Window(28, 28), bands=7),
        Conv2d(1, 64, 48, Window(17, 19, (3, 3), (2, 2), SAME), c_tile=1),
        Conv2d(1, 5, 48, Window(17, 19, (3, 3), (2, 2), SAME), c_tile=2, plain_input=True),
        Conv2d(1, 128, 128, Window(7, 7, (3, 3), (1, 1), SAME), blocks=8, columns=3),
        Conv2d(1, 32, 32, Window(9, 40, (1, 9), (1, 1), (0, 4, 0, 4)), bias=True),
        Conv2d(1, 3, 16, Window(5, 64, (1, 20), (1, 2), (0, 9, 0, 9)), plain_input=True),
        Conv2d(1, 16, 16, Window(33, 33, (3, 3), (1, 1), (12, 12, 12, 12), (12, 12))),
        DepthwiseConv2d(1, 40, Window(21, 45, (5, 5), (2, 2), (2, 2, 2, 2)), bias=True, columns=3),
        DepthwiseConv2d(1, 16, Window(1, 50, (1, 31), (1, 1), (0, 15, 0, 15))),
    ],
    ids=lambda spec: spec.name,
)
def test_shapes_of_real_networks(host: Cpu, spec: Conv) -> None:
    check_conv(spec, host, spec.batch or 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_may_be_known_at_run_time_only(host: Cpu, batch: int) -> None:
    window = Window(8, 9, (3, 3), (1, 1), SAME)
    check_conv(Conv2d(None, 20, 30, window, bias=True, residual=True), host, batch)
    check_conv(Conv2d(None, 20, 30, Window(8, 9), bias=True), host, batch)
    check_conv(DepthwiseConv2d(None, 20, window, bias=True), host, batch)


def test_a_kernel_that_lies_wholly_in_the_padding_sees_nothing(host: Cpu) -> None:
    check_conv(Conv2d(1, 2, 3, Window(2, 2, (1, 1), (1, 1), (3, 3, 3, 3)), bias=True), host)
    check_conv(DepthwiseConv2d(1, 2, Window(2, 2, (1, 1), (1, 1), (3, 3, 3, 3)), bias=True), host)


def test_channels_past_the_last_may_hold_any_number(host: Cpu) -> None:
    spec = Conv2d(1, 20, 16, Window(4, 4, (3, 3), (1, 1), SAME))
    x, w = random(1, 1, 20, 4, 4), random(2, 16, 20, 3, 3)
    got = run(spec, host, [blocked(x, past=7.0), *spec.pack(w)], (1, *spec.output_shape))
    close(plain(got, 16)[0], exact_conv(spec, x, w, 1), 200.0)


# -- pools and layouts ------------------------------------------------------------------------------


@FEW
@given(
    window=windows(),
    channels=st.integers(1, 35),
    kind=st.sampled_from(["max", "mean"]),
    count_pads=st.booleans(),
    cores=st.sampled_from([1, 2]),
    portable=st.booleans(),
)
def test_a_pool_looks_at_what_lies_in_the_image(
    host: Cpu, window: Window, channels: int, kind: str, count_pads: bool, cores: int, portable: bool
) -> None:
    spec = Pool2d(2, channels, window, kind, count_pads, portable)
    # Zero in the padding of a mean; a place that holds nothing is told apart by NaN.
    assume(spec.why_not() is None)
    x = random(1, 2, channels, window.height, window.width)
    top, left, bottom, right = window.pads
    held = np.pad(
        x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=np.nan
    )
    high, wide = window.out
    places = np.stack(
        [
            held[
                :,
                :,
                p * window.dilations[0] :: window.strides[0],
                q * window.dilations[1] :: window.strides[1],
            ][:, :, :high, :wide]
            for p in range(window.kernel[0])
            for q in range(window.kernel[1])
        ]
    )
    assume(not np.isnan(places).all(0).any())
    exact = np.nanmax(places, 0) if kind == "max" else np.nanmean(places, 0)
    if kind == "mean" and count_pads:
        exact = np.nansum(places, 0) / len(places)
    got = run(spec, with_cores(host, cores), [blocked(x)], (2, *spec.output_shape))
    close(plain(got, channels)[0], exact, 4.0)


@FEW
@given(
    channels=st.integers(1, 40), height=st.integers(1, 9), width=st.integers(1, 9), cores=st.integers(1, 2)
)
def test_the_mean_of_a_channel(host: Cpu, channels: int, height: int, width: int, cores: int) -> None:
    spec = GlobalMean(2, channels, height, width)
    assert spec.why_not() is None
    x = random(1, 2, channels, height, width)
    got = run(spec, with_cores(host, cores), [blocked(x)], (2, -(-channels // 16), 1, 1, 16))
    close(plain(got, channels)[0], x.astype(np.float64).mean((2, 3), keepdims=True), 4.0)


# -- refusals ---------------------------------------------------------------------------------------

IMAGE = Window(8, 8, (3, 3))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Conv2d(1, 4, 4, Window(2, 2, (3, 3))), "finds no place"),
        (Conv2d(1, 4, 4, Window(8, 8, (3, 3), pads=(-1, 0, 0, 0))), "crop the image"),
        (Conv2d(1, 4, 4, Window(8, 8, (3, 3), strides=(0, 1))), "no window"),
        (Conv2d(0, 4, 4, IMAGE), "no elements"),
        (Conv2d(1, 4, 6, IMAGE, groups=4), "do not fall into 4 groups"),
        (Conv2d(1, 4, 48, IMAGE, blocks=2), "tiles of 2"),
        (Conv2d(1, 4, 4, IMAGE, activation="mish"), "mish"),
        (Conv2d(1, 4, 4, IMAGE, activation="clip", low=1.0, high=2.0), "excludes zero"),
        (DepthwiseConv2d(1, 0, IMAGE), "no elements"),
        (DepthwiseConv2d(1, 4, Window(2, 2, (3, 3))), "finds no place"),
        (DepthwiseConv2d(1, 4, IMAGE, activation="clip", low=-2.0, high=-1.0), "excludes zero"),
        (Pool2d(1, 4, IMAGE, "median"), "median"),
        (Pool2d(1, 4, Window(8, 8, (2, 2), pads=(2, 0, 0, 0))), "without a pixel"),
        (Pool2d(1, 0, IMAGE), "no images"),
        (GlobalMean(1, 0, 2, 2), "no pixels"),
    ],
)
def test_what_the_family_cannot_hold_is_said(spec: Any, words: str) -> None:
    assert words in spec.why_not()


def test_names_tell_windows_apart() -> None:
    windows_ = [
        IMAGE,
        Window(8, 8, (3, 3), (2, 2)),
        Window(8, 8, (3, 3), (1, 1), (2, 2, 2, 2)),
        Window(88, 8),
    ]
    specs = [make(1, 4, 4, w) for w in windows_ for make in (Conv2d,)]
    specs += [Conv2d(1, 4, 4, IMAGE, plain_input=True), Conv2d(None, 4, 4, IMAGE), Conv2d(1, 4, 4, IMAGE, 4)]
    names = {spec.name for spec in specs}
    assert len(names) == len(specs)
    assert all(name.isidentifier() for name in names)
