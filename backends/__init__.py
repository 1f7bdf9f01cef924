"""The table of targets: reading it is enough to know them all."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from effic.ir.errors import UsageError
from effic.passes import near

if TYPE_CHECKING:
    from effic.backends.base import Backend

TARGETS: dict[str, str] = {
    # what any ONNX tool reads
    "portable": "effic.backends.ort.targets:Portable",
    # ONNX Runtime on a CPU
    "ort-cpu": "effic.backends.ort.targets:OrtCpu",
}

DEFAULT_TARGET = "ort-cpu"


def load_backend(name: str) -> type[Backend]:
    """The class of a target.

    Raises:
        UsageError: no such target; the nearest name is proposed.
    """
    if name not in TARGETS:
        names = ", ".join(TARGETS)
        raise UsageError(f"there is no target '{name}'{near(name, list(TARGETS))} (targets: {names})")
    from effic.backends.base import Backend

    module, _, attribute = TARGETS[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise UsageError(f"the target '{name}' is not a subclass of effic.backends.base.Backend")
    return found


def get_backend(text: str) -> Backend:
    """The target a text names: ``ort-cpu`` or ``ort-cpu{accuracy_level=0}``.

    Raises:
        UsageError: an unknown target or option, or a value out of range.
    """
    from effic.passes.spec import build, parse_one

    if not text.strip():
        raise UsageError(f"the target is empty (targets: {', '.join(TARGETS)})")
    name, at, options = parse_one(text)
    return build(load_backend(name), name, options, text, at)
