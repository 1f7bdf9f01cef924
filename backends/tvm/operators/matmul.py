"""MatMul and Gemm: on effic's kernels where one operand is a weight, or both are batches of matrices.

An encoded weight goes to a kernel in its codes, a plain one in panels; what neither holds is left to
TVM's own operator. An addition of constants and an activation that only this product feeds are part of
the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.ort.linear import Linear, read_linear
from effic.backends.ort.scenes import EncodedInput, encoded_input
from effic.backends.tvm.kernels.dense import OPEN_PANEL, BatchMatMul, DenseMatMul
from effic.backends.tvm.kernels.open_rows import OpenRows
from effic.backends.tvm.kernels.quantized import Outliers, QuantizedMatMul
from effic.backends.tvm.lowering import Lowering, dtype_of, same_size, shape_of
from effic.backends.tvm.operators.attention import attention
from effic.backends.tvm.operators.encoded import fingerprint
from effic.backends.tvm.operators.matmul_cuda import product_on_gpu
from effic.backends.tvm.operators.matmul_sparse import product_on_sparse
from effic.backends.tvm.operators.products import per_group, read_form, rows_of, run_kernel
from effic.ir.encodings import code_values
from effic.ir.model import constant_array, constant_tensor, sole_consumer
from effic.ir.tensors import borrow


def matmul(lowering: Lowering, node: ir.Node) -> None:
    """MatMul, NumPy's rules for operands of one axis and for batches."""
    _product(lowering, node, Linear())


def gemm(lowering: Lowering, node: ir.Node) -> None:
    """Gemm: ``alpha * A' @ B' + beta * C``."""
    _product(lowering, node, read_linear(node))


def _product(lowering: Lowering, node: ir.Node, linear: Linear) -> None:
    left, right = node.inputs[0], node.inputs[1]
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    x = lowering.value(left)
    if lowering.cpu is not None and not turned and dtype_of(x) in ("float32", "float16"):
        tail = _Tail(lowering, node, linear)
        result = product_on_sparse(lowering, x, right, linear, tail)
        if result is None:
            result = _on_codes(lowering, x, right, linear, tail)
        if result is None:
            result = _on_panels(lowering, x, right, linear, tail)
        if result is not None:
            tail.set(result)
            return
        if node.op_type == "MatMul":
            result = attention(lowering, node)
            if result is None:
                result = _on_batches(lowering, x, right)
            if result is not None:
                lowering.set(node.outputs[0], result)
                return
    elif "arch" in lowering.options and not turned:
        tail = _Tail(lowering, node, linear)
        result = product_on_gpu(lowering, x, right, linear, tail)
        if result is not None:
            tail.set(result)
            return
    lowering.set(node.outputs[0], _plain(lowering, node, x, linear, turned))


def _plain(lowering: Lowering, node: ir.Node, x: Any, linear: Linear, turned: bool) -> Any:
    """The product by TVM's own operators."""
    emit = lowering.emit
    w = lowering.value(node.inputs[1])
    if turned:
        x = emit(relax.op.permute_dims(x, [1, 0]))
    if linear.transposed:
        w = emit(relax.op.permute_dims(w, [1, 0]))
    y = emit(relax.op.matmul(x, w))
    dtype = dtype_of(y)
    if linear.alpha != 1:
        y = emit(relax.op.multiply(y, relax.const(linear.alpha, dtype)))
    c = lowering.optional(node, 2)
    if c is not None and linear.beta != 0:
        if linear.beta != 1:
            c = emit(relax.op.multiply(c, relax.const(linear.beta, dtype)))
        y = emit(relax.op.add(y, c))
    return y


# -- what follows a product -----------------------------------------------------------------------


