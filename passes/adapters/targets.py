"""What adapters change, constant by constant: everything matched and checked before anything is written."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.model import Model
from effic.ir.weights import WeightUse
from effic.passes.adapters.adapter_files import Adapter, AdapterModule
from effic.passes.adapters.matching import (
    Found,
    MapEntry,
    Place,
    Places,
    module_shape,
    natural,
    own_uses,
    why_not,
)

Rows = tuple[int, int] | None

# Unmatched modules whose candidates are worked out for the message.
_SHOWN = 3


@dataclasses.dataclass(eq=False)
class Target:
    """Everything that adapters change about one constant, in the order in which it is applied.

    Attributes:
        place: the constant.
        uses: the uses that belong to the modules, where others read it too; None for all.
        path: the module or parameter, for the report.
        whole: tensors that replace it, each with its adapter's weight.
        rows: rows that are replaced: numbers, values, weight.
        parts: modules merged into it, by output channels (None: all of them), each with a weight.
        biases: modules whose B has a bias that is added to this one, each with a weight.
    """

    place: Place
    uses: list[WeightUse] | None
    path: str
    whole: list[tuple[np.ndarray, float]] = dataclasses.field(default_factory=list)
    rows: list[tuple[np.ndarray, np.ndarray, float]] = dataclasses.field(default_factory=list)
    parts: dict[Rows, list[tuple[AdapterModule, float]]] = dataclasses.field(default_factory=dict)
    biases: list[tuple[AdapterModule, float]] = dataclasses.field(default_factory=list)

    @property
    def modules(self) -> list[tuple[AdapterModule, float]]:
        """All modules, of all parts."""
        return [item for part in self.parts.values() for item in part]


def gather(
    model: Model,
    adapters: Sequence[tuple[Adapter, float]],
    mapping: Mapping[str, MapEntry],
    untie: bool,
) -> tuple[list[Target], list[str]]:
    """Find the constant of every tensor of every adapter.

    Args:
        model: not changed.
        adapters: with their weights.
        mapping: lines of a map file.
        untie: whether one side of a tied pair may be adapted by itself.

    Returns:
        The targets, in the order of the first adapter, and the paths that the map leaves out.

    Raises:
        UsageError: a tensor's constant is not found, or several could be meant; candidates are named.
        UnsupportedError: a tensor does not fit its constant, or cannot be merged into it.
    """
    found = _Gathering(Places(model, mapping))
    for adapter, weight in adapters:
        found.take(adapter, weight)
    found.complain()
    if unused := found.places.unused():
        raise UsageError(f"the map names '{unused[0]}', which no adapter has")
    found.settle_ties(untie)
    targets = list(found.targets.values())
    for target in targets:
        _check_parts(target)
    return targets, sorted(set(found.left_out))


class _Gathering:
    def __init__(self, places: Places) -> None:
        self.places = places
        self.targets: dict[object, Target] = {}
        self.left_out: list[str] = []
        self.missing: list[tuple[str, str, AdapterModule | None]] = []
        self.taken: dict[object, str] = {}

    def take(self, adapter: Adapter, weight: float) -> None:
        """File everything one adapter changes."""
        for path, array in adapter.replacements.items():
            for target in self.target(adapter, path, path.rpartition(".")[0], "whole", ("whole",)):
                target.whole.append((_fitted(target, path, array), weight))
        for path, (numbers, values) in adapter.rows.items():
            for target in self.target(adapter, f"{path}.weight", path, "rows", ("rows",)):
                shape = target.place.shape
                if len(shape) != 2 or shape[1] != values.shape[1] or numbers.max() >= shape[0]:
                    raise UnsupportedError(
                        f"'{path}' of adapter '{adapter.name}' replaces rows of an embedding, which "
                        f"'{target.place.name}' of shape {list(shape)} does not have"
                    )
                target.rows.append((numbers, values, weight))
        for module in adapter.modules.values():
            self.take_module(adapter, module, weight)

    def take_module(self, adapter: Adapter, module: AdapterModule, weight: float) -> None:
        names = module.parameters or (f"{module.path}.weight",)
        founds = [self.places.find(name, module.path) for name in names]
        if len(names) > 1:
            # Of the parameters a wrapped module may be of, the one its shapes fit.
            fits = [f for f in founds if isinstance(f, Found) and why_not(module, f.place, f.rows) is None]
            fits = list({id(f.place.value): f for f in fits}.values())
            if len(fits) != 1:
                count = "none" if not fits else "several"
                raise UsageError(
                    f"'{module.path}' of adapter '{adapter.name}' may be of {', '.join(names)}, and by its "
                    f"shapes it is of {count}; say which in a map file"
                )
            founds = list(fits)
        found = founds[0]
        if found is None:
            self.left_out.append(module.path)
            return
        if isinstance(found, str):
            self.missing.append((module.path, found, module))
            return
        if reason := why_not(module, found.place, found.rows):
            raise UnsupportedError(f"'{module.path}' of adapter '{adapter.name}' {reason}")
        target = self.at(adapter, found, module.path, module.kind, ("delta", found.rows))
        target.parts.setdefault(found.rows, []).append((module, weight))
        if module.lora_bias is not None:
            for bias in self.target(adapter, f"{module.path}.bias", f"{module.path}.bias", "bias", ("bias",)):
                if bias.place.shape != (module.lora_bias.size,):
                    raise UnsupportedError(
                        f"the bias of '{module.path}' of adapter '{adapter.name}' has {module.lora_bias.size} "
                        f"elements, but '{bias.place.name}' is of shape {list(bias.place.shape)}"
                    )
                bias.biases.append((module, weight))

    def target(
        self, adapter: Adapter, parameter: str, module: str, kind: str, what: tuple[object, ...]
    ) -> list[Target]:
        """The target of a parameter that is not a module's weight; none when there is none."""
        found = self.places.find(parameter, module if kind != "whole" else parameter)
        if found is None:
            self.left_out.append(parameter)
            return []
        if isinstance(found, str):
            self.missing.append((parameter, found, None))
            return []
        if found.rows is not None:
            raise UsageError(f"the map gives rows for '{parameter}', which only weights of layers have")
        return [self.at(adapter, found, parameter, kind, what)]

    def at(self, adapter: Adapter, found: Found, path: str, kind: str, what: tuple[object, ...]) -> Target:
        """The target of a place, shared by all that change the same uses of it."""
        module = path.removesuffix(".weight")
        uses = None if kind in ("bias", "rows") else own_uses(found.place, [module], kind)
        mark = None if uses is None else tuple(sorted((id(use.node), use.index) for use in uses))
        key = (id(found.place.value), mark)
        if (adapter.path, key, what) in self.taken:
            raise UsageError(
                f"'{path}' and '{self.taken[adapter.path, key, what]}' of adapter '{adapter.name}' "
                f"both belong to '{found.place.name}'; tell them apart in a map file"
            )
        self.taken[adapter.path, key, what] = path
        if key not in self.targets:
            self.targets[key] = Target(found.place, uses, module)
        return self.targets[key]

    def complain(self) -> None:
        """One sentence about everything that was not found.

        Raises:
            UsageError: something was not.
        """
        if not self.missing:
            return
        modules = [module for _, _, module in self.missing if module is not None]
        taken = {id(target.place.value) for target in self.targets.values() if target.parts}
        hints = []
        for path, reason, module in sorted(self.missing, key=lambda m: natural(m[0]))[:_SHOWN]:
            hint = f"; {self.places.proposals(module, modules, taken)}" if module is not None else ""
            hints.append(f"'{path}': {reason}{hint}")
        rest = f" (and {len(self.missing) - _SHOWN} more)" if len(self.missing) > _SHOWN else ""
        count = len(self.missing)
        what = "a tensor of the adapter has" if count == 1 else f"{count} tensors of the adapter have"
        raise UsageError(
            f"{what} no place in the model{rest}; give a map file (--lora-map FILE, or the option map). "
            f"{'; '.join(hints)}"
        )

    def settle_ties(self, untie: bool) -> None:
        """Decide about tables that are an embedding and an output layer at once.

        Raises:
            UnsupportedError: one side is adapted by itself, and ``untie`` is off.
        """
        for key, target in list(self.targets.items()):
            site = target.place.site
            if site is None or target.uses is None or not ("Gather" in site.kinds and len(site.kinds) > 1):
                continue
            if len(target.uses) == len(site.uses) or key not in self.targets:
                continue
            others = [
                (k, t) for k, t in self.targets.items() if t.place.value is target.place.value and k != key
            ]
            if len(others) == 1 and _transposed_twins(target, others[0][1]):
                head = key if target.modules[0][0].kind != "embedding" else others[0][0]
                kept = others[0][1] if head == key else target
                del self.targets[head]
                kept.uses = None
            elif not untie:
                raise UnsupportedError(
                    f"'{target.path}' shares its weight '{target.place.name}' with "
                    f"{'the output layer' if target.uses[0].node.op_type == 'Gather' else 'the embedding'}, "
                    "which the adapter leaves alone; untie=true gives it a copy"
                )


