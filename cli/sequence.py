"""Options with which commands name a sequence of passes, its target and its calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--passes", metavar="TEXT", help="Passes in order: 'fuse-conv-bn,quantize-rtn{bits=4}'."),
    click.option("--preset", metavar="NAME", help="A named sequence of passes ('effic passes' lists them)."),
    click.option("--recipe", metavar="FILE", help="A TOML file of passes, target and checks."),
    click.option("--target", metavar="TEXT", help="Lower for it before judging.  [default: as written]"),
    click.option(
        "--calib", metavar="SOURCE", help="Data for passes that look at some, as 'optimize' takes them."
    ),
    click.option("--calib-samples", type=int, metavar="N", help="Samples of it to use.  [default: 128]"),
    click.option("--calib-window", type=int, metavar="N", help="Tokens of a sample, when it is token ids."),
    click.option(
        "--seed", type=int, help="Seed of made-up inputs, and of the choice of samples.  [default: 0]"
    ),
)


def sequence_options(command: F) -> F:
    """Passes, target and calibration data."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def sequence(options: dict[str, Any]) -> dict[str, Any]:
    """The passes and what goes with them, taken out of a command's options.

    Raises:
        UsageError: none or several of --passes, --preset and --recipe.
    """
    from effic.ir.errors import UsageError
    from effic.passes.presets import preset
    from effic.passes.spec import parse_passes, read_recipe

    passes, named, recipe = (options.pop(name) for name in ("passes", "preset", "recipe"))
    if sum(choice is not None for choice in (passes, named, recipe)) != 1:
        raise UsageError("give the passes with one of --passes, --preset and --recipe")
    given = {name: options.pop(name) for name in ("target", "calib", "calib_samples", "calib_window", "seed")}
    if recipe is not None:
        found = read_recipe(recipe)
        for unused in ("check", "require_change", "accuracy"):
            found.pop(unused, None)
    else:
        found = {"passes": parse_passes(passes if passes is not None else preset(named).text)}
    return {**found, **{name: value for name, value in given.items() if value is not None}}
