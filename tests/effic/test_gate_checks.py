"""Budgets that take a run: scores, agreement, speed; what is alike and what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import effic
from effic import gate_checks
from effic.bench import BenchResult, Timing
from effic.gate import gate
from effic.gate_config import read_config
from effic.gate_verdicts import GateReport
from effic.ir.errors import NotMeasuredError, UsageError
from effic.models import digits_path, digits_test

COARSE = "fuse-conv-bn,quantize-rtn{kinds=[Conv,MatMul,Gemm],min_size=0,group_size=-1,bits=2}"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``m.onnx`` and a reference that is the same file, with data."""
    for name in ("m.onnx", "ref.onnx"):
        shutil.copy(digits_path(), tmp_path / name)
    images, labels = digits_test()
    np.savez(tmp_path / "val.npz", images=images[:64], labels=labels[:64])
    np.savez(tmp_path / "inputs.npz", images=images[:4])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(body: str, **options: Any) -> GateReport:
    Path("effic.toml").write_text(f'[gate.models."m.onnx"]\n{body}\n')
    return gate(read_config(Path("effic.toml")), **options)


def coarse() -> None:
    effic.optimize("ref.onnx", COARSE, output="m.onnx", force=True, check="off")


# -- accuracy ------------------------------------------------------------------------------------

DROP = 'accuracy = { metric = "top1", data = "val.npz", max_drop = 0.5 }'


def test_a_drop_against_the_recorded_score(project: Path) -> None:
    missing = run(DROP)
    assert missing.exit_code == 3
    assert "has no top1 of this model" in missing.verdicts[0].why
    assert run(DROP, update=True).exit_code == 0
    recorded = json.loads(Path("effic-baseline.json").read_text())["models"]["m.onnx"]["scores"]["top1"]
    assert recorded["count"] == 64
    assert len(recorded["data"]) == 64
    shutil.copy("ref.onnx", "m.onnx")
    coarse()
    found = run(DROP, allow_unlike=True)
    assert (found.exit_code, found.verdicts[0].unit) == (1, "points")
    assert found.verdicts[0].value is not None
    assert found.verdicts[0].value > 10


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("data", "0" * 64, "on other data"),
        ("onnxruntime", "1.0.0", "with onnxruntime 1.0.0, and this is"),
        ("machine", "an abacus", "on another machine (an abacus; this is"),
    ],
)
def test_a_score_of_something_unlike_is_refused(project: Path, field: str, value: str, words: str) -> None:
    run(DROP, update=True)
    path = Path("effic-baseline.json")
    data = json.loads(path.read_text())
    data["models"]["m.onnx"]["scores"]["top1"][field] = value
    path.write_text(json.dumps(data))
    (verdict,) = run(DROP).verdicts
    assert verdict.status == "unmeasured"
    assert words in verdict.why
    assert "--allow-unlike" in verdict.why
    assert run(DROP, allow_unlike=True).exit_code == 0
    Path("effic.toml").write_text(f'[gate]\nallow_unlike = true\n[gate.models."m.onnx"]\n{DROP}\n')
    assert gate(read_config(Path("effic.toml"))).exit_code == 0


def test_a_baseline_of_another_source_model_is_refused(project: Path) -> None:
    budgets = 'nodes.max_growth = "50%"\nweight_bytes.max = "1 MB"'
    effic.optimize("ref.onnx", "fuse-conv-bn", output="m.onnx", force=True, check="off")
    run(budgets, update=True)
    model = effic.read_onnx("ref.onnx")
    model.ir.doc_string = "trained a little longer"
    model.save("ref.onnx", force=True)
    effic.optimize("ref.onnx", "fuse-conv-bn", output="m.onnx", force=True, check="off")
    growth, absolute = run(budgets).verdicts
    assert (growth.status, absolute.status) == ("unmeasured", "ok")
    assert "another source model" in growth.why
    told = run(budgets, allow_unlike=True)
    assert (told.exit_code, len(told.notes)) == (0, 1)


def test_metrics_of_which_less_is_better(project: Path) -> None:
    report = run('accuracy = { metric = "max_abs", data = "val.npz", max = 1e-6, reference = "ref.onnx" }')
    assert [(v.status, v.bound, v.value) for v in report.verdicts] == [("ok", "max", 0.0)]
    coarse()
    report = run('accuracy = { metric = "max_abs", data = "val.npz", max = 1e-6, reference = "ref.onnx" }')
    assert report.exit_code == 1
    assert report.verdicts[0].over is not None
    assert report.verdicts[0].over > 0


