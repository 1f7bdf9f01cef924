"""What a run has finished, kept in files: a run that was interrupted goes on behind it.

A pass that works for minutes at every weight asks for its weights through :func:`unfinished`, or through
:meth:`effic.passes.calibration.Calibration.walk`. What it did to a weight, and what it remarked, is then kept
as soon as the weight is done; when the same job runs again, it is put back and the pass never sees that weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import Encoding, Outliers
from effic.ir.errors import InvalidModelError, UnsupportedError, UsageError
from effic.ir.model import Model, constant_tensor
from effic.ir.safetensors_format import DTYPES, read_safetensors, write_safetensors
from effic.ir.sparsity import Pattern, declare, declared
from effic.ir.weights import WeightSite
from effic.passes.base import Remark
from effic.passes.statistics import RangeStatistics

if TYPE_CHECKING:
    from effic.passes.base import Remarks

Arrays = dict[str, np.ndarray]

SUFFIX = ".kept"
"""Files of a store; their form is safetensors."""

_NAME = re.compile(r"[a-z0-9-]+-[0-9a-f]{24}\.kept")
_CODES = ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8")
# Codes, scales of groups of one, zero points and outliers with their positions take less for a weight,
# and remarks less than this.
_SITE_BYTES, _REMARK_BYTES = 32, 1 << 20
_RANGE_BYTES = 64 << 20
_RANGE_ARRAYS = ("counts", "edges", "channel_low", "channel_high", "channel_mean")


class Store:
    """Arrays with a description by key, one file each, written all or nothing.

    Every file carries the digest of all that is in it, and the key itself: what is damaged, or was put
    there for something else, is not taken.

    Args:
        folder: where the files lie.
        prefix: what their names begin with: lower-case letters, digits and dashes.

    Attributes:
        damaged: names of files that were left out, since they are damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], prefix: str) -> None:
        self.folder = os.fspath(folder)
        self.prefix = re.sub(r"[^a-z0-9]+", "-", prefix.lower()).strip("-")
        self.damaged: list[str] = []

    def path(self, key: Mapping[str, Any]) -> str:
        """The file of a key."""
        name = hashlib.sha256(_json(key).encode()).hexdigest()[:24]
        return os.path.join(self.folder, f"{self.prefix}-{name}{SUFFIX}")

    def get(
        self, key: Mapping[str, Any], most_bytes: int | None = None
    ) -> tuple[dict[str, Any], Arrays] | None:
        """What was put under a key: the description, and the arrays as views of the file's map; or None.

        Args:
            key: JSON-able.
            most_bytes: a file larger than this cannot be right.
        """
        path = self.path(key)
        if not os.path.lexists(path):
            return None
        try:
            if os.path.islink(path) or not os.path.isfile(path):
                raise ValueError("of another kind")
            if most_bytes is not None and os.stat(path).st_size > most_bytes:
                raise ValueError("of another size")
            found = read_safetensors(path)
            text = found.metadata.get("effic", "")
            whole = json.loads(text)
            if found.metadata.get("sha256") != _digest(text, found.tensors):
                raise ValueError("its digest is another one")
            if not isinstance(whole, dict) or _json(whole.get("key")) != _json(key):
                raise ValueError("it is of something else")
            description = whole.get("description")
            if not isinstance(description, dict):
                raise ValueError("it lacks a description")
            return description, found.tensors
        except (InvalidModelError, UsageError, ValueError, RecursionError, OSError):
            self._leave(path)
            return None

    def put(self, key: Mapping[str, Any], description: Mapping[str, Any], arrays: Arrays) -> None:
        """Keep arrays (of the types in ``safetensors_format.DTYPES``) and a JSON-able description.

        Raises:
            UsageError: the file cannot be written.
        """
        text = _json({"key": dict(key), "description": dict(description)})
        metadata = {"effic": text, "sha256": _digest(text, arrays)}
        write_safetensors(self.path(key), arrays, metadata)

    def count(self) -> int:
        """How many files there are."""
        with os.scandir(self.folder) as entries:
            names = [entry.name for entry in entries]
        return sum(bool(_NAME.fullmatch(n)) and n[: -24 - len(SUFFIX) - 1] == self.prefix for n in names)

    def _leave(self, path: str) -> None:
        name = os.path.basename(path)
        if name not in self.damaged:
            self.damaged.append(name)


