"""quantize-rtn: weight-only quantization by rounding to nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from effic.ir.encodings import Encoding, code_type, effective_bits, stored_bytes
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.weights import KINDS, WeightSite, weight_sites
from effic.passes.base import Numerics, Pass, Remarks, matches, option
from effic.passes.quantize.affine import Grid, quantization_noise, quantize

_BITS = (2, 3, 4, 8)
_OPSET = 21


@dataclass(frozen=True)
class QuantizeRTN(Pass):
    """Store weights in few bits, each rounded to the nearest level of its group's grid.

    Before:  y = MatMul(x, w)
    After:   y = MatMul(x, DequantizeLinear(w.codes, w.scales))

    Needs no data and keeps activations in floating point. A group of ``group_size`` weights shares a
    scale; with ``axis=oc`` groups run along the inputs of one output channel, with ``axis=ic`` along
    the outputs of one input channel. At the same size more groups mean less error and more scales.
    3-bit codes, and 2-bit codes before opset 25, are stored in 4 bits, for want of a narrower type.

    Missed when the weight is computed at run time, may be overridden by the caller, is no matrix of
    floats, is encoded already, holds NaN or infinity, is read as something else too, or would not get
    smaller; and for embeddings (also those tied to the output layer) unless ``embeddings`` is on.
    """

    name: ClassVar[str] = "quantize-rtn"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    needs_opset: ClassVar[int] = _OPSET

    bits: Literal[2, 3, 4, 8] = option(4, help="width of a code")
    group_size: int = option(128, help="weights that share a scale; -1 for a whole channel", ge=-1)
    symmetric: bool = option(True, help="without zero points: 0 is the middle of the grid")
    axis: Literal["oc", "ic"] = option("oc", help="groups within one output channel or one input channel")
    scale: Literal["full", "absmax"] = option(
        "full", help="symmetric scale: all levels, the largest weight exact, or one level less, none clipped"
    )
    skip: tuple[str, ...] = option((), help="patterns of weight or node names to leave alone")
    overrides: tuple[str, ...] = option(
        (), help="other widths by name, as PATTERN=BITS; the first match counts"
    )
    kinds: tuple[str, ...] = option(
        ("MatMul", "Gemm"), help="operators whose weights are quantized", choices=KINDS
    )
    embeddings: bool = option(False, help="also the tables that Gather reads")
    min_size: int = option(1024, help="leave weights with fewer elements alone", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < -1 or self.group_size == 0:
            raise UsageError(f"quantize-rtn: group_size is {self.group_size}; use a positive number, or -1")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise UsageError(f"quantize-rtn: kinds has '{unknown[0]}'; choose from {', '.join(KINDS)}")
        for text in self.overrides:
            pattern, _, bits = text.rpartition("=")
            if not pattern or bits not in map(str, _BITS):
                raise UsageError(
                    f"quantize-rtn: override '{text}' is not PATTERN=BITS with bits of {', '.join(map(str, _BITS))}"
                )

    def apply(self, model: Model, remarks: Remarks) -> None:
        left = [
            site
            for site in weight_sites(model, ("Conv", "ConvTranspose"))
            if not site.kinds & set(self.kinds)
        ]
        if left:
            count = f"{len(left)} convolution weights" if len(left) > 1 else "1 convolution weight"
            remarks.missed(
                "the model", f"{count} left in floating point; name Conv in kinds to quantize them"
            )
        for site in weight_sites(model, {*self.kinds, "Gather"}):
            if reason := self.why_not(site):
                remarks.missed(site.name, reason)
                continue
            encoded, sqnr, sampled = encode(model, site, self.grid(site), self.axis)
            if encoded is None:
                remarks.missed(site.name, "holds a weight that is infinite or not a number")
                continue
            before = int(site.elements * site.dtype.bitwidth // 8)
            site.write(model, encoded)
            figures = report(encoded, self.axis, before, sqnr, sampled)
            remarks.passed(site.name, sentence(figures), method="rtn", **figures)

    def grid(self, site: WeightSite) -> Grid:
        """The grid for a site, overrides applied."""
        bits: int = self.bits
        for text in self.overrides:
            pattern, _, other = text.rpartition("=")
            if matches_site(site, (pattern,)):
                bits = int(other)
                break
        return Grid(bits, self.group_size, self.symmetric, self.scale)

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
        if site.opset < _OPSET:
            return f"lives in a function at opset {site.opset}; encodings need opset {_OPSET}"
        before = site.elements * site.dtype.bitwidth / 8
        after = predicted_bytes(site, self.grid(site), self.axis)
        if after >= before:
            return f"would grow from {before:.0f} to {after:.0f} bytes, scales included"
        return None


def matches_site(site: WeightSite, patterns: tuple[str, ...]) -> bool:
    """Whether the weight's name, or that of a node that reads it, matches a pattern."""
    names = [site.name, *(use.node.name or "" for use in site.uses)]
    return any(matches(name, patterns) for name in names)


