"""MaskLLM: the weights stay, masks are learned as choices among all patterns of a group."""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from effic.backends.torch.sparse_training.masks import Layout, choices, from_groups, nm_mask, to_groups
from effic.backends.torch.sparse_training.parametrization import Mask, masked_places, original
from effic.backends.torch.sparse_training.recipes import Recipe
from effic.backends.torch.sparse_training.schedules import Clock, linear
from effic.backends.torch.sparse_training.training import Overrides, SparseTraining
from effic.backends.torch.sparse_training.weights import Weight
from effic.ir.errors import UsageError
from effic.ir.sparsity import Pattern

Prior = Mapping[str, np.ndarray | Tensor] | Literal["magnitude"] | None


@dataclasses.dataclass(frozen=True)
class MaskLLM(Recipe):
    """Learnable masks over frozen weights (arXiv 2409.17481).

    Every group has a logit per pattern. In training mode the layer reads W m with the soft mask
    m = sum_k softmax((kappa pi + Gumbel noise) / tau)_k pattern_k; in eval mode it reads what would be
    baked: the pattern of the largest logit. All other parameters are frozen until ``finish()``, and the
    weights that stay are bit for bit what they were; optimize ``training.parameters()``, the logits.

    The regulariser, - lambda sum ||W m||² in the loss, keeps large weights, so that gradients do not
    vanish. Its gradient is added in the backward pass: nothing has to be added to the loss.

    Attributes:
        n: weights kept of a group.
        m: weights in a group.
        steps: optimizer steps; ``kappa``, ``tau`` and lambda go linearly from their first value to
            their last (lambda to 0) over them.
        kappa: what logits are multiplied by.
        tau: temperature.
        regulariser: lambda at the start.
        prior_strength: how much a prior mask counts, in standard deviations of the logits.
        spread: standard deviation of the logits at the start.
        seed: of the logits at the start; the noise comes from torch's own generator.
    """

    freezes: ClassVar[bool] = True

    steps: int = 2000
    kappa: tuple[float, float] = (1e2, 5e2)
    tau: tuple[float, float] = (4.0, 0.05)
    regulariser: float = 1e-5
    prior_strength: float = 3.0
    spread: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices(self.pattern)
        if self.steps < 1:
            raise UsageError(f"steps={self.steps} teaches no mask; give 1 or more")
        for name in ("kappa", "tau"):
            if not min(getattr(self, name)) > 0:
                raise UsageError(f"{name}={getattr(self, name)} must stay above 0")

    def attach(
        self,
        module: nn.Module,
        *,
        skip: Sequence[str] = (),
        overrides: Overrides | None = None,
        first_conv: bool = False,
        head: bool = False,
        prior: Prior = "magnitude",
    ) -> SparseTraining:
        """Put learnable masks on the weights of a module; see :meth:`Recipe.attach`.

        Args:
            module: changed in place, until ``finish()``.
            skip: names of weights to leave alone.
            overrides: other patterns by names.
            first_conv: take the convolution that sees the input as well.
            head: take the layer that scores a language model's vocabulary as well.
            prior: what masks lean to at the start: the largest weights, or masks by name of the weight,
                bools of its shape or pattern numbers (those of a pruned model, ``masks_of``, or of a
                file, ``read_masks``). Weights that it does not name start without.

        Raises:
            UsageError: also: a prior mask has another shape than its weight.
            UnsupportedError: no weight can be pruned.
        """
        training = super().attach(module, skip=skip, overrides=overrides, first_conv=first_conv, head=head)
        try:
            for name, (place, mask) in masked_places(module).items():
                if (
                    isinstance(mask, LearnedMask)
                    and (given := _prior(prior, name, original(place), mask)) is not None
                ):
                    mask.lean(given, self.prior_strength)
        except UsageError:
            training.abandon()
            raise
        return training

    def mask(self, weight: Weight, pattern: Pattern) -> Mask:
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(weight.name.encode()))
        return LearnedMask(pattern, weight.layout, weight.tensor, self.spread, generator)

    def adjust(self, mask: Mask, clock: Clock) -> None:
        if isinstance(mask, LearnedMask):
            mask.kappa.fill_(linear(*self.kappa, clock.step, self.steps))
            mask.tau.fill_(linear(*self.tau, clock.step, self.steps))
            mask.regulariser.fill_(linear(self.regulariser, 0.0, clock.step, self.steps))


