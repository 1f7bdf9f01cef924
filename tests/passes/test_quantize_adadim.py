from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.encodings import decode
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.opset import raise_opset
from effic.ir.weights import WeightSite, weight_sites
from effic.models.builders import BUILDERS
from effic.passes.base import Remark, Remarks
from effic.passes.calibration import Calibration, SiteStatistics
from effic.passes.quantize import quantize_adadim
from effic.passes.quantize.adadim import RANK, Judge, choose, rounded, spectrum, spectrum_of_moment
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.quantize_adadim import QuantizeAdaDim
from tests.passes.adadim_nets import apply, decoded, linear, output_error, parse, passed, random, run

# -- the invariants of the choice ------------------------------------------------------------------

options = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([16, 20, 32, -1]),
        "symmetric": st.booleans(),
    }
)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([(48, 32), (33, 70), (64, 64)]), options)
def test_error_of_adadim_is_the_least_of_both_dimensions(
    seed: int, shape: tuple[int, int], chosen: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    weight, x = random(*shape, seed=seed), random(40, shape[0], seed=seed + 1)
    weight *= np.exp(rng.standard_normal(shape[1 - seed % 2]).astype(np.float32)).reshape(
        (1, -1) if seed % 2 == 0 else (-1, 1)
    )
    errors = {}
    for dim in ("auto", "oc", "ic"):
        model = linear(weight)
        (remark,) = passed(apply(model, {"x": x}, dim=dim, **chosen)).values()
        errors[dim] = output_error(weight, decoded(model), x)
        if dim == "auto":
            told = remark.data
    assert errors["auto"] == min(errors["oc"], errors["ic"])
    assert told["error_oc"] == pytest.approx(errors["oc"], rel=1e-3)
    assert told["error_ic"] == pytest.approx(errors["ic"], rel=1e-3)
    assert min(told["error_oc"], told["error_ic"]) == told[f"error_{told['axis']}"] == told["output_error"]


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exact_ties_give_oc(value: float, symmetric: bool, bits: int) -> None:
    model = linear(np.full((64, 64), value, np.float32))
    (remark,) = passed(
        apply(model, {"x": random(9, 64)}, bits=bits, symmetric=symmetric, group_size=32)
    ).values()
    assert remark.data["axis"] == "oc"
    assert remark.data["error_oc"] == remark.data["error_ic"]
    assert "oc, for both err the same" in remark.text


def test_choose_takes_ic_only_when_strictly_better() -> None:
    assert choose({"oc": 1.0, "ic": 1.0}) == "oc"
    assert choose({"oc": 1.0, "ic": np.nextafter(1.0, 0)}) == "ic"
    assert choose({"ic": 5.0}) == "ic"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), options)
def test_with_unit_inputs_oc_of_a_matrix_errs_as_ic_of_its_transpose(
    seed: int, chosen: dict[str, Any]
) -> None:
    weight = random(40, 40, seed=seed) * np.exp(random(40, seed=seed + 1))
    eye = {"x": np.eye(40, dtype=np.float32)}
    (one,) = passed(apply(linear(weight), eye, **chosen)).values()
    (other,) = passed(apply(linear(np.ascontiguousarray(weight.T)), eye, **chosen)).values()
    assert one.data["error_oc"] == pytest.approx(other.data["error_ic"], rel=1e-5)
    assert one.data["error_ic"] == pytest.approx(other.data["error_oc"], rel=1e-5)


