"""Files of masks: which weights stay, by name of the weight, in ``.npz`` or ``.safetensors``.

A mask is a bool array of the weight's shape under the weight's name. A mask that keeps exactly ``n`` of
every ``m`` may instead be stored as one byte per group: uint8 ``[A, G, B]`` under ``<name>.pattern``, where
the weight is seen as ``[A, C, B]`` with G groups along C, each byte a position in the list of patterns in
lexicographic order (2:4: 1100, 1010, 1001, 0110, 0101, 0011). The entry ``effic.masks``, JSON in the
metadata of a safetensors file and a string in an npz, then has its pattern and shape.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.model import Model
from effic.ir.safetensors_format import read_safetensors, write_safetensors
from effic.ir.sparsity import Pattern, declared
from effic.ir.weights import weight_sites

MASKS_KEY = "effic.masks"
SUFFIX = ".pattern"

MAX_CANDIDATES = 256
"""Patterns that a byte can tell apart: 4:8 has 70, 5:10 has 252."""


class Grouping(NamedTuple):
    """How groups lie in a weight: along ``axis``, which ``blocks`` pieces divide that no group crosses."""

    pattern: Pattern
    axis: int
    blocks: int = 1


def candidates(pattern: Pattern) -> np.ndarray:
    """All masks of one group, in lexicographic order: bool ``[C(m, n), m]``.

    Raises:
        UsageError: there are more than :data:`MAX_CANDIDATES`.
    """
    count = math.comb(pattern.m, pattern.n)
    if count > MAX_CANDIDATES:
        raise UsageError(
            f"a group of {pattern} has {count:,} masks to choose from, and {MAX_CANDIDATES} are the most that "
            "can be learned or stored by number; take a smaller pattern such as 2:4 or 4:8"
        )
    found = np.zeros((count, pattern.m), bool)
    for row, kept in enumerate(itertools.combinations(range(pattern.m), pattern.n)):
        found[row, list(kept)] = True
    return found


def to_indices(mask: np.ndarray, grouping: Grouping) -> np.ndarray:
    """A mask as the number of each group's pattern: uint8 ``[A, G, B]``.

    Raises:
        UsageError: a group does not keep exactly ``n`` (a last short one: as many of them as it has).
    """
    pattern, choices = grouping.pattern, candidates(grouping.pattern)
    seen = mask.reshape(_seen_as(mask.shape, grouping))
    a, c, b = seen.shape
    found = np.empty((a, -(-c // pattern.m), b), np.uint8)
    for group, start in enumerate(range(0, c, pattern.m)):
        part = seen[:, start : start + pattern.m]
        length = part.shape[1]
        wrong = np.stack([(part != row[:length, None]).any(1) for row in choices])
        if wrong.all(0).any() or (part.sum(1) != min(length, pattern.n)).any():
            raise UsageError(f"the mask does not keep exactly {pattern} of every group; store it as bools")
        found[:, group] = wrong.argmin(0)
    return found


def from_indices(indices: np.ndarray, shape: tuple[int, ...], grouping: Grouping) -> np.ndarray:
    """The inverse of :func:`to_indices`: bool of the weight's shape.

    Raises:
        UsageError: indices and shape do not fit, or an index is too large.
    """
    pattern, choices = grouping.pattern, candidates(grouping.pattern)
    a, c, b = _seen_as(shape, grouping)
    if indices.shape != (a, -(-c // pattern.m), b) or (indices >= len(choices)).any():
        raise UsageError(
            f"pattern numbers of shape {list(indices.shape)} are no {pattern} mask of shape {list(shape)}"
        )
    groups = np.moveaxis(choices[indices], 3, 2)
    return groups.reshape(a, -1, b)[:, :c].reshape(shape)


def _seen_as(shape: tuple[int, ...], grouping: Grouping) -> tuple[int, int, int]:
    axis, blocks = grouping.axis, grouping.blocks
    if not (0 <= axis < len(shape) and blocks > 0 and shape[axis] % blocks == 0):
        raise UsageError(f"axis {axis} in {blocks} pieces is no axis of a weight of shape {list(shape)}")
    return math.prod(shape[:axis]) * blocks, shape[axis] // blocks, math.prod(shape[axis + 1 :])


def write_masks(
    path: str | os.PathLike[str],
    masks: Mapping[str, np.ndarray],
    groupings: Mapping[str, Grouping] | None = None,
) -> None:
    """Write masks to a ``.npz`` or ``.safetensors`` file.

    Args:
        path: of the file.
        masks: bool, of the weight's shape, by name of the weight.
        groupings: those to store as a byte per group.

    Raises:
        UsageError: the file's name has another ending, or a mask does not fit its grouping.
    """
    arrays: dict[str, np.ndarray] = {}
    header: dict[str, Any] = {}
    for name, mask in masks.items():
        grouping = (groupings or {}).get(name)
        if grouping is None:
            arrays[name] = np.asarray(mask, bool)
            continue
        arrays[name + SUFFIX] = to_indices(np.asarray(mask, bool), grouping)
        header[name] = {
            "pattern": str(grouping.pattern), "axis": grouping.axis, "blocks": grouping.blocks,
            "shape": list(mask.shape),
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), sort_keys=True)
    if _ending(path) == ".npz":
        extra = {MASKS_KEY: np.array(text)} if header else {}
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays, **extra)
    else:
        write_safetensors(path, arrays, {MASKS_KEY: text} if header else {})


def read_masks(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The masks of a file: bool, of the weight's shape, by name of the weight.

    Raises:
        UsageError: there is no such file, or its name has another ending.
        InvalidModelError: it is damaged, or holds something other than masks.
    """
    if _ending(path) == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except OSError as error:
            raise UsageError(f"cannot read {os.fspath(path)}: {error.strerror or error}.") from error
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InvalidModelError(f"{os.fspath(path)} is no npz file of plain arrays: {error}.") from error
        text = str(arrays.pop(MASKS_KEY, "{}"))
    else:
        found = read_safetensors(path)
        arrays, text = found.tensors, found.metadata.get(MASKS_KEY, "{}")
    try:
        header = json.loads(text)
        return {
            name.removesuffix(SUFFIX) if name in _numbered(header) else name: _mask(name, array, header)
            for name, array in arrays.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UsageError) as error:
        raise InvalidModelError(f"{os.fspath(path)} holds no masks: {error}") from error


