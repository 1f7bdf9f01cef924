"""Which pass breaks a model, and at which of its sites."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effic.backends import get_backend
from effic.compare import Bounds
from effic.guard import Accuracy
from effic.ir.errors import NotMeasuredError
from effic.ir.evaluate import Oracle, distances, load_inputs
from effic.ir.model import Model, describe
from effic.optimize import load
from effic.partial import Partial, partial
from effic.passes.base import Pass
from effic.passes.calibration import SAMPLES, Calibration
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes, to_text
from effic.trial import Outcome, Trial

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finding:
    """What :func:`bisect` found.

    Attributes:
        broken: whether the whole sequence breaks the bound at all.
        sentence: what was found, in a sentence.
        evaluations: how often a model was judged.
        step: text form of the pass at fault, ``lower`` for the target's own work, or None.
        number: of the pass, from 1; 0 for none and for lowering.
        sites: the site at fault, or none where the pass cannot be taken apart.
        alone: whether it breaks the bound alone; else it is where most of the damage is done.
        node: the first node whose value moved far, where no site could be named.
        reason: what is broken at that point, as a phrase.
        figures: how the model fared just before and just after.
        passes: text form of the sequence that leaves the site out, ready to run, or None.
        mended: whether the pass keeps the bound without that site; None where no site was found.
        sites_in_all: sites of the pass at fault.
    """

    broken: bool
    sentence: str
    evaluations: int
    step: str | None = None
    number: int = 0
    sites: tuple[str, ...] = ()
    alone: bool = False
    node: str | None = None
    reason: str | None = None
    figures: tuple[str, str] = ("", "")
    passes: str | None = None
    mended: bool | None = None
    sites_in_all: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


def bisect(
    source: str | os.PathLike[str] | Model,
    passes: str | Sequence[Pass],
    *,
    bounds: Bounds | None = None,
    accuracy: Accuracy | None = None,
    target: str | None = None,
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    calib: Any = None,
    calib_samples: int | None = None,
    calib_window: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Finding:
    """Find the pass, then the site, that breaks a bound.

    The sequence is run once and the model kept after each pass (weights are shared, so that costs
    little). Where the model turns from good to bad is found by halving, and so is the site: the pass is
    applied to half of its sites, then to half of the half that breaks the bound. With ``P`` passes and
    ``S`` sites that takes about ``log2(P) + 2·log2(S)`` evaluations.

    Args:
        source: an ``.onnx`` file or a model, which is left as it is.
        passes: the sequence, as text or passes.
        bounds: how far the outputs may lie from the original's; or
        accuracy: a metric, its data and how much may be lost.
        target: lower each model for it before it is judged; None judges models as they are written.
        inputs: for ``bounds``: arrays by name or an ``.npz`` file; seeded ones by default.
        calib, calib_samples, calib_window: as :func:`effic.optimize` takes them.
        seed: of seeded inputs and of the choice of samples.
        progress: called with what is done, evaluations so far, and how many are expected.

    Raises:
        UsageError: no bound, or one that nothing can break.
        NotMeasuredError: the original cannot be run.
        CheckFailedError: the original is outside the bound already, or a pass makes an invalid model.
    """
    sequence = parse_passes(passes) if isinstance(passes, str) else list(passes)
    original = load(source)
    model = original.clone()
    backend = None if target is None else get_backend(target)
    arrays = load_inputs(inputs) if isinstance(inputs, (str, os.PathLike)) else inputs
    trial = Trial(original, bounds=bounds, accuracy=accuracy, backend=backend, inputs=arrays, seed=seed)
    calibration = None
    if calib is not None:
        calibration = Calibration.load(
            calib,
            model,
            samples=SAMPLES if calib_samples is None else calib_samples,
            seed=seed,
            window=calib_window,
        )
    states = [original]
    run_passes(
        model,
        sequence,
        check="off",
        calibration=calibration,
        after_pass=lambda made, item, number: states.append(made.clone()),
        progress=progress,
    )
    search = _Search(trial, progress, len(sequence))
    return search.run(sequence, states, calibration, target)


class _Search:
    def __init__(self, trial: Trial, progress: Progress | None, passes: int) -> None:
        self.trial, self._progress = trial, progress
        self.expected = 2 + passes.bit_length()

    def judge(self, model: Model, text: str) -> Outcome:
        if self._progress is not None:
            self._progress(text, self.trial.evaluations, max(self.expected, self.trial.evaluations + 1))
        return self.trial(model)

    def run(
        self, sequence: list[Pass], states: list[Model], calibration: Calibration | None, target: str | None
    ) -> Finding:
        last = self.judge(states[-1], "the whole sequence")
        if last.reason is None:
            sentence = f"nothing to find: the whole sequence keeps the bound ({last.text})"
            return Finding(False, sentence, self.trial.evaluations, figures=("", last.text))
        first = self.judge(states[0], "no pass at all")
        if first.reason is not None:
            text = "the target's own work" if target is not None else "running the model"
            sentence = f"{text} breaks the bound already, without any pass: {first.reason}"
            return Finding(
                True,
                sentence,
                self.trial.evaluations,
                step="lower",
                reason=first.reason,
                figures=("", first.text),
            )
        good, bad, before, after = 0, len(sequence), first, last
        while bad - good > 1:
            middle = (good + bad) // 2
            found = self.judge(states[middle], f"the first {middle} passes")
            if found.reason is None:
                good, before = middle, found
            else:
                bad, after = middle, found
        item = sequence[bad - 1]
        return self._site(sequence, bad, item, states[good], states[bad], before, after, calibration)

    def _site(
        self,
        sequence: list[Pass],
        number: int,
        item: Pass,
        old: Model,
        new: Model,
        before: Outcome,
        after: Outcome,
        calibration: Calibration | None,
    ) -> Finding:
        parts = partial(item, old, new, calibration)
        count = 0 if parts is None else len(parts.sites)
        sites: tuple[str, ...] = ()
        alone, node = False, None
        if parts is not None and count > 1:
            self.expected = self.trial.evaluations + 2 * count.bit_length()
            sites, alone = self._halve(parts)
        elif parts is not None:
            sites, alone = tuple(parts.sites), True
        else:
            node = self._first_node(old, new)
        mended = None
        if parts is not None and sites:
            rest = set(parts.sites) - set(sites)
            mended = self.judge(parts.apply(rest), "without the site").reason is None
        text = to_text(item)
        spared = None if parts is None or not sites else parts.skip(sites)
        passes = None
        if spared is not None:
            texts = [to_text(p) for p in sequence]
            passes = ",".join([*texts[: number - 1], spared, *texts[number:]])
        where = ""
        if alone:
            where = f", at '{sites[0]}'" + (f" (one of its {count} sites)" if count > 1 else "")
        elif sites:
            where = (
                f"; none of its {count} sites does so alone, and '{sites[0]}' contributes most of those tried"
            )
        elif node is not None:
            where = f"; the first value that moved is made by {node}"
        sentence = f"pass {number} of {len(sequence)}, {text}, breaks the bound{where}: {after.reason}"
        return Finding(
            True,
            sentence,
            self.trial.evaluations,
            step=text,
            number=number,
            sites=sites,
            alone=alone,
            node=node,
            reason=after.reason,
            figures=(before.text, after.text),
            passes=passes,
            mended=mended,
            sites_in_all=count,
        )

    def _halve(self, parts: Partial) -> tuple[tuple[str, ...], bool]:
        """The site at fault, and whether it breaks the bound alone."""
        suspects = list(parts.sites)
        alone = True
        while len(suspects) > 1:
            halves = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
            first = self.judge(parts.apply(set(halves[0])), f"{len(halves[0])} of {len(parts.sites)} sites")
            if first.reason is not None:
                suspects = halves[0]
                continue
            second = self.judge(parts.apply(set(halves[1])), f"{len(halves[1])} of {len(parts.sites)} sites")
            if second.reason is None:
                # Neither half alone: the damage adds up. Go where there is more of it.
                alone = False
            suspects = halves[0] if first.badness > second.badness else halves[1]
        return tuple(suspects), alone

    def _first_node(self, old: Model, new: Model) -> str | None:
        """The first node of ``new`` whose value moved at least half as far as the one that moved furthest."""
        try:
            inputs = self.trial.inputs()
            want, got = (Oracle(_tapped(model)).run(inputs) for model in (old, new))
        except NotMeasuredError:
            # A value that is no tensor cannot be tapped; then the pass alone is named.
            return None
        moved = {
            name: math.inf if d.shape_mismatch or d.new_nonfinite else d.max_rel
            for name, d in distances(want, got)
        }
        worst = max(moved.values(), default=0.0)
        for node in new.graph:
            if worst > 0 and any(moved.get(str(v.name), 0.0) >= worst / 2 for v in node.outputs):
                return describe(node)
        return None


def _tapped(model: Model) -> Model:
    copy = model.clone()
    have = {v.name for v in copy.graph.outputs}
    for node in copy.graph:
        copy.graph.outputs.extend(v for v in node.outputs if v.name and v.name not in have)
    return copy
