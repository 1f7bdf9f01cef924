"""prune-magnitude: keep the largest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effic.ir.model import Model
from effic.passes.base import Remarks
from effic.passes.sparsify.one_shot import Before, OneShot, prune, report, say_dense
from effic.passes.sparsify.scores import NotFiniteError


@dataclass(frozen=True)
class PruneMagnitude(OneShot):
    """Keep the n largest of every m weights along the inputs, and zero the others.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, w2), in each column of w2 at most n of every m weights not zero

    Needs no data. Among all weights that follow the pattern the result is the nearest to the original.
    Groups run along the dimension that the operator sums over: along the input channels, for a
    convolution at each place of the kernel, inside its convolution group. Where the number of inputs is
    no multiple of m, at most n of the last ones stay. Of equal weights the first ones stay. With
    ``density`` the largest of the whole weight stay, wherever they lie. The result is stored as dense
    weights, and the pattern is declared in the model's metadata: later passes and compress-nm read it.

    Zeros alone make no runtime faster that has no kernels for them; ONNX Runtime on a CPU has none.

    Missed when the weight is computed at run time, may be overridden by the caller, is encoded already,
    follows the pattern already, holds NaN or infinity, is read as something else or both ways round, has
    fewer input channels than a group (depthwise convolutions have one), and for embeddings, the first
    convolution and the head of a language model, unless they are asked for.
    """

    name: ClassVar[str] = "prune-magnitude"

    def apply(self, model: Model, remarks: Remarks) -> None:
        for site, target in self.sites(model, remarks):
            try:
                kept = prune(model, site, target, None, "matrix")
            except NotFiniteError:
                remarks.missed(site.name, "holds a weight that is infinite or not a number")
                continue
            report(remarks, site, target, kept, "magnitude", Before(site, None))
        say_dense(remarks)
