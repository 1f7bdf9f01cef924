"""Index spaces: whatever is found free may be put into any order, and the outputs stay what they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effic.ir.channels import Channels, Dim, product, total, unify
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model, constant_tensor
from effic.ir.verify import verify
from effic.models.builders import BUILDERS

MakeNet = Callable[..., Model]
RNG = np.random.default_rng(0)


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def shuffle(model: Model, seed: int) -> int:
    """Put all free channels into random orders, and compare; how many groups there were."""
    verify(model)
    oracle = Oracle(model)
    inputs, want = runnable_inputs(model, oracle)
    channels, rng = Channels(model), np.random.default_rng(seed)
    leaves = [leaf for leaf in channels.constants() if leaf.reason is None]
    orders = {leaf: rng.permutation(leaf.size) for leaf in leaves}
    assert not channels.permute({})
    kept = {v: constant_tensor(v).numpy().copy() for vs in channels.constants().values() for v in vs}  # type: ignore[union-attr]
    changed = channels.permute(orders)
    verify(model)
    distance = compare_outputs(want, Oracle(model).run(inputs))
    assert distance.max_rel < 2e-5, f"outputs moved by {distance.max_rel:.1e}"
    assert not distance.wrong_integers
    # The inverse gives the weights back, bit for bit.
    channels.permute({leaf: np.argsort(order) for leaf, order in orders.items()})
    for value, array in kept.items():
        tensor = constant_tensor(value)
        assert tensor is not None
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert set(changed) <= set(kept)
    return len(leaves)


IMAGE = "(float[N,3,8,8] x) => (float[N,5,m,k] y)"
ROWS = "(float[N,6] x) => (float[N,5] y)"
TOKENS = "(float[N,S,6] x) => (float[N,S,5] y)"

# signature, body, weights, and the groups expected: names of their constants, and how many channels.
NETS: dict[str, tuple[str, str, dict[str, object], list[tuple[str, int]]]] = {
    "mlp": (
        ROWS,
        "h = MatMul(x, w1) g = Add(h, b) a = Relu(g) y = MatMul(a, w2)",
        {"w1": w(6, 8), "b": w(8), "w2": w(8, 5)},
        [("w1 b w2", 8)],
    ),
    "gemm, transposed both ways": (
        "(float[6,N] x) => (float[N,5] y)",
        "h = Gemm <transA=1,transB=1> (x, w1, b) a = Tanh(h) t = Transpose(w2) y = MatMul(a, t)",
        {"w1": w(8, 6), "b": w(1, 8), "w2": w(5, 8)},
        [("w1 b w2", 8)],
    ),
    "weight on the left": (
        "(float[6,N] x) => (float[5,N] y)",
        "h = MatMul(w1, x) a = Relu(h) y = MatMul(w2, a)",
        {"w1": w(8, 6), "w2": w(5, 8)},
        [("w1 w2", 8)],
    ),
    "SwiGLU": (
        TOKENS,
        "g = MatMul(x, wg) u = MatMul(x, wu) s = Sigmoid(g) t = Mul(g, s) h = Mul(t, u) y = MatMul(h, wd)",
        {"wg": w(6, 8), "wu": w(6, 8), "wd": w(8, 5)},
        [("wg wu wd", 8)],
    ),
    "residual stream with norms": (
        TOKENS,
        """e = MatMul(x, w0) n = LayerNormalization(e, g, c) u = MatMul(n, w1) d = MatMul(u, w2)
        r = Add(e, d) sq = Mul(r, r) mean = ReduceMean <axes=[-1]> (sq) root = Sqrt(mean) o = Div(r, root)
        p = Mul(o, g2) y = MatMul(p, w3)""",
        {"w0": w(6, 8), "g": w(8), "c": w(8), "w1": w(8, 12), "w2": w(12, 8), "g2": w(8), "w3": w(8, 5)},
        [("w0 g c w1 w2 g2 w3", 8), ("w1 w2", 12)],
    ),
    "convolutions, norm, PReLU and a depthwise one": (
        IMAGE,
        """h = Conv(x, w1, b1) n = BatchNormalization(h, s, o, m1, v) a = PRelu(n, slope)
        d = Conv <group=8> (a, wd) p = MaxPool <kernel_shape=[2,2]> (d) y = Conv(p, w2)""",
        {"w1": w(8, 3, 3, 3), "b1": w(8), "s": w(8), "o": w(8), "m1": w(8), "v": positive(8),
         "slope": w(8, 1, 1), "wd": w(8, 1, 3, 3), "w2": w(5, 8, 1, 1)},
        [("w1 b1 s o m1 v slope wd w2", 8)],
    ),
    "depthwise with two filters a channel": (
        IMAGE,
        "h = Conv(x, w1) d = Conv <group=4> (h, wd, bd) y = Conv(d, w2)",
        {"w1": w(4, 3, 1, 1), "wd": w(8, 1, 3, 3), "bd": w(8), "w2": w(5, 8, 1, 1)},
        [("w1 wd bd w2", 4), ("wd bd w2", 2)],
    ),
    "grouped: alike in every group, and the groups": (
        IMAGE,
        "h = Conv(x, w1) d = Conv <group=2> (h, wg) y = Conv(d, w2)",
        {"w1": w(8, 3, 1, 1), "wg": w(6, 4, 3, 3), "w2": w(5, 6, 1, 1)},
        [("w1 wg", 4), ("w1 wg w2", 2), ("wg w2", 3)],
    ),
    "grouped transposed": (
        IMAGE,
        "h = Conv(x, w1) d = ConvTranspose <group=2> (h, wt, b) y = Conv(d, w2)",
        {"w1": w(8, 3, 1, 1), "wt": w(8, 3, 2, 2), "b": w(6), "w2": w(5, 6, 1, 1)},
        [("w1 wt", 4), ("w1 wt b w2", 2), ("wt b w2", 3)],
    ),
    "concat, part by part": (
        IMAGE,
        "p = Conv(x, w1) q = Conv(x, w2) c = Concat <axis=1> (p, q) n = InstanceNormalization(c, s, o) y = Conv(n, w3)",
        {"w1": w(4, 3, 1, 1), "w2": w(8, 3, 1, 1), "s": w(12), "o": w(12), "w3": w(5, 12, 1, 1)},
        [("w1 s o w3", 4), ("w2 s o w3", 8)],
    ),
    "split of one projection": (
        ROWS,
        "h = MatMul(x, w1) p, q = Split <axis=1> (h, sizes) s = Sigmoid(q) z = Mul(p, s) y = MatMul(z, w2)",
        {"w1": w(6, 16), "sizes": ints(8, 8), "w2": w(8, 5)},
        [("w1 w2", 8)],
    ),
    "slices in another order": (
        ROWS,
        """h = MatMul(x, w1) a = Slice(h, i0, i4, one) b = Slice(h, i4, i8, one) n = Neg(b)
        t = Concat <axis=1> (n, a) c = Mul(h, cos) s = Mul(t, sin) r = Add(c, s) y = MatMul(r, w2)""",
        {"w1": w(6, 8), "i0": ints(0), "i4": ints(4), "i8": ints(8), "one": ints(1), "cos": w(8), "sin": w(8),
         "w2": w(8, 5)},
        [("w1 cos sin w2", 4)],
    ),
    "flatten of an image": (
        "(float[N,3,4,4] x) => (float[N,5] y)",
        "h = Conv(x, w1) a = Relu(h) f = Flatten(a) y = Gemm(f, w2)",
        {"w1": w(8, 3, 3, 3), "w2": w(32, 5)},
        [("w1 w2", 8)],
    ),
    "heads: dims alike in every head, and heads": (
        TOKENS,
        """h = MatMul(x, wv) r = Reshape(h, heads) t = Transpose <perm=[0,2,1,3]> (r) a = Tanh(t)
        b = Transpose <perm=[0,2,1,3]> (a) m = Reshape(b, merge) y = MatMul(m, wo)""",
        {"wv": w(6, 12), "heads": ints(0, 0, 3, 4), "merge": ints(0, 0, 12), "wo": w(12, 5)},
        [("wv wo", 3), ("wv wo", 4)],
    ),
    "grouped norm": (
        # Shape inference does not see through this one: the shape is declared, as exporters do.
        "(float[N,3,8,8] x) => (float[N,5,8,8] y) <float[N,8,8,8] n>",
        "h = Conv(x, w1) n = GroupNormalization <num_groups=2> (h, s, o) y = Conv(n, w2)",
        {"w1": w(8, 3, 1, 1), "s": w(2), "o": w(2), "w2": w(5, 8, 1, 1)},
        [("w1 s o w2", 2), ("w1 w2", 4)],
    ),
    "softmax over channels, then over rows": (
        TOKENS,
        "h = MatMul(x, w1) s = Softmax <axis=-1> (h) t = Softmax <axis=1> (s) y = MatMul(t, w2)",
        {"w1": w(6, 8), "w2": w(8, 5)},
        [("w1 w2", 8)],
    ),
    "pad and resize of images": (
        IMAGE,
        """h = Conv(x, w1) p = Pad(h, pads) r = Resize(p, , scales) g = GlobalAveragePool(r) y = Conv(g, w2)""",
        {"w1": w(8, 3, 1, 1), "pads": ints(0, 0, 1, 1, 0, 0, 1, 1), "w2": w(5, 8, 1, 1),
         "scales": np.array([1, 1, 2, 2], np.float32)},
        [("w1 w2", 8)],
    ),
    "pad of channels": (
        IMAGE,
        "h = Conv(x, w1) p = Pad(h, pads) q = Conv(x, w3) z = Add(p, q) y = Conv(z, w2)",
        {"w1": w(4, 3, 1, 1), "pads": ints(0, 2, 0, 0, 0, 2, 0, 0), "w3": w(8, 3, 1, 1), "w2": w(5, 8, 1, 1)},
        [("w1 w3 w2", 4), ("w3 w2", 2), ("w3 w2", 2)],
    ),
    "table, shared by embedding and a head": (
        "(int64[N,S] ids) => (float[N,S,9] y)",
        "e = Gather(table, ids) t = Transpose(table) y = MatMul(e, t)",
        {"table": w(9, 8)},
        [("table", 8)],
    ),
    "einsum": (
        TOKENS,
        'h = Einsum <equation="nsi,oi->nso"> (x, w1) y = MatMul(h, w2)',
        {"w1": w(8, 6), "w2": w(8, 5)},
        [("w1 w2", 8)],
    ),
    "depth to space": (
        IMAGE,
        "h = Conv(x, w1) d = DepthToSpace <blocksize=2> (h) y = Conv(d, w2)",
        {"w1": w(16, 3, 1, 1), "w2": w(5, 4, 1, 1)},
        [("w1 w2", 4)],
    ),
    "constant nodes": (
        "(float[N,2] x) => (float[N,2] y)",
        """a = Constant <value = float[2,4] {1,2,3,4,5,6,7,8}> () b = Constant <value = float[4] {1,2,3,4}> ()
        h = MatMul(x, a) s = Mul(h, b) y = MatMul(s, w2)""",
        {"w2": w(4, 2)},
        [("a b w2", 4)],
    ),
    "tile and expand": (
        "(float[N,6] x) => (float[N,5] y)",
        """h = MatMul(x, w1) t = Tile(h, twice) u = Unsqueeze(t, one) e = Expand(u, shape) r = Reshape(e, flat)
        y = MatMul(r, w2)""",
        {"w1": w(6, 4), "twice": ints(1, 2), "one": ints(1), "shape": ints(1, 3, 1), "flat": ints(-1, 24),
         "w2": w(24, 5)},
        [("w1 w2", 4), ("w2", 2), ("w2", 3)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_every_order_of_free_channels_gives_the_same_outputs(name: str, make_net: MakeNet) -> None:
    signature, body, weights, expected = NETS[name]
    channels = Channels(make_net(signature, body, opset=17 if "axes=[-1]" in body else 18, **weights))
    found = sorted((sorted(names), size) for names, size in _pairs(channels))
    assert found == sorted((sorted(names.split()), size) for names, size in expected)
    for seed in range(3):
        model = make_net(signature, body, opset=17 if "axes=[-1]" in body else 18, **weights)
        assert shuffle(model, seed) == len(expected)


def _pairs(channels: Channels) -> list[tuple[list[str], int]]:
    return [
        ([str(v.name) for v in values], leaf.size)
        for leaf, values in channels.constants().items()
        if leaf.reason is None
    ]


HELD: dict[str, tuple[str, str, dict[str, object], str]] = {
    "graph output": (
        "(float[N,6] x) => (float[N,8] h, float[N,5] y)",
        "h = MatMul(x, w1) y = MatMul(h, w2)",
        {},
        "reach the graph output 'h'",
    ),
    "graph input": (
        "(float[N,6] x, float[N,8] z) => (float[N,5] y)",
        "a = MatMul(x, w1) h = Add(a, z) y = MatMul(h, w2)",
        {},
        "come from the graph input 'z'",
    ),
    "running sum": (
        ROWS,
        "a = MatMul(x, w1) h = CumSum(a, one) y = MatMul(h, w2)",
        {"one": ints(1)},
        "CumSum",
    ),
    "argmax": (
        "(float[N,6] x) => (float[N,5] y, int64[N,m] i)",
        "h = MatMul(x, w1) i = ArgMax <axis=1> (h) y = MatMul(h, w2)",
        {},
        "in an order that matters to ArgMax",
    ),
    "gather of channels": (
        "(float[N,6] x) => (float[N,5] y, float[N,m] i)",
        "h = MatMul(x, w1) i = Gather <axis=1> (h, idx) y = MatMul(h, w2)",
        {"idx": ints(1, 2)},
        "in an order that matters to Gather",
    ),
    "two cuts": (
        "(float[N,6] x) => (float[N,5] y, float[N,s] z)",
        """h = MatMul(x, w1) r = Reshape(h, shape) s = ReduceSum <axes=[2]> (r) c = Slice(h, a, b, ax)
        z = ReduceSum <axes=[1]> (c) q = ReduceSum <axes=[1]> (s) u = Add(q, z) v = Mul(u, zero)
        y0 = MatMul(h, w2) y = Add(y0, v)""",
        {"shape": ints(0, 2, 4), "a": ints(1), "b": ints(4), "ax": ints(1), "zero": w(1)},
        "cut in two ways",
    ),
    "an operator without a rule": (
        ROWS,
        "a = MatMul(x, w1) h = Bernoulli(a) y = MatMul(a, w2) z = Identity(h)",
        {},
        "Bernoulli",
    ),
    "a subgraph": (
        ROWS,
        """h = MatMul(x, w1) y0 = MatMul(h, w2)
        y = If (yes) <then_branch = t () => (float[N,5] a) { s = ReduceSum <keepdims=1> (h) a = Add(y0, s) },
                      else_branch = e () => (float[N,5] b) { b = Identity(y0) }>""",
        {"yes": np.array(True)},
        "are read by If",
    ),
    "random dropout": (
        ROWS,
        "a = MatMul(x, w1) h = Dropout(a, r, yes) y = MatMul(h, w2)",
        {"r": np.float32(0.5), "yes": np.array(True)},
        "drops elements at random",
    ),
    "shape unknown": (
        "(float[N,6] x, int64[2] n) => (float[N,k] y)",
        "a = MatMul(x, w1) r = Reshape(a, n) y = MatMul(a, w2) z = Identity(r)",
        {},
        "whose shape is not known",
    ),
    "an argument": (
        "(float[N,6] x) => (float[N,8] y)",
        "h = MatMul(x, w1) y = MatMul(h, w2) z = Reshape(x, dims)",
        {"w2": w(8, 8)},
        "graph output",
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_what_holds_channels_is_named(name: str, make_net: MakeNet) -> None:
    signature, body, more, reason = HELD[name]
    if name == "an argument":
        more = {**more, "dims": ints(-1, 2, 3)}
    opset = 11 if "axes=[" in body else 18
    model = make_net(signature, body, opset=opset, **{"w1": w(6, 8), "w2": w(8, 5), **more})
    channels = Channels(model)
    axes = channels.axes(model.graph.initializers["w1" if name != "an argument" else "w2"])
    assert axes is not None
    reasons = [leaf.reason for leaf in axes[1].leaves()]
    assert any(reason in (text or "") for text in reasons), reasons


def test_encoded_weights_and_integer_parameters_are_held(make_net: MakeNet) -> None:
    model = make_net(
        ROWS,
        "d = DequantizeLinear <axis=1> (q, s) h = MatMul(x, d) y = MatMul(h, w2)",
        q=RNG.integers(-9, 9, (6, 8)).astype(np.int8), s=positive(8), w2=w(8, 5),
    )  # fmt: skip
    axes = Channels(model).axes(model.graph.initializers["w2"])
    assert axes is not None
    assert "DequantizeLinear" in str(axes[0].root.reason)


def test_permute_refuses_what_is_no_permutation_or_not_free(make_net: MakeNet) -> None:
    signature, body, weights, _ = NETS["mlp"]
    channels = Channels(make_net(signature, body, **weights))
    leaf = next(leaf for leaf in channels.constants() if leaf.reason is None)
    held = next(leaf for leaf in channels.constants() if leaf.reason is not None)
    with pytest.raises(ValueError, match="no permutation"):
        channels.permute({leaf: np.zeros(leaf.size, int)})
    with pytest.raises(ValueError, match="graph input"):
        channels.permute({held: np.arange(held.size)})


def test_types_and_sharing_are_kept(make_net: MakeNet) -> None:
    model = make_net(
        "(float16[N,6] x) => (float16[N,5] y)",
        "a = MatMul(x, w1) b = MatMul(a, sq) c = Add(b, a) d = MatMul(c, sq) e = Add(d, a) y = MatMul(e, w2)",
        w1=w(6, 8).astype(np.float16), sq=w(8, 8).astype(np.float16), w2=w(8, 5).astype(np.float16),
    )  # fmt: skip
    channels = Channels(model)
    (leaf,) = [leaf for leaf in channels.constants() if leaf.reason is None]
    order = np.random.default_rng(1).permutation(8)
    square = model.graph.initializers["sq"]
    old = constant_tensor(square).numpy().copy()  # type: ignore[union-attr]
    assert len(channels.permute({leaf: order})) == 3
    new = constant_tensor(square)
    assert new is not None
    assert new.numpy().dtype == np.float16
    np.testing.assert_array_equal(new.numpy(), old[order][:, order])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(built=st.sampled_from(sorted(BUILDERS)), seed=st.integers(0, 99), order=st.integers(0, 999))
def test_property_any_order_of_any_group_of_any_builder(built: str, seed: int, order: int) -> None:
    shuffle(Model(BUILDERS[built](seed=seed)), order)


@pytest.mark.parametrize("built", ["cnn", "encoder", "llama", "grouped_transposed"])
def test_builders_have_free_channels(built: str) -> None:
    assert shuffle(Model(BUILDERS[built]()), 0) >= 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=1, max_size=4)
)
def test_property_places_and_order_agree(outer: list[int], inner: list[int]) -> None:
    """A leaf's places are where its indices are, by an order that moves it."""
    leaf = Dim(5)
    axis = total([product([*(Dim(n) for n in outer), leaf, *(Dim(n) for n in inner)]), Dim(3), leaf])
    places = axis.places(leaf)
    assert places.shape == (np.prod(outer) * np.prod(inner) + 1, 5)
    assert len(np.unique(places)) == places.size
    order = np.array([2, 0, 1, 4, 3])
    moved = axis.order({leaf: order})
    assert moved is not None
    np.testing.assert_array_equal(moved[places], places[:, order])
    rest = np.setdiff1d(np.arange(axis.size), places)
    np.testing.assert_array_equal(moved[rest], rest)


