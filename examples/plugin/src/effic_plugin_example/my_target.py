"""A target: what a model becomes for it, and what runs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from effic.backends.base import Backend
from effic.backends.ort.artifact import OrtArtifact
from effic.ir.model import Model
from effic.passes.base import Remarks, option


@dataclass(frozen=True)
class MyTarget(Backend):
    """Standard ONNX with a note of who it is for, run by ONNX Runtime on a CPU."""

    name: ClassVar[str] = "my-target"

    note: str = option("", help="text for the model's metadata, under my-target.note")

    def lower(self, model: Model, remarks: Remarks) -> Model:
        # Here come the passes that write what the target runs best. What they cannot write is missed.
        if self.note:
            model.ir.metadata_props["my-target.note"] = self.note
            remarks.passed("the model", f"noted '{self.note}'")
        encoded = sum(1 for _ in model.nodes("DequantizeLinear"))
        if encoded:
            remarks.missed("the model", f"{encoded} weights stay encoded, and are decoded at every call")
        return model

    def load(self, path: str | os.PathLike[str], *, threads: int = 1) -> OrtArtifact:
        # A runtime of its own comes with a subclass of effic.backends.base.Artifact.
        return OrtArtifact.load(path, threads=threads)
