"""Runs that are killed at any moment leave the old output or the new one, whole, and the input as it was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effic.ir.onnx_format import read_onnx, write_onnx
from effic.ir.whole_files import WholeFiles, write_whole
from effic.record import read_record

RANDOM_KILLS = 10  # of each of the six jobs
OUTPUTS = ("out.onnx", "out.onnx.data", "out.effic.json")
JOBS = {
    "copy": "eliminate-dead-code",
    "rewrite": "eliminate-identities",
    "quantize": "quantize-rtn{bits=4,group_size=64}",
}


def chain(path: Path, seed: int, layers: int = 4, width: int = 512) -> Path:
    """A model of a few MB, MatMul and Identity in turn."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    for i in range(layers):
        weights.append(numpy_helper.from_array(rng.standard_normal((width, width)).astype("f") / 20, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"], name=f"mul{i}"))
        nodes.append(helper.make_node("Identity", [f"m{i}"], [f"h{i + 1}"], name=f"id{i}"))
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, width])] for n in ("h0", f"h{layers}")]
    graph = helper.make_graph(nodes, "chain", *ends, weights)
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


Run = Callable[[dict[str, Any] | None, str], dict[str, Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Run]]:
    """A folder, and what runs ``effic optimize`` in it and kills it there."""
    if not hasattr(os, "fork"):
        pytest.skip("killing many runs cheaply needs fork")
    folder = tmp_path_factory.mktemp("killed")
    scratch = tmp_path_factory.mktemp("scratch")
    process = subprocess.Popen(
        [sys.executable, "-P", Path(__file__).with_name("killed_runs.py"), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def run(kill: dict[str, Any] | None, *argv: str) -> dict[str, Any]:
        process.stdin.write(json.dumps({"argv": argv, "kill": kill}) + "\n")
        process.stdin.flush()
        found: dict[str, Any] = json.loads(process.stdout.readline())
        return found

    with process:
        yield folder, run
        process.stdin.close()


def content(path: Path) -> str:
    """Digest of a model's graph and weights, wherever they are stored."""
    model = read_onnx(path)
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        assert value.const_value is not None
        digest.update(name.encode() + value.const_value.tobytes())
    for node in model.nodes(domain=None):
        digest.update(f"{node.op_type} {[v and v.name for v in node.inputs]}".encode())
    return digest.hexdigest()


def state(folder: Path) -> str | None:
    """The output's content, or None without one; a record, where there is one, is of these very files."""
    output, record = folder / "out.onnx", folder / "out.effic.json"
    if record.exists():
        for file in read_record(record)["output"]["files"]:
            data = (folder / file["name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == file["sha256"], "the record is of another output"
    return content(output) if output.exists() else None


@pytest.mark.parametrize("over", [False, True], ids=["new", "over"])
@pytest.mark.parametrize("job", JOBS)
def test_a_killed_run_leaves_the_old_output_or_the_new(
    job: str, over: bool, server: tuple[Path, Run]
) -> None:
    folder, run = server
    for file in folder.iterdir():
        file.unlink()
    source = chain(folder / "in.onnx", 0)
    given = source.read_bytes()
    argv = ["optimize", "in.onnx", "-o", "out.onnx", "--passes", JOBS[job], "-q", "--external-data"]
    # The numbers are checked in another test: here the time goes to the moments of writing.
    argv += ["--check", "off", "--target", "portable", *(["--force"] if over else [])]
    kept: dict[str, bytes] = {}
    if over:
        chain(folder / "older.onnx", 1)
        older = [arg if arg != "in.onnx" else "older.onnx" for arg in argv]
        assert run(None, *older)["code"] == 0
        kept = {name: (folder / name).read_bytes() for name in OUTPUTS}
    old = state(folder)
    whole = run(None, *argv)
    assert whole["code"] == 0
    new = state(folder)
    assert new is not None
    assert new != old

    rng = random.Random(job + str(over))
    kills: list[dict[str, float]] = [{"event": n + 1} for n in range(whole["events"])]
    tail = whole["seconds"] - whole["writing"]
    kills += [{"seconds": rng.uniform(0, whole["seconds"])} for _ in range(RANDOM_KILLS // 2)]
    kills += [{"writing": rng.uniform(0, tail)} for _ in range(RANDOM_KILLS - RANDOM_KILLS // 2)]
    seen, killed, events = set(), 0, 0
    for kill in kills:
        for name in OUTPUTS:
            if over:
                (folder / name).write_bytes(kept[name])
            elif name != "out.onnx.data":  # one without its model stays in the way, as it would
                (folder / name).unlink(missing_ok=True)
        ended = run(kill, *argv)
        assert ended["code"] in (0, -9), kill
        killed += ended["code"] == -9
        events += "event" in kill and ended["code"] == -9
        found = state(folder)
        assert found in (old, new), kill
        assert source.read_bytes() == given, kill
        seen.add(found)
    assert events == whole["events"], "every change of a file has a kill before it"
    assert killed >= events + RANDOM_KILLS // 3, "most random moments lie before the end"
    assert seen == {old, new}
    # What the killed runs left behind stops nobody.
    (folder / "out.onnx").unlink() if not over else None
    assert run(None, *argv)["code"] == 0
    assert state(folder) == new
    assert not list(folder.glob(".effic-*"))
    if over:
        assert len(list(folder.glob("out.onnx*"))) == 2, "the model and its data"


def test_files_of_a_run_that_lives_are_no_leftovers(tmp_path: Path) -> None:
    (tmp_path / f".effic-{'0' * 16}.tmp").write_bytes(b"of a killed run")
    (tmp_path / f".effic-{'1' * 16}.tmp").mkdir()
    (tmp_path / ".effic-mine.tmp").write_bytes(b"named by somebody else")
    with WholeFiles() as files:
        first = files.create(tmp_path, "a")
        first.write(b"whole")
        write_whole(tmp_path / "b", b"meanwhile")
        files.create(tmp_path, "c").write(b"too")
        files.commit()
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f".effic-{'1' * 16}.tmp",
        ".effic-mine.tmp",
        "a",
        "b",
        "c",
    ]


def test_nothing_appears_when_the_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    def write() -> None:
        with WholeFiles() as files:
            files.create(tmp_path, "a").write(b"new")
            files.commit(fail)

    with pytest.raises(OSError, match="No space"):
        write()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_data_that_a_renamed_model_reads_is_kept(tmp_path: Path) -> None:
    source = chain(tmp_path / "in.onnx", 0, width=64)
    output = tmp_path / "out.onnx"
    write_onnx(read_onnx(source), output, external=True)
    output.rename(tmp_path / "best.onnx")
    expected = content(tmp_path / "best.onnx")
    other = read_onnx(chain(tmp_path / "other.onnx", 1, width=64))
    for _ in range(3):
        write_onnx(other, output, external=True, force=True)
        assert content(tmp_path / "best.onnx") == expected
        assert content(output) == content(tmp_path / "other.onnx")
    assert len(list(tmp_path.glob("*.data"))) == 2
