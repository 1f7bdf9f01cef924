"""Several adapters on one weight: what their deltas become together.

``delta_sum``        ``Σ w_i ΔW_i``, exactly; ``cat`` is the same, written as factors one beside the other
``linear``           A and B are summed on their own, ``(Σ √(w_jσ_j) B_j)(Σ √(w_iσ_i) A_i)``, which holds cross
                     terms ``B_j A_i`` and is *not* the sum of the deltas
``svd``              the best approximation of the sum of rank ``svd_rank``
``magnitude_prune``  the ``density`` largest entries of each, then the weighted sum
``ties``             … of those entries whose sign most agree with, divided by how many they are
                     (arXiv 2306.01708)
``dare_linear``      a random ``density`` of the entries of each, divided by it (arXiv 2311.03099), summed
``dare_ties``        … joined as ties joins them

The last four work on the deltas (``space="delta"``) or, as PEFT does, on A and B by themselves
(``space="factors"``), with cross terms again. An adapter is drawn for by its content, not by its place in
the list: the order of the adapters changes nothing.

``peft_compat`` does what PEFT 0.21 does where that is another thing: it keeps the weights of adapters in
float32; a single adapter is added as it is; deltas that were pruned are cut to ``svd_rank`` (its
``ties_svd`` and so on); and when the first adapter has rsLoRA, the result is multiplied by the root of its
rank, because the configuration of the combined adapter still says rsLoRA (not so ``delta_sum``, which is
none of PEFT's modes). Where an adapter's rank differs from module to module, or an adapter lacks the
module, PEFT takes ranks from configurations, which are not seen here. Releases of PEFT that multiplied
``svd``'s deltas by σ a second time are not followed: 0.21 does not.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from effic.ir.errors import UsageError
from effic.passes.adapters.adapter_files import AdapterModule
from effic.passes.adapters.deltas import (
    Dtype,
    Factors,
    RankScale,
    factors,
    low_rank,
    module_delta,
    oriented,
    product,
)

Combine = Literal["delta_sum", "cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Space = Literal["delta", "factors"]
Sign = Literal["total", "frequency"]

_MODES = ("delta_sum", "cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_SUMS = ("delta_sum", "cat")

# What masks are drawn for, so that a seed gives each another one.
_OF_A, _OF_B, _OF_DELTA = range(3)


def combined_delta(
    modules: Sequence[tuple[AdapterModule, float]],
    base: np.ndarray,
    *,
    combine: Combine = "delta_sum",
    space: Space = "delta",
    density: float = 0.5,
    svd_rank: int | None = None,
    sign: Sign = "total",
    seed: int = 42,
    peft_compat: bool = False,
    rank: int | None = None,
    rank_scale: RankScale = "alpha_over_b",
    dtype: Dtype = np.float32,
) -> np.ndarray:
    """The change of a weight by several adapters, ``base + ΔW`` being the merged one.

    Every delta is taken against ``base`` itself, DoRA's too: merging it first and the others after it
    gives the same.

    Args:
        modules: one per adapter that has the weight, each with its adapter's weight ``w``.
        base: the weight, see :mod:`effic.passes.adapters.deltas`.
        combine: see the module.
        space: what ``ties``, ``dare_*`` and ``magnitude_prune`` work on.
        density: share of the entries that is kept, above 0 and up to 1.
        svd_rank: rank of ``svd``'s result, the largest rank of the modules by default; given with the
            pruning modes in delta space, their result is cut to it too.
        sign: whose sign counts for ``ties``: the larger sum's (``total``) or the more frequent one.
        seed: of the random modes, from 0.
        peft_compat: see the module.
        rank: DyLoRA's rank, see :func:`~effic.passes.adapters.deltas.module_delta`.
        rank_scale: likewise.
        dtype: what is computed in and returned.

    Raises:
        UsageError: the modules cannot be combined so; one is named.
    """
    _check(modules, combine, space, density, svd_rank, sign, seed)
    single = len(modules) == 1
    of_peft = peft_compat and combine != "delta_sum"
    if of_peft and (rescaled := next((module for module, _ in modules if module.use_dora), None)):
        raise _wrong(rescaled, "has DoRA, which PEFT does not combine; use combine=delta_sum")
    inflated = of_peft and modules[0][0].use_rslora
    if single and (combine == "linear" or peft_compat):
        # Of one adapter, linear is the product itself; PEFT adds a single adapter whatever it is told.
        combine = "delta_sum"
    # In an order of their own, so that rounding does not depend on the order they are given in.
    items = list(modules) if single else sorted(modules, key=lambda item: (_content(item[0]), item[1]))
    if peft_compat and (combine == "svd" or (space == "delta" and combine not in (*_SUMS, "linear"))):
        items = [(module, float(np.float32(weight))) for module, weight in items]
    cut = _Cut(rank, rank_scale, dtype)
    ranks = [module.rank for module, _ in items]
    new_rank = sum(ranks) if combine == "cat" else max(ranks)
    if combine in _SUMS:
        delta = _sum(items, base, cut)
    elif combine == "svd":
        delta = _svd(items, base, cut, svd_rank or new_rank)
    elif combine == "linear" or space == "factors":
        delta = _of_factors(items, base, cut, _mixer(combine, density, sign, seed), peft_compat)
    else:
        delta = _of_deltas(items, base, cut, _mixer(combine, density, sign, seed))
        if svd_rank is not None or peft_compat:
            delta = _nearest(delta, svd_rank or new_rank)
    if inflated:
        delta *= math.sqrt(new_rank if single else svd_rank or new_rank)
    return delta


class _Cut(NamedTuple):
    """How a module's factors are taken: DyLoRA's rank and scale, and what is computed in."""

    rank: int | None
    rank_scale: RankScale
    dtype: Dtype

    def delta(self, module: AdapterModule, base: np.ndarray) -> np.ndarray:
        return module_delta(module, base, rank=self.rank, rank_scale=self.rank_scale, dtype=self.dtype)

    def low_rank(self, module: AdapterModule, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return low_rank(module, base, rank=self.rank, rank_scale=self.rank_scale, dtype=self.dtype)

    def factors(self, module: AdapterModule) -> Factors:
        return factors(module, rank=self.rank, rank_scale=self.rank_scale, dtype=self.dtype)


_Items = Sequence[tuple[AdapterModule, float]]
# What joins tensors, one per adapter: the tensors, their weights, whose they are, what they are.
_Mixer = Callable[[Sequence[np.ndarray], Sequence[float], Sequence[AdapterModule], int], np.ndarray]


def _check(
    modules: _Items, combine: str, space: str, density: float, svd_rank: int | None, sign: str, seed: int
) -> None:
    for name, value, allowed in (
        ("combine", combine, _MODES),
        ("space", space, ("delta", "factors")),
        ("sign", sign, ("total", "frequency")),
    ):
        if value not in allowed:
            raise UsageError(f"{name} is '{value}'; give one of {', '.join(allowed)}.")
    if not modules:
        raise UsageError("there is no adapter to combine; name at least one.")
    if not 0 < density <= 1:
        raise UsageError(f"density is {density}; give a share above 0 and up to 1.")
    ranked = combine == "svd" or (space == "delta" and combine not in (*_SUMS, "linear"))
    if svd_rank is not None and (svd_rank < 1 or not ranked):
        why = (
            "give a whole number from 1"
            if svd_rank < 1
            else f"{combine} in {space} space has no rank to choose"
        )
        raise UsageError(f"svd_rank is {svd_rank}; {why}.")
    if seed < 0:
        raise UsageError(f"seed is {seed}; give a whole number from 0.")
    rescaling = [module for module, _ in modules if module.use_dora or module.method == "l4q"]
    if len(rescaling) > 1:
        raise _wrong(
            rescaling[1], "rescales its whole weight, and so does another adapter; merge only one of the two"
        )
    for module, weight in modules:
        if not math.isfinite(weight):
            raise _wrong(module, f"has the weight {weight}; give a finite number")
        if module not in rescaling:
            continue
        what = "DoRA" if module.use_dora else "L4Q"
        if combine not in _SUMS and not (combine == "linear" and len(modules) == 1):
            raise _wrong(module, f"has {what}, whose change is no sum; only combine=delta_sum takes it")
        if weight != 1 or (what == "L4Q" and len(modules) > 1):
            raise _wrong(module, f"has {what}, which is merged as it is: alone or first, with weight 1")


def _content(module: AdapterModule) -> int:
    """A number of a module's own, from its arrays."""
    arrays = [module.a, module.b, *(module.extra[key] for key in sorted(module.extra))]
    value = zlib.crc32(module.path.encode())
    for array in arrays:
        if array is not None:
            value = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, value)
    return value


