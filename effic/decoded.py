"""Weights that are computed from codes when a file is loaded, as lowering writes out what no kernel decodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from effic.ir.encodings import ENCODING_KEY
from effic.ir.model import Model, constant_tensor, noted_text
from effic.ir.weights import WeightSite, weight_sites
from effic.measure_graph import Constants


@dataclass(frozen=True)
class DecodedWeight:
    """A computed weight.

    Attributes:
        name: as the model that was lowered called it, where that is noted; of its codes otherwise.
        site: the computed value as a weight.
        codes: the largest of the constants that it is computed from, or None.
        bits, group: of the encoding, where they are noted.
        bytes: of all these constants.
        parts: their names.
    """

    name: str
    site: WeightSite
    codes: ir.TensorProtocol | None
    bits: int | None
    group: int | None
    bytes: int
    parts: frozenset[str]

    @property
    def shape_oi(self) -> tuple[int, int]:
        """``(out, in)``: the weight's where it is known, and that of its codes otherwise."""
        if self.site.shape:
            return self.site.shape_oi
        shape = () if self.codes is None else self.codes.shape.numpy()
        if self.codes is None or not shape or not self.codes.size:
            return 0, 0
        out = shape[0] if "Conv" in self.site.kind else shape[-1]
        return out, self.codes.size // out


def decoded_weights(model: Model) -> list[DecodedWeight]:
    """The weights of a model that are computed from constants in a form that effic does not know."""
    constants = Constants(model)
    return [
        _decoded(site)
        for site in weight_sites(model)
        if site.encoding is None and site.compressed is None and constants.is_derived(site.value.producer())
    ]


def _decoded(site: WeightSite) -> DecodedWeight:
    total, seen, todo = 0, set[int](), [site.value]
    codes: ir.TensorProtocol | None = None
    name, notes, parts = site.name, dict[str, Any](), set[str]()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        node, tensor = value.producer(), constant_tensor(value)
        if tensor is not None:
            total += tensor.nbytes
            parts.add(value.name or "")
            if codes is None or tensor.nbytes > codes.nbytes:
                codes, name = tensor, value.name or name
        elif node is not None:
            notes = notes or encoding_notes(node)
            todo += [each for each in node.inputs if each is not None]
    return DecodedWeight(
        notes.get("weight") or name,
        site,
        codes,
        notes.get("bits") or None,
        notes.get("group_size"),
        total,
        frozenset(parts),
    )


def encoding_notes(node: ir.Node) -> dict[str, Any]:
    """What lowering notes of an encoding that it gave another form: ``weight``, ``bits``, ``group_size``."""
    try:
        notes: Any = json.loads(node.metadata_props.get(ENCODING_KEY, "null"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(notes, dict):
        return {}
    kinds = {"bits": int, "group_size": int}
    found = {key: notes[key] for key, kind in kinds.items() if type(notes.get(key)) is kind}
    return {**found, "weight": noted_text(notes.get("weight"))}