@dataclass
class _Tail:
    """A bias and an activation that a kernel can take along, and the output they lead to.

    Attributes:
        output: what the kernel's result is the value of.
        passed: values on the way there, which nobody else reads.
        bias: ``[N]`` fp32, or None.
        rest: Gemm's C where it is no bias of the kernel's, with its factor: added afterwards.
        activation: ``relu`` or None.
    """

    lowering: Lowering
    node: ir.Node
    linear: Linear

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.output = self.node.outputs[0]
        self.passed: list[ir.Value] = []
        self.bias: np.ndarray | None = None
        self.key: tuple[object, ...] = ()
        self.rest: ir.Value | None = None
        self.activation: str | None = None

    def read(self, outputs: int, *, activations: bool) -> None:
        """Look at what follows, once the kernel's N is known; another kernel may have looked before."""
        self._begin()
        c = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if c is not None and self.linear.beta != 0:
            self.bias = _row(c, outputs)
            self.key = (id(constant_tensor(c)), self.linear.beta)
            if self.bias is None:
                self.rest = c
                return
            self.bias = self.bias * np.float32(self.linear.beta)
        following = sole_consumer(self.output)
        if (
            self.bias is None
            and following is not None
            and following.op_type == "Add"
            and not following.domain
        ):
            other = following.inputs[1 - _index(following, self.output)]
            self.bias = None if other is self.output else _row(other, outputs)
            if self.bias is not None:
                self.key = (id(constant_tensor(other)), 1.0)
                self._go_on(following)
                following = sole_consumer(self.output)
        if activations and following is not None and following.op_type == "Relu" and not following.domain:
            self.activation = "relu"
            self._go_on(following)

    def _go_on(self, node: ir.Node) -> None:
        self.passed.append(self.output)
        self.output = node.outputs[0]

    def set(self, result: Any) -> None:
        """The kernel's result; the values passed count as made."""
        self.lowering.set(self.output, result)
        for value in self.passed:
            self.lowering.set(value, self.lowering.value(self.output))

    def finish(self, y: Any) -> Any:
        """What the kernel could not take along."""
        if self.rest is None:
            return y
        c, dtype = self.lowering.value(self.rest), dtype_of(y)
        if self.linear.beta != 1:
            c = self.lowering.emit(relax.op.multiply(c, relax.const(self.linear.beta, dtype)))
        return self.lowering.emit(relax.op.add(y, c))


def _index(node: ir.Node, value: ir.Value) -> int:
    return 0 if node.inputs[0] is value else 1


