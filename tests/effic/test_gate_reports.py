"""What other programs read of a gate's verdicts: JSON, JUnit, Markdown, annotations; lines of the keys."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.cli.main import main
from effic.gate_config import read_config
from effic.gate_reports import github_annotations, junit, markdown
from effic.gate_verdicts import GateReport, Mover, PassMover, Verdict, headline
from effic.ir.model import Model
from effic.models.builders import BUILDERS
from effic.toml_lines import key_lines

SCHEMA = json.loads((files("effic") / "schemas" / "gate.schema.json").read_text())

CONFIG = """\
[gate]
baseline = "effic-baseline.json"

# every status at once
[gate.models."m.onnx"]
nodes = { max = 10_000, max_growth = 0 }
file_bytes.max = "1 B"
latency = { repeats = 4 }
agreement = { reference = "gone.onnx", min_sqnr = 10 }
[gate.models."missing.onnx"]
nodes.max = 1
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    Model(BUILDERS["cnn"]()).save("m.onnx")
    Path("effic.toml").write_text(CONFIG)
    return tmp_path


def run(*options: str) -> Result:
    return CliRunner().invoke(main, ["gate", *options], catch_exceptions=False)


def test_json_follows_its_schema(project: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    result = run("--json")
    data = json.loads(result.stdout)
    jsonschema.validate(data, SCHEMA)
    assert result.exit_code == data["exit_code"] == 1
    assert [(v["bound"], v["status"], v["line"]) for v in data["verdicts"]] == [
        ("max", "ok", 6),
        ("max_growth", "unmeasured", 6),
        ("max", "broken", 7),
        ("max", "unmeasured", 11),
        ("time", "info", 8),
        ("min_sqnr", "error", 9),
    ]
    broken = {**data, "verdicts": [{**data["verdicts"][0], "status": "fine"}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_an_error_follows_the_schema_too(project: Path) -> None:
    Path("effic.toml").write_text("[gate")
    result = run("--json")
    assert result.exit_code == 2
    jsonschema.validate(json.loads(result.stdout), SCHEMA)


def test_junit(project: Path) -> None:
    result = run("--junit", "gate.xml")
    assert result.exit_code == 1
    root = ElementTree.parse("gate.xml").getroot()
    assert (root.tag, root.get("tests"), root.get("failures"), root.get("errors")) == (
        "testsuites",
        "6",
        "1",
        "3",
    )
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {"m.onnx", "missing.onnx"}
    cases = {case.get("name"): case for case in suites["m.onnx"]}
    failure = cases["file_bytes max"].find("failure")
    assert failure is not None
    assert "over its limit" in (failure.get("message") or "")
    assert "file_bytes.max in effic.toml" in (failure.text or "")
    assert cases["nodes max"].find("failure") is None
    assert cases["nodes max_growth"].find("error") is not None
    assert suites["missing.onnx"][0].find("error") is not None
    assert all(case.find("skipped") is None for case in root.iter("testcase"))
    assert not [p for p in project.iterdir() if p.name.startswith(".")]


def test_markdown_is_written_or_added_to_a_summary(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--markdown", "gate.md")
    text = Path("gate.md").read_text()
    assert text.startswith("## effic gate: 1 kept, 1 broken, 1 failed, 2 not measured, 1 for information\n")
    assert "| ❌ broken | m.onnx | file\\_bytes | max | 1 B |" in text
    assert "```text" in text
    run("--markdown", "gate.md")
    assert Path("gate.md").read_text().count("## effic gate") == 1
    Path("summary.md").write_text("of another step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    run("--markdown", "summary.md")
    summary = Path("summary.md").read_text()
    assert summary.startswith("of another step\n## effic gate: ")


def test_annotations_stand_at_the_lines_of_the_keys(project: Path) -> None:
    lines = [line for line in run("--github").stdout.splitlines() if line.startswith("::")]
    assert [line.partition("::")[2].partition(",title")[0] for line in lines] == [
        f"error file=effic.toml,line={number}" for number in (6, 7, 11, 9)
    ]
    assert "over its limit" in lines[1]
    result = run("--github", "--json")
    json.loads(result.stdout)
    assert result.stderr.count("::error ") == 4


def test_a_report_that_cannot_be_written_is_bad_usage(project: Path) -> None:
    result = CliRunner().invoke(main, ["gate", "--junit", "no/such/folder/gate.xml"])
    assert result.exit_code == 2
    assert "no/such/folder" in result.stderr


@pytest.mark.parametrize("share", ["2", "lots", "-2%"])
def test_a_headroom_that_is_no_share(project: Path, share: str) -> None:
    result = run("--update", f"--headroom={share}")
    assert result.exit_code == 2
    assert "--headroom" in result.stderr


def test_headroom_is_said(project: Path) -> None:
    Path("effic.toml").write_text('[gate.models."m.onnx"]\nnodes.max_growth = 0\n')
    result = run("--update", "--headroom", "2%")
    assert result.exit_code == 0
    assert "(1 model, with 2% headroom); commit it" in result.stderr
    model = Model(BUILDERS["llama"]())
    model.save("m.onnx", force=True)
    assert "in effic-baseline.json (+2% headroom)" in run().stdout


# -- hostile names -------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=40, deadline=None)
@given(NAMES, NAMES, NAMES)
def test_names_break_no_report(model: str, tensor: str, why: str) -> None:
    movers = (Mover("tensor", tensor, None, 7, tensor),)
    passes = (PassMover("p", None, tensor, 0, -3),)
    verdict = Verdict(
        model, "nodes", "max", f"gate.{tensor}", "broken", 3, value=9, limit=2, movers=movers, passes=passes
    )
    failed = Verdict(model, "nodes", "max", "k", "error", 3, why=why)
    report = GateReport(Path("effic.toml"), Path("b.json"), verdicts=[verdict, failed])
    root = ElementTree.fromstring(junit(report))
    assert [case.tag for case in root.iter("testcase")] == ["testcase", "testcase"]
    for line in github_annotations(report):
        assert len(line.splitlines()) == 1 or not {"\n", "\r"} & set(line)
        assert line.startswith("::error file=effic.toml,line=3,title=effic gate%3A nodes::")
    table = [line for line in markdown(report).split("\n") if line.startswith("| ❌")]
    assert len(table) == 2
    data = json.loads(json.dumps(report.to_dict()))
    jsonschema.validate(data, SCHEMA)


def test_a_headline_is_one_sentence_of_the_cause() -> None:
    verdict = Verdict("m.onnx", "accuracy top1", "min", "k", "broken", unit="score", value=0.9, limit=0.98)
    assert headline(verdict) == (
        "m.onnx: accuracy top1 is 0.0800 under its limit (0.9000, at least 0.9800 allowed)"
    )


# -- lines -----------------------------------------------------------------------------------------


def test_lines_of_keys() -> None:
    text = (
        "# [gate.models.x]\n"
        "[gate]\n"
        'baseline = "a = b"\n'
        '[gate.models."a=b.onnx"] # here\n'
        "ops_allowed = [\n"
        '  "Conv",\n'
        "]\n"
        'ops . "Conv" . max = 3\n'
        "[gate.models.'c.onnx'.nodes]\n"
        "max = 1\n"
    )
    lines = key_lines(text, tomllib.loads(text))
    wanted = {
        ("gate", "baseline"): 3,
        ("gate", "models", "a=b.onnx"): 4,
        ("gate", "models", "a=b.onnx", "ops_allowed"): 5,
        ("gate", "models", "a=b.onnx", "ops", "Conv", "max"): 8,
        ("gate", "models", "c.onnx", "nodes", "max"): 10,
    }
    assert {keys: lines.get(keys) for keys in wanted} == wanted


def test_a_text_that_looks_like_a_key_is_none(tmp_path: Path) -> None:
    path = tmp_path / "effic.toml"
    path.write_text(
        '[gate]\nbaseline = """x\n[other]\nnodes = 3\n"""\n[gate.models."m"]\nnodes = {max = 3}\n'
    )
    assert [b.place.line for b in read_config(path).budgets] == [7]
