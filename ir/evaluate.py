"""The oracle: run a model as it is written, and say how far two runs lie apart.

The oracle is ONNX Runtime with every graph optimisation switched off, so that what is judged is the
graph and not what a runtime makes of it (at its default level the runtime replaces a
``DequantizeLinear`` + ``MatMul`` by a kernel with 8-bit activations, which alone moves outputs by
0.5 %).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effic.ir.errors import NotMeasuredError, UsageError
from effic.ir.memory import release_memory
from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor

if TYPE_CHECKING:
    import onnxruntime as ort

Arrays = dict[str, np.ndarray]

# Sizes tried for dynamic dimensions, first axis and others: two rows catch a pass that mixes up
# batch items; a model that was exported with a hidden batch of one gets one.
TRIED_DIMS = ((2, 8), (1, 8), (1, 16), (1, 32), (1, 1), (1, 64), (1, 224), (4, 4))

_FLOATS = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.DOUBLE: np.dtype(np.float64),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}

# Nodes that pass an integer on unchanged, on its way to the Gather that tells its range.
_CARRIERS = {
    "Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Tile",
    "Transpose", "Unsqueeze", "Clip", "Where",
}  # fmt: skip


class Runner(Protocol):
    """Whatever runs a model: the oracle, or a backend's artifact."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name for inputs by name."""


class Oracle:
    """One model, ready to be run as written.

    Args:
        model: the model; it is written to its scratch folder, streaming, and may change afterwards.
        optimized: let the runtime optimise, as a user of the file would see it.

    Raises:
        NotMeasuredError: the runtime cannot run the model (an unknown operator, say).
    """

    def __init__(self, model: Model, *, optimized: bool = False) -> None:
        # Of its own, so that the file goes when the oracle goes.
        from effic.ir.tensors import Scratch

        self._scratch = Scratch()
        path = os.path.join(self._scratch.folder, "oracle.onnx")
        model.save(path, external_threshold=64 << 20)
        release_memory()
        # Operators of the runtime's own (MatMulNBits) compute another way without packed weights.
        own = any(node.domain not in ONNX_DOMAINS for node in model.nodes(domain=None))
        self._session = start_session(path, optimized=optimized, prepack=optimized or own)
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name for inputs by name.

        Raises:
            NotMeasuredError: the run failed; the text carries the runtime's reason.
            UsageError: an input is missing.
        """
        # Copies: the runtime's own arrays keep all the memory that its session worked in, for as long as they live.
        return {name: np.array(array) for name, array in run_session(self._session, inputs).items()}


def start_session(
    path: str, *, optimized: bool = False, threads: int = 0, prepack: bool = True
) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU that logs nothing; ``threads=0`` means all cores.

    With ``prepack`` the runtime packs weights that are initializers, and rounds differently than
    for the same weight behind an Identity.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except runtime_errors() as error:
        raise NotMeasuredError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error


def run_session(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """Run a session on arrays by name; bfloat16 goes in and out as ml_dtypes arrays.

    An optional input (one with a default value) that is not given has its default.
    """
    import onnxruntime as ort

    feeds = {}
    for item in _taken(session, inputs):
        if item.name not in inputs:
            have = ", ".join(sorted(inputs)) or "none"
            raise UsageError(f"the inputs lack '{item.name}' ({item.type}); given: {have}")
        array = inputs[item.name]
        if array.dtype == ml_dtypes.bfloat16:
            feeds[item.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                np.ascontiguousarray(array).view(np.uint16), int(ir.DataType.BFLOAT16)
            )
        elif array.dtype.kind in "USO":
            feeds[item.name] = array.astype(object)
        else:
            feeds[item.name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    names = [item.name for item in session.get_outputs()]
    try:
        if any(isinstance(value, np.ndarray) for value in feeds.values()):
            plain = {k: v if isinstance(v, np.ndarray) else v.numpy() for k, v in feeds.items()}
            results = session.run(names, plain)
        else:
            results = [_to_numpy(value) for value in session.run_with_ort_values(names, feeds)]
    except runtime_errors() as error:
        _refuse_misfits(session, feeds)
        raise NotMeasuredError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
    return dict(zip(names, (np.asarray(r) for r in results), strict=True))


def _taken(session: ort.InferenceSession, given: Mapping[str, Any]) -> list[Any]:
    """The inputs a session has to be given, and the optional ones that are."""
    return [*session.get_inputs(), *(i for i in session.get_overridable_initializers() if i.name in given)]


def _refuse_misfits(session: ort.InferenceSession, feeds: Mapping[str, Any]) -> None:
    """Blame the inputs, by name, where a run failed because of their types or shapes."""
    for item in _taken(session, feeds):
        value = feeds[item.name]
        kind = "tensor(string)" if isinstance(value, np.ndarray) else value.data_type()
        shape = list(value.shape if isinstance(value, np.ndarray) else value.shape())
        wanted = item.shape
        fits = len(wanted) == len(shape) and all(
            not isinstance(want, int) or want == size for want, size in zip(wanted, shape, strict=True)
        )
        if kind != item.type or not fits:
            raise UsageError(
                f"the input '{item.name}' is {kind} of shape {shape}, "
                f"and the model takes {item.type} of shape {wanted}; correct the inputs"
            )


def _to_numpy(value: Any) -> np.ndarray:
    if value.is_tensor() and value.data_type() == "tensor(bfloat16)":
        import ctypes  # OrtValue offers no bfloat16 array, only its buffer's address

        count = math.prod(value.shape())
        raw = (ctypes.c_uint16 * count).from_address(value.data_ptr())
        bits = np.frombuffer(raw, np.uint16).copy()
        return np.asarray(bits.view(ml_dtypes.bfloat16).reshape(value.shape()))
    return np.asarray(value.numpy())


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own family, and plain RuntimeErrors and ValueErrors of pybind."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "Fail", "InvalidArgument", "NoSuchFile", "NoModel", "EngineError", "RuntimeException",
        "InvalidProtobuf", "ModelLoaded", "NotImplemented", "InvalidGraph", "EPFail",
    )  # fmt: skip
    own = tuple(getattr(state, name) for name in names if hasattr(state, name))
    return (*own, RuntimeError, ValueError)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without ONNX Runtime's status prefix."""
    text = str(error).strip().partition("\n")[0]
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text.rstrip(" .")[:400]


