"""adapters-as-inputs: the base when nothing is given, the merged model when an adapter is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import effic
from effic.ir.errors import EfficError
from effic.ir.evaluate import Oracle, runnable_inputs, start_session
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes.adapters.adapters_as_inputs import AdaptersAsInputs
from effic.passes.base import Remarks
from effic.passes.pipeline import Checker, run_passes
from effic.passes.spec import parse_passes

RNG = np.random.default_rng(5)


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / 4).astype(np.float32)


def plain(make_net, opset: int = 18) -> Model:
    model = make_net(
        "(float[N,64] x) => (float[N,32] y)",
        "h0 = MatMul(x, up) h = Add(h0, bias) g = Relu(h) y = Gemm<transB=1>(g, down)",
        opset=opset,
        up=normal(64, 32),
        bias=normal(32),
        down=normal(32, 32),
    )
    for name in ("up", "down"):
        model.graph.initializers[name].name = f"{name}.weight"
    return model


def run(model: Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return Oracle(model).run(feeds)["y"]


def adapters(folder: Path, write_adapter, number: int, rank: int = 3) -> str:
    return write_adapter(
        folder / f"adapter{number}",
        {
            "net.up.lora_A.weight": normal(rank, 64), "net.up.lora_B.weight": normal(32, rank),
            "net.down.lora_A.weight": normal(rank, 32), "net.down.lora_B.weight": normal(32, rank),
        },
        r=rank, lora_alpha=5,
    )  # fmt: skip


def test_nothing_given_is_the_base_and_each_adapter_is_itself(make_net, write_adapter, tmp_path) -> None:
    base = plain(make_net)
    x = {"x": normal(5, 64)}
    want = run(base, x)
    model = base.clone()
    result = run_passes(model, [AdaptersAsInputs(rank=4)], checker=Checker(model))
    assert result.steps[0].verdict == "exact"
    assert result.steps[0].passed == 2
    assert run(model, x).tobytes() == want.tobytes()
    model.save(tmp_path / "base.onnx")
    session = ort.InferenceSession(tmp_path / "base.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x"]
    for number in (1, 2, 1):
        folder = tmp_path / f"adapter{number}"
        path = str(folder) if folder.exists() else adapters(tmp_path, write_adapter, number)
        merged = base.clone()
        run_passes(merged, parse_passes(f'merge-lora{{adapters=["{path}"]}}'), check="off")
        feeds = effic.adapter_feeds(path, tmp_path / "base.onnx")
        assert set(feeds) == {f"{n}.weight.lora_{f}" for n in ("up", "down") for f in "AB"}
        expected = run(merged, x)
        assert np.abs(expected - want).max() > 0.01
        for got in (run(model, x | feeds), session.run(None, {**x, **feeds})[0]):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    half = effic.adapter_feeds(path, model, weight=0.5)
    np.testing.assert_allclose(half["up.weight.lora_B"] * 2, feeds["up.weight.lora_B"])


def test_quantized_weights_get_branches(make_net, write_adapter, tmp_path) -> None:
    model = plain(make_net, opset=21)
    run_passes(model, parse_passes("quantize-rtn{bits=8,group_size=32}"), check="off")
    x = {"x": normal(5, 64)}
    want = run(model, x)
    run_passes(model, [AdaptersAsInputs(rank=3)], checker=Checker(model))
    assert run(model, x).tobytes() == want.tobytes()
    path = adapters(tmp_path, write_adapter, 1)
    feeds = effic.adapter_feeds(path, model)
    got = run(model, x | feeds)
    sites = {s.name: s.read() for s in weight_sites(model) if "lora" not in s.name}
    up = sites["up.weight"] + feeds["up.weight.lora_B"] @ feeds["up.weight.lora_A"]
    down = sites["down.weight"] + feeds["down.weight.lora_B"] @ feeds["down.weight.lora_A"]
    bias = model.graph.initializers["bias"].const_value
    assert bias is not None
    expected = np.maximum(x["x"] @ up.T + bias.numpy(), 0) @ down.T
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # The lowered file keeps the inputs.
    effic.optimize(model, [], output=tmp_path / "low.onnx", check="off")
    session = start_session(str(tmp_path / "low.onnx"), optimized=True)
    assert len(session.get_overridable_initializers()) == 4
    low = session.run(None, {**x, **effic.adapter_feeds(path, tmp_path / "low.onnx")})[0]
    assert np.abs(low - expected).max() < 0.05 * np.abs(expected).max()


def test_the_inputs_survive_the_file_and_other_passes(make_net, tmp_path) -> None:
    model = plain(make_net)
    run_passes(model, [AdaptersAsInputs()], check="off")
    model.save(tmp_path / "a.onnx")
    again = read_onnx(tmp_path / "a.onnx")
    names = [v.name for v in model.graph.inputs]
    assert [v.name for v in again.graph.inputs] == names
    run_passes(again, parse_passes("fold-constants,eliminate-common-subexpressions,eliminate-dead-code"),
               checker=Checker(again))  # fmt: skip
    run_passes(again, parse_passes("eliminate-identities,canonicalize-linear,fuse-lora-branches"),
               checker=Checker(again))  # fmt: skip
    assert [v.name for v in again.graph.inputs] == names
    assert sum(node.op_type == "Transpose" for node in again.nodes()) == 4


def test_targets_and_reasons(make_net) -> None:
    model = plain(make_net)
    remarks = Remarks()
    AdaptersAsInputs(targets=("down.*", "q.*")).apply(model, remarks)
    assert [(r.kind, r.where) for r in remarks.items] == [("passed", "down.weight"), ("missed", "q.*")]
    remarks = Remarks()
    AdaptersAsInputs().apply(model, remarks)
    assert {r.where: r.kind for r in remarks.items} == {"up.weight": "passed", "down.weight": "missed"}
    model = make_net(
        "(float[3,4] x) => (float[3,4] y)",
        "l = MatMul(w, x) g = Gemm<alpha=2.0>(l, u) t = Gemm<transA=1>(g, v) s = MatMul(t, z) y = Add(s, z)",
        w=normal(3, 3), u=normal(4, 4), v=normal(3, 3), z=normal(3, 4),
    )  # fmt: skip
    remarks = Remarks()
    AdaptersAsInputs().apply(model, remarks)
    assert [r.kind for r in remarks.items] == ["missed"] * 4
    assert len(model.graph.inputs) == 1


@pytest.mark.parametrize("built", sorted(BUILDERS))
def test_shared_weights_subgraphs_and_functions(built: str) -> None:
    model = Model(BUILDERS[built]())
    inputs, want = runnable_inputs(model, Oracle(model))
    run_passes(model, [AdaptersAsInputs(rank=2)], checker=Checker(model))
    got = Oracle(model).run(inputs)
    assert all(np.array_equal(got[name], want[name]) for name in want)
    given = {
        str(v.name): np.full(v.const_value.shape.numpy(), 0.1, v.const_value.dtype.numpy())
        for v in model.graph.inputs
        if v.const_value is not None
    }
    if given:
        moved = Oracle(model).run(inputs | given)
        assert any(not np.array_equal(moved[name], want[name]) for name in want)


def test_adapters_that_do_not_fit(make_net, write_adapter, tmp_path) -> None:
    model = plain(make_net)
    path = adapters(tmp_path, write_adapter, 1)
    with pytest.raises(EfficError, match="takes no adapters"):
        effic.adapter_feeds(path, model)
    run_passes(model, [AdaptersAsInputs(rank=2, targets=("up.*",))], check="off")
    with pytest.raises(EfficError, match=r"changes net\.down"):
        effic.adapter_feeds(path, model)
    one = {"up.lora_A.weight": normal(3, 64), "up.lora_B.weight": normal(32, 3)}
    with pytest.raises(EfficError, match="rank 3"):
        effic.adapter_feeds(write_adapter(tmp_path / "b", one, r=3), model)
    wide = {"up.lora_A.weight": normal(2, 63), "up.lora_B.weight": normal(32, 2)}
    with pytest.raises(EfficError, match=r"\[32, 63\]"):
        effic.adapter_feeds(write_adapter(tmp_path / "c", wide, r=2), model)
    dora = {**one, "up.lora_magnitude_vector": normal(32)}
    with pytest.raises(EfficError, match="DoRA"):
        effic.adapter_feeds(write_adapter(tmp_path / "d", dora, r=3, use_dora=True), model)
    with pytest.raises(EfficError, match="replaces"):
        effic.adapter_feeds(write_adapter(tmp_path / "e", {**one, "up.bias": normal(32)}, r=3), model)


def test_a_fused_projection_by_a_map(make_net, write_adapter, tmp_path) -> None:
    model = make_net("(float[N,8] x) => (float[N,12] y)", "y = MatMul(x, qkv)", qkv=normal(8, 12))
    run_passes(model, [AdaptersAsInputs(rank=4)], check="off")
    tensors = {f"{n}.lora_{f}.weight": normal(2, 8) if f == "A" else normal(4, 2) for n in "qv" for f in "AB"}
    path = write_adapter(tmp_path / "a", tensors, r=2, lora_alpha=2)
    (tmp_path / "map").write_text("q = qkv[0:4]\nv = qkv[8:12]\n")
    feeds = effic.adapter_feeds(path, model, map=tmp_path / "map")
    delta = feeds["qkv.lora_B"] @ feeds["qkv.lora_A"]
    np.testing.assert_allclose(delta[:4], tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"], rtol=1e-5)
    assert not delta[4:8].any()
    np.testing.assert_allclose(delta[8:], tensors["v.lora_B.weight"] @ tensors["v.lora_A.weight"], rtol=1e-5)


def test_nodes_without_names(make_net) -> None:
    """Two products of one kind would have given two nodes of one name, which onnxruntime refuses."""
    model = make_net(
        "(float[N,64] x) => (float[N,64] y)",
        "h = MatMul(x, one) y = MatMul(h, two)",
        one=normal(64, 64),
        two=normal(64, 64),
    )
    result = run_passes(model, [AdaptersAsInputs(rank=2)], checker=Checker(model))
    assert (result.steps[0].passed, result.steps[0].verdict) == (2, "exact")
    names = [node.name for node in model.graph if node.name]
    assert len(set(names)) == len(names)