def _row(value: ir.Value | None, outputs: int) -> np.ndarray | None:
    """A constant that is added to every row alike, as fp32 ``[N]``, or None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size not in (1, outputs) or tensor.dtype != ir.DataType.FLOAT:
        return None
    shape = tuple(tensor.shape.numpy())
    if len(shape) > 1 and math.prod(shape[:-1]) != 1:
        return None
    if len(shape) > 2 or (shape and shape[-1] not in (1, outputs)):
        return None
    array = constant_array(value)
    assert array is not None
    return np.broadcast_to(array.reshape(-1), (outputs,)).astype(np.float32)


# -- on effic's kernels ---------------------------------------------------------------------------


def _on_codes(lowering: Lowering, x: Any, right: ir.Value | None, linear: Linear, tail: _Tail) -> Any | None:
    """The product with an encoded weight, in its codes; None where no kernel holds it."""
    weight, rows = encoded_input(right), rows_of(x)
    if weight is None or rows is None:
        return None
    k_axis = int(weight.transposed) ^ int(linear.transposed)
    encoding = weight.encoding
    form = read_form(encoding, k_axis)
    if form is None or 0 in rows.lead or encoding.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    grouping, group, symmetric, bits = form
    k, n = encoding.shape[k_axis], encoding.shape[1 - k_axis]
    tail.read(n, activations=False)
    spec = QuantizedMatMul(
        m=rows.typical,
        k=k,
        n=n,
        bits=bits,
        group_size=group,
        grouping=grouping,
        symmetric=symmetric,
        activations=lowering.options.get("activations", "fp32"),
        outliers=encoding.outliers is not None and len(encoding.outliers.values) > 0,
        bias=tail.bias is not None,
    )
    if spec.why_not() is not None:
        return None
    key = (
        "codes",
        fingerprint(weight.value),
        k_axis,
        linear.alpha,
        tail.key if tail.bias is not None else (),
    )
    packed = lowering.packed(
        spec, key, weight.name, lambda: _pack(spec, weight, k_axis, linear.alpha, tail.bias)
    )
    return tail.finish(run_kernel(lowering, spec, x, packed, rows))


def _pack(
    spec: QuantizedMatMul, weight: EncodedInput, k_axis: int, alpha: float, bias: np.ndarray | None
) -> list[np.ndarray]:
    encoding = weight.encoding
    codes = code_values(encoding)
    codes = codes if k_axis == 0 else codes.T
    scales = per_group(spec, encoding.scales, encoding, k_axis).astype(np.float32)
    zeros = encoding.zero_points
    points = None if zeros is None else per_group(spec, zeros, encoding, k_axis)
    outliers = None
    if encoding.outliers is not None and spec.outliers:
        first, second = np.divmod(encoding.outliers.indices, encoding.shape[1])
        rows, columns = (first, second) if k_axis == 0 else (second, first)
        outliers = Outliers(rows, columns, encoding.outliers.values.astype(np.float32) * np.float32(alpha))
    return spec.pack(codes, scales * np.float32(alpha), points, outliers, bias)


def _on_panels(lowering: Lowering, x: Any, right: ir.Value | None, linear: Linear, tail: _Tail) -> Any | None:
    """The product with a plain constant matrix in panels; None where the kernel does not hold it."""
    tensor, rows = constant_tensor(right), rows_of(x)
    if tensor is None or rows is None or 0 in rows.lead or tensor.dtype != ir.DataType.FLOAT:
        return None
    shape = tuple(tensor.shape.numpy())
    if len(shape) != 2 or 0 in shape or right is None:
        return None
    k, n = (shape[1], shape[0]) if linear.transposed else shape
    tail.read(n, activations=True)
    identity = (id(tensor), linear.transposed, linear.alpha)
    plain = DenseMatMul(rows.typical, k, n, tail.bias is not None, tail.activation)
    spec = replace(plain, panel=OPEN_PANEL) if rows.is_open else lowering.tuned(plain)
    # Buckets share one packed weight: the first one's panels are the others' as well.
    panel = lowering.shared.choices.setdefault(("panel", *identity), spec.columns)
    if panel != spec.columns:
        spec = replace(plain, panel=panel)
    key = ("panels", *identity, tail.key if tail.bias is not None else ())

    def pack() -> list[np.ndarray]:
        with borrow(tensor) as matrix:
            matrix = matrix.T if linear.transposed else matrix
            return spec.pack(matrix if linear.alpha == 1 else matrix * np.float32(linear.alpha), tail.bias)

    packed = lowering.packed(spec, key, right.name or "weight", pack)
    return tail.finish(run_kernel(lowering, spec, x, packed, rows))


def _on_batches(lowering: Lowering, x: Any, right: ir.Value | None) -> Any | None:
    """The product of two activations; None where the kernel does not hold it.

    Of what lies before the matrices the first dimension may be open, or 1 on one side; the others are the same on
    both, or 1 on the right.
    """
    if right is None:
        return None
    w = lowering.value(right)
    left_shape, right_shape = shape_of(x), shape_of(w)
    if dtype_of(x) != "float32" or dtype_of(w) != "float32" or min(len(left_shape), len(right_shape)) < 2:
        return None
    rank = max(len(left_shape), len(right_shape), 3)
    (first, *rest, m, k), (other, *others, _, n) = (
        (1,) * (rank - len(shape)) + shape for shape in (left_shape, right_shape)
    )
    if not all(isinstance(size, int) for size in (*rest, *others, m, k, n)):
        return None
    batch = math.prod(rest)
    cut: tuple[int, ...] = (0,)
    if isinstance(other, int) and other * math.prod(others) == 1:
        # One matrix for all: what is multiplied with it is so many rows.
        spec, outer = BatchMatMul(1, batch * m, k, n), first
        if isinstance(first, int):
            spec, outer = BatchMatMul(1, first * batch * m, k, n), 1
    elif rest != others:
        return None
    elif same_size(first, other):
        spec, cut, outer = BatchMatMul(batch, m, k, n), (0, 1), first
        if isinstance(first, int):
            spec, outer = BatchMatMul(first * batch, m, k, n), 1
    elif same_size(other, 1) or same_size(first, 1):
        cut = (0,) if same_size(other, 1) else (1,)
        spec, outer = BatchMatMul(batch, m, k, n), first if cut == (0,) else other
    else:
        return None
    spec = lowering.tuned(spec)
    if spec.why_not() is not None:
        return None
    kernel: Any = spec
    one: tuple[Any, ...] = (spec.batch,)
    before = [one] * 3
    if not same_size(outer, 1):
        kernel = OpenRows(
            f"{spec.name}_for_each_{'_'.join('xw'[index] for index in cut)}", lambda _: spec, (1,), cut
        )
        many = (outer, *one) if spec.batch > 1 else (outer,)
        before = [many if index in (*cut, 2) else one for index in range(3)]
    operands = [_as(lowering, x, (*before[0], spec.m, k)), _as(lowering, w, (*before[1], k, n))]
    y = lowering.call(kernel, operands, (*before[2], spec.m, n), "float32")
    whole = (other if same_size(first, 1) else first, *rest, m, n)
    return _as(lowering, y, whole[rank - max(len(left_shape), len(right_shape)) :])


def _as(lowering: Lowering, value: Any, shape: tuple[Any, ...]) -> Any:
    """A value in another shape of as many elements."""
    have = shape_of(value)
    if len(have) == len(shape) and all(map(same_size, have, shape)):
        return value
    return lowering.emit(relax.op.reshape(value, shape))
