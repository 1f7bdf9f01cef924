"""Run a finished artifact in a child process: what is wrong with native code ends that, and not this one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from effic.backends.artifact import Arrays
from effic.backends.tvm.artifact import TvmArtifact
from effic.backends.tvm.build_steps import load_arrays, save_arrays
from effic.backends.tvm.child import Tell, run_in_child


def run_apart(folder: str | os.PathLike[str], feeds: Iterable[Mapping[str, np.ndarray]]) -> Iterator[Arrays]:
    """Outputs by name for each of several sets of inputs.

    Inputs and outputs lie in temporary files, so that only one set of them is in memory at a time.

    Raises:
        EfficError: as :meth:`TvmArtifact.run` raises it.
        NotMeasuredError: the run crashed.
    """
    with tempfile.TemporaryDirectory(prefix="effic-tvm-") as scratch:
        names = []
        for number, inputs in enumerate(feeds):
            save_arrays(os.path.join(scratch, f"{number}.in.npz"), inputs.values())
            names.append(list(inputs))
        if not names:
            return
        request = {"folder": os.path.abspath(folder), "scratch": scratch, "inputs": names}
        result = run_in_child(
            "the run", "effic.backends.tvm.run_apart:run_in_the_child", request, scratch, None
        )
        for number in range(len(names)):
            arrays = load_arrays(os.path.join(scratch, f"{number}.out.npz"))
            yield dict(zip(result["outputs"], arrays, strict=True))


def run_in_the_child(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The child's side."""
    tell("loading", 0, 0)
    artifact = TvmArtifact.load(request["folder"], threads=1)
    for number, names in enumerate(request["inputs"]):
        tell("running the result", number, len(request["inputs"]))
        arrays = load_arrays(os.path.join(request["scratch"], f"{number}.in.npz"))
        found = artifact.run(dict(zip(names, arrays, strict=True)))
        save_arrays(
            os.path.join(request["scratch"], f"{number}.out.npz"), [found[name] for name in artifact.outputs]
        )
    return {"outputs": artifact.outputs}
