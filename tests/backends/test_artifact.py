from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effic.backends.ort.artifact import OrtArtifact
from effic.bench import bench, machine
from effic.ir.errors import InvalidModelError, NotMeasuredError, UsageError
from effic.models.builders import cnn

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def write(path: Path, text: str) -> Path:
    ir.save(ir.from_onnx_text(HEADER + text), path)
    return path


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    return write(
        tmp_path / "adder.onnx", "g (float[N,4] x, float[N,4] y) => (float[N,4] z) { z = Add(x, y) }"
    )


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    steps = "".join(f"v{i + 1} = MatMul(v{i}, v{i}) " for i in range(8))
    return write(
        tmp_path / "chain.onnx",
        f"g (float[96,96] x, float[96,96] y) => (float[96,96] z) {{ v0 = Tanh(x) {steps} z = Add(v8, y) }}",
    )


def test_run(adder: Path) -> None:
    artifact = OrtArtifact.load(adder)
    assert (artifact.inputs, artifact.outputs, artifact.threads) == (["x", "y"], ["z"], 1)
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(artifact.run({"x": x, "y": x, "unread": x})["z"], 2 * x)


def test_errors_are_sentences(adder: Path, tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    unknown = write(tmp_path / "unknown.onnx", "g (float[4] x) => (float[4] y) { y = Banana(x) }")
    artifact = OrtArtifact.load(adder)
    cases = [
        (UsageError, lambda: OrtArtifact.load(tmp_path / "none.onnx")),
        (UsageError, lambda: OrtArtifact.load(adder, threads=0)),
        (InvalidModelError, lambda: OrtArtifact.load(broken)),
        (InvalidModelError, lambda: OrtArtifact.load(unknown)),
        (InvalidModelError, lambda: OrtArtifact.load(adder, config={"": "1"})),
        (UsageError, lambda: artifact.run({"x": x})),
        (UsageError, lambda: artifact.run({"x": x, "y": np.ones((3, 5), np.float32)})),
        (NotMeasuredError, lambda: artifact.run({"x": x, "y": np.ones((3, 4), np.float32)})),
        (UsageError, lambda: artifact.time({"x": x, "y": x}, repeats=0)),
        (UsageError, lambda: bench(adder, repeats=0)),
    ]
    for number, (kind, action) in enumerate(cases):
        with pytest.raises(kind) as caught:
            action()
        assert len(str(caught.value).splitlines()) == 1, number


def test_time(adder: Path) -> None:
    x = np.ones((2, 4), np.float32)
    seconds = OrtArtifact.load(adder).time({"x": x, "y": x}, repeats=5, batch=3)
    assert len(seconds) == 5
    assert all(0 < s < 1 for s in seconds)


def test_save_copies_the_weights(tmp_path: Path) -> None:
    source, copy = tmp_path / "a.onnx", tmp_path / "sub" / "b.onnx"
    copy.parent.mkdir()
    ir.save(cnn(), source, external_data="a.data")
    artifact = OrtArtifact.load(source)
    artifact.save(copy)
    (tmp_path / "a.data").unlink()
    x = np.ones([d if isinstance(d, int) else 2 for d in cnn().graph.inputs[0].shape], np.float32)
    name = artifact.inputs[0]
    for want, got in zip(
        artifact.run({name: x}).values(), OrtArtifact.load(copy).run({name: x}).values(), strict=True
    ):
        np.testing.assert_array_equal(want, got)


def test_bench_of_two(adder: Path, chain: Path) -> None:
    turns: list[tuple[int, int]] = []
    x = np.ones((96, 96), np.float32)
    slow = OrtArtifact.load(chain)
    quick = OrtArtifact.load(
        write(adder.parent / "quick.onnx", "g (float[96,96] x) => (float[96,96] z) { z = Neg(x) }")
    )
    result = bench(slow, quick, {"x": x, "y": x}, repeats=5, progress=lambda i, n: turns.append((i, n)))
    assert turns == [(i, 5) for i in range(1, 6)]
    assert result.b is not None
    assert result.speedup is not None
    assert result.speedup > 1
    assert result.speedup_low <= result.speedup <= result.speedup_high
    assert result.a.low_ms <= result.a.median_ms <= result.a.high_ms
    assert result.b.runs_per_batch > 1
    assert json.loads(json.dumps(result.to_dict()))["inputs"] == {
        "x": "float32[96, 96]",
        "y": "float32[96, 96]",
    }
    assert set(machine()) == {"processor", "cores", "system"}


def test_bench_makes_inputs_up(adder: Path) -> None:
    result = bench(adder, repeats=2)
    assert (result.b, result.speedup) == (None, None)
    assert result.inputs == {"x": "float32[2, 4]", "y": "float32[2, 4]"}
    assert result.a.load_ms > 0
