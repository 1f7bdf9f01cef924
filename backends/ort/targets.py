"""The targets that ONNX Runtime runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from effic.backends.base import Backend
from effic.backends.ort.artifact import OrtArtifact
from effic.backends.ort.decode_at_load import DecodeAtLoad
from effic.backends.ort.lower_compressed import (
    LowerCompressed,
    names_compressed,
    say_lost,
    say_no_faster,
)
from effic.backends.ort.lower_cuda import LowerCuda
from effic.backends.ort.lower_dynamic import LowerDynamic
from effic.backends.ort.lower_encodings import LowerEncodings
from effic.backends.ort.lower_input_groups import LowerInputGroups
from effic.backends.ort.lower_outliers import LowerOutliers
from effic.backends.ort.lower_quantized import LowerQuantized
from effic.ir.model import Model
from effic.passes.base import Pass, Remarks, option

_FAST_KERNELS = {"ep.cuda.fpa_intb_gemm": "1"}
"""The provider's fpA_intB kernels are only taken where a session asks for them."""


def _remarks_of(step: Pass, model: Model, remarks: Remarks) -> int:
    """Apply a step; how many remarks it left, which is none where it has nothing to look at."""
    before = len(remarks.items)
    step.apply(model, remarks)
    return len(remarks.items) - before


def _idle_dense(remarks: Remarks) -> set[str]:
    remarks.missed("the model", "nm=dense does nothing: no weight is compressed")
    return set()


@dataclass(frozen=True)
class Portable(Backend):
    """Standard ONNX only, as the passes leave it: any ONNX tool runs it, none of them fast.

    Compressed weights stay ``DequantizeLinear`` nodes. Few runtimes have fast kernels for those:
    for speed in ONNX Runtime use ``ort-cpu``.
    """

    name: ClassVar[str] = "portable"

    def lower(self, model: Model, remarks: Remarks) -> Model:
        say_no_faster(model, remarks)
        return model

    def load(self, path: str | os.PathLike[str], *, threads: int = 1) -> OrtArtifact:
        return OrtArtifact.load(path, threads=threads)


@dataclass(frozen=True)
class OrtCpu(Backend):
    """ONNX Runtime on a CPU: compressed weights become the operators it has fast kernels for.

    MatMul and Gemm become ``com.microsoft::MatMulNBits``, embedding look-ups
    ``com.microsoft::GatherBlockQuantized``. What neither can hold is written so that the runtime
    decodes it once, when it loads the file.
    """

    name: ClassVar[str] = "ort-cpu"

    accuracy_level: int = option(
        4, ge=0, le=4, help="4: activations rounded to 8 bits per block (fast); 0 to 3: fp32 arithmetic"
    )
    decode: Literal["load", "call"] = option(
        "load",
        help="weights without a fast kernel: decoded once at load (fp32 memory), or at every call (slow)",
    )
    ic: Literal["split", "prefill", "exact"] = option(
        "split",
        help="per-input-channel groups: MatMulNBits per group (for few rows), DynamicQuantizeMatMul per "
        "group (16 rows and more), or decoded to floating point",
    )

    outliers: Literal["auto", "coo", "gather", "ell", "requantize", "fold"] = option(
        "auto",
        help="weights kept exact beside the codes: added to the product element by element, by channels, by "
        "rows (16 rows and more), put in 8 bits with the rest, or put in their places at load",
    )

    nm: Literal["load", "dense"] = option(
        "load",
        help="weights of compress-nm: decompressed when the file is loaded (small file, more memory then), or "
        "stored dense",
    )

    def lower(self, model: Model, remarks: Remarks) -> Model:
        say_no_faster(model, remarks)
        stored = names_compressed(model)
        LowerCompressed(form=self.nm).apply(model, remarks)
        if self.nm == "dense":
            stored = set() if stored else _idle_dense(remarks)
        LowerDynamic().apply(model, remarks)
        # A weight that is decoded at every call is never faster.
        groups = LowerInputGroups(
            form=self.ic, accuracy_level=self.accuracy_level, always=self.decode == "call"
        )
        outliers = LowerOutliers(form=self.outliers, accuracy_level=self.accuracy_level)
        grouped = _remarks_of(groups, model, remarks)
        LowerQuantized().apply(model, remarks)
        kept = _remarks_of(outliers, model, remarks)
        LowerEncodings(accuracy_level=self.accuracy_level).apply(model, remarks)
        decoded = _remarks_of(DecodeAtLoad(when=self.decode), model, remarks)
        say_lost(stored, model, remarks)
        if self.ic != "split" and not grouped:
            remarks.missed("the model", f"ic={self.ic} does nothing: no weight has groups per input channel")
        if self.outliers != "auto" and not kept:
            remarks.missed(
                "the model", f"outliers={self.outliers} does nothing: no weight has exact outliers"
            )
        if self.decode != "load" and not (grouped or decoded):
            remarks.missed("the model", f"decode={self.decode} does nothing: no weight has to be decoded")
        return model

    def load(self, path: str | os.PathLike[str], *, threads: int = 1) -> OrtArtifact:
        return OrtArtifact.load(path, threads=threads)


@dataclass(frozen=True)
class OrtCuda(Backend):
    """ONNX Runtime on an NVIDIA GPU, unverified until it is run on one: fp16 n-bit kernels of the CUDA provider.

    MatMul and Gemm become ``com.microsoft::MatMulNBits`` in fp16, in blocks and sizes that the provider's fast
    kernels take. What it has no kernel for is written so that the runtime decodes it when it loads the file.
    Checks run the file on the CPU.
    """

    name: ClassVar[str] = "ort-cuda"

    precision: Literal["fp16", "model"] = option(
        "fp16",
        help="of compressed products: fp16, which the fast kernels take, or the model's own type (slower)",
    )
    ic: Literal["requantize", "exact"] = option(
        "requantize",
        help="per-input-channel groups: put in 8 bits per output channel, or decoded at load",
    )
    nm: Literal["load", "dense"] = option("load", help="weights of compress-nm, as for ort-cpu")

    def lower(self, model: Model, remarks: Remarks) -> Model:
        say_no_faster(model, remarks)
        stored = names_compressed(model)
        LowerCompressed(form=self.nm).apply(model, remarks)
        if self.nm == "dense":
            stored = set() if stored else _idle_dense(remarks)
        LowerCuda(precision=self.precision, ic=self.ic).apply(model, remarks)
        DecodeAtLoad(when="load").apply(model, remarks)
        say_lost(stored, model, remarks)
        remarks.missed("the model", "checks run it on the CPU: unverified until it runs on a GPU")
        return model

    def load(self, path: str | os.PathLike[str], *, threads: int = 1) -> OrtArtifact:
        """Open a file on the first GPU, with the provider's fast kernels for n-bit weights switched on.

        Raises:
            NotMeasuredError: the installed ONNX Runtime has no CUDA provider.
        """
        return OrtArtifact.load(path, threads=threads, config=_FAST_KERNELS, provider="CUDAExecutionProvider")
