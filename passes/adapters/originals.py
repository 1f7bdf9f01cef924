"""What a merge is recorded as in the model, and the file of weights as they were before it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import CODE_TYPES, Encoding, Outliers
from effic.ir.errors import InvalidModelError, UnsupportedError, UsageError
from effic.ir.model import Model, constant_tensor
from effic.ir.safetensors_format import DTYPES, TensorFile, read_safetensors, write_safetensors
from effic.passes.adapters.matching import Place, put
from effic.passes.adapters.targets import Target

MERGED_KEY = "effic.adapters"
"""Key of the model's metadata: the merges done, oldest first, as JSON."""

_ENCODINGS = "effic.encodings"


@dataclasses.dataclass(frozen=True)
class MergeRecord:
    """One merge.

    Attributes:
        adapters: name, digest and weight of each.
        text: the pass in its text form.
        places: path, constant (``-``: left out) and rows (or None) of every module and parameter.
        constants: the constants that were changed: their names now, and what the originals are called.
        originals: sha256 of the file of originals, or None.
        exact: whether the deltas can be taken away again without it.
        branches: what the branches beside encoded weights are marked with, or None where there are none.
    """

    adapters: list[tuple[str, str, float]]
    text: str
    places: list[tuple[str, str, tuple[int, int] | None]]
    constants: dict[str, str]
    originals: str | None
    exact: bool
    branches: str | None = None

    @property
    def digests(self) -> list[str]:
        """Digests of the adapters."""
        return [digest for _, digest, _ in self.adapters]


def read_merges(model: Model) -> list[MergeRecord]:
    """The merges a model's metadata tell of; none where somebody else's text is under the key."""
    try:
        rows = json.loads(model.ir.metadata_props.get(MERGED_KEY, "[]"))
        return [
            MergeRecord(
                [(str(name), str(digest), float(weight)) for name, digest, weight in row["adapters"]],
                str(row["text"]),
                [
                    (str(p), str(n), None if r is None else (int(r[0]), int(r[1])))
                    for p, n, r in row["places"]
                ],
                {str(name): str(original) for name, original in row["constants"].items()},
                None if row["originals"] is None else str(row["originals"]),
                bool(row["exact"]),
                None if row.get("branches") is None else str(row["branches"]),
            )
            for row in rows
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return []


def write_merges(model: Model, merges: Sequence[MergeRecord]) -> None:
    """Put the merges into the model's metadata."""
    if not merges:
        model.ir.metadata_props.pop(MERGED_KEY, None)
        return
    rows = [dataclasses.asdict(merge) for merge in merges]
    model.ir.metadata_props[MERGED_KEY] = json.dumps(rows, separators=(",", ":"))


# -- weights as they were --------------------------------------------------------------------------


def check_file(path: str) -> None:
    """Refuse a file of originals that could not be written, before anything is done.

    Raises:
        UsageError: why.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists; name a new file for the original weights")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UsageError(f"the folder {os.path.dirname(path)} does not exist; make it first")


def save_originals(path: str, targets: Sequence[Target]) -> str:
    """Write the constants that are about to change, as they lie in the model; sha256 of the file.

    Raises:
        UsageError: it cannot be written.
    """
    tensors: dict[str, np.ndarray | ir.TensorProtocol] = {}
    encodings: dict[str, Any] = {}
    for place in {id(target.place.value): target.place for target in targets}.values():
        encoding = place.site.encoding if place.site is not None else None
        if encoding is None:
            tensor = constant_tensor(place.value)
            if tensor is None:
                raise UnsupportedError(f"'{place.name}' is no constant, so it cannot be kept")
            tensors[place.name] = tensor
            continue
        encodings[place.name] = {
            "type": encoding.codes.dtype.name,
            "codes": encoding.codes.shape.numpy(),
            "axis": encoding.axis,
            "block_size": encoding.block_size,
            "bits": encoding.bits,
            "shape": encoding.shape,
        }
        tensors[f"{place.name}#codes"] = np.frombuffer(encoding.codes.tobytes(), np.uint8)
        tensors[f"{place.name}#scales"] = encoding.scales
        if encoding.zero_points is not None:
            tensors[f"{place.name}#zeros"] = encoding.zero_points
        if encoding.outliers is not None:
            tensors[f"{place.name}#indices"] = encoding.outliers.indices
            tensors[f"{place.name}#values"] = encoding.outliers.values
    for name, kept in tensors.items():
        dtype = kept.dtype if isinstance(kept, np.ndarray) else kept.dtype.numpy()
        if dtype not in DTYPES.values():
            raise UnsupportedError(f"'{name}' is of type {dtype}, which a safetensors file cannot keep")
    write_safetensors(path, tensors, {_ENCODINGS: json.dumps(encodings)})
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_originals(path: str, digest: str) -> TensorFile:
    """A file of originals.

    Args:
        path: the file.
        digest: its sha256.

    Raises:
        UsageError: there is no such file, or it is not the one that was written at the merge.
        InvalidModelError: it is damaged.
    """
    found = read_safetensors(path)
    if found.map.sha256() != digest:
        raise UsageError(f"{path} is not the file that was written when the adapter was merged")
    return found


def restore(model: Model, kept: TensorFile, place: Place, original: str) -> None:
    """Put a constant back as it was.

    Args:
        model: rewritten in place.
        kept: the file of originals.
        place: where the constant is now.
        original: its name in the file.

    Raises:
        InvalidModelError: the file does not have it, or it does not fit.
    """
    if original in kept.tensors:
        array = kept.tensors[original]
        if place.shape != array.shape:
            raise InvalidModelError(f"the original of '{place.name}' has another shape; nothing was restored")
        tensor = model.scratch.tensor(place.name, array)
        site = place.site
        if site is not None and site.encoding is not None:
            site.redirect(model, tensor, site.uses)
        else:
            put(place, tensor)
        return
    site = place.site
    try:
        encoding = _encoding(kept, original, json.loads(kept.metadata[_ENCODINGS])[original])
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise InvalidModelError(
            f"the file of originals has no '{original}', or is damaged; nothing was restored"
        ) from error
    if site is None:
        raise InvalidModelError(f"'{place.name}' is no weight any more; nothing was restored")
    site.write(model, encoding)


def _encoding(kept: TensorFile, name: str, row: dict[str, Any]) -> Encoding:
    types = {dtype.name: dtype for dtype in CODE_TYPES}
    codes = ir.PackedTensor if types[row["type"]].bitwidth < 8 else None
    packed = np.array(kept.tensors[f"{name}#codes"])
    dtype, shape = types[row["type"]], tuple(row["codes"])
    tensor: ir.TensorProtocol
    if codes is not None:
        tensor = codes(packed, dtype, shape=ir.Shape(shape))
    else:
        tensor = ir.Tensor(packed.view(dtype.numpy()).reshape(shape), dtype=dtype)
    indices = kept.tensors.get(f"{name}#indices")
    zeros = kept.tensors.get(f"{name}#zeros")
    return Encoding(
        codes=tensor,
        scales=np.array(kept.tensors[f"{name}#scales"]),
        zero_points=None if zeros is None else np.array(zeros),
        axis=row["axis"],
        block_size=row["block_size"],
        bits=row["bits"],
        shape=tuple(row["shape"]),
        outliers=None
        if indices is None
        else Outliers(np.array(indices), np.array(kept.tensors[f"{name}#values"])),
        weight=name,
    )
