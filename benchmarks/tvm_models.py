"""Whole models on ``tvm-cpu`` beside ONNX Runtime: time, build, memory, size; one thread and two.

    python -m benchmarks.tvm_models [--only TEXT] [--rounds N] [--threads 1,2]

Each network is timed in a process of its own per number of threads: all its forms take turns, A B C, C B A, …
A turn is one call that is not counted and then calls for at least 50 ms; arrays in, arrays out. With several
threads, the other runtime's are waited out before, which look out for more work for a while. With one thread
the clock is the processor time of that thread, so that other work on the machine shows less; with more it is the
wall's, which only tells something on a machine without other work. A ratio is the median over the turns of a
form's time divided by that of ONNX Runtime in the same round, with its quartiles: below 1, the build for TVM is
the faster. Nothing was tuned.

Weights are random, shapes are those of the published networks: ResNet-18 and MobileNetV2 on one image of 224 x
224; BERT-small (4 layers of 512, 8 heads) and Llama-small (the same, 4 heads of keys, 8000 tokens) on 64 tokens;
a step of a Llama-like decoder (see :mod:`benchmarks.decoder_step`), fp32, in 4 bits per output channel for
ONNX Runtime (``MatMulNBits``, activations in 8 bits), and in 4 bits by AdaDim for TVM.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

import effic
from benchmarks.decoder_step import Sizes, write_step
from benchmarks.harness import machine, table
from benchmarks.tvm_kernels import SPIN_SECONDS, tvm_threads
from effic.backends.artifact import Arrays, Artifact

SEQUENCE = 64
TURN_SECONDS = 0.05
STEP_SAMPLES = 8
CLEAN = "eliminate-dead-code"


@dataclass(frozen=True)
class Form:
    """A network as one runtime runs it.

    Attributes:
        name: of the row.
        path: the file or the folder.
        seconds, memory: what building it took; memory of the child process that compiles. 0: no compiler.
        size: bytes of what is stored.
    """

    name: str
    path: Path
    seconds: float = 0.0
    memory: int = 0
    size: int = 0
    stages: dict[str, float] = field(default_factory=dict)


def resnet(folder: Path) -> list[Form]:
    """ResNet-18."""
    from benchmarks.int8_static import resnet18

    return _convolutional(folder, resnet18)


def mobilenet(folder: Path) -> list[Form]:
    """MobileNetV2."""
    from benchmarks.int8_static import mobilenet_v2

    return _convolutional(folder, mobilenet_v2)


def _convolutional(folder: Path, make: Callable[[], Any]) -> list[Form]:
    import torch

    from benchmarks.int8_static import calibrated

    torch.manual_seed(0)
    return _fp32(folder, calibrated(make()), (torch.zeros(1, 3, 224, 224),))


def bert(folder: Path) -> list[Form]:
    """BERT-small."""
    import torch
    from transformers import BertConfig, BertModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048,
                attn_implementation="eager",
            )  # fmt: skip
            self.model = BertModel(config, add_pooling_layer=False)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    torch.manual_seed(0)
    ones = torch.ones(1, SEQUENCE, dtype=torch.int64)
    return _fp32(folder, Encoder().eval(), (ones, ones))


def llama(folder: Path) -> list[Form]:
    """Llama-small."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = LlamaConfig(
                hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
                intermediate_size=1376, vocab_size=8000, attn_implementation="eager", use_cache=False,
            )  # fmt: skip
            self.model = LlamaForCausalLM(config)

        def forward(self, input_ids: Any) -> Any:
            return self.model(input_ids=input_ids, use_cache=False).logits

    torch.manual_seed(0)
    return _fp32(folder, Decoder().eval(), (torch.ones(1, SEQUENCE, dtype=torch.int64),))


def step(folder: Path) -> list[Form]:
    """Llama-like decoder step."""
    sizes = Sizes()
    source = write_step(folder / "step.onnx", sizes)
    adadim = folder / "adadim.onnx"
    rng = np.random.default_rng(1)
    past = (1, sizes.kv_heads, sizes.past, sizes.head)
    samples = [
        {
            "x": rng.standard_normal((1, 1, sizes.dim), np.float32),
            "position": np.full((1, 1), sizes.past, np.float32),
            **{
                f"past_{kind}.{i}": rng.standard_normal(past, np.float32)
                for i in range(sizes.layers)
                for kind in "kv"
            },
        }
        for _ in range(STEP_SAMPLES)
    ]
    effic.optimize(
        source, "quantize-adadim", output=adadim, target="portable", calib=samples, check="off", external=True
    )
    return [
        _for_ort("ORT fp32", source, folder / "fp32.onnx"),
        _for_ort("ORT 4-bit per output, level 4", source, folder / "level4.onnx", "quantize-rtn"),
        _for_tvm("TVM AdaDim, fp32 activations", adadim, folder / "fp32.tvm"),
        _for_tvm("TVM AdaDim, int8 activations", adadim, folder / "int8.tvm", "tvm-cpu{activations=int8}"),
    ]


NETWORKS: dict[str, Callable[[Path], list[Form]]] = {
    "ResNet-18": resnet,
    "MobileNetV2": mobilenet,
    "BERT-small": bert,
    "Llama-small": llama,
    "Decoder step": step,
}