class FinishedSites(Store):
    """Weights that a pass is done with.

    Args:
        folder: where the files lie.
        prefix: of their names; different for every pass of a run.
        text: the pass with its options.

    Attributes:
        taken: weights (or other pieces of work) that were put back.
        total: weights there are, where the pass has said so.
    """

    def __init__(self, folder: str | os.PathLike[str], prefix: str, text: str) -> None:
        super().__init__(folder, prefix)
        self.text, self.taken = text, 0
        self._total = Store(folder, f"{prefix}-total")
        self._some = self.count() > 0
        self._digests: dict[WeightSite, tuple[ir.TensorProtocol | None, str]] = {}

    @property
    def total(self) -> int | None:
        """Weights there are, where a pass has said so."""
        found = self._total.get({"pass": self.text})
        count = None if found is None else found[0].get("sites")
        return count if isinstance(count, int) else None

    def expect(self, count: int) -> None:
        """Note how many weights there are to work on."""
        if self.total != count:
            self._total.put({"pass": self.text}, {"sites": count}, {})

    def has(self, site: WeightSite) -> bool:
        """Whether a weight was finished, and what was kept of it is whole."""
        # In a run that begins, no weight is read only to learn that nothing was kept of it.
        key = self._key(site) if self._some else None
        return key is not None and self._found(site, key) is not None

    def put_back(self, model: Model, site: WeightSite, remarks: Remarks) -> bool:
        """Do to a weight what was done to it before, remarks included; whether it was finished.

        Raises:
            UsageError: what was kept is whole, and yet cannot be done: somebody else has written it.
        """
        key = self._key(site) if self._some else None
        found = None if key is None else self._found(site, key)
        if found is None:
            return False
        description, arrays = found
        if description["kind"] == "encoding":
            encoding = _read_encoding(site, description, arrays)
            codes = np.array(arrays["codes"])
            kind, shape = encoding.codes.dtype, tuple(encoding.codes.shape.numpy())
            tensor = (
                model.scratch.packed(site.name, codes, kind, shape)
                if kind.bitwidth < 8
                else model.scratch.tensor(site.name, codes.view(kind.numpy()).reshape(shape), kind)
            )
            scales = np.array(encoding.scales)
            zeros = None if encoding.zero_points is None else np.array(encoding.zero_points)
            outliers = encoding.outliers
            if outliers is not None:
                outliers = Outliers(np.array(outliers.indices), np.array(outliers.values))
            whole = dataclasses.replace(
                encoding, codes=tensor, scales=scales, zero_points=zeros, outliers=outliers
            )
            try:
                site.write(model, whole)
            except (ValueError, UnsupportedError) as error:
                raise UsageError(
                    f"{self.folder} holds what cannot be a weight ({error}); remove the folder to begin anew"
                ) from error
        elif description["kind"] == "values":
            values = np.array(arrays["values"]).view(site.dtype.numpy()).reshape(site.shape)
            site.replace(model.scratch.tensor(site.name, values, site.dtype))
            pattern = description.get("pattern")
            declare(model, site.name, None if pattern is None else Pattern.parse(str(pattern)))
        remarks.items.extend(_remarks(description["remarks"]))
        self.taken += 1
        return True

    def keep(self, model: Model, site: WeightSite, begun: Begun, remarks: Remarks) -> None:
        """Keep what has happened to a weight since :meth:`begin`."""
        if begun.key is None:
            return
        rows = [dataclasses.asdict(one) for one in remarks.items[begun.remarks :]]
        tensor = constant_tensor(site.value)
        if site.encoding is not None and site.encoding.compressed is None:
            description, arrays = _written(site.encoding)
        elif site.encoding is None and tensor is not None and tensor is not begun.tensor:
            pattern = declared(model).get(site.name)
            description = {"kind": "values", "pattern": None if pattern is None else str(pattern)}
            arrays = {"values": _bytes(tensor)}
        elif site.encoding is None and tensor is not None:
            description, arrays = {"kind": "left"}, {}
        else:
            return  # It has become something that is not known here, and will be done again.
        if all(array.dtype in DTYPES.values() for array in arrays.values()):
            self.put(begun.key, {**description, "remarks": rows}, arrays)

    def begin(self, site: WeightSite, remarks: Remarks) -> Begun:
        """What is to be known of a weight before a pass works on it."""
        return Begun(self._key(site), constant_tensor(site.value), len(remarks.items))

    def ranges(self, names: Iterable[str], bins: int) -> dict[str, RangeStatistics]:
        """The ranges that were measured, by name of the value; of the others there is nothing."""
        found = ((name, self.get(self._range(name, bins), _RANGE_BYTES)) for name in names)
        known = {}
        for name, one in found:
            if one is None:
                continue
            if (statistics := _read_range(*one)) is None:
                self._leave(self.path(self._range(name, bins)))
                continue
            known[name] = statistics
        return known

    def keep_range(self, name: str, bins: int, found: RangeStatistics) -> None:
        """Keep the range of a value."""
        row = {"low": found.low, "high": found.high}
        arrays = {n: a for n in _RANGE_ARRAYS if (a := getattr(found, n)) is not None}
        self.put(self._range(name, bins), row, arrays)

    def _range(self, name: str, bins: int) -> dict[str, Any]:
        return {"pass": self.text, "range": name, "bins": bins}

    def weight(self, site: WeightSite) -> str:
        """Digest of a weight's values."""
        tensor = constant_tensor(site.value)
        if site not in self._digests or self._digests[site][0] is not tensor:
            with site.matrix() as matrix:
                flat = np.ascontiguousarray(matrix).reshape(-1).view(np.uint8)
                self._digests[site] = tensor, hashlib.sha256(flat.data).hexdigest()
                del flat
        return self._digests[site][1]

    def _key(self, site: WeightSite) -> dict[str, Any] | None:
        if site.encoding is not None or site.why_not is not None or constant_tensor(site.value) is None:
            return None
        return {
            "pass": self.text,
            "name": site.name,
            "kinds": sorted(site.kinds),
            "shape": list(site.shape),
            "dtype": site.dtype.name,
            "in_axis": site.in_axis,
            "groups": site.groups,
            "opset": site.opset,
            "weight": self.weight(site),
        }

    def _found(self, site: WeightSite, key: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays] | None:
        found = self.get(key, _SITE_BYTES * site.elements + _REMARK_BYTES)
        if found is None:
            return None
        try:
            description, arrays = found
            _remarks(description.get("remarks"))
            if description.get("kind") == "encoding":
                _read_encoding(site, description, arrays)
            elif description.get("kind") == "values":
                values, pattern = arrays["values"], description.get("pattern")
                nbytes = site.elements * site.dtype.bitwidth // 8
                if values.dtype != np.uint8 or values.shape != (nbytes,):
                    raise ValueError("values of another size")
                if pattern is not None:
                    Pattern.parse(str(pattern))
            elif description.get("kind") != "left":
                raise ValueError("of an unknown kind")
            return found
        except (ValueError, TypeError, KeyError, UsageError):
            self._leave(self.path(key))
            return None


