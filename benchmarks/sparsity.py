"""One-shot pruning of real models: what is left of their quality, and the error of each method's outputs.

    python -m benchmarks.sparsity [--model stories260k|minilm|resnet20]… [--pattern N:M]… [--json FILE]

stories260k (perplexity) and MiniLM (Spearman) at 2:4 and 4:8, resnet20 (top-1) at 2:4 and 1:4, for
magnitude, Wanda and SparseGPT, each also after channels were permuted for the pattern. Nothing is trained
afterwards. "Output SQNR" is the mean over layers of what pruning took from their outputs on the calibration
data, in dB (higher is better); a row says where the expected order, SparseGPT above Wanda above
magnitude, does not hold. Files run in ONNX Runtime as they are written.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import effic
from benchmarks.harness import machine, table
from benchmarks.subjects import Scores, Subject, interval, make
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import broken
from effic.ir.weights import weight_sites
from effic.passes import PASSES
from effic.passes.calibration import Calibration

MODELS = {"stories260k": ("2:4", "4:8"), "minilm": ("2:4", "4:8"), "resnet20": ("2:4", "1:4")}
METHODS = ("magnitude", "wanda", "sparsegpt")
PERMUTE = "permute-channels"
# Rows of the sketch that the outputs' errors are measured with here: nearly exact.
SKETCH = 1024


@dataclasses.dataclass
class Result:
    """What one sequence of passes left of a model.

    Attributes:
        pattern, method: headings.
        permuted: whether channels were permuted first.
        scores: the model's metric.
        outputs: SQNR of each pruned layer's outputs on its calibration data, dB, by weight.
        kept: mean share of the energy that was kept.
        seconds: of the whole job.
    """

    pattern: str
    method: str
    permuted: bool
    scores: Scores
    outputs: dict[str, float]
    kept: float
    seconds: float

    @property
    def output(self) -> float:
        """Mean over layers, dB."""
        return float(np.mean(list(self.outputs.values()))) if self.outputs else float("nan")


def prune(subject: Subject, folder: Path, pattern: str, method: str, permuted: bool) -> Result:
    """Prune the subject's file and score what comes out."""
    n, m = pattern.split(":")
    options = f"{{n={n},m={m}}}"
    given: dict[str, Any] = {} if method == "magnitude" else {"calib": subject.calibration}
    passes = f"{PERMUTE}{options}," if permuted else ""
    passes += f"prune-{method}{options}"
    out = folder / "pruned.onnx"
    began = time.perf_counter()
    report = effic.optimize(
        subject.fp32, passes, output=out, target="portable", check="off", force=True, **given
    )
    seconds = time.perf_counter() - began
    done = [r for step in report.steps for r in step.remarks if "kept_energy" in r.data]
    pruned = read_onnx(out)
    if left := broken(pruned):
        raise SystemExit(f"{passes} leaves {left[0][0]} without its pattern")
    kept = float(np.mean([r.data["kept_energy"] for r in done]))
    outputs = output_errors(subject, folder, permuted, options, out)
    return Result(pattern, method, permuted, subject.score(out), outputs, kept, seconds)


def output_errors(
    subject: Subject, folder: Path, permuted: bool, options: str, pruned: Path
) -> dict[str, float]:
    """SQNR in dB of each pruned layer's outputs, its inputs those of the dense model."""
    dense = subject.fp32
    if permuted:
        dense = folder / "permuted.onnx"
        effic.optimize(
            subject.fp32, PERMUTE + options, output=dense, target="portable", check="off", force=True
        )
    model, after = read_onnx(dense), {site.name: site for site in weight_sites(read_onnx(pruned))}
    calibration = Calibration.load(subject.calibration, model)
    sites = [
        site
        for site in weight_sites(model)
        if site.why_not is None and site.name in after and calibration.why_not(site) is None
    ]
    found = {}
    for site, statistics in calibration.walk(model, sites, second_moment=False, sketch=SKETCH):
        exact = site.read()
        delta = exact - after[site.name].read()
        if delta.any():
            ratio = statistics.output_error(exact) / max(statistics.output_error(delta), 1e-30)
            found[site.name] = 10 * float(np.log10(ratio))
    return found


def order(results: dict[str, Result]) -> Iterator[str]:
    """In how many layers the expected order of the methods' output errors does not hold."""
    for better, worse in (("sparsegpt", "wanda"), ("wanda", "magnitude")):
        both = results[better].outputs.keys() & results[worse].outputs.keys()
        wrong = [n for n in both if results[better].outputs[n] < results[worse].outputs[n]]
        mean = results[better].output - results[worse].output
        yield f"{better} over {worse}: {mean:+.2f} dB in the mean" + (
            f", but worse in {len(wrong)} of {len(both)} layers"
            if wrong
            else f", better in all {len(both)} layers"
        )


def report(subject: Subject, base: Scores, results: list[Result]) -> None:
    """Print a subject's table, and where the expected order does not hold."""
    metrics = list(base.cells)
    lines: list[list[object]] = [
        ["dense", "", "", *(f"{base.cells[m]:.{subject.digits}f}" for m in metrics), "", "", ""]
    ]
    for row in results:
        lines.append([
            row.pattern, row.method, "yes" if row.permuted else "no",
            *(_cell(subject, row.scores, base, m) for m in metrics),
            f"{row.output:.2f}", f"{row.kept:.4f}", f"{row.seconds:.1f}",
        ])  # fmt: skip
    head = ("pattern", "method", "permuted", *metrics, "output SQNR dB", "kept energy", "seconds")
    table(f"{subject.name}, one-shot", head, lines)
    for pattern in dict.fromkeys(row.pattern for row in results):
        plain = {row.method: row for row in results if row.pattern == pattern and not row.permuted}
        if plain.keys() >= set(METHODS):
            print(f"\n{subject.name} {pattern}: " + "; ".join(order(plain)))


def _cell(subject: Subject, scores: Scores, base: Scores, metric: str) -> str:
    text = f"{scores.cells[metric]:.{subject.digits}f}"
    if metric in scores.right:
        low, high = interval(scores.right[metric], base.right[metric])
        text += f" ({100 * low:+.1f} to {100 * high:+.1f} points)"
    return text


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="default: all")
@click.option("--pattern", "patterns", multiple=True, help="default: those of the model")
@click.option("--json", "saved", type=click.Path(path_type=Path), help="also write the figures here")
def command(models: tuple[str, ...], patterns: tuple[str, ...], saved: Path | None) -> None:
    """Print the tables."""
    print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "numpy"))
    figures: list[dict[str, Any]] = []
    for name in models or MODELS:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
            subject = make(name, Path(made))
            if isinstance(subject, str):
                print(f"\n{name}: {subject}, skipped")
                continue
            base, results = subject.score(subject.fp32), []
            for pattern in patterns or MODELS[name]:
                for permuted in (False, True):
                    if permuted and PERMUTE not in PASSES:
                        continue
                    for method in METHODS:
                        results.append(prune(subject, Path(made), pattern, method, permuted))
                        told = dict(results[-1].scores.cells)
                        print(f"{name} {pattern} {method} {permuted}: {told}", file=sys.stderr, flush=True)
            report(subject, base, results)
            figures += [{"model": name, **dataclasses.asdict(r), "output": r.output} for r in results]
    if saved is not None:
        saved.write_text(json.dumps(figures, indent=1, default=lambda v: np.asarray(v).tolist()))


def main() -> None:
    """The tables, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()
