from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.verify import signature, verify
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes.quantize.fold_scales import LINEARS, ScaleFlow, Scaling
from effic.passes.quantize.scale_flow import Blocked, reshaped

MakeNet = Callable[..., Model]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scaling_of(model: Model, weight: str) -> Scaling | str:
    sites = {site.name: site for site in weight_sites(model, LINEARS)}
    return ScaleFlow(model, sites.values()).find(sites[weight])


def fold_all(model: Model, seed: int = 0, tolerance: float = 1e-5) -> list[Scaling]:
    """Folds random factors into every producer, and checks that nothing else happened."""
    verify(model)
    shape = signature(model)
    oracle = Oracle(model)
    inputs, want = runnable_inputs(model, oracle)
    rng = np.random.default_rng(seed)
    sites = weight_sites(model, LINEARS)
    before = {id(site): site.read() for site in sites if site.why_not is None}
    scalings = ScaleFlow(model, sites).scalings()
    for scaling in scalings:
        factor = np.exp(rng.standard_normal(scaling.free.size))
        assert scaling.fold(model, factor) is None
        for item in scaling.consumers:
            free = scaling.free[item.channels]
            assert free.any() == (not np.array_equal(item.site.read(), before[id(item.site)]))
    model.forget_names()
    verify(model)
    assert signature(model) == shape
    assert compare_outputs(want, Oracle(model).run(inputs)).max_rel <= tolerance
    return scalings


def test_function_is_preserved_on_seeded_models() -> None:
    expected = {
        "cnn": 5,
        "encoder": 2,
        "llama": 8,
        "control_flow": 0,
        "functions": 0,
        "shared_weights": 0,
        "grouped_transposed": 5,
    }
    for name, builder in BUILDERS.items():
        assert len(fold_all(Model(builder()))) == expected[name], name


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.booleans())
def test_function_is_preserved_for_any_heads(seed: int, heads: tuple[int, int], tied: bool) -> None:
    from effic.models.builders import llama

    model = Model(llama(seed, layers=1, heads=heads[0], kv_heads=heads[1], tied=tied))
    # q, k, v; o; gate, up; down; and the head, where it has a weight of its own.
    assert len(fold_all(model, seed, 2e-5)) == (4 if tied else 5)


def test_function_is_preserved_on_a_trained_decoder(data_dir: Path) -> None:
    model = read_onnx(data_dir / "onnx" / "stories260k.onnx")
    scalings = fold_all(model)
    # Four of each of the five layers; the head is tied to the embedding.
    assert len(scalings) == 20


@pytest.mark.parametrize("name", ["resnet20_cifar", "version-RFB-320"])
def test_function_is_preserved_on_trained_convolutions(data_dir: Path, name: str) -> None:
    assert len(fold_all(read_onnx(data_dir / "onnx" / f"{name}.onnx"))) > 5


# -- producers, one by one -------------------------------------------------------------------------

GAMMA, BETA = random(6, seed=1), random(6, seed=2)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("h = LayerNormalization<axis=-1>(x, g, b)  y = MatMul(h, w)", {"g": GAMMA, "b": BETA}),
        ("h = LayerNormalization(x, g)  y = MatMul(h, w)", {"g": GAMMA}),
        ("n = Mul(x, g)  h = Add(n, b)  y = MatMul(h, w)", {"g": GAMMA, "b": BETA}),
        ("n = Mul(g, x)  h = Sub(b, n)  y = MatMul(h, w)", {"g": GAMMA, "b": BETA}),
        ("n = Mul(x, g)  h = Add(n, b)  y = MatMul(h, w)", {"g": GAMMA, "b": np.float32(0.5)}),
        ("h = MatMul(x, v)  y = MatMul(h, w)", {"v": random(6, 6)}),
        ("n = MatMul(x, v)  h = Add(n, b)  y = MatMul(h, w)", {"v": random(6, 6), "b": BETA}),
        ("h = Gemm<alpha=0.5, beta=2.0>(x, v, b)  y = MatMul(h, w)", {"v": random(6, 6), "b": BETA}),
        ("h = Gemm<transB=1>(x, v, b)  y = Gemm<transB=1>(h, w)", {"v": random(6, 6), "b": np.float32(2)}),
        ("n = Gemm(x, v)  h = Relu(n)  y = Gemm(h, w)", {"v": random(6, 6)}),
        ("n = Gemm(x, v)  h = PRelu(n, s)  y = Gemm(h, w)", {"v": random(6, 6), "s": np.float32(0.1)}),
        ("h = MatMul(x, v)  t = Transpose<perm=[1,0]>(w)  y = MatMul(h, t)", {"v": random(6, 6)}),
        ("t = Transpose<perm=[1,0]>(x)  h = MatMul(v, t)  y = MatMul(w, h)", {"v": random(6, 6)}),
    ],
)
def test_producers_take_factors_in(make_net: MakeNet, body: str, weights: dict[str, np.ndarray]) -> None:
    model = make_net("(float[N,6] x) => (float[A,B] y)", body, w=random(6, 6, seed=9), **weights)
    (scaling,) = fold_all(model)
    assert scaling.free.all()
    assert [item.site.name for item in scaling.consumers] == ["w"]
    assert scaling.positive == ("Relu(" in body)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("second", ["Conv", "ConvTranspose"])
