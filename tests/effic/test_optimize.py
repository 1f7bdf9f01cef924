"""The whole job from Python: what is written, what is refused, what the report holds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import effic
from effic.ir.errors import CheckFailedError, InvalidModelError, NotMeasuredError, UsageError
from effic.ir.evaluate import run_session, runnable_inputs, start_session
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.models.builders import BUILDERS
from effic.passes.base import Numerics, Pass, Remarks


@dataclass(frozen=True)
class Breaks(Pass):
    """Claims to be exact and negates the first weight it finds.

    Before:  w
    After:   -w
    """

    name: ClassVar[str] = "breaks"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: Model, remarks: Remarks) -> None:
        conv = next(model.nodes("Conv"))
        old = conv.inputs[1]
        assert old is not None
        assert old.const_value is not None
        new = model.add_initializer(model.graph, "negated", -old.const_value.numpy())
        conv.replace_input_with(1, new)
        remarks.passed(conv, "negated")


@pytest.fixture
def cnn(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    Model(BUILDERS["cnn"]()).save(path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_default_preset_on_every_seeded_model(tmp_path: Path, name: str, target: str) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    Model(BUILDERS[name]()).save(source)
    report = effic.optimize(source, output=out, target=target)
    if name != "shared_weights":  # a norm folded into a shared weight needs a copy of it
        assert report.after.weight_bytes <= report.before.weight_bytes
    assert report.after.nodes <= report.before.nodes
    model = read_onnx(source)
    from effic.ir.evaluate import Oracle

    inputs, want = runnable_inputs(model, Oracle(model))
    got = run_session(start_session(str(out), optimized=True), inputs)
    for key, array in want.items():
        assert np.max(np.abs(got[key] - array)) <= 1e-4 * np.max(np.abs(array))


def test_a_breach_names_pass_and_node_and_writes_nothing(cnn: Path, tmp_path: Path) -> None:
    before, out = digest(cnn), tmp_path / "out.onnx"
    with pytest.raises(CheckFailedError, match=r"breaks broke the model.*Conv"):
        effic.optimize(cnn, [Breaks()], output=out)
    with pytest.raises(CheckFailedError):
        effic.optimize(cnn, [Breaks()], output=cnn, force=True)
    assert not out.exists()
    assert digest(cnn) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_existing_files_are_kept_unless_forced(cnn: Path) -> None:
    before = digest(cnn)
    with pytest.raises(UsageError, match="--force"):
        effic.optimize(cnn, "fuse-conv-bn", output=cnn)
    assert digest(cnn) == before
    report = effic.optimize(cnn, "fuse-conv-bn", output=cnn, force=True)
    assert report.output == str(cnn)
    assert "BatchNormalization" not in {n.op_type for n in read_onnx(cnn).graph}


def test_dry_run_writes_nothing(cnn: Path, tmp_path: Path) -> None:
    report = effic.optimize(cnn, "fuse-conv-bn", output=tmp_path / "out.onnx", dry_run=True)
    assert report.output is None
    assert report.steps[0].passed
    with pytest.raises(UsageError, match="--force"):  # as the real run would
        effic.optimize(cnn, "fuse-conv-bn", output=cnn, dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_refusals_come_before_the_work(cnn: Path, tmp_path: Path) -> None:
    for output, message in (("absent/out.onnx", "does not exist"), (".", "is a folder")):
        with pytest.raises(UsageError, match=message):
            effic.optimize(cnn, "fuse-conv-bn", output=tmp_path / output)
    with pytest.raises(UsageError, match="did you mean 'ort-cpu'"):
        effic.optimize(cnn, "fuse-conv-bn", target="ort-cpus")
    with pytest.raises(UsageError):
        effic.optimize(tmp_path / "absent.onnx", "fuse-conv-bn")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07garbage")
    with pytest.raises(InvalidModelError):
        effic.optimize(tmp_path / "broken.onnx", "fuse-conv-bn")


def test_require_change(cnn: Path) -> None:
    with pytest.raises(CheckFailedError, match="changed nothing"):
        effic.optimize(cnn, "fuse-conv-bn,fuse-conv-bn", require_change=True)


def test_report_is_json_and_the_record_is_in_the_file(cnn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    report = effic.optimize(cnn, "fuse-conv-bn,eliminate-dead-code", output=out)
    row = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert row["passes"] == "fuse-conv-bn,eliminate-dead-code"
    assert row["steps"][0]["passed"] == report.steps[0].passed > 0
    assert row["steps"][0]["remarks"][0]["where"]
    assert row["file_bytes"] == [cnn.stat().st_size, out.stat().st_size]
    assert read_onnx(out).record[0].text == "fuse-conv-bn"
    assert report.steps[0].peak_memory > 0


def test_own_inputs_are_used_and_checked(cnn: Path, tmp_path: Path) -> None:
    name = read_onnx(cnn).graph.inputs[0].name or ""
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, **{name: np.ones((3, 3, 16, 16), np.float32)})
    np.savez(bad, other=np.ones(3))
    assert effic.optimize(cnn, "fuse-conv-bn", inputs=good).distance is not None
    with pytest.raises(UsageError, match="lack"):
        effic.optimize(cnn, "fuse-conv-bn", inputs=bad)


def test_unknown_operators_are_kept_but_not_unchecked_in_silence(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "my.own" : 1]>
        g (float[2] x) => (float[2] y) { a = Identity(x)  b = my.own.Magic(a)  y = Relu(b) }"""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    Model(ir.from_onnx_text(text)).save(source)
    with pytest.raises(NotMeasuredError, match="Magic"):
        effic.optimize(source, output=out)
    assert not out.exists()
    report = effic.optimize(source, output=out, check="off")
    assert report.verdict == "not checked"
    assert [n.op_type for n in read_onnx(out).graph] == ["Magic", "Relu"]


