"""N:M weights as values and indices: choosing the form, packing, unpacking, and what it takes.

Of every group of ``m`` weights the ``n`` kept ones are stored in order, and where they stood. A group
with fewer than ``n`` non-zeros still has ``n`` slots: the highest free positions are stored as zeros,
which for 2:4 gives the nibbles of the usual table (``1100`` 0x4, ``1010`` 0x8, ``0110`` 0x9, ``1001``
0xC, ``0101`` 0xD, ``0011`` 0xE, ``0000`` 0xE, ``0100`` 0xD, ``1000`` 0xC; Mishra et al., "Accelerating
Sparse Deep Neural Networks", arXiv 2104.08378, section 3).

Where they stood is written in one of three ways, whichever takes the fewest bits:

- ``index``: ``ceil(log2 m)`` bits per kept weight, ascending, lowest bits first;
- ``pattern``: the number of the group's pattern among all ``C(m, n)`` in lexicographic order;
- ``position``: as ``index``, with a code of its own for every kept weight.

ONNX has codes of 4 and 8 bits. The first two put as many groups into a code as fit, so that 1:4 takes
two groups per 4-bit code; 2:4 takes one, which is its nibble.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import pack
from effic.ir.errors import UnsupportedError
from effic.ir.sparsity import Pattern

_WIDTHS = (4, 8)

# Up to so many weights in a group their mask is a number to look slots up by.
_LONGEST_TABLED = 12

# Weights worked on at a time: what is made of them stays in the second-level cache.
_PIECE = 1 << 18


@dataclass(frozen=True)
class Storage:
    """How the positions of a pattern's kept weights are written.

    Attributes:
        pattern: n and m.
        kind: ``index``, ``pattern`` or ``position``.
        width: bits of a code: 4 or 8.
        groups: groups of m weights that share a code; 1 for ``position``, where every kept weight has one.
    """

    pattern: Pattern
    kind: Literal["index", "pattern", "position"]
    width: int
    groups: int

    @property
    def unit(self) -> int:
        """Weights that are decoded together."""
        return self.groups * self.pattern.m

    @property
    def kept(self) -> int:
        """Values stored of a unit."""
        return self.groups * self.pattern.n

    @property
    def codes(self) -> int:
        """Codes of a unit."""
        return self.kept if self.kind == "position" else 1

    @property
    def index_bits(self) -> float:
        """Bits per weight, values not counted."""
        return self.codes * self.width / self.unit

    def bits(self, rows: int, length: int, value_bits: int) -> int:
        """Bits of values and codes of ``rows`` vectors of ``length`` weights.

        The last unit of a row is filled up.
        """
        units = rows * -(-length // self.unit)
        return units * (self.kept * value_bits + self.codes * self.width)

    def __str__(self) -> str:
        if self.kind == "position":
            return f"{self.width}-bit positions"
        many = "" if self.groups == 1 else f" for {self.groups} groups"
        what = "positions" if self.kind == "index" else "pattern numbers"
        return f"{self.width}-bit {what}{many}"


class Packed(NamedTuple):
    """A compressed weight.

    Attributes:
        values: ``[units, kept]``, in the dtype of the weight.
        codes: uint8 ``[units]``, or ``[units, kept]`` for ``position``.
    """

    values: np.ndarray
    codes: np.ndarray


def storage_of(pattern: Pattern) -> Storage | str:
    """The form of a pattern that takes the fewest bits, or why there is none."""
    n, m = pattern.n, pattern.m
    if m > 256:
        return f"groups of {m} are longer than the 256 that a position in a byte can tell apart"
    each = index_bits(m)
    patterns = (math.comb(m, n) - 1).bit_length()
    found = []
    for width in _WIDTHS:
        for kind, bits in (("index", n * each), ("pattern", patterns)):
            # Keys of patterns are 64-bit numbers.
            if 0 < bits <= width and (kind == "index" or n * each < 63):
                found.append(Storage(pattern, kind, width, width // bits))  # type: ignore[arg-type]
    found += [Storage(pattern, "position", width, 1) for width in _WIDTHS if each <= width]
    # Of equals the first: the narrower code, and positions rather than numbers of patterns.
    return min(found, key=lambda form: form.index_bits)


def index_bits(m: int) -> int:
    """Bits of a position in a group of ``m``."""
    return (m - 1).bit_length()


# -- positions -----------------------------------------------------------------------------------


def slots(kept: np.ndarray, n: int) -> np.ndarray:
    """Positions of the slots of every group, ascending; where fewer than ``n`` are kept, the highest
    free positions make up for it.

    Args:
        kept: bool ``[groups, m]``.
        n: slots of a group.

    Returns:
        uint8 ``[groups, n]``.

    Raises:
        UnsupportedError: a group keeps more than ``n``.
    """
    groups, m = kept.shape
    if m <= _LONGEST_TABLED:
        table, full = _slot_table(n, m)
        numbers = np.zeros(groups, np.uint16)
        for position in range(m):
            numbers |= kept[:, position].astype(np.uint16) << np.uint16(position)
        _refuse_overfull(full[numbers], n, m)
        return table[numbers]
    _refuse_overfull(kept.sum(axis=1) > n, n, m)
    return _slots(kept, n)


def _refuse_overfull(full: np.ndarray, n: int, m: int) -> None:
    count = int(np.count_nonzero(full))
    if count:
        raise UnsupportedError(
            f"{count} of {full.size} groups keep more than {n} of {m} weights; prune the weight to {n}:{m} first"
        )


def _slots(kept: np.ndarray, n: int) -> np.ndarray:
    free = ~kept
    lacking = n - kept.sum(axis=1, keepdims=True)
    from_the_end = np.cumsum(free[:, ::-1], axis=1)[:, ::-1]
    chosen = kept | (free & (from_the_end <= lacking))
    return np.nonzero(chosen)[1].astype(np.uint8).reshape(len(kept), n)


@cache
def _slot_table(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of every mask, read as a number with position 0 in the lowest bit, and which have too many."""
    masks = (np.arange(1 << m)[:, None] >> np.arange(m) & 1).astype(bool)
    full = masks.sum(axis=1) > n
    masks[full] = False
    return _slots(masks, n), full


