"""Fixtures every test may use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from effic.ir.safetensors_format import write_safetensors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data, beside the checkout or named by EFFIC_DATA."""
    folder = Path(os.environ.get("EFFIC_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "load.py").is_file():
        pytest.skip(f"real models and data are not at {folder}; set EFFIC_DATA to run this test")
    return folder


WriteAdapter = Callable[..., str]


@pytest.fixture(scope="session")
def write_adapter() -> WriteAdapter:
    """``write_adapter(folder, {"q.lora_A.weight": a, …}, r=2)`` makes a PEFT folder and gives its path."""

    def write(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        keys = {key if key.startswith("base_model.") else f"base_model.model.{key}": key for key in tensors}
        write_safetensors(
            folder / "adapter_model.safetensors",
            {key: np.asarray(tensors[name]) for key, name in keys.items()},
            {"format": "pt"},
        )
        return str(folder)

    return write
