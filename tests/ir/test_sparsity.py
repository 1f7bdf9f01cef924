"""N:M patterns: parsing, groups, masks, and what a model declares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import (
    SPARSITY_KEY,
    Pattern,
    along_groups,
    broken,
    by_reduction,
    declare,
    declared,
    density_mask,
    follows,
    from_reduction,
    nm_mask,
    reduction_length,
    violations,
)
from effic.ir.weights import weight_sites

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 16), (5, 7), (16, 40), (1, 33)]


@st.composite
def scores(draw: st.DrawFn) -> tuple[np.ndarray, Pattern]:
    pattern = Pattern(*draw(st.sampled_from(PATTERNS)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 3 * pattern.m + 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 1000]))  # few levels make ties
    return rng.integers(0, levels, (rows, columns)).astype(np.float32), pattern


def by_hand(score: np.ndarray, pattern: Pattern) -> np.ndarray:
    mask = np.zeros(score.shape, bool)
    for row, out in zip(score, mask, strict=True):
        for start in range(0, len(row), pattern.m):
            group = row[start : start + pattern.m]
            best = sorted(range(len(group)), key=lambda i: (-group[i], i))[: pattern.n]
            out[[start + i for i in best]] = True
    return mask


@settings(deadline=None)
@given(scores())
def test_the_mask_is_the_one_made_by_hand(given: tuple[np.ndarray, Pattern]) -> None:
    score, pattern = given
    mask = nm_mask(score, pattern)
    np.testing.assert_array_equal(mask, by_hand(score, pattern))
    np.testing.assert_array_equal(nm_mask(score.T, pattern, axis=0), mask.T)


@settings(deadline=None)
@given(scores())
def test_every_full_group_has_exactly_n_bits_even_where_scores_are_zero(
    given: tuple[np.ndarray, Pattern],
) -> None:
    score, pattern = given
    mask = nm_mask(score, pattern)
    full = score.shape[1] // pattern.m * pattern.m
    counts = mask[:, :full].reshape(len(score), -1, pattern.m).sum(axis=2)
    assert (counts == pattern.n).all()
    assert (mask[:, full:].sum(axis=1) == min(pattern.n, score.shape[1] - full)).all()
    assert follows(score * mask, pattern)


@settings(deadline=None)
@given(scores())
def test_a_mask_of_infinite_and_tiny_scores_and_its_own_mask(given: tuple[np.ndarray, Pattern]) -> None:
    score, pattern = given
    score = np.where(score > 1, np.inf, score * np.float32(1e-45))
    mask = nm_mask(score, pattern)
    np.testing.assert_array_equal(mask, by_hand(score, pattern))
    np.testing.assert_array_equal(nm_mask(mask.astype(np.float32), pattern), mask)


def test_a_large_array_is_masked_in_pieces_like_a_small_one() -> None:
    rng = np.random.default_rng(0)
    score = rng.random((7, 40_003), np.float32)
    mask = nm_mask(score, Pattern(2, 4))
    np.testing.assert_array_equal(mask, by_hand(score, Pattern(2, 4)))
    stored = rng.random((13, 30_000), np.float32)
    np.testing.assert_array_equal(
        nm_mask(stored, Pattern(1, 4), axis=0), nm_mask(np.ascontiguousarray(stored.T), Pattern(1, 4)).T
    )


def test_groups_in_the_middle_axis() -> None:
    score = np.random.default_rng(0).random((3, 9, 5), np.float32)
    mask = nm_mask(score, Pattern(2, 4), axis=1)
    np.testing.assert_array_equal(
        mask.transpose(0, 2, 1), nm_mask(score.transpose(0, 2, 1).copy(), Pattern(2, 4))
    )
    assert nm_mask(np.zeros((3, 0), np.float32), Pattern(2, 4)).shape == (3, 0)


@settings(deadline=None)
@given(scores(), st.floats(0, 1), st.sampled_from(["row", "matrix"]))
def test_a_density_mask_keeps_the_largest_and_no_more(
    given: tuple[np.ndarray, Pattern], density: float, compare: str
) -> None:
    score, _ = given
    mask = density_mask(score, density, compare=compare)  # type: ignore[arg-type]
    rows, bits = (score, mask) if compare == "row" else (score.reshape(1, -1), mask.reshape(1, -1))
    for row, kept in zip(rows, bits, strict=True):
        count = int(np.ceil(density * len(row) - 1e-9))
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
        assert sorted(np.flatnonzero(kept)) == sorted(best)


@settings(deadline=None)
@given(scores())
def test_violations_are_counted_as_by_hand(given: tuple[np.ndarray, Pattern]) -> None:
    score, pattern = given
    score[:, ::3] = 0
    groups = [row[i : i + pattern.m] for row in score for i in range(0, len(row), pattern.m)]
    count = sum(int(np.count_nonzero(group)) > pattern.n for group in groups)
    assert violations(score, pattern) == (count, len(groups))
    assert violations(score.T, pattern, axis=0) == (count, len(groups))
    assert follows(score, pattern) == (count == 0)


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:16"])
def test_a_pattern_is_its_text(text: str) -> None:
    assert str(Pattern.parse(text)) == text
    assert Pattern.parse("2:4").density == 0.5


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:4", "0:4", "2:0", "-1:4", "a:b", "5:4", "2:4:8", "²:4"]
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        Pattern.parse(text)


def shapes_model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        oh.make_node("Conv", ["x", "conv"], ["a"], group=2, pads=[1, 1, 1, 1]),
        oh.make_node("ConvTranspose", ["a", "transposed"], ["b"], group=2),
        oh.make_node("MatMul", ["b", "right"], ["c"]),
        oh.make_node("MatMul", ["left", "c"], ["d"]),
        oh.make_node("Reshape", ["d", "flat"], ["e"]),
        oh.make_node("Gemm", ["e", "gemm"], ["y"], transB=1),
    ]
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", 1, [1, 8, 5, 5])],
        [oh.make_tensor_value_info("y", 1, None)],
        [
            weight("conv", 6, 4, 3, 3),
            weight("transposed", 6, 5, 2, 2),
            weight("right", 6, 9),
            weight("left", 4, 6),
            weight("gemm", 3, 9),
            onnx.numpy_helper.from_array(np.array([-1, 9]), "flat"),
        ],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)


def test_groups_run_along_the_summed_dimension(tmp_path: Path) -> None:
    onnx.save(shapes_model(), tmp_path / "m.onnx")
    sites = {site.name: site for site in weight_sites(read_onnx(tmp_path / "m.onnx"))}
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in shapes_model().graph.initializer}
    want = {
        "conv": stored["conv"].transpose(0, 2, 3, 1).reshape(-1, 4),
        # Input channels of a convolution group, one row per output position: any order of rows will do.
        "transposed": stored["transposed"].reshape(2, 3, 20).transpose(2, 0, 1).reshape(-1, 3),
        "right": stored["right"].T,
        "left": stored["left"],
        "gemm": stored["gemm"],
    }
    for name, rows in want.items():
        site = sites[name]
        got = by_reduction(site, site.read())
        np.testing.assert_array_equal(got, rows, err_msg=name)
        np.testing.assert_array_equal(from_reduction(site, got), site.read(), err_msg=name)
        assert reduction_length(site) == rows.shape[1]
        with site.matrix() as matrix:
            mask = nm_mask(np.abs(along_groups(site, matrix)), Pattern(1, 2), axis=1).reshape(matrix.shape)
        mask = mask if site.in_axis == 1 else mask.T
        np.testing.assert_array_equal(mask, from_reduction(site, nm_mask(np.abs(rows), Pattern(1, 2))))


def test_declarations_survive_the_file_and_are_checked(tmp_path: Path) -> None:
    proto = shapes_model()
    for weight in proto.graph.initializer:
        if weight.name == "gemm":
            array = onnx.numpy_helper.to_array(weight).copy()
            array[:, 2::3] = 0
            array[0, 2] = 1
            weight.CopyFrom(onnx.numpy_helper.from_array(array, "gemm"))
    onnx.save(proto, tmp_path / "m.onnx")
    model = read_onnx(tmp_path / "m.onnx")
    assert declared(model) == {}
    assert broken(model) == []
    declare(model, "gemm", Pattern(2, 3))
    declare(model, "conv", Pattern(2, 4))
    declare(model, "nobody", Pattern(2, 4))
    declare(model, "nobody", None)
    model.save(tmp_path / "out.onnx")
    again = read_onnx(tmp_path / "out.onnx")
    assert declared(again) == {"gemm": Pattern(2, 3), "conv": Pattern(2, 4)}
    assert broken(again) == [("conv", Pattern(2, 4), 54, 54), ("gemm", Pattern(2, 3), 1, 9)]
    assert broken(again, ["gemm"]) == [("gemm", Pattern(2, 3), 1, 9)]
    assert declared(again.clone()) == declared(again)
    declare(again, "gemm", None)
    declare(again, "conv", None)
    assert SPARSITY_KEY not in again.ir.metadata_props


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"w": "4:4"}', '{"w": 3}', "[" * 100_000])
def test_what_others_wrote_under_the_key_does_no_harm(tmp_path: Path, text: str) -> None:
    onnx.save(shapes_model(), tmp_path / "m.onnx")
    model = read_onnx(tmp_path / "m.onnx")
    model.ir.metadata_props[SPARSITY_KEY] = text
    assert declared(model) == {}
    assert broken(model) == []


@pytest.mark.parametrize(
    "text", ["[" * 5000, "[1]", '{"w": 3}', '{"\\ud800": "2:4"}', '{"": "2:4"}', '{"w": "4:2"}']
)
def test_what_declares_nothing_is_left_out(text: str) -> None:
    model = Model(
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Abs(x) }'
        )
    )
    model.ir.metadata_props[SPARSITY_KEY] = text
    assert declared(model) == {}
