from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from effic.ir.encodings import Encoding, code_tensor, decode
from effic.ir.errors import UnsupportedError
from effic.ir.model import Model
from effic.ir.weights import WeightSite, weight_sites
from effic.models.builders import BUILDERS


def parse(text: str, **weights: np.ndarray) -> Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "local" : 1]>\n{text}')
    for name, array in weights.items():
        for graph in (model.graph, *model.graph.subgraphs()):
            if name in graph.initializers:
                graph.initializers[name].const_value = ir.Tensor(array, name=name)
                graph.initializers[name].shape = ir.Shape(array.shape)
                graph.initializers[name].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return Model(model)


def run(model: Model, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = ir.to_proto(model.ir).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def only(model: Model, *kinds: str) -> WeightSite:
    (site,) = weight_sites(model, kinds or None)
    return site


def simple_encoding(site: WeightSite) -> Encoding:
    """An encoding of the right shape whose values are easy to tell from the weight's."""
    codes = np.arange(site.elements, dtype=np.int64).reshape(site.matrix_shape) % 15 - 7
    scale = np.asarray(0.125, site.dtype.numpy())
    return Encoding(code_tensor(codes.astype(np.int8), ir.DataType.INT4), scale, None, 0, 0, 4, site.shape)


MATRIX = "g (float[N,6] x) => (float[N,M] y) <float[6,4] w = {0}>"


@pytest.mark.parametrize(
    ("nodes", "shape", "oriented"),
    [
        ("y = MatMul (x, w)", (6, 4), lambda w: w.T),
        ("y = Gemm (x, w)", (6, 4), lambda w: w.T),
        ("y = Gemm <transB = 1, alpha = 2.0> (x, w)", (4, 6), lambda w: w),
        ("t = Transpose (w) y = MatMul (x, t)", (4, 6), lambda w: w),
        (
            "t = Transpose <perm = [1, 0]> (w) i = Identity (t) y = Gemm <transB = 1> (x, i)",
            (6, 4),
            lambda w: w.T,
        ),
        ("t = Transpose (x) y = MatMul (w, t)", (4, 6), lambda w: w),
        ("y = Gemm <transA = 1, transB = 1> (w, x)", (6, 4), lambda w: w.T),
    ],
)
def test_matrix_sites_are_read_output_by_input(nodes: str, shape: tuple[int, int], oriented: object) -> None:
    weight = random(*shape)
    model = parse(f"{MATRIX} {{ {nodes} }}", w=weight)
    site = only(model)
    assert site.why_not is None
    assert (site.name, site.shape_oi) == ("w", (4, 6))
    np.testing.assert_array_equal(site.read(), oriented(weight))  # type: ignore[operator]
    np.testing.assert_array_equal(site.read_rows(1, 3), oriented(weight)[1:3])  # type: ignore[operator]
    # What is summed is the input axis: the model computes x · read()ᵀ.
    x = random(3, 6)
    scale = 2 if "alpha" in nodes else 1
    (out,) = run(model, x=x)
    out = out if out.shape == (3, 4) else out.T
    np.testing.assert_allclose(out, scale * x @ site.read().T, rtol=1e-5, atol=1e-5)


def test_convolution_sites() -> None:
    model = parse(
        """g (float[N,4,8,8] x) => (float[N,C,H,W] y) <float[6,2,3,3] w = {0}, float[6,1,2,2] v = {0}>
        { a = Conv <group = 2> (x, w)  y = ConvTranspose <group = 3> (a, v) }""",
        w=random(6, 2, 3, 3),
        v=random(6, 1, 2, 2),
    )
    conv, transposed = weight_sites(model)
    assert (conv.kind, conv.shape_oi, conv.groups) == ("Conv", (6, 18), 2)
    np.testing.assert_array_equal(conv.read(), random(6, 2, 3, 3).reshape(6, 18))
    assert (transposed.kind, transposed.shape_oi, transposed.groups) == ("ConvTranspose", (4, 6), 3)
    np.testing.assert_array_equal(transposed.read(), random(6, 1, 2, 2).reshape(6, 4).T)


TIED = """g (int64[T] ids) => (float[T,V] y) <float[10,4] w = {0}>
{ x = Gather (w, ids)  t = Transpose <perm = [1, 0]> (w)  y = MatMul (x, t) }"""


def test_a_tied_weight_is_one_site_and_is_rewritten_once() -> None:
    model = parse(TIED, w=random(10, 4))
    site = only(model)
    assert site.kind == "MatMul"
    assert site.kinds == {"Gather", "MatMul"}
    assert [use.in_axis for use in site.uses] == [1, 1]
    assert site.other_readers == []
    encoding = simple_encoding(site)
    site.write(model, encoding)
    assert "w" not in model.graph.initializers
    assert len(list(model.nodes("DequantizeLinear"))) == 1
    decoded = decode(encoding)
    (out,) = run(model, ids=np.array([3, 1]))
    np.testing.assert_allclose(out, decoded[[3, 1]] @ decoded.T, rtol=1e-6)
    again = only(model)
    assert again.encoding is not None
    assert (again.name, again.kinds, again.kind) == ("w", {"Gather", "MatMul"}, "MatMul")
    np.testing.assert_array_equal(again.read(), decoded)


def test_other_readers_keep_the_original() -> None:
    model = parse(
        """g (float[N,4] x) => (float[N,4] y, float[4,4] s) <float[4,4] w = {0}>
        { t = Transpose (w)  a = MatMul (x, t)  s = Add (t, w)  y = MatMul (a, w) }""",
        w=random(4, 4),
    )
    site = only(model)
    assert site.other_readers == ["Add 's'"]
    assert [use.in_axis for use in site.uses] == [1, 0]
    x = random(2, 4)
    encoding = simple_encoding(site)
    site.write(model, encoding)
    decoded, weight = decode(encoding), random(4, 4)
    y, s = run(model, x=x)
    np.testing.assert_allclose(y, x @ decoded.T @ decoded, rtol=1e-5)
    np.testing.assert_array_equal(s, weight.T + weight)


def test_an_encoding_is_rewritten_and_leaves_nothing_behind() -> None:
    model = parse(
        "g (float[N,6] x) => (float[N,4] y) <float[6,4] w = {0}> { y = MatMul (x, w) }", w=random(6, 4)
    )
    for _ in range(2):
        site = only(model)
        site.write(model, simple_encoding(site))
    assert sorted(node.op_type for node in model.nodes()) == ["DequantizeLinear", "MatMul"]
    assert len(model.graph.initializers) == 2
    assert only(model).name == "w"


def test_weights_in_subgraphs_and_captured_weights() -> None:
    model = parse(
        """g (bool c, float[2,4] x) => (float[2,4] y) <float[4,4] w = {0}>
        { y = If (c) <
            then_branch = t () => (float[2,4] a) { a = MatMul (x, w) },
            else_branch = e () => (float[2,4] b) <float[4,4] v = {0}> { m = MatMul (x, v) b = MatMul (m, w) } > }""",
        w=random(4, 4),
        v=2 * random(4, 4),
    )
    sites = {site.name: site for site in weight_sites(model)}
    assert set(sites) == {"w", "v"}
    assert len(sites["w"].uses) == 2
    assert sites["w"].graph is model.graph
    assert sites["v"].graph is not model.graph
    encodings = {name: simple_encoding(site) for name, site in sites.items()}
    for name, site in sites.items():
        site.write(model, encodings[name])
    w, v = decode(encodings["w"]), decode(encodings["v"])
    x = random(2, 4)
    np.testing.assert_allclose(run(model, c=np.array(True), x=x)[0], x @ w, rtol=1e-5)
    np.testing.assert_allclose(run(model, c=np.array(False), x=x)[0], x @ v @ w, rtol=1e-5)


def test_weights_in_functions_are_constants_there() -> None:
    model = parse(
        """g (float[N,2] x) => (float[N,2] y) { y = local.f <flag = 0> (x) }
        <domain: "local", opset_import: ["" : 21]>
        f <flag> (x) => (y) {
            w = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> ()
            h = MatMul (x, w)
            p = MatMul (h, x)
            y = Gemm <transB : int = @flag> (h, w2)
            w2 = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> ()
        }"""
    )
    function = next(iter(model.ir.functions.values()))
    function.sort()
    sites = weight_sites(model)
    reasons = {site.name: site.why_not for site in sites}
    assert reasons["w"] is None
    assert reasons["x"] == "is an input of the function 'f'"
    assert reasons["w2"] is not None
    assert "'transB' is a parameter of the function" in reasons["w2"]
    site = next(site for site in sites if site.name == "w")
    assert site.opset == 21
    encoding = simple_encoding(site)
    for other in list(model.nodes("Gemm")):
        other.attributes.pop("transB")
    gemm = next(model.nodes("Gemm"))
    product = next(node for node in model.nodes("MatMul") if node.outputs[0].name == "p")
    product.graph.remove(product, safe=True)  # type: ignore[union-attr]
    site.write(model, encoding)
    x = random(3, 2)
    constant = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_allclose(run(model, x=x)[0], x @ decode(encoding) @ constant, rtol=1e-5)
    assert gemm.graph is function.graph


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("g (float[N,4] x, float[4,4] w) => (y) { y = MatMul (x, w) }", "w", "is a graph input"),
        (
            "g (float[N,4] x, float[4,4] w = {1}) => (y) { y = MatMul (x, w) }",
            "w",
            "a caller may override it",
        ),
        (
            "g (float[N,4] x) => (y) { s = Relu (x) y = MatMul (x, s) }",
            "s",
            "computed at run time by Relu 's'",
        ),
        ("g (float[N,4] x) => (y) <float[2,4,4] w = {0}> { y = MatMul (x, w) }", "w", "batch of matrices"),
        ("g (float[N,4] x) => (y) <float[4] w = {0}> { y = MatMul (x, w) }", "w", "has rank 1"),
        ("g (double[N,2] x) => (y) <double[2,2] w = {0,1,2,3}> { y = MatMul (x, w) }", "w", "type DOUBLE"),
        ("g (int32[N,2] x) => (y) <int32[2,2] w = {0,1,2,3}> { y = MatMul (x, w) }", "w", "type INT32"),
        ("g (float[N,0] x) => (y) <float[0,2] w = {}> { y = MatMul (x, w) }", "w", "is empty"),
        ("g (int64[N] i) => (y) <float[2,4] w = {0}> { y = Gather <axis = 1> (w, i) }", "w", "along axis 1"),
    ],
)
def test_sites_that_cannot_be_rewritten_say_why(text: str, name: str, reason: str) -> None:
    text = text.replace("=> (y)", "=> (float[A,B] y)")
    shapes = {"[2,4,4]": (2, 4, 4), "float[4] w": (4,), "[4,4]": (4, 4), "[2,4] w": (2, 4), "[0,2]": (0, 2)}
    shape = next((s for key, s in shapes.items() if key in text), None)
    weights = {"w": random(*shape)} if shape and "double" not in text and "w = " in text else {}
    model = parse(text, **weights)
    site = only(model)
    assert site.name == name
    assert site.why_not is not None
    assert reason in site.why_not
    with pytest.raises(UnsupportedError, match="so it cannot be encoded"):
        site.write(model, None)  # type: ignore[arg-type]


