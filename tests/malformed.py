"""Broken and hostile model files, one maker per kind.

``CORPUS[kind](folder)`` writes the files of one kind into ``folder`` and returns the path to open.
Run as a script, it writes the whole corpus: ``python tests/malformed.py FOLDER``.
"""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

Maker = Callable[[Path], Path]
CORPUS: dict[str, Maker] = {}

FLOAT, INT64, STRING = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.STRING

VALID = """
<ir_version: 8, opset_import: ["" : 17]>
model (float[N,4] x) => (float[N,3] y)
<float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b = {1,2,3}>
{
    t = MatMul(x, w)
    s = Add(t, b)
    y = Relu(s)
}
"""


def valid_model() -> onnx.ModelProto:
    """A small valid model: y = relu(x @ w + b), weights in raw_data."""
    proto = onnx.parser.parse_model(VALID)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.ClearField("float_data")
        tensor.raw_data = array.tobytes()
    return proto


def kind(name: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        CORPUS[name] = maker
        return maker

    return register


def broken(name: str) -> Callable[[Callable[[onnx.ModelProto], None]], None]:
    """A kind made by damaging the valid model's proto."""

    def register(damage: Callable[[onnx.ModelProto], None]) -> None:
        def make(folder: Path) -> Path:
            proto = valid_model()
            damage(proto)
            return _write(folder, proto.SerializeToString())

        CORPUS[name] = make

    return register


def parsed(name: str, text: str) -> None:
    """A kind written in onnx's text format."""
    CORPUS[name] = lambda folder: _write(folder, onnx.parser.parse_model(text).SerializeToString())


def content(name: str, data: bytes) -> None:
    CORPUS[name] = lambda folder: _write(folder, data)


def _write(folder: Path, data: bytes, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def external(
    name: str,
    location: str,
    *,
    offset: str | None = "0",
    length: str | None = "48",
    prepare: Callable[[Path], None] | None = None,
) -> None:
    """A kind whose weight lies in external data at ``location``."""

    def make(folder: Path) -> Path:
        inside = folder / "model"
        inside.mkdir()
        (inside / "data.bin").write_bytes(np.arange(12, dtype=np.float32).tobytes())
        (folder / "secret.bin").write_bytes(b"s" * 48)
        if prepare is not None:
            prepare(inside)
        proto = valid_model()
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            if value is not None:
                tensor.external_data.add(key=key, value=value)
        return _write(inside, proto.SerializeToString())

    CORPUS[name] = make


# -- no ONNX file at all ---------------------------------------------------------------------------

content("empty file", b"")
content("plain text", b"This is a shopping list: milk, bread.\n")
content("web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
content("json", b'{"format": "onnx"}')
content("git lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
content("pickle", pickle.dumps({"weights": [1.0, 2.0]}))
content("random bytes", np.random.default_rng(0).bytes(4096))
content("zeros", bytes(4096))
content("one byte", b"\x08")
content("gguf", b"GGUF\x03\x00\x00\x00" + bytes(64))
content("ort format", b"\x18\x00\x00\x00ORTM" + bytes(64))


@kind("zip archive")
def _(folder: Path) -> Path:
    path = folder / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    return path


@kind("missing file")
def _(folder: Path) -> Path:
    return folder / "nowhere.onnx"


@kind("folder")
def _(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.mkdir()
    return path


@kind("dangling link")
def _(folder: Path) -> Path:
    path = folder / "model.onnx"
    path.symlink_to(folder / "gone.onnx")
    return path


@kind("named pipe")
def _(folder: Path) -> Path:
    path = folder / "model.onnx"
    os.mkfifo(path)
    return path


# -- damaged protobuf ------------------------------------------------------------------------------


def _cut(fraction: float) -> Maker:
    def make(folder: Path) -> Path:
        data = valid_model().SerializeToString()
        return _write(folder, data[: int(len(data) * fraction)])

    return make


CORPUS["truncated at a third"] = _cut(0.33)
CORPUS["truncated at the end"] = _cut(0.99)


@kind("truncated inside a long weight")
def _(folder: Path) -> Path:
    proto = valid_model()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(100_000, np.float32), "long"))
    return _write(folder, proto.SerializeToString()[:200_000])


content("length beyond the file", b"\x08\x08\x3a\xff\xff\xff\xff\x07\x0a\x00")
content("endless varint", b"\x08" + b"\xff" * 32)
content("wrong wire type", b"\x0b" * 64)


def _nested(levels: int, message: bytes = b"") -> bytes:
    def field(number: int, payload: bytes) -> bytes:
        size, out = len(payload), bytearray([number << 3 | 2])
        while size >= 0x80:
            out.append(size & 0x7F | 0x80)
            size >>= 7
        out.append(size)
        return bytes(out) + payload

    graph = message
    for _ in range(levels):
        # GraphProto.node -> NodeProto.attribute -> AttributeProto.g
        node = field(4, b"If") + field(5, field(1, b"b") + b"\xa0\x01\x05" + field(6, graph))
        graph = field(1, node) + field(2, b"g")
    return b"\x08\x08" + field(7, graph) + field(8, b"\x10\x11")


content("subgraphs beyond our limit", _nested(28))
content("subgraphs beyond protobuf's limit", _nested(2000))
content("long subgraphs beyond protobuf's limit", _nested(2000, b"\x52\x88\x27" + b"d" * 5000))


# -- models that are none --------------------------------------------------------------------------


@broken("no graph")
def _(proto: onnx.ModelProto) -> None:
    proto.ClearField("graph")


broken("no ir version")(lambda proto: proto.ClearField("ir_version"))


@broken("ir version of the far future")
def _(proto: onnx.ModelProto) -> None:
    proto.ir_version = 1_000_000


@broken("no opset import")
def _(proto: onnx.ModelProto) -> None:
    del proto.opset_import[:]


@broken("standard opset not imported")
def _(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].domain = "somewhere.else"


@broken("absurd opset")
def _(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 2**40


@broken("negative opset")
def _(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = -3


@broken("two opsets for a domain")
def _(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="ai.onnx", version=11)


# -- graphs ----------------------------------------------------------------------------------------

# Which input or output of which node is renamed to what.
_RENAMES = {
    "cycle": (0, "input", 0, "s"),
    "node that reads itself": (1, "input", 1, "s"),
    "undefined value": (0, "input", 0, "nobody"),
    "two nodes make a value": (1, "output", 0, "t"),
    "node makes an initializer": (0, "output", 0, "w"),
    "node makes an input": (0, "output", 0, "x"),
}


def _rename(node: int, field: str, index: int, name: str) -> Callable[[onnx.ModelProto], None]:
    return lambda proto: getattr(proto.graph.node[node], field).__setitem__(index, name)


broken("duplicate initializer")(lambda proto: proto.graph.initializer.append(proto.graph.initializer[0]))
broken("duplicate input")(lambda proto: proto.graph.input.append(proto.graph.input[0]))
for _name, _where in _RENAMES.items():
    broken(_name)(_rename(*_where))


@broken("output nobody makes")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "nobody"


@broken("input without a name")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.input.add().type.CopyFrom(proto.graph.input[0].type)


@broken("initializer without a name")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2, np.float32)))


@broken("node without an operator")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = ""


@broken("duplicate attribute")
def _(proto: onnx.ModelProto) -> None:
    for _ in range(2):
        proto.graph.node[0].attribute.append(onnx.helper.make_attribute("alpha", 1.0))


@broken("attribute without a type")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(onnx.AttributeProto(name="alpha", f=1.0))


@broken("attribute reference outside a function")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].attribute.append(
        onnx.AttributeProto(name="alpha", ref_attr_name="beta", type=onnx.AttributeProto.FLOAT)
    )


@broken("element type that does not exist")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = 250


@broken("map type")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.map_type.key_type = INT64


@broken("name that steers the terminal")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "line\nand \x1b[31mred \x1b[2J" + "long" * 500


@kind("name that is no UTF-8")
def _(folder: Path) -> Path:
    proto = valid_model()
    proto.graph.node[0].name = "bytes!"
    return _write(folder, proto.SerializeToString().replace(b"bytes!", b"\xff\xfetes!"))


@kind("string attribute list that is no UTF-8")
def _(folder: Path) -> Path:
    proto = valid_model()
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("names", ["a", b"\xff\xfe"]))
    return _write(folder, proto.SerializeToString())


