"""Functions without a kernel: their schedules are searched in MetaSchedule's spaces, kept, and taken by builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends.tvm import tune as tuning
from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.targets import TvmCpu
from effic.backends.tvm.tune import Tuner, find_tasks, tune_kernels
from effic.backends.tvm.tune_measure import prepare_function, same
from effic.backends.tvm.tune_records import FILE, Base, Choice, Records, Trial, TunedKernels
from effic.backends.tvm.tune_schedule import FunctionTask, UnfitScheduleError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model

ROWS, COLUMNS = 24, 720
BACKEND = TvmCpu(num_cores=1)


def sums(rows: int | str = ROWS) -> Model:
    """``sum(exp(x)) + sum(exp(y))``, the same function twice; then its root, another one."""
    given = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, COLUMNS]))
        for name in "xy"
    ]
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([1], np.int64), name="axes"))
    nodes: list[ir.Node] = []
    for value in given:
        exp = ir.Node("", "Exp", [value], name=f"exp_{value.name}")
        total = ir.Node("", "ReduceSum", [exp.outputs[0], axes], {"keepdims": ir.AttrInt64("keepdims", 0)}.values(),
                        name=f"sum_{value.name}")  # fmt: skip
        nodes += [exp, total]
    turned = ir.Node("", "Transpose", [given[0]], [ir.AttrInt64s("perm", [1, 0])], name="turned")
    both = ir.Node("", "Add", [nodes[1].outputs[0], nodes[3].outputs[0]], name="both")
    found = [both.outputs[0], turned.outputs[0]]
    for out, name, shape in zip(found, ("s", "t"), ([rows], [COLUMNS, rows]), strict=True):
        out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph(
        given, found, nodes=[*nodes, both, turned], initializers=[axes], opset_imports={"": 21}, name="sums"
    )
    return Model(ir.Model(graph, ir_version=10))


def tasks_of(model: Model, cpu: Cpu | None = None) -> list[FunctionTask]:
    found = find_tasks(model, cpu or BACKEND.cpu(), "", "fp32")
    assert all(isinstance(task, FunctionTask) for task in found)  # the model has no kernels
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tasks() -> list[FunctionTask]:
    return tasks_of(sums())


@pytest.fixture(scope="module")
def reduction(tasks: list[FunctionTask]) -> FunctionTask:
    """The function that is called twice, whose spaces have decisions."""
    return next(task for task in tasks if task.calls == 2)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What six trials found."""
    folder = tmp_path_factory.mktemp("schedules") / "log"
    found = tune_kernels(BACKEND, sums(), folder, 6)
    assert (found.trials, found.crashed) == (6, 0)
    assert {one.kind for one in found.kernels} == {"schedule"}
    assert sum(one.tried for one in found.kernels) == 6
    return folder


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log / FILE).read_text().splitlines() if line]


def test_equal_functions_are_one_task_and_open_sizes_none(tasks: list[FunctionTask]) -> None:
    assert sorted(task.calls for task in tasks)[-1] == 2
    assert len({task.key for task in tasks}) == len(tasks)
    assert sum(len(task.names) for task in tasks) <= sum(task.calls for task in tasks)
    assert tasks_of(sums("rows")) == []


