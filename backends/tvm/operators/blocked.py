"""What lies between convolutions, without leaving the blocks: pools, sums, activations, joins.

A blocked value is ``[N, ceil(C / 16), H, W, 16]``. Operators that work element by element are the same
operators on five axes; constants per channel are laid out in blocks as well. Channels past C hold some finite
number (zero, or what an operator makes of zero), which every reader drops: the weights of a convolution are
zero there, and plain layout leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.kernels.lanes import LANES
from effic.backends.tvm.kernels.pool import GlobalMean, Pool2d
from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of
from effic.backends.tvm.operators.convolution import (
    clip_bounds,
    constant_pads,
    pad,
    pads_for_conv,
    per_channel,
)
from effic.backends.tvm.operators.windows import read_window
from effic.ir.model import constant_array, constant_tensor


def convert_blocked(lowering: Lowering, node: ir.Node) -> bool:
    """Lower a node of the standard domain in blocks.

    Returns:
        Whether it was; otherwise its converter reads plain layout.
    """
    convert = _CONVERTERS.get(node.op_type)
    if convert is None or node.domain or lowering.cpu is None:
        return False
    return convert(lowering, node)


def _set(lowering: Lowering, node: ir.Node, expression: Any, channels: int | None = None) -> bool:
    x = next(value for value in node.inputs if lowering.is_blocked(value))
    assert x is not None
    lowering.set_blocked(node.outputs[0], expression, lowering.shape(x)[1] if channels is None else channels)
    return True


# -- element by element -----------------------------------------------------------------------------


def _unary(make: Callable[[Any, ir.Node], Any]) -> Callable[[Lowering, ir.Node], bool]:
    def convert(lowering: Lowering, node: ir.Node) -> bool:
        x = node.inputs[0]
        if x is None or not lowering.is_blocked(x) or any(v is not None for v in node.inputs[1:]):
            return False
        return _set(lowering, node, make(lowering.blocked(x), node))

    return convert


def _float(value: float) -> Any:
    return relax.const(np.float32(value))


def _leaky(x: Any, node: ir.Node) -> Any:
    return relax.op.nn.leakyrelu(x, node.attributes.get_float("alpha", 0.01))


def _hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    line = relax.op.add(relax.op.multiply(x, _float(alpha)), _float(beta))
    return relax.op.minimum(relax.op.maximum(line, _float(0.0)), _float(1.0))


def _hard_sigmoid_of(x: Any, node: ir.Node) -> Any:
    return _hard_sigmoid(x, node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5))


def _clip(lowering: Lowering, node: ir.Node) -> bool:
    x, bounds = node.inputs[0], clip_bounds(node)
    if x is None or bounds is None or not lowering.is_blocked(x):
        return False
    y = lowering.blocked(x)
    if bounds[0] > -np.inf:
        y = lowering.emit(relax.op.maximum(y, _float(bounds[0])))
    if bounds[1] < np.inf:
        y = lowering.emit(relax.op.minimum(y, _float(bounds[1])))
    return _set(lowering, node, y)


def _identity(lowering: Lowering, node: ir.Node) -> bool:
    x = node.inputs[0]
    mask = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    training = len(node.inputs) > 2 and node.inputs[2] is not None
    if x is None or not lowering.is_blocked(x) or mask or training:
        return False
    return _set(lowering, node, lowering.blocked(x))


def _binary(operator: Callable[[Any, Any], Any]) -> Callable[[Lowering, ir.Node], bool]:
    def convert(lowering: Lowering, node: ir.Node) -> bool:
        if len(node.inputs) != 2:
            return False
        sides = _operands(lowering, node)
        return sides is not None and _set(lowering, node, operator(*sides))

    return convert


def _operands(lowering: Lowering, node: ir.Node) -> list[Any] | None:
    """Both sides in blocks, None where one cannot be."""
    known = next(value for value in node.inputs if value is not None and lowering.is_blocked(value))
    shape, found = lowering.shape(known), []
    for value in node.inputs:
        if value is None:
            return None
        if lowering.is_blocked(value):
            if not _broadcasts(lowering.shape(value), shape):
                return None
            found.append(lowering.blocked(value))
        elif constant_tensor(value) is not None:
            constant = _constant(lowering, value, shape[1])
            if constant is None:
                return None
            found.append(constant)
        else:
            expression = lowering.value(value)
            if dtype_of(expression) != "float32" or shape_of(expression) != tuple(shape):
                return None
            found.append(lowering.blocked(value))
    return found


def _broadcasts(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two images go together block by block: channels alike, other axes alike or 1."""
    return one[1] == other[1] and all(
        a == b or (isinstance(a, int) and a == 1) or (isinstance(b, int) and b == 1)
        for a, b in zip(one, other, strict=True)
    )


