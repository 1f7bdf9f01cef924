"""GPTQ: round the inputs of a layer one after another, the rest making up for each error.

Frantar et al., "GPTQ" (arXiv 2210.17323). Minimises ``tr((W - Q) H (W - Q)ᵀ)``, the output error on
calibration data with second moment ``H`` of the layer's inputs, column by column of ``W [out, K]``.

The paper updates all columns that are left with rows of ``U``, ``inverse(H) = Uᵀ U``. Here the same
numbers come from ``H`` itself. With ``H = R Rᵀ``, ``R`` upper triangular, ``U = inverse(R)``, and the
value that column ``k`` has when its turn comes is::

    v_k = w_k + Σ_{j<k} (w_j - q_j) · R_jk / R_kk            e_k = (v_k - q_k) · R_kk

(Chee et al., "QuIP", arXiv 2307.13304, theorem 6, proves it). This is better in these ways:

- Nothing is inverted. The Cholesky factor costs K³/3 operations instead of 4/3·K³, and float32 is
  enough for it: its error is that of a relative change of each ``H_ij`` by some 1e-7·√(H_ii·H_jj),
  far below the damping of 1e-2 of the mean diagonal, whereas inverting and factoring again would
  multiply it by the condition number, some 100·K.
- A column needs the plain errors of earlier ones only, so each block is read and written once, by one
  matrix product with everything before it, instead of all later columns after every block.
- Nothing is stale: a group that takes its scale from its weights' values asks for them then.

To get ``R`` without copies the inputs are put in reverse: the factor of LAPACK is lower triangular,
``H' = L Lᵀ``, and positions are walked from the last to the first.

Measured on one core of Zen 5 (110 Gflop/s in float32 matrix products), out x K: 2048 x 2048 takes 0.26 s,
5632 x 2048 0.53 s and 2048 x 5632 1.3 s, and the factor 0.10 s for K of 2048 and 1.2 s for 5632. About
half of it is matrix products, so NumPy is enough; the rest are the few passes over each column.
"""

from __future__ import annotations

import abc
from typing import Literal, NamedTuple

import numpy as np

from effic.ir.errors import UsageError
from effic.passes.quantize.affine import Grid, parameters

_RETRIES = 3

# Columns worked on one at a time before a matrix product brings the next ones up to date: the errors
# of a few thousand outputs over so many columns stay in the second-level cache.
_STRIP = 16

# Rows of a second moment put in order at a time.
_ROWS = 256


class Factor(NamedTuple):
    """What GPTQ needs of a second moment; the same for every layer that reads the same input.

    Attributes:
        order: intp ``[G, K]``, the input at each position; the last position is rounded first.
        upper: float32 ``[G, K, K]``, ``upper[t, s]`` is what an error at position ``s > t`` adds to
            the value at ``t``.
        pivots: float32 ``[G, K]``, ``R_kk`` by position.
        dead: bool ``[G, K]``, by input: never anything but zero on the data.
        damping: fraction of the mean diagonal that was added to the diagonal, the largest of all groups.
        fallback: what became of groups that could not be factored (they are rounded to nearest), or None.
    """

    order: np.ndarray
    upper: np.ndarray
    pivots: np.ndarray
    dead: np.ndarray
    damping: float
    fallback: str | None


