"""Text to passes and back: ``fuse-conv-bn,quantize-rtn{bits=4,group_size=128}``.

Grammar: passes are separated by commas; options stand in braces as ``name=value``; a list is
``[a,b]``; a text with any of ``,{}[]="`` in it stands in double quotes. A mistake is answered with
a caret under it, the nearest known name and the allowed values.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from effic.ir.errors import UsageError
from effic.passes import load_pass, near
from effic.passes.base import Pass, option_problem, options_of

_WORD = re.compile(r'[^\s,{}\[\]="]+')
T = TypeVar("T")


def parse_passes(text: str) -> list[Pass]:
    """The passes a text names.

    Raises:
        UsageError: with the text, a caret under the mistake, and what would be right.
    """
    return [build_pass(name, options, text, at) for name, at, options in _Reader(text).items()]


def parse_one(text: str) -> tuple[str, int, dict[str, tuple[Any, int]]]:
    """Name, its place and raw options of a single ``name{…}`` (how targets are written)."""
    items = _Reader(text).items()
    if len(items) != 1:
        raise UsageError(f"'{text}' should name one thing, not {len(items)}")
    return items[0]


def parse_several(text: str) -> list[tuple[str, int, dict[str, tuple[Any, int]]]]:
    """Names, their places and raw options of ``name{…},name{…}``."""
    return _Reader(text).items()


def build_pass(name: str, options: Mapping[str, tuple[Any, int]], text: str, at: int) -> Pass:
    """A pass from its name and raw option texts (each with its place in ``text``)."""
    try:
        cls = load_pass(name)
    except UsageError as error:
        raise UsageError(_caret(text, at, str(error))) from error
    return build(cls, name, options, text, at)


def build(cls: type[T], name: str, options: Mapping[str, tuple[Any, int]], text: str, at: int) -> T:
    """An instance of a dataclass whose fields are options, from raw option texts."""
    known = {field.name: (field, kind) for field, kind in options_of(cls)}
    values: dict[str, Any] = {}
    for key, (raw, place) in options.items():
        if key not in known:
            names = ", ".join(known) or "none"
            hint = near(key, list(known))
            raise UsageError(_caret(text, place, f"{name} has no option '{key}'{hint} (options: {names})"))
        field, kind = known[key]
        value = _convert(raw, kind)
        if problem := option_problem(field, kind, value):
            raise UsageError(_caret(text, place, f"{name}: {key} {problem}"))
        values[key] = value
    for key, (field, _) in known.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and key not in values:
            raise UsageError(_caret(text, at, f"{name} needs the option {key}: {field.metadata.get('help')}"))
    return cls(**values)


def with_options(text: str, extra: Sequence[str]) -> str:
    """``name{…}`` with further options, each ``NAME=VALUE``.

    Raises:
        UsageError: one is not of that form, or contradicts what is there.
    """
    if not extra:
        return text
    name, _, options = parse_one(text)
    values = {key: value for key, (value, _) in options.items()}
    for item in extra:
        key, sign, _ = (part.strip() for part in item.partition("="))
        if not sign or not key:
            raise UsageError(f"'{item}' is not of the form NAME=VALUE")
        (value, _) = parse_one(f"{name}{{{item}}}")[2][key]
        if values.setdefault(key, value) != value:
            raise UsageError(f"{name}: {key} is said to be both {values[key]} and {value}; say one of them")
    return f"{name}{{{','.join(f'{k}={_raw_text(v)}' for k, v in values.items())}}}"


def to_text(passes: Sequence[Pass] | Pass) -> str:
    """The text form, with the options that differ from their defaults."""
    if isinstance(passes, Pass):
        return option_text(passes.name, passes)
    return ",".join(option_text(p.name, p) for p in passes)


def option_text(name: str, value: Any) -> str:
    """``name{option=value,…}`` of any dataclass of options, defaults left out."""
    parts = []
    for field in dataclasses.fields(value):
        current = getattr(value, field.name)
        if current != field.default:
            parts.append(f"{field.name}={_value_text(current)}")
    return f"{name}{{{','.join(parts)}}}" if parts else name


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A recipe file: the same fields as the command line, in TOML.

    ::

        target = "ort-cpu"           # optional
        check = "each"               # optional: each, final, off
        require_change = false       # optional
        seed = 0                     # optional
        calib = "images.npz"         # optional; also calib_samples, calib_window

        [accuracy]                   # optional: the options --metric, --data, --max-drop, …
        metric = "top1"
        data = "validation.npz"
        max_drop = 0.5

        [[pass]]
        name = "quantize-rtn"
        bits = 4
        group_size = 32

    Returns:
        The fields that were given, ``passes`` as a list of :class:`Pass`, ``accuracy`` as it is written.

    Raises:
        UsageError: no such file, no TOML, an unknown field or option.
    """
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from error
    kinds: dict[str, type] = {
        "pass": list, "target": str, "check": str, "require_change": bool, "seed": int,
        "calib": str, "calib_samples": int, "calib_window": int, "accuracy": dict,
    }  # fmt: skip
    for key, value in data.items():
        if key not in kinds:
            raise UsageError(f"the recipe {path} has an unknown field '{key}'{near(key, sorted(kinds))}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool) != (kinds[key] is bool):
            raise UsageError(f"the recipe {path}: {key} is {value!r}, expected {kinds[key].__name__}")
    if data.get("check", "each") not in ("each", "final", "off"):
        raise UsageError(f"the recipe {path}: check is {data['check']!r}, allowed are each, final, off")
    rows = data.pop("pass", [])
    if not rows:
        raise UsageError(f"the recipe {path} has no pass; add a [[pass]] with a name")
    passes = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise UsageError(f"the recipe {path}: [[pass]] number {number} needs a name")
        options = {k: (v, 0) for k, v in row.items() if k != "name"}
        try:
            passes.append(build_pass(row["name"], options, "", 0))
        except UsageError as error:
            raise UsageError(f"the recipe {path}, [[pass]] number {number}: {error}") from error
    data["passes"] = passes
    return data


def _raw_text(raw: Any) -> str:
    """An option's value as it is written, from what the reader made of it."""
    return _value_text(tuple(raw) if isinstance(raw, list) else raw)


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ",".join(_value_text(v) for v in value) + "]"
    if isinstance(value, str) and not _WORD.fullmatch(value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def _convert(raw: Any, kind: Any) -> Any:
    """A raw text (or a TOML value) as the option's type; what does not fit is returned as it is."""
    if typing.get_origin(kind) is tuple:
        if isinstance(raw, str):
            return (raw,)
        return tuple(raw) if isinstance(raw, list) else raw
    if not isinstance(raw, str):
        return float(raw) if kind is float and type(raw) is int else raw
    if kind is bool:
        return {"true": True, "false": False}.get(raw, raw)
    if typing.get_origin(kind) is typing.Literal:
        return next((v for v in typing.get_args(kind) if str(v) == raw), raw)
    if kind in (int, float):
        try:
            return kind(raw)
        except ValueError:
            return raw
    return raw


def _caret(text: str, at: int, message: str) -> str:
    return f"{message}\n  {text}\n  {' ' * at}^" if text else message


class _Reader:
    """A small recursive-descent reader that remembers where it is."""

    def __init__(self, text: str) -> None:
        # A line break is only white space: recipes on a command line often have some.
        self.text = re.sub(r"\s", " ", text)
        self.at = 0

    def items(self) -> list[tuple[str, int, dict[str, tuple[Any, int]]]]:
        found = []
        if not self.text.strip():
            raise UsageError("the list of passes is empty; `effic passes` lists them")
        while True:
            place, name = self._word("the name of a pass")
            options: dict[str, tuple[Any, int]] = {}
            if self._take("{"):
                while not self._take("}"):
                    if options:
                        self._need(",", "',' or '}'")
                    key_at, key = self._word("the name of an option")
                    self._need("=", f"'=' after {key}")
                    if key in options:
                        self._fail(f"{key} is given twice", key_at)
                    options[key] = (self._value(), key_at)
            found.append((name, place, options))
            if self._peek() == "":
                return found
            self._need(",", "',' and another pass")

    def _value(self) -> Any:
        if self._take("["):
            values: list[str] = []
            while not self._take("]"):
                if values:
                    self._need(",", "',' or ']'")
                values.append(self._text())
            return values
        return self._text()

    def _text(self) -> str:
        if self._peek() != '"':
            return self._word("a value")[1]
        start = self.at
        self.at += 1
        out = ""
        while self.at < len(self.text) and self.text[self.at] != '"':
            if self.text[self.at] == "\\" and self.at + 1 < len(self.text):
                self.at += 1
            out += self.text[self.at]
            self.at += 1
        if self.at >= len(self.text):
            self._fail("this quotation mark is never closed", start)
        self.at += 1
        return out

    def _peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _take(self, mark: str) -> bool:
        if self._peek() != mark:
            return False
        self.at += 1
        return True

    def _need(self, mark: str, what: str) -> None:
        if not self._take(mark):
            self._fail(f"expected {what}", self.at)

    def _word(self, what: str) -> tuple[int, str]:
        self._peek()
        match = _WORD.match(self.text, self.at)
        if match is None:
            self._fail(f"expected {what}", self.at)
        self.at = match.end()
        return match.start(), match.group()

    def _fail(self, message: str, at: int) -> typing.NoReturn:
        raise UsageError(_caret(self.text, at, message))
