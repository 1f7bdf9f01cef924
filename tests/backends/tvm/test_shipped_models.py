"""Every model that comes with effic, on tvm-cpu: the folder, the cross-check, several and odd sizes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason="needs the tvm extra")

import effic
from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.coverage import coverage
from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.evaluate import Oracle, compare_outputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.models.builders import BUILDERS
from tests.backends.tvm.module_runs import CPU
from tests.backends.tvm.shipped_runs import TOLERANCE, build_here, check_across, check_folder

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "models" / "digits.onnx"
REFUSED = {"control_flow"}
NAMES = [*sorted(BUILDERS.keys() - REFUSED), "digits"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("models"), {"digits": DIGITS}
    for name, make in BUILDERS.items():
        found[name] = folder / f"{name}.onnx"
        Model(make()).save(found[name])
    return found


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    build_here(monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_gives_the_oracles_outputs(paths: dict[str, Path], name: str, tmp_path: Path) -> None:
    check_folder(paths[name], tmp_path / "out.tvm")


@pytest.mark.parametrize("name", NAMES)
def test_targets_agree_node_by_node(paths: dict[str, Path], name: str) -> None:
    model = read_onnx(paths[name])
    names = list(check_across(paths[name], taps=True).outputs)
    assert len(names) > len(model.graph.outputs)
    assert names[-len(model.graph.outputs) :] == [value.name for value in model.graph.outputs]


@pytest.mark.parametrize("name", ["cnn", "llama", "digits"])
def test_targets_agree_per_output(paths: dict[str, Path], name: str) -> None:
    assert list(check_across(paths[name], taps=False).outputs) == [
        value.name for value in read_onnx(paths[name]).graph.outputs
    ]


def documented(pages: str = "docs/tvm.md") -> dict[str, set[str]]:
    """The table of models in the page: what is refused in each."""
    text = (ROOT / pages).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| (runs|refused: .*?) \|$", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", what)) for name, what in rows}


def test_the_pages_table_of_models_is_true(paths: dict[str, Path]) -> None:
    table = documented()
    for name, path in paths.items():
        assert table[name] == {one.op for one in coverage(read_onnx(path), CPU)}, name


def test_what_is_refused_leaves_nothing(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"If '.*Loop '.*use the target ort-cpu"):
        effic.optimize(
            paths["control_flow"], "eliminate-dead-code", output=tmp_path / "out.tvm", target="tvm-cpu"
        )
    assert not list(tmp_path.iterdir())


# -- sizes ----------------------------------------------------------------------------------------


def test_several_sizes_of_a_transformer(paths: dict[str, Path], tmp_path: Path) -> None:
    folder, oracle = tmp_path / "out.tvm", Oracle(read_onnx(paths["encoder"]))
    target = 'tvm-cpu{shapes="batch=1,sequence=64;batch=8,sequence=64;batch=3,sequence=17"}'
    effic.optimize(paths["encoder"], "eliminate-dead-code", output=folder, target=target, check="off")
    artifact, rng = TvmArtifact.load(folder, threads=1), np.random.default_rng(0)
    for batch, length in ((8, 64), (1, 64), (3, 17), (1, 64)):
        feeds = {
            "input_ids": rng.integers(0, 100, (batch, length)),
            "attention_mask": np.ones((batch, length), np.int64),
        }
        assert compare_outputs(oracle.run(feeds), artifact.run(feeds)).max_rel < TOLERANCE
    for batch, length in ((2, 64), (8, 17), (0, 64)):
        feeds = {name: np.ones((batch, length), np.int64) for name in ("input_ids", "attention_mask")}
        with pytest.raises(UsageError, match=r"other shapes|no elements"):
            artifact.run(feeds)


def test_any_number_of_images(paths: dict[str, Path], tmp_path: Path) -> None:
    folder, oracle = tmp_path / "out.tvm", Oracle(read_onnx(DIGITS))
    effic.optimize(DIGITS, "fuse-conv-bn", output=folder, target="tvm-cpu", check="off")
    artifact = TvmArtifact.load(folder, threads=1)
    (value,) = read_onnx(DIGITS).graph.inputs
    name, shape = value.name or "", [d for d in value.shape or () if isinstance(d, int)]
    for batch in (1, 2, 3, 7, 17, 33):
        x = np.random.default_rng(batch).random((batch, *shape), np.float32)
        found = compare_outputs(oracle.run({name: x}), artifact.run({name: x}))
        assert found.shape_mismatch is None
        assert found.max_rel < TOLERANCE
    with pytest.raises(UsageError, match=name):
        artifact.run({name: np.zeros((0, *shape), np.float32)})


def test_a_convolution_that_takes_its_channels_in_parts(tmp_path: Path) -> None:
    # 512 channels into 512, as ResNet's last: the weights of a tile are larger than a cache.
    rng = np.random.default_rng(0)
    w = ir.tensor((rng.standard_normal((512, 1024, 3, 3)) / 100).astype(np.float32), name="w")
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1,1024,5,6] x) => (float[1,512,5,6] y) '
        "{ y = Conv<pads=[1,1,1,1]>(x, w) }"
    )
    weight = ir.Value(name="w", const_value=w, type=ir.TensorType(w.dtype), shape=w.shape)
    (node,) = model.graph
    node.replace_input_with(1, weight)
    model.graph.register_initializer(weight)
    Model(model).save(tmp_path / "conv.onnx")
    check_folder(tmp_path / "conv.onnx", tmp_path / "out.tvm")


def test_a_folder_that_was_built_again_runs_the_new_code(tmp_path: Path) -> None:
    # The name of an open library stands for what was opened first, for as long as anybody holds it.
    held, x = [], {"x": np.array([-1.5, 2], np.float32)}
    for op, want in (("Abs", [1.5, 2]), ("Neg", [1.5, -2])):
        text = f'<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) {{ y = {op}(x) }}'
        folder = tmp_path / "out.tvm"
        effic.optimize(
            Model(ir.from_onnx_text(text)), "eliminate-dead-code", output=folder, target="tvm-cpu", force=True
        )
        held.append(TvmArtifact.load(folder, threads=1))
        np.testing.assert_array_equal(held[-1].run(x)["y"], want)
    np.testing.assert_array_equal(held[0].run(x)["y"], [1.5, 2])
