"""merge-lora into weights that are stored in few bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from effic.ir.encodings import code_values, recognise
from effic.ir.errors import UsageError
from effic.ir.evaluate import Oracle
from effic.ir.weights import weight_sites
from effic.passes.base import Remarks
from effic.passes.spec import parse_passes
from tests.passes.adapter_nets import (
    MakeNet,
    WriteAdapter,
    close,
    delta,
    encoded_net,
    lora,
    merge,
    net,
    normal,
)

FORMS = [
    "bits=4,group_size=32",
    "bits=4,group_size=24,axis=ic",
    "bits=3,group_size=32,symmetric=false",
    "bits=8,group_size=-1",
    "bits=4,group_size=32,scale=absmax",
]


@pytest.mark.parametrize("form", FORMS)
def test_new_parameters_are_those_of_the_quantizer(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, form: str
) -> None:
    model = encoded_net(make_net, normal(64, 48), form)
    base = weight_sites(model)[0].read().T
    tensors = lora("q", 48, 64)
    remarks = merge(model, write_adapter(tmp_path / "a", tensors))
    merged = (base + delta(tensors, "q").T).astype(np.float32)
    want = weight_sites(encoded_net(make_net, merged, form))[0].read().T
    got = weight_sites(model)[0].read().T
    # The sums may round otherwise by a bit, and a code on the edge with them.
    assert np.mean(~np.isclose(got, want, rtol=1e-5)) < 0.01
    error = np.linalg.norm(got - merged) / np.linalg.norm(delta(tensors, "q"))
    assert remarks.items[0].data["requantization"] == pytest.approx(error, rel=1e-3)


def test_an_erased_adapter_is_warned_of(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = encoded_net(make_net, normal(64, 48), "bits=4,group_size=32")
    remarks = merge(model, write_adapter(tmp_path / "a", lora("q", 48, 64), lora_alpha=0.001))
    passed, missed = remarks.items
    assert passed.data["erased"]
    assert missed.kind == "missed", "these are printed on the command line"
    assert "keep_branch" in missed.text


def test_the_other_ways_to_write_an_encoded_weight(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight, x = normal(64, 48), normal(5, 64)
    tensors = lora("q", 48, 64)
    folder = write_adapter(tmp_path / "a", tensors, lora_alpha=0.4)
    start = encoded_net(make_net, weight, "bits=4,group_size=32")
    base = weight_sites(start)[0].read().T
    want = x @ (base + delta(tensors, "q", 0.2).T)

    keep = start.clone()
    before = weight_sites(keep)[0].encoding
    merge(keep, folder, requantize="keep_params")
    after = weight_sites(keep)[0].encoding
    assert before is not None
    assert after is not None
    assert np.array_equal(before.scales, after.scales)
    assert not np.array_equal(code_values(before), code_values(after))

    floating = start.clone()
    merge(floating, folder, requantize="none")
    assert weight_sites(floating)[0].encoding is None
    close(Oracle(floating).run({"x": x})["y"], want, 1e-5)
    assert not [n for n in floating.graph if n.op_type == "DequantizeLinear"]

    branch = start.clone()
    merge(branch, folder, requantize="keep_branch")
    assert recognise(weight_sites(branch, ["MatMul"])[0].value) is not None
    close(Oracle(branch).run({"x": x})["y"], want, 1e-5)
    assert merge(branch, folder, requantize="keep_branch").count("passed") == 0


def test_a_branch_beside_a_gemm(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = net(
        make_net,
        "y = Gemm<alpha=0.5, transB=1>(x, q__weight, bias)",
        opset=21,
        sig="(float[N,64] x) => (float[N,48] y)",
        q__weight=normal(48, 64),
        bias=normal(48),
    )
    (item,) = parse_passes("quantize-rtn{min_size=0,group_size=32}")
    item.apply(model, Remarks())
    model.forget_names()
    tensors, x = lora("q", 48, 64), normal(5, 64)
    before = Oracle(model).run({"x": x})["y"]
    merge(model, write_adapter(tmp_path / "a", tensors), requantize="keep_branch")
    close(Oracle(model).run({"x": x})["y"], before + 0.5 * x @ delta(tensors, "q").T, 1e-5)


def test_branches_of_a_weight_that_is_read_twice(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight, x = 0.1 * normal(64, 64), normal(5, 64)
    model = net(
        make_net,
        "h = MatMul(x, q__weight) y = MatMul(h, q__weight)",
        opset=21,
        sig="(float[N,64] x) => (float[N,64] y)",
        q__weight=weight,
    )
    (item,) = parse_passes("quantize-rtn{min_size=0,group_size=32}")
    item.apply(model, Remarks())
    model.forget_names()
    whole = weight_sites(model)[0].read()
    tensors = lora("q", 64, 64)
    merge(model, write_adapter(tmp_path / "a", tensors, lora_alpha=0.1), requantize="keep_branch")
    whole = whole + delta(tensors, "q", 0.05)
    close(Oracle(model).run({"x": x})["y"], x @ whole.T @ whole.T, 1e-5)


def test_outliers_stay_exact(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = normal(64, 48)
    weight[3, 5] = 40
    model = net(
        make_net,
        "y = MatMul(x, q__weight)",
        opset=21,
        sig="(float[N,64] x) => (float[N,48] y)",
        q__weight=weight,
    )
    (item,) = parse_passes("quantize-easyquant{min_size=0,group_size=32}")
    item.apply(model, Remarks())
    model.forget_names()
    before = weight_sites(model)[0].encoding
    assert before is not None
    assert before.outliers is not None
    tensors = lora("q", 48, 64)
    merge(model, write_adapter(tmp_path / "a", tensors))
    after = weight_sites(model)[0].encoding
    assert after is not None
    assert after.outliers is not None
    flat = (before.outliers.values + delta(tensors, "q").T.reshape(-1)[before.outliers.indices]).astype(
        np.float32
    )
    close(after.outliers.values, flat, 1e-6)


def test_an_encoded_base_is_restored_bit_for_bit(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    for number, requantize in enumerate(("new_params", "keep_params", "none")):
        model = encoded_net(make_net, normal(64, 48), "bits=3,group_size=32,symmetric=false")
        before = weight_sites(model)[0].read()
        folder = write_adapter(tmp_path / f"a{number}", lora("q", 48, 64))
        kept.unlink(missing_ok=True)
        merge(model, folder, requantize=requantize, keep_original=kept)
        assert not np.array_equal(weight_sites(model)[0].read(), before)
        merge(model, [], name="unmerge-lora", originals=kept)
        site = weight_sites(model)[0]
        assert site.encoding is not None
        assert site.encoding.bits == 3
        assert site.read().tobytes() == before.tobytes()


def test_the_original_of_an_encoded_base_is_not_there(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = encoded_net(make_net, normal(64, 48), "bits=4,group_size=32")
    with pytest.raises(UsageError, match="base=original"):
        merge(model, write_adapter(tmp_path / "a", lora("q", 48, 64)), base="original")
