"""The oracle, made-up inputs and distances."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.evaluate import (
    Oracle,
    compare_outputs,
    load_inputs,
    rounding_tolerance,
    runnable_inputs,
    seeded_inputs,
)
from effic.ir.model import Model
from effic.models.builders import BUILDERS


def model(text: str) -> Model:
    return Model(ir.from_onnx_text(text))


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_builder_runs_on_made_up_inputs(name: str) -> None:
    built = Model(BUILDERS[name]())
    inputs, outputs = runnable_inputs(built, Oracle(built))
    assert all(np.isfinite(v).all() for v in outputs.values() if v.dtype.kind == "f")
    again, _ = runnable_inputs(built, Oracle(built))
    assert all(np.array_equal(inputs[k], again[k]) for k in inputs)


def test_indices_stay_inside_their_table() -> None:
    built = model("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (int64[N,T] ids, int64[N,T] attention_mask) => (float[N,T,2] y, int64[N,T] m)
        <float[3,2] table = {1,2,3,4,5,6}> {
          wide = Cast<to=7>(ids)
          y = Gather(table, wide)
          m = Identity(attention_mask)
        }""")
    inputs = seeded_inputs(built, first=50, other=50)
    assert inputs["ids"].min() >= 0
    assert inputs["ids"].max() == 2
    assert set(np.unique(inputs["attention_mask"])) == {0, 1}
    assert inputs["ids"].shape == inputs["attention_mask"].shape


def test_oracle_leaves_the_graph_as_written() -> None:
    # A DequantizeLinear + MatMul would become a kernel with 8-bit activations at the default level.
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (64, 32)).astype(ml_dtypes.int4)
    scales = rng.random((2, 32)).astype(np.float32)
    built = model("""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[4,64] x, float[64,32] w) => (float[4,32] y) { y = MatMul(x, w) }""")
    graph = built.graph
    dq = ir.node(
        "DequantizeLinear",
        [built.add_initializer(graph, "q", codes), built.add_initializer(graph, "s", scales)],
        {"axis": 0, "block_size": 32},
    )
    graph.insert_before(graph[0], dq)
    graph[1].replace_input_with(1, dq.outputs[0])
    dq.outputs[0].name = "dq"
    graph.inputs.pop()
    x = rng.standard_normal((4, 64)).astype(np.float32)
    want = x.astype(np.float64) @ (codes.astype(np.float64) * np.repeat(scales, 32, 0))
    got = Oracle(built).run({"x": x})["y"]
    assert np.max(np.abs(got - want)) < 1e-4 * np.max(np.abs(want))


def test_bfloat16_goes_in_and_out() -> None:
    built = model("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (bfloat16[2,3] x) => (bfloat16[2,3] y) { y = Identity(x) }""")
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    y = Oracle(built).run({"x": x})["y"]
    assert y.dtype == ml_dtypes.bfloat16
    assert np.array_equal(x, y)
    assert rounding_tolerance(built) == 5e-2


def test_a_weight_behind_an_identity_computes_alike() -> None:
    # The runtime packs a weight that is an initializer for another kernel, which rounds differently.
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 64), (48, 64)))
    outputs = []
    for weight in ("w", "v"):
        net = model(f"""
            <ir_version: 8, opset_import: ["" : 18]> g (float[1,64] x, float[48,64] w) => (float[1,48] y) {{
                v = Identity(w)  y = Gemm <transB = 1> (x, {weight}) }}""")
        placeholder = net.graph.inputs.pop()
        placeholder.replace_all_uses_with(net.add_initializer(net.graph, "weight", w))
        outputs.append(Oracle(net).run({"x": x}))
    assert compare_outputs(*outputs).exact


def test_unknown_operator_is_not_measured() -> None:
    built = model("""
        <ir_version: 10, opset_import: ["" : 18, "my.own" : 1]>
        g (float[2] x) => (float[2] y) { y = my.own.Magic(x) }""")
    with pytest.raises(NotMeasuredError, match="Magic"):
        Oracle(built)


def test_inputs_that_do_not_fit() -> None:
    built = model("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }""")
    with pytest.raises(UsageError, match="lack 'x'"):
        Oracle(built).run({"z": np.zeros((1, 3), np.float32)})
    with pytest.raises(UsageError, match=r"'x' is tensor\(float\) of shape \[1, 4\]"):
        Oracle(built).run({"x": np.zeros((1, 4), np.float32)})
    with pytest.raises(UsageError, match="the seed is -1"):
        seeded_inputs(built, -1)


def test_distance() -> None:
    ref = {"y": np.array([[1.0, -2.0, 3.0]], np.float32)}
    assert compare_outputs(ref, ref).exact
    moved = {"y": ref["y"] + np.float32(0.3)}
    distance = compare_outputs(ref, moved)
    assert distance.max_abs == pytest.approx(0.3, rel=1e-5)
    assert distance.max_rel == pytest.approx(0.1, rel=1e-5)
    assert distance.sqnr_db == pytest.approx(10 * math.log10(14 / 0.27), rel=1e-4)
    assert distance.top1 == 1
    assert compare_outputs(ref, {"y": np.array([[1, np.nan, 3]], np.float32)}).new_nonfinite == 1
    assert compare_outputs(ref, {"y": ref["y"][0]}).shape_mismatch
    assert compare_outputs(ref, {"z": ref["y"]}).shape_mismatch
    inf = {"y": np.array([np.inf, np.nan, 1.0])}
    assert compare_outputs(inf, inf).exact
    assert compare_outputs(inf, {"y": np.array([-np.inf, np.nan, 1.0])}).new_nonfinite == 1
    ints = {"i": np.array([1, 2, 3])}
    assert compare_outputs(ints, {"i": np.array([1, 2, 4])}).wrong_integers == 1


def test_inputs_file_without_pickles(tmp_path) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, x=np.zeros(3))
    assert list(load_inputs(good)) == ["x"]
    bad = tmp_path / "bad.npz"
    np.savez(bad, x=np.array([object()]))
    with pytest.raises(UsageError, match="cannot read"):
        load_inputs(bad)
    with pytest.raises(UsageError, match="cannot read"):
        load_inputs(tmp_path / "absent.npz")
    text = tmp_path / "text.npz"
    text.write_text("hello")
    with pytest.raises(UsageError):
        load_inputs(text)


def test_outputs_outlive_the_session_without_its_memory() -> None:
    oracle = Oracle(Model(BUILDERS["encoder"]()))
    inputs, outputs = runnable_inputs(Model(BUILDERS["encoder"]()), oracle, 0)
    again = oracle.run(inputs)
    assert all(array.flags.owndata for arrays in (outputs, again) for array in arrays.values())