def test_gathers_over_shapes_and_integers_are_no_sites() -> None:
    model = parse(
        """g (float[N,4] x) => (int64 n) <int64[2,2] table = {1,2,3,4}, int64 zero = {0}>
        { s = Shape (x)  a = Gather (s, zero)  b = Gather (table, zero) c = ReduceSum(b) n = Add (a, c) }"""
    )
    assert weight_sites(model) == []


def test_an_encoding_that_does_not_fit_is_refused() -> None:
    model = parse(
        "g (float[N,6] x) => (float[N,4] y) <float[6,4] w = {0}> { y = MatMul (x, w) }", w=random(6, 4)
    )
    site = only(model)
    wrong = Encoding(
        code_tensor(np.zeros((4, 6), np.int8), ir.DataType.INT4),
        np.ones((), np.float32),
        None,
        0,
        0,
        4,
        (4, 6),
    )
    with pytest.raises(UnsupportedError, match=r"shape \[4, 6\].*does not fit"):
        site.write(model, wrong)


def test_a_mapped_weight_is_read_in_place_and_given_back(tmp_path: Path) -> None:
    weight = random(300, 64)
    model = parse(
        "g (float[N,300] x) => (float[N,64] y) <float[300,64] w = {0}> { y = MatMul (x, w) }", w=weight
    )
    ir.save(model.ir, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=16)
    loaded = Model(ir.load(tmp_path / "m.onnx"))
    site = only(loaded)
    with site.matrix() as matrix:
        assert not matrix.flags.writeable
        for rows in (100, 200, 300):
            site.give_back(rows)
            np.testing.assert_array_equal(matrix, weight)
    np.testing.assert_array_equal(site.read(), weight.T)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_builder_has_sites_and_each_can_be_read(name: str) -> None:
    model = Model(BUILDERS[name]())
    sites = [site for site in weight_sites(model) if site.why_not is None]
    assert sites
    for site in sites:
        assert site.read().shape == site.shape_oi
        assert site.uses[0].node.inputs[site.uses[0].index] is not None
