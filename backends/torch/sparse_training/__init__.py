"""Training sparse models: recipes that bring a module's weights to N:M, and masks that are learned.

>>> training = SRSTE(n=2, m=4).attach(module)
>>> for batch in batches:
...     loss(module, batch).backward(); optimizer.step(); optimizer.zero_grad(); training.step()
>>> finished = training.finish()
"""

from __future__ import annotations

from effic.backends.torch.sparse_training.bdwp import BDWP
from effic.backends.torch.sparse_training.mask_files import masks_of
from effic.backends.torch.sparse_training.mask_learning import MaskLLM, learn_masks
from effic.backends.torch.sparse_training.recipes import SRSTE, STE, MdGf, Recipe, SdGf
from effic.backends.torch.sparse_training.training import Finished, Layer, SparseTraining, finish
from effic.backends.torch.sparse_training.weights import Weight, weights
from effic.passes.sparsify.mask_files import read_masks

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
