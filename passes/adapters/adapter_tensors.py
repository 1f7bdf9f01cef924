"""Which tensor of an adapter file belongs to which module, and whether its shapes agree.

:class:`AdapterModule` is what a file says about one module of the base, arrays as stored.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from effic.ir.errors import InvalidModelError
from effic.passes.adapters.adapter_config import Settings

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
        parameters: where a parameter itself is adapted and not a module: the parameters it may be.
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
    parameters: tuple[str, ...] = ()

    @property
    def use_dora(self) -> bool:
        """Whether the weight's rows are rescaled after the addition."""
        return self.magnitude is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter folder, read and checked by itself (not yet against a base).

    Attributes:
        name: last part of the folder's path, for messages.
        path: the folder.
        digest: sha256 of the configuration and the tensors.
        settings: what the configuration says.
        modules: what changes modules by a delta, by :attr:`AdapterModule.path`.
        replacements: tensors that take the place of parameters, by the parameter's path.
        rows: rows of embeddings that are replaced, by module path: row numbers and their values.
    """

    name: str
    path: str
    digest: str
    settings: Settings
    modules: dict[str, AdapterModule]
    replacements: dict[str, np.ndarray]
    rows: dict[str, tuple[np.ndarray, np.ndarray]]


# No path of a module is longer; names are repeated in messages.
_NAME_LENGTH = 500

_FLOATS = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)

# Ends of keys, in the order they are tried, and what the rest of effic calls the tensor.
_ENDS: tuple[tuple[str, str], ...] = (
    (".lora_A.weight", "a"),
    (".lora_B.weight", "b"),
    (".lora_B.bias", "lora_bias"),
    (".lora_embedding_A", "embedding_a"),
    (".lora_embedding_B", "embedding_b"),
    (".lora_magnitude_vector", "magnitude"),
    (".lora_magnitude_vector.weight", "magnitude"),
    (".token_adapter.trainable_tokens_delta", "rows"),
    (".paca_w", "paca_w"),
    (".paca_indices", "paca_indices"),
    (".s2", "s2"),
    (".s2_axis", "axis"),
    (".s2_start", "start"),
    (".s2_order", "order"),
    (".svfit_u", "u"),
    (".svfit_v", "v"),
    (".svfit_sigma", "sigma"),
    (".svfit_sigma0", "sigma0"),
    (".l4q_scale", "scale"),
    (".l4q_offset", "offset"),
)
_INTEGERS = {"paca_indices", "axis", "start", "order"}
_OF_METHOD: dict[Method, tuple[set[str], set[str]]] = {
    # What a module must have, and what it may have.
    "lora": ({"a", "b"}, {"lora_bias", "magnitude"}),
    "paca": ({"paca_w", "paca_indices"}, set()),
    "s2ft": ({"s2", "axis", "start"}, {"order"}),
    "svfit": ({"u", "v", "sigma"}, {"sigma0"}),
    "l4q": ({"a", "b", "scale", "offset"}, set()),
}


class Sorting:
    """Sorts the tensors of a file by module and checks them."""

    def __init__(self, name: str, file: str, settings: Settings) -> None:
        self.name, self.file, self.settings = name, file, settings
        self.parts: dict[str, dict[str, np.ndarray]] = {}
        self.replacements: dict[str, np.ndarray] = {}

    def wrong(self, text: str) -> InvalidModelError:
        return InvalidModelError(f"adapter '{self.name}': {text}")

    def take(self, key: str, tensor: np.ndarray) -> None:
        """File a tensor under its module."""
        if not key.isprintable() or len(key) > _NAME_LENGTH:
            raise self.wrong(f"the name {key!r:.200} of a tensor is longer than names are, or no text.")
        path, role = _split(key)
        if path is None:
            raise self.wrong(f"the tensor '{key:.200}' is of no kind that is known here.")
        integer = role in _INTEGERS
        if tensor.dtype.kind not in "iu" if integer else tensor.dtype not in _FLOATS:
            wanted = "whole numbers" if integer else "fp32, fp16, bf16 or fp64"
            raise self.wrong(f"the tensor '{key:.200}' is of type {tensor.dtype}; expected {wanted}.")
        if not integer and not _finite(tensor):
            raise self.wrong(
                f"the tensor '{key:.200}' holds NaN, infinity or numbers beyond fp32; it would spoil the base."
            )
        target = self.replacements if role == "whole" else self.parts.setdefault(path, {})
        if (path if role == "whole" else role) in target:
            raise self.wrong(f"the tensor '{key:.200}' is there twice.")
        target[path if role == "whole" else role] = tensor

    def finish(self, path: str, digest: str) -> Adapter:
        """The adapter, when everything was taken."""
        modules: dict[str, AdapterModule] = {}
        rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        wrapped = _wrapped(self.parts, self.settings.target_parameters)
        for key, parts in self.parts.items():
            if "rows" in parts:
                rows[key] = self.token_rows(key, parts.pop("rows"))
            if parts:
                modules[key] = self.module(key, parts, wrapped.get(key, ()))
        if not modules and not rows and not self.replacements:
            raise InvalidModelError(f"{self.file} holds no tensors; copy the adapter again.")
        return Adapter(self.name, path, digest, self.settings, modules, self.replacements, rows)

    def module(self, path: str, parts: dict[str, np.ndarray], parameters: tuple[str, ...]) -> AdapterModule:
        settings = self.settings
        embedding = "embedding_a" in parts or "embedding_b" in parts
        if embedding:
            renamed = {"embedding_a": "a", "embedding_b": "b"}
            if {"a", "b"} & parts.keys():
                raise self.wrong(f"module '{path}' has factors of a layer and of an embedding.")
            parts = {renamed.get(k, k): v for k, v in parts.items()}
        needed, allowed = _OF_METHOD[settings.method]
        for role in sorted(needed - parts.keys()):
            raise self.wrong(f"module '{path}' has {_listed(parts)} but no {_listed([role])}.")
        for role in sorted(parts.keys() - needed - allowed):
            raise self.wrong(
                f"module '{path}' has {_listed([role])}, which a {settings.method} adapter does not."
            )
        if settings.method == "lora" and settings.use_dora != ("magnitude" in parts):
            there = "has" if "magnitude" in parts else "lacks"
            raise self.wrong(
                f"module '{path}' {there} a magnitude, but use_dora is {str(settings.use_dora).lower()}."
            )
        if settings.method == "lora" and settings.lora_bias and "lora_bias" not in parts and not embedding:
            raise self.wrong(f"module '{path}' lacks lora_B.bias, but lora_bias is true.")
        if "magnitude" in parts and "lora_bias" in parts:
            raise self.wrong(f"module '{path}' has DoRA and a bias on B, which is not defined.")
        rank, experts, kind = self.shape(path, parts, embedding, bool(parameters))
        alpha = settings.alpha_of(_plain(path))
        extra = {k: v for k, v in parts.items() if k not in ("a", "b", "lora_bias", "magnitude")}
        if settings.method == "l4q":
            extra["bits"] = np.array(settings.bits)
        return AdapterModule(
            path=path,
            kind=kind,
            a=parts.get("a"),
            b=parts.get("b"),
            rank=rank,
            scaling=settings.scaling(alpha, rank),
            alpha=alpha,
            use_rslora=settings.use_rslora,
            magnitude=parts.get("magnitude"),
            lora_bias=parts.get("lora_bias"),
            fan_in_fan_out=settings.fan_in_fan_out,
            init=settings.init if settings.method == "lora" else True,
            experts=experts,
            method=settings.method,
            extra=extra,
            adapter=self.name,
            parameters=parameters,
        )

    def shape(
        self, path: str, parts: Mapping[str, np.ndarray], embedding: bool, expert: bool
    ) -> tuple[int, int, Kind]:
        """Rank, number of experts and kind of a module; its shapes are checked against one another."""
        r, rank = self.settings.rank_of(_plain(path)), _RANK[self.settings.method](parts)
        conv = "a" in parts and parts["a"].ndim > 2
        if not rank or (conv and (embedding or expert)):
            shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(parts.items()))
            raise self.wrong(f"the tensors of module '{path}' do not fit one another: {shapes}.")
        if expert and rank % r == 0 and rank > r:
            return r, rank // r, "expert"
        if rank != r and self.settings.method in ("lora", "l4q", "paca"):
            raise self.wrong(f"module '{path}' has rank {rank}, but the configuration says {r}.")
        return rank, 1, "embedding" if embedding else "conv" if conv else "linear"

    def token_rows(self, path: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and values of an embedding's retrained rows."""
        said = self.settings.token_indices
        if isinstance(said, Mapping):
            found = [rows for name, rows in said.items() if f".{path}".endswith(f".{name}")]
        else:
            found = [said]
        if len(found) != 1 or values.ndim != 2 or not len(values) or len(found[0]) != len(values):
            raise self.wrong(
                f"module '{path}' has {len(values) if values.ndim else 1} retrained rows, "
                "but trainable_token_indices do not say which they are."
            )
        return np.array(found[0], np.int64), values


