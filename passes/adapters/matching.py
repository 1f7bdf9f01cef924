"""Which constant of a model an adapter's tensor belongs to: by module path, by a map, never by guessing.

Captured models carry their parameters' names, and a path matches when one of the two is the other with
something in front (``model.``), whole components only. Exporters that rename weights often keep the path
in the names of the nodes (``/encoder/layer.0/query/MatMul``), which is looked at second. What is left
needs a map file: one ``PATH = NAME`` per line, where PATH is a module or parameter of the adapter and
NAME a constant of the model, ``NAME[0:64]`` rows (output channels) of one that holds several, or ``-`` to
leave the adapter's tensor out. ``#`` begins a comment.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.errors import UsageError
from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, describe
from effic.ir.torch_capture import ALIASES_KEY, MODULE_KEY
from effic.ir.weights import WeightSite, WeightUse, weight_sites
from effic.passes.adapters.adapter_files import AdapterModule
from effic.passes.adapters.deltas import why_not_order

LEFT_OUT = "-"
"""What a map says of a tensor that is to be left out."""

# Candidates named in a message.
_SHOWN = 6


@dataclasses.dataclass(eq=False)
class Place:
    """A constant that adapters may change.

    Attributes:
        name: of the initializer (before encoding, for an encoded weight).
        value: the constant, or the decoded value of an encoded weight.
        site: how it is read as a weight, or None for one that is not (biases, norms).
    """

    name: str
    value: ir.Value
    site: WeightSite | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        if self.site is not None and self.site.shape:
            return self.site.shape
        tensor = constant_tensor(self.value)
        return () if tensor is None else tuple(tensor.shape.numpy())


class Found(NamedTuple):
    """Where a path leads: a place, and rows of it where it holds several weights."""

    place: Place
    rows: tuple[int, int] | None


class MapEntry(NamedTuple):
    """A line of a map: a constant's name, and rows of it."""

    name: str
    rows: tuple[int, int] | None


def read_map(path: str) -> dict[str, MapEntry]:
    """A map file.

    Raises:
        UsageError: it cannot be read, or a line is not of the form ``PATH = NAME``.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"cannot read the map {path}: {reason}.") from error
    found: dict[str, MapEntry] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        key, sign, name = (part.strip() for part in text.partition("="))
        match = re.fullmatch(r"(.+?)(?:\[(\d+):(\d+)\])?", name)
        if not sign or not key or match is None or key in found:
            why = "names a path again" if key in found else "is not of the form PATH = NAME"
            raise UsageError(f"line {number} of the map {path} {why}: {text:.80}")
        rows = (int(match[2]), int(match[3])) if match[2] else None
        if rows is not None and rows[0] >= rows[1]:
            raise UsageError(f"line {number} of the map {path} names no rows: {text:.80}")
        found[key] = MapEntry(match[1], rows)
    return found


class Places:
    """The constants of a model by the paths they are known under.

    Args:
        model: not changed. Valid until the graph changes.
        mapping: lines of a map file, see :func:`read_map`.
    """

    def __init__(self, model: Model, mapping: Mapping[str, MapEntry]) -> None:
        self.mapping = dict(mapping)
        self.used: set[str] = set()
        self.sites = weight_sites(model)
        # Subgraphs and functions may each have a constant of one name.
        self.by_name: dict[str, list[Place]] = {}
        self.by_scope: dict[str, list[Place]] = {}
        for site in self.sites:
            if constant_tensor(site.value) is None and site.encoding is None:
                continue
            place = Place(site.name, site.value, site)
            self._name(site.name, place)
            for use in site.uses:
                path = module_of(use.node)
                if path is not None and place not in self.by_scope.setdefault(f"{path}.weight", []):
                    self.by_scope[f"{path}.weight"].append(place)
        for graph in model.graphs():
            for name, value in graph.initializers.items():
                known = any(place.value is value for place in self.by_name.get(name, ()))
                if not known and constant_tensor(value) is not None:
                    self._name(name, Place(name, value, None))

    def _name(self, name: str, place: Place) -> None:
        for known in dict.fromkeys((name, *aliases(place.value))):
            self.by_name.setdefault(known, []).append(place)

    def find(self, parameter: str, module: str) -> Found | str | None:
        """The place of a parameter.

        Args:
            parameter: its path, ``encoder.0.query.weight``.
            module: its module's path, which the map may name instead where it means the weight.

        Returns:
            The place; None where the map leaves it out; or why there is none, as a phrase.
        """
        for key in dict.fromkeys((parameter, module)):
            if key not in self.mapping:
                continue
            self.used.add(key)
            entry = self.mapping[key]
            if entry.name == LEFT_OUT:
                return None
            named = self.by_name.get(entry.name, [])
            if len(named) != 1:
                count = "several constants" if named else "no constant"
                return f"the map names '{entry.name}', which is {count} of the model"
            return Found(named[0], entry.rows)
        for table in (self.by_name, self.by_scope):
            places = table.get(parameter) or _by_suffix(parameter, table)
            unique = list({id(place.value): place for place in places}.values())
            if len(unique) == 1:
                return Found(unique[0], None)
            if len({place.name for place in unique}) == 1 < len(unique):
                return f"{len(unique)} graphs of the model have a constant '{unique[0].name}' of their own"
            if unique:
                names = ", ".join(f"'{place.name}'" for place in unique[:_SHOWN])
                return f"several constants could be meant: {names}"
        return "no constant of the model has that path"

    def unused(self) -> list[str]:
        """Paths of the map that nothing asked for."""
        return sorted(self.mapping.keys() - self.used)

    def proposals(
        self, module: AdapterModule, others: Sequence[AdapterModule], taken: Collection[int] = ()
    ) -> str:
        """What may be meant by a module that was not found: by shape, and by position among its like.

        Args:
            module: the one that was not found.
            others: all that were not found, this one among them.
            taken: ids of the values that other modules were found to belong to.
        """
        shape = module_shape(module)
        free = [site for site in self.sites if site.shape and id(site.value) not in taken]
        fits = [site for site in free if _agrees(shape, site.shape_oi)]
        alike = sorted((m for m in others if module_shape(m) == shape), key=lambda m: natural(m.path))
        if len(fits) != len(alike) and (layer := _numbers(module.path)):
            # Too many, or too few: those of the same layer.
            near = [site for site in fits if _numbers(site.name)[-len(layer) :] == layer]
            if near:
                fits, alike = near, [m for m in alike if _numbers(m.path) == layer]
        at = alike.index(module)
        if fits and len(fits) == len(alike):
            guess = fits[at].name
            return f"by shape and position it may be '{guess}' (map line: {module.path} = {guess})"
        if fits:
            names = ", ".join(f"'{site.name}'" for site in fits[:_SHOWN])
            more = f" and {len(fits) - _SHOWN} more" if len(fits) > _SHOWN else ""
            # No two modules are told the same line.
            line = f" (map line: {module.path} = {fits[at].name})" if at < len(fits) else ""
            return f"of its shape are {names}{more}{line}"
        fused = [
            site
            for site in free
            if shape[1] == site.shape_oi[1] and shape[0] is not None and site.shape_oi[0] > shape[0]
        ]
        if fused:
            name = fused[0].name
            return (
                f"'{name}' has its inputs and more outputs, and may hold several projections "
                f"(map line: {module.path} = {name}[0:{shape[0]}])"
            )
        return f"no weight has its shape {['?' if d is None else d for d in shape]}"


def _by_suffix(parameter: str, table: Mapping[str, list[Place]]) -> list[Place]:
    """Places whose path is the parameter's with something in front, or else the other way round."""
    longer = [places for name, places in table.items() if name.endswith(f".{parameter}")]
    found = longer or [
        places for name, places in table.items() if "." in name and parameter.endswith(f".{name}")
    ]
    return [place for places in found for place in places]


