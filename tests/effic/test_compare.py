"""How far two models' outputs lie apart, and when they cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effic.compare import Bounds, compare
from effic.ir.errors import InvalidModelError, NotMeasuredError, UsageError
from effic.ir.model import Model

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def save(path: Path, text: str) -> Path:
    Model(ir.from_onnx_text(HEAD + text)).save(path)
    return path


def linear(path: Path, body: str, *, x: str = "float[B, 4] x", y: str = "float[B, 4] y") -> Path:
    return save(path, f"net ({x}) => ({y}) {{ {body} }}")


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return linear(tmp_path / "a.onnx", "y = Exp(x)")


def test_a_model_equals_itself(a: Path) -> None:
    found = compare(a, a, bounds=Bounds(max_abs=0, rtol=0, min_sqnr=300, min_cosine=1, min_top1=1))
    assert found.broken == []
    assert found.outputs["y"].exact
    assert "4 seeded random sets" in found.inputs
    assert "default optimisation" in found.engine
    assert "as written" in compare(a, a, as_written=True).engine


def test_distances_and_bounds(a: Path, tmp_path: Path) -> None:
    b = linear(tmp_path / "b.onnx", "c = Constant <value_float: float = 0.5> () e = Exp(x) y = Add(e, c)")
    distance = compare(a, b).outputs["y"]
    assert distance.max_abs == pytest.approx(0.5, abs=1e-5)
    assert distance.top1 == 1.0
    assert compare(a, b).broken == []
    bounds = Bounds(max_abs=0.1, rtol=1e-3, min_sqnr=60, min_cosine=0.99999)
    broken = compare(a, b, bounds=bounds).broken
    assert len(broken) == 4
    assert broken[0].startswith("output 'y' differs by 0.5, at most 0.1 is allowed")
    assert compare(a, b, bounds=Bounds(max_abs=0.6)).broken == []
    flipped = linear(tmp_path / "c.onnx", "n = Neg(x) y = Exp(n)")
    assert any("top entries" in text for text in compare(a, flipped, bounds=Bounds(min_top1=0.9)).broken)


def test_given_inputs(a: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((3, 4), np.float32))
    found = compare(a, a, inputs=tmp_path / "data.npz")
    assert found.inputs.endswith("data.npz")
    assert compare(a, a, inputs={"x": np.zeros((3, 4), np.float32)}).outputs["y"].exact
    with pytest.raises(UsageError, match="lack 'x'"):
        compare(a, a, inputs={"z": np.zeros((3, 4), np.float32)})


def test_seeds_change_the_inputs(a: Path, tmp_path: Path) -> None:
    b = linear(tmp_path / "b.onnx", "y = Relu(x)")
    assert compare(a, b, seed=0) == compare(a, b, seed=0)
    assert compare(a, b, seed=0, count=1).outputs != compare(a, b, seed=1, count=1).outputs
    with pytest.raises(UsageError, match="at least 1"):
        compare(a, b, count=0)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        ("float[B, 5] x", "'x' is"),
        ("float[B, 4, 1] x", "'x' is"),
        ("double[B, 4] x", "'x' is"),
        ("float[B, 4] z", "which"),
        ("float[B, 4] x, float[B] mask", "'mask'"),
    ],
)
def test_other_inputs_cannot_be_compared(a: Path, tmp_path: Path, x: str, what: str) -> None:
    name = "z" if " z" in x else "x"
    b = linear(tmp_path / "b.onnx", f"c = Exp({name}) y = Cast <to: int = 1> (c)", x=x, y="float y")
    for left, right in ((a, b), (b, a)):
        with pytest.raises(UsageError) as caught:
            compare(left, right)
        assert str(caught.value).startswith("the models take different inputs")
        assert what in str(caught.value)


def test_a_fixed_size_beside_a_dynamic_one(a: Path, tmp_path: Path) -> None:
    fixed = linear(tmp_path / "b.onnx", "y = Exp(x)", x="float[7, 4] x", y="float[7, 4] y")
    assert compare(a, fixed).outputs["y"].exact
    assert compare(fixed, a).outputs["y"].exact


def test_outputs_are_paired_by_name_then_by_place(a: Path, tmp_path: Path) -> None:
    renamed = linear(tmp_path / "b.onnx", "out = Exp(x)", y="float[B, 4] out")
    found = compare(a, renamed)
    assert found.notes == ["the outputs have different names and were paired by position"]
    assert found.outputs["y"].exact
    two = linear(tmp_path / "c.onnx", "y = Exp(x) z = Relu(x)", y="float[B, 4] y, float[B, 4] z")
    with pytest.raises(UsageError, match=r"1 outputs and .* has 2"):
        compare(a, two)


def test_what_no_bound_excuses(a: Path, tmp_path: Path) -> None:
    other_shape = linear(tmp_path / "b.onnx", "y = Transpose(x)", y="float[4, B] y")
    assert any("shape" in text for text in compare(a, other_shape).broken)
    not_a_number = linear(tmp_path / "c.onnx", "y = Sqrt(x)")
    assert any("NaN" in text for text in compare(a, not_a_number).broken)


def test_integers(tmp_path: Path) -> None:
    a = linear(tmp_path / "a.onnx", "y = Cast <to: int = 7> (x)", y="int64[B, 4] y")
    b = linear(tmp_path / "b.onnx", "n = Neg(x) y = Cast <to: int = 7> (n)", y="int64[B, 4] y")
    found = compare(a, b, bounds=Bounds(max_abs=1))
    assert found.outputs["y"].wrong_integers > 0
    assert "integer entries" in found.broken[0]


def test_unusable_files(a: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        compare(a, tmp_path / "nowhere.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x0anonsense")
    with pytest.raises(InvalidModelError):
        compare(a, tmp_path / "bad.onnx")
    path = tmp_path / "odd.onnx"
    text = "net (float[B, 4] x) => (float[B, 4] y) { y = someone.Mystery(x) }"
    Model(ir.from_onnx_text(HEAD.replace("20]", '20, "someone" : 1]') + text)).save(path)
    with pytest.raises(NotMeasuredError):
        compare(path, path)


def test_the_comparison_is_json(a: Path) -> None:
    data = json.loads(json.dumps(compare(a, a).to_dict(), allow_nan=False))
    assert data["broken"] == []
    assert data["outputs"]["y"]["max_abs"] == 0
