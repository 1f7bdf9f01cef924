"""Sizes to tensors and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def from_sizes(
    anchor: torch.Tensor, items: Sequence[int | float | bool], shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor of the given shape with these numbers, on the device of ``anchor``."""
    if not items:
        return torch.empty(list(shape), dtype=dtype, device=anchor.device)
    parts = [torch.scalar_tensor(item, dtype=dtype, device=anchor.device) for item in items]
    return torch.stack(parts).reshape(list(shape))


def to_ints(tensor: torch.Tensor) -> list[int]:
    """The integers in a tensor, as a flat list."""
    found: list[int] = tensor.reshape(-1).tolist()
    return found
