"""Factors per channel that leave a model's function alone: out of a producer, into its consumers.

Where one layer makes a value and other layers read it, the producer's channels can be divided by
any factors and the consumers' input channels multiplied by them. SmoothQuant, AWQ and cross-layer
equalisation differ in the factors; where this is possible, and how it is done, is the same::

    producer (norm, Mul by a vector, linear layer)     output channels / s
      -> operators that hand factors on (Reshape, Transpose, Relu, Mul by an activation, ...)
        -> every reader is a linear layer              input channels * s

Channels that somebody else reads as well (a residual Add, the queries of a fused projection) keep
the factor 1; the others of the same producer need not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, describe
from effic.ir.tensors import borrow
from effic.ir.weights import WeightSite, WeightUse, weight_sites
from effic.passes.fuse.affine import (
    conv_input_factor,
    conv_output_factor,
    conv_transpose_output_factor,
    scaled,
)
from effic.passes.fuse.reading import FLOATS, rank_of
from effic.passes.quantize.scale_flow import POSITIVE, Blocked, Shapes, carry, is_carrier

LINEARS = ("MatMul", "Gemm", "Conv", "ConvTranspose")

# Norms: which inputs scale and shift the channels, and whether these are on axis 1 (else the last).
_NORMS = {
    ("", "LayerNormalization"): ((1, 2), False),
    ("", "RMSNormalization"): ((1,), False),
    ("", "SimplifiedLayerNormalization"): ((1,), False),
    ("com.microsoft", "SimplifiedLayerNormalization"): ((1,), False),
    ("com.microsoft", "SkipLayerNormalization"): ((2, 3), False),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): ((2,), False),
    ("", "BatchNormalization"): ((1, 2), True),
    ("", "InstanceNormalization"): ((1, 2), True),
}

# A producer is looked for this many nodes upstream and no further: it is next door or not there.
_MAX_STEPS_BACK = 32


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant that is multiplied by the factors: ``node`` reads it at ``index``.

    ``channels`` says which channel's factor each element gets (broadcast against the constant).
    """

    node: ir.Node
    index: int
    channels: np.ndarray


