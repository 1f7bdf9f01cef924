"""Text form of passes: both ways, and helpful about mistakes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.spec import build, parse_one, parse_passes, read_recipe, to_text


@dataclass(frozen=True)
class Sample(Pass):
    """A pass with one option of each kind."""

    name: ClassVar[str] = "sample"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    bits: Literal[2, 4, 8] = option(4, help="bits")
    size: int = option(128, help="size", ge=-1, le=4096)
    ratio: float = option(0.5, help="ratio", ge=0.0, le=1.0)
    fast: bool = option(False, help="fast")
    label: str = option("x", help="label")
    skip: tuple[str, ...] = option((), help="skip")

    def apply(self, model: Model, remarks: Remarks) -> None:
        """Nothing."""


def parse(text: str) -> Sample:
    name, at, options = parse_one(text)
    return build(Sample, name, options, text, at)


@given(
    st.builds(
        Sample,
        bits=st.sampled_from([2, 4, 8]),
        size=st.integers(-1, 4096),
        ratio=st.floats(0, 1),
        fast=st.booleans(),
        label=st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), min_size=1),
        skip=st.lists(st.text('abc.*{},[]"\\= ', min_size=1)).map(tuple),
    )
)
def test_text_form_round_trips(value: Sample) -> None:
    assert parse(to_text(value)) == value


def test_defaults_are_left_out() -> None:
    assert to_text(Sample()) == "sample"
    assert to_text(Sample(bits=8, skip=("a", "*.b"))) == "sample{bits=8,skip=[a,*.b]}"


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("sample{bitz=4}", "did you mean 'bits'?", 7),
        ("sample{bits=5}", "allowed are 2, 4, 8", 7),
        ("sample{size=-2}", "the least is -1", 7),
        ("sample{size=four}", "no integer", 7),
        ("sample{ratio=1.5}", "the most is 1.0", 7),
        ("sample{ratio=nan}", "is nan, which is no number", 7),
        ("sample{fast=yes}", "allowed are true, false", 7),
        ("sample{bits=4", "expected ',' or '}'", 13),
        ("sample{bits=4,bits=8}", "given twice", 14),
        ("sample{bits}", "expected '=' after bits", 11),
        ('sample{label="x}', "never closed", 13),
        ("sample{bits=4}}", "expected ',' and another pass", 14),
        ("", "empty", None),
    ],
)
def test_mistakes_show_a_caret(text: str, message: str, column: int | None) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert message in str(error.value)
    if column is not None:
        assert str(error.value).splitlines()[-1].index("^") - 2 == column


def test_unknown_pass_proposes_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'fuse-conv-bn'"):
        parse_passes("eliminate-dead-code,fuse-conv-bm")


def test_options_are_checked_in_python_too() -> None:
    with pytest.raises(UsageError, match="sample: bits is 3, allowed are 2, 4, 8"):
        Sample(bits=3)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample().size = 3  # type: ignore[misc]


def test_recipe(tmp_path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'target = "portable"\n[[pass]]\nname = "eliminate-dead-code"\n'
        '[[pass]]\nname = "quantize-rtn"\nbits = 8\nskip = ["*.head"]\n'
    )
    recipe = read_recipe(path)
    assert recipe["target"] == "portable"
    assert to_text(recipe["passes"]) == "eliminate-dead-code,quantize-rtn{bits=8,skip=[*.head]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taget = 'x'", "did you mean 'target'"),
        ("[[pass]]\nbits = 4", "number 1 needs a name"),
        ("[[pass]]\nname = 'quantize-rtn'\nbits = 5", "allowed are"),
        ("check = 'never'", "allowed are each, final, off"),
        ("pass = 3", "expected list"),
        ("target = 'portable'", "has no pass"),
        ("= 3", "cannot read the recipe"),
    ],
)
def test_broken_recipes_are_one_sentence(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recipe(path)
