"""The same model on two targets: what each makes of it, on the same inputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from effic.backends.base import Backend, Tell
from effic.compare import DEFAULT_COUNT, Bounds, Comparison, compare
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.passes.base import Remarks


def cross_check(
    path: str | os.PathLike[str],
    targets: str | Sequence[Backend],
    *,
    inputs: Mapping[str, np.ndarray] | str | os.PathLike[str] | None = None,
    seed: int = 0,
    count: int = DEFAULT_COUNT,
    taps: bool = False,
    bounds: Bounds | None = None,
    tell: Tell | None = None,
) -> Comparison:
    """Lower a model for two targets, build both, and compare what they compute.

    Args:
        path: the model, an ``.onnx`` file.
        targets: two, as text (``"ort-cpu,tvm-cpu{activations=int8}"``) or objects; the first is the reference.
        inputs, seed, count, bounds: as :func:`effic.compare.compare` takes them.
        taps: compare the values of all nodes too, in order. What is looked at cannot be fused away, so
            each target runs other code than without.
        tell: hears of the stages of a compiler.

    Returns:
        The comparison; ``a`` and ``b`` are the targets' texts.

    Raises:
        UsageError: there are not two targets, or inputs do not fit.
        UnsupportedError: a target cannot run the model.
    """
    from effic.backends import get_backends

    backends = get_backends(targets) if isinstance(targets, str) else list(targets)
    if len(backends) != 2:
        raise UsageError(f"two targets are compared, and {len(backends)} are named; write ort-cpu,tvm-cpu")
    model = read_onnx(path)
    if taps:
        model = tapped(model)
    with tempfile.TemporaryDirectory(prefix="effic-cross-check-") as scratch:
        built = []
        for number, backend in enumerate(backends):
            copy = model.clone()
            backend.lower(copy, Remarks())
            place = os.path.join(scratch, f"{number}" if backend.is_folder else f"{number}.onnx")
            backend.build(copy, place, tell=tell)
            built.append(place)
        found = compare(built[0], built[1], inputs=inputs, seed=seed, count=count, bounds=bounds)
    found.a, found.b = (backend.text for backend in backends)
    return found


def tapped(model: Model) -> Model:
    """A copy whose outputs are all values that nodes of the main graph compute from the inputs, in order."""
    copy = model.clone()
    fed: set[ir.Value] = set(copy.graph.inputs)
    outputs = list(copy.graph.outputs)
    taps = []
    for node in copy.graph:
        # What is computed from constants alone (a weight being decoded) is no activation.
        if not any(value in fed for value in node.inputs):
            continue
        fed.update(node.outputs)
        taps += [v for v in node.outputs if v.name and v not in outputs and _is_tensor(v)]
    copy.graph.outputs[:] = [*taps, *outputs]
    return copy


def _is_tensor(value: ir.Value) -> bool:
    return bool(value.uses()) and (value.type is None or isinstance(value.type, ir.TensorType))
