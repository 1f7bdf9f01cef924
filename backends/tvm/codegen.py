"""How machine code is made of functions whose loops are arranged: which of TVM's passes they go through."""

from __future__ import annotations

from typing import Any

import tvm

from effic.backends.tvm.cpu import Cpu

# LLVM does the same later, for less: both visit every statement that unrolling has made.
_NEEDLESS = ["tirx.CommonSubexprElim", "tirx.RemoveNoOp"]


def generating() -> Any:
    """The context to call ``tvm.compile`` in, for a CPU.

    Functions do not check their arguments, which was half of all code: the virtual machine has checked those of
    the whole function, and makes all others itself. Who calls a kernel alone has to get them right.
    """
    return tvm.transform.PassContext(disabled_pass=_NEEDLESS, config={"tirx.disable_assert": True})


def compile_kernel(function: Any, cpu: Cpu) -> Any:
    """A scheduled ``PrimFunc`` alone, as a function of TVM's tensors, which must have the shapes it asks for."""
    with generating():
        return tvm.compile(function, cpu.target())[str(function.attrs["global_symbol"])]
