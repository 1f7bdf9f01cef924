"""merge-lora on hand-made graphs: every layout, every kind, several adapters, and streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.model import Model, constant_tensor
from effic.ir.onnx_format import read_onnx
from effic.ir.weights import weight_sites
from effic.passes.adapters.streamed import MergedTensor, Term
from tests.passes.adapter_nets import (
    RNG,
    MakeNet,
    WriteAdapter,
    close,
    delta,
    embedding_net,
    linear,
    lora,
    merge,
    net,
    normal,
    value_of,
)

# -- layouts -----------------------------------------------------------------------------------------

LAYOUTS = {
    "matmul": ("y = MatMul(x, <w>)", False),
    "transposed": ("t = Transpose<perm=[1,0]>(<w>) y = MatMul(x, t)", True),
    "gemm": ("y = Gemm(x, <w>)", False),
    "gemm transB": ("y = Gemm<transB=1>(x, <w>)", True),
    "left": ("t = Transpose<perm=[1,0]>(x) u = MatMul(<w>, t) y = Transpose<perm=[1,0]>(u)", True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_linear_in_every_layout(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, layout: str, fan_in_fan_out: bool
) -> None:
    body, as_torch = LAYOUTS[layout]
    weight = normal(3, 4)
    body = body.replace("<w>", "q_weight")
    model = make_net("(float[N,4] x) => (float[N,3] y)", body, q_weight=weight if as_torch else weight.T)
    model.graph.initializers["q_weight"].name = "q.weight"
    tensors = lora("q", 3, 4)
    x = normal(5, 4)
    remarks = merge(model, write_adapter(tmp_path / "a", tensors, fan_in_fan_out=fan_in_fan_out))
    want = weight + delta(tensors, "q")
    got = value_of(model, "q.weight")
    close(got if as_torch else got.T, want)
    close(Oracle(model).run({"x": x})["y"], x @ want.T, 1e-5)
    (remark,) = remarks.items
    assert remark.data["rank"] == [2]
    assert remark.data["relative"] == pytest.approx(
        np.linalg.norm(delta(tensors, "q")) / np.linalg.norm(weight), rel=1e-5
    )


def test_float64(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = RNG.standard_normal((4, 3))
    model = net(
        make_net, "y = MatMul(x, q__weight)", sig="(double[N,4] x) => (double[N,3] y)", q__weight=weight
    )
    tensors = lora("q", 3, 4)
    merge(model, write_adapter(tmp_path / "a", tensors))
    close(value_of(model, "q.weight"), weight + delta(tensors, "q").T, 1e-14)


def test_bf16_rounds_once(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = normal(4, 3)
    model = net(make_net, "c = Cast<to=16>(x) h = MatMul(c, q__weight) y = Cast<to=1>(h)", q__weight=weight)
    value = model.graph.initializers["q.weight"]
    value.const_value = ir.Tensor(weight.astype(ml_dtypes.bfloat16), name="q.weight")
    value.type = ir.TensorType(ir.DataType.BFLOAT16)
    tensors = lora("q", 3, 4)
    merge(model, write_adapter(tmp_path / "a", tensors), compute_dtype="float64")
    want = (weight.astype(ml_dtypes.bfloat16).astype(np.float64) + delta(tensors, "q").T).astype(
        ml_dtypes.bfloat16
    )
    assert np.array_equal(value_of(model, "q.weight"), want)


def test_an_adapter_of_zeros_changes_no_bit(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = linear(make_net)
    before = constant_tensor(model.graph.initializers["q.weight"])
    tensors = lora("q", 3, 4)
    tensors["q.lora_B.weight"][:] = 0
    remarks = merge(model, write_adapter(tmp_path / "a", tensors))
    assert constant_tensor(model.graph.initializers["q.weight"]) is before
    assert remarks.items[0].kind == "missed"


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, kernel: int) -> None:
    weight = normal(5, 4, kernel, kernel)
    model = net(
        make_net,
        "y = Conv(x, c__weight)",
        sig="(float[N,4,8,8] x) => (float[N,5,h,h] y)",
        c__weight=weight,
    )
    a, b = normal(2, 4, kernel, kernel), normal(5, 2, 1, 1)
    merge(model, write_adapter(tmp_path / "a", {"c.lora_A.weight": a, "c.lora_B.weight": b}))
    close(value_of(model, "c.weight"), weight + 2 * np.einsum("or,rchw->ochw", b[:, :, 0, 0], a))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [("<dilations=[2,2]>", "dilation"), ("<group=2>", "groups"), ("pad", "padded otherwise")],
)
def test_convolutions_that_peft_does_not_repeat(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, attributes: str, reason: str
) -> None:
    body = f"y = Conv{attributes}(x, c__weight)"
    weights: dict[str, np.ndarray] = {"c__weight": normal(4, 2 if "group" in attributes else 4, 3, 3)}
    if attributes == "pad":
        body = 'p = Pad<mode="reflect">(x, pads) y = Conv(p, c__weight)'
        weights["pads"] = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    model = net(make_net, body, sig="(float[N,4,8,8] x) => (float[N,4,h,h] y)", **weights)
    tensors = {"c.lora_A.weight": normal(2, 4, 3, 3), "c.lora_B.weight": normal(4, 2, 1, 1)}
    with pytest.raises(UnsupportedError, match=reason):
        merge(model, write_adapter(tmp_path / "a", tensors))


def test_embedding(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    table = normal(6, 4)
    model = embedding_net(make_net, table)
    a, b = normal(2, 6), normal(4, 2)
    merge(model, write_adapter(tmp_path / "a", {"e.lora_embedding_A": a, "e.lora_embedding_B": b}))
    close(value_of(model, "e.weight"), table + 2 * (b @ a).T)


def test_rows_of_an_embedding(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    table, rows = normal(6, 4), normal(2, 4)
    model = embedding_net(make_net, table, tied=True)
    tensors = {"e.token_adapter.trainable_tokens_delta": rows}
    merge(model, write_adapter(tmp_path / "a", tensors, trainable_token_indices=[4, 1]))
    table[[4, 1]] = rows
    assert np.array_equal(value_of(model, "e.weight"), table)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, transposed: bool) -> None:
    stack = normal(3, 4, 5)
    model = net(make_net, "y = MatMul(x, m__up)", sig="(float[3,N,4] x) => (float[3,N,5] y)", m__up=stack)
    out, into = (4, 5) if transposed else (5, 4)
    a, b = normal(6, into), normal(out, 6)
    tensors = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    merge(model, write_adapter(tmp_path / "a", tensors, target_parameters=["m.up"]))
    deltas = 2 * np.einsum("ore,eri->eoi", b.reshape(out, 2, 3), a.reshape(3, 2, into))
    close(value_of(model, "m.up"), stack + (deltas if transposed else deltas.transpose(0, 2, 1)))


def test_nested_experts_are_told_apart_by_shape(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    up, down = normal(3, 4, 5), normal(3, 5, 6)
    model = net(
        make_net,
        "h = MatMul(x, m__up) y = MatMul(h, m__down)",
        sig="(float[3,N,4] x) => (float[3,N,6] y)",
        m__up=up,
        m__down=down,
    )
    tensors = {
        "m.base_layer.lora_A.weight": normal(6, 4),
        "m.base_layer.lora_B.weight": normal(5, 6),
        "m.lora_A.weight": normal(6, 5),
        "m.lora_B.weight": normal(6, 6),
    }
    remarks = merge(model, write_adapter(tmp_path / "a", tensors, target_parameters=["m.up", "m.down"]))
    assert remarks.count("passed") == 2


# -- kinds -------------------------------------------------------------------------------------------


def test_dora_gives_rows_their_magnitude(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = linear(make_net)
    m = np.abs(normal(3)) + 1
    tensors = {**lora("q", 3, 4), "q.lora_magnitude_vector": m}
    merge(model, write_adapter(tmp_path / "a", tensors, use_dora=True))
    close(np.linalg.norm(value_of(model, "q.weight"), axis=0), m)


def test_paca_replaces_columns_and_nothing_else(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight = normal(4, 3)
    weight[1] = -0.0
    model = linear(make_net, weight)
    w = normal(3, 2)
    tensors = {"q.paca_w": w, "q.paca_indices": np.array([3, 0])}
    merge(model, write_adapter(tmp_path / "a", tensors, peft_type="PACA"))
    got = value_of(model, "q.weight")
    assert np.array_equal(got[[3, 0]], 2 * w.T)
    assert got[1:3].tobytes() == weight[1:3].tobytes()


def test_s2ft_is_put_back_in_the_original_order(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight, s2 = normal(4, 3), normal(2, 4)
    model = linear(make_net, weight)
    order = np.array([2, 0, 1])
    tensors = {"q.s2": s2, "q.s2_axis": np.array(0), "q.s2_start": np.array(1), "q.s2_order": order}
    merge(model, write_adapter(tmp_path / "a", tensors, peft_type="S2FT"))
    permuted = weight.T[order]
    permuted[1:] += s2
    close(value_of(model, "q.weight").T[order], permuted)


def test_s2ft_of_grouped_queries_is_explained(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    tensors = {
        "q.s2": normal(2, 4),
        "q.s2_axis": np.array(0),
        "q.s2_start": np.array(1),
        "q.s2_order": np.arange(6),
    }
    folder = write_adapter(tmp_path / "a", tensors, peft_type="S2FT")
    with pytest.raises(UnsupportedError, match=r"orders 6 channels, but its weight has 3 .*grouped-query"):
        merge(linear(make_net), folder)


def test_channels_that_dora_cannot_rescale_are_said(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight = normal(4, 3)
    weight[:, 1] = 0
    model = linear(make_net, weight)
    tensors = {**lora("q", 3, 4), "q.lora_magnitude_vector": np.abs(normal(3)) + 1}
    tensors["q.lora_B.weight"][1] = 0
    remarks = merge(model, write_adapter(tmp_path / "a", tensors, use_dora=True))
    assert [r.kind for r in remarks.items] == ["passed", "missed"]
    assert remarks.items[1].text.startswith("1 of its channels are zero")
    assert not value_of(model, "q.weight")[:, 1].any()


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize(("into", "groups"), [(4, 1), (64, 2), (64, 1)])
@pytest.mark.parametrize("offset", [0.0, 0.5, 0.3])
def test_l4q_is_what_training_multiplied_with(
    make_net: MakeNet,
    write_adapter: WriteAdapter,
    tmp_path: Path,
    opset: int,
    into: int,
    groups: int,
    offset: float,
) -> None:
    weight = normal(into, 3)
    model = net(
        make_net,
        "y = MatMul(x, q__weight)",
        opset=opset,
        sig=f"(float[N,{into}] x) => (float[N,3] y)",
        q__weight=weight,
    )
    tensors = lora("q", 3, into)
    scale = np.full((3, groups), 0.25, np.float32)
    tensors |= {"q.l4q_scale": scale, "q.l4q_offset": np.full((3, groups), offset, np.float32)}
    merge(model, write_adapter(tmp_path / "a", tensors, peft_type="L4Q", bits=4))
    full = (weight.T + np.float32(2) * tensors["q.lora_B.weight"] @ tensors["q.lora_A.weight"]) - np.float32(
        offset
    )
    want = np.rint(np.clip(full / np.float32(0.25), -8, 7)) * np.float32(0.25) + np.float32(offset)
    site = weight_sites(model)[0]
    assert (site.encoding is not None) == (opset == 21 and offset != 0.3)
    # A code on the edge may fall to the other side.
    assert np.mean(site.read() != want.astype(np.float32)) < 0.02
    if site.encoding is not None:
        assert site.encoding.bits == 4


def test_dylora_is_cut(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = normal(4, 3)
    tensors = lora("q", 3, 4)
    folder = write_adapter(tmp_path / "a", tensors)
    a, b = tensors["q.lora_A.weight"], tensors["q.lora_B.weight"]
    for scale, sigma in (("alpha_over_b", 4), ("keep", 2)):
        model = linear(make_net, weight)
        merge(model, folder, lora_rank=1, rank_scale=scale)
        close(value_of(model, "q.weight"), weight + sigma * (b[:, :1] @ a[:1]).T)


def test_an_adapter_that_changed_its_base_needs_to_be_told(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight = normal(4, 3)
    tensors, first = lora("q", 3, 4), lora("q", 3, 4)
    folder = write_adapter(tmp_path / "a", tensors, init_lora_weights="pissa")
    start = write_adapter(tmp_path / "b", first, init_lora_weights="pissa")
    with pytest.raises(UsageError, match="initialised by pissa"):
        merge(linear(make_net, weight), folder)
    model = linear(make_net, weight)
    merge(model, folder, base="residual")
    close(value_of(model, "q.weight"), weight + delta(tensors, "q").T)
    model = linear(make_net, weight)
    merge(model, folder, initial=start)
    close(value_of(model, "q.weight"), weight + (delta(tensors, "q") - delta(first, "q")).T)
    model = linear(make_net, weight)
    merge(model, folder, base="original")
    u, s, vt = np.linalg.svd(weight.T)
    close(value_of(model, "q.weight"), (weight.T - (u[:, :2] * s[:2]) @ vt[:2] + delta(tensors, "q")).T, 1e-5)


# -- replaced tensors and biases ---------------------------------------------------------------------


def test_biases_and_replaced_modules(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    bias, weight = normal(3), normal(4, 3)
    model = net(
        make_net,
        "h = Gemm(x, q__weight, q__bias) y = MatMul(h, head__weight)",
        sig="(float[N,4] x) => (float[N,2] y)",
        q__weight=weight,
        q__bias=bias,
        head__weight=normal(3, 2),
    )
    head, trained = normal(2, 3), normal(3)
    tensors = {
        **lora("q", 3, 4),
        "q.lora_B.bias": trained,
        "head.weight": head,
    }
    merge(model, write_adapter(tmp_path / "a", tensors, lora_bias=True, modules_to_save=["head"]))
    close(value_of(model, "q.bias"), bias + 2 * trained)
    assert np.array_equal(value_of(model, "head.weight"), head.T)


def test_a_bias_that_the_base_lacks(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    tensors = {**lora("q", 3, 4), "q.lora_B.bias": normal(3)}
    with pytest.raises(UsageError, match=r"'q.bias': no constant of the model has that path"):
        merge(linear(make_net), write_adapter(tmp_path / "a", tensors, lora_bias=True))


# -- several adapters --------------------------------------------------------------------------------


def test_weighted_sum_in_any_order(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = normal(4, 3)
    one, two = lora("q", 3, 4), lora("q", 3, 4)
    folders = [write_adapter(tmp_path / "a", one), write_adapter(tmp_path / "b", two)]
    want = weight + (0.5 * delta(one, "q") - 2 * delta(two, "q")).T
    for combine in ("delta_sum", "cat"):
        model = linear(make_net, weight)
        merge(model, [f"{folders[0]}=0.5", f"{folders[1]}=-2"], combine=combine)
        close(value_of(model, "q.weight"), want)
    model = linear(make_net, weight)
    merge(model, f"{folders[1]}=-2")
    merge(model, f"{folders[0]}=0.5")
    close(value_of(model, "q.weight"), want)


def test_rows_that_two_adapters_replace_are_added_up(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    table, one, two = normal(6, 4), normal(2, 4), normal(2, 4)
    folders = [
        write_adapter(
            tmp_path / name, {"e.token_adapter.trainable_tokens_delta": rows}, trainable_token_indices=numbers
        )
        for name, rows, numbers in (("a", one, [4, 1]), ("b", two, [1, 0]))
    ]
    for order in (folders, folders[::-1]):
        model = embedding_net(make_net, table)
        merge(model, order)
        got = value_of(model, "e.weight")
        assert np.array_equal(got[[4, 0]], [one[0], two[1]]), "to the bit, where they are alone"
        close(got[1], one[1] + two[0] - table[1])


@pytest.mark.parametrize("combine", ["svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "linear"])
def test_other_combinations_run(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, combine: str
) -> None:
    folders = [write_adapter(tmp_path / n, lora("q", 3, 4)) for n in "ab"]
    model, again = (
        linear(make_net, np.ones((4, 3), np.float32)),
        linear(make_net, np.ones((4, 3), np.float32)),
    )
    assert merge(model, folders, combine=combine).count("passed") == 1
    merge(again, folders[::-1], combine=combine)
    assert np.array_equal(value_of(model, "q.weight"), value_of(again, "q.weight"))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a", "a"], "are the same adapter"),
        (["a=x"], "is not FOLDER or FOLDER=WEIGHT"),
        (["a=inf"], "is not FOLDER or FOLDER=WEIGHT"),
        (["none"], "is no folder"),
        ([], "adapters is empty"),
    ],
)
def test_adapters_that_are_named_wrong(
    make_net: MakeNet,
    write_adapter: WriteAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folders: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a", lora("q", 3, 4))
    with pytest.raises(UsageError, match=message):
        merge(linear(make_net), folders)


# -- streaming ---------------------------------------------------------------------------------------


def half_net(make_net: MakeNet, weight: np.ndarray) -> Model:
    return net(
        make_net,
        "c = Cast<to=10>(x) h = MatMul(c, q__weight) y = Cast<to=1>(h)",
        q__weight=weight.astype(np.float16),
    )


@pytest.mark.parametrize(("size", "fits"), [(60000.0, True), (65000.0, False), (-65000.0, False)])
def test_a_sum_that_half_precision_cannot_hold(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, size: float, fits: bool
) -> None:
    weight = normal(4, 3)
    weight[2, 1] = size
    tensors = lora("q", 3, 4)
    tensors["q.lora_A.weight"][:, 2] = [1000 * np.sign(size), 0]
    tensors["q.lora_B.weight"][1] = [1, 0]
    folder, kept = write_adapter(tmp_path / "a", tensors), tmp_path / "kept.safetensors"
    model = half_net(make_net, weight)
    if fits:
        merge(model, folder)
        assert value_of(model, "q.weight")[2, 1] == 62000
        return
    with pytest.raises(UnsupportedError, match=r"into 'q.weight', .* FLOAT16 cannot hold"):
        merge(model, folder, keep_original=kept)
    assert not kept.exists(), "nothing is left of a merge that failed"


@pytest.mark.parametrize("use_dora", [False, True])
def test_products_that_overflow_are_refused_without_warnings(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, use_dora: bool
) -> None:
    """Warnings are errors in these tests."""
    tensors = {key: np.full_like(value, 1e30) for key, value in lora("q", 3, 4).items()}
    if use_dora:
        tensors["q.lora_magnitude_vector"] = np.ones(3, np.float32)
    with pytest.raises(UnsupportedError, match="FLOAT cannot hold"):
        merge(linear(make_net), write_adapter(tmp_path / "a", tensors, use_dora=use_dora))


def test_an_overflow_is_looked_for_where_it_may_be() -> None:
    top = np.finfo(np.float16).max
    base = ir.Tensor(np.full((4, 4), top), name="w")
    for step, infinite in ((15.9, False), (16.1, True)):
        term = Term((0, 4), (0, 4), np.full((4, 1), step, np.float32), np.ones((1, 4), np.float32))
        merged = MergedTensor(base, [term], (4, 4), "w")
        assert merged.overflows() == infinite
        assert np.isinf(merged.numpy()).any() == infinite


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_merged_tensor_is_the_same_however_it_is_read(tmp_path: Path, dtype: Any, mapped: bool) -> None:
    base = normal(300, 700).astype(dtype)
    tensor: ir.TensorProtocol = ir.Tensor(base, name="w")
    if mapped:
        value = ir.Value(
            name="w", const_value=tensor, shape=ir.Shape(base.shape), type=ir.TensorType(tensor.dtype)
        )
        node = ir.node("Identity", [value])
        node.outputs[0].name = "y"
        node.outputs[0].type = value.type
        graph = ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[value], opset_imports={"": 18})
        Model(ir.Model(graph, ir_version=10)).save(tmp_path / "m.onnx", external=True)
        loaded = constant_tensor(read_onnx(tmp_path / "m.onnx").graph.initializers["w"])
        assert loaded is not None
        tensor = loaded
    terms = [
        Term((10, 290), (0, 700), normal(280, 3), normal(3, 700)),
        Term((0, 300), (50, 60), normal(300, 2), normal(2, 10)),
    ]
    if dtype == np.float64:
        terms = [t._replace(left=t.left.astype(dtype), right=t.right.astype(dtype)) for t in terms]
    merged = MergedTensor(tensor, terms, (300, 700), "w")
    want = base.astype(np.float64)
    want[10:290] += terms[0].left @ terms[0].right
    want[:, 50:60] += terms[1].left @ terms[1].right
    got = merged.numpy()
    close(got.astype(np.float64), want, {2: 5e-3, 4: 1e-6, 8: 1e-14}[base.dtype.itemsize])
    assert got[:10, :50].tobytes() == base[:10, :50].tobytes()
    with open(tmp_path / "out", "wb") as file:
        merged.tofile(file)
    assert (tmp_path / "out").read_bytes() == got.tobytes() == merged.tobytes()
    assert terms[0].norm() == pytest.approx(np.linalg.norm(terms[0].left @ terms[0].right), rel=1e-5)


def test_what_lies_in_memory_is_not_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers begin as anything: signalling NaN, for one, which a cast to a wider type warns of."""

    def dirty(shape: tuple[int, int], dtype: Any) -> np.ndarray:
        bits = np.full(shape, 0x7D01, np.uint16)
        return bits.view(np.float16) if dtype == np.float16 else np.zeros(shape, dtype)

    monkeypatch.setattr(np, "empty", dirty)
    base = ir.Tensor(normal(4, 4).astype(np.float16), name="w")
    term = Term((0, 4), (0, 4), normal(4, 1), normal(1, 4))
    assert np.isfinite(MergedTensor(base, [term], (4, 4), "w").numpy()).all()
