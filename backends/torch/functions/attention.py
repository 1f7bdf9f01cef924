"""Attention and rotary embeddings (ONNX opset 23 and later)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def heads(x: Tensor, count: int | None) -> Tensor:
    """``[batch, sequence, heads · size]`` as ``[batch, heads, sequence, size]``."""
    if x.ndim == 4 or count is None:
        return x
    return x.reshape(x.size(0), x.size(1), count, -1).transpose(1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    query_heads: int | None,
    key_heads: int | None,
    scale: float | None,
    softcap: float,
    wide_softmax: torch.dtype | None,
    window: tuple[int, int],
    qk_output: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """ONNX Attention.

    Args:
        query: ``[batch, heads, sequence, size]`` or with heads and size in the last axis.
        key: as ``query``, of ``key_heads``.
        value: as ``key``.
        mask: boolean (True is looked at) or added to the scores; its last axis may be shorter.
        past_key: keys from before, four axes.
        past_value: values from before.
        lengths: ``[batch]``, keys that count.
        causal: query i looks at keys up to i plus the number of keys from before.
        query_heads: for inputs of three axes.
        key_heads: for inputs of three axes.
        scale: of the scores; one over the root of the size when None.
        softcap: bound on the scores, 0 for none.
        wide_softmax: type the softmax is computed in, None for the input's.
        window: how far a query looks to the left and to the right, -1 without bound.
        qk_output: which scores to hand out: 0 plain, 1 or 2 bounded and masked, 3 after the softmax.

    Returns:
        The result in the form of ``query``, the keys and values with those from before, the scores.
    """
    flat = query.ndim == 3
    query, key, value = heads(query, query_heads), heads(key, key_heads), heads(value, key_heads)
    before = 0
    if past_key is not None and past_value is not None:
        before = past_key.size(2)
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    bias = _bias(query, key, mask, lengths, causal, before, window)
    grouped = query.size(1) != key.size(1)
    if not softcap and qk_output is None and wide_softmax is None and lengths is None:
        result = F.scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=grouped)
        scores = None
    else:
        result, scores = _plain(query, key, value, bias, scale, softcap, wide_softmax, qk_output)
    if flat:
        result = result.transpose(1, 2).flatten(2)
    return result, key, value, scores


def _bias(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    before: int,
    window: tuple[int, int],
) -> Tensor | None:
    """Everything that is added to the scores, None when nothing is."""
    rows, columns = query.size(2), key.size(2)
    minus = torch.full((), float("-inf"), dtype=query.dtype, device=query.device)
    bias = None
    if mask is not None:
        bias = torch.where(mask, torch.zeros_like(minus), minus) if mask.dtype == torch.bool else mask
        if bias.size(-1) < columns:
            bias = F.pad(bias, (0, columns - bias.size(-1)), value=float("-inf"))
    allowed = None
    places = torch.arange(columns, device=query.device)
    if causal or window != (-1, -1):
        own = torch.arange(rows, device=query.device).unsqueeze(-1)
        if lengths is not None and before == 0:
            own = own + (lengths.reshape(-1, 1, 1, 1) - rows)
        else:
            own = own + before
        distance = own - places
        if causal:
            allowed = distance >= 0
        if window[0] >= 0:
            allowed = distance <= window[0] if allowed is None else allowed & (distance <= window[0])
        if window[1] >= 0:
            allowed = -distance <= window[1] if allowed is None else allowed & (-distance <= window[1])
    if lengths is not None:
        real = places < lengths.reshape(-1, 1, 1, 1)
        allowed = real if allowed is None else allowed & real
    if allowed is None:
        return bias
    added = torch.where(allowed, torch.zeros_like(minus), minus)
    return added if bias is None else bias + added


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float,
    wide_softmax: torch.dtype | None,
    qk_output: int | None,
) -> tuple[Tensor, Tensor | None]:
    if query.size(1) != key.size(1):
        repeats = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    factor = (query.size(-1) ** -0.5 if scale is None else scale) ** 0.5
    scores = (query * factor) @ (key * factor).transpose(-1, -2)
    stages = [scores]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    stages.append(scores)
    if bias is not None:
        scores = scores + bias
    stages.append(scores)
    shares = F.softmax(scores, -1, dtype=wide_softmax).to(query.dtype)
    # A query that may look at nothing gets zeros.
    shares = torch.where(torch.isneginf(scores).all(-1, keepdim=True), torch.zeros_like(shares), shares)
    stages.append(shares)
    return shares @ value, None if qk_output is None else stages[qk_output]


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    width: int,
    count: int,
) -> Tensor:
    """ONNX RotaryEmbedding.

    Args:
        x: ``[batch, heads, sequence, size]``, or ``[batch, sequence, heads · size]``.
        cos: ``[positions, width / 2]``, or ``[batch, sequence, width / 2]`` without ``positions``.
        sin: as ``cos``.
        positions: ``[batch, sequence]`` rows of the two, or None.
        interleaved: whether a pair lies side by side, or half the width apart.
        width: how much of a head is turned, 0 for all of it.
        count: number of heads, for three axes.
    """
    if positions is not None:
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    flat = x.ndim == 3
    if flat:
        x = heads(x, count)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = x if width == 0 else x[..., :width]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    if interleaved:
        result = torch.stack([real, imaginary], -1).flatten(-2)
    else:
        result = torch.cat([real, imaginary], -1)
    if width:
        result = torch.cat([result, x[..., width:]], -1)
    return result.transpose(1, 2).flatten(2) if flat else result
