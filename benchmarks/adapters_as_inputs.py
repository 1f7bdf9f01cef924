"""What adapters as inputs cost: a transformer with and without them, fed and not, beside the merged one.

One process, one thread, all forms timed in turns; the lower quartile of each, which a busy machine moves
least, and its ratio to the base's.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import effic
from benchmarks.harness import machine, table
from benchmarks.make_transformer import transformer_torchscript
from effic.ir.safetensors_format import write_safetensors
from effic.ir.weights import weight_sites
from effic.passes.adapters.adapters_as_inputs import AdaptersAsInputs

LAYERS, DIM, TURNS = 4, 512, 60
RANKS = (8, 64)
SHAPES = ((1, 1), (1, 128))


def main() -> None:
    """Print the tables."""
    import onnxruntime as ort

    print(machine("effic", "onnxruntime"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of every optional input

    def start(path: Path) -> Any:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        base = transformer_torchscript(folder / "exported.onnx", LAYERS, DIM)
        effic.optimize(base, "canonicalize-linear", output=folder / "base.onnx", check="off")
        sizes, rows = [], []
        for rank in RANKS:
            adapter = _adapter(folder / "base.onnx", folder / f"rank{rank}", rank)
            names = tuple(line.partition(" = ")[2] for line in (adapter / "map").read_text().splitlines())
            item = AdaptersAsInputs(rank=rank, targets=names)
            effic.optimize(folder / "base.onnx", [item], output=folder / f"inputs{rank}.onnx", check="off")
            text = f'merge-lora{{adapters=["{adapter}"],map="{adapter}/map"}}'
            effic.optimize(folder / "base.onnx", text, output=folder / f"merged{rank}.onnx", check="off")
            feeds = effic.adapter_feeds(adapter, folder / f"inputs{rank}.onnx", map=adapter / "map")
            sessions = {n: start(folder / f"{n}.onnx") for n in ("base", f"inputs{rank}", f"merged{rank}")}
            sizes.append((rank, *(f"{(folder / f'{n}.onnx').stat().st_size / 1e6:.0f} MB" for n in sessions)))
            for batch, length in SHAPES:
                ids = {"ids": np.ones((batch, length), np.int64)}
                runs = {
                    "base": (sessions["base"], ids),
                    "inputs, none given": (sessions[f"inputs{rank}"], ids),
                    "inputs, given": (sessions[f"inputs{rank}"], {**ids, **feeds}),
                    "merged": (sessions[f"merged{rank}"], ids),
                }
                rows += _timed(runs, rank, length)
    table("Files", ("rank", "base", "with inputs", "merged"), sizes)
    table(
        f"{LAYERS} layers of width {DIM}, adapters on all {6 * LAYERS} projections, one thread",
        ("rank", "tokens", "form", "one run", "of the base's"),
        rows,
    )


def _timed(
    runs: dict[str, tuple[Any, dict[str, np.ndarray]]], rank: int, length: int
) -> list[tuple[Any, ...]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 3):
        for name, (session, feeds) in runs.items():
            began = time.perf_counter()
            session.run(None, feeds)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - began)
    found = []
    for name, times in seconds.items():
        typical, base = (statistics.quantiles(ts, n=4)[0] for ts in (times, seconds["base"]))
        found.append((rank, length, name, f"{1e3 * typical:.2f} ms", f"{typical / base:.2f}"))
    return found


def _adapter(model: Path, folder: Path, rank: int) -> Path:
    """A made-up adapter of every matrix of the layers."""
    rng = np.random.default_rng(0)
    tensors, lines = {}, []
    for number, site in enumerate(weight_sites(effic.read_onnx(model), ("MatMul", "Gemm"))):
        if site.why_not is not None or site.shape_oi[0] < DIM:
            continue  # products of activations, and the classifier
        out, into = site.shape_oi
        tensors[f"base_model.model.m{number}.lora_A.weight"] = _normal(rng, rank, into)
        tensors[f"base_model.model.m{number}.lora_B.weight"] = _normal(rng, out, rank)
        lines.append(f"m{number} = {site.name}")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank})
    )
    (folder / "map").write_text("\n".join(lines))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return 0.01 * rng.standard_normal(shape).astype(np.float32)


if __name__ == "__main__":
    main()
