"""The jobs with tvm-cpu: built in a child, checked, recorded, shown, timed, compared, built again."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends import get_backend
from effic.backends.artifact import Artifact
from effic.backends.base import Built
from effic.backends.ort.artifact import OrtArtifact
from effic.backends.tvm import features
from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.manifest import read_manifest
from effic.backends.tvm.targets import TvmCpu
from effic.bench import BenchResult, Timing
from effic.cli.main import main
from effic.folder_build import FolderBuild, check_buckets, check_build, inputs_that_fit
from effic.ir.errors import (
    CheckFailedError,
    MissingExtraError,
    MissingToolError,
    NotMeasuredError,
    UnsupportedError,
    UsageError,
)
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.optimize import optimize
from effic.passes.base import Remarks
from effic.passes.calibration import Calibration
from effic.reproduce import reproduce
from effic.show import inspect_model
from effic.testing import check_target

K, N = 64, 48


def linear(rows: int | str = 2, op: str = "MatMul", k: int = K, n: int = N) -> Model:
    """``relu(x @ w) @ v``, with a dynamic first dimension when ``rows`` is a name."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, k]))
    weights = [
        ir.Value(name=name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in (("w", (k, n)), ("v", (n, k)))
    ]
    first = ir.Node("", op, [x, weights[0]], name="first")
    relu = ir.Node("", "Relu", [first.outputs[0]], name="relu")
    second = ir.Node("", "MatMul", [relu.outputs[0], weights[1]], name="second")
    out = second.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, k])
    graph = ir.Graph(
        [x], [out], nodes=[first, relu, second], initializers=weights, opset_imports={"": 21}, name="linear"
    )
    return Model(ir.Model(graph, ir_version=10))


