"""Schedules of MetaSchedule for the functions that effic's kernels leave: spaces, candidates, and what a record makes.

MetaSchedule's rules write a *space* for a function: instructions that arrange its loops, some of which take a
decision (how a loop is cut, how far it is unrolled, where a step is computed). A record holds the number of a space
and the decisions, and no instruction: those are written again by the same rules at each build, so a record can
choose among schedules and do nothing else. Vector forms of exp, erf and the like are put in afterwards, as in effic's
own schedules, so both compute the same.

Nothing is searched by MetaSchedule itself: candidates are drawn, then the decisions of the best one are drawn again
one by one, and all are timed by :mod:`effic.backends.tvm.tune_measure`. Its builders and runners start pools of
processes, and its cost model needs another package.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir import meta_schedule as ms

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.vector_math import replace_calls
from effic.backends.tvm.private_api import tune_context
from effic.backends.tvm.tune_records import SCHEDULE, Decision, Records, Tile

if TYPE_CHECKING:
    from effic.backends.tvm.tune_measure import Ready

DRAWN, NEAR = 24, 40
"""Candidates of a function that are drawn at first, and how many there may be in all with those near the best."""

_NEAR_SEEDS = 3
_SAMPLING = "Sample"

# As MetaSchedule's own for CPUs, without 512 steps of unrolling: such code takes LLVM up to 10 s per candidate.
_JOBS, _INNERMOST, _UNROLLED = 16, 64, (0, 16, 64)
_VECTORS = (16, 64)
"""Lengths that loops may be vectorized to; each has spaces of its own."""

REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, LookupError)
"""What TVM raises for a schedule that does not fit a function."""


class UnfitScheduleError(ValueError):
    """A record's decisions are none of the function's spaces."""


def key_of_function(function: Any, cpu: Cpu) -> str | None:
    """What a record of a function's schedule is found by, a line of JSON; None where a size of it is open."""
    parameters = []
    for parameter in function.params:
        shape = getattr(parameter, "shape", None)
        if shape is None or not all(isinstance(size, (int, tirx.IntImm)) for size in shape):
            return None
        parameters.append([str(parameter.dtype), [int(size) for size in shape]])
    blocks: list[str] = []
    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, lambda block: blocks.append(block.name_hint)))
    # Names do not count for the hash, but instructions find blocks by their names.
    digest = tvm_ffi.structural_hash(_bare(function)) & (2**64 - 1)
    fields = {"hash": f"{digest:016x}", "blocks": blocks, "parameters": parameters}
    made_by = {name: version(name) for name in ("effic", "apache-tvm")}
    return json.dumps(
        [SCHEDULE, fields, dataclasses.asdict(cpu), made_by], sort_keys=True, separators=(",", ":")
    )


def _bare(function: Any) -> Any:
    return function.without_attr("global_symbol")


