"""What every one-shot pruning pass shares: which weights, how many of them stay, and what is reported.

The passes differ in how they choose the weights that stay, and in whether those move; which weights
they may touch, how patterns are given by name, how the result is written and what the report says is
the same for all and lives here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.sparsity import (
    Pattern,
    along_groups,
    declare,
    declared,
    density_mask,
    follows,
    reduction_length,
)
from effic.ir.weights import KINDS, WeightSite, weight_sites
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.quantize.weight_only import decibels, matches_site, say_unmatched
from effic.passes.sparsify.ends import first_convolutions, vocabulary_heads
from effic.passes.sparsify.scores import Kept, by_pattern, prune_to_density, pruned_blocks
from effic.passes.statistics import SiteStatistics

Target = Pattern | float
"""What a weight becomes: a pattern, or the fraction of it that is kept wherever it lies."""

SKETCH = 128
"""Rows of the sketch of the inputs that output errors are measured with."""

# Output channels that the output error is measured on, evenly spread: with 64 it is good to a few
# tenths of a decibel, and measuring it takes no time beside the pruning.
_OUTPUTS = 64


@dataclass(frozen=True)
class OneShot(Pass):
    """Options and site selection of the passes that prune weights once, without training."""

    numerics: ClassVar[Numerics] = Numerics.LOSSY

    n: int = option(2, help="weights kept of every m consecutive inputs of an output channel", ge=1)
    m: int = option(4, help="weights in a group", ge=2)
    density: float = option(
        0.0,
        help="instead of n and m: fraction of the weights to keep, wherever they lie; 0 for n:m",
        ge=0,
        le=1,
    )
    skip: tuple[str, ...] = option(
        (), help="weights to leave dense: patterns of weight or node names, or kind:Conv"
    )
    overrides: tuple[str, ...] = option(
        (),
        help="others by name or kind: PATTERN=N:M, PATTERN=DENSITY or PATTERN=dense; the first match counts",
    )
    kinds: tuple[str, ...] = option(
        ("MatMul", "Gemm", "Conv", "ConvTranspose"), help="operators whose weights are pruned", choices=KINDS
    )
    first_conv: bool = option(False, help="also the convolution that sees the model's input")
    head: bool = option(False, help="also the layer that scores a language model's vocabulary")
    embeddings: bool = option(False, help="also the tables that Gather reads")
    min_size: int = option(1024, help="leave weights with fewer elements alone", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density:
            self.refuse_idle(f"density={self.density:g}", "n", "m")
        try:
            Pattern(self.n, self.m)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error
        for text in self.overrides:
            self._override(text)

    def _override(self, text: str) -> tuple[str, Target | None]:
        """An override's pattern of names, and what these weights become; None: dense.

        Raises:
            UsageError: it is not of one of the forms.
        """
        names, _, target = text.rpartition("=")
        if names and target == "dense":
            return names, None
        if names and ":" in target:
            return names, Pattern.parse(target)
        try:
            density = float(target)
        except ValueError:
            density = -1.0
        if not (names and 0 < density <= 1):
            raise UsageError(
                f"{self.name}: override '{text}' is not PATTERN=N:M, PATTERN=DENSITY (a fraction, such as 0.5) "
                "or PATTERN=dense"
            )
        return names, density

    def candidates(self, model: Model, remarks: Remarks) -> list[WeightSite] | None:
        return [site for site, _ in self.sites(model, remarks)]

    def stays(self) -> float:
        """All: zeros are stored like any number."""
        return 1.0

    def target(self, site: WeightSite) -> Target | None:
        """What a weight becomes, overrides applied; None: it stays dense."""
        for text in self.overrides:
            names, target = self._override(text)
            if matches_site(site, (names,)):
                return target
        return self.density or Pattern(self.n, self.m)

    def sites(self, model: Model, remarks: Remarks) -> Iterator[tuple[WeightSite, Target]]:
        """The weights to prune and what they become; the others are remarked as missed, with the reason."""
        say_unmatched(model, "skip", self.skip, remarks)
        say_unmatched(model, "overrides", (self._override(text)[0] for text in self.overrides), remarks)
        first = set() if self.first_conv else first_convolutions(model)
        heads = set() if self.head else vocabulary_heads(model)
        known = declared(model)
        for site in weight_sites(model, {*self.kinds, "Gather"}):
            target = self.target(site)
            reason = self.why_not(site, target)
            if reason is None and any(use.node in first for use in site.uses):
                reason = (
                    "is the first convolution, which sees the input itself; ask for it with first_conv=true"
                )
            if reason is None and any(use.node in heads for use in site.uses):
                reason = "scores the vocabulary (the head); ask for it with head=true"
            if reason is None and target is not None:
                reason = _already(site, target)
                if reason is not None and isinstance(target, Pattern) and known.get(site.name) != target:
                    declare(model, site.name, target)
            if reason is not None or target is None:
                remarks.missed(site.name, reason or "stays dense")
            else:
                yield site, target

    def why_not(self, site: WeightSite, target: Target | None) -> str | None:
        """Why a weight is left alone, wherever it stands in the model, or None."""
        if site.encoding is not None:
            return f"is already encoded, in {site.encoding.bits} bits; prune first, then encode"
        if site.why_not is not None:
            return site.why_not
        if matches_site(site, self.skip):
            return "is named in skip"
        if target is None:
            return "is left dense by overrides"
        if "Gather" in site.kinds and not (self.embeddings or "Gather" in self.kinds):
            also = " as well" if len(site.kinds) > 1 else ""
            return f"is an embedding table{also}; ask for it with embeddings=true"
        if site.other_readers:
            return f"is read by {site.other_readers[0]} as well, which would see the zeros"
        layers = [use for use in site.uses if use.node.op_type != "Gather"]
        kinds = {use.node.op_type for use in layers}
        convolved = len(kinds) > 1 and kinds & {"Conv", "ConvTranspose"}
        if len({use.in_axis for use in layers}) > 1 or convolved:
            return "is read both ways round, so that its inputs are another layer's outputs"
        if site.elements < self.min_size:
            return f"has {site.elements} elements, fewer than min_size={self.min_size}"
        if isinstance(target, Pattern):
            length = reduction_length(site)
            if length == 1 and site.groups > 1:
                return "is depthwise: an output has one input channel, so there is no group to choose from"
            if length < target.m:
                return f"has {length} input channel{'s'[: length > 1]}, fewer than the {target.m} of a group"
        return None


def _already(site: WeightSite, target: Target) -> str | None:
    """Why a weight needs no pruning, or None."""
    with site.matrix() as matrix:
        if isinstance(target, Pattern):
            return (
                f"follows {target} already" if follows(along_groups(site, matrix), target, axis=1) else None
            )
        count, length = _rows_of(site)
        most = count * int(density_mask(np.zeros((1, length)), target).sum())
        return f"has a density of {target:g} already" if np.count_nonzero(matrix) <= most else None


def _rows_of(site: WeightSite) -> tuple[int, int]:
    """How many vectors of weights make one output each, and how long they are."""
    length = site.shape_oi[1] // (site.groups if site.kind == "ConvTranspose" else 1)
    return site.elements // length, length


# -- pruning by a score ---------------------------------------------------------------------------


def prune(
    model: Model,
    site: WeightSite,
    target: Target,
    scale: np.ndarray | None,
    compare: Literal["row", "matrix"],
) -> Kept:
    """Keep the weights with the largest magnitude times scale, and zero the others.

    Args:
        model: whose scratch folder takes the result.
        site: the weight.
        target: what to keep.
        scale: float32 ``[G·K]``, per input as :class:`SiteStatistics` has them; None: magnitude alone.
        compare: without a pattern, whether the weights of an output or of all compete.

    Raises:
        NotFiniteError: the weight holds NaN or infinity; nothing was changed.
    """
    kept = Kept()
    with site.matrix() as matrix:
        if isinstance(target, Pattern):
            weight = along_groups(site, matrix)
            mask = by_pattern(target, None if scale is None else _along_groups(site, scale))
            blocks = pruned_blocks(weight, target.m, mask, kept)
            tensor = model.scratch.streamed(site.name, site.dtype, site.shape, blocks)
        else:
            rows = by_output(site, np.asarray(matrix, np.float32))
            each = None if scale is None else _by_output(site, scale)
            pruned = prune_to_density(rows, each, target, compare, kept)
            stored = stored_again(site, pruned).astype(matrix.dtype, copy=False)
            tensor = model.scratch.tensor(site.name, stored.reshape(site.shape), site.dtype)
    site.replace(tensor)
    declare(model, site.name, target if isinstance(target, Pattern) else None)
    return kept


def by_output(site: WeightSite, matrix: np.ndarray) -> np.ndarray:
    """The stored matrix as ``[rows, K]``, a row the weights of one output."""
    if site.in_axis == 1:
        return matrix
    count, length = _rows_of(site)
    return np.ascontiguousarray(matrix.reshape(-1, length, matrix.shape[1]).transpose(0, 2, 1)).reshape(
        count, length
    )


def stored_again(site: WeightSite, rows: np.ndarray) -> np.ndarray:
    """The inverse of :func:`by_output`."""
    if site.in_axis == 1:
        return rows
    outputs, length = site.matrix_shape[1], rows.shape[1]
    return np.ascontiguousarray(rows.reshape(-1, outputs, length).transpose(0, 2, 1)).reshape(
        site.matrix_shape
    )


def _by_output(site: WeightSite, scale: np.ndarray) -> np.ndarray:
    """A scale per input, ``[G·K]``, for every row of :func:`by_output`."""
    count, length = _rows_of(site)
    each = scale.reshape(-1, length)
    return np.repeat(each, count // len(each), axis=0)


def _along_groups(site: WeightSite, scale: np.ndarray) -> np.ndarray:
    """A scale per input, ``[G·K]``, of a shape that broadcasts to ``along_groups``."""
    length = reduction_length(site)
    if site.kind == "Conv":
        each = scale.reshape(-1, length, scale.size // (length * site.groups))
        return each if len(each) == 1 else np.repeat(each, site.shape[0] // len(each), axis=0)
    return scale.reshape(-1, length, 1)


# -- what is reported -----------------------------------------------------------------------------


class Before:
    """A few outputs' weights as they were, to tell later what pruning did to the outputs.

    Args:
        site: the weight, not pruned yet.
        statistics: of its inputs, with a sketch or the second moment; None: nothing is measured.
    """

    def __init__(self, site: WeightSite, statistics: SiteStatistics | None) -> None:
        self.site, self.statistics = site, statistics
        self.weight = None if statistics is None else self._read()

    def _read(self) -> np.ndarray:
        outputs = self.site.shape_oi[0]
        # Of each convolution group as many, so that they are groups again.
        groups = self.site.groups if self.site.kind == "Conv" else 1
        count = max(1, min(outputs, _OUTPUTS) // groups)
        picked = np.linspace(0, outputs // groups - 1, count).astype(np.intp)
        at = (np.arange(groups)[:, None] * (outputs // groups) + picked).reshape(-1)
        with self.site.matrix() as matrix:
            return np.asarray(matrix[at] if self.site.in_axis == 1 else matrix[:, at].T, np.float32)

    def output_sqnr(self) -> float | None:
        """Signal-to-noise ratio in dB of the outputs on the data, now that the weight is pruned."""
        if self.statistics is None or self.weight is None:
            return None
        noise = self.statistics.output_error(self.weight - self._read())
        found = decibels(self.statistics.output_error(self.weight), noise)
        return None if found is None else round(found, 2)


def report(
    remarks: Remarks, site: WeightSite, target: Target, kept: Kept, method: str, before: Before, **more: Any
) -> None:
    """Remark on a pruned weight.

    Args:
        remarks: gets the remark.
        site: the weight.
        target: what it was to become.
        kept: what was left.
        method: that chose.
        before: the weight as it was.
        more: what the method adds; ``fallback`` is said in words as well.
    """
    output = before.output_sqnr()
    figures = {
        "pattern": str(target) if isinstance(target, Pattern) else None,
        "density": round(kept.density, 6),
        "kept_energy": round(kept.energy_share, 6),
        "output_sqnr_db": output,
    }
    text = f"{target}, " if isinstance(target, Pattern) else ""
    text += f"{100 * kept.density:.1f} % of the weights kept, {100 * kept.energy_share:.1f} % of their energy"
    if output is not None:
        text += f", output {output:.1f} dB"
    if more.get("fallback"):
        text += f"; {more['fallback']}"
    remarks.passed(site.name, text, method=method, **figures, **more)


def say_dense(remarks: Remarks) -> None:
    """Say that zeros alone make nothing faster, where there are some."""
    if remarks.count("passed"):
        remarks.missed(
            "the model",
            "zeros are stored and multiplied like any number: ONNX Runtime's CPU kernels get no faster by them; "
            "compress-nm makes the file smaller",
        )
