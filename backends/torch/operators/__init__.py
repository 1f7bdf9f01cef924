"""The operators the torch backend knows: one table, reading it is enough.

A family is a module of this package; its entries name, for each ONNX operator, the function in it that
converts the operator. Operators of other domains are written ``domain::Operator``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import onnx_ir as ir

from effic.ir.model import ONNX_DOMAINS

if TYPE_CHECKING:
    from effic.backends.torch.builder import Converter

FAMILIES: dict[str, dict[str, str]] = {
    # -- arithmetic, comparisons, activations, casts
    "elementwise": {},
    # -- shapes and views
    "shape": {},
    # -- sums, extrema, softmax
    "reduction": {},
    # -- products of matrices
    "linear": {},
    # -- normalizations
    "normalization": {},
    # -- attention and rotary embeddings
    "attention": {},
    # -- If, Loop, Scan
    "control": {},
}

OPERATORS: dict[str, str] = {
    operator: f"effic.backends.torch.operators.{family}:{function}"
    for family, members in FAMILIES.items()
    for operator, function in members.items()
}


def operator_key(node: ir.Node) -> str:
    """The key of a node's operator in :data:`OPERATORS`."""
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}::{node.op_type}"


def lookup(node: ir.Node) -> Converter | None:
    """The converter of a node's operator, None when there is none."""
    entry = OPERATORS.get(operator_key(node))
    if entry is None:
        return None
    module, _, function = entry.partition(":")
    converter: Converter = getattr(importlib.import_module(module), function)
    return converter