def effic(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in argv], prog_name="effic")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.onnx`` and what ``effic optimize --preset int4`` made of it, ``out.tvm``."""
    folder = tmp_path_factory.mktemp("built")
    linear().save(folder / "model.onnx")
    passes = "quantize-rtn{bits=4,group_size=16}"
    done = effic(
        "optimize",
        folder / "model.onnx",
        "--passes",
        passes,
        "--target",
        "tvm-cpu",
        "-o",
        folder / "out.tvm",
        "--json",
    )
    assert done.exit_code == 0, done.output
    (folder / "report.json").write_text(done.stdout)
    return folder


def test_the_artifact_computes_what_the_canonical_model_does(built: Path) -> None:
    canonical = optimize(built / "model.onnx", "quantize-rtn{bits=4,group_size=16}", target="portable").model
    inputs = {"x": np.random.default_rng(5).standard_normal((2, K)).astype(np.float32)}
    found = compare_outputs(Oracle(canonical).run(inputs), TvmArtifact.load(built / "out.tvm").run(inputs))
    assert found.max_rel < 1e-5


def test_the_report_says_what_each_node_became(built: Path) -> None:
    report = json.loads((built / "report.json").read_text())
    lowered = report["steps"][-1]
    assert lowered["text"] == "tvm-cpu"
    remarks = {row["where"]: row["text"] for row in lowered["remarks"]}
    assert "runs on effic's" in remarks["MatMul 'first'"]
    assert "MatMul 'second'" in remarks
    assert lowered["verdict"].startswith(("rounding", "exact"))
    assert lowered["seconds"] > 0
    assert lowered["peak_memory"] > 0
    assert report["file_bytes"][1] == sum(file.stat().st_size for file in (built / "out.tvm").iterdir())
    assert report["versions"]["apache-tvm"].startswith("0.27")


def test_weights_stay_encoded_and_out_of_the_library(built: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in (built / "out.tvm").iterdir()}
    assert set(sizes) == {"model.so", "params.safetensors", "manifest.json"}
    assert sizes["params.safetensors"] < 0.5 * 4 * 2 * K * N  # codes, scales and padding, not fp32


def test_the_record_is_in_the_manifest_and_beside_the_folder(built: Path) -> None:
    record = json.loads((built / "out.tvm.effic.json").read_text())
    assert record["build"] == read_manifest(built / "out.tvm").build
    assert {row["name"] for row in record["output"]["files"]} == {
        "model.so", "params.safetensors", "manifest.json",
    }  # fmt: skip
    assert record["build"]["versions"]["apache-tvm-ffi"].startswith("0.1.14")
    assert read_manifest(built / "out.tvm").source == inspect_model(built / "model.onnx").sha256


def test_it_is_built_again_bit_for_bit(built: Path) -> None:
    found = reproduce(built / "out.tvm.effic.json")
    assert found.same, found.differences


def test_show_bench_and_compare_take_folders(built: Path) -> None:
    told = effic("show", built / "out.tvm")
    assert told.exit_code == 0, told.output
    assert "in   x: float32[2, 64]" in told.stdout
    assert "quantize-rtn" in told.stdout
    assert json.loads(effic("show", built / "out.tvm", "--json").stdout)["misfit"] is None
    both = effic("bench", built / "model.onnx", built / "out.tvm", "--repeats", "2", "--json")
    assert both.exit_code == 0, both.output
    timed = json.loads(both.stdout)
    assert timed["speedup"] > 0
    assert "apache-tvm" in timed["versions"]
    assert effic("bench", built / "out.tvm", "--repeats", "2").exit_code == 0
    compared = effic("compare", built / "model.onnx", built / "out.tvm", "--min-sqnr", "10", "--json")
    assert compared.exit_code == 0, compared.output
    assert json.loads(compared.stdout)["engine"].endswith("TVM (B)")
    assert effic("compare", built / "model.onnx", built / "out.tvm", "--max-abs", "1e-6").exit_code == 1
    assert effic("compare", built / "out.tvm", built / "out.tvm", "--max-abs", "0").exit_code == 0


def test_what_is_kept_if_faster_is_held_against_onnx_runtime_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear().save(tmp_path / "model.onnx")
    timed: list[tuple[str, str]] = []

    def bench(a: Artifact, b: Artifact, inputs: object, **options: object) -> BenchResult:
        # The pass does no harm, and ONNX Runtime is four times as fast.
        timed.append((type(a).__name__, type(b).__name__))
        speedup = 0.25 if isinstance(a, OrtArtifact) else 1.0
        one = Timing(b.path, 1.0, 1.0, 1.0, 1.0, 1)
        return BenchResult(one, one, speedup, speedup - 0.01, speedup + 0.01, 1, 15, {}, {}, {})

    monkeypatch.setattr("effic.faster.bench", bench)
    passes = ("--passes", "quantize-rtn{bits=4,group_size=16}", "--target", "tvm-cpu", "--keep-if-faster")
    done = effic("optimize", tmp_path / "model.onnx", *passes, "-o", tmp_path / "out.tvm")
    assert done.exit_code == 0, done.output
    assert timed == [("TvmArtifact", "TvmArtifact")] * 2 + [("OrtArtifact", "TvmArtifact")]
    assert "no clear difference: the result is 1.00 times as fast as the original (" in done.stdout
    assert "the result is slower: 0.25 times as fast as the original on ort-cpu (" in done.stdout
    speed = json.loads((tmp_path / "out.tvm.effic.json").read_text())["measured"]["speed"]
    assert (speed["beside"]["target"], speed["beside"]["speedup"]) == ("ort-cpu", 0.25)
    # What was finished and checked is timed, and not built once more for that.
    assert speed["beside"]["b"]["path"] == speed["total"]["b"]["path"]
    assert ".folder" in speed["total"]["b"]["path"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-o", "out.onnx"], "out.onnx is the name of a file; call it out.tvm"),
        (["-o", "out.tvm", "--single-file"], "do nothing with tvm-cpu"),
        (["-o", "taken"], "a folder of something else (it has no manifest.json)"),
        (["-o", "model.onnx/out.tvm"], "does not exist"),
        (["--target", "tvm-cpu{mcpu=cascadelak}"], "did you mean 'cascadelake'?"),
        (["--target", "tvm-cpu{num_cores=-1}"], "the least is 0"),
        (["--target", "tvm-cpu{shapes=\"rows\"}"], "rows"),
        (["--target", "tvm-cpu{shapes=\"rows=3\"}"], "rows"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_and_leave_nothing(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "model.onnx").write_bytes((built / "model.onnx").read_bytes())
    target = [] if "--target" in argv else ["--target", "tvm-cpu"]
    done = effic("optimize", "model.onnx", "--passes", "eliminate-dead-code", *target, *argv)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "taken"]


def test_an_existing_build_is_replaced_only_when_asked_for(built: Path, tmp_path: Path) -> None:
    TvmArtifact.load(built / "out.tvm").save(tmp_path / "out.tvm")
    before = (tmp_path / "out.tvm" / "manifest.json").read_bytes()
    argv = ("optimize", built / "model.onnx", "--passes", "eliminate-dead-code", "--target", "tvm-cpu")
    refused = effic(*argv, "-o", tmp_path / "out.tvm")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "out.tvm" / "manifest.json").read_bytes() == before
    done = effic(*argv, "-o", tmp_path / "out.tvm", "--force", "--no-record")
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "out.tvm").build is None
    assert [path.name for path in tmp_path.iterdir()] == ["out.tvm"]


def test_sizes_of_dynamic_dimensions_are_buckets(tmp_path: Path) -> None:
    report = optimize(
        linear("rows"),
        "eliminate-dead-code",
        target='tvm-cpu{shapes="rows=1;rows=3"}',
        output=tmp_path / "out.tvm",
    )
    assert report.distance is not None
    assert report.distance.max_rel < 1e-5
    assert [row["sizes"] for row in report.buckets] == [{"rows": 3}]
    assert report.buckets[0]["verdict"].startswith(("rounding", "exact"))
    assert report.to_dict()["buckets"][0]["distance"]["max_rel"] < 1e-5
    artifact, model = TvmArtifact.load(tmp_path / "out.tvm"), Oracle(linear("rows"))
    for rows in (1, 3):
        inputs = {"x": np.random.default_rng(rows).standard_normal((rows, K)).astype(np.float32)}
        assert compare_outputs(model.run(inputs), artifact.run(inputs)).max_rel < 1e-5
    with pytest.raises(UsageError, match=r"it takes: x \[1, 64\]; x \[3, 64\]"):
        artifact.run({"x": np.zeros((2, K), np.float32)})
    with pytest.raises(UsageError, match=r"has the shape \[5, 64\]"):
        inputs_that_fit(
            TvmCpu(shapes="rows=1"), linear("rows"), {"x": np.zeros((5, K), np.float32)}, given=True, seed=0
        )


def test_a_decoder_starts_without_a_past(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 17]>
        g (float[1,past,4] before, float[1,seq,4] x) => (float[1,seq,4] y, float[1,all,4] after) {
            turned = Transpose<perm=[0,1,2]>(before)
            after = Concat<axis=1>(turned, x)
            keys = Transpose<perm=[0,2,1]>(after)
            scores = MatMul(x, keys)
            shares = Softmax<axis=-1>(scores)
            y = MatMul(shares, after)
        }""")
    target = 'tvm-cpu{shapes="past=0,seq=5;past=5,seq=1"}'
    report = optimize(
        Model(ir.from_proto(proto)),
        "eliminate-dead-code",
        target=target,
        output=tmp_path / "out.tvm",
        record=False,
    )
    assert [row["sizes"] for row in report.buckets] == [{"past": 5, "seq": 1}]
    artifact = TvmArtifact.load(tmp_path / "out.tvm")
    rng = np.random.default_rng(0)
    for past, seq in ((0, 5), (5, 1)):
        feeds = {
            n: rng.standard_normal((1, k, 4)).astype(np.float32) for n, k in (("before", past), ("x", seq))
        }
        found, wanted = artifact.run(feeds), Oracle(Model(ir.from_proto(proto))).run(feeds)
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="built for other shapes"):
        artifact.run({"before": np.zeros((1, 0, 4), np.float32), "x": np.zeros((1, 1, 4), np.float32)})


