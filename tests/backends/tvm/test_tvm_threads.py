"""Several threads: the same outputs as with one, timed in turns with ONNX Runtime's, on the wall clock."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends import get_backend
from effic.backends.tvm.artifact import TvmArtifact
from effic.cli.main import main
from effic.ir.errors import UsageError
from effic.ir.model import Model

SIZE, ROWS = 512, 16


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.onnx``, two products that are worth two threads, and ``out.tvm``."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([ROWS, SIZE]))
    weights = [
        ir.Value(name=name, const_value=ir.tensor(rng.standard_normal((SIZE, SIZE)).astype(np.float32) / 20))
        for name in ("w", "v")
    ]
    first = ir.Node("", "MatMul", [x, weights[0]], name="first")
    second = ir.Node("", "MatMul", [first.outputs[0], weights[1]], name="second")
    out = second.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([ROWS, SIZE])
    graph = ir.Graph(
        [x], [out], nodes=[first, second], initializers=weights, opset_imports={"": 21}, name="two"
    )
    model, folder = Model(ir.Model(graph, ir_version=10)), tmp_path_factory.mktemp("threads")
    model.save(folder / "model.onnx")
    get_backend("tvm-cpu{num_cores=2}").build(model, folder / "out.tvm")
    return folder


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    if int(os.environ.get("TVM_NUM_THREADS", "2")) < 2 or (os.cpu_count() or 1) < 2:
        pytest.skip("this process may use one thread alone")


@pytest.mark.usefixtures("two")
def test_outputs_are_equal_whatever_the_number_of_threads(built: Path) -> None:
    assert b"ParallelLaunch" in (built / "out.tvm" / "model.so").read_bytes()
    one, two = (TvmArtifact.load(built / "out.tvm", threads=n) for n in (1, 2))
    inputs = one.made_up()
    wanted = one.run(inputs)["y"]
    for artifact in (two, one, two):
        np.testing.assert_array_equal(artifact.run(inputs)["y"], wanted)


@pytest.mark.usefixtures("two")
def test_bench_waits_for_the_threads_of_the_other_runtime(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for threads, pauses in ((2, 6), (1, 0)):
        slept.clear()
        argv = ["bench", str(built / "model.onnx"), str(built / "out.tvm"), "--repeats", "3", "--json"]
        done = CliRunner().invoke(main, [*argv, "--threads", str(threads)])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["threads"] == threads
        assert len(slept) == pauses


def test_times_are_of_the_wall_clock(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, clock = TvmArtifact.load(built / "out.tvm"), iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert artifact.time(artifact.made_up(), repeats=2, batch=4) == [0.25, 0.25]


@pytest.mark.parametrize("text", ["none", "0", "-1", "1.5", ""])
def test_a_number_of_threads_that_is_none_is_refused(
    built: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", text)
    with pytest.raises(UsageError, match=r"TVM_NUM_THREADS is .*, and 1 threads are wanted; set it before"):
        TvmArtifact.load(built / "out.tvm")
