"""Adapters from the command line: one sentence and exit code 2 for all that is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.passes.adapter_nets import MakeNet, WriteAdapter, linear, lora


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
