"""How far apart the outputs of two models are on the same inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.manifest import is_artifact, made_up, read_manifest
from effic.folder_build import model_of, pinned_to
from effic.guard import Accuracy, Guard
from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.evaluate import (
    Distance,
    Oracle,
    comparable,
    distances,
    load_inputs,
    runnable_inputs,
    start_session,
)
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx

DEFAULT_COUNT = 4
"""Sets of seeded inputs: one alone can hit or miss a near-tie of the top entries."""


@dataclass(frozen=True)
class Bounds:
    """How far outputs may lie apart; None leaves a quantity free.

    Attributes:
        max_abs: largest absolute difference allowed.
        rtol: largest difference allowed, relative to the reference output's largest magnitude.
        min_sqnr: lowest signal-to-noise ratio allowed, in dB.
        min_cosine: lowest cosine allowed.
        min_top1: lowest share of rows whose largest entry agrees.
    """

    max_abs: float | None = None
    rtol: float | None = None
    min_sqnr: float | None = None
    min_cosine: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        # A bound that nothing can break would pass everything in silence, and NaN is one.
        for what, value, low, high in (
            ("max_abs", self.max_abs, 0.0, math.inf),
            ("rtol", self.rtol, 0.0, math.inf),
            ("min_sqnr", self.min_sqnr, -math.inf, math.inf),
            ("min_cosine", self.min_cosine, -1.0, 1.0),
            ("min_top1", self.min_top1, 0.0, 1.0),
        ):
            if value is not None and not low <= value <= high:
                raise UsageError(f"the bound {what} is {value:g}; it must lie between {low:g} and {high:g}")

    def broken_by(self, name: str, distance: Distance) -> list[str]:
        """Each bound (and each thing no bound excuses) that an output breaks, as a phrase."""
        if distance.shape_mismatch:
            return [f"output '{name}' {distance.shape_mismatch}"]
        found = []
        if distance.new_nonfinite:
            found.append(
                f"output '{name}' has {distance.new_nonfinite} entries that are NaN or Inf only there"
            )
        if self.max_abs is not None and distance.max_abs > self.max_abs:
            found.append(
                f"output '{name}' differs by {distance.max_abs:.3g}, at most {self.max_abs:g} is allowed"
            )
        if self.rtol is not None and distance.max_rel > self.rtol:
            found.append(
                f"output '{name}' differs by {distance.max_rel:.3g} of its range, at most {self.rtol:g} is allowed"
            )
        if self.min_sqnr is not None and distance.sqnr_db < self.min_sqnr:
            found.append(
                f"output '{name}' has {distance.sqnr_db:.1f} dB SQNR, at least {self.min_sqnr:g} dB are required"
            )
        if self.min_cosine is not None and distance.cosine < self.min_cosine:
            found.append(
                f"output '{name}' has the cosine {distance.cosine:.6f}, at least {self.min_cosine:g} is required"
            )
        if self.min_top1 is not None and distance.top1 is not None and distance.top1 < self.min_top1:
            found.append(
                f"output '{name}' agrees in {distance.top1:.2%} of the top entries, "
                f"at least {self.min_top1:.2%} is required"
            )
        if distance.wrong_integers and (self.max_abs is not None or self.rtol is not None):
            found.append(f"output '{name}' has {distance.wrong_integers} integer entries that differ")
        return found


@dataclass
class Comparison:
    """The outcome of :func:`compare`.

    Attributes:
        a: the reference's path.
        b: the other's path.
        engine: how both were run, as a phrase.
        inputs: where the inputs came from, as a phrase.
        outputs: the distance of each output of ``b`` from that of ``a``, by ``a``'s name.
        notes: what the reader should know, each a sentence.
        broken: the bounds that are broken, each as a phrase; empty when none is.
        accuracy: the metric of both, and what was allowed, where one was asked for.
    """

    a: str
    b: str
    engine: str
    inputs: str
    outputs: dict[str, Distance] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    accuracy: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-able data."""
        return {
            "a": self.a,
            "b": self.b,
            "engine": self.engine,
            "inputs": self.inputs,
            "outputs": {name: distance.to_dict() for name, distance in self.outputs.items()},
            "notes": self.notes,
            "broken": self.broken,
            "accuracy": self.accuracy,
        }


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    inputs: Mapping[str, np.ndarray] | str | os.PathLike[str] | None = None,
    seed: int = 0,
    count: int = DEFAULT_COUNT,
    as_written: bool = False,
    bounds: Bounds | None = None,
    accuracy: Accuracy | None = None,
) -> Comparison:
    """Run two ONNX files on the same inputs and measure how far their outputs lie apart.

    Args:
        a: the reference: an ONNX file, or the folder of a build for TVM.
        b: the other.
        inputs: arrays by input name, or an ``.npz`` file of them; seeded random ones by default.
        seed: of the first set of seeded inputs; the next ones count up.
        count: how many sets of seeded inputs.
        as_written: run the graphs as they are written. By default ONNX Runtime optimises both as it
            does for a user of the files, which may move the numbers by itself.
        bounds: what to hold the distances to.
        accuracy: a metric to score both by, the data, and how much worse ``b`` may be.

    Raises:
        UsageError: a file is not there, the inputs of the two models differ, or the outputs cannot
            be paired.
        InvalidModelError: a file is broken.
        NotMeasuredError: a model cannot be run.
    """
    folders = is_artifact(a), is_artifact(b)
    models = tuple(
        model_of(read_manifest(p)) if f else read_onnx(p) for p, f in zip((a, b), folders, strict=True)
    )
    _same_inputs(models[0], models[1], a, b)
    runs = _opened(a, folders[0], as_written), _opened(b, folders[1], as_written)
    comparison = Comparison(os.fspath(a), os.fspath(b), _engine(folders, as_written), "")
    pairs = _paired_outputs(*runs, comparison)
    results: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    if inputs is not None:
        given = inputs if isinstance(inputs, Mapping) else load_inputs(inputs)
        comparison.inputs = "given arrays" if isinstance(inputs, Mapping) else os.fspath(inputs)
        results.append((runs[0].run(given), runs[1].run(given)))
    else:
        if count < 1:
            raise UsageError(f"the count of seeded inputs is {count}; it must be at least 1")
        comparison.inputs = f"{count} seeded random sets (seed {seed})"
        # The model with more fixed sizes decides the inputs: the other one accepts them too.
        first = min((0, 1), key=lambda i: _dynamic_dims(models[i]))
        for number in range(seed, seed + count):
            if folders[0] and folders[1]:
                arrays = made_up(read_manifest(a), number)
                mine = runs[first].run(arrays)
            else:
                arrays, mine = runnable_inputs(_deciding(models, folders, (a, b)), runs[first], number)
            other = runs[1 - first].run(arrays)
            results.append((mine, other) if first == 0 else (other, mine))
    reference = {name: _stack([left[name] for left, _ in results]) for name in pairs}
    got = {name: _stack([right[other] for _, right in results]) for name, other in pairs.items()}
    if not comparable(reference):
        raise NotMeasuredError(
            f"the outputs of {a} are empty or all NaN on these inputs, so there is nothing to compare; "
            "give others with --inputs"
        )
    comparison.outputs = dict(distances(reference, got))
    for name, distance in comparison.outputs.items():
        comparison.broken += (bounds or Bounds()).broken_by(name, distance)
    if accuracy is not None:
        guard = Guard.scored(accuracy, _deciding(models, folders, (a, b)), runs[0].run)
        guard.after = guard.score(runs[1].run)
        comparison.accuracy = guard.to_dict()
        if reason := guard.why_not(guard.after):
            comparison.broken.append(reason)
    return comparison


