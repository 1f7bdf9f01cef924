"""Channels of real models: found where they should be, permuted with a gain, outputs as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from effic.ir.channels import Channels
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.onnx_format import read_onnx
from effic.passes.base import Remarks
from effic.passes.sparsify.permute_channels import PermuteChannels
from effic.passes.sparsify.prune_magnitude import PruneMagnitude

FILES = ("resnet20_cifar", "mobilenet_v1_075_224", "stories260k", "version-RFB-320", "basic_pitch_nmp")


@pytest.mark.parametrize("name", FILES)
def test_random_orders_of_all_free_channels_keep_the_outputs(name: str, data_dir: Path) -> None:
    model = read_onnx(data_dir / "onnx" / f"{name}.onnx")
    inputs, want = runnable_inputs(model, Oracle(model))
    channels, rng = Channels(model), np.random.default_rng(0)
    leaves = [leaf for leaf in channels.constants() if leaf.reason is None]
    assert max(leaf.size for leaf in leaves) >= 8
    channels.permute({leaf: rng.permutation(leaf.size) for leaf in leaves})
    assert compare_outputs(want, Oracle(model).run(inputs)).max_rel < 1e-5


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        # Nine inner widths, the stream of the first stage, and what Pad leaves of those of the others.
        ("resnet20_cifar", {16: 6, 32: 3, 64: 3, 8: 2}),
        # The residual stream (with embedding and head), the feed-forward of each layer, dims of heads.
        ("stories260k", {64: 1, 172: 5}),
    ],
)
def test_a_gain_that_pruning_keeps(name: str, groups: dict[int, int], data_dir: Path, tmp_path: Path) -> None:
    model = read_onnx(data_dir / "onnx" / f"{name}.onnx")
    inputs, want = runnable_inputs(model, Oracle(model, optimized=True))
    plain, remarks = Remarks(), Remarks()
    PruneMagnitude().apply(model.clone(), plain)
    PermuteChannels(escape_attempts=0).apply(model, remarks)
    model.save(tmp_path / "out.onnx")
    again = read_onnx(tmp_path / "out.onnx")
    assert compare_outputs(want, Oracle(again, optimized=True).run(inputs)).max_rel < 1e-5
    done = [r.data for r in remarks.items if r.kind == "passed"]
    sizes = [row["channels"] for row in done]
    assert {size: sizes.count(size) for size in groups} == groups
    assert all(row["gain"] > 1e-4 for row in done)
    pruned = Remarks()
    PruneMagnitude().apply(again, pruned)

    def energy(found: Remarks) -> float:
        return float(np.mean([r.data["kept_energy"] for r in found.items if r.kind == "passed"]))

    assert energy(pruned) > energy(plain) + 0.002
