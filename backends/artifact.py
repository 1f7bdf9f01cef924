"""What is loaded and run: importing it needs neither onnx nor any runtime."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]


class Artifact(abc.ABC):
    """A lowered model in a file, ready to run.

    Attributes:
        path: the file.
        threads: how many threads one operator may use.
    """

    path: str
    threads: int

    @classmethod
    @abc.abstractmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int = 1) -> Artifact:
        """Open a file.

        Raises:
            EfficError: one sentence with the runtime's reason.
        """

    @abc.abstractmethod
    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Copy the artifact, weights included, to another place."""

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name for inputs by name."""

    @abc.abstractmethod
    def time(
        self, inputs: Mapping[str, np.ndarray], *, repeats: int = 20, warmup: int = 2, batch: int = 1
    ) -> list[float]:
        """Seconds of one run, ``repeats`` times, each the mean of ``batch`` runs."""
