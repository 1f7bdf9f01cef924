"""effic: compiler passes for neural networks.

>>> import effic
>>> report = effic.optimize("model.onnx", "fuse-conv-bn,quantize-rtn{bits=4}", output="out.onnx")

Everything is imported when it is first used, so ``import effic`` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effic import sparse_training as sparse_training
    from effic.adapter_feeds import adapter_feeds as adapter_feeds
    from effic.backends.ort.artifact import OrtArtifact as OrtArtifact
    from effic.backends.torch.read_back import read_back as read_back
    from effic.backends.torch.to_module import to_module as to_module
    from effic.backends.torch.tune_conv_bn import TuneReport as TuneReport
    from effic.backends.torch.tune_conv_bn import tune_conv_bn as tune_conv_bn
    from effic.backends.torch.tune_conv_bn import untune_conv_bn as untune_conv_bn
    from effic.bench import bench as bench
    from effic.bisect import bisect as bisect
    from effic.compare import compare as compare
    from effic.extract_lora import extract_lora as extract_lora
    from effic.gate import gate as gate
    from effic.ir.errors import EfficError as EfficError
    from effic.ir.model import Model as Model
    from effic.ir.onnx_format import read_onnx as read_onnx
    from effic.ir.torch_capture import capture as capture
    from effic.optimize import Report as Report
    from effic.optimize import load as load
    from effic.optimize import optimize as optimize
    from effic.passes.base import CalibratedPass as CalibratedPass
    from effic.passes.base import Numerics as Numerics
    from effic.passes.base import Pass as Pass
    from effic.passes.base import Remarks as Remarks
    from effic.passes.base import option as option
    from effic.passes.calibration import Calibration as Calibration
    from effic.passes.pipeline import run_passes as run_passes
    from effic.passes.spec import parse_passes as parse_passes
    from effic.reproduce import reproduce as reproduce
    from effic.sensitivity import sensitivity as sensitivity

_EXPORTS = {
    "CalibratedPass": "effic.passes.base",
    "Calibration": "effic.passes.calibration",
    "OrtArtifact": "effic.backends.ort.artifact",
    "EfficError": "effic.ir.errors",
    "Model": "effic.ir.model",
    "Numerics": "effic.passes.base",
    "Pass": "effic.passes.base",
    "Remarks": "effic.passes.base",
    "Report": "effic.optimize",
    "TuneReport": "effic.backends.torch.tune_conv_bn",
    "adapter_feeds": "effic.adapter_feeds",
    "bench": "effic.bench",
    "bisect": "effic.bisect",
    "capture": "effic.ir.torch_capture",
    "compare": "effic.compare",
    "extract_lora": "effic.extract_lora",
    "gate": "effic.gate",
    "load": "effic.optimize",
    "optimize": "effic.optimize",
    "option": "effic.passes.base",
    "parse_passes": "effic.passes.spec",
    "plan": "effic.plan",
    "read_back": "effic.backends.torch.read_back",
    "read_onnx": "effic.ir.onnx_format",
    "run_passes": "effic.passes.pipeline",
    "reproduce": "effic.reproduce",
    "sensitivity": "effic.sensitivity",
    "to_module": "effic.backends.torch.to_module",
    "tune_conv_bn": "effic.backends.torch.tune_conv_bn",
    "untune_conv_bn": "effic.backends.torch.tune_conv_bn",
}

_MODULES = ("sparse_training",)

__all__ = sorted([*_EXPORTS, *_MODULES])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("effic")
    if name in _MODULES:
        return importlib.import_module(f"effic.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'effic' has no attribute '{name}'")


class _Face(types.ModuleType):
    """Keeps ``effic.optimize`` the function when the file of the same name is imported.

    Importing a submodule binds it as an attribute of its package, over whatever was there.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and isinstance(value, types.ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
