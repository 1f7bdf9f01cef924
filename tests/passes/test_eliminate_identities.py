"""eliminate-identities: every rule, its refusals, and the merging of layout pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effic.passes.base import Remarks
from effic.passes.cleanup.eliminate_identities import EliminateIdentities
from effic.passes.cleanup.layout_pairs import merged_squeeze, merged_unsqueeze

PASS = EliminateIdentities()
ONE, ZERO = np.float32(1), np.float32(0)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def ops(model) -> list[str]:
    return [node.op_type for node in model.nodes()]


# What stands between Exp and Relu, and the constants it needs; x is float[2,3].
NO_OPS = {
    "identity": ("b = Identity(a)", {}),
    "dropout": ("b = Dropout(a)", {}),
    "dropout_mode": ("b = Dropout(a, r, m)", {"r": np.float32(0.9), "m": np.array(False)}),
    "cast": ("b = Cast <to = 1> (a)", {}),
    "cast_like": ("b = CastLike(a, x)", {}),
    "transpose": ("b = Transpose <perm = [0, 1]> (a)", {}),
    "reshape": ("b = Reshape(a, s)", {"s": i64(2, 3)}),
    "reshape_zero": ("b = Reshape(a, s)", {"s": i64(0, -1)}),
    "flatten": ("b = Flatten(a)", {}),
    "expand": ("b = Expand(a, s)", {"s": i64(2, 1)}),
    "expand_short": ("b = Expand(a, s)", {"s": i64(3)}),
    "tile": ("b = Tile(a, s)", {"s": i64(1, 1)}),
    "pad": ("b = Pad(a, s)", {"s": i64(0, 0, 0, 0)}),
    "slice": ("b = Slice(a, z, e)", {"z": i64(0, 0), "e": i64(2**63 - 1, 3)}),
    "slice_axis": ("b = Slice(a, z, e, k)", {"z": i64(0), "e": i64(7), "k": i64(-1)}),
    "concat": ("b = Concat <axis = 0> (a)", {}),
    "sum": ("b = Sum(a)", {}),
    "max": ("b = Max(a)", {}),
    "mean": ("b = Mean(a)", {}),
    "split": ("b = Split <num_outputs = 1> (a)", {}),
    "mul": ("b = Mul(a, c)", {"c": ONE}),
    "mul_left": ("b = Mul(c, a)", {"c": np.ones((1, 3), np.float32)}),
    "add": ("b = Add(a, c)", {"c": np.zeros(3, np.float32)}),
    "sub": ("b = Sub(a, c)", {"c": ZERO}),
    "div": ("b = Div(a, c)", {"c": ONE}),
    "pow": ("b = Pow(a, c)", {"c": ONE}),
    "unsqueeze_squeeze": ("u = Unsqueeze(a, k)  b = Squeeze(u, k)", {"k": i64(1)}),
    "two_transposes": ("u = Transpose(a)  b = Transpose(u)", {}),
    "two_perms": ("u = Transpose <perm=[1,0]> (a)  b = Transpose <perm=[1,0]> (u)", {}),
    "reshape_back": ("u = Reshape(a, s)  b = Reshape(u, t)", {"s": i64(6), "t": i64(2, 3)}),
    "flatten_back": ("u = Flatten <axis = 0> (a)  b = Reshape(u, t)", {"t": i64(2, -1)}),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_removes(make_net, check, name: str) -> None:
    body, weights = NO_OPS[name]
    model = make_net("(float[2,3] x) => (float[2,3] y)", f"a = Exp(x)  {body}  y = Relu(b)", **weights)
    remarks = check(model, PASS)
    assert ops(model) == ["Exp", "Relu"]
    assert remarks.count("passed") >= 1
    assert not model.graph.initializers


KEPT = {
    "cast": ("d = Cast <to = 11> (a)  b = Cast <to = 1> (d)", {}, 4),
    "transpose": ("t = Transpose(a)  b = Transpose <perm = [0, 1]> (t)  ", {}, 3),
    "reshape": ("b = Reshape(a, s)", {"s": i64(3, 2)}, 3),
    "expand": ("b = Expand(a, s)", {"s": i64(4, 2, 3)}, 3),
    "tile": ("b = Tile(a, s)", {"s": i64(1, 2)}, 3),
    "pad": ("b = Pad(a, s)", {"s": i64(0, 1, 0, 0)}, 3),
    "slice": ("b = Slice(a, z, e)", {"z": i64(0, 0), "e": i64(2, 2)}, 3),
    "mul": ("b = Mul(a, c)", {"c": np.array([1, 1, 2], np.float32)}, 3),
    "broadcast_rank": ("b = Mul(a, c)", {"c": np.ones((4, 1, 3), np.float32)}, 3),
    "sub_from_zero": ("b = Sub(c, a)", {"c": ZERO}, 3),
    "one_over": ("b = Div(c, a)", {"c": ONE}, 3),
    "mask": ("b, m = Dropout(a)  n = Not(m)  o = Cast <to = 1> (n)  p = ReduceSum(o)  b2 = Add(b, p)", {}, 7),
}


@pytest.mark.parametrize("name", KEPT)
def test_keeps(make_net, check, name: str) -> None:
    body, weights, count = KEPT[name]
    model = make_net(
        "(float[2,3] x) => (float y)", f"a = Exp(x)  {body}  y = ReduceSum <keepdims=0> (b)", **weights
    )
    check(model, PASS)
    assert len(ops(model)) == count


def test_broadcast_is_a_reason(make_net, check) -> None:
    model = make_net(
        "(float[2,3] x) => (float[4,2,3] y)", "a = Exp(x)  y = Mul(a, c)", c=np.ones((4, 1, 1), np.float32)
    )
    remarks = check(model, PASS)
    assert "broadcasts" in remarks.items[0].text


def test_training_dropout_is_a_reason(make_net) -> None:
    model = make_net(
        "(float[2,3] x) => (float[2,3] y)",
        "a = Dropout(x, r, m)  y = Relu(a)",
        r=np.float32(0.5),
        m=np.array(True),
    )
    remarks = Remarks()
    PASS.apply(model, remarks)
    assert [r.text for r in remarks.items] == ["kept: it is in training mode"]


def test_named_sizes_count_as_equal(make_net, check) -> None:
    model = make_net(
        "(float[N,S,4] x) => (float[N,S,4] y)",
        "a = Exp(x)  s = Shape(a)  b = Reshape(a, s)  c = Expand(b, s)  y = Relu(c)",
    )
    check(model, PASS)
    assert ops(model) == ["Exp", "Relu"]


def test_identity_from_input_to_output_is_kept_with_the_reason(make_net, check) -> None:
    model = make_net("(float[2] x) => (float[2] y)", "y = Identity(x)")
    remarks = check(model, PASS)
    assert ops(model) == ["Identity"]
    assert "kept" in remarks.items[0].text


def test_other_readers_of_a_kept_identity_read_past_it(make_net, check) -> None:
    model = make_net("(float[2] x) => (float[2] y, float[2] z)", "y = Identity(x)  z = Relu(y)")
    check(model, PASS)
    relu = next(iter(model.nodes("Relu")))
    assert relu.inputs[0] is model.graph.inputs[0]


def test_output_names_survive(make_net, check) -> None:
    model = make_net(
        "(float[2] x) => (float[2] y, float[2] z)", "a = Exp(x)  y = Identity(a)  z = Identity(a)"
    )
    check(model, PASS)
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert ops(model) == ["Exp", "Identity"]


def test_goes_into_subgraphs_and_functions(make_net, check) -> None:
    model = make_net(
        "(bool c, float[4] x) => (float[4] y)",
        """h = f.pass_on(x)
        y = If(c) <then_branch = t () => (float[4] a) { i = Identity(h)  j = Dropout(i)  a = Relu(j) },
                   else_branch = e () => (float[4] b) { b = Identity(h) }>""",
        functions='<opset_import: ["": 18], domain: "f"> pass_on (p) => (q) { r = Identity(p)  q = Exp(r) }',
    )
    check(model, PASS)
    # The else branch needs its Identity: a branch cannot return an outer value.
    assert sorted(ops(model)) == ["Exp", "Identity", "If", "Relu"]


def test_old_opsets_hold_arguments_in_attributes(make_net, check) -> None:
    model = make_net(
        "(float[2,3] x) => (float[2,3] y)",
        """a = Exp(x)  b = Dropout <ratio = 0.3> (a)  c = Slice <axes = [0], starts = [0], ends = [9]> (b)
        d = Pad <pads = [0, 0, 0, 0]> (c)  e = Unsqueeze <axes = [0]> (d)  g = Squeeze <axes = [0]> (e)
        y = Relu(g)""",
        opset=9,
    )
    check(model, PASS)
    assert ops(model) == ["Exp", "Relu"]


@given(
    inner=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
    outer=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
)
def test_merged_axes_give_the_same_shape(inner: list[int], outer: list[int]) -> None:
    array = np.zeros((3, 5, 7, 2, 4, 6))
    if max(inner) < array.ndim + len(inner) and max(outer) < array.ndim + len(inner) + len(outer):
        want = np.expand_dims(np.expand_dims(array, inner), outer).shape
        merged = merged_unsqueeze(inner, outer)
        assert merged is not None
        assert np.expand_dims(array, merged).shape == want
    rank = len(inner) + len(outer)
    shape = list(range(2, 11))
    for axis in inner:
        shape[axis] = 1
    left = [size for index, size in enumerate(shape) if index not in inner]
    positions = [index for index in range(9) if index not in inner]
    if max(outer) < len(left):
        for axis in outer:
            shape[positions[axis]] = 1
        squeezed = merged_squeeze(inner, outer)
        assert squeezed is not None
        assert len(squeezed) == rank
        data = np.broadcast_to(np.float32(0), shape)
        assert (
            np.squeeze(data, tuple(squeezed)).shape
            == np.squeeze(np.squeeze(data, tuple(inner)), tuple(outer)).shape
        )


def test_merges_unsqueezes(make_net, check) -> None:
    model = make_net(
        "(float[2,3] x) => (float[1,2,1,3] y)",
        "a = Exp(x)  b = Unsqueeze(a, k)  y = Unsqueeze(b, l)",
        k=i64(1),
        l=i64(0),
    )
    check(model, PASS)
    assert ops(model) == ["Exp", "Unsqueeze"]


def test_names_of_output_sizes_are_not_trusted(make_net, check) -> None:
    # The author called the second size S, too; it is twice that.
    model = make_net("(float[N,S] x) => (float[N,S] y)", "a = Exp(x)  y = Tile(a, r)", r=i64(1, 2))
    check(model, PASS)
    assert ops(model) == ["Exp", "Tile"]
    model = make_net("(float[N,S] x, int64[2] t) => (float[N,S] y)", "a = Exp(x)  y = Expand(a, t)")
    PASS.apply(model, Remarks())
    assert ops(model) == ["Exp", "Expand"]


def test_an_output_gets_no_shape_from_an_identity_it_feeds(make_net, check) -> None:
    model = make_net(
        "(float[2,3] x) => (float[] a, float[2,3] y)", "a = Exp(x)  y = Expand(a, s)", s=i64(2, 3)
    )
    model.graph.outputs[0].shape = None
    check(model, PASS)
    assert model.graph.outputs[0].shape is None
