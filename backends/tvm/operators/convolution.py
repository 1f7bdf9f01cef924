"""Convolutions on effic's kernels, in blocks of 16 channels, with what follows them in the same pass.

A convolution takes along the batch norm, the bias, the addition of a shortcut that is there already and
the Relu or Clip that only it feeds. Its result stays blocked; :mod:`effic.backends.tvm.operators.blocked`
keeps it so through what lies between convolutions. What no kernel holds (three axes, other types, sizes
that are not known) is left to the importer's converter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.kernels.conv import Conv2d
from effic.backends.tvm.kernels.conv_depthwise import DepthwiseConv2d
from effic.backends.tvm.kernels.lanes import LANES
from effic.backends.tvm.layout import to_blocked, to_plain
from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of
from effic.backends.tvm.operators.importer import by_importer
from effic.backends.tvm.operators.windows import read_window
from effic.ir.model import constant_array, constant_tensor, sole_consumer

Epilogue = dict[str, Any]


def conv(lowering: Lowering, node: ir.Node) -> None:
    """Conv of one or two axes; three axes go to the importer."""
    if _one_axis(lowering, node) or _two_axes(lowering, node):
        return
    by_importer(lowering, node)


def conv_transpose(lowering: Lowering, node: ir.Node) -> None:
    """ConvTranspose: a given output shape is turned into the padding that it takes."""
    wanted = node.attributes.get_ints("output_shape", ())
    if wanted:
        x, w = (shape_of(lowering.tensor(value)) for value in node.inputs[:2])
        rank = len(x) - 2
        get = node.attributes.get_ints
        strides, dilations = get("strides", [1] * rank), get("dilations", [1] * rank)
        more = list(get("output_padding", [0] * rank))
        starts, ends = [], []
        for i in range(rank):
            size = strides[i] * (x[i + 2] - 1) + more[i] + (w[i + 2] - 1) * dilations[i] + 1
            total = size - wanted[i - rank]
            more[i] += max(-total, 0)
            half = max(total, 0) // 2
            rest = max(total, 0) - half
            upper = node.attributes.get_string("auto_pad", "NOTSET") == "SAME_UPPER"
            starts.append(half if upper else rest)
            ends.append(rest if upper else half)
        for name in ("output_shape", "auto_pad"):
            node.attributes.pop(name, None)
        node.attributes.add(ir.AttrInt64s("pads", [*starts, *ends]))
        node.attributes.add(ir.AttrInt64s("output_padding", more))
    by_importer(lowering, node)


def _one_axis(lowering: Lowering, node: ir.Node) -> bool:
    """A signal is an image of one row."""
    x = node.inputs[0]
    if lowering.cpu is None or x is None or lowering.is_blocked(x) or len(lowering.shape(x)) != 3:
        return False
    n, channels, length = lowering.shape(x)
    spec = _spec(lowering, node, (n, channels, 1, length), dtype_of(lowering.value(x)))
    if spec is None:
        return False
    tail = _Tail(lowering, node, spec.filters, residuals=False)
    image = lowering.emit(relax.op.reshape(lowering.value(x), (n, channels, 1, length)))
    blocked = isinstance(spec, DepthwiseConv2d) or channels >= LANES
    image = to_blocked(lowering.bb, image) if blocked else image
    y = _run(lowering, node, spec, tail, image, blocked=blocked)
    plain = to_plain(lowering.bb, y, spec.filters)
    signal = lowering.emit(relax.op.reshape(plain, (n, spec.filters, spec.window.out[1])))
    # What was passed by on the way has no reader; it only counts as made.
    for value in (*tail.passed, tail.output):
        lowering.set(value, signal)
    return True


def _two_axes(lowering: Lowering, node: ir.Node) -> bool:
    x = node.inputs[0]
    if lowering.cpu is None or x is None:
        return False
    pads = (0, 0, 0, 0)
    pad = x.producer()
    if pad is not None and (found := pads_for_conv(lowering, pad)) is not None:
        x, pads = pad.inputs[0], found
        assert x is not None
    if len(shape := lowering.shape(x)) != 4:
        return False
    blocked = lowering.is_blocked(x)
    spec = _spec(lowering, node, shape, "float32" if blocked else dtype_of(lowering.value(x)), pads)
    if spec is None:
        return False
    tail = _Tail(lowering, node, spec.filters, (shape[0], spec.filters, *spec.window.out))
    if isinstance(spec, Conv2d) and not blocked and spec.channels < LANES:
        y = _run(lowering, node, spec, tail, lowering.value(x), blocked=False)
    else:
        y = _run(lowering, node, spec, tail, lowering.blocked(x), blocked=True)
    for value in (*tail.passed, tail.output):
        lowering.set_blocked(value, y, spec.filters)
    return True


def _spec(
    lowering: Lowering,
    node: ir.Node,
    shape: tuple[Any, ...],
    dtype: str,
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Conv2d | DepthwiseConv2d | None:
    """The kernel of a convolution, None where there is none."""
    batch, channels, height, width = shape
    if dtype != "float32" or not all(isinstance(d, int) for d in (channels, height, width)):
        return None
    kernel = _weight_shape(lowering, node)
    if kernel is None:
        return None
    window = read_window(node, height, width, kernel[2:], pads)
    if window is None:
        return None
    batch = batch if isinstance(batch, int) else None
    groups, filters = node.attributes.get_int("group", 1), kernel[0]
    spec: Conv2d | DepthwiseConv2d
    if groups == channels == filters and channels > 1:
        spec = DepthwiseConv2d(batch, channels, window)
    else:
        spec = Conv2d(batch, channels, filters, window, groups)
    if spec.why_not() is not None or kernel[1] * groups != channels:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_tensor(bias) is None:
        return None
    computed = constant_tensor(node.inputs[1]) is None
    # Weights that are computed are packed by operators, which know no windows of channels.
    return None if computed and isinstance(spec, Conv2d) and groups > 1 else spec


def _weight_shape(lowering: Lowering, node: ir.Node) -> tuple[int, ...] | None:
    """Sizes of the weight, an image's kernel for a signal's, None where they are not known or not fp32."""
    weight = constant_tensor(node.inputs[1])
    if weight is not None:
        if weight.dtype != ir.DataType.FLOAT:
            return None
        shape: tuple[Any, ...] = tuple(weight.shape.numpy())
    else:
        expression = lowering.value(node.inputs[1])
        if dtype_of(expression) != "float32":
            return None
        shape = shape_of(expression)
    if not all(isinstance(d, int) for d in shape) or len(shape) not in (3, 4):
        return None
    return shape if len(shape) == 4 else (*shape[:2], 1, shape[2])


def _run(
    lowering: Lowering,
    node: ir.Node,
    spec: Conv2d | DepthwiseConv2d,
    tail: _Tail,
    x: Any,
    *,
    blocked: bool,
) -> Any:
    """Call the kernel with everything it takes along; the result is blocked."""
    more: Epilogue = {
        "bias": tail.adds,
        "residual": tail.residual is not None,
        "activation": tail.activation,
        "low": tail.low,
        "high": tail.high,
    }
    if isinstance(spec, Conv2d):
        spec = Conv2d(
            spec.batch, spec.channels, spec.filters, spec.window, spec.groups, **more, plain_input=not blocked
        )
    else:
        spec = DepthwiseConv2d(spec.batch, spec.channels, spec.window, **more)
    spec = lowering.tuned(spec)
    arguments = [x, *_weights(lowering, node, spec, tail)]
    if tail.residual is not None:
        arguments.append(lowering.blocked(tail.residual))
    return lowering.call(spec, arguments, (shape_of(x)[0], *spec.output_shape), "float32")


def _weights(lowering: Lowering, node: ir.Node, spec: Conv2d | DepthwiseConv2d, tail: _Tail) -> list[Any]:
    """The packed weight and bias, as parameters; packed at every call where the weight is computed."""
    value = node.inputs[1]
    assert value is not None
    name = value.name or f"{node.name}.weight"
    tensor = constant_tensor(value)
    if tensor is not None:
        layout = (spec.filter_blocks, spec.plain_input) if isinstance(spec, Conv2d) else ()
        key = ("conv", id(tensor), layout, spec.bias, *tail.key)

        def make() -> list[np.ndarray]:
            weight = lowering.array(value)
            assert weight is not None
            if tail.scale is not None:
                weight = weight * tail.scale.reshape(-1, *[1] * (weight.ndim - 1))
            if weight.ndim == 3:
                weight = weight[:, :, None]
            return spec.pack(weight.astype(np.float32, copy=False), tail.shift)

        return lowering.packed(spec, key, name, make, activations=2 + (tail.residual is not None))
    weight = lowering.value(value)
    if tail.scale is not None:
        ndim = len(shape_of(weight))
        factor = lowering.weight(
            ("conv.scale", *tail.key), f"{name}.scale", lambda: tail.column(tail.scale, ndim)
        )
        weight = lowering.emit(relax.op.multiply(weight, factor))
    packed = [_pack_at_call(lowering, weight, spec)]
    if spec.bias:
        bias = np.zeros(spec.output_shape[0] * LANES, np.float32)
        bias[: spec.filters] = 0 if tail.shift is None else tail.shift
        key = ("conv.bias", id(value), *tail.key)
        packed.append(lowering.weight(key, f"{name}.bias", lambda: bias.reshape(-1, LANES)))
    return packed


def _pack_at_call(lowering: Lowering, weight: Any, spec: Conv2d | DepthwiseConv2d) -> Any:
    """``spec.pack`` in operators, for one group or depthwise."""
    emit = lowering.emit
    kh, kw = spec.window.kernel
    blocks = spec.output_shape[0]
    missing = blocks * LANES - spec.filters
    if isinstance(spec, DepthwiseConv2d):
        flat = emit(relax.op.reshape(weight, (spec.channels, kh, kw)))
        if missing:
            flat = emit(relax.op.nn.pad(flat, [0, missing, 0, 0, 0, 0]))
        split = emit(relax.op.reshape(flat, (blocks, LANES, kh, kw)))
        return emit(relax.op.permute_dims(split, [0, 2, 3, 1]))
    unit = 1 if spec.plain_input else LANES
    channels = -(-spec.channels // unit) * unit
    weight = emit(relax.op.reshape(weight, (spec.filters, spec.channels, kh, kw)))
    if missing or channels != spec.channels:
        weight = emit(relax.op.nn.pad(weight, [0, missing, 0, channels - spec.channels, 0, 0, 0, 0]))
    r = spec.filter_blocks
    split = emit(relax.op.reshape(weight, (blocks // r, r * LANES, channels // unit, unit, kh, kw)))
    packed = emit(relax.op.permute_dims(split, [0, 2, 4, 5, 3, 1]))
    if spec.plain_input:
        packed = emit(relax.op.reshape(packed, (blocks // r, channels, kh, kw, r * LANES)))
    return packed


# -- what goes before a convolution ------------------------------------------------------------------


def pad(lowering: Lowering, node: ir.Node) -> None:
    """Pad: nothing where the convolution behind it does the padding, else the importer's."""
    x, output = node.inputs[0], node.outputs[0]
    if x is None or pads_for_conv(lowering, node) is None:
        by_importer(lowering, node)
        return
    # Its one reader looks past it; the value only counts as made.
    if lowering.is_blocked(x):
        lowering.set_blocked(output, lowering.blocked(x), lowering.shape(x)[1])
    else:
        lowering.set(output, lowering.value(x))


