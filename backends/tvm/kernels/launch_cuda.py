"""How a GPU kernel is launched: a grid of blocks, the threads of a block, what they share, and where they wait.

A kernel is written once, as a sequence of *phases* that every thread of a block goes through, with
barriers between them, and runs in two ways. On a GPU a phase is the code of one thread. On a CPU
(:class:`SerialLaunch`) it is a loop over the threads, registers have an axis more for the thread, and what
a warp does together (sums by shuffles, matrix products) is written out from its definition. So the
arithmetic and every index of a kernel can be tried where there is no GPU; what cannot be tried there is
whether a barrier is missing between threads that really run at once, and the speed.

Matrix products of a warp are ``mma.m16n8k16`` of half precision with fp32 sums (PTX ISA, "Matrix fragments
for mma.m16n8k16 with floating point type").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WARP = 32
"""Threads of a warp."""

MMA_M, MMA_N, MMA_K = 16, 8, 16
"""Rows, columns and products of one matrix instruction."""

_ALL_LANES = 0xFFFFFFFF


class Registers:
    """An array that every thread has one of, which lives as long as the block."""

    def __init__(self, T: Any, buffer: Any, per_thread: bool) -> None:
        self._T, self.buffer, self._per_thread = T, buffer, per_thread

    def _at(self, thread: Any, index: Any) -> list[Any]:
        return [thread, index] if self._per_thread else [index]

    def get(self, thread: Any, index: Any) -> Any:
        """An element, as an expression."""
        at = self._at(thread, index)
        return self.buffer[tuple(at)] if len(at) > 1 else self.buffer[at[0]]

    def set(self, thread: Any, index: Any, value: Any) -> None:
        """Emit the store of an element."""
        self._T.buffer_store(self.buffer, value, self._at(thread, index))


class Launch:
    """A grid of blocks of ``threads`` threads on a GPU.

    Attributes:
        T: the TIR builder, inside a function.
        threads: of a block, whole warps.
    """

    def __init__(self, T: Any, threads: int) -> None:
        self.T, self.threads = T, threads
        self._thread: Any = None

    @contextmanager
    def grid(self, across: int, down: int = 1) -> Iterator[tuple[Any, Any]]:
        """The code of one block; yields its two numbers."""
        T = self.T
        with (
            T.thread_binding(across, thread="blockIdx.x") as x,
            T.thread_binding(down, thread="blockIdx.y") as y,
            T.thread_binding(self.threads, thread="threadIdx.x") as thread,
        ):
            self._thread = thread
            yield x, y

    def shared(self, size: int, dtype: str) -> Any:
        """Memory of the block."""
        return self.T.alloc_buffer((size,), dtype, scope="shared")

    def registers(self, size: int, dtype: str = "float32") -> Registers:
        """An array per thread."""
        return Registers(self.T, self.T.alloc_buffer((size,), dtype, scope="local"), False)

    def each(self, phase: Callable[[Any], None]) -> None:
        """Emit what each thread does, given its number."""
        phase(self._thread)

    def barrier(self) -> None:
        """Wait until all threads of the block have come here, and see what they have stored."""
        self.T.evaluate(self.T.tvm_storage_sync("shared"))

    def warp_sums(self, values: Registers, count: int) -> None:
        """Add up the first ``count`` registers over the threads of each warp; all get the sums."""
        T = self.T
        offset = WARP // 2
        while offset:
            for index in range(count):
                own = values.get(None, index)
                other = T.tvm_warp_shuffle_xor(T.uint32(_ALL_LANES), own, offset, WARP, WARP)
                values.set(None, index, own + other)
            offset //= 2

    def mma(self, a: Registers, a_at: int, b: Registers, b_at: int, c: Registers, c_at: int) -> None:
        """``c += a @ b`` of fragments that begin at these registers: 8 halves, 4 halves, 4 floats."""
        T = self.T
        T.evaluate(
            T.ptx_legacy.mma(
                f"m{MMA_M}n{MMA_N}k{MMA_K}", "row", "col", "fp16", "fp16", "fp32",
                a.buffer.data, a_at, b.buffer.data, b_at, c.buffer.data, c_at, False, dtype="float32",
            )
        )  # fmt: skip


class SerialLaunch(Launch):
    """The same grid on a CPU: blocks and threads one after the other."""

    @contextmanager
    def grid(self, across: int, down: int = 1) -> Iterator[tuple[Any, Any]]:
        T = self.T
        with T.serial(across) as x, T.serial(down) as y:
            yield x, y

    def shared(self, size: int, dtype: str) -> Any:
        return self.T.alloc_buffer((size,), dtype)

    def registers(self, size: int, dtype: str = "float32") -> Registers:
        return Registers(self.T, self.T.alloc_buffer((self.threads, size), dtype), True)

    def each(self, phase: Callable[[Any], None]) -> None:
        with self.T.serial(self.threads) as thread:
            phase(thread)

    def barrier(self) -> None:
        """Every loop over the threads ends before the next begins."""

    def warp_sums(self, values: Registers, count: int) -> None:
        T = self.T
        others = self.registers(count)
        offset = WARP // 2
        while offset:
            # All threads read what the others hold before any of them adds.
            with T.serial(self.threads) as thread, T.serial(count) as i:
                others.set(thread, i, values.get(T.bitwise_xor(thread, T.int32(offset)), i))
            with T.serial(self.threads) as thread, T.serial(count) as i:
                values.set(thread, i, values.get(thread, i) + others.get(thread, i))
            offset //= 2

    def mma(self, a: Registers, a_at: int, b: Registers, b_at: int, c: Registers, c_at: int) -> None:
        T = self.T
        with (
            T.serial(self.threads // WARP) as warp,
            T.serial(MMA_M) as row,
            T.serial(MMA_N) as column,
            T.serial(MMA_K) as k,
        ):
            first = warp * WARP
            a_thread, a_register = _a_place(row, k)
            b_thread, b_register = _b_place(k, column)
            c_thread, c_register = _c_place(row, column)
            product = T.cast(a.get(first + a_thread, a_at + a_register), "float32") * T.cast(
                b.get(first + b_thread, b_at + b_register), "float32"
            )
            old = c.get(first + c_thread, c_at + c_register)
            c.set(first + c_thread, c_at + c_register, old + product)


# Where the instruction has its elements: thread of the warp, register of the thread.


def _a_place(row: Any, k: Any) -> tuple[Any, Any]:
    return row % 8 * 4 + k % 8 // 2, k % 2 + row // 8 * 2 + k // 8 * 4


def _b_place(k: Any, column: Any) -> tuple[Any, Any]:
    return column * 4 + k % 8 // 2, k % 2 + k // 8 * 2


def _c_place(row: Any, column: Any) -> tuple[Any, Any]:
    return row % 8 * 4 + column // 2, column % 2 + row // 8 * 2