def _fp32(folder: Path, module: Any, example: tuple[Any, ...]) -> list[Form]:
    source = folder / "source.onnx"
    effic.optimize(
        module, output=source, target="portable", example_inputs=example, check="off", external=True
    )
    return [
        _for_ort("ORT fp32", source, folder / "fp32.onnx"),
        _for_tvm("TVM fp32", source, folder / "fp32.tvm"),
    ]


def _for_ort(name: str, source: Path, path: Path, passes: str = CLEAN) -> Form:
    effic.optimize(source, passes, output=path, target="ort-cpu", check="off", external=True, record=False)
    return Form(name, path, size=sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")))


def _for_tvm(name: str, source: Path, path: Path, target: str = "tvm-cpu") -> Form:
    from effic.backends import get_backend
    from effic.ir.onnx_format import read_onnx

    built = get_backend(target).build(read_onnx(source), path)
    size = sum(p.stat().st_size for p in path.iterdir())
    return Form(name, path, built.seconds, built.peak_memory, size, built.stages)


# -- timing ---------------------------------------------------------------------------------------


def timed(forms: list[Form], threads: int, rounds: int) -> list[list[float]]:
    """Seconds of a call, per form and round, in a process of its own."""
    request = json.dumps({"paths": [str(form.path) for form in forms], "threads": threads, "rounds": rounds})
    # TVM's pool is as large as the first user asks; a pool of one does not spin.
    env = {**os.environ, **tvm_threads(threads), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tvm_models", "--request", request],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"timing failed:\n{done.stderr[-3000:]}")
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _time_here(request: dict[str, Any]) -> list[list[float]]:
    from effic.folder_build import load_artifact

    artifacts = [load_artifact(path, request["threads"]) for path in request["paths"]]
    feeds = artifacts[-1].made_up(0)
    clock = time.thread_time if request["threads"] == 1 else time.perf_counter
    seconds: list[list[float]] = [[] for _ in artifacts]
    batches: list[int] = []
    for artifact in artifacts:
        artifact.run(feeds)
        batches.append(max(1, round(TURN_SECONDS / min(_turn(artifact, feeds, clock, 1) for _ in range(3)))))
    for number in range(request["rounds"]):
        order = range(len(artifacts)) if number % 2 == 0 else reversed(range(len(artifacts)))
        for i in order:
            seconds[i].append(_turn(artifacts[i], feeds, clock, batches[i]))
    return seconds


def _turn(artifact: Artifact, feeds: Arrays, clock: Callable[[], float], calls: int) -> float:
    """Seconds of a call."""
    if clock is time.perf_counter:
        time.sleep(SPIN_SECONDS)
    artifact.run(feeds)
    began = clock()
    for _ in range(calls):
        artifact.run(feeds)
    return (clock() - began) / calls


def rows_of(network: str, forms: list[Form], threads: int, seconds: list[list[float]]) -> Iterator[list[str]]:
    """Rows of the table: ratios against the first form, and against the second where that is ORT's too."""
    rivals = [i for i, form in enumerate(forms) if form.name.startswith("ORT")]
    for form, taken in zip(forms, seconds, strict=True):
        cells = []
        for rival in (0, 1):
            if rival not in rivals or taken is seconds[rival]:
                cells.append("")
                continue
            ratios = [a / b for a, b in zip(taken, seconds[rival], strict=True)]
            low, middle, high = np.percentile(ratios, (25, 50, 75))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        yield [network, form.name, str(threads), f"{1e3 * statistics.median(taken):.2f}", *cells]


@click.command()
@click.option("--only", default="", help="networks whose name contains this text")
@click.option("--rounds", default=15, show_default=True, help="turns of each form")
@click.option("--threads", default="1,2", show_default=True, help="numbers of threads")
@click.option("--keep", default="", help="a folder for the builds, used again where they are there")
@click.option("--request", default="", hidden=True)
def command(only: str, rounds: int, threads: str, keep: str, request: str) -> None:
    """Print the tables."""
    if request:
        print(json.dumps(_time_here(json.loads(request))))
        return
    print(machine("effic", "apache-tvm", "onnxruntime", "numpy", "torch", "transformers"))
    speed, builds = [], []
    for name, make in NETWORKS.items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
            forms = _made(make, Path(keep, name) if keep else Path(scratch))
            for count in map(int, threads.split(",")):
                speed += rows_of(name, forms, count, timed(forms, count, rounds))
        builds += [
            [name, f.name, f"{f.seconds:.1f} s" if f.seconds else "", f"{f.memory / 1e6:.0f} MB" if f.memory else "",
             f"{f.size / 1e6:.1f} MB", ", ".join(f"{k} {v:.1f}" for k, v in f.stages.items())]
            for f in forms
        ]  # fmt: skip
    head = ("network", "form", "threads", "ms", "/ ORT fp32", "/ ORT level 4")
    table("Time of a call; ratios below 1: faster than that", head, speed)
    head = ("network", "form", "build", "peak memory of the build", "stored", "stages, s")
    table("What was built", head, builds)


def _made(make: Callable[[Path], list[Form]], folder: Path) -> list[Form]:
    """The forms, built; those of an earlier run where they are kept."""
    note = folder / "forms.json"
    if note.is_file():
        return [Form(**{**row, "path": Path(row["path"])}) for row in json.loads(note.read_text())]
    folder.mkdir(parents=True, exist_ok=True)
    forms = make(folder)
    note.write_text(json.dumps([{**vars(form), "path": str(form.path)} for form in forms]))
    return forms


def main() -> None:
    """The tables, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()
