"""What each operator does with the channels of its inputs; see :mod:`effic.ir.channels`.

A rule returns the numbers of the inputs it follows (the others are held in place) and the axes of the
outputs it knows (the others are held in place as well).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from effic.ir.channels import Channels, Dim, Unfollowed, product, total, unify
from effic.ir.model import ONNX_DOMAINS, constant_array, describe

Axes = Sequence[Dim]
Result = tuple[Collection[int], list[Axes]]


def follow(node: ir.Node, channels: Channels) -> Result:
    """Unify what a node makes the same, and say what its outputs carry.

    Raises:
        Unfollowed: the operator is not known, or what it does here depends on more than is known.
    """
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    rule = RULES.get((domain, node.op_type))
    if rule is None:
        raise Unfollowed("is not followed")
    return rule(node, channels)


def _axes(node: ir.Node, index: int, channels: Channels) -> Axes:
    found = channels.axes(node.inputs[index]) if index < len(node.inputs) else None
    if found is None:
        raise Unfollowed("reads a value whose shape is not known")
    return found


def _given(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _shape_of(value: ir.Value, channels: Channels) -> tuple[int, ...]:
    shape = channels.shape(value)
    if shape is None:
        raise Unfollowed("makes a value whose shape is not known")
    return shape


def _ints(node: ir.Node, name: str, index: int | None = None) -> list[int] | None:
    """Integers of an attribute or, in later operator sets, of a constant input; None when not given."""
    if index is not None and _given(node, index):
        array = constant_array(node.inputs[index])
        if array is None:
            raise Unfollowed(f"takes its {name} from a value computed at run time")
        return [int(v) for v in array.reshape(-1)]
    attr = node.attributes.get(name)
    return None if attr is None else list(attr.as_ints())


def _broadcast(operands: Iterable[Axes], where: str) -> list[Dim]:
    """Axes of what NumPy's broadcasting makes of operands; axes of length one are free."""
    rows = [list(axes) for axes in operands]
    rank = max(map(len, rows), default=0)
    result = []
    for place in range(-rank, 0):
        here = [row[place] for row in rows if len(row) >= -place and row[place].size != 1]
        for other in here[1:]:
            unify(here[0], other, where)
        result.append(here[0] if here else Dim(1))
    return result


# -- element by element ---------------------------------------------------------------------------


def _elementwise(node: ir.Node, channels: Channels) -> Result:
    given = [i for i in range(len(node.inputs)) if _given(node, i)]
    return given, [_broadcast((_axes(node, i, channels) for i in given), describe(node))]


def _first_input(node: ir.Node, channels: Channels) -> Result:
    return [0], [_axes(node, 0, channels)]


def _dropout(node: ir.Node, channels: Channels) -> Result:
    training = constant_array(node.inputs[2]) if _given(node, 2) else np.zeros((), bool)
    if training is None or training.any():
        raise Unfollowed("drops elements at random")
    axes = _axes(node, 0, channels)
    return [0], [axes, axes]


def _quantize(node: ir.Node, channels: Channels) -> Result:
    if any(axis.size != 1 for axis in _axes(node, 1, channels)):
        raise Unfollowed("has a scale for each channel")
    if node.op_type == "DequantizeLinear" and constant_array(node.inputs[0]) is not None:
        raise Unfollowed("decodes a weight stored in compressed form")
    return _first_input(node, channels)


def _over_axis(node: ir.Node, channels: Channels) -> Result:
    """Softmax and the like: every element by itself and by a sum over the axis."""
    axes = _axes(node, 0, channels)
    for axis in axes:
        axis.mix(describe(node))
    return [0], [axes]


def _in_order(node: ir.Node, channels: Channels) -> Result:
    """CumSum, LRN, Hardmax: neighbours on the axis matter."""
    axes = _axes(node, 0, channels)
    if node.op_type == "LRN":
        axis = 1
    elif node.op_type == "CumSum":
        found = _ints(node, "axis", 1)
        axis = found[0] if found else 0
    else:
        axis = node.attributes.get_int("axis", -1)
    _hold(axes[axis], node)
    return [0], [axes]


