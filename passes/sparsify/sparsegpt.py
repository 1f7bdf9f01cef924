"""SparseGPT: prune the inputs of a layer from the first to the last, the later ones making up for each loss.

Frantar and Alistarh, "SparseGPT" (arXiv 2301.00774). Minimises ``tr((W - Ŵ) H (W - Ŵ)ᵀ)``, the output error
on calibration data with second moment ``H`` of the layer's inputs. When the turn of a group of inputs
comes, those weights stay that cost most to lose, ``w² / U_kk²`` on the values they have by then; what
pruning takes from one column moves the columns that are left (optimal brain surgeon).

The walk is that of GPTQ and, like there (:mod:`effic.passes.quantize.gptq`), its coefficients come from the
factor of ``H`` itself, ``H = R Rᵀ`` with ``R`` upper triangular: ``U = inverse(R)``, so that the cost of a
weight is ``(w R_kk)²``. The values that a group's columns have when its turn comes, before any of them is
pruned, follow from the losses of all earlier columns by one triangular solve as wide as the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from effic.ir.sparsity import Pattern, density_mask, nm_mask
from effic.passes.quantize.gptq import Factor, factorise

# Columns worked on before a matrix product brings the next ones up to date; as in GPTQ.
_STRIP = 16


class SparseGptResult(NamedTuple):
    """A pruned weight.

    Attributes:
        weight: float32 ``[out, K]``, zero where the mask is.
        mask: bool ``[out, K]``, what is kept.
        damping: fraction of the mean diagonal that was added to the diagonal.
        fallback: what was pruned by magnitude instead and why, or None.
    """

    weight: np.ndarray
    mask: np.ndarray
    damping: float
    fallback: str | None


def factor_in_order(second_moment: np.ndarray, length: int, percdamp: float) -> Factor:
    """The factor of a second moment whose inputs are dealt with group by group.

    Args:
        second_moment: ``[G, K, K]``.
        length: input channels; the others of K are places of the kernel, see :func:`order_of`.
        percdamp: see :func:`~effic.passes.quantize.gptq.factorise`.
    """
    return factorise(second_moment, percdamp=percdamp, order=order_of(second_moment.shape[1], length))


def order_of(inputs: int, length: int) -> np.ndarray:
    """The order in which groups along the input channels are adjacent: intp ``[K]``.

    Args:
        inputs: K, in the order channel, place of the kernel.
        length: channels.
    """
    return np.arange(inputs).reshape(length, -1).T.reshape(-1)


def sparsegpt(
    weight: np.ndarray,
    factor: Factor,
    target: Pattern | float,
    length: int,
    *,
    blocksize: int = 128,
    update: bool = True,
) -> SparseGptResult:
    """Prune a weight by SparseGPT.

    Args:
        weight: ``[out, K]``, all finite; for a convolution the outputs of its groups one after another.
        factor: of the second moment of its inputs, see :func:`factor_in_order`.
        target: a pattern, or the fraction to keep; then the weights of ``blocksize`` inputs compete.
        length: input channels, along which groups run, for each place of the kernel.
        blocksize: inputs brought up to date at once; blocks end where groups do.
        update: whether weights that stay make up for the others; else only the mask is chosen, with the
            weights as they are, and kept weights do not change.
    """
    groups, inputs = factor.order.shape
    order = factor.order[0, ::-1]
    plain = length == inputs  # then groups are adjacent as they are
    rows = weight.reshape(groups, -1, inputs)
    columns = np.ascontiguousarray((rows if plain else rows[:, :, order]).transpose(0, 2, 1), np.float32)
    dead = factor.dead[:, order]
    fallback = (factor.fallback or "").replace("rounded to nearest", "pruned by magnitude") or None
    # Weights near the end of float32 may leave it on the way; that shows in the result.
    with np.errstate(over="ignore", invalid="ignore"):
        if not update:
            pruned, mask = _mask_only(columns, factor, target, length, blocksize)
        else:
            start = np.where(dead[:, :, None], np.float32(0), columns) if dead.any() else columns
            pruned, mask = _walk(start, factor, target, length, blocksize)
            if not np.isfinite(pruned).all():
                fallback = "pruned by magnitude: what makes up for losses is beyond float32"
                alike = factor._replace(upper=np.zeros_like(factor.upper), pivots=np.ones_like(factor.pivots))
                pruned, mask = _mask_only(columns, alike, target, length, blocksize)

    def back(array: np.ndarray) -> np.ndarray:
        turned = array.transpose(0, 2, 1)
        if not plain:
            turned = turned[:, :, np.argsort(order)]
        return turned.reshape(-1, inputs)

    return SparseGptResult(back(pruned), back(mask), factor.damping, fallback)


def _spans(inputs: int, length: int, target: Pattern | float, blocksize: int) -> Iterator[tuple[int, int]]:
    """Columns whose weights compete, in order."""
    if isinstance(target, Pattern):
        for first in range(0, inputs, length):
            for start in range(first, first + length, target.m):
                yield start, min(start + target.m, first + length)
    else:
        for start in range(0, inputs, blocksize):
            yield start, min(start + blocksize, inputs)


def _chooser(target: Pattern | float) -> Callable[[np.ndarray], np.ndarray]:
    """From the scores ``[G, run, out]`` of a span to its mask."""
    if isinstance(target, Pattern):
        return lambda score: nm_mask(score, target, axis=1)
    return lambda score: np.stack([density_mask(s, target, compare="matrix") for s in score])


def _mask_only(
    columns: np.ndarray, factor: Factor, target: Pattern | float, length: int, blocksize: int
) -> tuple[np.ndarray, np.ndarray]:
    choose, inputs = _chooser(target), columns.shape[1]
    pivots = factor.pivots[:, ::-1, None]
    mask = np.empty(columns.shape, bool)
    for start, stop in _spans(inputs, length, target, blocksize):
        mask[:, start:stop] = choose(np.abs(columns[:, start:stop]) * pivots[:, start:stop])
    return np.where(mask, columns, np.float32(0)), mask


def _walk(
    columns: np.ndarray, factor: Factor, target: Pattern | float, length: int, blocksize: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prune all columns in order.

    Args:
        columns: ``[G, K, outputs per group]`` in the order in which they are dealt with; not changed.
        factor: its positions run the other way round: column ``k`` is at ``K - 1 - k``.
        target, length, blocksize: see :func:`sparsegpt`.

    Returns:
        The pruned columns and their mask.
    """
    inputs = columns.shape[1]
    pivots = factor.pivots[:, ::-1, None]
    choose = _chooser(target)
    mask = np.empty(columns.shape, bool)
    pruned = np.empty(columns.shape, np.float32)
    losses = np.empty(columns.shape, np.float32)  # columns - pruned, of those that are done
    spans = list(_spans(inputs, length, target, blocksize))
    for block in _gathered(spans, max(blocksize, 1)):
        first, last = block[0][0], block[-1][1]
        # lower[t, s]: what the loss of an earlier column s adds to column first + t.
        lower = np.ascontiguousarray(
            factor.upper[:, inputs - last : inputs - first, inputs - last :][:, ::-1, ::-1]
        )
        values = columns[:, first:last].copy()
        if first:
            values += lower[:, :, :first] @ losses[:, :first]
        settle = dict(zip(block, _settling(block, first, lower), strict=True))
        for strip in _gathered(block, _STRIP):
            left, right = strip[0][0], strip[-1][1]
            if left > first:
                here = slice(left - first, right - first)
                values[:, here] += lower[:, here, first:left] @ losses[:, first:left]
            for start, stop in strip:
                span, here = slice(start, stop), slice(start - first, stop - first)
                now, inner = values[:, here], lower[:, here, span]
                if start > left:
                    now += lower[:, here, left:start] @ losses[:, left:start]
                # What the columns of the span would be if each were left as it was at first becomes what
                # they are if none of them is pruned: what the paper has in W when their turn comes.
                now[:] = columns[:, span] + settle[start, stop] @ (now - columns[:, span])
                mask[:, span] = choose(np.abs(now) * pivots[:, span])
                _prune_span(now, mask[:, span], inner)
                pruned[:, span] = now
                np.subtract(columns[:, span], now, out=losses[:, span])
    return pruned, mask


