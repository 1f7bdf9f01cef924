"""Probes: parts of a model run by themselves."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.evaluate import Oracle, seeded_inputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.probe import Probe, constant_values
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.quantize_rtn import encode


def parse(text: str, **weights: np.ndarray) -> Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, array in weights.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    return Model(model)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def value(model: Model, name: str) -> ir.Value:
    found = [*model.graph.inputs, *model.graph.initializers.values()]
    found += [v for node in model.graph for v in node.outputs]
    return next(v for v in found if v.name == name)


LAYERS = (
    "g (float[N,4] x) => (float[N,4] z) <float[4,4] v = {0}, float[4,4] w = {0}> "
    "{ a = MatMul(x, v) b = Relu(a) c = MatMul(b, w) z = Add(c, x) }"
)


def layers() -> Model:
    return parse(LAYERS, v=random(4, 4, seed=1), w=random(4, 4, seed=2))


@pytest.mark.parametrize("built", sorted(BUILDERS))
def test_a_probe_of_everything_computes_what_the_model_does(built: str) -> None:
    model = Model(BUILDERS[built]())
    feeds = seeded_inputs(model)
    want = Oracle(model).run(feeds)
    got = Probe(model, model.graph.inputs, model.graph.outputs).run(feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4)


def test_values_in_between_go_in_and_come_out() -> None:
    model, a = layers(), random(3, 4)
    probe = Probe(model, [value(model, "a")], [value(model, "b"), value(model, "c"), value(model, "a")])
    assert probe.inputs == ["a"]
    got = probe.run({"a": a, "unknown": a})
    np.testing.assert_array_equal(got["b"], np.maximum(a, 0))
    np.testing.assert_allclose(got["c"], np.maximum(a, 0) @ random(4, 4, seed=2), atol=1e-5)
    assert got["a"] is not None
    assert list(got) == ["b", "c", "a"]


def test_weights_may_be_given_at_every_run() -> None:
    model, x = layers(), random(3, 4)
    probe = Probe(model, [value(model, "x"), value(model, "v")], [value(model, "a")])
    for seed in range(2):
        weight = random(4, 4, seed=seed + 5)
        np.testing.assert_allclose(probe.run({"x": x, "v": weight})["a"], x @ weight, atol=1e-5)


def test_weights_come_out_as_they_are() -> None:
    model = layers()
    got = Probe(model, [], [value(model, "v")]).run({})
    np.testing.assert_array_equal(got["v"], random(4, 4, seed=1))


def test_what_is_missing_is_named() -> None:
    model = layers()
    with pytest.raises(UsageError, match="cannot be computed without the graph input 'x'"):
        Probe(model, [value(model, "a")], [value(model, "z")])
    with pytest.raises(UsageError, match="not in the model's main graph"):
        Probe(model, [], [value(layers(), "a")])
    with pytest.raises(UsageError, match="lack 'x'"):
        Probe(model, [value(model, "x")], [value(model, "a")]).run({})
    with pytest.raises(UsageError, match="lack 'x'"):
        Probe(model, [value(model, "x")], [value(model, "x")]).run({})


def test_what_does_not_run_is_said() -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { y = NoSuchOperator(x) }")
    with pytest.raises(NotMeasuredError, match="cannot load a part of the model"):
        Probe(model, model.graph.inputs, model.graph.outputs).run({"x": random(1, 4)})


def test_the_model_may_change_afterwards() -> None:
    model, x = layers(), random(3, 4)
    probe = Probe(model, model.graph.inputs, model.graph.outputs)
    want = Oracle(model).run({"x": x})["z"]
    value(model, "v").const_value = ir.tensor(random(4, 4, seed=9), name="v")
    np.testing.assert_allclose(probe.run({"x": x})["z"], want, atol=1e-5)
    probe.close()
    np.testing.assert_allclose(probe.run({"x": x})["z"], want, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_encoded_weights_are_decoded(bits: int) -> None:
    model = parse(
        "g (float[N,64] x) => (float[N,32] y) <float[64,32] w = {0}> { y = MatMul(x, w) }", w=random(64, 32)
    )
    (site,) = weight_sites(model)
    encoding = encode(model, site, Grid(bits, 16, True), "oc")[0]
    assert encoding is not None
    site.write(model, encoding)
    x = random(3, 64)
    np.testing.assert_allclose(
        Probe(model, model.graph.inputs, model.graph.outputs).run({"x": x})["y"],
        Oracle(model).run({"x": x})["y"],
        atol=1e-4,
    )
    # Asked for by name, the decoded weight is computed as the graph says.
    np.testing.assert_allclose(
        Probe(model, [], [site.value]).run({})[str(site.value.name)], site.read().T, atol=1e-6
    )


def test_large_weights_stay_in_the_file(tmp_path: Path) -> None:
    weight = random(256, 256)
    parse(
        "g (float[N,256] x) => (float[N,256] y) <float[256,256] w = {0}> { y = MatMul(x, w) }", w=weight
    ).save(tmp_path / "m.onnx", external=True)
    model = read_onnx(tmp_path / "m.onnx")
    probe = Probe(model, model.graph.inputs, model.graph.outputs)
    assert probe.inputs == ["x"]
    x = random(2, 256)
    for _ in range(2):
        np.testing.assert_allclose(probe.run({"x": x})["y"], x @ weight, atol=1e-3)
        probe.close()


def test_half_precision() -> None:
    for kind, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        weight = random(256, 256).astype(dtype)
        model = parse(
            f"g ({kind}[N,256] x) => (float[N,256] y) <{kind}[256,256] w = {{0}}> "
            "{ a = Cast<to = 1>(w) b = Cast<to = 1>(x) y = MatMul(b, a) }",
            w=weight,
        )
        x = random(2, 256).astype(dtype)
        got = Probe(model, model.graph.inputs, model.graph.outputs).run({"x": x})["y"]
        np.testing.assert_allclose(got, x.astype(np.float32) @ weight.astype(np.float32), atol=1e-3)


def test_constants_are_what_no_input_reaches() -> None:
    model = parse(
        "g (float[N,4] x) => (float[N,4] z) <float[4,4] w = {0}> "
        "{ t = Transpose(w) r = RandomNormalLike(t) s = Add(t, w) y = MatMul(x, s) z = Add(y, x) }",
        w=random(4, 4),
    )
    assert {v.name for v in constant_values(model.graph)} == {"w", "t", "s"}
    assert constant_values(model.graph, ["w"]) == set()
