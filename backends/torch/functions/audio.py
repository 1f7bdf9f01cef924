"""Fourier transforms, windows and mel filters."""

from __future__ import annotations

import math

import torch

# Cosine coefficients a0 - a1·cos(2πn/N) + a2·cos(4πn/N), as ONNX writes them.
WINDOWS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25.0 / 46.0, 21.0 / 46.0, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


def window(
    kind: str, size: int, periodic: bool, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """A window of ``size`` entries; ``periodic`` leaves out the last of a symmetric one."""
    first, second, third = WINDOWS[kind]
    places = torch.arange(size, dtype=torch.float64, device=device)
    turn = places * (2 * math.pi / max(size if periodic else size - 1, 1))
    found: torch.Tensor = first - second * torch.cos(turn) + third * torch.cos(2 * turn)
    return found.to(dtype)


def dft(x: torch.Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> torch.Tensor:
    """Discrete Fourier transform along ``axis`` of numbers stored as ``[..., 1]`` (real) or ``[..., 2]``.

    Args:
        length: the signal is cut or padded with zeros to it; as long as it is when None.
        onesided: half of the spectrum of a real signal, or, with ``inverse``, the real signal of one.

    Returns:
        ``[..., 2]``; ``[..., 1]`` for the real signal of a one-sided spectrum.
    """
    axis = axis % x.ndim
    signal = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
    if inverse and onesided:
        real: torch.Tensor = torch.fft.irfft(signal, length, dim=axis)
        return real.unsqueeze(-1)
    if inverse:
        result = torch.fft.ifft(signal, length, dim=axis)
    elif onesided:
        result = torch.fft.rfft(signal.real if signal.is_complex() else signal, length, dim=axis)
    else:
        result = torch.fft.fft(signal, length, dim=axis)
    return torch.view_as_real(result)


def stft(
    signal: torch.Tensor,
    step: int,
    weights: torch.Tensor | None,
    length: int | None,
    onesided: bool,
) -> torch.Tensor:
    """Transforms of frames of ``length`` entries every ``step`` of them, without padding.

    Args:
        signal: ``[N, samples, 1]`` (real) or ``[N, samples, 2]``; ``[N, samples]`` is real too.
        weights: the window, as long as a frame.

    Returns:
        ``[N, frames, bins, 2]``.
    """
    if signal.ndim == 2:
        signal = signal.unsqueeze(-1)
    if length is None:
        length = weights.shape[0] if weights is not None else signal.shape[1]
    frames = signal.unfold(1, length, step).transpose(2, 3)
    if weights is not None:
        frames = frames * weights.reshape(-1, 1)
    return dft(frames, None, 2, False, onesided)


def mel_weights(
    bins: int,
    length: int,
    rate: int,
    low: float,
    high: float,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Triangular mel filters ``[length // 2 + 1, bins]``, on whole bins of the spectrum as ONNX defines them."""
    spectrum = length // 2 + 1
    low_mel, high_mel = (2595 * math.log10(1 + hertz / 700) for hertz in (low, high))
    width = (high_mel - low_mel) / (bins + 2)
    edges = [700 * (10 ** ((i * width + low_mel) / 2595) - 1) for i in range(bins + 2)]
    places = [int((length + 1) * hertz // rate) for hertz in edges]
    result = torch.zeros(spectrum, bins, dtype=torch.float64)
    for i in range(bins):
        lower, centre, upper = places[i : i + 3]
        if centre == lower:
            result[centre, i] = 1
        for j in range(lower, centre + 1):
            if centre != lower:
                result[j, i] = (j - lower) / (centre - lower)
        for j in range(centre, upper):
            result[j, i] = (upper - j) / (upper - centre)
    return result.to(dtype=dtype, device=device)