class _FileOracle(Oracle):
    """A model file run as it lies on the disk: what is compared is the very file people get."""

    def __init__(self, path: Path, *, optimized: bool) -> None:
        self._session = start_session(str(path), optimized=optimized)
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]


def _opened(path: str | os.PathLike[str], folder: bool, as_written: bool) -> Oracle | TvmArtifact:
    return TvmArtifact.load(path) if folder else _FileOracle(Path(path), optimized=not as_written)


def _engine(folders: tuple[bool, bool], as_written: bool) -> str:
    """How both were run, as a phrase."""
    runtime = "ONNX Runtime, graphs as written" if as_written else "ONNX Runtime, default optimisation"
    if folders[0] and folders[1]:
        return "TVM"
    return (
        f"{runtime} ({'B' if folders[0] else 'A'}), TVM ({'A' if folders[0] else 'B'})"
        if any(folders)
        else runtime
    )


def _deciding(
    models: tuple[Model, ...], folders: tuple[bool, bool], paths: tuple[str | os.PathLike[str], ...]
) -> Model:
    """The model that tells which inputs fit both: a build has fixed sizes, a file knows what indexes what."""
    if folders[0] == folders[1]:
        return models[min((0, 1), key=lambda i: _dynamic_dims(models[i]))]
    built = folders.index(True)
    return pinned_to(models[1 - built], read_manifest(paths[built]))


def _same_inputs(a: Model, b: Model, path_a: Any, path_b: Any) -> None:
    left, right = _inputs(a), _inputs(b)
    for name in [*left, *right]:
        if name not in left or name not in right:
            lacking, having = (path_a, path_b) if name not in left else (path_b, path_a)
            raise UsageError(
                f"the models take different inputs: '{having}' has '{name}', which '{lacking}' lacks; "
                "compare models with the same inputs"
            )
        if not _compatible(left[name], right[name]):
            raise UsageError(
                f"the models take different inputs: '{name}' is {_text(left[name])} in '{path_a}' and "
                f"{_text(right[name])} in '{path_b}'; compare models with the same inputs"
            )


def _inputs(model: Model) -> dict[str, ir.Value]:
    return {v.name or "": v for v in model.graph.inputs if not v.is_initializer()}


def _compatible(a: ir.Value, b: ir.Value) -> bool:
    if a.dtype != b.dtype:
        return False
    if a.shape is None or b.shape is None:
        return True
    return len(a.shape) == len(b.shape) and all(
        left == right or not isinstance(left, int) or not isinstance(right, int)
        for left, right in zip(a.shape, b.shape, strict=True)
    )


def _text(value: ir.Value) -> str:
    return f"{value.dtype}{value.shape if value.shape is not None else ''}"


def _dynamic_dims(model: Model) -> int:
    return sum(
        not isinstance(dim, int) for value in _inputs(model).values() for dim in value.shape or (None,) * 8
    )


def _paired_outputs(
    a: Oracle | TvmArtifact, b: Oracle | TvmArtifact, comparison: Comparison
) -> dict[str, str]:
    if set(a.outputs) == set(b.outputs):
        return {name: name for name in a.outputs}
    if len(a.outputs) == len(b.outputs):
        comparison.notes.append("the outputs have different names and were paired by position")
        return dict(zip(a.outputs, b.outputs, strict=True))
    raise UsageError(
        f"'{comparison.a}' has {len(a.outputs)} outputs and '{comparison.b}' has {len(b.outputs)}; "
        "compare models with the same outputs"
    )


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    if any(array.shape != arrays[0].shape for array in arrays):
        # Outputs whose size depends on the values (a detector's boxes): compared as one long row.
        return np.concatenate([array.reshape(-1) for array in arrays])
    return np.stack(arrays)
