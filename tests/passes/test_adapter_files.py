"""Adapter folders: what is read, and everything that is refused, in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effic.ir.errors import EfficError, InvalidModelError, UsageError
from effic.ir.safetensors_format import read_safetensors, write_safetensors
from effic.passes.adapters.adapter_files import read_adapter

WriteAdapter = Callable[..., str]

A = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
B = np.arange(6, dtype=np.float32).reshape(3, 2) / 8
PAIR = {"q.lora_A.weight": A, "q.lora_B.weight": B}


def test_a_lora_module(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "my", PAIR))
    module = adapter.modules["q"]
    assert (adapter.name, module.kind, module.rank, module.scaling) == ("my", "linear", 2, 2.0)
    assert module.a is not None
    assert np.array_equal(module.a, A)
    assert not module.a.flags.writeable


def test_ranks_and_alphas_by_pattern(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    tensors = {
        "l.0.q.lora_A.weight": A,
        "l.0.q.lora_B.weight": B,
        "l.1.q.lora_A.weight": A[:1],
        "l.1.q.lora_B.weight": B[:, :1],
    }
    folder = write_adapter(
        tmp_path / "a", tensors, rank_pattern={"l.1.q": 1}, alpha_pattern={r"\d+\.q": 8}, use_rslora=True
    )
    modules = read_adapter(folder).modules
    assert modules["l.1.q"].scaling == 8
    assert modules["l.0.q"].scaling == pytest.approx(8 / 2**0.5)


def test_the_first_pattern_wins(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    folder = write_adapter(tmp_path / "a", PAIR, alpha_pattern={"q": 6, ".*q": 10})
    assert read_adapter(folder).modules["q"].scaling == 3


@pytest.mark.parametrize("name", ["q.lora_A.default.weight", "base_model.model.q.lora_A.weight"])
def test_names_left_in_keys(tmp_path: Path, write_adapter: WriteAdapter, name: str) -> None:
    folder = write_adapter(tmp_path / "a", {name: A, "q.lora_B.weight": B})
    assert set(read_adapter(folder).modules) == {"q"}


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
def test_dora_and_embedding_keys(tmp_path: Path, write_adapter: WriteAdapter, end: str) -> None:
    tensors = {
        "e.lora_embedding_A": A,
        "e.lora_embedding_B": B,
        f"e.{end}": np.ones(3, np.float32),
    }
    module = read_adapter(write_adapter(tmp_path / "a", tensors, use_dora=True)).modules["e"]
    assert module.kind == "embedding"
    assert module.use_dora


def test_replacements_and_rows(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    tensors = {
        **PAIR,
        "q.base_layer.bias": np.zeros(3, np.float32),
        "head.modules_to_save.default.weight": np.zeros((2, 2), np.float32),
        "emb.token_adapter.trainable_tokens_delta": np.ones((2, 4), np.float32),
    }
    adapter = read_adapter(
        write_adapter(tmp_path / "a", tensors, bias="lora_only", trainable_token_indices={"emb": [5, 1]})
    )
    assert set(adapter.replacements) == {"q.bias", "head.weight"}
    assert adapter.rows["emb"][0].tolist() == [5, 1]


def test_expert_parameters(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    tensors = {
        "m.experts.lora_A.weight": np.zeros((6, 4), np.float32),
        "m.experts.lora_B.weight": np.zeros((5, 6), np.float32),
    }
    folder = write_adapter(tmp_path / "a", tensors, target_parameters=["experts.up"])
    module = read_adapter(folder).modules["m.experts"]
    assert (module.kind, module.experts, module.rank) == ("expert", 3, 2)
    assert module.parameters == ("m.experts.up",)


def test_other_methods(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    paca = {"q.paca_w": B, "q.paca_indices": np.array([3, 0])}
    module = read_adapter(write_adapter(tmp_path / "p", paca, peft_type="PACA", paca_alpha=8)).modules["q"]
    assert (module.method, module.rank, module.scaling) == ("paca", 2, 4.0)
    s2 = {"q.s2": A, "q.s2_axis": np.array(0), "q.s2_start": np.array(1), "q.s2_order": np.array([2, 0, 1])}
    module = read_adapter(write_adapter(tmp_path / "s", s2, peft_type="S2FT")).modules["q"]
    assert (module.method, module.rank) == ("s2ft", 2)
    svfit = {
        "q.svfit_u": B,
        "q.svfit_v": A.T,
        "q.svfit_sigma": np.ones(2, np.float32),
        "q.svfit_sigma0": np.ones(2, np.float32),
    }
    assert read_adapter(write_adapter(tmp_path / "v", svfit, peft_type="SVFIT")).modules["q"].rank == 2
    l4q = {**PAIR, "q.l4q_scale": np.ones((3, 2), np.float32), "q.l4q_offset": np.zeros((3, 2), np.float32)}
    module = read_adapter(write_adapter(tmp_path / "l", l4q, peft_type="L4Q", bits=3)).modules["q"]
    assert int(module.extra["bits"].item()) == 3


def test_a_bf16_bin_file(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    torch = pytest.importorskip("torch")
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    (folder / "adapter_model.safetensors").unlink()
    tensors = {f"base_model.model.{k}": torch.from_numpy(v).to(torch.bfloat16) for k, v in PAIR.items()}
    torch.save(tensors, folder / "adapter_model.bin")
    a = read_adapter(folder).modules["q"].a
    assert a is not None
    assert a.dtype == ml_dtypes.bfloat16


def test_an_empty_tensor_of_impossible_size(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    header = json.dumps({"q": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InvalidModelError, match="impossible shape"):
        read_adapter(folder)


def test_the_digest_is_of_config_and_tensors(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    one = read_adapter(write_adapter(tmp_path / "a", PAIR))
    same = read_adapter(write_adapter(tmp_path / "b", PAIR))
    other = read_adapter(write_adapter(tmp_path / "c", PAIR, lora_alpha=5))
    assert one.digest == same.digest != other.digest


NAN = np.full_like(A, np.nan)
REFUSED_TENSORS: dict[str, tuple[dict[str, np.ndarray], dict[str, object], str]] = {
    "a without b": ({"q.lora_A.weight": A}, {}, r"'q' has lora_A.weight but no lora_B.weight"),
    "b without a": ({"q.lora_B.weight": B}, {}, r"no lora_A.weight"),
    "nan": ({**PAIR, "q.lora_A.weight": NAN}, {}, "NaN, infinity"),
    "infinity": ({**PAIR, "q.lora_B.weight": np.full_like(B, np.inf)}, {}, "NaN, infinity"),
    "integers": ({**PAIR, "q.lora_A.weight": A.astype(np.int8)}, {}, "of type int8"),
    "shapes": ({"q.lora_A.weight": A, "q.lora_B.weight": B.T}, {}, "do not fit one another"),
    "empty": ({"q.lora_A.weight": A[:0], "q.lora_B.weight": B[:, :0]}, {}, "do not fit one another"),
    "rank of the config": (PAIR, {"r": 4}, "has rank 2, but the configuration says 4"),
    "unknown tensor": (
        {**PAIR, "q.lora_C.weight": A},
        {},
        "'base_model.model.q.lora_C.weight' is of no kind",
    ),
    "magnitude without dora": ({**PAIR, "q.lora_magnitude_vector": A[0, :3]}, {}, "use_dora is false"),
    "dora without magnitude": (PAIR, {"use_dora": True}, "lacks a magnitude"),
    "long magnitude": ({**PAIR, "q.lora_magnitude_vector": A[0]}, {"use_dora": True}, "do not fit"),
    "bias missing": (PAIR, {"lora_bias": True}, "lacks lora_B.bias"),
    "rows without numbers": (
        {"e.token_adapter.trainable_tokens_delta": A},
        {"trainable_token_indices": [1]},
        "do not say which",
    ),
    "two of one": ({**PAIR, "q.lora_A.default.weight": A}, {}, "is there twice"),
    "indices beyond": (
        {"q.paca_w": B, "q.paca_indices": np.array([1, 1])},
        {"peft_type": "PACA"},
        "do not fit one another",
    ),
    "other method's": (PAIR, {"peft_type": "PACA"}, "no paca_indices"),
    "nothing": ({}, {}, "holds no tensors"),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_refused_tensors(tmp_path: Path, write_adapter: WriteAdapter, case: str) -> None:
    tensors, config, message = REFUSED_TENSORS[case]
    with pytest.raises(InvalidModelError, match=message):
        read_adapter(write_adapter(tmp_path / "a", tensors, **config))


REFUSED_CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config routes every token"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens acts on a part"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "replication": ({"layer_replication": [[0, 4]]}, "layer_replication"),
    "unknown": ({"use_wonder": True}, "use_wonder is set"),
    "rank": ({"r": 0}, "r is 0"),
    "rank of a wrong type": ({"r": "8"}, "r is '8'"),
    "rank true": ({"r": True}, "r is True"),
    "alpha": ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "flag": ({"use_dora": "yes"}, "use_dora is 'yes'"),
    "bias": ({"bias": "some"}, "bias is 'some'"),
    "init": ({"init_lora_weights": "magic"}, "init_lora_weights is 'magic'"),
    "pattern": ({"rank_pattern": {"(": 2}}, "no regular expression"),
    "slow pattern": ({"rank_pattern": {"(a+)+b": 2}}, "repeats too much"),
    "pattern's rank": ({"rank_pattern": {"q": -1}}, "rank_pattern"),
    "indices": ({"trainable_token_indices": [-1]}, "no lists of row numbers"),
    "modules": ({"modules_to_save": "head"}, "modules_to_save"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_refused_configurations(tmp_path: Path, write_adapter: WriteAdapter, case: str) -> None:
    config, message = REFUSED_CONFIGS[case]
    with pytest.raises(InvalidModelError, match=message):
        read_adapter(write_adapter(tmp_path / "a", PAIR, **config))


def test_null_and_false_fields_say_nothing(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    read_adapter(write_adapter(tmp_path / "a", PAIR, arrow_config=None, use_wonder=False, kasa_config={}))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"peft_type": ' + "[" * 100_000, "\x00\xff"])
def test_broken_configurations(tmp_path: Path, write_adapter: WriteAdapter, text: str) -> None:
    folder = write_adapter(tmp_path / "a", PAIR)
    (Path(folder) / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InvalidModelError):
        read_adapter(folder)


def test_missing_files(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        read_adapter(tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no adapter_config.json"):
        read_adapter(tmp_path)
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model.safetensors"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_out_of_the_folder(tmp_path: Path, write_adapter: WriteAdapter, name: str) -> None:
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    os.rename(folder / name, tmp_path / name)
    os.symlink(tmp_path / name, folder / name)
    with pytest.raises(InvalidModelError, match="link that leaves its folder"):
        read_adapter(folder)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    snapshot = Path(write_adapter(tmp_path / "repo" / "snapshots" / "abc", PAIR))
    blobs = tmp_path / "repo" / "blobs"
    blobs.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        os.rename(snapshot / name, blobs / name)
        os.symlink(f"../../blobs/{name}", snapshot / name)
    assert read_adapter(snapshot).modules


def test_a_folder_for_a_file_and_a_pipe(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(InvalidModelError, match="no regular file"):
        read_adapter(folder)


class Payload:
    """What a hostile pickle carries."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def test_a_pickle_is_not_executed(tmp_path: Path, write_adapter: WriteAdapter, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"q.lora_A.weight": Payload()}, folder / "adapter_model.bin")
    with pytest.raises(InvalidModelError, match="something else than tensors"):
        read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InvalidModelError, match="something else than tensors"):
        read_adapter(folder)
    assert not (tmp_path / "pwned").exists()


