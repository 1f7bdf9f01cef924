"""The arrays of an adapter for a model that takes adapters as inputs (the pass ``adapters-as-inputs``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.torch_capture import MODULE_KEY
from effic.passes.adapters.adapter_files import Adapter, AdapterModule, read_adapter
from effic.passes.adapters.adapters_as_inputs import A_SUFFIX, B_SUFFIX
from effic.passes.adapters.matching import LEFT_OUT, MapEntry, read_map

# Names that a message lists.
_SHOWN = 4


class Slot(NamedTuple):
    """The two inputs of a weight."""

    a: ir.Value
    b: ir.Value

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rank, inputs and outputs."""
        a, b = self.a.const_value, self.b.const_value
        if a is None or b is None:
            return 0, 0, 0
        (rank, into), (out, _) = a.shape.numpy(), b.shape.numpy()
        return rank, into, out


def adapter_feeds(
    adapter: str | os.PathLike[str],
    model: Model | str | os.PathLike[str],
    *,
    map: str | os.PathLike[str] | None = None,
    weight: float = 1.0,
) -> dict[str, np.ndarray]:
    """What to give a model so that it runs with an adapter.

    >>> session.run(None, {**inputs, **effic.adapter_feeds("adapters/legal", "model.onnx")})

    Args:
        adapter: a PEFT folder with LoRA or rsLoRA factors of linear layers.
        model: a model that ``adapters-as-inputs`` was applied to, or its ``.onnx`` file.
        map: a file of ``PATH = NAME`` lines, where weights go by other names in the model; see
            ``merge-lora``. ``NAME[0:64]`` names rows of a fused projection, ``-`` leaves a module out.
        weight: factor on the whole adapter; 0.5 gives half of its effect.

    Returns:
        A and B for each adapted weight, by input name, in the type of the input. B has the scaling
        multiplied in; both are filled up with zeros to the rank of the inputs.

    Raises:
        UsageError: the model takes no adapters, lacks the inputs of a module, or takes lower ranks only.
        InvalidModelError: the adapter is broken, or of a kind whose change is no product of two factors.
    """
    found = read_adapter(adapter)
    model = model if isinstance(model, Model) else read_onnx(model)
    slots = _slots(model)
    if not slots:
        raise UsageError("the model takes no adapters; apply the pass adapters-as-inputs to it first")
    _refuse_other_changes(found)
    mapping = read_map(os.fspath(map)) if map is not None else {}
    parts: dict[str, list[tuple[AdapterModule, tuple[int, int] | None]]] = {}
    lacking = []
    for module in found.modules.values():
        place = _find(module.path, slots, mapping)
        if place is None:
            lacking.append(module.path)
        elif place.name != LEFT_OUT:
            parts.setdefault(place.name, []).append((module, place.rows))
    if lacking:
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        raise UsageError(
            f"adapter '{found.name}' changes {', '.join(lacking[:_SHOWN])}{more}, for which the model has no "
            f"inputs; it has some for {', '.join(list(slots)[:_SHOWN])}{' …' if len(slots) > _SHOWN else ''} "
            "(a map file says which is which)"
        )
    feeds: dict[str, np.ndarray] = {}
    for name, modules in parts.items():
        slot = slots[name]
        a, b = _stacked(name, modules, slot.shape, weight, found.name)
        feeds[str(slot.a.name)] = a.astype(_numpy(slot.a))
        feeds[str(slot.b.name)] = b.astype(_numpy(slot.b))
    return feeds


def _slots(model: Model) -> dict[str, Slot]:
    """The inputs for adapters by the weight's name."""
    inputs = {str(v.name): v for v in model.graph.inputs if v.is_initializer()}
    names = [name.removesuffix(A_SUFFIX) for name in inputs if name.endswith(A_SUFFIX)]
    return {name: Slot(inputs[name + A_SUFFIX], inputs[name + B_SUFFIX])
            for name in names if name + B_SUFFIX in inputs}  # fmt: skip


def _numpy(value: ir.Value) -> np.dtype[np.generic]:
    return (value.dtype or ir.DataType.FLOAT).numpy()


def _refuse_other_changes(adapter: Adapter) -> None:
    """Refuse what a product of two factors beside a layer cannot do."""
    others = [*adapter.replacements, *adapter.rows]
    if others:
        raise UsageError(
            f"adapter '{adapter.name}' replaces '{others[0]}', which no input can; merge it with merge-lora"
        )
    for module in adapter.modules.values():
        what = (
            f"is of the kind {module.method}" if module.method != "lora"
            else "is DoRA" if module.use_dora
            else "has a bias" if module.lora_bias is not None
            else f"was trained from a changed base ({module.init})" if module.init is not True
            else f"belongs to {module.kind} weights" if module.kind != "linear"
            else None
        )  # fmt: skip
        if what is not None:
            raise UsageError(
                f"'{module.path}' of adapter '{adapter.name}' {what}, so it cannot be given as two factors; "
                "merge it with merge-lora"
            )


def _find(path: str, slots: Mapping[str, Slot], mapping: Mapping[str, MapEntry]) -> MapEntry | None:
    """The weight of a module: as the map says, by its name, or by the module its node came from."""
    for key in (f"{path}.weight", path):
        if key in mapping:
            entry = mapping[key]
            return entry if entry.name in slots or entry.name == LEFT_OUT else None
    scopes = {name: f"{slot.a.metadata_props.get(MODULE_KEY, '')}.weight" for name, slot in slots.items()}
    for known in ({name: name for name in slots}, scopes):
        for wanted in (f"{path}.weight", path):
            hits = [name for name, alias in known.items() if alias == wanted]
            hits = hits or [name for name, alias in known.items() if _same_end(alias, wanted)]
            if len(hits) == 1:
                return MapEntry(hits[0], None)
    return None


def _same_end(a: str, b: str) -> bool:
    """Whether one of two paths is the other with something in front; single components say nothing."""
    return ("." in a.removesuffix(".weight") or "." in b.removesuffix(".weight")) and (
        a.endswith(f".{b}") or b.endswith(f".{a}")
    )


def _stacked(
    name: str,
    modules: list[tuple[AdapterModule, tuple[int, int] | None]],
    shape: tuple[int, int, int],
    weight: float,
    adapter: str,
) -> tuple[np.ndarray, np.ndarray]:
    """A ``[rank, in]`` and σ·B ``[out, rank]`` of all modules of a weight, one after the other."""
    rank, into, out = shape
    total = sum(module.rank for module, _ in modules)
    if total > rank:
        raise UsageError(
            f"adapter '{adapter}' is of rank {total} on '{name}', and the model takes {rank}; "
            f"apply adapters-as-inputs{{rank={total}}} to the base"
        )
    a, b = np.zeros((rank, into), np.float32), np.zeros((out, rank), np.float32)
    at = 0
    for module, rows in modules:
        assert module.a is not None
        assert module.b is not None
        first, last = rows or (0, out)
        if module.a.shape != (module.rank, into) or module.b.shape != (last - first, module.rank):
            raise UsageError(
                f"'{module.path}' of adapter '{adapter}' is for a weight of shape "
                f"{[len(module.b), module.a.shape[1]]}, but '{name}' has {[last - first, into]}"
            )
        a[at : at + module.rank] = module.a.astype(np.float32)
        scale = np.float32(module.scaling * weight)
        b[first:last, at : at + module.rank] = module.b.astype(np.float32) * scale
        at += module.rank
    return a, b