@dataclass(frozen=True, eq=False)
class Producer:
    """A node whose output channels can be multiplied by factors.

    Attributes:
        node: the node.
        channels: how many.
        layout: map of its output; see :mod:`effic.passes.quantize.scale_flow`.
        constants: what is multiplied: scale and shift of a norm, bias of a linear layer.
        site: weight of a linear layer, None for a norm.
        why_not: why it cannot be done after all, as a phrase, or None.
    """

    node: ir.Node
    channels: int
    layout: np.ndarray
    constants: tuple[Constant, ...]
    site: WeightSite | None = None
    why_not: str | None = None


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer that reads scaled channels.

    Attributes:
        site: its weight.
        channels: the producer's channel that each input channel carries, int ``[C_in]``.
    """

    site: WeightSite
    channels: np.ndarray


@dataclass(eq=False)
class Scaling:
    """A producer, everyone who reads its channels, and which channels may be scaled.

    Attributes:
        producer: makes the channels.
        consumers: the linear layers that read them.
        constants: shifts between producer and consumers, which are scaled along.
        free: bool ``[channels]``: whether a channel may have a factor other than 1.
        reasons: why some channels may not, in order of discovery.
        positive: whether factors must be positive (there is a Relu on the way).
    """

    producer: Producer
    consumers: list[Consumer] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    free: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    reasons: list[str] = field(default_factory=list)
    positive: bool = False

    @property
    def name(self) -> str:
        """The producer, as people know it."""
        return describe(self.producer.node)

    def freeze(self, channels: np.ndarray, reason: str) -> None:
        """Hold channels at the factor 1."""
        self.free[channels.reshape(-1)] = False
        self.reasons.append(reason)

    def consumer_of(self, site: WeightSite) -> Consumer | None:
        """The consumer whose weight is ``site``."""
        return next((item for item in self.consumers if item.site is site), None)

    def whole(self, factor: np.ndarray) -> np.ndarray:
        """Factors ``[channels]`` in float64 with 1 where a channel must not be scaled."""
        return np.where(self.free, np.asarray(factor, np.float64), 1.0)

    def fold(self, model: Model, factor: np.ndarray) -> str | None:
        """Divide the producer's channels by factors and multiply the consumers' by them.

        Args:
            model: rewritten in place; constants that others read as well are copied.
            factor: one per channel of the producer, shape ``[channels]``; those of channels that are
                not free are not used.

        Returns:
            None, or the reason why nothing was done, as a phrase.
        """
        factor = self.whole(factor)
        plan = _Plan(model)
        self._plan_producer(plan, 1 / factor)
        for item in self.consumers:
            if (factor[item.channels] != 1).any():
                plan.weight(item.site, factor[item.channels], "in")
        return plan.carry_out()

    def scale_producer(self, model: Model, factor: np.ndarray) -> str | None:
        """Multiply the producer's channels by factors and leave the consumers to the caller.

        Args and returns as for :meth:`fold`.
        """
        plan = _Plan(model)
        self._plan_producer(plan, self.whole(factor))
        return plan.carry_out()

    def _plan_producer(self, plan: _Plan, factor: np.ndarray) -> None:
        for item in (*self.producer.constants, *self.constants):
            plan.constant(item, factor)
        if self.producer.site is not None:
            plan.weight(self.producer.site, factor, "out")


class ScaleFlow:
    """Finds scalings in a model.

    Args:
        model: the model; scalings found stay valid while others are folded, and no longer than its
            nodes are rewired by other means.
        sites: weight sites the caller holds already: they are kept up to date by folding.
        encoded: consumers may be encoded weights; such scalings are for :meth:`Scaling.scale_producer`.
    """

    def __init__(self, model: Model, sites: Iterable[WeightSite] = (), *, encoded: bool = False) -> None:
        self.model, self.encoded = model, encoded
        self.shapes = Shapes(model)
        self._uses: dict[ir.Node, tuple[WeightSite, WeightUse]] = {}
        for site in (*weight_sites(model, LINEARS), *sites):
            if constant_tensor(site.value) is None and site.encoding is None:
                continue  # a product of two activations
            for use in site.uses:
                if use.node.op_type in LINEARS:
                    self._uses[use.node] = site, use
        self._scalings: dict[ir.Node, Scaling] = {}

    def scalings(self) -> list[Scaling]:
        """Every scaling of the model with a free channel and a consumer, each once."""
        for node in list(self.model.nodes(domain=None)):
            self._of(node)
        return [found for found in self._scalings.values() if found.consumers and found.free.any()]

    def find(self, site: WeightSite) -> Scaling | str:
        """The scaling whose consumer ``site`` is, or why there is none, as a phrase."""
        if len(site.uses) != 1:
            return f"its weight is read by {len(site.uses)} nodes"
        use = site.uses[0]
        value = _activation(use)
        if value is None:
            return "it has no input"
        reason = None
        for node in self._upstream(value):
            found = self._of(node)
            if found is None:
                continue
            consumer = found.consumer_of(self._uses[use.node][0]) if use.node in self._uses else None
            if consumer is not None and found.free[consumer.channels].any():
                return found
            reason = reason or (found.reasons[0] if found.reasons else None)
        return reason or _no_producer(value)

    def made_by(self, site: WeightSite) -> Scaling | str:
        """The scaling whose producer the layer of ``site`` is, or why there is none, as a phrase."""
        if len(site.uses) != 1:
            return f"its weight is read by {len(site.uses)} nodes"
        found = self._of(site.uses[0].node)
        if found is None:
            return "its weight is no matrix of constants"
        if found.consumers and found.free.any():
            return found
        return found.reasons[0] if found.reasons else "nobody reads its output"

    def _upstream(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that may be the producer of ``value``, nearest first."""
        found: list[ir.Node] = []
        seen: set[ir.Node] = set()
        todo = [value]
        while todo and len(seen) < _MAX_STEPS_BACK:
            node = todo.pop(0).producer()
            if node is None or node in seen:
                continue
            seen.add(node)
            if self._of(node) is not None:
                found.append(node)
            elif is_carrier(node):
                both = node.op_type in ("Mul", "Add", "Sub", "MatMul", "Div")
                inputs = node.inputs if both else node.inputs[:1]
                # The right operand first: values in an attention, the plain half of a gated unit.
                todo += [v for v in reversed(inputs) if v is not None and constant_tensor(v) is None]
        return found

    def _of(self, node: ir.Node) -> Scaling | None:
        """The scaling whose producer ``node`` is, or None when it is none."""
        if node not in self._scalings:
            producer = self._producer(node)
            if producer is None:
                return None
            self._scalings[node] = self._follow(producer)
        return self._scalings[node]

    # -- producers -------------------------------------------------------------------------------

    def _producer(self, node: ir.Node) -> Producer | None:
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        norm = _NORMS.get((domain, node.op_type))
        if norm is not None:
            return _norm_producer(node, *norm)
        if node in self._uses:
            return _linear_producer(*self._uses[node])
        if domain == "" and node.op_type == "Mul":
            return _vector_producer(node)
        return None

    # -- consumers -------------------------------------------------------------------------------

    def _follow(self, producer: Producer) -> Scaling:
        """Follow the producer's channels to everyone who reads them."""
        scaling = Scaling(producer, free=np.ones(producer.channels, bool))
        if producer.why_not is not None:
            scaling.freeze(producer.layout, producer.why_not)
        while scaling.free.any():
            before, clashes = int(scaling.free.sum()), self._walk(scaling)
            # Where two operands carry factors, one may be found to be held back: then the other is
            # free to go, and the walk starts again without the first. Only a walk that holds back
            # nothing more tells that both are meant.
            if scaling.free.sum() == before:
                for first, second, reason in clashes:
                    scaling.freeze(first, reason)
                    scaling.freeze(second, reason)
                if not clashes:
                    break
        return scaling

    def _walk(self, scaling: Scaling) -> list[tuple[np.ndarray, np.ndarray, str]]:
        """Visit every reader of free channels; returns the nodes that read two maps, with a reason."""
        producer = scaling.producer
        scaling.consumers, scaling.constants, scaling.positive = [], [], False
        todo = [(producer.node.outputs[0], producer.layout)]
        crossed: dict[ir.Node, np.ndarray] = {}
        clashes = []
        while todo:
            value, channels = todo.pop()
            if not scaling.free[channels.reshape(-1)].any():
                continue
            if value.is_graph_output():
                scaling.freeze(channels, f"'{value.name}' is an output of the graph")
            for node, index in value.uses():
                if node.graph is not value.graph:
                    scaling.freeze(channels, f"the output of {scaling.name} is read inside a subgraph")
                elif node.op_type in ("Shape", "Size") and node.domain in ONNX_DOMAINS:
                    continue
                elif node in crossed:
                    reason = f"{describe(node)} reads the output of {scaling.name} twice"
                    clashes.append((channels, crossed[node], reason))
                else:
                    crossed[node] = channels
                    try:
                        if node in self._uses:
                            scaling.consumers.append(self._consumer(node, value, channels))
                            continue
                        todo += carry(node, index, channels, self.model, self.shapes)
                    except Blocked as blocked:
                        scaling.freeze(channels, f"the output of {scaling.name} {blocked}")
                        continue
                    scaling.positive |= node.op_type in POSITIVE
                    if node.op_type in ("Add", "Sub"):
                        scaling.constants.append(Constant(node, 1 - index, channels))
        return clashes

    def _consumer(self, node: ir.Node, value: ir.Value, channels: np.ndarray) -> Consumer:
        """The linear layer ``node`` as a consumer of ``value``.

        Raises:
            Blocked: its weight cannot be scaled, or the channels are not its input channels.
        """
        site, use = self._uses[node]
        if _activation(use) is not value:
            raise Blocked(f"is the weight or the bias of {describe(node)}")
        if reason := why_fixed(site, self.encoded):
            raise Blocked(f"is read by {describe(node)}, whose weight {reason}")
        count, layout = _inputs_of(site, use)
        places = np.arange(count).reshape(layout)
        wide = (1,) * max(0, places.ndim - channels.ndim) + channels.shape
        if len(wide) > places.ndim or any(a not in (1, b) for a, b in zip(wide, places.shape, strict=True)):
            # More axes than the layer's channel axis are fine as long as nothing changes along them.
            extra = len(wide) - places.ndim
            rest = wide[extra:]
            if any(a > 1 for a in wide[:extra]) or any(
                a not in (1, b) for a, b in zip(rest, places.shape, strict=True)
            ):
                raise Blocked(f"is read by {describe(node)} along another axis than its channels")
            wide = rest
        spread = np.broadcast_to(channels.reshape(wide), places.shape).reshape(-1)
        return Consumer(site, np.ascontiguousarray(spread))