def test_a_bucket_that_is_not_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second function gets the two weights, which are of one size, in the wrong order.
    build = TvmCpu.build

    def wrong(self: TvmCpu, model: Model, path: str | os.PathLike[str], **options: Any) -> Built:
        built, manifest = build(self, model, path, **options), read_manifest(path)
        first, second = manifest.buckets
        assert len(second.parameters) == 2
        second = dataclasses.replace(second, parameters=second.parameters[::-1])
        dataclasses.replace(manifest, buckets=(first, second)).write(path)
        return built

    monkeypatch.setattr(TvmCpu, "build", wrong)
    linear("rows", n=K).save(tmp_path / "model.onnx")
    argv = ("--passes", "eliminate-dead-code", "--target", 'tvm-cpu{shapes="rows=1;rows=3"}')
    done = effic("optimize", tmp_path / "model.onnx", *argv, "-o", tmp_path / "out.tvm")
    assert done.exit_code == 1, done.output
    assert "built is not the model at rows=3: " in done.stderr
    del done  # its traceback holds the folder, which goes with the process otherwise
    gc.collect()
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_samples_of_its_sizes_are_taken_for_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend = linear("rows"), TvmCpu(shapes="rows=1;rows=3;rows=5")
    samples = {"x": np.random.default_rng(3).standard_normal((3, K)).astype(np.float32)}
    calibration = Calibration.load([samples], model)
    seen: list[dict[str, np.ndarray]] = []

    class Right(FolderBuild):
        def __init__(self) -> None:
            pass

        def run(self, feeds: Any) -> Any:
            seen.extend(feeds)
            return (Oracle(model).run(inputs) for inputs in seen)

    rows = check_buckets(Right(), model, backend, calibration)
    assert [row["sizes"]["rows"] for row in rows] == [3, 5]
    np.testing.assert_array_equal(seen[0]["x"], samples["x"])
    assert seen[1]["x"].shape == (5, K)


