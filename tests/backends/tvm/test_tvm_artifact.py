"""The folder: what it computes, that it loads without onnx or torch, and what is refused in a sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends.tvm import features  # noqa: E402
from effic.backends.tvm.artifact import TvmArtifact  # noqa: E402
from effic.backends.tvm.features import why_not_here  # noqa: E402
from effic.backends.tvm.manifest import Bucket, Manifest, Port, made_up, read_manifest  # noqa: E402
from effic.ir.errors import EfficError, InvalidModelError, NotMeasuredError, UsageError  # noqa: E402
from effic.ir.safetensors_format import write_safetensors  # noqa: E402

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) - 5


def _library(path: Path) -> None:
    """Two functions, for 2 and for 8 rows: ``relu(x @ w)``, and the sums of a row of integers."""
    from tvm import relax

    builder = relax.BlockBuilder()
    for name, rows in (("main_0", 2), ("main_1", 8)):
        x = relax.Var("x", relax.TensorType((rows, 4), "float32"))
        ids = relax.Var("ids", relax.TensorType((rows,), "int64"))
        w = relax.Var("w", relax.TensorType((4, 3), "float32"))
        with builder.function(name):
            with builder.dataflow():
                y = builder.emit(relax.op.nn.relu(relax.op.matmul(x, w)))
                doubled = builder.emit(relax.op.add(ids, ids))
                both = builder.emit_output(relax.Tuple([y, doubled]))
            builder.emit_func_output(both, [x, ids, w])
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64", "num-cores": 1})
    pipeline = relax.get_default_pipeline(target)
    tvm.compile(builder.get(), target, relax_pipeline=pipeline).export_library(str(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "small.tvm"
    folder.mkdir()
    library = folder / "model.so"
    _library(library)
    write_safetensors(folder / "params.safetensors", {"w": WEIGHT})
    buckets = tuple(
        Bucket(f"main_{i}", {"batch": rows}, ((rows, 4), (rows,)), ((rows, 3), (rows,)), ("w",))
        for i, rows in enumerate((2, 8))
    )
    Manifest(
        target="tvm-cpu",
        triple=str(tvm.target.codegen.llvm_get_system_triple()),
        mcpu="x86-64",
        features=(),
        cores=1,
        library=(library.stat().st_size, hashlib.sha256(library.read_bytes()).hexdigest()),
        parameter_bytes=(folder / "params.safetensors").stat().st_size,
        inputs=(Port("x", "float32"), Port("ids", "int64", 10)),
        outputs=(Port("y", "float32"), Port("doubled", "int64")),
        buckets=buckets,
        versions={"effic": "0.1.0"},
    ).write(folder)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy.tvm"))


def feeds(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((rows, 4)).astype(np.float32), "ids": rng.integers(0, 9, rows)}


def check(artifact: TvmArtifact, inputs: dict[str, np.ndarray]) -> None:
    found = artifact.run(inputs)
    assert list(found) == ["y", "doubled"]
    np.testing.assert_allclose(found["y"], np.maximum(inputs["x"] @ WEIGHT, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["doubled"], 2 * inputs["ids"])


@pytest.mark.parametrize("rows", [2, 8])
def test_the_bucket_is_chosen_by_the_shapes(made: Path, rows: int) -> None:
    artifact = TvmArtifact.load(made)
    check(artifact, {**feeds(rows), "unread": np.zeros(3)})
    assert (artifact.inputs, artifact.outputs) == (["x", "ids"], ["y", "doubled"])


def test_arrays_may_lie_anywhere_in_memory(made: Path) -> None:
    artifact = TvmArtifact.load(made)
    inputs = feeds(8)
    raw = np.zeros(8 * 16 + 4, np.uint8)
    off = raw[4:].view(np.float32).reshape(8, 4)  # on 4 bytes, where kernels want 64
    off[:] = inputs["x"]
    check(artifact, {**inputs, "x": off})
    check(artifact, {**inputs, "x": np.asfortranarray(inputs["x"])})
    read_only = inputs["x"].copy()
    read_only.flags.writeable = False
    check(artifact, {**inputs, "x": read_only})


def test_outputs_belong_to_the_caller(made: Path) -> None:
    artifact = TvmArtifact.load(made)
    first = artifact.run(feeds(2))
    kept = first["y"].copy()
    artifact.run(feeds(2, seed=1))
    np.testing.assert_array_equal(first["y"], kept)
    first["y"][:] = 0


@pytest.mark.parametrize("threads", [1, 2])
def test_other_threads_may_run_it(made: Path, threads: int) -> None:
    artifact = TvmArtifact.load(made, threads=threads)
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(5):
                check(artifact, feeds(8, 10 * seed + number))
        except BaseException as error:
            failed.append(error)
            raise

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


def test_times_are_taken(made: Path) -> None:
    artifact = TvmArtifact.load(made)
    seconds = artifact.time(feeds(2), repeats=3, batch=2)
    assert len(seconds) == 3
    assert all(0 < one < 10 for one in seconds)
    with pytest.raises(UsageError, match="at least 1"):
        artifact.time(feeds(2), repeats=0)


def test_made_up_inputs_fit(made: Path) -> None:
    artifact = TvmArtifact.load(made)
    inputs = artifact.made_up(3)
    assert inputs["ids"].max() < 10
    check(artifact, inputs)
    assert made_up(artifact.manifest, bucket=1)["x"].shape == (8, 4)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": np.zeros((2, 4), np.float32)}, r"the inputs lack 'ids' \(int64\); given: x"),
        ({**feeds(2), "x": np.zeros((2, 4))}, "the input 'x' is float64, and the artifact takes float32"),
        ({**feeds(2), "x": np.array([["a"] * 4] * 2)}, "takes float32"),
        (
            feeds(3),
            r"for other shapes than x \[3, 4\], ids \[3\]; it takes: x \[2, 4\], ids \[2\]; x \[8, 4\]",
        ),
        ({**feeds(2), "ids": np.zeros(8, np.int64)}, "other shapes"),
        ({**feeds(2), "x": np.zeros((2, 4, 1), np.float32)}, "other shapes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(made: Path, inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TvmArtifact.load(made).run(inputs)


def test_a_name_stands_for_one_size() -> None:
    bucket = Bucket("main", {}, (("N", 4), ("N",)), ((),), ())
    assert bucket.fits([(5, 4), (5,)])
    assert not bucket.fits([(5, 4), (6,)])
    assert not bucket.fits([(0, 4), (0,)])
    assert not bucket.fits([(5, 3), (5,)])


ALONE = """
import sys
for name in ("onnx", "onnx_ir", "onnxruntime", "torch"):
    sys.modules[name] = None  # importing them is an error
