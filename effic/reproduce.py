"""Build a model again from its record, and compare bit for bit."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effic.backends.tvm.manifest import MANIFEST
from effic.folder_build import folder_files
from effic.ir.errors import UsageError
from effic.ir.model import Model, constant_tensor
from effic.ir.onnx_format import read_onnx
from effic.ir.whole_folder import WholeFolder
from effic.measure import external_files
from effic.optimize import optimize
from effic.record import FileDigest, file_digest, read_record, versions

Progress = Callable[[str, int, int], None]
_NAMED = 5


@dataclass(frozen=True)
class Reproduction:
    """What building again gave.

    Attributes:
        same: whether every file of the output is the same, bit for bit.
        differences: what is not, most telling first; each a sentence.
        other_versions: packages that have another version than then, as ``"onnx 1.22 then, 1.23 now"``.
        output: where the new build was kept, or None.
    """

    same: bool
    differences: tuple[str, ...]
    other_versions: tuple[str, ...]
    output: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


def reproduce(
    record: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    calib: str | os.PathLike[str] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Reproduction:
    """Build again what a record describes.

    Args:
        record: an ``out.effic.json``.
        source, calib, inputs: where these files are now, when they were moved.
        output: keep the new build there; by default it is thrown away after the comparison.
        force: allow writing over an existing file.
        progress: as :func:`effic.optimize` takes it.

    Raises:
        UsageError: no record, or the source, the calibration data or the inputs are missing or others than
            those of the record; nothing was built.
        EfficError: the build fails.
    """
    data = read_record(record)
    build, folder = data["build"], Path(record).parent
    if not build["source"]["files"]:
        raise UsageError(
            "the record is of a model that came from memory; only builds from files can be repeated"
        )
    model_path = _found("source", source, data, folder)
    _same_files("source", build["source"]["files"], model_path)
    calib_path = _found("calib", calib, data, folder) if build.get("calibration") else None
    inputs_path = _found("inputs", inputs, data, folder) if build.get("inputs") else None
    if inputs_path is not None:
        _same_files("inputs", [build["inputs"]], inputs_path)
    name = data["output"]["name"]
    with tempfile.TemporaryDirectory(prefix="effic-reproduce-") as scratch:
        # The same name: external data are named after the model's file, and the name is part of it.
        made = Path(scratch) / name
        options: dict[str, Any] = {}
        calibration = build.get("calibration") or {}
        if calib_path is not None:
            options["calib"] = calib_path
            for key in ("calib_samples", "calib_window"):
                if calibration.get(key) is not None:
                    options[key] = calibration[key]
        report = optimize(
            model_path,
            ",".join(build["passes"]) or [],
            output=made,
            target=build["target"],
            inputs=inputs_path,
            seed=build["seed"],
            check=build["check"],
            external=build.get("external"),
            progress=progress,
            **options,
        )
        then = calibration.get("digest")
        now = None if report.calibration is None else report.calibration.get("digest")
        if then != now:
            raise UsageError("the calibration data are others than those of the record: their digest differs")
        other = _other_versions(build.get("versions", {}), versions(build["passes"], build["target"]))
        differences = _differences(data, made, folder)
        if output is not None:
            _keep(made, Path(output), force)
    return Reproduction(
        not differences,
        tuple(differences),
        tuple(other),
        None if output is None else os.fspath(output),
    )


def _found(what: str, given: str | os.PathLike[str] | None, data: dict[str, Any], folder: Path) -> str:
    """Where a file of the record is now."""
    if given is not None:
        return os.fspath(given)
    path = data["paths"].get(what)
    if path is None:
        raise UsageError(f"the record does not say where the {what} was; give it with --{what}")
    if path == "random" or (":" in path and not os.path.exists(folder / path)):
        return str(path)  # made-up data, or a function
    found = folder / path
    if not found.exists():
        raise UsageError(f"the {what} of the record, {path}, is not there; say where it is with --{what}")
    return str(found)


def _same_files(what: str, wanted: Sequence[Mapping[str, Any]], path: str) -> None:
    for number, entry in enumerate(wanted):
        # The first is the file itself, which may have been renamed; the others are named in it.
        file = Path(path) if number == 0 else Path(path).parent / str(entry["name"])
        if not file.is_file():
            raise UsageError(f"the {what} lacks its file {file}; put it back")
        found = file_digest(file, whole=not entry.get("sampled", False))
        if found.sha256 != entry["sha256"] or found.bytes != entry["bytes"]:
            raise UsageError(
                f"the {what} {file} is another file than that of the record: it has {found.bytes} bytes and the "
                f"digest {found.sha256[:12]}…, the record says {entry['bytes']} and {str(entry['sha256'])[:12]}…"
            )


def _other_versions(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{name} {then.get(name, 'absent')} then, {now.get(name, 'absent')} now"
        for name in sorted({*then, *now} - {"python"})
        if then.get(name) != now.get(name)
    ]


def _differences(data: dict[str, Any], made: Path, folder: Path) -> list[str]:
    """What differs between the recorded output and the new one; empty when not a bit does."""
    wanted = {entry["name"]: entry for entry in data["output"]["files"]}
    model = None if made.is_dir() else read_onnx(made)
    files = {
        path.name: path for path in (folder_files(made) if model is None else (*external_files(model), made))
    }
    found = []
    for name in sorted({*wanted, *files}):
        if name not in files:
            found.append(f"the file {name} was not written this time")
        elif name not in wanted:
            found.append(f"the file {name} was not there then")
        else:
            entry = wanted[name]
            digest: FileDigest = file_digest(files[name], whole=not entry.get("sampled", False))
            if (digest.sha256, digest.bytes) != (entry["sha256"], entry["bytes"]):
                found.append(f"{name} differs: {digest.bytes} bytes now, {entry['bytes']} then")
    old = folder / data["output"]["name"]
    if found and model is not None and old.is_file():
        found += _inside(read_onnx(old), model)
    return found


def _inside(old: Model, new: Model) -> list[str]:
    """Where two models differ: operators, tensors, metadata."""
    found = []
    ops = [[f"{n.op_type} {n.name}" for n in m.nodes(domain=None)] for m in (old, new)]
    if ops[0] != ops[1]:
        odd = next((b for a, b in zip(*ops, strict=False) if a != b), "the end")
        found.append(f"the nodes differ ({len(ops[0])} then, {len(ops[1])} now), first at {odd}")
    tensors = [
        {name: constant_tensor(value) for graph in m.graphs() for name, value in graph.initializers.items()}
        for m in (old, new)
    ]
    names = [
        name
        for name in sorted({*tensors[0], *tensors[1]})
        if not _equal(tensors[0].get(name), tensors[1].get(name))
    ]
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        found.append(f"{len(names)} tensors differ: {', '.join(names[:_NAMED])}{more}")
    keys = [
        key
        for key in sorted({*old.ir.metadata_props, *new.ir.metadata_props})
        if old.ir.metadata_props.get(key) != new.ir.metadata_props.get(key)
    ]
    if keys:
        only = "only " if not found else ""
        found.append(f"{only}the metadata differ: {', '.join(keys)}")
    return found


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if (a.dtype, tuple(a.shape)) != (b.dtype, tuple(b.shape)):
        return False
    return bool(np.array_equal(a.numpy().view(np.uint8), b.numpy().view(np.uint8)))


def _keep(made: Path, output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise UsageError(f"the output {output} exists; give --force to write over it")
    if made.is_dir():
        with WholeFolder(output) as place:
            for file in folder_files(made):
                shutil.copy(file, place.path)
            place.commit(mark=MANIFEST, force=force)
        return
    model = read_onnx(made)
    if output.name == made.name:
        for file in external_files(model):
            shutil.copy(file, output.parent / file.name)
        shutil.copy(made, output)
    else:
        model.save(output, force=force)
