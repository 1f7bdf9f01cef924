"""The nodes that random graphs are made of: each maker picks values that fit, or gives None."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from tests.backends.tvm.random_graphs import RandomGraph

MOST = 4096
"""Elements that a value may have."""

Maker = Callable[["RandomGraph"], "onnx.NodeProto | None"]


def _node(op: str, *inputs: str | None, outputs: int = 1, **attributes: object) -> onnx.NodeProto | None:
    if any(name is None for name in inputs):
        return None
    return helper.make_node(op, [str(i) for i in inputs], [f"o{i}" for i in range(outputs)], **attributes)


def _real(a: np.ndarray) -> bool:
    return bool(a.dtype == np.float32)


def _finite(a: np.ndarray) -> bool:
    """What is the largest, and where, is not said of NaN."""
    return _real(a) and a.ndim > 0 and bool(np.isfinite(a).all())


def _whole(a: np.ndarray) -> bool:
    return a.dtype in (np.int64, np.int32)


def _unary(g: RandomGraph) -> onnx.NodeProto | None:
    op = g.one_of(
        "Relu Sigmoid Tanh Erf Exp Neg Abs Sqrt Reciprocal Softplus Softsign Elu Selu "
        "LeakyRelu HardSigmoid HardSwish Gelu Mish Sin Cos Tan Atan Asinh Log Floor Ceil "
        "Round Sign IsNaN IsInf Celu ThresholdedRelu Identity Acos Asin Sinh Cosh Atanh "
        "Acosh"
    )
    return _node(op, g.pick(_real))


def _unary_other(g: RandomGraph) -> onnx.NodeProto | None:
    if g.chance():
        return _node("Not", g.pick(lambda a: a.dtype.kind == "b"))
    return _node(g.one_of("Neg Abs Sign"), g.pick(_whole))


def _other(g: RandomGraph, x: str) -> str | None:
    """Something that broadcasts with ``x``, of its type."""
    a = g.values[x]
    if g.chance(0.5):
        shape = [1 if g.chance(0.4) else d for d in a.shape][g.below(a.ndim + 1) :]
        if a.dtype.kind == "b":
            return g.constant(g.rng.random(shape) < 0.5)
        if a.dtype.kind in "iu":
            return g.constant(g.rng.integers(1, 9, shape).astype(a.dtype))
        return g.constant(np.asarray(g.rng.standard_normal(shape), np.float32))

    def fits(b: np.ndarray) -> bool:
        if b.dtype != a.dtype:
            return False
        try:
            return np.prod(np.broadcast_shapes(a.shape, b.shape)) <= MOST
        except ValueError:
            return False

    return g.pick(fits)


def _binary(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick()
    assert x is not None
    dtype = g.values[x].dtype
    if dtype.kind == "b":
        op = g.one_of("And Or Xor Equal")
    elif dtype.kind == "f":
        op = g.one_of(
            "Add Sub Mul Div Max Min Pow Greater Less GreaterOrEqual LessOrEqual Equal Mod PRelu Mean Sum"
        )
    elif dtype in (np.int64, np.int32):
        op = g.one_of("Add Sub Mul Div Max Min Greater Less Equal Mod LessOrEqual BitwiseAnd BitwiseOr")
    else:
        op = g.one_of("Max Min Equal Add BitwiseXor")
    other = _other(g, x)
    pair = (x, other) if g.chance(0.7) or op in ("PRelu", "Div", "Mod") else (other, x)
    return _node(op, *pair, **({"fmod": 1} if op == "Mod" and dtype.kind == "f" else {}))


def _cast(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(lambda a: a.dtype.kind != "f" or bool(np.isfinite(a).all()))
    to = [
        TensorProto.FLOAT,
        TensorProto.FLOAT,
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.BOOL,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.INT8,
    ]
    return _node("Cast", x, to=to[g.below(len(to))])


def _where(g: RandomGraph) -> onnx.NodeProto | None:
    c = g.pick(lambda a: a.dtype.kind == "b")
    if c is None:
        return None
    x = g.pick(_real)
    if x is None:
        return None
    return _node("Where", c, x, _other(g, x))


def _clip(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(lambda a: a.dtype in (np.float32, np.int64, np.int32))
    if x is None:
        return None
    dtype = g.values[x].dtype
    low = g.constant(np.array(-1, dtype)) if g.chance(0.8) else ""
    high = g.constant(np.array(2, dtype)) if g.chance(0.8) else ""
    return _node("Clip", x, low, high)


def _reduce(g: RandomGraph) -> onnx.NodeProto | None:
    op = g.one_of(
        "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 "
        "ReduceSumSquare ReduceLogSumExp ReduceLogSum"
    )
    x = g.pick(
        lambda a: (_real(a) or (_whole(a) and op in ("ReduceSum", "ReduceMax", "ReduceMin"))) and a.ndim > 0
    )
    if x is None:
        return None
    a = g.values[x]
    attributes: dict[str, object] = {"keepdims": g.below(2)}
    if g.chance(0.15):
        return _node(op, x, noop_with_empty_axes=g.below(2), **attributes)
    count = 1 + g.below(a.ndim)
    axes = [int(i) - (a.ndim if g.chance(0.3) else 0) for i in g.rng.permutation(a.ndim)[:count]]
    return _node(op, x, g.ints(*axes), **attributes)


def _arg(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(_finite)
    if x is None:
        return None
    op = "ArgMax" if g.chance() else "ArgMin"
    return _node(op, x, axis=g.axis(g.values[x]), keepdims=g.below(2), select_last_index=int(g.chance(0.2)))


def _along(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(_finite)
    if x is None:
        return None
    a = g.values[x]
    op = g.one_of("Softmax LogSoftmax Hardmax CumSum LpNormalization LayerNormalization TopK")
    if op == "CumSum":
        return _node(
            op,
            x,
            g.ints(g.axis(a)) if g.chance() else g.constant(np.array(g.axis(a), np.int64)),
            reverse=g.below(2),
            exclusive=g.below(2),
        )
    if op == "LayerNormalization":
        axis = g.below(a.ndim)
        shape = a.shape[axis:]
        return _node(op, x, g.normal(*shape), *([g.normal(*shape)] if g.chance() else []), axis=axis)
    if op == "TopK":
        axis = g.axis(a)
        return _node(
            op, x, g.ints(1 + g.below(a.shape[axis])), outputs=2, axis=axis, largest=g.below(2), sorted=1
        )
    if op == "LpNormalization":
        return _node(op, x, axis=g.axis(a), p=1 + g.below(2))
    return _node(op, x, axis=g.axis(a))


def _shape(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(lambda a: a.ndim > 0)
    if x is None:
        return None
    a = g.values[x]
    op = g.one_of("Reshape Transpose Flatten Squeeze Unsqueeze Expand Tile Reshape Transpose")
    if op == "Reshape":
        flat = _factors(a.size)
        g.rng.shuffle(flat)
        shape = [1] * (1 + g.below(4))
        for factor in flat:
            shape[g.below(len(shape))] *= factor
        if g.chance(0.5):
            shape[g.below(len(shape))] = -1
        return _node(op, x, g.ints(*shape))
    if op == "Transpose":
        return _node(op, x, perm=[int(i) for i in g.rng.permutation(a.ndim)])
    if op == "Flatten":
        return _node(op, x, axis=g.below(a.ndim + 1))
    if op == "Squeeze":
        ones = [i for i, d in enumerate(a.shape) if d == 1]
        if not ones:
            return None
        return _node(op, x) if g.chance(0.3) else _node(op, x, g.ints(ones[g.below(len(ones))]))
    if op == "Unsqueeze":
        return _node(op, x, g.ints(g.below(a.ndim + 1))) if a.ndim < 5 else None
    if op == "Expand":
        return _node(
            op,
            x,
            g.ints(
                *([2] if g.chance() and a.ndim < 5 else []),
                *(int(3 if d == 1 else (1 if g.chance() else d)) for d in a.shape),
            ),
        )
    return _node(op, x, g.ints(*(1 + g.below(3) for _ in a.shape)))


def _factors(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


def _cut(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(lambda a: a.ndim > 0)
    if x is None:
        return None
    a = g.values[x]
    op = g.one_of(
        "Slice Slice Gather Gather Split Concat Concat Pad GatherElements GatherND "
        "ScatterElements ScatterND ReverseSequence Trilu OneHot DepthToSpace SpaceToDepth"
    )
    axis = g.axis(a)
    size = a.shape[axis]
    if op == "Slice":
        step = int(g.rng.choice([1, 1, 2, 3, -1, -2]))
        start, end = (0, 1 << 40) if step > 0 else (-1, -(1 << 40))
        if g.chance(0.7):
            start = int(g.rng.integers(-size - 1, size + 1))
        if g.chance(0.5):
            end = int(g.rng.integers(-size - 1, size + 2))
        return _node(op, x, g.ints(start), g.ints(end), g.ints(axis), g.ints(step))
    if op == "Gather":
        i = g.pick(_whole) if g.chance(0.3) else None
        if i is not None and np.abs(g.values[i]).max() < size:
            return _node(op, x, i, axis=axis)
        shape = [(), (1,), (3,), (2, 2), (2, 1, 3)][g.below(5)]
        return _node(op, x, g.constant(g.rng.integers(-size, size, shape).astype(np.int64)), axis=axis)
    if op == "Split":
        if size < 2:
            return None
        at = 1 + g.below(size - 1)
        return _node(op, x, g.ints(at, size - at), outputs=2, axis=axis)
    if op == "Concat":

        def fits(b: np.ndarray) -> bool:
            return (
                b.dtype == a.dtype
                and b.ndim == a.ndim
                and all(
                    i == axis % a.ndim or m == n
                    for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True))
                )
            )

        return _node(op, *[n for _ in range(1 + g.below(3)) if (n := g.pick(fits))], x, axis=axis)
    if op == "Pad":
        if not _real(a):
            return None
        mode = g.one_of("constant constant reflect edge wrap")
        low = -1 if mode == "constant" and g.chance(0.2) and min(a.shape) > 2 else 0
        pads = [int(g.rng.integers(low, 3)) for _ in range(2 * a.ndim)]
        if mode in ("reflect", "wrap"):
            pads = [min(p, a.shape[i % a.ndim] - 1) for i, p in enumerate(pads)]
        return _node(
            op,
            x,
            g.ints(*pads),
            *([g.constant(np.array(1.5, np.float32))] if mode == "constant" and g.chance() else []),
            mode=mode,
        )
    if op == "GatherElements":
        shape = [max(1, d - g.below(2)) for d in a.shape]
        return _node(op, x, g.constant(g.rng.integers(-size, size, shape).astype(np.int64)), axis=axis)
    if op == "GatherND":
        depth = 1 + g.below(a.ndim)
        index = np.stack([g.rng.integers(-a.shape[i], a.shape[i], (3,)) for i in range(depth)], -1)
        return _node(op, x, g.constant(index.astype(np.int64)))
    if op == "ScatterElements":
        index = np.stack([g.rng.permutation(size)[: max(1, size - 1)] for _ in range(a.size // size)], -1)
        moved = np.moveaxis(a, axis, 0).shape[1:]
        index = np.moveaxis(index.reshape(-1, *moved), 0, axis)
        updates = g.constant(g.rng.integers(0, 2, index.shape).astype(a.dtype))
        return _node(op, x, g.constant(index.astype(np.int64)), updates, axis=axis)
    if op == "ScatterND":
        index = g.rng.permutation(a.shape[0])[: max(1, a.shape[0] // 2)].reshape(-1, 1)
        updates = g.constant(g.rng.integers(0, 2, (len(index), *a.shape[1:])).astype(a.dtype))
        return _node(op, x, g.constant(index.astype(np.int64)), updates)
    if op == "ReverseSequence":
        if a.ndim < 2:
            return None
        return _node(op, x, g.constant(g.rng.integers(1, a.shape[0] + 1, a.shape[1]).astype(np.int64)))
    if op == "Trilu":
        if a.ndim < 2:
            return None
        return _node(op, x, g.constant(np.array(g.below(5) - 2, np.int64)), upper=g.below(2))
    if op == "OneHot":
        if not _whole(a):
            return None
        return _node(
            op, x, g.constant(np.array(6, np.int64)), g.constant(np.array([0.5, 2], np.float32)), axis=-1
        )
    if a.ndim != 4 or not _real(a):
        return None
    return _node(op, x, blocksize=2)


def _matmul(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(lambda a: _real(a) and a.ndim > 0)
    if x is None:
        return None
    a = g.values[x]
    if g.chance(0.5):
        k, n = a.shape[-1], g.size()
        shape = [(k, n), (k, n), (k,), (1, k, n), (*a.shape[:-2], k, n)][g.below(5)]
        return _node("MatMul", x, g.normal(*shape))
    if g.chance(0.4) and a.ndim == 2:
        ta, tb = g.below(2), g.below(2)
        k, n = a.shape[0 if ta else 1], g.size()
        m = a.shape[1 if ta else 0]
        c = [(), (n,), (1, n), (m, 1), (m, n)][g.below(5)]
        return _node(
            "Gemm",
            x,
            g.normal(*((n, k) if tb else (k, n))),
            *([g.normal(*c)] if g.chance() else []),
            transA=ta,
            transB=tb,
            alpha=0.5,
            beta=2.0,
        )

    def fits(b: np.ndarray) -> bool:
        return _real(b) and b.ndim > 0 and b.shape[-2 if b.ndim > 1 else 0] == a.shape[-1]

    y = g.pick(fits)
    if y is None or g.chance(0.2):
        letters = "abcdef"[: a.ndim]
        return _node("Einsum", x, x, equation=f"{letters},{letters}->{letters[0]}")
    return _node("MatMul", x, y)


def _conv(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(lambda a: _real(a) and a.ndim in (3, 4) and np.isfinite(a).all())
    if x is None:
        return None
    a = g.values[x]
    spatial, c = a.ndim - 2, a.shape[1]
    kernel = [1 + g.below(min(3, d)) for d in a.shape[2:]]
    strides = [1 + g.below(2) for _ in kernel]
    dilations = [1 + g.below(2) if g.chance(0.3) else 1 for _ in kernel]
    pads = [g.below(k) if g.chance(0.6) else 0 for k in [*kernel, *kernel]]
    groups = int(g.rng.choice([d for d in range(1, c + 1) if c % d == 0]))
    out = groups * int(g.rng.choice([1, 2, 3, 16]))
    more: dict[str, object] = {"pads": pads}
    if g.chance(0.15):
        more = {"auto_pad": g.one_of("SAME_UPPER SAME_LOWER VALID")}
    bias = [g.normal(out)] if g.chance() else []
    if g.chance(0.2):
        return _node(
            "ConvTranspose",
            x,
            g.normal(c, out // groups, *kernel),
            *bias,
            strides=strides,
            group=groups,
            kernel_shape=kernel,
            dilations=dilations,
            **more,
        )
    return (
        _node(
            "Conv",
            x,
            g.normal(out, c // groups, *kernel),
            *bias,
            strides=strides,
            dilations=dilations,
            group=groups,
            kernel_shape=kernel,
            **more,
        )
        if spatial
        else None
    )


def _pool(g: RandomGraph) -> onnx.NodeProto | None:
    x = g.pick(lambda a: _real(a) and a.ndim in (3, 4))
    if x is None:
        return None
    a = g.values[x]
    op = g.one_of(
        "MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool BatchNormalization "
        "InstanceNormalization Resize"
    )
    if op.startswith("Global"):
        return _node(op, x)
    c = a.shape[1]
    if op == "BatchNormalization":
        return _node(
            op,
            x,
            g.normal(c),
            g.normal(c),
            g.normal(c),
            g.constant(np.abs(g.rng.standard_normal(c)).astype(np.float32)),
        )
    if op == "InstanceNormalization":
        return _node(op, x, g.normal(c), g.normal(c))
    if op == "Resize":
        scales = [1.0, 1.0, *(float(g.rng.choice([0.5, 1, 2, 1.5])) for _ in a.shape[2:])]
        mode = "nearest" if g.chance() else "linear"
        where = g.one_of("half_pixel asymmetric align_corners pytorch_half_pixel")
        return _node(
            op,
            x,
            "",
            g.constant(np.array(scales, np.float32)),
            mode=mode,
            coordinate_transformation_mode=where,
        )
    kernel = [1 + g.below(min(3, d)) for d in a.shape[2:]]
    pads = [min(k - 1, g.below(2)) for k in [*kernel, *kernel]]
    more: dict[str, object] = {}
    if op == "AveragePool":
        more["count_include_pad"] = g.below(2)
    if op != "LpPool":
        more["ceil_mode"] = int(g.chance(0.3))
    return _node(op, x, kernel_shape=kernel, pads=pads, strides=[1 + g.below(3) for _ in kernel], **more)


MAKERS: list[Maker] = [
    *[_unary] * 3,
    _unary_other,
    *[_binary] * 4,
    _cast,
    _where,
    _clip,
    *[_reduce] * 2,
    _arg,
    *[_along] * 2,
    *[_shape] * 3,
    *[_cut] * 4,
    *[_matmul] * 2,
    *[_conv] * 2,
    *[_pool] * 2,
]