import numpy as np
from effic.backends.tvm.artifact import TvmArtifact
artifact = TvmArtifact.load(sys.argv[1])
found = artifact.run({"x": np.ones((2, 4), np.float32), "ids": np.arange(2)})
print(found["y"].tolist(), found["doubled"].tolist())
"""


def test_it_loads_without_onnx_or_torch(made: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, made], capture_output=True, text=True, check=True
    )
    wanted = np.maximum(np.ones((2, 4), np.float32) @ WEIGHT, 0).tolist()
    assert out.stdout.strip() == f"{wanted} [0, 2]"


THREADS = """
import sys
from effic.backends.tvm.artifact import TvmArtifact
TvmArtifact.load(sys.argv[1], threads=int(sys.argv[2]))
"""


@pytest.mark.parametrize(("wanted", "code"), [("1", 0), ("3", 1)])
def test_threads_beyond_the_pool_are_refused(made: Path, wanted: str, code: int) -> None:
    environment = {**os.environ, "TVM_NUM_THREADS": "2"}
    command = [sys.executable, "-P", "-c", THREADS, made, wanted]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    if code:
        assert "TVM_NUM_THREADS is 2, and 3 threads are wanted" in done.stderr
    with pytest.raises(UsageError, match="the least is 1"):
        TvmArtifact.load(made, threads=0)


def test_a_copy_runs_and_nothing_else_is_overwritten(made: Path, tmp_path: Path) -> None:
    artifact = TvmArtifact.load(made)
    artifact.save(tmp_path / "copy")
    check(TvmArtifact.load(tmp_path / "copy"), feeds(2))
    with pytest.raises(UsageError, match="--force"):
        artifact.save(tmp_path / "copy")
    artifact.save(tmp_path / "copy", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="a folder of something else"):
        artifact.save(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


# -- broken and hostile folders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("effic_tvm", 99, "has format 99, and this effic reads 1"),
        ("effic_tvm", [1] * 100, "has format"),
        ("target", "", "'target' is no text"),
        ("features", "avx", "'features' is no list"),
        ("cores", -1, "'cores' is no size"),
        ("cores", True, "'cores' is no size"),
        ("library", None, "'library' holds no size"),
        ("library", {"bytes": "1", "sha256": "0"}, "'library.bytes' is no size"),
        ("inputs", [{"name": "x", "dtype": "object"}], "without a known dtype"),
        ("inputs", [{"name": "x", "dtype": "float32"}] * 2, "a name twice"),
        ("inputs", [{"name": "x", "dtype": "float32"}], "has 2 shapes, and there are 1 ports"),
        ("buckets", [], "'buckets' is no list of 1 or more"),
        ("buckets", [7], "something else than tables"),
        ("versions", {"effic": 1}, "'versions' is no table"),
        ("build", "yes", "'build' is no table"),
        ("source", 1, "'source' is no text"),
    ],
)
def test_a_broken_manifest_is_refused(copy: Path, key: str, value: Any, said: str) -> None:
    data = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**data, key: value}))
    with pytest.raises(InvalidModelError, match=said):
        TvmArtifact.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}', "[" * 100_000, "\udcff"])
def test_what_is_no_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidModelError, match="no manifest"):
        read_manifest(copy)


@pytest.mark.parametrize("size", ["NaN", "Infinity", "1e9", "-1", "true", str(1 << 70), '""', "[2]"])
def test_sizes_that_are_none_are_refused(copy: Path, size: str) -> None:
    text = (copy / "manifest.json").read_text()
    data = json.loads(text)
    data["buckets"][0]["inputs"][0][0] = "HERE"
    (copy / "manifest.json").write_text(json.dumps(data).replace('"HERE"', size))
    with pytest.raises(InvalidModelError, match=r"'buckets.inputs' is no (size|text)"):
        read_manifest(copy)


def test_inputs_of_any_size_are_not_made_up(made: Path) -> None:
    manifest = read_manifest(made)
    huge = dataclasses.replace(manifest.buckets[0], inputs=(((1 << 61), 4), (1 << 61,)))
    with pytest.raises(NotMeasuredError, match="GB of memory, which are not free"):
        made_up(dataclasses.replace(manifest, buckets=(huge,)))


def test_names_in_the_manifest_lead_nowhere(copy: Path, tmp_path: Path) -> None:
    # They are looked up in the library and in the file of weights, and are never paths.
    (tmp_path / "secret").write_text("years")
    manifest = read_manifest(copy)
    for name in ("../secret", str(tmp_path / "secret"), "w\0", "main_0"):
        bucket = dataclasses.replace(manifest.buckets[0], parameters=(name,))
        dataclasses.replace(manifest, buckets=(bucket,)).write(copy)
        with pytest.raises(InvalidModelError, match="lacks the tensor"):
            TvmArtifact.load(copy)
        bucket = dataclasses.replace(manifest.buckets[0], entry=name + "x")
        dataclasses.replace(manifest, buckets=(bucket,)).write(copy)
        with pytest.raises(InvalidModelError, match="TVM cannot load"):
            TvmArtifact.load(copy)


def test_a_manifest_of_any_size_is_not_read(copy: Path) -> None:
    with open(copy / "manifest.json", "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidModelError, match="too large"):
        read_manifest(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_no_manifest_raises_anything_but_a_sentence(made: Path, data: st.DataObject) -> None:
    found = json.loads((made / "manifest.json").read_text())
    place: Any = found
    while isinstance(place, (dict, list)) and place:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    folder = made.parent / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(found))
    try:
        said = repr(read_manifest(folder))
    except EfficError as error:
        said = str(error)
    assert "manifest" in said.lower()


def test_files_that_are_cut_short_or_missing_are_refused(copy: Path, made: Path) -> None:
    library, weights = copy / "model.so", copy / "params.safetensors"
    library.write_bytes(library.read_bytes()[:-100])
    with pytest.raises(InvalidModelError, match="not the library that the manifest speaks of"):
        TvmArtifact.load(copy)
    library.unlink()
    with pytest.raises(UsageError, match=r"cannot read .*model\.so"):
        TvmArtifact.load(copy)
    shutil.copy(made / "model.so", library)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InvalidModelError, match="cut short"):
        TvmArtifact.load(copy)
    write_safetensors(weights, {"w": WEIGHT, "more": WEIGHT})
    with pytest.raises(InvalidModelError, match="copy the folder whole"):
        TvmArtifact.load(copy)
    write_safetensors(weights, {"v": WEIGHT})
    with pytest.raises(InvalidModelError, match="lacks the tensor 'w'"):
        TvmArtifact.load(copy)
    with pytest.raises(UsageError, match="there is no folder"):
        TvmArtifact.load(copy / "nothing")
    with pytest.raises(UsageError, match="is no artifact of effic"):
        TvmArtifact.load(copy.parent)


def test_a_function_that_is_not_there_and_weights_of_other_shapes_are_sentences(copy: Path) -> None:
    manifest = read_manifest(copy)
    other = dataclasses.replace(manifest.buckets[0], entry="main_9")
    dataclasses.replace(manifest, buckets=(other,)).write(copy)
    with pytest.raises(InvalidModelError, match="TVM cannot load"):
        TvmArtifact.load(copy)
    write_safetensors(copy / "params.safetensors", {"w": WEIGHT.T})
    manifest.write(copy)
    with pytest.raises(EfficError, match=r"TVM cannot run .*mismatch"):
        TvmArtifact.load(copy).run(feeds(2))


# -- other machines -------------------------------------------------------------------------------------


def test_another_cpu_is_refused_before_the_library_is_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_flags", lambda: frozenset({"pni", "avx", "fma"}))
    manifest = read_manifest(copy)
    dataclasses.replace(manifest, mcpu="znver5", features=("avx", "avx512f", "avx512vnni")).write(copy)
    with pytest.raises(
        InvalidModelError, match="built for znver5, needs avx512f, avx512vnni, which this CPU"
    ):
        TvmArtifact.load(copy)
    dataclasses.replace(manifest, triple="riscv64-linux-gnu").write(copy)
    with pytest.raises(InvalidModelError, match="is for riscv64, and this machine is"):
        TvmArtifact.load(copy)


def test_features_are_told_by_the_names_of_both() -> None:
    names = features.features_of("cascadelake")
    assert {"avx2", "avx512f", "avx512vnni", "sse4.2", "bmi"} <= set(names)
    assert "avx512f" not in features.features_of("x86-64-v3")
    assert why_not_here(f"{features.architecture()}-linux-gnu", []) is None
