"""Quality at equal bits: onnxruntime's quantizers and effic's on real models, through the files they ship.

    python -m benchmarks.quality [--model stories260k|minilm|resnet20|resnet56|mobilenet]… [--json FILE]

Every row is a process of its own that quantizes the same cleaned float32 file, on one core; seconds are
those of the quantizing call, without imports; memory is the process's peak. The file it wrote is then
run by ONNX Runtime. Bits per weight count codes, scales, zero points and outliers; for codes that no
operator can hold in their width (3 bits) the column after it says what the file takes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

from benchmarks.harness import machine, run, table
from benchmarks.peers import METHODS
from benchmarks.subjects import SUBJECTS, Scores, Subject, feeds_in, interval, make

BASE = "import effic.optimize, onnx, onnx_ir, onnxruntime, effic.passes.pipeline"
NEEDS_DATA = ("gptq", "static_int8")
ERROR = re.compile(r"[A-Za-z_.]*Error: ")
"""The line of a traceback that says what was wrong."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        tool: ``effic`` or ``onnxruntime``.
        method: as the table calls it.
        bits: width of a code; a heading of the table.
        how: text form of effic's passes, or the name of a function of :mod:`benchmarks.peers`.
        options: the function's arguments.
        decoded: the weights are written decoded, for want of a kernel.
        calibrated: the method sees the calibration samples.
    """

    tool: str
    method: str
    bits: str
    how: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    decoded: bool = False
    calibrated: bool = False


@dataclasses.dataclass
class Result:
    """What a row measured."""

    row: Row
    shipped: Scores | None = None
    exact: Scores | None = None
    bits: float = 0.0
    file_bytes: int = 0
    stored_bits: float = 0.0
    seconds: float = 0.0
    peak: int = 0
    failure: str = ""


def rows(subject: Subject) -> Iterator[Row]:
    """The table of a subject: peers first, then effic, per width."""
    if subject.convolutional:
        yield from _static(subject)
        yield from _effic(subject)
        return
    yield from _peers(subject.group)
    yield from _effic(subject)
    yield Row("onnxruntime", "dynamic int8", "8", "dynamic_int8")
    yield Row("effic", "int8 dynamic", "8", "quantize-int8{mode=dynamic}")


def _peers(group: int) -> Iterator[Row]:
    for bits in (4, 3):
        shown, common = str(bits), {"bits": bits, "group": group}
        emulated = bits == 3
        for symmetric in (True, False):
            kind = "symmetric" if symmetric else "asymmetric"
            yield Row(
                "onnxruntime", f"RTN, {kind}", shown, "rtn", {**common, "symmetric": symmetric}, emulated
            )
        yield Row("onnxruntime", "k_quant", shown, "k_quant", common, emulated)
        yield Row("onnxruntime", "HQQ", shown, "hqq", common, emulated)
        if not emulated:
            for symmetric in (True, False):
                kind = "symmetric" if symmetric else "asymmetric"
                options = {**common, "symmetric": symmetric}
                yield Row("onnxruntime", f"GPTQ, {kind}", shown, "gptq", options)
        for act_order in (False, True):
            options = {**common, "symmetric": False, "decode": True, "act_order": act_order}
            text = "GPTQ, its algorithm alone" + (", actorder" if act_order else "")
            yield Row("onnxruntime", text, shown, "gptq", options, True)
        channel = {"bits": bits, "group": -1}
        shown += ", a scale per channel"
        for symmetric in (True, False):
            kind = "symmetric" if symmetric else "asymmetric"
            yield Row("onnxruntime", f"RTN, {kind}", shown, "rtn", {**channel, "symmetric": symmetric}, True)
        yield Row("onnxruntime", "HQQ", shown, "hqq", channel, True)


WEIGHT_ONLY = (
    ("RTN", "quantize-rtn", False),
    ("RTN, asymmetric", "quantize-rtn{symmetric=false}", False),
    ("AdaDim-RTN", "quantize-adadim", True),
    ("AWQ", "quantize-awq", True),
    ("GPTQ", "quantize-gptq", True),
    ("GPTQ, asymmetric", "quantize-gptq{symmetric=false}", True),
    ("AdaDim-GPTQ", "quantize-adadim{base=gptq}", True),
    ("AdaDim-GPTQ, asymmetric", "quantize-adadim{base=gptq,symmetric=false}", True),
)
PER_CHANNEL = (
    ("RTN", "quantize-rtn{group_size=-1}", False),
    ("GPTQ", "quantize-gptq{group_size=-1}", True),
    ("EasyQuant", "quantize-easyquant", False),
    # As many bits as HQQ takes, whose zero points are floats.
    ("EasyQuant, fewer outliers", "quantize-easyquant{outlier_sigma=3.1}", False),
)


def _effic(subject: Subject) -> Iterator[Row]:
    """effic's weight-only methods; the text of the passes is what a user would write."""
    for bits in (4, 3):
        common = [f"bits={bits}", *([subject.kinds] if subject.kinds else [])]
        for method, text, calibrated in WEIGHT_ONLY:
            passes = _with(text, [*common, f"group_size={subject.group}"])
            yield Row("effic", method, str(bits), passes, calibrated=calibrated)
        for method, text, calibrated in PER_CHANNEL:
            yield Row(
                "effic", method, f"{bits}, a scale per channel", _with(text, common), calibrated=calibrated
            )


