"""Gradients of the torch backend's operators, and whether ``torch.compile`` can look into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from effic.backends.torch.functions import (
    audio,
    convolution,
    indexing,
    pooling,
    quantization,
    recurrent,
    resizing,
    sampling,
)

Function = Callable[..., Any]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def named(*names: str) -> list[recurrent.Named]:
    return [(name, *recurrent.ACTIVATIONS[name][1:]) for name in names]


POOL: dict[str, Any] = {
    "kernel": (3, 2), "strides": (2, 1), "dilations": (1, 2), "pads": (1, 0, 0, 1), "auto_pad": "NOTSET",
    "ceil_mode": True,
}  # fmt: skip
TRANSPOSE: dict[str, Any] = {
    "strides": (2, 1), "pads": (1, 0, 0, 1), "dilations": (1, 1), "output_padding": (1, 0),
    "output_shape": (), "auto_pad": "NOTSET", "group": 1,
}  # fmt: skip
CELL: dict[str, Any] = {"directions": (False, True), "clip": 2.0}
WHERE = torch.tensor([[0, -1], [2, 1]])

CASES: dict[str, tuple[Function, list[torch.Tensor]]] = {
    "average_pool": (
        lambda x: pooling.average_pool(x, count_include_pad=False, **POOL),
        [draw(2, 2, 5, 6)],
    ),
    "max_pool": (lambda x: pooling.max_pool(x, **POOL)[0], [draw(2, 2, 5, 6)]),
    "lp_pool": (lambda x: pooling.lp_pool(x, p=3, **POOL), [draw(1, 2, 5, 6)]),
    "max_unpool": (
        lambda x: pooling.max_unpool(
            x, torch.tensor([[[[0, 3], [9, 14]]]]), kernel=(2, 2), strides=(2, 2), pads=(0,) * 4
        ),
        [draw(1, 1, 2, 2)],
    ),
    "local_response_norm": (
        lambda x: pooling.local_response_norm(x, 4, 0.1, 0.75, 1.0),
        [draw(2, 5, 2, 2)],
    ),
    "conv_transpose": (
        lambda x, w, b: convolution.conv_transpose(x, w, b, **TRANSPOSE),
        [draw(1, 2, 3, 3), draw(2, 3, 3, 2), draw(3)],
    ),
    "deform_conv": (
        lambda x, w, offset, b, mask: convolution.deform_conv(
            x,
            w,
            offset,
            b,
            mask,
            strides=(1, 1),
            pads=(0, 0, 0, 0),
            dilations=(1, 1),
            group=1,
            offset_group=1,
        ),
        [draw(1, 2, 4, 4), draw(2, 2, 2, 2), draw(1, 8, 3, 3) / 4, draw(2), draw(1, 4, 3, 3)],
    ),
    "col2im": (
        lambda x: convolution.col2im(x, (4, 4), (2, 2), strides=(1, 1), pads=(1, 0, 1, 0), dilations=(1, 1)),
        [draw(1, 8, 15)],
    ),
    "gather": (lambda x: indexing.gather(x, WHERE, 1), [draw(2, 3, 2)]),
    "gather_elements": (lambda x: indexing.gather_elements(x, WHERE, 1), [draw(2, 3)]),
    "gather_nd": (lambda x: indexing.gather_nd(x, torch.tensor([[[-1], [0]]] * 2), 1), [draw(2, 3, 2)]),
    "scatter_elements": (
        lambda x, y: indexing.scatter_elements(x, WHERE, y, 1, "add"),
        [draw(2, 3), draw(2, 2)],
    ),
    "scatter_elements_max": (
        lambda x, y: indexing.scatter_elements(x, WHERE, y, 1, "max"),
        [draw(2, 3), draw(2, 2)],
    ),
    "scatter_nd": (
        lambda x, y: indexing.scatter_nd(x, torch.tensor([[2], [-3]]), y, "none"),
        [draw(3, 2), draw(2, 2)],
    ),
    "scatter_nd_mul": (
        lambda x, y: indexing.scatter_nd(x, torch.tensor([[2], [2]]), y, "mul"),
        [draw(3, 2), draw(2, 2)],
    ),
    "top_k": (lambda x: indexing.top_k(x, 2, -1, True)[0], [draw(3, 4)]),
    "reverse_sequence": (
        lambda x: indexing.reverse_sequence(x, torch.tensor([1, 3, 2]), 1, 0),
        [draw(4, 3, 2)],
    ),
    "compress": (lambda x: indexing.compress(x, torch.tensor([True, False, True]), 0), [draw(3, 2)]),
    "center_crop_pad": (lambda x: indexing.center_crop_pad(x, (2, 6), (0, 1)), [draw(3, 3)]),
    "pad_edge": (lambda x: indexing.pad(x, (2, 1), (0, 3), (0, 1), "edge"), [draw(3, 3)]),
    "pad_wrap": (lambda x: indexing.pad(x, (2, 1), (0, 3), (0, 1), "wrap"), [draw(3, 3)]),
    "pad_reflect": (lambda x: indexing.pad(x, (2, -1), (0, 3), (0, 1), "reflect"), [draw(3, 3)]),
    "pad_value": (
        lambda x, value: indexing.pad(x, (2, 1), (0, 3), (0, 1), "constant", value),
        [draw(3, 3), draw(1)],
    ),
    "depth_to_space": (lambda x: indexing.depth_to_space(x, 2), [draw(1, 8, 2, 3)]),
    "space_to_depth": (lambda x: indexing.space_to_depth(x, 2), [draw(1, 2, 4, 6)]),
    "resize_cubic": (
        lambda x: resizing.resize(x, axes=(1, 2), sizes=(5, 2), scales=None, mode="cubic"),
        [draw(1, 4, 4)],
    ),
    "resize_antialias": (
        lambda x: resizing.resize(x, axes=(1, 2), sizes=(2, 3), scales=None, mode="linear", antialias=True),
        [draw(1, 5, 4)],
    ),
    "resize_crop": (
        lambda x: resizing.resize(
            x,
            axes=(1, 2),
            sizes=(4, 3),
            scales=None,
            mode="linear",
            coordinates="tf_crop_and_resize",
            roi=(0.1, 0.0, 0.8, 1.2),
        ),
        [draw(1, 5, 4)],
    ),
    "grid_sample": (
        lambda x, grid: sampling.grid_sample(x, grid, "linear", "zeros", False),
        [draw(1, 2, 5), draw(1, 4, 1) / 2],
    ),
    "grid_sample_cubic": (
        lambda x, grid: sampling.grid_sample(x, grid, "cubic", "border", False),
        [draw(1, 2, 6), draw(1, 4, 1) / 2],
    ),
    "roi_align": (
        lambda x, rois: sampling.roi_align(
            x,
            rois,
            torch.tensor([0, 1]),
            output_height=2,
            output_width=3,
            sampling_ratio=2,
            spatial_scale=0.5,
            mode="avg",
            half_pixel=True,
        ),
        [draw(2, 2, 6, 6), torch.tensor([[1.1, 0.3, 9.2, 8.4], [2.3, 3.1, 7.7, 10.9]], dtype=torch.float64)],
    ),
    "rnn": (
        lambda x, w, r, b: recurrent.recurrent(
            "RNN", x, w, r, b, None, None, activations=[named("tanh")] * 2, **CELL
        ),
        [draw(3, 2, 2), draw(2, 3, 2), draw(2, 3, 3), draw(2, 6)],
    ),
    "gru": (
        lambda x, w, r, b: recurrent.recurrent(
            "GRU", x, w, r, b, None, None, activations=[named("sigmoid", "tanh")] * 2, **CELL
        ),
        [draw(3, 2, 2), draw(2, 6, 2), draw(2, 6, 2), draw(2, 12)],
    ),
    "lstm": (
        lambda x, w, r, b, h, c, p: recurrent.recurrent(
            "LSTM",
            x,
            w,
            r,
            b,
            torch.tensor([3, 1]),
            h,
            c,
            p,
            activations=[named("sigmoid", "tanh", "tanh")] * 2,
            **CELL,
        ),
        [draw(3, 2, 2), draw(2, 8, 2), draw(2, 8, 2), draw(2, 16), draw(2, 2, 2), draw(2, 2, 2), draw(2, 6)],
    ),
    "torch_lstm": (
        lambda x, w, r, b: recurrent.torch_recurrent("LSTM", x, w, r, b, None, directions=(True,)),
        [draw(3, 2, 2), draw(1, 8, 2), draw(1, 8, 2), draw(1, 16)],
    ),
    "torch_gru": (
        lambda x, w, r, b: recurrent.torch_recurrent("GRU", x, w, r, b, None, directions=(False, True)),
        [draw(3, 2, 2), draw(2, 6, 2), draw(2, 6, 2), draw(2, 12)],
    ),
    "dft": (lambda x: audio.dft(x, 7, 1, False, False), [draw(2, 5, 2)]),
    "dft_real": (lambda x: audio.dft(x, None, 1, False, True), [draw(2, 6, 1)]),
    "dft_back": (lambda x: audio.dft(x, None, 1, True, False), [draw(2, 5, 2)]),
    "stft": (lambda x, w: audio.stft(x, 2, w, None, True), [draw(2, 9, 1), draw(4)]),
    "dequantize": (
        lambda scale: quantization.dequantize(
            torch.arange(12, dtype=torch.int8).reshape(2, 6), scale, None, axis=1, block=3, dtype=None
        ),
        [draw(2, 2)],
    ),
    "decode_blocks": (
        lambda scale: quantization.decode_blocks(
            torch.arange(16, dtype=torch.uint8).reshape(2, 1, 8),
            scale,
            None,
            rows=2,
            columns=16,
            bits=4,
            block=16,
        ),
        [draw(2)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name: str) -> None:
    function, inputs = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


def test_rounding_has_no_gradient() -> None:
    """Quantize and decode: the scale learns what the definition gives it, the input nothing."""
    x, scale = draw(4, 4).requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    codes = quantization.quantize(x, scale, None, axis=0, block=0, low=-128, high=127, dtype=torch.int8)
    assert not codes.requires_grad
    quantization.dequantize(codes, scale, None, axis=0, block=0, dtype=None).sum().backward()
    assert x.grad is None
    assert scale.grad is not None
    assert scale.grad == codes.sum()
