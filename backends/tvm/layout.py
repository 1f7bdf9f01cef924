"""Images in blocks of 16 channels, ``[N, ceil(C / 16), H, W, 16]``: the layout between convolutions."""

from __future__ import annotations

from typing import Any

from tvm import relax

BLOCK = 16
"""Channels in a block: one 512-bit vector of fp32."""


def to_blocked(bb: relax.BlockBuilder, image: Any) -> Any:
    """``[N, C, H, W]`` to blocks; channels past C are zero."""
    n, c, h, w = image.ty.shape.values
    blocks = -(-int(c) // BLOCK)
    if blocks * BLOCK != int(c):
        image = bb.emit(relax.op.nn.pad(image, [0, 0, 0, blocks * BLOCK - int(c), 0, 0, 0, 0]))
    split = bb.emit(relax.op.reshape(image, (n, blocks, BLOCK, h, w)))
    return bb.emit(relax.op.permute_dims(split, [0, 1, 3, 4, 2]))


def to_plain(bb: relax.BlockBuilder, blocked: Any, channels: int) -> Any:
    """Blocks to ``[N, channels, H, W]``."""
    n, blocks, h, w, _ = blocked.ty.shape.values
    turned = bb.emit(relax.op.permute_dims(blocked, [0, 1, 4, 2, 3]))
    joined = bb.emit(relax.op.reshape(turned, (n, blocks * BLOCK, h, w)))
    if int(blocks) * BLOCK == channels:
        return joined
    return bb.emit(relax.op.strided_slice(joined, axes=[1], begin=[0], end=[channels]))
