"""permute-channels: an order of channels with which N:M pruning loses less; the function stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from effic.ir.channels import Channels, Dim
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.sparsity import Pattern, declared
from effic.ir.weights import WeightSite, weight_sites
from effic.passes.base import CalibratedPass, Numerics, Remarks, option
from effic.passes.calibration import Calibration
from effic.passes.finished import FinishedSites
from effic.passes.quantize.weight_only import say_unmatched
from effic.passes.sparsify.channel_scores import columns_of, reduction_axis, sampled_rows, scores
from effic.passes.sparsify.ends import first_convolutions, vocabulary_heads
from effic.passes.sparsify.permutation_search import Found, kept_score, search, solves_triples
from effic.passes.sparsify.prune_magnitude import PruneMagnitude

# Gains below this share of the score are not worth rewriting weights for.
_WORTH_IT = 1e-4
# Scores of one group of channels that are held at a time (256 MB); of more, a sample of the rows is searched.
_MOST_SCORES = 1 << 26

LINEARS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True)
class PermuteChannels(CalibratedPass):
    """Reorder channels so that large weights do not share a group of m: pruning then keeps more of them.

    Before:  h = Relu(MatMul(x, w1));        y = MatMul(h, w2)
    After:   h = Relu(MatMul(x, w1[:, p]));  y = MatMul(h, w2[p, :])

    Run it before prune-magnitude, prune-wanda or prune-sparsegpt, with the same n and m. For channels
    that nothing holds in place an order ``p`` is searched for (ASP's search, Pool and Yu, NeurIPS 2021)
    that raises the score (``|w|``, or ``|w|`` times the norm of the input) that is kept in all weights
    that read them. Everything else that has these channels follows: the layers that make them, biases,
    norms, depthwise filters, all layers on a residual stream, tables of embeddings. Channels of a
    Reshape are permuted alike in every copy (dims in all heads), those of a Concat part by part.

    Missed when channels reach a graph input or output, a subgraph or a function, or an operator to which
    their order matters; when groups of m straddle parts that move apart; when a weight that reads them
    is pruned already; and when no order keeps more. Weights that prune-magnitude leaves dense by default
    do not count.
    """

    name: ClassVar[str] = "permute-channels"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    n: int = option(2, help="weights that pruning will keep of every m", ge=1)
    m: int = option(4, help="weights in a group", ge=2)
    score: Literal["magnitude", "wanda"] = option(
        "magnitude", help="what is to be kept: |w|, or |w| times the norm of its input"
    )
    search: Literal["exhaustive", "channel_swap"] = option(
        "exhaustive",
        help="try all rearrangements of a window, or swaps of two channels (the only way for m over 6)",
    )
    window: Literal[8, 12] = option(
        8, help="columns of a window for groups of four: 8 is two groups at a time, 12 also three"
    )
    escape_attempts: int = option(
        100, help="random disturbances to try; fewer are made where they take long", ge=0
    )
    seed: int = option(0, help="of the disturbances", ge=0)
    skip: tuple[str, ...] = option(
        (),
        help="weights that will stay dense and do not count: patterns of weight or node names, or kind:Conv",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            Pattern(self.n, self.m)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error
        if self.search == "channel_swap":
            self.refuse_idle("search=channel_swap", "window")
        if not solves_triples(self.m):
            self.refuse_idle(f"m={self.m}", "window")

    @property
    def needs_data(self) -> bool:
        return self.score == "wanda"

    def calibrate(self, model: Model, calibration: Calibration | None, remarks: Remarks) -> None:
        say_unmatched(model, "skip", self.skip, remarks)
        pattern = Pattern(self.n, self.m)
        channels = Channels(model)
        sites = list(self._counted(model, remarks))
        norms: dict[WeightSite, np.ndarray] = {}
        if self.needs_data and calibration is not None:
            seen = [site for site in sites if self._is_seen(site, calibration, remarks)]
            for site, statistics in calibration.walk(model, seen, second_moment=False):
                norms[site] = np.sqrt(statistics.mean_square)
            sites = seen
        pruned = _pruned_readers(model, channels)
        orders: dict[Dim, np.ndarray] = {}
        constants = channels.constants()
        for place in _places(channels, sites, pattern):
            place.reason = place.reason or pruned.get(place.channels)
            if place.reason is not None:
                remarks.missed(place.where, f"{place.title} {place.reason}")
                continue
            found, total = self._found(place, pattern, norms, remarks.finished)
            if found is None:
                remarks.missed(place.where, "holds a weight that is infinite or not a number")
            elif found.after - found.before <= _WORTH_IT * found.before:
                remarks.missed(
                    place.where, f"{place.title}: no order found that keeps more", **_figures(found)
                )
            else:
                orders[place.channels] = found.order
                others = len(constants[place.channels]) - len(place.readers)
                follow = "1 other constant follows" if others == 1 else f"{others} other constants follow"
                remarks.passed(
                    place.where,
                    f"{place.title}: {pattern} keeps {100 * found.before / total:.2f} -> "
                    f"{100 * found.after / total:.2f} % of the score; {follow}",
                    channels=place.channels.size,
                    weights=[site.name for site, _ in place.readers],
                    share_before=round(found.before / total, 6),
                    share_after=round(found.after / total, 6),
                    **_figures(found),
                )
        channels.permute(orders)

    def _counted(self, model: Model, remarks: Remarks) -> Iterator[WeightSite]:
        """The weights that pruning will take; the others are remarked as missed, with the reason."""
        rules = PruneMagnitude(n=self.n, m=self.m, skip=self.skip)
        first, heads = first_convolutions(model), vocabulary_heads(model)
        for site in weight_sites(model, LINEARS):
            reason = rules.why_not(site, Pattern(self.n, self.m))
            nodes = {use.node for use in site.uses}
            if reason is None and nodes & first:
                reason = "is the first convolution, which is left dense"
            if reason is None and nodes & heads:
                reason = "scores the vocabulary, and is left dense"
            if reason is None and any(node.graph is not model.graph for node in nodes):
                reason = "is read inside a subgraph or function, into which channels are not followed"
            if reason is None:
                yield site
            else:
                remarks.missed(site.name, f"does not count: {reason}")

    def _is_seen(self, site: WeightSite, calibration: Calibration, remarks: Remarks) -> bool:
        reason = calibration.why_not(site)
        if reason is not None:
            remarks.missed(site.name, f"does not count: {reason}")
        return reason is None

    def _found(
        self,
        place: _Place,
        pattern: Pattern,
        norms: dict[WeightSite, np.ndarray],
        finished: FinishedSites | None,
    ) -> tuple[Found | None, float]:
        """What :meth:`_search` finds, or found in an earlier run that was interrupted."""
        if finished is None:
            return self._search(place, pattern, norms)
        asked = {
            "order of": [[site.name, finished.weight(site), where.tolist()] for site, where in place.readers],
            "norms": [norms[site].tolist() for site, _ in place.readers if site in norms],
        }
        size = place.channels.size
        if (kept := finished.get(asked)) is not None and (known := _read_found(*kept, size)) is not None:
            finished.taken += 1
            return known
        found, total = self._search(place, pattern, norms)
        if found is not None:
            row = {name: getattr(found, name) for name in ("before", "after", "rows", "attempts")}
            finished.put(asked, {**row, "total": total}, {"order": np.asarray(found.order)})
        return found, total

    def _search(
        self, place: _Place, pattern: Pattern, norms: dict[WeightSite, np.ndarray]
    ) -> tuple[Found | None, float]:
        """The best order of a place's channels and the whole score; None when a weight is not finite."""
        size = place.channels.size
        rows = [site.elements // reduction_axis(site)[1] * len(where) for site, where in place.readers]
        share = min(1.0, _MOST_SCORES / (sum(rows) * size))
        parts, total = [], 0.0
        for site, where in place.readers:
            part = scores(site, where, norms.get(site))
            if not np.isfinite(part).all():
                return None, 0.0
            total += float(part.sum(dtype=np.float64))
            parts.append(part if share == 1.0 else sampled_rows(part, max(1, int(share * len(part)))))
        found = search(
            np.concatenate(parts),
            pattern,
            exhaustive=self.search == "exhaustive",
            window=self.window // 4,
            escape_attempts=self.escape_attempts,
            seed=self.seed,
        )
        del parts
        if share < 1.0:
            # What was found on a sample counts by what it keeps of all.
            before = after = 0.0
            for site, where in place.readers:
                part = scores(site, where, norms.get(site))
                before += kept_score(part, pattern)
                after += kept_score(part, pattern, found.order)
            found = Found(found.order, before, after, found.rows, found.attempts)
        return found, max(total, float(np.finfo(np.float32).tiny))


@dataclass(eq=False)
class _Place:
    """Channels, and the weights that sum over them.

    Attributes:
        channels: they.
        readers: weights with where the channels are on the axis that is summed over, int
            ``[copies, channels]``.
        names: of all weights that sum over them, moved by them or not.
        reason: why they stay, as a phrase, or None.
    """

    channels: Dim
    readers: list[tuple[WeightSite, np.ndarray]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    reason: str | None = None

    @property
    def where(self) -> str:
        return self.names[0]

    @property
    def title(self) -> str:
        """Which channels, in words."""
        others = self.names[1:3] if len(self.names) <= 3 else self.names[1:2]
        more = len(self.names) - 1 - len(others)
        also = "".join(f", {name}" for name in others) + (f" and {more} more" if more else "")
        return f"{self.channels.size} input channels" + (f", shared with {also[2:]}" if also else "")


def _places(channels: Channels, sites: list[WeightSite], pattern: Pattern) -> list[_Place]:
    """The channels that weights sum over, in the order of their first reader."""
    found: dict[Dim, _Place] = {}
    for site in sites:
        axis, length = reduction_axis(site)
        axes = channels.axes(site.value)
        if axes is None:
            continue
        for leaf in dict.fromkeys(axes[axis].leaves()):
            if leaf.size == 1:
                continue
            place = found.setdefault(leaf, _Place(leaf, reason=leaf.reason))
            place.names.append(site.name)
            where = columns_of(axes[axis].places(leaf), axes[axis].size, length, pattern)
            if isinstance(where, str):
                place.reason = place.reason or where
            elif where is not None:
                place.readers.append((site, where))
    # What can be gained in a weight is a place of its own: the dims of heads, beside the heads, say.
    moved = {site.name for p in found.values() if p.channels.size > pattern.m for site, _ in p.readers}
    for place in list(found.values()):
        if not place.readers and place.reason is None and moved.issuperset(place.names):
            del found[place.channels]
        elif not place.readers:
            place.reason = (
                place.reason or f"fill whole groups of {pattern.m}, so that their order changes nothing"
            )
        elif place.channels.size <= pattern.m:
            place.reason = place.reason or "are one group, so that their order changes nothing"
    return list(found.values())


def _pruned_readers(model: Model, channels: Channels) -> dict[Dim, str]:
    """Channels whose order a pruned weight relies on, with the reason."""
    known, found = declared(model), {}
    for site in weight_sites(model, LINEARS):
        axes = channels.axes(site.value) if site.name in known and site.why_not is None else None
        if axes is None:
            continue
        for leaf in axes[reduction_axis(site)[0]].leaves():
            found[leaf] = (
                f"are read by '{site.name}', which is pruned to {known[site.name]} already; permute first"
            )
    return found


def _read_found(row: dict[str, Any], arrays: dict[str, np.ndarray], size: int) -> tuple[Found, float] | None:
    """What was kept of a search for an order of so many channels, or None where it is nothing of that kind."""
    order, figures = arrays.get("order"), [row.get(name) for name in ("before", "after", "total")]
    counts = [row.get(name) for name in ("rows", "attempts")]
    right = order is not None and order.shape == (size,) and order.dtype.kind == "i"
    if not right or not all(type(v) is float for v in figures) or not all(type(v) is int for v in counts):
        return None
    if order is None or not np.array_equal(np.sort(order), np.arange(size)):
        return None
    found = Found(np.array(order), row["before"], row["after"], row["rows"], row["attempts"])
    return found, row["total"]


def _figures(found: Found) -> dict[str, float | int]:
    return {
        "kept_before": found.before,
        "kept_after": found.after,
        "gain": round(found.after / found.before - 1, 6) if found.before else 0.0,
        "rows_in_table": found.rows,
        "escape_attempts": found.attempts,
    }
