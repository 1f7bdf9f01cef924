"""Reading a graph for folding: constants, windows, and the per-channel map a node stands for.

A reader either returns what it read or raises :class:`Refused` with the reason, which the pass
turns into a *missed* remark.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effic.ir.errors import InvalidModelError
from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, describe, sole_consumer
from effic.ir.tensors import borrow
from effic.passes.fuse.affine import AffineMap, Window, explicit_pads

NORM = "BatchNormalization"
ARITHMETIC = ("Mul", "Add", "Sub", "Div")
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# Operators that give their first input's rank to their output, for rank_of.
RANK_KEEPERS = frozenset(
    (
        "AveragePool",
        "BatchNormalization",
        "Cast",
        "Clip",
        "Dropout",
        "Elu",
        "Erf",
        "Gelu",
        "GlobalAveragePool",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "InstanceNormalization",
        "LRN",
        "LayerNormalization",
        "LeakyRelu",
        "MaxPool",
        "Neg",
        "Pad",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Tanh",
        "Transpose",
    )
)

# A value's rank is looked for this far upstream and no further, so that a pass stays linear in the
# size of a model without shapes.
MAX_STEPS_BACK = 64


class Refused(Exception):
    """Something cannot be folded; the text is the reason, as a clause."""


@dataclass(frozen=True)
class WeightRef:
    """A constant weight behind Identity and Transpose nodes.

    Attributes:
        value: what the node reads.
        tensor: the constant at the far end.
        perm: transposition from ``tensor`` to ``value``.
        graph: where the constant lives, and where its replacement belongs.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    perm: tuple[int, ...]
    graph: ir.Graph

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as the node sees it."""
        dims = tuple(int(d) for d in self.tensor.shape)  # type: ignore[arg-type]
        return tuple(dims[p] for p in self.perm)

    @property
    def shared(self) -> bool:
        """Whether anything but the one node reads the constant, or what lies between."""
        source: ir.Value | None = self.value
        while source is not None:
            if len(source.uses()) > 1 or source.is_graph_output():
                return True
            node = source.producer()
            source = node.inputs[0] if node is not None and node.inputs else None
        return False

    @property
    def name(self) -> str:
        """The constant's name."""
        return self.tensor.name or self.value.name or "weight"


def read_weight(value: ir.Value | None, what: str = "weight") -> WeightRef:
    """The constant behind ``value``, through Identity and Transpose.

    Raises:
        Refused: it is not a constant of a floating-point type.
    """
    source, perms = value, []
    while source is not None and (node := source.producer()) is not None and node.domain in ONNX_DOMAINS:
        if node.op_type == "Transpose":
            perms.append(_transpose_perm(node))
        elif node.op_type != "Identity":
            break
        source = node.inputs[0]
    tensor = constant_tensor(source)
    if value is None or source is None or tensor is None:
        raise Refused(f"its {what} {_why_not_constant(source)}")
    if tensor.dtype not in FLOATS:
        raise Refused(f"its {what} is not of a floating-point type ({tensor.dtype.name})")
    perm = tuple(range(len(tensor.shape)))
    for step in reversed(perms):
        step = step or tuple(reversed(range(len(perm))))
        if len(step) != len(perm):
            raise Refused(f"its {what} is transposed by a permutation of another rank")
        perm = tuple(perm[axis] for axis in step)
    graph = _home(source)
    return WeightRef(value, tensor, perm, graph)


def _transpose_perm(node: ir.Node) -> tuple[int, ...]:
    attr = node.attributes.get("perm")
    if attr is None:
        return ()
    if attr.is_ref():
        raise Refused("its weight is transposed as the function's caller says")
    return tuple(attr.as_ints())


def _home(source: ir.Value) -> ir.Graph:
    node = source.producer()
    graph = source.graph if node is None else node.graph
    if not isinstance(graph, ir.Graph):
        raise Refused("its weight belongs to no graph")
    return graph


def _why_not_constant(value: ir.Value | None) -> str:
    node = value.producer() if value is not None else None
    if node is None:
        if value is not None and value.is_graph_input():
            return "is an input of the graph"
        return "is missing" if value is None else "has no stored values"
    if node.op_type in ("DequantizeLinear", "DynamicQuantizeLinear"):
        return f"is quantized (behind {describe(node)}); fold before quantizing"
    if node.op_type == "Constant":
        return "is set by the function's caller"
    return f"is computed at run time (by {describe(node)})"


