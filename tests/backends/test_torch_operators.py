"""The torch backend's operators against ONNX Runtime, where ONNX's own cases do not reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from effic.backends.torch.builder import to_tensor
from effic.backends.torch.to_module import to_module
from effic.ir.errors import UnsupportedError
from effic.ir.evaluate import runtime_errors
from effic.ir.model import Model

Arrays = Sequence[np.ndarray | None]

FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much]
)
F32 = np.float32


def one_node(
    op_type: str,
    inputs: Arrays,
    constants: Sequence[int] = (),
    outputs: int = 1,
    *,
    domain: str = "",
    opset: int = 21,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node, and what to feed it; None leaves an optional input out."""
    names = [f"i{k}" if array is not None else "" for k, array in enumerate(inputs)]
    node = helper.make_node(op_type, names, [f"o{k}" for k in range(outputs)], domain=domain, **attributes)
    fed = {names[k]: a for k, a in enumerate(inputs) if a is not None and k not in constants}
    held = {names[k]: a for k, a in enumerate(inputs) if a is not None and k in constants}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in fed.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [numpy_helper.from_array(a, n) for n, a in held.items()],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=10), fed


def by_runtime(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def by_torch(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[Any]:
    module = to_module(Model(ir.from_proto(proto)), trainable=False)
    with torch.no_grad():
        made = module(**{name: to_tensor(array) for name, array in feeds.items()})
    return [item.numpy() for item in (made if isinstance(made, tuple) else (made,))]


def compare(op_type: str, inputs: Arrays, *args: Any, tolerance: float = 1e-4, **kwargs: Any) -> None:
    proto, feeds = one_node(op_type, inputs, *args, **kwargs)
    for found, wanted in zip(by_torch(proto, feeds), by_runtime(proto, feeds), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        scale = max(1.0, float(np.abs(wanted).max())) if wanted.size else 1.0
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * scale)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(F32)


# -- windows ---------------------------------------------------------------------------------------


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    """Spatial sizes, and attributes of a window that fits."""
    axes = draw(st.integers(1, 3))

    def per_axis(low: int, high: int, count: int = axes) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel, strides, dilations = per_axis(1, 3), per_axis(1, 3), per_axis(1, 2)
    sizes = [
        draw(st.integers((k - 1) * d + 1, (k - 1) * d + 6)) for k, d in zip(kernel, dilations, strict=True)
    ]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "dilations": dilations}
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    else:
        attributes["auto_pad"] = auto_pad
    return sizes, attributes


@pytest.mark.parametrize("op_type", ["AveragePool", "LpPool", "MaxPool"])
@FEW
@given(window=windows(), ceil_mode=st.booleans(), flag=st.booleans(), seed=st.integers(0, 99))
def test_pooling(
    op_type: str, window: tuple[list[int], dict[str, Any]], ceil_mode: bool, flag: bool, seed: int
) -> None:
    sizes, attributes = window
    # ONNX Runtime leaves the dilation out of the padding of SAME, and rounds up after it.
    same = "SAME" in attributes.get("auto_pad", "")
    assume(not same or (not ceil_mode and set(attributes["dilations"]) == {1}))
    # It also cuts off the beginning where a stride jumps over entries; the padding of SAME is at least 0.
    assume(
        not same
        or all(k >= s for k, s in zip(attributes["kernel_shape"], attributes["strides"], strict=True))
    )
    outputs = 1
    if op_type == "AveragePool":
        attributes["count_include_pad"] = int(flag)
    elif op_type == "LpPool":
        attributes["p"] = 1 + int(flag)
    elif flag:
        outputs = 2
        attributes["storage_order"] = int(seed % 2 and len(sizes) > 1)
    x = normal(2, 3, *sizes, seed=seed)
    compare(op_type, [x], (), outputs, ceil_mode=int(ceil_mode), **attributes)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float64])
def test_max_pool_of_other_types(dtype: Any) -> None:
    low = np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else -100
    x = np.random.default_rng(0).integers(low, low + 60, (1, 2, 5, 6)).astype(dtype)
    compare("MaxPool", [x], kernel_shape=[3, 2], pads=[1, 1, 1, 0], strides=[2, 1])


