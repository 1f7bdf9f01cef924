from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.encodings import decode, recognise
from effic.ir.errors import UsageError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.opset import raise_opset
from effic.ir.verify import signature, verify
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS, llama
from effic.passes.base import Remark, Remarks
from effic.passes.calibration import Calibration
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.awq import Layer, clipped, factors, round_to_grid, search
from effic.passes.quantize.fold_scales import ScaleFlow
from effic.passes.quantize.quantize_awq import QuantizeAWQ
from effic.passes.quantize.quantize_rtn import QuantizeRTN
from effic.passes.statistics import Accumulator

MakeNet = Callable[..., Model]
Feeds = list[dict[str, np.ndarray]]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loud(seed: int, rows: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, channels)) * np.exp(rng.normal(0, 1.5, channels))).astype(np.float32)


def apply(model: Model, feeds: Feeds, **options: object) -> Remarks:
    verify(model)
    before, remarks = signature(model), Remarks()
    QuantizeAWQ(**{"min_size": 0, "group_size": 8, **options}).apply_with(  # type: ignore[arg-type]
        model, Calibration.of(feeds), remarks
    )
    model.forget_names()
    verify(model)
    assert signature(model) == before
    return remarks


def passed(remarks: Remarks) -> dict[str, Remark]:
    return {r.where: r for r in remarks.items if r.kind == "passed"}


def net(make_net: MakeNet, seed: int = 0, body: str = "") -> Model:
    return make_net(
        "(float[N,24] x) => (float[N,16] p, float[N,20] q)",
        body or "h = Mul(x, g)  p = MatMul(h, v)  q = MatMul(h, w)",
        opset=21,
        g=np.exp(np.random.default_rng(seed).normal(0, 1, 24)).astype(np.float32),
        v=random(24, 16, seed=seed + 1),
        w=random(24, 20, seed=seed + 2),
    )


# -- the arithmetic --------------------------------------------------------------------------------

grids = st.builds(
    Grid,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 5, 8, 16]),
    symmetric=st.booleans(),
)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**16), grids)
def test_error_is_never_above_rounding_to_nearest(make_net: MakeNet, seed: int, grid: Grid) -> None:
    model = net(make_net, seed)
    x = loud(seed, 64, 24)
    gathered = Accumulator(1, 24, second_moment=True, sketch=64)
    gathered.add(x)
    statistics = gathered.finish()
    layers = [Layer(site, np.arange(24), grid, statistics) for site in weight_sites(model)]
    found = search(layers, statistics.mean_abs, np.ones(24, bool))
    sizes = [16, 20]
    assert np.dot(found.errors, sizes) <= np.dot(found.rtn, sizes)
    # The errors are those of the outputs, in so many words.
    for layer, rtn, error, signal in zip(layers, found.rtn, found.errors, found.signals, strict=True):
        weight = layer.site.read()
        scaled = round_to_grid((weight * found.factor.astype(np.float32)), grid) / found.factor
        np.testing.assert_allclose(error, np.mean((x @ (scaled - weight).T) ** 2), rtol=1e-2)
        np.testing.assert_allclose(
            rtn, np.mean((x @ (round_to_grid(weight, grid) - weight).T) ** 2), rtol=1e-2
        )
        np.testing.assert_allclose(signal, np.mean((x @ weight.T) ** 2), rtol=1e-2)


@given(st.integers(0, 2**16), st.sampled_from([0.05, 0.5, 0.95]))
@settings(deadline=None)
def test_factors_are_balanced_and_spare_what_is_not_free(seed: int, ratio: float) -> None:
    rng = np.random.default_rng(seed)
    loudness = np.abs(rng.standard_normal(12)).astype(np.float32)
    loudness[3] = 0
    free = rng.random(12) < 0.7
    found = factors(loudness, free, ratio)
    assert (found[~free] == 1).all()
    assert (found > 0).all()
    assert found[3] == 1, "it was silent"
    moved = free & (loudness > 0)
    if moved.any():
        np.testing.assert_allclose(found[moved].max() * found[moved].min(), 1, rtol=1e-6)
    np.testing.assert_array_equal(factors(loudness, free, 0), np.ones(12))


