"""`.pt2` files: what they hold, and what would run something on reading."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest

from effic.ir.errors import InvalidModelError, UsageError
from effic.ir.torch_archive import _is_size
from effic.ir.torch_capture import capture
from tests.ir.torch_nets import Decoder, assert_same

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
nn = torch.nn

F = torch.nn.functional


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "decoder.pt2"
    dims = {"ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}}
    program = torch.export.export(Decoder().eval(), (torch.randint(0, 32, (2, 6)),), dynamic_shapes=dims)
    torch.export.save(program, path)
    return path


def test_pt2_files(archive: Path) -> None:
    model = capture(archive)
    assert model.origin.path == str(archive)
    assert len(model.origin.sha256) == 64
    assert "output.weight" not in model.graph.initializers
    assert_same(model, Decoder().eval(), torch.randint(0, 32, (3, 9)))


def rewritten(archive: Path, target: Path, **changes: object) -> Path:
    """A copy with records replaced: a name ending, and bytes or a function of the text."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as made:
        root = source.namelist()[0].split("/", 1)[0]
        left = dict(changes)
        for name in source.namelist():
            data = source.read(name)
            for ending in list(left):
                if name.endswith(ending):
                    change = left.pop(ending)
                    data = change if isinstance(change, bytes) else change(data.decode()).encode()
            made.writestr(name, data)
        for name, data in left.items():
            made.writestr(name if name.startswith("/") else f"{root}/{name}", data)
    return target


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file's code was run",))


def pickled() -> bytes:
    stream = io.BytesIO()
    torch.save(((torch.zeros(1), Bomb()), {}), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"sample_inputs/model.pt": pickled}, "pickled objects that are not tensors"),
        ({"data/weights/model.pt": pickled}, "pickled objects that are not tensors"),
        (
            {"weights_config.json": lambda t: t.replace('"use_pickle": false', '"use_pickle": true', 1)},
            "is a pickled Python object",
        ),
        ({"data/aotinductor/model/x.so": b"\x7fELF"}, "may be code"),
        ({"data/constants/opaque_obj_0": pickle.dumps(1), "serialized_state_dict.pt": b""}, "may be code"),
        (
            {"models/model.json": lambda t: t.replace("torch.ops.aten.add.Tensor", "torch.os.system", 1)},
            "calls 'torch.os.system'",
        ),
        (
            {
                "models/model.json": lambda t: t.replace(
                    "torch.ops.aten.add.Tensor", "torch.ops.load_library", 1
                )
            },
            "no registered torch operator",
        ),
        (
            {"models/model.json": lambda t: t.replace("Symbol(", "__import__(", 1)},
            "no arithmetic",
        ),
        (
            {"models/model.json": lambda t: t.replace('\\"context\\": \\"null\\"', '\\"__enum__\\": 1', 1)},
            "names a Python class",
        ),
        ({"models/other.json": b"{}"}, "exactly one program"),
        ({"models/model.json": b"{"}, "broken .pt2"),
    ],
)
def test_pt2_files_that_would_run_something(
    archive: Path, tmp_path: Path, changes: dict, pattern: str
) -> None:
    ready = {name: change() if change is pickled else change for name, change in changes.items()}
    with pytest.raises(InvalidModelError, match=pattern):
        capture(rewritten(archive, tmp_path / "bad.pt2", **ready))


def test_files_that_are_no_pt2(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        capture(tmp_path / "absent.pt2")
    with pytest.raises(UsageError, match=r"not a \.pt2"):
        capture(tmp_path / "weights.pth")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(InvalidModelError, match=r"not a \.pt2 archive"):
        capture(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as made:
        made.writestr("version", "8.1")
        made.writestr("serialized_state_dict.pt", pickled())
    with pytest.raises(InvalidModelError, match=r"old\.pt2"):
        capture(tmp_path / "old.pt2")
    data = archive.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidModelError):
        capture(tmp_path / "cut.pt2")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Mul(Integer(8), Pow(Symbol('s27'), Integer(2)))", True),
        ("Max(1, s0) + 2*s1//3", True),
        ("__import__('os').system('id')", False),
        ("Mul('__import__(\"os\")')", False),
        ("Symbol.__class__", False),
        ("[s0 for s0 in (1,)]", False),
        ("exec('x')", False),
        ("(", False),
    ],
)
def test_sizes_are_arithmetic_only(text: str, good: bool) -> None:
    assert _is_size(text) is good
