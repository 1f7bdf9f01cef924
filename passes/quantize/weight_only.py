"""What every weight-only quantizer shares: which weights, in how many bits, and what is reported.

The passes differ in how they choose codes and scales; which weights they may touch, how widths are
given by name, how the result is written and what the report says is the same for all and lives here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from effic.ir.encodings import Encoding, Outliers, code_type, effective_bits, pack, stored_bytes
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.weights import KINDS, WeightSite, weight_sites
from effic.passes.base import Numerics, Pass, Remarks, matches, option
from effic.passes.quantize.affine import Grid

BITS = (2, 3, 4, 8)
OPSET = 21


class Width(NamedTuple):
    """How a weight is stored: bits of a code, and weights that share a scale (-1: a whole channel)."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class WeightOnly(Pass):
    """Options and site selection of the passes that store weights in few bits."""

    numerics: ClassVar[Numerics] = Numerics.LOSSY
    needs_opset: ClassVar[int] = OPSET

    bits: Literal[2, 3, 4, 8] = option(4, help="width of a code")
    group_size: int = option(128, help="weights that share a scale; -1 for a whole channel", ge=-1)
    symmetric: bool = option(True, help="without zero points: 0 is the middle of the grid")
    skip: tuple[str, ...] = option(
        (), help="weights to leave alone: patterns of weight or node names, or kind:Conv"
    )
    overrides: tuple[str, ...] = option(
        (), help="other widths by name or kind: PATTERN=BITS or PATTERN=BITSgGROUP; the first match counts"
    )
    kinds: tuple[str, ...] = option(
        ("MatMul", "Gemm"), help="operators whose weights are quantized", choices=KINDS
    )
    embeddings: bool = option(False, help="also the tables that Gather reads")
    min_size: int = option(1024, help="leave weights with fewer elements alone", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size == 0:
            raise UsageError(f"{self.name}: group_size is 0; use a positive number, or -1")
        for text in self.overrides:
            self._override(text)

    def _override(self, text: str) -> tuple[str, Width]:
        """An override's pattern and width.

        Raises:
            UsageError: it is not of the form ``PATTERN=BITS`` or ``PATTERN=BITSgGROUP``.
        """
        pattern, _, width = text.rpartition("=")
        bits, _, group = width.partition("g")
        fits = pattern and bits in map(str, BITS) and (not group or group == "-1" or group.isdecimal())
        if not fits or group == "0" or width.endswith("g"):
            raise UsageError(
                f"{self.name}: override '{text}' is not PATTERN=BITS or PATTERN=BITSgGROUP "
                f"with bits of {', '.join(map(str, BITS))}"
            )
        return pattern, Width(int(bits), int(group) if group else self.group_size)

    def candidates(self, model: Model, remarks: Remarks) -> list[WeightSite] | None:
        return list(self.sites(model, remarks))

    def stays(self) -> float:
        """The narrowest codes alone, of float32 weights."""
        return min(self.bits, *(self._override(text)[1].bits for text in self.overrides), 8) / 32

    def width(self, site: WeightSite) -> Width:
        """Bits and group size of a site, overrides applied."""
        for text in self.overrides:
            pattern, width = self._override(text)
            if matches_site(site, (pattern,)):
                return width
        return Width(self.bits, self.group_size)

    def grid(self, site: WeightSite) -> Grid:
        """The grid of a site, overrides applied."""
        width = self.width(site)
        return Grid(width.bits, width.group_size, self.symmetric)

    def sites(self, model: Model, remarks: Remarks) -> Iterator[WeightSite]:
        """The weights to quantize; the others are remarked as missed, with the reason."""
        say_unmatched(model, "skip", self.skip, remarks)
        say_unmatched(model, "overrides", (self._override(text)[0] for text in self.overrides), remarks)
        rest = ("Conv", "ConvTranspose")
        left = [site for site in weight_sites(model, rest) if not site.kinds & set(self.kinds)]
        if left:
            count = f"{len(left)} convolution weights" if len(left) > 1 else "1 convolution weight"
            remarks.missed(
                "the model", f"{count} left in floating point; name Conv in kinds to quantize them"
            )
        for site in weight_sites(model, {*self.kinds, "Gather"}):
            if reason := self.why_not(site):
                remarks.missed(site.name, reason)
            else:
                yield site

    def why_not(self, site: WeightSite) -> str | None:
        """Why a site is left alone, or None."""
        if site.encoding is not None:
            return f"is already encoded, in {site.encoding.bits} bits"
        if site.why_not is not None:
            return site.why_not
        if matches_site(site, self.skip):
            return "is named in skip"
        if "Gather" in site.kinds and not (self.embeddings or "Gather" in self.kinds):
            also = " as well" if len(site.kinds) > 1 else ""
            return f"is an embedding table{also}; ask for it with embeddings=true"
        if site.other_readers:
            return f"is read by {site.other_readers[0]} as well, so the original would have to stay"
        if site.elements < self.min_size:
            return f"has {site.elements} elements, fewer than min_size={self.min_size}"
        if site.opset < OPSET:
            return f"lives in a function at opset {site.opset}; encodings need opset {OPSET}"
        before = site.elements * site.dtype.bitwidth / 8
        after = self.predicted_bytes(site)
        if after >= before:
            return f"would grow from {before:.0f} to {after:.0f} bytes, scales included"
        return None

    def predicted_bytes(self, site: WeightSite) -> float:
        """Bytes the encoded weight will take; of several possible forms, the smallest."""
        return min(predicted_bytes(site, self.grid(site), axis) for axis in ("oc", "ic"))


def matches_site(site: WeightSite, patterns: tuple[str, ...]) -> bool:
    """Whether the weight's name, or that of a node that reads it, or ``kind:`` and an operator of its
    readers matches a pattern."""
    names = [site.name, *(use.node.name or "" for use in site.uses), *(f"kind:{k}" for k in site.kinds)]
    return any(matches(name, patterns) for name in names)


def say_unmatched(model: Model, option: str, patterns: Iterable[str], remarks: Remarks) -> None:
    """Remark on patterns that match no weight and no node: most likely a slip of the pen."""
    patterns = tuple(patterns)
    if not patterns:
        return
    nodes = list(model.nodes(domain=None))
    names = {site.name for site in weight_sites(model)} | {node.name or "" for node in nodes}
    names |= {f"kind:{node.op_type}" for node in nodes}
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            remarks.missed("the model", f"{option} names '{pattern}', which matches no weight and no node")


def predicted_bytes(site: WeightSite, grid: Grid, axis: Literal["oc", "ic"]) -> float:
    """Bytes a weight encoded in groups along ``axis`` will take."""
    run = site.run_axis(axis)
    length = site.matrix_shape[run]
    groups = site.matrix_shape[1 - run] * math.ceil(length / (grid.block(length) or length))
    code_bits = code_type(grid.bits, grid.symmetric, site.opset).bitwidth
    zero_bits = 0 if grid.symmetric else code_bits
    return (site.elements * code_bits + groups * (site.dtype.bitwidth + zero_bits)) / 8


def encoding_of(
    model: Model,
    site: WeightSite,
    grid: Grid,
    axis: Literal["oc", "ic"],
    codes: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray | None,
    *,
    packed: bool = False,
    outliers: Outliers | None = None,
) -> Encoding:
    """A site's encoding from arrays laid out as the file stores the weight.

    Args:
        model: whose scratch folder takes large codes.
        site: the weight; its ``matrix_shape`` is the shape of the codes.
        grid: bits, group size and symmetry.
        axis: which way groups run.
        codes: int8 or uint8 of ``site.matrix_shape``, or already packed bytes (``packed=True``).
        scales: dtype of the weight; ``[rows, groups]`` for groups along the stored columns,
            ``[groups, columns]`` for groups down the stored rows, without the axis of groups when a
            group takes a whole channel.
        zero_points: uint8 or int8 as ``scales``, or None.
        packed: see ``codes``.
        outliers: exact weights by flat position in the stored weight.
    """
    run, storage = site.run_axis(axis), code_type(grid.bits, grid.symmetric, site.opset)
    block = grid.block(site.matrix_shape[run])
    # With a scale per row the codes can have the weight's own shape, which saves the Reshape.
    shape = site.shape if not block and run == 1 else site.matrix_shape
    if storage.bitwidth == 8:
        kind = np.int8 if grid.symmetric else np.uint8
        tensor = model.scratch.tensor(site.name, np.asarray(codes).view(kind).reshape(shape), storage)
    else:
        tensor = model.scratch.packed(site.name, codes if packed else pack(codes, storage), storage, shape)
    return Encoding(
        codes=tensor,
        scales=scales,
        zero_points=zero_points,
        axis=run if block else 1 - run,
        block_size=block,
        bits=grid.bits,
        shape=site.shape,
        outliers=outliers,
        weight=site.name,
    )


def report(encoding: Encoding, axis: str, before: int, sqnr: float | None, **more: Any) -> dict[str, Any]:
    """Figures of an encoded weight, for the remark.

    Args:
        encoding: the result.
        axis: ``oc`` or ``ic``.
        before: bytes of the weight before.
        sqnr: signal-to-noise ratio of the weight in dB, None when nothing was lost.
        more: what the method adds: ``output_sqnr_db``, ``error_oc``, ``error_ic``,
            ``outlier_fraction``, ``damping``, ``fallback``.
    """
    return {
        "bits": encoding.bits,
        "stored_bits": encoding.stored_bits,
        "group_size": encoding.group_size,
        "axis": axis,
        "symmetric": encoding.symmetric,
        "effective_bits": round(effective_bits(encoding), 4),
        "file_bits": round(8 * stored_bytes(encoding) / max(1, encoding.elements), 4),
        "sqnr_db": None if sqnr is None else round(sqnr, 2),
        "bytes_before": before,
        "bytes_after": stored_bytes(encoding),
        **more,
    }


def decibels(signal: float, noise: float) -> float | None:
    """``10·log10(signal / noise)``; None when there is no noise or no signal, or one cannot be represented."""
    measured = 0 < signal < math.inf and 0 < noise < math.inf
    return 10 * math.log10(signal / noise) if measured else None


def sentence(figures: dict[str, Any]) -> str:
    """The figures of :func:`report` in a phrase."""
    group = f"groups of {figures['group_size']}" if figures["group_size"] > 0 else "a scale per channel"
    wide = f", stored as {figures['stored_bits']}" if figures["stored_bits"] != figures["bits"] else ""
    text = (
        f"{figures['bits']} bits{wide}, {group} ({figures['axis']}), "
        f"{figures['effective_bits']:.2f} bits per weight"
    )
    if wide:
        # What the codes are worth is one thing, what the file pays for them another.
        text += f" ({figures['file_bits']:.2f} in the file)"
    if figures.get("outlier_fraction"):
        text += f", {100 * figures['outlier_fraction']:.2f} % kept exact"
    if figures["sqnr_db"] is not None:
        text += f", {figures['sqnr_db']:.1f} dB"
    if figures.get("output_sqnr_db") is not None:
        text += f", output {figures['output_sqnr_db']:.1f} dB"
    if figures.get("fallback"):
        text += f"; {figures['fallback']}"
    return text