def test_clipping_keeps_groups_within_their_share() -> None:
    matrix = random(3, 10)
    held = clipped(matrix, np.array([[1, 0.5, 0.25]] * 3, np.float32), Grid(4, 4))
    for group, share in enumerate((1, 0.5, 0.25)):
        part = slice(4 * group, 4 * group + 4)
        limit = np.abs(matrix[:, part]).max(axis=1) * share
        np.testing.assert_allclose(np.abs(held[:, part]).max(axis=1), limit, rtol=1e-6)
    np.testing.assert_array_equal(held[:, :4], matrix[:, :4])


# -- the pass --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**16), st.booleans(), st.booleans())
def test_outputs_are_nearer_than_by_rounding_to_nearest(
    make_net: MakeNet, seed: int, symmetric: bool, clip: bool
) -> None:
    feed = {"x": loud(seed, 128, 24)}
    want = Oracle(net(make_net, seed)).run(feed)
    errors = []
    for kind in ("awq", "rtn"):
        model, remarks = net(make_net, seed), Remarks()
        if kind == "awq":
            remarks = apply(model, [feed], symmetric=symmetric, clip=clip)
        else:
            QuantizeRTN(min_size=0, group_size=8, symmetric=symmetric).apply(model, remarks)
        got = Oracle(model).run(feed)
        errors.append(sum(float(np.square(got[k] - want[k]).sum()) for k in want))
    assert errors[0] <= errors[1] * 1.001


def test_remarks_report_the_choice(make_net: MakeNet) -> None:
    model = net(make_net)
    feed = {"x": loud(0, 128, 24)}
    want = Oracle(model).run(feed)
    found = passed(apply(model, [feed], bits=3))
    got = Oracle(model).run(feed)
    for name, output in (("v", "p"), ("w", "q")):
        data = found[name].data
        assert data["method"] == "awq"
        assert data["ratio"] > 0
        assert data["producer"].startswith("Mul")
        assert data["axis"] == "oc"
        assert f"r = {data['ratio']:.2f}, scaled in Mul" in found[name].text
        noise = np.mean((got[output] - want[output]) ** 2)
        assert data["error_awq"] == pytest.approx(noise, rel=0.02)
        sqnr = 10 * np.log10(np.mean(want[output] ** 2) / noise)
        assert data["output_sqnr_db"] == pytest.approx(sqnr, abs=0.1)


def test_scaling_alone_leaves_the_function_as_it_is(make_net: MakeNet) -> None:
    for build, feed in (
        (lambda: net(make_net), {"x": loud(0, 64, 24)}),
        (lambda: Model(llama(tied=False)), {"input_ids": np.arange(18).reshape(2, 9)}),
    ):
        model = build()
        want = Oracle(model).run(feed)
        flow = ScaleFlow(model)
        for scaling in flow.scalings():
            loudness = np.abs(np.random.default_rng(0).standard_normal(scaling.free.size)) + 1e-3
            assert scaling.fold(model, factors(loudness, scaling.free, 0.95)) is None
        model.forget_names()
        assert compare_outputs(want, Oracle(model).run(feed)).max_rel <= 1e-5


def test_without_a_producer_it_is_rounding_to_nearest(make_net: MakeNet) -> None:
    body = "h = Tanh(x)  i = Mul(h, g)  p = MatMul(h, v)  q = MatMul(i, w)  "
    model, plain = (net(make_net, body=body) for _ in range(2))
    found = passed(apply(model, [{"x": loud(0, 64, 24)}], clip=False))
    QuantizeRTN(min_size=0, group_size=8).apply(plain, Remarks())
    assert found["v"].data["ratio"] == 0
    assert "no scaling: its input comes from Tanh" in found["v"].text
    assert found["v"].data["error_awq"] == found["v"].data["error_rtn"]
    weights = [{s.name: s.read() for s in weight_sites(m)}["v"] for m in (model, plain)]
    np.testing.assert_array_equal(*weights)


