"""Operators that have a kernel of effic's own become calls of it: softmax and the norms.

The kernels take plain rows, so the tensor is reshaped before and after; a reshape becomes a view.
"""

from __future__ import annotations

from math import prod
from typing import Any

import tvm
from tvm import ir, relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.norm import GroupNorm, LayerNorm
from effic.backends.tvm.kernels.softmax import softmax_of

# An opaque kernel is never fused with its neighbours.
_OPAQUE = 8


def choose_kernels(cpu: Cpu) -> Any:
    """The pass that replaces softmax and the norms of fp32 tensors by kernels.

    Operators whose normalised axes are unknown at build, or do not lie beside each other, stay as they are.
    """

    def run(module: Any, _context: Any) -> Any:
        chooser = _Chooser(module, cpu)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                chooser.builder_.update_func(variable, chooser.visit_expr(function))
        return chooser.builder_.get()

    return tvm.transform.module_pass(run, opt_level=0, name="effic.ChooseKernels")


def _sizes(expression: Any) -> list[Any] | None:
    """The shape of an fp32 tensor, unknown sizes as expressions; None for anything else."""
    kind = expression.ty
    if not isinstance(kind, relax.TensorType) or str(kind.dtype) != "float32" or kind.shape is None:
        return None
    if not isinstance(kind.shape, relax.ShapeExpr):
        return None
    return [int(size) if isinstance(size, tirx.IntImm) else size for size in kind.shape.values]


def _known(sizes: list[Any]) -> int | None:
    """The product, None where one size is unknown."""
    return prod(sizes) if all(isinstance(size, int) for size in sizes) else None


@mutator
class _Chooser(PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: Any, cpu: Cpu) -> None:
        super().__init__(module)
        self.cpu = cpu
        self.functions: dict[str, Any] = {}

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if not isinstance(call.op, ir.Op) or not call.args:
            return call
        sizes = _sizes(call.args[0]) if call.op.name.startswith("relax.nn.") else None
        if not sizes or 0 in sizes:
            return call
        chosen = None
        if call.op.name in ("relax.nn.softmax", "relax.nn.log_softmax"):
            chosen = self._softmax(call, sizes)
        elif call.op.name in ("relax.nn.layer_norm", "relax.nn.rms_norm"):
            chosen = self._layer_norm(call, sizes)
        elif call.op.name in ("relax.nn.group_norm", "relax.nn.instance_norm"):
            chosen = self._group_norm(call, sizes)
        return call if chosen is None else chosen

    def _kernel(self, spec: Any, x: Any, others: list[Any], shape: list[Any], sizes: list[Any]) -> Any:
        """``spec`` on ``x`` seen as ``shape``; the result has ``sizes`` again."""
        if spec.name not in self.functions:
            function = spec.prim_func(self.cpu).with_attr("op_pattern", _OPAQUE)
            self.functions[spec.name] = self.builder_.add_func(function, spec.name)
        builder = self.builder_
        same = len(shape) == len(sizes) and all(
            a is b or _same(a, b) for a, b in zip(shape, sizes, strict=True)
        )
        x = x if same else builder.emit(relax.op.reshape(x, shape))
        out = relax.TensorType(shape, "float32")
        y = relax.call_tir(self.functions[spec.name], [x, *others], out_ty=out)
        return y if same else relax.op.reshape(builder.emit(y), sizes)

    def _softmax(self, call: Any, sizes: list[Any]) -> Any | None:
        axis = int(call.attrs.axis) % len(sizes)
        spec = softmax_of(sizes, axis, call.op.name.endswith("log_softmax"))
        if spec is None:
            return None
        rows = spec.rows if spec.rows is not None else _product(sizes[:axis])
        shape = [rows, spec.columns] if spec.inner == 1 else [rows, spec.columns, spec.inner]
        return self._kernel(spec, call.args[0], [], shape, sizes)

    def _layer_norm(self, call: Any, sizes: list[Any]) -> Any | None:
        axes = sorted(int(axis) % len(sizes) for axis in call.attrs.axes)
        columns = _known(sizes[axes[0] :])
        if axes != list(range(axes[0], len(sizes))) or columns is None:
            return None
        rms = call.op.name == "relax.nn.rms_norm"
        rows = _known(sizes[: axes[0]])
        others = list(call.args[1:])
        if any((given := _sizes(other)) is None or _known(given) != columns for other in others):
            return None
        if not rms and not (call.attrs.center and call.attrs.scale):
            return None
        spec = LayerNorm(rows, columns, float(call.attrs.epsilon), True, not rms, rms)
        flat = [self._flat(other) for other in others]
        shape = [rows if rows is not None else _product(sizes[: axes[0]]), columns]
        return self._kernel(spec, call.args[0], flat, shape, sizes)

    def _group_norm(self, call: Any, sizes: list[Any]) -> Any | None:
        if len(sizes) < 2 or int(call.attrs.channel_axis) % len(sizes) != 1:
            return None
        channels, inner = sizes[1], _known(sizes[2:])
        axes = sorted(int(axis) % len(sizes) for axis in call.attrs.axes)
        if axes != list(range(2, len(sizes))) or inner is None or not isinstance(channels, int):
            return None
        if not (call.attrs.center and call.attrs.scale) or any(
            _sizes(arg) != [channels] for arg in call.args[1:]
        ):
            return None
        instance = call.op.name.endswith("instance_norm")
        groups = channels if instance else int(call.attrs.num_groups)
        batch = sizes[0] if isinstance(sizes[0], int) else None
        spec = GroupNorm(batch, groups, channels, inner, float(call.attrs.epsilon))
        if spec.why_not():
            return None
        shape = [sizes[0], groups, channels // groups * inner]
        return self._kernel(spec, call.args[0], list(call.args[1:]), shape, sizes)

    def _flat(self, value: Any) -> Any:
        sizes = _sizes(value) or []
        return value if len(sizes) == 1 else self.builder_.emit(relax.op.reshape(value, [_known(sizes)]))


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a == b


def _product(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total
