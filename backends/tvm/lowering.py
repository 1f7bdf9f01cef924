"""What a converter of one operator works on: the values so far, the function's parameters, the kernels.

A converter is a function ``(lowering, node) -> None``. It reads the node's inputs with
:meth:`Lowering.value`, emits Relax, and hands every output that is read to :meth:`Lowering.set`. What it
cannot hold it refuses with :meth:`Lowering.refuse`; then nothing is built and the node is named.

Shapes are those of the Relax expressions (``value(v).ty``); they are static unless the model's first
dimension was left open.

Two layouts exist. *Plain* is ONNX's own. *Blocked* is for images between convolutions: ``[N, ceil(C /
16), H, W, 16]``, channels past C are zero. A value may have either or both; the other is made where
a reader asks for it, see :mod:`effic.backends.tvm.layout`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx
from tvm.ir import GenericConst
from tvm_ffi import structural_equal

from effic.backends.tvm import layout
from effic.backends.tvm.cpu import Cpu
from effic.ir.errors import UnsupportedError
from effic.ir.model import Model, constant_tensor, describe
from effic.ir.tensors import Scratch, borrow

Converter = Callable[["Lowering", ir.Node], None]

MAX_CONSTANT = 64
"""Constants of up to so many elements (axes, shapes, factors) are part of the code; longer ones are
parameters of the function."""

# An opaque kernel is never fused with its neighbours.
_OPAQUE = 8


class NotLoweredError(UnsupportedError):
    """A node reads a value that could not be lowered; the node that was to make it is blamed."""


Made = np.ndarray | ir.TensorProtocol
"""A parameter as it is handed over: an array, or a tensor of the model's, which then stays in its file."""


class KernelSpec(Protocol):
    """What a family of kernels gives: a frozen value that names and makes one function."""

    @property
    def name(self) -> str:
        """A name that differs between specs that differ."""

    def prim_func(self, cpu: Cpu) -> Any:
        """The scheduled ``tvm.tirx.PrimFunc``: inputs in order, then the output."""


SomeSpec = TypeVar("SomeSpec", bound=KernelSpec)


