"""What a pass is: a frozen value whose fields are its options, and the remarks it leaves."""

from __future__ import annotations

import abc
import dataclasses
import enum
import fnmatch
import inspect
import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx_ir as ir

from effic.ir.errors import UsageError
from effic.ir.model import Model, describe

if TYPE_CHECKING:
    from effic.ir.weights import WeightSite
    from effic.passes.calibration import Calibration
    from effic.passes.finished import FinishedSites


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
            needs no ``choices``. ``example=`` is a value to show, for options without a telling default.
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
    """Collects a pass's remarks in order.

    Attributes:
        items: the remarks.
        finished: where what is done to each weight is kept, for a run that may be interrupted; else None.
    """

    def __init__(self, finished: FinishedSites | None = None) -> None:
        self.items: list[Remark] = []
        self.finished = finished

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
    adds_inputs: ClassVar[bool] = False
    """Whether the pass may add optional inputs (with default values): what callers do now stays right."""

    def __post_init__(self) -> None:
        for field, kind in options_of(type(self)):
            if problem := option_problem(field, kind, getattr(self, field.name)):
                raise UsageError(f"{self.name}: {field.name} {problem}")

    def refuse_idle(self, mode: str, *names: str) -> None:
        """Refuse options that do nothing in a mode.

        Args:
            mode: what makes them do nothing, as it is written: ``base=rtn``.
            names: the options; each has to be left at its default.

        Raises:
            UsageError: one of them is given.
        """
        for field in dataclasses.fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise UsageError(f"{self.name}: {field.name} does nothing with {mode}; leave it out")

    @abc.abstractmethod
    def apply(self, model: Model, remarks: Remarks) -> None:
        """Rewrite ``model`` in place, leaving remarks."""

    def candidates(self, model: Model, remarks: Remarks) -> list[WeightSite] | None:
        """The weights the pass would work on, each by itself and with an option ``skip``; None: it is not so.

        A plan tries such a pass on one weight of each kind and counts how many there are, instead of doing
        all the work.

        Args:
            model: the model; nothing in it is rewritten.
            remarks: gets what would be left alone, and why.
        """
        return None

    def rehearsed(self) -> Pass:
        """The same pass without what it does outside the model (files it writes), for trying it out."""
        return self

    def stays(self) -> float:
        """The share of the weights' bytes that is sure to stay: runs that cannot fit are refused by it.

        Nothing is known of a lossy pass unless it says so itself.
        """
        return 0.0 if self.numerics is Numerics.LOSSY else 1.0

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @classmethod
    def wants_data(cls) -> bool:
        """Whether the pass needs calibration data, as far as its options are left as they are."""
        return False


@dataclass(frozen=True)
class CalibratedPass(Pass):
    """A pass that needs to see data: the runner hands it the calibration samples of the run."""

    @property
    def needs_data(self) -> bool:
        """Whether these options need calibration data at all."""
        return True

    @property
    def uses_data(self) -> bool:
        """Whether these options make use of calibration data where there are some."""
        return self.needs_data

    def require_data(self, data: object | None) -> None:
        """Refuse to run without data.

        Raises:
            UsageError: the pass needs data and ``data`` is None.
        """
        if data is None and self.needs_data:
            raise UsageError(
                f"{self.name} needs calibration data; give some with --calib DATA "
                "(arrays as .npz, .npy, .safetensors or a folder of them), or made-up data with --calib random"
            )

    @classmethod
    def wants_data(cls) -> bool:
        required = any(
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            for field in dataclasses.fields(cls)
        )
        return required or cls().needs_data

    def apply(self, model: Model, remarks: Remarks) -> None:
        self.apply_with(model, None, remarks)

    def apply_with(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        """Rewrite ``model`` in place, leaving remarks.

        Args:
            model: the model.
            calibration: the samples, or None; never None for :meth:`calibrate`.
            remarks: gets a line per place looked at.

        Raises:
            UsageError: the pass needs data and there is none.
        """
        self.require_data(calibration)
        self.calibrate(model, calibration, remarks)

    @abc.abstractmethod
    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        """Rewrite ``model`` in place; ``calibration`` is None only where :attr:`needs_data` is false."""


def options_of(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The options of a pass or target class: its dataclass fields, with their resolved types."""
    kinds = typing.get_type_hints(cls)
    return [(field, kinds[field.name]) for field in dataclasses.fields(cls)]


def option_problem(field: dataclasses.Field[Any], kind: Any, value: Any) -> str | None:
    """Why ``value`` cannot be the option's value, as a phrase that follows its name, or None."""
    allowed = typing.get_args(kind) if typing.get_origin(kind) is Literal else field.metadata.get("choices")
    if allowed is not None and typing.get_origin(kind) is tuple and isinstance(value, tuple):
        wrong = next((v for v in value if v not in allowed), None)
        return None if wrong is None else f"has {wrong!r}, allowed are {', '.join(map(str, allowed))}"
    if allowed is not None:
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            return f"is {value!r}, allowed are {', '.join(map(str, allowed))}"
        return None
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            return f"is {value!r}, which is no {'integer' if kind is int else 'number'}"
        if math.isnan(value):
            return f"is {value}, which is no number"
        low, high = field.metadata.get("ge"), field.metadata.get("le")
        if low is not None and value < low:
            return f"is {value}, the least is {low}"
        if high is not None and value > high:
            return f"is {value}, the most is {high}"
    elif kind is bool and not isinstance(value, bool):
        return f"is {value!r}, allowed are true, false"
    elif kind is str and not isinstance(value, str):
        return f"is {value!r}, which is no text"
    elif typing.get_origin(kind) is tuple and not (
        isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    ):
        return f"is {value!r}, which is no list of texts; write [a,b]"
    return None


def matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """Whether ``name`` matches any of the shell-style patterns (``*.attention.*``)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
