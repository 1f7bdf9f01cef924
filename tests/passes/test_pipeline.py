"""The runner catches passes that break their word; these break it on purpose."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
import pytest

import effic.passes as passes_table
from effic.ir.errors import CheckFailedError, NotMeasuredError, UsageError
from effic.ir.evaluate import Distance, Oracle, compare_outputs
from effic.ir.model import Model
from effic.ir.onnx_format import raise_opset
from effic.ir.weights import weight_sites
from effic.passes.base import CalibratedPass, Numerics, Pass, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.pipeline import Checker, judge, run_passes
from effic.passes.quantize.quantize_rtn import QuantizeRTN
from effic.passes.spec import parse_passes

TEXT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[N,4] x) => (float[N,3] y)
<float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b = {1,2,3}>
{
  h = MatMul(x, w)
  s = Add(h, b)
  y = Relu(s)
}
"""


def make() -> Model:
    return Model(ir.from_onnx_text(TEXT))


@dataclass(frozen=True)
class Edit(Pass):
    """Multiplies the bias; claims whatever the test lets it claim."""

    name: ClassVar[str] = "edit"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    factor: float = 1.0

    def apply(self, model: Model, remarks: Remarks) -> None:
        add = next(model.nodes("Add"))
        old = np.array([1, 2, 3], np.float32)
        with np.errstate(all="ignore"):
            new = (old * np.float32(self.factor)).astype(np.float32)
        add.replace_input_with(1, model.add_initializer(model.graph, "b_new", new))
        remarks.passed(add, "edited")


@dataclass(frozen=True)
class Rounding(Edit):
    """The same, claiming ROUNDING."""

    name: ClassVar[str] = "rounding-edit"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING


@dataclass(frozen=True)
class Lossy(Edit):
    """The same, claiming LOSSY."""

    name: ClassVar[str] = "lossy-edit"
    numerics: ClassVar[Numerics] = Numerics.LOSSY


@dataclass(frozen=True)
class Dangling(Pass):
    """Removes a node others still read."""

    name: ClassVar[str] = "dangling"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: Model, remarks: Remarks) -> None:
        model.graph.remove(next(model.nodes("MatMul")))


@dataclass(frozen=True)
class Renames(Pass):
    """Renames a graph output."""

    name: ClassVar[str] = "renames"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: Model, remarks: Remarks) -> None:
        model.graph.outputs[0].name = "z"


@dataclass(frozen=True)
class Nothing(Pass):
    """Looks and leaves."""

    name: ClassVar[str] = "nothing"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def apply(self, model: Model, remarks: Remarks) -> None:
        remarks.missed(next(model.nodes("Add")), "it is too nice")


def run(model: Model, *passes: Pass, **options):
    return run_passes(model, passes, checker=Checker(model), **options)


def test_exact_pass_that_moves_numbers_is_caught_and_the_node_named() -> None:
    with pytest.raises(CheckFailedError, match=r"edit broke the model.*made by Add"):
        run(make(), Edit(factor=1.0001))


def test_rounding_pass_may_move_within_the_tolerance_only() -> None:
    step = run(make(), Rounding(factor=1.000001)).steps[0]
    assert step.verdict.startswith("rounding")
    with pytest.raises(CheckFailedError, match="rounding-edit"):
        run(make(), Rounding(factor=1.01))


def test_lossy_pass_is_measured() -> None:
    result = run(make(), Lossy(factor=1.1))
    assert result.steps[0].verdict.startswith("SQNR")
    assert result.distance is not None
    assert 0 < result.distance.max_rel < 0.1


@pytest.mark.parametrize("kind", [Edit, Rounding, Lossy])
def test_new_nan_or_inf_always_fails(kind: type[Edit]) -> None:
    with pytest.raises(CheckFailedError, match="NaN or Inf"):
        run(make(), kind(factor=float("inf")))


def test_broken_structure_is_caught_with_the_neighbourhood() -> None:
    with pytest.raises(CheckFailedError, match="nothing before it makes") as error:
        run_passes(make(), [Dangling()], check="off")
    assert "> Add" in str(error.value)


