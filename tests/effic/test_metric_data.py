"""Data to score on: every kind of source, batches of a fixed size, limits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import effic
from effic.ir.errors import UsageError
from effic.metric_data import Images, MetricData
from effic.metrics import score


def identity(path: Path, shape: list[Any], kind: int = TensorProto.FLOAT, name: str = "x") -> effic.Model:
    node = helper.make_node("Identity", [name], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return effic.read_onnx(path)


def seen(data: MetricData, name: str = "x") -> np.ndarray:
    return np.concatenate([batch.cut(batch.feeds[0])[name] for batch in data.batches()])


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_arrays_with_labels(tmp_path: Path, suffix: str) -> None:
    model = identity(tmp_path / "m.onnx", ["N", 3])
    x, labels = np.arange(210, dtype=np.float32).reshape(70, 3), np.arange(70) % 3
    path = tmp_path / f"d.{suffix}"
    if suffix == "npz":
        np.savez(path, x=x, labels=labels)
    else:
        from safetensors.numpy import save_file

        save_file({"x": x, "labels": labels}, path)
    data = MetricData.load(path, model)
    assert (data.kind, data.count, data.labelled) == ("samples", 70, True)
    assert np.array_equal(seen(data), x)
    assert np.array_equal(np.concatenate([b.labels for b in data.batches() if b.labels is not None]), labels)
    first = MetricData.load(path, model, limit=40)
    assert first.count == 40
    assert np.array_equal(seen(first), x[:40])
    assert sum(b.count for b in first.batches()) == 40
    assert len({data.digest, first.digest, MetricData.load(path, model).digest}) == 2


def test_a_fixed_batch_is_filled_up_and_cut(tmp_path: Path) -> None:
    model = identity(tmp_path / "m.onnx", [4, 3])
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    data = MetricData.load({"x": x, "labels": np.full(10, 2)}, model)
    assert [(b.count, len(b.feeds[0]["x"])) for b in data.batches()] == [(4, 4), (4, 4), (2, 4)]
    assert np.array_equal(seen(data), x)
    # The rows that fill the batch must not be scored.
    assert score("top1", lambda f: {"y": f["x"]}, data).count == 10


def test_windows_of_ids(tmp_path: Path) -> None:
    model = identity(tmp_path / "m.onnx", ["N", "T"], TensorProto.INT64, "ids")
    np.save(tmp_path / "ids.npy", np.arange(50, dtype=np.uint16))
    data = MetricData.load(tmp_path / "ids.npy", model, window=8)
    assert (data.kind, data.count) == ("tokens", 6)
    assert np.array_equal(seen(data, "ids"), np.arange(48).reshape(6, 8))
    assert seen(data, "ids").dtype == np.int64


def test_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = identity(tmp_path / "m.onnx", ["N", 3])
    (tmp_path / "own_data.py").write_text(
        "import numpy as np\n"
        "def labelled():\n"
        "    for n in (2, 3):\n"
        "        yield {'x': np.full((n, 3), n, np.float32)}, np.zeros(n, int)\n"
        "def mixed():\n"
        "    yield {'x': np.zeros((1, 3), np.float32)}\n"
        "    yield {'x': np.zeros((1, 3), np.float32)}, 1\n"
        "def number():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    data = MetricData.load("own_data:labelled", model)
    assert data.count == 5
    assert seen(data)[:, 0].tolist() == [2, 2, 3, 3, 3]
    cut = MetricData.load("own_data:labelled", model, limit=3)
    assert seen(cut)[:, 0].tolist() == [2, 2, 3]
    with pytest.raises(UsageError, match="different kinds"):
        MetricData.load("own_data:mixed", model)
    with pytest.raises(UsageError, match="gives int"):
        MetricData.load("own_data:number", model)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_folder_of_images(tmp_path: Path, layout: str) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    pixels = {}
    for label in ("cat", "dog"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(2):
            array = rng.integers(0, 256, (10, 12, 3), np.uint8)
            pixels[label, number] = array
            image.fromarray(array).save(tmp_path / "set" / label / f"{number}.png")
    shape = ["N", 3, 8, 8] if layout == "nchw" else ["N", 8, 8, 3]
    model = identity(tmp_path / "m.onnx", shape)
    prepared = Images(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), channels="bgr")
    data = MetricData.load(tmp_path / "set", model, images=prepared)
    found = seen(data)
    want = pixels["dog", 1][1:9, 2:10, ::-1].astype(np.float32) / 255
    want = (want - np.array([0.5, 0.4, 0.3], np.float32)) / np.array([0.2, 0.3, 0.4], np.float32)
    assert np.allclose(found[3], want.transpose(2, 0, 1) if layout == "nchw" else want, atol=1e-6)
    labels = np.concatenate([b.labels for b in data.batches() if b.labels is not None])
    assert labels.tolist() == [0, 0, 1, 1]
    # The shorter side, so 10 x 12 becomes 20 x 24.
    assert seen(MetricData.load(tmp_path / "set", model, images=Images(resize=20))).shape == found.shape


def test_pairs_of_sentences(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "fox": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "p.tsv").write_text('score\ta\tb\n4.5\ta red fox\ta fox\n0.5\tfox\t"red\n')
    model = identity(tmp_path / "m.onnx", ["N", "T"], TensorProto.INT64, "input_ids")
    data = MetricData.load(tmp_path / "p.tsv", model, tokenizer=tmp_path)
    (batch,) = data.batches()
    assert batch.feeds[0]["input_ids"].tolist() == [[2, 3, 4], [4, 0, 0]]
    assert batch.feeds[1]["input_ids"].tolist() == [[2, 4], [1, 3]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [4.5, 0.5]
    with pytest.raises(UsageError, match="--tokenizer"):
        MetricData.load(tmp_path / "p.tsv", model)
    (tmp_path / "bad.tsv").write_text("1\ta\tb\nx\ta\tb\n")
    with pytest.raises(UsageError, match="line 2"):
        MetricData.load(tmp_path / "bad.tsv", model, tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot read the tokenizer"):
        MetricData.load(tmp_path / "p.tsv", model, tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": np.ones((2, 3), np.float32), "labels": np.ones(3, int)}, "2 samples and 3 labels"),
        ({"x": np.ones((2, 3), np.float32), "labels": np.array([0.5, 1])}, "one class number a sample"),
        ({"x": np.ones((2, 4), np.float32)}, "the shape"),
        ({"x": np.ones((2, 3), np.uint8)}, "scale and normalize"),
        ({"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}, "the model takes"),
        ({"labels": np.ones(3, int)}, "no inputs"),
        ({"x": np.ones((0, 3), np.float32)}, "no samples"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    model = identity(tmp_path / "m.onnx", ["N", 3])
    with pytest.raises(UsageError, match=reason):
        for _ in MetricData.load(arrays, model).batches():
            pass


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    model = identity(tmp_path / "m.onnx", ["N", 3])
    with pytest.raises(UsageError, match="do not exist"):
        MetricData.load(tmp_path / "no.npz", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no sub-folders of images"):
        MetricData.load(tmp_path / "empty", model)
    with pytest.raises(UsageError, match="at least 1"):
        MetricData.load({"x": np.ones((2, 3), np.float32)}, model, limit=0)
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    with pytest.raises(UsageError, match="a window of 4"):
        MetricData.load(tmp_path / "x.npy", model, window=4)
