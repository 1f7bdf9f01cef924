"""One-shot pruning of real models: the shipped file runs and follows its pattern, methods are in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import effic
from effic.ir.evaluate import start_session
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import along_groups, declared, follows
from effic.ir.weights import weight_sites

CLEAN = "eliminate-identities,fold-constants,canonicalize-linear"


def follows_what_it_declares(path: Path) -> int:
    """How many weights declare a pattern; all of them follow it."""
    model = read_onnx(path)
    patterns = declared(model)
    for site in weight_sites(model):
        if site.name in patterns:
            with site.matrix() as matrix:
                assert follows(along_groups(site, matrix), patterns[site.name], axis=1), site.name
                assert np.count_nonzero(matrix) > 0.2 * matrix.size
    return len(patterns)


def test_stories_at_2_4_predicts_the_better_the_more_a_method_sees(tmp_path: Path, data_dir: Path) -> None:
    source, out = data_dir / "onnx" / "stories260k.onnx", tmp_path / "out.onnx"
    ids = np.load(data_dir / "stories" / "ids_eval.npy").astype(np.int64)[None, :512]
    losses = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        data: dict[str, Any] = {}
        if method != "magnitude":
            data = {"calib": data_dir / "stories" / "ids_calib.npy", "calib_samples": 4}
        report = effic.optimize(
            source, f"{CLEAN},prune-{method}", output=out, force=True, check="off", **data
        )
        step = next(s for s in report.steps if s.name == f"prune-{method}")
        # Five layers of seven matrices; the head and the table stay dense.
        assert step.passed == 35
        assert follows_what_it_declares(out) == 35
        assert all(r.data["density"] == 0.5 for r in step.remarks if r.kind == "passed")
        session = start_session(str(out), optimized=True)
        logits = np.asarray(session.run(None, {session.get_inputs()[0].name: ids})[0], np.float64)[0, :-1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        chosen = np.take_along_axis(shifted, ids[0, 1:, None], axis=-1)[:, 0]
        losses[method] = float(np.mean(np.log(np.exp(shifted).sum(axis=-1)) - chosen))
    assert losses["sparsegpt"] < losses["wanda"] < losses["magnitude"], losses


def test_mobilenet_keeps_its_depthwise_layers_dense(tmp_path: Path, data_dir: Path) -> None:
    out = tmp_path / "out.onnx"
    report = effic.optimize(
        data_dir / "onnx" / "mobilenet_v1_075_224.onnx",
        "fuse-conv-bn,prune-magnitude{min_size=0}",
        output=out,
        check="off",
    )
    step = next(s for s in report.steps if s.name == "prune-magnitude")
    reasons = [r.text for r in step.remarks if r.kind == "missed"]
    assert sum("depthwise" in text for text in reasons) == 13
    assert sum("has 3 input channels" in text for text in reasons) == 1
    assert follows_what_it_declares(out) == step.passed >= 13
