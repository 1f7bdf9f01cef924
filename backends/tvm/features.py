"""Which instructions a library needs, and whether this machine has them: asked before it is run, not by SIGILL."""

from __future__ import annotations

import functools
import os
import platform

# LLVM's names of the x86 instruction sets that compiled arithmetic may use, and Linux's where those differ.
_X86 = {
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt",
    "avx": "avx", "f16c": "f16c", "fma": "fma", "avx2": "avx2", "bmi": "bmi1", "bmi2": "bmi2",
    "lzcnt": "abm", "movbe": "movbe", "avxvnni": "avx_vnni", "gfni": "gfni",
    "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi",
    "avx512vnni": "avx512_vnni", "avx512vbmi2": "avx512_vbmi2", "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq", "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16",
}  # fmt: skip

_SAME = {"amd64": "x86_64", "arm64": "aarch64"}


def features_of(mcpu: str) -> list[str]:
    """The instruction sets that code for a CPU may use, by LLVM's names; empty for other than x86."""
    from tvm.target import Target, codegen

    found = {str(name) for name in codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mcpu": mcpu}))}
    return sorted(found & set(_X86))


def architecture() -> str:
    """This machine's, as a target triple begins: ``x86_64``."""
    name = platform.machine().lower()
    return _SAME.get(name, name)


def why_not_here(triple: str, features: list[str]) -> str | None:
    """Why code for ``triple`` with these instruction sets does not run on this machine, a phrase, or None.

    Instruction sets are compared on Linux on x86 alone; elsewhere the architecture is.
    """
    wanted = triple.partition("-")[0]
    if _SAME.get(wanted, wanted) != architecture():
        return f"is for {wanted}, and this machine is {architecture()}"
    flags = _flags()
    lacking = [name for name in features if flags and name in _X86 and _X86[name] not in flags]
    return f"needs {', '.join(lacking)}, which this CPU lacks" if lacking else None


@functools.cache
def _flags() -> frozenset[str]:
    """Linux's names of what this x86 CPU can do; empty where that is not told."""
    if not os.path.isfile("/proc/cpuinfo"):
        return frozenset()
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()
