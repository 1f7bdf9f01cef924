"""``effic optimize --plan`` and ``--no-fit-check``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from effic.cli.main import main

DIGITS = str(Path(__file__).parents[2] / "models" / "digits.onnx")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["optimize", DIGITS, *args])


def test_the_plan_is_a_table_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Put behind a whole command, as it will be run.
    result = invoke("--preset", "int8", "-o", "out.onnx", "--force", "--report", "report.json", "--plan")
    assert result.exit_code == 0, result.output
    for text in (
        "quantize-rtn{bits=8}",
        "lower for ort-cpu",
        "memory, at most",
        "temporary files",
        "time: about",
    ):
        assert text in result.output
    assert "8 convolution weights left in floating point" in result.output
    assert list(tmp_path.iterdir()) == []


def test_json_has_all_of_it() -> None:
    result = invoke("--passes", "fuse-conv-bn,quantize-rtn", "--check", "off", "--plan", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert [step["sites"] for step in found["steps"]] == [8, 2, 2]
    assert found["misfits"] == []
    assert found["memory"] > 0
    assert found["file"] > 100_000
    assert found["seconds"]["check"] == 0


def test_what_is_wrong_with_a_run_is_wrong_with_its_plan() -> None:
    result = invoke("--passes", "quantize-gptq", "--plan")
    assert result.exit_code == 2
    assert "needs calibration data" in result.output


def test_a_run_that_cannot_fit_ends_with_2_and_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effic.fit._free", lambda folder: 10_000)
    output = str(tmp_path / "out.onnx")
    result = invoke("--passes", "fuse-conv-bn", "-o", output)
    assert result.exit_code == 2
    assert "this run needs at least 0.34 MB for the output and 0.34 MB for temporary files" in result.output
    assert "0.01 MB are free" in result.output
    assert not Path(output).exists()
    assert invoke("--passes", "fuse-conv-bn", "-o", output, "--no-fit-check").exit_code == 0
    assert Path(output).exists()


def test_the_plan_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effic.fit.available_memory", lambda: 1000)
    result = invoke("--passes", "fuse-conv-bn", "--plan")
    assert result.exit_code == 0
    assert "does not fit: " in result.output
    assert "the model was not run" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-o", "none/out.onnx"), "the folder none for the output does not exist"),
        (("-o", "folder"), "is a folder; name a file in it"),
        (("-o", "there.onnx"), "exists; give --force"),
        (("--resume",), "give -o out.onnx"),
        (("--resume", "-o", "out.onnx", "--keep-if-faster"), "leave one of them out"),
        (("-o", "closed/out.onnx"), "the folder closed for the output cannot be written"),
    ],
)
@pytest.mark.parametrize("planned", [("--plan",), ()])
def test_what_would_stop_the_run_stops_its_plan(
    options: tuple[str, ...],
    says: str,
    planned: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "there.onnx").touch()
    monkeypatch.setattr("os.access", lambda path, mode, **options: "closed" not in str(path))
    result = invoke("--passes", "fuse-conv-bn", *options, *planned)
    assert result.exit_code == 2
    assert says in result.output
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["closed", "folder", "there.onnx"]


def test_json_has_a_fixed_shape_and_names_what_is_not_in_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[pass]]\nname = "quantize-rtn"\n')
    output = str(tmp_path / "out.onnx")
    result = invoke("--recipe", str(recipe), "--resume", "-o", output, "--plan", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert list(found) == [
        "passes", "target", "steps", "memory", "file", "temporary", "seconds", "memory_free", "output_free",
        "temporary_free", "misfits", "notes",
    ]  # fmt: skip
    assert list(found["seconds"]) == ["load", "calibration", "passes", "check", "save", "total"]
    assert any(note.startswith("--resume keeps up to") for note in found["notes"])
    found = json.loads(invoke("--passes", "fuse-conv-bn", "--keep-if-faster", "--plan", "--json").output)
    assert found["notes"] == ["timing the model after each pass takes time that is not in these figures"]


def test_limits_of_the_control_group_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "group"
    group.mkdir()
    for name, text in (("memory.max", "300000\n"), ("memory.current", "100000\n"), ("memory.stat", "")):
        (group / name).write_text(text)
    monkeypatch.setattr("effic.ir.memory._groups", lambda: [group])
    output = tmp_path / "out.onnx"
    result = invoke("--passes", "fuse-conv-bn", "-o", str(output))
    assert result.exit_code == 2
    assert "0.51 MB of memory, and 0.20 MB can be had" in result.output
    assert result.output.count("\n") == 1
    assert not output.exists()