def test_a_key_is_of_the_function_the_machine_and_the_versions(
    reduction: FunctionTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = next(task for task in tasks_of(sums()) if task.calls == 2)
    assert again.key == reduction.key  # another module, with other variables
    other = Cpu(reduction.cpu.mcpu, 2, reduction.cpu.avx512, reduction.cpu.vnni)
    assert reduction.key not in [task.key for task in tasks_of(sums(), other)]
    assert reduction.key not in [task.key for task in tasks_of(sums(ROWS + 1))]
    monkeypatch.setattr("effic.backends.tvm.tune_schedule.version", lambda package: "9.9")
    assert reduction.key not in [task.key for task in tasks_of(sums())]


def test_every_candidate_is_distinct_and_computes_the_same(tasks: list[FunctionTask], tmp_path: Path) -> None:
    for task in tasks:
        default = task.prepare({}, 0)
        candidates = task.candidates(Records(tmp_path))
        assert candidates
        assert len({json.dumps(tile) for tile in candidates}) == len(candidates)
        for tile in candidates[:4]:
            assert same(default.output, task.prepare(tile, 0).output), tile
        assert not same(default.output, default.output * 1.01)


def test_the_best_is_varied_when_what_was_drawn_is_tried(reduction: FunctionTask, tmp_path: Path) -> None:
    records = Records(tmp_path)
    drawn = reduction.candidates(records)
    records.add(Trial(reduction.key, tile, "timed", 1 + i) for i, tile in enumerate(drawn))
    best, near = drawn[-1], reduction.candidates(records)
    assert best["decisions"]
    assert near
    for tile in near:
        assert tile not in drawn
        assert tile["space"] == best["space"]
        changed = sum(a != b for a, b in zip(tile["decisions"], best["decisions"], strict=True))
        assert changed >= 1
    # Space that could not be written: nothing more is tried.
    records.add([Trial(reduction.key, {}, "crashed")])
    assert reduction.candidates(records) == []


def test_records_are_used_again_and_a_killed_run_goes_on(log: Path, tmp_path: Path) -> None:
    before = (log / FILE).read_bytes()
    again = tune_kernels(BACKEND, sums(), log, 0)
    assert again.trials == 0
    assert (log / FILE).read_bytes() == before
    # What a run that was killed leaves: some whole lines, one cut short.
    (tmp_path / FILE).write_bytes(before + b'{"kind": "trial", "key": "[')
    found = tune_kernels(BACKEND, sums(), tmp_path, 3)
    tried = [(t.key, json.dumps(t.tile)) for trials in Records(tmp_path).trials.values() for t in trials]
    assert found.trials == 3
    assert len(tried) == len(set(tried)) == 9
    assert (tmp_path / FILE).read_bytes().startswith(before)
    assert sum('"kind": "base"' in line for line in (tmp_path / FILE).read_text().splitlines()) == len(
        [row for row in lines(log) if row["kind"] == "base"]
    )


def test_a_build_takes_the_schedule_and_computes_the_same(
    reduction: FunctionTask, tasks: list[FunctionTask], tmp_path: Path
) -> None:
    tile = reduction.candidates(Records(tmp_path / "none"))[0]
    rows = [Trial(reduction.key, tile, "timed", 1.5), Choice(reduction.key, tile, 1.5, 1.4, 1.6)]
    other = next(task for task in tasks if task is not reduction)
    Records(tmp_path / "log").add([*rows, Base(other.key, 1e-6)])
    backend = TvmCpu(num_cores=1, tuned=str(tmp_path / "log"))
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((ROWS, COLUMNS)).astype(np.float32) for name in "xy"}
    built = [backend.build(sums(), tmp_path / name, inputs=inputs) for name in ("one", "two")]
    found = TvmArtifact.load(tmp_path / "one").run(inputs)
    assert compare_outputs(Oracle(sums()).run(inputs), found).max_rel < 1e-5
    said = {remark.where: remark for remark in built[0].remarks}
    assert said["schedules"].text.startswith(
        f"1 of {len(tasks)} functions without a kernel run a tuned schedule"
    )
    assert "1.50x" in said["schedules"].text
    assert "no candidate was tried for 1" in said["schedules"].text
    missed = [remark.where for remark in built[0].remarks if "not tuned: " in remark.text]
    assert sorted(missed) == sorted(name for t in tasks if t not in (reduction, other) for name in t.names)
    # Tuned or not, a build is the same every time.
    for name in ("model.so", "params.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def edited(tile: dict[str, Any], place: int, decision: Any) -> dict[str, Any]:
    decisions = [decision if i == place else one for i, one in enumerate(tile["decisions"])]
    return {**tile, "decisions": decisions}


def test_decisions_outside_of_the_space_are_left_out_in_a_sentence(
    reduction: FunctionTask, tmp_path: Path
) -> None:
    tile = next(
        tile
        for tile in reduction.candidates(Records(tmp_path))
        if any(isinstance(one, list) for one in tile["decisions"])
    )
    place = next(i for i, one in enumerate(tile["decisions"]) if isinstance(one, list))
    number = next(i for i, one in enumerate(tile["decisions"]) if not isinstance(one, list))
    factors = tile["decisions"][place]
    wrong = [
        {**tile, "space": len(reduction.spaces.spaces)},
        {**tile, "decisions": tile["decisions"][:-1]},
        edited(tile, place, 4),
        edited(tile, place, [*factors, 1]),
        edited(tile, place, [1 for _ in factors]),
        edited(tile, place, [1 << 20, *factors[1:]]),
        edited(tile, number, 99),
        edited(tile, number, [1, 2]),
    ]
    for one in wrong:
        with pytest.raises(UnfitScheduleError):
            reduction.spaces.scheduled(one)
        folder = tmp_path / "log"
        Records(folder).add([Trial(reduction.key, one, "timed", 9.0), Choice(reduction.key, one, 9, 9, 9)])
        tuned = TunedKernels(str(folder))
        assert tuned.schedule(reduction.function, "f", reduction.cpu) is None
        assert list(tuned.unfit) == ["f"]
        assert not tuned.functions


@pytest.mark.parametrize(
    "tile",
    [
        {"space": 0},
        {"space": -1, "decisions": []},
        {"space": True, "decisions": []},
        {"space": 0, "decisions": "GetSBlock"},
        {"space": 0, "decisions": [["GetSBlock", [], ["main"], ["b0"]]]},
        {"space": 0, "decisions": [[[1]]]},
        {"space": 0, "decisions": [1.5]},
        {"space": 0, "decisions": [None]},
        {"space": 0, "decisions": [[0, 40]]},
        {"space": 0, "decisions": [1 << 40]},
        {"space": 0, "decisions": [0] * 10_000},
        {"space": 0, "decisions": [], "instructions": []},
        [["GetSBlock"]],
    ],
)  # fmt: skip
def test_rows_that_are_no_schedule_count_for_nothing(
    reduction: FunctionTask, tmp_path: Path, tile: Any
) -> None:
    row = {"kind": "trial", "key": reduction.key, "tile": tile, "status": "timed", "speedup": 2.0}
    choice = {"kind": "choice", "key": reduction.key, "tile": tile, "speedup": 2.0, "low": 2, "high": 2}
    deep = "[" * 100_000
    (tmp_path / FILE).write_text(f"{json.dumps(row)}\n{json.dumps(choice)}\n{deep}\n")
    found = Records(tmp_path)
    assert (found.trials, found.choices) == ({}, {})
    tuned = TunedKernels(str(tmp_path))
    assert tuned.schedule(reduction.function, "f", reduction.cpu) is None
    assert list(tuned.without) == ["f"]


def test_a_schedule_that_computes_something_else_is_never_kept(
    reduction: FunctionTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effic.backends.tvm.schedule.functions import scheduled

    # A function whose schedule forgets half: faster than any, and wrong.
    other = next(task for task in tasks_of(halved()) if task.calls == 2)
    wrong = prepare_function(scheduled(other.function, other.cpu), other.cpu)
    right = FunctionTask.prepare

    def broken(self: FunctionTask, tile: Any, footprint: int) -> Any:
        return wrong if tile else right(self, tile, footprint)

    monkeypatch.setattr(FunctionTask, "prepare", broken)
    tuner = Tuner(reduction.cpu, [reduction], Records(tmp_path), tmp_path / "trying")
    tuner.run(3, 0, 3, lambda *row: None)
    found = Records(tmp_path)
    assert [trial.status for trial in found.trials[reduction.key]] == ["wrong"] * 3
    assert not found.choices


def halved() -> Model:
    """:func:`sums` of halves: as large a result, another one."""
    model = sums()
    for node in list(model.graph):
        if node.op_type == "Exp":
            node.op_type = "Abs"
    return model


CRASHING = """
import os, signal
from effic.backends.tvm import tune, tune_schedule

def crash(self, function, cpu):
    os.kill(os.getpid(), signal.SIGSEGV)

def run(request, tell):
    tune_schedule.Spaces.__init__ = crash
    return tune.tune_in_child(request, tell)
"""


def test_a_function_whose_spaces_crash_is_left_as_it_is(
    tasks: list[FunctionTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing_spaces.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tuning, "CHILD", "crashing_spaces:run")
    found = tune_kernels(BACKEND, sums(), tmp_path / "log", 1)
    assert (found.trials, found.crashed) == (1, 1)
    tiles = [trial.tile for trials in Records(tmp_path / "log").trials.values() for trial in trials]
    assert tiles == [{}]
