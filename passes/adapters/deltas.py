"""What an adapter's module adds to its weight: ``ΔW``, so that the merged weight is ``base + ΔW``.

Plain functions of arrays. Weights are ``[out, in]``; a convolution's has its kernel flattened into the
inputs, ``[O, I·k…]``, an embedding's is ``[V, d]``, a stack of expert weights ``[E, out, in]``.

=================  ================================================================================
LoRA, rsLoRA       ``σ B A`` with σ = α/r or α/√r; experts: ``σ B_e A_e`` each; embedding: ``σ (B A)ᵀ``
DyLoRA             the first b components, σ = α/b (arXiv 2210.07558)
DoRA               ``diag(m / ‖V‖) V - W`` of ``V = W + σ B A``; norms over a row (an output channel), in
                   an embedding over the vocabulary (arXiv 2402.09353)
PiSSA, OLoRA,      training began from ``W - σ B₀ A₀`` (arXiv 2404.02948, 2406.01775): into the original
BA-LoRA            weight, ``σ (B A - B₀ A₀)``
PaCA               columns are replaced: ``W[:, idx] = σ paca_w`` (ICLR 2025)
S²FT               ``s2`` is added to channels that lie side by side in a permuted model (NeurIPS 2024)
SVFit              ``U diag(σ' - σ) Vᵀ`` (arXiv 2409.05926)
L4Q                the weight *is* ``s·round(clamp((W + α B A - b) / s)) + b`` (arXiv 2402.04902)
=================  ================================================================================

Where nothing is added ``ΔW`` is ``-0.0``, the only number that leaves every other one alone, ``-0.0``
itself included: what an adapter does not touch stays bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from effic.ir.errors import UsageError
from effic.passes.adapters.adapter_files import AdapterModule

RankScale = Literal["alpha_over_b", "keep"]
Dtype = type[np.float32] | type[np.float64]

# Two singular values closer than this, relative to the largest, are one to float32: which of their
# vectors PiSSA took out of the weight cannot be told.
_GAP = 2.0**-20


def module_delta(
    module: AdapterModule,
    base: np.ndarray,
    *,
    rank: int | None = None,
    rank_scale: RankScale = "alpha_over_b",
    dtype: Dtype = np.float32,
) -> np.ndarray:
    """The change of a weight, ``base + ΔW`` being the merged one.

    Args:
        module: what the adapter says. Where :attr:`~AdapterModule.init` names an initialisation that
            changed the base, ``base`` is taken for the original weight; to merge into the residual one
            that training started from, pass the module with ``init=True``.
        base: the weight, decoded if it was quantized; see the module for its axes.
        rank: DyLoRA: keep the first so many components; modules of no higher rank stay as they are.
        rank_scale: σ of what is kept: ``alpha_over_b`` as during training, or ``keep``.
        dtype: what is computed in and returned.

    Returns:
        ``[out, in]``, ``[O, I·k…]``, ``[V, d]`` or ``[E, out, in]``, an array of its own.

    Raises:
        UsageError: the module does not fit the weight, or its kind allows no such merge.
    """
    if module.method != "lora":
        if rank is not None:
            raise _wrong(module, f"is of a {module.method} adapter, which has no rank to cut")
        return _METHODS[module.method](module, as_matrix(module, base), dtype)
    left, right = low_rank(module, base, rank=rank, rank_scale=rank_scale, dtype=dtype)
    delta = product(left, right)
    if module.kind != "expert":
        delta = delta[0]
    return delta if module.magnitude is None else _rescaled(module, as_matrix(module, base), delta)


def bias_delta(
    module: AdapterModule, *, rank: int | None = None, rank_scale: RankScale = "alpha_over_b"
) -> np.ndarray | None:
    """What B's bias adds to the bias of the base, ``[out]``; None without one."""
    if module.lora_bias is None:
        return None
    kept = module.rank if rank is None else min(rank, module.rank)
    return module.lora_bias.astype(np.float64) * scaling_of(module, kept, rank_scale)


def as_matrix(module: AdapterModule, base: np.ndarray) -> np.ndarray:
    """A view of a weight with the axes that deltas have."""
    if module.kind == "expert":
        if base.ndim != 3 or len(base) != module.experts:
            raise _wrong(
                module,
                f"is for a stack of {module.experts} expert weights, but its weight has shape "
                f"{list(base.shape)}",
            )
        return base
    return base.reshape(len(base), -1)


