"""Imports put off until something in them is used, in the processes that the command line owns.

onnx_ir imports sympy for arithmetic on symbolic sizes: a quarter of a second that most runs have no use
for, as a size that is merely called ``batch`` needs none.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The second takes functions out of the first while it is imported, so both have to wait.
PUT_OFF = ("sympy", "onnx_ir._symbolic_shapes")


class _Later(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PUT_OFF:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def put_off_imports() -> None:
    """Let the modules of :data:`PUT_OFF` be executed when something in them is used."""
    if not any(isinstance(finder, _Later) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Later())
