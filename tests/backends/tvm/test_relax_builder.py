"""Models become Relax modules with the oracle's outputs, or are refused beforehand by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.backends.tvm.coverage import coverage
from effic.backends.tvm.operators import CONVERTERS
from effic.backends.tvm.relax_builder import build_relax, try_bucket
from effic.backends.tvm.specialize import open_dims, parse_shapes, specialize
from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.models.builders import BUILDERS
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes
from tests.backends.tvm.module_runs import CPU, Lowered, distance_from_oracle

TOLERANCE = 1e-4

GRAPHS = sorted(BUILDERS.keys() - {"control_flow"})


def net(text: str, opset: int = 21, **weights: np.ndarray) -> Model:
    """``(float[2,4] x) => (float[2,4] y) { y = Relu(x) }`` with initializers by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model(ir.from_proto(proto))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(model: Model, shapes: str | None = None, **options: Any) -> None:
    distance = distance_from_oracle(model, shapes, **options)
    assert distance.shape_mismatch is None
    assert distance.max_rel < TOLERANCE
    assert not distance.wrong_integers
    assert not distance.new_nonfinite


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_builders_at_fixed_sizes(name: str) -> None:
    close(Model(BUILDERS[name]()))


@pytest.mark.parametrize("name", ["functions", "shared_weights"])
def test_batches_may_stay_open(name: str) -> None:
    model = Model(BUILDERS[name]())
    lowered, oracle = Lowered(model), Oracle(model)
    (value,) = model.graph.inputs
    for batch in (1, 3):
        x = {value.name or "": normal(batch, *[d for d in value.shape or () if isinstance(d, int)])}
        assert compare_outputs(oracle.run(x), lowered.run(x)).max_rel < TOLERANCE
    assert lowered.signature.buckets[0].inputs[0].shape[0] == "N"


def test_control_flow_is_refused_by_name() -> None:
    model = Model(BUILDERS["control_flow"]())
    found = coverage(model, CPU)
    assert {one.op for one in found} == {"If", "Loop"}
    with pytest.raises(UnsupportedError, match=r"If .*Loop "):
        build_relax(model, CPU)


@pytest.mark.parametrize(
    ("name", "passes", "kernel"),
    [
        ("encoder", "canonicalize-linear,quantize-rtn{bits=4}", "quantized"),
        ("llama", "quantize-rtn{bits=4,axis=ic,group_size=16}", "quantized"),
        ("llama", "quantize-rtn{bits=3,group_size=16,embeddings=true}", "quantized"),
        ("encoder", "canonicalize-linear,quantize-easyquant", "quantized"),
        ("llama", "quantize-rtn{bits=8}", "quantized"),
        ("llama", "prune-magnitude{n=2,m=4},compress-nm", ""),
    ],
)
def test_compressed_weights_stay_compressed(name: str, passes: str, kernel: str) -> None:
    model = Model(BUILDERS[name]())
    plain = sum(t.nbytes for v in model.graph.initializers.values() if (t := v.const_value) is not None)
    run_passes(model, parse_passes(passes), check="off")
    distance = distance_from_oracle(model)
    assert distance.max_rel < TOLERANCE
    lowered = build_relax(model, CPU, ",".join(f"{d}=2" for d in open_dims(model)))
    if kernel:
        names = [variable.name_hint for variable in lowered[0].get_global_vars()]
        assert any(one.startswith(kernel) for one in names)
        assert sum(array.nbytes for array in lowered[1].values()) < plain


# -- buckets and parameters -----------------------------------------------------------------------


def test_buckets_share_their_parameters() -> None:
    model = Model(BUILDERS["encoder"]())
    one = Lowered(model, "batch=1,sequence=8")
    two = Lowered(model, "batch=1,sequence=8;batch=2,sequence=16")
    assert [bucket.function for bucket in two.signature.buckets] == ["main_0", "main_1"]
    large = {name: a.nbytes for name, a in two.parameters.items() if a.nbytes > 2048}
    assert sum(large.values()) == sum(a.nbytes for a in one.parameters.values() if a.nbytes > 2048)
    oracle = Oracle(model)
    for batch, length in ((1, 8), (2, 16)):
        rng = np.random.default_rng(length)
        feeds = {
            "input_ids": rng.integers(0, 100, (batch, length)),
            "attention_mask": np.ones((batch, length), np.int64),
        }
        assert compare_outputs(oracle.run(feeds), two.run(feeds)).max_rel < TOLERANCE


def test_weights_are_parameters_and_short_constants_are_code() -> None:
    lowered = Lowered(
        net(
            "(float[2,8] x) => (float[2,128] y) { z = MatMul(x, w) y = Add(Mul(z, half), b) }".replace(
                "Add(Mul(z, half), b)", "Add(h, b)"
            ).replace("z = MatMul(x, w)", "z = MatMul(x, w) h = Mul(z, half)"),
            w=normal(8, 128),
            b=normal(2, 128, seed=1),
            half=np.array(0.5, np.float32),
        )
    )
    assert len(lowered.parameters) == 2
    assert lowered.kernels == {"dense"}


