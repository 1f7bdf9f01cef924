"""The runner: apply passes one by one, and check, measure and record each. It knows no pass by name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import onnx_ir as ir

from effic.ir.cost import ModelCost, model_cost, weight_bytes
from effic.ir.errors import CheckFailedError, NotMeasuredError, UsageError
from effic.ir.evaluate import (
    Distance,
    Oracle,
    comparable,
    compare_outputs,
    computes_in_half,
    distances,
    rounding_tolerance,
    runnable_inputs,
)
from effic.ir.memory import available_memory, peak_memory, release_memory, reset_peak_memory
from effic.ir.model import Model, PassRecord, describe
from effic.ir.verify import required_signature, signature, verify
from effic.passes.base import CalibratedPass, Numerics, Pass, Remark, Remarks
from effic.passes.kept_patterns import DeclaredPatterns
from effic.passes.spec import to_text

if TYPE_CHECKING:
    from effic.passes.calibration import Calibration
    from effic.passes.finished import FinishedSites

Progress = Callable[[str, int, int], None]
Check = Literal["each", "final", "off"]


@dataclasses.dataclass(frozen=True)
class Instead:
    """Another pass to run in place of one that is undone, and why."""

    item: Pass
    reason: str


Keep = Callable[[Model, Model, Pass, "Step"], str | Instead | None]
"""Called with the model before a pass, the model after it, the pass and its step, where figures may be
noted: why what the pass did is to be undone, another pass to run instead, or None to keep it."""

# A run holds the weights, the runtime's own copies of some, and the activations.
RUN_MEMORY = 1.5


@dataclasses.dataclass
class Step:
    """What one pass did, as measured by the runner.

    Attributes:
        name: the pass (or ``lower``, the backend's work).
        text: its text form, options included.
        numerics: how far it may move numbers.
        changed: whether the graph differs at all from before.
        passed, missed: number of remarks of each kind.
        remarks: all of them.
        bytes_before, bytes_after: bytes of the weights as stored.
        nodes_before, nodes_after: nodes in all graphs.
        parameters, macs: of the result.
        verdict: what the check of the numbers found, in words.
        distance: the outputs' distance from those before the pass, or None when not run.
        seconds: time of the pass itself, without checks.
        peak_memory: largest resident set of the process during the pass, in bytes.
        data: sha256 of the calibration data it used, or None.
        calibration: what each look at the data was expected to take, in words.
        options: every option of the pass, by name.
        score: the metric's value after the pass, where one was asked for.
        rolled_back: why what the pass did was undone, or None.
        resumed: sites taken from an earlier run that was interrupted, None when there was none. Of a pass
            which that run had finished, ``seconds`` is the time it took there.
    """

    name: str
    text: str
    numerics: Numerics
    changed: bool = False
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    parameters: int = 0
    macs: int = 0
    verdict: str = "not checked"
    distance: Distance | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    data: str | None = None
    calibration: list[str] = dataclasses.field(default_factory=list)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    score: float | None = None
    rolled_back: str | None = None
    resumed: int | None = None

    @property
    def passed(self) -> int:
        """Places rewritten."""
        return sum(r.kind == "passed" for r in self.remarks)

    @property
    def missed(self) -> int:
        """Places looked at and left alone."""
        return sum(r.kind == "missed" for r in self.remarks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        row["numerics"] = self.numerics.value
        row["remarks"] = [dataclasses.asdict(r) for r in self.remarks]
        row["distance"] = None if self.distance is None else self.distance.to_dict()
        return {**row, "passed": self.passed, "missed": self.missed}


class Unfinished(Protocol):
    """What a run keeps of its work; :class:`effic.resume.Unfinished` does."""

    def sites(self, number: int, item: Pass) -> FinishedSites:
        """Where the weights are kept that a pass (its number from 0) is done with."""

    def done(self, number: int, step: Step) -> None:
        """Called after each pass."""


class Checker:
    """Judges numbers: runs the model on fixed inputs before the first pass and after each.

    Args:
        model: the model before the first pass.
        inputs: arrays by name, or None for seeded ones.
        seed: of the seeded inputs.

    Raises:
        NotMeasuredError: the model cannot be run, does not fit into memory, is random, or has no
            outputs to compare on these inputs.
    """

    def __init__(self, model: Model, inputs: Mapping[str, np.ndarray] | None = None, seed: int = 0) -> None:
        need, have = int(RUN_MEMORY * weight_bytes(model)), available_memory()
        if have is not None and need > have:
            raise NotMeasuredError(
                f"checking the numbers takes about {need / 1e9:.1f} GB of memory and {have / 1e9:.1f} GB are "
                "free; use a larger machine, or give --check off to go on without"
            )
        oracle = Oracle(model)
        if inputs is None:
            self.inputs, self.original = runnable_inputs(model, oracle, seed)
        else:
            self.inputs = dict(inputs)
            self.original = oracle.run(self.inputs)
        if not comparable(self.original):
            raise NotMeasuredError(
                "the model's outputs are empty or all NaN on these inputs, so there is nothing to compare; "
                "give others with --inputs data.npz, or --check off to go on without"
            )
        again = oracle.run(self.inputs)
        if not compare_outputs(self.original, again).exact:
            raise NotMeasuredError(
                "the model's outputs are random (two runs on the same inputs differ), so no pass can be "
                "checked; give --check off to go on without"
            )
        self.outputs = self.original

    def check(
        self, model: Model, numerics: Numerics, name: str, before: Model | None
    ) -> tuple[Distance, str]:
        """The distance from the last outputs, and the verdict in words.

        Raises:
            CheckFailedError: the outputs moved further than ``numerics`` allows.
        """
        got = self._run(model, name)
        if numerics is Numerics.EXACT and computes_in_half(model):
            numerics = Numerics.ROUNDING
        distance = compare_outputs(self.outputs, got)
        verdict = judge(distance, numerics, rounding_tolerance(model))
        if verdict.startswith("broken"):
            where = "" if before is None else self._first_difference(before, model, numerics)
            raise CheckFailedError(f"{name} broke the model: {verdict.removeprefix('broken: ')}{where}")
        self.outputs = got
        return distance, verdict

    def total(self) -> Distance:
        """Distance of the last outputs from the original model's."""
        return compare_outputs(self.original, self.outputs)

    def _run(self, model: Model, name: str) -> dict[str, np.ndarray]:
        try:
            return Oracle(model).run(self.inputs)
        except NotMeasuredError as error:
            # It ran before this pass: that it no longer does is the pass's doing.
            raise CheckFailedError(f"{name} broke the model: {error}") from error

    def _first_difference(self, before: Model, after: Model, numerics: Numerics) -> str:
        """Name the first node whose value, present in both models, moved too far."""
        tapped = []
        for model in (before, after):
            copy = model.clone()
            have = {v.name for v in copy.graph.outputs}
            for node in copy.graph:
                for value in node.outputs:
                    if value.name and value.name not in have:
                        copy.graph.outputs.append(value)
            tapped.append(copy)
        try:
            want, got = (Oracle(copy).run(self.inputs) for copy in tapped)
        except NotMeasuredError:
            # A value that is no tensor cannot be tapped; then the pass alone is named.
            return ""
        moved = dict(distances(want, got))
        tolerance = rounding_tolerance(after)
        for node in tapped[1].graph:
            for value in node.outputs:
                distance = moved.get(str(value.name))
                if distance is not None and judge(distance, numerics, tolerance).startswith("broken"):
                    return f"; the first value that moved is '{value.name}', made by {describe(node)}"
        return ""


def judge(distance: Distance, numerics: Numerics, tolerance: float) -> str:
    """The verdict on a distance; it begins with ``broken:`` when a pass may not do that.

    Args:
        distance: of the outputs after the pass from those before.
        numerics: the pass's class.
        tolerance: for ROUNDING, relative to an output's largest magnitude.
    """
    if distance.shape_mismatch:
        return f"broken: {distance.shape_mismatch}"
    if distance.new_nonfinite:
        return f"broken: {distance.new_nonfinite} output values became NaN or Inf"
    if distance.exact:
        return "exact"
    if numerics is Numerics.LOSSY:
        parts = [f"SQNR {distance.sqnr_db:.1f} dB", f"cos {distance.cosine:.4f}"]
        if distance.top1 is not None:
            parts.append(f"top-1 {100 * distance.top1:.0f} %")
        if distance.wrong_integers:
            parts.append(f"{distance.wrong_integers} integers differ")
        return ", ".join(parts)
    limit = 0.0 if numerics is Numerics.EXACT else tolerance
    if distance.wrong_integers:
        return f"broken: {distance.wrong_integers} integer outputs differ"
    text = f"outputs moved by {distance.max_rel:.1e} of their range, allowed is {limit:.0e}"
    return f"broken: {text}" if distance.max_rel > limit else f"rounding {distance.max_rel:.0e}"


@dataclasses.dataclass
class PipelineResult:
    """What a run of several passes did.

    Attributes:
        steps: one for each pass, in order.
        before, after: costs of the model.
        distance: of the outputs from the original's, or None when nothing was run.
    """

    steps: list[Step]
    before: ModelCost
    after: ModelCost
    distance: Distance | None


def run_passes(
    model: Model,
    passes: Sequence[Pass],
    *,
    check: Check = "each",
    checker: Checker | None = None,
    calibration: Calibration | None = None,
    require_change: bool = False,
    keep: Keep | None = None,
    after_pass: Callable[[Model, Pass, int], None] | None = None,
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
) -> PipelineResult:
    """Apply passes in order, in place; each is verified, checked, measured and recorded.

    Args:
        model: rewritten in place. After an error its state is undefined; nothing was saved.
        passes: in order.
        check: ``each`` runs the model after every pass that changed it, ``final`` once at the end,
            ``off`` never. The structure is verified after each pass in any case.
        checker: what runs the model; needed unless ``check`` is ``off``.
        calibration: samples for the passes that need to see data.
        require_change: a pass that changes nothing is an error.
        keep: asked after each pass that changed the model whether to keep that; a reason not to undoes it.
        after_pass: called with the model, the pass and its number (from 0) after each pass.
        progress: called with the pass's name, its number and how many there are.
        unfinished: where what is done is kept, and what an interrupted run had done is found.

    Raises:
        CheckFailedError: a pass broke the model, or changed nothing although it had to.
        NotMeasuredError: a check could not be carried out.
        UsageError: a pass needs calibration data and there are none; nothing was done.
    """
    if check != "off" and checker is None:
        raise UsageError(f"check={check!r} needs a checker")
    for item in passes:
        if isinstance(item, CalibratedPass):
            item.require_data(calibration)
    first = cost = model_cost(model)
    mark, opset = fingerprint(model), model.opset
    steps: list[Step] = []
    for number, item in enumerate(passes):
        if progress is not None:
            progress(item.name, number, len(passes))
        if calibration is not None:
            calibration.progress = _inside(progress, item.name, number, len(passes))
        judged = checker if check == "each" else None
        finished = None if unfinished is None else unfinished.sites(number, item)
        step, cost, mark = _run_one(model, item, cost, mark, judged, calibration, keep, finished)
        steps.append(step)
        if unfinished is not None:
            unfinished.done(number, step)
        if require_change and not step.changed:
            reason = step.rolled_back or next(
                (r.text for r in step.remarks if r.kind == "missed"), "nothing in the model matched"
            )
            raise CheckFailedError(f"{step.text} changed nothing, but a change was required: {reason}")
        if after_pass is not None:
            after_pass(model, item, number)
    distance = None
    if checker is not None and check != "off":
        if check == "final" and any(step.changed for step in steps):
            worst = max((p.numerics for p in passes), key=list(Numerics).index)
            if worst is Numerics.EXACT and model.opset != opset:
                worst = Numerics.ROUNDING  # see _at_opset
            steps[-1].distance, steps[-1].verdict = checker.check(
                model, worst, "the sequence of passes", None
            )
        distance = checker.total()
    return PipelineResult(steps, first, cost, distance)


def _inside(progress: Progress | None, name: str, number: int, total: int) -> Progress | None:
    """Progress of the calibration as progress of the pass it is for."""
    if progress is None:
        return None
    return lambda text, at, of: progress(
        f"{name}: {text}" + (f", {100 * at // of} %" if at and of else ""), number, total
    )


def _run_one(
    model: Model,
    item: Pass,
    cost: ModelCost,
    mark: int,
    checker: Checker | None,
    calibration: Calibration | None,
    keep: Keep | None,
    finished: FinishedSites | None = None,
) -> tuple[Step, ModelCost, int]:
    step = Step(item.name, to_text(item), item.numerics, options=dataclasses.asdict(item))
    step.bytes_before, step.nodes_before = cost.weight_bytes, cost.nodes
    # For naming the node at fault, for going back to the lower opset, and for undoing the pass.
    raises = item.needs_opset > model.opset
    before = model.clone() if checker is not None or raises or keep is not None else None
    shape = signature(model)
    patterns = DeclaredPatterns(model)
    remarks = Remarks(finished)
    release_memory()
    reset_peak_memory()
    began = time.perf_counter()
    reason = None
    if raises:
        from effic.ir.onnx_format import raise_opset

        reason = raise_opset(model, item.needs_opset)
        model.forget_names()
    if reason is None:
        if isinstance(item, CalibratedPass):
            _apply_with(model, item, calibration, remarks, step)
        else:
            item.apply(model, remarks)
        if raises and before is not None and not remarks.count("passed"):
            # The opset is raised only for a pass that makes use of it.
            model.ir = before.ir.clone()
    else:
        remarks.missed(f"opset {model.opset}", f"{item.name} needs opset {item.needs_opset}: {reason}")
    step.seconds = time.perf_counter() - began
    step.peak_memory = peak_memory()
    step.remarks = remarks.items
    model.forget_names()
    verify(model, f"after {item.name} the model")
    now = required_signature(model, shape) if item.adds_inputs else signature(model)
    if now != shape:
        changed = [b for a, b in zip(shape, now, strict=False) if a != b]
        raise CheckFailedError(f"{item.name} changed the model's inputs or outputs: {changed}")
    after = fingerprint(model)
    step.changed = after != mark
    if step.changed:
        patterns.check(model, remarks)
    if not step.changed:
        step.verdict = "unchanged"
    else:
        outputs = None if checker is None else checker.outputs
        if checker is not None:
            base = before
            if raises and before is not None and item.numerics is Numerics.EXACT:
                base = _at_opset(before, item.needs_opset, checker)
            step.distance, step.verdict = checker.check(model, item.numerics, item.name, base)
        verdict = None if keep is None or before is None else keep(before, model, item, step)
        if verdict is not None and before is not None:
            if checker is not None and outputs is not None:
                checker.outputs = outputs
            if isinstance(verdict, Instead):
                model.ir = before.ir.clone()
                model.forget_names()
                step, cost, after = _run_one(model, verdict.item, cost, mark, checker, calibration, keep)
                step.remarks.append(Remark("missed", to_text(item), verdict.reason))
                return step, cost, after
            step.rolled_back = verdict
            model.ir, after, step.changed = before.ir, mark, False
            model.forget_names()
            step.verdict = "rolled back"
        else:
            cost = model_cost(model, shapes=cost.shapes)
    step.bytes_after, step.nodes_after = cost.weight_bytes, cost.nodes
    step.parameters, step.macs = cost.parameters, cost.macs
    if step.changed:
        model.record.append(
            PassRecord(
                step.text,
                version("effic"),
                step.passed,
                step.missed,
                step.bytes_before,
                step.bytes_after,
                step.data,
            )
        )
    return step, cost, after


def _at_opset(before: Model, opset: int, checker: Checker) -> Model:
    """The model before a pass at the opset that the pass needs, with its outputs as what the pass is held to.

    ONNX Runtime has other kernels for later versions of some operators (AveragePool 19), which round
    differently: that is not the pass's doing.
    """
    from effic.ir.onnx_format import raise_opset

    raised = before.clone()
    if raise_opset(raised, opset) is None:
        checker.check(raised, Numerics.ROUNDING, f"raising the opset to {opset}", before)
    return raised


def _apply_with(
    model: Model, item: CalibratedPass, calibration: Calibration | None, remarks: Remarks, step: Step
) -> None:
    if calibration is not None:
        calibration.plans.clear()
    item.apply_with(model, calibration, remarks)
    if calibration is not None and item.uses_data:
        step.data = calibration.digest
        step.calibration = [str(plan) for plan in calibration.plans]


def fingerprint(model: Model) -> int:
    """A number that changes when the graph does (tensors count by identity: they are never edited)."""
    functions = model.ir.functions.items()
    rows: list[Any] = [
        tuple(sorted(model.ir.opset_imports.items())),
        *sorted((str(key), tuple(sorted(function.opset_imports.items()))) for key, function in functions),
    ]
    for graph in model.graphs():
        rows.append(tuple(v.name for v in graph.outputs))
        rows.extend((n, id(v.const_value)) for n, v in graph.initializers.items())
        for node in graph:
            rows.append((
                node.domain,
                node.op_type,
                tuple(None if v is None else v.name for v in node.inputs),
                tuple(v.name for v in node.outputs),
                tuple((k, _attribute_mark(a)) for k, a in sorted(node.attributes.items())),
            ))  # fmt: skip
    return hash(tuple(rows))


def _attribute_mark(attr: ir.Attr) -> Any:
    if attr.is_ref():
        return attr.ref_attr_name
    if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return None  # its nodes are visited as a graph of their own
    if attr.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        return id(attr.value)
    return str(attr.value)
