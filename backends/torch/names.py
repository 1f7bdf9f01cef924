"""Names: what ONNX allows in a name and torch does not."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable

from torch import fx, nn


def state_keys(names: Iterable[str]) -> dict[str, str]:
    """A state-dict key for each initializer name: the name itself wherever torch can hold it.

    A dot makes a submodule. Changed, by an underscore and perhaps a number at the end, are names that an
    ``fx.GraphModule`` has a use for (``graph``, ``forward``) or Python (``class``), and names that are the
    submodule of others (``a`` beside ``a.b``); where a part is at fault, dots become underscores.

    Args:
        names: all different.

    Returns:
        Keys by name, all different.
    """
    wanted = list(names)
    usable = {name: _parts_allowed(name) for name in wanted}
    prefixes = {
        ".".join(parts[:i]) for name in wanted for parts in [name.split(".")] for i in range(1, len(parts))
    }
    keys: dict[str, str] = {}
    taken = {name for name in wanted if usable[name] and name not in prefixes}
    for name in wanted:
        if name in taken:
            keys[name] = name
            continue
        base = (name if usable[name] else name.replace(".", "_")) + "_"
        if base.startswith("__"):
            base = f"tensor{base}"  # torch keeps such names to itself, whatever follows
        key, number = base, 0
        while key in taken or key in prefixes or not _parts_allowed(key):
            number += 1
            key = f"{base}{number}"
        taken.add(key)
        keys[name] = key
    return keys


def _parts_allowed(name: str) -> bool:
    parts = name.split(".")
    if any(not part or part.startswith("__") or keyword.iskeyword(part) for part in parts) or hasattr(
        fx.GraphModule, parts[0]
    ):
        return False
    return parts[0] not in _RESERVED and not any(hasattr(_PLAIN, part) for part in parts)


_PLAIN = nn.Module()
# Names that the code torch writes for a graph reads as globals or builtins.
_CODES_OWN = {
    "self",
    "torch",
    "math",
    "inf",
    "nan",
    "NoneType",
    "device",
    "pytree",
    "fx_pytree",
    "getattr",
    "slice",
}
_RESERVED = ("meta", "graph", "code", "effic_constants", "effic_bodies")


def argument_names(names: Iterable[str]) -> dict[str, str]:
    """A Python argument for each ONNX input: the name itself, or the nearest identifier that is free."""
    wanted = list(names)
    taken = {name for name in wanted if _identifier(name)}
    result = {}
    for name in wanted:
        if name in taken:
            result[name] = name
            continue
        base = re.sub(r"\W", "_", name, flags=re.ASCII) or "input"
        if not _identifier(base):
            base = f"input_{base}"
        argument, number = base, 0
        while argument in taken:
            number += 1
            argument = f"{base}_{number}"
        taken.add(argument)
        result[name] = argument
    return result


def _identifier(name: str) -> bool:
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and name not in _CODES_OWN
