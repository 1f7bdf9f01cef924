"""The whole job: load, run the passes, lower for a target, check, save, report."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.faster import SpeedGuard
from effic.fit import refuse_misfit
from effic.folder_build import (
    FolderBuild,
    check_buckets,
    check_build,
    folder_files,
    inputs_that_fit,
    pinned,
    refuse_output,
)
from effic.guard import Accuracy, Guard
from effic.ir.cost import ModelCost, model_cost
from effic.ir.errors import CheckFailedError, UsageError
from effic.ir.evaluate import Distance, Oracle, compare_outputs, load_inputs
from effic.ir.memory import peak_memory, reset_peak_memory
from effic.ir.model import Model
from effic.ir.onnx_checks import refuse_name
from effic.ir.onnx_format import read_onnx
from effic.ir.verify import verify
from effic.ir.whole_files import Stamp, why_no_file
from effic.measure import external_files, file_bytes
from effic.passes.base import CalibratedPass, Numerics, Pass, Remarks
from effic.passes.calibration import SAMPLES, Calibration
from effic.passes.pipeline import Check, Checker, Instead, Keep, Step, fingerprint, judge, run_passes
from effic.passes.presets import preset
from effic.passes.spec import parse_passes, to_text
from effic.record import BUILD_KEY, Digests, build_of, file_digest, put_build, record_path, write_record
from effic.resume import Unfinished, identity, refuse, was_saving

if TYPE_CHECKING:
    import torch

    from effic.backends.base import Backend

Progress = Callable[[str, int, int], None]
_PACKAGES = ("effic", "onnx", "onnx-ir", "onnxruntime", "numpy")


@dataclasses.dataclass
class Report:
    """All that :func:`optimize` did and measured.

    Attributes:
        source: where the model came from.
        notes: what reading it changed or found, and what is to be known of the calibration data.
        passes: text form of the passes.
        target: text form of the target.
        steps: one per pass, then one for lowering.
        before, after: costs of the model (weights, parameters, nodes, multiply-adds).
        verdict: what the check of the finished file found, in words.
        distance: its outputs' distance from the original's, or None without a check.
        buckets: what the check found at each set of sizes but the first that a build has code for: ``sizes``,
            ``verdict`` and ``distance`` from the model as the passes left it.
        output: path of the file written, or None.
        file_bytes: bytes of the input file and of the output file, external data included.
        seconds: time of the whole job.
        versions: effic and the packages that decide the result.
        calibration: the samples that passes looked at (source, digest, samples, random), or None.
        accuracy: the metric before and after, and what was allowed, or None.
        speed: how fast the model was after each pass, beside the one before, and in the end, or None.
        model: the finished model.
    """

    source: str
    notes: tuple[str, ...]
    passes: str
    target: str
    steps: list[Step]
    before: ModelCost
    after: ModelCost
    verdict: str
    distance: Distance | None
    buckets: list[dict[str, Any]]
    output: str | None
    file_bytes: tuple[int | None, int | None]
    seconds: float
    versions: dict[str, str]
    calibration: dict[str, Any] | None
    accuracy: dict[str, Any] | None
    speed: dict[str, Any] | None
    model: Model = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: everything but the model."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        row["steps"] = [step.to_dict() for step in self.steps]
        row["before"], row["after"] = self.before.to_dict(), self.after.to_dict()
        row["distance"] = None if self.distance is None else self.distance.to_dict()
        return row


def load(
    source: str | os.PathLike[str] | Model | torch.nn.Module, example_inputs: Any = None, **options: Any
) -> Model:
    """A model from an ``.onnx`` file, a ``.pt2`` file, or a torch module with example inputs.

    Raises:
        InvalidModelError: the file is broken.
        UsageError: no such file, or of no known kind.
        CaptureError: torch cannot export the module.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, (str, os.PathLike)):
        if os.fspath(source).endswith(".pt2"):
            from effic.ir.torch_capture import capture

            return capture(source, example_inputs, **options)
        return read_onnx(source)
    from effic.ir.torch_capture import capture

    return capture(source, example_inputs, **options)


