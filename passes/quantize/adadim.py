"""AdaDim: which way the groups of a weight run, chosen by the error each way makes at the output.

Groups along the inputs of one output channel (``oc``) share a scale among ``g`` input channels, so
one channel with large weights or large activations spoils its neighbours in every row; groups along
the outputs of one input channel (``ic``) keep the damage in that column. Which is better differs
from layer to layer and is measured: ``argmin over d of mean((X (W - Q_d(W))ᵀ)²)``, ties to ``oc``
(arXiv 2309.15531, sections 4 and 5).

The mean needs the second moment ``H`` of the inputs only. Computing it exactly takes ``2 K`` operations
a weight and candidate, far more than quantizing. For large models ``H`` is taken from a sketch as

    H ≈ D + Lᵀ L,    L: the RANK strongest directions of the sketch, D: diagonal, the rest

since rounding errors of different inputs are nearly uncorrelated: only the few directions in which
inputs move together (their mean, massive activations) see anything but the diagonal. Measured on the
108 linear layers of MiniLM-L6 and stories260k, 3 and 4 bits, groups of 32, 128 and whole channels,
excess of the chosen error over the better one, mean and largest:

=======================================  ================  =================
                                         MiniLM-L6         stories260k
=======================================  ================  =================
sketch of 64 rows                        0.022 %, 3.5 %    0.089 %,  4.6 %
sketch of 128 rows                       0.007 %, 1.5 %    0.066 %, 11.8 %
diagonal of 128 rows                     0.202 %, 21.9 %   0.207 %, 11.8 %
diagonal and 4 directions of 128 rows    0.007 %, 1.5 %    0.056 %, 11.8 %
diagonal and 4 directions of 256 rows    0.005 %, 1.0 %    0.065 %, 11.8 %
a quarter of the outputs, exact          2.4 %, 64 %       0.27 %,   5.6 %
=======================================  ================  =================

(The 11.8 % is one small layer, which is judged exactly in practice.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import dequantize
from effic.ir.weights import Axis
from effic.passes.quantize.affine import Grid, quantize
from effic.passes.quantize.gptq import Factor, GptqResult, factorise, gptq, pruned, shares_order
from effic.passes.statistics import SiteStatistics

RANK = 4
"""Directions of the inputs that are kept beside the diagonal."""

# Twice the rank of directions, iterated until the strongest stand.
_ITERATIONS = 8

# Weights decoded at a time: with the weights themselves, about a 1 MiB second-level cache.
_CHUNK = 1 << 17


class Candidate(NamedTuple):
    """A weight quantized one way, laid out as the file stores it.

    Attributes:
        axis: which way its groups run.
        run: axis of the stored matrix they run along.
        block: codes per group; 0 when a group takes the whole axis.
        codes: int8 or uint8 ``[rows, columns]``.
        scales: in the dtype of the weight; shapes as :class:`~effic.passes.quantize.affine.Quantized`.
        zero_points: uint8, as ``scales``, or None.
    """

    axis: Axis
    run: int
    block: int
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None

    def decode(self) -> np.ndarray:
        """The decoded weight ``[rows, columns]``, in its own dtype."""
        axis = self.run if self.block else 1 - self.run
        return dequantize(self.codes, self.scales, self.zero_points, axis, self.block)

    def decoded_rows(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """A few rows at a time: first, last (exclusive), and their decoded weights."""
        rows, columns = self.codes.shape
        chunk = max(1, _CHUNK // max(columns, 1))
        # Groups down the rows: a piece stays inside one, and then has a scale per column.
        group = self.block if self.run == 0 and self.block else rows
        for top in range(0, rows, group):
            for start in range(top, min(top + group, rows), chunk):
                stop = min(start + chunk, top + group, rows)
                if self.run == 1:
                    scales, zeros = self.scales[start:stop], _part(self.zero_points, slice(start, stop))
                    piece = dequantize(self.codes[start:stop], scales, zeros, int(self.block > 0), self.block)
                else:
                    which = top // self.block if self.block else slice(None)
                    scales, zeros = self.scales[which], _part(self.zero_points, which)
                    piece = dequantize(self.codes[start:stop], scales, zeros, 1, 0)
                yield start, stop, piece


def _part(values: np.ndarray | None, which: int | slice) -> np.ndarray | None:
    return None if values is None else values[which]


def rounded(matrix: np.ndarray, axis: Axis, in_axis: int, grid: Grid) -> Candidate | None:
    """A weight rounded to nearest, in groups along one axis.

    Args:
        matrix: the stored matrix, float32, float16 or bfloat16; only read.
        axis: which way groups run.
        in_axis: axis of the matrix that is summed over.
        grid: bits, group size, symmetry.

    Returns:
        None when a weight is infinite or not a number.
    """
    run = in_axis if axis == "oc" else 1 - in_axis
    kind = ir.DataType.INT8 if grid.symmetric else ir.DataType.UINT8
    done = quantize(matrix, run, grid, kind)
    if done is None:
        return None
    codes = done.packed.view(np.int8 if grid.symmetric else np.uint8).reshape(matrix.shape)
    return Candidate(axis, run, grid.block(matrix.shape[run]), codes, done.scales, done.zero_points)


class Compensator:
    """Quantizes weights by GPTQ, and keeps the factor that weights with the same input share.

    Args:
        percdamp: fraction of the mean diagonal of the second moment that is added to it.
        blocksize: inputs brought up to date at once.
        act_order: the inputs with the largest second moment first.
    """

    def __init__(self, *, percdamp: float, blocksize: int, act_order: bool) -> None:
        self._percdamp, self._blocksize, self._act_order = percdamp, blocksize, act_order
        self._key: tuple[np.ndarray, bool] | None = None
        self._factor: Factor | None = None

    def compensated(
        self, matrix: np.ndarray, second_moment: np.ndarray, axis: Axis, in_axis: int, grid: Grid
    ) -> tuple[Candidate, GptqResult]:
        """A weight quantized in groups along one axis, the errors of some inputs made up for by others.

        Groups along the inputs have the scales of the weight as it is; those along the outputs get
        theirs from the compensated values of their input.

        Args:
            matrix: the stored matrix, all finite; only read.
            second_moment: ``[G, K, K]`` with ``K`` the inputs of one output.
            axis: which way groups run.
            in_axis: axis of the matrix that is summed over.
            grid: bits, group size, symmetry.
        """
        weight = matrix if in_axis == 1 else matrix.T
        shared = shares_order(axis, len(second_moment))
        if self._key is None or self._key[0] is not second_moment or self._key[1] != shared:
            self._factor = factorise(
                second_moment, percdamp=self._percdamp, act_order=self._act_order, shared_order=shared
            )
            self._key = second_moment, shared
        result = gptq(
            weight.astype(np.float32, copy=False),
            second_moment,
            grid,
            axis,
            percdamp=self._percdamp,
            blocksize=self._blocksize,
            act_order=self._act_order,
            scale_dtype=matrix.dtype,
            factor=self._factor,
            keep_zeros=pruned(matrix),
        )
        run = in_axis if axis == "oc" else 1 - in_axis
        arrays = [result.codes, result.scales, result.zero_points]
        if in_axis == 0:
            arrays = [None if a is None else np.ascontiguousarray(a.T) for a in arrays]
        codes, scales, zeros = arrays
        assert codes is not None
        assert scales is not None
        return Candidate(axis, run, grid.block(matrix.shape[run]), codes, scales, zeros), result


class Errors(NamedTuple):
    """What a change of a weight does.

    Attributes:
        output: mean over rows and outputs of the squared output of the change.
        weight: sum of the squared change itself.
    """

    output: float
    weight: float


class Judge:
    """Measures changes of a weight on the inputs it was seen with.

    Args:
        statistics: with the second moment or a sketch; None where nothing is known of the inputs, which
            then count as uncorrelated and equally large.
        in_axis: axis of the stored matrix that is summed over.
        exact: use all there is, instead of ``H ≈ D + LᵀL`` (which convolutions of several groups have
            no need of).
    """

    def __init__(self, statistics: SiteStatistics | None, in_axis: int, *, exact: bool = True) -> None:
        self._statistics, self._in_axis = statistics, in_axis
        self._parts: tuple[np.ndarray, np.ndarray] | None = None
        if exact or statistics is None:
            return
        if statistics.sketch is not None and len(statistics.sketch) == 1:
            self._parts = spectrum(statistics.sketch[0], RANK)
        elif statistics.second_moment is not None and len(statistics.second_moment) == 1:
            self._parts = spectrum_of_moment(statistics.second_moment[0], RANK)

    def candidate(self, matrix: np.ndarray, candidate: Candidate) -> Errors:
        """Errors of ``matrix - candidate``."""
        if self._statistics is not None and self._parts is None:
            return self._whole(matrix.astype(np.float32) - candidate.decode().astype(np.float32))
        return self._pieces(matrix.shape, _differences(matrix, candidate))

    def weight(self, matrix: np.ndarray) -> Errors:
        """Errors of leaving the weight out: the power of the output, and of the weight."""
        if self._statistics is not None and self._parts is None:
            return self._whole(matrix.astype(np.float32))
        return self._pieces(matrix.shape, _float_rows(matrix))

    def _whole(self, change: np.ndarray) -> Errors:
        statistics = self._statistics
        weight = float(np.vdot(change, change))
        change = change if self._in_axis == 1 else change.T
        return Errors(weight if statistics is None else statistics.output_error(change), weight)

    def _pieces(self, shape: tuple[int, ...], pieces: Iterator[tuple[int, int, np.ndarray]]) -> Errors:
        outputs = max(shape[1 - self._in_axis], 1)
        if self._parts is None:
            weight = sum(float(np.vdot(piece, piece)) for _, _, piece in pieces)
            return Errors(weight / outputs, weight)
        diagonal, directions = self._parts
        total = weight = 0.0
        if self._in_axis == 0:
            sums = np.zeros((len(directions), outputs), np.float32)
            for start, stop, piece in pieces:
                # A product of every row with itself: three times as fast as einsum.
                energy = np.matmul(piece[:, None, :], piece[:, :, None]).reshape(-1)
                weight += float(energy.sum(dtype=np.float64))
                total += float(np.dot(energy, diagonal[start:stop]))
                sums += directions[:, start:stop] @ piece
            return Errors((total + float(np.vdot(sums, sums))) / outputs, weight)
        root, buffer = np.sqrt(diagonal), np.empty((0, 0), np.float32)
        for _, _, piece in pieces:
            weight += float(np.vdot(piece, piece))
            projected = piece @ directions.T
            if len(buffer) < len(piece):
                buffer = np.empty_like(piece, order="C")
            scaled = np.multiply(piece, root, out=buffer[: len(piece)])
            total += float(np.vdot(projected, projected)) + float(np.vdot(scaled, scaled))
        return Errors(total / outputs, weight)


def _differences(matrix: np.ndarray, candidate: Candidate) -> Iterator[tuple[int, int, np.ndarray]]:
    for start, stop, piece in candidate.decoded_rows():
        change = piece if piece.dtype == np.float32 else piece.astype(np.float32)
        change -= matrix[start:stop]
        yield start, stop, change


def _float_rows(matrix: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    chunk = max(1, _CHUNK // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), chunk):
        stop = min(start + chunk, len(matrix))
        yield start, stop, np.asarray(matrix[start:stop], np.float32)


def spectrum(sketch: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The second moment ``SᵀS`` as a diagonal and a few directions: ``SᵀS ≈ diag(D) + LᵀL``.

    Args:
        sketch: ``S``, float32 ``[R, K]``.
        rank: rows of ``L``.

    Returns:
        ``D`` float32 ``[K]``, not negative, and ``L`` float32 ``[min(rank, R), K]``. Both have the same
        diagonal as ``SᵀS`` together.
    """
    _, turns = np.linalg.eigh((sketch @ sketch.T).astype(np.float64))
    directions = turns[:, ::-1][:, :rank].T.astype(np.float32) @ sketch
    diagonal = np.einsum("rk,rk->k", sketch, sketch) - np.einsum("rk,rk->k", directions, directions)
    return np.maximum(diagonal, 0), directions


