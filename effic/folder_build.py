"""A build that is a folder: made in a place of its own, checked there, and given its name when it is whole.

Targets that compile (:attr:`effic.backends.base.Backend.is_folder`) come this way; what ONNX Runtime loads is the
model's own file and does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.backends.artifact import Artifact
from effic.backends.base import Arrays, Backend, Tell
from effic.backends.tvm.manifest import MANIFEST, Manifest, Port, read_manifest
from effic.ir.errors import CheckFailedError, UsageError
from effic.ir.evaluate import Distance, Oracle, compare_outputs, rounding_tolerance, seeded_inputs
from effic.ir.model import Model
from effic.ir.tensors import Scratch
from effic.ir.whole_files import Before
from effic.ir.whole_folder import WholeFolder, why_not_replace
from effic.passes.base import Numerics
from effic.passes.calibration import Calibration
from effic.passes.pipeline import Step, judge

REORDERED = 10.0
"""Times the tolerance of one reordering that a compiled model may be off: every operator is another's code,
and what is wrong in one is off by far more."""

LEAST_SQNR_DB = 20.0
"""Of a build that rounds activations to 8 bits, against the same weights with exact activations: a chain of
twelve products has 31 dB, and a wrong kernel none."""


class FolderBuild:
    """A model built for a target into a temporary folder, which goes away unless it is kept.

    Args:
        backend: the target.
        model: what it lowered.
        output: the name the folder may get, or None; it is made beside that place.
        inputs: what to run it on when it is finished.
        tell: hears of the stages.

    Attributes:
        outputs: of ``inputs``, or None.
    """

    def __init__(
        self,
        backend: Backend,
        model: Model,
        output: str | os.PathLike[str] | None,
        inputs: Mapping[str, np.ndarray] | None,
        tell: Tell | None = None,
    ) -> None:
        self._scratch = Scratch()
        self._backend = backend
        stack = contextlib.ExitStack()
        self._close = weakref.finalize(self, stack.close)
        place = os.path.join(self._scratch.folder, "built") if output is None else output
        self._folder = stack.enter_context(WholeFolder(place))
        try:
            self._built = backend.build(model, self._folder.path, inputs=inputs, tell=tell)
        except BaseException:
            # Now, and not when whoever has the error lets go of it.
            self._close()
            raise
        self.outputs = self._built.outputs

    def note(self, step: Step) -> None:
        """Add what the build did to the step of lowering."""
        step.remarks += self._built.remarks
        step.seconds += self._built.seconds
        step.peak_memory = max(step.peak_memory, self._built.peak_memory)
        step.changed = True

    def load(self, threads: int = 1) -> Artifact:
        """The artifact, where it lies now."""
        return self._backend.load(self._folder.path, threads=threads)

    def run(self, feeds: Iterator[Mapping[str, np.ndarray]]) -> Iterator[Arrays]:
        """Outputs for each of several sets of inputs."""
        return self._backend.run_apart(self._folder.path, feeds)

    def keep(
        self,
        output: str | os.PathLike[str],
        build: Mapping[str, Any] | None,
        *,
        force: bool = False,
        before: Before | None = None,
    ) -> int:
        """Give the folder its name; its size in bytes.

        Args:
            output: the name.
            build: the record to put into the manifest, or None.
            force: replace an older artifact.
            before: called with its name and stamp before the older one goes.
        """
        if build is not None:
            manifest = read_manifest(self._folder.path)
            dataclasses.replace(manifest, build=dict(build)).write(self._folder.path)
        self._folder.commit(mark=MANIFEST, force=force, before=before)
        return sum(file.stat().st_size for file in folder_files(output))


def folder_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of an artifact, by name."""
    return sorted(file for file in Path(path).iterdir() if file.is_file())


def refuse_output(
    backend: Backend, output: str | os.PathLike[str], force: bool, external: bool | None
) -> None:
    """Say what would stop a folder from getting its name before the work is done.

    Raises:
        UsageError: one sentence.
    """
    path = os.fspath(output)
    if path.endswith(".onnx"):
        raise UsageError(f"{backend.name} writes a folder, and {path} is the name of a file; call it out.tvm")
    if external is not None:
        raise UsageError(f"--external-data and --single-file do nothing with {backend.name}; leave them out")
    if (problem := why_not_replace(path, MANIFEST, force)) is not None:
        raise UsageError(problem)


def pinned(model: Model, sizes: Mapping[str, int]) -> Model:
    """The model with sizes for dynamic dimensions of its inputs; it shares the weights."""
    if not sizes:
        return model
    copy = model.clone()
    for value in copy.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    dim if isinstance(dim, int) else sizes.get(dim.value or f"{value.name}.{axis}", dim)
                    for axis, dim in enumerate(value.shape)
                ]
            )
    return copy


def load_artifact(path: str | os.PathLike[str], threads: int = 1) -> Artifact:
    """A model file in ONNX Runtime, or a folder that was built for TVM."""
    if os.path.isdir(path):
        from effic.backends.tvm.artifact import TvmArtifact

        return TvmArtifact.load(path, threads=threads)
    from effic.backends.ort.artifact import OrtArtifact

    return OrtArtifact.load(path, threads=threads)


def pinned_to(model: Model, manifest: Manifest, bucket: int = 0) -> Model:
    """The model with the input shapes of a build's bucket."""
    shapes = {port.name: s for port, s in zip(manifest.inputs, manifest.buckets[bucket].inputs, strict=True)}
    copy = model.clone()
    for value in copy.graph.inputs:
        wanted = shapes.get(value.name or "")
        if wanted is not None and value.shape is not None and len(wanted) == len(value.shape):
            value.shape = ir.Shape(wanted)
    return copy