def _transposed_twins(one: Target, other: Target) -> bool:
    """Whether both sides of a tied pair were given the same delta (``ensure_weight_tying``)."""
    pairs = list(zip(one.modules, other.modules, strict=False))
    if not pairs or len(one.modules) != len(other.modules) or one.whole or other.whole:
        return False
    for (a, weight), (b, same_weight) in pairs:
        if a.a is None or a.b is None or b.a is None or b.b is None or a.use_dora or b.use_dora:
            return False
        if {a.kind, b.kind} != {"embedding", "linear"} or a.scaling != b.scaling or weight != same_weight:
            return False
        if not (np.array_equal(a.a, b.b.T) and np.array_equal(a.b, b.a.T)):
            return False
    return True


def _fitted(target: Target, path: str, array: np.ndarray) -> np.ndarray:
    """A replacement in the layout of the file.

    Raises:
        UnsupportedError: its shape is another.
    """
    place, site = target.place, target.place.site
    if site is not None and site.in_axis == 0 and array.ndim == 2 and array.shape == site.shape_oi:
        array = array.T
    if array.shape != place.shape:
        raise UnsupportedError(
            f"'{path}' replaces a tensor of shape {list(array.shape)}, but '{place.name}' has "
            f"{list(place.shape)}"
        )
    return array