def why_fixed(site: WeightSite, encoded: bool = False) -> str | None:
    """Why a weight cannot be multiplied by factors, as a phrase, or None."""
    if site.encoding is not None:
        return None if encoded else "is encoded already"
    if site.why_not is not None:
        return site.why_not
    if len(site.uses) > 1 or site.other_readers:
        others = [describe(use.node) for use in site.uses[1:]] + site.other_readers
        return f"is read by {others[0]} as well"
    return None


def _activation(use: WeightUse) -> ir.Value | None:
    """The input that the weight is multiplied by."""
    inputs = use.node.inputs
    index = 0 if use.node.op_type in ("Conv", "ConvTranspose") else 1 - use.index
    return inputs[index] if index < len(inputs) else None


def _inputs_of(site: WeightSite, use: WeightUse) -> tuple[int, tuple[int, ...]]:
    """Number of input channels, and their layout in the activation."""
    node = use.node
    if node.op_type in ("Conv", "ConvTranspose"):
        groups = site.groups if node.op_type == "Conv" else 1
        count = site.shape[1 if node.op_type == "Conv" else 0] * groups
        return count, (count, *[1] * (len(site.shape) - 2))
    count = site.matrix_shape[use.in_axis]
    # x of x·W has them in the last axis, x of W·x in the last but one; Gemm may turn either.
    last = use.index == 1
    if node.op_type == "Gemm" and _flag(node, "transA" if last else "transB"):
        last = not last
    return count, (count,) if last else (count, 1)


