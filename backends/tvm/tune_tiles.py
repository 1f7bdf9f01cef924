"""The tiles a kernel may be made with: few enough to try them all.

In two steps, because they hardly depend on each other: the *register tile* (how many sums are held, and in which
shape), and, around the best of those, the *cache tile* (into which pieces the longest loops are cut).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.kernels.conv import Conv2d
from effic.backends.tvm.kernels.conv_depthwise import DepthwiseConv2d
from effic.backends.tvm.kernels.dense import GEMV_ROWS, BatchMatMul, DenseMatMul
from effic.backends.tvm.kernels.lanes import LANES, registers, tiles
from effic.backends.tvm.tune_records import Tile, with_tile

REGISTER_FIELDS = ("panel", "rows", "blocks", "columns")
"""The fields that shape the register tile; the others cut loops."""

_MOST, _WORST = 10, 1.5
"""Register tiles that are tried, and how much more cycles than the best a count may give them."""


def register_part(tile: Tile) -> Tile:
    """The fields of a tile that shape the register tile."""
    return {name: size for name, size in tile.items() if name in REGISTER_FIELDS}


def candidates(spec: Any, cpu: Cpu, chosen: Tile, tried: list[Tile]) -> list[Tile]:
    """The tiles worth trying next, the default not among them.

    Args:
        spec: in its default tile.
        cpu: that it is made for.
        chosen: the best tile so far.
        tried: tiles that need not be tried again.
    """
    left = [tile for tile in register_tiles(spec, cpu) if tile not in tried]
    return left or [tile for tile in cache_tiles(spec, cpu, register_part(chosen)) if tile not in tried]


def why_not_tile(spec: Any, cpu: Cpu, tile: Tile) -> str | None:
    """Why a tile is none that would be tried for this kernel, a phrase, or None."""
    base = register_part(tile)
    if base and base not in register_tiles(spec, cpu):
        return "it is not among the register tiles of this kernel"
    if tile != base and tile not in cache_tiles(spec, cpu, base):
        return "it is not among the cache tiles of this kernel"
    return with_tile(spec, tile).why_not()  # type: ignore[no-any-return]


def register_tiles(spec: Any, cpu: Cpu) -> list[Tile]:
    """Shapes of the register tile."""
    most = registers(cpu, spec.portable)
    if isinstance(spec, DenseMatMul):
        return _dense(spec, most)
    if isinstance(spec, BatchMatMul):
        return [{"rows": rows} for rows in _lengths(spec.m, most // 2)]
    if isinstance(spec, Conv2d):
        return _conv(spec, most)
    if isinstance(spec, DepthwiseConv2d):
        return [{"columns": length} for length in _lengths(spec.window.out[1], most)]
    return []


def cache_tiles(spec: Any, cpu: Cpu, base: Tile) -> list[Tile]:
    """Lengths of the pieces that loops are cut into, around a register tile."""
    found: list[Tile] = []
    if isinstance(spec, DenseMatMul):
        found = [{**base, "k_tile": size} for size in (256, 512, 1024, 4096) if size < spec.k]
        if spec.k > 2048:
            found.append({**base, "k_tile": spec.k})
    elif isinstance(spec, Conv2d):
        # Channels as they are counted by the loop: blocks of 16, or single ones of a plain image.
        channels = spec.channels // spec.groups
        size = channels if spec.plain_input else -(-channels // LANES)
        cuts = sorted({-(-size // parts) for parts in (1, 2, 4, 8) if size >= parts}, reverse=True)
        height = spec.flat.out[0]
        bands = [count for count in (1, 2, 4, 7, 8, 14, 16, 28) if count <= height]
        found = [{**base, "bands": count} for count in bands]
        found += [{**base, "c_tile": cut} for cut in cuts]
        found += [{**base, "bands": count, "c_tile": cut} for cut in cuts[:2] for count in bands[1:4]]
    return found


def _dense(spec: DenseMatMul, most: int) -> list[Tile]:
    if spec.m <= GEMV_ROWS:
        return [
            {"panel": vectors * LANES, "rows": spec.m}
            for vectors in (2, 4, 6, 8, 12, 16)
            if spec.m * vectors <= most
        ]
    shapes = _shapes(spec.m, -(-spec.n // LANES), most, (1, 2, 3, 4, 6))
    return [{"panel": vectors * LANES, "rows": rows} for vectors, rows in shapes]


def _conv(spec: Conv2d, most: int) -> list[Tile]:
    flat, count = spec.flat, -(-spec.filters // LANES)
    shapes = _shapes(flat.out[1], count, most, [r for r in range(1, 9) if count % r == 0])
    return [{"blocks": blocks, "columns": length} for blocks, length in shapes]


def _shapes(rows: int, vectors: int, most: int, widths: Iterable[int]) -> list[tuple[int, int]]:
    """Vectors and rows of register tiles of ``rows × vectors`` sums, the promising ones.

    What a step of a tile takes is counted as in :attr:`Conv2d.tile`: two multiply-adds or two loads per cycle,
    and sums that wait four cycles for themselves.
    """
    found: dict[tuple[int, int], float] = {}
    for width in widths:
        for upper in range(1, most // width + 1):
            length, full, rest = tiles(rows, upper)
            cycles = sum(
                count * (max(size * width / 2, (size + width) / 2, 4) + 0.5)
                for size, count in ((length, full), (rest, int(rest > 0)))
            )
            found[width, length] = cycles * -(-vectors // width)
    best = min(found.values())
    ranked = sorted((cost, shape) for shape, cost in found.items() if cost <= _WORST * best)
    return [shape for _, shape in ranked[:_MOST]]


def _lengths(size: int, most: int) -> list[int]:
    """The lengths that cut ``size`` into equal pieces of at most ``most``, longest first, four at most."""
    found: list[int] = []
    length = min(size, most)
    while length >= 1 and len(found) < 4:
        even = tiles(size, length)[0]
        found.append(even)
        length = even - 1
    return found
