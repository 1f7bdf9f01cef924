"""Tuning from end to end: measured in a child, kept, used again, taken by builds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends import get_backend
from effic.backends.tvm import tune as tuning
from effic.backends.tvm import versions
from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.targets import TvmCpu
from effic.backends.tvm.tune import KernelTask, find_tasks, tune_kernels
from effic.backends.tvm.tune_records import FILE, Choice, Records, Trial, with_tile
from effic.backends.tvm.tune_tiles import cache_tiles, register_tiles
from effic.cli.main import main
from effic.ir.errors import MissingExtraError, MissingToolError, NotMeasuredError, UsageError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.tune import tune

K, N, ROWS = 32, 48, 8
TARGET = "tvm-cpu{num_cores=1}"
TILE = {"panel": 16, "rows": 8}


def linear(rows: int | str = ROWS) -> Model:
    """``relu(x @ w) @ v + x @ w @ v``: one kernel is called twice."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, K]))
    w, v = (
        ir.Value(name=name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in (("w", (K, N)), ("v", (N, K)))
    )
    first = ir.Node("", "MatMul", [x, w], name="first")
    relu = ir.Node("", "Relu", [first.outputs[0]], name="relu")
    second = ir.Node("", "MatMul", [relu.outputs[0], v], name="second")
    third = ir.Node("", "MatMul", [first.outputs[0], v], name="third")
    total = ir.Node("", "Add", [second.outputs[0], third.outputs[0]], name="total")
    out = total.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, K])
    nodes = [first, relu, second, third, total]
    graph = ir.Graph([x], [out], nodes=nodes, initializers=[w, v], opset_imports={"": 21}, name="linear")
    return Model(ir.Model(graph, ir_version=10))


def kernels() -> list[KernelTask]:
    """The kernels among what can be tuned."""
    found = find_tasks(linear(), TvmCpu(num_cores=1).cpu(), "", "fp32")
    return [task for task in found if isinstance(task, KernelTask)]


def effic(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in argv], prog_name="effic")


