"""The GitHub Action, the pre-commit hook and the GitLab job: the very commands they hold are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from effic.ir.model import Model
from effic.models.builders import BUILDERS

ROOT = Path(__file__).resolve().parents[2]
ACTION = ROOT / "action.yml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository whose one budget is kept."""
    Model(BUILDERS["cnn"]()).save(tmp_path / "m.onnx")
    (tmp_path / "effic.toml").write_text('[gate.models."m.onnx"]\nnodes.max = 1000\n')
    return tmp_path


def shell(
    command: str, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run commands as CI does, with this Python first on the path and no token."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if "TOKEN" not in k and not k.startswith("GITHUB_")}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
        cwd=folder,
        env={**kept, "PATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def break_it(project: Path) -> None:
    (project / "effic.toml").write_text('[gate.models."m.onnx"]\nnodes.max = 1\n')


# -- GitHub --------------------------------------------------------------------------------------


def steps() -> list[dict[str, Any]]:
    action = yaml.safe_load(ACTION.read_text())
    assert action["runs"]["using"] == "composite"
    return [step for step in action["runs"]["steps"] if "run" in step]


def filled(step: dict[str, Any], project: Path) -> dict[str, str]:
    """The environment of a step, with the inputs' defaults in place."""
    inputs = yaml.safe_load(ACTION.read_text())["inputs"]

    def value(text: str) -> str:
        return re.sub(r"\$\{\{ inputs\.([\w-]+) }}", lambda m: inputs[m[1]]["default"], text)

    found = {name: value(text) for name, text in step.get("env", {}).items()}
    assert not any("${{" in text for text in found.values())
    return {**found, "GITHUB_STEP_SUMMARY": str(project / "summary.md"), "GITHUB_ACTION_PATH": str(ROOT)}


def test_the_action_takes_no_input_into_its_script() -> None:
    """What a caller gives reaches the shell as a variable only, never as text of the script."""
    for step in steps():
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"


@pytest.mark.parametrize("good", [True, False])
def test_the_action_checks_the_budgets(project: Path, good: bool) -> None:
    if not good:
        break_it(project)
    step = steps()[-1]
    result = shell(step["run"], project, filled(step, project))
    assert result.returncode == (0 if good else 1), result.stdout + result.stderr
    assert ("::error file=effic.toml,line=2" in result.stdout) is not good
    assert (project / "summary.md").read_text().startswith("## effic gate: 1 ")
    suite = ElementTree.parse(project / "effic-gate.xml").getroot()
    assert suite.get("failures") == ("0" if good else "1")


def test_the_action_takes_another_configuration(project: Path) -> None:
    shutil.move(project / "effic.toml", project / "a file.toml")
    step = steps()[-1]
    environment = {**filled(step, project), "EFFIC_CONFIG": "a file.toml"}
    assert shell(step["run"], project, environment).returncode == 0
    environment["EFFIC_CONFIG"] = "gone.toml; touch hacked"
    assert shell(step["run"], project, environment).returncode == 2
    assert not (project / "hacked").exists()


def test_the_action_installs_the_effic_it_belongs_to(project: Path, tmp_path: Path) -> None:
    step = steps()[0]
    copy = tmp_path / "action"
    wanted = ("effic", "ir", "passes", "backends", "cli", "models", "pyproject.toml", "README.md", "LICENSE")
    for name in wanted:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
        else:
            shutil.copy(source, copy / name)
    environment = {**filled(step, project), "GITHUB_ACTION_PATH": str(copy)}
    result = shell(f"{step['run'].rstrip()} --dry-run --no-deps --ignore-installed", project, environment)
    if result.returncode and "No matching distribution found for setuptools" in result.stderr:
        pytest.skip("no package index is in reach, which building takes setuptools from")
    assert result.returncode == 0, result.stderr
    assert "Would install effic-" in result.stdout


# -- pre-commit ------------------------------------------------------------------------------------


def hook() -> dict[str, Any]:
    (found,) = yaml.safe_load(HOOKS.read_text())
    return dict(found)


@pytest.mark.parametrize("good", [True, False])
def test_the_hook_checks_the_budgets(project: Path, good: bool) -> None:
    if not good:
        break_it(project)
    found = hook()
    assert (found["language"], found["pass_filenames"]) == ("python", False)
    result = shell(shlex.join(shlex.split(found["entry"]) + found.get("args", [])), project)
    assert result.returncode == (0 if good else 1), result.stdout + result.stderr


@pytest.mark.parametrize(
    ("path", "runs"),
    [
        ("m.onnx", True),
        ("models/m.onnx.data", True),
        ("effic.toml", True),
        ("sub/pyproject.toml", True),
        ("effic-baseline.json", True),
        ("README.md", False),
        ("src/onnx.py", False),
        ("not_pyproject.toml", False),
    ],
)
def test_the_hook_runs_for_what_budgets_depend_on(path: str, runs: bool) -> None:
    assert bool(re.search(hook()["files"], path)) is runs


# -- the guide -------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "gate.md").read_text(), re.DOTALL)


def test_the_gitlab_job_of_the_guide(project: Path) -> None:
    (job,) = (found for text in blocks("yaml") if "effic-gate" in (found := yaml.safe_load(text)))
    script = job["effic-gate"]["script"]
    install, check = script
    assert install.startswith("pip install ")
    assert shell(check, project).returncode == 0
    report = job["effic-gate"]["artifacts"]["reports"]["junit"]
    assert ElementTree.parse(project / report).getroot().get("tests") == "1"
    break_it(project)
    assert shell(check, project).returncode == 1
    assert ElementTree.parse(project / report).getroot().get("failures") == "1"
    assert job["effic-gate"]["artifacts"]["when"] == "always"


def test_the_workflow_and_the_hook_of_the_guide_name_what_is_there() -> None:
    texts = [yaml.safe_load(text) for text in blocks("yaml")]
    (workflow,) = (text for text in texts if "jobs" in text)
    uses = [
        step for job in workflow["jobs"].values() for step in job["steps"] if "effic" in step.get("uses", "")
    ]
    inputs = yaml.safe_load(ACTION.read_text())["inputs"]
    assert uses
    assert all(set(step.get("with", {})) <= set(inputs) for step in uses)
    (repos,) = (text for text in texts if "repos" in text)
    assert [item["id"] for item in repos["repos"][0]["hooks"]] == [hook()["id"]]
    assert workflow["permissions"] == {"contents": "read"}


def test_the_configuration_of_the_guide_can_be_read(tmp_path: Path) -> None:
    from effic.gate_config import read_config

    for number, text in enumerate(blocks("toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text if "[gate" in text else f'[gate.models."m.onnx"]\n{text}')
        read_config(path)


def test_the_guide_names_every_key() -> None:
    from effic.gate_config import TABLES
    from effic.measure import METRICS

    text = (ROOT / "docs" / "gate.md").read_text()
    for name in (*METRICS, *TABLES, "baseline", "allow_unlike"):
        assert f"`{name}" in text, name
