"""Scaled dot-product attention of all heads in one kernel: scores, softmax and values stay in the cache.

One piece of work is one head. Its keys are first copied transposed into the thread's own buffer
``[head_dim, keys]``, so that a score is a sum over contiguous vectors. Then, for 4 queries at a time: their
scores against all keys (a register tile of 4 by 2 vectors), the softmax of each row, and the weighted sum of
the values (4 by up to 4 vectors). The scores of 4 queries are the only intermediate: ``16 · keys`` bytes
instead of ``4 · heads · queries · keys``.

Roofline: ``4 · queries · keys · head_dim`` flops per head and one exp per score, against the bytes of q, k,
v and y once. Arithmetic limits from a few queries on; with one query the bytes of k and v do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels import vector_math
from effic.backends.tvm.kernels.lanes import (
    LANES,
    MIN_PARALLEL_FLOPS,
    argument,
    function,
    loop,
    spec_name,
)
from effic.backends.tvm.kernels.rows import fold, indices, keep, partials, walk, wide

_LOWEST = float("-inf")

_ROWS = 4
"""Queries of one register tile."""

_VALUES = 4
"""Vectors of values of one register tile."""


@dataclass(frozen=True)
class Attention:
    """``y[b, h] = softmax(scale * q[b, h] @ k[b, g].T + mask) @ v[b, g]`` in fp32, ``g = h * kv_heads // heads``.

    Attributes:
        batch: None: known at run time only.
        heads, kv_heads: query heads, and heads of keys and values; the first is a multiple of the second.
        queries, keys, head_dim: sizes of one head.
        mask: ``additive``: a fourth argument ``[mask_batch, mask_heads, mask_queries, keys]`` is added to the
            scaled scores; each of its first three sizes is that of the scores or 1.
        mask_shape: those three sizes; a batch of 0 stands for the batch that is not known.
        causal: query i sees keys up to ``i + keys - queries``.
        scale: factor of the scores.
    """

    batch: int | None
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    mask: Literal["none", "additive"] = "none"
    mask_shape: tuple[int, int, int] = (1, 1, 1)
    causal: bool = False
    scale: float = 1.0

    @property
    def name(self) -> str:
        """The name of the function."""
        return spec_name("attention", self)

    def why_not(self) -> str | None:
        """What the family cannot hold, as a sentence."""
        sizes = (self.heads, self.kv_heads, self.queries, self.keys, self.head_dim)
        if min(sizes) < 1 or (self.batch is not None and self.batch < 1):
            return "an attention of no elements"
        if self.heads % self.kv_heads:
            return f"{self.heads} heads do not share {self.kv_heads} heads of keys evenly"
        if self.causal and self.keys < self.queries:
            return f"{self.queries} queries with {self.keys} keys leave the first queries nothing to see"
        if self.mask == "additive":
            full = (self.batch or 0, self.heads, self.queries)
            if any(have not in (1, want) for have, want in zip(self.mask_shape, full, strict=True)):
                return f"a mask of {self.mask_shape} does not fit scores of {full}"
        return None

    def prim_func(self, cpu: Cpu) -> Any:
        """``(q, k, v, [mask], y)``; q and y ``[batch, heads, queries, head_dim]``, k and v
        ``[batch, kv_heads, keys, head_dim]``."""
        result: list[Any] = []
        with function(self.name, result) as T:
            batch = T.int64() if self.batch is None else self.batch
            q = argument(T, "q", (batch, self.heads, self.queries, self.head_dim))
            k = argument(T, "k", (batch, self.kv_heads, self.keys, self.head_dim))
            v = argument(T, "v", (batch, self.kv_heads, self.keys, self.head_dim))
            mask = None
            if self.mask == "additive":
                first, *others = self.mask_shape
                mask = argument(T, "mask", (batch if first == 0 else first, *others, self.keys))
            y = argument(T, "y", (batch, self.heads, self.queries, self.head_dim))
            flops = 4 * (self.batch or 1) * self.heads * self.queries * self.keys * self.head_dim
            parallel = cpu.cores > 1 and (self.batch is None or flops >= MIN_PARALLEL_FLOPS)
            with loop(T, batch * self.heads, parallel) as piece:
                _Head(T, self, (q, k, v, mask, y), piece // self.heads, piece % self.heads).run()
        return result[0]


class _Head:
    """The statements of one head."""

    def __init__(self, T: Any, spec: Attention, buffers: Sequence[Any], b: Any, h: Any) -> None:
        self.T, self.spec = T, spec
        self.q, self.k, self.v, self.mask, self.y = buffers
        self.b, self.h = b, h
        self.g = h // (spec.heads // spec.kv_heads)
        self.padded = -(-spec.keys // LANES) * LANES

    def run(self) -> None:
        """All queries of the head."""
        T, spec = self.T, self.spec
        scores = T.alloc_buffer((_ROWS, self.padded), "float32", scope="global")
        turned = None
        if spec.queries >= _ROWS:
            turned = T.alloc_buffer((spec.head_dim, self.padded), "float32", scope="global")
            self._turn(turned)
        whole, rest = divmod(spec.queries, _ROWS)
        with T.serial(whole) as block:
            self._block(turned, scores, block * _ROWS, _ROWS)
        if rest:
            self._block(turned, scores, whole * _ROWS, rest)

    def _turn(self, turned: Any) -> None:
        """Keys as ``[head_dim, padded]``: 16 keys at a time, so that both sides use whole lines."""
        # One vector is 16 loads of one float; the lines they come from stay for the next 16 d.
        T, spec = self.T, self.spec
        whole, rest = divmod(spec.keys, LANES)
        with T.serial(whole) as block, T.serial(spec.head_dim) as d, T.vectorized(LANES) as lane:
            T.buffer_store(turned, self.k[self.b, self.g, block * LANES + lane, d], [d, block * LANES + lane])
        if rest:
            with T.serial(spec.head_dim) as d:
                T.buffer_store(turned, wide(T, 0.0, LANES), [d, indices(T, whole * LANES, LANES)])
                with T.serial(rest) as lane:
                    at = whole * LANES + lane
                    T.buffer_store(turned, self.k[self.b, self.g, at, d], [d, at])

    def _block(self, turned: Any, scores: Any, first: Any, rows: int) -> None:
        """``rows`` queries from ``first`` on."""
        T, spec = self.T, self.spec
        vectors = self.padded // LANES
        seen = self._seen(first + rows - 1)
        if turned is None:
            self._scores_of_few(scores, first, rows, seen)
        elif spec.causal:
            # Whole vectors up to the last key that one of these queries sees.
            with T.serial((seen + LANES - 1) // LANES) as block:
                self._scores(turned, scores, first, rows, block * LANES, 1)
        else:
            with T.serial(vectors // 2) as block:
                self._scores(turned, scores, first, rows, block * (2 * LANES), 2)
            if vectors % 2:
                self._scores(turned, scores, first, rows, (vectors - 1) * LANES, 1)
        factors = []
        for row in range(rows):
            factors.append(self._softmax(scores, first + row, row, seen))
        self._values(scores, first, rows, factors, seen)

    def _seen(self, query: Any) -> Any:
        """How many keys a query sees."""
        spec = self.spec
        return query + (spec.keys - spec.queries + 1) if spec.causal else spec.keys

    def _scores(self, turned: Any, scores: Any, first: Any, rows: int, start: Any, count: int) -> None:
        T, spec = self.T, self.spec
        sums = partials(T, rows * count, 0.0)
        with T.serial(spec.head_dim) as d:
            for row in range(rows):
                query = wide(T, self.q[self.b, self.h, first + row, d], LANES)
                for column in range(count):
                    at = indices(T, (row * count + column) * LANES, LANES)
                    keys = turned[d, indices(T, start + column * LANES, LANES)]
                    T.buffer_store(sums, sums[at] + query * keys, [at])
        for row in range(rows):
            for column in range(count):
                at = indices(T, (row * count + column) * LANES, LANES)
                value = sums[at] * wide(T, spec.scale, LANES)
                T.buffer_store(scores, value, [row, indices(T, start + column * LANES, LANES)])

    def _scores_of_few(self, scores: Any, first: Any, rows: int, seen: Any) -> None:
        """Scores without a transposed copy, which would cost more than it saves: one sum over lanes each."""
        T, spec = self.T, self.spec
        slots = min(_VALUES, -(-spec.head_dim // LANES))
        with T.serial(seen) as key:
            for row in range(rows):
                sums = partials(T, slots, 0.0)

                def step(slot: int, start: Any, width: int, row: int = row, sums: Any = sums) -> None:
                    at, here = indices(T, slot * LANES, width), indices(T, start, width)
                    product = self.q[self.b, self.h, first + row, here] * self.k[self.b, self.g, key, here]
                    T.buffer_store(sums, sums[at] + product, [at])

                walk(T, spec.head_dim, slots, step)
                total = fold(T, sums, slots, lambda a, b: a + b)
                T.buffer_store(scores, total * T.float32(spec.scale), [row, key])

    def _softmax(self, scores: Any, query: Any, row: int, seen: Any) -> Any:
        """Scores of one row to weights without their common factor, which is returned."""
        T, spec = self.T, self.spec
        if self.mask is not None:
            batch, heads, queries = spec.mask_shape
            place = [0 if batch == 1 else self.b, 0 if heads == 1 else self.h, 0 if queries == 1 else query]

            def add(_: int, start: Any, width: int) -> None:
                here = indices(T, start, width)
                T.buffer_store(scores, scores[row, here] + self.mask[(*place, here)], [row, here])

            walk(T, spec.keys, 4, add)
        if spec.causal:
            own = self._seen(query)
            with T.serial((seen + LANES - 1) // LANES * LANES - own) as past:
                T.buffer_store(scores, T.float32(_LOWEST), [row, own + past])
            return self._softmax_causal(scores, row, seen)
        if self.padded > spec.keys:
            width = self.padded - spec.keys
            T.buffer_store(scores, wide(T, _LOWEST, width), [row, indices(T, spec.keys, width)])
        largest = partials(T, 4, _LOWEST)

        def look(slot: int, start: Any, width: int) -> None:
            at = indices(T, slot * LANES, width)
            T.buffer_store(largest, T.max(largest[at], scores[row, indices(T, start, width)]), [at])

        walk(T, self.padded, 4, look)
        top = fold(T, largest, 4, T.max)
        sums = partials(T, 2, 0.0)

        def power(slot: int, start: Any, width: int) -> None:
            self._power(scores, row, top, sums, slot, start)

        walk(T, self.padded, 2, power)
        return keep(T, T.float32(1) / fold(T, sums, 2, lambda a, b: a + b), 1)

    def _softmax_causal(self, scores: Any, row: int, seen: Any) -> Any:
        T = self.T
        vectors = (seen + LANES - 1) // LANES
        largest, sums = partials(T, 1, _LOWEST), partials(T, 1, 0.0)
        at = indices(T, 0, LANES)
        with T.serial(vectors) as block:
            T.buffer_store(largest, T.max(largest[at], scores[row, indices(T, block * LANES, LANES)]), [at])
        top = fold(T, largest, 1, T.max)
        with T.serial(vectors) as block:
            self._power(scores, row, top, sums, 0, block * LANES)
        return keep(T, T.float32(1) / fold(T, sums, 1, lambda a, b: a + b), 1)

    def _power(self, scores: Any, row: int, top: Any, sums: Any, slot: int, start: Any) -> None:
        T = self.T
        here, at = indices(T, start, LANES), indices(T, slot * LANES, LANES)
        value = vector_math.exp_below_one(scores[row, here] - wide(T, top, LANES))
        weight = keep(T, value, LANES)
        T.buffer_store(scores, weight, [row, here])
        T.buffer_store(sums, sums[at] + weight, [at])

    def _values(self, scores: Any, first: Any, rows: int, factors: list[Any], seen: Any) -> None:
        T, spec = self.T, self.spec
        start = 0
        while start < spec.head_dim:
            pieces: list[tuple[int, int]] = []
            while len(pieces) < _VALUES and start < spec.head_dim:
                width = min(LANES, spec.head_dim - start)
                pieces.append((start, width))
                start += width
            sums = partials(T, rows * len(pieces), 0.0)
            with T.serial(seen if spec.causal else spec.keys) as key:
                for row in range(rows):
                    for number, (column, width) in enumerate(pieces):
                        at = indices(T, (row * len(pieces) + number) * LANES, width)
                        weight = wide(T, scores[row, key], width)
                        value = self.v[self.b, self.g, key, indices(T, column, width)]
                        T.buffer_store(sums, sums[at] + weight * value, [at])
            for row in range(rows):
                for number, (column, width) in enumerate(pieces):
                    at = indices(T, (row * len(pieces) + number) * LANES, width)
                    value = sums[at] * wide(T, factors[row], width)
                    T.buffer_store(self.y, value, [self.b, self.h, first + row, indices(T, column, width)])