def read_vector(value: ir.Value | None, what: str) -> np.ndarray:
    """A constant rank-1 float vector, in float64.

    Raises:
        Refused: it is not one.
    """
    ref = read_weight(value, what)
    if len(ref.shape) != 1:
        raise Refused(f"its {what} is not one value per channel (shape {list(ref.shape)})")
    with borrow(ref.tensor) as array:
        return array.astype(np.float64)


def int_attr(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute; Refused when the function's caller sets it."""
    return int(_literal(node, name, default))


def float_attr(node: ir.Node, name: str, default: float) -> float:
    """A float attribute; Refused when the function's caller sets it."""
    return float(_literal(node, name, default))


def _literal(node: ir.Node, name: str, default: int | float) -> int | float:
    attr = node.attributes.get(name)
    if attr is None:
        return default
    if attr.is_ref():
        raise Refused(f"its attribute '{name}' is set by the function's caller")
    value: int | float = attr.value
    return value


def is_pass_through(node: ir.Node, model: Model) -> bool:
    """Whether the node hands its first input on unchanged: Identity, and Dropout outside training."""
    if node.domain not in ONNX_DOMAINS:
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type != "Dropout" or any(_is_read(out) for out in node.outputs[1:]):
        return False
    if model.opset < 7:
        attr = node.attributes.get("is_test")
        return attr is not None and not attr.is_ref() and bool(attr.value)
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return True
    tensor = constant_tensor(training)
    return tensor is not None and not tensor.numpy().any()


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def is_candidate(node: ir.Node | None, value: ir.Value, arithmetic: bool = True) -> bool:
    """Whether ``node`` is a batch norm of ``value``, or arithmetic of it with a constant."""
    if node is None or node.domain not in ONNX_DOMAINS:
        return False
    if node.op_type == NORM or (node.op_type == "Neg" and arithmetic):
        return node.inputs[0] is value
    if node.op_type not in ARITHMETIC or not arithmetic:
        return False
    other = other_operand(node, value)
    if node.op_type == "Div" and other is node.inputs[0]:
        return False
    return constant_tensor(other) is not None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a two-operand node that is not ``value``."""
    left, right = node.inputs
    return right if left is value else left


@dataclass(frozen=True)
class Layout:
    """Where the channels of a tensor are.

    Attributes:
        channels: how many.
        rank: axes of the tensor, None when not known (then the channels are last).
        last: whether the channel axis is the last one; else it is axis 1.
    """

    channels: int
    rank: int | None
    last: bool = False

    @property
    def from_right(self) -> int:
        """Position of the channel axis counted from the right, 1 being the last."""
        return 1 if self.last or self.rank is None else self.rank - 1


def read_map(node: ir.Node, value: ir.Value, layout: Layout, model: Model) -> AffineMap:
    """The scale and shift that ``node`` (a candidate) applies to ``value``.

    Raises:
        Refused: it does not act per channel, or is not fixed.
        InvalidModelError: the batch norm's variance is negative.
    """
    if node.op_type == NORM:
        found = read_norm(node, model)
        if layout.last and layout.rank != 2:
            rank = "an unknown number of" if layout.rank is None else str(layout.rank)
            raise Refused(f"its input has {rank} axes, and it normalises axis 1, not the output channels")
        if found.channels != layout.channels:
            raise Refused(f"it has {found.channels} channels and its neighbour {layout.channels}")
        return found
    if node.op_type == "Neg":
        return AffineMap(np.full(layout.channels, -1.0), np.zeros(layout.channels))
    return _read_arithmetic(node, value, layout)


def read_norm(node: ir.Node, model: Model) -> AffineMap:
    """The scale and shift of a batch norm in inference.

    Raises:
        Refused: it is in training mode, or its statistics are not constants.
        InvalidModelError: its variance is negative.
    """
    if model.opset < 7 and not int_attr(node, "is_test", 0):
        raise Refused("it is in training mode")
    if int_attr(node, "training_mode", 0) or any(_is_read(out) for out in node.outputs[1:]):
        raise Refused("it is in training mode")
    if not int_attr(node, "spatial", 1):
        raise Refused("it keeps statistics per position, not per channel (spatial=0)")
    if len(node.inputs) < 5:
        raise InvalidModelError(f"{describe(node)} has {len(node.inputs)} inputs; it needs 5.")
    names = ("scale", "bias", "mean", "variance")
    gamma, beta, mean, variance = (read_vector(v, n) for v, n in zip(node.inputs[1:5], names, strict=True))
    if len({gamma.size, beta.size, mean.size, variance.size}) != 1:
        raise InvalidModelError(f"{describe(node)}: scale, bias, mean and variance differ in length.")
    if (variance < 0).any():
        raise InvalidModelError(
            f"{describe(node)} has a negative variance ({variance.min():.3g}): the checkpoint is corrupted."
        )
    found = AffineMap.of_norm(gamma, beta, mean, variance, float_attr(node, "epsilon", 1e-5))
    if not found.finite:
        raise Refused("its scale or shift is not finite")
    return found


def _read_arithmetic(node: ir.Node, value: ir.Value, layout: Layout) -> AffineMap:
    if "axis" in node.attributes or "broadcast" in node.attributes:
        raise Refused("it broadcasts the way operator sets before 7 did")
    other = other_operand(node, value)
    ref = read_weight(other, "constant")
    vector = per_channel(ref, layout)
    ones, zeros = np.ones(layout.channels), np.zeros(layout.channels)
    with np.errstate(divide="ignore", invalid="ignore"):
        if node.op_type == "Mul":
            found = AffineMap(vector, zeros)
        elif node.op_type == "Div":
            found = AffineMap(1.0 / vector, zeros)
        elif node.op_type == "Add":
            found = AffineMap(ones, vector)
        else:
            found = AffineMap(ones, -vector) if node.inputs[0] is value else AffineMap(-ones, vector)
    if not found.finite:
        raise Refused("its scale or shift is not finite")
    return found


def refuse_broadcast(node: ir.Node, value: ir.Value, layout: Layout) -> None:
    """Refuse arithmetic that may give ``value`` the channels of its constant, one of it having none.

    Only what comes before a layer needs this: the output of a layer has its channels.
    """
    if node.op_type == NORM or node.op_type == "Neg":
        return
    shape = read_weight(other_operand(node, value), "constant").shape
    if all(size == 1 for size in shape) and len(shape) <= layout.from_right:
        return
    if layout.rank is None or _channels_of(value, layout) != layout.channels:
        raise Refused("its constant may broadcast its input, whose channels are not known to be as many")


def _channels_of(value: ir.Value | None, layout: Layout) -> int | None:
    """Size of the channel axis of a value with the layout's rank: from its shape, or from what made it."""
    for _ in range(MAX_STEPS_BACK):
        if value is None:
            return None
        if value.shape is not None:
            dim = value.shape[1] if len(value.shape) == layout.rank and not layout.last else None
            return dim if isinstance(dim, int) else None
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS or not node.inputs or layout.last:
            return None
        if node.op_type in ("Conv", NORM):
            tensor = constant_tensor(node.inputs[1])
            if tensor is None or rank_of(value) != layout.rank:
                return None
            return int(tensor.shape[0])  # type: ignore[arg-type]
        if node.op_type in ARITHMETIC:
            left, right = node.inputs
            constant, value = (right, left) if constant_tensor(left) is None else (left, right)
            tensor = constant_tensor(constant)
            if tensor is None:
                return None
            if len(tensor.shape) == layout.rank and tensor.shape[1] == layout.channels:
                return layout.channels
        elif node.op_type in RANK_KEEPERS:
            value = node.inputs[0]
        else:
            return None
    return None


def per_channel(ref: WeightRef, layout: Layout) -> np.ndarray:
    """A constant as one float64 value per channel.

    Raises:
        Refused: it varies within a channel, or would change the tensor's shape.
    """
    shape, channel = ref.shape, len(ref.shape) - layout.from_right
    if any(size != 1 for axis, size in enumerate(shape) if axis != channel):
        raise Refused(f"its constant varies within a channel (shape {list(shape)})")
    if len(shape) > (1 if layout.rank is None else layout.rank):
        raise Refused(f"its constant (shape {list(shape)}) may add an axis to the result")
    size = shape[channel] if 0 <= channel < len(shape) else 1
    if size not in (1, layout.channels):
        raise Refused(f"its constant has {size} channels and its neighbour {layout.channels}")
    with borrow(ref.tensor) as array:
        return np.array(np.broadcast_to(array.astype(np.float64).reshape(-1), layout.channels))


def read_window(node: ir.Node, kernel: tuple[int, ...], value: ir.Value | None = None) -> Window:
    """Strides, dilations and explicit padding of a Conv or pooling node.

    Args:
        node: the node.
        kernel: its taps per axis.
        value: its input, whose static size resolves ``auto_pad``.

    Raises:
        Refused: the padding depends on a size that is not known.
    """

    def ints(name: str, default: int, length: int) -> tuple[int, ...]:
        attr = node.attributes.get(name)
        if attr is None:
            return (default,) * length
        if attr.is_ref():
            raise Refused(f"its attribute '{name}' is set by the function's caller")
        found = tuple(attr.as_ints())
        if len(found) != length:
            raise InvalidModelError(
                f"{describe(node)}: '{name}' has {len(found)} values instead of {length}."
            )
        return found

    axes = len(kernel)
    strides, dilations = ints("strides", 1, axes), ints("dilations", 1, axes)
    attr = node.attributes.get("auto_pad")
    auto_pad = "NOTSET" if attr is None or attr.is_ref() else attr.as_string()
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        found = explicit_pads(auto_pad, kernel, strides, dilations, spatial_size(value))
        if found is None:
            raise Refused(f"its padding ({auto_pad}) depends on an input size that is not known")
        return Window(kernel, strides, dilations, *found)
    pads = ints("pads", 0, 2 * axes) if auto_pad in ("NOTSET", "") else (0,) * (2 * axes)
    return Window(kernel, strides, dilations, pads[:axes], pads[axes:])


def spatial_size(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Sizes of axes 2 and up (None where not fixed), or None when the shape is not known."""
    if value is None or value.shape is None:
        return None
    return tuple(int(d) if isinstance(d, int) else None for d in value.shape.dims[2:])


def rank_of(value: ir.Value | None) -> int | None:
    """Number of axes of a value: from its shape, or from the operators that made it."""
    for _ in range(MAX_STEPS_BACK):
        if value is None:
            return None
        if value.shape is not None:
            return len(value.shape)
        tensor = constant_tensor(value)
        if tensor is not None:
            return len(tensor.shape)
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS or not node.inputs:
            return None
        if node.op_type in ("Gemm", "Flatten"):
            return 2
        if node.op_type in ("Conv", "ConvTranspose"):
            value = node.inputs[1]  # The weight has as many axes as the output.
        elif node.op_type in RANK_KEEPERS or rank_of_constant(node.inputs[-1]) in _ranks_kept(node):
            value = node.inputs[0]
        else:
            return None
    return None


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """Element type of a value: as stated, or from the operators that made it."""
    for _ in range(MAX_STEPS_BACK):
        if value is None or value.dtype is not None:
            return None if value is None else value.dtype
        node = value.producer()
        if node is None or node.domain not in ONNX_DOMAINS or not node.inputs:
            return None
        if node.op_type == "Cast" or node.op_type not in (
            *RANK_KEEPERS,
            *ARITHMETIC,
            "Conv",
            "Gemm",
            "MatMul",
        ):
            return None
        value = node.inputs[0]
    return None


def _ranks_kept(node: ir.Node) -> tuple[int, ...]:
    # Ranks of a constant second operand that leave the rank of the first as it is.
    if node.op_type == "MatMul":
        return (2,)
    return (0, 1) if node.op_type in ARITHMETIC else ()


def rank_of_constant(value: ir.Value | None) -> int | None:
    """Number of axes of a constant; None for anything else."""
    tensor = constant_tensor(value)
    return None if tensor is None else len(tensor.shape)


def follow(value: ir.Value, model: Model) -> tuple[ir.Value, list[ir.Node]]:
    """``value`` after the Identity and Dropout nodes that alone read it, and those nodes."""
    crossed: list[ir.Node] = []
    while (node := sole_consumer(value)) is not None and is_pass_through(node, model):
        if node.graph is not value.graph or node.inputs[0] is not value:
            break
        crossed.append(node)
        value = node.outputs[0]
    return value, crossed


class Orphans:
    """Constants that may have lost their last reader, removed in one go at the end of a pass.

    A constant may be read by thousands of nodes; asking after each removal whether one is left
    would make a pass quadratic.
    """

    def __init__(self) -> None:
        self._values: dict[ir.Value, None] = {}

    def add(self, value: ir.Value | None) -> None:
        """Look at ``value`` in the end."""
        if value is not None:
            self._values[value] = None

    def remove_node(self, node: ir.Node) -> None:
        """Remove a node that nothing reads any more, and look at what it read in the end."""
        if node.graph is None:
            return
        for value in node.inputs:
            self.add(value)
        node.graph.remove(node, safe=True)

    def sweep(self) -> None:
        """Remove the constants, and Identity and Transpose nodes on them, that nothing reads."""
        for value in self._values:
            _drop_unused(value)
        self._values.clear()


def _drop_unused(value: ir.Value | None) -> None:
    while value is not None and not value.uses() and not value.is_graph_output():
        node = value.producer()
        if node is None:
            if value.is_initializer() and not value.is_graph_input() and isinstance(value.graph, ir.Graph):
                value.graph.initializers.pop(value.name or "", None)
            return
        if node.op_type not in ("Identity", "Transpose", "Constant") or node.graph is None:
            return
        before = node.inputs[0] if node.inputs else None
        node.graph.remove(node, safe=True)
        value = before