def test_the_examples_of_the_page_run_as_they_stand(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors", reason="the example reads the weights with safetensors")
    monkeypatch.chdir(built)
    text = (Path(__file__).resolve().parents[3] / "docs" / "tvm.md").read_text()
    with_effic, without = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, object] = {}
    exec(compile(with_effic, "tvm.md", "exec"), names)
    assert capsys.readouterr().out == "{'y': (2, 64)}\n"
    assert "effic" not in without.replace("out.tvm", "")
    exec(compile(without, "tvm.md", "exec"), names := {})
    (found,) = names["outputs"]  # type: ignore[misc]
    zeros = {"x": np.zeros((2, K), np.float32)}
    np.testing.assert_array_equal(found.numpy(), TvmArtifact.load("out.tvm").run(zeros)["y"])


def test_the_conformance_kit_holds_it_to_what_targets_promise() -> None:
    assert check_target(get_backend("tvm-cpu"), linear(), least_sqnr_db=80).max_rel < 1e-5
    check_target(get_backend('tvm-cpu{shapes="rows=3"}'), linear("rows"), least_sqnr_db=80)


def test_a_cpu_that_is_named_decides_the_instructions(tmp_path: Path) -> None:
    built = get_backend("tvm-cpu{mcpu=x86-64,num_cores=1}").build(linear(), tmp_path / "old.tvm")
    assert built.outputs is None
    manifest = read_manifest(tmp_path / "old.tvm")
    assert (manifest.mcpu, manifest.cores) == ("x86-64", 1)
    assert not any(name.startswith("avx") for name in manifest.features)
    inputs = {"x": np.ones((2, K), np.float32)}
    found = compare_outputs(Oracle(linear()).run(inputs), TvmArtifact.load(tmp_path / "old.tvm").run(inputs))
    assert found.max_rel < 1e-5


def test_a_single_number_goes_in_and_comes_out_as_one(tmp_path: Path) -> None:
    kind = ir.TensorType(ir.DataType.FLOAT)
    a, b = (ir.Value(name=name, type=kind, shape=ir.Shape([])) for name in "ab")
    node = ir.Node("", "Add", [a, b], name="sum")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", kind, ir.Shape([])
    graph = ir.Graph([a, b], node.outputs, nodes=[node], opset_imports={"": 21}, name="scalars")
    get_backend("tvm-cpu").build(Model(ir.Model(graph, ir_version=10)), tmp_path / "one.tvm")
    artifact = TvmArtifact.load(tmp_path / "one.tvm")
    found = artifact.run({"a": np.array(2, np.float32), "b": np.array(3, np.float32)})["y"]
    assert (found.shape, float(found)) == ((), 5)


