"""One constant at a time: its merged value, computed or promised, and what is reported about it."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from effic.ir.encodings import Encoding, decode
from effic.ir.errors import UnsupportedError
from effic.ir.model import Model, constant_tensor
from effic.ir.tensors import borrow
from effic.ir.weights import WeightSite
from effic.passes.adapters.adapter_files import AdapterModule
from effic.passes.adapters.combine import Combine, Sign, Space, combined_delta
from effic.passes.adapters.deltas import (
    Dtype,
    RankScale,
    bias_delta,
    dora_norms,
    factors,
    l4q_merged,
    oriented,
)
from effic.passes.adapters.matching import Place, expert_axis, put
from effic.passes.adapters.requantize import Requantize, add_branch, norm, requantized, why_no_branch
from effic.passes.adapters.streamed import MergedTensor, Term, norm_of, term_for
from effic.passes.adapters.targets import Target
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.weight_only import OPSET, encoding_of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How deltas are formed and written.

    Attributes:
        combine, space, density, svd_rank, sign, seed, peft_compat: see
            :func:`effic.passes.adapters.combine.combined_delta`.
        rank, rank_scale: likewise.
        requantize: what becomes of encoded weights.
        dtype: what is computed in.
        subtract: take the deltas away instead.
        mark: of the branches that are kept beside encoded weights.
    """

    combine: Combine = "delta_sum"
    space: Space = "delta"
    density: float = 0.5
    svd_rank: int | None = None
    sign: Sign = "total"
    seed: int = 42
    peft_compat: bool = False
    requantize: Requantize = "new_params"
    rank: int | None = None
    rank_scale: RankScale = "alpha_over_b"
    dtype: Dtype = np.float32
    subtract: bool = False
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Merged:
    """What became of a constant.

    Attributes:
        name: the constant's name now; None when nothing changed.
        relative: ``‖ΔW‖ / ‖W₀‖``.
        sampled: whether ``‖W₀‖`` is an estimate.
        rounding: ``‖Q(W) - W‖ / ‖ΔW‖`` of a requantized weight, or None.
        kept_branch: whether the adapter was kept beside the weight.
        bits: width of the codes of an L4Q export; 0 for everything else.
        silent: channels of norm zero, which DoRA has nothing to rescale in.
    """

    name: str | None
    relative: float = 0.0
    sampled: bool = False
    rounding: float | None = None
    kept_branch: bool = False
    bits: int = 0
    silent: int = 0


def is_plain(module: AdapterModule) -> bool:
    """Whether a module's delta is σ·B·A and nothing else."""
    return (
        module.method == "lora"
        and module.kind != "expert"
        and module.magnitude is None
        and module.init is True
        and module.initial is None
    )


def merge(model: Model, target: Target, recipe: Recipe) -> Merged:
    """Merge everything into one constant and write it back.

    Raises:
        UnsupportedError: the result cannot be written in the form that was asked for, or is not finite.
    """
    # What overflows is refused in words, by looking at the result.
    with np.errstate(over="ignore", invalid="ignore"):
        return _merge(model, target, recipe)


def _merge(model: Model, target: Target, recipe: Recipe) -> Merged:
    site = target.place.site
    if site is not None and site.encoding is not None:
        return _merge_encoded(model, target, site, recipe)
    if site is not None and _streams(target, recipe):
        return _merge_streamed(model, target, site, recipe)
    base, merged, silent = _computed(target, recipe)
    size = norm(merged - base)
    if size == 0 and np.array_equal(base, merged):
        return Merged(None)
    if site is not None and (codes := _l4q_codes(model, target, site, base, merged)) is not None:
        site.write(model, codes)
        return Merged(site.name, _relative(size, norm(base)), bits=codes.bits)
    name = _write(model, target, model.scratch.tensor(target.place.name, _narrowed(target.place, merged)))
    return Merged(name, _relative(size, norm(base)), silent=silent)