def fixture(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``[out, in]`` and inputs of the measured cases."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((256, 256)).astype(np.float32)
    x = rng.standard_normal((512, 256)).astype(np.float32)
    columns = [37, 150]
    if "at the outliers" in name:
        x[:, columns] *= 50
    if "x0.05" in name:
        weight[:, columns] *= 0.05
    elif "columns x20" in name:
        weight[:, columns] *= 20
    elif "rows x8" in name:
        weight[::16] *= 8
    return weight, x


@pytest.mark.parametrize(
    ("name", "oc", "ic"),
    [
        ("two columns x0.05, at the outliers", 23.9, 10.1),
        ("two columns x20", 67.5, 39.5),
        ("two columns x20, at the outliers", 7.0e3, 7.5e4),
        ("rows x8", 48.0, 119.0),
        ("plain", 9.76, 9.71),
    ],
)
def test_the_measured_fixtures_come_out_as_measured(name: str, oc: float, ic: float) -> None:
    weight, x = fixture(name)
    (remark,) = passed(
        apply(linear(np.ascontiguousarray(weight.T)), {"x": x}, bits=3, group_size=64, symmetric=False)
    ).values()
    assert remark.data["error_oc"] == pytest.approx(oc, rel=0.35)
    assert remark.data["error_ic"] == pytest.approx(ic, rel=0.35)
    if name != "plain":  # a near tie has no winner
        assert remark.data["axis"] == ("oc" if oc < ic else "ic")


@pytest.mark.parametrize("bits", [3, 4])
def test_outlier_columns_win_for_ic_on_the_default_grid_too(bits: int) -> None:
    weight, x = fixture("two columns x0.05, at the outliers")
    (remark,) = passed(
        apply(linear(np.ascontiguousarray(weight.T)), {"x": x}, bits=bits, group_size=64)
    ).values()
    assert remark.data["axis"] == "ic"
    assert "ic errs" in remark.text
    assert "% less than oc" in remark.text


def test_how_a_weight_is_stored_does_not_change_the_decision() -> None:
    for name in ("two columns x0.05, at the outliers", "rows x8"):
        weight, x = fixture(name)
        turned = np.ascontiguousarray(weight.T)
        left = parse("g (float[K,N] x) => (float[M,N] y) WEIGHTS { y = MatMul (w, x) }", w=weight)
        behind = parse(
            "g (float[N,K] x) => (float[N,M] y) WEIGHTS { t = Transpose <perm=[1,0]> (w)\n y = MatMul (x, t) }",
            w=weight,
        )
        found = []
        for model, feed in (
            (linear(turned), x),
            (linear(weight, "Gemm <transB=1> (x, w)"), x),
            (left, np.ascontiguousarray(x.T)),
            (behind, x),
        ):
            (remark,) = passed(apply(model, {"x": feed}, bits=3, group_size=64)).values()
            found.append(
                (remark.data["axis"], round(remark.data["error_oc"], 3), remark.data["effective_bits"])
            )
        assert len(set(found)) == 1


# -- who takes part --------------------------------------------------------------------------------


def test_a_weight_shared_by_two_nodes_is_decided_once_by_the_sum_of_errors() -> None:
    weight = random(64, 48) * np.exp(random(64, 1, seed=3))
    text = "g (float[N,64] a, float[M,64] b) => (float[N,48] y, float[M,48] z) WEIGHTS"
    model = parse(text + "{ y = MatMul (a, w)\n z = MatMul (b, w) }", w=weight)
    a, b = random(30, 64, seed=1), 9 * random(20, 64, seed=2)
    (remark,) = passed(apply(model, {"a": a, "b": b}, group_size=16)).values()
    assert remark.data["output_error"] == pytest.approx(
        output_error(weight, decoded(model), np.concatenate([a, b])), rel=1e-3
    )
    assert len([s for s in weight_sites(model) if s.encoding is not None]) == 1


TIED = """g (int64[N] ids) => (float[N,V] y) WEIGHTS {
    h = Gather <axis=0> (w, ids)
    r = Relu (h)
    t = Transpose <perm=[1,0]> (w)
    y = MatMul (r, t)
}"""


def test_a_tied_embedding_is_left_alone_unless_asked_for_and_then_decided_once() -> None:
    table = random(80, 32)
    ids = {"ids": np.arange(40, dtype=np.int64)}
    model = parse(TIED, w=table)
    (remark,) = apply(model, ids, group_size=16).items
    assert "ask for it with embeddings=true" in remark.text
    (remark,) = passed(apply(model, ids, group_size=16, embeddings=True)).values()
    x = np.maximum(table[:40], 0)
    assert remark.data["output_error"] == pytest.approx(output_error(table.T, decoded(model).T, x), rel=1e-3)
    assert np.isfinite(run(model, **ids)[0]).all()


def test_a_table_is_judged_by_its_own_error() -> None:
    table = random(80, 32) * np.exp(random(1, 32, seed=5))
    text = "g (int64[N] ids) => (float[N,32] y) WEIGHTS { y = Gather <axis=0> (w, ids) }"
    model = parse(text, w=table)
    ids = {"ids": np.arange(4, dtype=np.int64)}
    (remark,) = passed(apply(model, ids, group_size=16, embeddings=True)).values()
    assert "judged by its own error, since it is a table" in remark.data["fallback"]
    delta = table - decoded(model)
    assert remark.data["output_error"] == pytest.approx(float((delta**2).sum()) / 80, rel=1e-3)


def test_a_weight_inside_an_if_is_judged_by_its_own_error() -> None:
    model = Model(BUILDERS["control_flow"]())
    assert raise_opset(model, 21) is None
    remarks = Remarks()
    calibration = Calibration.load("random", model, samples=2)
    QuantizeAdaDim(group_size=16, min_size=0).apply_with(model, calibration, remarks)
    inside = [r for r in passed(remarks).values() if "cannot be observed" in str(r.data.get("fallback"))]
    assert inside


@pytest.mark.parametrize("base", ["rtn", "gptq"])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_builder_survives(name: str, base: Any) -> None:
    model = Model(BUILDERS[name]())
    assert raise_opset(model, 21) is None
    remarks = Remarks()
    calibration = Calibration.load("random", model, samples=2)
    QuantizeAdaDim(
        base=base,
        scope="block",
        group_size=16,
        min_size=64,
        embeddings=True,
        kinds=("MatMul", "Gemm", "Conv", "ConvTranspose"),
    ).apply_with(model, calibration, remarks)
    assert remarks.count("passed") == sum(site.encoding is not None for site in weight_sites(model)) > 0
    for remark in passed(remarks).values():
        assert remark.data["axis"] in ("oc", "ic")
        assert remark.data["output_error"] >= 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_left_alone(value: float) -> None:
    weight = random(64, 32)
    weight[3, 4] = value
    (remark,) = apply(linear(weight), {"x": random(5, 64)}, group_size=16).items
    assert remark.kind == "missed"
    assert "infinite or not a number" in remark.text


def test_a_dimension_with_few_weights_a_scale_drops_out() -> None:
    (remark,) = passed(apply(linear(random(64, 10)), {"x": random(5, 64)}, group_size=32)).values()
    assert remark.data["axis"] == "oc"
    assert remark.data["error_ic"] is None
    assert "ic would take a scale for every 10 weights" in remark.text
    (remark,) = passed(apply(linear(random(64, 10)), {"x": random(5, 64)}, dim="ic", group_size=32)).values()
    assert remark.data["axis"] == "ic"
    assert "ic, as asked for" in remark.text
    # A group of 8 was asked for, so that ten weights hold two.
    (remark,) = passed(apply(linear(random(64, 10)), {"x": random(5, 64)}, group_size=8)).values()
    assert remark.data["error_ic"] is not None


def test_a_dimension_that_would_grow_drops_out() -> None:
    (remark,) = passed(apply(linear(random(1, 64)), {"x": random(5, 1)}, group_size=32)).values()
    assert remark.data["axis"] == "ic"
    assert "oc would not get smaller" in remark.text
    (remark,) = apply(linear(random(1, 64)), {"x": random(5, 1)}, dim="oc", group_size=32).items
    assert "would grow" in remark.text


@pytest.mark.parametrize("group_size", [48, 100, -1])
@pytest.mark.parametrize("dim", ["oc", "ic"])
@pytest.mark.parametrize("base", ["rtn", "gptq"])
def test_short_last_groups_and_whole_axes(base: Any, dim: Any, group_size: int) -> None:
    weight = random(172, 64)
    model = linear(weight)
    x = random(300, 172)
    (remark,) = passed(apply(model, {"x": x}, base=base, dim=dim, group_size=group_size)).values()
    assert remark.data["axis"] == dim
    assert remark.data["output_error"] == pytest.approx(output_error(weight, decoded(model), x), rel=1e-3)
    np.testing.assert_allclose(run(model, x=x)[0], x @ decoded(model), rtol=1e-4, atol=1e-4)


def test_nothing_is_done_twice_and_data_are_asked_for() -> None:
    model = linear(random(64, 32))
    with pytest.raises(UsageError, match="needs calibration data"):
        QuantizeAdaDim().apply(model, Remarks())
    with pytest.raises(UsageError, match="select=gptq needs base=gptq"):
        QuantizeAdaDim(select="gptq")
    assert apply(model, {"x": random(5, 64)}, group_size=16).count("passed") == 1
    (remark,) = apply(model, {"x": random(5, 64)}, group_size=16).items
    assert "is already encoded" in remark.text


def test_the_weight_is_not_changed_and_half_precision_keeps_its_type() -> None:
    weight = random(64, 32).astype(np.float16)
    before = weight.copy()
    model = linear(weight)
    model.graph.inputs[0].type = model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    x = random(20, 64).astype(np.float16)
    for base in ("rtn", "gptq"):
        copy = model.clone()
        apply(copy, {"x": x}, base=base, group_size=16)
        np.testing.assert_array_equal(weight, before)
        assert decoded(copy).dtype == np.float16


# -- GPTQ --------------------------------------------------------------------------------------------


def correlated(rows: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width // 4)) @ rng.standard_normal((width // 4, width))
    return (x + 0.3 * rng.standard_normal((rows, width))).astype(np.float32)


@pytest.mark.parametrize("select", ["rtn", "gptq"])
@pytest.mark.parametrize("outliers", [False, True])
def test_gptq_errs_less_and_both_figures_are_reported(select: Any, outliers: bool) -> None:
    weight, x = random(96, 80), correlated(500, 96)
    if outliers:
        weight[[5, 60]] *= 0.05
        x[:, [5, 60]] *= 50
    errors = {}
    for dim in ("auto", "oc", "ic"):
        model = linear(weight)
        (remark,) = passed(
            apply(
                model,
                {"x": x},
                base="gptq",
                select=select if dim == "auto" else "rtn",
                dim=dim,
                bits=3,
                group_size=32,
            )
        ).values()
        data = remark.data
        assert data["method"] == "adadim-gptq"
        assert data["damping"] == 0.01
        assert data["error_gptq"] == pytest.approx(output_error(weight, decoded(model), x), rel=1e-2)
        assert data["error_gptq"] < data["error_rtn"]
        assert "less than rounding" in remark.text
        errors[dim] = data["error_gptq"]
        if dim == "auto":
            chosen = data
    by = {a: chosen[f"error_{a}"] for a in ("oc", "ic")}
    assert chosen["axis"] == ("ic" if by["ic"] < by["oc"] else "oc")
    assert errors["auto"] == errors[chosen["axis"]]
    if select == "gptq":
        assert errors["auto"] == min(errors["oc"], errors["ic"]) == min(by.values())
    else:
        assert chosen["error_rtn"] == min(by.values())


def test_gptq_with_uncorrelated_inputs_is_rounding() -> None:
    weight = random(64, 48)
    x = {"x": np.eye(64, dtype=np.float32)}
    models = [linear(weight), linear(weight)]
    apply(models[0], x, group_size=16)
    apply(models[1], x, base="gptq", group_size=16)
    np.testing.assert_array_equal(decoded(models[0]), decoded(models[1]))


# -- the arithmetic ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(33, 70), (64, 8), (7, 300)]),
    st.sampled_from(["oc", "ic"]),
    st.sampled_from([0, 1]),
    options,
    st.sampled_from([np.float32, np.float16]),
)
def test_rows_decode_as_the_whole_does(
    seed: int, shape: tuple[int, int], axis: Any, in_axis: int, chosen: dict[str, Any], dtype: Any
) -> None:
    matrix = random(*shape, seed=seed).astype(dtype)
    grid = Grid(chosen["bits"], chosen["group_size"], chosen["symmetric"])
    candidate = rounded(matrix, axis, in_axis, grid)
    assert candidate is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effic.passes.quantize.adadim._CHUNK", 150)
        pieces = [piece for _, _, piece in candidate.decoded_rows()]
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces), candidate.decode())


