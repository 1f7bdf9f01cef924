"""The conformance kit of effic, and what this pass and this target do."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from effic_plugin_example.my_pass import MyPass

from effic.backends import get_backend
from effic.ir.model import Model
from effic.testing import (
    MODELS,
    check_documented,
    check_pass,
    check_refused,
    check_target,
    check_text_form,
    seeded_model,
)


def model(body: str, outputs: str = "float[N,4] y") -> Model:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,4] a, float[N,4] b) => ({outputs}) {{ {body} }}'
    return Model(ir.from_onnx_text(text))


def test_it_is_documented_and_has_a_text_form() -> None:
    check_documented(MyPass)
    check_text_form(MyPass())
    check_text_form(MyPass(skip=("head*", "tail")))


@pytest.mark.parametrize("name", MODELS)
def test_the_pass_keeps_every_seeded_model_right(name: str) -> None:
    check_pass(MyPass(), seeded_model(name))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", ["my-target", 'my-target{note="for the shop"}'])
def test_the_target_runs_every_seeded_model(name: str, text: str) -> None:
    check_target(get_backend(text), seeded_model(name))


@pytest.mark.parametrize("body", ["n = Neg(b) y = Add(a, n)", "n = Neg(b) y = Add(n, a)"])
def test_an_added_negation_becomes_a_subtraction(body: str) -> None:
    found = model(body)
    step = check_pass(MyPass(), found)
    assert step.changed
    assert step.verdict == "exact"
    assert [node.op_type for node in found.nodes()] == ["Sub"]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("n = Neg(b) h = Add(a, n) y = Mul(h, n)", "float[N,4] y", "read 2 times"),
        ("n = Neg(b) y = Add(a, n)", "float[N,4] y, float[N,4] n", "an output of the model"),
    ],
)
def test_a_refusal_says_why(body: str, outputs: str, reason: str) -> None:
    check_refused(MyPass(), model(body, outputs), reason)