def test_a_metric_of_ones_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("gate_own_metric.py").write_text("def one(run, data):\n    return 0.25\n")
    report = run('accuracy = { metric = "gate_own_metric:one", min = 0.5 }')
    assert (report.exit_code, report.verdicts[0].value) == (1, 0.25)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ('accuracy = { metric = "top1", data = "no.npz", min = 0.5 }', 2, "no.npz"),
        ('accuracy = { metric = "top1", data = "inputs.npz", min = 0.5 }', 2, "labels"),
        (
            'accuracy = { metric = "top1", data = "val.npz", max_drop = 1, reference = "no.onnx" }',
            2,
            "no.onnx",
        ),
        ('agreement = { reference = "no.onnx", min_sqnr = 10 }', 2, "no.onnx"),
        ('agreement = { reference = "ref.onnx", min_sqnr = 10, inputs = "no.npz" }', 2, "no.npz"),
        ('latency = { reference = "no.onnx", max_ratio = 2 }', 2, "no.onnx"),
    ],
)
def test_what_cannot_be_compared_with_is_an_error(project: Path, body: str, code: int, words: str) -> None:
    report = run(body + "\nnodes.max = 100")
    assert report.exit_code == code
    assert report.verdicts[0].status == "ok"
    assert words in report.verdicts[1].why


def test_a_model_that_does_not_run_is_not_measured(project: Path) -> None:
    model = effic.read_onnx("m.onnx")
    for node in model.nodes("Relu"):
        node.domain = "nobody"
    model.ir.opset_imports["nobody"] = 1
    model.save("m.onnx", force=True)
    body = (
        'accuracy = { metric = "top1", data = "val.npz", min = 0.5 }\n'
        'agreement = { reference = "ref.onnx", min_sqnr = 10 }'
    )
    report = run(body)
    assert [v.status for v in report.verdicts] == ["unmeasured", "unmeasured"]
    with pytest.raises(NotMeasuredError):
        run(body, update=True)
    assert not Path("effic-baseline.json").exists()


# -- agreement -----------------------------------------------------------------------------------


def test_agreement_with_itself_and_with_a_coarse_copy(project: Path) -> None:
    body = (
        'agreement = { reference = "ref.onnx", inputs = "inputs.npz", min_sqnr = 30, rtol = 1e-3, '
        "max_abs = 1e-2, min_cosine = 0.999, min_top1 = 1.0 }"
    )
    same = run(body)
    assert {(v.bound, v.status) for v in same.verdicts} == {
        (name, "ok") for name in ("min_sqnr", "rtol", "max_abs", "min_cosine", "min_top1")
    }
    coarse()
    other = run(body)
    assert {v.bound for v in other.verdicts if v.status == "broken"} >= {"min_sqnr", "rtol", "max_abs"}
    sqnr = next(v for v in other.verdicts if v.bound == "min_sqnr")
    assert (sqnr.limit, sqnr.unit) == (30, "dB")
    assert sqnr.value is not None
    assert sqnr.over == 30 - sqnr.value
    assert "logits" in sqnr.why


# -- latency -------------------------------------------------------------------------------------


def timed(monkeypatch: pytest.MonkeyPatch, low: float, middle: float, high: float) -> None:
    """Let every benchmark find these quartiles of time of the model over time of the reference."""
    row = Timing("m", 2.0, 1.9, 2.2, 1.0, 1)

    def bench(*models: Any, **options: Any) -> BenchResult:
        if models[1] is None:
            return BenchResult(row, None, None, None, None, 1, 20, {}, {}, {})
        return BenchResult(row, row, 1 / middle, 1 / high, 1 / low, 1, 20, {}, {}, {})

    monkeypatch.setattr(gate_checks, "bench", bench)


LATENCY = 'latency = { reference = "ref.onnx", max_ratio = 1.1, floor = 0.05 }'