def _finite(tensor: np.ndarray) -> bool:
    """Whether all numbers are finite, in fp32 too, looking at a piece at a time."""
    flat = tensor.reshape(-1)
    step = 1 << 20
    with np.errstate(over="ignore"):
        pieces = (flat[at : at + step] for at in range(0, flat.size, step))
        return all(
            bool(np.isfinite(piece.astype(np.float32) if piece.itemsize > 4 else piece).all())
            for piece in pieces
        )


def _split(key: str) -> tuple[str | None, str]:
    """Module path and role of a key; for a replacement the parameter's path and ``"whole"``."""
    path = key.removeprefix("base_model.model.")
    # Some tools leave the adapter's name in.
    path = re.sub(r"\.modules_to_save(\.default)?\.", ".", path)
    path = re.sub(r"(\.lora_\w+)\.default(?=\.|$)", r"\1", path)
    for end, role in _ENDS:
        if path.endswith(end) and len(path) > len(end):
            return path.removesuffix(end), role
    parts = path.split(".")
    if any(part.startswith(("lora_", "paca_", "svfit_", "l4q_", "s2_")) for part in parts):
        return None, ""
    if len(parts) > 1 and parts[-1] and all(parts):
        return ".".join(part for part in parts if part != "base_layer"), "whole"
    return None, ""