def _with(text: str, options: Sequence[str]) -> str:
    name, _, own = text.rstrip("}").partition("{")
    return f"{name}{{{','.join([*filter(None, [own]), *options])}}}"


def _static(subject: Subject) -> Iterator[Row]:
    for method in ("MinMax", "Percentile", "Entropy"):
        yield Row("onnxruntime", f"static, {method}", "8", "static_int8", {"method": method})
    for options in ("", "ranges=minmax", "ranges=percentile", "ranges=entropy", "equalize=true"):
        text = f"quantize-int8{{{options}}}" if options else "quantize-int8"
        yield Row("effic", f"static, {options or 'ranges=mse'}", "8", text, calibrated=True)


def measure(row: Row, subject: Subject, folder: Path) -> Result:
    """Quantize in a process of its own, then score the file."""
    out = folder / "out.onnx"
    for old in folder.glob("out*"):
        old.unlink()
    told = folder / "told.json"
    job = {
        "row": dataclasses.asdict(row), "source": str(subject.fp32), "output": str(out),
        "calibration": str(subject.calibration), "told": str(told),
    }  # fmt: skip
    result = Result(row)
    try:
        process = run([sys.executable, "-m", "benchmarks.quality", "--job", json.dumps(job)])
    except SystemExit as error:
        lines = [line for line in str(error).splitlines() if ERROR.match(line)]
        result.failure = (lines or [str(error)])[-1][:200]
        return result
    said = json.loads(told.read_text())
    result.bits, result.seconds, result.peak = said["bits"], said["seconds"], process.peak
    result.file_bytes = sum(p.stat().st_size for p in folder.glob("out.onnx*"))
    before, weights = _stored(subject.fp32), said["weights"]
    if weights and not row.decoded:
        result.stored_bits = 8 * (_stored(out) - before + 4 * weights) / weights
    result.shipped = subject.score(out)
    levelled = _at_level(out, 0 if row.tool == "effic" else 4)
    if levelled is not None:
        other = subject.score(levelled)
        first, second = (other, result.shipped) if row.tool == "effic" else (result.shipped, other)
        result.exact, result.shipped = first, second
    else:
        result.exact = result.shipped
    return result