def test_convolutions_hand_channels_on(make_net: MakeNet, group: int, second: str) -> None:
    shape = (5, 4 // group, 3, 3) if second == "Conv" else (4, 6 // group, 3, 3)
    outputs = 5 if second == "Conv" else 6
    if second == "Conv" and group == 2:
        shape, outputs = (6, 2, 3, 3), 6
    model = make_net(
        f"(float[N,4,8,8] x) => (float[N,{outputs},H,W] y)",
        f"a = ConvTranspose<group={group}>(x, u, b)  r = Relu(a)  p = MaxPool<kernel_shape=[2,2]>(r)"
        f" y = {second}<group={group}>(p, w)",
        u=random(4, 4 // group, 3, 3),
        b=random(4),
        w=random(*shape),
    )
    (scaling,) = fold_all(model)
    assert scaling.free.size == 4
    assert scaling.positive


def test_depthwise_and_flattened_channels(make_net: MakeNet) -> None:
    model = make_net(
        "(float[N,4,6,6] x) => (float[N,3] y)",
        "a = Conv<group=4, pads=[1,1,1,1]>(x, u)  r = Relu(a)  c = Conv<group=4>(r, v)"
        " l = LeakyRelu(c)  f = Flatten(l)  y = Gemm(f, w)",
        u=random(4, 1, 3, 3),
        v=random(4, 1, 3, 3),
        w=random(64, 3),
    )
    assert len(fold_all(model)) == 2
    found = scaling_of(model, "w")
    assert isinstance(found, Scaling)
    # Sixteen pixels of each channel share its factor.
    np.testing.assert_array_equal(found.consumers[0].channels, np.repeat(np.arange(4), 16))


def test_only_the_slice_of_a_fused_projection_is_scaled(make_net: MakeNet) -> None:
    model = make_net(
        "(float[N,T,8] x) => (float[N,T,8] y)",
        """qkv = MatMul(x, p)  all = Add(qkv, b)  q, k, v = Split<axis=-1, num_outputs=3>(all)
           t = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, t)  a = Softmax(s)  m = MatMul(a, v)
           y = MatMul(m, w)""",
        p=random(8, 24),
        b=random(24),
        w=random(8, 8),
    )
    found = scaling_of(model, "w")
    assert isinstance(found, Scaling)
    np.testing.assert_array_equal(found.free, [False] * 16 + [True] * 8)
    np.testing.assert_array_equal(found.consumers[0].channels, np.arange(16, 24))
    before = model.graph.initializers["p"].const_value.numpy()  # type: ignore[union-attr]
    fold_all(model)
    after = model.graph.initializers["p"].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_array_equal(before[:, :16], after[:, :16])
    assert (before[:, 16:] != after[:, 16:]).any()


def test_plain_half_of_a_gated_unit_takes_the_factors(make_net: MakeNet) -> None:
    model = make_net(
        "(float[N,4] x) => (float[N,4] y)",
        "gu = MatMul(x, p)  g = Slice(gu, s0, s6, last)  u = Slice(gu, s6, s12, last)"
        " e = Sigmoid(g)  silu = Mul(g, e)  h = Mul(silu, u)  y = MatMul(h, w)",
        p=random(4, 12),
        w=random(6, 4),
        **{name: np.array([n]) for name, n in {"s0": 0, "s6": 6, "s12": 12, "last": -1}.items()},
    )
    (scaling,) = fold_all(model)
    np.testing.assert_array_equal(np.flatnonzero(scaling.free), np.arange(6, 12))


def test_a_shared_vector_is_copied_and_keeps_its_value(make_net: MakeNet) -> None:
    model = make_net(
        "(float[N,6] x) => (float[N,4] y, float[N,6] z)",
        "h = Mul(x, g)  y = MatMul(h, w)  z = Add(x, g)",
        g=GAMMA,
        w=random(6, 4),
    )
    fold_all(model)
    np.testing.assert_array_equal(model.graph.initializers["g"].const_value.numpy(), GAMMA)  # type: ignore[union-attr]
    assert sorted(model.graph.initializers) == ["g", "g_1", "w"]


def test_half_precision_is_multiplied_in_double(make_net: MakeNet) -> None:
    model = make_net(
        "(float16[N,6] x) => (float16[N,4] y)",
        "h = Mul(x, g)  y = MatMul(h, w)",
        g=GAMMA.astype(np.float16),
        w=random(6, 4).astype(np.float16),
    )
    fold_all(model, tolerance=5e-3)
    found = scaling_of(model, "w")
    assert isinstance(found, Scaling)
    assert found.fold(model, np.full(6, 1e6)) == "the scaled 'w' would overflow float16"
    fold_all(model, tolerance=5e-3)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "body", "weights", "reason"),
    [
        ("float[N,6] y", "y = MatMul(x, w)", {}, "its input is an input of the graph"),
        (
            "float[N,6] y",
            "h = Mul(x, g)  m = MatMul(h, w)  y = Add(h, m)",
            {"g": GAMMA},
            "is read by Add 'y': it is added to what is not scaled",
        ),
        ("float[N,6] y, float[N,6] h", "h = Mul(x, g)  y = MatMul(h, w)", {"g": GAMMA}, "is an output of"),
        ("float[N,6] y", "h = Mul(x, g)  t = Tanh(h)  y = MatMul(t, w)", {"g": GAMMA}, "comes from Tanh 't'"),
        (
            "float[N,6] y",
            "h = Gemm(x, g)  t = Clip(h, lo, hi)  y = MatMul(t, w)",
            {"g": random(6, 6), "lo": np.float32(0), "hi": np.float32(6)},
            "it is clipped at a fixed value there",
        ),
        (
            "float[N,6] y, float[N,6] z",
            "h = Mul(x, g)  z = Softmax(h)  y = MatMul(h, w)",
            {"g": GAMMA},
            "is read by Softmax 'z', which no factor passes",
        ),
        (
            "float[N,6] y",
            "h = Mul(x, g)  q = Mul(h, h)  y = MatMul(q, w)",
            {"g": GAMMA},
            "reads the output of Mul 'h' twice",
        ),
        (
            "float[N,6] y",
            "a = MatMul(x, w)  y = MatMul(a, w)",
            {},
            "its weight is read by 2 nodes",
        ),
        (
            "float[N,6] y, float[6,6] z",
            "a = Mul(x, g)  y = MatMul(a, w)  z = Identity(w)",
            {"g": GAMMA},
            "whose weight is read by Identity 'z' as well",
        ),
        (
            "float[N,6] y, float[N,6] z",
            "a = MatMul(x, v)  y = MatMul(a, w)  z = MatMul(x, v)",
            {"v": random(6, 6)},
            "which makes its input, has a weight that is read by MatMul 'z' as well",
        ),
        (
            "float[N,6] y",
            "b = ReduceSum<keepdims=0>(x, zero)  a = Gemm(x, v, b)  y = MatMul(a, w)",
            {"v": random(6, 6), "zero": np.array([0])},
            "reads 'b', which is no constant",
        ),
        (
            "float[N,6] y",
            "a = MatMul(x, v)  t = Transpose<perm=[1,0]>(a)  r = Relu(t)  y = MatMul(r, w)",
            {"v": random(6, 6)},
            "along another axis than its channels",
        ),
    ],
)
def test_refusals_say_why(
    make_net: MakeNet, outputs: str, body: str, weights: dict[str, np.ndarray], reason: str
) -> None:
    size = 6 if "Transpose" in body else "N"
    model = make_net(
        f"(float[{size},6] x) => ({outputs.replace('N', str(size))})", body, w=random(6, 6), **weights
    )
    for node in model.graph:
        node.name = node.outputs[0].name
    found = scaling_of(model, "w")
    assert isinstance(found, str)
    assert reason in found
    assert fold_all(model) == []


