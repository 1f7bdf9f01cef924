"""``effic tune``: measure how the kernels of a build are best made on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.backends.tvm.tune import Tuned, Tuning

ROWS = 12
"""Kernels and functions that are printed; ``--json`` has them all."""


@click.command()
@click.argument("model", type=click.Path())
@click.option("--target", default="tvm-cpu", show_default=True, help="What the model will be built for.")
@click.option(
    "--trials", default=200, show_default=True, type=click.IntRange(min=0), help="Most candidates to try."
)
@click.option("--log", metavar="DIR", required=True, help="The folder where what was measured is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def tune(model: str, target: str, trials: int, log: str, as_json: bool) -> None:
    """Try ways to make the kernels that MODEL calls, and schedules of MetaSchedule for what has no kernel, on this
    machine, and keep in DIR what was measured.

    A build takes it with --target 'tvm-cpu{tuned=DIR}'. Tune the model as it will be built (quantized, say)
    and with the same sizes and number of threads. A run that was interrupted, or is given more trials, goes
    on from the records; nothing is tried twice.
    """
    from effic.tune import tune as run

    with console.progress(as_json) as bar:
        task = None if bar is None else bar.add_task("tuning", total=trials)

        def advance(text: str, done: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=f"{done}/{total} trials, {text}", completed=done, total=total)

        try:
            found = run(model, log, target=target, trials=trials, progress=advance)
        except KeyboardInterrupt:
            console.note(f"what was measured so far is in {log}; the same command goes on from there")
            raise
    if as_json:
        import dataclasses

        console.print_json({**dataclasses.asdict(found), "speedup": found.speedup})
    else:
        _print(found)


def _how(one: Tuned) -> str:
    if one.kind == "schedule":
        return "MetaSchedule's" if one.tile else "effic's own schedule"
    return " ".join(f"{name}={size}" for name, size in one.tile.items()) or "default"


def _print(found: Tuning) -> None:
    if not found.kernels:
        console.print_result("this model calls nothing that can be tuned")
        return
    console.print_result(
        console.table(
            "kernel or function", ">calls", ">each", ">faster", "tile",
            rows=[
                [
                    one.name,
                    str(one.calls),
                    console.seconds(one.seconds),
                    f"{one.speedup:.2f}x" if one.tile else "-",
                    _how(one),
                ]
                for one in found.kernels[:ROWS]
            ],
        )
    )  # fmt: skip
    if len(found.kernels) > ROWS:
        console.print_result(f"… {len(found.kernels) - ROWS} more: see --json")
    crashed = f", {found.crashed} of them crashed" if found.crashed else ""
    left = f"; {found.left} more can be tried" if found.left else ""
    console.print_result(
        "",
        f"{found.trials} candidates tried in {console.seconds(found.seconds)}{crashed}{left}",
        f"together: {found.speedup:.2f} times as fast as by default, each measured alone",
        f"build with: --target 'tvm-cpu{{tuned={found.log}}}'",
    )
