"""What the tests of passes share: hand-made graphs in, checked models and remarks out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model
from effic.ir.verify import signature, verify
from effic.passes.base import Numerics, Pass, Remarks

MakeNet = Callable[..., Model]
Check = Callable[..., Remarks]


@pytest.fixture(scope="session")
def make_net() -> MakeNet:
    """``make_net("(float[N,4] x) => (float[N,4] y)", "y = Relu(x)", w=array)`` → Model."""

    def make(signature: str, body: str, *, opset: int = 18, functions: str = "", **weights: object) -> Model:
        domains = f'"": {opset}' + (', "f": 1' if functions else "")
        text = f"<ir_version: 8, opset_import: [{domains}]> g {signature} {{ {body} }} {functions}"
        proto = onnx.parser.parse_model(text)
        for name, array in weights.items():
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return Model(ir.from_proto(proto))

    return make


@pytest.fixture(scope="session")
def check() -> Check:
    """Applies a pass, and checks structure, signature, outputs, and that it is done in one go."""

    def run(model: Model, item: Pass) -> Remarks:
        verify(model)
        before = signature(model)
        oracle = Oracle(model)
        inputs, want = runnable_inputs(model, oracle)
        remarks = Remarks()
        item.apply(model, remarks)
        model.forget_names()
        verify(model)
        assert signature(model) == before
        distance = compare_outputs(want, Oracle(model).run(inputs))
        assert distance.shape_mismatch is None
        assert not distance.new_nonfinite
        assert not distance.wrong_integers
        assert distance.max_rel <= (0 if item.numerics is Numerics.EXACT else 1e-5)
        again = Remarks()
        item.apply(model.clone(), again)
        assert not [r for r in again.items if r.kind == "passed"], "a second run found more to do"
        return remarks

    return run
