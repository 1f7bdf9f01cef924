from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.errors import UnsupportedError
from effic.ir.sparsity import Pattern, nm_mask
from effic.passes.sparsify import nm_codec
from effic.passes.sparsify.nm_codec import Storage, decode, encode, storage_of

TWO_FOUR = Pattern(2, 4)

# Mishra et al., table of the positions of 2:4 groups; what has fewer than two non-zeros as well.
NIBBLES = {
    "1100": 0x4,
    "1010": 0x8,
    "0110": 0x9,
    "1001": 0xC,
    "0101": 0xD,
    "0011": 0xE,
    "0000": 0xE,
    "0001": 0xE,
    "0010": 0xE,
    "0100": 0xD,
    "1000": 0xC,
}


def form(n: int, m: int) -> Storage:
    found = storage_of(Pattern(n, m))
    assert isinstance(found, Storage)
    return found


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


@pytest.mark.parametrize(("text", "nibble"), NIBBLES.items())
def test_nibbles_of_two_of_four(text: str, nibble: int) -> None:
    kept = np.array([[character == "1" for character in text]])
    weight = np.arange(1, 5, dtype=np.float32)[None] * kept
    packed = encode(weight, kept, form(2, 4))
    assert packed.codes.tolist() == [nibble]
    first, second = nibble & 3, nibble >> 2
    assert first < second
    assert packed.values.tolist() == [[weight[0, first], weight[0, second]]]
    np.testing.assert_array_equal(decode(packed, form(2, 4), (1, 4)), weight)


def test_words_hold_quads_from_the_low_end() -> None:
    nibbles = np.array([[0x4, 0x8, 0x9, 0xC, 0xD, 0xE, 0x4, 0x4]], np.uint8)
    halves = nm_codec.metadata_words(nibbles, np.int16)
    assert [int(word) & 0xFFFF for word in halves[0]] == [0xC984, 0x44ED]
    (word,) = nm_codec.metadata_words(nibbles, np.int32)[0]
    assert int(word) & 0xFFFFFFFF == 0x44EDC984


@pytest.mark.parametrize(
    ("n", "m", "text", "bits"),
    [
        (2, 4, "4-bit positions", 1.0),
        (1, 4, "4-bit positions for 2 groups", 0.5),
        (1, 2, "4-bit positions for 4 groups", 0.5),
        (1, 8, "4-bit positions", 0.5),
        (2, 8, "8-bit positions", 1.0),
        (4, 8, "8-bit pattern numbers", 1.0),
        (3, 4, "4-bit pattern numbers for 2 groups", 0.5),
        (2, 16, "8-bit positions", 0.5),
        (4, 16, "4-bit positions", 1.0),
        (1, 256, "8-bit positions", 1 / 32),
    ],
)
def test_the_cheapest_form_is_taken(n: int, m: int, text: str, bits: float) -> None:
    found = form(n, m)
    assert str(found) == text
    assert found.index_bits == bits


def test_longer_groups_than_a_byte_can_count_are_refused() -> None:
    assert "256" in str(storage_of(Pattern(2, 257)))


def test_pattern_numbers_are_in_lexicographic_order() -> None:
    storage = Storage(TWO_FOUR, "pattern", 4, 1)
    order = ["1100", "1010", "1001", "0110", "0101", "0011"]
    kept = np.array([[c == "1" for c in text] for text in order])
    codes = nm_codec.codes_of(nm_codec.slots(kept, 2)[:, None], storage)
    assert codes.tolist() == [0, 1, 2, 3, 4, 5]
    assert nm_codec.table(storage).tolist() == [[c for c in range(4) if t[c] == "1"] for t in order]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4), (1, 2), (2, 8)])
def test_every_mask_of_a_group_has_its_code(n: int, m: int) -> None:
    storage = form(n, m)
    masks = np.array([mask for mask in itertools.product([False, True], repeat=m) if sum(mask) <= n])
    weight = masks * np.arange(1, m + 1, dtype=np.float32)
    packed = encode(weight, masks, storage)
    np.testing.assert_array_equal(decode(packed, storage, weight.shape), weight)
    full = masks[masks.sum(axis=1) == n]
    if storage.groups == 1:
        assert len(np.unique(encode(full.astype(np.float32), full, storage).codes)) == math.comb(m, n)