class GptqResult(NamedTuple):
    """A quantized weight.

    Attributes:
        codes: int8 (symmetric) or uint8 ``[out, K]``.
        scales: in the dtype asked for. Axis oc: ``[out, groups]``, ic: ``[groups, K]``; without the
            axis of groups, ``[out]`` or ``[K]``, when one group takes all of it.
        zero_points: uint8 as ``scales``; None when symmetric.
        damping: see :class:`Factor`.
        fallback: what was rounded to nearest instead and why, or None.
        loss: ``Σ e²``, which is ``tr((W - Q) H (W - Q)ᵀ)`` with the damped ``H``.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    damping: float
    fallback: str | None
    loss: float


def factorise(
    second_moment: np.ndarray,
    *,
    percdamp: float = 0.01,
    act_order: bool = True,
    shared_order: bool = False,
    order: np.ndarray | None = None,
) -> Factor:
    """Damp and factor the second moment of a layer's inputs.

    Args:
        second_moment: ``[G, K, K]``, symmetric, any positive multiple of ``Σ x xᵀ`` per convolution group.
        percdamp: fraction of the mean diagonal added to the diagonal. A matrix that has no factor is
            tried with ten times as much, three times.
        act_order: round the inputs with the largest second moment first, instead of in order.
        shared_order: one order for all convolution groups.
        order: intp ``[K]``, the order in which inputs are dealt with, for all groups and instead of
            ``act_order``.
    """
    groups, inputs, _ = second_moment.shape
    diagonal = np.ascontiguousarray(np.diagonal(second_moment, axis1=1, axis2=2), np.float32)
    dead = diagonal == 0
    places = np.empty((groups, inputs), np.intp)
    upper = np.zeros((groups, inputs, inputs), np.float32)
    pivots = np.ones((groups, inputs), np.float32)
    means = diagonal.sum(axis=1, dtype=np.float64) / np.maximum((~dead).sum(axis=1), 1)
    # An input that is always zero has no part in the mean: scaling the data must change nothing.
    importance = np.where(dead, means[:, None].astype(np.float32), diagonal)
    if act_order and shared_order:
        importance[:] = importance.mean(axis=0, dtype=np.float64)
    most, silent, failed = percdamp, 0, 0
    for group in range(groups):
        if order is not None:
            first = order
        else:
            first = np.argsort(-importance[group], kind="stable") if act_order else np.arange(inputs)
        places[group] = first[::-1]
        if not diagonal[group].any():
            # Nothing is known of these weights; to make them zero, as single dead inputs are, would
            # remove the layer.
            silent += 1
            dead[group] = False
            continue
        damping = percdamp
        for _ in range(_RETRIES + 1):
            found = _factorise_one(
                second_moment[group], places[group], dead[group], means[group], damping, upper[group]
            )
            if found is not None:
                pivots[group], most = found, max(most, damping)
                break
            damping *= 10
        else:
            failed += 1
            upper[group], dead[group] = 0, False
    reasons = []
    for count, reason in (
        (silent, "its inputs were zero on all the data"),
        (failed, f"the second moment has no factor, with damping up to {percdamp * 10**_RETRIES:g}"),
    ):
        if count:
            which = f"{count} of {groups} groups " if groups > 1 else ""
            reasons.append(f"{which}rounded to nearest: {reason}")
    return Factor(places, upper, pivots, dead, most, "; ".join(reasons) or None)


def _factorise_one(
    moment: np.ndarray, order: np.ndarray, dead: np.ndarray, mean: float, damping: float, upper: np.ndarray
) -> np.ndarray | None:
    """Write ``upper`` of one group and return its pivots (see :class:`Factor`); None when there are none."""
    from scipy.linalg.lapack import spotrf

    size = len(order)
    for start in range(0, size, _ROWS):
        rows = slice(start, start + _ROWS)
        upper[rows] = moment[order[rows]][:, order]
    places = np.arange(size)
    diagonal = upper[places, places] + np.float32(mean) * dead[order]
    upper[places, places] = diagonal + np.float32(mean * damping)
    # LAPACK wants columns; the rows of a symmetric matrix are its columns. So it works in place.
    lower, problem = spotrf(upper.T, lower=1, clean=1, overwrite_a=1)
    pivots: np.ndarray = lower[places, places]
    if problem or not np.isfinite(pivots).all() or not (pivots > 0).all():
        return None
    np.divide(lower.T, pivots[:, None], out=upper)
    return pivots if np.isfinite(upper[0]).all() else None


def gptq(
    weight: np.ndarray,
    second_moment: np.ndarray,
    grid: Grid,
    axis: Literal["oc", "ic"],
    *,
    percdamp: float = 0.01,
    blocksize: int = 128,
    act_order: bool = True,
    static_groups: bool = True,
    scale_dtype: np.dtype | type = np.float32,
    factor: Factor | None = None,
    keep_zeros: bool = False,
) -> GptqResult:
    """Quantize a weight by GPTQ.

    Args:
        weight: ``[out, K]``, all finite; for a convolution the outputs of its groups one after another,
            for a grouped transposed one ``[out, G·K]``. A transposed view of ``[K, out]`` saves a copy.
        second_moment: ``[G, K, K]``; see :func:`factorise`. An input that is always zero gets zero weights.
        grid: how to quantize.
        axis: ``"oc"``: groups run along the inputs of one output; ``"ic"``: along the outputs of one
            input, and get their scale when that input's turn comes.
        percdamp: see :func:`factorise`.
        blocksize: columns brought up to date by one large matrix product. A matter of speed alone.
        act_order: see :func:`factorise`.
        static_groups: axis oc: scales of all groups from the weight as it is; else each from the values
            its weights have when its first column's turn comes.
        scale_dtype: what scales are stored as, which is the dtype of the weight.
        factor: of ``second_moment`` with these options, where it is known already.
        keep_zeros: weights that are zero stay zero (pruned ones, see :func:`pruned`): what later weights
            would make up for by them goes to the next ones, as in SparseGPT (arXiv 2301.00774, section 3.5).

    Raises:
        UsageError: groups of reordered inputs that are not static (ONNX has no index of groups to hold
            them), or a weight that is not finite.
    """
    if axis == "oc" and act_order and not static_groups:
        raise UsageError(
            "gptq: act_order needs static_groups, since ONNX cannot say which group an input belongs to; "
            "turn one off or the other on"
        )
    if weight.shape[1] != second_moment.shape[2]:
        second_moment = _block_diagonal(second_moment)
    groups, inputs, _ = second_moment.shape
    if factor is None:
        factor = factorise(
            second_moment,
            percdamp=percdamp,
            act_order=act_order,
            shared_order=shares_order(axis, groups),
        )
    columns = np.ascontiguousarray(weight.reshape(groups, -1, inputs).transpose(0, 2, 1), np.float32)
    if not (np.isfinite(columns.min()) and np.isfinite(columns.max())):
        raise UsageError("gptq: the weight holds infinity or NaN; leave it as it is")
    if factor.dead.any():
        columns = columns.copy() if np.shares_memory(columns, weight) else columns
        columns[factor.dead] = 0
    dtype = np.dtype(scale_dtype)

    def walk(upper: np.ndarray) -> tuple[np.ndarray, float, _Levels]:
        levels = (_AlongInputs if axis == "oc" else _AlongOutputs)(columns, grid, dtype)
        walked = _walk(
            columns, factor._replace(upper=upper), levels, max(blocksize, 1), static_groups, keep_zeros
        )
        return *walked, levels

    fallback = factor.fallback
    # Weights near the end of float32 may leave it on the way; that shows in the loss.
    with np.errstate(over="ignore", invalid="ignore"):
        codes, loss, levels = walk(factor.upper)
        if not np.isfinite(loss):
            fallback = "rounded to nearest: what makes up for errors is beyond float32"
            codes, loss, levels = walk(np.zeros_like(factor.upper))
    outputs = groups * columns.shape[2]
    return GptqResult(
        codes.transpose(0, 2, 1).reshape(outputs, inputs),
        *levels.parameters(),
        factor.damping,
        fallback,
        loss,
    )


def pruned(weight: np.ndarray) -> bool:
    """Whether so many weights are exactly zero that they have been pruned: one in 64 or more.

    Trained weights hardly ever are; even 63:64 sparsity makes this many.
    """
    return weight.size > 0 and 64 * int(np.count_nonzero(weight == 0)) >= weight.size


def _block_diagonal(second_moment: np.ndarray) -> np.ndarray:
    """Of convolution groups whose inputs are columns of one matrix: ``[G, K, K]`` to ``[1, G·K, G·K]``."""
    groups, width, _ = second_moment.shape
    whole = np.zeros((groups, width, groups, width), np.float32)
    each = np.arange(groups)
    whole[each, :, each] = second_moment
    return whole.reshape(1, groups * width, groups * width)


def shares_order(axis: Literal["oc", "ic"], groups: int) -> bool:
    """Whether all convolution groups must take their inputs in one order: where groups of outputs of
    one input, which may reach across, share a scale."""
    return axis == "ic" and groups > 1


def _walk(
    columns: np.ndarray, factor: Factor, levels: _Levels, blocksize: int, static: bool, keep_zeros: bool
) -> tuple[np.ndarray, float]:
    """Round all columns in the factor's order.

    Args:
        columns: ``[G, K, outputs per group]``, not changed.
        factor: order and coefficients.
        levels: rounds one column to its grid.
        blocksize: see :func:`gptq`.
        static, keep_zeros: see :func:`gptq`.

    Returns:
        Codes as ``columns``, and ``Σ e²``.
    """
    groups, inputs, _ = columns.shape
    order, upper = factor.order, factor.upper
    each = np.arange(groups)
    errors = np.empty(columns.shape, np.float32)  # by position: values before, errors after the rounding
    codes = np.empty(columns.shape, levels.kind)
    squares = np.zeros(groups)

    def current(start: int, stop: int, out: np.ndarray) -> None:
        """The values at positions ``start`` to ``stop``, once all from ``stop`` on are rounded."""
        out[:] = columns[each[:, None], order[:, start:stop]]
        if stop < inputs:
            out += upper[:, start:stop, stop:] @ errors[:, stop:]

    moving = levels if isinstance(levels, _AlongInputs) and not static else None
    stop = inputs
    while stop:
        start = max(0, stop - blocksize)
        if moving:
            # Inputs are in reverse order of positions here. Blocks end where groups do.
            group, within = divmod(inputs - stop, moving.run)
            last = max(0, inputs - (group + 1) * moving.run)
            start = max(start, last)
            if not within:
                ahead = _ahead(columns, factor, errors, last, stop)
                if keep_zeros:
                    ahead[columns[each[:, None], order[:, last:stop]] == 0] = 0
                moving.set_group(group, ahead)
        current(start, stop, errors[:, start:stop])
        for high in range(stop, start, -_STRIP):
            low = max(start, high - _STRIP)
            if high < stop:
                errors[:, low:high] += upper[:, low:high, high:stop] @ errors[:, high:stop]
            for place in range(high - 1, low - 1, -1):
                values, which = errors[:, place], order[:, place]
                if place + 1 < high:
                    later = slice(place + 1, high)
                    values += (upper[:, place : place + 1, later] @ errors[:, later])[:, 0]
                exact = columns[each, which]
                wanted = np.where(exact == 0, np.float32(0), values) if keep_zeros else values
                codes[each, which], rounded = levels.round(wanted, which)
                values -= rounded
                squares += factor.pivots[:, place] ** 2 * (values[:, None] @ values[:, :, None])[:, 0, 0]
                np.subtract(exact, rounded, out=values)
        stop = start
    return codes, float(squares.sum())


def _ahead(columns: np.ndarray, factor: Factor, errors: np.ndarray, start: int, stop: int) -> np.ndarray:
    """What the columns at positions ``start`` to ``stop`` will be, once all from ``stop`` on are rounded,
    if none of them makes an error itself: what the paper has in ``W`` at that moment."""
    from scipy.linalg import solve_triangular

    values = np.empty((len(columns), stop - start, columns.shape[2]), np.float32)
    for group, out in enumerate(values):
        out[:] = columns[group, factor.order[group, start:stop]]
        if stop < columns.shape[1]:
            upper = factor.upper[group, start:stop]
            # They differ from the weight by what they take over from each other as well.
            out += solve_triangular(
                upper[:, start:stop],
                upper[:, stop:] @ errors[group, stop:],
                unit_diagonal=True,
                check_finite=False,
            )
    return values


class _Levels(abc.ABC):
    """Rounds a column to the grid of its groups."""

    def __init__(self, columns: np.ndarray, grid: Grid, dtype: np.dtype) -> None:
        self.columns, self.grid, self.dtype = columns, grid, dtype
        self.kind = np.int8 if grid.symmetric else np.uint8

    @abc.abstractmethod
    def round(self, values: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes of one column and what they stand for, both float32.

        Args:
            values: ``[G, outputs per group]``.
            which: ``[G]``, the input whose weights they are.
        """

    @abc.abstractmethod
    def parameters(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zero points as :class:`GptqResult` has them."""

    def to_grid(
        self, values: np.ndarray, scale: np.ndarray, zero: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`round` with the scale and zero point (float32) of every weight."""
        # Times the inverse, as rounding to nearest does it elsewhere: the same codes to the last tie.
        codes = values * (1 / scale)
        np.rint(codes, out=codes)
        if zero is not None:
            codes += zero
        np.maximum(codes, np.float32(self.grid.lowest), out=codes)
        np.minimum(codes, np.float32(self.grid.highest), out=codes)
        rounded = codes * scale if zero is None else (codes - zero) * scale
        if self.dtype != np.float32:
            rounded = rounded.astype(self.dtype).astype(np.float32)
        return codes, rounded


class _AlongInputs(_Levels):
    """Groups along the inputs of one output (oc)."""

    def __init__(self, columns: np.ndarray, grid: Grid, dtype: np.dtype) -> None:
        super().__init__(columns, grid, dtype)
        groups, inputs, outputs = columns.shape
        self.each = np.arange(groups)
        self.run = grid.block(inputs) or inputs
        shape = (-(-inputs // self.run), groups, outputs)
        self.scales = np.empty(shape, dtype)
        self.zeros = None if grid.symmetric else np.empty(shape, np.uint8)
        for group in range(shape[0]):
            self.set_group(group, columns[:, group * self.run : (group + 1) * self.run])

    def set_group(self, group: int, values: np.ndarray) -> None:
        """Take a group's scale from the values ``[G, run, outputs per group]`` of its weights."""
        low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
        self.scales[group], zeros = parameters(low, high, self.grid, self.dtype)
        if self.zeros is not None:
            self.zeros[group] = zeros

    def round(self, values: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        group = which // self.run
        zero = None if self.zeros is None else self.zeros[group, self.each].astype(np.float32)
        return self.to_grid(values, self.scales[group, self.each].astype(np.float32, copy=False), zero)

    def parameters(self) -> tuple[np.ndarray, np.ndarray | None]:
        lone = self.grid.block(self.columns.shape[1]) == 0

        def laid_out(array: np.ndarray) -> np.ndarray:
            flat = np.ascontiguousarray(array.reshape(len(array), -1).T)
            return flat[:, 0] if lone else flat

        return laid_out(self.scales), None if self.zeros is None else laid_out(self.zeros)


class _AlongOutputs(_Levels):
    """Groups along the outputs of one input (ic), of all convolution groups."""

    def __init__(self, columns: np.ndarray, grid: Grid, dtype: np.dtype) -> None:
        super().__init__(columns, grid, dtype)
        groups, inputs, outputs = columns.shape
        run = grid.block(groups * outputs) or groups * outputs
        self.starts = np.arange(0, groups * outputs, run)
        self.lengths = np.diff(self.starts, append=groups * outputs)
        self.scales = np.empty((len(self.starts), inputs), dtype)
        self.zeros = None if grid.symmetric else np.empty(self.scales.shape, np.uint8)

    def round(self, values: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # All convolution groups are at the same input (shared order).
        flat, column = values.reshape(-1), which[0]
        low = np.minimum(np.minimum.reduceat(flat, self.starts), 0)
        high = np.maximum(np.maximum.reduceat(flat, self.starts), 0)
        scale, zero = parameters(low, high, self.grid, self.dtype)
        self.scales[:, column] = scale
        full = np.repeat(scale.astype(np.float32, copy=False), self.lengths).reshape(values.shape)
        if self.zeros is None or zero is None:
            return self.to_grid(values, full, None)
        self.zeros[:, column] = zero
        shift = np.repeat(zero.astype(np.float32), self.lengths).reshape(values.shape)
        return self.to_grid(values, full, shift)

    def parameters(self) -> tuple[np.ndarray, np.ndarray | None]:
        if len(self.starts) > 1:
            return self.scales, self.zeros
        return self.scales[0], None if self.zeros is None else self.zeros[0]
