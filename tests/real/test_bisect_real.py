"""bisect on real models: one site with a wrong scale, one pass that transposes a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import effic
from effic.bisect import bisect
from effic.compare import Bounds
from effic.ir.model import constant_tensor
from effic.ir.weights import weight_sites
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.quantize.quantize_rtn import QuantizeRTN
from effic.trial import Trial

CLEAN = "eliminate-identities,fuse-conv-bn,fold-constants,canonicalize-linear,eliminate-dead-code"


@dataclass(frozen=True)
class WrongScale(QuantizeRTN):
    """quantize-rtn with a mistake: the scales of one weight are ten times too large."""

    name: ClassVar[str] = "quantize-wrong"
    fault: str = option("", help="the weight")

    def apply(self, model: effic.Model, remarks: Remarks) -> None:
        super().apply(model, remarks)
        for site in weight_sites(model):
            if site.name == self.fault and site.encoding is not None:
                decode = site.value.producer()
                while decode is not None and decode.op_type != "DequantizeLinear":
                    decode = decode.inputs[0].producer() if decode.inputs[0] is not None else None
                assert decode is not None
                scale = decode.inputs[1]
                assert scale is not None
                tensor = constant_tensor(scale)
                assert tensor is not None
                scale.const_value = ir.Tensor(tensor.numpy() * np.float32(10), name=scale.name)


@dataclass(frozen=True)
class TransposeWeight(Pass):
    """Turn one square weight the other way round."""

    name: ClassVar[str] = "transpose-weight"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    fault: str = option("", help="the weight")

    def apply(self, model: effic.Model, remarks: Remarks) -> None:
        for site in list(weight_sites(model)):
            tensor = constant_tensor(site.value)
            if tensor is None:
                continue
            array = tensor.numpy()
            turned = array.swapaxes(0, 1) if site.name == self.fault else array
            site.value.const_value = ir.Tensor(np.ascontiguousarray(turned), name=site.name)
            remarks.passed(site.name, "copied")


@pytest.mark.parametrize("name", ["mobilenet_v1_075_224", "stories260k"])
@pytest.mark.parametrize("kind", ["scale", "transpose"])
@pytest.mark.parametrize("where", [0.2, 0.8])
def test_a_planted_fault_is_found_in_few_evaluations(
    data_dir: Path, name: str, kind: str, where: float
) -> None:
    path = data_dir / "onnx" / f"{name}.onnx"
    model = effic.read_onnx(path)
    effic.run_passes(model, effic.parse_passes(CLEAN), check="off")
    allowed = 25.0
    if kind == "scale":
        fine = QuantizeRTN(bits=8, group_size=-1, kinds=("Conv", "MatMul", "Gemm"))
        trial = Trial(effic.read_onnx(path), bounds=Bounds(rtol=1))
        remarks = effic.run_passes(model, [fine], check="off").steps[0].remarks
        # What the method costs by itself, on noise as inputs, is no fault.
        allowed = float(trial(model).text.removesuffix(" dB").rpartition(" ")[2]) - 6
        sites = [remark.where for remark in remarks if remark.kind == "passed"]
        fault = sites[int(where * len(sites))]
        item: Pass = WrongScale(bits=8, group_size=-1, kinds=("Conv", "MatMul", "Gemm"), fault=fault)
    else:
        sites = [s.name for s in weight_sites(model)]
        square = [s.name for s in weight_sites(model) if len(s.shape) > 1 and s.shape[0] == s.shape[1]]
        fault = square[int(where * len(square))]
        item = TransposeWeight(fault=fault)
    sequence = [*effic.parse_passes(CLEAN), item, *effic.parse_passes("eliminate-dead-code")]
    found = bisect(path, sequence, bounds=Bounds(min_sqnr=allowed))
    assert (found.number, found.sites, found.alone) == (6, (fault,), True), found.sentence
    assert found.mended
    assert found.evaluations <= 2 * math.log2(len(sites)) + len(sequence)
