"""The table of targets: reading it is enough to know them all.

A target of another package is listed by an entry point in the group ``effic.backends`` (name = the
target's name, object = the class).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from effic.ir.errors import UsageError
from effic.passes import near
from effic.passes.plugins import load_plugin, plugin_names

if TYPE_CHECKING:
    from effic.backends.base import Backend

GROUP = "effic.backends"
"""Entry points of other packages' targets."""

TARGETS: dict[str, str] = {
    # what any ONNX tool reads
    "portable": "effic.backends.ort.targets:Portable",
    # ONNX Runtime on a CPU
    "ort-cpu": "effic.backends.ort.targets:OrtCpu",
    # ONNX Runtime on an NVIDIA GPU: builds, unverified
    "ort-cuda": "effic.backends.ort.targets:OrtCuda",
    # compiled by TVM, with effic's own kernels
    "tvm-cpu": "effic.backends.tvm.targets:TvmCpu",
    # the same for an NVIDIA GPU: builds, unverified
    "tvm-cuda": "effic.backends.tvm.targets:TvmCuda",
}

DEFAULT_TARGET = "ort-cpu"


def target_names() -> list[str]:
    """Names of all targets, third parties' last."""
    return [*TARGETS, *(name for name in plugin_names(GROUP) if name not in TARGETS)]


def load_backend(name: str) -> type[Backend]:
    """The class of a target.

    Raises:
        UsageError: no such target (the nearest name is proposed), or a third party's does not load.
    """
    from effic.backends.base import Backend

    if name not in TARGETS:
        other = load_plugin(GROUP, name, "target", Backend)  # type: ignore[type-abstract]
        if other is None:
            names = target_names()
            raise UsageError(f"there is no target '{name}'{near(name, names)} (targets: {', '.join(names)})")
        return other
    module, _, attribute = TARGETS[name].partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), attribute)
    return found


def get_backends(text: str) -> list[Backend]:
    """The targets a text names: ``ort-cpu,tvm-cpu{activations=int8}``.

    Raises:
        UsageError: an unknown target or option, or a value out of range.
    """
    from effic.passes.spec import build, parse_several

    return [build(load_backend(name), name, options, text, at) for name, at, options in parse_several(text)]


def get_backend(text: str) -> Backend:
    """The target a text names: ``ort-cpu`` or ``ort-cpu{accuracy_level=0}``.

    Raises:
        UsageError: an unknown target or option, or a value out of range.
    """
    from effic.passes.spec import build, parse_one

    if not text.strip():
        raise UsageError(f"the target is empty (targets: {', '.join(target_names())})")
    name, at, options = parse_one(text)
    return build(load_backend(name), name, options, text, at)
