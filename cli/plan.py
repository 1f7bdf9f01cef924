"""``effic optimize --plan``: what a run will take, before it starts."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from effic.cli import console

if TYPE_CHECKING:
    from effic.plan import Plan

REASONS = 8
"""Missed reasons that are printed; ``--json`` has them all."""

_QUOTED = re.compile(r"'[^']*'")


def show_plan(model: str, options: dict[str, Any], *, as_json: bool, quiet: bool, **more: Any) -> None:
    """Plan a run and print it.

    Args:
        model: the file.
        options: what the run would be given by the recipe and the command line.
        as_json, quiet: as for the run.
        more: ``output``, ``inputs``, ``external`` and ``resume`` of the run.
    """
    from effic.plan import plan

    # What only concerns writing and printing is left aside: --plan is put behind the command as it will be run.
    given = {
        name: value
        for name, value in options.items()
        if name not in ("accuracy", "keep_if_faster", "threads", "require_change")
    }
    with console.progress(quiet or as_json) as bar:
        task = None if bar is None else bar.add_task("reading", total=None)

        def advance(text: str, number: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=text, completed=number, total=total)

        found = plan(
            model,
            scored=options.get("accuracy") is not None,
            timed=bool(options.get("keep_if_faster")),
            progress=advance,
            **more,
            **given,
        )
    if as_json:
        console.print_json(found.to_dict())
    elif not quiet:
        _print(found)


def _print(found: Plan) -> None:
    console.print_result(
        console.table(
            "pass", ">changes", ">leaves", ">weights", ">nodes", ">memory", ">time",
            rows=[
                [
                    f"lower for {step.text}" if step.name == "lower" else step.text,
                    str(step.sites),
                    str(step.left_alone),
                    console.size(step.weight_bytes),
                    str(step.nodes),
                    console.size(step.memory),
                    console.seconds(step.seconds),
                ]
                for step in found.steps
            ],
        ),
        "",
        console.table(
            "what", ">takes", ">there is",
            rows=[
                ["memory, at most", console.size(found.memory), _free(found.memory_free)],
                ["output", console.size(found.file), _free(found.output_free)],
                ["temporary files, at most", console.size(found.temporary), _free(found.temporary_free)],
            ],
        ),
        "",
        f"time: about {_time(found)}",
    )  # fmt: skip
    _print_missed(found)
    for note in found.notes:
        console.note(f"note: {note}")
    for phrase in found.misfits:
        console.print_result("", f"does not fit: {phrase}")


def _free(count: int | None) -> str:
    return "?" if count is None else console.size(count)


def _time(found: Plan) -> str:
    names = {
        "load": "reading",
        "calibration": "reading data",
        "passes": "passes",
        "check": "checks",
        "save": "saving",
    }
    parts = [
        f"{text} {console.seconds(found.seconds[name])}"
        for name, text in names.items()
        if found.seconds[name]
    ]
    return f"{console.seconds(found.seconds['total'])} ({', '.join(parts)})"


def _print_missed(found: Plan) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for step in found.steps:
        for row in step.missed:
            key = step.name, _QUOTED.sub("", row["text"])
            counts[key] += row["count"]
            first.setdefault(key, (row["where"], row["text"]))
    if not counts:
        return
    console.print_result("", "will be left alone:")
    for key, count in counts.most_common(REASONS):
        where, text = first[key]
        others = f" and {count - 1} more" if count > 1 else ""
        console.print_result(f"  {key[0]}: {where}{others}: {text}")
    if len(counts) > REASONS:
        console.print_result(f"  … {len(counts) - REASONS} more reasons: see --json")
