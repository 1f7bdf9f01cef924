"""What permute-channels asks of a weight: where channels lie in its groups, and what they score."""

from __future__ import annotations

import numpy as np

from effic.ir.sparsity import Pattern, by_reduction, reduction_length
from effic.ir.weights import WeightSite
from effic.passes.sparsify.permutation_search import content_keys


def reduction_axis(site: WeightSite) -> tuple[int, int]:
    """The axis of the stored weight that is summed over, and how many of it one output sees.

    (Of a grouped ConvTranspose's input channels an output sees those of its group.)
    """
    if site.kind in ("Conv", "ConvTranspose"):
        return (1 if site.kind == "Conv" else 0), reduction_length(site)
    return site.in_axis, reduction_length(site)


def columns_of(places: np.ndarray, size: int, length: int, pattern: Pattern) -> np.ndarray | str | None:
    """Where some channels lie, if reordering them moves single weights between groups of m.

    Args:
        places: int ``[copies, channels]``, where they are on the axis.
        size: length of the axis.
        length: groups of m begin anew after so many.
        pattern: its m.

    Returns:
        ``places``; None when the channels fill whole groups, which would move as they are; or the reason
        why neither is so, as a phrase about the channels.
    """
    index = np.arange(size)
    group = index // length * -(-length // pattern.m) + index % length // pattern.m
    members = np.bincount(group)
    label = np.full(size, -1)
    label[places] = np.arange(places.shape[1])
    low, high = (np.full(len(members), start) for start in (size, -2))
    np.minimum.at(low, group, label)
    np.maximum.at(high, group, label)
    if (low == high).all() and (members[low >= 0] == pattern.m).all():
        return None
    chunk = np.arange(places.shape[1]) // pattern.m
    together = (group[places] == group[places[:, chunk * pattern.m]]).all()
    if together and (members[group[places]] == np.bincount(chunk)[chunk]).all():
        return places
    return f"share groups of {pattern.m} with channels that move apart from them"


def scores(site: WeightSite, places: np.ndarray, norms: np.ndarray | None) -> np.ndarray:
    """Scores with a column for each of some channels.

    Args:
        site: a weight that sums over them.
        places: int ``[copies, channels]``, where they are on the axis that is summed over.
        norms: of the inputs, ``[G·K]`` as :class:`~effic.passes.statistics.SiteStatistics` has them, or
            None for ``|w|`` alone.

    Returns:
        float32 ``[rows, channels]``, a row per vector of weights that groups run along.
    """
    matrix = site.read()
    np.abs(matrix, out=matrix)
    if norms is not None:
        groups = site.groups if site.kind == "Conv" else 1
        with np.errstate(over="ignore"):
            matrix = (matrix.reshape(groups, -1, matrix.shape[1]) * norms.reshape(groups, 1, -1)).reshape(
                matrix.shape
            )
    if site.kind == "Conv":
        matrix = by_reduction(site, matrix)
    if len(places) == 1 and np.array_equal(places[0], np.arange(matrix.shape[1])):
        return matrix
    return np.concatenate([matrix[:, where] for where in places])


def sampled_rows(matrix: np.ndarray, count: int) -> np.ndarray:
    """Some rows of a matrix, spread evenly over large and small ones; which, only their content decides."""
    order = np.lexsort(content_keys(matrix, 1))
    chosen: np.ndarray = matrix[order[np.linspace(0, len(matrix) - 1, count).round().astype(int)]]
    return chosen
