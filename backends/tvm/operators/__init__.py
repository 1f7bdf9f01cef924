"""The table of effic's own converters: operator -> ``module:function`` in this folder.

What is not here goes through the converters of TVM's ONNX importer, see
:mod:`effic.backends.tvm.private_api`. A converter raises
:class:`effic.ir.errors.UnsupportedError` (best by ``Lowering.refuse``) for what it cannot hold.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from effic.backends.tvm.lowering import Converter, Lowering

CONVERTERS: dict[str, str] = {
    "Conv": "convolution:conv",
    "Gather": "indexing:gather",
    "Gemm": "matmul:gemm",
    "MatMul": "matmul:matmul",
    "Slice": "indexing:slice_",
}
"""By operator; those of other domains as ``domain::operator``."""


def find_converter(key: str) -> Converter | None:
    """effic's own converter of an operator, None where there is none."""
    if key not in CONVERTERS:
        return None
    module, _, name = CONVERTERS[key].partition(":")
    found: Converter = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found


def through_blocked(lowering: Lowering, node: ir.Node) -> bool:
    """Lower a node whose inputs lie in blocked layout without leaving it, where that can be done.

    Returns:
        Whether it was lowered; otherwise its converter reads plain layout.
    """
    if not any(lowering.is_blocked(value) for value in node.inputs):
        return False
    from effic.backends.tvm.operators.blocked import convert_blocked

    return convert_blocked(lowering, node)
