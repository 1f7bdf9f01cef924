"""What a run of :func:`effic.optimize` will take, said before it starts: memory, disk, time, places changed.

Nothing is guessed that can be tried cheaply. Passes that look at the graph are applied to a copy of it in
memory; passes that work weight by weight are tried on one weight of each kind, calibrated ones on two samples;
the check runs the model as the run will (see :mod:`effic.rehearsal`). Temporary files that this makes are gone
afterwards; nothing else is written.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effic.fit import Need, Room, least_need, misfits, room
from effic.ir.cost import weight_bytes
from effic.ir.errors import UsageError
from effic.ir.evaluate import Oracle, load_inputs
from effic.ir.memory import peak_memory, release_memory, reset_peak_memory, resident_memory
from effic.ir.model import Model
from effic.ir.onnx_writer import file_bytes_of
from effic.passes.base import Numerics, Pass
from effic.passes.calibration import SAMPLES, Calibration
from effic.passes.pipeline import Check, Checker, Progress
from effic.rehearsal import FEW, Part, Rehearsal, rehearse

if TYPE_CHECKING:
    import torch

# The record in the file's metadata: digests, passes, versions.
_RECORD_BYTES = 1500

# Written to the folder for temporary files to learn how fast they are: enough to count, soon done.
_PROBE_BYTES = 16 << 20

# An optimized session packs float weights, and lets go of those it read.
_PACKED_COPIES = 1.0


@dataclasses.dataclass
class PlannedStep:
    """What one pass, or the lowering, will do.

    Attributes:
        name, text: of the pass; of the lowering ``lower`` and the target.
        numerics: how far it may move numbers.
        sites: places it will change.
        missed: reasons for what it will leave alone: ``text``, ``where`` (the first place) and ``count``.
        seconds: of the pass itself.
        memory: largest resident set of the process meanwhile, in bytes.
        weight_bytes, nodes: of the model after it.
        tried: ``whole``, or ``one of each kind``: what it will do with each of the others may be decided by
            their values while it runs.
    """

    name: str
    text: str
    numerics: str
    sites: int
    missed: list[dict[str, Any]]
    seconds: float
    memory: int
    weight_bytes: int
    nodes: int
    tried: str

    @property
    def left_alone(self) -> int:
        """Places it will leave alone."""
        return sum(row["count"] for row in self.missed)


@dataclasses.dataclass
class Plan:
    """What a run will take.

    Attributes:
        passes, target: text forms.
        steps: one per pass, then one for the lowering.
        memory: largest resident set of the process, in bytes.
        file: bytes of the output's files.
        temporary: bytes of temporary files, at most at a time.
        seconds: of the whole run: ``load``, ``calibration`` (reading it), ``passes``, ``check``, ``save`` and
            ``total``.
        memory_free, output_free, temporary_free: what there is, in bytes; None where it is not known.
        misfits: what does not fit, each a phrase with the numbers; empty when everything does.
        notes: what the figures do not hold.
    """

    passes: str
    target: str
    steps: list[PlannedStep]
    memory: int
    file: int
    temporary: int
    seconds: dict[str, float]
    memory_free: int | None
    output_free: int | None
    temporary_free: int | None
    misfits: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


def plan(
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
    external: bool | None = None,
    scored: bool = False,
    timed: bool = False,
    resume: bool = False,
    force: bool = True,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> Plan:
    """Say what :func:`effic.optimize` with the same arguments will take.

    Args:
        source, passes, output, target, inputs, calib, calib_samples, calib_window, seed, check, external,
            example_inputs, dynamic_shapes: as there; nothing is written to ``output``. Without one the free
            disk is that of the working folder.
        scored: whether the run will score a metric, which is not planned.
        timed: whether it will time the model after each pass, which is not planned.
        resume: whether it will keep its progress beside the output, which counts to the disk there.
        force: whether the run may write over ``output``.
        progress: called with what is being done, the number and how many there are.

    Raises:
        EfficError: what the run itself would raise before it writes.
    """
    from effic.backends import get_backend
    from effic.optimize import load, refuse_data, refuse_early, sequence_of
    from effic.passes.spec import to_text
    from effic.resume import refuse, was_saving

    tell = progress or (lambda text, number, total: None)
    sequence, backend = sequence_of(passes), get_backend(target)
    if backend.is_folder:
        raise UsageError(
            f"what compiling for {backend.name} takes cannot be planned; plan for portable, which does the passes only"
        )
    refuse_data(sequence, calib, calib_samples, calib_window)
    if output is not None:
        refuse_early(output, force or (resume and was_saving(output)), False)
    if resume:
        refuse(source, output, timed)
    peaks = _Peaks()
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    arrays = load_inputs(inputs) if isinstance(inputs, (str, os.PathLike)) else inputs
    options = {"dynamic_shapes": dynamic_shapes} if dynamic_shapes is not None else {}
    model = load(source, example_inputs, **options)
    seconds["load"] = time.perf_counter() - began
    began = time.perf_counter()
    calibration = None
    if calib is not None:
        tell("reading calibration data", 0, 1)
        samples = SAMPLES if calib_samples is None else calib_samples
        calibration = Calibration.load(calib, model, samples=samples, seed=seed, window=calib_window)
        if arrays is None:
            arrays = next(calibration.feeds())
    seconds["calibration"] = time.perf_counter() - began if calib is not None else 0.0
    peaks.note()
    notes: list[str] = []
    have = room(os.path.join(os.getcwd(), "out.onnx") if output is None else output)
    probe = _check(model, arrays, seed, check, have, sequence, notes, tell)
    tried = rehearse(model, sequence, backend, calibration, external=external, progress=tell)
    peaks.values.extend([part.memory for part in tried.parts] + [probe.memory])
    changed = [part for part in tried.parts if part.changed]
    final = _final(tried, probe, peaks)
    each = probe.seconds * (len(changed) if check == "each" else bool(changed))
    seconds["passes"] = tried.seconds
    seconds["check"] = probe.first + (each + final if probe.inputs is not None else 0.0)
    file = int(tried.file) + _RECORD_BYTES
    seconds["save"] = file / _bandwidth()
    seconds["total"] = sum(seconds.values())
    temporary = _temporary(model, tried, file, check)
    if isinstance(calib, str) and calib == "random":
        temporary = max(temporary, file_bytes_of(model))  # the original is run to find samples that it takes
    _note(notes, tried, calibration, scored, timed)
    memory = max(peaks.values)
    lossy = [part for part in changed if part.item is not None and part.item.numerics is Numerics.LOSSY]
    kept = round(sum(part.weights for part in lossy)) if resume else 0
    if resume:
        notes.append(
            f"--resume keeps up to {kept / 1e6:.1f} MB beside the output until that is whole; they count to what has "
            "to be free there, not to the sizes here"
        )
    need = Need(max(0, memory - resident_memory()), file + kept, temporary)
    return Plan(
        to_text(sequence),
        target,
        [_step(part, target) for part in tried.parts],
        memory,
        file,
        temporary,
        seconds,
        have.memory,
        have.output,
        have.temporary,
        misfits(need, have),
        notes,
    )


class _Peaks:
    """Largest resident sets of what was done one after the other."""

    def __init__(self) -> None:
        reset_peak_memory()
        self.values: list[int] = []

    def note(self) -> None:
        """Take note of the peak since the last time, and start anew."""
        self.values.append(peak_memory())
        reset_peak_memory()


@dataclasses.dataclass
class _Probe:
    """What the check takes: before the first pass, and for each run of the model.

    ``inputs`` is None where no model was run.
    """

    first: float = 0.0
    seconds: float = 0.0
    memory: int = 0
    inputs: dict[str, np.ndarray] | None = None


def _check(
    model: Model,
    arrays: Mapping[str, np.ndarray] | None,
    seed: int,
    check: Check,
    have: Room,
    sequence: Sequence[Pass],
    notes: list[str],
    tell: Progress,
) -> _Probe:
    """Run the original as the check will."""
    if check == "off":
        return _Probe()
    need = least_need(model, sequence, check)
    if misfits(dataclasses.replace(need, file=0), have):
        notes.append(
            "the model was not run, since that does not fit; time and memory of the check are estimates"
        )
        return _Probe(memory=resident_memory() + need.memory)
    tell("running the original", 0, 1)
    reset_peak_memory()
    began = time.perf_counter()
    checker = Checker(model, arrays, seed)
    first = time.perf_counter() - began
    began = time.perf_counter()
    Oracle(model).run(checker.inputs)
    return _Probe(first, time.perf_counter() - began, peak_memory(), checker.inputs)


def _final(tried: Rehearsal, probe: _Probe, peaks: _Peaks) -> float:
    """Seconds of the check of the finished file; its peak is noted."""
    if probe.inputs is None:
        return 0.0
    if tried.model is None:
        # Of a model that was only tried in part there is no finished file to run.
        release_memory()
        peaks.values.append(int(resident_memory() + max(_PACKED_COPIES * tried.file, tried.folded)))
        return probe.seconds
    release_memory()
    reset_peak_memory()
    began = time.perf_counter()
    Oracle(tried.model, optimized=True).run(probe.inputs)
    peaks.values.append(peak_memory())
    return time.perf_counter() - began


def _temporary(model: Model, tried: Rehearsal, file: int, check: Check) -> int:
    """Bytes of temporary files: what passes put aside, and the copy of the model that the check runs."""
    most = max(part.temporary for part in tried.parts)
    if check == "off":
        return int(most)
    copies = [float(file_bytes_of(model)), tried.parts[-1].temporary + file]
    if check == "each":
        copies += [part.temporary + part.weights for part in tried.parts if part.changed]
        # What came before a pass that raises the opset is run at the new one as well.
        befores = [float(weight_bytes(model)), *(part.weights for part in tried.parts)]
        copies += [p.temporary + w for p, w in zip(tried.parts, befores, strict=False) if p.raises]
    return int(max(most, *copies))


def _bandwidth() -> float:
    """Bytes a second that files are written with, in the folder for temporary files."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile() as file:
        began = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        return _PROBE_BYTES / max(1e-6, time.perf_counter() - began)