@st.composite
def sparse(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Pattern]:
    m = draw(st.sampled_from([2, 3, 4, 5, 8, 14, 16, 32, 100]))
    n = draw(st.integers(1, m - 1))
    rows, length = draw(st.integers(1, 6)), draw(st.integers(1, 3 * m + 2))
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    # All bits there are: NaNs with payloads, negative zeros, subnormals.
    size = np.dtype(dtype).itemsize
    raw = random.integers(0, 256, (rows, length * size), dtype=np.uint8).view(dtype).copy()
    raw[random.random(raw.shape) < 0.2] = 0
    if np.dtype(dtype).kind not in "iu":
        raw[random.random(raw.shape) < 0.1] = -0.0
    mask = nm_mask(random.random(raw.shape), Pattern(n, m))
    mask &= random.random(raw.shape) < 0.9
    return raw, mask, Pattern(n, m)


@given(sparse())
@settings(deadline=None, max_examples=150)
def test_decode_of_encode_is_the_masked_weight_bit_for_bit(
    case: tuple[np.ndarray, np.ndarray, Pattern],
) -> None:
    weight, mask, pattern = case
    storage = storage_of(pattern)
    assert isinstance(storage, Storage)
    packed = encode(weight, mask, storage)
    want = np.where(mask, bits_of(weight), 0)
    np.testing.assert_array_equal(bits_of(decode(packed, storage, weight.shape)), want)
    value_bits = 8 * weight.dtype.itemsize
    assert packed.values.nbytes * 8 + packed.codes.size * storage.width == storage.bits(
        *weight.shape, value_bits
    )


@given(sparse())
@settings(deadline=None, max_examples=100)
def test_without_a_mask_what_is_not_zero_is_kept(case: tuple[np.ndarray, np.ndarray, Pattern]) -> None:
    weight, mask, pattern = case
    weight = np.where(mask, weight, np.zeros((), weight.dtype))
    storage = storage_of(pattern)
    assert isinstance(storage, Storage)
    got = decode(encode(weight, None, storage), storage, weight.shape)
    # The mask had room for all of its negative zeros.
    np.testing.assert_array_equal(bits_of(got), bits_of(weight))
    assert nm_codec.lost_zeros(weight, pattern) == 0


def test_indices_ascend_in_every_group() -> None:
    mask = nm_mask(np.random.default_rng(0).random((64, 32)), Pattern(4, 8))
    places = nm_codec.slots(mask.reshape(-1, 8), 4).astype(int)
    assert (np.diff(places, axis=1) > 0).all()


def test_negative_zeros_beyond_the_free_slots_are_lost_and_counted() -> None:
    weight = np.array([[-0.0, -0.0, 3.0, -0.0], [1.0, -0.0, 2.0, -0.0]], np.float32)
    assert nm_codec.lost_zeros(weight, TWO_FOUR) == 2 + 2
    got = decode(encode(weight, None, form(2, 4)), form(2, 4), (2, 4))
    np.testing.assert_array_equal(got, weight)
    assert np.signbit(got).tolist() == [[True, False, False, False], [False] * 4]


@pytest.mark.parametrize(("n", "m", "count"), [(2, 4, 2), (1, 16, 3)])
def test_more_than_n_in_a_group_is_refused(n: int, m: int, count: int) -> None:
    weight = np.zeros((count + 3, m), np.float32)
    weight[:, :n] = 1
    weight[:count, n] = 1
    message = (
        rf"^{count} of {count + 3} groups keep more than {n} of {m} weights; prune the weight to {n}:{m}"
    )
    with pytest.raises(UnsupportedError, match=message):
        encode(weight, None, form(n, m))
    assert nm_codec.overfull(weight, None, Pattern(n, m)).sum() == count


def test_a_weight_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nm_codec, "_PIECE", 100)
    rng = np.random.default_rng(0)
    weight = np.where(nm_mask(rng.random((37, 30)), TWO_FOUR), rng.standard_normal((37, 30)), 0)
    packed = encode(weight, None, form(2, 4))
    np.testing.assert_array_equal(decode(packed, form(2, 4), weight.shape), weight)


@pytest.mark.parametrize(
    ("value_bits", "per_four"), [(32, 68), (16, 36), (8, 20), (4, 12)], ids=["fp32", "fp16", "int8", "int4"]
)
def test_bits_of_four_weights(value_bits: int, per_four: int) -> None:
    assert form(2, 4).bits(8, 64, value_bits) == per_four * 8 * 64 // 4
    assert ir.DataType.UINT4.bitwidth == form(2, 4).width
