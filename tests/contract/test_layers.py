"""Layers point one way, heavy packages are imported where they are used, only the CLI prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "ir": {"ir"},
    "models": {"ir", "models"},
    "passes": {"ir", "passes"},
    "backends": {"ir", "passes", "backends"},
    "effic": {"ir", "passes", "backends", "effic", "models"},
    "cli": {"ir", "passes", "backends", "effic", "cli", "models"},
}
# Scripts that are run by hand, with `python -m`, and so may print.
SCRIPTS = {"models/accuracy.py", "models/train_digits.py"}


def files() -> list[Path]:
    return [p for layer in MAY_IMPORT for p in sorted((ROOT / layer).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    for module in imported(path):
        parts = module.split(".")
        if parts[0] != "effic":
            assert parts[0] not in MAY_IMPORT, f"{module}: a bare import makes a second copy of every class"
            continue
        target = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "effic"
        assert target in MAY_IMPORT[layer], f"{layer} may not import {module}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    if name.startswith("cli/") or name in SCRIPTS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.exit", "exit", "os._exit"), f"{name} calls {called}"


@pytest.mark.parametrize("module", ["effic", "effic.cli.main", "effic.passes"])
def test_importing_is_cheap(module: str) -> None:
    heavy = {"onnx_ir", "onnx", "onnxruntime", "torch", "tvm", "numpy", "rich", "networkx", "sympy"}
    code = f"import sys, {module}; print(' '.join(m for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert not heavy & set(out.stdout.split())


def test_the_core_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnxscript'] = None\n"
        "from effic.models import digits_path\nimport effic\n"
        "report = effic.optimize(digits_path(), 'fuse-conv-bn')\nassert report.steps[0].passed\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_functions_stay_functions_when_their_modules_are_imported() -> None:
    import effic
    import effic.compare
    import effic.optimize

    assert callable(effic.optimize)
    assert callable(effic.compare)
    assert set(effic.__all__) >= {"optimize", "compare", "bench", "gate", "capture", "Model"}
    with pytest.raises(AttributeError):
        _ = effic.optimise  # type: ignore[attr-defined]