@kind("more nodes than the limit, by functions that unfold")
def _(folder: Path) -> Path:
    proto = valid_model()
    proto.ir_version = 10
    proto.opset_import.add(domain="bomb", version=1)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("bomb", 1)]
    for level in range(40):
        op, domain = (f"f{level + 1}", "bomb") if level < 39 else ("Relu", "")
        nodes = [
            onnx.helper.make_node(op, ["a"], ["b"], domain=domain),
            onnx.helper.make_node(op, ["b"], ["c"], domain=domain),
        ]
        proto.functions.append(onnx.helper.make_function("bomb", f"f{level}", ["a"], ["c"], nodes, opsets))
    proto.graph.node[2].CopyFrom(onnx.helper.make_node("f0", ["s"], ["y"], domain="bomb"))
    return _write(folder, proto.SerializeToString())


_FUNCTIONS = """
<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
model (float[4] x) => (float[4] y) {{ y = local.f(x) }}
{}
"""
_HEAD = '<domain: "local", opset_import: ["" : 17, "local" : 1]>'
parsed("function that calls itself", _FUNCTIONS.format(_HEAD + "f (a) => (b) { b = local.f(a) }"))
parsed(
    "functions that call each other",
    _FUNCTIONS.format(
        _HEAD + "f (a) => (b) { b = local.g(a) }\n" + _HEAD + "g (a) => (b) { b = local.f(a) }"
    ),
)
parsed(
    "two functions of one name",
    _FUNCTIONS.format(_HEAD + "f (a) => (b) { b = Relu(a) }\n" + _HEAD + "f (a) => (b) { b = Abs(a) }"),
)
parsed("function output nobody makes", _FUNCTIONS.format(_HEAD + "f (a) => (c) { b = Relu(a) }"))
parsed("undefined value in a function", _FUNCTIONS.format(_HEAD + "f (a) => (b) { b = Add(a, q) }"))
parsed("cycle in a function", _FUNCTIONS.format(_HEAD + "f (a) => (b) { b = Add(a, c) c = Relu(b) }"))

