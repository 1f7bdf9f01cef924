"""Schedules one legalized function: steps inlined into each other, then loops around what is left."""

from __future__ import annotations

from typing import Any

from tvm import ir, s_tir, tirx

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.vector_math import replace_calls
from effic.backends.tvm.schedule.accesses import IF, Block, blocks_of, calls, loads, size
from effic.backends.tvm.schedule.nests import nest, sequence

MAX_EXPRESSION = 400
"""Loads and calls that one inlined expression may grow to; a value used twice doubles what made it."""

NAIVE = "effic.naive"
"""Attribute of functions that could not be scheduled: why, in a sentence."""

# A step with one of these is not computed again for every reader.
_COSTLY = (
    "tirx.exp",
    "tirx.erf",
    "tirx.tanh",
    "tirx.log",
    "tirx.pow",
    "tirx.sin",
    "tirx.cos",
    "tirx.sigmoid",
)


def scheduled(function: Any, cpu: Cpu) -> Any:
    """The function with its loops arranged for this CPU.

    What is not made of plain boxes (sorting, loops with conditions) is returned as it was, with the
    attribute :data:`NAIVE` saying why.
    """
    done = function.with_attr("tirx.is_scheduled", True)
    inlined = _inline(function)
    root = inlined.body
    blocks = blocks_of(root)
    if blocks is None:
        done = done.with_attr(NAIVE, "it is not made of plain boxes of loops")
        return done.with_body(replace_calls(root))
    parts = [tirx.AllocBuffer(buffer) for buffer in root.block.alloc_buffers]
    parts += [nest(block, cpu) for block in blocks]
    return done.with_body(rooted(replace_calls(sequence(parts))))


def rooted(body: Any) -> Any:
    """A body inside a root block, as TVM's passes expect of every function."""
    if isinstance(body, s_tir.SBlockRealize):
        return body
    block = s_tir.SBlock([], [], [], "root", body)
    return s_tir.SBlockRealize([], True, block)


def _inline(function: Any) -> Any:
    """Steps that write every point once and are read by others, inlined into their readers."""
    schedule = s_tir.Schedule(ir.IRModule({"main": function}))
    root = function.body
    if not isinstance(root, s_tir.SBlockRealize) or blocks_of(root) is None:
        return function
    for name in _names(root):
        block = schedule.get_sblock(name)
        if _worth_inlining(schedule, block):
            try:
                schedule.compute_inline(block)
            except s_tir.ScheduleError:
                continue
    return schedule.mod["main"]


def _names(root: Any) -> list[str]:
    import tvm_ffi

    names: list[str] = []
    tvm_ffi.structural_walk(root.block.body, (s_tir.SBlock, lambda block: names.append(block.name_hint)))
    return names


def _worth_inlining(schedule: Any, block_rv: Any) -> bool:
    block = schedule.get(block_rv)
    if not isinstance(block.body, tirx.BufferStore) or block.init is not None:
        return False
    if any(iteration.iter_type != tirx.IterVar.DataPar for iteration in block.iter_vars):
        return False
    readers = [schedule.get(rv) for rv in schedule.get_consumers(block_rv)]
    if not readers:
        return False
    weight = size(block.body.value) + 1
    costly = any(calls(block.body.value, name) for name in _COSTLY)
    conditional = bool(calls(block.body.value, IF))
    for reader in readers:
        reads = sum(load.source.same_as(block.body.buffer) for load in loads(reader.body))
        reduces = reader.init is not None
        if reads * weight + size(reader.body) > MAX_EXPRESSION:
            return False
        if costly and ((reads > 1 and len(readers) > 1) or _repeats(block, reader)):
            return False
        # A reduction over a padded input reads it many times, and a condition would undo its vectors.
        if reduces and (conditional or _repeats(block, reader)):
            return False
    return not (costly and len(readers) > 1)


def _repeats(block: Any, reader: Any) -> bool:
    """Whether a reader asks for the same point more than once: its box is larger than the block's."""
    return _points(reader) != _points(block)


def _points(block: Any) -> list[int]:
    extents = [iteration.dom.extent for iteration in block.iter_vars]
    total, unknown = 1, []
    for extent in extents:
        if isinstance(extent, tirx.IntImm):
            total *= int(extent)
        else:
            unknown.append(extent)
    return [total, len(unknown)]


__all__ = ["NAIVE", "Block", "scheduled"]