def header(table: object, payload: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty": b"",
    "short": b"abc",
    "huge header": struct.pack("<Q", 1 << 60) + b"{}",
    "no json": header(b"{{{{"),
    "deep json": header(b"[" * 200_000),
    "a list": header([1, 2]),
    "twice": header(b'{"a": {}, "a": {}}'),
    "metadata": header({"__metadata__": 3}),
    "no entry": header({"a": 3}),
    "unknown dtype": header({"a": entry("F7")}, b"x" * 8),
    "negative shape": header({"a": entry(shape=(-2,))}, b"x" * 8),
    "shape of texts": header({"a": entry(shape=("2",))}, b"x" * 8),
    "shape true": header({"a": entry(shape=(True, 2))}, b"x" * 8),
    "too many bytes": header({"a": entry(shape=(1 << 40, 1 << 40))}, b"x" * 8),
    "offsets out of range": header({"a": entry(offsets=(8, 16))}, b"x" * 8),
    "offsets backwards": header({"a": entry(offsets=(8, 0))}, b"x" * 8),
    "overlap": header({"a": entry(), "b": entry(offsets=(4, 12))}, b"x" * 12),
    "gap": header({"a": entry(), "b": entry(offsets=(12, 20))}, b"x" * 20),
    "truncated": header({"a": entry()}, b"x" * 7),
    "trailing": header({"a": entry()}, b"x" * 9),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(tmp_path: Path, write_adapter: WriteAdapter, case: str) -> None:
    folder = write_adapter(tmp_path / "a", PAIR)
    (Path(folder) / "adapter_model.safetensors").write_bytes(BROKEN[case])
    with pytest.raises((InvalidModelError, UsageError)) as caught:
        read_adapter(folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1), byte=st.integers(0, 255), cut=st.floats(0, 1))