@FEW
@given(window=windows(), group=st.integers(1, 2), bias=st.booleans(), seed=st.integers(0, 99))
def test_convolution(window: tuple[list[int], dict[str, Any]], group: int, bias: bool, seed: int) -> None:
    sizes, attributes = window
    # ONNX Runtime has no dilated convolution with the padding of SAME.
    assume("SAME" not in attributes.get("auto_pad", "") or set(attributes["dilations"]) == {1})
    x = normal(2, 2 * group, *sizes, seed=seed)
    weight = normal(3 * group, 2, *attributes["kernel_shape"], seed=seed)
    inputs = [x, weight, normal(3 * group)] if bias else [x, weight]
    compare("Conv", inputs, (1, 2), group=group, **attributes)


@FEW
@given(
    window=windows(),
    group=st.integers(1, 2),
    bias=st.booleans(),
    how=st.sampled_from(["plain", "output_padding", "output_shape"]),
    seed=st.integers(0, 99),
)
def test_transposed_convolution(
    window: tuple[list[int], dict[str, Any]], group: int, bias: bool, how: str, seed: int
) -> None:
    sizes, attributes = window
    kernel, strides, dilations = (attributes[name] for name in ("kernel_shape", "strides", "dilations"))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    # Where the kernel is smaller than the stride, ONNX Runtime makes fewer outputs than SAME asks for.
    assume(
        "SAME" not in attributes.get("auto_pad", "")
        or all(r >= s for r, s in zip(reach, strides, strict=True))
    )
    if how == "output_padding":
        attributes[how] = [max(s, d) - 1 for s, d in zip(strides, dilations, strict=True)]
    elif how == "output_shape" and "pads" in attributes:
        del attributes["pads"]
        attributes[how] = [(n - 1) * s + r - seed % 2 for n, s, r in zip(sizes, strides, reach, strict=True)]
        assume(min(attributes[how]) > 0)
    x = normal(2, 2 * group, *sizes, seed=seed)
    weight = normal(2 * group, 3, *kernel, seed=seed)
    inputs = [x, weight, normal(3 * group)] if bias else [x, weight]
    proto, feeds = one_node("ConvTranspose", inputs, (1, 2), group=group, **attributes)
    try:
        wanted = by_runtime(proto, feeds)[0]
    except runtime_errors():
        assume(False)
    found = by_torch(proto, feeds)[0]
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# -- resize ----------------------------------------------------------------------------------------

COORDINATES = [
    "half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric",
    "tf_crop_and_resize",
]  # fmt: skip


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@settings(FEW, max_examples=20)
@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    scales=st.tuples(*[st.sampled_from([0.5, 0.6, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0])] * 2),
    by_size=st.booleans(),
    nearest=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    antialias=st.booleans(),
    exclude=st.booleans(),
    channels=st.booleans(),
)
def test_resize(
    coordinates: str,
    mode: str,
    sizes: tuple[int, int],
    scales: tuple[float, float],
    by_size: bool,
    nearest: str,
    antialias: bool,
    exclude: bool,
    channels: bool,
) -> None:
    counts = [int(size * scale) for size, scale in zip(sizes, scales, strict=True)]
    assume(min(counts) > 0)
    crops = coordinates == "tf_crop_and_resize"
    for size, count, scale in zip(sizes, counts, scales, strict=True):
        # ONNX Runtime leaves out an axis that keeps its size: one that is cropped, one that is smoothed.
        assume(count != size or not crops)
        assume(count != size or scale == 1.0 or not antialias)
    # Ties between two entries: that formula is rounded in another order there.
    exact = set(scales) <= {0.5, 1.0, 2.0}
    assume(mode != "nearest" or coordinates != "half_pixel_symmetric" or exact)
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    if mode == "nearest":
        attributes["nearest_mode"] = nearest
    elif not crops:
        attributes["antialias"] = int(antialias)
    if mode == "cubic":
        attributes["exclude_outside"] = int(exclude)
    roi = np.array([0, 0, 0.2, 0.1, 1, 1, 0.9, 1.2], F32) if crops else None
    if by_size:
        rest = [None, np.array([1, 2, *counts], np.int64)]
    else:
        rest = [np.array([1, 1, *scales], F32)]
    compare("Resize", [normal(1, 2, *sizes), roi, *rest], (1, 2, 3), opset=19, **attributes)


# -- recurrent layers ------------------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
ACTIVATIONS = ["Relu", "Tanh", "Sigmoid", "Softsign", "HardSigmoid", "LeakyRelu"]