def _numbered(header: Mapping[str, Any]) -> set[str]:
    return {name + SUFFIX for name in header}


def _mask(name: str, array: np.ndarray, header: Mapping[str, Any]) -> np.ndarray:
    if name in _numbered(header):
        row = header[name.removesuffix(SUFFIX)]
        grouping = Grouping(Pattern.parse(row["pattern"]), int(row["axis"]), int(row["blocks"]))
        return from_indices(array, tuple(int(d) for d in row["shape"]), grouping)
    if array.dtype != bool and not (array.dtype.kind in "iu" and ((array == 0) | (array == 1)).all()):
        raise ValueError(f"'{name}' has elements of type {array.dtype}, and a mask is of bools.")
    return np.array(array, bool)


def masks_of(model: Model) -> dict[str, np.ndarray]:
    """Where a pruned model's weights are not zero: every weight that declares a pattern, by name, as stored."""
    wanted = declared(model)
    found = {}
    for site in weight_sites(model):
        if site.name in wanted:
            with site.matrix() as matrix:
                found[site.name] = (matrix != 0).reshape(site.shape)
    return found


def _ending(path: str | os.PathLike[str]) -> str:
    ending = os.path.splitext(os.fspath(path))[1]
    if ending not in (".npz", ".safetensors"):
        raise UsageError(f"masks are kept in .npz or .safetensors files, and '{os.fspath(path)}' is neither")
    return ending
