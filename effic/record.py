"""The record of a build: what went in, what was done with which versions, and what came out.

A part of it that is the same on every machine and wherever the files lie (digests, passes, seeds, versions)
goes into the output's metadata; the whole of it, with the output's digests and what was measured, is written
beside the output: ``out.onnx`` has ``out.effic.json``. Its form is ``effic/schemas/record.schema.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from effic import backends
from effic import passes as all_passes
from effic.bench import machine
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.whole_files import why_no_file, write_whole
from effic.passes.pipeline import Step
from effic.passes.plugins import plugin_packages

RECORD_VERSION = 1
SUFFIX = ".effic.json"
BUILD_KEY = "effic.build"
"""Key of the model's metadata with the part of the record that is the same on every machine."""

WHOLE_BYTES = 256 << 20
"""Files up to this size are digested whole, larger ones in samples: hashing would take longer than the work."""

_SAMPLES = 256
_SAMPLE_BYTES = 64 << 10
_MOST_RECORD_BYTES = 64 << 20
_OF_TVM = ("apache-tvm", "apache-tvm-ffi")
_PACKAGES = ("effic", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch")


@dataclasses.dataclass(frozen=True)
class FileDigest:
    """What identifies a file.

    Attributes:
        name: its name, without the folder.
        bytes: its size.
        sha256: hex digest, of the whole file or of samples of it.
        sampled: whether it is the digest of samples: 256 pieces of 64 KiB, evenly spread, the first and
            the last among them.
    """

    name: str
    bytes: int
    sha256: str
    sampled: bool = False


def file_digest(path: str | os.PathLike[str], *, whole: bool | None = None) -> FileDigest:
    """Digest of a file; a large one is sampled.

    Args:
        path: the file.
        whole: read all of it whatever its size, or sample it; by size when None.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        size = os.stat(path).st_size
        sampled = size > WHOLE_BYTES if whole is None else not whole
        with open(path, "rb") as file:
            if not sampled:
                return FileDigest(Path(path).name, size, hashlib.file_digest(file, "sha256").hexdigest())
            digest = hashlib.sha256(size.to_bytes(8, "little"))
            last = max(0, size - _SAMPLE_BYTES)
            for number in range(_SAMPLES):
                file.seek(last * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
            return FileDigest(Path(path).name, size, digest.hexdigest(), True)
    except OSError as error:
        raise UsageError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error


class Digests:
    """Digests of files, made by a thread of their own while the work goes on.

    They are of the files as they are when this is created and until :meth:`result` returns.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="effic-digest")
        self._found: list[Future[FileDigest]] = [self._pool.submit(file_digest, path) for path in paths]
        self._pool.shutdown(wait=False)

    def result(self) -> list[FileDigest]:
        """All of them, in order of the files."""
        return [found.result() for found in self._found]


def record_path(output: str | os.PathLike[str]) -> Path:
    """Where the record of an output lies: ``out.effic.json`` beside ``out.onnx``."""
    path = Path(output)
    return path.with_name(path.name.removesuffix(".onnx") + SUFFIX)