@dataclasses.dataclass(frozen=True)
class Begun:
    """A weight before a pass works on it: its key, its values, and how many remarks there were."""

    key: dict[str, Any] | None
    tensor: ir.TensorProtocol | None
    remarks: int


def unfinished(model: Model, sites: Iterable[WeightSite], remarks: Remarks) -> Iterator[WeightSite]:
    """The weights that are still to be worked on; the others are put back as they were left.

    The caller rewrites a weight, if at all, before it takes the next one.

    Args:
        model: the model.
        sites: weights of it.
        remarks: of the pass.
    """
    finished = remarks.finished
    for site in sites:
        if finished is None:
            yield site
        elif not finished.put_back(model, site, remarks):
            begun = finished.begin(site, remarks)
            yield site
            finished.keep(model, site, begun, remarks)


# -- encodings ------------------------------------------------------------------------------------


def _written(encoding: Encoding) -> tuple[dict[str, Any], Arrays]:
    arrays = {"codes": _bytes(encoding.codes), "scales": np.asarray(encoding.scales)}
    if encoding.zero_points is not None:
        arrays["zero_points"] = np.asarray(encoding.zero_points)
    if encoding.outliers is not None:
        arrays["indices"], arrays["values"] = encoding.outliers.indices, encoding.outliers.values
    return {
        "kind": "encoding",
        "codes": encoding.codes.dtype.name,
        "codes_shape": list(encoding.codes.shape.numpy()),
        "axis": encoding.axis,
        "block_size": encoding.block_size,
        "bits": encoding.bits,
        "weight": encoding.weight,
    }, arrays


