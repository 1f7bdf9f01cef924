"""Weights reach MatMul and Gemm as constants, stored the way they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, constant_tensor, describe, sole_consumer
from effic.ir.tensors import borrow
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.cleanup.scopes import (
    Scope,
    drop_unused_initializer,
    int_attribute,
    ints_attribute,
    is_standard,
    prune,
    scopes,
)

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class CanonicalizeLinear(Pass):
    """Bring linear layers to one form: the weight a constant [in, out], read without a transpose.

    Before:  y = Gemm<transB=1, alpha=0.5>(x, w[out,in], b);   z = MatMul(y, Transpose(v))
    After:   y = Gemm(x, w2[in,out], b);                       z = MatMul(y, v2)

    Runtimes replace neither a Transpose nor transB before an encoded weight by their fast kernels,
    and passes over weights have one form to deal with. alpha goes into the weight and beta into
    the bias. Encoded weights (DequantizeLinear) are turned with their scales. The weight keeps its
    name, and is streamed from and to disk.

    Missed when the weight is computed at run time, or when something else reads it as it is (an
    embedding tied to the output layer): a second copy would make the file larger; ``untie`` makes
    it all the same.
    """

    name: ClassVar[str] = "canonicalize-linear"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    untie: bool = option(False, help="copy a weight that is also read as it is (a larger file)")

    def apply(self, model: Model, remarks: Remarks) -> None:
        turned: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
        for scope in scopes(model):
            for node in list(scope.graph):
                if node.graph is None or not is_standard(node):
                    continue
                if node.op_type == "MatMul":
                    for index in (0, 1):
                        self._fold_transpose(node, index, model, turned, remarks)
                elif node.op_type == "Gemm":
                    self._fold_transpose(node, 1, model, turned, remarks)
                    self._fold_trans_b(node, model, turned, remarks)
                    _fold_factor(node, "alpha", 1, scope, model, remarks)
                    _fold_factor(node, "beta", 2, scope, model, remarks)

    def _fold_transpose(
        self,
        node: ir.Node,
        index: int,
        model: Model,
        turned: dict[tuple[ir.Value, tuple[int, ...]], ir.Value],
        remarks: Remarks,
    ) -> None:
        """A constant Transpose that feeds the node becomes a constant."""
        value = node.inputs[index]
        transpose = value.producer() if value is not None else None
        if (
            value is None
            or transpose is None
            or transpose.op_type != "Transpose"
            or not is_standard(transpose)
        ):
            return
        source = transpose.inputs[0]
        if source is None:
            return
        if node.op_type == "Gemm" and index == 1 and int_attribute(node, "transB", 0) == 1:
            # Turned twice is not turned at all, whether the weight is constant or not.
            if sole_consumer(value) is node or constant_tensor(source) is not None:
                node.attributes.pop("transB")
                node.replace_input_with(1, source)
                prune([transpose])
                remarks.passed(node, f"transB undoes {describe(transpose)}")
            return
        perm = ints_attribute(transpose, "perm")
        if perm is None and "perm" not in transpose.attributes and source.shape is not None:
            perm = tuple(reversed(range(len(source.shape))))
        if perm is None:
            return
        if constant_tensor(source) is not None:
            new = self._turn(source, perm, model, turned, node, remarks)
            if new is not None:
                model.replace_value(value, new)
                prune([transpose])
                _forget(source, new)
                remarks.passed(node, f"reads its weight '{new.name}' without {describe(transpose)}")
        elif perm == (1, 0) and _turn_encoded(source, transpose, model):
            model.replace_value(value, source)
            prune([transpose])
            remarks.passed(node, f"reads its encoded weight without {describe(transpose)}")

    def _fold_trans_b(
        self,
        node: ir.Node,
        model: Model,
        turned: dict[tuple[ir.Value, tuple[int, ...]], ir.Value],
        remarks: Remarks,
    ) -> None:
        flag = int_attribute(node, "transB", 0)
        weight = node.inputs[1]
        if flag is None:
            remarks.missed(node, "transB is only known where the function around it is called")
        if not flag or weight is None:
            return
        if constant_tensor(weight) is not None:
            new = self._turn(weight, (1, 0), model, turned, node, remarks)
            if new is None:
                return
            node.replace_input_with(1, new)
            _forget(weight, new)
        elif not _turn_encoded(weight, node, model):
            producer = weight.producer()
            encoded = producer is not None and producer.op_type == "DequantizeLinear"
            reason = (
                "its encoded weight is shared, or not of rank 2"
                if encoded
                else "its weight is computed at run time"
            )
            remarks.missed(node, f"transB stays: {reason}")
            return
        node.attributes.pop("transB")
        remarks.passed(
            node, f"reads its weight '{node.inputs[1].name if node.inputs[1] else ''}' without transB"
        )

    def _turn(
        self,
        weight: ir.Value,
        perm: tuple[int, ...],
        model: Model,
        turned: dict[tuple[ir.Value, tuple[int, ...]], ir.Value],
        node: ir.Node,
        remarks: Remarks,
    ) -> ir.Value | None:
        """The constant with its axes permuted, made once; None (with a remark) to leave it."""
        found = turned.get((weight, perm))
        if found is not None:
            return found
        tensor = constant_tensor(weight)
        if tensor is None or len(tensor.shape) != len(perm):
            return None
        other = None if self.untie else _other_reader(weight, perm)
        if other is not None:
            remarks.missed(
                node,
                f"its weight '{weight.name}' is also read as it is by {other}: "
                f"a turned copy would add {tensor.nbytes} bytes (untie=true makes it)",
            )
            return None
        graph = weight.graph
        if graph is None:
            return None
        with borrow(tensor) as array:
            new = model.add_initializer(
                graph, weight.name or "weight", np.ascontiguousarray(array.transpose(perm)), tensor.dtype
            )
        turned[(weight, perm)] = new
        return new


def _other_reader(weight: ir.Value, perm: tuple[int, ...]) -> str | None:
    """Who reads the weight other than with these axes swapped."""
    if weight.is_graph_output():
        return "the model's output"
    for user, index in weight.uses():
        if is_standard(user):
            if user.op_type == "Transpose" and (
                ints_attribute(user, "perm") == perm
                or ("perm" not in user.attributes and perm == tuple(reversed(range(len(perm)))))
            ):
                continue
            if (
                user.op_type == "Gemm"
                and index == 1
                and perm == (1, 0)
                and int_attribute(user, "transB", 0) == 1
            ):
                continue
        return describe(user)
    return None


def _forget(old: ir.Value, new: ir.Value) -> None:
    """Remove a constant without readers; the one that took its place takes its name."""
    name = old.name
    producer = old.producer()
    if old.uses() or old.is_graph_output():
        return
    if producer is not None:
        prune([producer])
        old.name = None
    elif not drop_unused_initializer(old):
        return
    new.name = name


def _turn_encoded(weight: ir.Value, reader: ir.Node, model: Model) -> bool:
    """Transpose codes and scales of a rank-2 DequantizeLinear that only ``reader`` reads."""
    node = weight.producer()
    if node is None or node.op_type != "DequantizeLinear" or not is_standard(node) or node.graph is None:
        return False
    axis = int_attribute(node, "axis", 1)
    tensors = [constant_tensor(value) for value in node.inputs]
    if axis is None or sole_consumer(weight) is not reader or any(tensor is None for tensor in tensors):
        return False
    codes = tensors[0]
    if codes is None or len(codes.shape) != 2:
        return False
    for value, tensor in zip(node.inputs, tensors, strict=True):
        # A scale per row or column stays a vector; only its axis changes.
        if value is None or tensor is None or len(tensor.shape) != 2:
            continue
        if sole_consumer(value) is not node:
            return False
    for index, (value, tensor) in enumerate(zip(tuple(node.inputs), tensors, strict=True)):
        if value is None or tensor is None or len(tensor.shape) != 2:
            continue
        with borrow(tensor) as array:
            turned = np.ascontiguousarray(array.T)
        new = model.add_initializer(node.graph, value.name or "codes", turned, tensor.dtype)
        node.replace_input_with(index, new)
        _forget(value, new)
    node.attributes["axis"] = ir.AttrInt64("axis", 1 - axis % 2)
    if weight.shape is not None:
        weight.shape = ir.Shape(tuple(reversed(codes.shape.numpy())))
    return True


def _fold_factor(node: ir.Node, name: str, index: int, scope: Scope, model: Model, remarks: Remarks) -> None:
    """Multiply Gemm's alpha into its weight, or beta into its bias."""
    attr = node.attributes.get(name)
    if attr is None:
        return
    if attr.is_ref():
        remarks.missed(node, f"{name} is only known where the function around it is called")
        return
    factor = attr.as_float()
    value = node.inputs[index] if len(node.inputs) > index else None
    if factor == 1.0 or value is None:
        if value is None or name == "beta" or factor == 1.0:
            node.attributes.pop(name)
        return
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype not in FLOATS:
        remarks.missed(node, f"{name} stays: '{value.name}' is not a constant of floats")
        return
    if sole_consumer(value) is not node or value.graph is None:
        remarks.missed(node, f"{name} stays: '{value.name}' is also read elsewhere")
        return
    with borrow(tensor) as array:
        wide = np.float64 if tensor.dtype == ir.DataType.DOUBLE else np.float32
        scaled = np.multiply(array.astype(wide, copy=False), factor, dtype=wide).astype(
            array.dtype, copy=False
        )
    new = model.add_initializer(value.graph, value.name or name, scaled, tensor.dtype)
    node.replace_input_with(index, new)
    _forget(value, new)
    node.attributes.pop(name)
    remarks.passed(node, f"{name}={factor:g} went into '{new.name}'")
