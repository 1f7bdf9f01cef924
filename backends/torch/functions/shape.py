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


def truncated_division(a: int, b: int) -> int:
    """Integer division towards zero, as ONNX divides."""
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def truth(a: int) -> bool:
    return a != 0


def both(a: bool, b: bool) -> bool:
    return a and b


def either(a: bool, b: bool) -> bool:
    return a or b


def larger(a: int, b: int) -> int:
    return torch.sym_max(a, b)  # type: ignore[no-any-return]


def smaller(a: int, b: int) -> int:
    return torch.sym_min(a, b)  # type: ignore[no-any-return]


def choose(condition: bool, a: int, b: int) -> int:
    return a if condition else b
