"""Finding the convolutions of a live module whose output goes to one batch norm and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# A forward that is run on proxies instead of tensors may fail in any of these ways: comparing, indexing
# and unpacking them, taking their length, asking for what they lack.
TRACE_FAILURES = (
    fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError,
)  # fmt: skip

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass
class Found:
    """What was found in a module.

    Attributes:
        pairs: convolution and norm, by their names.
        skipped: norms that are in no pair, with the reason as a phrase.
        opaque: modules whose forward cannot be traced, with torch's reason.
    """

    pairs: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    opaque: dict[str, str] = dataclasses.field(default_factory=dict)


class _Tracer(fx.Tracer):
    """Stops at torch's own modules, and at those known to be untraceable."""

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (*CONVOLUTIONS, *NORMS)) or m in self.opaque
        return leaf or super().is_leaf_module(m, module_qualified_name)


class _Calls:
    """Who feeds whom in one traced run, by module objects."""

    def __init__(self, root: nn.Module, opaque: set[nn.Module]) -> None:
        graph = _Tracer(opaque).trace(root)
        self.reasons: dict[nn.Module, str] = {}
        self.norm_of: dict[nn.Module, nn.Module] = {}
        hidden = {inner for module in opaque for inner in module.modules()}
        inline = set()
        calls: dict[nn.Module, list[fx.Node]] = {}
        self._made_by: dict[fx.Node, nn.Module] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                inline.add(root.get_submodule(str(node.target).rpartition(".")[0]))
            elif node.op == "call_module":
                module = root.get_submodule(str(node.target))
                calls.setdefault(module, []).append(node)
                self._made_by[node] = module
        for norm in (module for module in calls if isinstance(module, NORMS)):
            found = self._feeder(norm, calls)
            if isinstance(found, nn.Module) and (norm in inline or found in inline):
                found = "its parameters, or those of the convolution before it, are read from outside"
            elif isinstance(found, nn.Module) and (norm in hidden or found in hidden):
                found = "it, or the convolution before it, is part of a module that cannot be traced"
            if isinstance(found, str):
                self.reasons[norm] = found
            else:
                self.norm_of[found] = norm

    def _feeder(self, norm: nn.Module, calls: dict[nn.Module, list[fx.Node]]) -> nn.Module | str:
        """The convolution whose every output goes to ``norm`` alone, and that alone feeds it; or why not."""
        makers: set[nn.Module | None] = set()
        for node in calls[norm]:
            source = node.args[0] if node.args else None
            while isinstance(source, fx.Node) and isinstance(self._made_by.get(source), nn.Identity):
                if len(source.users) > 1:
                    return "its input is read elsewhere as well"
                source = source.args[0] if source.args else None
            makers.add(self._made_by.get(source) if isinstance(source, fx.Node) else None)
        (maker, *others) = makers
        if others:
            return "it is called on the outputs of different layers"
        if maker is None or not isinstance(maker, CONVOLUTIONS):
            kind = "no module" if maker is None else f"a {type(maker).__name__}"
            return f"its input is made by {kind}, not by a convolution"
        if any(len(node.users) != 1 for node in calls[maker]):
            return "the output of the convolution before it is read elsewhere as well"
        if len(calls[maker]) != len(calls[norm]):
            return "the convolution before it feeds other modules as well"
        return maker


def find_pairs(root: nn.Module) -> Found:
    """Pairs of a module, as its forward uses them in training and in evaluation alike.

    A module that torch.fx cannot trace is looked into: the modules inside that can be traced are searched
    each for itself.
    """
    found = Found()
    names: dict[nn.Module, str] = {}
    for name, module in root.named_modules():
        names.setdefault(module, name)
    opaque: dict[nn.Module, str] = {}
    for norm, (conv, reason) in _search(root, opaque).items():
        if reason is None and conv is not None:
            reason = why_not(conv, norm)
        if reason is None and conv is not None:
            found.pairs.append((names[conv], names[norm]))
        else:
            found.skipped[names[norm]] = str(reason)
    found.opaque = {names[module]: reason for module, reason in opaque.items()}
    paired = {norm for _, norm in found.pairs}
    for module, name in names.items():
        if isinstance(module, NORMS) and name not in found.skipped and name not in paired:
            found.skipped[name] = _unseen(name, found.opaque)
    return found


def _unseen(name: str, opaque: dict[str, str]) -> str:
    around = [path for path in opaque if path == "" or name.startswith(f"{path}.")]
    if not around:
        return "nothing calls it"
    return f"what calls it cannot be traced ({opaque[max(around, key=len)]})"


_Result = dict[nn.Module, tuple[nn.Module | None, str | None]]


def _search(module: nn.Module, opaque: dict[nn.Module, str]) -> _Result:
    """For every norm whose call was seen: its convolution, or the reason that it has none."""
    try:
        return _both_modes(module, set(opaque))
    except TRACE_FAILURES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    known = len(opaque)
    inner: _Result = {}
    for child in module.children():
        # A list of modules has no forward of its own; what is in it has.
        parts = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
        for part in parts:
            if not _Tracer(set()).is_leaf_module(part, ""):
                inner |= _search(part, opaque)
    if len(opaque) > known:
        try:
            return inner | _both_modes(module, set(opaque))
        except TRACE_FAILURES:
            pass  # It cannot be traced for reasons of its own; the first one is reported.
    opaque[module] = reason
    return inner


def _both_modes(module: nn.Module, opaque: set[nn.Module]) -> _Result:
    seen: list[_Calls] = []
    for training in (False, True):
        with _mode(module, training):
            seen.append(_Calls(module, opaque))
    result: _Result = {}
    for calls in seen:
        result.update({norm: (None, reason) for norm, reason in calls.reasons.items()})
    for calls, other in (seen, reversed(seen)):
        for conv, norm in calls.norm_of.items():
            if norm in result and result[norm][1] is not None:
                continue
            same = other.norm_of.get(conv) is norm
            reason = None if same else "it follows the convolution only in training, or only in evaluation"
            result[norm] = (conv, reason)
    return result


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """All of ``module`` in training or evaluation mode, and as it was afterwards."""
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            part.training = training
        yield
    finally:
        for part, was in before:
            part.training = was


def why_not(conv: nn.Module, norm: nn.Module) -> str | None:
    """Why a convolution and the norm that takes its output cannot be computed as one, or None."""
    for module in (conv, norm):
        label = f"{'it' if module is norm else 'the convolution before it'}"
        if nn.utils.parametrize.is_parametrized(module):
            return f"{label} has a parametrization; remove it first"
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"{label} has hooks, which would see other values"
        if "forward" in vars(module):
            return f"{label} has a forward of its own"
        if type(module) not in (*CONVOLUTIONS, *NORMS):
            return f"{label} is a {type(module).__name__}, which may compute something else"
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not isinstance(conv, nn.modules.conv._ConvNd):
        return "it is no batch norm after a convolution"
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics, so that it uses the batch's in evaluation too"
    if norm.num_features != conv.out_channels:
        return f"it has {norm.num_features} channels, the convolution before it {conv.out_channels}"
    if not torch.is_floating_point(conv.weight):
        return "the convolution before it has no floating-point weight"
    return None
