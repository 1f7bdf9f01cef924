"""The conformance kit finds what it is for: each check fails on a pass that was made to break it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import pytest

from effic.backends.base import Backend
from effic.backends.ort.targets import Portable
from effic.ir.errors import CheckFailedError
from effic.ir.model import Model
from effic.passes.base import Numerics, Pass, Remarks
from effic.passes.cleanup.eliminate_identities import EliminateIdentities
from effic.testing import (
    MODELS,
    check_documented,
    check_pass,
    check_refused,
    check_target,
    check_text_form,
    seeded_model,
    seeded_models,
)


def model(body: str = "h = Relu(x) y = Exp(h)") -> Model:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,4] x) => (float[N,4] y) {{ {body} }}'
    return Model(ir.from_onnx_text(text))


def rewrite(found: Model, old: str, new: str) -> bool:
    """Exchange the operator of the first node that has it."""
    node = next(found.nodes(old), None)
    if node is not None:
        node.op_type = new
    return node is not None


@dataclass(frozen=True)
class Good(Pass):
    """A pass that keeps every promise.

    Before:  y = Relu(x)
    After:   y = Abs(x)

    Missed never.
    """

    name: ClassVar[str] = "good"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def apply(self, model: Model, remarks: Remarks) -> None:
        for node in list(model.nodes("Relu")):
            node.op_type = "Abs"
            remarks.passed(node, "rewritten")


class Lying(Good):
    numerics: ClassVar[Numerics] = Numerics.EXACT


class Silent(Good):
    def apply(self, model: Model, remarks: Remarks) -> None:
        rewrite(model, "Relu", "Abs")


class Boasting(Good):
    def apply(self, model: Model, remarks: Remarks) -> None:
        remarks.passed("the model", "did a lot")


class Restless(Good):
    def apply(self, model: Model, remarks: Remarks) -> None:
        if rewrite(model, "Relu", "Abs") or rewrite(model, "Abs", "Relu"):
            remarks.passed("the model", "turned over")


class Mumbling(Good):
    def apply(self, model: Model, remarks: Remarks) -> None:
        remarks.missed("the model", " ")


class Nowhere(Good):
    def apply(self, model: Model, remarks: Remarks) -> None:
        remarks.missed("", "cannot")


class Renaming(Good):
    def apply(self, model: Model, remarks: Remarks) -> None:
        if model.graph.inputs[0].name == "x":
            model.graph.inputs[0].name = "other"
            remarks.passed("x", "renamed")


def test_a_good_pass_conforms() -> None:
    check_documented(Good)
    assert check_pass(Good(), model()).changed
    assert not check_pass(Good(), model("y = Exp(x)")).changed


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Lying, "good broke the model"),
        (Silent, "left no remark"),
        (Boasting, "says it did something and changed nothing"),
        (Restless, "not idempotent: run again, it changed .*turned over"),
        (Mumbling, "without a reason"),
        (Nowhere, "names no place"),
        (Renaming, "changed the model.s inputs or outputs"),
    ],
)
def test_a_broken_promise_is_named(kind: type[Good], said: str) -> None:
    with pytest.raises((AssertionError, CheckFailedError), match=said):
        check_pass(kind(), model())


def test_a_refusal_has_to_say_the_reason() -> None:
    with pytest.raises(AssertionError, match="does not say 'because'"):
        check_refused(Good(), model("y = Exp(x)"), "because")
    with pytest.raises(AssertionError, match="changed what it has to refuse"):
        check_refused(Good(), model(), "because")


def test_documentation_has_its_parts() -> None:
    @dataclass(frozen=True)
    class Bare(Good):
        pass

    @dataclass(frozen=True)
    class Long(Good):
        __doc__ = "x" * 101 + "\n\nBefore After Missed"

    @dataclass(frozen=True)
    class Helpless(Good):
        __doc__ = Good.__doc__
        bits: int = 4

    Bare.__doc__ = None
    for kind, said in ((Bare, "no 'Before'"), (Long, "101 characters"), (Helpless, "bits has no help")):
        with pytest.raises(AssertionError, match=said):
            check_documented(kind)


def test_the_text_form_has_to_lead_back() -> None:
    class Impostor(EliminateIdentities):
        pass

    check_text_form(EliminateIdentities())
    with pytest.raises(AssertionError, match="eliminate-identities parses to"):
        check_text_form(Impostor())


class Wrong(Portable):
    """A target that computes something else."""

    def lower(self, model: Model, remarks: Remarks) -> Model:
        rewrite(model, "Relu", "Abs")
        return model


class Growing(Portable):
    """A target that never ends."""

    def lower(self, model: Model, remarks: Remarks) -> Model:
        rewrite(model, "Relu", "Neg") or rewrite(model, "Neg", "Relu")
        return model


@pytest.mark.parametrize(
    ("kind", "said"), [(Wrong, "wanted is 30.0 dB"), (Growing, "second time changes the model")]
)
def test_a_target_that_breaks_the_model_is_named(
    kind: type[Backend], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effic.testing.get_backend", lambda text: target)
    target = kind()
    with pytest.raises(AssertionError, match=said):
        check_target(target, model())


def test_seeded_models_are_fresh_each_time() -> None:
    assert len(seeded_models()) == len(MODELS)
    assert seeded_model("cnn") is not seeded_model("cnn")
