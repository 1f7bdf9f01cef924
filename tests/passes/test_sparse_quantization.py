"""Quantizing pruned weights: zeros stay zeros, patterns stay patterns, whatever the quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.sparsity import Pattern, broken, declare, declared, nm_mask
from effic.ir.weights import weight_sites
from effic.passes.base import CalibratedPass, Pass, Remarks
from effic.passes.calibration import Calibration
from effic.passes.pipeline import run_passes
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.gptq import factorise, gptq, pruned
from effic.passes.sparsify.compress_nm import CompressNM
from effic.passes.spec import parse_passes

SIZE = 64
QUANTIZERS = [
    "quantize-rtn",
    "quantize-rtn{symmetric=false}",
    "quantize-rtn{axis=ic}",
    "quantize-rtn{axis=ic,symmetric=false}",
    "quantize-rtn{bits=3,symmetric=false}",
    "quantize-rtn{bits=8,symmetric=false}",
    "quantize-gptq",
    "quantize-gptq{symmetric=false}",
    "quantize-gptq{axis=ic,symmetric=false}",
    "quantize-gptq{act_order=false,static_groups=false}",
    "quantize-gptq{act_order=false,static_groups=false,symmetric=false}",
    "quantize-adadim",
    "quantize-adadim{dim=ic,symmetric=false}",
    "quantize-adadim{base=gptq,dim=ic,sketch=0}",
    "quantize-adadim{base=gptq,symmetric=false,sketch=0}",
    "quantize-awq",
    "quantize-awq{symmetric=false,clip=false}",
    "quantize-easyquant",
    "quantize-easyquant{group_size=32}",
    "quantize-int8",
    "smooth-activations",
]
LINEAR = ("w", "v")


def with_groups(text: str) -> str:
    """Groups of 32, where the quantizer has groups and none are given."""
    name, _, options = text.partition("{")
    if "group_size" in options or name in ("quantize-int8", "smooth-activations"):
        return text
    return f"{name}{{group_size=32{',' + options if options else '}'}"


def sparse_model(make_net: Any, pattern: str = "2:4") -> Model:
    """norm, two layers, a residual: what scaling passes look for as well."""
    rng = np.random.default_rng(0)
    one = Pattern.parse(pattern)
    weights = {}
    for name in LINEAR:
        weight = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
        weights[name] = np.where(nm_mask(np.abs(weight), one, axis=0), weight, 0).astype(np.float32)
    gain = rng.random(SIZE).astype(np.float32) + 0.5
    model: Model = make_net(
        f"(float[N,{SIZE}] x) => (float[N,{SIZE}] y)",
        "h = LayerNormalization(x, g) a = MatMul(h, w) r = Relu(a) b = MatMul(r, v) y = Add(b, x)",
        opset=21,
        g=gain,
        **weights,
    )
    for name in LINEAR:
        declare(model, name, one)
    return model


def quantize(model: Model, text: str) -> Remarks:
    (item,) = parse_passes(text)
    remarks = Remarks()
    apply(model, item, remarks)
    model.forget_names()
    return remarks


def apply(model: Model, item: Pass, remarks: Remarks) -> None:
    if isinstance(item, CalibratedPass):
        item.apply_with(model, Calibration.load("random", model, samples=16), remarks)
    else:
        item.apply(model, remarks)


def weights_of(model: Model) -> dict[str, np.ndarray]:
    return {site.name: site.read() for site in weight_sites(model, ("MatMul",))}


@pytest.mark.parametrize("text", QUANTIZERS)
def test_zeros_stay_zeros(make_net: Any, text: str) -> None:
    model = sparse_model(make_net)
    before = weights_of(model)
    remarks = quantize(model, with_groups(text))
    assert remarks.count("passed"), [r.text for r in remarks.items]
    after = weights_of(model)
    assert set(after) == set(LINEAR)
    for name in LINEAR:
        # What clipping or a small value rounds to zero is zero as well; nothing comes to life.
        assert not after[name][before[name] == 0].any(), name
        assert np.count_nonzero(after[name]) > 0.6 * np.count_nonzero(before[name]), name
    assert broken(model) == []
    assert declared(model) == dict.fromkeys(LINEAR, Pattern(2, 4))


@pytest.mark.parametrize("text", [text for text in QUANTIZERS if "easyquant" not in text])
def test_the_compressed_file_gives_the_same(
    make_net: Any, tmp_path: Any, text: str, monkeypatch: Any
) -> None:
    from effic.passes.sparsify import compress_nm

    monkeypatch.setattr(compress_nm, "_GRAPH_BYTES", -10_000)
    model = sparse_model(make_net)
    quantize(model, with_groups(text))
    inputs = {"x": np.random.default_rng(3).standard_normal((5, SIZE)).astype(np.float32)}
    model.save(tmp_path / "dense.onnx")
    want = Oracle(model).run(inputs)["y"]
    remarks = Remarks()
    CompressNM().apply(model, remarks)
    assert [r.where for r in remarks.items if r.kind == "passed"] == list(LINEAR), remarks.items
    model.save(tmp_path / "small.onnx")
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)
    got = [
        ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for name in ("dense.onnx", "small.onnx")
    ]
    np.testing.assert_array_equal(got[0], got[1])


def test_easyquant_keeps_outliers_beside_compressed_codes(make_net: Any, monkeypatch: Any) -> None:
    from effic.passes.sparsify import compress_nm

    monkeypatch.setattr(compress_nm, "_GRAPH_BYTES", -10_000)
    model = sparse_model(make_net)
    quantize(model, "quantize-easyquant{outlier_sigma=2}")
    inputs = {"x": np.random.default_rng(3).standard_normal((5, SIZE)).astype(np.float32)}
    want, before = Oracle(model).run(inputs)["y"], weights_of(model)
    remarks = Remarks()
    CompressNM().apply(model, remarks)
    assert remarks.count("passed") == 2
    np.testing.assert_array_equal(Oracle(model).run(inputs)["y"], want)
    for site in weight_sites(model, ("MatMul",)):
        assert site.encoding is not None
        assert site.encoding.outliers is not None
        np.testing.assert_array_equal(site.read(), before[site.name])


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "1:16"])
def test_other_patterns(make_net: Any, pattern: str) -> None:
    model = sparse_model(make_net, pattern)
    before = weights_of(model)
    quantize(model, "quantize-gptq{group_size=32,symmetric=false}")
    assert broken(model) == []
    for name, weight in weights_of(model).items():
        assert not weight[before[name] == 0].any()


def test_the_runner_keeps_the_declaration(make_net: Any) -> None:
    model = sparse_model(make_net)
    passes = parse_passes("quantize-gptq{group_size=32}")
    result = run_passes(model, passes, check="off", calibration=Calibration.load("random", model, samples=8))
    assert declared(model) == dict.fromkeys(LINEAR, Pattern(2, 4))
    assert not any("breaks" in remark.text for step in result.steps for remark in step.remarks)


# -- GPTQ over survivors ---------------------------------------------------------------------------


def layer(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A 2:4 weight ``[out, K]`` and the second moment of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((400, 48)) @ (np.eye(48) + 0.3 * rng.standard_normal((48, 48)))
    weight = rng.standard_normal((32, 48)).astype(np.float32)
    weight *= nm_mask(np.abs(weight), Pattern(2, 4))
    return weight, (mixed.T @ mixed)[None].astype(np.float32)


def decoded(weight: np.ndarray, moment: np.ndarray, grid: Grid, **options: Any) -> np.ndarray:
    done = gptq(weight, moment, grid, "oc", **options)
    block = grid.block(weight.shape[1]) or weight.shape[1]
    spread = [
        np.repeat(a.reshape(len(weight), -1), block, axis=1)[:, : weight.shape[1]] for a in (done.scales,)
    ]
    codes = done.codes.astype(np.float32)
    if done.zero_points is not None:
        codes -= np.repeat(done.zero_points.reshape(len(weight), -1), block, axis=1)[:, : weight.shape[1]]
    return np.asarray(codes * spread[0])


def output_error(weight: np.ndarray, other: np.ndarray, moment: np.ndarray) -> float:
    delta = (weight - other).astype(np.float64)
    return float(np.einsum("oi,ij,oj->", delta, moment[0].astype(np.float64), delta))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_only_survivors_are_moved(symmetric: bool, act_order: bool) -> None:
    weight, moment = layer()
    grid = Grid(4, 16, symmetric)
    refilled = decoded(weight, moment, grid, act_order=act_order)
    assert refilled[weight == 0].any(), "without the mask errors flow into the pruned places"
    kept = decoded(weight, moment, grid, act_order=act_order, keep_zeros=True)
    assert not kept[weight == 0].any()
    # Making up for errors with survivors alone is still better than rounding them.
    rtn = decoded(weight, np.eye(48, dtype=np.float32)[None], grid, keep_zeros=True)
    assert output_error(weight, kept, moment) < output_error(weight, rtn, moment)


def test_the_sweep_is_that_of_the_paper_with_a_mask() -> None:
    """Columns in order, errors of each spread over the later ones by rows of U (SparseGPT, algorithm 1)."""
    weight, moment = layer(1)
    grid = Grid(4, -1, True)
    done = gptq(weight, moment, grid, "oc", act_order=False, keep_zeros=True)
    scales = done.scales.reshape(-1, 1).astype(np.float64)
    hessian = moment[0].astype(np.float64)
    hessian += 0.01 * np.mean(np.diag(hessian)) * np.eye(48)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    current, codes = weight.astype(np.float64), np.zeros(weight.shape)
    for column in range(48):
        wanted = np.where(weight[:, column] == 0, 0, current[:, column])
        codes[:, column] = np.clip(np.rint(wanted / scales[:, 0]), -8, 7)
        error = (current[:, column] - codes[:, column] * scales[:, 0]) / upper[column, column]
        current[:, column:] -= np.outer(error, upper[column, column:])
    assert (codes == done.codes).mean() > 0.995  # float32 here and there: a tie may fall the other way
    assert (codes[weight == 0] == 0).all()


def test_a_dense_weight_is_quantized_as_before() -> None:
    weight, moment = layer()
    dense = weight + np.float32(0.1)
    assert not pruned(dense)
    assert pruned(weight)
    grid = Grid(4, 16, True)
    factor = factorise(moment)
    plain = gptq(dense, moment, grid, "oc", factor=factor)
    kept = gptq(dense, moment, grid, "oc", factor=factor, keep_zeros=True)
    np.testing.assert_array_equal(plain.codes, kept.codes)
    assert plain.loss == kept.loss
