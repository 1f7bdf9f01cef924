"""Budgets: how they are read, judged, and explained; the baseline file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from effic.gate import gate
from effic.gate_config import find_config, read_config
from effic.gate_verdicts import GateReport
from effic.ir.errors import InvalidModelError, NotMeasuredError, UsageError
from effic.ir.model import Model


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    save(tmp_path, layers=1)
    return tmp_path


def save(project: Path, name: str = "net", *, layers: int) -> Path:
    """A perceptron of 16 by 16 layers whose multiply-adds can be told."""
    x = ir.val("x", ir.DataType.FLOAT, ["N", 16])
    model = Model(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="net"), ir_version=10))
    value = x
    for number in range(layers):
        weight = model.add_initializer(model.graph, f"w{number}", np.full((16, 16), 0.1, np.float32))
        for op, inputs in (("MatMul", [value, weight]), ("Relu", [])):
            node = ir.node(op, inputs or [value], name=f"{op}_{number}")
            model.graph.append(node)
            value = node.outputs[0]
            value.name = f"{op}_{number}_out"
    value.type, value.shape = x.type, ir.Shape(["N", 16])
    model.graph.outputs.append(value)
    path = project / "models" / f"{name}.onnx"
    model.save(path, force=True)
    return path


def write(project: Path, body: str, name: str = "effic.toml") -> Path:
    path = project / name
    path.write_text(body)
    return path


def run(project: Path, body: str, *, update: bool = False) -> GateReport:
    return gate(read_config(write(project, body)), update=update)


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "text", "limit", "relative"),
    [
        ("file_bytes", "1000", 1000, False),
        ("file_bytes", '"2 MB"', 2_000_000, False),
        ("file_bytes", '"1.5 MiB"', 1.5 * 2**20, False),
        ("weight_bytes", '"10kb"', 10_000, False),
        ("macs", '"2.5 M"', 2_500_000, False),
        ("nodes", "0", 0, False),
        ("parameters", '"1_000"', 1000, False),
        ("nodes", '"5%"', 0.05, True),
        ("nodes", '"+2.5 %"', 0.025, True),
    ],
)
def test_limits(tmp_path: Path, metric: str, text: str, limit: float, relative: bool) -> None:
    path = write(tmp_path, f'[gate.models."m.onnx"]\n{metric} = {{ max_growth = {text} }}')
    (budget,) = read_config(path).budgets
    assert (budget.limit, budget.relative) == (pytest.approx(limit), relative)
    assert budget.key == f'gate.models."m.onnx".{metric}.max_growth'


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("[gaet]\n", ["no [gate] section", "did you mean 'gate'"]),
        ("[gate]\nbasline = 1", ["unknown key 'basline'", "did you mean 'baseline'"]),
        ("[gate]\nbaseline = 1\n", ["gate.baseline must be the path"]),
        ("[gate]\n", ["names no models"]),
        ("[gate]\nmodels = 3", ["names no models"]),
        ("gate = 3", ["gate must be a table"]),
        ('[gate.models."m"]\n', ["sets no budget"]),
        ('[gate.models."m"]\nfile_byte.max = 1', ["unknown key 'file_byte'", "did you mean 'file_bytes'"]),
        ('[gate.models."m"]\nnodes = 3', ["nodes must be a table"]),
        ('[gate.models."m"]\nnodes.maximum = 3', ["unknown key 'maximum'", "did you mean 'max'"]),
        ('[gate.models."m"]\nnodes.max = "lots"', ["nodes.max is 'lots'", "no amount"]),
        ('[gate.models."m"]\nnodes.max = "3 MB"', ["no amount"]),
        ('[gate.models."m"]\nnodes.max = -1', ["no amount"]),
        ('[gate.models."m"]\nnodes.max = nan', ["no amount"]),
        ('[gate.models."m"]\nnodes.max = true', ["no amount"]),
        ('[gate.models."m"]\nnodes.max = "5%"', ["use max_growth"]),
        ("[gate\n", ["not valid TOML"]),
    ],
)
def test_mistakes_in_the_configuration(tmp_path: Path, body: str, parts: list[str]) -> None:
    path = write(tmp_path, body)
    with pytest.raises(UsageError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_the_nearest_configuration_with_a_gate_is_used(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    outer = write(tmp_path, '[tool.effic.gate.models."m"]\nnodes.max = 1', "pyproject.toml")
    (deep / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert find_config(deep) == outer
    (budget,) = read_config(outer).budgets
    assert budget.key == "tool.effic.gate.models.m.nodes.max"
    inner = write(deep, '[gate.models."m"]\nnodes.max = 1')
    assert find_config(deep) == inner


def test_no_configuration_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no effic\.toml"):
        find_config(tmp_path)
    with pytest.raises(UsageError, match="no configuration file"):
        read_config(tmp_path / "effic.toml")


# -- judging -------------------------------------------------------------------------------------


def test_absolute_budgets(project: Path) -> None:
    report = run(project, '[gate.models."models/net.onnx"]\nnodes.max = 10_000\nfile_bytes.max = "1 kB"')
    kept, broken = report.verdicts
    assert (kept.status, broken.status, report.exit_code) == ("ok", "broken", 1)
    assert broken.value == (project / "models" / "net.onnx").stat().st_size
    assert broken.over == broken.value - 1000
    assert not broken.grown
    assert len(broken.movers) == 2
    assert sum(m.after for m in broken.movers) + broken.others == broken.value
    assert kept.over is not None
    assert kept.over < 0


GROWTH = '[gate.models."models/*.onnx"]\nweight_bytes.max_growth = "10%"\nnodes.max_growth = 1\nmacs.max_growth = "5%"'


def test_growth_is_measured_against_the_baseline(project: Path) -> None:
    first = run(project, GROWTH, update=True)
    assert (first.exit_code, first.updated) == (0, ["models/net.onnx"])
    assert run(project, GROWTH).exit_code == 0
    save(project, layers=2)
    report = run(project, GROWTH)
    assert report.exit_code == 1
    weights, nodes, macs = report.verdicts
    assert {weights.status, nodes.status, macs.status} == {"broken"}
    assert weights.grown
    assert weights.movers[0].before is None
    assert weights.value is not None
    assert weights.baseline is not None
    assert (
        sum(m.grew for m in weights.movers) + weights.others - weights.shrunk
        == weights.value - weights.baseline
    )
    assert nodes.limit == nodes.baseline + 1
    assert [m.kind for m in nodes.movers] == ["operator"] * len(nodes.movers)
    assert macs.movers[0].kind == "node"
    assert run(project, GROWTH, update=True).exit_code == 0


def test_an_update_does_not_excuse_an_absolute_budget(project: Path) -> None:
    report = run(project, '[gate.models."models/*.onnx"]\nnodes = { max = 1, max_growth = 0 }', update=True)
    assert [v.status for v in report.verdicts] == ["broken", "ok"]


def test_a_missing_measurement_never_passes(project: Path) -> None:
    missing = run(
        project, '[gate.models."models/*.onnx"]\nnodes.max = 10_000\n[gate.models."gone.onnx"]\nnodes.max = 1'
    )
    assert missing.exit_code == 3
    assert "no file matches 'gone.onnx'" in missing.verdicts[1].why
    assert run(project, GROWTH).exit_code == 3
    run(project, GROWTH, update=True)
    save(project, "second", layers=1)
    report = run(project, GROWTH)
    assert report.exit_code == 3
    assert [v.status for v in report.verdicts if v.model == "models/net.onnx"] == ["ok"] * 3
    assert all("--update" in v.why for v in report.verdicts if v.model == "models/second.onnx")


def test_a_broken_budget_outweighs_a_missing_measurement(project: Path) -> None:
    body = '[gate.models."models/*.onnx"]\nnodes.max = 1\n[gate.models."gone.onnx"]\nnodes.max = 1'
    assert run(project, body).exit_code == 1


def test_no_baseline_is_written_while_a_model_is_missing(project: Path) -> None:
    with pytest.raises(NotMeasuredError, match="baseline was not rewritten"):
        run(project, GROWTH + '\n[gate.models."gone.onnx"]\nnodes.max = 1', update=True)
    assert not (project / "effic-baseline.json").exists()


def test_a_broken_model_is_bad_input_and_stops_no_other(project: Path) -> None:
    save(project, "a_sound_one", layers=1)
    run(project, GROWTH, update=True)
    (project / "models" / "net.onnx").write_bytes(b"\x08\x0agarbage")
    report = run(project, GROWTH)
    assert report.exit_code == 2
    assert {(v.model, v.status) for v in report.verdicts} == {
        ("models/a_sound_one.onnx", "ok"),
        ("models/net.onnx", "error"),
    }
    assert all("net.onnx" in v.why for v in report.verdicts if v.status == "error")
    before = (project / "effic-baseline.json").read_bytes()
    with pytest.raises(InvalidModelError):
        run(project, GROWTH, update=True)
    assert (project / "effic-baseline.json").read_bytes() == before
    # What is certain outweighs what cannot be judged, and that what was not measured.
    assert run(project, '[gate.models."models/*.onnx"]\nnodes.max = 1').exit_code == 1
    gone = '\n[gate.models."gone.onnx"]\nnodes.max = 1'
    assert run(project, '[gate.models."models/*.onnx"]\nnodes.max = 1000' + gone).exit_code == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"effic_baseline": 1}',
        '{"effic_baseline": 1, "models": {"a": {}}}',
        '{"effic_baseline": 1, "models": {}, "headroom": NaN}',
        '{"effic_baseline": 1, "models": {}, "headroom": -1}',
        '{"effic_baseline": 1, "models": {"a": {"file_bytes": Infinity}}}',
    ],
)
def test_a_malformed_baseline(project: Path, text: str) -> None:
    (project / "effic-baseline.json").write_text(text)
    with pytest.raises(UsageError, match="malformed"):
        run(project, GROWTH)
    assert run(project, GROWTH, update=True).exit_code == 0


def test_a_baseline_of_another_format(project: Path) -> None:
    (project / "effic-baseline.json").write_text('{"effic_baseline": 99}')
    with pytest.raises(UsageError, match="format 99"):
        run(project, GROWTH)


def test_the_baseline_reads_well_in_a_review(project: Path) -> None:
    run(project, GROWTH, update=True)
    text = (project / "effic-baseline.json").read_text()
    assert text.endswith("}\n")
    assert '\n   "nodes": ' in text
    assert json.loads(text)["effic_baseline"] == 1
    run(project, GROWTH, update=True)
    assert (project / "effic-baseline.json").read_text() == text
    assert sorted(p.name for p in project.iterdir()) == ["effic-baseline.json", "effic.toml", "models"]


def test_the_report_is_json(project: Path) -> None:
    report = run(project, GROWTH, update=True)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["exit_code"] == 0
    assert {v["metric"] for v in data["verdicts"]} == {"weight_bytes", "nodes", "macs"}
