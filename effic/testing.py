"""The conformance kit: what every pass and target of effic holds to, for those of other packages too.

Plain functions that raise AssertionError with one sentence, to be called from any test runner; importing this
module imports no test runner. With pytest::

    @pytest.mark.parametrize("model", seeded_models(), ids=MODELS)
    def test_conformance(model):
        check_pass(MyPass(), model)
"""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effic.backends import get_backend
from effic.backends.base import Backend
from effic.folder_build import pinned
from effic.ir.evaluate import Distance, compare_outputs, seeded_inputs
from effic.ir.model import Model
from effic.ir.verify import problems
from effic.passes.base import CalibratedPass, Numerics, Pass, Remark, Remarks, options_of
from effic.passes.calibration import Calibration
from effic.passes.pipeline import Checker, Step, fingerprint, judge, run_passes
from effic.passes.spec import parse_passes, to_text

MODELS = ("cnn", "control_flow", "encoder", "functions", "grouped_transposed", "llama", "shared_weights")
"""Names of the seeded models: convolutions with batch norms, attention, If and Loop, functions, shared weights."""

SUMMARY_LENGTH = 100
"""Characters of a summary: the first line of a docstring, as ``effic passes`` lists it."""


def seeded_model(name: str, seed: int = 0) -> Model:
    """One of the small seeded models, fresh.

    Args:
        name: one of :data:`MODELS`.
        seed: of its weights.
    """
    from effic.models.builders import BUILDERS

    return Model(BUILDERS[name](seed))


def seeded_models(seed: int = 0) -> list[Model]:
    """All of the seeded models, fresh, in the order of :data:`MODELS`."""
    return [seeded_model(name, seed) for name in MODELS]


def made_up_data(model: Model, *passes: Pass) -> Calibration | None:
    """Four random samples, where one of the passes may look at data."""
    if not any(isinstance(item, CalibratedPass) for item in passes):
        return None
    return Calibration.load("random", model, samples=4)


def check_documented(cls: type[Pass]) -> None:
    """A pass is a frozen dataclass that says what it does, with a help text for every option.

    Raises:
        AssertionError: the docstring lacks Before, After or Missed, its first line is missing or too long
            for a list, an option has no help, the class is not frozen, or has no name or numerics.
    """
    _expect(dataclasses.is_dataclass(cls), f"{cls.__name__} is no dataclass; write @dataclass(frozen=True)")
    _expect(cls.__dataclass_params__.frozen, f"{cls.__name__} is not frozen; write @dataclass(frozen=True)")  # type: ignore[attr-defined]
    _expect(isinstance(getattr(cls, "name", None), str), f"{cls.__name__} has no name")
    _expect(isinstance(getattr(cls, "numerics", None), Numerics), f"{cls.name} does not say its numerics")
    # Not inspect.getdoc: that takes the docstring of Pass for want of another.
    text = inspect.cleandoc(cls.__doc__ or "")
    for word, meaning in (
        ("Before", "what it looks for"),
        ("After", "what becomes of it"),
        ("Missed", "when it leaves it alone"),
    ):
        _expect(word in text, f"the docstring of {cls.name} has no '{word}', which says {meaning}")
    summary = text.partition("\n")[0]
    _expect(
        0 < len(summary) <= SUMMARY_LENGTH,
        f"the first line of {cls.name}'s docstring has {len(summary)} characters, 1 to {SUMMARY_LENGTH} can be listed",
    )
    _check_help(cls)


def check_text_form(item: Pass) -> None:
    """The text form leads back to the pass, and so do recipes, records and the command line.

    The pass has to be known by its name: one of effic's, or an entry point of an installed package.

    Raises:
        AssertionError: it leads to another pass.
        UsageError: it does not parse.
    """
    text = to_text([item])
    found = parse_passes(text)
    _expect(found == [item], f"{text} parses to {found}")