class Spaces:
    """The spaces of one function.

    Attributes:
        spaces: their traces, each with some decision for every instruction that takes one.
    """

    def __init__(self, function: Any, cpu: Cpu) -> None:
        """Let MetaSchedule's rules write them.

        Raises:
            RuntimeError, ValueError, TypeError, AssertionError: the rules do not apply to this function.
        """
        self._function = function
        main = _bare(function).with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
        self._module = ir.IRModule({"main": main})
        self._postprocs = [
            ms.postproc.DisallowDynamicLoop(),
            ms.postproc.RewriteParallelVectorizeUnroll(),
            ms.postproc.RewriteReductionBlock(),
        ]
        self.spaces: list[Any] = []
        for extent in _VECTORS:
            generator = ms.space_generator.PostOrderApply(
                sch_rules=_rules(extent), postprocs=self._postprocs, mutator_probs={}
            )
            # It is held while its parts are used: they point at it without owning it.
            self._context = tune_context(self._module, cpu.target(), generator)
            self.spaces += [schedule.trace for schedule in generator.generate_design_space(self._module)]

    def scheduled(self, tile: Tile) -> Any:
        """The function in the schedule of a record.

        Raises:
            UnfitScheduleError: it is none of the function's spaces.
        """
        if (reason := self.why_not(tile)) is not None:
            raise UnfitScheduleError(reason)
        try:
            body, _ = self._made(tile["space"], tile["decisions"], 1)
        except REFUSALS as error:
            raise UnfitScheduleError("its decisions cannot be taken together") from error
        return self._function.with_body(replace_calls(body)).with_attr("tirx.is_scheduled", True)

    def why_not(self, tile: Tile) -> str | None:
        """Why a record's schedule is none of the spaces, a phrase, or None."""
        if not 0 <= tile["space"] < len(self.spaces):
            return "there is no such space"
        trace, given = self.spaces[tile["space"]], tile["decisions"]
        sampling = _sampling(trace)
        if len(given) != len(sampling):
            return f"it takes {len(given)} decisions and the space has {len(sampling)}"
        for instruction, decision in zip(sampling, given, strict=True):
            if not _is_open_to(instruction, _plain(trace.get_decision(instruction)), decision):
                return f"a decision of {instruction.kind.name} is outside of the space"
        return None

    def draws(self, space: int, decisions: Sequence[Decision | None], seeds: Sequence[int]) -> Iterator[Tile]:
        """Candidates of a space in which the decisions that are None are drawn, one for each seed that gives one."""
        for seed in seeds:
            try:
                _, taken = self._made(space, decisions, seed)
            except REFUSALS:
                continue
            yield {"space": space, "decisions": taken}

    def _made(
        self, space: int, decisions: Sequence[Decision | None], seed: int
    ) -> tuple[Any, list[Decision]]:
        trace = self.spaces[space]
        sampling = _sampling(trace)
        taken = {
            instruction: decision
            for instruction, decision in zip(sampling, decisions, strict=True)
            if decision is not None
        }
        schedule = s_tir.Schedule(self._module, seed=seed, error_render_level="none")
        s_tir.Trace(trace.insts, taken).apply_to_schedule(schedule, remove_postproc=True)
        found = schedule.trace
        drawn = [_plain(found.get_decision(instruction)) for instruction in _sampling(found)]
        schedule.enter_postproc()
        if not all(postproc.apply(schedule) for postproc in self._postprocs):
            raise UnfitScheduleError("MetaSchedule cannot finish it")
        return schedule.mod["main"].body, drawn


def _rules(extent: int) -> list[Any]:
    rule = ms.schedule_rule
    return [
        rule.InlineConstantScalars(),
        rule.AutoInline(
            into_producer=False,
            into_consumer=True,
            inline_const_tensor=True,
            disallow_if_then_else=True,
            require_injective=True,
            require_ordered=True,
            disallow_op=["tirx.exp"],
        ),
        rule.AddRFactor(max_jobs_per_core=_JOBS, max_innermost_factor=_INNERMOST),
        rule.MultiLevelTiling(
            structure="SSRSRS",
            max_innermost_factor=_INNERMOST,
            reuse_write=rule.ReuseType(req="may", levels=[1, 2], scope="global"),
        ),
        rule.ParallelizeVectorizeUnroll(
            max_jobs_per_core=_JOBS,
            max_vectorize_extent=extent,
            unroll_max_steps=list(_UNROLLED),
            unroll_explicit=True,
        ),
        rule.RandomComputeLocation(),
    ]


def _sampling(trace: Any) -> list[Any]:
    """The instructions of a trace that take a decision."""
    return [instruction for instruction in trace.insts if instruction.kind.name.startswith(_SAMPLING)]


def _plain(decision: Any) -> Decision:
    return int(decision) if isinstance(decision, (int, tirx.IntImm)) else [int(size) for size in decision]


def _is_open_to(instruction: Any, reference: Decision, decision: Decision) -> bool:
    """Whether an instruction may take a decision, ``reference`` being one that it may."""
    if isinstance(reference, list):
        return (
            isinstance(decision, list)
            and len(decision) == len(reference)
            and math.prod(decision) == math.prod(reference)
            and min(decision) >= 1
            and decision[-1] <= int(instruction.attrs[1])
        )
    if isinstance(decision, list):
        return False
    if instruction.kind.name == "SampleCategorical":
        return 0 <= decision < len(instruction.attrs[0])
    # Where a step is computed: -1 at the root, -2 inlined, else the number of a loop, which MetaSchedule looks up.
    return -2 <= decision < _INNERMOST


