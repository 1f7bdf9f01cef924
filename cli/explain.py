"""``effic explain``: one pass, in its own words."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any, Literal

import click

from effic.cli import console


@click.command()
@click.argument("name", metavar="PASS")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def explain(name: str, as_json: bool) -> None:
    """What PASS does, where it refuses, and its options."""
    from effic.passes import load_pass
    from effic.passes.base import options_of

    found = load_pass(name)
    text = inspect.getdoc(found) or ""
    options = [_option(field, kind) for field, kind in options_of(found)]
    if as_json:
        console.print_json(
            {
                "name": name,
                "numerics": found.numerics.value,
                "needs_opset": found.needs_opset,
                "needs_data": found.wants_data(),
                "documentation": text,
                "options": options,
            }
        )
        return
    needs = f", needs opset {found.needs_opset}" if found.needs_opset else ""
    needs += ", needs calibration data" if found.wants_data() else ""
    console.print_result(f"{name} ({found.numerics.value}{needs})", "", text, "")
    if not options:
        console.print_result("It has no options.")
        return
    console.print_result("Options:")
    for option in options:
        default = "must be given" if option["required"] else f"default {_text(option['default'])}"
        limits = f", {option['limits']}" if option["limits"] else ""
        console.print_result(f"  {option['name']}: {option['type']}, {default}{limits}")
        console.print_result(f"      {option['help']}")
    data = " --calib data.npz" if found.wants_data() else ""
    console.print_result(
        "", f"For example: effic optimize model.onnx --passes '{_example(name, options)}'{data} -o out.onnx"
    )


def _option(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = None if required or field.default is dataclasses.MISSING else field.default
    limits = []
    if "ge" in field.metadata:
        limits.append(f"at least {field.metadata['ge']}")
    if "le" in field.metadata:
        limits.append(f"at most {field.metadata['le']}")
    if field.metadata.get("choices"):
        limits.append("one of " + ", ".join(map(str, field.metadata["choices"])))
    return {
        "name": field.name,
        "type": _type(kind),
        "required": required,
        "default": default,
        "limits": ", ".join(limits),
        "help": field.metadata.get("help", ""),
        "example": field.metadata.get("example"),
    }


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "[text, …]"
    return {int: "integer", float: "number", bool: "true | false", str: "text"}.get(kind, str(kind))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return repr(value) if value == "" else str(value)


def _example(name: str, options: list[dict[str, Any]]) -> str:
    """The pass with what has to be given, or else with one option that has a value to show."""
    shown = [f"{o['name']}={o['example']}" for o in options if o["example"]]
    if not shown:
        shown = [f"{o['name']}={_text(o['default'])}" for o in options if o["default"] not in (None, "", ())][
            :1
        ]
    return f"{name}{{{','.join(shown)}}}" if shown else name
