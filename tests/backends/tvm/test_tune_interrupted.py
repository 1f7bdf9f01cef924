"""A run of tuning that is interrupted or killed: what was measured stays, and the next one goes on from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends.tvm.tune_records import FILE, Records
from effic.ir.model import Model
from effic.tune import tune

K, N, ROWS = 32, 48, 8
TARGET = "tvm-cpu{num_cores=1}"
WAIT_SECONDS = 400


def product() -> Model:
    """One product with a weight."""
    weight = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([ROWS, K]))
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    node = ir.Node("", "MatMul", [x, w], name="product")
    out = node.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([ROWS, N])
    graph = ir.Graph([x], [out], nodes=[node], initializers=[w], opset_imports={"": 21}, name="product")
    return Model(ir.Model(graph, ir_version=10))


# Slow enough to be caught between two batches, and its process is known.
SLOW = """
import os, time
from pathlib import Path
from effic.backends.tvm import tune

compare = tune.Tuner._compare

def slow(self, task):
    compare(self, task)
    Path({note!r}).write_text(str(os.getpid()))
    time.sleep({seconds})

def run(request, tell):
    tune.BATCH = 2
    tune.Tuner._compare = slow
    return tune.tune_in_child(request, tell)
"""

# What ``effic`` runs, but for the child's side.
MAIN = """
import sys
from effic.backends.tvm import tune
tune.CHILD = "slow:run"
from effic.cli.main import main
main(sys.argv[1:])
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(what: str, ready: object) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.05)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="the child's process is looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_measured_stays_and_the_next_run_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    product().save(tmp_path / "model.onnx")
    log, note = tmp_path / "log", tmp_path / "pid"
    # A child of a killed parent ends at its next word; one of an interrupted parent is ended at once.
    seconds = 2 if number == signal.SIGKILL else 60
    (tmp_path / "slow.py").write_text(SLOW.format(note=str(note), seconds=seconds))
    run = subprocess.Popen(
        [sys.executable, "-P", "-c", MAIN, "tune", str(tmp_path / "model.onnx"), "--log", str(log), "--target", TARGET],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )  # fmt: skip
    try:
        wait_for("the first batch", lambda: note.exists() and note.read_text() != "")
        child = int(note.read_text())
        run.send_signal(number)
        _, said = run.communicate(timeout=WAIT_SECONDS)
    finally:
        run.kill()
    wait_for("the child's end", lambda: not is_alive(child))
    if number == signal.SIGINT:
        assert run.returncode == 130
        assert f"what was measured so far is in {log}; the same command goes on from there" in said
        assert "Traceback" not in said
    before = (log / FILE).read_bytes()
    (key,) = Records(log).trials
    first = Records(log).tried(key)
    assert len(first) == 2
    # As if the last line had been cut short, too.
    (log / FILE).write_bytes(before + b'{"key": "[')
    found = tune(tmp_path / "model.onnx", log, target=TARGET, trials=3)
    assert found.trials == 3
    tiles = [json.dumps(tile) for tile in Records(log).tried(key)]
    assert tiles[:2] == [json.dumps(tile) for tile in first]
    assert len(set(tiles)) == len(tiles) == 5
    assert len((log / FILE).read_text().split('"kind": "base"')) == 2  # the default was timed once
