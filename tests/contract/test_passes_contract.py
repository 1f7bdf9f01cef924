"""What holds for every pass of the table, on every seeded model."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Sequence

import pytest

from effic.ir.model import Model
from effic.ir.verify import problems
from effic.models.builders import BUILDERS
from effic.passes import PASSES, load_pass
from effic.passes.base import CalibratedPass, Numerics, Pass, options_of
from effic.passes.calibration import Calibration
from effic.passes.pipeline import Checker, run_passes
from effic.passes.presets import PRESETS
from effic.passes.spec import parse_passes, to_text


def made_up(model: Model, passes: Sequence[Pass]) -> Calibration | None:
    """Random samples, where a pass asks to see data."""
    if not any(isinstance(item, CalibratedPass) for item in passes):
        return None
    return Calibration.load("random", model, samples=4)


@pytest.mark.parametrize("name", PASSES)
def test_one_name_in_four_places(name: str) -> None:
    cls = load_pass(name)
    assert cls.name == name
    module = importlib.import_module(cls.__module__)
    assert module.__name__.rsplit(".", 1)[-1] == name.replace("-", "_")
    assert cls.__name__.lower() == name.replace("-", "")


@pytest.mark.parametrize("name", PASSES)
def test_pass_is_a_documented_frozen_value(name: str) -> None:
    cls = load_pass(name)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert isinstance(cls.numerics, Numerics)
    assert cls.__doc__
    assert "Before" in cls.__doc__, "before and after are shown the same way everywhere"
    assert len(inspect.getdoc(cls).splitlines()[0]) <= 100  # type: ignore[union-attr]
    for field, _ in options_of(cls):
        assert field.metadata.get("help"), f"{name}.{field.name} has no help"
    assert parse_passes(to_text(cls())) == [cls()]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("built", sorted(BUILDERS))
def test_pass_is_verified_checked_and_idempotent(name: str, built: str) -> None:
    model = Model(BUILDERS[built]())
    item: Pass = load_pass(name)()
    data = made_up(model, [item])
    run_passes(model, [item], checker=Checker(model), calibration=data)
    assert not list(problems(model))
    second = run_passes(model, [item], check="off", calibration=data).steps[0]
    assert not second.changed, [r for r in second.remarks if r.kind == "passed"][:3]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_give_reasons(name: str) -> None:
    assert parse_passes(PRESETS[name].text)
    assert all(reason for _, reason in PRESETS[name].lines)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("built", sorted(BUILDERS))
def test_presets_keep_every_seeded_model_right(name: str, built: str) -> None:
    model = Model(BUILDERS[built]())
    passes = parse_passes(PRESETS[name].text)
    run_passes(model, passes, checker=Checker(model), calibration=made_up(model, passes))
