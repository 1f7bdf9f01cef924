"""Training with masks found anew from the weights at every step: STE, SR-STE, MdGf, SdGf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from effic.backends.torch.sparse_training.parametrization import Mask
from effic.backends.torch.sparse_training.schedules import (
    Clock,
    Phase,
    Unit,
    boundaries,
    geometric,
    last_begun,
    mask_decay,
    stepwise,
)
from effic.backends.torch.sparse_training.training import Ends, Overrides, SparseTraining
from effic.backends.torch.sparse_training.weights import Weight
from effic.ir.errors import UsageError
from effic.ir.sparsity import Pattern


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How weights come to keep ``n`` of every ``m``, along the dimension their layer sums over.

    Attributes:
        n: weights kept of a group.
        m: weights in a group.

    Raises:
        UsageError: not 0 < n < m.
    """

    freezes: ClassVar[bool] = False
    """Whether everything but the masks is held as it is."""

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        Pattern(self.n, self.m)

    @property
    def pattern(self) -> Pattern:
        """The pattern weights end with."""
        return Pattern(self.n, self.m)

    def attach(
        self,
        module: nn.Module,
        *,
        skip: Sequence[str] = (),
        overrides: Overrides | None = None,
        first_conv: bool = False,
        head: bool = False,
    ) -> SparseTraining:
        """Put masks on the weights of a module.

        Weights of linear layers, matrix products and convolutions are taken, except those of embeddings,
        of the first convolution and a language model's head, of depthwise convolutions, and those with
        fewer input channels than a group has weights. ``skipped`` of what is handed back has the reasons.

        Args:
            module: changed in place, until ``finish()``: any ``nn.Module``, also what ``to_module`` made.
            skip: names of weights, as in the state dict, to leave alone; ``*`` and ``?`` as in file names.
            overrides: other patterns (``"1:4"``; None to skip) by names written the same way; the first
                match counts.
            first_conv: take the convolution that sees the input as well.
            head: take the layer that scores a language model's vocabulary as well.

        Raises:
            UsageError: the module already has a recipe, or a name matches nothing.
            UnsupportedError: no weight can be pruned; the text says why.
        """
        ends = Ends(first_conv, head)
        return SparseTraining(self, module, skip=skip, overrides=overrides or {}, ends=ends)

    # -- what a recipe may decide, called by SparseTraining ---------------------------------------

    def mask(self, weight: Weight, pattern: Pattern) -> Mask:
        """The mask of a weight."""
        return Mask(pattern, weight.layout)

    def phase(self, clock: Clock, pattern: Pattern, length: int) -> Phase:
        """What the mask of a weight with vectors of ``length`` is like now."""
        return Phase(pattern)

    def adjust(self, mask: Mask, clock: Clock) -> None:
        """Bring up to date what a phase does not say."""

    def sparse(self, clock: Clock) -> bool:
        """Whether weights have masks now."""
        return True

    def why_not(self, weight: Weight, pattern: Pattern) -> str | None:
        """Why the recipe cannot take a weight, as a phrase, or None."""
        return None

    def note(self, pattern: Pattern, length: int) -> str | None:
        """What has to be done differently for a weight with vectors of ``length``."""
        return None


@dataclasses.dataclass(frozen=True)
class STE(Recipe):
    """Straight-through estimator: the layer reads m W, the gradient goes to all of W as it is."""


