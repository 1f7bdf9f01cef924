"""Masks of a pruned model, and files of masks as ``apply-masks`` reads them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from effic.backends.torch.sparse_training.masks import MAX_CHOICES, Layout, choices, to_groups
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.safetensors_format import write_safetensors
from effic.ir.sparsity import Pattern, declared
from effic.ir.weights import weight_sites


def masks_of(model: Model) -> dict[str, np.ndarray]:
    """Where a pruned model's weights are not zero: every weight that declares a pattern, by name, as stored."""
    wanted = declared(model)
    found = {}
    for site in weight_sites(model):
        if site.name in wanted:
            with site.matrix() as matrix:
                found[site.name] = (matrix != 0).reshape(site.shape)
    return found


def numbered(mask: Tensor, pattern: Pattern, layout: Layout) -> np.ndarray | None:
    """A mask as the number of each group's pattern, uint8 ``[rows, C / m]``.

    None where groups cannot be numbered: a last one is short, or some keep another number than ``n``, or
    there are too many patterns, or a transposed convolution's groups come in another order in the file.
    """
    if layout.length(mask) % pattern.m or layout.blocks > 1 or math.comb(pattern.m, pattern.n) > MAX_CHOICES:
        return None
    groups = to_groups(mask.float(), layout, pattern.m)
    agreement = groups @ choices(pattern).to(groups).T
    if not ((agreement.amax(-1) == pattern.n) & (groups.sum(-1) == pattern.n)).all():
        return None
    return agreement.argmax(-1).flatten(0, -2).to(torch.uint8).cpu().numpy()


def write_masks(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write masks, bools or pattern numbers by name of the weight.

    Raises:
        UsageError: the file's name ends neither in ``.npz`` nor in ``.safetensors``.
    """
    ending = os.path.splitext(os.fspath(path))[1]
    if ending == ".npz":
        with open(path, "wb") as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    elif ending == ".safetensors":
        write_safetensors(path, arrays, {"format": "np"})
    else:
        raise UsageError(f"masks are kept in .npz or .safetensors files, and '{os.fspath(path)}' is neither")
