"""Draws from distributions.

They come from torch's own generator (``torch.manual_seed``), so that noise differs from step to step of a
training run and ``torch.compile`` can look into it. A node's ``seed`` has no effect: no two runtimes agree on
the numbers that belong to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def uniform(
    shape: Sequence[int], low: float, high: float, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Even draws from [low, high)."""
    return torch.rand(list(shape), dtype=dtype, device=device) * (high - low) + low


def normal(
    shape: Sequence[int], mean: float, scale: float, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Normal draws."""
    return torch.randn(list(shape), dtype=dtype, device=device) * scale + mean


def uniform_like(x: torch.Tensor, low: float, high: float, dtype: torch.dtype | None) -> torch.Tensor:
    """Even draws from [low, high) in the shape of ``x``."""
    return torch.rand_like(x, dtype=dtype or x.dtype) * (high - low) + low


def normal_like(x: torch.Tensor, mean: float, scale: float, dtype: torch.dtype | None) -> torch.Tensor:
    """Normal draws in the shape of ``x``."""
    return torch.randn_like(x, dtype=dtype or x.dtype) * scale + mean


def bernoulli(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Ones with the probabilities in ``x``."""
    return (torch.rand_like(x) < x).to(dtype or x.dtype)


def multinomial(x: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` draws with replacement from the classes of each row, ``x`` being their log-probabilities."""
    return torch.multinomial(torch.softmax(x, dim=-1), count, replacement=True).to(dtype)
