"""Every private interface of TVM that effic uses, and the version they were tried on.

The ONNX importer of TVM converts whole files only, weights included. Its converters of single operators
are what effic needs: they are reached through ``onnx_frontend._get_convert_map``. An ordinary operator
goes this way; what the importer gets wrong or does not know has a converter of effic's own in
:mod:`effic.backends.tvm.operators`. Of MetaSchedule, the context that tuning needs is made without its constructor.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from tvm import relax

TRIED_ON = "0.27.0.post1"
"""The release of apache-tvm that these were tried on."""

IMPORTER_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,  # tvm.error.InternalError and what C++ raises
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)
"""What the importer's converters and Relax's type inference raise for what they do not support: they
check little of their input and have no errors of their own."""

# Operators of other domains that the importer, which looks at names only, has right.
_OTHER_DOMAINS = {
    "com.microsoft::Gelu",
    "com.microsoft::FastGelu",
    "com.microsoft::BiasGelu",
    "com.microsoft::SkipLayerNormalization",
}


def _converters() -> dict[str, Any]:
    from tvm.relax.frontend.onnx import onnx_frontend

    found: dict[str, Any] = onnx_frontend._get_convert_map()
    return found


def importer_knows(key: str) -> bool:
    """Whether the importer has a converter of an operator (``Relu``, ``com.microsoft::Gelu``)."""
    domain, _, op_type = key.rpartition("::")
    return op_type in _converters() and (not domain or key in _OTHER_DOMAINS)


def convert_by_importer(bb: relax.BlockBuilder, node: ir.Node, inputs: list[Any], opset: int) -> list[Any]:
    """What the importer makes of one node.

    Args:
        bb: inside the function that is built.
        node: without subgraphs and references to a function's attributes.
        inputs: Relax expressions, constants as ``relax.const``; None where an input is left out.
        opset: version of the node's operator set.

    Returns:
        One expression per output; fewer where the importer leaves trailing ones out.

    Raises:
        Exception: one of :data:`IMPORTER_ERRORS`.
    """
    from tvm.relax.frontend.onnx import onnx_frontend

    converter = _converters()[node.op_type].get_converter(opset)
    attributes = _attributes(node)
    attributes["tvm_custom"] = {"name": node.name or "", "num_outputs": len(node.outputs)}
    result = converter(bb, onnx_frontend.onnx_input(inputs), attributes, [{}, {}])
    if isinstance(result, relax.Expr):
        result = bb.normalize(result)
    if isinstance(result, relax.Tuple):
        return list(result.fields)
    if isinstance(result, (tuple, list)):
        return [bb.normalize(one) for one in result]
    if isinstance(getattr(result, "ty", None), relax.TupleType):
        whole = bb.emit(result)
        return [bb.emit(relax.TupleGetItem(whole, i)) for i in range(len(result.ty.fields))]
    return [result]


def tune_context(module: Any, target: Any, generator: Any) -> Any:
    """MetaSchedule's context of one module, which makes a space generator ready for use.

    Its own constructor imports every tensor intrinsic of TVM, which takes a minute of processor time and serves
    none of the rules that effic uses; this is the rest of it.
    """
    from tvm.s_tir.meta_schedule import TuneContext, _ffi_api

    context = TuneContext.__new__(TuneContext)
    seed, threads = 1, 1
    context.__init_handle_by_constructor__(
        _ffi_api.TuneContext, module, target, generator, None, "main", threads, seed, None
    )
    _ffi_api.TuneContextInitialize(context)
    return context


def _attributes(node: ir.Node) -> dict[str, Any]:
    """Attributes as the importer parses them: numbers, bytes, tuples, TensorProtos."""
    found: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        proto = ir.to_proto(attribute)
        assert isinstance(proto, onnx.AttributeProto)
        value = onnx.helper.get_attribute_value(proto)
        found[name] = tuple(value) if not isinstance(value, (int, float, bytes, onnx.TensorProto)) else value
    return found