def _check_parts(target: Target) -> None:
    """Refuse rows that overlap, and DoRA beside another adapter.

    Raises:
        UnsupportedError: which.
    """
    spans = sorted((rows or (0, 1 << 62)) for rows in target.parts)
    for first, second in itertools.pairwise(spans):
        if second[0] < first[1]:
            raise UnsupportedError(f"the rows mapped to '{target.place.name}' overlap")
    for part in target.parts.values():
        if sum(module.use_dora for module, _ in part) > 1:
            raise UnsupportedError(
                f"'{target.path}' is rescaled by several DoRA adapters, which do not add up; merge one"
            )


def with_initial(
    targets: Sequence[Target], initial: Adapter | None, base: str, encoded: Callable[[Place], bool]
) -> None:
    """Settle what adapters whose training changed the base weight are merged into.

    Args:
        targets: rewritten in place.
        initial: the adapter as training began, where it is given.
        base: ``residual``: the model is the one training started from; ``original``: it is not.
        encoded: whether a place is quantized.

    Raises:
        UsageError: what the base is cannot be told.
    """
    for target in targets:
        for rows, part in target.parts.items():
            target.parts[rows] = [
                (_settled(target, module, initial, base, encoded), weight) for module, weight in part
            ]


def _settled(
    target: Target,
    module: AdapterModule,
    initial: Adapter | None,
    base: str,
    encoded: Callable[[Place], bool],
) -> AdapterModule:
    if initial is not None:
        first = initial.modules.get(module.path)
        if first is None or first.a is None or first.b is None or module_shape(first) != module_shape(module):
            raise UsageError(f"the initial adapter '{initial.name}' has no fitting '{module.path}'")
        return dataclasses.replace(module, initial=first)
    if module.init is True or module.init == "mica":
        # MiCA starts from A = 0, which takes nothing out.
        return dataclasses.replace(module, init=True)
    trained_on_codes = module.init == "loftq" and encoded(target.place) and base in ("auto", "dequantized")
    if base == "residual" or trained_on_codes:
        return dataclasses.replace(module, init=True)
    if base == "original" and module.init in ("pissa", "olora"):
        return module
    raise UsageError(
        f"adapter '{module.adapter}' was initialised by {module.init}, which took a part out of the base "
        "weights; give initial=FOLDER (the adapter before training), or say base=residual if the model is "
        "the one that was saved at the start of training"
        + (", or base=original if it is the original one" if module.init in ("pissa", "olora") else "")
    )
