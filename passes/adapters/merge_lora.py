"""merge-lora: adapters of the LoRA family merged into the weights they belong to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.passes.adapters.adapter_files import Adapter, AdapterModule, read_adapter
from effic.passes.adapters.matching import LEFT_OUT, MapEntry, Place, read_map
from effic.passes.adapters.merging import Merged, Recipe, is_plain, merge
from effic.passes.adapters.originals import (
    MergeRecord,
    check_file,
    read_merges,
    save_originals,
    write_merges,
)
from effic.passes.adapters.targets import Target, gather, with_initial
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.spec import to_text


@dataclass(frozen=True)
class MergeLora(Pass):
    """Merge adapters (LoRA, DoRA, PaCA, …) into the weights they belong to.

    Before:  y = MatMul(x, W), and a folder with A, B and σ for W
    After:   y = MatMul(x, W + σ·B·A)

    Adapters are PEFT folders. Their modules are matched to constants by path; ``map`` names a file of
    ``PATH = NAME`` lines for models whose exporter renamed the weights (``NAME[0:64]``: rows of a fused
    projection; ``-``: leave out). Replaced modules, biases and rows of embeddings are merged as well.
    Several adapters, each ``folder`` or ``folder=weight``, are added up, or combined otherwise
    (``combine``). A weight that others read too is copied first. Nothing is merged in part: an adapter
    with a tensor that has no place, or of a kind that no single weight can hold, is refused.

    A weight that is stored in few bits is decoded, added to and encoded again (``requantize``); the
    rounding is reported beside the adapter's own size.

    Missed when the adapter is merged already, or adds nothing to a weight.
    """

    name: ClassVar[str] = "merge-lora"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    adapters: tuple[str, ...] = option(
        help='adapter folders: FOLDER, or "FOLDER=WEIGHT" in quotes', example="[my_adapter]"
    )
    map: str = option("", help="file of PATH = NAME lines, for weights that go by other names in the model")
    combine: Literal[
        "delta_sum", "cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"
    ] = option("delta_sum", help="how several adapters become one; delta_sum is exact")
    space: Literal["delta", "factors"] = option(
        "delta", help="whether ties, dare and pruning work on B·A or on A and B, as PEFT does"
    )
    density: float = option(0.5, help="part of the entries that ties, dare and pruning keep", ge=0.0, le=1.0)
    svd_rank: int = option(0, help="rank of combine=svd; 0 for the largest of the adapters'", ge=0)
    sign: Literal["total", "frequency"] = option("total", help="how ties elects a sign")
    seed: int = option(42, help="of the masks of dare", ge=0)
    lora_rank: int = option(0, help="keep the first components of a DyLoRA adapter; 0 for all", ge=0)
    rank_scale: Literal["alpha_over_b", "keep"] = option(
        "alpha_over_b", help="σ of a shortened adapter: for the new rank, or as it was"
    )
    requantize: Literal["new_params", "keep_params", "none", "keep_branch"] = option(
        "new_params",
        help="encoded weights: new scales, the old ones, floating point, or a branch beside them",
    )
    base: Literal["auto", "dequantized", "original", "residual"] = option(
        "auto", help="what the model's weights are to the adapter; residual: saved when PiSSA training began"
    )
    initial: str = option("", help="folder of the adapter before training, for those that changed the base")
    untie: bool = option(False, help="give one side of a tied embedding and output layer a copy")
    peft_compat: bool = option(
        False, help="combine as PEFT 0.21 does, even where that is no weighted sum of the adapters"
    )
    keep_original: str = option("", help="file (.safetensors) to write the replaced weights to")
    compute_dtype: Literal["float32", "float64"] = option("float32", help="what sums are computed in")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapters:
            raise UsageError(f"{self.name}: adapters is empty; name the folder of an adapter")
        for text in self.adapters:
            split(text)
        if self.density == 0:
            raise UsageError(f"{self.name}: density is 0, which keeps nothing of any adapter")
        if self.svd_rank and self.combine in ("delta_sum", "cat", "linear"):
            raise UsageError(f"{self.name}: combine={self.combine} has no rank to choose; leave svd_rank out")

    def rehearsed(self) -> Pass:
        return dataclasses.replace(self, keep_original="")

    def apply(self, model: Model, remarks: Remarks) -> None:
        adapters = read_all(self.adapters)
        done = {digest for merge in read_merges(model) for digest in merge.digests}
        merged = [adapter for adapter, _ in adapters if adapter.digest in done]
        for adapter in merged:
            remarks.missed(adapter.name, "is merged already")
        if merged and len(merged) < len(adapters) and self.combine not in ("delta_sum", "cat"):
            raise UsageError(
                f"adapter '{merged[0].name}' is merged already, so it cannot be combined with the others"
            )
        adapters = [item for item in adapters if item[0].digest not in done]
        if not adapters:
            return
        if self.keep_original:
            check_file(self.keep_original)
        targets, left_out = plan(self, model, adapters, read_map(self.map) if self.map else {})
        for path in left_out:
            remarks.missed(path, "is left out by the map")
        digest = save_originals(self.keep_original, targets) if self.keep_original else None
        try:
            self._merge(model, adapters, targets, left_out, digest, remarks)
        except BaseException:
            # Of a merge that failed nothing is left behind.
            if self.keep_original:
                os.unlink(self.keep_original)
            raise

    def _merge(
        self,
        model: Model,
        adapters: Sequence[tuple[Adapter, float]],
        targets: Sequence[Target],
        left_out: Sequence[str],
        digest: str | None,
        remarks: Remarks,
    ) -> None:
        # Adapters are merged once, so that those of a merge tell it from the others.
        recipe = dataclasses.replace(recipe_of(self), mark="+".join(a.digest[:16] for a, _ in adapters))
        record = MergeRecord(
            adapters=[(adapter.name, adapter.digest, weight) for adapter, weight in adapters],
            text=to_text(dataclasses.replace(self, adapters=("-",), map="", keep_original="")),
            places=[(path, LEFT_OUT, None) for path in left_out],
            constants={},
            originals=digest,
            exact=all(additive(target, self.requantize) for target in targets),
        )
        kept_branch = False
        for target in targets:
            original = target.place.name
            result = merge(model, target, recipe)
            kept_branch |= result.kept_branch
            report(remarks, target, result)
            name = result.name or original
            record.places.extend((path, name, rows) for path, rows in _paths(target))
            if result.name is not None and not result.kept_branch:
                record.constants[name] = original
        if kept_branch:
            record = dataclasses.replace(record, branches=recipe.mark)
        write_merges(model, [*read_merges(model), record])


def split(text: str) -> tuple[str, float]:
    """Folder and weight of an adapter, from ``FOLDER`` or ``FOLDER=WEIGHT``.

    Raises:
        UsageError: the weight is no finite number.
    """
    folder, sign, number = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not folder or not np.isfinite(weight):
        raise UsageError(f"merge-lora: adapter '{text}' is not FOLDER or FOLDER=WEIGHT")
    return folder, weight


def read_all(texts: Sequence[str]) -> list[tuple[Adapter, float]]:
    """The adapters of an option, read, with their weights.

    Raises:
        UsageError: one is there twice, or no adapter.
        InvalidModelError: one is broken or cannot be merged.
    """
    adapters = [(read_adapter(folder), weight) for folder, weight in map(split, texts)]
    seen: dict[str, str] = {}
    for adapter, _ in adapters:
        if adapter.digest in seen:
            raise UsageError(f"{adapter.path} and {seen[adapter.digest]} are the same adapter; give it once")
        seen[adapter.digest] = adapter.path
    return adapters


def recipe_of(item: MergeLora) -> Recipe:
    """The options that concern the arithmetic."""
    return Recipe(
        combine=item.combine,
        space=item.space,
        density=item.density,
        svd_rank=item.svd_rank or None,
        sign=item.sign,
        seed=item.seed,
        peft_compat=item.peft_compat,
        rank=item.lora_rank or None,
        rank_scale=item.rank_scale,
        requantize=item.requantize,
        dtype=np.float64 if item.compute_dtype == "float64" else np.float32,
    )


def plan(
    item: MergeLora,
    model: Model,
    adapters: Sequence[tuple[Adapter, float]],
    mapping: dict[str, MapEntry],
) -> tuple[list[Target], list[str]]:
    """Targets of all adapters, with the options about ranks and bases applied, and what the map leaves out.

    Raises:
        UsageError: a tensor has no place, or what the base is cannot be told.
        UnsupportedError: something cannot be merged.
    """
    initial = read_adapter(item.initial) if item.initial else None
    if initial is not None and len(adapters) > 1:
        raise UsageError(f"{item.name}: initial is of one adapter; merge adapters one after the other")
    targets, left_out = gather(model, adapters, mapping, item.untie)

    def encoded(place: Place) -> bool:
        return place.site is not None and place.site.encoding is not None

    if item.base == "original":
        for target in targets:
            if encoded(target.place):
                raise UsageError(
                    f"base=original, but '{target.place.name}' is quantized and its original is not in the "
                    "model; merge into the unquantized model and quantize the result"
                )
    with_initial(targets, initial, item.base, encoded)
    # Those that change a constant for everyone come first: copies are made of the result.
    targets.sort(key=lambda target: target.uses is not None)
    return targets, left_out


def additive(target: Target, requantize: str) -> bool:
    """Whether what is done to a constant can be undone by taking the same delta or branch away."""
    site = target.place.site
    if site is not None and site.encoding is not None:
        return requantize == "keep_branch"
    if target.whole or target.rows:
        return False
    return all(
        is_plain(module) or module.method == "s2ft" or (module.kind == "expert" and module.init is True)
        for module, _ in target.modules
    )


def _paths(target: Target) -> list[tuple[str, tuple[int, int] | None]]:
    """Paths of a target's modules, or its own where it has none."""
    found = [(module.path, rows) for rows, part in target.parts.items() for module, _ in part]
    return list(dict.fromkeys(found)) or [(target.path, None)]


