"""Generated pages are up to date, and what the README shows works."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

from effic.passes.spec import parse_passes

ROOT = Path(__file__).resolve().parents[2]


def test_the_pass_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_passes", ROOT / "docs" / "make_passes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "passes.md").read_text() == module.page(), "run: python docs/make_passes.py"


def test_pass_lists_in_the_readme_parse() -> None:
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"--passes '([^']+)'", text)
    assert found
    for passes in found:
        parse_passes(passes)


def test_links_in_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/torch.md", "docs/training.md", "docs/plugins.md"])
def test_python_in_the_pages_runs(page: str, tmp_path, monkeypatch) -> None:
    text = (ROOT / page).read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes((ROOT / "models" / "digits.onnx").read_bytes())
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        if "torch" in block:
            pytest.importorskip("torch")
        module = types.ModuleType("readme")
        monkeypatch.setitem(sys.modules, "readme", module)  # dataclasses look their module up
        exec(compile(block, page, "exec"), vars(module))