def predicted_bytes(site: WeightSite, grid: Grid, axis: Literal["oc", "ic"]) -> float:
    """Bytes the encoded weight will take."""
    run = site.run_axis(axis)
    length = site.matrix_shape[run]
    groups = site.matrix_shape[1 - run] * math.ceil(length / (grid.block(length) or length))
    code_bits = code_type(grid.bits, grid.symmetric, site.opset).bitwidth
    zero_bits = 0 if grid.symmetric else code_bits
    return (site.elements * code_bits + groups * (site.dtype.bitwidth + zero_bits)) / 8


def encode(
    model: Model, site: WeightSite, grid: Grid, axis: Literal["oc", "ic"]
) -> tuple[Encoding | None, float | None, bool]:
    """Quantize a site's weight by rounding to nearest.

    Returns:
        The encoding, or None when the weight is not finite; the signal-to-noise ratio of the weight
        in dB (None when nothing was lost); whether that ratio is from a sample.
    """
    run, storage = site.run_axis(axis), code_type(grid.bits, grid.symmetric, site.opset)
    with site.matrix() as matrix:
        done = quantize(matrix, run, grid, storage, site.give_back)
        if done is None:
            return None, None, False
        signal, noise, sampled = quantization_noise(matrix, run, grid)
        block = grid.block(matrix.shape[run])
    # With a scale per row the codes can have the weight's own shape, which saves the Reshape.
    shape = site.shape if not block and run == 1 else site.matrix_shape
    if storage.bitwidth == 8:
        kind = np.int8 if grid.symmetric else np.uint8
        codes = model.scratch.tensor(site.name, done.packed.view(kind).reshape(shape), storage)
    else:
        codes = model.scratch.packed(site.name, done.packed, storage, shape)
    encoding = Encoding(
        codes=codes,
        scales=done.scales,
        zero_points=done.zero_points,
        axis=run if block else 1 - run,
        block_size=block,
        bits=grid.bits,
        shape=site.shape,
        weight=site.name,
    )
    return encoding, 10 * math.log10(signal / noise) if noise and signal else None, sampled


def report(encoding: Encoding, axis: str, before: int, sqnr: float | None, sampled: bool) -> dict[str, Any]:
    """Figures of an encoded weight, for the remark."""
    return {
        "bits": encoding.bits,
        "stored_bits": encoding.stored_bits,
        "group_size": encoding.group_size,
        "axis": axis,
        "symmetric": encoding.symmetric,
        "effective_bits": round(effective_bits(encoding), 4),
        "sqnr_db": None if sqnr is None else round(sqnr, 2),
        "sqnr_sampled": sampled,
        "bytes_before": before,
        "bytes_after": stored_bytes(encoding),
    }


def sentence(figures: dict[str, Any]) -> str:
    """The figures of :func:`report` in a phrase."""
    group = f"groups of {figures['group_size']}" if figures["group_size"] > 0 else "a scale per channel"
    wide = f", stored as {figures['stored_bits']}" if figures["stored_bits"] != figures["bits"] else ""
    ratio = "" if figures["sqnr_db"] is None else f", {figures['sqnr_db']:.1f} dB"
    return (
        f"{figures['bits']} bits{wide}, {group} ({figures['axis']}), "
        f"{figures['effective_bits']:.2f} bits per weight{ratio}"
    )
