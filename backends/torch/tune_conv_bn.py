"""ConvBN tune mode of a live torch module: fine-tuning with frozen statistics in less memory.

Source: "Efficient ConvBN Blocks for Transfer Learning and Beyond" (arXiv 2305.11624, ICLR 2024).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from effic.backends.torch.conv_bn_pairs import find_pairs
from effic.backends.torch.fused_conv import Geometry, Pair, fused_conv, fused_parameters
from effic.ir.errors import InvalidModelError, UnsupportedError

LARGE_SCALE = 1e3
"""A scale above this comes from a channel whose variance is almost zero (see the same limit of
``fuse-conv-bn``)."""


@dataclasses.dataclass(frozen=True)
class TunedPair:
    """A convolution and the batch norm computed with it.

    Attributes:
        conv, norm: their names.
        max_scale: ``max |gamma / sqrt(variance + epsilon)|`` at present.
        activation_bytes: bytes of the convolution's output, which training no longer keeps; None when no
            example inputs were given, or the pair was not reached.
    """

    conv: str
    norm: str
    max_scale: float
    activation_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class TuneReport:
    """What :func:`tune_conv_bn` did.

    Attributes:
        pairs: what is in tune mode now.
        skipped: every other batch norm, with the reason.
    """

    pairs: tuple[TunedPair, ...]
    skipped: dict[str, str]

    @property
    def max_scale(self) -> float:
        """The largest of all scales, 0 without pairs."""
        return max((pair.max_scale for pair in self.pairs), default=0.0)

    @property
    def activation_bytes(self) -> int | None:
        """Bytes that a training step no longer keeps, as far as they are known."""
        known = [pair.activation_bytes for pair in self.pairs if pair.activation_bytes is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        lines = [f"{len(self.pairs)} pairs in tune mode, {len(self.skipped)} batch norms as they were"]
        if self.activation_bytes is not None:
            lines.append(f"a training step keeps {self.activation_bytes / 1e6:.1f} MB less for these inputs")
        lines += [
            f"{pair.norm}: its largest scale is {pair.max_scale:.3g}, a channel's variance is almost zero"
            for pair in self.pairs
            if pair.max_scale > LARGE_SCALE
        ]
        return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in self.skipped.items())])


def tune_conv_bn(module: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> TuneReport:
    """Compute every batch norm that follows a convolution together with it, while the norm is in eval mode.

    In place: modules, parameters, buffers and the state dict's keys stay, and so do optimizers made before.
    While ``norm.training`` is False the pair computes ``a·w`` and ``beta + a·(b - mean)`` from the present
    parameters on every call and keeps its input alone for the backward pass; outputs and gradients are those
    of eval mode. While it is True, convolution and norm are what they were: statistics are updated.

    Pairs are found by torch.fx; what it cannot trace is left as it is. Call it again after replacing modules
    (``convert_sync_batchnorm`` and the like come first).

    Args:
        module: the module.
        example_inputs: positional inputs; with them the report counts the bytes that training saves. They
            are run once, in eval mode.

    Returns:
        The pairs, and every other batch norm with the reason.

    Raises:
        UnsupportedError: the module has batch norms, and no part of it that holds one can be traced.
        InvalidModelError: a variance is negative, or a fused weight is not finite. Nothing was changed.
    """
    untune_conv_bn(module)
    found = find_pairs(module)
    if "" in found.opaque and found.skipped and not found.pairs:
        raise UnsupportedError(
            f"the forward of {type(module).__name__} cannot be traced ({found.opaque['']}), so no convolution "
            "can be told to feed a batch norm alone; call tune_conv_bn on the parts that can"
        )
    scales = {conv: _largest_scale(module, conv, norm) for conv, norm in found.pairs}
    for conv_name, norm_name in found.pairs:
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        # Behind a tuple: the convolution must not list the norm among its own modules.
        vars(conv)["_tuned_norm"] = (norm,)
        vars(norm)["_tuned_rank"] = conv.weight.dim()  # type: ignore[operator]
        conv.__class__, norm.__class__ = _TUNED[type(conv)], _TUNED[type(norm)]
    sizes = _output_bytes(module, example_inputs) if example_inputs is not None else {}
    pairs = tuple(TunedPair(conv, norm, scales[conv], sizes.get(conv)) for conv, norm in found.pairs)
    return TuneReport(pairs, found.skipped)


def untune_conv_bn(module: nn.Module) -> int:
    """Undo :func:`tune_conv_bn`, in place; a module that is not tuned stays as it is.

    Returns:
        How many pairs there were.
    """
    pairs = 0
    for part in module.modules():
        pair = vars(part).pop("_tuned_norm", ())
        pairs += len(pair)
        # The norm may lie outside of what is undone; it must not wait for a convolution that is gone.
        for changed in (part, *pair):
            vars(changed).pop("_tuned_rank", None)
            # One that was parametrized since is of torch's own subclass: without a pair it acts as it did.
            changed.__class__ = _PLAIN.get(type(changed), type(changed))
    return pairs


class _TunedConv:
    """A convolution that also does the work of the norm after it, while that is in eval mode."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        conv: Any = self
        (norm,) = getattr(conv, "_tuned_norm", (None,))
        if norm is None or not _fuses(norm, input, conv):
            extra = () if output_size is None else (output_size,)
            plain: Tensor = super().forward(input, *extra)  # type: ignore[misc]
            return plain
        padding, output_padding = conv.padding, conv.output_padding
        if conv.transposed:
            axes = len(conv.kernel_size)
            output_padding = conv._output_padding(
                input, output_size, conv.stride, conv.padding, conv.kernel_size, axes, conv.dilation
            )
        elif isinstance(padding, str) or conv.padding_mode != "zeros":
            pads = conv._reversed_padding_repeated_twice  # Last axis first, each with begin and end.
            if conv.padding_mode == "zeros" and pads[::2] == pads[1::2]:
                padding = tuple(reversed(pads[::2]))
            else:
                mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
                input = functional.pad(input, pads, mode=mode) if any(pads) else input
                padding = (0,) * len(conv.kernel_size)
        geometry = Geometry(conv.stride, padding, conv.dilation, conv.transposed, output_padding, conv.groups)
        return fused_conv(input, _parameters(conv, norm), geometry)


