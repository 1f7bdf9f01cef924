from __future__ import annotations

import subprocess
import sys

import pytest

from effic.backends import DEFAULT_TARGET, TARGETS, get_backend, load_backend
from effic.backends.base import Backend
from effic.backends.ort.targets import OrtCpu
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.opset import raise_opset
from effic.models.builders import BUILDERS
from effic.passes.base import Remarks, options_of
from effic.passes.quantize.quantize_rtn import QuantizeRTN


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_table_and_class_agree(name: str) -> None:
    cls = load_backend(name)
    assert issubclass(cls, Backend)
    assert cls.name == name
    assert cls.summary()
    assert all(field.metadata["help"] for field, _ in options_of(cls))
    assert get_backend(name).text == name


def test_text_form_both_ways() -> None:
    target = get_backend("ort-cpu{accuracy_level=0,decode=call}")
    assert target == OrtCpu(accuracy_level=0, decode="call")
    assert get_backend(target.text) == target
    assert get_backend(DEFAULT_TARGET) == OrtCpu()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ort_cpu", "did you mean 'ort-cpu'?"),
        ("tpu", "targets: portable, ort-cpu"),
        ("ort-cpu{accuracy=0}", "did you mean 'accuracy_level'?"),
        ("ort-cpu{accuracy_level=5}", "the most is 4"),
        ("ort-cpu{accuracy_level=high}", "no integer"),
        ("ort-cpu{decode=never}", "allowed are load, call"),
        ("portable,ort-cpu", "one thing"),
        ("portable{accuracy_level=4}", "no option"),
    ],
)
def test_mistakes_are_answered_with_what_is_right(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        get_backend(text)
    assert said in str(caught.value)


def test_options_are_checked_in_python_too() -> None:
    with pytest.raises(UsageError, match="the most is 4"):
        OrtCpu(accuracy_level=9)


def test_the_table_imports_no_runtime() -> None:
    code = "import effic.backends, sys; print({'onnxruntime', 'onnx_ir', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("text", "idle"),
    [
        ("ort-cpu{ic=exact}", ["ic=exact"]),
        ("ort-cpu{outliers=coo,decode=call}", ["outliers=coo", "decode=call"]),
        ("ort-cpu", []),
    ],
)
def test_options_that_had_nothing_to_work_on_are_said(text: str, idle: list[str]) -> None:
    model, remarks = Model(BUILDERS["encoder"]()), Remarks()
    raise_opset(model, 21)
    QuantizeRTN().apply(model, Remarks())
    get_backend(text).lower(model, remarks)
    found = [r.text.partition(" does nothing")[0] for r in remarks.items if " does nothing" in r.text]
    assert found == idle
