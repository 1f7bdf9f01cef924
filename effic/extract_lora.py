"""The difference between a model and its fine-tuned version as a LoRA adapter, by singular values.

The best approximation of rank r of ``ΔW = W_tuned - W_base`` keeps its r largest singular values (Eckart and
Young); for a model that LoRA itself trained nothing is lost at the trained rank. Large matrices are
decomposed by randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import encoding_nodes
from effic.ir.errors import UsageError
from effic.ir.model import Model, constant_tensor
from effic.ir.safetensors_format import write_safetensors
from effic.ir.tensors import borrow
from effic.ir.weights import WeightSite, weight_sites
from effic.optimize import load
from effic.passes.adapters.adapter_files import CONFIG, TENSORS
from effic.passes.adapters.matching import module_of
from effic.passes.base import matches

MAP = "lora.map"
"""File of the folder with the lines of a map, for weights whose names do not tell their modules."""

PREFIX = "base_model.model."

# Smaller matrices are decomposed exactly: it takes seconds at most.
_EXACT = 1024
# Halko et al., sections 4.2 and 4.5: more columns than wanted, and a few products with ΔWᵀΔW.
_MORE_COLUMNS = 10
_ITERATIONS = 4
# Singular values below this share of the largest are rounding noise of fp32 weights' differences.
_NOISE = 1e-6

Kind = Literal["linear", "conv", "embedding"]


@dataclasses.dataclass(frozen=True)
class ExtractedSite:
    """One weight's part of an adapter.

    Attributes:
        name: of the constant in the base.
        path: of the module in the adapter.
        kind: what the module is.
        shape: ``[out, in]``.
        rank: kept singular values.
        energy: their share of ``‖ΔW‖²``.
        error: ``‖ΔW - σBA‖ / ‖ΔW‖``.
        relative: ``‖ΔW‖ / ‖W_base‖``.
    """

    name: str
    path: str
    kind: Kind
    shape: tuple[int, int]
    rank: int
    energy: float
    error: float
    relative: float


@dataclasses.dataclass
class Extraction:
    """What became an adapter, and what did not.

    Attributes:
        folder: where it was written.
        sites: weights with factors.
        replaced: parameters that differ and went into the adapter whole (biases, norms).
        unchanged: weights that are the same in both models.
        not_covered: what differs and is not in the adapter: the name, and the reason as a phrase.
        mapped: whether the folder has a map file, which ``merge-lora`` needs.
        parameters: numbers in the adapter.
    """

    folder: str
    sites: list[ExtractedSite] = dataclasses.field(default_factory=list)
    replaced: list[str] = dataclasses.field(default_factory=list)
    unchanged: int = 0
    not_covered: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    mapped: bool = False
    parameters: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        row = dataclasses.asdict(self)
        row["not_covered"] = [{"name": name, "reason": reason} for name, reason in self.not_covered]
        return row


def extract_lora(
    base: Model | str | os.PathLike[str],
    tuned: Model | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    alpha: float | None = None,
    include: Sequence[str] = (),
    skip: Sequence[str] = (),
    seed: int = 0,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Extraction:
    """Write the difference between two models as a PEFT folder.

    Args:
        base: the model before fine-tuning (or its file).
        tuned: the same model after it: constants of the same names and shapes.
        output: the folder to write.
        rank: of every weight, at most.
        energy: instead of ``rank``: the share of ``‖ΔW‖²`` to keep in each weight.
        alpha: α to write, one for all; by default α = r for each weight, so that σ = 1.
        include: weights to look at, as shell patterns on names; none means all.
        skip: weights and parameters to leave out.
        seed: of the randomized decomposition of large matrices.
        force: allow writing over a folder that is there.
        progress: called with a weight's name, its number and how many there are.

    Raises:
        UsageError: neither or both of ``rank`` and ``energy``, the folder exists, or the models are not
            versions of one another.
    """
    check_options(rank, energy, alpha)
    folder = os.fspath(output)
    if os.path.lexists(folder) and not (force and os.path.isdir(folder)):
        raise UsageError(f"{folder} exists; pass --force to replace the adapter in it")
    before, after = load(base), load(tuned)
    found = Extraction(folder)
    writer = _Adapter(alpha)
    pairs = _pairs(before, after, found)
    for number, (site, other) in enumerate(pairs):
        if progress is not None:
            progress(site.name, number, len(pairs))
        if (include and not matches(site.name, tuple(include))) or matches(site.name, tuple(skip)):
            continue
        _take_site(site, other, rank, energy, seed, writer, found)
    _take_parameters(before, after, include, skip, writer, found)
    if not writer.tensors and not writer.whole:
        reason = found.not_covered[0] if found.not_covered else None
        raise UsageError(
            "the models do not differ in anything that an adapter can hold"
            + (f" ('{reason[0]}' {reason[1]})" if reason else "")
        )
    found.mapped = bool(writer.map)
    writer.write(folder)
    found.parameters = sum(array.size for array in writer.tensors.values())
    return found


def check_options(rank: int | None, energy: float | None, alpha: float | None) -> None:
    """Refuse options that say nothing or two things.

    Raises:
        UsageError: with what would be right.
    """
    if (rank is None) == (energy is None):
        raise UsageError("say how much to keep: either --rank N or --energy SHARE")
    if rank is not None and rank < 1:
        raise UsageError(f"the rank is {rank}, the least is 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"the energy is {energy}; it is a share, above 0 and at most 1")
    if alpha is not None and not 0 < alpha < math.inf:
        raise UsageError(f"alpha is {alpha}; it must be positive")


# -- weights ---------------------------------------------------------------------------------------


def _pairs(before: Model, after: Model, found: Extraction) -> list[tuple[WeightSite, WeightSite]]:
    """Weights of both models that belong together: by name, or all of them by position."""
    left, right = (
        {site.name: site for site in weight_sites(model) if _values(site)} for model in (before, after)
    )
    if not left.keys() & right.keys() and [s.shape for s in left.values()] == [
        s.shape for s in right.values()
    ]:
        return list(zip(left.values(), right.values(), strict=True))
    if not left.keys() & right.keys():
        raise UsageError(
            "the models have no weight of the same name, and not the same weights in the same order; "
            "export both with the same exporter"
        )
    for name in left.keys() ^ right.keys():
        found.not_covered.append((name, f"is in the {'base' if name in left else 'tuned'} model only"))
    return [(site, right[name]) for name, site in left.items() if name in right]


def _values(site: WeightSite) -> bool:
    return site.encoding is not None or constant_tensor(site.value) is not None


def _take_site(
    site: WeightSite,
    other: WeightSite,
    rank: int | None,
    energy: float | None,
    seed: int,
    writer: _Adapter,
    found: Extraction,
) -> None:
    if site.shape_oi != other.shape_oi or site.shape[2:] != other.shape[2:]:
        shapes = f"{list(site.shape)} and {list(other.shape)}"
        found.not_covered.append((site.name, f"has different shapes in the two models ({shapes})"))
        return
    delta, norm = _difference(site, other)
    if not delta.any():
        found.unchanged += 1
        return
    if not np.isfinite(delta).all():
        found.not_covered.append((site.name, "holds NaN or infinity in one of the models"))
        return
    if reason := _why_not(site):
        found.not_covered.append((site.name, reason))
        return
    kind: Kind = "conv" if site.kind == "Conv" else "embedding" if site.kind == "Gather" else "linear"
    if kind == "embedding":
        # The stored table is [V, d]; the adapter's matrix is [d, V].
        delta = np.ascontiguousarray(delta.T)
    total = float(np.linalg.norm(delta))
    u, s, vt = decompose(delta, rank, energy, seed)
    scaled = u * s
    error = float(np.linalg.norm(delta - scaled @ vt)) / total
    kept = min(1.0, float(np.sum(s.astype(np.float64) ** 2)) / total**2)
    path = writer.add(site, kind, u * np.sqrt(s), np.sqrt(s)[:, None] * vt)
    relative = total / norm if norm else math.inf
    shape = (delta.shape[0], delta.shape[1])
    found.sites.append(ExtractedSite(site.name, path, kind, shape, len(s), kept, error, relative))


def _difference(site: WeightSite, other: WeightSite) -> tuple[np.ndarray, float]:
    """``ΔW [out, in]`` and ``‖W_base‖``, in float64 for float64 weights."""
    dtype = np.float64 if site.dtype == ir.DataType.DOUBLE else np.float32
    with site.matrix() as old, other.matrix() as new:
        # An array of its own, turned to [out, in].
        delta: np.ndarray = np.array(new if other.in_axis == 1 else new.T, dtype=dtype, order="C")
        wide: np.ndarray = (old if site.in_axis == 1 else old.T).astype(dtype, copy=False)
        np.subtract(delta, wide, out=delta)
        norm = float(np.linalg.norm(wide))
        del wide
    return delta, norm


def _why_not(site: WeightSite) -> str | None:
    """Why a weight's difference is not one an adapter of it can hold, as a phrase."""
    if len(site.kinds) > 1:
        return f"is shared by {' and '.join(sorted(site.kinds))}: an adapter of one side would untie it"
    if site.kind == "ConvTranspose":
        return "belongs to a ConvTranspose, for which adapters are not defined"
    if site.groups != 1:
        return f"belongs to a convolution of {site.groups} groups, which adapters are not defined for"
    if site.kind != "Conv" and len(site.shape) != 2:
        return f"is no matrix (shape {list(site.shape)})"
    for use in site.uses:
        dilations = use.node.attributes.get("dilations") if site.kind == "Conv" else None
        if dilations is not None and (dilations.is_ref() or any(d != 1 for d in dilations.as_ints())):
            return "belongs to a dilated convolution, whose dilation an adapter does not have"
    return None