# -- sums ------------------------------------------------------------------------------------------


def _stacked(items: _Items, base: np.ndarray, cut: _Cut) -> tuple[np.ndarray, np.ndarray]:
    """The weighted deltas as one product of higher rank."""
    pairs = [(cut.low_rank(module, base), weight) for module, weight in items]
    left = np.concatenate([pair[0] * weight for pair, weight in pairs], axis=2)
    return left, np.concatenate([pair[1] for pair, _ in pairs], axis=1)


def _is_product(module: AdapterModule) -> bool:
    return module.method == "lora" and not module.use_dora


def _sum(items: _Items, base: np.ndarray, cut: _Cut) -> np.ndarray:
    thin = [item for item in items if _is_product(item[0])]
    delta: np.ndarray | None = None
    if thin:
        delta = product(*_stacked(thin, base, cut))
        delta = delta if thin[0][0].kind == "expert" else delta[0]
    for module, weight in items:
        if _is_product(module):
            continue
        other = cut.delta(module, base)
        if weight != 1:
            other *= weight
        delta = other if delta is None else np.add(delta, other, out=delta)
    if delta is None:  # _check: there is at least one
        raise UsageError("there is no adapter to combine; name at least one.")
    return delta


def _svd(items: _Items, base: np.ndarray, cut: _Cut, rank: int) -> np.ndarray:
    if not all(_is_product(module) for module, _ in items):
        return _nearest(_sum(items, base, cut), rank)
    left, right = _stacked(items, base, cut)
    if rank >= min(left.shape[2], left.shape[1], right.shape[2]):
        return _sum(items, base, cut)
    # The decomposition of a thin product costs no more than that of its core.
    q, upper = np.linalg.qr(left)
    p, other = np.linalg.qr(right.transpose(0, 2, 1))
    u, s, vt = np.linalg.svd(upper @ other.transpose(0, 2, 1))
    delta = (q @ (u[:, :, :rank] * s[:, None, :rank])) @ (vt[:, :rank] @ p.transpose(0, 2, 1))
    return np.asarray(delta if items[0][0].kind == "expert" else delta[0])