def tried(log: Path) -> list[tuple[str, str]]:
    """Kernel and tile of every candidate with a record, in order."""
    return [(t.key, json.dumps(t.tile)) for trials in Records(log).trials.values() for t in trials]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.onnx`` and what four trials found, ``log``; ``first.json`` is what was printed."""
    folder = tmp_path_factory.mktemp("tuned")
    linear().save(folder / "model.onnx")
    done = effic(
        "tune", folder / "model.onnx", "--target", TARGET, "--trials", "4", "--log", folder / "log", "--json"
    )
    assert done.exit_code == 0, done.output
    (folder / "first.json").write_text(done.stdout)
    return folder


def test_what_is_called_is_found_once_with_its_calls() -> None:
    tasks = kernels()
    assert sorted((task.spec.k, task.spec.n, task.calls) for task in tasks) == [(K, N, 1), (N, K, 2)]
    # Rows that are known at run time only are nothing to measure.
    assert find_tasks(linear("rows"), get_backend(TARGET).cpu(), "", "fp32") == []  # type: ignore[attr-defined]


def test_trials_are_counted_and_kept(home: Path) -> None:
    found = json.loads((home / "first.json").read_text())
    assert (found["trials"], found["crashed"]) == (4, 0)
    assert found["left"] > 0
    assert found["speedup"] >= 1
    assert len(tried(home / "log")) == len(set(tried(home / "log"))) == 4
    assert sorted(one["calls"] for one in found["kernels"] if one["kind"] == "kernel") == [1, 2]
    assert all(one["seconds"] > 0 for one in found["kernels"])
    assert sum(one["tried"] for one in found["kernels"]) == 4
    assert {t.status for trials in Records(home / "log").trials.values() for t in trials} == {"timed"}


def test_records_are_used_again_and_added_to(home: Path) -> None:
    before = (home / "log" / FILE).read_bytes()
    again = tune(home / "model.onnx", home / "log", target=TARGET, trials=0)
    assert again.trials == 0
    assert (home / "log" / FILE).read_bytes() == before  # nothing was measured, not even the defaults
    heard: list[tuple[str, int, int]] = []
    told = tune(
        home / "model.onnx", home / "log", target=TARGET, trials=1000, progress=lambda *row: heard.append(row)
    )
    assert (
        told.trials == len(tried(home / "log")) - 4 >= json.loads((home / "first.json").read_text())["left"]
    )
    assert told.left == 0
    assert len(tried(home / "log")) == len(set(tried(home / "log")))
    assert (home / "log" / FILE).read_bytes().startswith(before)
    assert heard[-1][0].startswith("kernels ")
    assert "x, schedules " in heard[-1][0]
    assert heard[-1][1:] == (told.trials, 1000)


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    """Records by which the kernel that is called twice has a tile of its own; the other one has none."""
    cpu = TvmCpu(num_cores=1).cpu()
    task = next(task for task in kernels() if task.calls == 2)
    tile = TILE
    assert tile in register_tiles(task.spec, cpu)
    Records(tmp_path / "my log").add(
        [Trial(task.key, tile, "timed", 2.0), Choice(task.key, tile, 2.0, 1.9, 2.1)]
    )
    return tmp_path / "my log"


def test_a_build_takes_the_records(home: Path, chosen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tvm"
    target = f'tvm-cpu{{num_cores=1,tuned="{chosen}"}}'
    done = effic(
        "optimize",
        home / "model.onnx",
        "--passes",
        "eliminate-dead-code",
        "--target",
        target,
        "-o",
        out,
        "--json",
    )
    assert done.exit_code == 0, done.output
    remarks = {row["where"]: row for row in json.loads(done.stdout)["steps"][-1]["remarks"]}
    tuned = remarks["MatMul 'second'"]["text"]
    assert f"panel{TILE['panel']}" in tuned
    assert f"rows{TILE['rows']}" in tuned
    assert "panel" not in remarks["MatMul 'first'"]["text"]
    without = [row for where, row in remarks.items() if "not tuned: " in row["text"]]
    # The other kernel, and what has none.
    assert [row["where"].startswith("dense_") for row in without].count(True) == 1
    assert {row["kind"] for row in without} == {"missed"}
    assert all(str(chosen) in row["text"] for row in without)
    inputs = {"x": np.random.default_rng(3).standard_normal((ROWS, K)).astype(np.float32)}
    found = compare_outputs(Oracle(linear()).run(inputs), TvmArtifact.load(out).run(inputs))
    assert found.max_rel < 1e-5


def test_every_tile_computes_the_same() -> None:
    from effic.backends.tvm.tune_measure import prepare, same

    cpu = TvmCpu(num_cores=1).cpu()
    for task in kernels():
        default = prepare(task.spec, cpu, 0)
        assert not same(default.output, default.output + 1)
        for tile in [*register_tiles(task.spec, cpu)[:3], *cache_tiles(task.spec, cpu, {})]:
            assert same(default.output, prepare(with_tile(task.spec, tile), cpu, 1 << 16).output), tile


@pytest.mark.parametrize(
    ("log", "said"), [("none", "this folder does not exist"), (".", "holds no records of tuning")]
)
def test_a_missing_log_is_a_sentence_before_anything_is_built(
    home: Path, tmp_path: Path, log: str, said: str
) -> None:
    target = f'tvm-cpu{{tuned="{tmp_path / log}"}}'
    done = effic("optimize", home / "model.onnx", "--passes", "eliminate-dead-code", "--target", target,
                 "-o", tmp_path / "out.tvm")  # fmt: skip
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_sentences(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="ort-cpu has nothing to tune"):
        tune(linear(), tmp_path, target="ort-cpu")
    with pytest.raises(UsageError, match="trials is -1"):
        tune(linear(), tmp_path, trials=-1)
    with pytest.raises(UsageError, match=r"is a file; records are kept in a folder"):
        tune(linear(), home / "model.onnx")
    assert effic("tune", home / "none.onnx", "--log", tmp_path).exit_code == 2
    assert effic("tune", home / "model.onnx").exit_code == 2  # no log
    monkeypatch.setattr(versions, "version", lambda package: "0.1.15.post2")
    done = effic("tune", home / "model.onnx", "--log", tmp_path / "log")
    assert done.exit_code == 3
    assert "tuning with apache-tvm-ffi 0.1.15.post2 crashes; run: pip install" in done.stderr
    assert not (tmp_path / "log").exists()
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'effic\[tvm\]'"):
        tune(linear(), tmp_path)


CRASHING = """
import os, signal
from pathlib import Path
from effic.backends.tvm import tune, tune_measure
from effic.backends.tvm.tune_records import tile_of

prepare = tune_measure.prepare

def fragile(spec, cpu, footprint):
    mark = Path({mark!r})
    if tile_of(spec) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return prepare(spec, cpu, footprint)

def run(request, tell):
    tune_measure.prepare = fragile
    return tune.tune_in_child(request, tell)

def always(request, tell):
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_candidate_that_crashes_is_left_out_and_the_others_are_tried(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING.format(mark=str(tmp_path / "mark")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tuning, "CHILD", "crashing:run")
    found = tune_kernels(TvmCpu(num_cores=1), linear(), tmp_path / "log", 2)
    trials = [t for trials in Records(tmp_path / "log").trials.values() for t in trials]
    assert found.trials == len(trials) == 2
    assert found.crashed == 1
    assert sorted(t.status for t in trials) == ["crashed", "timed"]
    assert trials[0].tile != trials[1].tile
    monkeypatch.setattr(tuning, "CHILD", "crashing:always")
    with pytest.raises(NotMeasuredError, match=r"tuning for TVM crashed \(SIGSEGV\)"):
        tune_kernels(TvmCpu(num_cores=1), linear(), tmp_path / "log", 3)


def test_ffi_errors_are_of_the_exit_code_three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "version", lambda package: "0.1.15.post2")
    with pytest.raises(MissingToolError) as caught:
        tune_kernels(TvmCpu(), linear(), tmp_path, 1)
    assert caught.value.exit_code == 3