class Shared:
    """What the functions of all buckets have in common: parameters and kernels.

    Attributes:
        keep: whether parameters are kept; without, only their types are known: for a trial.
        parameters: by the name they are stored under. What is large lies in a file: a weight that is stored as
            it is in the model's, what was packed in a scratch file, so that memory peaks at a few weights.
        functions: of kernels, by name of their spec.
        kernels: the same functions in the module.
        choices: what was chosen for a weight when it was packed, which all functions have to heed.
    """

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.parameters: dict[str, ir.TensorProtocol] = {}
        self.functions: dict[str, Any] = {}
        self.kernels: dict[str, Any] = {}
        self.choices: dict[object, Any] = {}
        self._scratch = Scratch()
        self._types: dict[str, tuple[tuple[int, ...], str]] = {}
        self._names: dict[object, list[str]] = {}

    def names(self, key: object, name: str, make: Callable[[], Sequence[Made]]) -> list[str]:
        """The names under which the arrays of ``key`` are kept; they are made when first asked for."""
        if key not in self._names:
            arrays = list(make())
            wanted = [name] if len(arrays) == 1 else [f"{name}.{i}" for i in range(len(arrays))]
            self._names[key] = [self._add(one, array) for one, array in zip(wanted, arrays, strict=True)]
        return self._names[key]

    def type_of(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and element type of a parameter."""
        return self._types[name]

    def function(self, spec: KernelSpec, cpu: Cpu) -> Any:
        """The function of a kernel, made once per spec."""
        if spec.name not in self.functions:
            self.functions[spec.name] = spec.prim_func(cpu).with_attr("op_pattern", _OPAQUE)
        return self.functions[spec.name]

    def _add(self, base: str, made: Made) -> str:
        kind = _type(made)
        name, number = base, 0
        while name in self._types:
            if self._types[name] == kind and self.keep and _same(self.parameters[name], made):
                # Every bucket folds its constants for itself; often the sizes have no part in them.
                return name
            number += 1
            name = f"{base}_{number}"
        self._types[name] = kind
        if self.keep:
            self.parameters[name] = self._scratch.tensor(name, made) if isinstance(made, np.ndarray) else made
        return name


class Parameters(Mapping[str, np.ndarray]):
    """Parameters as arrays, each read when it is asked for.

    Attributes:
        tensors: the same as tensors, large ones in their files.
    """

    def __init__(self, tensors: Mapping[str, ir.TensorProtocol]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.tensors[name].numpy())

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _type(made: Made) -> tuple[tuple[int, ...], str]:
    if isinstance(made, np.ndarray):
        return made.shape, str(made.dtype)
    return tuple(made.shape.numpy()), str(made.dtype.numpy())


def _same(one: ir.TensorProtocol, made: Made) -> bool:
    with borrow(one) as array:
        return np.array_equal(array, made if isinstance(made, np.ndarray) else made.numpy())


class Lowering:
    """One Relax function under construction: the main graph at one set of input shapes.

    Attributes:
        model: the specialized model (shapes pinned, constants folded).
        bb: the ``relax.BlockBuilder``, inside a dataflow block of the function.
        cpu: what kernels are made for; None for a GPU.
        opset: version of the standard operators.
        options: options of the target that converters may heed (``activations``, ``tuned``), by name.
        shared: parameters and kernels of all functions of the module.
        called: names of the kernels called so far, in order.
        told: what converters told of their choices so far, phrases.
        variables: the parameters that this function takes, by name, in the order of its arguments.
    """

    def __init__(
        self,
        model: Model,
        bb: relax.BlockBuilder,
        cpu: Cpu | None,
        shared: Shared,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.bb, self.cpu = model, bb, cpu
        self.opset = model.opset
        self.options = dict(options or {})
        self.shared = shared
        self.called: list[str] = []
        self.told: list[str] = []
        self.variables: dict[str, Any] = {}
        self._plain: dict[ir.Value, Any] = {}
        self._blocked: dict[ir.Value, tuple[Any, int]] = {}
        self._names: set[str] = set()
        self._missing: set[ir.Value] = set()

    # -- values ----------------------------------------------------------------------------------

    def value(self, value: ir.Value | None) -> Any:
        """The Relax expression of a value in plain layout.

        Constants become ``relax.const`` when short (see :data:`MAX_CONSTANT`), else parameters; a value
        that is only there in blocked layout is converted, once.
        """
        assert value is not None, "a converter asks for an input it has not looked for"
        if value in self._missing:
            raise NotLoweredError(f"'{value.name}' could not be lowered")
        if value not in self._plain:
            if value in self._blocked:
                expression, channels = self._blocked[value]
                self._plain[value] = layout.to_plain(self.bb, expression, channels)
            else:
                self._plain[value] = self._constant(value)
        return self._plain[value]

    plain = value

    def tensor(self, value: ir.Value | None) -> Any:
        """As :meth:`value`; a shape that is known as such becomes an int64 tensor."""
        expression = self.value(value)
        if isinstance(expression.ty, relax.ShapeType):
            return self.bb.emit(relax.op.shape_to_tensor(expression))
        return expression

    def type_of(self, value: ir.Value) -> Any | None:
        """The Relax type of a value that was set in plain layout, else None."""
        found = self._plain.get(value)
        return None if found is None else found.ty

    def is_done(self, node: ir.Node) -> bool:
        """Whether an earlier node took this one along, as a product its bias and activation."""
        return all(v in self._plain or v in self._blocked for v in node.outputs if v.name)

    def give_up(self, value: ir.Value) -> None:
        """Mark a value as one that could not be lowered: whoever reads it is not blamed."""
        self._missing.add(value)

    def optional(self, node: ir.Node, index: int) -> Any | None:
        """The input at ``index``, None when it is left out or past the end."""
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None else self.value(value)

    def set(self, value: ir.Value, expression: Any) -> None:
        """What an output became, in plain layout; an expression that is no variable is emitted."""
        if not isinstance(expression, (relax.Var, GenericConst)):
            expression = self.bb.emit(expression)
        if isinstance(expression.ty, relax.ShapeType):
            self._plain[value] = expression
            return
        if dtype_of(expression) not in _COMPUTED:
            kind = dtype_of(expression)
            raise UnsupportedError(
                f"'{value.name}' is of type {kind}, which this target does not compute with"
            )
        if 0 in shape_of(expression) and is_read(value):
            raise UnsupportedError(f"'{value.name}' has no elements, and kernels are made for some")
        self._plain[value] = expression

    def blocked(self, value: ir.Value) -> Any:
        """The value in blocked layout ``[N, ceil(C / 16), H, W, 16]``, converted once if need be."""
        if value not in self._blocked:
            expression = self.value(value)
            channels = self.shape(value)[1]
            if not isinstance(channels, int):
                raise UnsupportedError(f"the channels of '{value.name}' are not known; pin them with shapes")
            self._blocked[value] = (layout.to_blocked(self.bb, expression), channels)
        return self._blocked[value][0]

    def set_blocked(self, value: ir.Value, expression: Any, channels: int) -> None:
        """What an output became, in blocked layout, with ``channels`` real channels."""
        if not isinstance(expression, relax.Var):
            expression = self.bb.emit(expression)
        self._blocked[value] = (expression, channels)

    def is_blocked(self, value: ir.Value | None) -> bool:
        """Whether the value is there in blocked layout already."""
        return value in self._blocked

    def shape(self, value: ir.Value) -> tuple[Any, ...]:
        """Sizes in plain layout: ints, and ``tirx`` expressions where a dimension was left open."""
        if value not in self._plain and value in self._blocked:
            expression, channels = self._blocked[value]
            n, _, h, w, _ = shape_of(expression)
            return (n, channels, h, w)
        return shape_of(self.value(value))

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a value is a constant of the model, of any size."""
        return constant_tensor(value) is not None

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """A constant as an array of its own (for what is packed or read at build), None otherwise."""
        tensor = constant_tensor(value)
        if tensor is None:
            return None
        with borrow(tensor) as array:
            return np.array(array)

    # -- emitting --------------------------------------------------------------------------------

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable."""
        return self.bb.emit(expression)

    def weight(self, key: object, name: str, make: Callable[[], Made]) -> Any:
        """A parameter of the function that holds an array: a weight, a scale, a bias.

        Args:
            key: what the array is made of and how (hashable, for instance ``(weight's name, spec)``);
                the array of a key is made once, buckets share it.
            name: the name to store it under.
            make: makes the array, or gives a tensor of the model's as it is. NumPy's own types only; codes below
                8 bits are packed in integers.

        Returns:
            The variable.
        """
        return self.weights(key, name, lambda: [make()])[0]

    def weights(self, key: object, name: str, make: Callable[[], Sequence[Made]]) -> list[Any]:
        """Parameters for several arrays that are made together; see :meth:`weight`."""
        found = []
        for stored in self.shared.names(key, name, make):
            if stored not in self.variables:
                kind = relax.TensorType(*self.shared.type_of(stored))
                self.variables[stored] = relax.Var(self.identifier(stored), kind)
            found.append(self.variables[stored])
        return found

    def packed(
        self,
        spec: KernelSpec,
        key: object,
        name: str,
        pack: Callable[[], Sequence[np.ndarray]],
        activations: int = 2,
    ) -> list[Any]:
        """Parameters for the arrays of ``spec.pack(…)``; a trial packs none of them.

        Args:
            spec: the kernel that reads them.
            key, name: see :meth:`weight`.
            pack: packs them.
            activations: arguments of the kernel that are none of them: x, which is the first, and y and what
                else is at the end.
        """
        cpu = self.cpu
        if self.shared.keep or cpu is None:
            return self.weights(key, name, pack)

        def unpacked() -> list[np.ndarray]:
            function = self.shared.function(spec, cpu)
            return [
                # A size that is open, of as many outliers as there are, is any.
                np.broadcast_to(
                    np.zeros((), str(one.dtype)), [getattr(size, "value", 1) for size in one.shape]
                )
                for one in function.params[1 : 1 - activations]
            ]

        return self.weights(key, name, unpacked)

    def call(self, spec: KernelSpec, arguments: Sequence[Any], shape: Sequence[Any], dtype: str) -> Any:
        """Call a kernel: ``arguments`` in the order of its inputs, one output of ``shape``.

        The function is added to the module once per spec. It is opaque: nothing is fused into it.
        """
        assert self.cpu is not None, "the kernels of a GPU are called by other means"
        self.called.append(spec.name)
        found = self.shared.kernels.get(spec.name)
        if found is None:
            function = self.shared.function(spec, self.cpu)
            found = self.shared.kernels[spec.name] = self.bb.add_func(function, spec.name)
        out = relax.TensorType(tuple(shape), dtype)
        return self.bb.emit(relax.call_tir(found, list(arguments), out))

    def tuned(self, spec: SomeSpec) -> SomeSpec:
        """The spec in the tile that was measured to be the best, where the target has records of tuning."""
        records = self.options.get("tuned")
        if records is None or self.cpu is None:
            return spec
        found: SomeSpec = records.apply(spec, self.cpu)
        return found

    def tell(self, phrase: str) -> None:
        """Tell why the current node becomes what it does: a remark of the build."""
        self.told.append(phrase)

    def refuse(self, node: ir.Node, reason: str) -> NoReturn:
        """Stop: this node cannot be lowered, because ``reason`` (a phrase: "has string inputs")."""
        raise UnsupportedError(f"{describe(node)} {reason}")

    # -- the builder's own -----------------------------------------------------------------------

    def identifier(self, name: str) -> str:
        """A variable's name for a name of the model's, not taken yet in this function."""
        base = re.sub(r"\W", "_", name, flags=re.ASCII) or "x"
        base = base if not base[0].isdigit() else f"_{base}"
        free, number = base, 0
        while free in self._names:
            number += 1
            free = f"{base}_{number}"
        self._names.add(free)
        return free

    def _constant(self, value: ir.Value) -> Any:
        from effic.backends.tvm.operators.encoded import decoded

        tensor = constant_tensor(value)
        if tensor is None:
            weight = decoded(self, value)
            if weight is not None:
                return weight
            raise UnsupportedError(f"the value '{value.name}' is read before anything has made it")
        if (reason := why_no_type(tensor.dtype)) is not None:
            raise UnsupportedError(f"the constant '{value.name}' {reason}")
        if tensor.size <= MAX_CONSTANT:
            # The type is told: TVM makes int32 of int8, float32 of float64.
            return relax.const(np.array(tensor.numpy()), relax_dtype(tensor.dtype))
        name = value.name or "constant"
        # Not read: what is large stays in its file until it is saved or run.
        return self.weight(("plain", id(tensor)), name, lambda: tensor)


_TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BOOL: "bool",
    ir.DataType.INT8: "int8",
    ir.DataType.INT16: "int16",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
    ir.DataType.UINT16: "uint16",
    ir.DataType.UINT32: "uint32",
    ir.DataType.UINT64: "uint64",
}


_COMPUTED = frozenset(_TYPES.values())


def is_read(value: ir.Value) -> bool:
    """Whether a node reads a value, or the model's caller does."""
    return bool(value.uses()) or value.is_graph_output()


def why_no_type(dtype: ir.DataType | None) -> str | None:
    """Why a tensor of this type cannot be held, a phrase; None where it can."""
    if dtype is None:
        return "has an unknown element type"
    return None if dtype in _TYPES else f"is of type {dtype.name}, which this target does not compute with"


def relax_dtype(dtype: ir.DataType) -> str:
    """TVM's name of an element type; see :func:`why_no_type`."""
    return _TYPES[dtype]


def shape_of(expression: Any) -> tuple[Any, ...]:
    """Sizes of a Relax expression: ints, and ``tirx`` expressions where a dimension is open.

    Raises:
        UnsupportedError: not even the number of axes is known.
    """
    shape = getattr(expression.ty, "shape", None)
    if shape is None or not isinstance(shape, relax.ShapeExpr):
        raise UnsupportedError(
            "a shape depends on the values of the inputs, which kernels cannot be made for"
        )
    return tuple(int(d) if isinstance(d, tirx.IntImm) else d for d in shape.values)


def same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal as far as is known at build."""
    if isinstance(one, int) or isinstance(other, int):
        return isinstance(one, int) and isinstance(other, int) and one == other
    return bool(structural_equal(one, other))


def dtype_of(expression: Any) -> str:
    """TVM's name of an expression's element type."""
    return str(expression.ty.dtype)
