"""The table of passes: reading it is enough to know them all.

A pass of another package is listed by an entry point in the group ``effic.passes`` (name = the
pass's name, object = the class).
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from effic.ir.errors import UsageError
from effic.passes.plugins import load_plugin, plugin_names

if TYPE_CHECKING:
    from effic.passes.base import Pass

GROUP = "effic.passes"
"""Entry points of other packages' passes."""

PASSES: dict[str, str] = {
    # cleanup: smaller graphs, same numbers
    "eliminate-dead-code": "effic.passes.cleanup.eliminate_dead_code:EliminateDeadCode",
    "eliminate-identities": "effic.passes.cleanup.eliminate_identities:EliminateIdentities",
    "eliminate-common-subexpressions": (
        "effic.passes.cleanup.eliminate_common_subexpressions:EliminateCommonSubexpressions"
    ),
    "fold-constants": "effic.passes.cleanup.fold_constants:FoldConstants",
    "canonicalize-linear": "effic.passes.cleanup.canonicalize_linear:CanonicalizeLinear",
    # fuse: fewer operators, rounding only
    "fuse-conv-bn": "effic.passes.fuse.fuse_conv_bn:FuseConvBN",
    "reparameterize-branches": "effic.passes.fuse.reparameterize_branches:ReparameterizeBranches",
    # quantize: fewer bits
    "smooth-activations": "effic.passes.quantize.smooth_activations:SmoothActivations",
    "equalize-layers": "effic.passes.quantize.equalize_layers:EqualizeLayers",
    "quantize-rtn": "effic.passes.quantize.quantize_rtn:QuantizeRTN",
    "quantize-int8": "effic.passes.quantize.quantize_int8:QuantizeInt8",
    "quantize-easyquant": "effic.passes.quantize.quantize_easyquant:QuantizeEasyQuant",
    "quantize-gptq": "effic.passes.quantize.quantize_gptq:QuantizeGPTQ",
    "quantize-adadim": "effic.passes.quantize.quantize_adadim:QuantizeAdaDim",
    "quantize-awq": "effic.passes.quantize.quantize_awq:QuantizeAWQ",
    # sparsify: fewer weights
    "permute-channels": "effic.passes.sparsify.permute_channels:PermuteChannels",
    "prune-magnitude": "effic.passes.sparsify.prune_magnitude:PruneMagnitude",
    "prune-wanda": "effic.passes.sparsify.prune_wanda:PruneWanda",
    "prune-sparsegpt": "effic.passes.sparsify.prune_sparsegpt:PruneSparseGPT",
    "apply-masks": "effic.passes.sparsify.apply_masks:ApplyMasks",
    "compress-nm": "effic.passes.sparsify.compress_nm:CompressNM",
    # adapters: the LoRA family
    "merge-lora": "effic.passes.adapters.merge_lora:MergeLora",
    "unmerge-lora": "effic.passes.adapters.unmerge_lora:UnmergeLora",
    "fuse-lora-branches": "effic.passes.adapters.fuse_lora_branches:FuseLoRABranches",
    "adapters-as-inputs": "effic.passes.adapters.adapters_as_inputs:AdaptersAsInputs",
}


def pass_names() -> list[str]:
    """Names of all passes, third parties' last."""
    return [*PASSES, *(name for name in plugin_names(GROUP) if name not in PASSES)]


def load_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        UsageError: no such pass (the nearest name is proposed), or a third party's does not load.
    """
    from effic.passes.base import Pass

    if name not in PASSES:
        other = load_plugin(GROUP, name, "pass", Pass)  # type: ignore[type-abstract]
        if other is None:
            raise UsageError(
                f"there is no pass '{name}'{near(name, pass_names())}; `effic passes` lists them"
            )
        return other
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), attribute)
    return found


def near(word: str, known: list[str]) -> str:
    """``" (did you mean 'x'?)"`` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
