"""Measure which tile suits each of a model's kernels best on this machine, and which schedule what has no kernel.

Both share the trials by their time in the model. The parent keeps the records; the child lowers the model, compiles
candidates and times them. A candidate whose code takes the child down is recorded as crashed, and a fresh child goes
on with the others.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from effic.backends import get_backend
from effic.backends.tvm.child import Tell, run_in_child
from effic.backends.tvm.tune_records import Base, Choice, Records, Tile, Trial, key_of, line_of, with_tile
from effic.backends.tvm.versions import require_tuning
from effic.ir.errors import NotMeasuredError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx

if TYPE_CHECKING:
    from effic.backends.tvm.cpu import Cpu
    from effic.backends.tvm.targets import TvmCpu
    from effic.backends.tvm.tune_measure import Ready
    from effic.backends.tvm.tune_schedule import FunctionTask

CHILD = "effic.backends.tvm.tune:tune_in_child"
"""What the child runs."""

BATCH = 6
"""Candidates of one kernel that are timed beside each other."""

QUICK_TURNS, SURE_TURNS = 9, 31
"""Turns to rank candidates, and to let one of them take the place of what is used."""

NOISE = 0.02
"""Faster by less than this share is no difference, whatever the quartiles say."""

HOPELESS = 1 / 3
"""Candidates below this speed of the default in a few calls are not timed any longer."""

WORTH = 1e-3
"""Functions without a kernel that take less than this share of the time are left as they are."""

_MODEL, _TRYING = "model.onnx", "trying.json"
_EXTERNAL_BYTES = 1 << 20


@dataclass(frozen=True)
class Tuned:
    """What is known of one kernel or function.

    Attributes:
        kind: ``kernel``, or ``schedule`` for a function that has no kernel.
        name: of its function in the default tile.
        calls: how often the model calls it, all sets of sizes together.
        seconds: of one call in the default tile.
        speedup: time of the default by that of the chosen tile; 1 where the default stays.
        tile: the chosen one, or the schedule; empty for the default.
        tried: candidates with a record.
    """

    kind: str
    name: str
    calls: int
    seconds: float
    speedup: float
    tile: Tile
    tried: int


@dataclass(frozen=True)
class Tuning:
    """What a run of tuning did.

    Attributes:
        target: as text.
        log: the folder of the records.
        kernels: and functions, by their share of the time, largest first.
        trials: candidates tried in this run.
        crashed: how many of them crashed.
        left: candidates that could still be tried, as far as they are known: one for a function that was not
            looked at.
        seconds: wall time.
    """

    target: str
    log: str
    kernels: tuple[Tuned, ...]
    trials: int
    crashed: int
    left: int
    seconds: float

    @property
    def speedup(self) -> float:
        """Time in all these kernels in their default tiles by that in the chosen ones."""
        before = sum(one.calls * one.seconds for one in self.kernels)
        after = sum(one.calls * one.seconds / one.speedup for one in self.kernels)
        return before / after if after else 1.0


def tune_kernels(
    backend: TvmCpu, model: Model, log: str | os.PathLike[str], trials: int, tell: Tell | None = None
) -> Tuning:
    """Try up to ``trials`` candidates that have no record yet, and add what is found to the records.

    Args:
        backend: the target; its records, if it names some, are not heeded.
        model: in canonical form; it is not changed.
        log: the folder of the records; it is made where it is missing.
        trials: most candidates to try.
        tell: hears how fast the kernels are so far, and how many candidates were tried, of how many.

    Raises:
        MissingToolError: with this release of apache-tvm-ffi tuning crashes.
        NotMeasuredError: the code is for another CPU than this machine's, or the child died outside of a trial.
        UnsupportedError: nodes that cannot be lowered.
    """
    require_tuning()
    began = time.perf_counter()
    folder = os.path.abspath(log)
    before = _count(Records(folder))
    with tempfile.TemporaryDirectory(prefix="effic-tvm-") as scratch:
        model.save(os.path.join(scratch, _MODEL), external_threshold=_EXTERNAL_BYTES)
        trying = Path(scratch, _TRYING)
        while True:
            done = sum((_count(Records(folder)) - before).values())
            request = {
                "target": backend.text,
                "model": os.path.join(scratch, _MODEL),
                "log": folder,
                "done": done,
                "trials": trials,
                "trying": os.fspath(trying),
            }
            try:
                found = run_in_child("tuning", CHILD, request, scratch, tell)
                break
            except NotMeasuredError:
                # The child clears the file when it ends by itself.
                if not trying.exists():
                    raise
                Records(folder).add_text(trying.read_text(encoding="utf-8"))
                trying.unlink()
    new = _count(Records(folder)) - before
    return Tuning(
        target=backend.text,
        log=os.fspath(log),
        kernels=tuple(Tuned(**row) for row in found["kernels"]),
        trials=sum(new.values()),
        crashed=new["crashed"],
        left=found["left"],
        seconds=time.perf_counter() - began,
    )


def _count(records: Records) -> Counter[str]:
    return Counter(trial.status for trials in records.trials.values() for trial in trials)


# -- the child's side ----------------------------------------------------------------------------------


def tune_in_child(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The child's side: all of the work."""
    backend: TvmCpu = get_backend(request["target"])  # type: ignore[assignment]
    tell("lowering the model", request["done"], request["trials"])
    cpu = backend.cpu()
    # As many threads as the code is laid out for; it is read when TVM first runs something.
    os.environ["TVM_NUM_THREADS"] = str(cpu.cores)
    from effic.backends.tvm.build import need_this_cpu

    need_this_cpu(cpu, "tuned")
    tasks = find_tasks(read_onnx(request["model"]), cpu, backend.shapes, backend.activations)
    tuner = Tuner(cpu, tasks, Records(request["log"]), Path(request["trying"]))
    try:
        left = tuner.run(request["trials"] - request["done"], request["done"], request["trials"], tell)
    finally:
        # Whatever ends it here has a reason of its own; only a crash leaves the note behind.
        tuner.trying.unlink(missing_ok=True)
    return {"kernels": tuner.rows(), "left": left}