def test_weights_of_a_file_are_not_copied(tmp_path: Any) -> None:
    from effic.ir.onnx_format import read_onnx

    path = tmp_path / "m.onnx"
    made = net("(float[2,256] x) => (float[2,256] y) { y = Mul(x, w) }", w=normal(2, 256))
    made.save(path, external_threshold=64)
    (array,) = build_relax(read_onnx(path), CPU)[1].values()
    assert not array.flags.owndata


# -- shapes ---------------------------------------------------------------------------------------


def test_parse_shapes() -> None:
    assert parse_shapes("") == []
    assert parse_shapes(" batch=1, seq=64 ;batch=8,seq=64;batch=1,seq=64") == [
        {"batch": 1, "seq": 64},
        {"batch": 8, "seq": 64},
    ]


@pytest.mark.parametrize("text", ["batch", "batch=", "batch=-1", "=4", "a=1,a=2", "a=1.5", "a=99999999999"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="shapes"):
        parse_shapes(text)


def test_dimensions_without_a_size_are_named() -> None:
    model = Model(BUILDERS["encoder"]())
    with pytest.raises(UsageError, match=r"'batch', 'sequence'.*shapes=batch=1,sequence=64"):
        build_relax(model, CPU)
    with pytest.raises(UsageError, match="no size for 'sequence'"):
        build_relax(model, CPU, "batch=1")
    with pytest.raises(UsageError, match=r"'width'.*open dimensions are batch, sequence"):
        build_relax(model, CPU, "batch=1,sequence=8,width=3")


def test_dimensions_without_a_name_go_by_input_and_axis() -> None:
    model = net("(float[?,4] x) => (float[?,4] y) { y = Relu(x) }")
    (name,) = open_dims(model)
    assert name == "x.0"
    assert specialize(model, {name: 3}).graph.inputs[0].shape == ir.Shape([3, 4])
    close(model, "x.0=2")


def test_shape_arithmetic_is_folded() -> None:
    special = specialize(Model(BUILDERS["llama"]()), {"batch": 1, "sequence": 8})
    left = {node.op_type for node in special.graph}
    assert not left & {"Shape", "Range", "ConstantOfShape"}


def test_compressed_weights_are_not_folded() -> None:
    model = Model(BUILDERS["llama"]())
    run_passes(model, parse_passes("prune-magnitude{n=2,m=4},compress-nm"), check="off")
    before = sum(node.op_type == "ScatterElements" for node in model.graph)
    special = specialize(model, {"batch": 1, "sequence": 8})
    assert before > 0
    assert sum(node.op_type == "ScatterElements" for node in special.graph) == before


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("(float[2,4] x) => (float[2,4] y) { y = Banana(x) }", "Banana.*no converter"),
        ("(string[2] x) => (string[2] y) { y = Identity(x) }", "input 'x'.*STRING"),
        ("(float[2,4] x) => (int64[2,n] y) { y = NonZero(x) }", "NonZero.*depends on the values"),
        ("(float[4] x, int64[1] s) => (float[n] y) { y = Slice(x, s, s) }", "Slice.*inputs' values"),
        ("(float[2,1] x, int64[2] s) => (float[n,m] y) { y = Expand(x, s) }", "Expand.*inputs' values"),
        ("(float[4] x) => (float[4] y) { s = Constant<value_int = 9>() y = Gather(x, s) }", "past the end"),
        ("(seq(float[2]) x, int64 i) => (float[2] y) { y = SequenceAt(x, i) }", "is no tensor"),
    ],
)
def test_refusals_name_the_node(text: str, named: str) -> None:
    model = net(text)
    assert coverage(model, CPU)
    with pytest.raises(UnsupportedError, match=named):
        build_relax(model, CPU)


def test_what_tvm_cannot_compile_is_found_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    # The importer takes truth values here, and TVM has no least one to start from.
    monkeypatch.delitem(CONVERTERS, "ReduceMax")
    model = net("(bool[2,4] x) => (bool[2,1] y) { a = Not(x) y = ReduceMax(a, i) }", i=np.array([1]))
    (found,) = coverage(model, CPU)
    assert (found.op, found.node) == ("ReduceMax", "y")
    assert "cannot compile" in found.reason


def test_whoever_reads_what_is_missing_is_not_blamed() -> None:
    model = net("(float[2,4] x) => (float[2,4] y) { a = Banana(x) b = Relu(a) y = Cherry(b) }")
    assert [one.op for one in coverage(model, CPU)] == ["Banana", "Cherry"]


# -- single operators that have converters of their own ---------------------------------------------