def check_pass(item: Pass, model: Model, data: Calibration | None = None) -> Step:
    """Run a pass on a model, which is rewritten, and check all it promises.

    The result is valid; outputs moved no further than the pass's numerics allow, by the oracle; inputs and
    outputs keep their names; every remark says where and why; what changed is remarked on; a second run
    changes nothing.

    Args:
        item: the pass.
        model: rewritten in place.
        data: calibration data; random samples for a pass that needs some when None.

    Returns:
        What the first run did: whether it changed anything, its remarks and verdict.

    Raises:
        AssertionError: one of these does not hold.
        CheckFailedError: outputs moved too far, or the structure is broken.
    """
    ends = _ends(model)
    data = made_up_data(model, item) if data is None else data
    step = run_passes(model, [item], checker=Checker(model), calibration=data).steps[0]
    for problem in problems(model):
        raise AssertionError(f"after {item.name}: {problem}")
    kept = _ends(model)
    if item.adds_inputs:
        kept = (kept[0][: len(ends[0])], kept[1])
    _expect(kept == ends, f"{item.name} changed the model's inputs or outputs from {ends} to {kept}")
    _check_remarks(item.name, step.remarks)
    if step.changed:
        _expect(bool(step.remarks), f"{item.name} changed the model and left no remark")
    else:
        _expect(not step.passed, f"{item.name} says it did something and changed nothing: {step.remarks[:3]}")
    again = run_passes(model, [item], check="off", calibration=data).steps[0]
    done = [f"{r.where}: {r.text}" for r in again.remarks if r.kind == "passed"][:3]
    _expect(not again.changed, f"{item.name} is not idempotent: run again, it changed {done or 'the model'}")
    return step


def check_refused(item: Pass, model: Model, reason: str, data: Calibration | None = None) -> Remark:
    """A pass leaves a model alone, and says why.

    Args:
        item: the pass.
        model: one that has nothing for it but what it refuses.
        reason: words of the reason, as its remark has them.
        data: calibration data, as for :func:`check_pass`.

    Returns:
        The remark with the reason.

    Raises:
        AssertionError: it changed the model, or no *missed* remark has the words.
    """
    step = check_pass(item, model, data)
    _expect(not step.changed, f"{item.name} changed what it has to refuse")
    missed = [remark for remark in step.remarks if remark.kind == "missed"]
    for remark in missed:
        if reason in remark.text:
            return remark
    raise AssertionError(f"{item.name} does not say {reason!r}, it says {[r.text for r in missed]}")


def check_target(target: Backend, model: Model, *, least_sqnr_db: float = 30.0) -> Distance:
    """Lower a model for a target, save it, run it there, and compare with the original by the oracle.

    Args:
        target: the target.
        model: rewritten in place.
        least_sqnr_db: how near the outputs have to stay, as a ratio of signal to noise.

    Returns:
        The distance of the outputs.

    Raises:
        AssertionError: the target is not documented, its text form leads elsewhere, the lowered model is
            broken, lowering again changes it, or its outputs are too far off.
    """
    cls = type(target)
    _expect(bool(inspect.cleandoc(cls.__doc__ or "")), f"the target {cls.name} has no docstring")
    _check_help(cls)
    _expect(get_backend(target.text) == target, f"{target.text} leads to another target")
    sizes = target.sizes(model)
    checker, ends = Checker(model, seeded_inputs(pinned(model, sizes)) if sizes else None), _ends(model)
    remarks = Remarks()
    target.lower(model, remarks)
    model.forget_names()
    for problem in problems(model):
        raise AssertionError(f"lowered for {target.text}: {problem}")
    _expect(_ends(model) == ends, f"lowering for {target.text} changed the model's inputs or outputs")
    _check_remarks(target.text, remarks.items)
    mark = fingerprint(model)
    target.lower(model, Remarks())
    _expect(fingerprint(model) == mark, f"lowering for {target.text} a second time changes the model")
    with tempfile.TemporaryDirectory(prefix="effic-") as folder:
        path = Path(folder) / ("lowered" if target.is_folder else "lowered.onnx")
        target.build(model, path)
        got: Mapping[str, Any] = target.load(path).run(checker.inputs)
    distance = compare_outputs(checker.original, got)
    verdict = judge(distance, Numerics.LOSSY, 0.0)
    _expect(
        not verdict.startswith("broken") and (distance.exact or distance.sqnr_db >= least_sqnr_db),
        f"on {target.text}: {verdict}, wanted is {least_sqnr_db} dB",
    )
    return distance


def _ends(model: Model) -> tuple[list[str | None], list[str | None]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]


def _check_help(cls: type[Any]) -> None:
    for field, _ in options_of(cls):
        _expect(
            bool(field.metadata.get("help")), f"{cls.name}.{field.name} has no help; make it with option()"
        )


def _check_remarks(name: str, remarks: list[Remark]) -> None:
    for remark in remarks:
        _expect(bool(remark.where.strip()), f"{name} has a remark that names no place: {remark.text!r}")
        _expect(bool(remark.text.strip()), f"{name} has a remark without a reason, at {remark.where}")


def _expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence)
