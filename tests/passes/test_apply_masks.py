"""apply-masks: masks from files, as booleans and as numbers of patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.sparsity import Pattern, by_reduction, declared, nm_mask
from effic.ir.weights import weight_sites
from effic.passes.base import Remark, Remarks
from effic.passes.sparsify.apply_masks import ApplyMasks
from effic.passes.sparsify.mask_files import patterns_of

MakeNet = Callable[..., Model]


def net(make_net: MakeNet, channels: int = 8) -> Model:
    rng = np.random.default_rng(0)
    return make_net(
        f"(float[N,{channels},6,6] x) => (float[N,3,4,4] y)",
        "a = Conv(x, c) b = Transpose<perm=[0,2,3,1]>(a) d = MatMul(b, w) y = Transpose<perm=[0,3,1,2]>(d)",
        c=rng.standard_normal((12, channels, 3, 3)).astype(np.float32),
        w=rng.standard_normal((12, 3)).astype(np.float32),
    )


def apply(model: Model, path: Path) -> list[Remark]:
    remarks = Remarks()
    ApplyMasks(masks=str(path)).apply(model, remarks)
    return [r for r in remarks.items if r.where != "the model"]


def values(model: Model) -> dict[str, np.ndarray]:
    return {site.name: site.read() for site in weight_sites(model)}


def test_patterns_are_numbered_as_published() -> None:
    want = ["1100", "1010", "1001", "0110", "0101", "0011"]
    assert ["".join(map(str, row.astype(int))) for row in patterns_of(Pattern(2, 4))] == want
    assert len(patterns_of(Pattern(1, 4))) == 4
    with pytest.raises(UsageError, match="too many masks"):
        patterns_of(Pattern(16, 32))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("form", ["bool", "uint8", "numbers"])
def test_masks_of_either_form_from_either_file(
    make_net: MakeNet, tmp_path: Path, suffix: str, form: str
) -> None:
    model = net(make_net)
    before, rng = values(model), np.random.default_rng(1)
    want, arrays = {}, {}
    for site in weight_sites(model):
        rows = by_reduction(site, site.read())
        mask = nm_mask(rng.random(rows.shape), Pattern(2, 4))
        stored = {
            "c": lambda m: m.reshape(12, 9, 8).transpose(0, 2, 1).reshape(12, 8, 3, 3),
            "w": lambda m: m.T,
        }
        if form == "numbers":
            groups = mask.reshape(-1, 1, 4)
            arrays[site.name] = (groups == patterns_of(Pattern(2, 4))).all(axis=2).argmax(axis=1)
            arrays[site.name] = arrays[site.name].reshape(len(rows), -1).astype(np.int64)
        else:
            arrays[site.name] = np.ascontiguousarray(stored[site.name](mask)).astype(form)
        want[site.name] = stored[site.name](mask)
    path = tmp_path / f"masks{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    remarks = apply(model, path)
    assert [r.kind for r in remarks] == ["passed", "passed"], remarks
    after = values(model)
    np.testing.assert_array_equal(after["w"], np.where(want["w"].T, before["w"], 0))
    np.testing.assert_array_equal(after["c"], np.where(want["c"].reshape(12, -1), before["c"], 0))
    assert declared(model) == {"c": Pattern(2, 4), "w": Pattern(2, 4)}
    assert [r.text for r in apply(model, path)] == ["is zero already wherever its mask is"] * 2


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 4), (2, 4), (1, 2), (3, 8)]))
def test_numbers_and_booleans_say_the_same(seed: int, pattern: tuple[int, int]) -> None:
    one = Pattern(*pattern)
    table = patterns_of(one)
    mask = nm_mask(np.random.default_rng(seed).random((5, 3 * one.m)), one)
    numbers = (mask.reshape(-1, 1, one.m) == table).all(axis=2).argmax(axis=1)
    np.testing.assert_array_equal(table[numbers].reshape(mask.shape), mask)


def test_masks_that_do_not_fit_are_refused_with_their_reason(make_net: MakeNet, tmp_path: Path) -> None:
    model = net(make_net)
    before = values(model)
    path = tmp_path / "masks.npz"

    def reason(**arrays: np.ndarray) -> str:
        np.savez(path, **arrays)
        (remark,) = apply(model, path)
        assert remark.kind == "missed"
        return remark.text

    assert reason(w=np.ones((12, 3), bool)) == "its mask keeps more than 2:4 in 9 of 9 groups"
    assert "has the shape [3, 12]" in reason(w=np.ones((3, 12), bool))
    assert "other values than 0 and 1" in reason(w=np.full((12, 3), 2))
    assert "otherwise than from 0 to 5" in reason(w=np.full((3, 3), 6))
    assert "is no weight of the model" in reason(nobody=np.ones((3, 3), bool))
    for name, array in values(model).items():
        np.testing.assert_array_equal(array, before[name])
    assert declared(model) == {}


@pytest.mark.parametrize("name", ["none.npz", "none.safetensors", "masks.txt", "bad.npz", "bad.safetensors"])
def test_files_that_are_none_are_refused(make_net: MakeNet, tmp_path: Path, name: str) -> None:
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"no masks in here, none at all")
    with pytest.raises(UsageError, match=r"masks"):
        apply(net(make_net), tmp_path / name)


def npz(path: Path, method: int, *, flags: int = 0) -> None:
    """An archive that names a compression method in its table of contents that nobody has."""
    np.savez(path, w=np.ones((4, 4), bool))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8], data[at + 10] = flags, method
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["empty", "unknown compression", "encrypted", "records", "float8"])
def test_hostile_files_are_refused_in_a_sentence(make_net: MakeNet, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("masks.safetensors" if kind == "float8" else "masks.npz")
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "records":
        np.savez(path, w=np.zeros((96, 64), [("a", "i4")]))
    elif kind == "float8":
        header = b'{"w":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    else:
        npz(path, 99 if kind == "unknown compression" else 8, flags=kind == "encrypted")
    with pytest.raises(UsageError, match="the masks in") as caught:
        apply(net(make_net), path)
    assert "\n" not in str(caught.value)
