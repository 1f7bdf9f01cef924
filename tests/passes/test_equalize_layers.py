from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes.base import Pass, Remarks
from effic.passes.fuse.fuse_conv_bn import FuseConvBN
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.equalize import equalize
from effic.passes.quantize.equalize_layers import EqualizeLayers
from effic.passes.quantize.fold_scales import LINEARS, ScaleFlow, channel_ranges

MakeNet = Callable[..., Model]
Check = Callable[[Model, Pass], Remarks]


def uneven(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Weights whose output channels differ widely in range."""
    weight = rng.standard_normal(shape) * np.exp(rng.normal(0, 1.5, (shape[0], *[1] * (len(shape) - 1))))
    return weight.astype(np.float32)


def chain(make_net: MakeNet, seed: int = 0, groups: int = 1, between: str = "Relu(a)") -> Model:
    rng = np.random.default_rng(seed)
    return make_net(
        "(float[N,3,9,9] x) => (float[N,5] y)",
        f"a = Conv(x, w1, b1)  r = {between}  c = Conv<group={groups}>(r, w2, b2)  l = LeakyRelu(c)"
        " p = GlobalAveragePool(l)  f = Flatten(p)  y = Gemm(f, w3)",
        w1=uneven(rng, 6, 3, 3, 3),
        b1=uneven(rng, 6),
        w2=uneven(rng, 12, 6 // groups, 3, 3),
        b2=uneven(rng, 12),
        w3=uneven(rng, 12, 5),
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from([1, 2, 3, 6]))
def test_function_is_preserved_and_ranges_are_equal(
    make_net: MakeNet, check: Check, seed: int, groups: int
) -> None:
    model = chain(make_net, seed, groups)
    remarks = check(model, EqualizeLayers())
    assert [r.where for r in remarks.items if r.kind == "passed"] == ["w1", "w2"]
    sites = {site.name: channel_ranges(site) for site in weight_sites(model)}
    for first, second in (("w1", "w2"), ("w2", "w3")):
        np.testing.assert_allclose(
            sites[first].max(axis=2).reshape(-1), sites[second].max(axis=1).reshape(-1), rtol=1e-3
        )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16))
def test_one_pair_is_equalised_in_one_step(make_net: MakeNet, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w1, w2 = uneven(rng, 4, 7), uneven(rng, 7, 3)
    model = make_net("(float[N,4] x) => (float[N,3] y)", "a = MatMul(x, w1)  y = MatMul(a, w2)", w1=w1, w2=w2)
    (result,) = equalize(ScaleFlow(model).scalings())
    r1, r2 = np.abs(w1).max(axis=0), np.abs(w2).max(axis=1)
    np.testing.assert_allclose(result.factor, np.sqrt(r1 * r2) / r2, rtol=1e-5)
    assert result.after >= result.before * (1 - 1e-9)


def test_one_scale_per_layer_loses_less(make_net: MakeNet) -> None:
    model = chain(make_net)
    noise = [_noise_per_tensor(model)]
    EqualizeLayers().apply(model, Remarks())
    noise.append(_noise_per_tensor(model))
    assert noise[1] < 0.3 * noise[0]


def _noise_per_tensor(model: Model) -> float:
    """Relative error of each channel under one 8-bit scale for the layer, averaged."""
    total = []
    for site in weight_sites(model):
        weight = site.read()
        step = np.abs(weight).max() / -Grid(8).lowest
        noise = weight - np.rint(weight / step) * step
        total.append(np.mean(np.square(noise).sum(axis=1) / np.square(weight).sum(axis=1)))
    return float(np.mean(total))


def test_dead_channels_are_left_alone(make_net: MakeNet, check: Check) -> None:
    model = chain(make_net)
    for name, index in (("w1", (2,)), ("w2", (slice(None), 4))):
        array = np.array(model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]
        array[index] = 0
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    pairs = ScaleFlow(model).scalings()
    found = {pair.consumers[0].site.name: result for pair, result in zip(pairs, equalize(pairs), strict=True)}
    assert found["w2"].factor[2] == found["w2"].factor[4] == 1
    assert np.isfinite(found["w2"].factor).all()
    check(model, EqualizeLayers())


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("Clip(a, b1, b1)", "it is clipped at a fixed value there"),
        ("Sigmoid(a)", "is read by Sigmoid"),
        ("BatchNormalization(a, b1, b1, b1, b1)", "fold the norm first (fuse-conv-bn)"),
        ("Add(a, a)", "it is added to what is not scaled"),
    ],
)
def test_only_homogeneous_functions_are_crossed(make_net: MakeNet, between: str, reason: str) -> None:
    model = chain(make_net, between=between)
    remarks = Remarks()
    EqualizeLayers().apply(model, remarks)
    missed = {r.where: r.text for r in remarks.items if r.kind == "missed"}
    assert reason in missed["w1"]
    assert "is an output of the graph" in missed["w3"]


def test_kinds_and_skip_are_respected(make_net: MakeNet) -> None:
    for item, where, reason in (
        (EqualizeLayers(skip=("w3",)), "w2", "'w3' is named in skip"),
        (EqualizeLayers(kinds=("Conv",)), "w2", "a Gemm, which is not named in kinds"),
    ):
        remarks = Remarks()
        item.apply(chain(make_net), remarks)
        assert reason in next(r.text for r in remarks.items if r.where == where)
        assert remarks.count("passed") == 1


def test_seeded_models_after_fusing(check: Check) -> None:
    for name in ("cnn", "grouped_transposed"):
        model = Model(BUILDERS[name]())
        FuseConvBN().apply(model, Remarks())
        assert check(model, EqualizeLayers()).count("passed") >= 4


def test_trained_models(data_dir: Path, check: Check) -> None:
    model = read_onnx(data_dir / "onnx" / "resnet20_cifar.onnx")
    FuseConvBN().apply(model, Remarks())
    remarks = check(model, EqualizeLayers())
    # The first of the two convolutions of each of the nine blocks.
    assert remarks.count("passed") == 9
    assert all(r.data["precision_after"] > r.data["precision_before"] for r in remarks.items if r.data)


def test_encoded_and_shared_weights_stay(make_net: MakeNet) -> None:
    from effic.passes.quantize.quantize_rtn import QuantizeRTN

    model = make_net(
        "(float[N,8] x) => (float[N,8] y)",
        "a = MatMul(x, w1)  r = Relu(a)  y = MatMul(r, w2)",
        opset=21,
        w1=np.ones((8, 8), np.float32),
        w2=np.full((8, 8), 3, np.float32),
    )
    QuantizeRTN(min_size=0, skip=("w1",)).apply(model, Remarks())
    assert not ScaleFlow(model).scalings()
    assert len(ScaleFlow(model, encoded=True).scalings()) == 1
    assert {site.name for site in weight_sites(model, LINEARS)} == {"w1", "w2"}


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite_stay(make_net: MakeNet, wrong: float) -> None:
    model = make_net(
        "(float[N,8] x) => (float[N,8] y)",
        "a = MatMul(x, w1)  r = Relu(a)  y = MatMul(r, w2)",
        w1=np.where(np.eye(8) > 0, wrong, 1).astype(np.float32),
        w2=np.full((8, 8), 3, np.float32),
    )
    remarks = Remarks()
    EqualizeLayers().apply(model, remarks)
    assert [r.kind for r in remarks.items] == ["missed", "missed"]
    assert "'w1' holds a weight that is infinite or not a number" in " ".join(r.text for r in remarks.items)
