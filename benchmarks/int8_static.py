"""Static int8 convolutional networks: time of a call beside fp32 and onnxruntime's own static quantizer.

    python -m benchmarks.int8_static [--quality]

ResNet-18 and MobileNetV2 as published, 224 x 224, batch 1; seeded weights, batch norms calibrated, so that
activations have ranges like trained ones. The three files run interleaved in one process, one thread, on
one core: the time is the median over rounds of the best of a few calls, in processor time of that thread,
which other work on the machine disturbs less. With ``--quality`` also top-1 on
the real models of :mod:`benchmarks.quality`.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import effic
from benchmarks.harness import machine, table
from benchmarks.peers import static_int8
from effic.ir.evaluate import start_session

CLEAN = "eliminate-identities,fold-constants,fuse-conv-bn,eliminate-dead-code"
ROUNDS, CALLS = 15, 6
SAMPLES = 16


class _Basic(nn.Module):
    """Residual block of ResNet-18."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip
        same = stride == 1 and cin == cout
        self.short = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2016, table 1)."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1),
              (256, 512, 2), (512, 512, 1)]  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        *[_Basic(*w) for w in widths], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000),
    )  # fmt: skip


class _Inverted(nn.Module):
    """Inverted residual of MobileNetV2."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = cin * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(cin, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)]
        layers += [nn.ReLU6(), nn.Conv2d(wide, cout, 1, bias=False), nn.BatchNorm2d(cout)]
        self.body, self.same = nn.Sequential(*layers), stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return x + y if self.same else y


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018, table 2)."""
    plan = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    blocks: list[nn.Module] = []
    cin = 32
    for expand, cout, count, stride in plan:
        for number in range(count):
            blocks.append(_Inverted(cin, cout, stride if number == 0 else 1, expand))
            cin = cout
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(), *blocks,
        nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000),
    )  # fmt: skip


def images(count: int, seed: int) -> np.ndarray:
    """Smooth noise, as float32 ``[count, 3, 224, 224]``: neighbouring pixels are alike, as in photographs."""
    coarse = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (224, 224), mode="bicubic")
    return np.asarray(fine.numpy(), np.float32)


def calibrated(module: nn.Module) -> nn.Module:
    """The module with batch norms that fit what flows through it."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # a plain average
    with torch.no_grad():
        module(torch.from_numpy(images(8, 7)))
    return module.eval()


def speed(name: str, module: nn.Module, folder: Path) -> list[tuple[Any, ...]]:
    """Rows of the table for a network."""
    fp32, peer, own = (folder / f"{name}.{kind}.onnx" for kind in ("fp32", "peer", "effic"))
    example = (torch.zeros(1, 3, 224, 224),)
    effic.optimize(module, CLEAN, output=fp32, target="portable", example_inputs=example, external=False)
    key = start_session(str(fp32)).get_inputs()[0].name
    feeds = [{key: image[None]} for image in images(SAMPLES, 11)]
    began = time.process_time()
    static_int8(fp32, peer, feeds=feeds)
    taken = {"peer": time.process_time() - began}
    began = time.process_time()
    effic.optimize(
        fp32, "quantize-int8,eliminate-dead-code", output=own, calib=feeds, check="off", external=False
    )
    taken["effic"] = time.process_time() - began
    files = {"fp32": fp32, "peer": peer, "effic": own}
    sessions = {kind: start_session(str(path), optimized=True, threads=1) for kind, path in files.items()}
    x = {key: images(1, 99)}
    rounds: dict[str, list[float]] = {kind: [] for kind in files}
    for number in range(ROUNDS + 1):
        for kind, session in sessions.items():
            best = min(_once(session, x) for _ in range(CALLS))
            if number:
                rounds[kind].append(best)
    times = {kind: 1000 * statistics.median(values) for kind, values in rounds.items()}
    want = sessions["fp32"].run(None, x)[0]
    rows = []
    for kind, path in files.items():
        error = sessions[kind].run(None, x)[0] - want
        noise = float(np.sum(error**2))
        sqnr = f"{10 * np.log10(float(np.sum(want**2)) / noise):.1f} dB" if noise else ""
        ratios = [a / b for a, b in zip(rounds["fp32"], rounds[kind], strict=True)]
        found = operators(path, folder)
        rows.append((
            name, {"peer": "onnxruntime static", "effic": "effic quantize-int8"}.get(kind, kind),
            f"{times[kind]:.2f} ms", f"{statistics.median(ratios):.2f} x", f"{path.stat().st_size / 1e6:.1f} MB",
            f"{taken[kind]:.1f} s" if kind in taken else "", sqnr,
            f"{found['QuantizeLinear']} + {found['DequantizeLinear']}" if kind != "fp32" else "",
        ))  # fmt: skip
    return rows


def _once(session: Any, x: dict[str, np.ndarray]) -> float:
    began = time.thread_time()
    session.run(None, x)
    return time.thread_time() - began


def operators(path: Path, folder: Path) -> Counter[str]:
    """Operators of the graph that the runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def main(quality: bool = False) -> None:
    """Print the tables."""
    logging.disable(logging.INFO)  # the peer reports every step
    print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "numpy", "torch"))
    torch.manual_seed(0)
    networks = {"ResNet-18": resnet18(), "MobileNetV2": mobilenet_v2()}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for name, module in networks.items():
            rows += speed(name, calibrated(module), Path(folder))
    head = ("network", "file", "a call", "speed-up", "size", "quantized in (CPU)", "output", "Q + DQ left")
    table("Static int8, batch 1, 224 x 224, one thread", head, rows)
    if quality:
        from benchmarks.quality import command

        names = ["resnet20", "resnet56", "mobilenet"]
        command(args=[a for n in names for a in ("--model", n)] + ["--only", "static"], standalone_mode=False)


@click.command()
@click.option("--quality", is_flag=True, help="also top-1 on real models")
def _command(quality: bool) -> None:
    main(quality)


if __name__ == "__main__":
    _command(args=sys.argv[1:])