@pytest.mark.parametrize("op_type", GATES)
@FEW
@given(data=st.data())
def test_recurrent(op_type: str, data: st.DataObject) -> None:
    gates = GATES[op_type]
    steps, batch, size, hidden = (data.draw(st.integers(1, 4)) for _ in range(4))
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    count = 2 if direction == "bidirectional" else 1

    def maybe(array: np.ndarray) -> np.ndarray | None:
        return array if data.draw(st.booleans()) else None

    # Half of normal: sums that explode say nothing.
    lengths = np.array([1 + (steps + i) % steps for i in range(batch)], np.int32)
    inputs = [
        normal(steps, batch, size),
        normal(count, gates * hidden, size) / 2,
        normal(count, gates * hidden, hidden, seed=1) / 2,
        maybe(normal(count, 2 * gates * hidden)),
        maybe(lengths),
        maybe(normal(count, batch, hidden)),
    ]
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op_type == "LSTM":
        inputs += [maybe(normal(count, batch, hidden, seed=2)), maybe(normal(count, 3 * hidden))]
        attributes["input_forget"] = int(data.draw(st.booleans()))
    if op_type == "GRU":
        attributes["linear_before_reset"] = int(data.draw(st.booleans()))
    if data.draw(st.booleans()):
        attributes["clip"] = 0.7
    if data.draw(st.booleans()):
        some = st.sampled_from(ACTIVATIONS)
        per_direction = {"RNN": 1, "GRU": 2, "LSTM": 3}[op_type]
        length = per_direction * count
        attributes["activations"] = data.draw(st.lists(some, min_size=length, max_size=length))
    compare(op_type, inputs, (1, 2, 3), 3 if op_type == "LSTM" else 2, tolerance=1e-3, **attributes)


def test_sequence_lengths_stop_each_item_where_it_ends() -> None:
    """An item of two steps in a batch of five is what it is alone."""
    x, w, r = normal(5, 2, 3), normal(1, 16, 3), normal(1, 16, 4)
    proto, feeds = one_node("LSTM", [x, w, r, None, np.array([5, 2], np.int32)], (1, 2), 3, hidden_size=4)
    alone, fed = one_node("LSTM", [x[:2, 1:], w, r], (1, 2), 3, hidden_size=4)
    batch, single = by_torch(proto, feeds), by_torch(alone, fed)
    np.testing.assert_allclose(batch[0][:2, :, 1:], single[0], rtol=1e-5, atol=1e-6)
    assert not batch[0][2:, :, 1].any()
    for of_batch, of_one in zip(batch[1:], single[1:], strict=True):
        np.testing.assert_allclose(of_batch[:, 1:], of_one, rtol=1e-5, atol=1e-6)


def test_states_to_start_from_are_not_trained() -> None:
    inputs = [normal(3, 2, 4), normal(1, 16, 4), normal(1, 16, 4), None, None, normal(1, 2, 4)]
    proto, feeds = one_node("LSTM", inputs, (1, 2, 5), hidden_size=4)
    module = to_module(Model(ir.from_proto(proto)))
    assert {name for name, _ in module.named_parameters()} == {"i1", "i2"}
    module(**{name: to_tensor(array) for name, array in feeds.items()}).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


# -- operators without a case of ONNX's ------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p: int) -> None:
    compare("GlobalLpPool", [normal(2, 3, 4, 5)], p=p)