def _note(
    notes: list[str], tried: Rehearsal, calibration: Calibration | None, scored: bool, timed: bool
) -> None:
    if tried.kinds:
        notes.append(
            f"{tried.weights} weights are of {tried.kinds} kinds or more, one of each of these was tried and stands "
            "for the others by its size; what depends on their values is decided while the run goes on"
        )
    if calibration is not None and calibration.count > FEW:
        notes.append(
            f"calibrated on {FEW} samples of {calibration.count}: times are scaled, choices may differ"
        )
    if scored:
        notes.append("scoring the metric takes time and memory that are not in these figures")
    if timed:
        notes.append("timing the model after each pass takes time that is not in these figures")


def _step(part: Part, target: str) -> PlannedStep:
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for seen in part.remarks:
        if seen.remark.kind == "missed":
            counts[seen.remark.text] += seen.count
            first.setdefault(seen.remark.text, seen.remark.where)
    missed = [{"text": text, "where": first[text], "count": count} for text, count in counts.most_common()]
    numerics = Numerics.LOSSY if part.item is None else part.item.numerics
    return PlannedStep(
        part.name,
        part.text if part.item is not None else target,
        numerics.value,
        part.count("passed"),
        missed,
        part.seconds,
        part.memory,
        round(part.weights),
        round(part.nodes),
        part.tried,
    )