def statistics(x: np.ndarray, sketch: np.ndarray | None) -> SiteStatistics:
    moment = (x.T @ x / len(x))[None].astype(np.float32)
    flat = np.abs(x).mean(axis=0)
    return SiteStatistics(
        len(x), None if sketch is not None else moment, sketch, flat, flat, flat, flat, flat
    )


@pytest.mark.parametrize("in_axis", [0, 1])
def test_a_sketch_judges_by_its_diagonal_and_strongest_directions(in_axis: int) -> None:
    x = correlated(400, 64) + 3 * random(1, 64, seed=4)
    sketch = x[:40] / np.sqrt(np.float32(40))
    diagonal, directions = spectrum(sketch, RANK)
    moment = np.diag(diagonal) + directions.T @ directions
    np.testing.assert_allclose(np.diag(moment), np.diag(sketch.T @ sketch), rtol=1e-4)
    weight = random(48, 64)  # [out, in]
    stored = weight if in_axis == 1 else np.ascontiguousarray(weight.T)
    judge, grid = Judge(statistics(x, sketch[None]), in_axis, exact=False), Grid(4, 16)
    for axis in ("oc", "ic"):
        candidate = rounded(stored, axis, in_axis, grid)  # type: ignore[arg-type]
        assert candidate is not None
        delta = weight - (candidate.decode() if in_axis == 1 else candidate.decode().T)
        errors = judge.candidate(stored, candidate)
        assert errors.output == pytest.approx(np.einsum("ok,kl,ol->", delta, moment, delta) / 48, rel=1e-3)
        assert errors.weight == pytest.approx(float((delta**2).sum()), rel=1e-4)
    power = judge.weight(stored)
    assert power.output == pytest.approx(np.einsum("ok,kl,ol->", weight, moment, weight) / 48, rel=1e-3)