@pytest.mark.parametrize(
    ("quartiles", "status", "limit"),
    [
        ((0.99, 1.0, 1.01), "ok", 1.15),
        ((1.13, 1.14, 1.15), "ok", 1.15),
        ((1.15, 1.16, 1.17), "broken", 1.15),
        ((1.1, 1.2, 1.4), "ok", 1.25),  # the noise, 0.15, is more than the floor
        ((1.2, 1.3, 1.5), "broken", 1.25),
        ((0.6, 1.2, 1.4), "unmeasured", None),  # noise of 0.4
        ((3.0, 4.0, 5.5), "broken", 2.35),  # as noisy, but nothing excuses it
    ],
)
def test_the_ratio_is_held_to_its_noise(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    quartiles: tuple[float, float, float],
    status: str,
    limit: float | None,
) -> None:
    timed(monkeypatch, *quartiles)
    (verdict,) = run(LATENCY).verdicts
    assert verdict.status == status
    if limit is not None:
        assert verdict.limit == pytest.approx(limit)
        assert verdict.value == pytest.approx(quartiles[1])
        assert verdict.noise == pytest.approx((quartiles[2] - quartiles[0]) / 2)
    else:
        assert "too noisy" in verdict.why


def test_a_time_alone_is_for_information(project: Path) -> None:
    report = run('latency = { repeats = 4, inputs = "inputs.npz" }')
    (verdict,) = report.verdicts
    assert (report.exit_code, verdict.status, verdict.unit, verdict.limit) == (0, "info", "ms", None)
    assert verdict.value is not None
    assert verdict.value > 0
    (beside,) = run('latency = { reference = "ref.onnx", repeats = 4 }').verdicts
    assert (beside.status, beside.unit) == ("info", "ratio")


# -- headroom ------------------------------------------------------------------------------------


def test_headroom_is_kept_in_the_baseline(project: Path) -> None:
    body = "nodes.max_growth = 1"
    report = run(body, update=True, headroom=0.1)
    assert (report.headroom, report.verdicts[0].baseline, report.verdicts[0].limit) == (0.1, 30, 34)
    assert json.loads(Path("effic-baseline.json").read_text())["headroom"] == 0.1
    assert run(body).verdicts[0].limit == 34
    assert run(body, update=True).verdicts[0].limit == 31
    with pytest.raises(UsageError, match="--update"):
        run(body, headroom=0.1)
    with pytest.raises(UsageError, match="at least 0"):
        run(body, update=True, headroom=-0.1)


# -- what passes did -----------------------------------------------------------------------------


def test_what_passes_did_is_told_from_the_record_that_fits(project: Path) -> None:
    body = "weight_bytes.max_growth = 0"
    effic.optimize("ref.onnx", COARSE, output="m.onnx", force=True, check="off")
    run(body, update=True)
    recorded = json.loads(Path("effic-baseline.json").read_text())["models"]["m.onnx"]["passes"]
    assert [p["name"] for p in recorded] == ["fuse-conv-bn", "quantize-rtn", "lower"]
    effic.optimize("ref.onnx", "fuse-conv-bn", output="m.onnx", force=True, check="off")
    (verdict,) = run(body).verdicts
    gone, lowering = verdict.passes
    assert (gone.name, gone.after, lowering.name) == ("quantize-rtn", None, "lower")
    assert gone.saved_before == recorded[1]["bytes_before"] - recorded[1]["bytes_after"]
    # A record of another file, or a broken one, is left alone: the file's own metadata tell of the passes.
    record = json.loads(Path("m.effic.json").read_text())
    record["output"]["files"][0]["sha256"] = "0" * 64
    for text in (json.dumps(record), "{"):
        Path("m.effic.json").write_text(text)
        (verdict,) = run(body).verdicts
        assert [(p.name, p.after) for p in verdict.passes] == [("quantize-rtn", None), ("lower", None)]


# -- parts and operators -------------------------------------------------------------------------


def test_components(project: Path) -> None:
    body = (
        'components."*block1*" = { weight_bytes = { max = "50 kB", max_growth = 0 }, macs = { max = 1 }, '
        "parameters = { max_growth = 0 } }"
    )
    run(body, update=True)
    bytes_, growth, macs, parameters = run(body).verdicts
    assert [v.status for v in (bytes_, growth, macs, parameters)] == ["ok", "ok", "broken", "ok"]
    assert (bytes_.value, bytes_.metric) == (42240, "weight_bytes of *block1*")
    assert macs.value == 663552
    assert {m.name for m in macs.movers} == {"Conv '/block1/0/conv/Conv'", "Conv '/block1/1/conv/Conv'"}
    (missing,) = run('components."*attention*".macs.max = 1').verdicts
    assert missing.status == "unmeasured"
    assert "no tensor or node is called '*attention*'" in missing.why