def _read_encoding(site: WeightSite, row: Mapping[str, Any], arrays: Arrays) -> Encoding:
    """The encoding that was kept of a weight, over views of the file.

    Raises:
        ValueError, TypeError, KeyError: it is none of this weight.
    """
    shape = tuple(row["codes_shape"])
    axis, block, bits = row["axis"], row["block_size"], row["bits"]
    if row["codes"] not in _CODES or shape not in (site.shape, site.matrix_shape):
        raise ValueError("codes of another type or shape")
    if not all(type(v) is int for v in (axis, block, bits)) or not 0 <= axis < len(shape) or block < 0:
        raise ValueError("another axis or group")
    kind = ir.DataType[row["codes"]]
    codes, scales, zeros = arrays["codes"], arrays["scales"], arrays.get("zero_points")
    if not 1 <= bits <= kind.bitwidth or codes.shape != (-(-site.elements * kind.bitwidth // 8),):
        raise ValueError("codes of another size")
    blocks = tuple(math.ceil(n / block) if i == axis else n for i, n in enumerate(shape)) if block else ()
    right = [blocks] if block else [(shape[axis],), ()]
    if scales.shape not in right or scales.dtype != site.dtype.numpy() or codes.dtype != np.uint8:
        raise ValueError("scales of another shape or type")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype not in (np.int8, np.uint8)):
        raise ValueError("zero points of another shape or type")
    outliers = None
    if "indices" in arrays:
        at, values = arrays["indices"], arrays["values"]
        fits = at.ndim == 1 and at.dtype in (np.int32, np.int64) and values.shape == at.shape
        if (
            not fits
            or values.dtype != scales.dtype
            or (at.size and (at.min() < 0 or at.max() >= site.elements))
        ):
            raise ValueError("outliers of another kind")
        outliers = Outliers(at, values)
    if row["weight"] is not None and not isinstance(row["weight"], str):
        raise TypeError("a name that is no text")
    stand_in: ir.TensorProtocol = (
        ir.PackedTensor(codes, kind, shape=ir.Shape(shape))
        if kind.bitwidth < 8
        else ir.Tensor(codes.view(kind.numpy()).reshape(shape), dtype=kind)
    )
    return Encoding(stand_in, scales, zeros, axis, block, bits, site.shape, outliers, row["weight"])


def _read_range(row: Mapping[str, Any], arrays: Arrays) -> RangeStatistics | None:
    """A range that was kept, or None where it is nothing of that kind."""
    low, high = row.get("low"), row.get("high")
    copies = {name: np.array(arrays[name]) for name in _RANGE_ARRAYS if name in arrays}
    counts, edges = copies.pop("counts", None), copies.pop("edges", None)
    if counts is None or edges is None or counts.ndim != 1 or edges.shape != (len(counts) + 1,):
        return None
    channels = {(array.dtype, array.shape) for array in copies.values()}
    right = len(channels) <= 1 and all(d == np.float32 and len(s) == 1 for d, s in channels)
    if not right or counts.dtype != np.int64 or edges.dtype != np.float64:
        return None
    if type(low) is not float or type(high) is not float:
        return None
    return RangeStatistics(low, high, counts, edges, **copies)


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    return np.frombuffer(tensor.tobytes(), np.uint8)


def _remarks(rows: Any) -> list[Remark]:
    """Remarks from JSON.

    Raises:
        ValueError, TypeError: they are none.
    """
    if not isinstance(rows, list):
        raise TypeError("no remarks")
    found = [Remark(**row) for row in rows]
    for one in found:
        texts = isinstance(one.where, str) and isinstance(one.text, str)
        if one.kind not in ("passed", "missed") or not texts or not isinstance(one.data, dict):
            raise ValueError("no remark")
    return found


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), sort_keys=False, default=_item)


def _item(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
