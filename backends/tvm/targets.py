"""The targets that TVM compiles for."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from effic.backends.base import Arrays, Backend, Built, Tell
from effic.backends.tvm.artifact import TvmArtifact, import_tvm
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.passes.base import Remarks, option

if TYPE_CHECKING:
    from effic.backends.tvm.cpu import Cpu
    from effic.backends.tvm.cuda import Gpu
    from effic.backends.tvm.survey import Survey


class _Tvm(Backend):
    """What the targets have in common: folders, sets of sizes, and how a model is looked through."""

    is_folder: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("apache-tvm", "apache-tvm-ffi")
    shapes: str

    @abc.abstractmethod
    def cpu(self) -> Cpu | None:
        """The CPU that code is made for; None where it is made for a GPU.

        Raises:
            MissingExtraError: apache-tvm is not installed.
            UsageError: LLVM knows no such CPU.
        """

    @property
    @abc.abstractmethod
    def converter_options(self) -> dict[str, Any]:
        """The options that converters of operators heed."""

    def sizes(self, model: Model) -> dict[str, int]:
        return next(iter(self.buckets(model)), {})

    def buckets(self, model: Model) -> list[dict[str, int]]:
        from effic.backends.tvm.specialize import parse_shapes

        return parse_shapes(self.shapes)

    def run_apart(
        self, path: str | os.PathLike[str], feeds: Iterable[Mapping[str, np.ndarray]]
    ) -> Iterator[Arrays]:
        from effic.backends.tvm.run_apart import run_apart

        return run_apart(path, feeds)

    def lower(self, model: Model, remarks: Remarks) -> Model:
        """Refuse what cannot be compiled; what each node becomes is decided when it is built.

        Raises:
            UnsupportedError: operators that cannot be lowered, by node and with the reason.
            UsageError: dynamic dimensions without a size.
        """
        cpu = self.cpu()
        from effic.backends.tvm.coverage import coverage
        from effic.backends.tvm.relax_builder import buckets_of, refuse_uncovered

        refuse_uncovered(coverage(model, cpu, self.shapes, self.converter_options))
        buckets_of(model, cpu, self.shapes, self.converter_options)
        return model

    def survey(self, model: Model) -> Survey:
        """How each operator of a model would be run, and what cannot be; nothing is compiled."""
        cpu = self.cpu()
        from effic.backends.tvm.survey import survey

        return survey(model, self.text, cpu, self.shapes, self.converter_options)

    def load(self, path: str | os.PathLike[str], *, threads: int = 1) -> TvmArtifact:
        if not os.path.isdir(path):
            raise UsageError(f"{os.fspath(path)} is no folder; {self.name} builds folders")
        return TvmArtifact.load(path, threads=threads)


@dataclass(frozen=True)
class TvmCpu(_Tvm):
    """TVM on a CPU: a compiled library with effic's own kernels, for fixed input shapes.

    The output is a folder with native code for one kind of CPU, weights packed as the kernels read them.
    Weights in 2 to 8 bits, per-input-channel groups, exact outliers and N:M patterns stay as small in memory
    as in the file.
    """

    name: ClassVar[str] = "tvm-cpu"
    rival: ClassVar[str] = "ort-cpu"

    mcpu: str = option(
        "", help="LLVM's name of the CPU (cascadelake, znver5, x86-64-v3); this machine's by default"
    )
    num_cores: int = option(
        0, ge=0, le=1024, help="threads the code is laid out for; 0: the cores that this process may use"
    )
    shapes: str = option(
        "",
        help="sizes of dynamic dimensions, several sets parted by semicolons: batch=1,seq=64;batch=1,seq=128",
    )
    activations: Literal["fp32", "int8"] = option(
        "fp32",
        help="int8: activations of quantized weights rounded to 8 bits at every call (faster, less exact)",
    )
    tuned: str = option(
        "", help="folder of records of effic tune; kernels are made as was measured to be best"
    )

    def cpu(self) -> Cpu:
        import_tvm(f"the target {self.name}")
        from effic.backends.tvm.cpu import Cpu

        if not self.mcpu:
            return Cpu.host(self.num_cores or None)
        return Cpu.named(self.mcpu, self.num_cores or Cpu.host().cores)

    @property
    def converter_options(self) -> dict[str, Any]:
        """The options that converters of operators heed.

        Raises:
            UsageError: ``tuned`` names no folder of records.
        """
        from effic.backends.tvm.tune_records import TunedKernels

        return {
            "activations": self.activations,
            "tuned": TunedKernels(self.tuned) if self.tuned else None,
        }

    def build(
        self,
        model: Model,
        path: str | os.PathLike[str],
        *,
        inputs: Mapping[str, np.ndarray] | None = None,
        tell: Tell | None = None,
    ) -> Built:
        """Compile a model in a child process.

        Args:
            model: in canonical form; it is not changed.
            path: the folder, which must not exist or be empty.
            inputs: what to run the artifact on in the child when it is finished.
            tell: hears of the stages.

        Raises:
            UnsupportedError: operators that cannot be lowered.
            MissingExtraError: apache-tvm is not installed.
            MissingToolError: there is no C compiler to link with.
            NotMeasuredError: the build crashed.
        """
        import_tvm(f"the target {self.name}")
        from effic.backends.tvm.build import build

        return build(self, model, os.fspath(path), inputs, tell)


@dataclass(frozen=True)
class TvmCuda(_Tvm):
    """TVM on an NVIDIA GPU, unverified until it is run on one: a compiled library with effic's own kernels.

    The output is a folder with code for one architecture of GPUs and fixed input shapes. Weights in 2 to 8 bits,
    per-input-channel groups and 2:4 patterns stay as small in memory as in the file; other operators are scheduled
    by TVM's rules. It builds on a machine without a GPU, where nvcc compiles it; checking it takes a GPU.
    """

    name: ClassVar[str] = "tvm-cuda"

    arch: str = option(
        "sm_90", help="the GPU's architecture: sm_80 (A100), sm_89 (L4, RTX 40), sm_90 (H100, H200)"
    )
    shapes: str = option("", help="sizes of dynamic dimensions, as for tvm-cpu")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gpu()

    def gpu(self) -> Gpu:
        """The kind of GPU that code is made for.

        Raises:
            UsageError: there is no such architecture, or it is too old.
        """
        from effic.backends.tvm.cuda import Gpu

        return Gpu(self.arch)

    def cpu(self) -> None:
        import_tvm(f"the target {self.name}")

    @property
    def converter_options(self) -> dict[str, Any]:
        return {"arch": self.arch}

    def build(
        self,
        model: Model,
        path: str | os.PathLike[str],
        *,
        inputs: Mapping[str, np.ndarray] | None = None,
        tell: Tell | None = None,
    ) -> Built:
        """Compile a model in a child process.

        Args:
            model, path, tell: see :meth:`TvmCpu.build`.
            inputs: what to run the artifact on, which takes a GPU.

        Raises:
            UnsupportedError: operators that cannot be lowered, or nvcc refuses the source.
            MissingExtraError: apache-tvm is not installed.
            MissingToolError: there is no C++ compiler to link with.
            NotMeasuredError: ``inputs`` are given and no GPU is here, or the build crashed.
        """
        import_tvm(f"the target {self.name}")
        from effic.backends.tvm.cuda_build import build

        return build(self, model, os.fspath(path), inputs, tell)
