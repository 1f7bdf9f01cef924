"""Which order of columns lets N:M pruning keep most: the search behind permute-channels.

Only which columns share a group of ``m`` matters, so what is searched for is a partition of the columns
into groups. As in the reference (ASP's permutation search, Pool and Yu, NeurIPS 2021): a table holds the
gain of the best rearrangement of every pair of groups; the best entries that do not overlap are carried
out, the pairs they touched are computed anew, and so on until no gain is left. Then random disturbances
("escape attempts") are tried, the best result is kept.

The table is exact for small matrices. For larger ones it holds the gain of the best *single swap* of two
columns, on a sample of the rows; the pairs it points to are then solved on all rows.

Rows and columns are first put into an order that depends on what they hold alone. The result, and with
it a second run's, does not depend on the order they came in.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from effic.ir.sparsity import Pattern

MIN_GAIN, MIN_SHARE = 1e-4, 1e-6
"""Least gain of a step: in units of the mean score of a weight (the reference's threshold), and as a
share of all scores. The latter spares large matrices hundreds of steps that are worth nothing."""

# Groups of more columns than this have too many rearrangements in a pair to try them all.
_LARGEST_SOLVED = 6
# Partitions of a window of three groups that are still tried one by one (three groups of four).
_MOST_PARTITIONS = 5775
# Work that is spent, in multiplications' worth of array arithmetic: on a whole table of pairs, on a table
# of swaps, on windows of three groups, and on all escape attempts together: about a second each, and a
# third of one for the last. Each round of windows counts for some more, for its hundreds of small calls.
_PAIR_WORK, _SWAP_WORK, _TRIPLE_WORK, _ESCAPE_WORK = 1.5e9, 1.5e8, 2e9, 3e8
_CALLS = 2e6
# Steps on a sampled table end when the last ten rounds together gained less than this share.
_PATIENCE, _LATE_SHARE = 10, 1e-4
# The least rows a table is made of.
_MIN_ROWS = 64
# Array elements worked on at a time; so many floats stay in the second-level cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class Found:
    """An order of columns.

    Attributes:
        order: int ``[C]``: the column that comes to each place.
        before: score kept by pruning the columns as they are.
        after: the same in the new order; never less.
        rows: rows the table of gains was made of, all or a sample.
        attempts: escape attempts made; fewer than asked for where they take long.
    """

    order: np.ndarray
    before: float
    after: float
    rows: int
    attempts: int


def kept_score(score: np.ndarray, pattern: Pattern, order: np.ndarray | None = None) -> float:
    """Sum of the ``n`` largest scores of every ``m``, in an order of the columns.

    Args:
        score: at least 0, ``[R, C]``; groups run along C, the last may be short.
        pattern: what is kept.
        order: int ``[C]``, the column that comes to each place.
    """
    rows, columns = score.shape
    width = -(-columns // pattern.m) * pattern.m
    step, kept = max(1, _PIECE // max(1, width)), 0.0
    for start in range(0, rows, step):
        piece = score[start : start + step]
        piece = piece if order is None else piece[:, order]
        groups = np.pad(piece, ((0, 0), (0, width - columns))).reshape(-1, pattern.m)
        largest = np.partition(groups, pattern.m - pattern.n, axis=1)[:, pattern.m - pattern.n :]
        kept += float(largest.sum(dtype=np.float64))
    return kept


def search(
    score: np.ndarray,
    pattern: Pattern,
    *,
    exhaustive: bool = True,
    window: int = 2,
    escape_attempts: int = 100,
    seed: int = 0,
) -> Found:
    """An order of the columns with which N:M pruning keeps more.

    Args:
        score: finite and at least 0, ``[R, C]``: a column per channel, a row per vector that groups run
            along.
        pattern: what pruning keeps.
        exhaustive: try all rearrangements of a window; else only swaps of two columns. Groups of more
            than six columns have too many, and are always swapped.
        window: groups in a window, 2 or 3. Three are tried once pairs gain nothing, all of them or as
            many drawn at random as a second allows, and only where all their partitions can be tried.
        escape_attempts: random disturbances to try.
        seed: of what is random.

    Returns:
        The best order found; the present one where none is better.
    """
    rows, columns = score.shape
    before = kept_score(score, pattern)
    stay = Found(np.arange(columns), before, before, 0, 0)
    if columns <= pattern.m or not rows or not before > 0:
        return stay
    row_keys, column_keys = content_keys(score, 1), content_keys(score, 0)
    by_row, by_column = np.lexsort(row_keys), np.lexsort(column_keys)
    height = -(-columns // pattern.m) * pattern.m
    table = np.zeros((height, rows), np.float32)
    table[:columns] = score[np.ix_(by_row, by_column)].T
    table /= table[:columns].mean(dtype=np.float64)
    state = _State(table, columns, pattern, exhaustive, window, seed)
    # From an order that spreads large columns over the groups. It does not depend on the present one, so
    # that a run on the search's own result comes to the same end and finds no gain.
    best, kept = state.converge(_spread(columns, pattern.m))
    best, kept, attempts = state.escape(best, kept, escape_attempts)
    place = np.empty(columns, int)
    place[by_column] = np.arange(columns)
    now = np.concatenate([place, np.arange(columns, height)]).reshape(-1, pattern.m)
    if kept < state.keeps(now) - state.least:
        # The present order is better already: uphill from there.
        best, _ = state.converge(now)
    order = by_column[_ordered(best, columns).reshape(-1)[:columns]]
    # Groups in the order of their first column, the short one last.
    full = columns // pattern.m * pattern.m
    groups = np.sort(order[:full].reshape(-1, pattern.m), axis=1)
    order = np.concatenate([groups[np.argsort(groups[:, 0])].reshape(-1), np.sort(order[full:])])
    after = kept_score(score, pattern, order)
    if after <= before:
        return stay
    return Found(order, before, after, state.rows, attempts)


def content_keys(score: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sums along an axis that are the same, to the bit, in any order of summation."""
    largest = score.max()
    first, second = (np.zeros(score.shape[1 - axis], np.int64) for _ in range(2))
    step = max(1, _PIECE // max(1, score.shape[1]))
    for start in range(0, len(score), step):
        fixed = np.rint(score[start : start + step] / largest * 2.0**30).astype(np.int64)
        squares = (fixed >> 10) ** 2
        if axis == 0:
            first += fixed.sum(0)
            second += squares.sum(0)
        else:
            first[start : start + step], second[start : start + step] = fixed.sum(1), squares.sum(1)
    return second, first


def _spread(columns: int, m: int) -> np.ndarray:
    """Columns, sorted by size, dealt out to the groups; ``[G, m]``."""
    full = columns // m
    groups = np.arange(full * m).reshape(m, full).T
    if columns % m:
        last = np.arange(full * m, (full + 1) * m)[None]
        groups = np.concatenate([groups, last])
    return groups


def _ordered(groups: np.ndarray, columns: int) -> np.ndarray:
    """The same partition, columns sorted in groups and groups by their first, the one filled up last."""
    groups = np.sort(groups, axis=1)
    return groups[np.lexsort((groups[:, 0], (groups >= columns).any(axis=1)))]


class _State:
    """The matrix with its columns as rows, and the table of gains.

    Columns that fill up the last group are zeros, and never leave it.
    """

    def __init__(
        self, table: np.ndarray, columns: int, pattern: Pattern, exhaustive: bool, window: int, seed: int
    ) -> None:
        self.table, self.columns, self.pattern, self.seed = table, columns, pattern, seed
        self.m, self.n = pattern.m, pattern.n
        self.count = len(table) // self.m
        self.solve = exhaustive and self.m <= _LARGEST_SOLVED
        rows = table.shape[1]
        pairs = self.count * (self.count - 1) // 2
        self.whole = self.solve and pairs * rows * _cost(2, self.m) <= _PAIR_WORK
        self.triples = self.solve and window == 3 and self.count >= 3 and solves_triples(self.m)
        self.rows = rows if self.whole else min(rows, max(_MIN_ROWS, int(_SWAP_WORK / len(table) ** 2)))
        # Rows are sorted by size, so that evenly spread ones are a fair sample.
        sample = np.linspace(0, rows - 1, self.rows).round().astype(int)
        self.sample = table if self.rows == rows else np.ascontiguousarray(table[:, sample])
        self.scale = rows / self.rows
        self.least = max(MIN_GAIN, MIN_SHARE * rows * columns)
        self.work = 0.0

    def keeps(self, groups: np.ndarray) -> float:
        """Score kept by groups."""
        return float(self._kept(self.table, groups).sum())

    def _kept(self, table: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Score that each group keeps of a table's rows."""
        kept = np.zeros(len(groups))
        for start in range(0, len(groups), step := max(1, _PIECE // table.shape[1])):
            block = table[groups[start : start + step]]
            kept[start : start + step] = _subset_scores(block, self.m, self.n)[:, 0]
        return kept

    # -- climbing --------------------------------------------------------------------------------

    def converge(self, groups: np.ndarray) -> tuple[np.ndarray, float]:
        """Carry out what gains until nothing does; the groups and the score they keep."""
        groups = _ordered(groups, self.columns)
        self._start(groups)
        while True:
            self._climb(groups)
            if not self.triples or not self._rearrange_triples(groups):
                return groups, float(self.kept.sum())

    def escape(self, groups: np.ndarray, kept: float, attempts: int) -> tuple[np.ndarray, float, int]:
        """Disturb two groups at random and climb again, and keep what is better, so many times.

        It goes on where :meth:`converge` ended, with the groups and the score that came out of it.
        """
        full = self.columns // self.m
        if full < 2 or self.count <= 2:
            # With two groups every rearrangement has been tried.
            return groups, kept, 0
        rng = np.random.default_rng(self.seed)
        groups, self.work, made = groups.copy(), 0.0, 0
        while made < attempts and self.work <= _ESCAPE_WORK:
            made += 1
            saved = groups.copy()
            pair = rng.choice(full, 2, replace=False)
            groups[pair] = rng.permutation(groups[pair].reshape(-1)).reshape(2, -1)
            self._update(groups, pair)
            self._climb(groups)
            now = float(self.kept.sum())
            if now > kept + self.least:
                kept = now
                continue
            touched = np.flatnonzero((groups != saved).any(axis=1))
            groups[:] = saved
            if len(touched):
                self._update(groups, touched)
        if self.triples:
            groups, kept = self.converge(groups)
        return groups, kept, made

    def _climb(self, groups: np.ndarray) -> None:
        recent = deque([math.inf], _PATIENCE)
        # Where the table is of a sample, most of its last entries are chance: that is when to stop.
        while self.whole or sum(recent) > _LATE_SHARE * self.kept.sum():
            chosen = self._best_pairs()
            if not len(chosen):
                return
            solved = self._solve(groups, chosen) if self.solve else self._swap(groups, chosen)
            gains = solved[1] - self.kept[chosen].sum(axis=1)
            good = gains > self.least
            groups[chosen[good]] = solved[0][good]
            self.failed[chosen[~good, 0], chosen[~good, 1]] = True
            recent.append(float(gains[good].sum()))
            if good.any():
                self._update(groups, chosen[good].reshape(-1))

    def _best_pairs(self) -> np.ndarray:
        """Pairs of groups with a gain, best first, no group twice; ``[P, 2]``, first group lower."""
        gains = np.where(self.failed, 0.0, self.gains)
        first, second = np.nonzero(gains > self.least)
        chosen, taken = [], np.zeros(self.count, bool)
        for index in np.argsort(-gains[first, second], kind="stable"):
            g, h = first[index], second[index]
            if not taken[g] and not taken[h]:
                taken[g] = taken[h] = True
                chosen.append((g, h))
        return np.array(chosen, int).reshape(-1, 2)

    # -- the table -------------------------------------------------------------------------------

    def _start(self, groups: np.ndarray) -> None:
        self.kept = np.zeros(self.count)
        self.gains = np.zeros((self.count, self.count))
        self.failed = np.zeros((self.count, self.count), bool)
        if not self.whole:
            # What a group keeps of the sample once a column has gone and another has come.
            self.exchanged = np.zeros((len(self.table), len(self.table)), np.float32)
            self.seen = np.zeros(self.count)
        self._update(groups, np.arange(self.count))

    def _update(self, groups: np.ndarray, touched: np.ndarray) -> None:
        """Compute anew what depends on some groups."""
        self.kept[touched] = self._kept(self.table, groups[touched])
        self.failed[touched] = self.failed[:, touched] = False
        if self.whole:
            mask = np.zeros((self.count, self.count), bool)
            mask[touched] = mask[:, touched] = True
            pairs = np.argwhere(np.triu(mask, 1))
            best = self._solve(groups, pairs)[1]
            self.gains[pairs[:, 0], pairs[:, 1]] = best - self.kept[pairs].sum(axis=1)
            return
        for group in touched:
            self._exchange(groups[group])
        self.seen[touched] = self._kept(self.sample, groups[touched])
        flat, mine = groups.reshape(-1), groups[touched].reshape(-1)
        gains = self.exchanged[np.ix_(mine, flat)].astype(np.float64) + self.exchanged[np.ix_(flat, mine)].T
        gains[mine >= self.columns] = gains[:, flat >= self.columns] = -np.inf
        best = gains.reshape(len(touched), self.m, self.count, self.m).max(axis=(1, 3))
        best = (best - self.seen[touched][:, None] - self.seen) * self.scale
        self.gains[touched] = best
        self.gains[:, touched] = best.T
        # A pair is listed once, the lower group first.
        self.gains[np.tril_indices(self.count)] = 0.0
        self.work += gains.size * 8

    def _exchange(self, group: np.ndarray) -> None:
        """A group's rows of the table of exchanges."""
        for place, column in enumerate(group):
            left = np.sort(self.sample[np.delete(group, place)], axis=0)
            fixed = float(left[self.m - self.n :].sum(dtype=np.float64))
            least = left[self.m - self.n - 1]
            step = max(1, _PIECE // self.rows)
            for start in range(0, len(self.sample), step):
                larger = np.maximum(self.sample[start : start + step], least)
                self.exchanged[column, start : start + step] = larger.sum(axis=1) + fixed
        self.work += 2.0 * self.m * self.sample.size

    # -- windows ---------------------------------------------------------------------------------

    def _solve(self, groups: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best rearrangement of windows of groups, on all rows.

        Args:
            groups: ``[G, m]``.
            windows: numbers of the groups in each, ``[P, w]``, the one that is filled up last.

        Returns:
            The groups ``[P, w, m]`` and what they keep together ``[P]``.
        """
        width = windows.shape[1]
        parts = _splits(width, self.m)
        members = groups[windows].reshape(len(windows), -1)
        result, kept = np.empty((len(windows), width, self.m), int), np.zeros(len(windows))
        subsets = np.array(list(itertools.combinations(range(width * self.m), self.m)))
        # Fillers, which are the last places of the last group, stay together.
        fillers = len(self.table) - self.columns
        apart = (subsets[parts] >= width * self.m - fillers).sum(axis=2).max(axis=1) < fillers
        step = max(1, _PIECE // self.table.shape[1])
        for start in range(0, len(windows), step):
            cut = slice(start, start + step)
            scores = _subset_scores(self.table[members[cut]], self.m, self.n)
            totals = sum((scores[:, parts[:, place]] for place in range(width)), np.zeros(1))
            if fillers:
                totals[np.ix_(windows[cut][:, -1] == self.count - 1, apart)] = -np.inf
            best = totals.argmax(axis=1)
            kept[cut] = totals[np.arange(len(best)), best]
            where = subsets[parts[best]]
            result[cut] = np.take_along_axis(members[cut], where.reshape(len(best), -1), axis=1).reshape(
                len(best), width, self.m
            )
        # The group with the fillers stays the last.
        last = (result >= self.columns).any(axis=2).argsort(axis=1, kind="stable")
        result = np.take_along_axis(result, last[:, :, None], axis=1)
        self.work += _CALLS + len(windows) * self.table.shape[1] * _cost(width, self.m)
        return result, kept

    def _swap(self, groups: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best swap of two columns in each pair of groups, by the table; kept on all rows."""
        result = groups[chosen]
        for number, (g, h) in enumerate(chosen):
            into = self.exchanged[np.ix_(groups[g], groups[h])]
            back = self.exchanged[np.ix_(groups[h], groups[g])].T
            gains = into.astype(np.float64) + back
            gains[groups[g] >= self.columns] = gains[:, groups[h] >= self.columns] = -np.inf
            i, j = np.unravel_index(int(gains.argmax()), gains.shape)
            result[number, 0, i], result[number, 1, j] = groups[h][j], groups[g][i]
        return result, self._kept(self.table, result.reshape(-1, self.m)).reshape(-1, 2).sum(axis=1)

    def _rearrange_triples(self, groups: np.ndarray) -> bool:
        """Solve windows of three groups, all or some; whether one of them gained."""
        groups[:] = _ordered(groups, self.columns)
        self._start(groups)
        most = max(1, int(_TRIPLE_WORK / (self.table.shape[1] * _cost(3, self.m))))
        if math.comb(self.count, 3) <= most:
            windows = np.array(list(itertools.combinations(range(self.count), 3)))
        else:
            rng = np.random.default_rng(self.seed)
            drawn = (np.sort(rng.choice(self.count, 3, replace=False)) for _ in range(most))
            windows = np.unique(np.array(list(drawn)), axis=0)
        solved, kept = self._solve(groups, windows)
        gains = kept - self.kept[windows].sum(axis=1)
        touched: set[int] = set()
        for index in np.argsort(-gains, kind="stable"):
            if gains[index] <= self.least:
                break
            if touched.isdisjoint(windows[index].tolist()):
                touched.update(windows[index].tolist())
                groups[windows[index]] = solved[index]
        if touched:
            self._update(groups, np.array(sorted(touched)))
        return bool(touched)


def _subset_scores(block: np.ndarray, m: int, n: int) -> np.ndarray:
    """What every choice of ``m`` columns keeps.

    Args:
        block: ``[P, k, R]``: k columns each of P windows.
        m: columns of a choice.
        n: scores kept of each row.

    Returns:
        float64 ``[P, comb(k, m)]``, in the order of ``itertools.combinations``.
    """
    count = block.shape[1]
    out: list[np.ndarray] = []

    def choose(first: int, left: int, top: Sequence[np.ndarray]) -> None:
        # ``top``: the n largest scores of the columns chosen so far, largest first.
        for column in range(first, count - left + 1):
            x = block[:, column]
            if left == 1 and n <= 2:
                kept = np.maximum(top[-1], x)
                out.append((kept if n == 1 else kept + top[0]).sum(axis=1))
                continue
            merged = []
            for score in top:
                merged.append(np.maximum(score, x))
                x = np.minimum(score, x)
            if len(merged) < n:
                merged.append(x)
            if left == 1:
                # Largest first: the rounding must not depend on the order of the columns.
                out.append(sum(merged[1:], merged[0]).sum(axis=1))
            else:
                choose(column + 1, left - 1, merged)

    choose(0, m, ())
    return np.stack(out, axis=1).astype(np.float64)


@cache
def _splits(width: int, m: int) -> np.ndarray:
    """Every partition of ``width`` groups of ``m`` columns, as numbers of subsets; ``[S, width]``."""
    columns = width * m
    number = {subset: i for i, subset in enumerate(itertools.combinations(range(columns), m))}

    def cut(left: tuple[int, ...]) -> list[list[int]]:
        if not left:
            return [[]]
        result = []
        for rest in itertools.combinations(left[1:], m - 1):
            subset = (left[0], *rest)
            after = tuple(c for c in left if c not in subset)
            result += [[number[subset], *more] for more in cut(after)]
        return result

    # The present partition first: of equal ones it stays.
    found = cut(tuple(range(columns)))
    present = [number[tuple(range(g * m, (g + 1) * m))] for g in range(width)]
    found.sort(key=lambda parts: parts != present)
    return np.array(found)


def _cost(width: int, m: int) -> float:
    """Array operations per row to solve a window."""
    return 4.0 * sum(math.comb(width * m, size) for size in range(1, m + 1))


def solves_triples(m: int) -> bool:
    """Whether windows of three groups of ``m`` are ever solved: larger groups have too many rearrangements."""
    return _partitions(3, m) <= _MOST_PARTITIONS


def _partitions(width: int, m: int) -> int:
    """Ways to cut ``width·m`` columns into groups of ``m``."""
    return math.factorial(width * m) // (int(math.factorial(m) ** width) * math.factorial(width))