_IF = """
<ir_version: 8, opset_import: ["" : 17]>
model (bool c, float[4] x) => (float[4] y) {{
    {}
    y = If (c) <
        then_branch = then () => (float[4] t) {{ {} }},
        else_branch = other () => (float[4] e) {{ e = Relu(x) }}>
    {}
}}
"""
parsed("undefined value in a subgraph", _IF.format("", "t = Add(x, q)", ""))
parsed("cycle through a subgraph", _IF.format("", "t = Add(x, later)", "later = Relu(y)"))
parsed("subgraph hides an outer value", _IF.format("r = Relu(x)", "r = Abs(x) t = Relu(r)", ""))
parsed("subgraph output nobody makes", _IF.format("", "r = Abs(x)", ""))


# -- tensors ---------------------------------------------------------------------------------------


@broken("fewer bytes than the shape")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = bytes(44)


@broken("more bytes than the shape")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = bytes(64)


@broken("long payload of another size than the shape")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = bytes(1 << 20)


@broken("no values")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].ClearField("raw_data")


@broken("values twice")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].float_data.extend([1.0] * 12)


@broken("values in the field of another type")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].int64_data.extend([1] * 12)


@broken("huge declared tensor")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [2**31, 2**31]


@broken("huge declared tensor without values")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].dims[:] = [10**6, 10**6]


