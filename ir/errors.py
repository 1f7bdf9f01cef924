"""The whole error family on one page.

Every error a user can meet is an :class:`EfficError`; its text is one sentence that says what is
wrong, where, and what to do. The command line prints the text and leaves with :attr:`exit_code`:

====  =========================================================================
code  meaning
====  =========================================================================
0     done
1     a check or a budget failed
2     bad usage or bad input
3     something could not be measured, or an optional package is missing
====  =========================================================================
"""

from __future__ import annotations

from typing import ClassVar


class EfficError(Exception):
    """Base of every error effic raises on purpose. The text is one sentence for the user."""

    exit_code: ClassVar[int] = 2


class UsageError(EfficError):
    """The request cannot be understood: an unknown pass, an option out of range, a missing file."""


class DoesNotFitError(UsageError):
    """The run needs more memory or disk than this machine has; nothing was done."""


class InvalidModelError(EfficError):
    """The model file is broken, hostile, or beyond the limits; nothing was done with it."""


class CaptureError(EfficError):
    """torch could not export the module; the text carries torch's reason."""


class UnsupportedError(EfficError):
    """The model is valid, but the target or the file format cannot hold what was asked for."""


class CheckFailedError(EfficError):
    """A pass broke the model: structure or numbers moved further than the pass may move them."""

    exit_code: ClassVar[int] = 1


class BudgetExceededError(EfficError):
    """A gate's budget is broken."""

    exit_code: ClassVar[int] = 1


class NotMeasuredError(EfficError):
    """A check could not be carried out (a missing measurement is never a pass)."""

    exit_code: ClassVar[int] = 3


class MissingExtraError(EfficError):
    """An optional package is not installed."""

    exit_code: ClassVar[int] = 3

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"run: pip install 'effic[{extra}]'"
        )


class MissingToolError(EfficError):
    """A program that the job needs, a compiler say, is not on this machine."""

    exit_code: ClassVar[int] = 3