def _keys(positions: np.ndarray, m: int) -> np.ndarray:
    """A number per pattern that grows in lexicographic order: ``[…, n]`` to ``[…]``."""
    keys = np.zeros(positions.shape[:-1], np.int64)
    for slot in range(positions.shape[-1]):
        keys = keys * m + positions[..., slot]
    return keys


@cache
def table(storage: Storage) -> np.ndarray:
    """Positions in the unit by code: int32 ``[codes, kept]``; meaningless for ``position``.

    Codes that no group has stand for positions in range all the same.
    """
    pattern, groups = storage.pattern, storage.groups
    if storage.kind == "pattern":
        each = np.array(list(itertools.combinations(range(pattern.m), pattern.n)), np.int32)
        bits = (len(each) - 1).bit_length()
    else:
        step = index_bits(pattern.m)
        bits = step * pattern.n
        each = (np.arange(1 << bits)[:, None] >> (step * np.arange(pattern.n))) & ((1 << step) - 1)
        each = np.minimum(each, pattern.m - 1).astype(np.int32)
    numbers = np.arange(len(each) << bits * (groups - 1))
    columns = []
    for group in range(groups):
        part = np.minimum(numbers >> (bits * group) & ((1 << bits) - 1), len(each) - 1)
        columns.append(each[part] + group * pattern.m)
    return np.ascontiguousarray(np.concatenate(columns, axis=1), np.int32)


def codes_of(positions: np.ndarray, storage: Storage) -> np.ndarray:
    """Codes of units.

    Args:
        positions: uint8 ``[units, groups, n]``, those of :func:`slots`.
        storage: how to write them.

    Returns:
        uint8 ``[units]``, or ``[units, n]`` for ``position``.
    """
    pattern = storage.pattern
    if storage.kind == "position":
        return positions.reshape(len(positions), -1)
    if storage.kind == "pattern":
        every = np.array(list(itertools.combinations(range(pattern.m), pattern.n)))
        each = np.searchsorted(_keys(every, pattern.m), _keys(positions, pattern.m)).astype(np.uint8)
        bits = (len(every) - 1).bit_length()
    else:
        step = index_bits(pattern.m)
        bits = step * pattern.n
        each = np.zeros(positions.shape[:2], np.uint8)
        for slot in range(pattern.n):
            each |= positions[:, :, slot] << np.uint8(step * slot)
    codes = np.zeros(len(each), np.uint8)
    for group in range(storage.groups):
        codes |= each[:, group] << np.uint8(bits * group)
    return codes


def metadata_words(nibbles: np.ndarray, dtype: type[np.signedinteger]) -> np.ndarray:
    """Nibbles of 2:4 groups as the words that sparse kernels read, the first in the lowest bits.

    Args:
        nibbles: uint8 ``[rows, groups]``, groups a multiple of what a word holds.
        dtype: int16 (four groups; 16-bit values) or int32 (eight; 8-bit values).

    Returns:
        ``[rows, words]``, in row order: a kernel's own order of rows and columns is its backend's to make.
    """
    return pack(nibbles, ir.DataType.UINT4).view(np.dtype(dtype).newbyteorder("<")).reshape(len(nibbles), -1)