def test_cuts_are_brought_to_their_common_parts() -> None:
    first = product([Dim(4), Dim(6)])
    second = product([Dim(2), Dim(12)])
    unify(first, second, "here")
    assert [leaf.size for leaf in first.leaves()] == [2, 2, 6]
    assert list(first.leaves()) == list(second.leaves())
    one, other = total([Dim(3), Dim(5)]), total([Dim(4), Dim(4)])
    unify(one, other, "here")
    assert [leaf.size for leaf in one.leaves()] == [3, 1, 4]
    assert list(one.leaves()) == list(other.leaves())
    bad, worse = product([Dim(4), Dim(6)]), product([Dim(3), Dim(8)])
    unify(bad, worse, "here")
    assert all(leaf.reason == "are cut in two ways that do not go together at here" for leaf in bad.leaves())


@pytest.mark.parametrize("broken", ["Transpose<perm=[0,3]>(h)", "Hardmax<axis=7>(h)"])
def test_nodes_that_do_not_fit_hold_what_they_read(broken: str, make_net: MakeNet) -> None:
    body = f"h = MatMul(x, w)  p = {broken}  y = MatMul(h, v)"
    model = make_net("(float[N,4] x) => (float[N,3] y)", body, w=w(4, 8), v=w(8, 3))
    hidden = Channels(model).axes(model.graph.initializers["v"])
    assert hidden is not None
    assert str(hidden[0].root.reason).endswith("which does not fit what it reads")
