"""The commands of the page on adapters, run in order on a small model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from effic.cli.main import main
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
LAYERS = ("layers.0.query", "layers.0.key")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + shape[0]).standard_normal(shape).astype(np.float32)


def two_layers(first: str, second: str) -> Model:
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, one) y = MatMul(h, two) }"""
    proto = onnx.parser.parse_model(text)
    for node, name in zip(proto.graph.node, (first, second), strict=True):
        node.input[1] = name
        proto.graph.initializer.append(numpy_helper.from_array(normal(64, 64), name))
    return Model(ir.from_proto(proto))


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code, arguments


def test_the_commands_of_the_page_run(
    write_adapter: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two_layers(*(f"{name}.weight" for name in LAYERS)).save("base.onnx")
    two_layers("onnx::MatMul_12", "onnx::MatMul_13").save("renamed.onnx")
    for number, folder in enumerate(("legal", "style", "named")):
        tensors = {}
        for layer in LAYERS:
            tensors[f"{layer}.lora_A.weight"] = normal(2, 64) * (number + 1)
            tensors[f"{layer}.lora_B.weight"] = normal(64, 2)
        write_adapter(tmp_path / folder, tensors)
    text = PAGE.read_text()
    (names,) = re.findall(r"```text\n(# names\.map.*?)```", text, re.S)
    Path("names.map").write_text(names.replace("classifier.weight = -\n", ""))
    run("optimize", "base.onnx", "--passes", "quantize-rtn{bits=4,group_size=32,min_size=0}", "-o", "int4.onnx",
        "--target", "portable")  # fmt: skip
    run("optimize", "base.onnx", "--passes", "merge-lora{adapters=[legal]}", "-o", "plain.onnx")
    run("optimize", "base.onnx", "--passes", "merge-lora{adapters=[style]}", "-o", "tuned.onnx")
    commands = [
        line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines() if line
    ]
    assert len(commands) > 10
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "effic"
        run(*arguments, *(["--force"] if arguments[0] == "optimize" else []))
    base, restored = read_onnx("base.onnx"), read_onnx("restored.onnx")
    for name, value in base.graph.initializers.items():
        other = restored.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        np.testing.assert_allclose(other.numpy(), value.const_value.numpy(), rtol=0, atol=1e-5)
