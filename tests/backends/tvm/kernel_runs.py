"""Running one kernel alone: its output between canaries, its result against an exact one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm

from effic.backends.tvm.codegen import compile_kernel
from effic.backends.tvm.cpu import Cpu

CANARY = np.float32(-12345.5)
MARGIN = 64


def run(spec: Any, cpu: Cpu, inputs: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Run a kernel with its output in the middle of a buffer of canaries, which must survive."""
    made = spec.prim_func(cpu)
    check_shapes(made, [*(array.shape for array in inputs), shape])
    return called(compile_kernel(made, cpu), inputs, shape)


def called(function: Any, inputs: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """As :func:`run`, of what is compiled already."""
    size = math.prod(shape)
    room = np.full(size + 2 * MARGIN + 16, CANARY)
    whole = room[-room.ctypes.data % 64 // 4 :][: size + 2 * MARGIN]
    inner = tvm.runtime.from_dlpack(whole[MARGIN : MARGIN + size].reshape(shape))
    function(*map(tvm.runtime.tensor, inputs), inner)
    assert (whole[:MARGIN] == CANARY).all()
    assert (whole[MARGIN + size :] == CANARY).all()
    return whole[MARGIN : MARGIN + size].reshape(shape)


def check_shapes(function: Any, given: Sequence[tuple[int, ...]]) -> None:
    """Arguments are of the shapes that a kernel asks for: it does not look itself, and would read past the end."""
    for parameter, sizes in zip(function.params, given, strict=True):
        wanted = [getattr(size, "value", None) for size in parameter.shape]  # what is no number is open
        assert all(a in (None, b) for a, b in zip(wanted, sizes, strict=True))


def close(got: np.ndarray, exact: np.ndarray, scale: np.ndarray | float) -> None:
    """Within 1e-5 of the sum of the magnitudes that were added."""
    assert got.shape == exact.shape
    assert (np.abs(got - exact) <= 1e-5 * scale + 1e-30).all()


def random(seed: int, *shape: int) -> np.ndarray:
    """Normal fp32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_cores(cpu: Cpu, cores: int) -> Cpu:
    """The same CPU with other threads."""
    return Cpu(cpu.mcpu, cores, cpu.avx512, cpu.vnni)
