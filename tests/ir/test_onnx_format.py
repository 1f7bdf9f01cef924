"""Reading and writing ONNX: nothing lost, nothing loaded, nothing half written; raising the opset."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from effic.ir import protobuf_scan
from effic.ir.errors import InvalidModelError, UnsupportedError, UsageError
from effic.ir.mapped import MappedTensor
from effic.ir.model import Model, PassRecord
from effic.ir.onnx_format import model_bytes, read_onnx, to_proto, write_onnx
from effic.models.builders import BUILDERS

FLOAT = TensorProto.FLOAT


def dense(size: int = 64, layers: int = 2, seed: int = 0) -> onnx.ModelProto:
    """A chain of MatMul and Relu with ``layers`` weights of ``size`` x ``size`` floats."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    for i in range(layers):
        weights.append(onnx.numpy_helper.from_array(rng.standard_normal((size, size), np.float32), f"w{i}"))
        nodes.append(make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"], name=f"matmul{i}"))
        nodes.append(make_node("Relu", [f"m{i}"], [f"x{i + 1}"]))
    x = make_tensor_value_info("x0", FLOAT, ["N", size])
    y = make_tensor_value_info(f"x{layers}", FLOAT, ["N", size])
    graph = make_graph(nodes, "dense", [x], [y], weights, doc_string="a chain")
    model = make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=8, producer_name="me")
    model.metadata_props.add(key="license", value="none")
    return model


def save(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def session(model: str | Path | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: str | Path | bytes, seed: int = 0) -> list[np.ndarray]:
    loaded = session(model)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in loaded.get_inputs():
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        if "float" in value.type:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
        elif "bool" in value.type:
            feeds[value.name] = np.ones(shape, bool)
        else:
            feeds[value.name] = rng.integers(0, 3, shape).astype(
                np.int64 if "int64" in value.type else np.int32
            )
    return loaded.run(None, feeds)


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# -- reading ---------------------------------------------------------------------------------------


def test_large_weights_are_mapped_and_small_ones_are_not(tmp_path: Path) -> None:
    proto = dense()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1, 2]), "small"))
    path = save(proto, tmp_path / "m.onnx")
    model = read_onnx(path)
    for name in ("w0", "w1"):
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, MappedTensor)
        expected = onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))
        np.testing.assert_array_equal(tensor.numpy(), expected)
        np.testing.assert_array_equal(np.asarray(tensor), expected)
        assert tensor.tobytes() == expected.tobytes()
        assert not tensor.numpy().flags.writeable
    assert not isinstance(model.graph.initializers["small"].const_value, ir.ExternalTensor)
    assert model.origin.front_end == "onnx"
    assert model.origin.path == str(path)
    assert model.origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.origin.notes == ()


def test_reading_and_writing_never_hold_the_model(tmp_path: Path) -> None:
    path = save(dense(size=1024, layers=8), tmp_path / "m.onnx")
    assert path.stat().st_size > 32 << 20
    tracemalloc.start()
    try:
        model = read_onnx(path)
        write_onnx(model, tmp_path / "single.onnx", external=False)
        write_onnx(model, tmp_path / "external.onnx", external=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert equal(run(path), run(tmp_path / "single.onnx"))
    assert equal(run(path), run(tmp_path / "external.onnx"))


def test_a_model_with_hard_links_is_read(tmp_path: Path) -> None:
    path = save(dense(), tmp_path / "m.onnx")
    os.link(path, tmp_path / "again.onnx")
    assert read_onnx(path).graph.initializers["w0"].const_value.numpy().shape == (64, 64)  # type: ignore[union-attr]


def test_a_model_is_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    save(dense(), tmp_path / "real" / "m.onnx")
    (tmp_path / "m.onnx").symlink_to("real/m.onnx")
    assert len(read_onnx(tmp_path / "m.onnx").graph) == 4


def test_many_external_files_need_no_descriptors(tmp_path: Path) -> None:
    proto = dense(size=8, layers=80)
    for tensor in proto.graph.initializer:
        (tmp_path / f"{tensor.name}.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{tensor.name}.bin")
    path = save(proto, tmp_path / "m.onnx")
    before = len(os.listdir("/proc/self/fd"))
    model = read_onnx(path)
    assert len(os.listdir("/proc/self/fd")) < before + 8
    write_onnx(model, tmp_path / "out.onnx")
    assert equal(run(path), run(tmp_path / "out.onnx"))


def test_weights_listed_as_inputs_are_demoted(tmp_path: Path) -> None:
    proto = dense()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(make_tensor_value_info(tensor.name, FLOAT, list(tensor.dims)))
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    assert [v.name for v in model.graph.inputs] == ["x0"]
    assert model.ir.ir_version >= 4
    assert model.origin.notes == ("2 weights listed among the graph inputs were made plain initializers.",)
    write_onnx(model, tmp_path / "out.onnx")
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


def test_an_optional_input_that_is_the_only_input_stays(tmp_path: Path) -> None:
    proto = dense()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 64), np.float32), "x0"))
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    assert [v.name for v in model.graph.inputs] == ["x0"]


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    proto = dense()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    assert [n.op_type for n in model.graph] == ["MatMul", "Relu", "MatMul", "Relu"]
    assert model.origin.notes == ("Nodes that came before the nodes they read were sorted.",)
    write_onnx(model, tmp_path / "out.onnx")
    assert equal(run(save(dense(), tmp_path / "m.onnx")), run(tmp_path / "out.onnx"))


