"""apply-masks: prune by masks that were made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.sparsity import Pattern, along_groups, declare, violations
from effic.ir.weights import WeightSite, weight_sites
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.sparsify.mask_files import mask_of, read_masks
from effic.passes.sparsify.one_shot import Before, report, say_dense
from effic.passes.sparsify.scores import Kept, NotFiniteError, pruned_blocks


@dataclass(frozen=True)
class ApplyMasks(Pass):
    """Zero the weights that masks from a file leave out.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, w2), w2 = w where the mask is true, else 0

    The file holds an array for every weight to prune, under the weight's name: booleans of its shape, or
    numbers of patterns, ``[rows, inputs / m]``, in the order 1100, 1010, 1001, 0110, 0101, 0011 (learned
    masks, Fang et al., NeurIPS 2024, arXiv 2409.17481). Masks have to follow n:m. What is stored and what
    it does for speed are as in prune-magnitude.

    Missed when the weight cannot be rewritten, is encoded already or read as something else, when the mask
    does not fit it or the pattern, and for names of masks that no weight has.
    """

    name: ClassVar[str] = "apply-masks"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    masks: str = option(help="the .npz or .safetensors file", example="masks.npz")
    n: int = option(2, help="weights kept of every m consecutive inputs of an output channel", ge=1)
    m: int = option(4, help="weights in a group", ge=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            Pattern(self.n, self.m)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def apply(self, model: Model, remarks: Remarks) -> None:
        masks = read_masks(self.masks)
        for site in weight_sites(model):
            array = masks.pop(site.name, None)
            if array is None:
                continue
            mask = self._mask(site, array)
            if isinstance(mask, str):
                remarks.missed(site.name, mask)
            elif _is_applied(site, mask):
                declare(model, site.name, Pattern(self.n, self.m))
                remarks.missed(site.name, "is zero already wherever its mask is")
            else:
                self._apply(model, site, mask, remarks)
        for name in masks:
            remarks.missed(name, f"has a mask in {self.masks}, but is no weight of the model")
        say_dense(remarks)

    def _mask(self, site: WeightSite, array: np.ndarray) -> np.ndarray | str:
        """The mask of a weight as its stored matrix, or why it is not pruned."""
        pattern = Pattern(self.n, self.m)
        if site.encoding is not None:
            return f"is already encoded, in {site.encoding.bits} bits; prune first, then encode"
        if site.why_not is not None:
            return site.why_not
        if site.other_readers:
            return f"is read by {site.other_readers[0]} as well, which would see the zeros"
        mask = mask_of(site, array, pattern)
        if isinstance(mask, str):
            return f"its mask {mask}"
        broken, groups = violations(along_groups(site, mask), pattern, axis=1)
        if broken:
            return f"its mask keeps more than {pattern} in {broken:,} of {groups:,} groups"
        return mask

    def _apply(self, model: Model, site: WeightSite, mask: np.ndarray, remarks: Remarks) -> None:
        pattern, kept, flags = Pattern(self.n, self.m), Kept(), along_groups(site, mask)
        try:
            with site.matrix() as matrix:
                blocks = pruned_blocks(
                    along_groups(site, matrix), pattern.m, lambda _, where: flags[where], kept
                )
                tensor = model.scratch.streamed(site.name, site.dtype, site.shape, blocks)
        except NotFiniteError:
            remarks.missed(site.name, "holds a weight that is infinite or not a number")
            return
        site.replace(tensor)
        declare(model, site.name, pattern)
        report(remarks, site, pattern, kept, "mask", Before(site, None))


def _is_applied(site: WeightSite, mask: np.ndarray) -> bool:
    with site.matrix() as matrix:
        return not matrix[~mask].any()
