"""The GPU that code is made for, the compiler that checks it, and the Relax pipeline for it.

Without NVIDIA's driver TVM leaves its CUDA runtime library out, and then embeds CUDA source that no compiler
has seen. A stand-in for the driver's library, whose functions all fail, lets TVM load its own; then it runs
``nvcc`` and embeds what comes out, on a machine without a GPU too. Nothing is launched with it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effic.ir.errors import UnsupportedError, UsageError

LEAST_ARCH = 80
"""The oldest architecture (times ten) whose tensor cores have the matrix instruction that kernels use."""

_ARCH = re.compile(r"sm_(\d{2,3})a?")

# What TVM's CUDA runtime library takes from the driver's.
_DRIVER_SYMBOLS = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx",
    "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled",
)  # fmt: skip
_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE

_COMPILE_MODE, _EXACT_MATH = "TVM_CUDA_COMPILE_MODE", "TVM_CUDA_NVCC_NO_FAST_MATH"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        arch: as CUDA names it: ``sm_90`` (H100, H200), ``sm_80`` (A100), ``sm_89`` (L4, RTX 40).
    """

    arch: str = "sm_90"

    def __post_init__(self) -> None:
        found = _ARCH.fullmatch(self.arch)
        if found is None or int(found[1]) < LEAST_ARCH:
            raise UsageError(
                f"arch is '{self.arch}', and code is made for sm_{LEAST_ARCH} and later, as sm_80, sm_89 and sm_90"
            )

    def target(self) -> Any:
        """The ``tvm.target.Target`` that code is generated for; the host's part runs on any CPU of its kind."""
        from tvm.target import Target

        return Target({"kind": "cuda", "arch": self.arch, "host": {"kind": "llvm"}})

    def why_not_on(self, capability: tuple[int, int]) -> str | None:
        """Why its code does not run on a GPU of this compute capability, a phrase, or None."""
        number = int(self.arch[3:].rstrip("a"))
        own = number // 10, number % 10
        exact = self.arch.endswith("a")
        if capability == own or (not exact and capability[0] == own[0] and capability > own):
            return None
        return f"is for {self.arch}, and the GPU here is sm_{capability[0]}{capability[1]}"


def find_nvcc() -> str | None:
    """The path of nvcc: on the PATH, or in ``CUDA_HOME`` or ``CUDA_PATH``."""
    if found := shutil.which("nvcc"):
        return found
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return found
    return None


def nvcc_version(nvcc: str) -> str:
    """Its release, ``13.0``."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "of unknown release"


def has_driver() -> bool:
    """Whether NVIDIA's driver is here."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def stand_in_driver(scratch: str) -> None:
    """Load a library of the driver's name into this process, whose functions report that there is no device.

    Only for a process that compiles, before it imports tvm.
    """
    code = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER_SYMBOLS)
    source, library = Path(scratch, "driver.c"), Path(scratch, _DRIVER)
    source.write_text(code, encoding="utf-8")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "cc"
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}"]
    try:
        subprocess.run(
            [*command, "-o", str(library), str(source)], check=True, capture_output=True, text=True
        )
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (subprocess.CalledProcessError, OSError):
        # Then TVM embeds source, and the build says that nobody compiled it.
        return


class Nvcc:
    """TVM's calls of the CUDA compiler, led to nvcc and counted.

    Attributes:
        sources: how many sources nvcc has taken.
    """

    def __init__(self, nvcc: str, arch: str) -> None:
        import tvm_ffi

        self.arch, self.sources = arch, 0
        folder = os.path.dirname(os.path.abspath(nvcc))
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
        os.environ[_COMPILE_MODE] = "nvcc"
        # exp and division as exact as on a CPU: outputs are held against one.
        os.environ[_EXACT_MATH] = "1"
        tvm_ffi.register_global_func("tvm_callback_cuda_compile", self._compile, override=True)

    def _compile(self, code: str) -> Any:
        from tvm.support.nvcc import compile_cuda

        binary = compile_cuda(code, target_format="fatbin", compiler="nvcc")
        self.sources += 1
        return binary


def refused_by_nvcc(error: Exception) -> UnsupportedError | None:
    """What nvcc said when it refused a source, from TVM's error, which holds all of the source; else None."""
    text = str(error)
    _, mark, said = text.partition("Compilation error:\n")
    if not mark:
        return None
    lines = [line.strip() for line in said.splitlines()]
    telling = next((line for line in lines if "error" in line), lines[0] if lines else "")
    return UnsupportedError(f"nvcc refuses the CUDA source of this model: {telling[:300].rstrip(' .')}")


def compile_for_gpu(module: Any, gpu: Gpu) -> Any:
    """Schedule and compile a Relax module; the ``tvm.runtime.Executable``.

    What is no kernel of effic's is scheduled by TVM's own rules (dlight).
    """
    import tvm
    from tvm import relax
    from tvm.relax.backend.cuda import pipeline as cuda_pipeline

    target = gpu.target()
    before = [
        relax.transform.DeadCodeElimination(),
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        *cuda_pipeline.library_dispatch_passes(target),
        *cuda_pipeline.legalize_passes(target),
        *cuda_pipeline.dataflow_lower_passes(target),
        *cuda_pipeline.finalize_passes(target),
    ]

    @tvm.transform.module_pass(opt_level=0, name="effic.CudaPipeline")  # type: ignore[untyped-decorator]
    def pipeline(module: Any, _context: Any) -> Any:
        with target:
            return tvm.transform.Sequential(before)(module)

    # nvcc asks for the architecture of the target that is in force.
    with target:
        return tvm.compile(module, target, relax_pipeline=pipeline)
