"""What a target is: a frozen value whose fields are its options, that lowers models and loads files."""

from __future__ import annotations

import abc
import inspect
import os
from dataclasses import dataclass
from typing import ClassVar

from effic.backends.artifact import Arrays, Artifact
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.passes.base import Remarks, option_problem, options_of
from effic.passes.spec import option_text

__all__ = ["Arrays", "Artifact", "Backend"]


@dataclass(frozen=True)
class Backend(abc.ABC):
    """One target, with its options.

    A subclass is a frozen dataclass; :attr:`name` is what the target is called, its fields, made
    with :func:`effic.passes.base.option`, are its options, its docstring is its documentation.
    """

    name: ClassVar[str]

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

    @abc.abstractmethod
    def load(self, path: str | os.PathLike[str], *, threads: int = 1) -> Artifact:
        """Open a file that was lowered for this target."""

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]
