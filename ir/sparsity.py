"""N:M sparsity: what a pattern is, which weights share a group, masks, and what a model declares.

A pattern ``n:m`` keeps at most ``n`` of every ``m`` consecutive weights along the dimension that the
operator sums over. (Some papers' code counts the removed ones; for 2:4 and 4:8 that is the same.)
A pruned weight stays a dense constant with zeros, which every runtime computes rightly; that its zeros
follow a pattern is written into the model's metadata, under the name of the weight.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from effic.ir.errors import UsageError
from effic.ir.model import Model, constant_tensor, noted_text
from effic.ir.weights import WeightSite, weight_sites

SPARSITY_KEY = "effic.sparsity"
"""Key of the model's metadata with a JSON object: name of a weight -> pattern (``"2:4"``)."""

# Weights masked at a time: scores, ranks and masks of so many stay in the second-level cache.
_PIECE = 1 << 17

# An integer as long as the flags of a group, the first of which is its lowest byte.
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64} if sys.byteorder == "little" else {}

# Where so many neighbours are in the same place of their groups, they are compared where they lie.
_LONG = 256

# Up to this many weights in a group every pair is compared, in whole arrays; beyond it, groups are
# partitioned one by one.
_LONGEST_RANKED = 32


@dataclass(frozen=True)
class Pattern:
    """At most ``n`` non-zeros in every ``m`` consecutive weights.

    Attributes:
        n: weights kept of a group, at least 1.
        m: weights in a group, more than ``n``.

    Raises:
        UsageError: nothing would be kept, or nothing removed.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UsageError(
                f"{self.n}:{self.m} is no sparsity pattern; N:M keeps N of every M weights, 0 < N < M"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept."""
        return self.n / self.m

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern written ``2:4``.

        Raises:
            UsageError: the text is no pattern.
        """
        n, colon, m = text.strip().partition(":")
        # Nine digits are beyond any weight and still an int that is quick to read.
        if not (colon and n.isdecimal() and m.isdecimal() and max(len(n), len(m)) <= 9):
            raise UsageError(
                f"'{text}' is no sparsity pattern; write N:M, as in 2:4, N weights kept of every M"
            )
        return cls(int(n), int(m))


# -- which weights share a group ------------------------------------------------------------------


def reduction_length(site: WeightSite) -> int:
    """Length C of the vectors that groups run along: input channels, of one convolution group."""
    if site.kind == "Conv":
        return site.shape[1]
    if site.kind == "ConvTranspose":
        return site.shape[0] // max(1, site.groups)
    return site.shape_oi[1]


def by_reduction(site: WeightSite, matrix: np.ndarray) -> np.ndarray:
    """A weight as the vectors that groups of M run along.

    Args:
        site: the weight.
        matrix: ``[out, in]``, as :meth:`WeightSite.read` gives it, or anything of that shape.

    Returns:
        ``[rows, C]``; Conv: a row per output channel and kernel position, along input channels;
        ConvTranspose: along the input channels of one convolution group; others: the matrix itself.
    """
    length = reduction_length(site)
    if site.kind == "Conv":
        outputs = len(matrix)
        return matrix.reshape(outputs, length, -1).transpose(0, 2, 1).reshape(-1, length)
    return matrix.reshape(-1, length)


def from_reduction(site: WeightSite, rows: np.ndarray) -> np.ndarray:
    """The inverse of :func:`by_reduction`: ``[rows, C]`` to ``[out, in]``."""
    outputs, inputs = site.shape_oi
    if site.kind == "Conv":
        length = reduction_length(site)
        return rows.reshape(outputs, -1, length).transpose(0, 2, 1).reshape(outputs, inputs)
    return rows.reshape(outputs, inputs)


def along_groups(site: WeightSite, matrix: np.ndarray) -> np.ndarray:
    """The stored matrix as ``[A, C, B]``, groups running along axis 1: a view, where none is copied.

    Args:
        site: the weight.
        matrix: of ``site.matrix_shape``, as :meth:`WeightSite.matrix` gives it.
    """
    length = reduction_length(site)
    if site.kind == "Conv" or site.in_axis == 1:
        return matrix.reshape(len(matrix), length, -1)
    return matrix.reshape(-1, length, matrix.shape[1])


# -- masks ----------------------------------------------------------------------------------------


def nm_mask(score: np.ndarray, pattern: Pattern, *, axis: int = -1) -> np.ndarray:
    """Where the ``n`` largest scores of every ``m`` are.

    Args:
        score: at least 0, any shape ``[R, C]``, no NaN.
        pattern: what to keep.
        axis: the axis groups run along.

    Returns:
        bool, of the shape of ``score``: exactly ``n`` of every full group, and of what is left over at
        the end of the axis at most ``n``. Of equal scores the first ones are kept.
    """
    score = np.asarray(score)
    axis %= score.ndim
    mask = np.empty(score.shape, bool)
    if not score.size:
        return mask
    around = math.prod(score.shape[:axis]), score.shape[axis], math.prod(score.shape[axis + 1 :])
    flat, out = score.reshape(around), mask.reshape(around)
    full = around[1] // pattern.m * pattern.m
    # Splitting an axis never copies, so that writing to it writes to the mask.
    groups, kept = (
        a[:, :full].reshape(around[0], full // pattern.m, pattern.m, around[2]) for a in (flat, out)
    )
    _mask_groups(groups, kept, pattern.n)
    if full < around[1]:
        if around[1] - full <= pattern.n:
            out[:, full:] = True
        else:
            _mask_groups(flat[:, None, full:], out[:, None, full:], pattern.n)
    return mask


def _mask_groups(groups: np.ndarray, out: np.ndarray, n: int) -> None:
    """Write the mask of groups ``[A, G, m, B]`` to ``out``, piece by piece."""
    a, g, m, b = groups.shape
    if not groups.size:
        return
    mask = _by_ranks if m <= _LONGEST_RANKED else _by_partition
    step_a = max(1, _PIECE // (g * m * b))
    step_g = max(1, min(g, _PIECE // (m * b)))
    for start in range(0, a, step_a):
        for first in range(0, g, step_g):
            piece = slice(start, start + step_a), slice(first, first + step_g)
            mask(groups[piece], out[piece], n)


def _by_ranks(groups: np.ndarray, out: np.ndarray, n: int) -> None:
    """By counting, for every weight, how many of its group come before it."""
    a, g, m, b = groups.shape
    planes = np.moveaxis(groups, 2, 0)
    if b < _LONG:
        planes = np.ascontiguousarray(planes)
    ranks = np.empty(planes.shape, np.uint8)
    ranks[:] = np.arange(m - 1, -1, -1, dtype=np.uint8).reshape(m, 1, 1, 1)
    wins = np.empty(planes.shape, bool)
    for apart in range(1, m):
        # Of equals the first comes first.
        won = np.greater_equal(planes[:-apart], planes[apart:], out=wins[apart:]).view(np.uint8)
        ranks[:-apart] -= won
        ranks[apart:] += won
    np.less(ranks, n, out=wins)
    word = _WORDS.get(m) if b == 1 and out.flags.c_contiguous else None
    if word is None:
        np.copyto(np.moveaxis(out, 2, 0), wins)
        return
    # The flags of a group lie side by side. Shifting them into one word takes half the time of writing
    # every m-th byte.
    words, flags = out.reshape(a, g, m).view(word), wins.view(np.uint8)
    words[:] = flags[m - 1]
    for i in range(m - 2, -1, -1):
        np.left_shift(words, 8, out=words)
        np.bitwise_or(words, flags[i], out=words)


def _by_partition(groups: np.ndarray, out: np.ndarray, n: int) -> None:
    rows = np.moveaxis(groups, 2, 3)
    out[:] = np.moveaxis(_largest(rows.reshape(-1, rows.shape[3]), n).reshape(rows.shape), 3, 2)


def _largest(rows: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` largest of every row are, the first of equals."""
    length = rows.shape[1]
    if count >= length:
        return np.ones(rows.shape, bool)
    if count <= 0:
        return np.zeros(rows.shape, bool)
    least = np.partition(rows, length - count, axis=1)[:, length - count, None]
    mask = rows > least
    lacking = count - mask.sum(axis=1)
    equal = rows == least
    tied = np.flatnonzero(equal.sum(axis=1) != lacking)
    # Where all equals have room, no order among them is needed; this is nearly every row.
    equal[tied] &= equal[tied].cumsum(axis=1) <= lacking[tied, None]
    mask |= equal
    return mask


