"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data, beside the checkout or named by EFFIC_DATA."""
    folder = Path(os.environ.get("EFFIC_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "load.py").is_file():
        pytest.skip(f"real models and data are not at {folder}; set EFFIC_DATA to run this test")
    return folder
