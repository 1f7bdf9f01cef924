"""Metrics: each against its definition, written out plainly, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import effic
from effic.ir.errors import NotMeasuredError, UsageError
from effic.metric_data import MetricData
from effic.metrics import METRICS, Reference, get_metric, paired_stderr, score

RNG = np.random.default_rng(0)


def model(tmp_path: Path, inputs: Mapping[str, tuple[int, list[Any]]]) -> effic.Model:
    """A model with the given inputs, for fitting data; what is scored is a Python function."""
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    infos = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
    outs = [helper.make_tensor_value_info(f"{n}_out", t, s) for n, (t, s) in inputs.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", infos, outs), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.save(proto, tmp_path / "m.onnx")
    return effic.read_onnx(tmp_path / "m.onnx")


@pytest.fixture
def vectors(tmp_path: Path) -> effic.Model:
    return model(tmp_path, {"x": (TensorProto.FLOAT, ["N", 6])})


@pytest.fixture
def ids(tmp_path: Path) -> effic.Model:
    return model(tmp_path, {"input_ids": (TensorProto.INT64, ["N", "T"])})


def echo(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"logits": feed["x"]}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(0, 2**31))
def test_top1_and_top5_are_shares_of_right_rows(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are frequent.
    x = rng.integers(0, 4, (count, 6)).astype(np.float32)
    labels = rng.integers(0, 6, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effic.metric_data.model_inputs", lambda _: _INPUTS)
        data = MetricData.load({"x": x, "labels": labels}, None)  # type: ignore[arg-type]
    found = score("top1", echo, data)
    assert found.count == count
    assert found.value == pytest.approx(np.mean(x.argmax(1) == labels))
    order = np.argsort(-x, axis=1, kind="stable")[:, :5]
    assert score("top5", echo, data).value == pytest.approx(np.mean((order == labels[:, None]).any(1)))


def test_a_row_with_nan_is_wrong(vectors: effic.Model) -> None:
    x = np.eye(6, dtype=np.float32)
    data = MetricData.load({"x": x, "labels": np.arange(6)}, vectors)

    def spoiled(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = feed["x"].copy()
        out[0, 3] = np.nan
        return {"y": out}

    assert score("top1", echo, data).value == 1
    assert score("top1", spoiled, data).value == pytest.approx(5 / 6)
    assert score("agreement", spoiled, data, reference=echo).value == pytest.approx(5 / 6)


def test_perplexity_is_that_of_torch(ids: effic.Model) -> None:
    torch = pytest.importorskip("torch")
    tokens = RNG.integers(0, 11, 7 * 9 + 3).astype(np.int64)
    table = RNG.standard_normal((11, 11)).astype(np.float32) * 3

    def run(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": table[feed["input_ids"]]}

    path = Path(str(ids.origin.path)).with_name("ids.npy")
    np.save(path, tokens)
    data = MetricData.load(path, ids, window=9)
    assert (data.kind, data.count) == ("tokens", 7)
    windows = torch.from_numpy(tokens[:63].reshape(7, 9))
    logits = torch.from_numpy(table[windows.numpy()]).double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), windows[:, 1:].reshape(-1))
    found = score("perplexity", run, data)
    assert found.value == pytest.approx(math.exp(float(loss)), rel=1e-12)
    assert found.count == 7 * 8


def test_perplexity_leaves_padding_out(tmp_path: Path) -> None:
    both = {"input_ids": (TensorProto.INT64, ["N", "T"]), "attention_mask": (TensorProto.INT64, ["N", "T"])}
    fitted = model(tmp_path, both)
    tokens = RNG.integers(0, 5, (3, 8))
    mask = np.ones_like(tokens)
    mask[1, 5:] = 0
    table = RNG.standard_normal((5, 5)).astype(np.float32)

    def run(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": table[feed["input_ids"]]}

    padded = MetricData.load({"input_ids": tokens, "attention_mask": mask}, fitted)
    logs = table - np.log(np.exp(table).sum(1, keepdims=True))
    kept = [-logs[tokens[r, t], tokens[r, t + 1]] for r in range(3) for t in range(7) if mask[r, t + 1]]
    found = score("perplexity", run, padded)
    assert found.count == len(kept) == 18
    assert found.value == pytest.approx(math.exp(np.mean(kept)), rel=1e-6)


def test_spearman_pools_over_the_mask_and_is_scipys(tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    both = {"input_ids": (TensorProto.INT64, ["N", "T"]), "attention_mask": (TensorProto.INT64, ["N", "T"])}
    fitted = model(tmp_path, both)
    table = RNG.standard_normal((20, 4)).astype(np.float32)

    def run(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"hidden": table[feed["input_ids"]]}

    pairs, wanted = [], []
    gold = RNG.random(12)
    for value in gold:
        sides = []
        for _ in range(2):
            length = int(RNG.integers(2, 6))
            row = np.zeros((1, 6), np.int64)
            row[0, :length] = RNG.integers(0, 20, length)
            mask = (np.arange(6) < length).astype(np.int64)[None]
            sides.append({"input_ids": row, "attention_mask": mask})
        pairs.append((*sides, np.array([value])))
        a, b = (table[s["input_ids"][0, : s["attention_mask"].sum()]].mean(0) for s in sides)
        wanted.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    data = MetricData.load(pairs, fitted)
    assert (data.kind, data.count) == ("pairs", 12)
    found = score("spearman", run, data)
    assert found.value == pytest.approx(spearmanr(wanted, gold).statistic)


def test_distances_to_a_reference(vectors: effic.Model) -> None:
    x = RNG.standard_normal((70, 6)).astype(np.float32)
    data = MetricData.load({"x": x}, vectors)

    def off(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": feed["x"] * np.float32(1.5) + np.float32(0.25)}

    got = (x * np.float32(1.5) + np.float32(0.25)).astype(np.float64)
    noise = np.square(got - x).sum()
    assert score("sqnr", off, data, reference=echo).value == pytest.approx(
        10 * np.log10(np.square(x.astype(np.float64)).sum() / noise)
    )
    cosine = (got * x).sum() / np.linalg.norm(got) / np.linalg.norm(x.astype(np.float64))
    assert score("cosine", off, data, reference=echo).value == pytest.approx(cosine)
    assert score("max_abs", off, data, reference=echo).value == pytest.approx(np.abs(got - x).max())
    assert score("sqnr", echo, data, reference=echo).value == math.inf
    assert score("cosine", echo, data, reference=echo).value == 1


def test_nan_never_scores_well(vectors: effic.Model) -> None:
    data = MetricData.load({"x": np.ones((4, 6), np.float32)}, vectors)

    def broken(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": feed["x"] * np.nan}

    for text in ("sqnr", "cosine", "max_abs", "agreement"):
        metric = get_metric(text)
        found = score(metric, broken, data, reference=echo).value
        assert metric.worse(found, {"sqnr": 0, "cosine": -1, "max_abs": 1e30, "agreement": 0.5}[text]), text


def test_the_reference_runs_once_a_batch(vectors: effic.Model) -> None:
    data = MetricData.load({"x": np.ones((70, 6), np.float32)}, vectors)
    calls = []

    def counted(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(len(feed["x"]))
        return echo(feed)

    reference = Reference(counted)
    for _ in range(3):
        score("agreement", echo, data, reference=reference)
    assert sum(calls) == 70


def test_drops_and_bounds() -> None:
    assert get_metric("top1").drop(0.81, 0.805) == pytest.approx(0.5)
    assert get_metric("perplexity").drop(8.0, 8.4) == pytest.approx(5)
    assert get_metric("perplexity").worse(8.4, 8.3)
    assert not get_metric("top1").worse(0.5, 0.5)
    assert get_metric("top1").worse(math.nan, 0)
    with pytest.raises(UsageError, match="sqnr has no drop"):
        get_metric("sqnr").drop(math.inf, 20)


def test_paired_errors_are_smaller_than_single_ones(vectors: effic.Model) -> None:
    x = RNG.standard_normal((400, 6)).astype(np.float32)
    data = MetricData.load({"x": x, "labels": (x + RNG.standard_normal(x.shape)).argmax(1)}, vectors)
    a = score("top1", echo, data)
    b = score("top1", lambda f: {"l": f["x"] + np.float32(0.02) * np.sin(99 * f["x"])}, data)
    paired = paired_stderr(a, b)
    assert a.stderr is not None
    assert paired is not None
    assert 0 < paired < a.stderr / 2
    assert paired_stderr(a, score("sqnr", echo, data, reference=echo)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("perplexty", "did you mean 'perplexity'"),
        ("top1{out=y}", "out"),
        ("", "the metric is empty"),
        ("no.such.module:f", "cannot be imported"),
        ("math:pi", "is no function"),
    ],
)
def test_what_is_no_metric(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        get_metric(text)


@pytest.mark.parametrize(
    ("text", "arrays", "reason"),
    [
        ("top1", {"x": np.ones((2, 6), np.float32)}, "needs labels"),
        ("top1", {"x": np.ones((2, 6), np.float32), "labels": np.array([0, 6])}, "the label 6"),
        ("top1", {"x": np.ones((2, 6), np.float32), "labels": np.array([0, -1])}, "the label -1"),
        ("top1{output=z}", {"x": np.ones((2, 6), np.float32), "labels": np.array([0, 1])}, "no output 'z'"),
        ("spearman", {"x": np.ones((2, 6), np.float32)}, "needs pairs"),
        ("agreement", {"x": np.ones((2, 6), np.float32)}, "compares with a reference"),
        ("perplexity", {"x": np.ones((2, 6), np.float32)}, "no row of token ids"),
    ],
)
def test_what_a_metric_refuses(
    vectors: effic.Model, text: str, arrays: dict[str, np.ndarray], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        score(text, echo, MetricData.load(arrays, vectors))


def test_other_shapes_than_the_reference_are_not_measured(vectors: effic.Model) -> None:
    data = MetricData.load({"x": np.ones((2, 6), np.float32)}, vectors)
    with pytest.raises(NotMeasuredError, match="the shape"):
        score("sqnr", lambda f: {"logits": f["x"][:, :3]}, data, reference=echo)


def test_a_function_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: effic.Model
) -> None:
    (tmp_path / "own_metric.py").write_text(
        "def error(run, data):\n"
        "    return sum(float(abs(b.feeds[0]['x']).sum()) for b in data.batches())\n"
        "error.higher_is_better = False\n"
        "error.unit = '%'\n"
        "def text(run, data):\n"
        "    return 'good'\n"
    )
    monkeypatch.chdir(tmp_path)
    data = MetricData.load({"x": np.ones((3, 6), np.float32)}, vectors)
    metric = get_metric("own_metric:error")
    assert score(metric, echo, data).value == 18
    assert metric.drop(10, 11) == pytest.approx(10)
    assert metric.worse(11, 10)
    with pytest.raises(UsageError, match="returned str"):
        score("own_metric:text", echo, data)


def test_every_metric_is_in_the_table_under_its_name() -> None:
    for name in METRICS:
        assert get_metric(name).name == name
        assert get_metric(f"{name}{{output=y}}").text == f"{name}{{output=y}}"


def _fitted_inputs() -> Any:
    import onnx_ir as ir

    from effic.passes.calibration_data import ModelInput

    return [ModelInput("x", ir.DataType.FLOAT, (None, 6))]


_INPUTS = _fitted_inputs()
