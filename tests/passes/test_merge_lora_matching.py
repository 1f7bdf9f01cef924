"""Which constant merge-lora changes: by name, by a map, and of a shared one the part that is meant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from effic.ir.errors import EfficError, UnsupportedError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.torch_capture import ALIASES_KEY, MODULE_KEY
from tests.passes.adapter_nets import (
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

# -- matching ----------------------------------------------------------------------------------------


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


# -- shared weights ----------------------------------------------------------------------------------

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


def test_a_name_of_two_graphs_is_no_answer(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    """The first of them would be merged into and the other forgotten."""
    weights = [normal(4, 3), normal(4, 3)]
    model = make_net(
        "(float[N,4] x) => (float[N,3] y)",
        "y = If(c) <then_branch = t () => (float[N,3] a) { a = MatMul(x, one) }, "
        "else_branch = e () => (float[N,3] b) { b = MatMul(x, two) }>",
        c=np.array(True),
        one=weights[0],
        two=weights[1],
    )
    (node,) = model.graph
    for branch, name in (("then_branch", "one"), ("else_branch", "two")):
        inner = node.attributes[branch].as_graph()
        value = model.graph.initializers.pop(name)
        value.name = "q.weight"
        inner.initializers["q.weight"] = value
    model.forget_names()
    with pytest.raises(UsageError, match=r"2 graphs of the model have a constant 'q\.weight' of their own"):
        merge(model, write_adapter(tmp_path / "a", lora("q", 3, 4)))


def test_no_weight_is_proposed_to_two_modules(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    body = " ".join(f"h{i + 1} = MatMul(h{i}, {name})" for i, name in enumerate(("qa0", "ka0", "qa1", "ka1")))
    model = net(
        make_net,
        f"h0 = Identity(x) {body} y = Identity(h4)",
        sig="(float[N,4] x) => (float[N,4] y)",
        **{name: normal(4, 4) for name in ("qa0", "ka0", "qa1", "ka1")},
    )
    folder = write_adapter(
        tmp_path / "a", {**lora("l.0.q", 4, 4), **lora("l.1.q", 4, 4), **lora("qa1", 4, 4)}
    )
    model.graph.initializers["qa1"].name = "qa1.weight"
    with pytest.raises(UsageError) as caught:
        merge(model, folder)
    assert "of its shape are 'qa0', 'ka0' (map line: l.0.q = qa0)" in str(caught.value)
    assert "by shape and position it may be 'ka1'" in str(caught.value), "qa1 belongs to another module"