def _trilu(node: ir.Node, channels: Channels) -> Result:
    axes = _axes(node, 0, channels)
    for axis in axes[-2:]:
        _hold(axis, node)
    return [0], [axes]


def _hold(axis: Dim, node: ir.Node) -> None:
    axis.freeze(f"are in an order that matters to {describe(node)}")


# -- linear layers --------------------------------------------------------------------------------


def _matmul(node: ir.Node, channels: Channels) -> Result:
    a, b = _axes(node, 0, channels), _axes(node, 1, channels)
    where = describe(node)
    if not a or not b:
        raise Unfollowed("multiplies a value without axes")
    unify(a[-1], b[-2] if len(b) > 1 else b[0], where)
    batch = _broadcast((a[:-2], b[:-2]), where)
    return [0, 1], [[*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])]]


def _gemm(node: ir.Node, channels: Channels) -> Result:
    a, b = list(_axes(node, 0, channels)), list(_axes(node, 1, channels))
    if node.attributes.get_int("transA", 0):
        a.reverse()
    if node.attributes.get_int("transB", 0):
        b.reverse()
    unify(a[1], b[0], describe(node))
    result = [a[0], b[1]]
    if _given(node, 2):
        _broadcast((result, _axes(node, 2, channels)), describe(node))
    return [0, 1, 2], [result]


def _einsum(node: ir.Node, channels: Channels) -> Result:
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation or not arrow or len(terms) != len(node.inputs):
        raise Unfollowed("is written in a form that is not followed")
    letters: dict[str, Dim] = {}
    for index, term in enumerate(terms):
        for letter, axis in zip(term, _axes(node, index, channels), strict=True):
            if axis.size != 1 and letter in letters and letters[letter].size != 1:
                unify(letters[letter], axis, describe(node))
            if letter not in letters or letters[letter].size == 1:
                letters[letter] = axis
    return range(len(terms)), [[letters[letter] for letter in right]]