def test_damaged_adapters_end_in_one_sentence(
    tmp_path: Path, write_adapter: WriteAdapter, at: float, byte: int, cut: float
) -> None:
    folder = write_adapter(tmp_path / "a", PAIR)
    path = Path(folder) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] = byte
    path.write_bytes(bytes(data[: max(1, int(cut * len(data)))] if cut < 0.5 else data))
    refusal: EfficError | None = None
    try:
        read_adapter(folder)
    except EfficError as error:
        refusal = error
    assert refusal is None or (refusal.exit_code == 2 and "\n" not in str(refusal))


def test_safetensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(3, ml_dtypes.bfloat16),
        "scalar": np.array(3),
        "none": np.zeros((0, 4), np.float16),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    found, metadata, _ = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"}
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "r": 2, "r": 4}', "has the field 'r' twice"),
        ('{"peft_type": "LORA", "r": 2, "rank_pattern": {"q": 1, "q": 2}}', "has the field 'q' twice"),
        ('{"peft_type": "LORA", "r": 2, "rank_pattern": {"(?i)q": 1}}', "is no regular expression"),
        ('{"peft_type": "LORA", "r": 2, "alpha_pattern": {"a)|(b": 1}}', "is no regular expression"),
        (r'{"peft_type": "LORA", "r": 2, "\u001b[31m\n": 1}', r"'\\x1b\[31m\\n' is set"),
        ('{"peft_type": "LORA", "r": 2, "%s": 1}' % ("x" * 5000), "is set, and what it means is not known"),
    ],
)
def test_configurations_that_readers_would_take_differently(
    tmp_path: Path, write_adapter: WriteAdapter, text: str, message: str
) -> None:
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidModelError, match=message) as caught:
        read_adapter(folder)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("rows", [[], [1 << 70], {"e": [3, 1 << 63]}])