def packed(bits: int, rows: int, columns: int, block: int, seed: int = 0) -> np.ndarray:
    shape = (rows, -(-columns // block), block * bits // 8)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("bits", "columns", "zero_points"),
    [
        (bits, columns, zero_points)
        for zero_points in ("none", "packed", "float")
        for bits, columns in ((4, 64), (4, 72), (8, 64), (2, 64))
        # ONNX Runtime has no kernel for the float zero points of 8-bit codes.
        if (bits, zero_points) != (8, "float")
    ],
)
def test_matmul_nbits(bits: int, columns: int, zero_points: str) -> None:
    rows, block = 6, 16
    blocks = -(-columns // block)
    rng = np.random.default_rng(1)
    inputs: list[np.ndarray | None] = [normal(3, columns), packed(bits, rows, columns, block)]
    inputs.append(rng.random(rows * blocks).astype(F32))
    if zero_points == "packed":
        inputs.append(rng.integers(0, 256, rows * -(-blocks * bits // 8)).astype(np.uint8))
    elif zero_points == "float":
        inputs.append(rng.random(rows * blocks).astype(F32) * (1 << bits))
    proto, feeds = one_node(
        "MatMulNBits",
        inputs,
        (1, 2, 3),
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
    )
    wanted = by_runtime(proto, feeds)[0]
    np.testing.assert_allclose(by_torch(proto, feeds)[0], wanted, rtol=1e-4, atol=1e-3)


def test_matmul_nbits_of_two_bits_by_hand() -> None:
    """Bytes hold four codes, the low bits first; without zero points codes are centred on 2."""
    codes = np.arange(32).reshape(2, 16) % 4
    quads = codes.reshape(2, 1, 4, 4)
    data = (quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6).astype(np.uint8)
    scales = np.array([0.5, 2.0], F32)
    x = normal(3, 16)
    proto, feeds = one_node(
        "MatMulNBits", [x, data, scales], (1, 2), domain="com.microsoft", K=16, N=2, bits=2, block_size=16
    )
    np.testing.assert_allclose(
        by_torch(proto, feeds)[0], x @ ((codes - 2.0) * scales[:, None]).T, rtol=1e-5, atol=1e-5
    )


def test_packed_weights_are_not_trained_and_pass_gradients_on() -> None:
    inputs = [normal(3, 16), packed(4, 2, 16, 16), np.ones(2, F32)]
    proto, _ = one_node(
        "MatMulNBits", inputs, (1, 2), domain="com.microsoft", K=16, N=2, bits=4, block_size=16
    )
    module = to_module(Model(ir.from_proto(proto)))
    assert not list(module.parameters())
    x = torch.randn(3, 16, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_matmul_nbits_refuses_other_widths() -> None:
    inputs = [normal(3, 16), packed(4, 2, 16, 16), np.ones(2, F32)]
    proto, _ = one_node(
        "MatMulNBits", inputs, (1, 2), domain="com.microsoft", K=16, N=2, bits=3, block_size=16
    )
    with pytest.raises(UnsupportedError, match="weights of 3 bits"):
        to_module(Model(ir.from_proto(proto)))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gather_block_quantized(bits: int, zero_points: bool) -> None:
    rng = np.random.default_rng(2)
    rows, columns, block = 5, 32, 16
    codes = rng.integers(0, 256, (rows, columns * bits // 8)).astype(np.uint8)
    inputs = [codes, np.array([[4, 0], [2, 2]], np.int64), rng.random((rows, columns // block)).astype(F32)]
    if zero_points:
        inputs.append(rng.integers(0, 256, (rows, columns // block * bits // 8)).astype(np.uint8))
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    compare("GatherBlockQuantized", inputs, (0, 2, 3), domain="com.microsoft", **attributes)


@pytest.mark.parametrize("op_type", ["Gelu", "FastGelu", "QuickGelu", "BiasGelu"])
def test_gelus(op_type: str) -> None:
    inputs = [normal(2, 3, 8), normal(8)] if op_type in ("BiasGelu", "FastGelu") else [normal(2, 3, 8)]
    compare(op_type, inputs, (1,), domain="com.microsoft")


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_simplified_layer_normalization(domain: str) -> None:
    inputs = [normal(2, 3, 8), normal(8, seed=1)]
    compare("SimplifiedLayerNormalization", inputs, (1,), domain="", axis=-1, epsilon=1e-5)
    if domain:
        proto, feeds = one_node("SimplifiedLayerNormalization", inputs, (1,), domain=domain, epsilon=1e-5)
        plain, _ = one_node("SimplifiedLayerNormalization", inputs, (1,), epsilon=1e-5)
        np.testing.assert_array_equal(by_torch(proto, feeds)[0], by_torch(plain, feeds)[0])


@pytest.mark.parametrize("op_type", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_skip_normalizations(op_type: str) -> None:
    inputs = [normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8, seed=2)]
    if op_type == "SkipLayerNormalization":
        inputs += [normal(8, seed=3), normal(8, seed=4)]
    compare(op_type, inputs, (2, 3, 4), domain="com.microsoft", epsilon=1e-5)


def test_sequences() -> None:
    """Construct, insert, erase, take and join: what remains of 0, 1, 2 after putting 3 at 1 and dropping 0."""
    nodes = [
        helper.make_node("SequenceConstruct", ["a", "b", "c"], ["s0"]),
        helper.make_node("SequenceInsert", ["s0", "d", "one"], ["s1"]),
        helper.make_node("SequenceErase", ["s1", "zero"], ["s2"]),
        helper.make_node("SequenceErase", ["s2"], ["s3"]),
        helper.make_node("SequenceAt", ["s2", "minus"], ["last"]),
        helper.make_node("SequenceLength", ["s3"], ["length"]),
        helper.make_node("ConcatFromSequence", ["s3"], ["joined"], axis=-1),
        helper.make_node("ConcatFromSequence", ["s2"], ["stacked"], axis=1, new_axis=1),
    ]
    indices = {"zero": 0, "one": 1, "minus": -1}
    float_ = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "sequences",
        [helper.make_tensor_value_info(name, float_, [2, 3]) for name in "abcd"],
        [onnx.ValueInfoProto(name=name) for name in ("last", "length", "joined", "stacked")],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in indices.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = {name: normal(2, 3, seed=i) for i, name in enumerate("abcd")}
    found, wanted = by_torch(proto, feeds), by_runtime(proto, feeds)
    assert found[1] == 2
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("how", [{"split": 2}, {"split": [1, 3, 1]}, {"keepdims": 0}, {}])
def test_split_to_sequence(how: dict[str, Any]) -> None:
    split = how.get("split")
    names = ["x"] if split is None else ["x", "split"]
    keep = {"keepdims": how["keepdims"]} if "keepdims" in how else {}
    nodes = [
        helper.make_node("SplitToSequence", names, ["s"], axis=1, **keep),
        helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
        helper.make_node("SequenceLength", ["s"], ["n"]),
    ]
    graph = helper.make_graph(
        nodes,
        "split",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 5])],
        [onnx.ValueInfoProto(name="y"), onnx.ValueInfoProto(name="n")],
        [] if split is None else [numpy_helper.from_array(np.array(split, np.int64), "split")],
    )
    if split == 2 or isinstance(split, list):
        graph.node[1].attribute[0].i = 1
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = {"x": normal(2, 5)}
    for one, other in zip(by_torch(proto, feeds), by_runtime(proto, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


# -- random numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "attributes", "mean", "deviation"),
    [
        ("RandomUniform", {"low": 2.0, "high": 4.0}, 3.0, 1 / np.sqrt(3)),
        ("RandomNormal", {"mean": -1.0, "scale": 2.0}, -1.0, 2.0),
        ("RandomUniformLike", {"low": 2.0, "high": 4.0}, 3.0, 1 / np.sqrt(3)),
        ("RandomNormalLike", {"mean": -1.0, "scale": 2.0}, -1.0, 2.0),
        ("Bernoulli", {}, 0.25, np.sqrt(0.25 * 0.75)),
    ],
)
def test_random_numbers(op_type: str, attributes: dict[str, Any], mean: float, deviation: float) -> None:
    shape = [100, 200]
    like = "Like" in op_type or op_type == "Bernoulli"
    inputs = [np.full(shape, 0.25, F32)] if like else []
    extra = {} if like else {"shape": shape}
    proto, feeds = one_node(op_type, inputs, **attributes, **extra)
    torch.manual_seed(0)
    first, second = by_torch(proto, feeds)[0], by_torch(proto, feeds)[0]
    assert list(first.shape) == shape
    assert first.dtype == F32
    # 20,000 draws: the standard error of the mean is deviation / 141.
    assert abs(first.mean() - mean) < 4 * deviation / 141
    assert abs(first.std() - deviation) < 0.02 * deviation + 0.01
    assert (first != second).any()
    torch.manual_seed(0)
    np.testing.assert_array_equal(by_torch(proto, feeds)[0], first)


def test_multinomial_draws_classes_by_their_probabilities() -> None:
    logits = np.log(np.array([[0.1, 0.6, 0.3], [0.5, 0.0001, 0.4999]], F32))
    proto, feeds = one_node("Multinomial", [logits], sample_size=5000, dtype=onnx.TensorProto.INT64)
    torch.manual_seed(0)
    drawn = by_torch(proto, feeds)[0]
    assert drawn.dtype == np.int64
    shares = np.stack([(drawn == kind).mean(1) for kind in range(3)], 1)
    np.testing.assert_allclose(shares, np.exp(logits), atol=0.03)