def decompose(
    delta: np.ndarray, rank: int | None, energy: float | None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets of a matrix ``[m, n]``, in its dtype.

    Args:
        delta: not all zeros.
        rank: how many, at most; None where ``energy`` says.
        energy: share of ``‖delta‖²`` to keep.
        seed: of the randomized decomposition.

    Returns:
        ``u [m, r]``, ``s [r]`` descending, ``vt [r, n]``; at least one, and none that are noise.
    """
    smaller = min(delta.shape)
    total = float(np.linalg.norm(delta)) ** 2
    wanted = min(rank, smaller) if rank is not None else smaller
    tried = wanted if rank is not None else min(smaller, 32)
    while True:
        if smaller <= _EXACT or tried + _MORE_COLUMNS > smaller // 2:
            u, s, vt = np.linalg.svd(delta, full_matrices=False)
            break
        u, s, vt = _randomized(delta, tried, seed)
        if energy is None or float(np.sum(s.astype(np.float64) ** 2)) >= energy * total:
            break
        tried *= 2
    keep = int(np.count_nonzero(s > _NOISE * s[0]))
    if energy is not None:
        share = np.cumsum(s.astype(np.float64) ** 2) / total
        # All of it may be a rounding error away from 1.
        keep = min(keep, int(np.searchsorted(share, min(energy, float(share[-1])) - 1e-12)) + 1)
    keep = max(1, min(keep, wanted))
    return u[:, :keep], s[:keep], vt[:keep]


def _randomized(delta: np.ndarray, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    span = delta @ rng.standard_normal((delta.shape[1], rank + _MORE_COLUMNS)).astype(delta.dtype)
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(span)[0]
        span = delta @ np.linalg.qr(delta.T @ basis)[0]
    basis = np.linalg.qr(span)[0]
    u, s, vt = np.linalg.svd(basis.T @ delta, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


# -- what is no weight -----------------------------------------------------------------------------


def _take_parameters(
    before: Model,
    after: Model,
    include: Sequence[str],
    skip: Sequence[str],
    writer: _Adapter,
    found: Extraction,
) -> None:
    """Biases and norms that differ are stored whole."""
    of_weights: set[int] = set()
    for site in (*weight_sites(before), *weight_sites(after)):
        of_weights.add(id(site.value))
        if site.encoding is not None:
            of_weights |= {id(v) for node in encoding_nodes(site.value) for v in node.inputs}
    other = dict(_parameters(after, of_weights))
    for name, tensor in _parameters(before, of_weights):
        changed = other.get(name)
        if (include and not matches(name, tuple(include))) or matches(name, tuple(skip)):
            continue
        if changed is None or changed.dtype != tensor.dtype or changed.shape != tensor.shape:
            if changed is not None or name in after.graph.initializers:
                found.not_covered.append((name, "is of another type or shape in the tuned model"))
            continue
        with borrow(tensor) as old, borrow(changed) as new:
            if np.array_equal(old, new):
                continue
            array = new.astype(np.float32)
        module, _, leaf = name.rpartition(".")
        if not module or leaf not in ("weight", "bias") or array.ndim != 1 or not np.isfinite(array).all():
            found.not_covered.append((name, f"is no weight of a layer (shape {list(array.shape)})"))
            continue
        writer.replace(module, leaf, array)
        found.replaced.append(name)


def _parameters(model: Model, weights: set[int]) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        tensor = constant_tensor(value)
        if tensor is not None and tensor.dtype.is_floating_point() and id(value) not in weights:
            yield name, tensor


# -- the folder ------------------------------------------------------------------------------------


class _Adapter:
    """Collects tensors and writes the folder; :attr:`map` has the lines that ``merge-lora`` needs."""

    def __init__(self, alpha: float | None) -> None:
        self.alpha = alpha
        self.tensors: dict[str, np.ndarray] = {}
        self.ranks: dict[str, int] = {}
        self.whole: dict[str, list[tuple[str, np.ndarray]]] = {}
        self.map: list[str] = []

    def add(self, site: WeightSite, kind: Kind, b: np.ndarray, a: np.ndarray) -> str:
        """Store ``ΔW = b @ a``; returns the module's path."""
        rank = len(a)
        path = self.path_of(site)
        if self.alpha is not None:
            root = math.sqrt(self.alpha / rank)
            a, b = a / root, b / root
        a, b = a.astype(np.float32), b.astype(np.float32)
        if kind == "embedding":
            self.tensors[f"{PREFIX}{path}.lora_embedding_A"] = a
            self.tensors[f"{PREFIX}{path}.lora_embedding_B"] = b
        else:
            if kind == "conv":
                a = a.reshape(rank, *site.shape[1:])
                b = b.reshape(len(b), rank, *[1] * (len(site.shape) - 2))
            self.tensors[f"{PREFIX}{path}.lora_A.weight"] = a
            self.tensors[f"{PREFIX}{path}.lora_B.weight"] = b
        self.ranks[path] = rank
        return path

    def path_of(self, site: WeightSite) -> str:
        """The module a weight belongs to: by its name, else by where its node came from, else its name."""
        if site.name.endswith(".weight"):
            return site.name.removesuffix(".weight")
        scopes = {module_of(use.node) for use in site.uses}
        scope = scopes.pop() if len(scopes) == 1 else None
        path = scope if scope is not None and scope not in self.ranks else site.name.replace("/", ".")
        self.map.append(f"{path} = {site.name}")
        return path

    def replace(self, module: str, leaf: str, array: np.ndarray) -> None:
        self.whole.setdefault(module, []).append((leaf, array))

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        common = Counter(self.ranks.values()).most_common(1)
        rank = common[0][0] if common else 8
        alpha = rank if self.alpha is None else self.alpha
        # The first pattern that matches the end of a path counts: the longest goes first.
        odd = sorted((p for p, r in self.ranks.items() if r != rank), key=lambda p: (-len(p), p))
        alphas = {} if self.alpha is not None else {re.escape(path): self.ranks[path] for path in odd}
        saved = sorted(m for m, parts in self.whole.items() if any(leaf == "weight" for leaf, _ in parts))
        biases = any(module not in saved for module in self.whole)
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": None,
            "task_type": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(self.ranks),
            "rank_pattern": {re.escape(path): self.ranks[path] for path in odd},
            "alpha_pattern": alphas,
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "bias": "all" if biases else "none",
            "modules_to_save": saved or None,
        }

    def write(self, folder: str) -> None:
        """The folder, all or nothing; one that is there gets its files replaced.

        Raises:
            UsageError: it cannot be written.
        """
        config = self.config()
        saved = set(config["modules_to_save"] or ())
        for module, parts in self.whole.items():
            # peft wraps the layers it adapts, and then calls their own parameters so.
            inner = ".base_layer" if module in self.ranks and module not in saved else ""
            for leaf, array in parts:
                self.tensors[f"{PREFIX}{module}{inner}.{leaf}"] = array
        texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
        if self.map:
            texts[MAP] = "\n".join(
                ["# for merge-lora{map=…}: module of the adapter = constant", *self.map, ""]
            )
        parent = os.path.dirname(os.path.abspath(folder))
        temporary = os.path.join(parent, f".effic-{secrets.token_hex(8)}.tmp")
        try:
            os.makedirs(temporary)
            write_safetensors(os.path.join(temporary, TENSORS), self.tensors, {"format": "pt"})
            for name, text in texts.items():
                with open(os.path.join(temporary, name), "x", encoding="utf-8") as file:
                    file.write(text)
            if os.path.isdir(folder):
                for name in (TENSORS, *texts):
                    os.replace(os.path.join(temporary, name), os.path.join(folder, name))
                if MAP not in texts and os.path.lexists(os.path.join(folder, MAP)):
                    os.unlink(os.path.join(folder, MAP))
            else:
                os.rename(temporary, folder)
        except OSError as error:
            raise UsageError(f"cannot write {folder}: {error.strerror or error}") from error
        finally:
            if os.path.isdir(temporary):
                for name in os.listdir(temporary):
                    os.unlink(os.path.join(temporary, name))
                os.rmdir(temporary)
