"""The weights of a module: which parameters are summed over by a layer, along which axis, and who owns them.

For plain modules the class of the layer says so; in an ``fx.GraphModule`` (what ``to_module`` makes of an
ONNX file) the call that reads the parameter does.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from effic.backends.torch.functions import convolution, indexing, linear
from effic.backends.torch.sparse_training.masks import Layout

Kind = Literal["Linear", "Conv", "ConvTranspose"]

LINEAR = Layout(1)
MATMUL = Layout(0, out_axis=1)

EMBEDDING = "is an embedding"


@dataclasses.dataclass(frozen=True)
class Place:
    """An attribute of a module that holds a weight."""

    owner: nn.Module
    attribute: str


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight and where it is found.

    Attributes:
        name: its name in the state dict (the first one, of a shared weight).
        tensor: the parameter.
        places: every attribute that holds it; more than one for a shared weight.
        kind: the layer that reads it; matrix products count as Linear.
        layout: how it lies.
        plain: read as the ``weight`` argument of a linear, matrix product or convolution and of nothing
            that hides these (multi-head attention does).
        table: read by an embedding, too or only.
        why_not: why it cannot be pruned, as a phrase, or None.
    """

    name: str
    tensor: nn.Parameter
    places: tuple[Place, ...]
    kind: Kind | None
    layout: Layout
    plain: bool = True
    table: bool = False
    why_not: str | None = None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """What one layer or call does with a parameter."""

    kind: Kind | None
    layout: Layout = LINEAR
    plain: bool = True
    why_not: str | None = None


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OTHERS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, EMBEDDING),
    (nn.EmbeddingBag, EMBEDDING),
    (nn.RNNBase, "is a recurrent weight, which torch reads past any parametrization"),
    (nn.RNNCellBase, "is a recurrent weight, which is not pruned here"),
    (nn.Bilinear, "is a bilinear form"),
)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def weights(module: nn.Module) -> list[Weight]:
    """Every parameter of two axes or more, in the order in which layers read them.

    Args:
        module: not changed.

    Returns:
        A weight per parameter. Those that cannot be pruned have ``why_not``.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[int, tuple[Tensor, list[Place], list[_Reader]]] = {}
    for owner, attribute, tensor, reader in _readers(module):
        if id(tensor) not in names:
            continue
        _, places, readers = found.setdefault(id(tensor), (tensor, [], []))
        place = Place(owner, attribute)
        if place not in places:
            places.append(place)
        readers.append(reader)
    made = [
        _weight(names[key], tensor, tuple(places), readers)
        for key, (tensor, places, readers) in found.items()
    ]
    for name, parameter in module.named_parameters():
        if id(parameter) not in found and (
            isinstance(parameter, UninitializedParameter) or parameter.dim() > 1
        ):
            why = "is read by no linear layer, convolution or matrix product that is known here"
            if ".original" in name and "parametrizations." in name:
                why = "is parametrized already"
            made.append(Weight(name, parameter, (), None, LINEAR, plain=False, why_not=why))
    return made


def _weight(name: str, tensor: Tensor, places: tuple[Place, ...], readers: list[_Reader]) -> Weight:
    first = next((r for r in readers if r.kind is not None), readers[0])
    why_not = next((r.why_not for r in readers if r.why_not is not None), None)
    if why_not is None:
        if isinstance(tensor, UninitializedParameter):
            why_not = "has no shape yet; run the module once before attaching"
        elif not tensor.is_floating_point():
            why_not = f"has elements of type {tensor.dtype}"
        elif any(r.layout != first.layout for r in readers):
            why_not = "is read along two different axes"
    plain = all(r.plain for r in readers)
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    table = any(r.why_not == EMBEDDING for r in readers)
    return Weight(name, parameter, places, first.kind, first.layout, plain, table, why_not)


def _readers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, _Reader]]:
    for owner in module.modules():
        if isinstance(owner, fx.GraphModule):
            yield from _graph_readers(owner)
        elif isinstance(owner, _CONVOLUTIONS):
            yield from _own(owner, _Reader("Conv", Layout(1, 1, 0, owner.groups)), "weight")
        elif isinstance(owner, _TRANSPOSED):
            yield from _own(owner, _Reader("ConvTranspose", Layout(0, owner.groups, 1, 1)), "weight")
        elif isinstance(owner, nn.Linear):
            # Attention reads the weight of this class itself.
            plain = not isinstance(owner, NonDynamicallyQuantizableLinear)
            yield from _own(owner, _Reader("Linear", plain=plain), "weight")
        elif isinstance(owner, nn.MultiheadAttention):
            yield from _own(owner, _Reader("Linear", plain=False), *_ATTENTION)
        else:
            for cls, reason in _OTHERS:
                if isinstance(owner, cls):
                    attributes = [name for name, p in owner.named_parameters(recurse=False) if p.dim() > 1]
                    yield from _own(owner, _Reader(None, plain=False, why_not=reason), *attributes)


def _own(
    owner: nn.Module, reader: _Reader, *attributes: str
) -> Iterator[tuple[nn.Module, str, Tensor, _Reader]]:
    for attribute in attributes:
        if parametrize.is_parametrized(owner, attribute):
            continue
        tensor = getattr(owner, attribute, None)
        if isinstance(tensor, nn.Parameter):
            yield owner, attribute, tensor, reader


# -- in fx graphs ---------------------------------------------------------------------------------

_LINEARS: set[Any] = {functional.linear, torch.ops.aten.linear.default}
_PRODUCTS: set[Any] = {
    torch.matmul, torch.mm, operator.matmul, Tensor.matmul, Tensor.mm,
    torch.ops.aten.mm.default, torch.ops.aten.matmul.default,
}  # fmt: skip
_SUMS: set[Any] = {torch.addmm, Tensor.addmm, torch.ops.aten.addmm.default}
_CONVS: set[Any] = {
    functional.conv1d, functional.conv2d, functional.conv3d,
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default,
}  # fmt: skip
_CONV_TRANSPOSES: set[Any] = {
    functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    torch.ops.aten.conv_transpose1d.default, torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
}  # fmt: skip
_TABLES: set[Any] = {
    functional.embedding,
    torch.embedding,
    torch.index_select,
    operator.getitem,
    torch.ops.aten.embedding.default,
    indexing.gather,
}
_METHODS = {"matmul": torch.matmul, "mm": torch.mm, "__matmul__": torch.matmul}


def _graph_readers(module: fx.GraphModule) -> Iterator[tuple[nn.Module, str, Tensor, _Reader]]:
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        path, _, attribute = str(node.target).rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        if parametrize.is_parametrized(owner, attribute):
            continue
        tensor = getattr(owner, attribute, None)
        if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
            continue
        for reader in _uses(node, turned=False, rank=tensor.dim()):
            yield owner, attribute, tensor, reader


def _uses(node: fx.Node, *, turned: bool, rank: int) -> Iterator[_Reader]:
    for user in node.users:
        if _turns(user, node, rank):
            yield from _uses(user, turned=not turned, rank=rank)
            continue
        reader = _use(user, node, rank)
        if turned and reader.kind == "Linear":
            reader = dataclasses.replace(reader, layout=reader.layout.turned)
        elif turned and reader.kind is not None:
            reader = _Reader(None, plain=False, why_not="is transposed before a convolution")
        yield reader


def _use(user: fx.Node, weight: fx.Node, rank: int) -> _Reader:
    target: Any = _METHODS.get(str(user.target)) if user.op == "call_method" else user.target
    indices = [i for i, arg in enumerate(user.args) if arg is weight]
    if user.kwargs.get("weight") is weight:
        indices.append(1)
    if len(indices) == 1:
        index = indices[0]
        if rank == 2 and target in _LINEARS and index == 1:
            return _Reader("Linear")
        if rank == 2 and target in _PRODUCTS and index in (0, 1):
            return _Reader("Linear", MATMUL if index == 1 else LINEAR, plain=index == 1)
        if rank == 2 and target in _SUMS and index in (1, 2):
            return _Reader("Linear", MATMUL if index == 2 else LINEAR, plain=index == 2)
        if target in _CONVS | _CONV_TRANSPOSES and index == 1:
            groups: Any = user.args[6] if len(user.args) > 6 else user.kwargs.get("groups", 1)
            if isinstance(groups, int):
                if target in _CONVS:
                    return _Reader("Conv", Layout(1, 1, 0, groups))
                return _Reader("ConvTranspose", Layout(0, groups, 1, 1))
        if target is linear.gemm and index in (0, 1):
            trans_a, trans_b = user.args[5:7]
            return _Reader("Linear", LINEAR if (trans_b if index else not trans_a) else MATMUL, plain=False)
        if target is convolution.conv_transpose and index == 1:
            return _Reader("ConvTranspose", Layout(0, int(str(user.kwargs["group"])), 1, 1), plain=False)
        if target in _TABLES:
            return _Reader(None, plain=False, why_not=EMBEDDING)
    name = getattr(target, "__name__", None) or str(user.target)
    return _Reader(None, plain=False, why_not=f"is read by '{name}'")


# Which axes, each modulo 2, make these the transpose of a matrix.
_TRANSPOSES: dict[Any, set[tuple[int, ...]]] = {
    torch.t: {()},
    torch.transpose: {(0, 1), (1, 0)},
    torch.permute: {(1, 0)},
    torch.ops.aten.t.default: {()},
    torch.ops.aten.transpose.int: {(0, 1), (1, 0)},
    torch.ops.aten.permute.default: {(1, 0)},
}
_TRANSPOSE_METHODS = {"t": torch.t, "transpose": torch.transpose, "permute": torch.permute}


def _turns(user: fx.Node, weight: fx.Node, rank: int) -> bool:
    """Whether a node is the transpose of a matrix."""
    if rank != 2 or not user.args or user.args[0] is not weight:
        return False
    if user.target is getattr:
        return user.args[1:] in (("T",), ("mT",))
    target = _TRANSPOSE_METHODS.get(str(user.target)) if user.op == "call_method" else user.target
    arguments = (*user.args[1:], *user.kwargs.values())
    axes = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)) else arguments
    return tuple(a % 2 if isinstance(a, int) else None for a in axes) in _TRANSPOSES.get(target, set())
