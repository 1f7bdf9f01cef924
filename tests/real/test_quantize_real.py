"""quantize-rtn on real models, judged by their own metric through the file that ships."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import effic
from effic.ir.evaluate import start_session

CLEAN = "eliminate-identities,fold-constants,canonicalize-linear"
WINDOWS = 24  # of 116: the perplexity of the whole set is within 2 % of theirs


@pytest.fixture(scope="module")
def baseline(data_dir: Path) -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("PIL")
    sys.path.insert(0, str(data_dir))
    try:
        return importlib.import_module("baseline")
    finally:
        sys.path.remove(str(data_dir))


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    session = start_session(str(path), optimized=True)
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


@pytest.fixture(scope="module")
def perplexity(baseline: ModuleType, data_dir: Path) -> Callable[[Path], float]:
    ids = np.load(data_dir / "stories" / "ids_eval.npy").astype(np.int64)[: WINDOWS * 512].reshape(-1, 512)
    return lambda path: float(np.exp(baseline.mean_nll(runner(path), ids)[0]))


@pytest.mark.parametrize(
    ("bits", "target", "worse"),
    [
        (8, "ort-cpu{accuracy_level=0}", 1.002),
        (8, "ort-cpu", 1.01),
        (4, "ort-cpu{accuracy_level=0}", 1.12),
        (4, "ort-cpu", 1.13),
    ],
)
def test_stories_keeps_its_perplexity(
    tmp_path: Path,
    data_dir: Path,
    perplexity: Callable[[Path], float],
    bits: int,
    target: str,
    worse: float,
) -> None:
    source, out = data_dir / "onnx" / "stories260k.onnx", tmp_path / "out.onnx"
    report = effic.optimize(
        source, f"{CLEAN},quantize-rtn{{bits={bits},group_size=32}}", output=out, target=target
    )
    # The head is tied to the embedding, which is left alone unless asked for.
    assert report.steps[3].passed == 35
    before, after = perplexity(source), perplexity(out)
    assert after <= worse * before
    assert out.stat().st_size < source.stat().st_size


def test_both_targets_mean_the_same(tmp_path: Path, data_dir: Path) -> None:
    source = data_dir / "onnx" / "stories260k.onnx"
    outputs = []
    for target in ("portable", "ort-cpu{accuracy_level=0}"):
        out = tmp_path / "out.onnx"
        effic.optimize(
            source, f"{CLEAN},quantize-rtn{{group_size=32}}", output=out, target=target, force=True
        )
        session = start_session(str(out))
        ids = np.arange(64, dtype=np.int64).reshape(2, 32)
        outputs.append(session.run(None, {session.get_inputs()[0].name: ids})[0])
    assert np.max(np.abs(outputs[0] - outputs[1])) <= 1e-4 * np.max(np.abs(outputs[0]))


def test_a_tied_embedding_is_quantized_once_when_asked(tmp_path: Path, data_dir: Path) -> None:
    source = data_dir / "onnx" / "stories260k.onnx"
    out = tmp_path / "out.onnx"
    passes = f"{CLEAN},quantize-rtn{{bits=8,group_size=32,embeddings=true}},eliminate-dead-code"
    report = effic.optimize(source, passes, output=out)
    assert report.steps[3].passed == 36
    assert report.distance is not None
    assert report.distance.sqnr_db > 25
    assert out.stat().st_size < 0.45 * source.stat().st_size