def spectrum_of_moment(moment: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`spectrum`, of a second moment ``[K, K]``, by subspace iteration."""
    width = min(2 * rank, len(moment))
    basis = np.random.default_rng(0).standard_normal((len(moment), width)).astype(np.float32)
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(moment @ basis)[0]
    values, turns = np.linalg.eigh((basis.T @ moment @ basis).astype(np.float64))
    roots = np.sqrt(np.maximum(values, 0))[::-1][:rank, None]
    directions = (roots * turns[:, ::-1][:, :rank].T).astype(np.float32) @ basis.T
    diagonal = np.diagonal(moment) - np.einsum("rk,rk->k", directions, directions)
    return np.maximum(diagonal, 0), directions


def undamped_error(
    result: GptqResult, second_moment: np.ndarray, change: float, matrix: np.ndarray, in_axis: int
) -> float:
    """The output error of a GPTQ result, from its loss: the share of the damping taken out.

    Args:
        result: without a fallback.
        second_moment: ``[1, K, K]``, that it was made with.
        change: sum of squared changes of the weight.
        matrix: the weight as stored.
        in_axis: axis of it that is summed over.

    Returns:
        ``tr((W - Q) H (W - Q)ᵀ) / outputs``. What weights of inputs that are always zero change, counts
        for nothing.
    """
    diagonal = np.diagonal(second_moment[0])
    dead = diagonal == 0
    lost = matrix[dead] if in_axis == 0 else matrix[:, dead]
    alive = change - float(np.sum(np.square(lost.astype(np.float32)), dtype=np.float64))
    mean = float(diagonal.sum(dtype=np.float64)) / max(int((~dead).sum()), 1)
    outputs = int(matrix.shape[1 - in_axis])
    return max(result.loss - result.damping * mean * alive, 0.0) / max(outputs, 1)


def choose(errors: dict[Axis, float]) -> Axis:
    """The dimension of least error; ``ic`` only when strictly better than ``oc``."""
    if "oc" in errors and "ic" in errors:
        return "ic" if errors["ic"] < errors["oc"] else "oc"
    return next(iter(errors))
