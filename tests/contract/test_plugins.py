"""Other people's passes and targets: the template package, installed and used, and what can be wrong with one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import onnx_ir as ir
import pytest

from effic.backends import get_backend, target_names
from effic.cli.main import main
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.passes import load_pass, pass_names
from effic.testing import check_documented, check_pass, check_refused

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the template package, which no other test sees."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(TEMPLATE, folder / "source")  # building leaves files beside the sources
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", folder / "site", folder / "source"]
    subprocess.run(command, check=True, timeout=300)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONDONTWRITEBYTECODE": "1"}


def effic(installed: dict[str, str], *argv: str | Path, code: int = 0) -> str:
    """What the command prints, with the template package installed."""
    command = [sys.executable, "-P", "-c", "from effic.cli.main import main; main()", *argv]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_template_is_found_explained_and_run(installed: dict[str, str], tmp_path: Path) -> None:
    listed = json.loads(effic(installed, "passes", "--json"))
    assert [target["name"] for target in listed["targets"]][-1] == "my-target"
    assert "target my-target: Standard ONNX with a note" in effic(installed, "passes")
    assert listed["passes"][-1] == {
        "name": "my-pass",
        "numerics": "exact",
        "summary": "Subtract what was negated and then added.",
    }
    told = effic(installed, "explain", "my-pass")
    assert "n = Neg(b);  y = Add(a, n)" in told
    assert "additions to leave alone" in told
    output = tmp_path / "out.onnx"
    effic(
        installed, "optimize", ROOT / "models" / "digits.onnx", "--passes", "my-pass",
        "--target", "my-target{note=shop}", "-o", output,
    )  # fmt: skip
    model = read_onnx(output)
    assert model.ir.metadata_props["my-target.note"] == "shop"
    record = json.loads((tmp_path / "out.effic.json").read_text())
    assert record["build"]["passes"] == ["my-pass"]
    assert record["build"]["target"] == "my-target{note=shop}"
    assert record["build"]["versions"]["effic-plugin-example"] == "0.1.0"
    assert "did you mean 'my-target'?" in effic(
        installed, "optimize", output, "--target", "mytarget", "-o", tmp_path / "x.onnx", code=2
    )


def test_the_template_passes_its_own_tests(installed: dict[str, str]) -> None:
    tests = Path(installed["PYTHONPATH"]).parent / "source" / "tests"
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tests,
        tests,
    ]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


GOOD_PASS = "effic.passes.cleanup.fold_constants:FoldConstants"
GOOD_TARGET = "effic.backends.ort.targets:Portable"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["no.such.module:X"], "does not load"),
        (["effic.passes:NoSuchThing"], "does not load"),
        (["effic.passes:PASSES"], "is not a subclass of effic."),
        (["pathlib:Path"], "is not a subclass of effic."),
        (["pathlib:Path", "no.such.module:X"], "is offered twice"),
        (["GOOD"], "have to be the same"),
    ],
)
@pytest.mark.parametrize("kind", ["pass", "target"])
def test_a_broken_plugin_is_one_sentence(
    kind: str,
    values: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = "effic.passes" if kind == "pass" else "effic.backends"
    good = GOOD_PASS if kind == "pass" else GOOD_TARGET
    entries = [EntryPoint("odd", good if value == "GOOD" else value, group) for value in values]
    monkeypatch.setattr(
        "effic.passes.plugins.entry_points", lambda group: [e for e in entries if e.group == group]
    )
    with pytest.raises(UsageError, match=said) as raised:
        load_pass("odd") if kind == "pass" else get_backend("odd")
    assert f"the {kind} 'odd'" in str(raised.value)
    assert (pass_names() if kind == "pass" else target_names())[-1] == "odd"
    option = "--passes" if kind == "pass" else "--target"
    argv = ["effic", "optimize", str(ROOT / "models" / "digits.onnx"), option, "odd", "--dry-run"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert said.split(" of ")[0] in " ".join(capsys.readouterr().err.split())


def test_names_of_effic_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("fold-constants", "no.such.module:X", "effic.passes")
    monkeypatch.setattr("effic.passes.plugins.entry_points", lambda group: [entry])
    assert load_pass("fold-constants").__module__ == "effic.passes.cleanup.fold_constants"
    assert pass_names().count("fold-constants") == 1


def test_the_kit_imports_no_test_runner() -> None:
    code = "import effic.testing, sys; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0


def test_the_pass_of_the_guide_conforms(monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.S)[0]
    module = types.ModuleType("guide")
    monkeypatch.setitem(sys.modules, "guide", module)  # dataclasses look their module up
    exec(compile("__name__ = 'guide'\n" + block, "plugins.md", "exec"), vars(module))

    def model(body: str) -> Model:
        head = '<ir_version: 10, opset_import: ["" : 21]> g (float[N,4] a) => (float[N,4] y)'
        return Model(ir.from_onnx_text(f"{head} {{ {body} }}"))

    check_documented(module.WidenClips)
    widen = module.WidenClips()
    assert check_pass(widen, model("h = Clip(a) y = Exp(h)")).verdict == "exact"
    check_refused(widen, model("y = Clip(a)"), "an output of the model")
    check_refused(widen, model("l = Constant<value_float=0.0>() h = Clip(a, l) y = Exp(h)"), "it has a bound")
    check_refused(module.WidenClips(skip=("*",)), model("h = Clip(a) y = Exp(h)"), "named by skip")
