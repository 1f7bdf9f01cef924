"""Compressed real models score through TVM what their portable form scores, and targets agree node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs the tvm extra")

import effic
from effic.backends.tvm.artifact import TvmArtifact
from effic.ir.evaluate import Oracle
from effic.ir.onnx_format import read_onnx
from tests.backends.tvm.shipped_runs import build_here, check_across, check_folder
from tests.real.test_tvm_models import FILES

CLEAN = "eliminate-identities,fold-constants,canonicalize-linear,eliminate-dead-code"
FUSE = "eliminate-identities,fuse-conv-bn,fold-constants,eliminate-dead-code"
LENGTH, WINDOWS = 128, 4

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
Files = Callable[[str], Path]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    build_here(monkeypatch)


@pytest.mark.parametrize("name", FILES)
def test_the_folder_gives_the_oracles_outputs(name: str, data_dir: Path, tmp_path: Path) -> None:
    check_folder(data_dir / "onnx" / f"{name}.onnx", tmp_path / "out.tvm")


@pytest.mark.parametrize("name", ["basic_pitch_nmp", "resnet20_cifar", "stories260k", "version-RFB-320"])
def test_targets_agree_node_by_node(name: str, data_dir: Path) -> None:
    assert len(check_across(data_dir / "onnx" / f"{name}.onnx", taps=True).outputs) > 50


# -- metrics --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Portable files by the passes that made them."""
    folder = tmp_path_factory.mktemp("stories")

    @cache
    def made(passes: str) -> Path:
        out = folder / f"{abs(hash(passes))}.onnx"
        seen = {"calib": data_dir / "stories" / "ids_calib.npy", "calib_samples": 4}
        effic.optimize(
            data_dir / "onnx" / "stories260k.onnx",
            f"{CLEAN},{passes}",
            output=out,
            target="portable",
            check="off",
            **(seen if "adadim" in passes else {}),
        )
        return out

    return made


def loss(run: Run, data_dir: Path) -> float:
    """Mean loss of the next token on the first windows of the evaluation text."""
    ids = np.load(data_dir / "stories" / "ids_eval.npy").astype(np.int64)[: LENGTH * WINDOWS]
    windows, total = ids.reshape(WINDOWS, LENGTH), 0.0
    for window in windows:
        (logits,) = run({"ids": window[None]}).values()
        rows = logits[0, :-1].astype(np.float64)
        rows -= rows.max(1, keepdims=True)
        total -= (rows - np.log(np.exp(rows).sum(1, keepdims=True)))[np.arange(LENGTH - 1), window[1:]].mean()
    return total / WINDOWS


@pytest.mark.parametrize(
    ("passes", "activations", "tolerance"),
    [
        ("quantize-adadim{group_size=32}", "fp32", 1e-3),
        ("quantize-easyquant", "fp32", 1e-3),
        ("quantize-rtn{group_size=32,bits=8}", "fp32", 1e-3),
        ("prune-magnitude{n=2,m=4},compress-nm", "fp32", 1e-3),
        # Rounded activations are another computation: what they cost is bounded, not nothing.
        ("quantize-adadim{group_size=32}", "int8", 0.05),
        ("quantize-easyquant", "int8", 0.05),
    ],
)
def test_perplexity_is_that_of_the_portable_form(
    stories: Files, data_dir: Path, tmp_path: Path, passes: str, activations: str, tolerance: float
) -> None:
    portable, folder = stories(passes), tmp_path / "out.tvm"
    target = f'tvm-cpu{{shapes="batch=1,seq={LENGTH}",activations={activations}}}'
    effic.optimize(portable, "eliminate-dead-code", output=folder, target=target, check="off")
    want = np.exp(loss(Oracle(read_onnx(portable)).run, data_dir))
    got = np.exp(loss(TvmArtifact.load(folder, threads=1).run, data_dir))
    assert abs(got - want) <= tolerance * want


@pytest.mark.parametrize(
    "passes",
    [
        "quantize-adadim{kinds=[Conv,Gemm,MatMul],group_size=32}",
        "prune-magnitude{n=2,m=4,kinds=[Conv]},compress-nm",
    ],
)
def test_classes_are_those_of_the_portable_form(data_dir: Path, tmp_path: Path, passes: str) -> None:
    with np.load(data_dir / "cifar10" / "calib_lossless.npz") as arrays:
        images = next(arrays[key] for key in arrays if arrays[key].ndim == 4)[:48]
    x = images if images.shape[1] == 3 else images.transpose(0, 3, 1, 2)
    x = ((x / 255 - 0.45) / 0.2).astype(np.float32)
    portable, folder = tmp_path / "portable.onnx", tmp_path / "out.tvm"
    source = data_dir / "onnx" / "resnet20_cifar.onnx"
    seen = {"calib": x[:16]} if "adadim" in passes else {}
    effic.optimize(source, f"{FUSE},{passes}", output=portable, target="portable", check="off", **seen)
    effic.optimize(
        portable, "eliminate-dead-code", output=folder, target='tvm-cpu{shapes="batch=16"}', check="off"
    )
    model, artifact = read_onnx(portable), TvmArtifact.load(folder, threads=1)
    name, oracle = model.graph.inputs[0].name or "", Oracle(model)
    for part in np.split(x[:48], 3):
        (want,), (got,) = oracle.run({name: part}).values(), artifact.run({name: part}).values()
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
        np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