def refuse_report(path: str | os.PathLike[str], what: str, models: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a file for people that cannot be written, or would replace a model's, before the work is done.

    Args:
        path: where it is to lie.
        what: it is, a noun.
        models: whose files and records are not to be replaced.

    Raises:
        UsageError: one sentence.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"the {what} {path} is a folder; name a file in it")
    if why_no_file(path):
        raise UsageError(f"the {what} {path} is a device, and no file; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} for the {what} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"the folder {path.parent} for the {what} cannot be written; name another")
    for model in models:
        own = (Path(model), Path(f"{os.fspath(model)}.data"), record_path(model))
        if path.resolve() in {file.resolve() for file in own}:
            raise UsageError(f"the {what} {path} would replace a model's file; name another file")


def versions(passes: Sequence[str] = (), target: str = "") -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, as far as they are installed.

    Args:
        passes, target: text forms; the packages of those that are plug-ins decide too.
    """
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *(_OF_TVM if target.startswith("tvm-") else ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    names = [text.partition("{")[0] for text in (*passes, target)]
    return {**plugin_packages(all_passes.GROUP, names), **plugin_packages(backends.GROUP, names), **found}


def put_build(model: Model, build: Mapping[str, Any]) -> None:
    """Write the part of the record that is the same on every machine into the model's metadata."""
    model.ir.metadata_props[BUILD_KEY] = json.dumps(build, separators=(",", ":"), sort_keys=True)


def get_build(model: Model) -> dict[str, Any] | None:
    """What :func:`put_build` wrote, or None."""
    try:
        found: dict[str, Any] = json.loads(model.ir.metadata_props.get(BUILD_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return None if _problem(found, _SHAPE["build"]) else found  # anybody may have written it


def build_of(
    *,
    front_end: str,
    files: Sequence[FileDigest],
    steps: Sequence[Step],
    target: str,
    seed: int,
    check: str,
    external: bool | None,
    calibration: Mapping[str, Any] | None,
    inputs: FileDigest | None,
) -> dict[str, Any]:
    """The part of the record that is the same on every machine.

    Args:
        front_end: how the model was read.
        files: the file and its external data; empty for a model from memory.
        steps: the passes whose work was kept.
        target: text form.
        seed: of the choice of samples and of made-up inputs.
        check: ``each``, ``final`` or ``off``.
        external: where the weights were asked to be.
        calibration: the samples' digest, how many they are and how they were chosen, or None.
        inputs: the file of the inputs for checks, or None.
    """
    own = versions([step.text for step in steps], target)
    return {
        "effic_build": RECORD_VERSION,
        "source": {
            "front_end": front_end,
            # Its own name may change; those of its external data are written in it.
            "files": [
                {**dataclasses.asdict(file), **({} if number else {"name": "model"})}
                for number, file in enumerate(files)
            ],
        },
        "passes": [step.text for step in steps],
        "options": [step.options for step in steps],
        "target": target,
        "seed": seed,
        "check": check,
        "external": external,
        "calibration": None if calibration is None else dict(calibration),
        "inputs": None if inputs is None else {**dataclasses.asdict(inputs), "name": "inputs"},
        "versions": {name: own[name] for name in own if name != "python"},
    }


def write_record(
    output: str | os.PathLike[str],
    build: Mapping[str, Any],
    *,
    paths: Mapping[str, str | None],
    files: Sequence[str | os.PathLike[str]],
    measured: Mapping[str, Any],
) -> Path:
    """Write the record beside an output, all of it or nothing.

    Args:
        output: the ``.onnx`` file.
        build: of :func:`build_of`.
        paths: where source, calibration data and inputs were found; kept relative to the record's folder
            where they lie in it or beside it.
        files: the output and its external data.
        measured: costs, distances, scores, times.
    """
    path = record_path(output)
    data = {
        "effic_record": RECORD_VERSION,
        "build": dict(build),
        "paths": {key: None if found is None else _near(found, path.parent) for key, found in paths.items()},
        "output": {"name": Path(output).name, "files": [dataclasses.asdict(file_digest(f)) for f in files]},
        "machine": {**machine(), "python": platform.python_version()},
        "measured": _plain(measured),
    }
    write_whole(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
    return path


def _plain(data: Any) -> Any:
    """The same as JSON can hold it: numbers that are not finite become text."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data


def _near(path: str, folder: Path) -> str:
    """A path from a record's folder, where it lies below the folder's parent; else the whole path."""
    if path == "random" or not os.path.exists(path):
        return path
    whole, home = Path(path).resolve(), folder.resolve()
    return os.path.relpath(whole, home) if whole.is_relative_to(home.parent) else str(whole)


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        UsageError: no such file, no record, or of a later version.
    """
    try:
        if os.stat(path).st_size > _MOST_RECORD_BYTES:
            raise UsageError(f"{os.fspath(path)} is too large to be a record")
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the record {os.fspath(path)}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{os.fspath(path)} is no record of effic: {error}") from error
    if not isinstance(data, dict) or "effic_record" not in data:
        raise UsageError(f"{os.fspath(path)} is no record of effic; name an out{SUFFIX}")
    if data["effic_record"] != RECORD_VERSION:
        raise UsageError(
            f"{os.fspath(path)} has format {data['effic_record']!r}, and this effic reads {RECORD_VERSION}"
        )
    if problem := _problem(data):
        raise UsageError(f"the record {os.fspath(path)} is malformed: {problem}")
    return data


_SHAPE: dict[str, Any] = {
    "build": {
        "source": {"front_end": str, "files": list},
        "passes": list,
        "target": str,
        "seed": int,
        "check": str,
    },
    "paths": {},
    "output": {"name": str, "files": list},
}


def _problem(data: Any, shape: Any = _SHAPE, where: str = "") -> str | None:
    """What lacks or has another type, or None."""
    for key, kind in shape.items():
        if not isinstance(data, dict) or key not in data:
            return f"there is no '{where}{key}'"
        found = data[key]
        if isinstance(kind, dict):
            if problem := _problem(found, kind, f"{where}{key}."):
                return problem
        elif not isinstance(found, kind) or isinstance(found, bool):
            return f"'{where}{key}' is {type(found).__name__}"
        elif key == "files" and not all(
            isinstance(f, dict)
            and all(isinstance(f.get(k), t) for k, t in (("name", str), ("bytes", int), ("sha256", str)))
            and Path(f["name"]).name == f["name"]
            for f in found
        ):
            return f"'{where}files' holds something else than names, sizes and digests"
        elif key == "passes" and not all(isinstance(text, str) for text in found):
            return f"'{where}passes' holds something else than texts"
    return None
