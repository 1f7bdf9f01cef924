"""Arithmetic of layers with 8-bit weights and 32-bit biases.

A layer computes ``y = s_x·s_w·(Σ (q_x - z_x)·q_w + q_b)`` in integers: the step of a bias is the
product of the steps of what it is added to (Jacob et al., "Quantization and training of neural networks
for efficient integer-arithmetic-only inference", CVPR 2018, section 2.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HIGHEST = 127
# A bias gets half of what 32 bits hold: the rest is for the sum it is added to.
MOST_BIAS = float(1 << 30)
# Below this a product of steps leaves the normal numbers of float32.
_LEAST_STEP = 1e-36


class IntegerWeight(NamedTuple):
    """A weight in 8 bits.

    Attributes:
        codes: int8 ``[out, in]`` in -127 … 127.
        scales: float32 ``[out]``, all equal when there is one for the whole tensor.
        widened: output channels whose step had to grow so that their bias fits into 32 bits.
    """

    codes: np.ndarray
    scales: np.ndarray
    widened: int


def integer_weight(
    weight: np.ndarray, uses: Sequence[tuple[float, np.ndarray | None]], *, per_channel: bool = True
) -> IntegerWeight:
    """Round a weight to 8 bits, symmetrically.

    A channel with tiny weights and a bias gets a step at which the bias fits: its weights then lose
    precision that the bias would drown anyway.

    Args:
        weight: float32 ``[out, in]``, finite.
        uses: for each layer that reads it, the step of its input and its bias ``[out]`` or None.
        per_channel: a scale for each output channel, else one for all.
    """
    largest = np.abs(weight).max(axis=1, initial=0.0).astype(np.float64)
    if not per_channel:
        largest = np.full_like(largest, largest.max(initial=0.0))
    least = np.zeros_like(largest)
    for step, bias in uses:
        if bias is not None:
            least = np.maximum(least, np.abs(bias.astype(np.float64)) / (step * MOST_BIAS))
        # What is too small for a product of steps is nothing; code 0 stands for it at any scale.
        largest[largest / HIGHEST * step < _LEAST_STEP] = 0.0
        least[least * step < _LEAST_STEP] = 0.0
    if not per_channel:
        least = np.full_like(least, least.max(initial=0.0))
    wanted = largest / HIGHEST
    widened = int(((least > wanted) & (wanted > 0)).sum())
    scales = np.maximum(wanted, least)
    scales[scales == 0] = 1.0
    rounded = scales.astype(np.float32)
    codes = np.clip(np.rint(weight / rounded[:, None]), -HIGHEST, HIGHEST).astype(np.int8)
    return IntegerWeight(codes, rounded, widened)


def bias_scales(step: float, scales: np.ndarray) -> np.ndarray:
    """Steps of a bias, float32 ``[out]``: the products of the input's step and the weight's."""
    return np.float32(step) * scales.astype(np.float32)


def bias_codes(bias: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A bias in 32 bits, int32 ``[out]``; zero stands for zero."""
    codes = np.rint(bias.astype(np.float64) / scales.astype(np.float64))
    limit = float(np.iinfo(np.int32).max)
    return np.clip(codes, -limit, limit).astype(np.int32)
