"""bisect: planted faults are found, in few evaluations, and what is not there is not found."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import effic
from effic.bisect import Finding, bisect
from effic.cli.main import main
from effic.compare import Bounds
from effic.guard import Accuracy
from effic.ir.errors import UsageError
from effic.ir.model import constant_tensor
from effic.ir.weights import WeightSite, weight_sites
from effic.models import digits_path, digits_test
from effic.partial import literal
from effic.passes.base import Numerics, Pass, Remarks, matches, option

DIGITS = digits_path()
CLEAN = "eliminate-dead-code,eliminate-identities,fold-constants,fuse-conv-bn"


def rewrite(model: effic.Model, name: str, change: object) -> None:
    site = next(s for s in weight_sites(model) if s.name == name)
    tensor = constant_tensor(site.value)
    assert tensor is not None
    site.value.const_value = ir.Tensor(change(tensor.numpy()), name=name)  # type: ignore[operator]


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round all weights to 12 bits of mantissa, and one of them to nonsense."""

    name: ClassVar[str] = "round-weights"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    fault: str = option("", help="the weight to spoil")
    skip: tuple[str, ...] = option((), help="left alone")

    def apply(self, model: effic.Model, remarks: Remarks) -> None:
        for site in list(weight_sites(model)):
            if matches(site.name, self.skip):
                continue
            scale = 3.0 if site.name == self.fault else 1.0
            rewrite(model, site.name, lambda w, s=scale: (w.astype(np.float16) * s).astype(np.float32))
            remarks.passed(site.name, "rounded")


@dataclass(frozen=True)
class FlipWeight(Pass):
    """Turn one square weight round, and copy the others: a fault without an option skip."""

    name: ClassVar[str] = "flip-weight"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    fault: str = option("", help="the weight to flip")

    def apply(self, model: effic.Model, remarks: Remarks) -> None:
        for site in list(weight_sites(model)):
            flip = site.name == self.fault
            rewrite(model, site.name, lambda w, f=flip: np.ascontiguousarray(w[..., ::-1] if f else w))
            remarks.passed(site.name, "copied")


def clean() -> list[WeightSite]:
    model = effic.read_onnx(DIGITS)
    effic.run_passes(model, effic.parse_passes(CLEAN), check="off")
    return weight_sites(model)


SITES = [site.name for site in clean()]
WIDE = [site.name for site in clean() if site.shape[-1] > 1]
"""Where flipping the last axis changes anything."""


@pytest.mark.parametrize(
    ("kind", "fault"), [*((RoundWeights, n) for n in SITES), *((FlipWeight, n) for n in WIDE)]
)
def test_a_planted_fault_is_found(fault: str, kind: type[RoundWeights] | type[FlipWeight]) -> None:
    sequence = [*effic.parse_passes(CLEAN), kind(fault=fault), *effic.parse_passes("eliminate-dead-code")]
    found = bisect(DIGITS, sequence, bounds=Bounds(min_sqnr=35))
    assert (found.number, found.sites, found.alone, found.mended) == (5, (fault,), True, True)
    assert fault in found.sentence
    # P + 2·log2(S), and two to know the ends and one to see what is left without the site.
    assert found.evaluations <= len(sequence) + 2 * math.log2(len(SITES)) + 3
    if kind is RoundWeights:
        assert found.passes is not None
        assert f"skip=[{literal(fault)}]" in found.passes.replace('"', "")


def test_by_a_metric() -> None:
    images, labels = digits_test()
    wanted = Accuracy("top1", {"x": images, "labels": labels}, max_drop=2)
    sequence = [*effic.parse_passes(CLEAN), RoundWeights(), FlipWeight(fault=SITES[0])]
    found = bisect(DIGITS, sequence, accuracy=wanted)
    assert (found.number, found.sites, found.alone) == (6, (SITES[0],), True)
    assert "top1 0." in found.sentence


def test_nothing_to_find() -> None:
    found = bisect(DIGITS, CLEAN, bounds=Bounds(rtol=1e-3))
    assert (found.broken, found.evaluations) == (False, 1)
    assert "nothing to find" in found.sentence


def test_damage_that_adds_up_is_said_to() -> None:
    everywhere = "quantize-rtn{bits=4,group_size=-1,min_size=0,kinds=[Conv,MatMul,Gemm]}"
    # Each site alone stays above; all of them together do not.
    found = bisect(DIGITS, everywhere, bounds=Bounds(min_sqnr=_between(everywhere)))
    assert (found.broken, found.alone) == (True, False)
    assert "none of its" in found.sentence