def test_rows_that_are_none(tmp_path: Path, write_adapter: WriteAdapter, rows: object) -> None:
    count = 2 if isinstance(rows, dict) else len(rows)  # type: ignore[arg-type]
    tensors = {"e.token_adapter.trainable_tokens_delta": np.ones((count, 4), np.float32)}
    with pytest.raises(InvalidModelError, match="trainable_token_indices"):
        read_adapter(write_adapter(tmp_path / "a", tensors, trainable_token_indices=rows))


@pytest.mark.parametrize(
    "name", ["q\0.lora_A.weight", "q\nerror.lora_A.weight", "\x1b[2Jq.lora_A.weight", "q." * 9000 + "weight"]
)
def test_names_that_would_steer_a_terminal(tmp_path: Path, write_adapter: WriteAdapter, name: str) -> None:
    with pytest.raises(InvalidModelError, match="is longer than names are, or no text") as caught:
        read_adapter(write_adapter(tmp_path / "a", {name: A, "q.lora_B.weight": B}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_numbers_that_single_precision_lacks(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    """They would become infinite where sums are computed; the norm of that was taken for nothing."""
    tensors = {"q.lora_A.weight": np.full((2, 4), 1e300), "q.lora_B.weight": B}
    with pytest.raises(InvalidModelError, match="numbers beyond fp32"):
        read_adapter(write_adapter(tmp_path / "a", tensors))


def _expanded(torch: Any) -> Any:
    return torch.zeros(1).expand(1 << 40)


@pytest.mark.parametrize(
    "tensor",
    [
        _expanded,
        lambda torch: torch.zeros(2, 4, dtype=torch.float8_e4m3fn),
        lambda torch: torch.zeros(2, 4, dtype=torch.complex64),
        lambda torch: torch.zeros(2, 4, device="meta"),
    ],
    ids=["terabytes", "float8", "complex", "meta"],
)
def test_tensors_of_a_bin_file_that_are_none(
    tmp_path: Path, write_adapter: WriteAdapter, tensor: Callable[[Any], Any]
) -> None:
    torch = pytest.importorskip("torch")
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"q.lora_A.weight": tensor(torch)}, folder / "adapter_model.bin")
    with pytest.raises(InvalidModelError, match=r"which is no tensor of an adapter|holds something else"):
        read_adapter(folder)


def test_a_compressed_bin_file(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    torch = pytest.importorskip("torch")
    folder = Path(write_adapter(tmp_path / "a", PAIR))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"q.lora_A.weight": torch.zeros(1 << 16)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for item in plain.namelist():
            packed.writestr(item, plain.read(item))
    with pytest.raises(InvalidModelError, match="is compressed"):
        read_adapter(folder)