class _TunedNorm:
    """A batch norm that hands its input on, while the convolution before it does its work."""

    def forward(self, input: Tensor) -> Tensor:
        norm: Any = self
        if _fuses(norm, input, norm):
            return input
        plain: Tensor = super().forward(input)  # type: ignore[misc]
        return plain


def _parameters(conv: Any, norm: Any) -> Pair:
    return Pair(conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def _fuses(norm: Any, input: Tensor, asked: Any) -> bool:
    # Both modules of a pair ask, and get the same answer: a convolution keeps the number of axes. An input
    # without a batch axis is left to them, and so is DataParallel's replica, whose pair is not known.
    replica = getattr(asked, "_is_replica", False)
    frozen = not norm.training and norm.running_mean is not None
    return frozen and input.dim() == getattr(norm, "_tuned_rank", None) and not replica


class TunedConv1d(_TunedConv, nn.Conv1d):
    """nn.Conv1d in tune mode."""


class TunedConv2d(_TunedConv, nn.Conv2d):
    """nn.Conv2d in tune mode."""


class TunedConv3d(_TunedConv, nn.Conv3d):
    """nn.Conv3d in tune mode."""


class TunedConvTranspose1d(_TunedConv, nn.ConvTranspose1d):
    """nn.ConvTranspose1d in tune mode."""


class TunedConvTranspose2d(_TunedConv, nn.ConvTranspose2d):
    """nn.ConvTranspose2d in tune mode."""


class TunedConvTranspose3d(_TunedConv, nn.ConvTranspose3d):
    """nn.ConvTranspose3d in tune mode."""


class TunedBatchNorm1d(_TunedNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d in tune mode."""


class TunedBatchNorm2d(_TunedNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d in tune mode."""


class TunedBatchNorm3d(_TunedNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d in tune mode."""


class TunedSyncBatchNorm(_TunedNorm, nn.SyncBatchNorm):
    """nn.SyncBatchNorm in tune mode."""


_TUNED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: TunedConv1d,
    nn.Conv2d: TunedConv2d,
    nn.Conv3d: TunedConv3d,
    nn.ConvTranspose1d: TunedConvTranspose1d,
    nn.ConvTranspose2d: TunedConvTranspose2d,
    nn.ConvTranspose3d: TunedConvTranspose3d,
    nn.BatchNorm1d: TunedBatchNorm1d,
    nn.BatchNorm2d: TunedBatchNorm2d,
    nn.BatchNorm3d: TunedBatchNorm3d,
    nn.SyncBatchNorm: TunedSyncBatchNorm,
}
_PLAIN = {tuned: plain for plain, tuned in _TUNED.items()}


def _largest_scale(module: nn.Module, conv_name: str, norm_name: str) -> float:
    """``max |a|`` of a pair.

    Raises:
        InvalidModelError: the variance is negative, or a fused value is not finite.
    """
    conv: Any = module.get_submodule(conv_name)
    norm: Any = module.get_submodule(norm_name)
    if conv.weight.is_meta:
        return 0.0
    with torch.no_grad():
        if (norm.running_var < 0).any():
            raise InvalidModelError(
                f"the batch norm '{norm_name}' has a negative variance ({float(norm.running_var.min()):.3g}): "
                "the checkpoint is corrupted"
            )
        geometry = Geometry(transposed=conv.transposed, groups=conv.groups)
        fused = fused_parameters(_parameters(conv, norm), geometry, conv.weight.dtype)
        if not all(bool(tensor.isfinite().all()) for tensor in fused):
            raise InvalidModelError(
                f"the weight of '{conv_name}' times the scale of '{norm_name}' is not finite in "
                f"{conv.weight.dtype}: look for variances near zero, or convert the module to float32"
            )
        wide = torch.promote_types(norm.running_var.dtype, torch.float32)
        inverse = (norm.running_var.to(wide) + norm.eps).rsqrt()
        scale = inverse if norm.weight is None else inverse * norm.weight.to(wide)
        return float(scale.abs().max())


def _output_bytes(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Bytes of every tuned convolution's output, the calls of one run added up."""
    sizes: dict[str, int] = {}
    handles = []
    for name, part in module.named_modules():
        if type(part) in _PLAIN and isinstance(part, nn.modules.conv._ConvNd):

            def note(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                sizes[name] = sizes.get(name, 0) + output.numel() * output.element_size()

            handles.append(part.register_forward_hook(note))
    before = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            module(*inputs)
    finally:
        for part, was in before:
            part.training = was
        for handle in handles:
            handle.remove()
    return sizes