# -- inputs ---------------------------------------------------------------------------------------


def load_inputs(path: str | os.PathLike[str]) -> Arrays:
    """Arrays by name from an ``.npz`` file (no pickles).

    Raises:
        UsageError: no such file, or not a plain ``.npz``.
    """
    import zipfile

    try:
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise UsageError(f"{path} holds one array without a name; save the inputs as .npz by name")
        with data:
            return {name: data[name] for name in data.files}
    except OSError as error:
        raise UsageError(f"cannot read the inputs from {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the inputs from {path}: {first_line(error)}") from error


def seeded_inputs(
    model: Model,
    seed: int = 0,
    *,
    dims: Mapping[str, int] | None = None,
    first: int = 2,
    other: int = 8,
) -> Arrays:
    """Random inputs that respect dtypes, symbolic dimensions and integer ranges.

    Floats are standard normal; integers that index a table stay inside it; masks are ones with a
    tail of zeros.

    Args:
        model: whose main graph's inputs to fill.
        seed: of NumPy's generator.
        dims: sizes of dynamic dimensions by name.
        first: size of a dynamic first axis that ``dims`` does not name.
        other: size of any other dynamic axis.

    Raises:
        NotMeasuredError: an input is no tensor, or its rank is unknown.
    """
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must be at least 0")
    rng = np.random.default_rng(seed)
    sizes = dict(dims or {})
    arrays: Arrays = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if value.is_initializer():
            continue
        if not isinstance(value.type, ir.TensorType) or value.shape is None:
            raise NotMeasuredError(
                f"input '{name}' has no tensor type with a known rank, so no inputs can be made up for it; "
                "give some with --inputs data.npz"
            )
        shape = []
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            fallback = first if axis == 0 else other
            shape.append(sizes.setdefault(str(dim.value), fallback) if dim.value else fallback)
        arrays[name] = _fill(value, tuple(shape), rng)
    return arrays