def scaling_of(module: AdapterModule, rank: int, rank_scale: RankScale) -> float:
    """σ of a module cut to ``rank``."""
    if rank == module.rank or rank_scale == "keep":
        return module.scaling
    return module.alpha / (math.sqrt(rank) if module.use_rslora else rank)


# -- LoRA ------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """A and B as the file has them, one pair per expert.

    Attributes:
        a: ``[E, r, in]``; an embedding's ``in`` is its vocabulary.
        b: ``[E, out, r]``.
        scaling: σ.
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float


def factors(
    module: AdapterModule,
    *,
    rank: int | None = None,
    rank_scale: RankScale = "alpha_over_b",
    dtype: Dtype = np.float32,
) -> Factors:
    """A and B of a LoRA module, cut to ``rank``.

    Raises:
        UsageError: it has none, or they do not fit one another.
    """
    a, b, experts = module.a, module.b, module.experts
    if a is None or b is None:
        raise _wrong(module, f"is of a {module.method} adapter, which has no factors A and B")
    if rank is not None and rank < 1:
        raise UsageError(f"the rank to cut to is {rank}; give a whole number from 1.")
    kept = module.rank if rank is None else min(rank, module.rank)
    if len(a) != module.rank * experts or b.size != len(b) * module.rank * experts:
        raise _wrong(
            module, f"has A {list(a.shape)} and B {list(b.shape)}, which rank {module.rank} does not give"
        )
    # The experts run slowest in A and fastest in B.
    a = a.reshape(experts, module.rank, -1)[:, :kept]
    b = b.reshape(len(b), module.rank, experts)[:, :kept].transpose(2, 0, 1)
    return Factors(a.astype(dtype), b.astype(dtype), scaling_of(module, kept, rank_scale))