@broken("dimensions whose product overflows")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [2**62, 2**62, 16]


@broken("empty tensor of a huge shape")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].ClearField("raw_data")
    proto.graph.initializer[0].dims[:] = [0, 2**62, 2**62]


@broken("tensor of a thousand dimensions")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [4, 3] + [1] * 1000


@broken("negative dimension")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[:] = [-4, -3]


@broken("tensor type that does not exist")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 99


@broken("tensor without a type")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].ClearField("data_type")


@broken("strings as raw bytes")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = STRING


@broken("fewer strings than the shape")
def _(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type = STRING
    tensor.string_data.extend([b"one", b"two"])


@broken("tensor in segments")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].segment.begin = 0


@broken("sparse initializer")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.sparse_initializer.add().values.CopyFrom(proto.graph.initializer[0])


@broken("sparse attribute")
def _(proto: onnx.ModelProto) -> None:
    attribute = proto.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.dims.append(3)


@broken("broken tensor in an attribute")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["k"], value=proto.graph.initializer[0]))
    proto.graph.node[0].attribute[0].t.dims[:] = [1 << 40]


@broken("input declared with another shape than its weight")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", FLOAT, [4, 4]))


@broken("input declared with another type than its weight")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", INT64, [4, 3]))


# -- external data ---------------------------------------------------------------------------------

external("external data at an absolute path", "/etc/hostname", length=None)
external("external data above the folder", "../secret.bin")
external("external data above the folder, by detour", "sub/../../secret.bin")
external(
    "external data through a link", "link.bin", prepare=lambda d: (d / "link.bin").symlink_to("../secret.bin")
)
external(
    "external data through a linked folder",
    "sub/secret.bin",
    prepare=lambda d: (d / "sub").symlink_to("..", target_is_directory=True),
)
external(
    "external data with hard links", "data.bin", prepare=lambda d: os.link(d / "data.bin", d / "again.bin")
)
external("external data that is missing", "gone.bin")
external("external data in a folder", "sub", prepare=lambda d: (d / "sub").mkdir())
external("external data in a pipe", "pipe", prepare=lambda d: os.mkfifo(d / "pipe"))
external("external data in a loop of links", "loop", prepare=lambda d: (d / "loop").symlink_to("loop"))
external("external data with a NUL", "data.bin\0.txt")
external("external data of a very long name", "x" * 5000)
external("external data without a location", "")
external("external offset beyond the file", "data.bin", offset="4096")
external("external offset and length beyond the file", "data.bin", offset="8", length="48")
external("external offset negative", "data.bin", offset="-48")
external("external offset no number", "data.bin", offset="1e3")
external("external offset of a hundred digits", "data.bin", offset="9" * 100)
external("external length of another size than the shape", "data.bin", length="40")
external("external length negative", "data.bin", length="-1")
external(
    "external file shorter than the shape",
    "data.bin",
    offset=None,
    length=None,
    prepare=lambda d: (d / "data.bin").write_bytes(b"1234"),
)
external("external file empty", "data.bin", prepare=lambda d: (d / "data.bin").write_bytes(b""))


@broken("huge declared external tensor")
def _(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**40]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.onnx")


@broken("inline and external at once")
def _(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    proto.graph.initializer[0].external_data.add(key="location", value="model.onnx")


@broken("external data location given twice")
def _(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for location in ("model.onnx", "../secret.bin"):
        tensor.external_data.add(key="location", value=location)


@broken("external strings")
def _(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type = STRING
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.onnx")


def main(target: str) -> None:
    """Write the corpus: one folder per kind, the file to open printed beside it."""
    for name, make in CORPUS.items():
        folder = Path(target) / name.replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{make(folder)}\t{name}")


if __name__ == "__main__":
    main(sys.argv[1])
