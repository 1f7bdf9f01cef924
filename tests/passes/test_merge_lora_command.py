"""Adapters from the command line: one sentence and exit code 2 for all that is wrong with them."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from effic.ir.safetensors_format import write_safetensors
from tests.passes.adapter_nets import MakeNet, WriteAdapter, linear, lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def run(*arguments: str) -> int:
    from effic.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_a_hostile_adapter_is_one_sentence_and_exit_code_2(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear(make_net).save(tmp_path / "m.onnx")
    folder = Path(write_adapter(tmp_path / "an adapter", lora("q", 3, 4)))
    arguments = ["optimize", str(tmp_path / "m.onnx"), "--output", str(tmp_path / "out.onnx"), "--passes"]
    passes = f'merge-lora{{adapters=["{folder}"]}}'
    assert run(*arguments, passes) == 0
    (tmp_path / "out.onnx").unlink()
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-4])
    capsys.readouterr()
    assert run(*arguments, passes) == 2
    error = capsys.readouterr().err.strip()
    assert "is cut short" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.onnx").exists()


def test_a_map_by_a_flag(
    make_net: MakeNet, write_adapter: WriteAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = linear(make_net)
    model.graph.initializers["q.weight"].name = "w_1"
    model.save(tmp_path / "m.onnx")
    folder = write_adapter(tmp_path / "a", lora("q", 3, 4))
    merging = f'merge-lora{{adapters=["{folder}"]}}'
    arguments = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out.onnx"), "--passes"]
    assert run(*arguments, merging) == 2
    assert "map line: q = w_1" in capsys.readouterr().err
    (tmp_path / "map").write_text("q = w_1\n")
    flag = ["--lora-map", str(tmp_path / "map")]
    assert run(*arguments, "fuse-conv-bn", *flag) == 2
    assert "--lora-map does nothing without merge-lora" in capsys.readouterr().err
    assert run(*arguments, f'merge-lora{{adapters=["{folder}"],map=other}}', *flag) == 2
    assert "has a map already, map=other" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
    assert run(*arguments, f"fuse-conv-bn,{merging}", *flag) == 0
    assert (tmp_path / "out.onnx").exists()


class _Payload:
    """Runs a command when it is unpickled by anything that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("pwned",)


def _pickle(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"q.lora_A.weight": _Payload()}))


def _link(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/etc/passwd")


def _pipe(folder: Path) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def _header(text: bytes, length: int | None = None, rest: bytes = b"") -> Callable[[Path], object]:
    data = struct.pack("<Q", len(text) if length is None else length) + text + rest
    return lambda folder: (folder / TENSORS).write_bytes(data)


def _tensors(**changed: np.ndarray) -> Callable[[Path], object]:
    tensors = {**lora("q", 3, 4), **{key.replace("__", "."): value for key, value in changed.items()}}
    return lambda folder: write_safetensors(folder / TENSORS, tensors)


def _config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_text(text)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pickled object": _pickle,
    "a link out of the folder": _link,
    "a pipe": _pipe,
    "NaN": _tensors(q__lora_A__weight=np.full((2, 4), np.nan, np.float32)),
    "a product that overflows": _tensors(
        q__lora_A__weight=np.full((2, 4), 1e30, np.float32),
        q__lora_B__weight=np.full((3, 2), 1e30, np.float32),
    ),
    "numbers of fp64": _tensors(q__lora_A__weight=np.full((2, 4), 1e300)),
    "integers": _tensors(q__lora_A__weight=np.ones((2, 4), np.int32)),
    "a name with NUL": _tensors(**{"q\0__weight": np.ones((2, 4), np.float32)}),
    "a name without end": _tensors(**{"q__" * 9000 + "weight": np.ones((2, 4), np.float32)}),
    "a header of exabytes": _header(b"{}", 1 << 62),
    "a header of brackets": _header(b"[" * 100_000),
    "a name twice": _header(b'{"a": {}, "a": {}}'),
    "an impossible shape": _header(
        b'{"q.lora_A.weight": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}'
    ),
    "a configuration of brackets": _config("[" * 100_000),
    "a field twice": _config('{"peft_type": "LORA", "r": 2, "r": 3}'),
    "a field that steers the terminal": _config('{"peft_type": "LORA", "r": 2, "\\u001b[2J\\n": 1}'),
    "a pattern that is none inside brackets": _config(
        json.dumps({"peft_type": "LORA", "r": 2, "rank_pattern": {"(?i)q": 2}})
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(
    make_net: MakeNet,
    write_adapter: WriteAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    if case == "a pickled object":
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    linear(make_net).save(tmp_path / "m.onnx")
    HOSTILE[case](Path(write_adapter(tmp_path / "a", lora("q", 3, 4))))
    before = sorted(tmp_path.rglob("*"))
    merging = "merge-lora{adapters=[a],keep_original=kept.safetensors}"
    assert run("optimize", "m.onnx", "--check", "off", "-o", "out.onnx", "--passes", merging) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("effic: error: ")
    assert error.isprintable(), "one line, and no control characters"
    assert len(error) < 700
    assert sorted(tmp_path.rglob("*")) == before