def _gathered(spans: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Consecutive spans of at most so many columns together, or one alone."""
    block: list[tuple[int, int]] = []
    for span in spans:
        if block and span[1] - block[0][0] > most:
            yield block
            block = []
        block.append(span)
    if block:
        yield block


def _settling(block: list[tuple[int, int]], first: int, lower: np.ndarray) -> list[np.ndarray]:
    """For every span what settles its values, ``[G, run, run]``: ``(I + L)⁻¹``, ``L`` what each loss of the
    span adds to later columns of it.

    Args:
        block: the spans.
        first: first column of the block.
        lower: ``[G, columns of the block, columns up to its end]``.
    """
    # The factor has ones on its diagonal, or nothing at all where there is none.
    inner = [np.tril(lower[:, start - first : stop - first, start:stop], -1) for start, stop in block]
    runs = [array.shape[1] for array in inner]
    if len(set(runs)) == 1:
        return list(np.linalg.inv(np.stack(inner) + np.eye(runs[0], dtype=np.float32)))
    return [
        np.linalg.inv(array + np.eye(run, dtype=np.float32)) for array, run in zip(inner, runs, strict=True)
    ]


def _prune_span(values: np.ndarray, mask: np.ndarray, inner: np.ndarray) -> None:
    """Zero what the mask leaves out, column after column, the later ones of the span making up for it.

    Args:
        values: ``[G, run, outputs]``, settled; changed to the pruned ones.
        mask: of the same shape.
        inner: ``[G, run, run]``, what each loss of the span adds to later columns of it.
    """
    # A settled column that stays as it is adds nothing to later ones, which have its share already.
    moved = np.empty_like(values)
    for t in range(values.shape[1]):
        settled = values[:, t]
        value = settled + (inner[:, t : t + 1, :t] @ moved[:, :t])[:, 0] if t else settled
        kept = np.where(mask[:, t], value, np.float32(0))
        np.subtract(settled, kept, out=moved[:, t])
        values[:, t] = kept