def _linear_producer(site: WeightSite, use: WeightUse) -> Producer | None:
    node = use.node
    if site.why_not is not None or len(site.shape) < 2:
        # A batch of matrices, say.
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        count = site.shape[0] if node.op_type == "Conv" else site.shape[1] * site.groups
        layout = np.arange(count).reshape(count, *[1] * (len(site.shape) - 2))
    else:
        count = site.matrix_shape[1 - use.in_axis]
        layout = np.arange(count) if use.index == 1 else np.arange(count)[:, None]
    constants: tuple[Constant, ...] = ()
    reason = why_fixed(site)
    reason = (
        None if reason is None else f"{describe(node)}, which makes its input, has a weight that {reason}"
    )
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        channels = layout if node.op_type == "Gemm" else np.arange(count)
        constants = (Constant(node, 2, channels),)
        reason = reason or _why_not_constants(constants)
    return Producer(node, count, layout, constants, site, reason)


def _norm_producer(node: ir.Node, indices: tuple[int, ...], axis_one: bool) -> Producer | None:
    scale = node.inputs[indices[0]] if len(node.inputs) > indices[0] else None
    tensor = constant_tensor(scale)
    if tensor is None:
        return None
    shape = tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    channels = layout = np.arange(int(np.prod(shape))).reshape(shape)
    if axis_one:
        rank = rank_of(node.inputs[0])
        if rank is None or rank < 2:
            return None
        layout = channels.reshape(-1, *[1] * (rank - 2))
    present = [i for i in indices if i < len(node.inputs) and node.inputs[i] is not None]
    constants = tuple(Constant(node, i, channels) for i in present)
    return Producer(node, channels.size, layout, constants, None, _why_not_constants(constants))


def _vector_producer(node: ir.Node) -> Producer | None:
    """Mul by a constant vector: the last step of a norm that is written out, or a layer scale."""
    for index in (1, 0):
        tensor = constant_tensor(node.inputs[index])
        if tensor is None or tensor.dtype not in FLOATS:
            continue
        shape = tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
        if sum(size > 1 for size in shape) != 1:
            return None
        channels = np.arange(int(np.prod(shape))).reshape(shape)
        return Producer(node, channels.size, channels, (Constant(node, index, channels),))
    return None


def _why_not_constants(constants: Iterable[Constant]) -> str | None:
    for item in constants:
        value = item.node.inputs[item.index]
        tensor = constant_tensor(value)
        if tensor is None or tensor.dtype not in FLOATS:
            name = value.name if value is not None else "?"
            return f"{describe(item.node)}, which makes its input, reads '{name}', which is no constant"
    return None


def _no_producer(value: ir.Value) -> str:
    node = value.producer()
    if node is None:
        return "its input is an input of the graph"
    return f"its input comes from {describe(node)}, and no norm or layer before it could take factors in"


def _flag(node: ir.Node, name: str) -> bool:
    attr = node.attributes.get(name)
    return attr is not None and not attr.is_ref() and bool(attr.as_int())


