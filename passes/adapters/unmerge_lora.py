"""unmerge-lora: a merge undone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from effic.ir.errors import InvalidModelError, UnsupportedError, UsageError
from effic.ir.model import Model
from effic.passes.adapters.matching import MapEntry, Places
from effic.passes.adapters.merge_lora import MergeLora, plan, read_all, recipe_of
from effic.passes.adapters.merging import merge
from effic.passes.adapters.originals import (
    MergeRecord,
    load_originals,
    read_merges,
    restore,
    write_merges,
)
from effic.passes.adapters.requantize import remove_branches
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.spec import parse_passes


@dataclass(frozen=True)
class UnmergeLora(Pass):
    """Take merged adapters out of the weights again.

    Before:  y = MatMul(x, W + σ·B·A), merged by merge-lora
    After:   y = MatMul(x, W)

    With the file that merge-lora's ``keep_original`` wrote, weights are put back bit for bit. Without it
    the same delta is taken away again, which leaves the rounding of two sums, and is possible only where
    something was added: not for DoRA, PaCA, replaced modules or weights that were quantized anew.
    Options of the merge are in the model's metadata; only the adapters have to be named again.

    Missed when the adapters are not merged. Several merges are undone the last one first.
    """

    name: ClassVar[str] = "unmerge-lora"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    adapters: tuple[str, ...] = option(
        (), help="the folders that were merged; not needed with originals", example="[my_adapter]"
    )
    originals: str = option("", help="the file that merge-lora's keep_original wrote")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapters and not self.originals:
            raise UsageError(f"{self.name}: name the adapters, or the file of originals")

    def apply(self, model: Model, remarks: Remarks) -> None:
        merges = read_merges(model)
        if not merges:
            remarks.missed("the model", "nothing is merged into it")
            return
        record = merges[-1]
        if self.originals:
            _put_back(model, self.originals, record, remarks)
        elif not self._subtract(model, record, remarks):
            return
        write_merges(model, merges[:-1])

    def _subtract(self, model: Model, record: MergeRecord, remarks: Remarks) -> bool:
        """Take the last merge's deltas away; False when it was of other adapters."""
        given = {adapter.digest: adapter for adapter, _ in read_all(self.adapters)}
        if set(given) != set(record.digests):
            names = ", ".join(f"'{name}'" for name, _, _ in record.adapters)
            remarks.missed("the model", f"what was merged last is {names}")
            return False
        if not record.exact:
            raise UnsupportedError(
                "the last merge did more than add (DoRA, replaced tensors, quantized weights, …), so it cannot "
                "be undone by subtracting; give originals=FILE"
            )
        item = _merge_of(record)
        mapping = {path: MapEntry(name, rows) for path, name, rows in record.places}
        adapters = [(given[digest], weight) for _, digest, weight in record.adapters]
        recipe = dataclasses.replace(recipe_of(item), subtract=True)
        targets = plan(item, model, adapters, mapping)[0]
        _take_branches_away(model, record, remarks)
        for target in targets:
            site = target.place.site
            if site is not None and site.encoding is not None:
                # Its branch is gone already.
                continue
            done = merge(model, target, recipe)
            if done.name is None:
                remarks.missed(target.path, "the adapter adds nothing here, so nothing is taken away")
            else:
                remarks.passed(target.path, f"the delta is taken away, |ΔW|/|W| {done.relative:.2g}")
        return True


def _merge_of(record: MergeRecord) -> MergeLora:
    """The pass that a record tells of.

    Raises:
        InvalidModelError: the metadata are no record of a merge.
    """
    try:
        (item,) = parse_passes(record.text)
    except (UsageError, ValueError) as error:
        raise InvalidModelError(
            "the model's record of the merge is damaged; give originals=FILE or the base itself"
        ) from error
    if not isinstance(item, MergeLora):
        raise InvalidModelError("the model's record of the merge is of another pass; give originals=FILE")
    return item


def _put_back(model: Model, path: str, record: MergeRecord, remarks: Remarks) -> None:
    """Restore every constant of a merge from the file of originals.

    Raises:
        UsageError: the file is not the one that was written then, or none was.
        InvalidModelError: a constant is not where it was left.
    """
    if record.originals is None:
        raise UsageError("no originals were kept when the adapter was merged; name the adapters instead")
    kept = load_originals(path, record.originals)
    places = Places(model, {})
    for name, original in record.constants.items():
        named = places.by_name.get(name, [])
        if len(named) != 1:
            count = "no" if not named else "more than one"
            raise InvalidModelError(f"the model has {count} '{name}', so its original cannot be put back")
        restore(model, kept, named[0], original)
        remarks.passed(name, "the original is put back")
    _take_branches_away(model, record, remarks)


def _take_branches_away(model: Model, record: MergeRecord, remarks: Remarks) -> None:
    """Remove what was kept beside encoded weights.

    Raises:
        InvalidModelError: it is not there any more, so that it may be part of something else by now.
    """
    if record.branches is None:
        return
    names = remove_branches(model, record.branches)
    if not names:
        raise InvalidModelError(
            "the branches that were kept beside encoded weights are not to be found any more, so they cannot "
            "be taken away"
        )
    for name in names:
        remarks.passed(name, "the branch beside it is taken away")