def test_readers_in_a_branch_hold_the_factors_back(make_net: MakeNet) -> None:
    model = make_net(
        "(float[N,6] x, bool c) => (float[N,6] y)",
        """h = Mul(x, g)  m = MatMul(h, w)
           y = If(c) <then_branch = a () => (float[N,6] p) { p = Relu(h) },
                      else_branch = b () => (float[N,6] q) { q = Identity(m) }>""",
        g=GAMMA,
        w=random(6, 6),
    )
    found = scaling_of(model, "w")
    assert isinstance(found, str)
    assert "is read inside a subgraph" in found


# -- maps ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_a_reshaped_map_is_the_map_of_the_reshaped_value(data: st.DataObject) -> None:
    before = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    elements = int(np.prod(before))
    after = []
    left = elements
    while left > 1 or not after:
        size = data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        after.append(size)
        left //= size
        if len(after) > 4:
            after.append(left)
            break
    kept = tuple(size if data.draw(st.booleans()) else 1 for size in before)
    channels = np.arange(int(np.prod(kept))).reshape(kept)
    got = reshaped(channels, before, tuple(after))
    want = np.broadcast_to(channels, before).reshape(after)
    np.testing.assert_array_equal(np.broadcast_to(got, after), want)


def test_a_reshape_to_other_elements_is_refused() -> None:
    with pytest.raises(Blocked, match="another number"):
        reshaped(np.arange(6), (2, 6), (2, 5))