def channel_ranges(site: WeightSite) -> np.ndarray:
    """Largest magnitude between each output and input channel, over the taps of a kernel.

    Returns:
        Float32 ``[G, C_out/G, C_in/G]``, G the convolution groups.
    """
    with site.matrix() as matrix:
        sizes = np.abs(matrix.astype(np.float32))
    kind, groups = site.uses[0].node.op_type, site.groups
    if kind == "Conv":
        return np.asarray(sizes.reshape(groups, site.shape[0] // groups, site.shape[1], -1).max(axis=3))
    if kind == "ConvTranspose":
        by_group = sizes.reshape(groups, site.shape[0] // groups, site.shape[1], -1).max(axis=3)
        return np.asarray(by_group.transpose(0, 2, 1))
    return np.asarray((sizes if site.in_axis == 1 else sizes.T)[None])


def per_input_channel(site: WeightSite, statistic: np.ndarray) -> np.ndarray:
    """A statistic per weight column, ``[G·K]``, as ``[C_in, taps]``: the taps of a kernel see one channel."""
    taps = math.prod(site.shape[2:]) if site.uses[0].node.op_type == "Conv" else 1
    return statistic.reshape(-1, taps)


# -- rewriting ------------------------------------------------------------------------------------


class _Plan:
    """New constants, worked out before the first one is put in place."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tensors: list[tuple[ir.Node, int, ir.TensorProtocol, WeightSite | None]] = []
        self.pending: dict[tuple[ir.Node, int], int] = {}
        self.reason: str | None = None

    def constant(self, item: Constant, factor: np.ndarray) -> None:
        """Multiply a constant by the factor of the channel each element belongs to."""
        self._multiply(item.node, item.index, factor[item.channels], None)

    def weight(self, site: WeightSite, factor: np.ndarray, side: str) -> None:
        """Multiply a weight's input (``side="in"``) or output channels by factors."""
        use = site.uses[0]
        node, index = (use.via[0], 0) if use.via else (use.node, use.index)
        self._multiply(node, index, weight_factor(site, factor, side), site)

    def _multiply(self, node: ir.Node, index: int, factor: np.ndarray, site: WeightSite | None) -> None:
        before = self.pending.get((node, index))
        value = node.inputs[index]
        tensor = constant_tensor(value) if before is None else self.tensors[before][2]
        if tensor is None or value is None:
            self.reason = self.reason or f"{describe(node)} has lost a constant"
            return
        with borrow(tensor) as array:
            shape = np.broadcast_shapes(array.shape, factor.shape)
            new = scaled(np.broadcast_to(array, shape), factor)
        if not np.isfinite(new).all():
            self.reason = self.reason or f"the scaled '{value.name}' would overflow {new.dtype}"
            return
        made = self.model.scratch.tensor(value.name or "scaled", new, tensor.dtype)
        if before is None:
            self.pending[(node, index)] = len(self.tensors)
            self.tensors.append((node, index, made, site))
        else:
            self.tensors[before] = (node, index, made, site or self.tensors[before][3])

    def carry_out(self) -> str | None:
        """Put the new constants in place; the reason when they cannot be."""
        if self.reason is not None:
            return self.reason
        for node, index, tensor, site in self.tensors:
            old = node.inputs[index]
            if old is None or node.graph is None:
                continue
            graph = site.graph if site is not None and site.graph is not None else node.graph
            new = self.model.add_initializer(graph, old.name or "scaled", tensor)
            node.replace_input_with(index, new)
            _take_place(old, new)
            if site is not None:
                site.value = new
        return None


def weight_factor(site: WeightSite, factor: np.ndarray, side: str) -> np.ndarray:
    """Factors per channel, shaped to multiply the stored weight.

    Args:
        site: the weight.
        factor: one per input channel (``side="in"``) or output channel (``side="out"``).
        side: which.
    """
    kind, shape = site.uses[0].node.op_type, site.shape
    if kind == "Conv":
        if side == "out":
            return conv_output_factor(factor, len(shape))
        return conv_input_factor(factor, shape, site.groups)
    if kind == "ConvTranspose":
        if side == "out":
            return conv_transpose_output_factor(factor, shape, site.groups)
        return conv_output_factor(factor, len(shape))
    axis = site.in_axis if side == "in" else 1 - site.in_axis
    return factor[:, None] if axis == 0 else factor[None, :]


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """Remove a constant nobody reads any more, and give its name to the one in its place."""
    if old.uses() or old.is_graph_output() or old.graph is None:
        return
    name, node = old.name, old.producer()
    if node is not None:
        if not isinstance(node.graph, ir.Graph):
            return
        node.graph.remove(node, safe=True)
        old.name = None
    elif old.is_initializer() and not old.is_graph_input() and name is not None:
        old.graph.initializers.pop(name)
    else:
        return
    new.name = name
