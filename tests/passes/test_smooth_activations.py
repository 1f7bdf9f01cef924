from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.verify import signature, verify
from effic.models.builders import BUILDERS, llama
from effic.passes.base import Remarks
from effic.passes.calibration import Calibration
from effic.passes.quantize.smooth_activations import SmoothActivations, outlier_ratio, smoothing_factors

MakeNet = Callable[..., Model]


def smooth(model: Model, feeds: list[dict[str, np.ndarray]], item: SmoothActivations) -> Remarks:
    """Applies the pass, and checks structure and that the function is unchanged before quantization."""
    verify(model)
    before, want = signature(model), [Oracle(model).run(feed) for feed in feeds]
    remarks = Remarks()
    item.apply_with(model, Calibration.of(feeds), remarks)
    model.forget_names()
    verify(model)
    assert signature(model) == before
    for feed, outputs in zip(feeds, want, strict=True):
        assert compare_outputs(outputs, Oracle(model).run(feed)).max_rel <= 1e-5
    again = Remarks()
    item.apply_with(model.clone(), Calibration.of(feeds), again)
    assert not again.count("passed"), "a second run found more to do"
    return remarks


def loud(seed: int, channels: int, rows: int = 32) -> np.ndarray:
    """Activations of which some channels are outliers."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, channels)) * np.exp(rng.normal(0, 2, channels))).astype(np.float32)


def norm_and_two_layers(make_net: MakeNet, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    return make_net(
        "(float[N,16] x) => (float[N,8] p, float[N,8] q)",
        "h = Mul(x, g)  n = Add(h, b)  p = MatMul(n, v)  q = Gemm<transB=1>(n, w)",
        g=np.exp(rng.normal(0, 1, 16)).astype(np.float32),
        b=rng.standard_normal(16).astype(np.float32),
        v=rng.standard_normal((16, 8)).astype(np.float32),
        w=rng.standard_normal((8, 16)).astype(np.float32),
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.3, 0.5, 0.85, 1.0]))
def test_function_is_unchanged_and_factors_are_by_the_book(
    make_net: MakeNet, seed: int, alpha: float
) -> None:
    model = norm_and_two_layers(make_net, seed)
    arrays = {name: v.const_value.numpy().copy() for name, v in model.graph.initializers.items()}  # type: ignore[union-attr]
    x = loud(seed, 16)
    remarks = smooth(model, [{"x": x}], SmoothActivations(alpha=alpha))
    assert remarks.count("passed") == 1
    loudest = np.abs(x * arrays["g"] + arrays["b"]).max(axis=0)
    widest = np.maximum(np.abs(arrays["v"]).max(axis=1), np.abs(arrays["w"]).max(axis=0))
    factor = np.maximum(loudest**alpha / widest ** (1 - alpha), 1e-5)
    after = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}  # type: ignore[union-attr]
    np.testing.assert_allclose(after["g"], arrays["g"] / factor, rtol=1e-5)
    np.testing.assert_allclose(after["b"], arrays["b"] / factor, rtol=1e-5)
    np.testing.assert_allclose(after["v"], arrays["v"] * factor[:, None], rtol=1e-5)
    np.testing.assert_allclose(after["w"], arrays["w"] * factor, rtol=1e-5)


def test_outliers_shrink_and_are_reported(make_net: MakeNet) -> None:
    model = norm_and_two_layers(make_net)
    remark = smooth(model, [{"x": loud(0, 16)}], SmoothActivations()).items[-1]
    assert remark.where == "Add 'n'" or remark.where.startswith("Mul")
    assert remark.data["outlier_ratio_after"] < 0.5 * remark.data["outlier_ratio_before"]
    assert "folded into v, w" in remark.text


def test_all_of_the_outliers_go_with_alpha_one(make_net: MakeNet) -> None:
    remarks = smooth(norm_and_two_layers(make_net), [{"x": loud(0, 16)}], SmoothActivations(alpha=1.0))
    assert remarks.items[-1].data["outlier_ratio_after"] == pytest.approx(1, abs=1e-3)


def test_silent_channels_and_unread_channels_stay() -> None:
    loudest, widest = np.array([0.0, 4.0, 4.0]), np.array([1.0, 0.0, 1.0])
    np.testing.assert_allclose(smoothing_factors(loudest, widest, 0.5), [1, 1, 2])
    assert outlier_ratio(np.zeros(3)) == 1


def test_seeded_models_keep_their_function() -> None:
    rng = np.random.default_rng(0)
    for name, options, count in (
        ("llama", {}, 4),
        ("llama", {"producers": "all"}, 8),
        ("encoder", {}, 0),
        ("encoder", {"producers": "all"}, 2),
        ("cnn", {"kinds": ("Conv",)}, 5),
        ("control_flow", {}, 0),
        ("functions", {}, 0),
        ("shared_weights", {"kinds": ("Conv", "MatMul")}, 0),
    ):
        model = Model(BUILDERS[name]())
        if name in ("llama", "encoder"):
            feed = {"input_ids": rng.integers(0, 100, (2, 9))}
            if name == "encoder":
                feed["attention_mask"] = np.ones((2, 9), np.int64)
        else:
            size = {"cnn": (3, 16, 16), "shared_weights": (8, 8, 8)}.get(name, (3, 8, 8))
            feed = {"x": rng.standard_normal((2, *size)).astype(np.float32)}
        assert smooth(model, [feed], SmoothActivations(**options)).count("passed") == count, (name, options)


def test_a_head_of_its_own_is_smoothed_a_tied_one_is_not() -> None:
    feed = {"input_ids": np.random.default_rng(0).integers(0, 100, (2, 9))}
    tied = smooth(Model(llama(tied=True)), [feed], SmoothActivations())
    assert "read by 2 nodes" in next(r.text for r in tied.items if r.where == "embed_tokens.weight")
    assert smooth(Model(llama(tied=False)), [feed], SmoothActivations()).count("passed") == 5


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (SmoothActivations(skip=("w",)), "'w' is named in skip"),
        (SmoothActivations(kinds=("MatMul",)), "read by 'w', whose Gemm is not named in kinds"),
    ],
)
def test_every_reader_has_to_agree(make_net: MakeNet, item: SmoothActivations, reason: str) -> None:
    model = norm_and_two_layers(make_net)
    remarks = smooth(model, [{"x": loud(0, 16)}], item)
    assert not remarks.count("passed")
    assert reason in next(r.text for r in remarks.items if r.where == "v")


def test_layers_take_factors_in_only_when_asked(make_net: MakeNet) -> None:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((8, 8)).astype(np.float32) for n in "vw"}

    def make() -> Model:
        return make_net("(float[N,8] x) => (float[N,8] y)", "a = MatMul(x, v)  y = MatMul(a, w)", **weights)

    remarks = smooth(make(), [{"x": loud(0, 8)}], SmoothActivations())
    assert "which is no norm; producers=all folds into layers" in remarks.items[-1].text
    assert smooth(make(), [{"x": loud(0, 8)}], SmoothActivations(producers="all")).count("passed") == 1


def test_no_data_is_an_error(make_net: MakeNet) -> None:
    with pytest.raises(UsageError, match="smooth-activations needs calibration data"):
        SmoothActivations().apply(norm_and_two_layers(make_net), Remarks())


def test_a_trained_decoder_keeps_its_function(data_dir: Path) -> None:
    model = read_onnx(data_dir / "onnx" / "stories260k.onnx")
    ids = np.load(data_dir / "stories" / "ids_calib.npy").astype(np.int64)[:512].reshape(2, 256)
    feeds = [{model.graph.inputs[0].name or "": ids}]
    remarks = smooth(model, feeds, SmoothActivations())
    done = [r for r in remarks.items if r.kind == "passed"]
    assert len(done) == 10
    assert sum(r.data["outlier_ratio_after"] < r.data["outlier_ratio_before"] for r in done) >= 8