def _between(text: str) -> float:
    """A bound between the whole pass and each of its sites alone, in dB."""
    from effic.partial import partial
    from effic.trial import Trial

    before = effic.read_onnx(DIGITS)
    after = before.clone()
    (item,) = effic.parse_passes(text)
    effic.run_passes(after, [item], check="off")
    parts = partial(item, before, after)
    assert parts is not None
    trial = Trial(before, bounds=Bounds(rtol=1e-9))

    def decibels(model: effic.Model) -> float:
        return float(trial(model).text.rpartition(", ")[2].removesuffix(" dB"))

    everything = decibels(after)
    alone = min(decibels(parts.apply({site})) for site in parts.sites)
    assert alone > everything
    return everything + 0.1


def test_lowering_can_be_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from effic.backends.ort.targets import Portable

    def spoil(self: Portable, model: effic.Model, remarks: effic.Remarks) -> effic.Model:
        FlipWeight(fault=next(s.name for s in weight_sites(model) if s.shape[-1] > 1)).apply(model, remarks)
        return model

    monkeypatch.setattr(Portable, "lower", spoil)
    found = bisect(DIGITS, "eliminate-dead-code", bounds=Bounds(rtol=0.01), target="portable")
    assert found.step == "lower"
    assert "without any pass" in found.sentence


def test_a_pass_that_cannot_be_taken_apart_names_a_node() -> None:
    @dataclass(frozen=True)
    class AddNode(Pass):
        """Put a Neg behind the first convolution."""

        name: ClassVar[str] = "add-node"
        numerics: ClassVar[Numerics] = Numerics.ROUNDING

        def apply(self, model: effic.Model, remarks: Remarks) -> None:
            node = next(model.nodes("Conv"))
            out = node.outputs[0]
            users = list(out.uses())
            neg = ir.Node("", "Neg", [out], num_outputs=1, name="the_fault")
            neg.outputs[0].name = "negated"
            neg.outputs[0].type, neg.outputs[0].shape = out.type, out.shape
            model.graph.insert_after(node, neg)
            for user, index in users:
                user.replace_input_with(index, neg.outputs[0])

    found = bisect(DIGITS, [AddNode()], bounds=Bounds(rtol=0.01))
    assert (found.number, found.sites) == (1, ())
    assert found.node is not None


def test_the_model_given_is_left_alone() -> None:
    model = effic.read_onnx(DIGITS)
    before = [(n.op_type, n.name) for n in model.nodes(domain=None)]
    bisect(model, CLEAN, bounds=Bounds(rtol=1e-3))
    assert [(n.op_type, n.name) for n in model.nodes(domain=None)] == before
    assert model.record == []


@pytest.mark.parametrize("name", ["a*b", "w[0]", "x?y", "plain"])
def test_a_literal_pattern_matches_the_name_and_nothing_else(name: str) -> None:
    assert matches(name, (literal(name),))
    assert not matches(name + "z", (literal(name),))
    assert not matches(name.replace("*", "q").replace("?", "q").replace("[0]", "0") + "!", (literal(name),))


def test_bounds_are_needed() -> None:
    with pytest.raises(UsageError, match="give bounds"):
        bisect(DIGITS, CLEAN)
    with pytest.raises(UsageError, match="breaks never"):
        bisect(DIGITS, CLEAN, accuracy=Accuracy("top1", {"x": np.zeros(1), "labels": np.zeros(1)}))


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["bisect", str(DIGITS), *args])
    return result.exit_code, result.output


def test_the_command_line(tmp_path: Path) -> None:
    coarse = "fuse-conv-bn,quantize-rtn{bits=2,min_size=0,group_size=-1,kinds=[Conv,MatMul,Gemm]}"
    code, text = run("--passes", coarse, "--min-sqnr", "20")
    assert code == 1
    assert "pass 2 of 2, quantize-rtn" in text
    assert "--passes 'fuse-conv-bn,quantize-rtn{" in text
    code, text = run("--passes", coarse, "--min-sqnr", "20", "--json")
    found = json.loads(text)
    assert found["number"] == 2
    assert set(found) == {field.name for field in dataclasses.fields(Finding)}
    assert run("--passes", coarse, "--min-sqnr", "-90")[0] == 0
    for args, reason in (
        ((), "give the passes"),
        (("--passes", coarse), "give bounds"),
        (("--passes", coarse, "--metric", "top1", "--data", "x.npz", "--bound", "0"), "do not exist"),
        (("--preset", "int5", "--rtol", "1"), "int4"),
    ):
        code, text = run(*args)
        assert (code, reason in text) == (2, True), text