def test_inputs_and_outputs_may_not_change() -> None:
    with pytest.raises(CheckFailedError, match="inputs or outputs"):
        run_passes(make(), [Renames()], check="off")


def test_pass_that_changes_nothing() -> None:
    result = run(make(), Nothing())
    assert result.steps[0].verdict == "unchanged"
    assert not result.steps[0].changed
    assert result.steps[0].missed == 1
    with pytest.raises(CheckFailedError, match=r"nothing changed nothing.*too nice"):
        run(make(), Nothing(), require_change=True)


def test_final_check_judges_by_the_widest_class() -> None:
    result = run(make(), Lossy(factor=1.1), Rounding(factor=1.1), check="final")
    assert result.steps[-1].verdict.startswith("SQNR")
    with pytest.raises(CheckFailedError, match="sequence"):
        run(make(), Edit(factor=1.1), check="final")


def test_record_is_kept() -> None:
    model = make()
    run(model, Lossy(factor=1.1), Nothing())
    assert [r.text for r in model.record] == ["lossy-edit{factor=1.1}"]


@dataclass(frozen=True)
class Look(CalibratedPass):
    """Look at the data, and add what was seen to the output."""

    name: ClassVar[str] = "look"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    data: bool = option(True, help="look at all")

    @property
    def needs_data(self) -> bool:
        return self.data

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        if calibration is None:
            return
        value = model.graph.outputs[0]
        ranges = calibration.ranges(model, [value])
        remarks.passed("the output", f"is at most {ranges[str(value.name)].high:.1f}")
        for site in weight_sites(model):
            if calibration.why_not(site) is None:
                list(calibration.walk(model, [site]))
        model.graph.name = "seen"


def test_a_pass_that_needs_data_gets_them_and_the_record_says_which() -> None:
    model = make()
    calibration = Calibration.load("random", model, samples=2)
    told: list[str] = []
    result = run_passes(
        model,
        [Look(), Look(data=False)],
        check="off",
        calibration=calibration,
        progress=lambda text, number, total: told.append(text),
    )
    first, second = result.steps
    assert first.passed == 1
    assert first.data == calibration.digest
    assert second.data is None
    assert first.to_dict()["data"] == calibration.digest
    assert any(text.startswith("look: measuring ranges, part 1 of 1") for text in told)


def test_without_data_nothing_is_done_at_all() -> None:
    model = make()
    before = [node.name for node in model.graph]
    with pytest.raises(UsageError, match=r"look needs calibration data; give some with --calib DATA"):
        run_passes(model, [QuantizeRTN(min_size=0), Look()], check="off")
    assert [node.name for node in model.graph] == before
    with pytest.raises(UsageError, match="look needs calibration data"):
        Look().apply(model, Remarks())
    run_passes(model, [Look(data=False)], check="off")


def test_random_models_cannot_be_checked() -> None:
    text = TEXT.replace("y = Relu(s)", "r = RandomNormalLike(s)\n y = Add(s, r)")
    with pytest.raises(NotMeasuredError, match="random"):
        Checker(Model(ir.from_onnx_text(text)))


def test_check_needs_a_checker() -> None:
    with pytest.raises(UsageError):
        run_passes(make(), [Nothing()])


def test_judge_integers() -> None:
    assert judge(Distance(wrong_integers=1), Numerics.ROUNDING, 1e-4).startswith("broken")
    assert judge(Distance(), Numerics.EXACT, 0.0) == "exact"


@pytest.mark.parametrize("dtype", ["float16", "float"])
def test_exact_passes_may_round_where_the_runtime_rounds_by_neighbours(dtype: str) -> None:
    text = f"""
    <ir_version: 8, opset_import: ["" : 18]> g ({dtype}[8,64] x, {dtype}[64,16] w) => ({dtype}[8,16] y)
    {{ y = MatMul(x, w) }}"""
    model = Model(ir.from_onnx_text(text))
    checker = Checker(model)
    scale = {"float16": 1.001, "float": 1.00001}[dtype]
    moved = {name: (array * scale).astype(array.dtype) for name, array in checker.outputs.items()}
    checker.outputs = moved
    if dtype == "float16":
        assert checker.check(model, Numerics.EXACT, "some-pass", None)[1].startswith("rounding")
    else:
        with pytest.raises(CheckFailedError, match="some-pass"):
            checker.check(model, Numerics.EXACT, "some-pass", None)


