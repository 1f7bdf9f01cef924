"""N:M masks in torch: groups of a weight, the largest of every group, the patterns a group can have.

The counterpart of :mod:`effic.ir.sparsity` for tensors on any device, under autograd and torch.compile.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from effic.ir.errors import UsageError
from effic.ir.sparsity import Pattern
from effic.passes.sparsify.mask_files import patterns_of

# Up to this many weights in a group every pair is compared, in whole tensors; beyond it, groups are sorted.
_LONGEST_RANKED = 16

MAX_CHOICES = 256
"""Patterns a group may choose from, so that a choice is one byte: 4:8 has 70, 5:10 has 252."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a stored weight lies: which axis its operator sums over.

    ==================  ====================  ====  ======  ========  ==========
    operator            stored weight         axis  blocks  out_axis  out_blocks
    ==================  ====================  ====  ======  ========  ==========
    linear              ``[out, in]``         1     1       0         1
    matmul, right       ``[K, N]``            0     1       1         1
    convolution         ``[O, I/g, …]``       1     1       0         g
    its transpose       ``[I, O/g, …]``       0     g       1         1
    ==================  ====================  ====  ======  ========  ==========

    Attributes:
        axis: the axis summed over, which groups of M run along.
        blocks: pieces that lie one after another on that axis, which no group crosses.
        out_axis: the axis of the output channels.
        out_blocks: the same pieces on that axis.
    """

    axis: int
    blocks: int = 1
    out_axis: int = 0
    out_blocks: int = 1

    def length(self, weight: Tensor) -> int:
        """Length of the vectors that groups run along: input channels, of one convolution group."""
        return weight.shape[self.axis] // self.blocks

    @property
    def turned(self) -> Layout:
        """With inputs and outputs exchanged: of a transposed matrix, or the one gradients flow along."""
        return Layout(self.out_axis, self.out_blocks, self.axis, self.blocks)


def to_groups(tensor: Tensor, layout: Layout, m: int, fill: float = 0.0) -> Tensor:
    """A tensor of a weight's shape as groups ``[…, G, m]``; the last of a vector is padded with ``fill``."""
    rows = torch.unflatten(tensor, layout.axis, (layout.blocks, -1)).movedim(layout.axis + 1, -1)
    if short := -rows.shape[-1] % m:
        rows = functional.pad(rows, (0, short), value=fill)
    return torch.unflatten(rows, -1, (-1, m))


def from_groups(groups: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """The inverse of :func:`to_groups` for a weight of the shape of ``like``."""
    rows = groups.flatten(-2)[..., : layout.length(like)]
    return rows.movedim(-1, layout.axis + 1).flatten(layout.axis, layout.axis + 1)


def nm_mask(score: Tensor, pattern: Pattern, layout: Layout) -> Tensor:
    """Where the ``n`` largest scores of every ``m`` are.

    Args:
        score: of the weight's shape, at least 0.
        pattern: what to keep.
        layout: how the weight lies.

    Returns:
        bool, of the shape of ``score``: exactly ``n`` of every full group, at most ``n`` of what is left
        over at the end of a vector. Of equal scores the first ones are kept.
    """
    groups = to_groups(score.detach(), layout, pattern.m, -math.inf)
    return from_groups(_largest(groups, pattern.n), layout, score)


def _largest(groups: Tensor, n: int) -> Tensor:
    m = groups.shape[-1]
    if m > _LONGEST_RANKED:
        order = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order, True)
    planes = groups.unbind(-1)
    # How many of its group come before a weight; of equals the first comes first.
    ranks: list[Tensor | int] = [m - 1 - i for i in range(m)]
    for i, j in itertools.combinations(range(m), 2):
        wins = (planes[i] >= planes[j]).to(torch.int8)
        ranks[i] = ranks[i] - wins
        ranks[j] = ranks[j] + wins
    return torch.stack([torch.as_tensor(rank) < n for rank in ranks], -1)


def choices(pattern: Pattern) -> Tensor:
    """All masks of one group: float ``[C(m, n), m]``, for 2:4 1100, 1010, 1001, 0110, 0101, 0011.

    Raises:
        UsageError: there are more than :data:`MAX_CHOICES`.
    """
    count = math.comb(pattern.m, pattern.n)
    if count > MAX_CHOICES:
        raise UsageError(
            f"a group of {pattern} has {count:,} masks to choose from, and at most {MAX_CHOICES} can be "
            "learned; take a smaller pattern such as 2:4 or 4:8"
        )
    return torch.from_numpy(patterns_of(pattern)).float()
