"""Fine-tuning ResNet-20 with frozen batch norms: eval, tune and deploy mode reach which accuracy, over three seeds.

    python -m benchmarks.conv_bn_finetune [--epochs N] [--seed N]

Starts from the CIFAR-10 weights and trains on the 1000 JPEG training images (``calib``) with flips and shifts,
SGD with momentum; top-1 is taken on the 5000 JPEG test images (``eval``). *eval* trains with the norms frozen, *tune*
the same after ``effic.tune_conv_bn``, *deploy* trains the folded weights. Every result is then captured,
its norms folded by ``fuse-conv-bn``, written as .onnx and scored once more by ONNX Runtime.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

import effic
from benchmarks.conv_bn_modes import deployed
from benchmarks.harness import data_folder, machine, table
from effic.ir.evaluate import start_session

EPOCHS, SEEDS, BATCH, RATE = 3, (0, 1, 2), 50, 0.001
CLEAN = "eliminate-identities,fold-constants,fuse-conv-bn,eliminate-dead-code"


def augmented(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch of images, flipped and shifted by up to four pixels."""
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(3)
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    return padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]


def train(module: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, seed: int, rate: float) -> float:
    """Train in place, norms in eval mode; returns the CPU seconds."""
    module.eval()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
    began = time.process_time()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(module(augmented(x[rows], generator)), y[rows])
            loss.backward()
            optimizer.step()
    return time.process_time() - began


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of right first choices; a network that diverged has none."""
    return float((logits.argmax(1) == labels).mean()) if np.isfinite(logits).all() else 0.0


def scores(module: nn.Module, x: torch.Tensor, labels: np.ndarray, path: Path) -> tuple[float, float, int]:
    """Top-1 of a module, of its deploy form in ONNX Runtime, and the norms left in that."""
    with torch.no_grad():
        want = np.concatenate([module(part).numpy() for part in x.split(250)])
    effic.untune_conv_bn(module)
    model = effic.capture(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    effic.optimize(model, CLEAN, output=path, target="portable", external=False, check="off")
    norms = len(list(effic.read_onnx(path).nodes("BatchNormalization")))
    session: Any = start_session(str(path), optimized=True, threads=1)
    key = session.get_inputs()[0].name
    got = np.concatenate([session.run(None, {key: part.numpy()})[0] for part in x.split(250)])
    return top1(want, labels), top1(got, labels), norms


def main(epochs: int = EPOCHS, seeds: Sequence[int] = SEEDS, rate: float = RATE) -> None:
    """Print the table."""
    data = data_folder()
    if data is None:
        raise SystemExit("the data folder is absent; set EFFIC_DATA")
    sys.path.append(str(data))
    import load  # type: ignore[import-not-found]

    print(machine("effic", "torch", "onnxruntime"))
    torch.set_num_threads(1)
    images, labels = load.cifar10("calib")
    x, y = load.cifar_preprocess(images), torch.from_numpy(labels)
    images, truth = load.cifar10("eval")
    test, start = load.cifar_preprocess(images), load.cifar_resnet(20)
    makers = {"eval": copy.deepcopy, "tune (effic)": _tuned, "deploy": deployed}
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        before = scores(copy.deepcopy(start), test, truth, Path(folder, "start.onnx"))
        rows.append(("before", "", f"{before[0]:.2%}", f"{before[1]:.2%}", "", before[2]))
        for mode, make in makers.items():
            found, seconds, left = [], [], 0
            for seed in seeds:
                module = make(start)
                seconds.append(train(module, x, y, epochs, seed, rate))
                *result, left = scores(module, test, truth, Path(folder, f"{mode[:4]}{seed}.onnx"))
                found.append(result)
            columns = list(zip(*found, strict=True))
            each = ", ".join(f"{value:.2%}" for value in columns[0])
            means = [f"{statistics.mean(column):.2%}" for column in columns]
            rows.append((mode, each, *means, f"{statistics.median(seconds):.0f} s", left))
    head = (
        "mode",
        "top-1 of each seed",
        "mean",
        "exported, ONNX Runtime",
        "CPU time",
        "norms left in the file",
    )
    title = f"ResNet-20 fine-tuned on 1000 JPEG images, {epochs} epochs at rate {rate:g}, 5000 test images"
    table(title, head, rows)


def _tuned(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    effic.tune_conv_bn(module)
    return module


@click.command()
@click.option("--epochs", default=EPOCHS, show_default=True)
@click.option("--rate", default=RATE, show_default=True, help="learning rate of SGD with momentum 0.9")
@click.option("--seed", "seeds", multiple=True, type=int, help=f"default: {', '.join(map(str, SEEDS))}")
def command(epochs: int, rate: float, seeds: tuple[int, ...]) -> None:
    """The benchmark as a command."""
    main(epochs, seeds or SEEDS, rate)


if __name__ == "__main__":
    command()