def _plain(path: str) -> str:
    """A module's path without the wrappers around it."""
    return path.replace(".base_layer", "")


def _wrapped(paths: Iterable[str], parameters: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The parameters each module that wraps one may be of, by the module's path in the file.

    PEFT wraps a module once for each of its adapted parameters, one wrapper around the other, in the
    order in which the module registered them: the file calls the outermost ``experts`` and the next
    ``experts.base_layer``. Which is which only the base can tell, by shapes.
    """
    owners: dict[str, list[str]] = {}
    for path in paths:
        owners.setdefault(_plain(path), []).append(path)
    found: dict[str, tuple[str, ...]] = {}
    for owner, wrapped in owners.items():
        leaves = []
        for name in parameters:
            parent, _, leaf = name.rpartition(".")
            if parent and f".{owner}".endswith(f".{parent}"):
                leaves.append(f"{owner}.{leaf}")
        if len(leaves) == len(wrapped):
            found |= {path: tuple(leaves) for path in wrapped}
    return found


def _listed(roles: Iterable[str]) -> str:
    """Tensors as the file calls them."""
    names = {role: end.lstrip(".") for end, role in reversed(_ENDS)}
    return " and ".join(sorted(names[role] for role in roles))


# -- shapes: each gives the rank, or 0 when they do not fit one another ------------------------------


def _lora_rank(parts: Mapping[str, np.ndarray]) -> int:
    a, b = parts["a"], parts["b"]
    fits = a.ndim == b.ndim >= 2 and a.shape[0] == b.shape[1] and all(d == 1 for d in b.shape[2:])
    fits = fits and a.size > 0 and b.size > 0
    fits = fits and all(parts[key].size == len(b) for key in ("magnitude", "lora_bias") if key in parts)
    return a.shape[0] if fits else 0


def _l4q_rank(parts: Mapping[str, np.ndarray]) -> int:
    a, b, scale, offset = (parts[key] for key in ("a", "b", "scale", "offset"))
    fits = a.ndim == scale.ndim == 2 and scale.shape == offset.shape and len(scale) == len(b)
    return _lora_rank(parts) if fits and 0 < scale.shape[1] <= a.shape[1] else 0


def _paca_rank(parts: Mapping[str, np.ndarray]) -> int:
    w, indices = parts["paca_w"], parts["paca_indices"]
    fits = w.ndim == 2 and w.size > 0 and indices.shape == (w.shape[1],)
    return w.shape[1] if fits and indices.min() >= 0 and np.unique(indices).size == indices.size else 0


def _s2ft_rank(parts: Mapping[str, np.ndarray]) -> int:
    s2, axis, start, order = parts["s2"], parts["axis"], parts["start"], parts.get("order")
    if s2.ndim != 2 or s2.size == 0 or axis.size != 1 or start.size != 1:
        return 0
    along, first = int(axis.item()), int(start.item())
    if along not in (0, 1) or first < 0:
        return 0
    rank = int(s2.shape[along])
    if order is not None and not (
        order.ndim == 1
        and first + rank <= order.size
        and np.array_equal(np.sort(order), np.arange(order.size))
    ):
        return 0
    return rank


def _svfit_rank(parts: Mapping[str, np.ndarray]) -> int:
    u, v, sigma = parts["u"], parts["v"], parts["sigma"]
    fits = u.ndim == v.ndim == 2 and sigma.shape == (u.shape[1],) == (v.shape[1],)
    fits = fits and ("sigma0" not in parts or parts["sigma0"].shape == sigma.shape)
    return sigma.size if fits else 0


_RANK: dict[Method, Callable[[Mapping[str, np.ndarray]], int]] = {
    "lora": _lora_rank,
    "l4q": _l4q_rank,
    "paca": _paca_rank,
    "s2ft": _s2ft_rank,
    "svfit": _svfit_rank,
}