def optimize(
    source: str | os.PathLike[str] | Model | torch.nn.Module,
    passes: str | Sequence[Pass] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    target: str = "ort-cpu",
    inputs: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
    calib: Any = None,
    calib_samples: int | None = None,
    calib_window: int | None = None,
    seed: int = 0,
    check: Check = "each",
    accuracy: Accuracy | None = None,
    keep_if_faster: bool = False,
    threads: int = 1,
    require_change: bool = False,
    fit_check: bool = True,
    dry_run: bool = False,
    force: bool = False,
    external: bool | None = None,
    record: bool = True,
    resume: bool = False,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    after_pass: Callable[[Model, Pass, int], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Optimize a model.

    Args:
        source: an ``.onnx`` or ``.pt2`` file, a :class:`Model` (rewritten in place), or a torch
            module (needs ``example_inputs``).
        passes: text form, or pass objects; None is the preset ``default``.
        output: the ``.onnx`` file to write (a folder for ``tvm-cpu``); None writes nothing.
        target: ``ort-cpu``, ``portable`` or ``tvm-cpu``, with options: ``ort-cpu{accuracy_level=0}``.
        inputs: what to check the numbers on: arrays by name, or an ``.npz`` file; None takes the
            first calibration sample, or without one makes up seeded inputs.
        calib: data for the passes that need to see some: a file or folder, a function, arrays by
            name, feeds, or ``"random"``; see :meth:`effic.passes.calibration.Calibration.load`.
        calib_samples: how many samples of it to use; 128 when None.
        calib_window: tokens of a sample, where ``calib`` is a row of token ids.
        seed: of the seeded inputs, and of the choice of samples.
        check: ``each`` pass, ``final`` only, or ``off``.
        accuracy: a metric to score the model by, the data, and how much may be lost; see
            :class:`effic.guard.Accuracy`.
        keep_if_faster: time the model after each pass on the target, and undo what made it slower.
        threads: threads within one operator, for those timings.
        require_change: fail when a pass changes nothing.
        fit_check: refuse what cannot fit into memory or on the disk before anything is done.
        dry_run: do everything but write.
        force: allow writing over an existing file, the input included.
        external: weights in a file of their own; None decides by size.
        record: write the record of the build into the output and beside it (``out.effic.json``).
        resume: keep what is done in ``out.onnx.progress/`` until the output is whole, and go on with what an
            interrupted run of the same job has left there; see :mod:`effic.resume`.
        example_inputs, dynamic_shapes: for torch sources, as ``torch.export`` takes them.
        after_pass: called after each pass with the model, the pass and its number.
        progress: called with what is being done, the number of the step and how many there are.

    Returns:
        The report; ``report.model`` is the finished model.

    Raises:
        EfficError: one sentence and an exit code; nothing was written.
    """
    from effic.backends import get_backend

    began = time.perf_counter()
    sequence = sequence_of(passes)
    backend = get_backend(target)
    refuse_data(sequence, calib, calib_samples, calib_window)
    force = force or (resume and was_saving(output))
    if output is not None:
        refuse_early(output, force or backend.is_folder, backend.is_folder)
        if backend.is_folder:
            refuse_output(backend, output, force, external)
    if resume:
        refuse(source, output, keep_if_faster)
    arrays = load_inputs(inputs) if isinstance(inputs, (str, os.PathLike)) else inputs
    options = {"dynamic_shapes": dynamic_shapes} if dynamic_shapes is not None else {}
    model = load(source, example_inputs, **options)
    # Now, while the weights still point into the files they came from.
    input_bytes = _stored_bytes(model)
    files = _source_files(model)
    model.ir.metadata_props.pop(BUILD_KEY, None)  # of an earlier build, from which this one starts
    if fit_check:
        refuse_misfit(model, sequence, check, None if dry_run or backend.is_folder else output)
    digests = Digests(files) if record and output is not None and not dry_run else None
    steps_in_all = len(sequence) + 2
    calibration, checker = None, None
    if calib is not None:
        _tell(progress, "reading calibration data", 0, steps_in_all)
        calibration = Calibration.load(
            calib,
            model,
            samples=SAMPLES if calib_samples is None else calib_samples,
            seed=seed,
            window=calib_window,
        )
    unfinished = None
    if resume and output is not None:
        run = identity(
            front_end=model.origin.front_end,
            files=files,
            sequence=sequence,
            target=target,
            seed=seed,
            check=check,
            calibration=None if calibration is None else _samples(calibration, calib_samples, calib_window),
            inputs=inputs,
            accuracy=accuracy,
        )
        unfinished = Unfinished(output, run)
        for text in unfinished.notes:
            _tell(progress, text, unfinished.before, steps_in_all)
    if check != "off":
        if unfinished is None or not unfinished.notes:
            _tell(progress, "running the original", 0, steps_in_all)
        if arrays is None and calibration is not None:
            arrays = next(calibration.feeds())
        if backend.is_folder:
            arrays = inputs_that_fit(backend, model, arrays, given=inputs is not None, seed=seed)
        make = Checker if unfinished is None else unfinished.checker
        checker = make(model, arrays, seed)
    guard = None
    if accuracy is not None:
        _tell(progress, "scoring the original", 0, steps_in_all)
        guard = Guard.begin(pinned(model, backend.sizes(model)), accuracy, backend)
    speed, at = None, [0]
    if keep_if_faster:
        speed = SpeedGuard(
            model,
            backend,
            arrays,
            threads,
            calibration,
            seed,
            lambda text: _tell(progress, text, at[0], steps_in_all),
        )
    keeps = [guard.keep for guard in (guard, speed) if guard is not None]

    def passed(text: str, number: int, _total: int) -> None:
        at[0] = number
        _tell(progress, text, number, steps_in_all)

    result = run_passes(
        model,
        sequence,
        check=check,
        checker=checker,
        calibration=calibration,
        require_change=require_change,
        keep=_all_of(keeps if unfinished is None else [unfinished.keep(keep) for keep in keeps]),
        after_pass=after_pass,
        progress=passed,
        unfinished=unfinished,
    )
    canonical = model.clone() if checker is not None else None
    _tell(progress, f"lowering for {target}", len(sequence), steps_in_all)
    lowered = _lower(model, backend, result.after)
    steps, after = [*result.steps, lowered], result.after
    if lowered.changed:
        after = model_cost(model, shapes=after.shapes)
        lowered.bytes_after, lowered.nodes_after = after.weight_bytes, after.nodes
        lowered.parameters, lowered.macs = after.parameters, after.macs
    folder = None
    if backend.is_folder:
        folder = FolderBuild(
            backend,
            model,
            None if dry_run else output,
            None if checker is None else checker.inputs,
            lambda text, *_: _tell(progress, f"{target}: {text}", len(sequence), steps_in_all),
        )
        folder.note(lowered)
    verdict, distance, buckets = "not checked", None, []
    if checker is not None and canonical is not None:
        _tell(progress, "running the result", len(sequence) + 1, steps_in_all)
        verdict, distance = _check_result(
            model, canonical, checker, sequence, lowered, check, backend, folder
        )
        if folder is not None:
            buckets = check_buckets(folder, canonical, backend, calibration, seed)
    if guard is not None:
        _tell(progress, "scoring the result", len(sequence) + 1, steps_in_all)
        guard.finish(model, None if folder is None else folder.load().run)
    if speed is not None:
        at[0] = len(sequence) + 1
        speed.finish(model, None if folder is None else folder.load(threads))
    written, output_bytes = None, None
    if digests is not None:
        kept = [
            (item, step)
            for item, step in zip(sequence, result.steps, strict=True)
            if step.rolled_back is None
        ]
        # Where every pass that looked at the data was undone, nothing of them is in the result.
        looked = any(isinstance(item, CalibratedPass) and item.uses_data for item, _ in kept)
        build = build_of(
            front_end=model.origin.front_end,
            files=digests.result(),
            steps=[step for _, step in kept],
            target=target,
            seed=seed,
            check=check,
            external=external,
            calibration=_samples(calibration, calib_samples, calib_window)
            if calibration is not None and looked
            else None,
            inputs=file_digest(inputs) if isinstance(inputs, (str, os.PathLike)) else None,
        )
        if folder is None:
            put_build(model, build)
    if output is not None and not dry_run:
        sizes = [0]
        # An older record goes when its model is about to be replaced, so that none speaks of another model.
        stale = record_path(output)

        def saved(done: int, total: int) -> None:
            sizes[0] = total
            _tell(progress, f"saving, {100 * done // max(total, 1)} %", steps_in_all, steps_in_all)

        def forget(files: Mapping[str, Stamp]) -> None:
            stale.unlink(missing_ok=True)
            if unfinished is not None:
                unfinished.saving(files)

        if folder is None:
            model.save(output, force=force, external=external, progress=saved, before_commit=forget)
        else:
            sizes[0] = folder.keep(output, build if digests is not None else None, force=force, before=forget)
        written, output_bytes = os.fspath(output), sizes[0]
    report = Report(
        source=model.origin.path or f"a model from {model.origin.front_end}",
        notes=(
            *model.origin.notes,
            *_data_notes(calibration, result.steps),
            *([] if unfinished is None else unfinished.told(dry_run)),
        ),
        passes=to_text(sequence),
        target=target,
        steps=steps,
        before=result.before,
        after=after,
        verdict=verdict,
        distance=distance,
        buckets=buckets,
        output=written,
        file_bytes=(input_bytes, output_bytes),
        seconds=time.perf_counter() - began,
        versions={p: version(p) for p in (*_PACKAGES, *backend.packages)},
        calibration=None if calibration is None else calibration.to_dict(),
        accuracy=None if guard is None else guard.to_dict(),
        speed=None if speed is None else speed.to_dict(),
        model=model,
    )
    if digests is not None and output is not None:
        saved_files = _source_files(read_onnx(output)) if folder is None else folder_files(output)
        paths = {"source": model.origin.path, "calib": _path(calib), "inputs": _path(inputs)}
        write_record(output, build, paths=paths, files=saved_files, measured=measured(report))
    if unfinished is not None and written is not None:
        unfinished.remove()
    return report


def _samples(calibration: Calibration, samples: int | None, window: int | None) -> dict[str, Any]:
    """What a record keeps of calibration data: all but where they were."""
    kept = {key: value for key, value in calibration.to_dict().items() if key != "source"}
    return {**kept, "calib_samples": samples, "calib_window": window}


def _path(source: Any) -> str | None:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None


def measured(report: Report) -> dict[str, Any]:
    """The figures of a report that its record keeps."""
    row = report.to_dict()
    kept = ("before", "after", "verdict", "distance", "file_bytes", "seconds", "accuracy", "speed")
    steps = [{name: value for name, value in step.items() if name != "options"} for step in row["steps"]]
    return {**{name: row[name] for name in kept}, "steps": steps}


def _all_of(keeps: Sequence[Keep]) -> Keep | None:
    """Keep what each of them would keep."""
    if not keeps:
        return None

    def keep(before: Model, model: Model, item: Pass, step: Step) -> str | Instead | None:
        verdicts = (each(before, model, item, step) for each in keeps)
        return next((verdict for verdict in verdicts if verdict is not None), None)

    return keep


def sequence_of(passes: str | Sequence[Pass] | None) -> list[Pass]:
    """The passes of a run, from what :func:`optimize` takes."""
    if passes is None:
        return parse_passes(preset("default").text)
    return parse_passes(passes) if isinstance(passes, str) else list(passes)


def refuse_data(
    sequence: Sequence[Pass], calib: Any, calib_samples: int | None, calib_window: int | None
) -> None:
    """Say what is wrong with the calibration data's options before anything is read."""
    calibrated = [item for item in sequence if isinstance(item, CalibratedPass)]
    for item in calibrated:
        item.require_data(calib)
    if calib is None:
        for name, value in (("calib_samples", calib_samples), ("calib_window", calib_window)):
            if value is not None:
                raise UsageError(f"{name} does nothing without calibration data; give some with --calib DATA")
    elif not any(item.uses_data for item in calibrated):
        raise UsageError("no pass of this run looks at calibration data; leave --calib out")


def _data_notes(calibration: Calibration | None, steps: Sequence[Step]) -> Iterator[str]:
    if calibration is None:
        return
    if calibration.random:
        yield (
            "CALIBRATED ON RANDOM NUMBERS, as asked for: what the passes chose fits noise and not the model's "
            "real inputs; give real data with --calib before the result is used"
        )
    else:
        yield f"calibrated on {calibration.source}"
    for step in steps:
        for plan in step.calibration:
            yield f"{step.name} calibrated: {plan}"


def _lower(model: Model, backend: Backend, cost: ModelCost) -> Step:
    step = Step("lower", backend.text, Numerics.LOSSY)
    step.bytes_before = step.bytes_after = cost.weight_bytes
    step.nodes_before = step.nodes_after = cost.nodes
    step.parameters, step.macs = cost.parameters, cost.macs
    remarks, mark = Remarks(), fingerprint(model)
    reset_peak_memory()
    began = time.perf_counter()
    backend.lower(model, remarks)
    step.seconds, step.peak_memory = time.perf_counter() - began, peak_memory()
    step.remarks = remarks.items
    model.forget_names()
    verify(model, f"lowered for {backend.text}, the model")
    step.changed = fingerprint(model) != mark
    step.verdict = "not checked" if step.changed else "unchanged"
    return step


def _check_result(
    model: Model,
    canonical: Model,
    checker: Checker,
    sequence: Sequence[Pass],
    lowered: Step,
    check: Check,
    backend: Backend,
    folder: FolderBuild | None,
) -> tuple[str, Distance]:
    """Run the finished model as its users will, with the runtime's own optimisation."""
    if folder is not None:
        known = checker.outputs if check == "each" else None
        lowered.verdict, lowered.distance = check_build(folder, canonical, backend, checker.inputs, known)
        got = folder.outputs or {}
    else:
        got = Oracle(model, optimized=True).run(checker.inputs)
    if folder is None and lowered.changed and check == "each":
        lowered.distance = compare_outputs(checker.outputs, got)
        lowered.verdict = judge(lowered.distance, Numerics.LOSSY, 0.0)
        if lowered.verdict.startswith("broken"):
            raise CheckFailedError(
                f"lowering for {lowered.text} broke the model: {lowered.verdict.removeprefix('broken: ')}"
            )
    distance = compare_outputs(checker.original, got)
    # The runtime makes integer kernels of models that came in quantized, and so moves their outputs
    # by more than rounding; the graph itself has been judged without that.
    quantized = next(canonical.nodes("QuantizeLinear", "DequantizeLinear"), None) is not None
    lossy = quantized or lowered.changed or any(p.numerics is Numerics.LOSSY for p in sequence)
    # The runtime's own fusions reorder arithmetic, so even an EXACT sequence is judged as rounding;
    # each step of a long sequence may use its share of the tolerance.
    tolerance = 1e-4 if lossy else _file_tolerance(canonical, sequence)
    verdict = judge(distance, Numerics.LOSSY if lossy else Numerics.ROUNDING, tolerance)
    if verdict.startswith("broken"):
        raise CheckFailedError(f"the finished model is broken: {verdict.removeprefix('broken: ')}")
    return verdict, distance


def _file_tolerance(model: Model, sequence: Sequence[Pass]) -> float:
    from effic.ir.evaluate import rounding_tolerance

    rounding = sum(p.numerics is Numerics.ROUNDING for p in sequence)
    return rounding_tolerance(model) * max(1, rounding)


def refuse_early(output: str | os.PathLike[str], force: bool, folder_wanted: bool) -> None:
    """Say what would stop the saving before the work is done, not after it."""
    path = os.fspath(output)
    refuse_name(path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} for the output does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"the folder {folder} for the output cannot be written; name another")
    if os.path.isdir(path) and not folder_wanted:
        raise UsageError(f"the output {path} is a folder; name a file in it")
    if not folder_wanted and why_no_file(path):
        raise UsageError(f"the output {path} is a device, and no file; leave it out to write nothing")
    if os.path.exists(path) and not force:
        raise UsageError(f"the output {path} exists; give --force to write over it")


def _source_files(model: Model) -> list[Path]:
    """The file a model was read from and its external data; none for a model from memory."""
    if model.origin.path is None:
        return []
    own = Path(model.origin.path)
    others = external_files(model) if model.origin.front_end == "onnx" else set()
    return [own, *sorted(file for file in others if file.resolve() != own.resolve())]


def _stored_bytes(model: Model) -> int | None:
    """Bytes of the model's file and its external data, or None for a model that is from no ONNX file."""
    path = model.origin.path
    return file_bytes(model, Path(path)) if path and model.origin.front_end == "onnx" else None


def _tell(progress: Progress | None, text: str, number: int, total: int) -> None:
    if progress is not None:
        progress(text, number, total)
