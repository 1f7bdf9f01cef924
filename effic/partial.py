"""A pass applied to some of its sites only, to find out which of them does what."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Collection, Sequence

import onnx_ir as ir

from effic.ir.model import Model, constant_tensor
from effic.passes.base import Pass
from effic.passes.calibration import Calibration
from effic.passes.pipeline import run_passes
from effic.passes.spec import to_text


def literal(name: str) -> str:
    """A pattern that matches exactly this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


class Partial(abc.ABC):
    """A pass whose work can be restricted to sites.

    Attributes:
        sites: names of the places it changes, in its own order.
        how: how it is restricted, as a phrase.
    """

    sites: Sequence[str]
    how: str

    @abc.abstractmethod
    def apply(self, chosen: Collection[str]) -> Model:
        """The model before the pass, with the pass's work done at the chosen sites only."""

    def skip(self, sites: Collection[str]) -> str | None:
        """Text form of the pass that leaves sites alone, or None where it has no such option."""
        return None


class _BySkip(Partial):
    """Through the pass's own option ``skip``."""

    how = "by its option skip"

    def __init__(
        self, item: Pass, before: Model, sites: Sequence[str], calibration: Calibration | None
    ) -> None:
        self._item, self._before, self._calibration = item, before, calibration
        self.sites = sites

    def apply(self, chosen: Collection[str]) -> Model:
        model = self._before.clone()
        run_passes(
            model,
            [self._without([s for s in self.sites if s not in chosen])],
            check="off",
            calibration=self._calibration,
        )
        return model

    def skip(self, sites: Collection[str]) -> str | None:
        return to_text(self._without(sites))

    def _without(self, sites: Collection[str]) -> Pass:
        given: tuple[str, ...] = getattr(self._item, "skip", ())
        return dataclasses.replace(self._item, skip=(*given, *map(literal, sites)))  # type: ignore[call-arg]


class _ByWeight(Partial):
    """By giving weights that the pass changed in place their former values."""

    how = "by putting weights back"

    def __init__(self, before: Model, after: Model, sites: Sequence[str]) -> None:
        self._old, self._after, self.sites = _weights(before), after, sites

    def apply(self, chosen: Collection[str]) -> Model:
        model = self._after.clone()
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                if name in self.sites and name not in chosen:
                    value.const_value = self._old[name]
        return model


def partial(
    item: Pass, before: Model, after: Model, calibration: Calibration | None = None
) -> Partial | None:
    """The pass restricted to sites, or None where its work cannot be taken apart.

    Args:
        item: the pass.
        before: the model before it.
        after: the model after it.
        calibration: what it looked at, where it needs data.
    """
    if any(field.name == "skip" for field in dataclasses.fields(item)):
        sites = _passed(item, before, calibration)
        if sites:
            return _BySkip(item, before, sites, calibration)
    old, new = _weights(before), _weights(after)
    changed = [
        name
        for name, tensor in new.items()
        if name in old
        and tensor is not old[name]
        and (tensor.dtype, tensor.shape) == (old[name].dtype, old[name].shape)
    ]
    if changed and _same_nodes(before, after):
        return _ByWeight(before, after, changed)
    return None


def _passed(item: Pass, before: Model, calibration: Calibration | None) -> list[str]:
    """Names of the weights the pass wrote, as its remarks give them."""
    result = run_passes(before.clone(), [item], check="off", calibration=calibration)
    names = [remark.where for remark in result.steps[0].remarks if remark.kind == "passed"]
    return list(dict.fromkeys(names))


def _weights(model: Model) -> dict[str, ir.TensorProtocol]:
    found = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = constant_tensor(value)
            if tensor is not None:
                found[name] = tensor
    return found


def _same_nodes(before: Model, after: Model) -> bool:
    def rows(model: Model) -> list[tuple[object, ...]]:
        return [
            (n.op_type, tuple(v.name if v is not None else None for v in n.inputs))
            for n in model.nodes(domain=None)
        ]

    return rows(before) == rows(after)
