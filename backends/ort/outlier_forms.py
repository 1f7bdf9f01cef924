"""Forms in which ONNX Runtime multiplies with a few exact weights beside a compressed matrix.

``y = x @ (W + S)``, where ``W`` runs on ``MatMulNBits`` and ``S`` is sparse. Each form adds ``x @ S`` to
the product, with standard operators, and costs, per layer and call:

==========  ====================================================================  =====================
form        operators                                                             grows with
==========  ====================================================================  =====================
coo         GatherElements, Mul, ScatterElements(add)                             outliers · rows
gather      Gather of the input channels full of outliers, a small MatMul; coo    channels · outputs
            for the others
ell         Transpose, Gather of rows, batched MatMul                             padded outliers
requantize  everything as 8-bit blocks of 32, outliers included (an extra error)  weights
fold        the outliers scattered into the decoded weight, once, at load         weights, in fp32
==========  ====================================================================  =====================

GatherElements rather than Gather, which copies element by element at ten times the cost.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from effic.backends.ort.blocks import INT8_ACTIVATIONS
from effic.backends.ort.scenes import EncodedInput, graph_of, put_named
from effic.ir.encodings import Encoding, decode
from effic.ir.model import Model

EXACT_FORMS = ("coo", "gather", "ell", "fold")
"""Forms that compute with the very weights of the encoding; ``auto`` chooses among them."""

REQUANTIZED_BLOCK = 32

# What a call costs in nanoseconds, as (per call, per unit, per unit and row), one thread, measured by
# `python -m benchmarks.outlier_forms`. Units: weights of the matrix; outliers; padded outliers; weights
# of the gathered channels. What counts is their proportion.
_FP32 = (4e3, 0.30, 0.02)
_CODES = {True: (4e3, 0.015, 0.0145), False: (4e3, 0.08, 0.03)}
_CODES_8_BIT = (4e3, 0.045, 0.015)
_COO = (12e3, 0.0, 8.5)
_GATHER = (8e3, 0.2, 0.03)
_ELL = (15e3, 20.0, 1.8)

_FOLD_HANDICAP = 1.25
"""A decoded weight takes the memory of an uncompressed one: worth it when a quarter is gained."""


@dataclasses.dataclass(frozen=True, eq=False)
class Corrections:
    """The sparse matrix ``S`` of one weight as a product sees it, ``[K, N]``.

    Attributes:
        inputs, outputs: K and N.
        rows, columns: int32 ``[n]``, places, ordered by row.
        values: ``[n]``, dtype of the weight: what is added to the decoded code.
    """

    inputs: int
    outputs: int
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def full_channels(self, rows: int) -> np.ndarray:
        """Input channels with so many outliers that a dense row costs less than its outliers do."""
        counts = np.bincount(self.rows, minlength=self.inputs)
        return np.flatnonzero(counts * _COO[2] * rows > self.outputs * (_GATHER[1] + _GATHER[2] * rows))

    def part(self, chosen: np.ndarray) -> Corrections:
        """Those of the outliers that ``chosen`` (bool ``[n]``) names."""
        return dataclasses.replace(
            self, rows=self.rows[chosen], columns=self.columns[chosen], values=self.values[chosen]
        )

    @property
    def widest(self) -> int:
        """Most outliers of one output channel."""
        return int(np.bincount(self.columns).max()) if self.columns.size else 0


def corrections(encoding: Encoding, k_axis: int, factor: float = 1.0) -> Corrections:
    """What has to be added to the decoded codes.

    Args:
        encoding: of a matrix, with outliers.
        k_axis: axis of the stored matrix that numbers the input channels.
        factor: what the product is multiplied by.
    """
    outliers = encoding.outliers
    assert outliers is not None
    row, column = np.divmod(outliers.indices, encoding.shape[1])
    # Usually zero; who wrote other codes there must have them taken off.
    if encoding.zero_points is not None or _codes_at(encoding.codes, outliers.indices).any():
        under = decode(dataclasses.replace(encoding, outliers=None))
        values = outliers.values - under[row, column]
    else:
        values = outliers.values
    if factor != 1:
        values = values * values.dtype.type(factor)
    inputs, outputs = encoding.shape[k_axis], encoding.shape[1 - k_axis]
    rows, columns = (row, column) if k_axis == 0 else (column, row)
    # Stable, so that columns stay ascending; of rows in order already, as they are stored, it is quick.
    order = np.argsort(rows, kind="stable")
    kept = order[values[order] != 0]
    return Corrections(
        inputs, outputs, rows[kept].astype(np.int32), columns[kept].astype(np.int32), values[kept]
    )


def _codes_at(codes: ir.TensorProtocol, places: np.ndarray) -> np.ndarray:
    """The codes at some flat positions, as unsigned numbers; the others are not unpacked."""
    bits = codes.dtype.bitwidth
    per_byte = 8 // bits
    raw = np.frombuffer(codes.tobytes(), np.uint8)[places // per_byte]
    found: np.ndarray = (raw >> (places % per_byte * bits).astype(np.uint8)) & np.uint8((1 << bits) - 1)
    return found


def costs(sparse: Corrections, rows: int, level: int) -> dict[str, float]:
    """Expected microseconds of a call in each form, product included.

    Args:
        sparse: the outliers.
        rows: rows of the activations.
        level: accuracy level of the kernel.
    """
    weights, exact = sparse.inputs * sparse.outputs, level == INT8_ACTIVATIONS
    codes = _cost(_CODES[exact], weights, rows)
    full = sparse.full_channels(rows)
    rest = int(np.count_nonzero(~np.isin(sparse.rows, full)))
    found = {
        "coo": codes + _cost(_COO, sparse.rows.size, rows),
        "gather": codes
        + _cost(_GATHER, full.size * sparse.outputs, rows)
        + (_cost(_COO, rest, rows) if rest else 0),
        "ell": codes + _cost(_ELL, sparse.widest * sparse.outputs, rows),
        "fold": _cost(_FP32, weights, rows),
    }
    if exact:
        found["requantize"] = _cost(_CODES_8_BIT, weights, rows)
    return {form: nanoseconds / 1e3 for form, nanoseconds in found.items()}


def fastest(figures: dict[str, float]) -> str:
    """The exact form to take, given what each is expected to cost."""
    return min(EXACT_FORMS, key=lambda form: figures[form] * (_FOLD_HANDICAP if form == "fold" else 1))


def _cost(form: tuple[float, float, float], units: int, rows: int) -> float:
    return form[0] + form[1] * units + form[2] * units * rows


class Emitter:
    """Writes the forms of one weight; nodes that share the weight share its constants."""

    def __init__(self, model: Model, weight: EncodedInput) -> None:
        self.model, self.name = model, weight.name
        self.before = weight.dequantize
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def coo(
        self, node: ir.Node, x: ir.Value, product: ir.Value, key: object, sparse: Corrections
    ) -> ir.Value:
        """``product`` with every outlier's share added at its place."""
        count = sparse.rows.size
        lead = _static_lead(x)
        alone = lead is not None and math.prod(lead) == 1
        shape = (*lead, count) if alone and lead is not None else (count,)
        sources = self._narrow(key, "outlier_rows", sparse.rows.reshape(shape), sparse.inputs)
        targets = self._narrow(key, "outlier_columns", sparse.columns.reshape(shape), sparse.outputs)
        values = self._narrow(key, "outlier_values", sparse.values)
        if not alone:
            size = self._like(node, x, key, count)
            sources = self._put(node, "outlier_sources", "Expand", [sources, size])
            targets = self._put(node, "outlier_targets", "Expand", [targets, size])
        read = self._put(node, "outlier_inputs", "GatherElements", [x, sources], axis=-1)
        shares = self._put(node, "outlier_shares", "Mul", [read, values])
        scattered = self._put(node, "outlier_sums", "ScatterElements", [product, targets, shares], axis=-1)
        scatter = scattered.producer()
        assert scatter is not None
        scatter.attributes.add(ir.AttrString("reduction", "add"))
        return scattered

    def gather(
        self, node: ir.Node, x: ir.Value, product: ir.Value, key: object, sparse: Corrections
    ) -> ir.Value:
        """``product`` plus a MatMul with the input channels full of outliers; the others as in coo."""
        rows = known_rows(x) or 1
        channels, key = sparse.full_channels(rows), (key, rows)
        inside = np.isin(sparse.rows, channels)
        if not inside.all():
            product = self.coo(node, x, product, key, sparse.part(~inside))
        if not channels.size:
            return product
        sparse = sparse.part(inside)
        dense = np.zeros((channels.size, sparse.outputs), sparse.values.dtype)
        dense[np.searchsorted(channels, sparse.rows), sparse.columns] = sparse.values
        numbers = self._narrow(key, "outlier_channels", channels.astype(np.int32), sparse.inputs)
        matrix = self._narrow(key, "outlier_matrix", dense)
        read = self._put(node, "outlier_inputs", "Gather", [x, numbers], axis=-1)
        share = self._put(node, "outlier_sums", "MatMul", [read, matrix])
        return self._put(node, "with_outliers", "Add", [product, share])

    def ell(
        self, node: ir.Node, x: ir.Value, product: ir.Value, key: object, sparse: Corrections
    ) -> ir.Value:
        """``product`` plus, for each output, its outliers times the rows of ``xᵀ`` they belong to."""
        order = np.lexsort((sparse.rows, sparse.columns))
        columns, rows = sparse.columns[order], sparse.rows[order]
        counts = np.bincount(columns, minlength=sparse.outputs)
        first = np.cumsum(counts) - counts
        slots = np.arange(columns.size) - first[columns]
        # What fills up an output's slots repeats its first channel: no product that is not there anyway.
        fill = np.where(counts > 0, rows[np.minimum(first, columns.size - 1)], 0)
        places = np.repeat(fill[:, None], max(sparse.widest, 1), axis=1).astype(np.int32)
        values = np.zeros((sparse.outputs, 1, places.shape[1]), sparse.values.dtype)
        places[columns, slots], values[columns, 0, slots] = rows, sparse.values[order]
        numbers = self._narrow(key, "outlier_rows", places, sparse.inputs)
        factors = self._narrow(key, "outlier_values", values)
        flat = self._constant(("flat", sparse.inputs), "flat_shape", np.array([-1, sparse.inputs], np.int64))
        one = self._constant(("one",), "axis", np.array([1], np.int64))
        plain = x.shape is not None and len(x.shape) == 2
        turned = x if plain else self._put(node, "flat", "Reshape", [x, flat])
        turned = self._put(node, "turned", "Transpose", [turned])
        read = self._put(node, "outlier_inputs", "Gather", [turned, numbers], axis=0)
        share = self._put(node, "outlier_shares", "MatMul", [factors, read])
        share = self._put(node, "outlier_sums", "Squeeze", [share, one])
        share = self._put(node, "outlier_sums_turned", "Transpose", [share])
        if not plain:
            share = self._put(node, "shaped", "Reshape", [share, self._like(node, x, key, sparse.outputs)])
        return self._put(node, "with_outliers", "Add", [product, share])

    # -- pieces ----------------------------------------------------------------------------------

    def _put(
        self, node: ir.Node, role: str, op_type: str, inputs: list[ir.Value | None], **attributes: int
    ) -> ir.Value:
        return put_named(self.model, f"{self.name}.{role}", node, op_type, inputs, **attributes)

    def _like(self, node: ir.Node, x: ir.Value, key: object, last: int) -> ir.Value:
        """The shape of ``x`` with another last dimension."""
        lead = self._put(node, "lead", "Shape", [x], end=-1)
        size = self._constant((key, "size", last), "last_dimension", np.array([last], np.int64))
        return self._put(node, "size", "Concat", [lead, size], axis=0)

    def _constant(self, key: tuple[object, ...], role: str, array: np.ndarray) -> ir.Value:
        if key not in self._constants:
            home = graph_of(self.before)
            self._constants[key] = self.model.add_initializer(home, f"{self.name}.{role}", array)
        return self._constants[key]

    def _narrow(self, key: object, role: str, array: np.ndarray, limit: int | None = None) -> ir.Value:
        """A constant in the narrowest type that holds it, behind a Cast that the runtime folds at load.

        Args:
            key: what it belongs to.
            role: for its name.
            array: int32 indices below ``limit``, or floats.
            limit: None for floats, which are stored in fp16 where that is exact.
        """
        whole = (key, role, array.shape)
        if whole in self._constants:
            return self._constants[whole]
        if limit is not None:
            kind, stored = ir.DataType.INT32, array.astype(np.uint16) if limit <= 1 << 16 else array
        else:
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            exact = np.array_equal(half.astype(np.float32), array.astype(np.float32))
            kind, stored = ir.DataType.FLOAT, half if exact else array.astype(np.float32)
        value = self._constant((*whole, "stored"), role, stored)
        if ir.DataType.from_numpy(stored.dtype) != kind:
            value = put_named(
                self.model, f"{self.name}.{role}_wide", self.before, "Cast", [value], to=int(kind)
            )
            value.type, value.shape = ir.TensorType(kind), ir.Shape(array.shape)
        self._constants[whole] = value
        return value


def _static_lead(x: ir.Value) -> tuple[int, ...] | None:
    """All dimensions but the last, where they are known."""
    if x.shape is None or len(x.shape) == 0:
        return None
    lead = [dim for dim in x.shape[:-1] if isinstance(dim, int)]
    return tuple(lead) if len(lead) == len(x.shape) - 1 else None


def known_rows(x: ir.Value | None) -> int | None:
    """Rows of the activations, None where the model does not say."""
    lead = None if x is None else _static_lead(x)
    return None if lead is None else math.prod(lead)
