"""The built-in metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from effic.ir.errors import NotMeasuredError, UsageError
from effic.metric_data import Arrays, Batch
from effic.metrics import Metric, Need, Tally
from effic.passes import near
from effic.passes.base import option


class _Mean(Tally):
    """A mean over samples."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def result(self) -> tuple[float, int, float | None, np.ndarray | None]:
        rows = np.concatenate(self.rows) if self.rows else np.zeros(0)
        if not len(rows):
            return math.nan, 0, None, None
        stderr = float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else None
        return float(rows.mean()), len(rows), stderr, rows


class _Right(_Mean):
    def __init__(self, metric: Metric, k: int) -> None:
        super().__init__()
        self.metric, self.k = metric, k

    def add(self, batch: Batch, outputs: list[Arrays], reference: list[Arrays] | None) -> None:
        logits = self.metric.logits(outputs[0])
        labels = np.asarray(batch.labels).reshape(-1)
        if len(logits) != len(labels):
            raise UsageError(
                f"{self.metric.name}: {len(logits)} rows of class scores for {len(labels)} labels; "
                f"name another output with {self.metric.name}{{output=NAME}}"
            )
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise UsageError(
                f"{self.metric.name}: the data hold the label {wrong}, and the model has "
                f"{logits.shape[1]} classes, counted from 0"
            )
        own = logits[np.arange(len(labels)), labels]
        # A class with the same score counts as ahead when its number is lower, as argmax has it; a row
        # with NaN is wrong.
        ahead = (logits > own[:, None]).sum(1)
        ahead += ((logits == own[:, None]) & (np.arange(logits.shape[1]) < labels[:, None])).sum(1)
        self.rows.append(((ahead < self.k) & ~np.isnan(logits).any(1)).astype(np.float64))


@dataclass(frozen=True)
class Top1(Metric):
    """Share of samples whose largest class score is the label's."""

    name: ClassVar[str] = "top1"
    needs: ClassVar[Need] = "labels"

    def tally(self) -> Tally:
        return _Right(self, 1)


@dataclass(frozen=True)
class Top5(Metric):
    """Share of samples whose label is among the five largest class scores."""

    name: ClassVar[str] = "top5"
    needs: ClassVar[Need] = "labels"

    def tally(self) -> Tally:
        return _Right(self, 5)


class _Likelihood(_Mean):
    def __init__(self, metric: Perplexity) -> None:
        super().__init__()
        self.metric = metric

    def add(self, batch: Batch, outputs: list[Arrays], reference: list[Arrays] | None) -> None:
        ids = _ids(batch.cut(dict(batch.feeds[0])), self.metric.ids)
        logits = self.metric.chosen(outputs[0])
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise UsageError(
                f"perplexity: the output has the shape {list(logits.shape)} for ids of shape {list(ids.shape)}; it "
                "needs [batch, sequence, vocabulary]: name it with perplexity{output=NAME}"
            )
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= logits.shape[2]:
            raise UsageError(f"perplexity: the data hold ids beyond the {logits.shape[2]} words of the model")
        mask = batch.cut(dict(batch.feeds[0])).get("attention_mask")
        for row in range(len(ids)):
            scores = np.asarray(logits[row, :-1], np.float64)
            top = scores.max(-1, keepdims=True)
            norm = np.log(np.exp(scores - top).sum(-1)) + top[:, 0]
            losses = norm - scores[np.arange(len(scores)), ids[row, 1:]]
            kept = np.ones(len(losses), bool) if mask is None else np.asarray(mask[row, 1:]) != 0
            self.rows.append(losses[kept])

    def result(self) -> tuple[float, int, float | None, np.ndarray | None]:
        loss, count, stderr, rows = super().result()
        value = math.exp(loss) if loss < 700 else math.inf
        return value, count, None if stderr is None else value * stderr, rows


@dataclass(frozen=True)
class Perplexity(Metric):
    """Exponential of the mean negative log-likelihood of each next token.

    Positions whose attention_mask is 0 do not count.
    """

    name: ClassVar[str] = "perplexity"
    needs: ClassVar[Need] = "tokens"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "%"

    ids: str = option("", help="the input that holds the ids; input_ids, or the first of integers by default")

    def tally(self) -> Tally:
        return _Likelihood(self)


