"""The small real model that ships with effic, and seeded builders of test models.

``digits.onnx`` classifies handwritten digits; README.md in this folder says how it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["digits_path", "digits_test"]

_FOLDER = Path(__file__).resolve().parent


def digits_path() -> Path:
    """The model file that ships with effic: a Conv–BatchNorm classifier of digits, norms unfused."""
    return _FOLDER / "digits.onnx"


def digits_test() -> tuple[np.ndarray, np.ndarray]:
    """The held-out test data of the digits model.

    Returns:
        Images float32 [450, 1, 8, 8] between 0 and 1, and their labels int64 [450].
    """
    import numpy as np

    with np.load(_FOLDER / "digits_test.npz") as data:
        return data["images"], data["labels"]
