"""fuse-conv-bn: shared weights, branches, functions, chains."""

from __future__ import annotations

import itertools

import numpy as np

from effic.ir.evaluate import Oracle
from effic.ir.verify import verify
from effic.passes.base import Remarks
from effic.passes.fuse.fuse_conv_bn import FuseConvBN
from tests.passes.conv_bn_nets import X4, bn, f32, fuse, missed, net, norm, ops


def test_shared_weights_are_copied_for_norms_and_not_for_scales() -> None:
    body = "c = Conv(x, w)\n" + bn("c", "p") + "d = Conv(x, w)\n" + bn("d", "q", "k") + "y = Add(p, q)"
    model = net(X4, body, w=f32(4, 6, 3, 3), **norm(4), **norm(4, "k"))
    fuse(model)
    assert ops(model) == {"Conv": 2, "Add": 1}
    assert "w" not in model.graph.initializers

    body = "c = Conv(x, w)\n" + bn("c", "p") + "d = Conv(x, w)\ny = Add(p, d)"
    original = f32(4, 6, 3, 3)
    model = net(X4, body, w=original, **norm(4))
    fuse(model)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), original)

    model = net(
        X4, "c = Conv(x, w)\np = Mul(c, s)\nd = Conv(x, w)\ny = Add(p, d)", w=original, s=f32(4, 1, 1)
    )
    assert "shared" in missed(fuse(model))


def test_a_weight_that_is_a_graph_output_stays() -> None:
    model = net(
        "(float[N,6,9,8] x) => (float[N,?,?,?] y, float[4,6,3,3] w)",
        "c = Conv(x, w)\n" + bn("c", "y"),
        w=f32(4, 6, 3, 3),
        **norm(4),
    )
    fuse(model)
    assert ops(model) == {"Conv": 1}
    assert "w" in model.graph.initializers


def test_inside_branches_with_captured_weights() -> None:
    branch = "c = Conv(x, w)\n" + bn("c", "{0}")
    then, other = branch.format("yt"), "yo = Conv(x, w)"
    model = net(
        "(bool b, float[N,6,9,8] x) => (float[N,?,?,?] y)",
        f"y = If(b) <then_branch = t () => (float[N,?,?,?] yt) {{ {then} }}, "
        f"else_branch = e () => (float[N,?,?,?] yo) {{ {other} }}>",
        w=f32(4, 6, 3, 3),
        **norm(4),
    )
    for choice in (True, False):
        copy = model.clone()
        inputs = {"b": np.array(choice), "x": f32(2, 6, 9, 8)}
        want = Oracle(copy).run(inputs)["y"]
        FuseConvBN().apply(copy, Remarks())
        verify(copy)
        assert ops(copy) == {"If": 1, "Conv": 2}
        assert np.allclose(Oracle(copy).run(inputs)["y"], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_a_convolution_in_the_outer_graph_is_refused() -> None:
    model = net(
        "(bool b, float[N,6,9,8] x) => (float[N,?,?,?] y)",
        "c = Conv(x, w)\ny = If(b) <then_branch = t () => (float[N,?,?,?] yt) { " + bn("c", "yt") + " }, "
        "else_branch = e () => (float[N,?,?,?] yo) { yo = Relu(x) }>",
        w=f32(6, 6, 1, 1),
        **norm(6),
    )
    remarks = Remarks()
    FuseConvBN().apply(model, remarks)
    assert "outer graph" in missed(remarks)


def test_function_bodies_and_their_parameters() -> None:
    constants = "".join(f"n_{k} = Constant<value = float[2] {{1.5, 0.5}}>()\n" for k in "sbmv")
    weight = "w = Constant<value = float[2,1,1,1] {2.0, -3.0}>()\n"
    body = weight + constants + "c = Conv(x, w)\n" + bn("c", "y")
    head = '<domain: "f", opset_import: ["": 18]>'
    model = net(
        "(float[N,1,4,4] x) => (float[N,2,4,4] y)",
        "y = f.block(x)",
        functions=f"{head} block (x) => (y) {{ {body} }}",
    )
    fuse(model)
    assert ops(model) == {"block": 1, "Constant": 2, "Conv": 1}

    # The caller decides epsilon: what it will be is not known inside.
    set_outside = body.replace("BatchNormalization", "BatchNormalization<epsilon: float = @eps>")
    model = net(
        "(float[N,1,4,4] x) => (float[N,2,4,4] y)",
        "y = f.block<eps = 0.1>(x)",
        functions=f"{head} block <eps>(x) => (y) {{ {set_outside} }}",
    )
    assert "set by the function's caller" in missed(fuse(model))

    taken_in = body.replace(weight, "")
    model = net(
        "(float[N,1,4,4] x) => (float[N,2,4,4] y)",
        "y = f.block(x, w)",
        functions=f"{head} block (x, w) => (y) {{ {taken_in} }}",
        w=f32(2, 1, 1, 1),
    )
    assert "its weight is an input" in missed(fuse(model))


def test_norms_in_a_row_become_one() -> None:
    body = "r = Relu(x)\n" + bn("r", "a") + "m = Mul(a, p)\n" + bn("m", "b", "k") + "y = Relu(b)"
    weights = {"p": f32(6, 1, 1), **norm(6), **norm(6, "k")}
    model = net(X4, body, **weights)
    fuse(model)
    assert ops(model) == {"Relu": 2, "BatchNormalization": 1}
    assert len(model.graph.initializers) == 4
    model = net(X4, body, **weights)
    fuse(model, lone_norm="mul_add")
    assert ops(model) == {"Relu": 2, "Mul": 1, "Add": 1}
    assert len(model.graph.initializers) == 2


def test_a_lone_norm_as_mul_and_add() -> None:
    model = net(X4, bn("x", "a") + "y = Relu(a)", **norm(6))
    fuse(model)
    assert ops(model)["BatchNormalization"] == 1
    fuse(model, lone_norm="mul_add")
    assert ops(model) == {"Mul": 1, "Add": 1, "Relu": 1}


def test_dropout_in_training_is_not_crossed() -> None:
    model = net(
        X4, "c = Conv(x, w)\nd = Dropout(c, r, t)\n" + bn("d", "y"),
        w=f32(4, 6, 3, 3), r=np.float32(0.5), t=np.array(True), **norm(4),
    )  # fmt: skip
    remarks = Remarks()
    FuseConvBN().apply(model, remarks)
    assert ops(model)["BatchNormalization"] == 1


def test_time_is_linear_in_the_length_of_a_chain() -> None:
    # 2,000 Muls on one Conv: a fold per Mul would rewrite the weight 2,000 times.
    names = [f"v{i}" for i in range(2001)]
    body = "v0 = Conv(x, w)\n" + "".join(f"{b} = Mul({a}, s)\n" for a, b in itertools.pairwise(names))
    model = net(X4, body + "y = Relu(v2000)", w=f32(4, 6, 3, 3), s=np.float32(1.0001))
    fuse(model, tolerance=1e-3)
    assert ops(model) == {"Conv": 1, "Relu": 1}


def test_a_constant_that_makes_channels_is_not_folded_forward(make_net, check) -> None:
    # One channel times [4, 1, 1] is four channels: the layer cannot read the one.
    model = make_net(
        "(float[N,1,5,5] x) => (float[N,2,5,5] y)",
        "a = Mul(x, c)  y = Conv(a, w)",
        c=np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1),
        w=np.ones((2, 4, 1, 1), np.float32),
    )
    check(model, FuseConvBN())
    assert len(list(model.nodes("Mul"))) == 1
