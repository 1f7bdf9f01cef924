"""Sequences of tensors, held as Python lists, and optional values, held as None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Tensors = list[torch.Tensor]


def construct(*items: torch.Tensor) -> Tensors:
    """A sequence of these."""
    return list(items)


def at(items: Tensors, index: int) -> torch.Tensor:
    """The item at ``index``; negative ones count from the end."""
    return items[index]


def insert(items: Tensors, item: torch.Tensor, index: int | None) -> Tensors:
    """The sequence with ``item`` before ``index``, or at the end."""
    place = len(items) if index is None else index
    place += len(items) if place < 0 else 0
    return [*items[:place], item, *items[place:]]


def erase(items: Tensors, index: int | None) -> Tensors:
    """The sequence without the item at ``index``, or without the last."""
    place = len(items) - 1 if index is None else index
    place += len(items) if place < 0 else 0
    return [*items[:place], *items[place + 1 :]]


def length(items: Tensors, device: torch.device) -> torch.Tensor:
    """How many there are, as a scalar tensor."""
    return torch.scalar_tensor(len(items), dtype=torch.int64, device=device)


def concatenate(items: Tensors, axis: int, new_axis: bool) -> torch.Tensor:
    """All items behind each other, along ``axis`` or along a new one."""
    return torch.stack(items, axis) if new_axis else torch.cat(items, axis)


def split(x: torch.Tensor, parts: int | Sequence[int] | None, axis: int, keep_axis: bool) -> Tensors:
    """Parts of ``x`` along ``axis``: of one size (the last may be smaller), of given sizes, or single entries."""
    if parts is None:
        found = torch.split(x, 1, axis)
        return list(found) if keep_axis else [part.squeeze(axis) for part in found]
    return list(torch.split(x, parts if isinstance(parts, int) else list(parts), axis))


def same(value: Any) -> Any:
    """An optional value: what is in it, or None."""
    return value


def has_element(value: Any, device: torch.device) -> torch.Tensor:
    """Whether an optional value is there, as a scalar tensor."""
    return torch.scalar_tensor(value is not None, dtype=torch.bool, device=device)


def element(value: Any) -> Any:
    """What is in an optional value.

    Raises:
        ValueError: nothing is.
    """
    if value is None:
        raise ValueError("an optional value is read that is not there; give the optional input")
    return value