@pytest.mark.parametrize("rows", [np.zeros((0, 4)), np.full((2, 4), np.nan)])
def test_nothing_to_compare_is_no_pass(rows: np.ndarray) -> None:
    with pytest.raises(NotMeasuredError, match="nothing to compare"):
        Checker(make(), {"x": rows.astype(np.float32)})


def test_a_model_that_cannot_be_raised_is_a_missed_with_the_reason() -> None:
    # An operator of the standard domain that no release of onnx knows has no newer form.
    inner = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 13]>
        g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, w)  y = NoSuchOperator(h) }""")
    model = Model(inner)
    matmul = model.graph[0]
    matmul.replace_input_with(1, model.add_initializer(model.graph, "w", np.ones((64, 64), np.float32)))
    assert "NoSuchOperator" in str(raise_opset(model, 21))
    assert model.opset == 13


def test_opset_is_raised_only_for_a_pass_that_makes_use_of_it() -> None:
    text = TEXT.replace('"" : 18', '"" : 17')
    model = Model(ir.from_onnx_text(text))
    step = run_passes(model, [QuantizeRTN()], check="off").steps[0]
    assert not step.changed  # the weight is too small to be worth it
    assert model.opset == 17
    step = run_passes(model, [QuantizeRTN(bits=8, group_size=-1, min_size=0)], check="off").steps[0]
    assert model.opset == (21 if step.changed else 17)


@dataclass(frozen=True)
class Swapped(Pass):
    """Swaps the operands of an addition, which is exact, and at will scales the constant one, which is not."""

    name: ClassVar[str] = "swapped"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    needs_opset: ClassVar[int] = 21
    factor: float = 1.0

    def apply(self, model: Model, remarks: Remarks) -> None:
        add = next(model.nodes("Add"))
        bias = np.array([3 * self.factor], np.float32)
        add.replace_input_with(1, add.inputs[0])
        add.replace_input_with(0, model.add_initializer(model.graph, "b2", bias))
        remarks.passed(add, "swapped")


@pytest.mark.parametrize("check", ["each", "final"])
def test_an_exact_pass_is_not_blamed_for_the_rounding_of_newer_kernels(
    check: Literal["each", "final"],
) -> None:
    # ONNX Runtime's AveragePool rounds differently from opset 19 on.
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (float[N,16,6,6] x) => (float[N,16,6,6] y) <float[1] b = {3}> {
      h = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)
      y = Add(h, b)
    }"""
    model = Model(ir.from_onnx_text(text))
    original = model.clone()
    raised = model.clone()
    assert raise_opset(raised, 21) is None
    checker = Checker(original)
    assert not compare_outputs(checker.original, Oracle(raised).run(checker.inputs)).exact
    step = run_passes(model, [Swapped()], check=check, checker=checker).steps[0]
    assert step.changed
    assert model.opset == 21
    if check == "each":
        assert step.verdict == "exact"
        with pytest.raises(CheckFailedError, match="swapped broke the model: outputs moved"):
            run_passes(original, [Swapped(factor=1.00001)], checker=Checker(original))


def test_third_parties_passes_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("nothing", f"{__name__}:Nothing", "effic.passes")
    broken = EntryPoint("absent", "no.such.module:Pass", "effic.passes")
    monkeypatch.setattr("effic.passes.plugins.entry_points", lambda group: [entry, broken])
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType(__name__))
    monkeypatch.setattr(sys.modules[__name__], "Nothing", Nothing, raising=False)
    assert "nothing" in passes_table.pass_names()
    assert parse_passes("nothing") == [Nothing()]
    with pytest.raises(UsageError, match="does not load"):
        parse_passes("absent")
