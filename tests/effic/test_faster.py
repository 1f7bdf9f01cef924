"""--keep-if-faster: what makes a model slower is undone, for the kinds of weights that do so; and said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import effic
from effic.backends.base import Artifact
from effic.bench import BenchResult
from effic.cli.main import main
from effic.faster import slower
from effic.ir.weights import weight_sites
from effic.models import digits_path

DIGITS = digits_path()
RTN = "quantize-rtn{kinds=[Conv,MatMul,Gemm],min_size=0}"


def result(speedup: float, spread: float = 0.01) -> BenchResult:
    blank: Any = None
    return BenchResult(blank, blank, speedup, speedup - spread, speedup + spread, 1, 15, {}, {}, {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[set[str]], float]], None]:
    """Let a model's time be a function of the operators whose weights are encoded."""

    def encoded(path: str) -> set[str]:
        return {s.kind for s in weight_sites(effic.read_onnx(path)) if s.encoding is not None}

    def install(seconds: Callable[[set[str]], float]) -> None:
        def bench(a: Artifact, b: Artifact, inputs: Any, **options: Any) -> BenchResult:
            found = result(seconds(encoded(a.path)) / seconds(encoded(b.path)))
            timing = _timing(b.path)
            return dataclasses.replace(found, a=timing, b=timing)

        monkeypatch.setattr("effic.faster.bench", bench)

    return install


def _timing(path: str) -> Any:
    from effic.bench import Timing

    return Timing(path, 1.0, 1.0, 1.0, 1.0, 1)


def kinds(report: effic.Report) -> set[str]:
    return {s.kind for s in weight_sites(report.model) if s.encoding is not None}


def test_a_slower_pass_is_undone(clock: Any) -> None:
    clock(lambda encoded: 1.0 + len(encoded))
    report = effic.optimize(DIGITS, f"fuse-conv-bn,{RTN}", target="portable", keep_if_faster=True)
    assert kinds(report) == set()
    assert report.steps[1].rolled_back is not None
    assert "slower on portable: 0.33 times as fast" in report.steps[1].rolled_back
    assert report.speed is not None
    assert [row["kept"] for row in report.speed["steps"]] == [True, False, False, False]


def test_the_kind_that_does_not_slow_it_down_is_kept(clock: Any) -> None:
    clock(lambda encoded: (3.0 if "Conv" in encoded else 1.0) * (0.9 if "Gemm" in encoded else 1.0))
    report = effic.optimize(DIGITS, f"fuse-conv-bn,{RTN}", target="portable", keep_if_faster=True)
    assert kinds(report) == {"Gemm"}
    step = report.steps[1]
    assert step.rolled_back is None
    assert "kind:Conv" in step.text
    assert any("left Conv alone" in remark.text for remark in step.remarks)
    assert "kind:Conv" in report.model.record[-1].text


def test_a_faster_pass_is_kept(clock: Any) -> None:
    clock(lambda encoded: 1.0 / (1 + len(encoded)))
    report = effic.optimize(DIGITS, f"fuse-conv-bn,{RTN}", target="portable", keep_if_faster=True)
    assert kinds(report) == {"Conv", "Gemm"}
    assert all(step.rolled_back is None for step in report.steps)


@pytest.mark.parametrize(
    ("speedup", "spread", "wanted"),
    [(0.9, 0.02, True), (0.9, 0.2, False), (0.99, 0.005, False), (1.1, 0.01, False), (0.5, 0.4, True)],
)
def test_noise_is_no_slowness(speedup: float, spread: float, wanted: bool) -> None:
    assert slower(result(speedup, spread)) is wanted


def test_accuracy_and_speed_guard_together(clock: Any) -> None:
    from effic.guard import Accuracy
    from effic.models import digits_test

    images, labels = digits_test()
    clock(lambda encoded: 3.0 if "Conv" in encoded else 1.0)
    wanted = Accuracy("top1", {"x": images, "labels": labels}, max_drop=0.5)
    coarse = "quantize-rtn{bits=2,symmetric=false,min_size=0,group_size=-1,kinds=[Gemm,MatMul]}"
    report = effic.optimize(
        DIGITS,
        f"{coarse},quantize-rtn{{bits=8,kinds=[Conv]}}",
        target="portable",
        keep_if_faster=True,
        accuracy=wanted,
    )
    assert kinds(report) <= {"Gemm"}
    assert report.steps[1].rolled_back is not None
    assert "slower" in report.steps[1].rolled_back


def run(*args: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(main, ["optimize", str(DIGITS), *args])
    return outcome.exit_code, outcome.output


def test_on_the_real_clock(tmp_path: Path) -> None:
    # Decoding convolution weights at every call costs this model four fifths of its speed.
    out = tmp_path / "out.onnx"
    args = ("--passes", f"fuse-conv-bn,{RTN}", "--lower", "decode=call", "--keep-if-faster", "-o", str(out))
    code, text = run(*args)
    assert code == 0
    # Whether the Gemm weights stay is within the noise of a busy machine.
    assert "slower on ort-cpu" in text
    assert "speed: " in text
    left = {s.kind for s in weight_sites(effic.read_onnx(out)) if s.encoding is not None}
    assert "Conv" not in left


def test_threads_alone_do_nothing() -> None:
    code, text = run("--threads", "2")
    assert (code, "--threads does nothing" in text) == (2, True)
