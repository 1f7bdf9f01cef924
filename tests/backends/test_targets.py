from __future__ import annotations

import subprocess
import sys

import pytest

from effic.backends import DEFAULT_TARGET, TARGETS, get_backend, load_backend
from effic.backends.base import Backend
from effic.backends.ort.targets import OrtCpu
from effic.ir.errors import UsageError
from effic.passes.base import options_of


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
