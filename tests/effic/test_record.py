"""The record of a build, and building again from it."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

import effic
from effic.cli.main import main
from effic.ir.errors import UsageError
from effic.models import digits_path, digits_test
from effic.record import SUFFIX, file_digest, get_build, read_record, record_path
from effic.reproduce import reproduce

SCHEMA = json.loads((files("effic") / "schemas" / "record.schema.json").read_text())
INT4 = "fuse-conv-bn,quantize-rtn{kinds=[Conv,MatMul,Gemm],min_size=0}"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(digits_path(), tmp_path / "model.onnx")
    images, _ = digits_test()
    np.savez(tmp_path / "calib.npz", x=images[:64])
    np.savez(tmp_path / "inputs.npz", images=images[:4])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record_of(output: Path) -> dict[str, Any]:
    data = json.loads(record_path(output).read_text())
    jsonschema.validate(data, SCHEMA)
    return dict(data)


def test_what_it_says(project: Path) -> None:
    out = project / "out.onnx"
    effic.optimize("model.onnx", INT4, output=out)
    data = record_of(out)
    assert read_record(project / "out.effic.json") == data
    assert data["build"]["source"]["files"][0]["sha256"] == file_digest("model.onnx").sha256
    assert data["output"]["files"][0]["sha256"] == file_digest(out).sha256
    assert data["build"]["passes"][1] == INT4.partition(",")[2]
    assert data["build"]["options"][1]["bits"] == 4
    assert data["measured"]["after"]["weight_bytes"] < data["measured"]["before"]["weight_bytes"]
    assert get_build(effic.read_onnx(out)) == data["build"]


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        (INT4, {}),
        (INT4, {"target": "portable", "check": "off", "external": True}),
        ("quantize-gptq{min_size=0}", {"calib": "calib.npz", "calib_samples": 16, "seed": 3}),
        ("quantize-int8", {"calib": "random", "inputs": "inputs.npz", "target": "portable"}),
        ([], {}),
    ],
)
def test_built_again_it_is_the_same_bit_for_bit(project: Path, passes: Any, options: dict[str, Any]) -> None:
    out = project / "out.onnx"
    effic.optimize("model.onnx", passes, output=out, **options)
    record_of(out)
    found = reproduce(record_path(out), output=project / "again.onnx")
    assert (found.same, found.differences, found.other_versions) == (True, (), ())
    again, first = effic.read_onnx(project / "again.onnx"), effic.read_onnx(out)
    assert [n.op_type for n in again.nodes(domain=None)] == [n.op_type for n in first.nodes(domain=None)]


@pytest.mark.parametrize(
    ("coarse", "options"),
    [
        ("quantize-rtn{bits=2,symmetric=false,min_size=0,group_size=-1,kinds=[Conv,MatMul,Gemm]}", {}),
        ("prune-wanda{n=1,m=16}", {"calib": "calib.npz"}),
    ],
)
def test_passes_that_were_undone_are_not_repeated(
    project: Path, coarse: str, options: dict[str, Any]
) -> None:
    from effic.guard import Accuracy

    images, labels = digits_test()
    wanted = Accuracy("top1", {"x": images, "labels": labels}, max_drop=0.5)
    effic.optimize("model.onnx", f"fuse-conv-bn,{coarse}", output="out.onnx", accuracy=wanted, **options)
    data = record_of(project / "out.onnx")
    assert data["build"]["passes"] == ["fuse-conv-bn"]
    assert data["build"]["calibration"] is None
    assert data["measured"]["accuracy"]["metric"] == "top1"
    assert reproduce("out.effic.json").same


def test_a_file_that_was_tampered_with_is_told(project: Path) -> None:
    effic.optimize("model.onnx", INT4, output="out.onnx")
    model = effic.read_onnx("out.onnx")
    name, value = next(
        (n, v) for n, v in model.graph.initializers.items() if v.dtype and v.dtype.name == "FLOAT"
    )
    import onnx_ir as ir

    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() + np.float32(1), name=name)
    model.save("out.onnx", force=True)
    data = json.loads(Path("out.effic.json").read_text())
    entry = file_digest("out.onnx")
    data["output"]["files"] = [{"name": entry.name, "bytes": entry.bytes, "sha256": entry.sha256}]
    Path("out.effic.json").write_text(json.dumps(data))
    found = reproduce("out.effic.json")
    assert not found.same
    assert any(f"1 tensors differ: {name}" in text for text in found.differences)


def test_another_version_is_named(project: Path) -> None:
    effic.optimize("model.onnx", INT4, output="out.onnx")
    data = json.loads(Path("out.effic.json").read_text())
    data["build"]["versions"]["onnx"] = "1.0"
    Path("out.effic.json").write_text(json.dumps(data))
    assert any("onnx 1.0 then" in text for text in reproduce("out.effic.json").other_versions)


def test_other_files_than_then_are_refused(project: Path) -> None:
    effic.optimize("model.onnx", "quantize-gptq{min_size=0}", output="out.onnx", calib="calib.npz")
    images, _ = digits_test()
    np.savez("calib.npz", x=images[64:128])
    with pytest.raises(UsageError, match="calibration data are others"):
        reproduce("out.effic.json")
    Path("calib.npz").unlink()
    with pytest.raises(UsageError, match="is not there; say where it is with --calib"):
        reproduce("out.effic.json")
    effic.optimize("model.onnx", "fuse-conv-bn", output="other.onnx")
    with pytest.raises(UsageError, match="is another file than that of the record"):
        reproduce("out.effic.json", source="other.onnx")
    Path("model.onnx").rename("moved.onnx")
    with pytest.raises(UsageError, match="say where it is with --source"):
        reproduce("out.effic.json")
    np.savez("calib.npz", x=images[:64])
    assert reproduce("out.effic.json", source="moved.onnx").same


def test_a_model_from_memory_has_a_record_but_cannot_be_repeated(project: Path) -> None:
    from effic.models.builders import BUILDERS

    effic.optimize(effic.Model(BUILDERS["cnn"]()), "fuse-conv-bn", output="out.onnx")
    record_of(project / "out.onnx")
    with pytest.raises(UsageError, match="came from memory"):
        reproduce("out.effic.json")


def test_no_stale_record_is_left(project: Path) -> None:
    effic.optimize("model.onnx", INT4, output="out.onnx")
    effic.optimize("model.onnx", "fuse-conv-bn", output="out.onnx", force=True, record=False)
    assert not Path("out.effic.json").exists()
    assert get_build(effic.read_onnx("out.onnx")) is None
    # Nor the build of the model that went in.
    effic.optimize("model.onnx", INT4, output="a.onnx")
    effic.optimize("a.onnx", "eliminate-dead-code", output="b.onnx", record=False)
    assert get_build(effic.read_onnx("b.onnx")) is None


def test_in_place_the_digest_is_of_what_was_read(project: Path) -> None:
    before = file_digest("model.onnx").sha256
    effic.optimize("model.onnx", "fuse-conv-bn", output="model.onnx", force=True)
    data = record_of(project / "model.onnx")
    assert data["build"]["source"]["files"][0]["sha256"] == before


def test_large_files_are_sampled(tmp_path: Path) -> None:
    path = tmp_path / "large"
    data = np.random.default_rng(0).integers(0, 256, 20 << 20, np.uint8)
    data.tofile(path)
    first = file_digest(path, whole=False)
    assert first.sampled
    assert first.sha256 != file_digest(path).sha256
    for at in (0, len(data) - 1):
        data[at] ^= 1
        data.tofile(path)
        assert file_digest(path, whole=False).sha256 != first.sha256
        data[at] ^= 1
    path.write_bytes(b"tiny")
    assert file_digest(path, whole=False).bytes == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no record"),
        ("[1]", "is no record"),
        ("{}", "is no record"),
        ('{"effic_record": 9}', "has format 9"),
        ('{"effic_record": 1}', "there is no 'build'"),
        ('{"effic_record": 1, "build": 3}', "there is no 'build.source'"),
        ("[" * 100_000, "is no record"),
    ],
)
def test_what_is_no_record(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / f"x{SUFFIX}"
    path.write_text(text)
    result = CliRunner().invoke(main, ["reproduce", str(path)])
    assert (result.exit_code, reason in result.output) == (2, True), result.output


def test_a_record_cannot_name_files_elsewhere(project: Path) -> None:
    effic.optimize("model.onnx", INT4, output="out.onnx")
    data = json.loads(Path("out.effic.json").read_text())
    data["build"]["source"]["files"][0]["name"] = "../../etc/passwd"
    Path("out.effic.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="malformed"):
        reproduce("out.effic.json")
    with pytest.raises(UsageError, match="cannot read"):
        reproduce("none.effic.json")


def test_the_command_line(project: Path) -> None:
    def run(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, args)
        return result.exit_code, result.output

    assert run("optimize", "model.onnx", "--passes", INT4, "-o", "out.onnx", "-q")[0] == 0
    code, text = run("reproduce", "out.effic.json", "-o", "again.onnx")
    assert (code, "the same, bit for bit" in text) == (0, True)
    code, text = run("reproduce", "out.effic.json", "-o", "again.onnx")
    assert (code, "give --force" in text) == (2, True)
    code, text = run("show", "out.onnx")
    assert "from a file with the sha256 " in text
    assert run("optimize", "model.onnx", "-o", "plain.onnx", "--no-record", "-q")[0] == 0
    assert not Path("plain.effic.json").exists()
    data = json.loads(Path("out.effic.json").read_text())
    data["build"]["passes"] = ["fuse-conv-bn"]
    Path("out.effic.json").write_text(json.dumps(data))
    code, text = run("reproduce", "out.effic.json", "--json")
    assert code == 1
    assert not json.loads(text)["same"]
