"""The site builds without a warning: every page is in the menu, every link and anchor leads somewhere; and
what the first page for newcomers shows works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\" >]+)", text)
        # The canonical address of nothing: the site is read from a folder.
        assert not loaded, (page.name, loaded)


def test_the_first_ten_minutes_work(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "first-steps.md").read_text(encoding="utf-8")
    commands = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    assert len(commands) > 5
    (tmp_path / "models").mkdir()
    for name in ("digits.onnx", "digits_test.npz"):
        shutil.copy(ROOT / "models" / name, tmp_path / "models" / name)
    folder = os.path.dirname(sys.executable)
    done = subprocess.run(
        ["bash", "-euc", "\n".join(commands)],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "the same, bit for bit" in done.stdout
    assert "3 kept" in done.stdout
