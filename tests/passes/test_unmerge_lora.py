"""What is merged is merged once, and can be taken out again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.onnx_format import read_onnx
from tests.passes.adapter_nets import MakeNet, WriteAdapter, linear, lora, merge, normal, value_of


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