def _ids(feed: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name and name not in feed:
        raise UsageError(f"perplexity: the model has no input '{name}' (inputs: {', '.join(feed)})")
    found = feed.get(name or "input_ids")
    if found is None:
        found = next((a for a in feed.values() if a.dtype.kind in "iu" and a.ndim == 2), None)
    if found is None or found.ndim != 2:
        raise UsageError("perplexity: the model takes no row of token ids; name the input with {ids=NAME}")
    return found.astype(np.int64)


class _Ranks(Tally):
    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.similarity: list[np.ndarray] = []
        self.gold: list[np.ndarray] = []

    def add(self, batch: Batch, outputs: list[Arrays], reference: list[Arrays] | None) -> None:
        vectors = [
            self._pooled(self.metric.chosen(found), batch.cut(dict(feed)))
            for feed, found in zip(batch.feeds, outputs, strict=True)
        ]
        unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in vectors]
        self.similarity.append((unit[0] * unit[1]).sum(1))
        self.gold.append(np.asarray(batch.labels, np.float64).reshape(-1))

    def _pooled(self, found: np.ndarray, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        found = np.asarray(found, np.float64)
        if found.ndim == 2:
            return found
        if found.ndim != 3:
            raise UsageError(
                f"spearman: the output has the shape {list(found.shape)}; it needs embeddings [batch, width] or "
                "hidden states [batch, sequence, width]: name it with spearman{output=NAME}"
            )
        mask = feed.get("attention_mask")
        keep = np.ones(found.shape[:2]) if mask is None else np.asarray(mask, np.float64)
        return np.asarray((found * keep[..., None]).sum(1) / np.maximum(keep.sum(1, keepdims=True), 1e-12))

    def result(self) -> tuple[float, int, float | None, np.ndarray | None]:
        if not self.gold:
            return math.nan, 0, None, None
        from scipy.stats import spearmanr

        similarity, gold = np.concatenate(self.similarity), np.concatenate(self.gold)
        if not np.isfinite(similarity).all():
            return math.nan, len(gold), None, None
        rho = float(spearmanr(similarity, gold).statistic)
        # Bonett and Wright 2000, equation 3.
        spread = math.sqrt((1 + rho * rho / 2) / (len(gold) - 3)) * (1 - rho * rho) if len(gold) > 3 else None
        return rho, len(gold), spread, None


@dataclass(frozen=True)
class Spearman(Metric):
    """Rank correlation of the cosine of two sentences' embeddings with the score given for the pair.

    Hidden states ``[batch, sequence, width]`` are averaged over the positions of the attention_mask.
    """

    name: ClassVar[str] = "spearman"
    needs: ClassVar[Need] = "pairs"

    def tally(self) -> Tally:
        return _Ranks(self)


class _Agreement(_Mean):
    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def add(self, batch: Batch, outputs: list[Arrays], reference: list[Arrays] | None) -> None:
        for found, wanted in zip(outputs, reference or [], strict=True):
            mine, theirs = self.metric.logits(found), self.metric.logits(wanted)
            _same_shape(self.metric, mine, theirs)
            same = (mine.argmax(1) == theirs.argmax(1)) & ~np.isnan(mine).any(1)
            self.rows.append(same.astype(np.float64))


@dataclass(frozen=True)
class Agreement(Metric):
    """Share of rows whose largest entry is the reference model's."""

    name: ClassVar[str] = "agreement"
    needs: ClassVar[Need] = "reference"

    def tally(self) -> Tally:
        return _Agreement(self)


class _Distance(Tally):
    """Sums from which SQNR, cosine and the largest difference follow; over all outputs unless one is named."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.signal = self.noise = self.own = self.dot = self.largest = 0.0
        self.count = 0

    def add(self, batch: Batch, outputs: list[Arrays], reference: list[Arrays] | None) -> None:
        self.count += batch.count
        for found, wanted in zip(outputs, reference or [], strict=True):
            for name in [self.metric.output] if self.metric.output else list(wanted):
                a = np.asarray(self._named(found, name), np.float64)
                b = np.asarray(self._named(wanted, name), np.float64)
                _same_shape(self.metric, a, b)
                # Where the reference itself is infinite or no number there is nothing to be near to.
                kept = np.isfinite(b)
                a, b = a[kept], b[kept]
                difference = a - b
                self.signal += float(np.square(b).sum())
                self.own += float(np.square(a).sum())
                self.noise += float(np.square(difference).sum())
                self.dot += float((a * b).sum())
                if difference.size:
                    # np.maximum keeps NaN, max() may not.
                    self.largest = float(np.maximum(self.largest, np.abs(difference).max()))

    def _named(self, outputs: Arrays, name: str) -> np.ndarray:
        if name not in outputs:
            raise UsageError(
                f"{self.metric.name}: a model has no output '{name}'{near(name, list(outputs))} "
                f"(outputs: {', '.join(outputs)})"
            )
        return outputs[name]

    def result(self) -> tuple[float, int, float | None, np.ndarray | None]:
        value = self.largest
        if self.metric.name != "max_abs":
            value = self._sqnr() if self.metric.name == "sqnr" else self._cosine()
        return value, self.count, None, None

    def _sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or math.isnan(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise) if math.isfinite(self.noise) else -math.inf

    def _cosine(self) -> float:
        if self.noise == 0:
            return 1.0
        norm = math.sqrt(self.signal) * math.sqrt(self.own)
        return self.dot / norm if norm else 0.0


@dataclass(frozen=True)
class SQNR(Metric):
    """Signal-to-noise ratio in dB against the reference model, over all outputs."""

    name: ClassVar[str] = "sqnr"
    needs: ClassVar[Need] = "reference"
    unit: ClassVar[str] = "dB"

    def tally(self) -> Tally:
        return _Distance(self)

    def drop(self, before: float, after: float) -> float:
        raise _no_drop(self)


@dataclass(frozen=True)
class Cosine(Metric):
    """Cosine of the outputs with the reference model's, all of them as one long vector."""

    name: ClassVar[str] = "cosine"
    needs: ClassVar[Need] = "reference"

    def tally(self) -> Tally:
        return _Distance(self)


@dataclass(frozen=True)
class MaxAbs(Metric):
    """Largest absolute difference from the reference model's outputs."""

    name: ClassVar[str] = "max_abs"
    needs: ClassVar[Need] = "reference"
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "absolute"

    def tally(self) -> Tally:
        return _Distance(self)

    def drop(self, before: float, after: float) -> float:
        raise _no_drop(self)


def _no_drop(metric: Metric) -> UsageError:
    return UsageError(
        f"{metric.name} has no drop: the original model is at the best there is; bound the score itself"
    )


def _same_shape(metric: Metric, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise NotMeasuredError(
            f"{metric.name}: the outputs have the shape {list(a.shape)} and the reference's {list(b.shape)}, so "
            "they cannot be compared"
        )
