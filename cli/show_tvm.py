"""What ``effic show`` prints of builds for TVM, and of how a model would be built."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.backends.tvm.manifest import Manifest


def print_coverage(model: str, target: str, as_json: bool) -> None:
    """How a target would run each operator of a model; leaves with 1 where it cannot run some."""
    from effic.backends import get_backend
    from effic.ir.errors import UsageError
    from effic.ir.onnx_format import read_onnx

    backend = get_backend(target)
    survey = getattr(backend, "survey", None)
    if survey is None:
        raise UsageError(
            f"show --target tells of targets that compile, as tvm-cpu and tvm-cuda, and {backend.name} is none"
        )
    found = survey(read_onnx(model))
    if as_json:
        console.print_json(found.to_dict())
    else:
        sizes = ", ".join(f"{name}={size}" for name, size in found.sizes.items())
        console.print_result(
            f"{model} on {found.target}{f' at {sizes}' if sizes else ''}",
            "",
            console.table(
                "operator", ">effic's kernels", ">effic's lowering", ">TVM's importer", ">refused",
                rows=[
                    [row.op, *(str(n or "") for n in (row.kernels, row.converted, row.imported, row.refused))]
                    for row in found.rows
                ],
            ),
        )  # fmt: skip
        if found.uncovered:
            console.print_result("", "cannot be run:")
            console.print_result(*(f"  {one}" for one in found.uncovered))
    if found.uncovered:
        raise click.exceptions.Exit(1)


def print_artifact(path: str, as_json: bool) -> None:
    """The manifest of a build."""
    from effic.backends.tvm.features import why_not_here
    from effic.backends.tvm.manifest import read_manifest, shape_text
    from effic.folder_build import folder_files

    manifest = read_manifest(path)
    files = {file.name: file.stat().st_size for file in folder_files(path)}
    misfit = why_not_here(manifest.triple, list(manifest.features))
    if as_json:
        console.print_json(
            {
                **dataclasses.asdict(manifest),
                "path": path,
                "file_bytes": sum(files.values()),
                "misfit": misfit,
            }
        )
        return
    versions = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    console.print_result(
        f"{path}: {console.size(sum(files.values()))}, built for {manifest.target}",
        f"{_made_for(manifest)}, {manifest.triple}; with {versions}",
        *(f"  {name}: {console.size(size)}" for name, size in files.items()),
        *(
            f"  in   {port.name}: {port.dtype}{console.shape_text(shape)}"
            for port, shape in zip(manifest.inputs, manifest.buckets[0].inputs, strict=True)
        ),
        *(
            f"  out  {port.name}: {port.dtype}{console.shape_text(shape)}"
            for port, shape in zip(manifest.outputs, manifest.buckets[0].outputs, strict=True)
        ),
    )
    names = [port.name for port in manifest.inputs]
    for bucket in manifest.buckets[1:]:
        console.print_result(f"  also {shape_text(dict(zip(names, bucket.inputs, strict=True)))}")
    if misfit is not None:
        console.note(f"note: it does not run on this machine: it {misfit}")
    if manifest.build is not None:
        passes = manifest.build.get("passes")
        if isinstance(passes, list) and passes:
            console.print_result("", "made by effic with:", *(f"  {text}" for text in passes))


def _made_for(manifest: Manifest) -> str:
    """The device of a build in words, and of a GPU how far the build was verified."""
    if manifest.device == "cpu":
        return f"{manifest.mcpu}, {manifest.cores} cores"
    told = {
        "built": "not compiled by nvcc, unverified",
        "compiled": "compiled by nvcc, unverified until it runs on a GPU",
        "run": "run on a GPU when it was built",
    }
    return f"GPU {manifest.mcpu} ({told[manifest.verified]})"