@dataclass
class FunctionTask:
    """A function without a kernel of effic's that can be tuned, as it is before it is scheduled."""

    kind: ClassVar[str] = "schedule"

    function: Any
    key: str
    calls: int
    cpu: Cpu
    names: list[str] = field(default_factory=list)
    _spaces: Spaces | None = None
    _drawn: list[Tile] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its first function."""
        return self.names[0]

    @property
    def is_known(self) -> bool:
        """Whether its spaces are written, so that its candidates are known."""
        return self._spaces is not None

    def weight_bytes(self) -> int:
        """Nothing: what it reads is in the cache."""
        return 0

    def prepare(self, tile: Tile, footprint: int) -> Ready:
        """Compile it in a schedule, effic's own where ``tile`` is empty."""
        from effic.backends.tvm.schedule.functions import scheduled
        from effic.backends.tvm.tune_measure import prepare_function

        made = self.spaces.scheduled(tile) if tile else scheduled(self.function, self.cpu)
        return prepare_function(made, self.cpu)

    @property
    def spaces(self) -> Spaces:
        """MetaSchedule's, written when they are first asked for."""
        if self._spaces is None:
            self._spaces = Spaces(self.function, self.cpu)
        return self._spaces

    def why_not(self, tile: Tile) -> str | None:
        """Why a schedule is none of its spaces, a phrase, or None."""
        try:
            self.spaces.scheduled(tile)
        except UnfitScheduleError as error:
            return str(error)
        return None

    def candidates(self, records: Records) -> list[Tile]:
        """The schedules worth trying next: drawn ones, then such as differ from the best in one decision."""
        tried = records.tried(self.key)
        if {} in tried or len(tried) >= NEAR:
            return []  # {}: writing the spaces crashed, or the rules do not apply
        if not self._drawn:
            self._drawn = self._draw()
        left = [tile for tile in self._drawn if tile not in tried]
        if not left and (best := self._best(records)) is not None:
            left = [tile for tile in self._near(best) if tile not in tried]
        return left[: NEAR - len(tried)]

    def _draw(self) -> list[Tile]:
        found: list[Tile] = []
        count = len(self.spaces.spaces)
        for number in range(4 * DRAWN):
            space = number % count
            blank = [None] * len(_sampling(self.spaces.spaces[space]))
            if not blank and number >= count:
                continue  # it has one schedule
            for tile in self.spaces.draws(space, blank, [1 + number]):
                if tile not in found:
                    found.append(tile)
            if len(found) == DRAWN:
                break
        return found

    def _best(self, records: Records) -> Tile | None:
        timed = [trial for trial in records.trials.get(self.key, ()) if trial.status == "timed"]
        best = max(timed, key=lambda trial: trial.speedup, default=None)
        return None if best is None or self.why_not(best.tile) is not None else best.tile

    def _near(self, best: Tile) -> list[Tile]:
        found: list[Tile] = []
        decisions = best["decisions"]
        for place in range(len(decisions)):
            others = [None if i == place else one for i, one in enumerate(decisions)]
            for tile in self.spaces.draws(best["space"], others, range(1, 1 + _NEAR_SEEDS)):
                if tile not in found:
                    found.append(tile)
        return found


def find_functions(module: Any, cpu: Cpu) -> list[FunctionTask]:
    """The distinct functions that a lowered module has beside kernels; those of unknown sizes, and such as only call
    others, are left out."""
    from effic.backends.tvm.schedule.pipeline import called_functions, fuse, unscheduled
    from effic.backends.tvm.tune_measure import written_parameters

    ready = fuse(cpu)(module)
    calls = called_functions(ready)
    tasks: dict[str, FunctionTask] = {}
    for name, function in unscheduled(ready).items():
        key = key_of_function(function, cpu)
        if key is not None and name in calls and any(written_parameters(function)):
            task = tasks.setdefault(key, FunctionTask(function, key, 0, cpu))
            task.calls += calls[name]
            task.names.append(name)
    return list(tasks.values())
