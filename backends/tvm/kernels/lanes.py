"""Words that the fp32 kernels are written in: vectors of 16 lanes, tiles of accumulators, clamps.

A vector of 16 floats is one register with AVX512 and two or four elsewhere: LLVM splits it, so the
same code serves every CPU and only the size of the register tile changes (:func:`registers`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from effic.backends.tvm.cpu import Cpu

LANES = 16
"""Floats of a vector: one 64-byte line of the cache, and one register of AVX512."""

MIN_PARALLEL_FLOPS = 400_000
"""Below this (some 5 µs of one core) waking the other threads costs more than they give."""

CHUNKS_PER_CORE = 4
"""Pieces of work per core, so that a core that is late costs a quarter of its share at most."""

ACTIVATIONS = (None, "relu", "clip")


def registers(cpu: Cpu, portable: bool = False) -> int:
    """Vectors of 16 floats that accumulators may take, with some left for operands."""
    return 28 if cpu.avx512 and not portable else 6


def spec_name(family: str, spec: Any) -> str:
    """A function name of a frozen spec: two specs that differ in a field have two names."""
    words = [family]
    for field in fields(spec):
        value = getattr(spec, field.name)
        if value is None or value is False or value == ():
            continue
        text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"{field.name}{'' if value is True else text}")
    return re.sub(r"\W", lambda found: {"-": "m", ".": "p"}.get(found[0], "_"), "_".join(words))


def why_no_activation(activation: str | None, low: float, high: float) -> str | None:
    """Why an epilogue cannot be fused, None when it can."""
    if activation not in ACTIVATIONS:
        return f"the activation '{activation}' is none of relu and clip"
    if activation == "clip" and not low <= high:
        return f"the clip from {low} to {high} is empty"
    return None


@contextmanager
def function(name: str, result: list[Any]) -> Iterator[Any]:
    """Build a scheduled ``PrimFunc`` of this name inside the block; it is appended to ``result``.

    Yields:
        The TIR builder, whose statements the block adds to the function.
    """
    from tvm import s_tir
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "global_symbol": name})
        yield T
    made = builder.get()
    # TVM's passes over whole modules expect a root block, and fail on a function of two buffers without.
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", made.body))
    result.append(made.with_body(root))


def argument(T: Any, name: str, shape: Sequence[Any]) -> Any:
    """The next argument of the function: an fp32 buffer."""
    return T.arg(name, T.Buffer(tuple(shape), "float32"))


def loop(T: Any, extent: Any, parallel: bool) -> Any:
    """A loop over independent pieces, on the threads where there is work for them."""
    return T.parallel(extent) if parallel else T.serial(extent)


def lanes(T: Any, start: Any, stride: int = 1) -> Any:
    """The indices of 16 elements."""
    return T.ramp(start, stride, LANES)


def splat(T: Any, value: Any) -> Any:
    """One float in all 16 lanes."""
    return T.broadcast(T.float32(value) if isinstance(value, (int, float)) else value, LANES)


def accumulator(T: Any) -> Any:
    """A buffer of one vector, which lives in a register.

    TVM takes a buffer of a kilobyte, or of scope "local", from the heap, and in a function that threads share LLVM
    keeps in memory what is there, at the latest where something is fetched ahead beside it.
    """
    return T.alloc_buffer((LANES,), "float32")


def keeps_floats(floats: int, vectors: int, held: int) -> bool:
    """Whether a step of ``floats × vectors`` products should take the vectors one by one, or else the floats.

    The others stay in registers meanwhile, beside ``held`` sums: a float takes one, a vector two without AVX512.
    """
    return floats < vectors * (1 if held > LANES else 2)


def accumulators(T: Any, count: int) -> Any:
    """``count`` vectors that live in registers, as long as every index into them is a constant."""
    return T.alloc_buffer((count * LANES,), "float32", scope="local")


def clamp(T: Any, value: Any, activation: str | None, low: float, high: float) -> Any:
    """The activation of a vector; NaN stays NaN (the constant is the first operand on purpose)."""
    if activation == "relu":
        return T.max(splat(T, 0.0), value)
    if activation == "clip":
        if low > -math.inf:
            value = T.max(splat(T, low), value)
        if high < math.inf:
            value = T.min(splat(T, high), value)
    return value


def tiles(size: int, most: int) -> tuple[int, int, int]:
    """Cut ``size`` into pieces of nearly equal length, at most ``most``.

    Returns:
        length of the pieces, how many have it, length of the one left over (0 for none).
    """
    length = -(-size // -(-size // most))
    return length, size // length, size % length
