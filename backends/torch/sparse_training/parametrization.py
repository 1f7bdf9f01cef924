"""The masks that sit on a weight while it is trained, and how they are put on and taken off.

A mask is a parametrization in torch's sense: the layer reads ``f(weight)``, the optimizer sees the weight.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from effic.backends.torch.sparse_training.masks import Layout, nm_mask
from effic.backends.torch.sparse_training.schedules import Phase
from effic.backends.torch.sparse_training.weights import Place
from effic.ir.sparsity import Pattern


class Mask(nn.Module):
    """A mask of the largest weights, found anew each time the weight is read.

    The layer reads W (m + beta (1 - m)). The gradient G of what it read becomes that of W as it is, plus
    ``decay`` (1 - m) W; with ``exact`` it becomes G (m + beta (1 - m)), the chain rule's.

    Args:
        pattern: what :meth:`kept` keeps, and what is baked in the end.
        layout: how the weight lies.
        decay: SR-STE's pull on pruned weights.
        exact: multiply the gradient as the weight.
    """

    beta: Tensor

    def __init__(self, pattern: Pattern, layout: Layout, *, decay: float = 0.0, exact: bool = False) -> None:
        super().__init__()
        self.pattern, self.layout, self.decay, self.exact = pattern, layout, decay, exact
        self.current: Pattern | None = pattern
        self.siblings: tuple[str, ...] = ()
        # A tensor, so that compiled code does not depend on its value; the recipe knows it, not the file.
        self.register_buffer("beta", torch.zeros(()), persistent=False)

    def set_phase(self, phase: Phase) -> None:
        """Go by another pattern, or another share of the pruned weights."""
        self.current = phase.pattern
        self.beta.fill_(phase.beta)

    def kept(self, weight: Tensor) -> Tensor:
        """The weights that stay when the training ends: bool, of the weight's shape."""
        return nm_mask(weight.detach().abs(), self.pattern, self.layout)

    def forward(self, weight: Tensor) -> Tensor:
        if self.current is None:
            return weight
        mask = nm_mask(weight.detach().abs(), self.current, self.layout)
        if self.exact:
            return weight * torch.where(mask, 1.0, self.beta).to(weight.dtype)
        masked: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
            weight, mask, self.beta, self.decay
        )
        return masked

    def extra_repr(self) -> str:
        return str(self.pattern)


class _StraightThrough(torch.autograd.Function):
    """W (m + beta (1 - m)), whose gradient is handed to W as it is, plus decay (1 - m) W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, beta: Tensor, decay: float) -> Tensor:
        ctx.decay = decay
        ctx.save_for_backward(*(weight, mask) if decay else ())
        return torch.where(mask, weight, weight * beta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            gradient = gradient + torch.where(mask, 0.0, ctx.decay * weight)
        return gradient, None, None, None


# -- putting on and taking off --------------------------------------------------------------------


def put_on(place: Place, mask: Mask) -> None:
    """Let the layer read its weight through a mask."""
    owner = place.owner
    parametrize.register_parametrization(owner, place.attribute, mask, unsafe=True)
    # Soft masks and schedules run from the start, whatever mode the module was found in.
    mask.train()
    if isinstance(owner, fx.GraphModule):
        owner.__class__.__deepcopy__ = _copied_graph_module  # type: ignore[method-assign]


def take_off(place: Place) -> nn.Parameter:
    """Let the layer read its weight as it is again, which keeps its place among the parameters.

    torch's own function deletes the property from the class, which copies of the module share.
    """
    owner, attribute = place.owner, place.attribute
    lists: Any = owner.parametrizations
    weight: nn.Parameter = lists[attribute].original
    siblings = lists[attribute][0].siblings
    cls = type(owner)
    del lists[attribute]
    if len(lists):
        members = {k: v for k, v in vars(cls).items() if k not in (attribute, "__dict__", "__weakref__")}
        owner.__class__ = type(cls.__name__, cls.__bases__, members)
    else:
        del owner.parametrizations
        owner.__class__ = cls.__bases__[0]
    owner.register_parameter(attribute, weight)
    for name in siblings:
        if name in owner._parameters:
            owner._parameters[name] = owner._parameters.pop(name)
    if isinstance(owner, fx.GraphModule):
        # Code generated meanwhile belongs to the class that is gone.
        owner.recompile()
    return weight


def masked_places(module: nn.Module) -> dict[str, tuple[Place, Mask]]:
    """Every attribute of a module that is read through a mask, by its path."""
    found = {}
    for path, owner in module.named_modules():
        if not parametrize.is_parametrized(owner):
            continue
        lists: Any = owner.parametrizations
        for attribute, parametrizations in lists.items():
            if isinstance(mask := parametrizations[0], Mask):
                name = f"{path}.{attribute}" if path else attribute
                found[name] = (Place(owner, attribute), mask)
    return found


def original(place: Place) -> nn.Parameter:
    """The weight behind a mask."""
    lists: Any = place.owner.parametrizations
    weight: nn.Parameter = lists[place.attribute].original
    return weight


def _copied_graph_module(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """A deep copy with its masks: fx copies what the graph reads by value, properties not at all."""
    lists: Any = self.parametrizations
    masks = {attribute: parametrizations[0] for attribute, parametrizations in lists.items()}
    for attribute in masks:
        take_off(Place(self, attribute))
    try:
        made = copy.deepcopy(self, memo)
        for attribute, mask in masks.items():
            training = mask.training
            twin = copy.deepcopy(mask, memo)
            put_on(Place(made, attribute), twin)
            twin.train(training)
    finally:
        for attribute, mask in masks.items():
            training = mask.training
            put_on(Place(self, attribute), mask)
            mask.train(training)
    return made
