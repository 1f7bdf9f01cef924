"""Imports that wait: none of them in a run that does not need them, all of them where they are needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx.parser
import onnx_ir as ir

from effic.ir.model import Model

MODEL = """<ir_version: 8, opset_import: ["": 18]>
g (float[batch, 4] x) => (float[batch, 4] y) { y = Relu(x) }"""

CODE = """
import sys
from effic.cli.main import main
try:
    main(["show", sys.argv[1]])
except SystemExit as ended:
    assert not ended.code
print("executed:", "sympy.core" in sys.modules)
import onnx_ir
print("sum:", onnx_ir.SymbolicDim("batch") + 1)
print("executed:", "sympy.core" in sys.modules)
import sympy
print("symbol:", sympy.Symbol("n") * 2)
"""


def test_sympy_is_executed_when_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    Model(ir.from_proto(onnx.parser.parse_model(MODEL))).save(path)
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("executed:")] == ["executed: False", "executed: True"]
    assert "sum: batch + 1" in lines
    assert "symbol: 2*n" in lines