@dataclasses.dataclass(frozen=True)
class SRSTE(Recipe):
    """Sparse-refined straight-through estimator (arXiv 2102.04010).

    The gradient of W is G + decay (1 - m) W, added in the backward pass, so that momentum sees it: it
    pulls pruned weights to zero, and masks settle. Once per use of a weight and backward pass, and
    outside any loss scaling: with a ``GradScaler`` multiply ``decay`` by the scale.

    Attributes:
        decay: lambda_w.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay >= 0:
            raise UsageError(f"decay={self.decay} would drive pruned weights away from zero; give 0 or more")

    def mask(self, weight: Weight, pattern: Pattern) -> Mask:
        return Mask(pattern, weight.layout, decay=self.decay)


@dataclasses.dataclass(frozen=True)
class MdGf(Recipe):
    """Mask-decay gradient flow (arXiv 2402.04744): pruned weights fade instead of vanishing.

    The layer reads W (m + beta (1 - m)); beta is 1 in the dense phase, then max(1 - rho t, 0) or
    exp(-rho t) with t the optimizer steps since the dense phase, then 0.

    Attributes:
        kind: how beta falls.
        decay: length of the phase in which it does, in ``unit``; from its end on beta is 0, which makes
            the result valid: the exponential never gets there by itself.
        dense: length of the dense phase, in ``unit``.
        rho: by default beta reaches 0 (linear) or 0.01 (exp) at the end of the decay phase; to be given
            when phases are counted in epochs, of which no recipe knows how many steps they have.
        grad_mode: ``ste``: the gradient of what the layer reads is handed to W as it is, as in the
            paper's code; ``exact``: the chain rule's.
        unit: what ``decay`` and ``dense`` count.
    """

    kind: Literal["linear", "exp"] = "linear"
    decay: int = 1000
    dense: int = 0
    rho: float | None = None
    grad_mode: Literal["ste", "exact"] = "ste"
    unit: Unit = "step"

    _LEAST: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, kind=("linear", "exp"), grad_mode=("ste", "exact"), unit=("step", "epoch"))
        _lengths(self, decay=1, dense=0)
        if self.rho is None and self.unit == "epoch":
            raise UsageError("MdGf counts beta in optimizer steps; with unit='epoch' give rho as well")
        if self.rho is not None and not self.rho > 0:
            raise UsageError(f"with rho={self.rho} pruned weights would never fade; give a number above 0")

    def mask(self, weight: Weight, pattern: Pattern) -> Mask:
        return Mask(pattern, weight.layout, exact=self.grad_mode == "exact")

    def sparse(self, clock: Clock) -> bool:
        return clock.now(self.unit) >= self.dense

    def phase(self, clock: Clock, pattern: Pattern, length: int) -> Phase:
        now = clock.now(self.unit)
        if now < self.dense:
            return Phase(None, 1.0)
        if now >= self.dense + self.decay:
            return Phase(pattern)
        rho = self.rho
        if rho is None:
            rho = (1.0 if self.kind == "linear" else -math.log(self._LEAST)) / self.decay
        return Phase(pattern, mask_decay(self.kind, rho, clock.sparse))


@dataclasses.dataclass(frozen=True)
class SdGf(Recipe):
    """Structure-decay gradient flow (arXiv 2402.04744): patterns that tighten, with straight-through gradients.

    ``stepwise``: (M-1):M, M/2:M, M/4:M … N:M; M/N is a power of two. ``geometric``: kN:kM, kN/2:kM/2 …
    N:M, the same density in ever shorter groups. Each pattern has an equal share of what ``dense`` and
    ``finetune`` leave of ``total``; the last one also has ``finetune`` and all that comes after.

    Attributes:
        total: length of the training, in ``unit``.
        kind: which patterns.
        dense: length of a phase without masks at the start.
        finetune: length of a phase with N:M at the end.
        k: geometric: a power of two, 8 in the paper's code. Where kM does not divide a weight's vectors,
            that weight starts with the longest groups that do.
        unit: what lengths count.
    """

    total: int = 1000
    kind: Literal["stepwise", "geometric"] = "stepwise"
    dense: int = 0
    finetune: int = 0
    k: int = 8
    unit: Unit = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, kind=("stepwise", "geometric"), unit=("step", "epoch"))
        _lengths(self, total=1, dense=0, finetune=0)
        if self.k < 1 or self.k & (self.k - 1):
            raise UsageError(f"k={self.k} cannot be halved down to 1; give a power of two")
        boundaries(self.intervals(self.pattern), self.dense, self.total - self.finetune)

    def patterns(self, pattern: Pattern, length: int) -> list[Pattern]:
        """The patterns of a weight with vectors of ``length``, one per interval."""
        return stepwise(pattern) if self.kind == "stepwise" else geometric(pattern, self.k, length)

    def intervals(self, pattern: Pattern) -> int:
        """How many patterns there are."""
        return len(self.patterns(pattern, 0))

    def sparse(self, clock: Clock) -> bool:
        return clock.now(self.unit) >= self.dense

    def phase(self, clock: Clock, pattern: Pattern, length: int) -> Phase:
        patterns = self.patterns(pattern, length)
        starts = boundaries(len(patterns), self.dense, self.total - self.finetune)
        begun = last_begun(starts, clock.now(self.unit))
        return Phase(None, 1.0) if begun is None else Phase(patterns[begun])

    def why_not(self, weight: Weight, pattern: Pattern) -> str | None:
        # The recipe's own pattern was checked when it was made; an override's was not.
        boundaries(self.intervals(pattern), self.dense, self.total - self.finetune)
        return None

    def note(self, pattern: Pattern, length: int) -> str | None:
        wanted, first = Pattern(pattern.n * self.k, pattern.m * self.k), self.patterns(pattern, length)[0]
        if self.kind == "stepwise" or first == wanted:
            return None
        return f"starts with {first}: groups of {wanted.m} do not divide its vectors of {length}"


def _one_of(recipe: Recipe, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        if (value := getattr(recipe, name)) not in allowed:
            raise UsageError(
                f"{type(recipe).__name__} has no {name} '{value}'; there are {', '.join(allowed)}"
            )


def _lengths(recipe: Recipe, **least: int) -> None:
    for name, lowest in least.items():
        if (value := getattr(recipe, name)) < lowest:
            raise UsageError(f"{name}={value} is no length of a phase; give {lowest} or more")