def _conv(node: ir.Node, channels: Channels) -> Result:
    x, w = _axes(node, 0, channels), _axes(node, 1, channels)
    groups, where = node.attributes.get_int("group", 1), describe(node)
    for axis in (*x[2:], *w[2:]):
        _hold(axis, node)
    if groups == 1:
        unify(x[1], w[1], where)
        out = w[0]
    else:
        # The same order inside every group, and an order of the groups.
        each = Dim(groups)
        unify(x[1], product((each, w[1])), where)
        out = w[0]
        unify(out, product((each, Dim(out.size // groups))), where)
    if _given(node, 2):
        unify(_axes(node, 2, channels)[0], out, where)
    return [0, 1, 2], [[x[0], out, *_held(_shape_of(node.outputs[0], channels)[2:], node)]]


def _conv_transpose(node: ir.Node, channels: Channels) -> Result:
    x, w = _axes(node, 0, channels), _axes(node, 1, channels)
    groups, where = node.attributes.get_int("group", 1), describe(node)
    for axis in (*x[2:], *w[2:]):
        _hold(axis, node)
    unify(x[1], w[0], where)
    out = w[1]
    if groups > 1:
        each = Dim(groups)
        unify(w[0], product((each, Dim(w[0].size // groups))), where)
        out = product((each, w[1]))
    if _given(node, 2):
        unify(_axes(node, 2, channels)[0], out, where)
    return [0, 1, 2], [[x[0], out, *_held(_shape_of(node.outputs[0], channels)[2:], node)]]


def _held(sizes: Iterable[int], node: ir.Node) -> list[Dim]:
    """New axes whose order matters: positions in an image, mostly."""
    return [Dim(size, reason=f"are positions that {describe(node)} makes") for size in sizes]


# -- norms ----------------------------------------------------------------------------------------


def _channel_norm(node: ir.Node, channels: Channels) -> Result:
    """Batch and instance norm: vectors along axis 1."""
    x = _axes(node, 0, channels)
    if node.attributes.get_int("training_mode", 0) or not node.attributes.get_int("spatial", 1):
        raise Unfollowed("is in a form that is not followed")
    given = [i for i in range(1, len(node.inputs)) if _given(node, i)]
    for index in given:
        unify(_axes(node, index, channels)[0], x[1], describe(node))
    if node.op_type == "InstanceNormalization":
        for axis in x[2:]:
            axis.mix(describe(node))
    return [0, *given], [x]


def _layer_norm(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    axis = node.attributes.get_int("axis", -1) % len(x)
    for dim in x[axis:]:
        dim.mix(describe(node))
    given = [i for i in range(1, len(node.inputs)) if _given(node, i)]
    for index in given:
        _broadcast((x, _axes(node, index, channels)), describe(node))
    return [0, *given], [x]


def _skip_layer_norm(node: ir.Node, channels: Channels) -> Result:
    given = [i for i in range(len(node.inputs)) if _given(node, i)]
    x = _broadcast((_axes(node, i, channels) for i in given), describe(node))
    x[-1].mix(describe(node))
    if len(node.outputs) < 4:
        return given, [x]
    one = [*x[:-1], Dim(1)]
    return given, [x, one, one, x]


def _group_norm(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    groups = node.attributes.get_int("num_groups", 1)
    each = Dim(groups)
    inside = Dim(x[1].size // max(1, groups))
    unify(x[1], product((each, inside)), describe(node))
    for dim in (inside, *x[2:]):
        dim.mix(describe(node))
    for index in (1, 2):
        vector = _axes(node, index, channels)[0]
        # One for each group before operator set 21, one for each channel since.
        unify(vector, each if vector.size == groups != x[1].size else x[1], describe(node))
    return [0, 1, 2], [x]


# -- along other axes -----------------------------------------------------------------------------


def _reduce(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    found = _ints(node, "axes", 1)
    noop = node.attributes.get_int("noop_with_empty_axes", 0)
    if noop and not found:
        return [0], [x]
    gone = {axis % len(x) for axis in found} if found else set(range(len(x)))
    for axis in gone:
        x[axis].mix(describe(node))
    if node.attributes.get_int("keepdims", 1):
        return [0], [[Dim(1) if axis in gone else dim for axis, dim in enumerate(x)]]
    return [0], [[dim for axis, dim in enumerate(x) if axis not in gone]]


def _arg_reduce(node: ir.Node, channels: Channels) -> Result:
    x = list(_axes(node, 0, channels))
    axis = node.attributes.get_int("axis", 0) % len(x)
    _hold(x[axis], node)
    x[axis : axis + 1] = [Dim(1)] if node.attributes.get_int("keepdims", 1) else []
    return [0], [x]


def _top_k(node: ir.Node, channels: Channels) -> Result:
    x = list(_axes(node, 0, channels))
    axis = node.attributes.get_int("axis", -1) % len(x)
    _hold(x[axis], node)
    x[axis] = _held([_shape_of(node.outputs[0], channels)[axis]], node)[0]
    return [0], [x, x]


def _pool(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise Unfollowed("also gives the places of the largest")
    for axis in x[2:]:
        _hold(axis, node)
    return [0], [[*x[:2], *_held(_shape_of(node.outputs[0], channels)[2:], node)]]


def _global_pool(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    return [0], [[*x[:2], *(Dim(1) for _ in x[2:])]]


def _resize(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Unfollowed("crops")
    return [0], [_kept(node, x, _shape_of(node.outputs[0], channels), up_to=2)]


def _kept(node: ir.Node, x: Axes, shape: tuple[int, ...], up_to: int) -> list[Dim]:
    """The first axes where their sizes stay, held ones for the others."""
    result = []
    for number, (axis, size) in enumerate(zip(x, shape, strict=True)):
        if number < up_to and axis.size == size:
            result.append(axis)
        else:
            _hold(axis, node)
            result += _held([size], node)
    return result


def _pad(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    pads, axes = _ints(node, "pads", 1), _ints(node, "axes", 3)
    if pads is None:
        raise Unfollowed("pads by what is not known")
    axes = list(range(len(x))) if axes is None else [axis % len(x) for axis in axes]
    result = list(x)
    constant = node.attributes.get_string("mode", "constant") == "constant"
    for place, axis in enumerate(axes):
        before, after = pads[place], pads[place + len(axes)]
        if constant and min(before, after) >= 0:
            # What is added is all alike, so that its order does not matter either.
            result[axis] = total((Dim(before), x[axis], Dim(after)))
        elif before or after:
            _hold(x[axis], node)
            result[axis] = _held([x[axis].size + before + after], node)[0]
    return [0, 2], [result]


# -- moving elements ------------------------------------------------------------------------------


def _transpose(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    perm = _ints(node, "perm")
    return [0], [[x[axis] for axis in (range(len(x) - 1, -1, -1) if perm is None else perm)]]


def _reshape(node: ir.Node, channels: Channels) -> Result:
    before = _axes(node, 0, channels)
    after = [Dim(size) for size in _shape_of(node.outputs[0], channels)]
    where = describe(node)
    i = j = 0
    # Runs of axes that are turned into each other, from the left and as short as possible.
    while i < len(before) or j < len(after):
        left, right = list(before[i : i + 1]), after[j : j + 1]
        i, j = i + len(left), j + len(right)
        while (a := math.prod(d.size for d in left)) != (b := math.prod(d.size for d in right)):
            if a < b and i < len(before):
                left.append(before[i])
                i += 1
            elif b < a and j < len(after):
                right.append(after[j])
                j += 1
            else:
                raise Unfollowed("makes another number of elements")
        if math.prod(d.size for d in left) > 1:
            unify(product(left), product(right), where)
    return [0], [after]


def _expand(node: ir.Node, channels: Channels) -> Result:
    x, shape = _axes(node, 0, channels), _shape_of(node.outputs[0], channels)
    return [0], [_broadcast((x, [Dim(size) for size in shape]), describe(node))]


def _tile(node: ir.Node, channels: Channels) -> Result:
    x, repeats = _axes(node, 0, channels), _ints(node, "repeats", 1)
    if repeats is None:
        raise Unfollowed("is in a form that is not followed")
    return [0], [[product((Dim(n), axis)) for n, axis in zip(repeats, x, strict=True)]]


def _concat(node: ir.Node, channels: Channels) -> Result:
    operands = [_axes(node, i, channels) for i in range(len(node.inputs))]
    axis = node.attributes.get_int("axis", 1) % len(operands[0])
    result = list(operands[0])
    for number in range(len(result)):
        if number == axis:
            result[axis] = total(axes[axis] for axes in operands)
        else:
            for axes in operands[1:]:
                unify(result[number], axes[number], describe(node))
    return range(len(operands)), [result]


def _split(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    axis = node.attributes.get_int("axis", 0) % len(x)
    sizes = _ints(node, "split", 1)
    if sizes is None:
        part = -(-x[axis].size // len(node.outputs))
        sizes = [min(part, x[axis].size - n * part) for n in range(len(node.outputs))]
    parts = [Dim(size) for size in sizes]
    unify(x[axis], total(parts), describe(node))
    return [0], [[*x[:axis], part, *x[axis + 1 :]] for part in parts]


def _slice(node: ir.Node, channels: Channels) -> Result:
    x = _axes(node, 0, channels)
    axes = _ints(node, "axes", 3)
    starts, ends, steps = (_bounds(node, name, i) for name, i in (("starts", 1), ("ends", 2), ("steps", 4)))
    count = next((len(v) for v in (axes, starts, ends) if v is not None), 0)
    result = list(x)
    shape = _shape_of(node.outputs[0], channels)
    for place in range(count):
        axis = (axes[place] if axes is not None else place) % len(x)
        size, held = x[axis].size, _held([shape[axis]], node)[0]
        step = 1 if not _given(node, 4) else steps[place] if steps is not None else 0
        if starts is None or ends is None or step != 1:
            _hold(x[axis], node)
            result[axis] = held
            continue
        first, last, _ = slice(starts[place], ends[place]).indices(size)
        last = max(first, last)
        parts = [Dim(first), Dim(last - first), Dim(size - last)]
        if parts[1].size in (0, size):
            result[axis] = x[axis] if parts[1].size else held
            continue
        unify(x[axis], total(parts), describe(node))
        result[axis] = parts[1]
    return [0], [result]


def _bounds(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Bounds of a Slice; None when they are computed at run time."""
    try:
        return _ints(node, name, index)
    except Unfollowed:
        return None


def _gather(node: ir.Node, channels: Channels) -> Result:
    x, indices = _axes(node, 0, channels), _axes(node, 1, channels)
    axis = node.attributes.get_int("axis", 0) % len(x)
    _hold(x[axis], node)
    return [0, 1], [[*x[:axis], *indices, *x[axis + 1 :]]]


def _depth_to_space(node: ir.Node, channels: Channels) -> Result:
    x, block = _axes(node, 0, channels), node.attributes.get_int("blocksize", 1)
    inside = Dim(x[1].size // block**2)
    cells = [Dim(block), Dim(block)]
    first = node.attributes.get_string("mode", "DCR") == "DCR"
    unify(x[1], product([*cells, inside] if first else [inside, *cells]), describe(node))
    for axis in (*cells, *x[2:]):
        _hold(axis, node)
    return [0], [[x[0], inside, *_held(_shape_of(node.outputs[0], channels)[2:], node)]]


def _space_to_depth(node: ir.Node, channels: Channels) -> Result:
    x, block = _axes(node, 0, channels), node.attributes.get_int("blocksize", 1)
    cells = _held([block, block], node)
    for axis in x[2:]:
        _hold(axis, node)
    spatial = _held(_shape_of(node.outputs[0], channels)[2:], node)
    return [0], [[x[0], product([*cells, x[1]]), *spatial]]


# -- numbers that no channel goes into ------------------------------------------------------------


def _shape(node: ir.Node, channels: Channels) -> Result:
    # The order of channels does not change how many there are.
    return [0], []


def _constant(node: ir.Node, channels: Channels) -> Result:
    axes = channels.axes(node.outputs[0])
    if axes is None:
        raise Unfollowed("holds what is no tensor")
    return [], [axes]


ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd", "BitwiseNot",
    "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Elu", "Equal", "Erf",
    "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf",
    "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg",
    "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu",
    "Where", "Xor",
)  # fmt: skip
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip

Rule = Callable[[ir.Node, Channels], Result]

_STANDARD: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("CastLike",), _first_input),
    "Dropout": _dropout,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization"), _over_axis),
    **dict.fromkeys(("CumSum", "LRN", "Hardmax"), _in_order),
    "Trilu": _trilu,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _channel_norm),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _layer_norm),
    "GroupNormalization": _group_norm,
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg_reduce),
    "TopK": _top_k,
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    **dict.fromkeys(("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"), _global_pool),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Pad": _pad,
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    **dict.fromkeys(("Shape", "Size"), _shape),
    "Constant": _constant,
}

RULES: dict[tuple[str, str], Rule] = {
    **{("", name): rule for name, rule in _STANDARD.items()},
    **{
        ("com.microsoft", name): _elementwise
        for name in ("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd")
    },
    ("com.microsoft", "SimplifiedLayerNormalization"): _layer_norm,
    ("com.microsoft", "SkipLayerNormalization"): _skip_layer_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_layer_norm,
}
"""The rule of each operator, by domain and name; any other holds all it touches in place."""
