"""Accuracy of digit classifiers on the held-out test data: ``python -m effic.models.accuracy A.onnx B.onnx``."""

from __future__ import annotations

import sys

import numpy as np

from effic.ir.evaluate import run_session, start_session
from effic.models import digits_test


def accuracy(path: str) -> float:
    """Share of the test images that a model file classifies right, run by ONNX Runtime."""
    images, labels = digits_test()
    session = start_session(path, optimized=True)
    (logits,) = run_session(session, {session.get_inputs()[0].name: images}).values()
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def main(paths: list[str]) -> None:
    """Print one line per model file."""
    for path in paths:
        print(f"accuracy {accuracy(path):.4f}  {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
