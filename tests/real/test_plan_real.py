"""Plans of real models, held against the runs: processes of their own, within 25 %.

The models are small: most of what the process holds is the interpreter and the runtime. What either adds to that is
compared, and may differ by 25 % or by 15 MB, whichever is more: buffers of threads and of file reading come to that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from effic.passes.presets import preset

CHILD = Path(__file__).parents[1] / "effic" / "planned_run.py"
SLACK = 15_000_000
CASES = [
    ("mobilenet_v1_075_224.onnx", "int8", False),
    ("mobilenet_v1_075_224.onnx", "quantize-int8", True),
    ("stories260k.onnx", "default", False),
    ("stories260k.onnx", "int4", False),
]


def child(what: str, options: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(CHILD), what, json.dumps(options)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("name", "passes", "calibrated"), CASES)
def test_real_models_take_what_was_promised(
    name: str, passes: str, calibrated: bool, data_dir: Path, tmp_path: Path
) -> None:
    text = passes if "-" in passes else preset(passes).text
    options: dict[str, Any] = {"source": str(data_dir / "onnx" / name), "passes": text}
    if calibrated:
        options |= {"calib": "random", "calib_samples": 8}
    promised = child("plan", options)
    measured = child("run", {**options, "output": str(tmp_path / "out.onnx")})
    base = min(promised["base"], measured["base"])
    assert promised["file"] == pytest.approx(measured["file"], rel=0.01, abs=2000)
    assert promised["sites"] == measured["sites"]
    assert promised["memory"] - base == pytest.approx(measured["memory"] - base, rel=0.25, abs=SLACK)
    assert promised["temporary"] == pytest.approx(measured["temporary"], rel=0.25, abs=2 << 20)