def test_a_refused_fold_falls_back_to_rounding_to_nearest(make_net: MakeNet) -> None:
    half = np.float16
    gamma, weight = np.full(24, 3e4, half), random(24, 16).astype(half)
    model = make_net(
        "(float16[N,24] x) => (float16[N,16] p)",
        "h = Mul(x, g)  p = MatMul(h, v)",
        opset=21,
        g=gamma,
        v=weight,
    )
    x = (loud(1, 64, 24) * 1e-3).astype(half)
    x[:, 3] = 0
    remark = passed(apply(model, [{"x": x}], bits=2))["v"]
    if remark.data["ratio"] == 0:
        assert "would overflow float16" in remark.text or "r = 0.00" in remark.text
    assert np.isfinite(Oracle(model).run({"x": x})["p"]).all()


def test_skipped_readers_are_scaled_but_stay_floating(make_net: MakeNet) -> None:
    model = net(make_net)
    before = model.graph.initializers["w"].const_value.numpy().copy()  # type: ignore[union-attr]
    feed = {"x": loud(0, 64, 24)}
    want = Oracle(model).run(feed)["q"]
    found = apply(model, [feed], skip=("w",), bits=2)
    assert list(passed(found)) == ["v"]
    assert passed(found)["v"].data["ratio"] > 0
    after = {s.name: s for s in weight_sites(model)}["w"]
    assert after.encoding is None
    assert not np.array_equal(after.read().T, before)
    np.testing.assert_allclose(Oracle(model).run(feed)["q"], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_convolutions_by_request(make_net: MakeNet) -> None:
    model = make_net(
        "(float[N,8,6,6] x) => (float[N,8,4,4] y)",
        "a = Conv<kernel_shape=[1,1]>(x, v, b)  r = Relu(a)  y = Conv<group=2>(r, w)",
        opset=21,
        v=random(8, 8, 1, 1),
        b=random(8),
        w=random(8, 4, 3, 3),
    )
    x = loud(0, 4 * 36, 8).T.reshape(8, 4, 6, 6).transpose(1, 0, 2, 3)
    found = passed(apply(model, [{"x": np.ascontiguousarray(x)}], kinds=("Conv",), bits=2, clip=True))
    assert set(found) == {"v", "w"}
    assert found["w"].data["error_awq"] <= found["w"].data["error_rtn"]
    assert "no scaling: its input is an input of the graph" in found["v"].text


def test_a_second_run_changes_nothing(make_net: MakeNet) -> None:
    model = net(make_net)
    feeds = [{"x": loud(0, 64, 24)}]
    apply(model, feeds)
    again = apply(model, feeds)
    assert not again.count("passed")
    assert all("already encoded" in r.text for r in again.items)


def test_seeded_models_stay_valid_and_alike() -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "llama": {"input_ids": rng.integers(0, 100, (2, 9))},
        "encoder": {"input_ids": rng.integers(0, 100, (2, 9)), "attention_mask": np.ones((2, 9), np.int64)},
        "control_flow": {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)},
        "functions": {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)},
        "shared_weights": {"x": rng.standard_normal((2, 8, 8, 8)).astype(np.float32)},
    }
    for name, feed in feeds.items():
        model = Model(BUILDERS[name]())
        raise_opset(model, 21)
        want = Oracle(model).run(feed)
        remarks = apply(model, [feed], bits=8, embeddings=True, group_size=16)
        assert compare_outputs(want, Oracle(model).run(feed)).sqnr_db > 30, name
        never_worse(remarks)


