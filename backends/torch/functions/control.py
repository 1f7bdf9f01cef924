"""Control flow: plain Python over modules, so that gradients flow through what was run.

torch's own ``cond`` and ``while_loop`` want branches of equal shapes and loops without growing results,
which ONNX does not promise; a compiler breaks the graph here instead, unless the condition or the number of
trips comes from shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Body = Callable[..., tuple[torch.Tensor, ...]]


def default(given: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    """An optional input: what the caller gave, or its default."""
    return otherwise if given is None else given


def branch(
    condition: torch.Tensor | bool,
    then: Body,
    otherwise: Body,
    then_reads: Sequence[torch.Tensor],
    otherwise_reads: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """ONNX If."""
    if condition:
        return then(*then_reads)
    return otherwise(*otherwise_reads)


def loop(
    trips: torch.Tensor | int | None,
    going: torch.Tensor | bool | None,
    body: Body,
    state: Sequence[torch.Tensor],
    reads: Sequence[torch.Tensor],
    anchor: torch.Tensor,
    checks: bool,
    empty: Sequence[tuple[tuple[int, ...], torch.dtype]],
) -> tuple[torch.Tensor, ...]:
    """ONNX Loop: carried values after the last trip, then what each trip gave, stacked.

    Args:
        trips: the most trips, None for no limit.
        going: whether to begin at all.
        body: ``(iteration, going, *state, *reads) -> (going, *state, *scanned)``.
        state: carried values.
        reads: what the body reads from outside.
        anchor: lies on the device to count on.
        checks: whether the body's ``going`` has to be looked at; without, nothing is read back.
        empty: per stacked output, the shape and type of one trip's part, for a loop of no trips.
    """
    limit = None if trips is None else int(trips)
    carried = tuple(state)
    count = len(carried)
    parts: list[tuple[torch.Tensor, ...]] = []
    more = True if going is None else bool(going)
    trip = 0
    while more and (limit is None or trip < limit):
        iteration = torch.scalar_tensor(trip, dtype=torch.int64, device=anchor.device)
        flag = torch.scalar_tensor(True, dtype=torch.bool, device=anchor.device)
        results = body(iteration, flag, *carried, *reads)
        carried = tuple(results[1 : 1 + count])
        parts.append(tuple(results[1 + count :]))
        if checks:
            more = bool(results[0])
        trip += 1
    if not parts:
        stacks = tuple(torch.empty((0, *shape), dtype=dtype, device=anchor.device) for shape, dtype in empty)
    else:
        stacks = tuple(torch.stack(column) for column in zip(*parts, strict=True))
    return (*carried, *stacks)


def scan(
    body: Body,
    state: Sequence[torch.Tensor],
    sequences: Sequence[torch.Tensor],
    reads: Sequence[torch.Tensor],
    input_axes: Sequence[int],
    input_reversed: Sequence[int],
    output_axes: Sequence[int],
    output_reversed: Sequence[int],
) -> tuple[torch.Tensor, ...]:
    """ONNX Scan: the body over the slices of ``sequences``; carried values, then the stacked results."""
    slices = [
        torch.unbind(sequence, axis)[:: -1 if backwards else 1]
        for sequence, axis, backwards in zip(sequences, input_axes, input_reversed, strict=True)
    ]
    carried = tuple(state)
    count = len(carried)
    parts = []
    for step in zip(*slices, strict=True):
        results = body(*carried, *step, *reads)
        carried = tuple(results[:count])
        parts.append(tuple(results[count:]))
    stacks = [
        torch.stack(column[:: -1 if backwards else 1], axis)
        for column, axis, backwards in zip(
            zip(*parts, strict=True), output_axes, output_reversed, strict=True
        )
    ]
    return (*carried, *stacks)