def test_a_subgraph_that_reads_a_later_node_is_sorted(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    model (bool c, float[4] x) => (float[4] y) {
        y = If (c) <
            then_branch = then () => (float[4] t) { t = Add(x, later) },
            else_branch = other () => (float[4] e) { e = Relu(x) }>
        later = Abs(x)
    }
    """
    model = read_onnx(save(onnx.parser.parse_model(text), tmp_path / "m.onnx"))
    assert [n.op_type for n in model.graph] == ["Abs", "If"]


def test_negative_declared_dimensions_become_unknown(tmp_path: Path) -> None:
    proto = dense()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    shape = model.graph.inputs[0].shape
    assert shape is not None
    assert isinstance(shape[0], ir.SymbolicDim)
    assert "1 negative dimensions" in model.origin.notes[0]


def test_the_domain_ai_onnx_is_the_standard_domain(tmp_path: Path) -> None:
    proto = dense()
    proto.opset_import[0].domain = "ai.onnx"
    proto.opset_import.add(domain="", version=17)
    proto.graph.node[0].domain = "ai.onnx"
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    assert model.opset == 17
    assert len(list(model.nodes("MatMul"))) == 2


# -- round trips -----------------------------------------------------------------------------------

TYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32), "DOUBLE": np.dtype(np.float64), "FLOAT16": np.dtype(np.float16),
    "BFLOAT16": np.dtype(ml_dtypes.bfloat16), "INT8": np.dtype(np.int8), "UINT8": np.dtype(np.uint8),
    "INT16": np.dtype(np.int16), "UINT16": np.dtype(np.uint16), "INT32": np.dtype(np.int32),
    "UINT32": np.dtype(np.uint32), "INT64": np.dtype(np.int64), "UINT64": np.dtype(np.uint64),
    "BOOL": np.dtype(bool), "COMPLEX64": np.dtype(np.complex64), "COMPLEX128": np.dtype(np.complex128),
    "FLOAT8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn), "FLOAT8E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "FLOAT8E5M2": np.dtype(ml_dtypes.float8_e5m2), "FLOAT8E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "INT4": np.dtype(ml_dtypes.int4), "UINT4": np.dtype(ml_dtypes.uint4),
    "INT2": np.dtype(ml_dtypes.int2), "UINT2": np.dtype(ml_dtypes.uint2),
    "FLOAT4E2M1": np.dtype(ml_dtypes.float4_e2m1fn),
}  # fmt: skip


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (67, 129)], ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_every_type_comes_back(name: str, shape: tuple[int, ...], external: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = np.asarray(rng.integers(0, 2, shape)).astype(TYPES[name])
    tensor = ir.Tensor(array, dtype=ir.DataType[name], name="w")
    value = ir.Value(name="w", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    node = ir.Node("", "Identity", [value], num_outputs=1)
    node.outputs[0].name = "y"
    node.outputs[0].type = value.type
    graph = ir.Graph(
        [], list(node.outputs), nodes=[node], initializers=[value], opset_imports={"": 25}, name="g"
    )
    path = tmp_path / "m.onnx"
    Model(ir.Model(graph, ir_version=13)).save(path, external=external)
    for _ in range(2):
        read = read_onnx(path).graph.initializers["w"].const_value
        assert read is not None
        assert read.dtype == tensor.dtype
        assert read.tobytes() == tensor.tobytes()
        assert read.numpy().astype(TYPES[name]).tobytes() == array.tobytes()
        copy = tmp_path / "copy.onnx"
        write_onnx(read_onnx(path), copy, force=True, external=external)
        path = copy


@pytest.mark.parametrize(
    "name", ["FLOAT", "FLOAT16", "BFLOAT16", "INT4", "INT64", "BOOL", "UINT32", "COMPLEX64"]
)
def test_typed_data_fields_are_read(name: str, tmp_path: Path) -> None:
    dtype = ir.DataType[name]
    array = np.arange(8).astype(TYPES[name]) if name != "BOOL" else np.array([True, False] * 4)
    proto = dense()
    tensor = onnx.helper.make_tensor(
        "k", int(dtype), [8], array.astype(np.float32 if "FLOAT" in name else array.dtype)
    )
    assert not tensor.HasField("raw_data")
    proto.graph.initializer.append(tensor)
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    write_onnx(model, tmp_path / "out.onnx")
    read = read_onnx(tmp_path / "out.onnx").graph.initializers["k"].const_value
    assert read is not None
    np.testing.assert_array_equal(read.numpy(), array)


def test_strings_come_back(tmp_path: Path) -> None:
    proto = dense()
    strings = np.array([b"one", "zwölf".encode(), b"\xff\xfe"] * 600, dtype=object)
    tensor = TensorProto(name="s", data_type=TensorProto.STRING, dims=[1800], string_data=list(strings))
    proto.graph.initializer.append(tensor)
    for external in (False, True):
        write_onnx(
            read_onnx(save(proto, tmp_path / "m.onnx")), tmp_path / "o.onnx", external=external, force=True
        )
        read = read_onnx(tmp_path / "o.onnx").graph.initializers["s"].const_value
        assert read is not None
        assert list(read.numpy()) == list(strings)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_built_models_come_back(name: str, external: bool, tmp_path: Path) -> None:
    built = Model(BUILDERS[name]())
    first = tmp_path / "first.onnx"
    write_onnx(built, first)
    onnx.checker.check_model(str(first))
    again = read_onnx(first)
    second = tmp_path / "second.onnx"
    write_onnx(again, second, external=external)
    assert (tmp_path / "second.onnx.data").exists() == external
    assert equal(run(first), run(second))
    assert equal(run(first), run(to_proto(again).SerializeToString()))
    before, after = to_proto(again), to_proto(read_onnx(second))
    assert before == after
    assert abs(model_bytes(again) - first.stat().st_size) < 0.02 * first.stat().st_size + 256


def test_everything_that_is_no_weight_is_kept(tmp_path: Path) -> None:
    proto = dense()
    proto.ir_version = 10
    proto.opset_import.add(domain="custom.ops", version=7)
    proto.model_version = 12
    proto.doc_string = "about"
    proto.domain = "org.example"
    node = make_node("Anything", ["x0"], ["odd"], domain="custom.ops", name="odd_node", overload="v2")
    node.attribute.append(onnx.helper.make_attribute("blob", b"\x00\xff\xfe"))
    node.attribute.append(onnx.helper.make_attribute("scale", 0.5))
    node.attribute.append(onnx.helper.make_attribute("list", [1, 2, 3]))
    node.metadata_props.add(key="module", value="layer.1")
    node.doc_string = "odd"
    proto.graph.node.append(node)
    proto.graph.initializer[0].metadata_props.add(key="scheme", value="rtn")
    proto.graph.initializer[0].doc_string = "first"
    proto.graph.metadata_props.add(key="g", value="h")
    proto.graph.value_info.append(make_tensor_value_info("m0", FLOAT, ["N", 64]))
    path = save(proto, tmp_path / "m.onnx")
    for i in range(3):
        model = read_onnx(path)
        path = tmp_path / f"out{i}.onnx"
        write_onnx(model, path, external=i == 1)
    back = onnx.load(path)
    assert back == proto


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    path = save(dense(), tmp_path / "m.onnx")
    contents = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for external in (False, True):
            write_onnx(read_onnx(path), tmp_path / folder / f"{external}.onnx", external=external)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"False.onnx", "True.onnx", "True.onnx.data"}


def test_constant_nodes_hold_large_weights(tmp_path: Path) -> None:
    proto = dense(size=256)
    constants = [make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes = [*constants, *proto.graph.node]
    del proto.graph.initializer[:]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path = save(proto, tmp_path / "m.onnx")
    model = read_onnx(path)
    assert isinstance(next(model.nodes("Constant")).attributes["value"].as_tensor(), MappedTensor)
    for external in (False, True):
        out = tmp_path / f"{external}.onnx"
        write_onnx(model, out, external=external)
        assert equal(run(path), run(out))
        assert equal(run(path), run(to_proto(read_onnx(out)).SerializeToString()))
    assert out.stat().st_size < 4096


def test_the_record_of_passes_is_stored(tmp_path: Path) -> None:
    model = read_onnx(save(dense(), tmp_path / "m.onnx"))
    model.record.append(PassRecord("fold-constants", "0.1", 3, 1, 100, 90))
    write_onnx(model, tmp_path / "out.onnx")
    assert read_onnx(tmp_path / "out.onnx").record == model.record


def test_weights_are_external_above_the_threshold(tmp_path: Path) -> None:
    model = read_onnx(save(dense(), tmp_path / "m.onnx"))
    write_onnx(model, tmp_path / "a.onnx", external_threshold=1 << 20)
    write_onnx(model, tmp_path / "b.onnx", external_threshold=1 << 10)
    assert not (tmp_path / "a.onnx.data").exists()
    assert (tmp_path / "b.onnx.data").stat().st_size == 2 * 64 * 64 * 4
    assert (tmp_path / "b.onnx").stat().st_size < 2048


def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    # Sparse files: they take no room on the disk, and the weights are never read.
    count, rows = 3, 1 << 18
    proto = dense(size=8, layers=0)
    proto.graph.node.append(make_node("Relu", ["x0"], ["y"]))
    proto.graph.output[0].CopyFrom(make_tensor_value_info("y", FLOAT, ["N", 8]))
    for i in range(count):
        tensor = proto.graph.initializer.add(name=f"w{i}", data_type=FLOAT, dims=[rows, 1024])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "big.bin"), ("offset", str(i * rows * 4096))):
            tensor.external_data.add(key=key, value=value)
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(count * rows * 4096)
    model = read_onnx(save(proto, tmp_path / "m.onnx"))
    weight = model.graph.initializers["w2"].const_value
    assert weight is not None
    assert weight.numpy()[-1, -1] == 0
    assert model_bytes(model) > 3 << 30
    with pytest.raises(UnsupportedError, match="2 GiB"):
        write_onnx(model, tmp_path / "out.onnx", external=False)
    with pytest.raises(UnsupportedError, match="2 GiB"):
        to_proto(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.bin", "m.onnx"]


# -- writing safely --------------------------------------------------------------------------------


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = save(dense(), tmp_path / "m.onnx")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="--force"):
        write_onnx(read_onnx(path), path)
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="folder"):
        write_onnx(read_onnx(path), tmp_path, force=True)
    with pytest.raises(UsageError, match="does not exist"):
        write_onnx(read_onnx(path), tmp_path / "no" / "m.onnx")


@pytest.mark.parametrize("external", [False, True])
def test_a_model_is_written_over_its_own_input(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_onnx(read_onnx(save(dense(), tmp_path / "source.onnx")), path, external=True)
    expected = run(path)
    model = read_onnx(path)
    # Read nothing before the file is replaced: the map must hold the old bytes by itself.
    for _ in range(3):
        write_onnx(model, path, force=True, external=external)
        assert equal(run(path), expected)
    weight = model.graph.initializers["w1"].const_value
    assert weight is not None
    assert weight.tobytes() == dense().graph.initializer[1].raw_data
    data = [p.name for p in tmp_path.iterdir() if p.name.endswith(".data")]
    assert len(data) == (1 if external else 0)


def test_weights_that_onnx_ir_mapped_stay_readable_when_their_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_onnx(read_onnx(save(dense(), tmp_path / "source.onnx")), path, external=True)
    model = Model(ir.load(path))
    write_onnx(model, path, force=True, external=True)
    weight = model.graph.initializers["w1"].const_value
    assert weight is not None
    assert weight.tobytes() == dense().graph.initializer[1].raw_data


@pytest.mark.parametrize("external", [False, True])
def test_a_failure_midway_leaves_the_old_model_and_nothing_else(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_onnx(read_onnx(save(dense(), tmp_path / "source.onnx")), path, external=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = read_onnx(path)

    def fail() -> ir.TensorProtocol:
        raise RuntimeError("the disk caught fire")

    last = model.graph.initializers["w1"]
    last.const_value = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([64, 64]), name="w1")
    with pytest.raises(RuntimeError, match="caught fire"):
        write_onnx(model, path, force=True, external=external)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_crash_between_the_renames_leaves_a_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    write_onnx(read_onnx(save(dense(), tmp_path / "source.onnx")), path, external=True)
    expected = run(path)
    other = read_onnx(save(dense(seed=1), tmp_path / "other.onnx"))
    replace, calls = os.replace, []

    def crash(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_onnx(other, path, force=True, external=True)
    monkeypatch.undo()
    assert equal(run(path), expected)
    write_onnx(other, path, force=True, external=True)
    assert equal(run(path), run(tmp_path / "other.onnx"))
    assert len(list(tmp_path.glob("m.onnx*"))) == 2


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_onnx(save(dense(), tmp_path / "m.onnx"))

    def full(self: MappedTensor, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MappedTensor, "tofile", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_onnx(model, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_permissions(tmp_path: Path) -> None:
    model = read_onnx(save(dense(), tmp_path / "m.onnx"))
    old = os.umask(0o027)
    try:
        write_onnx(model, tmp_path / "new.onnx", external=True)
    finally:
        os.umask(old)
    assert (tmp_path / "new.onnx").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new.onnx.data").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new.onnx").chmod(0o604)
    write_onnx(model, tmp_path / "new.onnx", force=True)
    assert (tmp_path / "new.onnx").stat().st_mode & 0o777 == 0o604


@pytest.mark.parametrize("external", [False, True])
def test_progress(external: bool, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = read_onnx(save(dense(), tmp_path / "m.onnx"))
    write_onnx(model, tmp_path / "o.onnx", external=external, progress=lambda *x: seen.append(x))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) == 3


def test_the_model_is_unchanged_by_writing(tmp_path: Path) -> None:
    model = read_onnx(save(dense(), tmp_path / "m.onnx"))
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    write_onnx(model, tmp_path / "a.onnx", external=True)
    write_onnx(model, tmp_path / "b.onnx", external=False)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before


# -- the scanner -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=0, max_size=6),
    threshold=st.integers(1, 400),
    nested=st.booleans(),
)
def test_a_skeleton_with_its_payloads_is_the_message(sizes: list[int], threshold: int, nested: bool) -> None:
    proto = onnx.ModelProto(ir_version=8)
    for i, size in enumerate(sizes):
        tensor = TensorProto(
            name=f"t{i}", data_type=TensorProto.UINT8, dims=[size], raw_data=bytes([i]) * size
        )
        if nested:
            branch = onnx.GraphProto(name=f"g{i}", initializer=[tensor])
            proto.graph.node.append(make_node("If", ["c"], [f"o{i}"], then_branch=branch, value=tensor))
        else:
            proto.graph.initializer.append(tensor)
    data = proto.SerializeToString()
    short = onnx.ModelProto.FromString(protobuf_scan.skeleton(data, "marker", threshold))

    def restore(tensor: TensorProto) -> None:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries.get("location") == "marker":
            start = int(entries["offset"])
            tensor.raw_data = data[start : start + int(entries["length"])]
            assert len(tensor.raw_data) >= threshold
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
        else:
            assert len(tensor.raw_data) < threshold

    for tensor in short.graph.initializer:
        restore(tensor)
    for node in short.graph.node:
        restore(node.attribute[1].t if node.attribute[1].name == "value" else node.attribute[0].t)
        branch = node.attribute[0].g if node.attribute[0].name == "then_branch" else node.attribute[1].g
        restore(branch.initializer[0])
    assert short == proto


def test_external_data_that_shrinks_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_onnx(read_onnx(save(dense(), tmp_path / "s.onnx")), tmp_path / "m.onnx", external=True)
    from_proto = ir.serde.deserialize_model

    def shrink(proto: onnx.ModelProto) -> ir.Model:
        os.truncate(tmp_path / "m.onnx.data", 100)
        return from_proto(proto)

    monkeypatch.setattr(ir.serde, "deserialize_model", shrink)
    with pytest.raises(InvalidModelError, match="become shorter"):
        read_onnx(tmp_path / "m.onnx")