def never_worse(remarks: Remarks) -> None:
    """Weights that share their input channels lose no more together than by rounding to nearest."""
    errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in passed(remarks).values():
        if "error_awq" in r.data:
            errors[r.data.get("producer", r.where)].append((r.data["error_awq"], r.data["error_rtn"]))
            if "producer" not in r.data:
                assert r.data["ratio"] == 0
    assert all(np.isfinite(pair).all() for rows in errors.values() for pair in rows)


@pytest.mark.parametrize("clip", [True, False])
def test_the_ratio_of_weights_counts_what_was_clipped(make_net: MakeNet, clip: bool) -> None:
    model = net(make_net, body="h = Relu(x)  p = MatMul(h, v)  q = MatMul(h, w)")
    remark = passed(apply(model, [{"x": loud(0, 64, 24)}], bits=3, clip=clip))["v"]
    site = next(s for s in weight_sites(model) if s.name == "v")
    encoding = recognise(site.value)
    assert encoding is not None
    weight = random(24, 16, seed=1)
    noise = np.square(weight - decode(encoding)).sum()
    assert remark.data["sqnr_db"] == pytest.approx(10 * np.log10(np.square(weight).sum() / noise), abs=0.01)


def test_weights_that_are_not_finite_are_left(make_net: MakeNet) -> None:
    model = net(make_net)
    bad = random(24, 16)
    bad[3, 3] = np.nan
    model.graph.initializers["v"].const_value = ir.Tensor(bad, name="v")
    remarks = apply(model, [{"x": loud(0, 64, 24)}])
    assert list(passed(remarks)) == ["w"]
    assert "infinite or not a number" in next(r.text for r in remarks.items if r.where == "v")


def test_zero_and_constant_weights(make_net: MakeNet) -> None:
    for value in (0.0, 2.0):
        model = net(make_net)
        model.graph.initializers["v"].const_value = ir.Tensor(np.full((24, 16), value, np.float32), name="v")
        remark = passed(apply(model, [{"x": loud(0, 64, 24)}]))["v"]
        site = next(s for s in weight_sites(model) if s.name == "v")
        encoding = recognise(site.value)
        assert encoding is not None
        assert np.isfinite(decode(encoding)).all()
        assert remark.data["error_awq"] >= 0


def test_no_data_is_an_error(make_net: MakeNet) -> None:
    with pytest.raises(UsageError, match="quantize-awq needs calibration data"):
        QuantizeAWQ().apply(net(make_net), Remarks())


def test_a_trained_decoder_loses_less(data_dir: Path) -> None:
    path = data_dir / "onnx" / "stories260k.onnx"
    calib = np.load(data_dir / "stories" / "ids_calib.npy").astype(np.int64)[:2048].reshape(-1, 1, 256)
    test = np.load(data_dir / "stories" / "ids_eval.npy").astype(np.int64)[:2048].reshape(8, 256)
    model = read_onnx(path)
    raise_opset(model, 21)
    name = model.graph.inputs[0].name or ""
    want = Oracle(model).run({name: test})
    distances = []
    for clip in (None, False, True):
        copy, remarks = model.clone(), Remarks()
        if clip is None:
            QuantizeRTN(group_size=32, bits=3).apply(copy, remarks)
        else:
            remarks = apply(
                copy, [{name: ids} for ids in calib], group_size=32, bits=3, min_size=1024, clip=clip
            )
            assert sum(r.data["ratio"] > 0 for r in passed(remarks).values()) > 30
            # By what is shared: q, k and v; o; gate and up; down, in each layer.
            totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
            sizes = {site.name: site.shape_oi[0] for site in weight_sites(copy) if site.shape}
            for where, r in passed(remarks).items():
                totals[r.data["producer"]] += sizes[where] * np.array(
                    [r.data["error_awq"], r.data["error_rtn"]]
                )
            assert len(totals) == 20
            assert all(awq <= rtn for awq, rtn in totals.values())
        assert remarks.count("passed") == 35
        distances.append(compare_outputs(want, Oracle(copy).run({name: test})).sqnr_db)
    assert distances[0] + 0.4 < distances[1] < distances[2]
