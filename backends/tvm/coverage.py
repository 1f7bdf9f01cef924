"""What a target cannot run, found before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.relax_builder import Uncovered, try_bucket
from effic.backends.tvm.specialize import Dims, open_dims, parse_shapes
from effic.ir.model import Model

__all__ = ["Uncovered", "coverage", "sizes_to_try"]

# Sizes tried where none are given: an axis that is first, and any other.
_FIRST, _OTHER = 1, 16


def coverage(
    model: Model, cpu: Cpu | None, shapes: str = "", options: Mapping[str, Any] | None = None
) -> list[Uncovered]:
    """The nodes that cannot be lowered, with the reason of each; empty when all can.

    The model is lowered on trial, at the first set of sizes in ``shapes`` (without it, at small sizes of
    the open dimensions); nothing is compiled.

    Args:
        model: it is not changed.
        cpu, shapes, options: see :func:`effic.backends.tvm.relax_builder.build_relax`.
    """
    return try_bucket(model, sizes_to_try(model, shapes), cpu, options)


def sizes_to_try(model: Model, shapes: str = "") -> Dims:
    """Sizes of all open dimensions: those of the first set in ``shapes``, small ones for the others."""
    tried = {name: _FIRST if 0 in axes else _OTHER for name, axes in open_dims(model).items()}
    buckets = parse_shapes(shapes)
    return {**tried, **(buckets[0] if buckets else {})}