def test_a_build_for_a_cpu_that_is_not_here_says_that_it_cannot_be_checked(tmp_path: Path) -> None:
    if "avx512_fp16" in features._flags():
        pytest.skip("this machine has the instructions that it was to lack")
    backend = get_backend("tvm-cpu{mcpu=sapphirerapids}")
    with pytest.raises(
        NotMeasuredError, match=r"needs .*avx512fp16.*, which this CPU lacks; give --check off"
    ):
        backend.build(linear(), tmp_path / "new.tvm", inputs={"x": np.zeros((2, K), np.float32)})


def test_an_operator_that_cannot_be_lowered_is_named_before_anything_is_built(tmp_path: Path) -> None:
    model = linear()
    node = ir.Node("", "NonZero", [next(iter(model.graph)).outputs[0]], name="where")
    model.graph.append(node)
    node.outputs[0].name, node.outputs[0].type = "places", ir.TensorType(ir.DataType.INT64)
    node.outputs[0].shape = ir.Shape([2, "count"])
    model.graph.outputs.append(node.outputs[0])
    with pytest.raises(UnsupportedError, match="NonZero 'where'"):
        get_backend("tvm-cpu").lower(model, Remarks())
    model.save(tmp_path / "model.onnx")
    told = effic("show", tmp_path / "model.onnx", "--target", "tvm-cpu", "--json")
    assert told.exit_code == 1
    rows = {row["op"]: row for row in json.loads(told.stdout)["rows"]}
    assert rows["NonZero"]["refused"] == 1
    assert rows["MatMul"]["kernels"] == 2
    assert "cannot be run:" in effic("show", tmp_path / "model.onnx", "--target", "tvm-cpu").stdout
    other = effic("show", tmp_path / "model.onnx", "--target", "ort-cpu")
    assert other.exit_code == 2
    assert "ort-cpu is none" in other.stderr


def test_without_tvm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'effic\[tvm\]'") as caught:
        get_backend("tvm-cpu").lower(linear(), Remarks())
    assert caught.value.exit_code == 3


class Wrong(FolderBuild):
    """A build whose kernels are off by a given share."""

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        self.outputs = outputs


@pytest.mark.parametrize(
    ("activations", "error", "right"),
    [("fp32", 1e-5, True), ("fp32", 1e-2, False), ("int8", 1e-2, True), ("int8", 0.5, False)],
)
def test_a_build_that_is_not_the_model_is_refused(activations: str, error: float, right: bool) -> None:
    model, inputs = linear(), {"x": np.random.default_rng(1).standard_normal((2, K)).astype(np.float32)}
    good = Oracle(model).run(inputs)["y"]
    noise = np.random.default_rng(2).standard_normal(good.shape).astype(np.float32)
    wrong = Wrong({"y": good + error * noise * np.abs(good).max()})
    backend = get_backend(f"tvm-cpu{{activations={activations}}}")
    if right:
        check_build(wrong, model, backend, inputs)
        return
    with pytest.raises(CheckFailedError, match=r"what tvm-cpu.* built is not the model") as caught:
        check_build(wrong, model, backend, inputs)
    assert caught.value.exit_code == 1


def test_without_a_compiler_one_is_asked_for_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match=r"install g\+\+ or clang") as caught:
        optimize(linear(), "eliminate-dead-code", target="tvm-cpu", output=tmp_path / "out.tvm", check="off")
    assert caught.value.exit_code == 3
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="sizes of files are limited as Linux does")
def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the model's weights and too little for the library.
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        with pytest.raises(NotMeasuredError, match=r"failed \(exit code .*\) while linking$") as caught:
            optimize(
                linear(k=24, n=16),
                "eliminate-dead-code",
                target="tvm-cpu",
                output=tmp_path / "out.tvm",
                check="off",
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(text: str, *_: int) -> None:
        if text == "tvm-cpu: lowering":
            raise KeyboardInterrupt

    (tmp_path / "out.tvm").mkdir()
    (tmp_path / "out.tvm" / "manifest.json").write_text("an older build")
    with pytest.raises(KeyboardInterrupt):
        optimize(
            linear(),
            "eliminate-dead-code",
            target="tvm-cpu",
            output=tmp_path / "out.tvm",
            check="off",
            force=True,
            progress=interrupt,
        )
    assert os.listdir(tmp_path) == ["out.tvm"]
    assert (tmp_path / "out.tvm" / "manifest.json").read_text() == "an older build"