W = {"w": normal(16, 24)}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("(float[2,3,16] x) => (float[2,3,24] y) { y = MatMul(x, w) }", W),
        ("(float[16] x) => (float[24] y) { y = MatMul(x, w) }", W),
        ("(float[5,16] x) => (float[5,24] y) { y = Gemm<alpha=0.5, beta=2.0>(x, w, b) }", {**W, "b": normal(24)}),
        ("(float[5,16] x) => (float[5,24] y) { y = Gemm(x, w, b) }", {**W, "b": normal(5, 1)}),
        ("(float[16,5] x) => (float[5,24] y) { y = Gemm<transA=1>(x, w) }", W),
        ("(float[5,24] x) => (float[5,16] y) { y = Gemm<transB=1>(x, w) }", W),
        ("(float[5,16] x) => (float[5,24] y) { a = MatMul(x, w) c = Add(b, a) y = Relu(c) }", {**W, "b": normal(24)}),
        (
            "(float[5,16] x) => (float[5,24] y, float[5,24] a) { a = MatMul(x, w) y = Add(a, b) }",
            {**W, "b": normal(24)},
        ),
        ("(float[5,16] x) => (float[5,24] y) { a = MatMul(x, w) y = Add(a, a) }", W),
        ("(float[2,3,4,5] x, float[2,3,5,6] z) => (float[2,3,4,6] y) { y = MatMul(x, z) }", {}),
        ("(float[2,3,4,5] x, float[3,5,6] z) => (float[2,3,4,6] y) { y = MatMul(x, z) }", {}),
        ("(float[2,8] x) => (float[2,3] y) { y = Slice(x, a, b, c, d) }",
         {"a": np.array([-1]), "b": np.array([-9]), "c": np.array([1]), "d": np.array([-3])}),
        ("(float[2,8] x) => (float[2,2] y) { y = Slice(x, a, b) }", {"a": np.array([0, 2]), "b": np.array([9, 4])}),
        ("(float[5,8] x, int64[3] i) => (float[3,8] y) { y = Gather(x, i) }", {}),
        ("(float[5,8] x) => (float[5] y) { y = Gather<axis=1>(x, i) }", {"i": np.array(-2)}),
        ("(float[5,8] x) => (float[5,2,1] y) { y = Gather<axis=1>(x, i) }", {"i": np.array([[-2], [0]])}),
        ("(float[2,6] x) => (float[2,6] y) { y = Celu<alpha=0.5>(x) }", {}),
        ("(float[2,6] x) => (float[2,6] y, float[2,1] m) { y, m = LayerNormalization(x, s) }", {"s": normal(6)}),
        ("(float[1,2,4,4] x) => (float[1,2,7,7] y) { y = Resize<mode=\"cubic\">(x, , s) }",
         {"s": np.array([1, 1, 1.75, 1.75], np.float32)}),
    ],
)  # fmt: skip
def test_operators(text: str, weights: dict[str, np.ndarray]) -> None:
    model = net(text, **weights)
    rng = np.random.default_rng(3)
    feeds = {}
    for value in model.graph.inputs:
        shape = tuple(d for d in value.shape or () if isinstance(d, int))
        real = value.dtype == ir.DataType.FLOAT
        feeds[value.name or ""] = (
            rng.standard_normal(shape).astype(np.float32) if real else np.array([-5, 4, 0], np.int64)
        )
    distance = compare_outputs(Oracle(model).run(feeds), Lowered(model).run(feeds))
    assert distance.shape_mismatch is None
    assert distance.max_rel < TOLERANCE


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes", ["canonicalize-linear", "canonicalize-linear,quantize-rtn{bits=4,group_size=16}"]
)
def test_a_trial_packs_nothing(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from effic.backends.tvm.kernels.dense import DenseMatMul
    from effic.backends.tvm.kernels.quantized import QuantizedMatMul

    model = Model(BUILDERS["encoder"]())
    run_passes(model, parse_passes(passes), check="off")
    packed: list[str] = []

    def counted(pack: Any) -> Any:
        def count(*given: Any) -> Any:
            packed.append(given[0].name)
            return pack(*given)

        return count

    for spec in (DenseMatMul, QuantizedMatMul):
        monkeypatch.setattr(spec, "pack", counted(spec.pack))
    sizes = dict.fromkeys(open_dims(model), 2)
    assert try_bucket(model, sizes, CPU) == []
    assert not packed
    build_relax(model, CPU, ",".join(f"{name}=2" for name in sizes))
    assert packed


def test_large_packed_weights_lie_in_files() -> None:
    weight = normal(512, 1024)
    made = net("(float[2,512] x) => (float[2,1024] y) { y = MatMul(x, w) }", w=weight)
    _, parameters, _ = build_relax(made, CPU)
    (tensor,) = parameters.tensors.values()
    assert isinstance(tensor, ir.ExternalTensor)
    (array,) = parameters.values()
    assert not array.flags.owndata
    np.testing.assert_array_equal(np.sort(array, axis=None), np.sort(weight, axis=None))
