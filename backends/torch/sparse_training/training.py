"""A module that is being trained with masks: attach, step, finish."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effic.backends.torch.sparse_training.mask_files import numbered, write_masks
from effic.backends.torch.sparse_training.parametrization import (
    Mask,
    masked_places,
    original,
    put_on,
    take_off,
)
from effic.backends.torch.sparse_training.schedules import Clock
from effic.backends.torch.sparse_training.weights import Weight, weights
from effic.backends.torch.to_module import RECORD
from effic.ir.errors import CheckFailedError, UnsupportedError, UsageError
from effic.ir.model import Model
from effic.ir.sparsity import Pattern, along_groups, declare, violations
from effic.ir.weights import weight_sites

if TYPE_CHECKING:
    from effic.backends.torch.sparse_training.recipes import Recipe

Overrides = Mapping[str, str | Pattern | None]


@dataclasses.dataclass(frozen=True)
class Ends:
    """Whether the layers at a network's ends are taken, which usually stay dense.

    Attributes:
        first_conv: the convolution that sees the input itself.
        head: the linear layer that scores a language model's vocabulary.
    """

    first_conv: bool = False
    head: bool = False


@dataclasses.dataclass(frozen=True)
class Layer:
    """What became of one weight.

    Attributes:
        pattern: the pattern it follows.
        density: kept weights by all weights.
        kept_energy: their squares by all squares, before the others were set to zero.
    """

    pattern: Pattern
    density: float
    kept_energy: float


@dataclasses.dataclass(frozen=True)
class Finished:
    """A training that is over.

    Attributes:
        layers: every pruned weight, by its name in the state dict.
        initializers: what a weight is called in the model, where ``to_module`` could not keep the name.
    """

    layers: Mapping[str, Layer]
    initializers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def declare(self, model: Model) -> list[str]:
        """Write into a model that these weights follow their patterns, after checking that they do.

        Args:
            model: the trained module captured, or what ``read_back`` made of the model it was built from.

        Returns:
            Names of weights that the model has, but not where a pattern can be seen: behind the call of a
            function. They are not declared.

        Raises:
            UsageError: the model has no weight of such a name.
            CheckFailedError: a weight does not follow its pattern; nothing was declared.
        """
        sites = {site.name: site for site in weight_sites(model) if site.shape}
        constants = {name for graph in (model.graph, *model.graph.subgraphs()) for name in graph.initializers}
        layers = {self.initializers.get(name, name): layer for name, layer in self.layers.items()}
        for name, layer in layers.items():
            if name not in sites:
                if name not in constants:
                    raise UsageError(
                        f"the model has no weight '{name}'; give the model of the trained module"
                    )
                continue
            site = sites[name]
            with site.matrix() as matrix:
                broken, groups = violations(along_groups(site, matrix), layer.pattern, axis=1)
            if broken:
                raise CheckFailedError(
                    f"weight '{name}' breaks the {layer.pattern} pattern in {broken:,} of {groups:,} groups; "
                    "give what read_back() returns after finish()"
                )
        for name in layers.keys() & sites.keys():
            declare(model, name, layers[name].pattern)
        return sorted(layers.keys() - sites.keys())


class SparseTraining:
    """A recipe at work on a module: what ``Recipe.attach`` hands back.

    Attributes:
        recipe: what masks do, and when.
        module: the module whose weights are masked.
        patterns: the pattern each masked weight ends with, by its name in the state dict.
        skipped: weights left alone, and why.
        notes: what the recipe had to change for single weights.
        clock: steps and epochs so far.
    """

    def __init__(
        self, recipe: Recipe, module: nn.Module, *, skip: Sequence[str], overrides: Overrides, ends: Ends
    ) -> None:
        if any(True for _ in _masks(module)):
            raise UsageError("the module already has a recipe; call finish() on that one first")
        chosen, skipped = _choose(recipe, module, skip, overrides, ends)
        self.recipe, self.module, self.skipped = recipe, module, skipped
        self.patterns = {weight.name: pattern for weight, pattern in chosen}
        self.clock = Clock()
        self.notes: dict[str, str] = {}
        self._finished = False
        self._frozen: list[nn.Parameter] = []
        for weight, pattern in chosen:
            if note := recipe.note(pattern, weight.layout.length(weight.tensor)):
                self.notes[weight.name] = note
        if recipe.freezes:
            self._frozen = [p for p in module.parameters() if p.requires_grad]
        # Before any mask is on: each changes the order of its owner's parameters.
        siblings = {
            id(place.owner): tuple(place.owner._parameters) for weight, _ in chosen for place in weight.places
        }
        for weight, pattern in chosen:
            mask = recipe.mask(weight, pattern)
            mask.siblings = siblings[id(weight.places[0].owner)]
            mask.to(weight.tensor.device)
            for place in weight.places:
                put_on(place, mask)
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._update()

    def step(self) -> None:
        """Count an optimizer step; call it after each ``optimizer.step()``.

        Raises:
            UsageError: the recipe is finished.
        """
        self._refuse_finished("step()")
        if self.recipe.sparse(self.clock):
            self.clock.sparse += 1
        self.clock.step += 1
        self._update()

    def end_epoch(self) -> None:
        """Count an epoch; schedules in epochs go by it.

        Raises:
            UsageError: the recipe is finished.
        """
        self._refuse_finished("end_epoch()")
        self.clock.epoch += 1
        self._update()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is to be trained: for learned masks the masks alone, else the module's parameters."""
        return (p for p in self.module.parameters() if p.requires_grad)

    def masks(self) -> dict[str, Tensor]:
        """The masks as they would be baked now: bool, of the shape of each weight, by name."""
        self._refuse_finished("masks()")
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, (place, mask) in masked_places(self.module).items():
            weight = original(place)
            if id(weight) not in seen:
                seen.add(id(weight))
                found[name] = mask.kept(weight)
        return found

    def save_masks(self, path: str | os.PathLike[str]) -> None:
        """Write the masks as they would be baked now, for ``apply-masks`` to read.

        Each as the number of every group's pattern, one byte per group, where groups can be numbered, and
        as bools elsewhere.

        Raises:
            UsageError: the file ends neither in ``.npz`` nor in ``.safetensors``, or the recipe is finished.
        """
        masks, found = self.masks(), masked_places(self.module)
        arrays = {}
        for name, kept in masks.items():
            mask = found[name][1]
            numbers = numbered(kept, mask.pattern, mask.layout)
            arrays[name] = kept.cpu().numpy() if numbers is None else numbers
        write_masks(path, arrays)

    def finish(self) -> Finished:
        """Set pruned weights to zero and take the masks off; the module is a plain one again.

        Its state dict has the keys it had, in their order, and its parameters are the same objects, so
        an optimizer goes on. What was frozen may be trained again.

        Raises:
            UsageError: finished before.
            CheckFailedError: a weight holds NaN or infinity; nothing was changed.
        """
        self._refuse_finished("finish()")
        finished = finish(self.module)
        self._close()
        return finished

    def abandon(self) -> None:
        """Take the masks off and leave the weights as they are now.

        Raises:
            UsageError: finished before.
        """
        self._refuse_finished("abandon()")
        for place, _ in masked_places(self.module).values():
            take_off(place)
        self._close()

    def _close(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the module's and the optimizer's state."""
        return {"recipe": repr(self.recipe), **dataclasses.asdict(self.clock)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            UsageError: it is the state of another recipe, or the recipe is finished.
        """
        self._refuse_finished("load_state_dict()")
        if state.get("recipe") != repr(self.recipe):
            raise UsageError(f"this is the state of {state.get('recipe')}, and the recipe is {self.recipe!r}")
        self.clock = Clock(**{field.name: int(state[field.name]) for field in dataclasses.fields(Clock)})
        self._update()

    def _update(self) -> None:
        for place, mask in masked_places(self.module).values():
            length = mask.layout.length(original(place))
            mask.set_phase(self.recipe.phase(self.clock, mask.pattern, length))
            self.recipe.adjust(mask, self.clock)

    def _refuse_finished(self, what: str) -> None:
        if self._finished:
            raise UsageError(
                f"the recipe is finished, so {what} has nothing to do; attach a new one to train on"
            )


def finish(module: nn.Module) -> Finished:
    """Bake the masks of a module, also of a deep copy of the one a recipe was attached to.

    Raises:
        UsageError: the module has no masks.
        CheckFailedError: a weight holds NaN or infinity; nothing was changed.
    """
    found = masked_places(module)
    if not found:
        raise UsageError("the module has no masks; attach a recipe first, and finish it once")
    for name, (place, _) in found.items():
        if not torch.isfinite(original(place)).all():
            raise CheckFailedError(
                f"weight '{name}' holds NaN or infinity, so no mask is made of it; train with a lower rate"
            )
    layers: dict[str, Layer] = {}
    baked: set[int] = set()
    for name, (place, mask) in found.items():
        weight = original(place)
        if id(weight) not in baked:
            baked.add(id(weight))
            kept = mask.kept(weight)
            layers[name] = _bake(weight, kept, mask.pattern)
        take_off(place)
    record = getattr(module, "meta", {}).get(RECORD)
    renamed = (
        {} if record is None else {key: slot.name for key, slot in record.keys.items() if key != slot.name}
    )
    return Finished(layers, renamed)


def _bake(weight: nn.Parameter, kept: Tensor, pattern: Pattern) -> Layer:
    with torch.no_grad():
        energy = weight.float().square()
        share = torch.where(kept, energy, 0.0).sum() / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
        # Not a product: that would leave -0.0 behind, and the optimizer's parameter stays the object it is.
        weight.masked_fill_(~kept, 0.0)
    return Layer(pattern, float(kept.float().mean()), float(share))


def _masks(module: nn.Module) -> Iterator[Mask]:
    return (mask for _, mask in masked_places(module).values())


# -- which weights --------------------------------------------------------------------------------


def _choose(
    recipe: Recipe, module: nn.Module, skip: Sequence[str], overrides: Overrides, ends: Ends
) -> tuple[list[tuple[Weight, Pattern]], dict[str, str]]:
    found = weights(module)
    unmatched = [p for p in (*skip, *overrides) if not any(_matches(p, w.name) for w in found)]
    if unmatched:
        raise UsageError(
            f"'{unmatched[0]}' matches no weight of the module; they are called "
            f"{', '.join(w.name for w in found[:4])}{' …' if len(found) > 4 else ''}"
        )
    first, head = _ends(module, found)
    chosen: list[tuple[Weight, Pattern]] = []
    skipped: dict[str, str] = {}
    for weight in found:
        override = next((o for p, o in overrides.items() if _matches(p, weight.name)), recipe.pattern)
        pattern = Pattern.parse(override) if isinstance(override, str) else override
        if reason := _why_not(
            recipe, weight, pattern, skip, None if ends.first_conv else first, None if ends.head else head
        ):
            skipped[weight.name] = reason
        elif pattern is not None:
            chosen.append((weight, pattern))
    if not chosen:
        reasons = "; ".join(f"'{name}' {reason}" for name, reason in list(skipped.items())[:4])
        raise UnsupportedError(f"no weight of the module can be pruned: {reasons or 'it has none'}")
    return chosen, skipped


def _why_not(
    recipe: Recipe, weight: Weight, pattern: Pattern | None, skip: Sequence[str],
    first: Weight | None, head: Weight | None,
) -> str | None:  # fmt: skip
    if pattern is None or any(_matches(p, weight.name) for p in skip):
        return "is to be skipped"
    if weight.why_not is not None:
        return weight.why_not
    length = weight.layout.length(weight.tensor)
    if length == 1:
        return "belongs to a depthwise convolution: its sums are over one channel"
    if length < pattern.m:
        return f"has {length} input channels, fewer than a group of {pattern}"
    if weight is first:
        return "is the first convolution, which sees the input itself; ask for it with first_conv=True"
    if weight is head:
        return "scores the vocabulary (the head); ask for it with head=True"
    return recipe.why_not(weight, pattern)


def _ends(module: nn.Module, found: Sequence[Weight]) -> tuple[Weight | None, Weight | None]:
    """The first convolution, unless it is the only layer, and the head of a language model.

    A head is the last linear layer where it has as many outputs as an embedding has rows.
    """
    layers = [w for w in found if w.kind is not None]
    first = next((w for w in layers if w.kind == "Conv"), None) if len(layers) > 1 else None
    last = next((w for w in reversed(layers) if w.kind == "Linear"), None)
    tables = {w.tensor.shape[0] for w in found if w.table}
    if last is not None and last.why_not is None and last.layout.turned.length(last.tensor) not in tables:
        last = None
    return first, last


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)
