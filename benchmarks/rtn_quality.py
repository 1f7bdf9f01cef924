"""Round to nearest at equal bits: effic's scale rule beside onnxruntime's, in the same stored form.

Two measures: the relative error of a Gaussian and a heavy-tailed weight, and the perplexity of
stories260k (group 32) through files at accuracy level 0, so that only the weights differ.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import effic
from benchmarks.harness import data_folder, machine, table
from benchmarks.real_models import runner


def main() -> None:
    """Print the tables."""
    logging.disable(logging.INFO)  # the peer reports every node
    print(machine("effic", "onnx", "onnx-ir", "onnxruntime", "numpy"))
    with tempfile.TemporaryDirectory() as name:
        _weights(Path(name))
        _stories(Path(name))


def _weights(out: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    kinds = {
        "Gaussian": rng.standard_normal((1024, 512)),
        "student-t(5)": rng.standard_t(5, (1024, 512)),
        "uniform": rng.uniform(-1, 1, (1024, 512)),
    }
    for kind, values in kinds.items():
        weight = values.astype(np.float32)
        path = out / "linear.onnx"
        onnx.save(_linear(weight), path)
        eye = np.eye(1024, dtype=np.float32)
        for bits in (4, 8):
            for group in (32, 128):
                for symmetric in (True, False):
                    ours, theirs = out / "effic.onnx", out / "ort.onnx"
                    options = f"bits={bits},group_size={group},symmetric={str(symmetric).lower()}"
                    effic.optimize(
                        path, f"quantize-rtn{{{options}}}", output=ours, force=True, target="portable"
                    )
                    _peer(path, theirs, bits, group, symmetric)
                    norm = np.linalg.norm(weight)
                    errors = [float(np.linalg.norm(_exact(p, eye) - weight) / norm) for p in (ours, theirs)]
                    rows.append((kind, bits, group, symmetric, *(f"{e:.5f}" for e in errors)))
    table(
        "Relative weight error",
        ("weight", "bits", "group", "symmetric", "effic", "onnxruntime"),
        rows,
    )


def _stories(out: Path) -> None:
    folder = data_folder()
    if folder is None:
        print("stories260k: the data folder is absent (set EFFIC_DATA), skipped")
        return
    sys.path.insert(0, str(folder))
    baseline, load = importlib.import_module("baseline"), importlib.import_module("load")
    ids = load.stories_ids("eval")
    source = load.ROOT / "onnx" / "stories260k.onnx"
    rows = [("fp32", "", "", _perplexity(baseline, source, ids), "")]
    # The peer quantizes MatMuls with constant weights only: the same cleaned file goes into both.
    cleaned = out / "cleaned.onnx"
    effic.optimize(source, "fold-constants,canonicalize-linear", output=cleaned, target="portable")
    for bits in (4, 8):
        for symmetric in (True, False):
            ours, theirs = out / "effic.onnx", out / "ort.onnx"
            options = f"bits={bits},group_size=32,symmetric={str(symmetric).lower()}"
            effic.optimize(
                cleaned, f"quantize-rtn{{{options}}}", output=ours, force=True,
                target="ort-cpu{accuracy_level=4}" if bits == 8 else "ort-cpu{accuracy_level=0}",
            )  # fmt: skip
            _peer(cleaned, theirs, bits, 32, symmetric)
            rows.append((
                "4-bit" if bits == 4 else "8-bit", 32, symmetric,
                _perplexity(baseline, ours, ids), _perplexity(baseline, theirs, ids),
            ))  # fmt: skip
    table("stories260k: perplexity on ids_eval", ("bits", "group", "symmetric", "effic", "onnxruntime"), rows)


def _perplexity(baseline: object, path: Path, ids: np.ndarray) -> str:
    loss, _ = baseline.mean_nll(runner(path), ids)  # type: ignore[attr-defined]
    return f"{np.exp(loss):.4f}"


def _peer(source: Path, target: Path, bits: int, group: int, symmetric: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(
        block_size=group, is_symmetric=symmetric, bits=bits, accuracy_level=4 if bits == 8 else 0
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def _exact(path: Path, eye: np.ndarray) -> np.ndarray:
    from effic.ir.evaluate import run_session, start_session

    return next(iter(run_session(start_session(str(path)), {"x": eye}).values()))


def _linear(weight: np.ndarray) -> onnx.ModelProto:
    k, n = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


if __name__ == "__main__":
    main()
