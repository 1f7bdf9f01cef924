"""Every malformed file ends in one sentence of an effic error: no crash, no wait, no allocation."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effic.ir.errors import EfficError, InvalidModelError, UsageError
from effic.ir.onnx_format import Limits, read_onnx, write_onnx


def _load() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "malformed.py"
    spec = importlib.util.spec_from_file_location("effic_malformed_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


malformed = _load()


def test_the_corpus_has_enough_kinds() -> None:
    assert len(malformed.CORPUS) >= 40


def test_the_model_they_are_made_from_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(malformed.valid_model().SerializeToString())
    onnx.checker.check_model(str(path))
    assert len(read_onnx(path).graph) == 3


@pytest.mark.parametrize("kind", malformed.CORPUS)
def test_malformed(kind: str, tmp_path: Path) -> None:
    path = malformed.CORPUS[kind](tmp_path)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises((InvalidModelError, UsageError)) as caught:
            read_onnx(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert path.name in text
    assert text.endswith(".")
    assert text.isprintable()
    assert "Error calling" not in text
    assert len(text) < 500
    assert time.perf_counter() - started < 10
    assert peak < 32 << 20
    assert isinstance(caught.value, UsageError) == (kind in ("missing file", "folder", "dangling link"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda node: node.input.pop(), "MatMul 't' lacks its input 'B'"),
        (lambda node: node.input.__setitem__(1, ""), "MatMul 't' lacks its input 'B'"),
        (lambda node: node.output.pop(), "MatMul '' has fewer than 1 outputs"),
        (lambda node: node.input.append("b"), "MatMul 't' has 3 inputs, at most 2 are allowed"),
        (
            lambda node: (
                node.__setattr__("op_type", "Flatten"),
                node.input.pop(),
                node.attribute.add(name="axis", type=7, ints=[1]),
            ),
            "attribute 'axis' of Flatten 't' is INTS, not INT",
        ),
    ],
)
def test_nodes_that_lack_what_their_operator_needs(damage: Any, message: str, tmp_path: Path) -> None:
    proto = malformed.valid_model()
    damage(proto.graph.node[0])
    if not proto.graph.node[0].output:
        del proto.graph.node[1:]
        del proto.graph.output[:]
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InvalidModelError) as caught:
        read_onnx(path)
    assert str(caught.value) == f"model.onnx: {message}; export the model again."


def test_a_function_may_take_the_place_of_a_standard_operator(tmp_path: Path) -> None:
    proto = malformed.valid_model()
    body = [onnx.helper.make_node("Identity", ["a"], ["b"])]
    imports = [onnx.helper.make_opsetid("", 17)]
    proto.functions.append(onnx.helper.make_function("", "MatMul", ["a"], ["b"], body, imports))
    proto.graph.node[0].input.pop()
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert len(read_onnx(path).ir.functions) == 1


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(malformed.valid_model().SerializeToString())
    with pytest.raises(InvalidModelError, match="more than 2 nodes"):
        read_onnx(path, limits=Limits(nodes=2))
    with pytest.raises(InvalidModelError, match="besides its weights"):
        read_onnx(path, limits=Limits(structure_bytes=10))


SEED = malformed.valid_model()
SEED.metadata_props.add(key="author", value="somebody")
SEED.graph.doc_string = "a graph"
SEED.graph.node[0].attribute.append(onnx.helper.make_attribute("names", ["a", "b"]))
SEED.graph.node[0].domain = "custom"
SEED.opset_import.add(domain="custom", version=1)
BYTES = SEED.SerializeToString()


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(1, len(BYTES))),
)
def test_damaged_bytes_are_refused_or_read_and_written(
    tmp_path: Path, flips: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(BYTES)
    for at, byte in flips:
        data[at] = byte
    path = tmp_path / "damaged.onnx"
    path.write_bytes(data[:cut])
    # Nothing but effic's own errors may leave either function.
    with contextlib.suppress(InvalidModelError):
        model = read_onnx(path)
        with contextlib.suppress(EfficError):
            write_onnx(model, tmp_path / "out.onnx", force=True)