def _constant(lowering: Lowering, value: ir.Value, channels: int) -> Any | None:
    """A number, or one per channel, in blocks: ``[1, ceil(C / 16), 1, 1, 16]``."""
    row = per_channel(value, channels, 4)
    if row is None:
        return None
    tensor = constant_tensor(value)
    if tensor is not None and tensor.size == 1:
        return _float(float(row[0]))
    return _row(lowering, ("blocked", id(tensor)), f"{value.name or 'constant'}.blocked", row)


def _row(lowering: Lowering, key: tuple[object, ...], name: str, row: np.ndarray) -> Any:
    blocks = -(-row.size // LANES)
    padded = np.zeros((1, blocks, 1, 1, LANES), np.float32)
    padded.reshape(-1)[: row.size] = row
    return lowering.weight(key, name, lambda: padded)


def _norm(lowering: Lowering, node: ir.Node) -> bool:
    """A batch norm that no convolution could take along: a factor and a sum per channel."""
    x = node.inputs[0]
    arrays = [constant_array(value) for value in node.inputs[1:5]]
    if x is None or not lowering.is_blocked(x) or len(node.outputs) != 1 or any(a is None for a in arrays):
        return False
    if node.attributes.get_int("training_mode", 0):
        return False
    gamma, beta, mean, variance = (a.astype(np.float64) for a in arrays if a is not None)
    factor = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    ids = tuple(id(constant_tensor(value)) for value in node.inputs[1:5])
    name = node.name or "norm"
    scale = _row(lowering, ("norm.scale", *ids), f"{name}.scale", factor.astype(np.float32))
    shift = _row(lowering, ("norm.shift", *ids), f"{name}.shift", (beta - mean * factor).astype(np.float32))
    y = lowering.emit(relax.op.multiply(lowering.blocked(x), scale))
    return _set(lowering, node, relax.op.add(y, shift))


# -- pools ------------------------------------------------------------------------------------------


def _pool(lowering: Lowering, node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or len(node.outputs) != 1:
        return False
    batch, channels, height, width = lowering.shape(x)
    if not all(isinstance(d, int) for d in (channels, height, width)):
        return False
    window = read_window(node, height, width, node.attributes.get_ints("kernel_shape", ()))
    if window is None:
        return False
    count_pads = bool(node.attributes.get_int("count_include_pad", 0))
    if count_pads and node.attributes.get_int("ceil_mode", 0) != 0:
        return False
    kind = "max" if node.op_type == "MaxPool" else "mean"
    spec = Pool2d(
        batch if isinstance(batch, int) else None, channels, window, kind, count_pads and kind == "mean"
    )
    if spec.why_not() is not None:
        return False
    y = lowering.call(spec, [lowering.blocked(x)], (batch, *spec.output_shape), "float32")
    return _set(lowering, node, y)


def _global_mean(lowering: Lowering, node: ir.Node) -> bool:
    x = node.inputs[0]
    if x is None or not lowering.is_blocked(x):
        return False
    batch, channels, height, width = lowering.shape(x)
    if not all(isinstance(d, int) for d in (channels, height, width)):
        return False
    spec = GlobalMean(batch if isinstance(batch, int) else None, channels, height, width)
    shape = (batch, -(-channels // LANES), 1, 1, LANES)
    return _set(lowering, node, lowering.call(spec, [lowering.blocked(x)], shape, "float32"))


def _reduce_mean(lowering: Lowering, node: ir.Node) -> bool:
    """The mean over the pixels, as torch writes a global pool."""
    axes = list(node.attributes.get_ints("axes", ()) or ())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        found = constant_array(node.inputs[1])
        axes = [] if found is None else [int(axis) for axis in found.reshape(-1)]
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        return False
    x = node.inputs[0]
    if x is None or not lowering.is_blocked(x):
        return False
    if node.attributes.get_int("keepdims", 1):
        return _global_mean(lowering, node)
    batch, channels, height, width = lowering.shape(x)
    if not all(isinstance(d, int) for d in (channels, height, width)) or channels % LANES:
        return False
    spec = GlobalMean(batch if isinstance(batch, int) else None, channels, height, width)
    y = lowering.call(spec, [lowering.blocked(x)], (batch, channels // LANES, 1, 1, LANES), "float32")
    lowering.set(node.outputs[0], relax.op.reshape(y, (batch, channels)))
    return True


# -- shapes -----------------------------------------------------------------------------------------


def _concat(lowering: Lowering, node: ir.Node) -> bool:
    """Images side by side in their channels, where the seams lie between blocks."""
    if node.attributes.get_int("axis", 0) not in (1, -3):
        return False
    shapes = [lowering.shape(value) for value in node.inputs if value is not None]
    if len(shapes) != len(node.inputs) or any(len(shape) != 4 for shape in shapes):
        return False
    if any(not isinstance(shape[1], int) for shape in shapes) or any(s[1] % LANES for s in shapes[:-1]):
        return False
    parts = [lowering.blocked(value) for value in node.inputs if value is not None]
    if any(dtype_of(part) != "float32" for part in parts):
        return False
    return _set(lowering, node, relax.op.concat(parts, axis=1), sum(shape[1] for shape in shapes))


def _transpose(lowering: Lowering, node: ir.Node) -> bool:
    """Channels last, as heads of detectors write it: the blocks lie almost so already."""
    x = node.inputs[0]
    if x is None or list(node.attributes.get_ints("perm", ()) or ()) != [0, 2, 3, 1]:
        return False
    batch, channels, height, width = lowering.shape(x)
    blocks = -(-channels // LANES)
    turned = lowering.emit(relax.op.permute_dims(lowering.blocked(x), [0, 2, 3, 1, 4]))
    joined = lowering.emit(relax.op.reshape(turned, (batch, height, width, blocks * LANES)))
    if blocks * LANES != channels:
        joined = lowering.emit(relax.op.strided_slice(joined, axes=[3], begin=[0], end=[channels]))
    lowering.set(node.outputs[0], joined)
    return True


def _pad(lowering: Lowering, node: ir.Node) -> bool:
    """Zeros around the pixels, and whole blocks of channels."""
    x = node.inputs[0]
    if x is None or len(node.outputs) != 1:
        return False
    if pads_for_conv(lowering, node) is not None:
        pad(lowering, node)
        return True
    pads, channels = constant_pads(node), lowering.shape(x)[1]
    if pads is None or len(pads) != 8 or min(pads) < 0 or pads[0] or pads[4]:
        return False
    before, after = pads[1], pads[5]
    # Zeros behind ragged channels would have to fill their block first.
    if before % LANES or (after and channels % LANES):
        return False
    more = -(-(channels + before + after) // LANES) - -(-channels // LANES) - before // LANES
    sides = [0, 0, before // LANES, more, pads[2], pads[6], pads[3], pads[7], 0, 0]
    return _set(lowering, node, relax.op.nn.pad(lowering.blocked(x), sides), channels + before + after)


def _slice(lowering: Lowering, node: ir.Node) -> bool:
    """Some rows and columns of pixels."""
    x, rest = node.inputs[0], [constant_array(value) for value in node.inputs[1:]]
    if x is None or not 2 <= len(rest) <= 4 or any(array is None for array in rest):
        return False
    starts, ends, *others = ([int(n) for n in array.reshape(-1)] for array in rest if array is not None)
    axes = [axis % 4 for axis in (others[0] if others else range(len(starts)))]
    steps = others[1] if len(others) > 1 else [1] * len(axes)
    if any(axis not in (2, 3) for axis in axes) or min(steps) < 1 or len(set(axes)) != len(axes):
        return False
    shape, cuts = lowering.shape(x), list[tuple[int, int, int]]()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not isinstance(shape[axis], int):
            return False
        first, last, _ = slice(start, end, step).indices(shape[axis])
        if first >= last:
            return False
        cuts.append((first, last, step))
    begin, end_, strides = (list(column) for column in zip(*cuts, strict=True))
    y = relax.op.strided_slice(lowering.blocked(x), axes=axes, begin=begin, end=end_, strides=strides)
    return _set(lowering, node, y)


def _flatten(lowering: Lowering, node: ir.Node) -> bool:
    """One pixel in whole blocks is a row already."""
    x = node.inputs[0]
    if x is None or node.attributes.get_int("axis", 1) != 1:
        return False
    batch, channels, height, width = lowering.shape(x)
    if (height, width) != (1, 1) or channels % LANES:
        return False
    lowering.set(node.outputs[0], relax.op.reshape(lowering.blocked(x), (batch, channels)))
    return True


_CONVERTERS: dict[str, Callable[[Lowering, ir.Node], bool]] = {
    "Abs": _unary(lambda x, _: relax.op.abs(x)),
    "Add": _binary(relax.op.add),
    "AveragePool": _pool,
    "BatchNormalization": _norm,
    "Clip": _clip,
    "Concat": _concat,
    "Dropout": _identity,
    "Flatten": _flatten,
    "GlobalAveragePool": _global_mean,
    "HardSigmoid": _unary(_hard_sigmoid_of),
    "HardSwish": _unary(lambda x, _: relax.op.multiply(x, _hard_sigmoid(x, 1 / 6, 0.5))),
    "Identity": _identity,
    "LeakyRelu": _unary(_leaky),
    "Max": _binary(relax.op.maximum),
    "MaxPool": _pool,
    "Min": _binary(relax.op.minimum),
    "Mul": _binary(relax.op.multiply),
    "Neg": _unary(lambda x, _: relax.op.negative(x)),
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _unary(lambda x, _: relax.op.nn.relu(x)),
    "Sigmoid": _unary(lambda x, _: relax.op.sigmoid(x)),
    "Slice": _slice,
    "Sub": _binary(relax.op.subtract),
    "Sum": _binary(relax.op.add),
    "Tanh": _unary(lambda x, _: relax.op.tanh(x)),
    "Transpose": _transpose,
}
"""By operator."""