def low_rank(
    module: AdapterModule,
    base: np.ndarray,
    *,
    rank: int | None = None,
    rank_scale: RankScale = "alpha_over_b",
    dtype: Dtype = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """A LoRA module's delta before any rescaling by DoRA, as a product.

    Returns:
        ``left [E, out, R]`` and ``right [E, R, in]`` in the weight's orientation, E = 1 but for experts,
        with ``ΔW = left @ right``; R is r, or 2r where the base was changed before training.

    Raises:
        UsageError: it does not fit ``base``, or what training took out of the base is not known.
    """
    left, right = oriented(module, factors(module, rank=rank, rank_scale=rank_scale, dtype=dtype))
    matrix = as_matrix(module, base)
    shape = (left.shape[1], right.shape[2])
    if shape != matrix.shape[-2:]:
        raise _wrong(
            module, f"is for a weight of shape {list(shape)}, but its weight is {list(matrix.shape[-2:])}"
        )
    taken = _taken_out(module, matrix, dtype)
    if taken is None:
        return left, right
    return np.concatenate([left, -taken[0]], axis=2), np.concatenate([right, taken[1]], axis=1)


def oriented(module: AdapterModule, found: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Factors turned the way the weight lies, σ included: ``left [E, out, r]``, ``right [E, r, in]``."""
    a, b, scaling = found
    if module.kind == "embedding":
        return a.transpose(0, 2, 1) * scaling, np.ascontiguousarray(b.transpose(0, 2, 1))
    return b * scaling, a


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right``; nothing but ``-0.0`` where a factor is zero."""
    if not left.any() or not right.any():
        return _nothing((*left.shape[:-1], right.shape[-1]), left.dtype)
    return np.asarray(left @ right)


def _nothing(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.full(shape, -0.0, dtype)


def _taken_out(module: AdapterModule, base: np.ndarray, dtype: Dtype) -> tuple[np.ndarray, np.ndarray] | None:
    """What was subtracted from the original weight before training, as ``left`` and ``right``.

    None where nothing was: of the initialisations that are named, MiCA starts from A = 0.
    """
    if module.initial is not None:
        return oriented(module.initial, factors(module.initial, dtype=dtype))
    if isinstance(module.init, bool) or module.init == "mica":
        return None
    if module.init == "pissa" and module.kind == "linear":
        return _pissa(module, base.astype(dtype))
    if module.init == "olora" and module.kind == "linear" and not module.fan_in_fan_out:
        return _olora(module, base.astype(dtype))
    raise _wrong(
        module,
        f"was trained from init_lora_weights={module.init}, which changed the weight before training in a "
        "way that cannot be recomputed; merge into the residual model that was saved then, or give the "
        "initial adapter",
    )


def _pissa(module: AdapterModule, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The leading ``U_r Σ_r V_rᵀ`` of the original weight: σ cancels."""
    u, s, vt = np.linalg.svd(base, full_matrices=False)
    r = module.rank
    if r < len(s) and s[r - 1] > _GAP * s[0] and s[r - 1] - s[r] <= _GAP * s[0]:
        raise _wrong(
            module,
            f"was trained from init_lora_weights=pissa, but the singular values {r} and {r + 1} of its weight "
            "are the same, so what was taken out of it is not known; give the initial adapter",
        )
    return (u[:, :r] * s[:r])[None], vt[None, :r]


def _olora(module: AdapterModule, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``σ Q_r R_r`` of the QR decomposition; signs, the only freedom in it, cancel in the product."""
    q, upper = np.linalg.qr(base)
    r = module.rank
    pivots = np.abs(np.diagonal(upper))[:r]
    if pivots.min() <= _GAP * np.linalg.norm(base, axis=0).max():
        raise _wrong(
            module,
            f"was trained from init_lora_weights=olora, but the first {r} columns of its weight depend on one "
            "another, so what was taken out of it is not known; give the initial adapter",
        )
    return (q[:, :r] * module.scaling)[None], upper[None, :r]


# -- DoRA ------------------------------------------------------------------------------------------


def dora_norms(
    module: AdapterModule,
    base: np.ndarray,
    *,
    rank: int | None = None,
    rank_scale: RankScale = "alpha_over_b",
    dtype: Dtype = np.float32,
) -> np.ndarray:
    """``‖V‖``, which DoRA divides by: ``[out]``, of an embedding ``[d]``.

    Channels of norm 0 keep the factor 1. To take a DoRA adapter away again these are needed:
    ``W = merged / (m / ‖V‖) - σ B A``.
    """
    left, right = low_rank(module, base, rank=rank, rank_scale=rank_scale, dtype=dtype)
    total = product(left, right)[0]
    total += as_matrix(module, base)
    return _norms(total, 0 if module.kind == "embedding" else 1)


def _norms(matrix: np.ndarray, axis: int) -> np.ndarray:
    # A vocabulary is long: summed in double precision.
    return np.asarray(np.sqrt(np.add.reduce(np.square(matrix), axis=axis, dtype=np.float64)))


def _rescaled(module: AdapterModule, base: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """DoRA's delta from LoRA's, which is overwritten."""
    if module.kind == "expert" or module.magnitude is None:
        raise _wrong(module, "has DoRA on a stack of expert weights, which is not defined")
    axis = 0 if module.kind == "embedding" else 1
    m = module.magnitude.reshape(-1).astype(np.float64)
    if len(m) != delta.shape[1 - axis]:
        raise _wrong(
            module, f"has {len(m)} magnitudes, but its weight has {delta.shape[1 - axis]} channels to scale"
        )
    delta += base
    norms = _norms(delta, axis)
    factor = np.divide(m, norms, out=np.ones_like(m), where=norms > 0)
    delta *= np.expand_dims(factor.astype(delta.dtype), axis)
    delta -= base
    return delta


# -- other adapters --------------------------------------------------------------------------------


def _paca(module: AdapterModule, base: np.ndarray, dtype: Dtype) -> np.ndarray:
    new, columns = module.extra["paca_w"], module.extra["paca_indices"]
    if len(new) != len(base) or columns.max() >= base.shape[1]:
        raise _wrong(
            module,
            f"replaces columns up to {columns.max()} of {len(new)} weights each, but its weight is "
            f"{list(base.shape)}",
        )
    delta = _nothing(base.shape, dtype)
    delta[:, columns] = _in(new, dtype) * module.scaling - _in(base[:, columns], dtype)
    return delta


def _s2ft(module: AdapterModule, base: np.ndarray, dtype: Dtype) -> np.ndarray:
    s2, axis, start = module.extra["s2"], int(module.extra["axis"].item()), int(module.extra["start"].item())
    order = module.extra.get("order")
    length = base.shape[axis]
    if reason := why_not_order(module, base.shape):
        raise _wrong(module, reason)
    channels = np.arange(start, start + s2.shape[axis])
    if channels[-1] >= length or s2.shape[1 - axis] != base.shape[1 - axis]:
        raise _wrong(
            module,
            f"adds {list(s2.shape)} from channel {start} of axis {axis}, but its weight is {list(base.shape)}",
        )
    if order is not None:
        channels = order[channels]
    delta = _nothing(base.shape, dtype)
    delta[(channels, slice(None)) if axis == 0 else (slice(None), channels)] = s2
    return delta


def why_not_order(module: AdapterModule, shape: tuple[int, ...]) -> str | None:
    """Why S²FT's order is not one of a weight's channels ``(out, in)``, as a phrase, or None."""
    order, along = module.extra.get("order"), shape[int(module.extra["axis"].item())]
    if order is None or order.size == along:
        return None
    return (
        f"orders {order.size} channels, but its weight has {along} along that axis; with grouped-query "
        "attention the heads of keys and values cannot follow the order of the queries, so select channels "
        "of the feed-forward layers instead"
    )


def _svfit(module: AdapterModule, base: np.ndarray, dtype: Dtype) -> np.ndarray:
    u, v = _in(module.extra["u"], dtype), _in(module.extra["v"], dtype)
    if (len(u), len(v)) != base.shape:
        raise _wrong(
            module, f"is for a weight of shape {[len(u), len(v)]}, but its weight is {list(base.shape)}"
        )
    before = module.extra.get("sigma0")
    if before is None:
        before = np.add.reduce((_in(base, dtype) @ v) * u, axis=0)
    change = _in(module.extra["sigma"], dtype) - _in(before, dtype)
    return product(u * change, np.ascontiguousarray(v.T))


def _l4q(module: AdapterModule, base: np.ndarray, dtype: Dtype) -> np.ndarray:
    merged = l4q_merged(module, base)
    return np.asarray(_in(merged.decode(), dtype) - _in(base, dtype))


class L4QWeight(NamedTuple):
    """A weight as L4Q exports it: ``W = s·(codes - z)`` with a real-valued ``z = -b / s``.

    Attributes:
        codes: int8 ``[out, in]``, from ``-2^(bits-1)`` to ``2^(bits-1) - 1``.
        scale: s, float32 ``[out, groups]``.
        offset: b, likewise.
        group_size: inputs that share a scale; the last group may be short.
        bits: width of a code.
    """

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    group_size: int
    bits: int

    @property
    def zero_point(self) -> np.ndarray:
        """z, float32 ``[out, groups]``."""
        return np.asarray(-self.offset / self.scale)

    def decode(self) -> np.ndarray:
        """The weight, float32 ``[out, in]``, as training multiplied with it: ``s·codes + b``."""
        into = self.codes.shape[1]
        weight = self.codes.astype(np.float32)
        weight *= _spread(self.scale, self.group_size, into)
        weight += _spread(self.offset, self.group_size, into)
        return weight


def l4q_merged(module: AdapterModule, base: np.ndarray) -> L4QWeight:
    """Merge and quantize in one step, as L4Q's forward pass does, in float32 as it did.

    Raises:
        UsageError: the module does not fit the weight, or its scales are no scales.
    """
    scale, offset = (module.extra[key].astype(np.float32) for key in ("scale", "offset"))
    left, right = oriented(module, factors(module))
    matrix = as_matrix(module, base)
    out, into = left.shape[1], right.shape[2]
    groups = scale.shape[1]
    group_size = -(-into // groups)
    if (out, into) != matrix.shape or scale.shape != offset.shape or len(scale) != out:
        raise _wrong(
            module, f"is for a weight of shape {[out, into]}, but its weight is {list(matrix.shape)}"
        )
    if -(-into // group_size) != groups:
        raise _wrong(module, f"has {groups} scales a row, into which {into} inputs do not divide")
    bits = int(module.extra["bits"].item())
    if not 2 <= bits <= 8:
        raise _wrong(module, f"has codes of {bits} bits; 2 to 8 can be exported")
    if not (scale > 0).all():
        raise _wrong(module, "has scales that are not above zero")
    levels = matrix.astype(np.float32) + product(left, right)[0]
    levels -= _spread(offset, group_size, into)
    levels /= _spread(scale, group_size, into)
    np.clip(levels, -(1 << (bits - 1)), (1 << (bits - 1)) - 1, out=levels)
    return L4QWeight(np.rint(levels).astype(np.int8), scale, offset, group_size, bits)


def _spread(values: np.ndarray, group_size: int, into: int) -> np.ndarray:
    """A value per group made one per input."""
    return np.repeat(values, group_size, axis=1)[:, :into]


_METHODS: dict[str, Callable[[AdapterModule, np.ndarray, Dtype], np.ndarray]] = {
    "paca": _paca,
    "s2ft": _s2ft,
    "svfit": _svfit,
    "l4q": _l4q,
}


def _in(array: np.ndarray, dtype: Dtype) -> np.ndarray:
    return np.asarray(array, dtype)


def _wrong(module: AdapterModule, text: str) -> UsageError:
    of = f" of adapter '{module.adapter}'" if module.adapter else ""
    return UsageError(f"module '{module.path}'{of} {text}.")