def _relative(delta: float, base: float) -> float:
    return delta / base if base else math.inf if delta else 0.0


# -- weights in floating point ---------------------------------------------------------------------


def _streams(target: Target, recipe: Recipe) -> bool:
    only_deltas = not (target.whole or target.rows or target.biases)
    several = any(len(part) > 1 for part in target.parts.values())
    # PEFT's cat of rsLoRA adapters is more than their sum.
    sums = recipe.combine == "delta_sum" or (
        not recipe.peft_compat and (recipe.combine == "cat" or (recipe.combine == "linear" and not several))
    )
    return only_deltas and sums and all(is_plain(module) for module, _ in target.modules)


def _stacked(
    part: Sequence[tuple[AdapterModule, float]], recipe: Recipe, dtype: Dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The deltas of plain modules as one product ``left [out, R] @ right [R, in]``."""
    lefts, rights = [], []
    for module, weight in part:
        cut = factors(module, rank=recipe.rank, rank_scale=recipe.rank_scale, dtype=dtype)
        left, right = oriented(module, cut)
        lefts.append(left[0] * dtype(weight))
        rights.append(right[0])
    return np.hstack(lefts), np.vstack(rights)


def _merge_streamed(model: Model, target: Target, site: WeightSite, recipe: Recipe) -> Merged:
    tensor = constant_tensor(site.value)
    if tensor is None:
        raise UnsupportedError(f"weight '{site.name}' is no constant any more")
    out, into = site.shape_oi
    # A weight of fp64 is not computed in less.
    dtype: Dtype = np.float64 if site.dtype == ir.DataType.DOUBLE else recipe.dtype
    terms: list[Term] = []
    for rows, part in target.parts.items():
        left, right = _stacked(part, recipe, dtype)
        terms.append(
            term_for(-left if recipe.subtract else left, right, rows or (0, out), site.in_axis, into)
        )
    size = math.sqrt(sum(term.norm() ** 2 for term in terms))
    if size == 0:
        return Merged(None)
    base, sampled = norm_of(tensor, site.matrix_shape)
    merged = MergedTensor(tensor, terms, site.matrix_shape, site.name)
    if merged.overflows():
        raise _too_large(target.place)
    name = _write(model, target, merged)
    return Merged(name, _relative(size, base), sampled)


def _computed(target: Target, recipe: Recipe) -> tuple[np.ndarray, np.ndarray, int]:
    """Base and merged value of a constant, in the dtype that is computed in, shaped as stored.

    The third is how many channels DoRA found to be zero.
    """
    place, site = target.place, target.place.site
    exact = any(module.method in ("paca", "l4q") for module, _ in target.modules)
    wide = exact or dtype_of(place) == ir.DataType.DOUBLE
    dtype: Dtype = np.float64 if wide else recipe.dtype
    base: np.ndarray
    if site is not None and site.encoding is not None:
        base = decode(site.encoding).astype(dtype)
    else:
        tensor = constant_tensor(place.value)
        if tensor is None:
            raise UnsupportedError(f"'{place.name}' is no constant any more")
        with borrow(tensor) as array:
            base = np.array(array, dtype=dtype)
    merged: np.ndarray = base.copy()
    if len(target.whole) == 1 and target.whole[0][1] == 1.0:
        merged[...] = target.whole[0][0]
    else:
        for array, weight in target.whole:
            merged += dtype(weight) * (array.astype(dtype) - base)
    _replace_rows(merged, target.rows, dtype)
    silent = 0
    for rows, part in target.parts.items():
        view = _oriented(merged, place, part[0][0])
        if rows is not None:
            view = view[rows[0] : rows[1]]
        for module, _ in part:
            if module.use_dora:
                norms = dora_norms(module, view, rank=recipe.rank, rank_scale=recipe.rank_scale, dtype=dtype)
                silent += int(np.count_nonzero(norms == 0))
        delta = combined_delta(
            part,
            np.ascontiguousarray(view),
            combine=recipe.combine,
            space=recipe.space,
            density=recipe.density,
            svd_rank=recipe.svd_rank,
            sign=recipe.sign,
            # One seed would draw the same mask for every weight of a shape.
            seed=recipe.seed + zlib.crc32(f"{target.path}{rows}".encode()),
            peft_compat=recipe.peft_compat,
            rank=recipe.rank,
            rank_scale=recipe.rank_scale,
            dtype=dtype,
        ).reshape(view.shape)
        # Where nothing is added nothing may change: -0.0 + 0.0 is another number.
        operation = np.subtract if recipe.subtract else np.add
        operation(view, delta, out=view, where=delta != 0)
    for module, weight in target.biases:
        change = bias_delta(module, rank=recipe.rank, rank_scale=recipe.rank_scale)
        if change is not None:
            merged += (change * (-weight if recipe.subtract else weight)).astype(dtype)
    return base, merged, silent


def _replace_rows(
    table: np.ndarray, rows: Sequence[tuple[np.ndarray, np.ndarray, float]], dtype: Dtype
) -> None:
    """Replace rows of a table in place; what several adapters make of one row is added up."""
    before = {int(n): table[n].copy() for numbers, _, _ in rows for n in numbers}
    times = Counter(int(n) for numbers, _, _ in rows for n in numbers)
    for numbers, values, weight in rows:
        for n, new in zip(numbers, values.astype(dtype), strict=True):
            # A row of one adapter is what the file says, to the bit.
            alone = times[int(n)] == 1 and weight == 1.0
            table[n] = new if alone else table[n] + dtype(weight) * (new - before[int(n)])


def _oriented(array: np.ndarray, place: Place, module: AdapterModule) -> np.ndarray:
    """A view of a stored weight as ``[out, in]`` (experts: ``[E, out, in]``)."""
    if module.kind == "expert":
        return array if expert_axis(place, module) == 2 else array.transpose(0, 2, 1)
    matrix = array.reshape(len(array), -1)
    return matrix if place.site is None or place.site.in_axis == 1 else matrix.T


def dtype_of(place: Place) -> ir.DataType:
    """Element type that readers of a place see."""
    if place.site is not None:
        return place.site.dtype
    tensor = constant_tensor(place.value)
    return ir.DataType.UNDEFINED if tensor is None else tensor.dtype


def _narrowed(place: Place, merged: np.ndarray) -> np.ndarray:
    """The merged weight in the dtype of the base.

    Raises:
        UnsupportedError: it does not fit: an element would be infinite.
    """
    with np.errstate(over="ignore"):
        narrow = merged.astype(dtype_of(place).numpy())
    if not np.isfinite(narrow).all():
        raise _too_large(place)
    return np.asarray(narrow, order="C")


def _too_large(place: Place) -> UnsupportedError:
    return UnsupportedError(
        f"merged into '{place.name}', the adapter gives values that {dtype_of(place).name} cannot hold; "
        "give it a smaller weight (FOLDER=0.5), or merge into a float32 model"
    )


def _write(model: Model, target: Target, tensor: ir.TensorProtocol) -> str:
    """Put a new constant in a target's place, or beside it for its own uses; its name."""
    place = target.place
    if place.site is not None and (target.uses is not None or place.site.encoding is not None):
        uses = place.site.uses if target.uses is None else target.uses
        return place.site.redirect(model, tensor, uses).name or ""
    put(place, tensor)
    return place.value.name or ""


# -- encoded weights -------------------------------------------------------------------------------


def _merge_encoded(model: Model, target: Target, site: WeightSite, recipe: Recipe) -> Merged:
    encoding = site.encoding
    if encoding is None:
        raise UnsupportedError(f"weight '{site.name}' is not encoded")
    if recipe.requantize == "keep_branch":
        return _keep_branch(model, target, site, recipe)
    base, merged, silent = _computed(target, recipe)
    size = norm(merged - base)
    if size == 0 and np.array_equal(base, merged):
        return Merged(None)
    relative = _relative(size, norm(base))
    if recipe.requantize == "none":
        tensor = model.scratch.tensor(site.name, _narrowed(target.place, merged))
        return Merged(_write(model, target, tensor), relative, silent=silent)
    if target.uses is not None:
        raise UnsupportedError(
            f"'{target.path}' shares its encoded weight '{site.name}' with others; say requantize=none"
        )
    done = requantized(model, encoding, _narrowed(target.place, merged), recipe.requantize)
    rounding = norm(decode(done).astype(merged.dtype) - merged) / size
    site.write(model, done)
    return Merged(site.name, relative, rounding=rounding, silent=silent)


def _keep_branch(model: Model, target: Target, site: WeightSite, recipe: Recipe) -> Merged:
    uses = site.uses if target.uses is None else target.uses
    if not _streams(target, recipe) or not all(m.kind == "linear" for m, _ in target.modules):
        raise UnsupportedError(
            f"'{target.path}' is no sum of LoRA products, so it cannot be kept as a branch; "
            "choose another requantize"
        )
    if reason := why_no_branch(uses):
        raise UnsupportedError(f"'{target.path}' {reason}; choose another requantize")
    out, into = site.shape_oi
    lefts, rights = [], []
    for rows, part in target.parts.items():
        left, right = _stacked(part, recipe, recipe.dtype)
        padded = np.zeros((out, left.shape[1]), left.dtype)
        padded[slice(*rows) if rows is not None else slice(None)] = left
        lefts.append(padded)
        rights.append(right)
    b, a = np.hstack(lefts), np.vstack(rights)
    size = Term((0, out), (0, into), b, a).norm()
    if size == 0:
        return Merged(None)
    stored = site.dtype.numpy()
    base = site.read()
    narrow = a.astype(stored), b.astype(stored)
    if not all(np.isfinite(factor).all() for factor in narrow):
        raise _too_large(target.place)
    add_branch(model, uses, site.name, *narrow, recipe.mark)
    return Merged(site.name, _relative(size, norm(base)), kept_branch=True)


def _l4q_codes(
    model: Model, target: Target, site: WeightSite, base: np.ndarray, merged: np.ndarray
) -> Encoding | None:
    """The codes L4Q trained, where an encoding stands for the merged weight bit for bit; else None.

    ONNX has integer zero points only: with offsets that are no multiples of the scales the weight stays
    in floating point, on its grid.
    """
    modules = target.modules
    if [(m.method, weight) for m, weight in modules] != [("l4q", 1.0)] or target.uses is not None:
        return None
    if (
        site.why_not is not None
        or site.opset < OPSET
        or site.dtype != ir.DataType.FLOAT
        or site.other_readers
    ):
        return None
    module = modules[0][0]
    done = l4q_merged(module, _oriented(base, target.place, module))
    middle = 1 << (done.bits - 1)
    zeros = np.rint(done.zero_point)
    symmetric = not zeros.any()
    if not symmetric and (zeros.min() < -middle or zeros.max() >= middle):
        return None
    codes, scales, shifts = done.codes, done.scale, zeros.astype(np.int16) + middle
    if site.in_axis == 0:
        codes, scales, shifts = codes.T, scales.T, shifts.T
    if done.scale.shape[1] == 1:
        scales, shifts = scales.reshape(-1), shifts.reshape(-1)
    encoding = encoding_of(
        model,
        site,
        Grid(done.bits, done.group_size, symmetric),
        "oc",
        np.ascontiguousarray(codes if symmetric else (codes.astype(np.int16) + middle).astype(np.uint8)),
        np.ascontiguousarray(scales),
        None if symmetric else np.ascontiguousarray(shifts.astype(np.uint8)),
    )
    return encoding if np.array_equal(decode(encoding), merged.astype(np.float32)) else None