# -- weights -------------------------------------------------------------------------------------


def encode(rows: np.ndarray, kept: np.ndarray | None, storage: Storage) -> Packed:
    """Compress vectors of weights.

    Args:
        rows: ``[R, C]`` of any dtype; NumPy's own types are moved as bits, NaN and -0.0 unchanged.
        kept: bool ``[R, C]``, what to store; None: all that is not zero, and of negative zeros as many
            as there are free slots for.
        storage: the form.

    Raises:
        UnsupportedError: a group keeps more than ``n``.
    """
    count, length = rows.shape
    units = -(-length // storage.unit)
    values = np.empty((count, units * storage.kept), rows.dtype)
    codes = np.empty((count * units, storage.codes), np.uint8)
    step = max(1, _PIECE // max(1, units * storage.unit))
    for start in range(0, count, step):
        part = _padded(rows[start : start + step], storage.unit)
        mask = (
            kept_of(part, storage.pattern)
            if kept is None
            else _padded(kept[start : start + step], storage.unit)
        )
        groups = part.reshape(-1, storage.pattern.m)
        try:
            places = slots(mask.reshape(groups.shape), storage.pattern.n)
        except UnsupportedError:
            # Said of the whole, not of the piece at hand.
            _refuse_overfull(overfull(rows, kept, storage.pattern), storage.pattern.n, storage.pattern.m)
            raise
        flat = places + np.arange(0, groups.size, storage.pattern.m)[:, None]
        taken = groups.reshape(-1)[flat]
        if not mask.all():
            # A slot that is there to fill the group holds zero, whatever the mask left out there.
            taken[~mask.reshape(-1)[flat]] = 0
        values[start : start + step] = taken.reshape(len(part), -1)
        codes[start * units : (start + len(part)) * units] = codes_of(
            places.reshape(-1, storage.groups, storage.pattern.n), storage
        ).reshape(-1, storage.codes)
    flat_codes = codes if storage.kind == "position" else codes[:, 0]
    return Packed(values.reshape(count * units, storage.kept), flat_codes)


def decode(packed: Packed, storage: Storage, shape: tuple[int, int]) -> np.ndarray:
    """The vectors ``[R, C]`` of ``shape`` that :func:`encode` was given, zero where nothing was kept."""
    places = packed.codes if storage.kind == "position" else table(storage)[packed.codes]
    out = np.zeros((len(packed.values), storage.unit), packed.values.dtype)
    np.put_along_axis(out, places.astype(np.intp), packed.values, axis=1)
    return np.ascontiguousarray(out.reshape(shape[0], -1)[:, : shape[1]])


def kept_of(rows: np.ndarray, pattern: Pattern) -> np.ndarray:
    """What of ``rows [R, C]`` (C a multiple of m) there is to store: bool of its shape.

    All that is not zero; and negative zeros, which torch leaves where a negative weight is multiplied
    with a mask, as far as their group has slots free.
    """
    kept: np.ndarray = rows != 0
    if rows.dtype.kind in "iu":
        return kept
    negative = ~kept & np.signbit(rows)
    if negative.any():
        groups, zeros = kept.reshape(-1, pattern.m), negative.reshape(-1, pattern.m)
        free = pattern.n - groups.sum(axis=1, keepdims=True)
        groups |= zeros & (np.cumsum(zeros, axis=1) <= free)
    return kept


def lost_zeros(rows: np.ndarray, pattern: Pattern) -> int:
    """Negative zeros of ``rows [R, C]`` that :func:`encode` turns into zeros, for want of slots."""
    if rows.dtype.kind in "iu":
        return 0
    padded = _padded(rows, pattern.m)
    return int(np.count_nonzero((padded == 0) & np.signbit(padded) & ~kept_of(padded, pattern)))


def overfull(rows: np.ndarray, kept: np.ndarray | None, pattern: Pattern) -> np.ndarray:
    """Which groups keep more than ``n``: bool ``[groups]``, a short one at the end of each row included."""
    mask = (rows != 0) if kept is None else kept
    full: np.ndarray = _padded(mask, pattern.m).reshape(-1, pattern.m).sum(axis=1) > pattern.n
    return full


def _padded(rows: np.ndarray, unit: int) -> np.ndarray:
    missing = -rows.shape[1] % unit
    if not missing:
        return np.ascontiguousarray(rows)
    out = np.zeros((len(rows), rows.shape[1] + missing), rows.dtype)
    out[:, : rows.shape[1]] = rows
    return out
