"""What optimized models score through TVM: beside the portable form as written, and ONNX Runtime at its defaults.

    python -m benchmarks.tvm_quality [--model stories260k|minilm|mobilenet]… [--samples N]

Each row's passes run once; the portable file that they leave is lowered for every target, so that all score
the same weights. *As written* is ONNX Runtime without any optimization, that is the file's own meaning; it
is what TVM with fp32 activations has to match. Where nothing is quantized there are no activations to round,
and that column is empty. Bytes are those of the file, and of the folder's library and weights together.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import effic
from benchmarks.harness import machine, table
from benchmarks.subjects import SUBJECTS, MiniLM, MobileNet, Stories, Subject, make
from effic.backends import get_backend
from effic.ir.evaluate import Oracle, Runner
from effic.ir.onnx_format import read_onnx
from effic.passes.base import Remarks

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]

TARGETS = {
    "as written": "portable",
    "ort-cpu": "ort-cpu",
    "tvm-cpu": "tvm-cpu",
    "tvm-cpu, int8 activations": "tvm-cpu{activations=int8}",
}


@dataclass(frozen=True)
class Task:
    """How a subject is scored at fixed shapes.

    Attributes:
        shapes: the buckets of the TVM target.
        metric: the name of what :attr:`score` returns.
        score: the metric of a way to run the model.
    """

    shapes: str
    metric: str
    score: Callable[[Run], float]


def stories(subject: Stories, samples: int | None, batch: int = 8) -> Task:
    """Perplexity on windows of 512 ids, eight at a time."""
    ids = subject.ids[: min(samples or len(subject.ids), len(subject.ids)) // batch * batch]

    def score(run: Run) -> float:
        loss, _ = subject.baseline.mean_nll(lambda part: run({"ids": part}), ids)
        return float(np.exp(loss))

    return Task(f"batch={batch},seq=512", f"perplexity, {len(ids)} windows", score)


def minilm(subject: MiniLM, samples: int | None, batch: int = 16) -> Task:
    """Spearman on pairs of sts-test, padded to the next of three lengths."""
    lengths = (16, 32, 128)
    a, b, gold = (part[:samples] for part in subject.load.sts("test"))
    sentences = [*a, *b]
    made = subject.tokenizer(list(sentences), truncation=True, max_length=lengths[-1])
    sizes = np.array([len(ids) for ids in made["input_ids"]])
    groups = [(n, np.flatnonzero((sizes <= n) & (sizes > low))) for low, n in zip((0, *lengths), lengths)]  # noqa: B905

    def score(run: Run) -> float:
        found: dict[int, np.ndarray] = {}
        for length, members in groups:
            for start in range(0, len(members), batch):
                # The last batch is filled up: shapes are fixed.
                part = np.resize(members[start : start + batch], batch)
                feeds = _padded(made, part, length, subject.inputs)
                hidden = run(feeds)
                keep = feeds["attention_mask"][:, :, None].astype(np.float32)
                pooled = (hidden * keep).sum(1) / keep.sum(1)
                found.update(zip(part.tolist(), pooled, strict=True))
        whole = np.stack([found[i] for i in range(len(sentences))])
        whole /= np.linalg.norm(whole, axis=1, keepdims=True)
        similarity = (whole[: len(a)] * whole[len(a) :]).sum(1)
        return float(subject.baseline.spearman(similarity, gold))

    shapes = ";".join(f"batch={batch},sequence={length}" for length in lengths)
    return Task(shapes, f"Spearman, {len(a)} pairs", score)


def _padded(made: Any, part: np.ndarray, length: int, inputs: set[str]) -> dict[str, np.ndarray]:
    feeds = {}
    for name in inputs:
        array = np.zeros((len(part), length), np.int64)
        for row, index in enumerate(part):
            ids = made[name][index] if name in made else [0] * len(made["input_ids"][index])
            array[row, : len(ids)] = ids
        feeds[name] = array
    return feeds


def mobilenet(subject: MobileNet, samples: int | None, batch: int = 8) -> Task:
    """Top-1, or agreement with fp32 where no labelled images are at hand."""
    count = min(samples or len(subject.x), len(subject.x)) // batch * batch

    def score(run: Run) -> float:
        logits = [run({subject.input: subject.x[i : i + batch]}) for i in range(0, count, batch)]
        return float((np.concatenate(logits).argmax(1) == subject.labels[:count]).mean())

    what = "top-1" if subject.labelled else "agreement with fp32"
    return Task(f"batch={batch}", f"{what}, {count} images", score)


TASKS: dict[str, Callable[[Any, int | None], Task]] = {
    "stories260k": stories,
    "minilm": minilm,
    "mobilenet": mobilenet,
}


def rows(subject: Subject) -> Iterator[tuple[str, str]]:
    """Method and passes."""
    kinds = [subject.kinds] if subject.kinds else []
    # In 4 bits, depthwise weights too, nothing is left of MobileNet.
    bits = 8 if subject.convolutional else 4
    groups = [*kinds, f"group_size={subject.group}"]

    def written(name: str, *options: str) -> str:
        return f"{name}{{{','.join(options)}}}" if options else name

    yield "fp32", ""
    yield f"AdaDim, {bits} bits", written("quantize-adadim", *groups, f"bits={bits}")
    yield f"EasyQuant, {bits} bits", written("quantize-easyquant", *kinds, f"bits={bits}")
    yield "2:4 (SparseGPT)", written("prune-sparsegpt", *kinds, "n=2", "m=4") + ",compress-nm"
    yield f"GPTQ, {bits} bits", written("quantize-gptq", *groups, f"bits={bits}")
    yield "RTN, 8 bits", written("quantize-rtn", *groups, "bits=8")


def measure(
    source: Path, shapes: str, score: Callable[[Run], float], folder: Path, quantized: bool
) -> dict[str, tuple[float, int]]:
    """The metric and the bytes of a portable file on the targets, by the names of :data:`TARGETS`."""
    found = {}
    for name, text in TARGETS.items():
        if name.startswith("tvm"):
            rounded = "int8" in text
            if rounded and not quantized:
                continue
            options = [f'shapes="{shapes}"', *(["activations=int8"] if rounded else [])]
            text = f"tvm-cpu{{{','.join(options)}}}"
        backend, model = get_backend(text), read_onnx(source)
        place = folder / ("built" if backend.is_folder else "built.onnx")
        if name == "as written":
            runner: Runner = Oracle(model)
            size = source.stat().st_size
        else:
            model = backend.lower(model, Remarks())
            backend.build(model, place)
            runner = backend.load(place)
            size = sum(p.stat().st_size for p in place.rglob("*")) if place.is_dir() else place.stat().st_size
        found[name] = (score(lambda feeds, runner=runner: next(iter(runner.run(feeds).values()))), size)  # type: ignore[misc]
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    return found


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(TASKS)), help="default: all")
@click.option("--samples", type=click.IntRange(min=8), help="windows, pairs or images to score; default: all")
def command(models: tuple[str, ...], samples: int | None) -> None:
    """Print the tables."""
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    print(machine("effic", "apache-tvm", "onnxruntime", "numpy"))
    for name in models or TASKS:
        assert name in SUBJECTS
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            subject = make(name, folder)
            if isinstance(subject, str):
                print(f"\n{name}: {subject}, skipped")
                continue
            task, lines = TASKS[name](subject, samples), []
            for method, passes in rows(subject):
                path = subject.fp32
                if passes:
                    path = folder / "out.onnx"
                    calibrated = any(word in passes for word in ("gptq", "adadim", "sparsegpt"))
                    effic.optimize(
                        subject.fp32, passes, output=path, target="portable", check="off", force=True,
                        calib=subject.calibration if calibrated else None, external=False, record=False,
                    )  # fmt: skip
                scores = measure(path, task.shapes, task.score, folder, "quantize-" in passes)
                cells = [f"{scores[t][0]:.{subject.digits}f}" if t in scores else "" for t in TARGETS]
                lines.append([method, *cells, *(scores[t][1] if t in scores else "" for t in TARGETS)])
                print(f"{name}, {method}: {' '.join(cells)}", file=sys.stderr, flush=True)
            head = ["method", *TARGETS, *(f"bytes, {target}" for target in TARGETS)]
            table(f"{subject.name}: {task.metric}", head, lines)


def main() -> None:
    """All tables, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()
