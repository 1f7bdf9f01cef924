"""A function of the user's own, named on the command line as ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from effic.ir.errors import UsageError


def named_function(text: str, what: str) -> Callable[..., Any]:
    """Import the function a text names; modules in the working folder are found too.

    Args:
        text: ``package.module:function``.
        what: what it is for, for the error's sentence: ``"the metric"``.

    Raises:
        UsageError: it cannot be imported, or is not callable.
    """
    module, _, name = text.partition(":")
    folder = os.getcwd()  # the installed command does not look there by itself
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{what} {text} cannot be imported: {error}") from error
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise UsageError(f"{what} {text} is no function")
    return found  # type: ignore[no-any-return]