def test_operators(project: Path) -> None:
    conv, relu, gone, listed = run(
        'ops = { Conv = { max = 8 }, Relu = { max = 7 }, Einsum = { max = 0 } }\nops_allowed = ["Conv", "Relu"]'
    ).verdicts
    assert [(v.status, v.value) for v in (conv, relu, gone)] == [("ok", 8), ("broken", 8), ("ok", 0)]
    assert len(relu.movers) + relu.others == 8
    assert (listed.status, listed.value, listed.limit) == ("broken", 14, 0)
    assert "BatchNormalization '/stem/bn/BatchNormalization'" in {m.name for m in listed.movers}
    for target in ("portable", "ort-cpu", "torch"):
        assert run(f'ops_allowed = "{target}"').exit_code == 0
    effic.optimize("ref.onnx", "quantize-rtn{min_size=0,bits=4}", output="m.onnx", force=True, check="off")
    assert run('ops_allowed = "ort-cpu"').exit_code == 0
    (portable,) = run('ops_allowed = "portable"').verdicts
    assert portable.value == 2
    assert all(m.name.startswith("MatMulNBits") for m in portable.movers)


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("ops = 3", "ops must be a table"),
        ("ops.Conv = 3", "ops.Conv must be a table"),
        ('ops.Conv.max = "1 MB"', "no amount"),
        ("ops_allowed = []", "must list operators"),
        ('ops_allowed = "ort-gpu"', "(did you mean 'ort-cpu'?)"),
        ('components."*a*" = 3', "must be a table"),
        ('components."*a*".nodes.max = 3', "unknown key 'nodes'"),
        ("accuracy = 3", "accuracy must be a table"),
        ("accuracy = { min = 0.5 }", "must name its metric"),
        ('accuracy = { metric = "top2", data = "v", min = 1 }', "did you mean 'top"),
        ('accuracy = { metric = "top1", min = 1 }', "must name its data"),
        ('accuracy = { metric = "top1", data = 3, min = 1 }', "must be the path"),
        ('accuracy = { metric = "top1", data = "v" }', "sets no limit; give min or max_drop"),
        ('accuracy = { metric = "top1", data = "v", max = 1 }', "higher is better; use min"),
        ('accuracy = { metric = "perplexity", data = "v", min = 1 }', "lower is better; use max"),
        ('accuracy = { metric = "top1", data = "v", min = "a" }', "min is 'a'; it must be a number"),
        ('accuracy = { metric = "top1", data = "v", max_drop = -1 }', "at least 0"),
        ('accuracy = { metric = "top1", data = "v", min = 1, limit = 0 }', "at least 1"),
        ('accuracy = { metric = "top1", data = "v", min = 1, limt = 0 }', "did you mean 'limit'"),
        ('accuracy = { metric = "sqnr", data = "v", min = 1 }', "name it with reference"),
        ('accuracy = { metric = "top1", data = "v", min = 1, images = { men = 1 } }', "did you mean 'mean'"),
        ('accuracy = { metric = "top1", data = "v", min = 1, images = { mean = 1 } }', "must list numbers"),
        ('accuracy = { metric = "top1", data = "v", min = 1, images = { channels = "x" } }', "allowed are"),
        ("agreement = { min_sqnr = 1 }", "must name its reference"),
        ('agreement = { reference = "r" }', "sets no limit"),
        ('agreement = { reference = "r", min_cosine = 2 }', "must lie between"),
        ('agreement = { reference = "r", min_sqnr = 2, count = 0 }', "at least 1"),
        ('agreement = { reference = "r", min_sqnr = 2, count = 2, inputs = "i" }', "does nothing beside inputs"),
        ("latency = { max_ratio = 1.1 }", "needs a reference model"),
        ('latency = { reference = 3, max_ratio = 1.1 }', "must be the path"),
        ('latency = { reference = "r", max_ratio = 1.1, repeats = 1 }', "at least 4"),
        ('latency = { reference = "r", max_ratio = 1.1, threads = 1.5 }', "a whole number"),
        ('latency = { reference = "r", max_ratio = inf }', "is inf; it must be a number"),
        ('accuracy = { metric = "top1", data = "v", min = -inf }', "is -inf; it must be a number"),
        ('accuracy = { metric = "top1", data = "v", max_drop = nan }', "is nan; it must be a number"),
        ("latency = {}", "must be a table"),
    ],
)  # fmt: skip
def test_mistakes(project: Path, body: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(body)
    assert str(caught.value).startswith('effic.toml: gate.models."m.onnx".')
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
