"""merge-lora and unmerge-lora on hand-made graphs: every layout, every kind, every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.encodings import code_values, recognise
from effic.ir.errors import EfficError, UnsupportedError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.model import Model, constant_tensor
from effic.ir.onnx_format import read_onnx
from effic.ir.torch_capture import ALIASES_KEY, MODULE_KEY
from effic.ir.verify import verify
from effic.ir.weights import weight_sites
from effic.passes.adapters.streamed import MergedTensor, Term
from effic.passes.base import Remarks
from effic.passes.spec import parse_passes

MakeNet = Callable[..., Model]
WriteAdapter = Callable[..., str]

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lora(name: str, out: int, into: int, r: int = 2) -> dict[str, np.ndarray]:
    return {f"{name}.lora_A.weight": normal(r, into), f"{name}.lora_B.weight": normal(out, r)}


def delta(tensors: dict[str, np.ndarray], name: str, scaling: float = 2.0) -> np.ndarray:
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    return scaling * (b.astype(np.float64) @ a.astype(np.float64))


def merge(model: Model, folder: str | list[str], name: str = "merge-lora", **options: Any) -> Remarks:
    folders = [folder] if isinstance(folder, str) else folder
    texts = {"adapters": "[" + ",".join(f'"{f}"' for f in folders) + "]"}
    texts |= {key: f'"{value}"' for key, value in options.items()}
    (item,) = parse_passes(f"{name}{{{','.join(f'{k}={v}' for k, v in texts.items())}}}")
    remarks = Remarks()
    item.apply(model, remarks)
    model.forget_names()
    verify(model)
    return remarks


def value_of(model: Model, name: str) -> np.ndarray:
    tensor = constant_tensor(model.graph.initializers[name])
    assert tensor is not None
    return np.array(tensor.numpy())


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


# -- layouts ---------------------------------------------------------------------------------------

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


def net(make_net: MakeNet, body: str, opset: int = 18, sig: str = "", **weights: np.ndarray) -> Model:
    """A model whose weights have dots in their names where the text has two underscores."""
    model = make_net(sig or "(float[N,4] x) => (float[N,3] y)", body, opset=opset, **weights)
    for name, value in list(model.graph.initializers.items()):
        value.name = name.replace("__", ".")
    return model


def linear(make_net: MakeNet, weight: np.ndarray | None = None) -> Model:
    weight = normal(4, 3) if weight is None else weight
    return net(make_net, "y = MatMul(x, q__weight)", q__weight=weight)


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


def embedding_net(make_net: MakeNet, table: np.ndarray, tied: bool = False) -> Model:
    body = "h = Gather(e__weight, i)"
    body += " t = Transpose<perm=[1,0]>(e__weight) y = MatMul(h, t)" if tied else " y = Identity(h)"
    return net(make_net, body, sig="(int64[N] i) => (float[N,k] y)", e__weight=table)


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


# -- matching --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "constant"),
    [("q", "model__q__weight"), ("model.layers.q", "layers__q__weight"), ("layers.q", "layers__q__weight")],
)
def test_prefixes(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, module: str, constant: str
) -> None:
    model = net(make_net, f"y = MatMul(x, {constant})", **{constant: normal(4, 3)})
    assert merge(model, write_adapter(tmp_path / "a", lora(module, 3, 4))).count("passed") == 1


def test_components_match_whole(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = net(make_net, "y = MatMul(x, seq__weight)", seq__weight=normal(4, 3))
    with pytest.raises(UsageError, match="no place"):
        merge(model, write_adapter(tmp_path / "a", lora("q", 3, 4)))


def test_two_candidates_are_an_error(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = net(
        make_net,
        "a = MatMul(x, one__q__weight) b = MatMul(x, two__q__weight) y = Add(a, b)",
        one__q__weight=normal(4, 3),
        two__q__weight=normal(4, 3),
    )
    folder = write_adapter(tmp_path / "a", lora("q", 3, 4))
    with pytest.raises(UsageError, match=r"several constants could be meant: 'one.q.weight', 'two.q.weight'"):
        merge(model, folder)
    (tmp_path / "map").write_text("# which\nq = two.q.weight\n")
    assert merge(model, folder, map=tmp_path / "map").count("passed") == 1


def test_paths_in_node_names(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = net(make_net, "y = MatMul(x, w_12)", w_12=normal(4, 3))
    model.graph[0].name = "/encoder/layer.0/q/MatMul"
    remarks = merge(model, write_adapter(tmp_path / "a", lora("encoder.layer.0.q", 3, 4)))
    assert remarks.count("passed") == 1


def test_renamed_weights_are_proposed_by_shape_and_position(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = net(
        make_net,
        "a = MatMul(x, w_1) b = MatMul(a, w_2) y = MatMul(b, w_3)",
        w_1=normal(4, 5),
        w_2=normal(5, 5),
        w_3=normal(5, 3),
    )
    folder = write_adapter(tmp_path / "a", {**lora("l.2", 5, 4), **lora("l.10", 3, 5)})
    with pytest.raises(UsageError) as caught:
        merge(model, folder)
    assert "map line: l.2 = w_1" in str(caught.value)
    assert "map line: l.10 = w_3" in str(caught.value)


def test_fused_projections(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = normal(4, 9)
    model = net(
        make_net, "y = MatMul(x, qkv__weight)", sig="(float[N,4] x) => (float[N,9] y)", qkv__weight=weight
    )
    tensors = {**lora("q", 3, 4), **lora("v", 3, 4)}
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(UsageError, match=r"may hold several projections \(map line: q = qkv.weight\[0:3\]\)"):
        merge(model, folder)
    (tmp_path / "map").write_text("q = qkv.weight[0:3]\nv = qkv.weight[6:9]\n")
    merge(model, folder, map=tmp_path / "map")
    got = value_of(model, "qkv.weight")
    close(got[:, :3], weight[:, :3] + delta(tensors, "q").T)
    assert np.array_equal(got[:, 3:6], weight[:, 3:6])
    close(got[:, 6:], weight[:, 6:] + delta(tensors, "v").T)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q", "line 1 of the map .* is not of the form"),
        ("q = q.weight\nq = q.weight", "names a path again"),
        ("q = q.weight[3:1]", "names no rows"),
        ("q = q.weight[0:9]", "which has 3"),
        ("q = nothing", "names 'nothing', which is no constant"),
        ("q = q.weight\nother = q.weight", "names 'other', which no adapter has"),
    ],
)
def test_maps_that_are_wrong(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "map").write_text(text)
    with pytest.raises(EfficError, match=message) as caught:
        merge(linear(make_net), write_adapter(tmp_path / "a", lora("q", 3, 4)), map=tmp_path / "map")
    assert caught.value.exit_code == 2


def test_a_map_can_leave_tensors_out(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    tensors = {**lora("q", 3, 4), "classifier.weight": normal(2, 3)}
    (tmp_path / "map").write_text("classifier.weight = -\n")
    remarks = merge(linear(make_net), write_adapter(tmp_path / "a", tensors), map=tmp_path / "map")
    assert [r.where for r in remarks.items] == ["classifier.weight", "q"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lora("q", 4, 3), r"is for a weight of shape \[4, 3\], but 'q.weight' has \[3, 4\]"),
        ({"q.lora_embedding_A": normal(2, 3), "q.lora_embedding_B": normal(4, 2)}, "is an embedding's"),
        ({"q.lora_A.weight": normal(2, 4, 1, 1), "q.lora_B.weight": normal(3, 2, 1, 1)}, "a convolution's"),
        ({**lora("q", 3, 4), "q.weight": normal(4, 4)}, r"replaces a tensor of shape \[4, 4\]"),
    ],
)
def test_what_does_not_fit(
    make_net: MakeNet,
    write_adapter: WriteAdapter,
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    message: str,
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        merge(linear(make_net), write_adapter(tmp_path / "a", tensors))


def test_weights_that_are_no_constants(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = linear(make_net)
    model.graph.inputs.append(model.graph.initializers["q.weight"])
    with pytest.raises(EfficError, match="no place"):
        merge(model, write_adapter(tmp_path / "a", lora("q", 3, 4)))


# -- shared weights --------------------------------------------------------------------------------

HEAD = {"e.lora_A.weight": normal(2, 4), "e.lora_B.weight": normal(6, 2)}
EMBEDDING = {"e.lora_embedding_A": normal(2, 6), "e.lora_embedding_B": normal(4, 2)}


@pytest.mark.parametrize("side", ["head", "embedding"])
def test_a_tied_pair_is_refused_or_untied(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, side: str
) -> None:
    table = normal(6, 4)
    folder = write_adapter(tmp_path / "a", HEAD if side == "head" else EMBEDDING)
    with pytest.raises(UnsupportedError, match=r"shares its weight 'e\.weight' .* untie=true"):
        merge(embedding_net(make_net, table, tied=True), folder)
    model = embedding_net(make_net, table, tied=True)
    merge(model, folder, untie="true")
    changed = table + (
        2 * HEAD["e.lora_B.weight"] @ HEAD["e.lora_A.weight"]
        if side == "head"
        else 2 * (EMBEDDING["e.lora_embedding_B"] @ EMBEDDING["e.lora_embedding_A"]).T
    )
    i = np.array([0, 3, 5])
    want = (table[i] @ changed.T) if side == "head" else (changed[i] @ table.T)
    close(Oracle(model).run({"i": i})["y"], want, 1e-5)
    assert np.array_equal(value_of(model, "e.weight"), table)


def test_a_pair_that_was_tied_in_training_stays_tied(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    table = normal(6, 4)
    model = embedding_net(make_net, table, tied=True)
    model.graph.initializers["e.weight"].metadata_props[ALIASES_KEY] = json.dumps(["head.weight"])
    a, b = EMBEDDING["e.lora_embedding_A"], EMBEDDING["e.lora_embedding_B"]
    tensors = {**EMBEDDING, "head.lora_A.weight": b.T, "head.lora_B.weight": a.T}
    merge(model, write_adapter(tmp_path / "a", tensors, ensure_weight_tying=True))
    close(value_of(model, "e.weight"), table + 2 * (b @ a).T)
    assert len(model.graph.initializers) == 1


def test_a_weight_of_another_module_is_copied(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight = normal(4, 4)
    model = net(
        make_net,
        "t = Transpose<perm=[1,0]>(one__weight) h = MatMul(x, t) y = MatMul(h, t)",
        sig="(float[N,4] x) => (float[N,4] y)",
        one__weight=weight,
    )
    model.graph.initializers["one.weight"].metadata_props[ALIASES_KEY] = json.dumps(["two.weight"])
    for node, module in zip(list(model.graph)[1:], ("one", "two"), strict=True):
        node.metadata_props[MODULE_KEY] = module
    tensors, x = lora("two", 4, 4), normal(5, 4)
    merge(model, write_adapter(tmp_path / "a", tensors))
    close(Oracle(model).run({"x": x})["y"], x @ weight.T @ (weight + delta(tensors, "two")).T, 1e-5)


def test_a_module_called_twice_is_merged_in_place(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = net(
        make_net,
        "h = MatMul(x, q__weight) y = MatMul(h, q__weight)",
        sig="(float[N,4] x) => (float[N,4] y)",
        q__weight=normal(4, 4),
    )
    merge(model, write_adapter(tmp_path / "a", lora("q", 4, 4)))
    assert list(model.graph.initializers) == ["q.weight"]


# -- replaced tensors and biases -------------------------------------------------------------------


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


# -- kinds -----------------------------------------------------------------------------------------


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


# -- several adapters ------------------------------------------------------------------------------


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


# -- once, and back --------------------------------------------------------------------------------


def test_twice_is_once_also_through_a_file(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = linear(make_net)
    folder = write_adapter(tmp_path / "a", lora("q", 3, 4))
    merge(model, folder)
    model.save(tmp_path / "m.onnx")
    loaded = read_onnx(tmp_path / "m.onnx")
    remarks = merge(loaded, f"{folder}=0.5")
    assert [(r.kind, r.text) for r in remarks.items] == [("missed", "is merged already")]
    assert np.array_equal(value_of(loaded, "q.weight"), value_of(model, "q.weight"))


def test_unmerge_by_subtracting(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = normal(4, 3)
    model = linear(make_net, weight)
    folder = write_adapter(tmp_path / "a", lora("q", 3, 4))
    (tmp_path / "map").write_text("q = q.weight")
    merge(model, f"{folder}=0.25", map=tmp_path / "map")
    merged = value_of(model, "q.weight")
    assert merge(model, folder, name="unmerge-lora").count("passed") == 1
    ulp = np.spacing(np.maximum(np.abs(weight), np.abs(merged)))
    assert (np.abs(value_of(model, "q.weight") - weight) <= ulp).all()
    assert merge(model, folder, name="unmerge-lora").count("missed") == 1
    assert merge(model, folder).count("passed") == 1, "what was taken out may be merged again"


def test_unmerge_of_others(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = linear(make_net)
    merge(model, write_adapter(tmp_path / "a", lora("q", 3, 4)))
    remarks = merge(model, write_adapter(tmp_path / "b", lora("q", 3, 4)), name="unmerge-lora")
    assert remarks.items[0].text == "what was merged last is 'a'"


def test_dora_is_unmerged_only_with_originals(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight = normal(4, 3)
    tensors = {**lora("q", 3, 4), "q.lora_magnitude_vector": np.abs(normal(3)) + 1}
    folder = write_adapter(tmp_path / "a", tensors, use_dora=True)
    model = linear(make_net, weight)
    merge(model, folder, keep_original=tmp_path / "kept.safetensors")
    with pytest.raises(UnsupportedError, match="originals=FILE"):
        merge(model, folder, name="unmerge-lora")
    model.save(tmp_path / "m.onnx")
    loaded = read_onnx(tmp_path / "m.onnx")
    merge(loaded, [], name="unmerge-lora", originals=tmp_path / "kept.safetensors")
    assert value_of(loaded, "q.weight").tobytes() == weight.tobytes()


def test_originals_are_checked(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = linear(make_net)
    folder = write_adapter(tmp_path / "a", lora("q", 3, 4))
    kept = tmp_path / "kept.safetensors"
    merge(model, folder, keep_original=kept)
    other = linear(make_net)
    with pytest.raises(UsageError, match="exists"):
        merge(other, folder, keep_original=kept)
    merge(other, folder)
    with pytest.raises(UsageError, match="no originals were kept"):
        merge(other, [], name="unmerge-lora", originals=kept)
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="is not the file"):
        merge(model, [], name="unmerge-lora", originals=kept)


@pytest.mark.parametrize("text", ["[", "3", '[{"adapters": 3}]', '[{"adapters": [], "text": "x"}]'])
def test_somebody_elses_metadata(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, text: str
) -> None:
    model = linear(make_net)
    model.ir.metadata_props["effic.adapters"] = text
    assert merge(model, write_adapter(tmp_path / "a", lora("q", 3, 4))).count("passed") == 1


# -- encoded bases ---------------------------------------------------------------------------------


def encoded_net(make_net: MakeNet, weight: np.ndarray, options: str) -> Model:
    model = net(
        make_net,
        "y = MatMul(x, q__weight)",
        opset=21,
        sig=f"(float[N,{len(weight)}] x) => (float[N,{weight.shape[1]}] y)",
        q__weight=weight,
    )
    (item,) = parse_passes(f"quantize-rtn{{min_size=0,{options}}}")
    item.apply(model, Remarks())
    model.forget_names()
    return model


FORMS = [
    "bits=4,group_size=32",
    "bits=4,group_size=24,axis=ic",
    "bits=3,group_size=32,symmetric=false",
    "bits=8,group_size=-1",
    "bits=4,group_size=32,scale=absmax",
]


@pytest.mark.parametrize("form", FORMS)
def test_new_parameters_are_those_of_the_quantizer(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, form: str
) -> None:
    model = encoded_net(make_net, normal(64, 48), form)
    base = weight_sites(model)[0].read().T
    tensors = lora("q", 48, 64)
    remarks = merge(model, write_adapter(tmp_path / "a", tensors))
    merged = (base + delta(tensors, "q").T).astype(np.float32)
    want = weight_sites(encoded_net(make_net, merged, form))[0].read().T
    got = weight_sites(model)[0].read().T
    # The sums may round otherwise by a bit, and a code on the edge with them.
    assert np.mean(~np.isclose(got, want, rtol=1e-5)) < 0.01
    error = np.linalg.norm(got - merged) / np.linalg.norm(delta(tensors, "q"))
    assert remarks.items[0].data["requantization"] == pytest.approx(error, rel=1e-3)


def test_an_erased_adapter_is_warned_of(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = encoded_net(make_net, normal(64, 48), "bits=4,group_size=32")
    remarks = merge(model, write_adapter(tmp_path / "a", lora("q", 48, 64), lora_alpha=0.001))
    assert remarks.items[0].data["erased"]
    assert "keep_branch" in remarks.items[0].text


def test_the_other_ways_to_write_an_encoded_weight(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    weight, x = normal(64, 48), normal(5, 64)
    tensors = lora("q", 48, 64)
    folder = write_adapter(tmp_path / "a", tensors, lora_alpha=0.4)
    start = encoded_net(make_net, weight, "bits=4,group_size=32")
    base = weight_sites(start)[0].read().T
    want = x @ (base + delta(tensors, "q", 0.2).T)

    keep = start.clone()
    before = weight_sites(keep)[0].encoding
    merge(keep, folder, requantize="keep_params")
    after = weight_sites(keep)[0].encoding
    assert before is not None
    assert after is not None
    assert np.array_equal(before.scales, after.scales)
    assert not np.array_equal(code_values(before), code_values(after))

    floating = start.clone()
    merge(floating, folder, requantize="none")
    assert weight_sites(floating)[0].encoding is None
    close(Oracle(floating).run({"x": x})["y"], want, 1e-5)
    assert not [n for n in floating.graph if n.op_type == "DequantizeLinear"]

    branch = start.clone()
    merge(branch, folder, requantize="keep_branch")
    assert recognise(weight_sites(branch, ["MatMul"])[0].value) is not None
    close(Oracle(branch).run({"x": x})["y"], want, 1e-5)
    assert merge(branch, folder, requantize="keep_branch").count("passed") == 0


def test_a_branch_beside_a_gemm(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = net(
        make_net,
        "y = Gemm<alpha=0.5, transB=1>(x, q__weight, bias)",
        opset=21,
        sig="(float[N,64] x) => (float[N,48] y)",
        q__weight=normal(48, 64),
        bias=normal(48),
    )
    (item,) = parse_passes("quantize-rtn{min_size=0,group_size=32}")
    item.apply(model, Remarks())
    model.forget_names()
    tensors, x = lora("q", 48, 64), normal(5, 64)
    before = Oracle(model).run({"x": x})["y"]
    merge(model, write_adapter(tmp_path / "a", tensors), requantize="keep_branch")
    close(Oracle(model).run({"x": x})["y"], before + 0.5 * x @ delta(tensors, "q").T, 1e-5)


def test_outliers_stay_exact(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    weight = normal(64, 48)
    weight[3, 5] = 40
    model = net(
        make_net,
        "y = MatMul(x, q__weight)",
        opset=21,
        sig="(float[N,64] x) => (float[N,48] y)",
        q__weight=weight,
    )
    (item,) = parse_passes("quantize-easyquant{min_size=0,group_size=32}")
    item.apply(model, Remarks())
    model.forget_names()
    before = weight_sites(model)[0].encoding
    assert before is not None
    assert before.outliers is not None
    tensors = lora("q", 48, 64)
    merge(model, write_adapter(tmp_path / "a", tensors))
    after = weight_sites(model)[0].encoding
    assert after is not None
    assert after.outliers is not None
    flat = (before.outliers.values + delta(tensors, "q").T.reshape(-1)[before.outliers.indices]).astype(
        np.float32
    )
    close(after.outliers.values, flat, 1e-6)


def test_an_encoded_base_is_restored_bit_for_bit(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    for number, requantize in enumerate(("new_params", "keep_params", "none")):
        model = encoded_net(make_net, normal(64, 48), "bits=3,group_size=32,symmetric=false")
        before = weight_sites(model)[0].read()
        folder = write_adapter(tmp_path / f"a{number}", lora("q", 48, 64))
        kept.unlink(missing_ok=True)
        merge(model, folder, requantize=requantize, keep_original=kept)
        assert not np.array_equal(weight_sites(model)[0].read(), before)
        merge(model, [], name="unmerge-lora", originals=kept)
        site = weight_sites(model)[0]
        assert site.encoding is not None
        assert site.encoding.bits == 3
        assert site.read().tobytes() == before.tobytes()


def test_the_original_of_an_encoded_base_is_not_there(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    model = encoded_net(make_net, normal(64, 48), "bits=4,group_size=32")
    with pytest.raises(UsageError, match="base=original"):
        merge(model, write_adapter(tmp_path / "a", lora("q", 48, 64)), base="original")


# -- streaming -------------------------------------------------------------------------------------


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


# -- from the command line -------------------------------------------------------------------------


def test_a_hostile_adapter_is_one_sentence_and_exit_code_2(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from effic.cli.main import main

    linear(make_net).save(tmp_path / "m.onnx")
    folder = Path(write_adapter(tmp_path / "an adapter", lora("q", 3, 4)))
    arguments = ["optimize", str(tmp_path / "m.onnx"), "--output", str(tmp_path / "out.onnx"), "--passes"]
    passes = f'merge-lora{{adapters=["{folder}"]}}'
    with pytest.raises(SystemExit) as ended:
        main([*arguments, passes])
    assert ended.value.code in (0, None)
    (tmp_path / "out.onnx").unlink()
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-4])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*arguments, passes])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "is cut short" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.onnx").exists()
