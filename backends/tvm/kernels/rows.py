"""Walks along a row: vectors of 16, several at a time, and a narrower last one; sums of lanes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from effic.backends.tvm.kernels.lanes import LANES
from effic.backends.tvm.kernels.vector_math import share

MIN_PARALLEL_ELEMENTS = 16384
"""Elements below which waking the other threads costs more than it gives."""


def indices(T: Any, start: Any, width: int) -> Any:
    """``width`` indices in a row: a vector, or one number."""
    return start if width == 1 else T.ramp(start, 1, width)


def wide(T: Any, value: Any, width: int) -> Any:
    """A scalar in ``width`` lanes."""
    value = T.float32(value) if isinstance(value, (int, float)) else value
    return value if width == 1 else T.broadcast(value, width)


def walk(T: Any, length: int, unroll: int, step: Callable[[int, Any, int], None]) -> None:
    """Call ``step(slot, start, width)`` so that the pieces cover ``length``.

    ``slot`` < ``unroll`` names the accumulator: neighbours have different ones, so that a chain of
    additions does not wait for itself.
    """
    block = unroll * LANES
    if length >= block:
        with T.serial(length // block) as number:
            for slot in range(unroll):
                step(slot, number * block + slot * LANES, LANES)
    done = length // block * block
    slot = 0
    while done < length:
        width = min(LANES, length - done)
        step(slot, done, width)
        done, slot = done + width, slot + 1


def partials(T: Any, count: int, start: float) -> Any:
    """``count`` vectors of partial results that live in registers, all lanes ``start``."""
    buffer = T.alloc_buffer((count * LANES,), "float32", scope="local")
    for slot in range(count):
        T.buffer_store(buffer, wide(T, start, LANES), [indices(T, slot * LANES, LANES)])
    return buffer


def keep(T: Any, value: Any, width: int) -> Any:
    """A value that is used more than once, in a register.

    A bound name would do, but TVM puts its expression back where it is used, and names that occur inside of
    it would then be defined twice.
    """
    buffer = T.alloc_buffer((width,), "float32", scope="local")
    T.buffer_store(buffer, value, [indices(T, 0, width)])
    return buffer[indices(T, 0, width)]


def fold(T: Any, buffer: Any, count: int, combine: Callable[[Any, Any], Any]) -> Any:
    """All lanes of the partial results as one scalar, by halves."""
    whole = [buffer[indices(T, slot * LANES, LANES)] for slot in range(count)]
    while len(whole) > 1:
        whole = [
            combine(*whole[i : i + 2]) if i + 1 < len(whole) else whole[i] for i in range(0, len(whole), 2)
        ]
    # Halves of a value, not of the buffer: a load narrower than the store before it is slow to generate.
    value, width = whole[0], LANES
    while width > 2:
        width //= 2
        value = share(value, partial(_halves, combine, f"float32x{width}"))
    pair = keep_pair(T, value)
    return keep(T, combine(pair[0], pair[1]), 1)


def _halves(combine: Callable[[Any, Any], Any], kind: str, value: Any) -> Any:
    return combine(tirx.op.vectorlow(kind, value), tirx.op.vectorhigh(kind, value))


def keep_pair(T: Any, value: Any) -> Any:
    """A buffer with the two lanes of a value."""
    buffer = T.alloc_buffer((2,), "float32", scope="local")
    T.buffer_store(buffer, value, [indices(T, 0, 2)])
    return buffer
