"""Kernels of fixed sizes, put together to one for a first dimension that is known at run time only.

A product of 23 rows is the kernel for 16 rows and, for the 7 that are left, the one for 8 rows on the last 8: a row
that two of them compute comes out twice, which is less work than a kernel per number of rows is code. Each row
is computed by code that knows its sizes, and all kernels read one packed weight.

Against kernels for one number of rows, 1024 x 1024 on a Cascade Lake: 0.9 to 1.2 of their time in fp32, 1.0 to
1.5 in codes, the most at 3 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.lanes import function

SIZES = (1, 2, 4, 8, 16, 64)
"""Rows of the kernels that a product is put together from."""

CODED_SIZES = (1, 4, 16)
"""The same of weights in codes, whose kernels take longer to compile and lose less by being run twice."""


@dataclass(frozen=True)
class OpenRows:
    """A kernel of any number of rows, made of kernels for fixed ones.

    Attributes:
        name: of the function.
        make: the kernel for a number of rows; what each reads that is not cut has to be the same.
        sizes: the numbers of rows to have kernels for, from 1 on.
        cut: which of the arguments are cut along their first axis, besides the last one, y.
    """

    name: str
    make: Callable[[int], Any] = field(compare=False)
    sizes: tuple[int, ...] = SIZES
    cut: tuple[int, ...] = (0,)

    def prim_func(self, cpu: Cpu) -> Any:
        """The arguments of the kernels, those that are cut with an open first dimension."""
        from tvm.tirx import IntImm

        made = [self.make(size).prim_func(cpu) for size in self.sizes]
        cut = {*self.cut, len(made[0].params) - 1}
        result: list[Any] = []
        with function(self.name, result) as T:
            rows = T.int64()
            arguments = []
            for index, one in enumerate(made[0].params):
                # What is no number is open in the kernels, too.
                shape = [int(size) if isinstance(size, IntImm) else size for size in one.shape]
                if index in cut:
                    # The kernel for one row may take several, the heads of one image: they have an axis.
                    shape[:1] = [rows, *shape[:1]] if shape[0] > 1 else [rows]
                arguments.append(T.arg(str(one.name), T.Buffer(tuple(shape), str(one.dtype))))
            # Most of the rows by the largest kernel that they fill, the rest by the smallest that holds it.
            main = T.int64(self.sizes[0])
            for size in self.sizes[1:]:
                main = T.Select(rows >= size, T.int64(size), main)
            done = rows // main * main
            left = rows - done
            # How often a kernel runs and from which row on are kept in memory: TVM simplifies each access to a
            # buffer by all it knows about the loops around it, and would take seconds for as many terms.
            known = T.alloc_buffer((2,), "int64", scope="local")
            smaller = 0
            for size, kernel in zip(self.sizes, made, strict=True):
                rest = T.cast(T.And(left > smaller, left <= size), "int64")
                T.buffer_store(known, rest + T.Select(main == size, rows // size, T.int64(0)), [0])
                with T.serial(known[0]) as number:
                    begin = T.Select(main == size, number * size, done)
                    T.buffer_store(known, T.min(begin, rows - size), [1])
                    self._call(T, kernel, arguments, cut, known[1])
                smaller = size
        return result[0]

    def _call(self, T: Any, kernel: Any, arguments: list[Any], cut: set[int], row: Any) -> None:
        """The body of a kernel, its buffers lying inside of the arguments."""
        from tvm.tirx import DeclBuffer, IntImm

        bound: list[Any] = []
        for index, (one, whole) in enumerate(zip(kernel.params, arguments, strict=True)):
            begin = [row if index in cut else 0] + [0] * (len(whole.shape) - 1)
            if index not in cut:
                for own, given in zip(one.shape, whole.shape, strict=True):
                    if not isinstance(own, IntImm) and not any(own.same_as(v) for v in [given, *bound]):
                        T.bind(given, var=own)
                        bound.append(own)
            T.add_to_parent(DeclBuffer(one, data=T.address_of(whole[tuple(begin)])))
        T.add_to_parent(kernel.body.block.body)