def test_one_pass_list_for_torch_and_onnx(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 16),
    ).eval()  # fmt: skip
    module[1].running_mean.normal_()
    example = (torch.randn(2, 3, 8, 8),)
    exported, a, b = tmp_path / "exported.onnx", tmp_path / "a.onnx", tmp_path / "b.onnx"
    effic.capture(module, example).save(exported)
    passes = "fuse-conv-bn,canonicalize-linear,quantize-rtn{bits=4,group_size=32},eliminate-dead-code"
    effic.optimize(module, passes, example_inputs=example, output=a)
    effic.optimize(exported, passes, output=b)
    x = {"input": example[0].numpy()}
    one, two = (next(iter(run_session(start_session(str(p)), x).values())) for p in (a, b))
    assert np.array_equal(one, two)


def test_calibration_data_of_every_kind(cnn: Path) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    name = str(read_onnx(cnn).graph.inputs[0].name)
    digests = set()
    for data in (
        {name: images},
        [{name: image[None]} for image in images],
        lambda: ({name: i[None]} for i in images),
    ):
        report = effic.optimize(cnn, "quantize-gptq{min_size=0}", calib=data)
        assert report.calibration is not None
        digests.add(report.calibration["digest"])
        assert report.steps[0].data == report.calibration["digest"]
    assert len(digests) == 1
    assert effic.optimize(cnn, "fuse-conv-bn").calibration is None


def test_calibration_data_nobody_looks_at_are_refused(cnn: Path) -> None:
    with pytest.raises(UsageError, match="no pass of this run looks at calibration data"):
        effic.optimize(cnn, "fuse-conv-bn", calib="random")
    with pytest.raises(UsageError, match="calib_samples does nothing without calibration data"):
        effic.optimize(cnn, "fuse-conv-bn", calib_samples=3)
    with pytest.raises(UsageError, match="quantize-gptq needs calibration data"):
        effic.optimize("no-such-file.onnx", "quantize-gptq")


def test_progress_is_told(cnn: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    effic.optimize(cnn, "fuse-conv-bn", progress=lambda *row: seen.append(row))
    assert [text for text, _, _ in seen] == [
        "running the original", "fuse-conv-bn", "lowering for ort-cpu", "running the result",
    ]  # fmt: skip
    assert all(number < total == 3 for _, number, total in seen)


def test_a_model_that_came_in_quantized_is_not_blamed_for_the_kernels_of_the_runtime() -> None:
    # The runtime runs DequantizeLinear + MatMul with 8-bit activations, before and after any pass.
    model = Model(
        ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 14]> g (float[4,64] x) => (float[4,16] y) {
            d = DequantizeLinear <axis = 1> (q, s)  h = Identity(x)  y = MatMul(h, d) }""")
    )
    rng = np.random.default_rng(0)
    dequantize = next(model.nodes("DequantizeLinear"))
    codes = rng.integers(-127, 128, (64, 16)).astype(np.int8)
    scales = np.full(16, 0.01, np.float32)
    for index, array in enumerate((codes, scales)):
        dequantize.replace_input_with(index, model.add_initializer(model.graph, f"c{index}", array))
    report = effic.optimize(model, "eliminate-identities", target="portable")
    assert report.distance is not None
    assert report.steps[0].verdict == "exact"
    assert report.distance.sqnr_db > 30
