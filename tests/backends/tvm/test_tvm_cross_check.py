"""Two targets on the same inputs, by outputs and by the values of all nodes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from effic.backends import get_backends
from effic.backends.ort.targets import OrtCpu, Portable
from effic.cli.main import main
from effic.compare import Bounds
from effic.cross_check import cross_check, tapped
from effic.ir.errors import UsageError
from effic.ir.model import Model

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[rows, 8] x) => (float[rows, 8] y)
<float[8, 8] w = {WEIGHT}>
{ scaled = Identity(w)  a = MatMul(x, scaled)  b = Relu(a)  y = Add(a, b) }
""".replace("WEIGHT", ",".join(str((3 * i % 7 - 3) / 4) for i in range(64)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "model.onnx"
    Model(ir.from_onnx_text(TEXT)).save(file)
    return file


def effic(*argv: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in argv], prog_name="effic")


def test_two_targets_agree(path: Path) -> None:
    found = cross_check(path, 'ort-cpu,tvm-cpu{shapes="rows=3"}', count=2, bounds=Bounds(rtol=1e-5))
    assert not found.broken
    assert list(found.outputs) == ["y"]
    assert (found.a, found.b) == ("ort-cpu", 'tvm-cpu{shapes="rows=3"}')
    assert found.engine.endswith("TVM (B)")


def test_taps_compare_every_node_in_order(path: Path) -> None:
    done = effic("compare", path, "--backends", "portable,tvm-cpu", "--taps", "--rtol", "1e-5", "--json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["outputs"]) == ["a", "b", "y"]


def test_what_is_computed_from_constants_is_not_tapped() -> None:
    copy = tapped(Model(ir.from_onnx_text(TEXT)))
    assert [value.name for value in copy.graph.outputs] == ["a", "b", "y"]


def test_two_targets_of_onnx_runtime_need_no_tvm(path: Path) -> None:
    found = cross_check(path, [Portable(), OrtCpu()], count=1)
    assert found.outputs["y"].max_rel < 1e-5


def test_the_list_of_targets_is_text() -> None:
    assert get_backends("portable,ort-cpu{accuracy_level=0}") == [Portable(), OrtCpu(accuracy_level=0)]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a second model, or two targets"),
        (["model.onnx", "--backends", "ort-cpu,portable"], "name a second model, or two targets"),
        (["--taps", "model.onnx"], "--taps does nothing without --backends"),
        (["--backends", "ort-cpu"], "two targets are compared, and 1 are named"),
        (["--backends", "ort-cpu,tvm_cpu"], "did you mean 'tvm-cpu'?"),
        (["--backends", "ort-cpu,portable", "--as-written"], "do nothing with --backends"),
    ],
)
def test_mistakes_are_sentences(path: Path, argv: list[str], said: str) -> None:
    done = effic("compare", path, *argv)
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_python_list_of_other_length_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="3 are named"):
        cross_check(path, [Portable(), Portable(), OrtCpu()])