def _at_level(path: Path, level: int) -> Path | None:
    """The same file with another accuracy level in its n-bit products, or None when it has none."""
    model = onnx.load(path)
    found = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for node in found:
        kept = [a for a in node.attribute if a.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    if not found:
        return None
    target = path.with_name("out_level.onnx")
    onnx.save(model, target)
    return target


def _stored(path: Path) -> int:
    """Bytes of the constants of a file."""
    model = onnx.load(path)
    held = list(model.graph.initializer)
    held += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")]
    return sum(len(t.raw_data) or t.ByteSize() for t in held)


def child(job: dict[str, Any]) -> None:
    """Quantize one file; leaves seconds, bits per weight and the number of weights behind."""
    row, source, output = Row(**job["row"]), Path(job["source"]), Path(job["output"])
    calibration = Path(job["calibration"])
    weights = 0
    if row.tool == "effic":
        import effic

        began = time.perf_counter()
        given = {"calib": calibration} if row.calibrated else {}
        report = effic.optimize(source, row.how, output=output, check="off", **given)
        seconds = time.perf_counter() - began
        done = [r for step in report.steps for r in step.remarks if "effective_bits" in r.data]
        weights = sum(r.data["bytes_before"] // 4 for r in done)
        bits = sum(r.data["effective_bits"] * r.data["bytes_before"] / 4 for r in done) / max(weights, 1)
    else:
        options = dict(row.options)
        if row.how in NEEDS_DATA:
            options["feeds"] = feeds_in(calibration)
        began = time.perf_counter()
        bits = METHODS[row.how](source, output, **options)
        seconds = time.perf_counter() - began
        for node in onnx.load(output).graph.node:
            sizes = {a.name: a.i for a in node.attribute}
            weights += sizes["K"] * sizes["N"] if node.op_type == "MatMulNBits" else 0
    Path(job["told"]).write_text(json.dumps({"seconds": seconds, "bits": bits, "weights": weights}))


def report(subject: Subject, base: Scores, results: Sequence[Result], base_peak: int) -> None:
    """Print a subject's table."""
    metrics = list(base.cells)
    levels = ("activations fp32", "activations 8 bits") if not subject.convolutional else ("",)
    head = ["bits", "tool", "method", *(f"{m} {level}".strip() for m in metrics for level in levels)]
    head += ["bits per weight", "in the file", "file bytes", "seconds", "peak"]
    size = subject.fp32.stat().st_size
    lines: list[list[object]] = []
    cells = [f"{base.cells[m]:.{subject.digits}f}{_wilson(base, m)}" for m in metrics for _ in levels]
    lines.append(["32", "", "fp32", *cells, "32", "32", size, "", ""])
    for result in sorted(results, key=lambda r: [r.row.bits.startswith(b) for b in "843"], reverse=True):
        row = result.row
        lead = [row.bits, row.tool, row.method]
        if result.failure or result.shipped is None or result.exact is None:
            lines.append([*lead, f"fails: {result.failure}", *[""] * (len(head) - 4)])
            continue
        cells = []
        for metric in metrics:
            for level in levels:
                scores = result.exact if level == "activations fp32" else result.shipped
                same = level == "activations 8 bits" and result.exact is result.shipped
                text = "" if same else f"{scores.cells[metric]:.{subject.digits}f}"
                cells.append(text + ("" if same else _difference(scores, base, metric)))
        stored = f"{result.stored_bits:.2f}" if result.stored_bits else ("decoded" if row.decoded else "")
        lines.append([
            *lead, *cells, f"{result.bits:.3f}", stored, result.file_bytes,
            f"{result.seconds:.2f}", f"{result.peak / 1e6:.0f} MB",
        ])  # fmt: skip
    table(f"{subject.name}, groups of {subject.group} (imports alone {base_peak / 1e6:.0f} MB)", head, lines)


def _wilson(scores: Scores, metric: str) -> str:
    if metric not in scores.right:
        return ""
    low, high = interval(scores.right[metric])
    return f" ({low:.3f} to {high:.3f})"


def _difference(scores: Scores, base: Scores, metric: str) -> str:
    if metric not in scores.right:
        return ""
    low, high = interval(scores.right[metric], base.right[metric])
    change = 100 * (scores.cells[metric] - base.cells[metric])
    return f" ({change:+.2f}, {100 * low:+.2f} to {100 * high:+.2f} points)"


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(SUBJECTS)), help="default: all")
@click.option("--only", default="", help='rows whose "tool method, bits" match this pattern')
@click.option("--json", "saved", type=click.Path(path_type=Path), help="also write the figures here")
@click.option("--job", hidden=True)
def command(models: tuple[str, ...], only: str, saved: Path | None, job: str | None) -> None:
    """Print the tables."""
    if job is not None:
        child(json.loads(job))
        return
    print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "numpy", "torch"))
    figures: list[dict[str, Any]] = []
    base_peak = run(BASE).peak
    for name in models or SUBJECTS:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
            subject = make(name, Path(made))
            if isinstance(subject, str):
                print(f"\n{name}: {subject}, skipped")
                continue
            base, results = subject.score(subject.fp32), []
            wanted = [r for r in rows(subject) if re.search(only, f"{r.tool} {r.method}, {r.bits}")]
            for number, row in enumerate(wanted):
                results.append(measure(row, subject, Path(made)))
                print(
                    f"{name} {number + 1}/{len(wanted)}: {_brief(results[-1])}", file=sys.stderr, flush=True
                )
            report(subject, base, results, base_peak)
            figures += [_figures(name, r) for r in results]
    if saved is not None:
        saved.write_text(json.dumps(figures, indent=1, default=lambda v: np.asarray(v).tolist()))


def _brief(result: Result) -> str:
    row = result.row
    scores = {} if result.shipped is None else dict(result.shipped.cells)
    found = result.failure or ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    return f"{row.tool} {row.method}, {row.bits}: {found}; {result.bits:.3f} bits, {result.seconds:.1f} s"


def _figures(model: str, result: Result) -> dict[str, Any]:
    row = {k: v for k, v in dataclasses.asdict(result).items() if k not in ("shipped", "exact")}
    for name in ("shipped", "exact"):
        scores = getattr(result, name)
        row[name] = None if scores is None else dict(scores.cells)
    return {"model": model, **row}


def main() -> None:
    """All tables, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()
