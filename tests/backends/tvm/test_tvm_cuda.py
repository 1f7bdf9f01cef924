"""The target tvm-cuda where there is no GPU: what is built, what is said, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="apache-tvm is not installed")

import effic
from effic.backends import get_backend
from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.cuda import Gpu, find_nvcc, has_driver, refused_by_nvcc
from effic.backends.tvm.manifest import read_manifest
from effic.ir.errors import InvalidModelError, NotMeasuredError, UnsupportedError, UsageError
from effic.ir.model import Model
from tests.backends.test_lower_encodings import make_encoding, make_model

no_gpu = pytest.mark.skipif(has_driver(), reason="there is a GPU, on which tests/gpu runs")


def two_products(rows: int = 3) -> Model:
    """A product with 4-bit weights per output channel, and one with groups per input channel."""
    op = "h = MatMul(x, w) a = Relu(h) y = MatMul(a, v)"
    text = f"g (float[{rows},64] x, float[64,48] w, float[48,32] v) => (float[{rows},32] y) {{ {op} }}"
    of_inputs = make_encoding((48, 32), group=16, k_axis=1, symmetric=False)
    return make_model(text, {"w": make_encoding((64, 48)), "v": of_inputs})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder built without a check, and the remarks of the build."""
    path = tmp_path_factory.mktemp("cuda") / "out.tvm"
    report = effic.optimize(two_products(), target="tvm-cuda", output=path, check="off")
    return path, [remark.text for remark in report.steps[-1].remarks]


def test_products_with_codes_are_on_kernels(built) -> None:
    _, remarks = built
    kernels = [text for text in remarks if "cuda_quantized" in text]
    assert len(kernels) == 2
    assert "groupingoc" in kernels[0]
    assert "groupingic" in kernels[1]


@no_gpu
def test_the_build_says_how_far_it_is_verified(built) -> None:
    path, remarks = built
    manifest = read_manifest(path)
    assert (manifest.device, manifest.mcpu) == ("cuda", "sm_90")
    if find_nvcc() is not None:
        assert manifest.verified == "compiled"
        assert any(
            text.startswith("compiled by nvcc") and "not run: no CUDA device" in text for text in remarks
        )
    else:
        assert manifest.verified == "built"
        assert any("not compiled by nvcc" in text for text in remarks)


@no_gpu
def test_without_nvcc_the_build_holds_source(tmp_path, monkeypatch) -> None:
    # The child inherits the environment; a PATH with nothing but the C++ compiler's folder has no nvcc here.
    empty = tmp_path / "bin"
    empty.mkdir()
    for tool in ("g++", "cc", "gcc", "as", "ld"):
        if (found := shutil.which(tool)) is not None:
            (empty / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    path = tmp_path / "out.tvm"
    built = get_backend("tvm-cuda").build(two_products(), path)
    assert "not compiled by nvcc, which is not here" in built.remarks[-1].text
    assert "unverified" in built.remarks[-1].text
    assert read_manifest(path).verified == "built"


@no_gpu
def test_a_check_that_cannot_be_run_is_no_pass(tmp_path) -> None:
    with pytest.raises(NotMeasuredError, match="no CUDA device is here; give --check off") as caught:
        effic.optimize(two_products(), target="tvm-cuda", output=tmp_path / "out.tvm")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out.tvm").exists()


@no_gpu
def test_loading_without_a_gpu_is_one_sentence(built) -> None:
    path, _ = built
    with pytest.raises(
        NotMeasuredError, match=r"is for a GPU \(sm_90\), and this machine has none"
    ) as caught:
        TvmArtifact.load(path)
    assert caught.value.exit_code == 3


def test_show_prints_a_build_for_a_gpu(built) -> None:
    from click.testing import CliRunner

    from effic.cli.main import main

    path, _ = built
    shown = CliRunner().invoke(main, ["show", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "GPU sm_90" in shown.output
    table = json.loads(CliRunner().invoke(main, ["show", str(path), "--json"]).stdout)
    assert table["device"] == "cuda"


def test_the_survey_counts_kernels() -> None:
    survey = get_backend("tvm-cuda").survey(two_products())  # type: ignore[attr-defined]
    rows = {row.op: row for row in survey.rows}
    assert rows["MatMul"].kernels == 2
    assert not survey.uncovered


def test_open_batches_are_left_to_the_schedules() -> None:
    from effic.backends.tvm.relax_builder import build_relax

    text = "g (float[N,64] x, float[64,48] w) => (float[N,48] y) { y = MatMul(x, w) }"
    model = make_model(text, {"w": make_encoding((64, 48))})
    _, _, signature = build_relax(model, None, "", {"arch": "sm_90"})
    assert [way.kernels for way in signature.ways] == [()]


@pytest.mark.parametrize("arch", ["sm_75", "90", "sm_", "ampere", "sm_90b"])
def test_architectures_that_are_none(arch) -> None:
    with pytest.raises(UsageError, match="sm_80 and later"):
        get_backend(f"tvm-cuda{{arch={arch}}}")


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_120", (12, 1), True),
        ("sm_90", (10, 0), False),
    ],
)
def test_where_code_runs(arch, capability, runs) -> None:
    assert (Gpu(arch).why_not_on(capability) is None) == runs


def test_what_nvcc_refuses_is_one_sentence() -> None:
    said = 'k.cu(3): warning: odd\nk.cu(4): error: identifier "x" is undefined\n'
    error = RuntimeError(f"code\nCompilation error:\n{said}")
    found = refused_by_nvcc(error)
    assert isinstance(found, UnsupportedError)
    assert 'nvcc refuses the CUDA source of this model: k.cu(4): error: identifier "x"' in str(found)
    assert refused_by_nvcc(RuntimeError("something else")) is None


def test_a_manifest_of_an_unknown_device_is_refused(built, tmp_path) -> None:
    path, _ = built
    manifest = read_manifest(path)
    dataclasses.replace(manifest, device="tpu").write(tmp_path)
    with pytest.raises(InvalidModelError, match="'device' is none of cpu, cuda"):
        read_manifest(tmp_path)
    data = json.loads((path / "manifest.json").read_text())
    del data["device"], data["verified"]
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    assert read_manifest(tmp_path).device == "cpu"


def test_quantized_twice_in_buckets_shares_the_weights() -> None:
    from effic.backends.tvm.relax_builder import build_relax

    op = "y = MatMul(x, w)"
    encoding = make_encoding((64, 48))
    model = make_model(f"g (float[N,64] x, float[64,48] w) => (float[N,48] y) {{ {op} }}", {"w": encoding})
    _, parameters, signature = build_relax(model, None, "N=1;N=20", {"arch": "sm_90"})
    first, second = signature.buckets
    assert first.parameters == second.parameters
    assert sum(np.asarray(parameters[name]).nbytes for name in first.parameters) < 64 * 48
