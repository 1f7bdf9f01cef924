"""The CPU that code is made for: its name to LLVM, how many cores, and which instructions kernels may use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from effic.ir.errors import UsageError

_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_VNNI = "avx512vnni"


@dataclass(frozen=True)
class Cpu:
    """A CPU as kernels and schedules see it.

    Attributes:
        mcpu: the name LLVM knows it by (``cascadelake``, ``znver5``, ``x86-64-v3``).
        cores: threads that share the work of one operator.
        avx512: whether 512-bit vectors with byte and word operations are there (F, BW, DQ, VL).
        vnni: whether the 512-bit dot product of bytes is there; implies :attr:`avx512`.
    """

    mcpu: str
    cores: int = 1
    avx512: bool = False
    vnni: bool = False

    @classmethod
    def named(cls, mcpu: str, cores: int = 1) -> Cpu:
        """The CPU of this name; its instructions are what LLVM says it has.

        Raises:
            UsageError: LLVM knows no such CPU, or ``cores`` is not positive.
        """
        from tvm.target import Target, codegen

        if cores < 1:
            raise UsageError(f"cores is {cores}, the least is 1")
        known = {str(name) for name in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm"}))}
        if mcpu not in known:
            from effic.passes import near

            raise UsageError(
                f"LLVM knows no CPU '{mcpu}'{near(mcpu, sorted(known))}; leave mcpu out to use this machine's"
            )
        target = Target({"kind": "llvm", "mcpu": mcpu})
        avx512 = all(codegen.llvm_cpu_has_features(feature, target) for feature in _AVX512)
        vnni = avx512 and bool(codegen.llvm_cpu_has_features(_VNNI, target))
        return cls(mcpu, cores, avx512, vnni)

    @classmethod
    def host(cls, cores: int | None = None) -> Cpu:
        """The CPU of this machine; ``cores`` defaults to those this process may run on."""
        from tvm.target import codegen

        if cores is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls.named(str(codegen.llvm_get_system_cpu()), cores)

    def target(self) -> Any:
        """The ``tvm.target.Target`` that code is generated for, vectors as wide as the CPU has them.

        LLVM halves those of 512 bits on many CPUs (``prefer-256-bit``), for the sake of code that seldom uses
        vectors; here exp took 34 µs with halves and 19 µs without, on the same core. That is a preference and
        no instruction set: a build needs what :attr:`mcpu` has, and no more.
        """
        from tvm.target import Target

        config: dict[str, Any] = {"kind": "llvm", "mcpu": self.mcpu, "num-cores": self.cores}
        if self.avx512:
            config["mattr"] = ["-prefer-256-bit"]
        return Target(config)