def density_mask(
    score: np.ndarray, density: float, *, compare: Literal["row", "matrix"] = "row"
) -> np.ndarray:
    """Where the largest scores are, without a pattern.

    Args:
        score: ``[R, C]``, at least 0, no NaN.
        density: fraction to keep, from 0 to 1; a fraction of a weight rounds up.
        compare: ``row``: the largest of every row, each with the same number; ``matrix``: of all.

    Returns:
        bool ``[R, C]``. Of equal scores the first ones are kept.
    """
    rows = score if compare == "row" else score.reshape(1, -1)
    # 0.1 of 10 is 1, not the 2 that the last bit of a product could make of it.
    count = math.ceil(density * rows.shape[1] - 1e-9)
    return _largest(rows, count).reshape(score.shape)


def violations(weight: np.ndarray, pattern: Pattern, *, axis: int = -1) -> tuple[int, int]:
    """Groups with more than ``n`` non-zeros, and groups in all, a last short one included."""
    length = weight.shape[axis]
    groups = math.ceil(length / pattern.m) * (weight.size // length) if length else 0
    return sum(_broken_groups(weight, pattern, axis)), groups


def _broken_groups(weight: np.ndarray, pattern: Pattern, axis: int) -> Iterator[int]:
    """How many groups break the pattern, piece by piece."""
    axis %= weight.ndim
    around = math.prod(weight.shape[:axis]), weight.shape[axis], math.prod(weight.shape[axis + 1 :])
    flat, m = weight.reshape(around), pattern.m
    step_a = max(1, _PIECE // max(1, around[1] * around[2]))
    step_c = max(m, _PIECE // max(1, around[2]) // m * m)
    # Counts of short groups fit into a byte.
    kind = np.uint8 if m < 256 else np.int64
    for start in range(0, around[0], step_a):
        for first in range(0, around[1], step_c):
            kept = flat[start : start + step_a, first : first + step_c] != 0
            counts = np.add.reduceat(kept, np.arange(0, kept.shape[1], m), axis=1, dtype=kind)
            yield int(np.count_nonzero(counts > pattern.n))


def follows(rows: np.ndarray, pattern: Pattern, *, axis: int = -1) -> bool:
    """Whether every group along ``axis`` (a last short one too) has at most ``n`` non-zeros."""
    return all(not count for count in _broken_groups(rows, pattern, axis))


# -- what a model declares ------------------------------------------------------------------------


def declared(model: Model) -> dict[str, Pattern]:
    """Patterns that the model's weights are declared to follow, by name of the weight.

    What is no pattern is left out: anyone may have written to the metadata.
    """
    try:
        rows = json.loads(model.ir.metadata_props.get(SPARSITY_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    found = {}
    for name, text in rows.items() if isinstance(rows, dict) else ():
        if noted_text(name) is None:
            continue
        try:
            found[name] = Pattern.parse(str(text))
        except UsageError:
            continue
    return found


def declare(model: Model, site_name: str, pattern: Pattern | None) -> None:
    """Write into the model's metadata that a weight follows a pattern, or (None) that it does not.

    Args:
        model: its metadata are changed.
        site_name: :attr:`WeightSite.name`.
        pattern: what it follows; not checked here, see :func:`broken`.
    """
    rows = {name: str(one) for name, one in declared(model).items() if name != site_name}
    if pattern is not None:
        rows[site_name] = str(pattern)
    if rows:
        model.ir.metadata_props[SPARSITY_KEY] = json.dumps(rows, separators=(",", ":"), sort_keys=True)
    else:
        model.ir.metadata_props.pop(SPARSITY_KEY, None)


def broken(model: Model, names: Collection[str] | None = None) -> list[tuple[str, Pattern, int, int]]:
    """Declared weights that do not follow their pattern.

    Args:
        model: the model; encoded weights are decoded.
        names: weights to look at, all declared ones by default.

    Returns:
        For each such weight its name, the pattern, groups that break it, and groups in all.
    """
    wanted = {name: one for name, one in declared(model).items() if names is None or name in names}
    if not wanted:
        return []
    found = []
    for site in weight_sites(model):
        pattern = wanted.get(site.name)
        if pattern is None or (site.encoding is None and constant_tensor(site.value) is None):
            continue
        with site.matrix() as matrix:
            count, groups = violations(along_groups(site, matrix), pattern, axis=1)
        if count:
            found.append((site.name, pattern, count, groups))
    return found
