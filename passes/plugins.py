"""Passes and targets of other packages, found by their entry points."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from effic.ir.errors import UsageError

T = TypeVar("T")


def plugin_names(group: str) -> list[str]:
    """Names that other packages give in an entry point group, sorted, each once."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_plugin(group: str, name: str, kind: str, base: type[T]) -> type[T] | None:
    """The class another package offers under a name, or None where no package does.

    Args:
        group: the entry point group, ``effic.passes`` or ``effic.backends``.
        name: the entry point's name.
        kind: ``pass`` or ``target``, for messages.
        base: what it has to be a subclass of.

    Raises:
        UsageError: it does not load, two packages offer it, it is of another kind or called otherwise.
    """
    entries = [entry for entry in entry_points(group=group) if entry.name == name]
    if not entries:
        return None
    values = sorted({entry.value for entry in entries})
    if len(values) > 1:
        owners = " and ".join(sorted({_owner(entry) for entry in entries}))
        raise UsageError(
            f"the {kind} '{name}' is offered twice, by {owners} ({', '.join(values)}); uninstall one"
        )
    entry = entries[0]
    where = f"the {kind} '{name}' of {_owner(entry)} ({entry.value})"
    try:
        found = entry.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(
            f"{where} does not load: {error}; install that package again, or remove it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"{where} is not a subclass of {base.__module__}.{base.__qualname__}")
    # The text form of a run holds the class's name, and has to lead back to the class.
    if getattr(found, "name", None) != name:
        raise UsageError(
            f"{where} calls itself '{getattr(found, 'name', '')}'; the entry point and the class's name have "
            "to be the same"
        )
    return found


def plugin_packages(group: str, names: Iterable[str]) -> dict[str, str]:
    """Packages that offer these names in an entry point group, with their versions."""
    wanted = set(names)
    found = (entry.dist for entry in entry_points(group=group) if entry.name in wanted)
    return {dist.name: dist.version for dist in found if dist is not None}


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unnamed package"
