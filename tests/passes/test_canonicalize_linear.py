"""canonicalize-linear: transposes, transB, alpha and beta go into the weights; refusals with reasons."""

from __future__ import annotations

import numpy as np
import pytest

from effic.ir.model import constant_array
from effic.passes.cleanup.canonicalize_linear import CanonicalizeLinear

PASS = CanonicalizeLinear()
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ops(model) -> list[str]:
    return [node.op_type for node in model.nodes()]


def test_gemm_reads_an_unturned_weight_of_the_same_name(make_net, check) -> None:
    w = f32(5, 4)
    model = make_net("(float[N,4] x) => (float[N,5] y)", "y = Gemm <transB = 1> (x, w, b)", w=w, b=f32(5))
    check(model, PASS)
    gemm = next(iter(model.nodes("Gemm")))
    assert "transB" not in gemm.attributes
    assert set(model.graph.initializers) == {"w", "b"}
    np.testing.assert_array_equal(constant_array(gemm.inputs[1]), w.T)


def test_alpha_and_beta_go_into_weight_and_bias(make_net, check) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,5] y)",
        "y = Gemm <transB = 1, alpha = 0.3, beta = 1.7> (x, w, b)",
        w=f32(5, 4),
        b=f32(5),
    )
    check(model, PASS)
    assert not next(iter(model.nodes("Gemm"))).attributes
    assert set(model.graph.initializers) == {"w", "b"}


@pytest.mark.parametrize("side", ["y = MatMul(x, t)", "z = MatMul(t, u)  y = MatMul(x, z)"])
def test_a_transposed_constant_is_stored_turned(make_net, check, side: str) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,4] y)",
        f"t = Transpose <perm = [1, 0]> (w)  {side}",
        w=f32(4, 4),
        u=f32(4, 4),
    )
    check(model, PASS)
    assert "Transpose" not in ops(model)


def test_batched_weights_turn_too(make_net, check) -> None:
    model = make_net(
        "(float[3,2,4] x) => (float[3,2,5] y)",
        "t = Transpose <perm = [0, 2, 1]> (w)  y = MatMul(x, t)",
        w=f32(3, 5, 4),
    )
    check(model, PASS)
    assert ops(model) == ["MatMul"]


def test_turned_twice_is_read_as_it_is(make_net, check) -> None:
    w = f32(4, 5)
    model = make_net(
        "(float[N,4] x) => (float[N,5] y)",
        "t = Transpose <perm = [1, 0]> (w)  y = Gemm <transB = 1> (x, t)",
        w=w,
    )
    check(model, PASS)
    assert ops(model) == ["Gemm"]
    np.testing.assert_array_equal(constant_array(next(iter(model.nodes("Gemm"))).inputs[1]), w)


TIED = (
    "(int64[N] i) => (float[N,10] y)",
    "e = Gather(w, i)  t = Transpose <perm = [1, 0]> (w)  a = MatMul(e, t)"
    "  b = Gemm <transB = 1> (e, w)  y = Add(a, b)",
)


def test_a_tied_weight_stays_with_the_reason(make_net, check) -> None:
    model = make_net(*TIED, w=f32(10, 4))
    remarks = check(model, PASS)
    assert remarks.count("passed") == 0
    assert all("also read as it is by Gather" in r.text and "160 bytes" in r.text for r in remarks.items)
    assert len(remarks.items) == 2


def test_untie_makes_one_copy_for_all(make_net, check) -> None:
    model = make_net(*TIED, w=f32(10, 4))
    check(model, CanonicalizeLinear(untie=True))
    assert len(model.graph.initializers) == 2
    assert "Transpose" not in ops(model)


def test_layers_that_all_read_it_turned_share_one_copy(make_net, check) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,4] y)",
        "a = Gemm <transB = 1> (x, w)  t = Transpose <perm = [1, 0]> (w)  b = MatMul(a, t)"
        "  y = Gemm <transB = 1> (b, w)",
        w=f32(4, 4),
    )
    check(model, PASS)
    assert list(model.graph.initializers) == ["w"]
    assert "Transpose" not in ops(model)


def test_factors_of_a_shared_weight_stay_with_the_reason(make_net, check) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,4] y)",
        "a = Gemm <alpha = 2.0> (x, w)  y = Gemm <alpha = 3.0> (a, w)",
        w=f32(4, 4),
    )
    remarks = check(model, PASS)
    assert [r.text for r in remarks.items] == ["alpha stays: 'w' is also read elsewhere"] * 2


def test_weights_computed_at_run_time_are_a_reason(make_net, check) -> None:
    model = make_net("(float[N,4] x, float[M,4] k) => (float[N,M] y)", "y = Gemm <transB = 1> (x, k)")
    remarks = check(model, PASS)
    assert "computed at run time" in remarks.items[0].text


@pytest.mark.parametrize(
    "reader", ["y = Gemm <transB = 1> (x, d)", "t = Transpose <perm = [1, 0]> (d)  y = MatMul(x, t)"]
)
@pytest.mark.parametrize("per", ["tensor", "row", "block"])
def test_encoded_weights_turn_with_their_scales(make_net, check, reader: str, per: str) -> None:
    scale = {"tensor": np.float32(0.1), "row": np.abs(f32(6)) + 0.1, "block": np.abs(f32(6, 2)) + 0.1}[per]
    attributes = {"tensor": "", "row": "<axis = 0>", "block": "<axis = 1, block_size = 4>"}[per]
    model = make_net(
        "(float[N,8] x) => (float[N,6] y)",
        f"d = DequantizeLinear {attributes} (q, s)  {reader}",
        opset=21,
        q=RNG.integers(-8, 8, (6, 8), np.int8),
        s=scale,
    )
    check(model, PASS)
    assert "Transpose" not in ops(model)
    assert len(ops(model)) == 2
    assert set(model.graph.initializers) == {"q", "s"}


def test_goes_into_subgraphs_and_functions(make_net, check) -> None:
    model = make_net(
        "(bool c, float[2,2] x) => (float[2,2] y)",
        """h = f.linear(x)
        y = If(c) <then_branch = t () => (float[2,2] a) { a = Gemm <transB = 1> (h, w) },
                   else_branch = e () => (float[2,2] b) { b = Neg(h) }>""",
        functions="""<opset_import: ["": 18], domain: "f"> linear (p) => (q) {
            v = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> ()  q = Gemm <transB = 1> (p, v) }""",
        w=f32(2, 2),
    )
    remarks = check(model, PASS)
    assert remarks.count("passed") == 2


def test_beta_goes_into_a_scalar_bias(make_net, check) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,5] y)", "y = Gemm <beta = 0.5> (x, w, b)", w=f32(4, 5), b=np.float32(3)
    )
    check(model, PASS)
    assert "beta" not in next(iter(model.nodes("Gemm"))).attributes