class LearnedMask(Mask):
    """A mask chosen among all patterns of each group, by logits.

    Args:
        pattern: how many to keep.
        layout: how the weight lies.
        like: the weight.
        spread: standard deviation of the logits.
        generator: of the logits.
    """

    kappa: Tensor
    tau: Tensor
    regulariser: Tensor
    choices: Tensor
    closed: Tensor | None

    def __init__(
        self, pattern: Pattern, layout: Layout, like: Tensor, spread: float, generator: torch.Generator
    ) -> None:
        super().__init__(pattern, layout)
        groups = to_groups(like.detach(), layout, pattern.m)
        table = choices(pattern)
        self.shape = groups.shape[:-1]
        first = torch.randn(math.prod(self.shape), len(table), generator=generator) * spread
        self.logits = nn.Parameter(first)
        self.register_buffer("choices", table, persistent=False)
        self.register_buffer("closed", _closed(table, pattern, layout.length(like)), persistent=False)
        for name in ("kappa", "tau", "regulariser"):
            self.register_buffer(name, torch.ones(()), persistent=False)

    def lean(self, prior: Tensor, strength: float) -> None:
        """Add to the logits of the patterns that agree with a mask of the weight's shape.

        pi_k += std(pi) strength (<pattern_k, prior> - n / 2).
        """
        groups = to_groups(prior.to(self.logits), self.layout, self.pattern.m)
        with torch.no_grad():
            agreement = groups.flatten(0, -2) @ self.choices.T - self.pattern.n / 2
            self.logits.add_(self.logits.std() * strength * agreement)

    def soft(self, like: Tensor) -> Tensor:
        """A soft mask with fresh noise, of the shape of the weight; groups sum to ``n``."""
        noise = -torch.empty_like(self.logits).exponential_().log()
        scores = self._open(self.kappa * self.logits + noise) / self.tau
        # In half precision the mask of a group would no longer sum to n.
        with torch.autocast(like.device.type, enabled=False):
            return self._mask(scores.softmax(-1) @ self.choices, like)

    def kept(self, weight: Tensor) -> Tensor:
        choice = self._open(self.logits.detach()).argmax(-1)
        return self._mask(self.choices[choice], weight) > 0

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return torch.where(self.kept(weight), weight, 0.0)
        mask: Tensor = _Regularised.apply(  # type: ignore[no-untyped-call]
            self.soft(weight), weight.detach(), self.regulariser
        )
        return weight * mask.to(weight.dtype)

    def _open(self, scores: Tensor) -> Tensor:
        """Scores per group, ``[…, G, K]``, without the patterns that a last short group cannot have."""
        scores = torch.unflatten(scores, 0, self.shape)
        return scores if self.closed is None else scores.masked_fill(self.closed, -math.inf)

    def _mask(self, groups: Tensor, like: Tensor) -> Tensor:
        return from_groups(groups, self.layout, like)


class _Regularised(torch.autograd.Function):
    """The mask m as it is; its gradient gets that of - lambda ||W m||²: - 2 lambda W² m."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(mask, weight, factor)
        return mask.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        mask, weight, factor = ctx.saved_tensors
        return gradient - 2 * factor * weight.to(mask.dtype).square() * mask, None, None


def _closed(table: Tensor, pattern: Pattern, length: int) -> Tensor | None:
    """Patterns ``[G, K]`` that would spend what they keep on the padding of the last, short group."""
    short = length % pattern.m
    if not short:
        return None
    closed = torch.zeros(-(-length // pattern.m), len(table), dtype=torch.bool)
    closed[-1] = table[:, :short].sum(-1) < min(pattern.n, short)
    return closed


def _prior(prior: Prior, name: str, weight: Tensor, mask: LearnedMask) -> Tensor | None:
    if prior is None:
        return None
    if isinstance(prior, str):
        if prior != "magnitude":
            raise UsageError(
                f"there is no prior '{prior}'; give 'magnitude', None, or masks by name of the weight"
            )
        return nm_mask(weight.detach().abs(), mask.pattern, mask.layout)
    given = prior.get(name)
    if given is None:
        return None
    tensor = torch.as_tensor(given).to(weight.device)
    if tensor.shape == weight.shape:
        return tensor != 0
    numbered = (math.prod(mask.shape[:-1]), mask.shape[-1])
    if (
        tensor.shape != numbered
        or tensor.is_floating_point()
        or tensor.min() < 0
        or tensor.max() >= len(mask.choices)
    ):
        raise UsageError(
            f"the prior mask of '{name}' has shape {list(tensor.shape)}; give bools of the weight's, "
            f"{list(weight.shape)}, or the number of each group's pattern, {list(numbered)}"
        )
    return from_groups(torch.unflatten(mask.choices[tensor.long()], 0, mask.shape[:-1]), mask.layout, weight)


def learn_masks(
    training: SparseTraining,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    rate: float = 5e-4,
    clip: float = 1.0,
) -> list[float]:
    """Learn the masks of a small model: AdamW with the paper's settings, one step per batch.

    beta (0.9, 0.95), eps 1e-5, weight decay 0.1, gradients clipped, the rate falling to a tenth along
    a cosine. The module's training mode is left as it was; the masks are soft meanwhile.

    Args:
        training: what ``MaskLLM.attach`` handed back; ``finish()`` is left to the caller.
        batches: gone through again and again until ``steps`` are made.
        loss: of the module and a batch.
        rate: the first learning rate of the logits; 5e-4 for 2000 steps, more for fewer.
        clip: largest norm of the gradient.

    Returns:
        The loss of every step.

    Raises:
        UsageError: the recipe is not MaskLLM, or there are no batches.
    """
    if not isinstance(training.recipe, MaskLLM):
        raise UsageError(
            "masks are learned with MaskLLM; other recipes train the weights, in a loop of your own"
        )
    steps = training.recipe.steps
    parameters = list(training.parameters())
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 10)
    masks = [mask for _, mask in masked_places(training.module).values()]
    modes = [mask.training for mask in masks]
    losses: list[float] = []
    for mask in masks:
        mask.train()
    for batch in itertools.islice(_again(batches), steps - training.clock.step):
        optimizer.zero_grad()
        found = loss(training.module, batch)
        found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        training.step()
        losses.append(float(found.detach()))
    for mask, mode in zip(masks, modes, strict=True):
        mask.train(mode)
    return losses


def _again(batches: Iterable[Any]) -> Iterable[Any]:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise UsageError(
                "there are no batches to learn masks from; give a list, not an iterator that is used up"
            )
