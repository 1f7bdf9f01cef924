"""How a target would run a model, operator by operator, without building it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effic.backends.tvm.coverage import sizes_to_try
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.relax_builder import Uncovered, survey_bucket
from effic.ir.model import Model


@dataclass
class OperatorRow:
    """How the nodes of one operator are run.

    Attributes:
        op: the operator, with the domain where that is not ONNX's.
        kernels: nodes that become calls of effic's kernels.
        converted: nodes lowered by effic's converters, for the schedules.
        imported: nodes lowered by TVM's importer, for the schedules.
        refused: nodes that cannot be lowered.
    """

    op: str
    kernels: int = 0
    converted: int = 0
    imported: int = 0
    refused: int = 0


@dataclass(frozen=True)
class Survey:
    """What :func:`survey` found: rows by operator, most nodes first, and what cannot be lowered.

    Attributes:
        sizes: the sizes of open dimensions that it was found for.
    """

    target: str
    sizes: dict[str, int]
    rows: tuple[OperatorRow, ...]
    uncovered: tuple[Uncovered, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


def survey(
    model: Model, target: str, cpu: Cpu | None, shapes: str = "", options: Mapping[str, Any] | None = None
) -> Survey:
    """How each operator would be run, at the first set of sizes in ``shapes`` or at small ones.

    Nodes are those that are left when sizes are fixed and constants folded.
    """
    sizes = sizes_to_try(model, shapes)
    ways, uncovered = survey_bucket(model, sizes, cpu, options)
    rows: dict[str, OperatorRow] = {}
    for way in ways:
        row = rows.setdefault(way.op, OperatorRow(way.op))
        if way.kernels:
            row.kernels += 1
        elif way.by == "effic":
            row.converted += 1
        else:
            row.imported += 1
    for one in uncovered:
        rows.setdefault(one.op, OperatorRow(one.op)).refused += 1
    ordered = sorted(
        rows.values(), key=lambda row: -(row.kernels + row.converted + row.imported + row.refused)
    )
    return Survey(target, sizes, tuple(ordered), tuple(uncovered))
