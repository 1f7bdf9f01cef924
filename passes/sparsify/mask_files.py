"""Masks from a file: as booleans, or as the number of each group's pattern."""

from __future__ import annotations

import itertools

import numpy as np

from effic.ir.errors import UsageError
from effic.ir.sparsity import Pattern, from_reduction, reduction_length
from effic.ir.weights import WeightSite
from effic.passes.calibration_files import read_arrays

# Beyond so many patterns of a group their numbers are nobody's way of writing masks.
_MOST_PATTERNS = 1 << 16


def read_masks(path: str) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` or ``.safetensors`` file, by name of the weight.

    Raises:
        UsageError: there is no such file, or it cannot be read.
    """
    if not path.endswith((".npz", ".safetensors")):
        raise UsageError(f"{path} is no file of masks; give an .npz or .safetensors file")
    # Of their own: torch takes no arrays that it could not write to.
    return {name: np.array(array) for name, array in read_arrays(path, "the masks in").items()}


def patterns_of(pattern: Pattern) -> np.ndarray:
    """All masks of a group, bool ``[C(m, n), m]``, in the order 1100, 1010, 1001, 0110, 0101, 0011.

    The order of Fang et al., "MaskLLM" (arXiv 2409.17481).

    Raises:
        UsageError: there are too many of them to be numbered.
    """
    made = list(itertools.islice(itertools.combinations(range(pattern.m), pattern.n), _MOST_PATTERNS + 1))
    if len(made) > _MOST_PATTERNS:
        raise UsageError(f"{pattern} has too many masks to number them; give masks as booleans")
    table = np.zeros((len(made), pattern.m), bool)
    table[np.arange(len(made))[:, None], np.array(made)] = True
    return table


def mask_of(site: WeightSite, array: np.ndarray, pattern: Pattern) -> np.ndarray | str:
    """A mask laid out as the stored matrix, or why there is none.

    Args:
        site: the weight.
        array: booleans (or zeros and ones) of the shape of the weight as stored, or integers
            ``[rows, C / m]``: for every vector of :func:`~effic.ir.sparsity.by_reduction` and group the
            number of its pattern, see :func:`patterns_of`.
        pattern: what it has to follow.
    """
    length = reduction_length(site)
    if array.shape == site.shape:
        if array.dtype != bool and not np.isin(array, (0, 1)).all():
            return "is of the shape of the weight, but holds other values than 0 and 1"
        return array.astype(bool).reshape(site.matrix_shape)
    rows = site.elements // length
    if length % pattern.m == 0 and array.shape == (rows, length // pattern.m):
        table = patterns_of(pattern)
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= len(table):
            return f"numbers patterns of {pattern} otherwise than from 0 to {len(table) - 1}"
        mask = from_reduction(site, table[array].reshape(rows, length))
        return mask if site.in_axis == 1 else np.ascontiguousarray(mask.T)
    return (
        f"has the shape {list(array.shape)}, neither that of the weight, {list(site.shape)}, nor a number for "
        f"each of {rows} x {length} / {pattern.m} groups"
    )