def _fill(value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    dtype = value.dtype
    if dtype in _FLOATS:
        return rng.standard_normal(shape).astype(_FLOATS[dtype])
    if dtype == ir.DataType.BOOL:
        return rng.random(shape) < 0.5
    if dtype == ir.DataType.STRING:
        return np.array([f"word{i}" for i in rng.integers(0, 100, math.prod(shape))], object).reshape(shape)
    if dtype is None or not dtype.is_integer() or dtype.bitwidth < 8:
        raise NotMeasuredError(
            f"input '{value.name}' has the type {dtype}, for which no inputs can be made up; "
            "give some with --inputs data.npz"
        )
    kind = dtype.numpy()
    if "mask" in (value.name or "").lower() and shape:
        mask = np.ones(shape, kind)
        mask[..., shape[-1] - shape[-1] // 4 :] = 0
        return mask
    bound = index_bound(value)
    if bound is None:
        bound = 256 if dtype in (ir.DataType.UINT8, ir.DataType.INT8) else 2
    low = 0
    if dtype == ir.DataType.INT8 and bound == 256:
        low, bound = -128, 128
    return rng.integers(low, max(bound, low + 1), shape).astype(kind)


def index_bound(value: ir.Value) -> int | None:
    """Exclusive upper bound of an integer that indexes tables on its way through the graph."""
    bounds: list[int] = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for node, index in current.uses():
            if node.op_type in ("Gather", "GatherElements", "GatherBlockQuantized") and index == 1:
                table = node.inputs[0]
                axis = node.attributes.get_int("axis", 0) if "axis" in node.attributes else 0
                axis = (
                    node.attributes.get_int("gather_axis", axis) if "gather_axis" in node.attributes else axis
                )
                tensor = constant_tensor(table)
                shape = tensor.shape if tensor is not None else (table.shape if table is not None else None)
                if shape is not None and -len(shape) <= axis < len(shape) and isinstance(shape[axis], int):
                    bounds.append(int(shape[axis]))  # type: ignore[arg-type]
            elif node.op_type in _CARRIERS and (index == 0 or node.op_type in ("Concat", "Where")):
                todo.extend(node.outputs)
    return min(bounds) if bounds else None


def runnable_inputs(model: Model, oracle: Runner, seed: int = 0) -> tuple[Arrays, Arrays]:
    """Seeded inputs that the model accepts, and its outputs for them.

    Models do not say which sizes their dynamic dimensions allow: several are tried.

    Raises:
        NotMeasuredError: none of them runs; the text carries the reason of the first.
    """
    reason: NotMeasuredError | None = None
    last: list[tuple[tuple[int, ...], ...]] = []
    for first, other in TRIED_DIMS:
        inputs = seeded_inputs(model, seed, first=first, other=other)
        shapes = tuple(a.shape for a in inputs.values())
        if shapes in last:
            continue
        last.append(shapes)
        try:
            return inputs, oracle.run(inputs)
        except NotMeasuredError as error:
            reason = reason or error
    raise NotMeasuredError(f"{reason}; give inputs that fit with --inputs data.npz")


# -- distance -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far outputs lie from a reference, the worst over all outputs.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: largest absolute difference over the reference's largest magnitude, per output.
        sqnr_db: signal to quantization noise ratio, 10·log10(Σref²/ΣΔ²); inf when equal.
        cosine: cosine of the flattened outputs.
        top1: share of rows (last axis) whose largest entry is the same, or None without rows.
        new_nonfinite: entries that became NaN or Inf.
        wrong_integers: entries of integer, bool and string outputs that differ.
        shape_mismatch: the first output whose shape or set differs, as a phrase, or None.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    sqnr_db: float = math.inf
    cosine: float = 1.0
    top1: float | None = None
    new_nonfinite: int = 0
    wrong_integers: int = 0
    shape_mismatch: str | None = None

    @property
    def exact(self) -> bool:
        """Whether every entry is equal (a NaN equals a NaN, -0 equals 0)."""
        return (
            self.max_abs == 0
            and not self.new_nonfinite
            and not self.wrong_integers
            and self.shape_mismatch is None
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; an infinite ratio (no difference) becomes null."""
        row = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def comparable(outputs: Mapping[str, np.ndarray]) -> bool:
    """Whether there is anything to compare: some output has an entry that is neither NaN nor Inf."""
    return any(
        array.size > 0
        and (not _is_floating(array.dtype) or bool(np.isfinite(array.astype(np.float32, copy=False)).any()))
        for array in outputs.values()
    )


def _is_floating(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def compare_outputs(reference: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> Distance:
    """The worst distance over all outputs, which are paired by name."""
    worst = Distance()
    if list(reference) != list(got):
        return Distance(shape_mismatch=f"outputs are {list(got)} instead of {list(reference)}")
    for name, one in distances(reference, got):
        tops = [t for t in (worst.top1, one.top1) if t is not None]
        worst = Distance(
            max(worst.max_abs, one.max_abs),
            max(worst.max_rel, one.max_rel),
            min(worst.sqnr_db, one.sqnr_db),
            min(worst.cosine, one.cosine),
            min(tops) if tops else None,
            worst.new_nonfinite + one.new_nonfinite,
            worst.wrong_integers + one.wrong_integers,
            worst.shape_mismatch or (f"output '{name}' {one.shape_mismatch}" if one.shape_mismatch else None),
        )
    return worst


def distances(
    reference: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, Distance]]:
    """The distance of each output present in both, by name."""
    for name, want in reference.items():
        if name in got:
            yield name, _distance(want, got[name])


def _distance(want: np.ndarray, have: np.ndarray) -> Distance:
    if want.shape != have.shape:
        return Distance(shape_mismatch=f"has the shape {have.shape} instead of {want.shape}")
    if want.dtype != have.dtype:
        return Distance(shape_mismatch=f"has the type {have.dtype} instead of {want.dtype}")
    if not _is_floating(want.dtype):
        return Distance(wrong_integers=int(np.count_nonzero(want != have)))
    if want.size == 0:
        return Distance()
    a, b = want.astype(np.float64), have.astype(np.float64)
    finite = np.isfinite(a)
    broken = int(np.count_nonzero(finite & ~np.isfinite(b)))
    # Where the reference is Inf or NaN, the other has to be the same.
    strange = ~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))
    broken += int(np.count_nonzero(strange))
    use = finite & np.isfinite(b)
    a0, b0 = np.where(use, a, 0.0), np.where(use, b, 0.0)
    delta = b0 - a0
    signal, noise = float(np.sum(a0 * a0)), float(np.sum(delta * delta))
    peak, error = float(np.max(np.abs(a0))), float(np.max(np.abs(delta)))
    norms = math.sqrt(signal) * math.sqrt(float(np.sum(b0 * b0)))
    if noise == 0:
        cosine, sqnr = 1.0, math.inf
    else:
        cosine = float(np.sum(a0 * b0)) / norms if norms else 0.0
        sqnr = 10 * math.log10(signal / noise) if signal else -math.inf
    top1 = None
    if a.ndim >= 2 and a.shape[-1] >= 2:
        top1 = float(np.mean(np.argmax(a0, -1) == np.argmax(b0, -1)))
    relative = error / peak if peak else (0.0 if error == 0 else math.inf)
    return Distance(error, relative, sqnr, cosine, top1, broken)


def rounding_tolerance(model: Model) -> float:
    """How much a reordering may move outputs, relative to an output's largest magnitude.

    The narrowest floating type that computes anywhere in the model decides: rounding there cannot
    be undone by a wider type at the end. fp32 1e-4 (conv_bn deploy mode over deep networks),
    fp64 1e-9, fp16 2e-2, bf16 5e-2.
    """
    found = _types(model)
    if ir.DataType.BFLOAT16 in found:
        return 5e-2
    if ir.DataType.FLOAT16 in found:
        return 2e-2
    if ir.DataType.DOUBLE in found and ir.DataType.FLOAT not in found:
        return 1e-9
    return 1e-4


def computes_in_half(model: Model) -> bool:
    """Whether 16-bit floats occur in the model.

    The runtime computes many of their operators in 32 bits and leaves out the casts between two of
    them, so where it rounds depends on which nodes are neighbours: no rewrite is exact there.
    """
    return not _types(model).isdisjoint((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


def _types(model: Model) -> set[ir.DataType | None]:
    found = {v.dtype for graph in model.graphs() for v in graph.inputs}
    for node in model.nodes(domain=None):
        found.update(v.dtype for v in node.outputs)
        found.update(v.dtype for v in node.inputs if v is not None)
    return found
