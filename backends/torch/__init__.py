"""The torch backend: any model as a torch module to train, and what it learned back into the model."""

from __future__ import annotations

import importlib.util

from effic.ir.errors import MissingExtraError

if importlib.util.find_spec("torch") is None:
    raise MissingExtraError("torch", "torch", "building a torch module")
