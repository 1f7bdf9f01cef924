"""Run a lowered module in this process, with TVM's own pipeline: what is judged is the lowering alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from effic.backends.tvm.codegen import generating
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.relax_builder import Bucket, Signature, build_relax
from effic.backends.tvm.specialize import dim_name
from effic.ir.evaluate import Distance, Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model

CPU = Cpu.host(1)


class Lowered:
    """A model as a Relax module that runs.

    Attributes:
        module: before compilation.
        parameters, signature: see :func:`build_relax`.
    """

    def __init__(self, model: Model, shapes: str = "", **options: Any) -> None:
        self.module, self.parameters, self.signature = build_relax(model, CPU, shapes, options)
        target = CPU.target()
        with target, generating():
            executable = tvm.compile(self.module, target, relax_pipeline=relax.get_default_pipeline(target))
        self._machine = relax.VirtualMachine(executable, tvm.cpu())

    @property
    def kernels(self) -> set[str]:
        """Families of effic's kernels that are called."""
        names = [variable.name_hint for variable in self.module.get_global_vars()]
        return {name.split("_")[0] for name in names if not name.startswith("main_")}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        bucket = self.signature.buckets[_fitting(self.signature, inputs)]
        given = [np.array(inputs[one.name], order="C") for one in bucket.inputs]
        weights = [self.parameters[name] for name in bucket.parameters]
        result = self._machine[bucket.function](*(tvm.runtime.tensor(a) for a in [*given, *weights]))
        results = [result] if len(bucket.outputs) == 1 else list(result)
        return {one.name: got.numpy() for one, got in zip(bucket.outputs, results, strict=True)}


def _fitting(signature: Signature, inputs: Mapping[str, np.ndarray]) -> int:
    def fits(bucket: Bucket) -> bool:
        return all(
            not isinstance(size, int) or size == have
            for one in bucket.inputs
            for size, have in zip(one.shape, inputs[one.name].shape, strict=True)
        )

    return next(i for i, bucket in enumerate(signature.buckets) if fits(bucket))


def sizes_of(model: Model, inputs: Mapping[str, np.ndarray]) -> str:
    """The option ``shapes`` for inputs: every open dimension pinned."""
    found = {
        dim_name(value, axis): size
        for value in model.graph.inputs
        for axis, size in enumerate(inputs[value.name or ""].shape)
        if value.shape is not None and not isinstance(value.shape[axis], int)
    }
    return ",".join(f"{name}={size}" for name, size in found.items())


def distance_from_oracle(model: Model, shapes: str | None = None, **options: Any) -> Distance:
    """How far the module's outputs lie from the oracle's; ``shapes`` None pins what the inputs have."""
    inputs, expected = runnable_inputs(model, Oracle(model))
    lowered = Lowered(model, sizes_of(model, inputs) if shapes is None else shapes, **options)
    return compare_outputs(expected, lowered.run(inputs))
