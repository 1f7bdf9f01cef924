"""``effic passes``: what there is to run."""

from __future__ import annotations

from typing import Any

import click

from effic.cli import console


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the lists as JSON.")
def passes(as_json: bool) -> None:
    """List all passes, the presets with the reason for each line, and the targets.

    A pass is 'exact' (bit for bit the same outputs), 'rounding' (the same mathematics in another
    order) or 'lossy' (outputs move on purpose, and the distance is measured).
    """
    from effic.backends import load_backend, target_names
    from effic.ir.errors import UsageError
    from effic.passes import load_pass, pass_names
    from effic.passes.presets import PRESETS

    rows = []
    for name in pass_names():
        try:
            found = load_pass(name)
        except UsageError as error:
            # Another package's: the list must not fall with it.
            rows.append({"name": name, "numerics": "?", "summary": str(error)})
            continue
        rows.append({"name": name, "numerics": found.numerics.value, "summary": found.summary()})
    targets = []
    for name in target_names():
        try:
            targets.append({"name": name, "summary": load_backend(name).summary()})
        except UsageError as error:
            targets.append({"name": name, "summary": str(error)})
    if as_json:
        presets = {name: _preset(p) for name, p in PRESETS.items()}
        console.print_json({"passes": rows, "presets": presets, "targets": targets})
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        console.print_result(f"{row['name']:<{width}}  {row['numerics']:<8}  {row['summary']}")
    console.print_result("", "'effic explain PASS' tells more about each.")
    for name, preset in PRESETS.items():
        console.print_result("", f"preset {name}: {preset.summary}")
        width = max(len(line) for line, _ in preset.lines)
        for line, reason in preset.lines:
            console.print_result(f"  {line:<{width}}  {reason}")
    console.print_result("")
    for target in targets:
        console.print_result(f"target {target['name']}: {target['summary']}")


def _preset(preset: Any) -> dict[str, Any]:
    return {
        "summary": preset.summary,
        "passes": preset.text,
        "lines": [{"pass": line, "reason": reason} for line, reason in preset.lines],
    }
