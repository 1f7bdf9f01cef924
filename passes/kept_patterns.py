"""Whether a pass kept the sparsity that the model declares for its weights; the runner asks after each."""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir

from effic.ir.model import Model, constant_tensor
from effic.ir.sparsity import Pattern, along_groups, declare, declared, violations
from effic.ir.weights import WeightSite, weight_sites
from effic.passes.base import Remarks


class DeclaredPatterns:
    """The patterns that a model declares, and the constants that they are true of.

    Args:
        model: before a pass.
    """

    def __init__(self, model: Model) -> None:
        self._marks: dict[str, _Mark] = {}
        self._names: dict[ir.Node | str, str] = {}
        patterns = declared(model)
        if not patterns:
            return
        for site in weight_sites(model):
            if site.name in patterns:
                self._marks[site.name] = _mark(site)
                self._names.update((reader, site.name) for reader in _readers(site))

    def check(self, model: Model, remarks: Remarks) -> None:
        """Look at the declared weights that changed; what breaks its pattern is said, and declared no more.

        A weight that a pass replaced by one of another name passes its pattern on, if the new one has it.

        Args:
            model: after the pass; its declarations are brought up to date.
            remarks: of the pass.
        """
        patterns = declared(model)
        if not patterns:
            return
        sites = weight_sites(model)
        present = {site.name for site in sites}
        for name in patterns.keys() - present:
            declare(model, name, None)
        seen = set()
        for site in sites:
            name = site.name
            if name not in patterns:
                old = {self._names.get(reader) for reader in _readers(site)} - {None}
                if len(old) != 1 or (name := old.pop() or "") not in patterns or name in present:
                    continue
            elif _mark(site).same(self._marks.get(name)):
                seen.add(name)
                continue
            if not _readable(site):
                continue
            seen.add(name)
            _judge(model, site, patterns[name], remarks)
        for name in sorted(patterns.keys() - present - seen):
            remarks.missed(name, f"is no weight any more; its {patterns[name]} pattern is no longer declared")


def _judge(model: Model, site: WeightSite, pattern: Pattern, remarks: Remarks) -> None:
    with site.matrix() as matrix:
        broken, groups = violations(along_groups(site, matrix), pattern, axis=1)
    declare(model, site.name, None if broken else pattern)
    if broken:
        remarks.missed(
            site.name,
            f"breaks the {pattern} pattern of {site.name} in {broken:,} of {groups:,} groups; "
            "sparsity is no longer declared for it",
            pattern=str(pattern),
            broken_groups=broken,
            groups=groups,
        )


def _readable(site: WeightSite) -> bool:
    return bool(site.shape) and (site.encoding is not None or constant_tensor(site.value) is not None)


class _Mark(NamedTuple):
    """The constant of a weight, held so that no other takes its identity, and how it is read."""

    constant: Any
    reading: tuple[Any, ...]

    def same(self, other: _Mark | None) -> bool:
        return other is not None and self.constant is other.constant and self.reading == other.reading


def _mark(site: WeightSite) -> _Mark:
    # Scales make no zero of a number and no number of a zero: the codes tell.
    constant = constant_tensor(site.value) if site.encoding is None else site.encoding.codes
    return _Mark(constant, (site.shape, site.in_axis, site.groups, site.kind))


def _readers(site: WeightSite) -> list[ir.Node | str]:
    """The weight's readers and the names of what they give: a pass that replaces the weight leaves the
    one, a pass that replaces a reader the other."""
    nodes = [use.node for use in site.uses]
    return [*nodes, *(str(node.outputs[0].name) for node in nodes if node.outputs)]