def _numbers(path: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", path)]


def aliases(value: ir.Value) -> list[str]:
    """Other state-dict names of a tied weight."""
    try:
        found = json.loads(value.metadata_props.get(ALIASES_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def module_of(node: ir.Node) -> str | None:
    """The dotted path of the module a node was exported from, or None where nothing tells."""
    path = node.metadata_props.get(MODULE_KEY)
    if path is None and node.name and node.name.startswith("/") and node.domain in ONNX_DOMAINS:
        # The habit of torch's older exporter: /encoder/layer.0/query/MatMul.
        path = ".".join(node.name.strip("/").split("/")[:-1])
    # A module that is called again is called "name@1" by torch.
    return re.sub(r"@\d+", "", path) if path else None


def module_shape(module: AdapterModule) -> tuple[int | None, int | None]:
    """``(out, in)`` of the weight a module belongs to, None where its tensors do not tell."""
    a, b, extra = module.a, module.b, module.extra
    if module.method in ("lora", "l4q") and a is not None and b is not None:
        if module.kind == "embedding":
            return a.shape[1], b.shape[0]
        return b.shape[0], int(np.prod(a.shape[1:]))
    if module.method == "paca":
        return extra["paca_w"].shape[0], None
    if module.method == "svfit":
        return extra["u"].shape[0], extra["v"].shape[0]
    s2 = extra["s2"]
    return (None, s2.shape[1]) if int(extra["axis"].item()) == 0 else (s2.shape[0], None)


def _agrees(shape: tuple[int | None, int | None], real: tuple[int, int]) -> bool:
    return all(want in (None, got) for want, got in zip(shape, real, strict=True))


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key that counts: ``layer.2`` before ``layer.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


# -- what may be done at a place -------------------------------------------------------------------


def why_not(module: AdapterModule, place: Place, rows: tuple[int, int] | None) -> str | None:
    """Why a module cannot be merged into a place, as a phrase that follows its path, or None."""
    site = place.site
    if module.kind == "expert":
        return _why_not_experts(module, place)
    if site is None:
        return f"belongs to '{place.name}', which no node reads as a weight"
    # Encodings hold no fp64 weights; sums can.
    if site.why_not is not None and site.dtype != ir.DataType.DOUBLE:
        return f"belongs to '{place.name}', which {site.why_not}"
    if "ConvTranspose" in site.kinds:
        return f"belongs to '{place.name}', which a ConvTranspose reads; adapters of those are not defined"
    if module.kind == "embedding" and "Gather" not in site.kinds:
        return f"is an embedding's, but '{place.name}' is read by {site.kind}"
    if module.kind != "embedding" and site.kinds == {"Gather"}:
        return f"is a layer's, but '{place.name}' is an embedding table"
    if (module.kind == "conv") != ("Conv" in site.kinds) and not (
        module.kind == "linear" and site.kind == "Conv" and site.elements == site.shape[0] * site.shape[1]
    ):
        return f"is {'a convolution' if module.kind == 'conv' else 'a matrix'}'s, but '{place.name}' is not"
    if module.kind == "conv":
        if reason := _why_not_conv(site):
            return reason
        if module.a is not None and module.a.shape[1:] != site.shape[1:]:
            return f"has A of shape {list(module.a.shape)}, but '{place.name}' has {list(site.shape)}"
    out, into = site.shape_oi
    if rows is not None:
        if rows[1] > out:
            return f"is mapped to rows {rows[0]}:{rows[1]} of '{place.name}', which has {out}"
        out = rows[1] - rows[0]
    if module.method == "s2ft" and (reason := why_not_order(module, (out, into))):
        return reason
    if not _agrees(module_shape(module), (out, into)) or not _inside(module, (out, into)):
        wanted = ["any" if d is None else d for d in module_shape(module)]
        return f"is for a weight of shape {wanted}, but '{place.name}' has {[out, into]}"
    return None


def _inside(module: AdapterModule, shape: tuple[int, int]) -> bool:
    """Whether the channels a method names are there."""
    if module.method == "paca":
        return int(module.extra["paca_indices"].max()) < shape[1]
    if module.method == "s2ft":
        along = shape[int(module.extra["axis"].item())]
        return int(module.extra["start"].item()) + module.rank <= along
    return True


def _why_not_experts(module: AdapterModule, place: Place) -> str | None:
    shape = place.shape
    if constant_tensor(place.value) is None:
        return f"belongs to '{place.name}', which is no plain constant"
    out, into = module_shape(module)
    if len(shape) != 3 or shape[0] != module.experts or set(shape[1:]) != {out, into}:
        return f"is for {module.experts} experts of {[out, into]}, but '{place.name}' has {list(shape)}"
    if expert_axis(place, module) is None:
        return f"is for square experts, and which axis of '{place.name}' is the input is not known"
    return None


def expert_axis(place: Place, module: AdapterModule) -> int | None:
    """Axis of a stack ``[E, …]`` of expert weights that is the input, or None when nothing tells."""
    out, into = module_shape(module)
    if out != into:
        return 2 if place.shape[2] == into else 1
    readers = [use for use in place.value.uses() if use.node.op_type == "MatMul" and use.idx == 1]
    return 1 if readers and len(readers) == len(place.value.uses()) else None


def _why_not_conv(site: WeightSite) -> str | None:
    """PEFT's convolution A has the base's stride and padding, but not its dilation, groups or mode."""
    for use in site.uses:
        node = use.node
        dilations = node.attributes.get("dilations")
        if site.groups != 1:
            return f"belongs to {describe(node)}, whose {site.groups} groups cannot hold a dense delta"
        if dilations is not None and any(d != 1 for d in dilations.as_ints()):
            return f"belongs to {describe(node)}, whose dilation the adapter's convolution does not have"
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        mode = source.attributes.get("mode") if source is not None and source.op_type == "Pad" else None
        if mode is not None and mode.as_string() != "constant":
            return f"belongs to {describe(node)}, whose inputs are padded otherwise than with zeros"
    return None


def own_uses(place: Place, paths: Iterable[str], kind: str) -> list[WeightUse] | None:
    """The uses of a shared weight that belong to a module, or None when all do.

    A table that is an embedding and an output layer at once is told apart by operator, other shared
    weights by the module their nodes come from.

    Args:
        place: where the module's weight is.
        paths: the module's path.
        kind: of the module, see :class:`~effic.passes.adapters.adapter_files.AdapterModule`.
    """
    site = place.site
    if site is None:
        return None
    if "Gather" in site.kinds and len(site.kinds) > 1:
        return [use for use in site.uses if (use.node.op_type == "Gather") == (kind == "embedding")]
    modules = {module_of(use.node) for use in site.uses}
    if len(modules) > 1:
        wanted = tuple(paths)
        mine = [use for use in site.uses if any(_same_module(module_of(use.node), p) for p in wanted)]
        if mine and len(mine) < len(site.uses):
            return mine
    return list(site.uses) if site.other_readers else None


def _same_module(found: str | None, path: str) -> bool:
    return found is not None and (found == path or found.endswith(f".{path}") or path.endswith(f".{found}"))


def put(place: Place, tensor: ir.TensorProtocol) -> None:
    """Give a constant another value, under its name."""
    tensor.name = place.value.name
    node = place.value.producer()
    if node is not None:
        # The constants of function bodies are nodes.
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", tensor))
    place.value.const_value = tensor
