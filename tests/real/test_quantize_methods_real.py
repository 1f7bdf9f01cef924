"""Every quantizer from the command line on real models, judged by their metric through the file that ships."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import effic
from effic.cli.main import main
from effic.ir.encodings import decode
from effic.ir.evaluate import start_session
from effic.ir.weights import weight_sites
from effic.passes.calibration import Calibration

CLEAN = "eliminate-identities,fold-constants,canonicalize-linear,eliminate-dead-code"
FUSE = "eliminate-identities,fuse-conv-bn,fold-constants,eliminate-dead-code"
WINDOWS = 8  # of 116, the same for every file: only differences between files are judged
WEIGHTS = 35  # of the five blocks; the head is tied to the embedding, which stays unless asked for


@pytest.fixture(scope="module")
def baseline(data_dir: Path) -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("PIL")
    sys.path.insert(0, str(data_dir))
    try:
        return importlib.import_module("baseline")
    finally:
        sys.path.remove(str(data_dir))


def optimize(source: Path, passes: str, out: Path, *options: str) -> dict[str, Any]:
    """``effic optimize``; its report."""
    args = ["optimize", str(source), "--passes", passes, "-o", str(out), "--json", *options]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of every weight that was quantized."""
    rows = [remark["data"] for step in report["steps"] for remark in step["remarks"]]
    return [row for row in rows if "effective_bits" in row]


@pytest.fixture(scope="module")
def stories(
    data_dir: Path, baseline: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[float, dict[str, Any]]]:
    """Perplexity of stories260k after passes, and their report."""
    ids = np.load(data_dir / "stories" / "ids_eval.npy").astype(np.int64)[: WINDOWS * 512].reshape(-1, 512)
    folder = tmp_path_factory.mktemp("stories")

    def perplexity(path: Path) -> float:
        session = start_session(str(path), optimized=True)
        name = session.get_inputs()[0].name
        return float(np.exp(baseline.mean_nll(lambda x: session.run(None, {name: x})[0], ids)[0]))

    @cache
    def measured(passes: str) -> tuple[float, dict[str, Any]]:
        source = data_dir / "onnx" / "stories260k.onnx"
        if not passes:
            return perplexity(source), {}
        out = folder / "out.onnx"
        calibrated = not passes.startswith(("quantize-rtn", "quantize-easyquant", "quantize-int8{mode=dyn"))
        data = ["--calib", str(data_dir / "stories" / "ids_calib.npy")] if calibrated else []
        report = optimize(source, f"{CLEAN},{passes}", out, "--force", "--check", "off", *data)
        return perplexity(out), report

    return measured


@pytest.mark.parametrize(
    ("passes", "better_than", "bits"),
    [
        ("quantize-gptq{group_size=32}", "quantize-rtn{group_size=32}", 5.05),
        ("quantize-gptq{group_size=32,bits=3}", "quantize-rtn{group_size=32,bits=3}", 4.05),
        ("quantize-gptq{group_size=-1}", "quantize-rtn{group_size=-1}", 4.45),
        ("quantize-adadim{group_size=32}", "quantize-rtn{group_size=32}", 5.1),
        ("quantize-adadim{group_size=32,base=gptq}", "quantize-rtn{group_size=32}", 5.1),
        ("quantize-adadim{group_size=32,base=gptq,bits=3}", "quantize-adadim{group_size=32,bits=3}", 4.1),
        ("quantize-awq{group_size=32}", "quantize-rtn{group_size=32}", 5.05),
        ("quantize-awq{group_size=32,bits=3}", "quantize-rtn{group_size=32,bits=3}", 4.05),
        ("quantize-easyquant", "quantize-rtn{group_size=-1}", 5.0),
        ("quantize-easyquant{bits=3}", "quantize-rtn{group_size=-1,bits=3}", 4.0),
    ],
)
def test_each_method_beats_rounding_at_its_bits(
    stories: Callable[[str], tuple[float, dict[str, Any]]], passes: str, better_than: str, bits: float
) -> None:
    worst, (found, report) = stories(better_than)[0], stories(passes)
    fp32 = stories("")[0]
    rows = figures(report)
    assert len(rows) == WEIGHTS
    assert max(row["effective_bits"] for row in rows) < bits + 1
    mean = sum(r["effective_bits"] * r["bytes_before"] for r in rows) / sum(r["bytes_before"] for r in rows)
    assert mean < bits
    assert fp32 < found < worst


def test_three_bits_are_stored_as_four_and_the_report_says_so(
    stories: Callable[[str], tuple[float, dict[str, Any]]],
) -> None:
    _, report = stories("quantize-gptq{group_size=32,bits=3}")
    assert {(row["bits"], row["stored_bits"]) for row in figures(report)} == {(3, 4)}


def test_dynamic_int8_keeps_the_perplexity(stories: Callable[[str], tuple[float, dict[str, Any]]]) -> None:
    found, report = stories("quantize-int8{mode=dynamic}")
    assert report["file_bytes"][1] < 0.5 * report["file_bytes"][0]
    assert found <= 1.02 * stories("")[0]


def test_adadim_is_no_worse_than_either_dimension_at_every_weight(data_dir: Path) -> None:
    source = data_dir / "onnx" / "stories260k.onnx"
    clean = effic.optimize(source, CLEAN, target="portable").model
    ids = data_dir / "stories" / "ids_calib.npy"
    decoded = {}
    for passes in ("quantize-rtn{group_size=32,bits=3}", "quantize-rtn{group_size=32,bits=3,axis=ic}",
                   "quantize-adadim{group_size=32,bits=3}"):  # fmt: skip
        data = {"calib": ids} if "adadim" in passes else {}
        report = effic.optimize(clean.clone(), passes, target="portable", check="off", **data)
        decoded[passes] = {
            site.name: decode(site.encoding).T if site.in_axis == 0 else decode(site.encoding)
            for site in weight_sites(report.model)
            if site.encoding is not None
        }
    oc, ic, ada = decoded.values()
    sites = [site for site in weight_sites(clean) if site.name in oc]
    assert len(sites) == WEIGHTS
    for site, statistics in Calibration.load(ids, clean).walk(clean, sites):
        weight = site.read()
        error = [statistics.output_error(weight - found[site.name]) for found in (oc, ic, ada)]
        assert error[2] <= min(error[:2]) * (1 + 1e-5)
    assert any(np.array_equal(ada[n], oc[n]) for n in oc)
    assert any(np.array_equal(ada[n], ic[n]) for n in oc)
