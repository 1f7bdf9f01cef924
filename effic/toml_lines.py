"""Where the keys of a TOML file are written."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any


def key_lines(text: str, data: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """The line, from 1, of every key and table of a TOML file.

    The TOML reader of the standard library tells no lines: each line is tried as a header or as a key, and
    counts where the data hold such a key (so that text which only looks like one does not).
    """
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line.startswith("["):
            if (keys := _only_key(line)) and _has(data, keys):
                table = keys
                _note(found, keys, number)
            continue
        starts = [at for at, letter in enumerate(line) if letter == "="]
        keys = next((k for at in starts if (k := _only_key(f"{line[:at]} = 0"))), None)
        if keys and _has(data, (*table, *keys)):
            _note(found, (*table, *keys), number)
    return found


def _note(found: dict[tuple[str, ...], int], keys: tuple[str, ...], line: int) -> None:
    for size in range(1, len(keys) + 1):
        found.setdefault(keys[:size], line)


def _only_key(text: str) -> tuple[str, ...] | None:
    """The path of the one key that a piece of TOML sets, or None."""
    try:
        found: Any = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return None
    keys: list[str] = []
    while isinstance(found, dict) and len(found) == 1:
        ((key, found),) = found.items()
        keys.append(key)
    return tuple(keys) or None


def _has(data: Any, keys: Iterable[str]) -> bool:
    for key in keys:
        if not isinstance(data, Mapping) or key not in data:
            return False
        data = data[key]
    return True