def test_a_large_model_is_judged_by_a_sketch_and_decides_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_adadim, "_EXACT_WORK", 0.0)
    for name in ("two columns x0.05, at the outliers", "two columns x20", "rows x8"):
        weight, x = fixture(name)
        stored = np.ascontiguousarray(weight.T)
        found = [
            passed(apply(linear(stored), {"x": x}, bits=3, group_size=64, sketch=sketch))["w"].data
            for sketch in (0, 64)
        ]
        assert found[0]["axis"] == found[1]["axis"]
        for figure in ("error_oc", "error_ic", "output_sqnr_db"):
            assert found[0][figure] == pytest.approx(found[1][figure], rel=0.4)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("select", ["rtn", "gptq"])
def test_in_a_large_model_the_figures_of_gptq_are_those_of_the_second_moment(
    monkeypatch: pytest.MonkeyPatch, select: Any, dead: bool
) -> None:
    weight, x = random(96, 80), correlated(500, 96)
    if dead:
        x[:, [3, 50]] = 0
    found = []
    for work in (1e30, 0.0):
        monkeypatch.setattr(quantize_adadim, "_EXACT_WORK", work)
        options = {"base": "gptq", "select": select, "bits": 3, "group_size": 32}
        found.append(passed(apply(linear(weight), {"x": x}, **options))["w"].data)
    assert found[0]["axis"] == found[1]["axis"]
    assert found[1]["error_gptq"] == pytest.approx(found[0]["error_gptq"], rel=1e-3)
    # Many directions here; the approximation keeps four of 24.
    assert found[1]["error_rtn"] == pytest.approx(found[0]["error_rtn"], rel=0.1)


