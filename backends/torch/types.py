"""Element types: ONNX's and torch's."""

from __future__ import annotations

import onnx_ir as ir
import torch

from effic.ir.errors import UnsupportedError

_T = ir.DataType

TORCH_TYPES: dict[ir.DataType, torch.dtype] = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _T.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _T.FLOAT8E5M2: torch.float8_e5m2,
    _T.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    _T.BOOL: torch.bool,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.COMPLEX64: torch.complex64,
    _T.COMPLEX128: torch.complex128,
    # torch has no sub-byte integers that compute: one per byte.
    _T.INT4: torch.int8,
    _T.UINT4: torch.uint8,
    _T.INT2: torch.int8,
    _T.UINT2: torch.uint8,
}


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """The torch type that holds values of an ONNX type.

    Raises:
        UnsupportedError: torch has none (strings, 4-bit floats).
    """
    found = TORCH_TYPES.get(dtype)
    if found is None:
        raise UnsupportedError(f"has values of type {dtype.name}, which torch tensors cannot hold")
    return found
