"""Models through the folder that ships: built in this process, which has imported TVM already, loaded, and run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import effic
from effic.backends.tvm import build
from effic.backends.tvm.artifact import TvmArtifact
from effic.compare import Bounds, Comparison
from effic.cross_check import cross_check
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.onnx_format import read_onnx
from tests.backends.tvm.module_runs import sizes_of

TOLERANCE = 1e-4


def build_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds run in this process: a child's seconds to import TVM are spent once."""

    def here(
        _what: str, function: str, request: Mapping[str, Any], _folder: object, _tell: object = None
    ) -> Any:
        assert function == "effic.backends.tvm.build:build_in_child"
        return json.loads(json.dumps(build.build_in_child(json.loads(json.dumps(request)), lambda *_: None)))

    monkeypatch.setattr(build, "run_in_child", here)


def target_for(path: Path) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """``tvm-cpu`` at sizes that the oracle runs at, with its inputs and outputs."""
    model = read_onnx(path)
    inputs, outputs = runnable_inputs(model, Oracle(model))
    sizes = sizes_of(model, inputs)
    return (f'tvm-cpu{{shapes="{sizes}"}}' if sizes else "tvm-cpu"), inputs, outputs


def check_folder(path: Path, folder: Path, passes: str = "eliminate-dead-code", **options: Any) -> None:
    """What ``effic optimize`` builds gives the oracle's outputs."""
    target, inputs, expected = target_for(path)
    effic.optimize(path, passes, output=folder, target=target, check="off", record=False, **options)
    found = compare_outputs(expected, TvmArtifact.load(folder, threads=1).run(inputs))
    assert found.shape_mismatch is None
    assert found.max_rel < TOLERANCE
    assert not found.wrong_integers
    assert not found.new_nonfinite


def check_across(path: Path, taps: bool) -> Comparison:
    """``effic compare --backends ort-cpu,tvm-cpu``, per output or per node."""
    found = cross_check(
        path, f"ort-cpu,{target_for(path)[0]}", count=1, taps=taps, bounds=Bounds(rtol=TOLERANCE)
    )
    assert not found.broken, found.broken
    assert found.outputs
    return found
