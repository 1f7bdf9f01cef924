"""Runs that are killed at random moments go on, and end in the same bytes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from effic.ir.onnx_format import read_onnx
from effic.record import get_build
from tests.effic.test_killed import Run, chain, content, server

__all__ = ["server"]

KILLS = 20


def test_killed_runs_go_on_until_the_same_bytes(server: tuple[Path, Run]) -> None:
    folder, run = server
    chain(folder / "in.onnx", 0, layers=3, width=64)
    np.savez(folder / "c.npz", h0=np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32))
    passes = "prune-sparsegpt,eliminate-identities,quantize-gptq{group_size=32}"
    # What checks keep is looked at elsewhere: here the time goes to the moments of killing.
    argv = ["optimize", "in.onnx", "--passes", passes, "--calib", "c.npz", "-q", "--check", "off"]
    argv += ["--target", "portable", "--external-data", "-o"]
    whole = run(None, *argv, "plain.onnx")
    assert whole["code"] == 0
    want = structure(folder / "plain.onnx"), content(folder / "plain.onnx")
    build = get_build(read_onnx(folder / "plain.onnx"))
    output, progress = folder / "out.onnx", folder / "out.onnx.progress"
    rng, kills, runs, within, cycles = random.Random(7), 0, 0, 0, 0
    while kills < KILLS:
        assert runs < 4 * KILLS, "the runs get on"
        clear(folder)
        code = -9
        while code != 0:
            # Long before the end at first, as it is with runs that get killed; most of them while they work.
            kind, most = ("seconds", 1.0) if rng.random() < 0.2 else ("writing", 0.6)
            code = run({kind: rng.uniform(0, most * whole["seconds"])}, *argv, "out.onnx", "--resume")["code"]
            if code == 2:  # killed behind the end of its work: there is nothing to go on with
                assert output.exists()
                assert not progress.exists()
                break
            assert code in (0, -9)
            runs, kills = runs + 1, kills + (code == -9)
            within += code == -9 and bool(list(progress.glob("*-quantize-gptq-*")))
        assert structure(output) == want[0]
        assert content(output) == want[1]
        assert json.loads((folder / "out.effic.json").read_text())["build"] == build
        assert not progress.exists()
        assert len(list(folder.glob("out.onnx*.data"))) == 1
        cycles += 1
    assert within >= 3, "some moments lie within the last pass"


def clear(folder: Path) -> None:
    """Remove what runs have left."""
    for path in folder.glob("out.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def structure(path: Path) -> bytes:
    """A model file but for the name of its data, which is another one where a whole output was written again."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "data"
    return model.SerializeToString()


@pytest.mark.parametrize("event", [0, 1, 2, 4])
def test_a_run_killed_while_its_files_take_their_names_goes_on(event: int, server: tuple[Path, Run]) -> None:
    folder, run = server
    clear(folder)
    chain(folder / "in.onnx", 0, layers=2, width=64)
    argv = [
        "optimize",
        "in.onnx",
        "--passes",
        "quantize-easyquant",
        "-q",
        "--check",
        "off",
        "--external-data",
    ]
    argv += ["--resume", "-o", "out.onnx"]
    whole = run(None, *argv)
    want = content(folder / "out.onnx")
    clear(folder)
    assert run({"event": whole["events"] - event}, *argv)["code"] == -9
    again = run(None, *argv)["code"]
    # No --force is needed for what is its own; behind the end of the work there is nothing to go on with.
    assert again == (2 if event == 0 else 0)
    assert (folder / "out.effic.json").exists()
    assert content(folder / "out.onnx") == want
    assert not (folder / "out.onnx.progress").exists()
    assert len(list(folder.glob("out.onnx*.data"))) == 1
