"""Which operators a target runs, asked of the target itself."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from effic.ir.errors import NotMeasuredError
from effic.ir.model import ONNX_DOMAINS

TARGETS = ("portable", "ort-cpu", "ort-cuda", "torch")
"""Targets whose coverage is known."""


class Operator(NamedTuple):
    """An operator of a model.

    Attributes:
        op_type: its name.
        domain: its domain, ``""`` for standard ONNX.
        version: of the operator set that the model imports; 0 for none.
    """

    op_type: str
    domain: str
    version: int

    @property
    def label(self) -> str:
        """``Conv``, or ``com.microsoft::MatMulNBits``."""
        return self.op_type if self.domain in ONNX_DOMAINS else f"{self.domain}::{self.op_type}"


def covers(target: str, operator: Operator) -> bool:
    """Whether a target runs an operator.

    ``portable`` is what the ONNX standard has at the model's version; ``ort-cpu`` what the installed ONNX
    Runtime has a CPU kernel for, or can write in others that it has; ``ort-cuda`` the same of CUDA kernels (what
    has none there runs on the CPU, between two copies); ``torch`` what ``effic.to_module``
    converts. Element types are not looked at.

    Args:
        target: one of :data:`TARGETS`.
        operator: the operator.

    Raises:
        NotMeasuredError: the installed ONNX Runtime does not list its kernels, or has none for CUDA.
    """
    if target == "torch":
        from effic.backends.torch.operators import OPERATORS

        return operator.label in OPERATORS
    if target == "portable":
        return operator.domain in ONNX_DOMAINS and _standard(operator)
    name = operator.op_type, "" if operator.domain in ONNX_DOMAINS else operator.domain
    kernels = _kernels("CUDA" if target == "ort-cuda" else "CPU").get(name, ())
    return any(first <= operator.version <= last for first, last in kernels) or _is_written_in_others(
        operator
    )


def _standard(operator: Operator) -> bool:
    import onnx

    try:
        return not onnx.defs.get_schema(operator.op_type, operator.version, "").deprecated
    except onnx.defs.SchemaError:
        return False


def _is_written_in_others(operator: Operator) -> bool:
    """Whether the standard defines the operator by a function of others, which a runtime then runs."""
    import onnx

    if operator.domain not in ONNX_DOMAINS:
        return False
    try:
        schema = onnx.defs.get_schema(operator.op_type, operator.version, "")
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]


@cache
def _kernels(kind: str) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Versions (first, last) of every kernel of a provider (``CPU``, ``CUDA``) by operator and domain."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    listed = getattr(state, "get_all_opkernel_def", None)
    if listed is None:
        raise NotMeasuredError(
            "the installed ONNX Runtime does not list its kernels; list the operators in ops_allowed instead"
        )
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in listed():
        if kernel.provider == f"{kind}ExecutionProvider":
            domain = "" if kernel.domain in ONNX_DOMAINS else kernel.domain
            found.setdefault((kernel.op_name, domain), []).append(tuple(kernel.version_range))
    if not found:
        raise NotMeasuredError(
            f"the installed ONNX Runtime has no {kind} kernels to ask; install onnxruntime-gpu, or list the operators "
            "in ops_allowed instead"
        )
    return found
