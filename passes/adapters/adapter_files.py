"""Adapters as they lie on disk: one folder, one module after the other, nothing copied.

An adapter changes the weights of single modules of a base model. :class:`AdapterModule` is what a
file says about one of them, arrays as stored.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

Kind = Literal["linear", "conv", "embedding", "expert"]
Method = Literal["lora", "paca", "s2ft", "svfit", "l4q"]


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterModule:
    """What an adapter says about one module. Arrays are views of the file: read-only, in its dtype.

    ``extra`` by method:

    ======  ==========================================================================================
    paca    ``paca_w`` ``[out, r]``, ``paca_indices`` ``[r]`` (input columns that ``scaling · paca_w``
            takes the place of)
    s2ft    ``s2`` ``[k, in]`` or ``[out, k]``; ``axis`` (0 or 1) and ``start``, arrays of rank 0: the
            axis of the weight and the first selected channel, in the permuted model; ``order``
            ``[channels of the axis]``, absent when nothing was permuted: channel ``i`` of the permuted
            model is channel ``order[i]`` of the original one
    svfit   ``u`` ``[out, r]``, ``v`` ``[in, r]``, ``sigma`` ``[r]`` (trained), ``sigma0`` ``[r]`` (of
            the base; absent when the file lacks it, then it is ``diag(uᵀ W v)``)
    l4q     ``scale`` and ``offset`` ``[out, groups along in]``, ``bits`` (rank 0)
    ======  ==========================================================================================

    Attributes:
        path: the module's path in the base model, ``encoder.layer.0.attention.self.query``.
        kind: what the module is; ``expert``: a stack of matrices, see ``a``.
        a: ``[r, in]`` (linear), ``[r, I, k…]`` (conv), ``[r, V]`` (embedding), ``[E·r, in]``, expert by
            expert (expert); None for methods without factors.
        b: ``[out, r]``, ``[O, r, 1…]``, ``[d, r]``, or ``[out, r·E]`` with the expert running fastest.
        rank: r of this module.
        scaling: σ, the factor on ``B·A``: ``alpha / r``, or ``alpha / √r`` for rsLoRA.
        alpha: α of this module.
        use_rslora: whether σ is ``alpha / √r``.
        magnitude: DoRA's m in the shape of the file: ``[out]``, ``[1, O, 1…]`` or ``[d]``; None without.
        lora_bias: bias of B, ``[out]``, or None.
        fan_in_fan_out: the training framework stored the weight as ``[in, out]``. Deltas are
            ``[out, in]`` all the same, as A and B are.
        init: ``init_lora_weights`` of the config, where it changed the base weight (``"pissa"`` …).
        initial: the adapter as training started, where it is known (``B·A - B₀·A₀`` is the change).
        experts: E for kind ``expert``, else 1.
        method: how the arrays are to be read.
        extra: arrays of the methods that are not LoRA.
        adapter: name of the adapter, for messages.
    """

    path: str
    kind: Kind = "linear"
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    rank: int = 0
    scaling: float = 1.0
    alpha: float = 1.0
    use_rslora: bool = False
    magnitude: np.ndarray | None = None
    lora_bias: np.ndarray | None = None
    fan_in_fan_out: bool = False
    init: str | bool = True
    initial: AdapterModule | None = None
    experts: int = 1
    method: Method = "lora"
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    adapter: str = ""

    @property
    def use_dora(self) -> bool:
        """Whether the weight's rows are rescaled after the addition."""
        return self.magnitude is not None
