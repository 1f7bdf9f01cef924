"""Named sequences of passes, with the reason for each line. Order is code."""

from __future__ import annotations

from dataclasses import dataclass

from effic.ir.errors import UsageError
from effic.passes import near


@dataclass(frozen=True)
class Preset:
    """A named sequence.

    Attributes:
        summary: what it is for, in a line.
        lines: text form of each pass, and why it stands where it does.
    """

    summary: str
    lines: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The whole sequence in text form."""
        return ",".join(line for line, _ in self.lines)


_CLEANUP: tuple[tuple[str, str], ...] = (
    ("eliminate-dead-code", "first: nothing later spends time on what nobody reads"),
    ("eliminate-identities", "Identity, Dropout and no-op casts hide the patterns the next passes look for"),
    ("fold-constants", "shape arithmetic and constant subgraphs become constants, within a size bound"),
    (
        "canonicalize-linear",
        "weights reach MatMul and Gemm constant and un-transposed, so that runtimes fuse",
    ),
    ("eliminate-identities", "folding shapes turns Reshape, Expand and Slice into no-ops"),
    ("eliminate-common-subexpressions", "after folding: more nodes and constants have become equal"),
    ("eliminate-dead-code", "last: what folding and merging left without a reader"),
)

PRESETS: dict[str, Preset] = {
    "cleanup": Preset("a smaller graph with the same outputs", _CLEANUP),
    "default": Preset(
        "cleanup and the fusions that every inference model wants; no precision is given up",
        (
            *_CLEANUP,
            (
                "reparameterize-branches",
                "before BN folding: branches are easier to see while each has its norm",
            ),
            ("fuse-conv-bn", "batch norms and per-channel scales go into the weights beside them"),
            ("eliminate-dead-code", "the parameters of the folded norms have no reader left"),
        ),
    ),
    "int4": Preset(
        "default, then 4-bit weights in groups of 128 for MatMul and Gemm",
        (
            *_CLEANUP,
            ("fuse-conv-bn", "before quantization: a norm cannot be folded into codes"),
            ("quantize-rtn{bits=4}", "round to nearest: no data needed, seconds even for large models"),
            ("eliminate-dead-code", "the floating-point weights have no reader left"),
        ),
    ),
    "int8": Preset(
        "default, then 8-bit weights in groups of 128 for MatMul and Gemm",
        (
            *_CLEANUP,
            ("fuse-conv-bn", "before quantization: a norm cannot be folded into codes"),
            ("quantize-rtn{bits=8}", "8-bit weights: the error is 1/17 of 4-bit's"),
            ("eliminate-dead-code", "the floating-point weights have no reader left"),
        ),
    ),
    "sparse-2-4": Preset(
        "default, then 2 of every 4 weights zeroed, the others making up for them; needs calibration data",
        (
            *_CLEANUP,
            ("reparameterize-branches", "before BN folding: each branch still has its norm"),
            ("fuse-conv-bn", "before pruning: what a layer multiplies with is final"),
            (
                "prune-sparsegpt{n=2,m=4}",
                "of the one-shot methods the one that moves outputs least, for a second or two per layer",
            ),
            ("eliminate-dead-code", "the parameters of the folded norms have no reader left"),
        ),
    ),
    "int8-static": Preset(
        "default, then 8-bit weights and activations for convolutional models; needs calibration data",
        (
            *_CLEANUP,
            ("reparameterize-branches", "before BN folding: each branch still has its norm"),
            (
                "fuse-conv-bn",
                "before quantization: a norm behind a layer would cut its integer kernel in two",
            ),
            ("quantize-int8", "integers from the first layer to the last, with scales from calibration"),
            ("eliminate-dead-code", "the floating-point weights have no reader left"),
        ),
    ),
}


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: no such preset.
    """
    if name not in PRESETS:
        raise UsageError(
            f"there is no preset '{name}'{near(name, list(PRESETS))}; allowed are {', '.join(PRESETS)}"
        )
    return PRESETS[name]
