"""Calibration data: every source, what is done to fit it, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.models.builders import BUILDERS
from effic.passes import calibration_files
from effic.passes.calibration import Calibration


def model(*inputs: str) -> Model:
    """A model with these inputs; only their declarations matter."""
    names = [text.split()[-1] for text in inputs]
    body = " ".join(f"y{i} = Identity({name})" for i, name in enumerate(names))
    outputs = ", ".join(f"{text.split()[0]} y{i}" for i, text in enumerate(inputs))
    return Model(
        ir.from_onnx_text(
            f'<ir_version: 10, opset_import: ["" : 21]>\ng ({", ".join(inputs)}) => ({outputs}) {{ {body} }}'
        )
    )


IMAGES = "float[N,3,4,4] x"
TOKENS = "int64[B,S] ids"


def images(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 4, 4)).astype(np.float32)


def load(data: Any, *inputs: str, **options: Any) -> list[dict[str, np.ndarray]]:
    return list(Calibration.load(data, model(*(inputs or (IMAGES,))), **options).feeds())


def refusal(data: Any, *inputs: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load(data, *inputs, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy", "safetensors", "mapping", "array"])
def test_arrays_are_cut_into_samples_along_their_first_axis(kind: str, tmp_path: Path) -> None:
    array = images()
    path = tmp_path / f"data.{'npz' if kind == 'compressed' else kind}"
    if kind == "npz":
        np.savez(path, x=array, labels=np.arange(6))
    elif kind == "compressed":
        np.savez_compressed(path, x=array)
    elif kind == "npy":
        np.save(path, array)
    elif kind == "safetensors":
        path.write_bytes(safetensors({"x": ("F32", array)}))
    data: Any = {"mapping": {"x": array}, "array": array}.get(kind, str(path))
    feeds = load(data)
    assert [list(f) for f in feeds] == [["x"]] * 6
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), array)


def safetensors(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    header, body = {}, b""
    for name, (dtype, array) in tensors.items():
        offsets = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        body += array.tobytes()
    text = json.dumps({"__metadata__": {"made": "here"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_files_of_the_safetensors_package_are_read(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"x": images(2)}, tmp_path / "x.safetensors")
    assert len(load(tmp_path / "x.safetensors")) == 2


def test_a_static_batch_is_kept_and_a_remainder_left_out() -> None:
    feeds = load({"x": images(7)}, "float[2,3,4,4] x")
    assert [f["x"].shape for f in feeds] == [(2, 3, 4, 4)] * 3


def test_a_leading_axis_of_samples_is_taken_off() -> None:
    feeds = load({"x": images(6).reshape(3, 2, 3, 4, 4)})
    assert [f["x"].shape for f in feeds] == [(2, 3, 4, 4)] * 3


def test_an_array_of_one_sample_goes_with_all() -> None:
    feeds = load({"x": images(4), "k": np.ones((1, 2), np.float32)}, IMAGES, "float[1,2] k")
    assert len(feeds) == 4
    assert all(f["k"].shape == (1, 2) for f in feeds)


def test_a_scalar_goes_with_all_and_several_are_one_per_sample() -> None:
    flags = load({"x": images(3), "flag": np.array(True)}, IMAGES, "bool flag")
    assert [f["flag"].shape for f in flags] == [()] * 3
    times = load({"x": images(3), "t": np.arange(3, dtype=np.float32)}, IMAGES, "float t")
    assert [float(f["t"]) for f in times] == [0, 1, 2]


def test_different_numbers_of_samples_are_refused() -> None:
    text = refusal({"x": images(4), "z": images(3)}, IMAGES, "float[N,3,4,4] z")
    assert text == "the arrays of arrays hold different numbers of samples: 'x' 4, 'z' 3"


def test_samples_are_chosen_by_seed_and_stay_in_order() -> None:
    array = np.arange(50, dtype=np.float32).reshape(50, 1)
    first, again, other = (
        [int(f["x"].item()) for f in load({"x": array}, "float[N,1] x", samples=10, seed=s)]
        for s in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert first == sorted(first)
    assert len(set(first)) == 10


# -- tokens ----------------------------------------------------------------------------------------


def test_tokens_become_windows(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(1050, dtype=np.uint16))
    calibration = Calibration.load(tmp_path / "ids.npy", model(TOKENS), window=100)
    feeds = list(calibration.feeds())
    assert calibration.source == "ids.npy, 10 windows of 100"
    assert feeds[3]["ids"].dtype == np.int64
    np.testing.assert_array_equal(feeds[3]["ids"], np.arange(300, 400)[None])
    assert Calibration.load(tmp_path / "ids.npy", model(TOKENS)).source == "ids.npy, 2 windows of 512"
    assert (
        Calibration.load(tmp_path / "ids.npy", model("int64[1,64] ids")).source == "ids.npy, 16 windows of 64"
    )


def test_few_tokens_are_one_window() -> None:
    (feed,) = load({"ids": np.arange(40)}, TOKENS)
    assert feed["ids"].shape == (1, 40)


def test_inputs_that_follow_from_the_tokens_are_made() -> None:
    inputs = (TOKENS, "int64[B,S] attention_mask", "int32[B,S] token_type_ids", "int64[B,S] position_ids")
    feeds = load({"ids": np.arange(32)}, *inputs, window=8)
    assert feeds[1]["attention_mask"].tolist() == [[1] * 8]
    assert feeds[1]["token_type_ids"].tolist() == [[0] * 8]
    assert feeds[1]["token_type_ids"].dtype == np.int32
    assert feeds[1]["position_ids"].tolist() == [list(range(8))]


def test_inputs_that_do_not_follow_are_named() -> None:
    text = refusal({"ids": np.arange(32)}, TOKENS, "float[B,H] state", window=8)
    assert "lack the input 'state' (float[?,?])" in text


def test_windows_that_cannot_be_are_refused() -> None:
    assert "the model takes 64 exactly" in refusal({"ids": np.arange(99)}, "int64[1,64] ids", window=8)
    assert "fewer than one window of 200" in refusal({"ids": np.arange(99)}, TOKENS, window=200)
    assert "is no row of token ids" in refusal({"x": images()}, window=8)
    assert "is no row of token ids" in refusal(lambda: [{"x": images()}], window=8)
    assert "inputs have fixed sizes" in refusal("random", "float[1,3,4,4] x", window=8)
    assert load("random", TOKENS, window=8)[0]["ids"].shape == (1, 8)
    assert "window is 0, the least is 1" in refusal({"ids": np.arange(99)}, TOKENS, window=0)


def test_tokens_for_a_model_of_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(99, dtype=np.uint16))
    text = refusal(tmp_path / "ids.npy")
    assert "give the input 'x' the shape [99], and the model takes float[?,3,4,4]" in text


# -- folders, functions, feeds ---------------------------------------------------------------------


def test_a_folder_of_feeds(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=images(2) + i)
    feeds = load(tmp_path)
    assert [f["x"].shape[0] for f in feeds] == [2, 2, 2]
    np.testing.assert_array_equal(feeds[2]["x"], images(2) + 2)


def test_a_folder_of_images_without_a_batch(tmp_path: Path) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", images(1)[0])
    assert [f["x"].shape for f in load(tmp_path)] == [(1, 3, 4, 4)] * 3


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    assert "has no calibration data in it" in refusal(tmp_path)


def made() -> Iterator[dict[str, np.ndarray]]:
    for i in range(1000):
        yield {"x": images(1) + i}


def test_functions_and_iterables_give_feeds() -> None:
    assert len(load(made, samples=5)) == 5
    assert len(load(made(), samples=5)) == 5
    assert len(load([{"x": images(2)}] * 3)) == 3
    assert load([{"x": images(2)}])[0]["x"].shape == (2, 3, 4, 4)


def test_a_generator_may_use_one_buffer() -> None:
    def feeds() -> Iterator[dict[str, np.ndarray]]:
        buffer = np.zeros((1, 3, 4, 4), np.float32)
        for i in range(3):
            buffer[:] = i
            yield {"x": buffer}

    assert [f["x"].max() for f in load(feeds)] == [0, 1, 2]


def test_a_function_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_samples.py").write_text(
        "import numpy as np\ndef feeds():\n    yield {'x': np.ones((1, 3, 4, 4), np.float32)}\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    calibration = Calibration.load("my_samples:feeds", model(IMAGES))
    assert calibration.source == "my_samples:feeds, 1 sample"
    assert sys.path == before
    assert "cannot be imported" in refusal("my_samples:nothing")
    assert "cannot be imported" in refusal("no_such_module_here:feeds")
    assert "is no function" in refusal("my_samples:number")


def test_what_is_no_feed_is_refused() -> None:
    assert "is ndarray, not a mapping" in refusal([images()])
    assert "give an iterable of mappings" in refusal(lambda: 3)
    assert "hold no samples" in refusal([])
    assert "hold no samples" in refusal({"x": images(0)})


def test_random_data_only_by_name() -> None:
    calibration = Calibration.load("random", model(IMAGES), samples=3)
    assert calibration.random
    assert calibration.source == "random numbers, made up, 3 samples"
    first, second, _ = calibration.feeds()
    assert not np.array_equal(first["x"], second["x"])
    assert "do not exist" in refusal("rndom")
    assert not Calibration.of([{"x": images()}]).random


@pytest.mark.parametrize("built", sorted(BUILDERS))
def test_random_data_run_on_every_seeded_model(built: str) -> None:
    built_model = Model(BUILDERS[built]())
    calibration = Calibration.load("random", built_model, samples=2)
    assert len(list(calibration.record(built_model, built_model.graph.outputs))) == 2


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_floats_become_the_floats_of_the_model(dtype: Any) -> None:
    assert load({"x": images().astype(dtype)})[0]["x"].dtype == np.float32


def test_integers_must_fit() -> None:
    assert load({"k": np.ones((2, 3), np.uint16)}, "int64[N,3] k")[0]["k"].dtype == np.int64
    text = refusal({"k": np.full((2, 3), 300)}, "uint8[N,3] k")
    assert text.endswith("give the input 'k' as int64, and the model takes uint8[?,3]")
    assert "as float32" in refusal({"k": np.ones((2, 3), np.float32)}, "int64[N,3] k")


def test_images_in_bytes_are_not_scaled() -> None:
    text = refusal({"x": np.zeros((2, 3, 4, 4), np.uint8)})
    assert "as uint8, and the model takes float[?,3,4,4]; scale and normalize them" in text


def test_wrong_shapes_name_file_input_and_both_shapes(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((5, 4, 4, 3), np.float32))
    assert refusal(tmp_path / "data.npz") == (
        "the calibration data (data.npz, sample 0) give the input 'x' the shape [1, 4, 4, 3], "
        "and the model takes float[?,3,4,4]"
    )


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", a=images(), b=images())
    assert refusal(tmp_path / "data.npz") == "data.npz holds a, b, and the model takes x: float[?,3,4,4]"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    array = images()
    array[3, 0, 0, 0] = bad
    assert "array 'x' of sample 3 holds values that are infinite" in refusal({"x": array})


# -- hostile files ---------------------------------------------------------------------------------


def npz(path: Path, header: bytes, kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("x.npy", header)
    return path


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}], object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    assert "Python objects, which are never loaded" in refusal(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", x=objects)
    assert "Python objects" in refusal(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", x=objects)
    assert "Python objects" in refusal(tmp_path / "b.npz")


def test_texts_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(["text"]))
    assert "not numbers" in refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("cut", [0, 4, 60, 130, 200])
@pytest.mark.parametrize("kind", ["npy", "npz", "stored", "safetensors"])
def test_broken_files_are_refused_in_a_sentence(kind: str, cut: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{'npz' if kind == 'stored' else kind}"
    if kind == "npy":
        path.write_bytes(npy(images())[:cut])
    elif kind == "npz":
        np.savez(path, x=images())
        path.write_bytes(path.read_bytes()[:cut])
    elif kind == "stored":
        npz(path, npy(images())[:cut])
    else:
        path.write_bytes(safetensors({"x": ("F32", images())})[:cut])
    assert "cannot read the calibration data" in refusal(path)


@pytest.mark.filterwarnings("ignore:Reading")  # of headers that look like Python 2
@given(
    place=st.integers(0, 400), byte=st.integers(0, 255), kind=st.sampled_from(["npy", "npz", "safetensors"])
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_byte_that_is_wrong_is_refused_or_harmless(
    place: int, byte: int, kind: str, tmp_path: Path
) -> None:
    stream = io.BytesIO()
    np.savez(stream, x=images(1))
    whole = {
        "npy": npy(images(1)),
        "npz": stream.getvalue(),
        "safetensors": safetensors({"x": ("F32", images(1))}),
    }
    data = bytearray(whole[kind])
    data[place % len(data)] = byte
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data)
    with contextlib.suppress(UsageError):
        calibration_files.read_arrays(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        [],
    ],
)
def test_tensors_outside_their_file_are_refused(row: Any, tmp_path: Path) -> None:
    text = json.dumps({"x": row}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    assert "the tensor 'x'" in refusal(tmp_path / "a.safetensors")


def test_large_compressed_arrays_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_files, "MOST_UNPACKED", 1000)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((100, 3, 4, 4), np.float32))
    assert "save it with np.savez, uncompressed" in refusal(tmp_path / "a.npz")


def test_files_that_are_not_there_or_of_no_kind(tmp_path: Path) -> None:
    assert "do not exist" in refusal(tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("x")
    assert "of no known kind" in refusal(tmp_path / "a.txt")


def test_files_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=images())
    np.save(tmp_path / "a.npy", images())
    (tmp_path / "a.safetensors").write_bytes(safetensors({"x": ("F32", images())}))
    for path in tmp_path.iterdir():
        (array,) = calibration_files.read_arrays(str(path)).values()
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(getattr(base, "obj", base), mmap.mmap)
        np.testing.assert_array_equal(array, images())


def test_arrays_in_columns_keep_their_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(images()))
    np.testing.assert_array_equal(calibration_files.read_arrays(str(tmp_path / "a.npz"))["x"], images())


# -- digest ----------------------------------------------------------------------------------------


def test_the_digest_is_of_the_data_as_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=images(), labels=np.zeros(6))
    one = Calibration.load(tmp_path / "a.npz", model(IMAGES))
    other = Calibration.load({"x": images().astype(np.float64)}, model(IMAGES))
    assert one.digest == other.digest
    assert len(one.digest) == 64
    changed = images()
    changed[5, 2, 3, 3] += 1
    assert Calibration.load({"x": changed}, model(IMAGES)).digest != one.digest
    assert Calibration.load({"x": images()}, model(IMAGES), samples=5).digest != one.digest
    assert Calibration.of(list(one.feeds())).digest == one.digest
    assert one.to_dict() == {
        "source": "a.npz, 6 samples",
        "digest": one.digest,
        "samples": 6,
        "random": False,
    }
