"""The manifest of an artifact: what is in the folder, what it takes and gives, and where it runs.

Read and written without onnx, torch or tvm. Whoever made the folder may have meant harm: the manifest is
limited in size and every field is looked at before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effic.ir.errors import InvalidModelError, NotMeasuredError, UsageError
from effic.ir.memory import available_memory

FORMAT = 1
MANIFEST, LIBRARY, PARAMETERS = "manifest.json", "model.so", "params.safetensors"

# The record of a build is the largest part; ten thousand passes would fit.
_MOST_BYTES = 16 << 20
_MOST_ENTRIES = 1 << 20
_MOST_INPUT_BYTES = 1 << 34
"""Made-up inputs may take, where it is not known how much memory is free."""
_DEVICES, _VERIFIED = frozenset(["cpu", "cuda"]), frozenset(["built", "compiled", "run"])
_DTYPES = frozenset(
    ["bool", "float16", "float32", "float64"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: as the model calls it.
        dtype: NumPy's name of its element type.
        below: integers have to lie below this, as they index a table of that many rows; None is unknown.
    """

    name: str
    dtype: str
    below: int | None = None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One set of input shapes that the library has a function for.

    Attributes:
        entry: the function's name in the library.
        sizes: what the model's dynamic dimensions are here, by name.
        inputs, outputs: shapes in the order of the ports; a name instead of a size fits any size.
        parameters: names in the parameters' file, in the order that the function takes them.
    """

    entry: str
    sizes: dict[str, int]
    inputs: tuple[tuple[int | str, ...], ...]
    outputs: tuple[tuple[int | str, ...], ...]
    parameters: tuple[str, ...]

    def fits(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes are this function's; one name is one size throughout, and not 0."""
        names: dict[str, int] = {}
        for wanted, shape in zip(self.inputs, shapes, strict=True):
            if len(wanted) != len(shape):
                return False
            for want, size in zip(wanted, shape, strict=True):
                if isinstance(want, str):
                    want = names.setdefault(want, size or -1)
                if want != size:
                    return False
        return True


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        target: text form of the effic target it was built for.
        triple: LLVM's name of the system, ``x86_64-…``.
        mcpu: LLVM's name of the CPU; of a GPU, CUDA's name of its architecture.
        features: instruction sets that the code may use, by LLVM's names.
        cores: how many threads the code was laid out for; it runs with any number.
        library: bytes and sha256 of the library.
        parameter_bytes: size of the parameters' file.
        inputs, outputs: what the functions take and give.
        buckets: the functions.
        versions: of effic, apache-tvm and apache-tvm-ffi.
        source: sha256 of the model's file, or None for a model from memory.
        build: the record of the build, see :mod:`effic.record`, or None.
        device: ``cpu`` or ``cuda``: what it runs on.
        verified: for a GPU, how far: ``built`` (CUDA source that no compiler has seen), ``compiled`` (by nvcc), or
            ``run``.
    """

    target: str
    triple: str
    mcpu: str
    features: tuple[str, ...]
    cores: int
    library: tuple[int, str]
    parameter_bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    buckets: tuple[Bucket, ...]
    versions: dict[str, str]
    source: str | None = None
    build: dict[str, Any] | None = None
    device: str = "cpu"
    verified: str = "run"

    def for_gpu(self, arch: str, verified: str) -> Manifest:
        """The same for a GPU of this architecture, verified so far."""
        return dataclasses.replace(self, device="cuda", mcpu=arch, features=(), cores=1, verified=verified)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as it is in the file."""
        row = dataclasses.asdict(self)
        row["library"] = {"bytes": self.library[0], "sha256": self.library[1]}
        return {"effic_tvm": FORMAT, **row}

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a folder that nobody reads yet."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"
        Path(folder, MANIFEST).write_text(text, encoding="utf-8")


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like an artifact's folder."""
    return os.path.isdir(path) and os.path.isfile(os.path.join(path, MANIFEST))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a folder.

    Raises:
        UsageError: there is no such folder, or it has no manifest.
        InvalidModelError: the manifest is broken, or of another format.
    """
    path = os.path.join(folder, MANIFEST)
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {os.fspath(folder)}")
    try:
        if os.stat(path).st_size > _MOST_BYTES:
            raise InvalidModelError(f"{path} is too large to be a manifest")
        with open(path, "rb") as file:
            data = json.loads(file.read(_MOST_BYTES + 1))
    except OSError as error:
        raise UsageError(
            f"{os.fspath(folder)} is no artifact of effic: cannot read its {MANIFEST}: {error.strerror or error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(f"{path} is no manifest: {error}") from error
    if not isinstance(data, dict) or "effic_tvm" not in data:
        raise InvalidModelError(f"{path} is no manifest of an artifact; build one with effic optimize")
    if data["effic_tvm"] != FORMAT:
        raise InvalidModelError(
            f"{path} has format {data['effic_tvm']!r:.40}, and this effic reads {FORMAT}; build it again"
        )
    try:
        return _Reader(data).manifest()
    except _Malformed as error:
        raise InvalidModelError(f"the manifest {path} is malformed: {error}") from error


class _Malformed(Exception):
    """What is wrong in a manifest, as a phrase."""


class _Reader:
    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def manifest(self) -> Manifest:
        get = self._data.get
        inputs, outputs = _ports(get("inputs"), "inputs"), _ports(get("outputs"), "outputs")
        library = get("library")
        if not isinstance(library, dict):
            raise _Malformed("'library' holds no size and digest")
        source, build = get("source"), get("build")
        if build is not None and not isinstance(build, dict):
            raise _Malformed("'build' is no table")
        parameter_bytes = _size(get("parameter_bytes"), "parameter_bytes")
        return Manifest(
            target=_text(get("target"), "target"),
            triple=_text(get("triple"), "triple"),
            mcpu=_text(get("mcpu"), "mcpu"),
            features=_texts(get("features"), "features"),
            cores=_size(get("cores"), "cores"),
            library=(
                _size(library.get("bytes"), "library.bytes"),
                _text(library.get("sha256"), "library.sha256"),
            ),
            parameter_bytes=parameter_bytes,
            inputs=inputs,
            outputs=outputs,
            buckets=tuple(
                _bucket(row, len(inputs), len(outputs)) for row in _list(get("buckets"), "buckets", least=1)
            ),
            versions=_table(get("versions"), "versions", str),
            source=None if source is None else _text(source, "source"),
            build=build,
            # Older builds, all for a CPU, do not say.
            device=_word(get("device", "cpu"), "device", _DEVICES),
            verified=_word(get("verified", "run"), "verified", _VERIFIED),
        )


def _list(found: Any, where: str, least: int = 0) -> list[Any]:
    if not isinstance(found, list) or not least <= len(found) <= _MOST_ENTRIES:
        raise _Malformed(f"'{where}' is no list of {least} or more entries")
    return found


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str) or not found:
        raise _Malformed(f"'{where}' is no text")
    return found


def _word(found: Any, where: str, known: frozenset[str]) -> str:
    if not isinstance(found, str) or found not in known:
        raise _Malformed(f"'{where}' is none of {', '.join(sorted(known))}")
    return found


def _texts(found: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(one, where) for one in _list(found, where))


def _size(found: Any, where: str) -> int:
    if type(found) is not int or not 0 <= found < 1 << 62:
        raise _Malformed(f"'{where}' is no size")
    return found


def _table(found: Any, where: str, kind: type) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(type(value) is kind for value in found.values()):
        raise _Malformed(f"'{where}' is no table")
    return found


def _ports(found: Any, where: str) -> tuple[Port, ...]:
    ports = []
    for row in _list(found, where):
        dtype = row.get("dtype") if isinstance(row, dict) else None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise _Malformed(f"'{where}' has an entry without a known dtype")
        below = row.get("below")
        ports.append(
            Port(
                _text(row.get("name"), f"{where}.name"),
                dtype,
                None if below is None else _size(below, f"{where}.below"),
            )
        )
    if len({port.name for port in ports}) < len(ports):
        raise _Malformed(f"'{where}' has a name twice")
    return tuple(ports)


def _shapes(found: Any, where: str, count: int) -> tuple[tuple[int | str, ...], ...]:
    rows = _list(found, where)
    if len(rows) != count:
        raise _Malformed(f"'{where}' has {len(rows)} shapes, and there are {count} ports")
    return tuple(
        tuple(_text(d, where) if isinstance(d, str) else _size(d, where) for d in _list(row, where))
        for row in rows
    )


def _bucket(row: Any, inputs: int, outputs: int) -> Bucket:
    if not isinstance(row, dict):
        raise _Malformed("'buckets' holds something else than tables")
    return Bucket(
        entry=_text(row.get("entry"), "entry"),
        sizes=_table(row.get("sizes"), "sizes", int),
        inputs=_shapes(row.get("inputs"), "buckets.inputs", inputs),
        outputs=_shapes(row.get("outputs"), "buckets.outputs", outputs),
        parameters=_texts(row.get("parameters"), "parameters"),
    )


def shape_text(shapes: Mapping[str, Sequence[int | str]]) -> str:
    """Shapes by name for a sentence: ``ids [1, 64], mask [1, 64]``."""
    return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())


def made_up(manifest: Manifest, seed: int = 0, bucket: int = 0) -> dict[str, np.ndarray]:
    """Random inputs that an artifact takes, for timing; a dimension of any size is 1.

    Floats are standard normal, integers lie below what they index.

    Raises:
        NotMeasuredError: they would not fit into memory.
    """
    rng = np.random.default_rng(seed)
    arrays = {}
    shapes = [[1 if isinstance(d, str) else d for d in shape] for shape in manifest.buckets[bucket].inputs]
    # Random numbers are drawn in eight bytes each.
    need, have = 8 * sum(map(math.prod, shapes)), available_memory()
    if need >= (_MOST_INPUT_BYTES if have is None else have):
        raise NotMeasuredError(
            f"inputs of the shapes that the manifest names take {need / 1e9:.3g} GB of memory, which are not free; "
            "give others"
        )
    for port, sizes in zip(manifest.inputs, shapes, strict=True):
        if port.dtype == "bool":
            arrays[port.name] = rng.random(sizes) < 0.5
        elif port.dtype.startswith("float"):
            arrays[port.name] = rng.standard_normal(sizes).astype(port.dtype)
        else:
            arrays[port.name] = rng.integers(0, max(1, port.below or 2), sizes).astype(port.dtype)
    return arrays
