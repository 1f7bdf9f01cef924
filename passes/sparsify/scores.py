"""Prune by a score: weights are read, masked and handed on piece by piece."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from effic.ir.sparsity import Pattern, density_mask, nm_mask

# Weights worked on at a time: a piece and all that is made of it stay in the second-level cache, and
# the calls are nothing beside it.
_PIECE = 1 << 16


class NotFiniteError(ValueError):
    """A weight holds NaN or infinity, so that it has no order."""


@dataclass
class Kept:
    """What pruning left of a weight; counted while it is pruned.

    Attributes:
        weights: how many there were.
        kept: how many the mask keeps, zeros among them.
        energy: ``‖W‖²``.
        kept_energy: ``‖m⊙W‖²``.
    """

    weights: int = 0
    kept: int = 0
    energy: float = 0.0
    kept_energy: float = 0.0

    def add(self, weight: np.ndarray, pruned: np.ndarray, bits: int) -> None:
        """Count a piece.

        Args:
            weight: float32, contiguous.
            pruned: the same with zeros.
            bits: of its mask.

        Raises:
            NotFiniteError: the weight holds NaN or infinity.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            energies = [float(np.dot(a.reshape(-1), a.reshape(-1))) for a in (weight, pruned)]
        if not np.isfinite(energies[0]):
            if not np.isfinite(weight).all():
                raise NotFiniteError
            # Squares beyond float32.
            energies = [float(np.sum(np.square(a, dtype=np.float64))) for a in (weight, pruned)]
        self.weights += weight.size
        self.kept += bits
        self.energy += energies[0]
        self.kept_energy += energies[1]

    def merge(self, other: Kept) -> None:
        """Count what another counted."""
        self.weights += other.weights
        self.kept += other.kept
        self.energy += other.energy
        self.kept_energy += other.kept_energy

    @property
    def density(self) -> float:
        """Fraction of the weights that the mask keeps."""
        return self.kept / max(1, self.weights)

    @property
    def energy_share(self) -> float:
        """``‖m⊙W‖² / ‖W‖²``; 1 for a weight of zeros."""
        return self.kept_energy / self.energy if self.energy else 1.0


MakeMask = Callable[[np.ndarray, tuple[slice, slice]], np.ndarray]
"""From a float32 piece ``[a, c, B]`` and where it lies to its mask."""


def by_pattern(pattern: Pattern, scale: np.ndarray | None) -> MakeMask:
    """Keep the ``n`` largest ``|w|·scale`` of every ``m``.

    Args:
        pattern: what to keep.
        scale: per input, of a shape that broadcasts to the weight ``[A, C, B]``; None: magnitude alone.
    """

    def mask(piece: np.ndarray, where: tuple[slice, slice]) -> np.ndarray:
        score = np.abs(piece)
        if scale is not None:
            with np.errstate(over="ignore"):
                score *= scale[where[0] if len(scale) > 1 else slice(None), where[1]]
        return nm_mask(score, pattern, axis=1)

    return mask


def pruned_blocks(weight: np.ndarray, m: int, make_mask: MakeMask, kept: Kept) -> Iterator[np.ndarray]:
    """A weight with zeros where it is pruned, in consecutive blocks in C order.

    Two blocks are made while a third is written.

    Args:
        weight: ``[A, C, B]``, C-contiguous, any floating type; not changed.
        m: axis 1 is cut at multiples of it only.
        make_mask: of a piece.
        kept: is counted up.

    Raises:
        NotFiniteError: the weight holds NaN or infinity.
    """
    a, c, b = weight.shape
    step_a = max(1, _PIECE // (c * b))
    step_c = max(m, _PIECE // b // m * m)
    places = [
        (slice(i, min(a, i + step_a)), slice(j, min(c, j + step_c)))
        for i in range(0, a, step_a)
        for j in range(0, c, step_c)
    ]

    def one(place: tuple[slice, slice]) -> tuple[np.ndarray, Kept]:
        stored = weight[place]
        piece = np.ascontiguousarray(stored, np.float32)
        mask = make_mask(piece, place)
        # The product would turn what is pruned of negative weights into -0.
        pruned = np.bitwise_and(piece.view(np.int32), -mask.view(np.int8), dtype=np.int32).view(np.float32)
        count = Kept()
        count.add(piece, pruned, int(np.count_nonzero(mask)))
        return pruned.astype(stored.dtype, copy=False), count

    if len(places) < 3:
        results: Iterator[tuple[np.ndarray, Kept]] = map(one, places)
        yield from _counted(results, kept)
        return
    with ThreadPoolExecutor(2) as workers:
        yield from _counted(_ahead(workers, one, places), kept)


def _ahead(
    workers: ThreadPoolExecutor,
    one: Callable[[tuple[slice, slice]], tuple[np.ndarray, Kept]],
    places: list[tuple[slice, slice]],
) -> Iterator[tuple[np.ndarray, Kept]]:
    coming: deque[Future[tuple[np.ndarray, Kept]]] = deque()
    left = iter(places)
    coming.extend(workers.submit(one, place) for place in itertools.islice(left, 3))
    while coming:
        yield coming.popleft().result()
        coming.extend(workers.submit(one, place) for place in itertools.islice(left, 1))


def _counted(results: Iterator[tuple[np.ndarray, Kept]], kept: Kept) -> Iterator[np.ndarray]:
    for block, count in results:
        kept.merge(count)
        yield block


def prune_to_density(
    rows: np.ndarray, scale: np.ndarray | None, density: float, compare: Literal["row", "matrix"], kept: Kept
) -> np.ndarray:
    """A weight without a pattern: the largest scores of a row or of the matrix stay.

    Args:
        rows: float32 ``[out, in]``.
        scale: ``[out or 1, in]``, or None.
        density: fraction to keep.
        compare: see :func:`~effic.ir.sparsity.density_mask`.
        kept: is counted up.

    Raises:
        NotFiniteError: the weight holds NaN or infinity.
    """
    if not (np.isfinite(rows.min(initial=0)) and np.isfinite(rows.max(initial=0))):
        raise NotFiniteError
    with np.errstate(over="ignore"):
        score = np.abs(rows) if scale is None else np.abs(rows) * scale
    mask = density_mask(score, density, compare=compare)
    pruned = np.where(mask, rows, np.float32(0))
    kept.add(rows, pruned, int(np.count_nonzero(mask)))
    return pruned