def test_the_strongest_directions_of_a_second_moment_are_found() -> None:
    x = correlated(400, 64) + 3 * random(1, 64, seed=4)
    moment = (x.T @ x / 400).astype(np.float32)
    diagonal, directions = spectrum_of_moment(moment, 4)
    values = np.linalg.eigvalsh(moment.astype(np.float64))[::-1]
    np.testing.assert_allclose((directions**2).sum(axis=1), values[:4], rtol=2e-2)
    np.testing.assert_allclose(diagonal + (directions**2).sum(axis=0), np.diag(moment), rtol=1e-3)


# -- real models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "data", "given"),
    [
        ("stories260k.onnx", "stories/ids_calib.npy", {"group_size": 32, "embeddings": True}),
        ("resnet20_cifar.onnx", "cifar10/calib_lossless.npz", {"group_size": 32, "kinds": ("Conv", "Gemm")}),
    ],
)
def test_adadim_is_no_worse_than_the_better_dimension_at_every_site(
    data_dir: Path, file: str, data: str, given: dict[str, Any]
) -> None:
    from effic.ir.onnx_format import read_onnx
    from effic.passes.pipeline import run_passes
    from effic.passes.spec import parse_passes

    model = read_onnx(data_dir / "onnx" / file)
    assert raise_opset(model, 21) is None
    run_passes(model, parse_passes("eliminate-identities,fold-constants,canonicalize-linear"), check="off")
    if data.endswith(".npz"):
        with np.load(data_dir / data) as images:
            x = images["image"][:8].transpose(0, 3, 1, 2).astype(np.float32) / 255
        mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / deviation[:, None, None]
        calibration = Calibration.of([{str(model.graph.inputs[0].name): x}])
    else:
        calibration = Calibration.load(str(data_dir / data), model, samples=4)
    remarks: dict[str, dict[str, Remark]] = {}
    sites = {site.name: site for site in weight_sites(model)}
    quantized = {}
    for dim in ("auto", "oc", "ic"):
        copy, collected = model.clone(), Remarks()
        QuantizeAdaDim(dim=dim, **given).apply_with(copy, calibration, collected)  # type: ignore[arg-type]
        remarks[dim] = passed(collected)
        quantized[dim] = {s.name: decode(s.encoding) for s in weight_sites(copy) if s.encoding is not None}
    assert len(remarks["auto"]) >= 18
    chosen = [sites[name] for name in remarks["auto"]]
    for site, seen in calibration.walk(model, chosen):

        def error(dim: str, site: WeightSite = site, seen: SiteStatistics = seen) -> float:
            with site.matrix() as matrix:
                delta = matrix - quantized[dim][site.name].reshape(matrix.shape)
            return seen.output_error(delta if site.in_axis == 1 else delta.T)

        best = (
            min(error("oc"), error("ic"))
            if remarks["auto"][site.name].data["error_ic"] is not None
            else error("oc")
        )
        assert error("auto") <= best * (1 + 1e-6), site.name
    won = {r.data["axis"] for r in remarks["auto"].values()}
    assert won == {"oc", "ic"}, "both dimensions win somewhere"