def model_of(manifest: Manifest) -> Model:
    """A model without nodes that has a build's inputs and outputs, to tell what goes in and comes out."""

    def values(ports: Sequence[Port], shapes: Sequence[Sequence[int | str]]) -> list[ir.Value]:
        return [
            ir.Value(
                name=port.name,
                type=ir.TensorType(ir.DataType.from_numpy(np.dtype(port.dtype))),
                shape=ir.Shape(shape),
            )
            for port, shape in zip(ports, shapes, strict=True)
        ]

    first = manifest.buckets[0]
    inputs, outputs = values(manifest.inputs, first.inputs), values(manifest.outputs, first.outputs)
    graph = ir.Graph(inputs, outputs, nodes=[], opset_imports={"": 21}, name="build")
    return Model(ir.Model(graph, ir_version=10))


def inputs_that_fit(
    backend: Backend, model: Model, arrays: Mapping[str, np.ndarray] | None, *, given: bool, seed: int
) -> Mapping[str, np.ndarray] | None:
    """What to check a build on: ``arrays`` where they have its sizes, made-up ones otherwise.

    Args:
        backend: the target.
        model: the original.
        arrays: inputs of the user's, a calibration sample, or None.
        given: whether they are the user's own choice, which is not replaced.
        seed: of made-up inputs.

    Returns:
        Arrays by name; None where any sizes will do and none are at hand.

    Raises:
        UsageError: the user's inputs have other sizes.
    """
    sizes = backend.sizes(model)
    if arrays is not None:
        if (misfit := _misfit(pinned(model, sizes), arrays)) is None:
            return arrays
        if given:
            raise UsageError(f"{misfit}; give inputs of these sizes, or others in shapes")
    return seeded_inputs(pinned(model, sizes), seed) if sizes else arrays


def _misfit(model: Model, arrays: Mapping[str, np.ndarray]) -> str | None:
    for value in model.graph.inputs:
        array = arrays.get(value.name or "")
        if array is None or value.shape is None:
            continue
        wanted = [dim if isinstance(dim, int) else None for dim in value.shape]
        if len(wanted) != array.ndim or any(
            want is not None and want != size for want, size in zip(wanted, array.shape, strict=True)
        ):
            shape = [str(dim) for dim in value.shape]
            given, wanted_text = list(array.shape), ", ".join(shape)
            return f"the input '{value.name}' has the shape {given}, and the build takes [{wanted_text}]"
    return None


def check_build(
    build: FolderBuild,
    canonical: Model,
    backend: Backend,
    inputs: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray] | None = None,
) -> tuple[str, Distance]:
    """Hold what a build computes against the model as it is written, encoded weights against their own decode.

    Args:
        build: it was run on ``inputs``.
        canonical: the model that it was built from.
        backend: the target.
        inputs: arrays by name.
        wanted: the model's outputs for them, where they are known.

    Returns:
        The verdict in words, and the distance.

    Raises:
        CheckFailedError: it is further off than its arithmetic explains.
    """
    reference = Oracle(canonical).run(inputs) if wanted is None else wanted
    return _judged(canonical, backend, reference, build.outputs or {})


def check_buckets(
    build: FolderBuild,
    canonical: Model,
    backend: Backend,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Hold what a build computes at each of its sets of sizes but the first against the model, one after another.

    The inputs are the first calibration sample that has the sizes, or made up.

    Args:
        build, canonical, backend: see :func:`check_build`, which is for the first set.
        calibration: samples of the user's, or None.
        seed: of made-up inputs.

    Returns:
        A row for each: ``sizes``, ``verdict`` and ``distance``.

    Raises:
        CheckFailedError: one of them is further off than its arithmetic explains.
    """
    others = backend.buckets(canonical)[1:]
    if not others:
        return []

    def feeds() -> Iterator[Mapping[str, np.ndarray]]:
        for sizes in others:
            model = pinned(canonical, sizes)
            found: Mapping[str, np.ndarray] | None = None
            if calibration is not None:
                found = next(
                    (arrays for arrays in calibration.feeds() if _misfit(model, arrays) is None), None
                )
            yield seeded_inputs(model, seed) if found is None else found

    oracle, rows = Oracle(canonical), []
    for sizes, inputs, got in zip(others, feeds(), build.run(feeds()), strict=True):
        where = ",".join(f"{name}={size}" for name, size in sizes.items())
        verdict, distance = _judged(canonical, backend, oracle.run(inputs), got, f" at {where}")
        rows.append({"sizes": sizes, "verdict": verdict, "distance": distance.to_dict()})
    return rows


def _judged(
    canonical: Model,
    backend: Backend,
    reference: Mapping[str, np.ndarray],
    got: Mapping[str, np.ndarray],
    where: str = "",
) -> tuple[str, Distance]:
    distance = compare_outputs(reference, got)
    rounds = getattr(backend, "activations", "fp32") == "int8" or _rounds(canonical)
    tolerance = REORDERED * rounding_tolerance(canonical)
    numerics = Numerics.LOSSY if rounds else Numerics.ROUNDING
    verdict = judge(distance, numerics, tolerance)
    if rounds and not verdict.startswith("broken") and distance.sqnr_db < LEAST_SQNR_DB:
        verdict = f"broken: SQNR {distance.sqnr_db:.1f} dB, at least {LEAST_SQNR_DB:g} dB are required"
    if verdict.startswith("broken"):
        raise CheckFailedError(
            f"what {backend.text} built is not the model{where}: {verdict.removeprefix('broken: ')}; nothing was "
            "written"
        )
    return verdict, distance


def _rounds(model: Model) -> bool:
    """Whether activations are rounded in the model itself: a hair's breadth before is a step after."""
    return (
        next(model.nodes("QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil"), None)
        is not None
    )