def report(remarks: Remarks, target: Target, result: Merged) -> None:
    """The remark about one constant."""
    module = target.modules[0][0] if target.modules else None
    kind = kind_of(target, module)
    if result.name is None:
        remarks.missed(target.path, f"{kind}: adds nothing, the weight stays as it is")
        return
    text = f"{kind}, |ΔW|/|W| {result.relative:.2g}"
    data: dict[str, Any] = {
        "kind": kind,
        "constant": result.name,
        "relative": result.relative,
        "relative_sampled": result.sampled,
    }
    if module is not None:
        ranks = [m.rank for m, _ in target.modules]
        data |= {"rank": ranks, "scaling": [m.scaling for m, _ in target.modules]}
        data["adapters"] = {m.adapter: weight for m, weight in target.modules}
        text = (
            f"{kind}, r {'+'.join(map(str, ranks))}, σ {', '.join(f'{m.scaling:g}' for m, _ in target.modules)}"
            f", |ΔW|/|W| {result.relative:.2g}"
        )
    if target.uses is not None:
        text += f"; others read the weight too, so this is a copy, '{result.name}'"
    if result.bits:
        data["bits"] = result.bits
        text += f"; stored as the {result.bits}-bit codes it was trained with"
    if result.kept_branch:
        text += "; kept beside the encoded weight as a branch"
    if result.rounding is not None:
        data["requantization"] = result.rounding
        text += f"; rounding is {result.rounding:.2g} times the adapter"
        if result.rounding > 1:
            data["erased"] = True
    if result.silent:
        data["silent"] = result.silent
    remarks.passed(target.path, text, **data)
    # What was merged to little use is said where people look for what was not done.
    if result.rounding is not None and result.rounding > 1:
        remarks.missed(
            target.path,
            f"rounding is {result.rounding:.2g} times the adapter, which may be lost in it: use "
            "requantize=keep_branch or more bits",
        )
    if result.silent:
        remarks.missed(
            target.path,
            f"{result.silent} of its channels are zero, which DoRA cannot give a magnitude: they stay zero",
        )


def kind_of(target: Target, module: AdapterModule | None) -> str:
    """What was merged, in a word or two."""
    if module is None:
        if target.biases:
            return "bias"
        return "rows" if target.rows else "replaced"
    family = {"lora": "LoRA", "paca": "PaCA", "s2ft": "S²FT", "svfit": "SVFit", "l4q": "L4Q"}[module.method]
    if module.use_dora:
        family = "DoRA"
    elif module.use_rslora:
        family = "rsLoRA"
    where = "" if module.kind == "linear" else f" of {'an' if module.kind[0] == 'e' else 'a'} {module.kind}"
    return f"{family}{where}"
