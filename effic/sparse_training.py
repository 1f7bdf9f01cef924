"""Training sparse torch modules: ``effic.sparse_training.SRSTE(n=2, m=4).attach(module)``.

The work is in :mod:`effic.backends.torch.sparse_training`; importing this imports torch.
"""

from __future__ import annotations

from effic.ir.errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Training sparse modules") from error

from effic.backends.torch.sparse_training import (
    BDWP,
    SRSTE,
    STE,
    Finished,
    Layer,
    MaskLLM,
    MdGf,
    Recipe,
    SdGf,
    SparseTraining,
    Weight,
    finish,
    learn_masks,
    masks_of,
    read_masks,
    weights,
)

__all__ = [
    "BDWP",
    "SRSTE",
    "STE",
    "Finished",
    "Layer",
    "MaskLLM",
    "MdGf",
    "Recipe",
    "SdGf",
    "SparseTraining",
    "Weight",
    "finish",
    "learn_masks",
    "masks_of",
    "read_masks",
    "weights",
]
