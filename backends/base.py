"""What a target is: a frozen value whose fields are its options, that lowers models and loads files."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from effic.backends.artifact import Arrays, Artifact
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.passes.base import Remark, Remarks, option_problem, options_of
from effic.passes.spec import option_text

__all__ = ["Arrays", "Artifact", "Backend", "Built", "Tell"]

Tell = Callable[[str, int, int], None]
"""Called with what is being done, the number of the stage, and how many there are."""


@dataclass(frozen=True)
class Built:
    """What building gave.

    Attributes:
        outputs: of the inputs that were to be tried, or None.
        remarks: what became of nodes, where that is decided only when building.
        seconds: time of the build.
        peak_memory: bytes the building process had at most; 0 where it was this one.
        stages: seconds of each stage by name.
    """

    outputs: Arrays | None = None
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    stages: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Backend(abc.ABC):
    """One target, with its options.

    A subclass is a frozen dataclass; :attr:`name` is what the target is called, its fields, made
    with :func:`effic.passes.base.option`, are its options, its docstring is its documentation.
    """

    name: ClassVar[str]
    is_folder: ClassVar[bool] = False
    """Whether a build is a folder, made by a compiler, and not the model's own .onnx file."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages beside effic's own that decide what is built."""
    rival: ClassVar[str] = ""
    """Another target, which what was built has to be faster than to be called fast; the original runs there."""

    def __post_init__(self) -> None:
        for field, kind in options_of(type(self)):
            if problem := option_problem(field, kind, getattr(self, field.name)):
                raise UsageError(f"{self.name}: {field.name} {problem}")

    @property
    def text(self) -> str:
        """The text form, with the options that differ from their defaults."""
        return option_text(self.name, self)

    @abc.abstractmethod
    def lower(self, model: Model, remarks: Remarks) -> Model:
        """Rewrite ``model`` in place into what the target runs best.

        Args:
            model: in canonical form: standard operators, weights as constants or encodings.
            remarks: gets one entry per encoded weight: what it became, or why it stayed and what
                that costs.

        Returns:
            ``model``.
        """

    def sizes(self, model: Model) -> dict[str, int]:
        """Sizes of the model's dynamic dimensions, by name, that a build runs at; empty where any will do."""
        return {}

    def buckets(self, model: Model) -> list[dict[str, int]]:
        """All sets of such sizes that a build has code for, :meth:`sizes` the first; none where any will do."""
        return [sizes] if (sizes := self.sizes(model)) else []

    def build(
        self,
        model: Model,
        path: str | os.PathLike[str],
        *,
        inputs: Mapping[str, np.ndarray] | None = None,
        tell: Tell | None = None,
    ) -> Built:
        """Write a lowered model as :meth:`load` takes it; unless the target compiles, as an ``.onnx`` file.

        Args:
            model: what :meth:`lower` made.
            path: where to; nothing is there yet, or an empty folder.
            inputs: for a target with :attr:`is_folder`: what to run the finished build on.
            tell: hears of the stages of a compiler.
        """
        model.save(path)
        return Built()

    @abc.abstractmethod
    def load(self, path: str | os.PathLike[str], *, threads: int = 1) -> Artifact:
        """Open a file or folder that was built for this target."""

    def run_apart(
        self, path: str | os.PathLike[str], feeds: Iterable[Mapping[str, np.ndarray]]
    ) -> Iterator[Arrays]:
        """Outputs of a build for each of several sets of inputs, one after the other."""
        artifact = self.load(path)
        return (artifact.run(inputs) for inputs in feeds)

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]