@dataclass
class KernelTask:
    """A kernel that can be tuned: in its default tile, and how often it is called."""

    kind: ClassVar[str] = "kernel"
    is_known: ClassVar[bool] = True

    spec: Any
    key: str
    calls: int
    cpu: Cpu
    names: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its function in the default tile."""
        name: str = self.spec.name
        return name

    def weight_bytes(self) -> int:
        """Bytes of its weights as a model has them."""
        from effic.backends.tvm.tune_measure import weight_bytes

        return weight_bytes(self.spec)

    def prepare(self, tile: Tile, footprint: int) -> Ready:
        """Compile it in a tile."""
        from effic.backends.tvm.tune_measure import prepare

        return prepare(with_tile(self.spec, tile) if tile else self.spec, self.cpu, footprint)

    def why_not(self, tile: Tile) -> str | None:
        """Why a tile is none that would be tried, a phrase, or None."""
        from effic.backends.tvm.tune_tiles import why_not_tile

        return why_not_tile(self.spec, self.cpu, tile)

    def candidates(self, records: Records) -> list[Tile]:
        """The tiles worth trying next."""
        from effic.backends.tvm.tune_tiles import candidates

        found = candidates(self.spec, self.cpu, records.chosen(self.key), records.tried(self.key))
        return [tile for tile in found if with_tile(self.spec, tile).why_not() is None]


class _Collect:
    """Stands in for records: lets every kernel be as it is and remembers which were asked for."""

    def __init__(self) -> None:
        self.specs: dict[str, Any] = {}

    def apply(self, spec: Any, cpu: Cpu) -> Any:
        self.specs.setdefault(spec.name, spec)
        return spec


def find_tasks(model: Model, cpu: Cpu, shapes: str, activations: str) -> list[KernelTask | FunctionTask]:
    """The distinct kernels with tiles that a model calls, and the functions beside them; those of unknown sizes are
    left out."""
    from effic.backends.tvm.relax_builder import build_relax
    from effic.backends.tvm.schedule.pipeline import called_functions
    from effic.backends.tvm.tune_schedule import find_functions

    asked = _Collect()
    options = {"activations": activations, "tuned": asked}
    module, _, _ = build_relax(model, cpu, shapes, options, weights=False)
    tasks: dict[str, KernelTask] = {}
    for name, calls in called_functions(module).items():
        spec = asked.specs.get(name)
        if spec is None or None in (getattr(spec, "m", 0), getattr(spec, "batch", 0)):
            continue
        key = key_of(spec, cpu)
        task = tasks.setdefault(key, KernelTask(spec, key, 0, cpu))
        task.calls += calls
        task.names.append(name)
    return [*tasks.values(), *find_functions(module, cpu)]


class Tuner:
    """Tries candidates, those first from which most can be hoped."""

    def __init__(
        self, cpu: Cpu, tasks: list[KernelTask | FunctionTask], records: Records, trying: Path
    ) -> None:
        self.cpu, self.tasks, self.records, self.trying = cpu, tasks, records, trying
        self._ready: list[tuple[Tile, Ready]] = []
        self.footprint = sum(task.calls * task.weight_bytes() for task in tasks)

    def run(self, trials: int, done: int, total: int, tell: Tell) -> int:
        """Try candidates while there are some; returns how many are left."""
        for task in self.tasks:
            if task.key not in self.records.bases and {} not in self.records.tried(task.key):
                tell("timing the functions as they are", done, total)
                self._base(task)
        while trials > 0 and (best := self._next()) is not None:
            batch = self._candidates(best)[: min(BATCH, trials)]
            for number, tile in enumerate(batch):
                tell(self._so_far(), done + number, total)
                self._compile(best, tile)
            self._compare(best)
            trials, done = trials - len(batch), done + len(batch)
        tell(self._so_far(), done, total)
        return sum(self._left(task) for task in self.tasks)

    def rows(self) -> list[dict[str, Any]]:
        """:class:`Tuned` of every task, as JSON holds it."""
        found = []
        for task in self.tasks:
            choice = self.records.choices.get(task.key)
            found.append(
                {
                    "kind": task.kind,
                    "name": task.name,
                    "calls": task.calls,
                    "seconds": self._seconds(task),
                    "speedup": 1.0 if choice is None else choice.speedup,
                    "tile": self.records.chosen(task.key),
                    "tried": len(self.records.tried(task.key)),
                }
            )
        return sorted(found, key=lambda row: -row["calls"] * row["seconds"])

    def _seconds(self, task: KernelTask | FunctionTask) -> float:
        base = self.records.bases.get(task.key)
        return 0.0 if base is None else base.seconds

    def _so_far(self) -> str:
        """How fast kernels and functions are so far."""
        rows = self.rows()
        said = []
        for kind in ("kernel", "schedule"):
            mine = [row for row in rows if row["kind"] == kind]
            after = sum(row["calls"] * row["seconds"] / row["speedup"] for row in mine)
            if after:
                before = sum(row["calls"] * row["seconds"] for row in mine)
                said.append(f"{kind}s {before / after:.2f}x")
        return ", ".join(said) or "nothing to tune"

    def _candidates(self, task: KernelTask | FunctionTask) -> list[Tile]:
        if task.kind == "kernel":
            return task.candidates(self.records)
        if not self._is_worth(task):
            return []
        from effic.backends.tvm.tune_schedule import REFUSALS

        self._note(Trial(task.key, {}, "crashed"))
        try:
            return task.candidates(self.records)
        except REFUSALS:
            self.records.add([Trial(task.key, {}, "refused")])
            return []
        finally:
            self.trying.unlink()

    def _is_worth(self, task: KernelTask | FunctionTask) -> bool:
        whole = sum(one.calls * self._seconds(one) for one in self.tasks)
        return task.calls * self._seconds(task) >= WORTH * whole

    def _left(self, task: KernelTask | FunctionTask) -> int:
        if task.is_known:
            return len(self._candidates(task))
        return int(self._is_worth(task) and {} not in self.records.tried(task.key))

    def _next(self) -> KernelTask | FunctionTask | None:
        """The task with most time per candidate tried already."""
        ranked = sorted(
            self.tasks,
            key=lambda task: task.calls * self._seconds(task) / (1 + len(self.records.tried(task.key))),
            reverse=True,
        )
        return next((task for task in ranked if self._candidates(task)), None)

    def _base(self, task: KernelTask | FunctionTask) -> None:
        from effic.backends.tvm.tune_measure import REFUSALS, seconds

        if task.kind == "schedule":
            self._note(Trial(task.key, {}, "crashed"))
        try:
            kernel = task.prepare({}, self.footprint)
            self.records.add([Base(task.key, seconds(kernel, QUICK_TURNS))])
        except REFUSALS:
            if task.kind == "kernel":
                raise
            self.records.add([Trial(task.key, {}, "refused")])
        finally:
            self.trying.unlink(missing_ok=True)

    def _compile(self, task: KernelTask | FunctionTask, tile: Tile) -> None:
        """Make a candidate ready to be timed, and run it once."""
        from effic.backends.tvm.tune_measure import REFUSALS, once, same

        if not self._ready:
            self._ready.append(({}, task.prepare({}, self.footprint)))
        self._note(Trial(task.key, tile, "crashed"))
        try:
            kernel = task.prepare(tile, self.footprint)
        except REFUSALS:
            self.records.add([Trial(task.key, tile, "refused")])
            return
        default = self._ready[0][1]
        if not same(default.output, kernel.output):
            self.records.add([Trial(task.key, tile, "wrong")])
        elif (rough := once(default) / once(kernel)) < HOPELESS:
            self.records.add([Trial(task.key, tile, "timed", rough)])
        else:
            self._ready.append((tile, kernel))

    def _compare(self, task: KernelTask | FunctionTask) -> None:
        """Time what is ready beside the default; keep the best of it where it is better than what is used."""
        from effic.backends.tvm.tune_measure import beside

        self.trying.unlink(missing_ok=True)
        (_, default), *ready = self._ready
        self._ready = []
        if not ready:
            return
        ratios = beside([default, *(kernel for _, kernel in ready)], QUICK_TURNS)[1:]
        rows: list[Trial | Choice] = [
            Trial(task.key, tile, "timed", ratio.median)
            for (tile, _), ratio in zip(ready, ratios, strict=True)
        ]
        best = max(range(len(ready)), key=lambda i: ratios[i].median)
        tile, kernel = ready[best]
        used = self.records.choices.get(task.key)
        if used is not None and task.why_not(used.tile) is not None:
            used = None  # of somebody who edits the file
        if ratios[best].median > (1 + NOISE) * (1.0 if used is None else used.speedup):
            rival = default if used is None else task.prepare(used.tile, self.footprint)
            against, beside_default = beside([rival, kernel, default], SURE_TURNS)[1:]
            if against.low > 1 and against.median > 1 + NOISE:
                speedup = against.median / beside_default.median
                low, high = against.low / beside_default.median, against.high / beside_default.median
                rows.append(Choice(task.key, tile, speedup, low, high))
        self.records.add(rows)

    def _note(self, trial: Trial) -> None:
        """Write down what is tried, for the parent to record should this process die of it."""
        self.trying.write_text(line_of(trial), encoding="utf-8")
