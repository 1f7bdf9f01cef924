"""What is merged is merged once, and can be taken out again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from effic.ir.errors import InvalidModelError, UnsupportedError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.onnx_format import read_onnx
from effic.ir.safetensors_format import read_safetensors, write_safetensors
from tests.passes.adapter_nets import (
    MakeNet,
    WriteAdapter,
    encoded_net,
    linear,
    lora,
    merge,
    normal,
    value_of,
)


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


@pytest.mark.parametrize("by", ["originals", "adapters"])
def test_a_branch_is_taken_away(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, by: str
) -> None:
    model, x = encoded_net(make_net, normal(64, 48), "bits=4,group_size=32"), normal(5, 64)
    before, nodes = Oracle(model).run({"x": x})["y"], [node.op_type for node in model.graph]
    first, second = (write_adapter(tmp_path / name, lora("q", 48, 64)) for name in "ab")
    kept = tmp_path / "kept.safetensors"
    merge(model, first, requantize="keep_branch", keep_original=kept)
    once = Oracle(model).run({"x": x})["y"]
    merge(model, second, requantize="keep_branch")
    model.save(tmp_path / "m.onnx")
    model = read_onnx(tmp_path / "m.onnx")
    remarks = merge(model, second, name="unmerge-lora")
    assert [r.text for r in remarks.items] == ["the branch beside it is taken away"]
    assert np.array_equal(Oracle(model).run({"x": x})["y"], once)
    if by == "originals":
        merge(model, [], name="unmerge-lora", originals=kept)
    else:
        merge(model, first, name="unmerge-lora")
    assert [node.op_type for node in model.graph] == nodes
    assert np.array_equal(Oracle(model).run({"x": x})["y"], before)
    assert not [name for name in model.graph.initializers if "lora" in name]


def test_a_branch_that_is_gone(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    model = encoded_net(make_net, normal(64, 48), "bits=4,group_size=32")
    folder = write_adapter(tmp_path / "a", lora("q", 48, 64))
    merge(model, folder, requantize="keep_branch")
    for node in model.graph:
        node.metadata_props.pop("effic.lora_branch", None)
    with pytest.raises(InvalidModelError, match="not to be found any more"):
        merge(model, folder, name="unmerge-lora")


def test_originals_that_are_damaged(make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path) -> None:
    """The model's record is of whoever wrote the model, and may vouch for any file."""
    model = encoded_net(make_net, normal(64, 48), "bits=4,group_size=32")
    kept = tmp_path / "kept.safetensors"
    merge(model, write_adapter(tmp_path / "a", lora("q", 48, 64)), keep_original=kept)
    file = read_safetensors(kept)
    for text in ("[", "[]", '{"q.weight": {}}', '{"q.weight": {"type": 3}}'):
        write_safetensors(kept, {k: np.array(v) for k, v in file.tensors.items()}, {"effic.encodings": text})
        (record,) = json.loads(model.ir.metadata_props["effic.adapters"])
        record["originals"] = hashlib.sha256(kept.read_bytes()).hexdigest()
        other = model.clone()
        other.ir.metadata_props["effic.adapters"] = json.dumps([record])
        with pytest.raises(InvalidModelError, match="or is damaged; nothing was restored"):
            merge(other, [], name="unmerge-lora", originals=kept)
