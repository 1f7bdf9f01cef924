"""What a pass is: a frozen value whose fields are its options, and the remarks it leaves."""

from __future__ import annotations

import abc
import dataclasses
import enum
import fnmatch
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from effic.ir.model import Model, describe


class Numerics(enum.Enum):
    """How far a pass may move a model's outputs; the runner checks it."""

    EXACT = "exact"
    """Bit for bit the same outputs."""
    ROUNDING = "rounding"
    """The same mathematics in another order: differences within the tolerance of the dtype."""
    LOSSY = "lossy"
    """Outputs move on purpose; the distance is measured and reported, NaN and Inf still fail."""


def option(default: Any = dataclasses.MISSING, *, help: str, **limits: Any) -> Any:
    """A pass option: a dataclass field with a help text and, for numbers, limits.

    Args:
        default: its default; without one the option must be given.
        help: one line for ``effic explain``.
        limits: ``ge=``, ``le=`` (numbers, inclusive) or ``choices=`` (a tuple); a ``Literal`` type
            needs no ``choices``.
    """
    metadata = {"help": help, **limits}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Remark:
    """What a pass did at one place, or why it did not.

    Attributes:
        kind: ``"passed"`` or ``"missed"``.
        where: the node or weight, as people know it.
        text: what was done, or the reason it was not, as a phrase.
        data: figures for the report (bits, errors, …), JSON-able.
    """

    kind: Literal["passed", "missed"]
    where: str
    text: str
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


class Remarks:
    """Collects a pass's remarks in order."""

    def __init__(self) -> None:
        self.items: list[Remark] = []

    def passed(self, where: ir.Node | str, text: str, **data: Any) -> None:
        """Something was rewritten at ``where``."""
        self.items.append(Remark("passed", _where(where), text, data))

    def missed(self, where: ir.Node | str, text: str, **data: Any) -> None:
        """Something was looked at and left alone, for the reason in ``text``."""
        self.items.append(Remark("missed", _where(where), text, data))

    def count(self, kind: Literal["passed", "missed"]) -> int:
        """Number of remarks of one kind."""
        return sum(item.kind == kind for item in self.items)


def _where(where: ir.Node | str) -> str:
    return where if isinstance(where, str) else describe(where)


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite of a model.

    A subclass is a frozen dataclass. Its class attributes :attr:`name` and :attr:`numerics` say
    what it is called and how far numbers may move; its fields, made with :func:`option`, are its
    options; its docstring is its documentation (first line = summary). ``apply`` rewrites the
    model in place and leaves a remark for each place it looked at. It neither checks the result
    nor says whether anything changed: the runner does.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics]
    needs_opset: ClassVar[int] = 0
    """Lowest standard opset the pass's result needs; the runner raises the model first."""

    @abc.abstractmethod
    def apply(self, model: Model, remarks: Remarks) -> None:
        """Rewrite ``model`` in place, leaving remarks."""

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]


def matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """Whether ``name`` matches any of the shell-style patterns (``*.attention.*``)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
