from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effic.backends.ort.artifact import OrtArtifact
from effic.backends.ort.decode_at_load import DecodeAtLoad, runtime_dequantized
from effic.backends.ort.input_groups import read_groups, speed
from effic.backends.ort.lower_encodings import LowerEncodings
from effic.backends.ort.lower_input_groups import LowerInputGroups
from effic.ir.encodings import Encoding, build, decode
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.verify import verify
from effic.passes.base import Remarks
from tests.backends.test_lower_encodings import (
    activations,
    check_no_cliff,
    distance,
    lower,
    make_encoding,
    make_model,
    ops,
    run,
)

# What the kernels' own rounding of activations may move outputs by, relative to their norm. One scale
# for all activations (prefill) costs more than one per block; few outputs leave much to chance.
ROUNDING = 1e-5
KERNEL_4 = 4e-2
KERNEL_PREFILL = 6e-2


def apply(model: Model, **options) -> Remarks:
    remarks = Remarks()
    LowerInputGroups(always=True, **options).apply(model, remarks)
    verify(model)
    check_no_cliff(model)
    return remarks


def linear(encoding: Encoding, op: str = "y = MatMul(x, w)", x_shape: str = "M,K", kind="float") -> Model:
    rows, columns = encoding.shape
    text = f"g ({kind}[{x_shape}] x, {kind}[{rows},{columns}] w) => ({kind} y) {{ {op} }}"
    return make_model(text, {"w": encoding})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 80),
    group=st.sampled_from([1, 2, 3, 8, 16, 17, 32, 64, 0]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4), (0,)]),
    transposed=st.booleans(),
    opset=st.sampled_from([21, 25]),
)
def test_every_form_gives_the_outputs_of_the_canonical_form(
    inputs, outputs, group, bits, symmetric, rows, transposed, opset
) -> None:
    shape, n_axis = ((outputs, inputs), 0) if transposed else ((inputs, outputs), 1)
    encoding = make_encoding(
        shape, bits=bits, group=group, k_axis=n_axis, symmetric=symmetric, opset=opset
    )
    op = "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)" if transposed else "y = MatMul(x, w)"
    names = ",".join([*(f"D{i}" for i in range(len(rows))), str(inputs)])
    x = activations(*rows, inputs)
    want = Oracle(linear(encoding, op, names)).run({"x": x})["y"]
    weight = decode(encoding).astype(np.float64)
    # Where terms cancel the outputs say little about the rounding: measured against the terms.
    size = max(float(np.linalg.norm(np.abs(x) @ np.abs(weight.T if transposed else weight))), 1e-9)
    for form, level, tolerance in (
        ("split", 0, ROUNDING),
        ("split", 4, KERNEL_4),
        ("prefill", 4, KERNEL_PREFILL),
    ):
        model = linear(encoding, op, names)
        remarks = apply(model, form=form, accuracy_level=level)
        kernel = "split" if form == "split" and level == 0 and encoding.stored_bits == 8 else None
        if kernel:
            assert remarks.items[0].kind == "missed"
            assert "4-bit codes only" in remarks.items[0].text
            continue
        assert remarks.items[0].kind == "passed"
        assert "Transpose" not in ops(model)
        assert "DequantizeLinear" not in ops(model)
        (got,) = run(model, {"x": x})
        assert got.shape == want.shape
        assert np.linalg.norm(got - want) < tolerance * size
