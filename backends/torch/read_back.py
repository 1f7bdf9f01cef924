"""Trained weights, from the torch module back into the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from effic.backends.torch.to_module import RECORD, Slot
from effic.backends.torch.types import torch_dtype
from effic.ir.encodings import code_tensor
from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.model import Model, Origin
from effic.ir.sparsity import broken, declare
from effic.ir.tensors import borrow
from effic.passes.adapters.matching import aliases


def read_back(model: Model, module: nn.Module) -> Model:
    """Write what a module has learned into a model.

    Names, shapes and element types stay those of the model (a module that was moved to another float type
    is rounded to the model's). Weights that did not change keep their tensors. Running statistics and
    other buffers are written like weights; so are the scales and codes of an encoded weight, which stays
    encoded. An N:M pattern that training broke is no longer declared; the result's origin has a note of it.

    Args:
        model: the model the module was made from, or one with the same initializers; not changed.
        module: what :func:`~effic.backends.torch.to_module.to_module` made, compiled or not; or the torch
            module the model was captured from.

    Returns:
        A new model, which shares every unchanged tensor with ``model``.

    Raises:
        UsageError: an entry of the state dict is missing, of another shape, or not finite.
        UnsupportedError: a value changed that is part of the module's code, or tied weights differ.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile hides what it was given there
    state = module.state_dict()
    record = getattr(module, "meta", {}).get(RECORD)
    result = model.clone()
    graphs = [result.graph, *result.graph.subgraphs()]
    slots = _slots(result.graph, state) if record is None else record.keys
    for key, slot in slots.items():
        value = graphs[slot.graph].initializers.get(slot.name) if slot.graph < len(graphs) else None
        if value is None or value.const_value is None:
            raise UsageError(
                f"the model has no initializer '{slot.name}', which the module has; give the model it was made from"
            )
        trained = state.get(key)
        if trained is None:
            raise UsageError(
                f"the module has no '{key}' any more; undo what replaced it (a parametrization, an adapter) first"
            )
        if record is None:
            _require_tied(value, trained, state)
        new = _changed(key, value.const_value, trained)
        if new is None:
            continue
        if record is not None and key in record.baked:
            raise UnsupportedError(
                f"'{key}' was changed, but its values are part of the module's code, which still computes with "
                "the old ones; change it in the model and build the module again"
            )
        value.const_value = (
            new if isinstance(new, ir.PackedTensor) else result.scratch.tensor(slot.name, *new)
        )
        value.const_value.name = slot.name
    _withdraw_patterns(result)
    return result


def _withdraw_patterns(model: Model) -> None:
    """Take back what is declared of weights that no longer have it."""
    notes = []
    for name, pattern, count, groups in broken(model):
        declare(model, name, None)
        notes.append(
            f"training broke the {pattern} pattern of {name} in {count:,} of {groups:,} groups; "
            "sparsity is no longer declared for it"
        )
    if notes:
        old = model.origin
        model.origin = Origin(old.front_end, old.path, old.sha256, (*old.notes, *notes))


def _slots(graph: ir.Graph, state: Mapping[str, Any]) -> dict[str, Slot]:
    """For a module that was captured: the entries of its state dict that are in the model.

    Constants that torch's exporter made have no entry, and stay as they are.
    """
    found = {name: Slot(0, name) for name in graph.initializers if name in state}
    if not found:
        raise UsageError(
            "no entry of the module's state dict is an initializer of the model; give the module that "
            "to_module made, or the one the model was captured from"
        )
    return found


def _require_tied(value: ir.Value, trained: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
    for other in aliases(value):
        if other in state and not torch.equal(state[other], trained):
            raise UnsupportedError(
                f"'{value.name}' and '{other}' are one weight in the model but differ in the module; "
                "tie them again, or capture the module anew"
            )


def _changed(
    key: str, old: ir.TensorProtocol, trained: torch.Tensor
) -> tuple[np.ndarray, ir.DataType] | ir.PackedTensor[Any] | None:
    """The new tensor in the model's element type, None where it is what the model has."""
    shape = tuple(old.shape.numpy())
    if tuple(trained.shape) != shape:
        raise UsageError(f"'{key}' has the shape {tuple(trained.shape)}, and {shape} in the model")
    new = trained.detach().cpu()
    if new.dtype.is_floating_point != old.dtype.is_floating_point():
        raise UsageError(f"'{key}' is of type {new.dtype}, and {old.dtype.name} in the model")
    new = new.to(torch_dtype(old.dtype)).contiguous()
    with borrow(old) as array:
        small = old.dtype.is_integer() and old.dtype.bitwidth < 8
        before = array.astype(np.int8 if old.dtype.is_signed() else np.uint8) if small else array
        after = _array(new, before.dtype)
        if np.array_equal(_bits(before), _bits(after)):
            return None
        if new.dtype.is_floating_point:
            finite = torch.isfinite(new.to(torch.float32))
            if not bool(finite.all()) and bool(np.isfinite(before.astype(np.float32)).all()):
                raise UsageError(
                    f"'{key}' has {int((~finite).sum())} values that are NaN or infinite; training diverged"
                )
    if small:
        _require_fits(key, after, old.dtype)
        packed: ir.PackedTensor[Any] = code_tensor(after, old.dtype)  # type: ignore[assignment]
        return packed
    return after, old.dtype


def _require_fits(key: str, codes: np.ndarray, dtype: ir.DataType) -> None:
    low, high = (
        (-(1 << (dtype.bitwidth - 1)), (1 << (dtype.bitwidth - 1)) - 1)
        if dtype.is_signed()
        else (
            0,
            (1 << dtype.bitwidth) - 1,
        )
    )
    if codes.size and (codes.min() < low or codes.max() > high):
        raise UsageError(f"'{key}' has codes beyond {dtype.name}, which goes from {low} to {high}")


def _array(tensor: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    """The tensor as an array; for types NumPy lacks, the same bits as the ml_dtypes type."""
    if dtype.kind == "V" or dtype.name.startswith(("bfloat", "float8")):
        bits = tensor.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
        return bits.numpy().view(dtype).copy()
    return tensor.numpy().copy()


def _bits(array: np.ndarray) -> np.ndarray:
    """Bytes, so that -0 differs from 0 and NaN equals itself."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