def pads_for_conv(lowering: Lowering, node: ir.Node) -> tuple[int, int, int, int] | None:
    """Zeros around the pixels that the only reader, a convolution, can pad with; None for any other Pad.

    Returns:
        (top, left, bottom, right).
    """
    following = sole_consumer(node.outputs[0]) if len(node.outputs) == 1 else None
    if node.op_type != "Pad" or node.domain or following is None or lowering.cpu is None:
        return None
    if following.op_type != "Conv" or following.domain or following.inputs[0] is not node.outputs[0]:
        return None
    pads = constant_pads(node)
    x = node.inputs[0]
    if pads is None or len(pads) != 8 or x is None or any(pads[i] for i in (0, 1, 4, 5)) or min(pads) < 0:
        return None
    plain = not lowering.is_blocked(x) and dtype_of(lowering.value(x)) != "float32"
    if plain or following.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    found = (pads[2], pads[3], pads[6], pads[7])
    shape = lowering.shape(x)
    spec = _spec(lowering, following, shape, "float32", found) if len(shape) == 4 else None
    return None if spec is None else found


def constant_pads(node: ir.Node) -> list[int] | None:
    """The amounts of a Pad with constant zeros, None where they are computed or it pads with something else."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return None
    if "pads" in node.attributes:  # before opset 11
        if node.attributes.get_float("value", 0.0):
            return None
        return [int(n) for n in node.attributes.get_ints("pads", ()) or ()]
    rest = [*node.inputs[1:], None, None, None]
    pads, value = constant_array(rest[0]), constant_array(rest[1])
    if pads is None or rest[2] is not None or (rest[1] is not None and (value is None or value.any())):
        return None
    return [int(n) for n in pads.reshape(-1)]


# -- what follows a convolution ---------------------------------------------------------------------


@dataclass
class _Tail:
    """What a convolution takes along, and the output it leads to.

    Attributes:
        shape: of the convolution's output, to find shortcuts of the same shape.
        output: what the kernel's result is the value of.
        scale: factor of every filter, or None.
        shift: what is added to every filter, after the factor, or None.
        adds: whether there is a bias at all.
        residual: the value that is added before the activation.
        activation, low, high: of the kernel.
        key: identities of the constants in ``scale`` and ``shift``.
        passed: the outputs on the way, from the convolution's own on.
    """

    lowering: Lowering
    node: ir.Node
    filters: int
    shape: tuple[Any, ...] = ()
    residuals: bool = True
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    residual: ir.Value | None = None
    activation: str | None = None
    low: float = -math.inf
    high: float = math.inf
    key: tuple[object, ...] = ()
    passed: list[ir.Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = self.node.outputs[0]
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if bias is not None:
            found = constant_array(bias)
            assert found is not None, "a bias that is computed has no kernel"
            self.shift, self.key = found.astype(np.float32), (id(constant_tensor(bias)),)
        while (following := sole_consumer(self.output)) is not None and not following.domain:
            if not self._take(following):
                break
            self.passed.append(self.output)
            self.output = following.outputs[0]

    @property
    def adds(self) -> bool:
        """Whether the kernel has a bias."""
        return self.shift is not None

    @staticmethod
    def column(values: np.ndarray | None, ndim: int) -> np.ndarray:
        """One number per filter, shaped to multiply a weight."""
        assert values is not None
        return values.reshape(-1, *[1] * (ndim - 1))

    def _take(self, node: ir.Node) -> bool:
        if self.activation is not None:
            return False
        if node.op_type == "BatchNormalization" and self.residual is None:
            return self._take_norm(node)
        if node.op_type in ("Add", "Sum") and len(node.inputs) == 2:
            return self._take_sum(node)
        if node.op_type == "Relu":
            self.activation = "relu"
            return True
        if node.op_type == "Clip":
            return self._take_clip(node)
        return False

    def _take_norm(self, node: ir.Node) -> bool:
        arrays = [constant_array(value) for value in node.inputs[1:5]]
        if len(node.outputs) != 1 or node.attributes.get_int("training_mode", 0) != 0:
            return False
        if node.inputs[0] is not self.output or any(a is None or a.shape != (self.filters,) for a in arrays):
            return False
        gamma, beta, mean, variance = (a.astype(np.float64) for a in arrays if a is not None)
        factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        shift = beta + ((0 if self.shift is None else self.shift) - mean) * factor
        self.shift = shift.astype(np.float32)
        self.scale = (factor if self.scale is None else factor * self.scale).astype(np.float32)
        self.key = (*self.key, *(id(constant_tensor(value)) for value in node.inputs[1:5]))
        return True

    def _take_sum(self, node: ir.Node) -> bool:
        other = node.inputs[1] if node.inputs[0] is self.output else node.inputs[0]
        if other is None or other is self.output or self.residual is not None:
            return False
        added = per_channel(other, self.filters, len(self.shape) or 3)
        if added is not None:
            self.shift = added if self.shift is None else self.shift + added
            self.key = (*self.key, id(constant_tensor(other)))
            return True
        # Only what lies in blocks already is sure to be made before this node.
        if not self.residuals or not self.lowering.is_blocked(other):
            return False
        if self.lowering.shape(other) != self.shape:
            return False
        self.residual = other
        return True

    def _take_clip(self, node: ir.Node) -> bool:
        bounds = clip_bounds(node)
        if bounds is None or not bounds[0] <= bounds[1]:
            return False
        if self.filters % LANES and not bounds[0] <= 0 <= bounds[1]:
            return False
        self.activation, (self.low, self.high) = "clip", bounds
        return True


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """The constant bounds of a Clip, None where one is computed."""
    found = [node.attributes.get_float("min", -math.inf), node.attributes.get_float("max", math.inf)]
    for i, value in enumerate(node.inputs[1:3]):
        if value is None:
            continue
        bound = constant_array(value)
        if bound is None or bound.size != 1:
            return None
        found[i] = float(bound.reshape(()))
    return found[0], found[1]


def per_channel(value: ir.Value | None, channels: int, ndim: int) -> np.ndarray | None:
    """A constant that broadcasts along batch and pixels, as fp32 ``[channels]``, or None.

    Args:
        value: what may be such a constant.
        channels: of the image.
        ndim: axes of the image.
    """
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size not in (1, channels):
        return None
    shape = tuple(tensor.shape.numpy())
    if len(shape) > ndim:
        return None
    if tensor.size > 1 and (len(shape) < ndim - 1 or shape[len(shape) - ndim + 1] != channels):
        return None
    array = constant_array(value)
    assert array is not None
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (channels,)).astype(np.float32))