def _nearest(delta: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a matrix, or of each of a stack, of a rank."""
    if rank >= min(delta.shape[-2:]):
        return delta
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return np.asarray((u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :])


# -- pruning and joining -----------------------------------------------------------------------------


def _of_deltas(items: _Items, base: np.ndarray, cut: _Cut, mix: _Mixer) -> np.ndarray:
    modules = [module for module, _ in items]
    return mix([cut.delta(m, base) for m in modules], [weight for _, weight in items], modules, _OF_DELTA)


def _of_factors(items: _Items, base: np.ndarray, cut: _Cut, mix: _Mixer, single: bool) -> np.ndarray:
    """A and B joined by themselves, then multiplied.

    Args:
        single: weights in single precision, as PEFT has them.
    """
    modules = [module for module, _ in items]
    first = modules[0]
    for module in modules:
        if not _is_product(module):
            raise _wrong(module, f"is of a {module.method} adapter, which has no factors to join")
        if module.initial is not None or module.init not in (True, False, "mica"):
            raise _wrong(
                module, f"was trained from init_lora_weights={module.init}; join such deltas instead"
            )
        if module.rank != first.rank:
            raise _wrong(
                module,
                f"has rank {module.rank}, but that of adapter '{first.adapter}' has {first.rank}; factors of "
                "different ranks cannot be joined, so use combine=delta_sum or svd",
            )
        # Also says so where one does not fit the weight.
        cut.low_rank(module, base)
    found = [cut.factors(module) for module in modules]
    scales = [weight * pair.scaling for (_, weight), pair in zip(items, found, strict=True)]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    if single:
        roots, signed = ([float(np.float32(v)) for v in values] for values in (roots, signed))
    a = mix([pair.a for pair in found], signed, modules, _OF_A)
    b = mix([pair.b for pair in found], roots, modules, _OF_B)
    delta = product(*oriented(first, Factors(a, b, 1.0)))
    return delta if first.kind == "expert" else delta[0]


def _mixer(combine: str, density: float, sign: str, seed: int) -> _Mixer:
    def mix(
        tensors: Sequence[np.ndarray], weights: Sequence[float], modules: Sequence[AdapterModule], part: int
    ) -> np.ndarray:
        if combine in ("ties", "magnitude_prune"):
            kept = [largest(tensor, density) for tensor in tensors]
        elif combine != "linear" and density < 1:
            kept = [
                np.where(_drawn(tensor.shape, density, (seed, part, _content(module))), tensor / density, 0)
                for tensor, module in zip(tensors, modules, strict=True)
            ]
        else:
            kept = list(tensors)
        return agreed(kept, weights, sign) if combine in ("ties", "dare_ties") else weighted(kept, weights)

    return mix


def _drawn(shape: tuple[int, ...], density: float, seed: tuple[int, int, int]) -> np.ndarray:
    """A mask that holds each entry with probability ``density``."""
    return np.random.default_rng(seed).random(shape, np.float32) < density


def largest(tensor: np.ndarray, density: float) -> np.ndarray:
    """The ``int(density · size)`` entries of largest magnitude, the rest zero; of equals the first."""
    count = int(density * tensor.size)
    if count >= tensor.size:
        return tensor
    kept = np.zeros_like(tensor)
    if count:
        size = np.abs(tensor).reshape(-1)
        least = np.partition(size, size.size - count)[size.size - count]
        mask = size > least
        mask[np.flatnonzero(size == least)[: count - int(np.count_nonzero(mask))]] = True
        np.copyto(kept, tensor, where=mask.reshape(tensor.shape))
    return kept


def weighted(tensors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """``Σ w_i T_i``."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight
    return total


def agreed(tensors: Sequence[np.ndarray], weights: Sequence[float], sign: str) -> np.ndarray:
    """TIES: of every entry, the mean of those whose sign wins; zeros have none.

    Args:
        tensors: one per adapter, alike in shape.
        weights: applied to the entries, not to the vote.
        sign: ``total``: the sign of the sum; ``frequency``: that of most; positive when they are even.
    """
    total = np.zeros_like(tensors[0])
    for tensor in tensors:
        total += np.sign(tensor) if sign == "frequency" else tensor
    winner = np.where(total >= 0, 1, -1).astype(total.dtype)
    mixed, count = np.zeros_like(total), np.zeros_like(total)
    for tensor, weight in zip(tensors, weights, strict=True):
        keeps = np.sign(tensor) == winner
        mixed += np.where(keeps, tensor * weight, 0)
        count += keeps
    return np.asarray(mixed / np.maximum(count, 1))


def _wrong(module: AdapterModule, text: str) -> UsageError:
    return UsageError(f"module '{module.path}' of adapter '{module.adapter}' {text}.")
