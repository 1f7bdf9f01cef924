"""lower-compressed: what becomes of weights that compress-nm stored, and what their zeros are worth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

from effic.backends.ort.scenes import remove_unread
from effic.ir.compressed import COMPRESSED_KEY, Compressed
from effic.ir.model import Model
from effic.ir.sparsity import declared
from effic.ir.weights import WeightSite, weight_sites
from effic.passes.base import Numerics, Pass, Remarks, option

NO_FASTER = (
    "ONNX Runtime's CPU kernels do not use zeros: N:M weights run at dense speed; "
    "compress-nm makes the file smaller"
)


@dataclass(frozen=True)
class LowerCompressed(Pass):
    """Say what compressed sparse weights cost, or store them dense again.

    Before:  w = ScatterElements(zeros, Gather(positions, codes), values)
    After:   the same (form=load), or w as a constant (form=dense)

    The runtime folds what decompresses a weight when it loads the file and keeps every step until it is
    done: some four times the memory of the dense weight meanwhile, and 40 ns per weight (4-bit 2:4: 10).
    Results are the same to the last bit.

    Missed when no weight is compressed.
    """

    name: ClassVar[str] = "lower-compressed"
    numerics: ClassVar[Numerics] = Numerics.EXACT

    form: Literal["load", "dense"] = option("load", help="decompress when the file is loaded, or store dense")

    def apply(self, model: Model, remarks: Remarks) -> None:
        found = [(site, one) for site in weight_sites(model) if (one := site.compressed) is not None]
        if self.form == "dense":
            for site, one in found:
                before, after = one.nbytes, _store(model, site, one)
                remarks.passed(
                    site.name, f"stored dense again, as asked (nm=dense): {before:,} → {after:,} bytes"
                )
            return
        plain = [site for site, _ in found if site.encoding is None]
        if plain:
            count = f"{len(plain)} sparse weights are" if len(plain) > 1 else "1 sparse weight is"
            remarks.missed(
                "the model",
                f"{count} decompressed once, when the file is loaded: small in the file, dense in memory and "
                "speed, and up to four times that memory while loading; nm=dense trades file size for it",
            )


def _store(model: Model, site: WeightSite, compressed: Compressed) -> int:
    """Put a constant in the place of what decompresses it; its bytes."""
    tensor, old, graph = compressed.dense(), compressed.value, site.graph
    assert graph is not None
    new = model.add_initializer(graph, f"{site.name}.codes" if site.encoding else site.name, tensor)
    old.replace_all_uses_with(new)
    node = old.producer()
    remove_unread([] if node is None else [node])
    return int(tensor.nbytes)


def names_compressed(model: Model) -> set[str]:
    """Names of the weights that the graph decompresses."""
    found = set()
    for node in model.nodes("ScatterElements", "Gather"):
        text = node.metadata_props.get(COMPRESSED_KEY)
        if text is not None:
            try:
                found.add(str(json.loads(text).get("weight")))
            except (ValueError, AttributeError, RecursionError):
                continue
    return found


def say_lost(before: set[str], model: Model, remarks: Remarks) -> None:
    """Remark on weights that other lowering passes stored dense."""
    lost = sorted(before - names_compressed(model))
    if lost:
        which = f"'{lost[0]}'" if len(lost) == 1 else f"{len(lost)} compressed weights ('{lost[0]}', …)"
        remarks.missed(
            "the model",
            f"{which} stored dense again, in the order of the runtime's kernel: it decompresses 2:4 weights "
            "in 4 bits of 262,144 elements and more, with groups along the input channels",
        )


def say_no_faster(model: Model, remarks: Remarks) -> None:
    """Remark, once, that the runtime has no use for zeros."""
    count = len(declared(model))
    if count:
        weights = f"{count} weights are" if count > 1 else "1 weight is"
        remarks.missed("the model", f"{weights} sparse, but {NO_FASTER}")
