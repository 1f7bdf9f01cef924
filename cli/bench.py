"""``effic bench``: how fast a model runs, alone or against another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.bench import BenchResult


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path(), required=False)
@click.option("--inputs", metavar="NPZ", help="Run on these inputs (arrays by input name).")
@click.option("--seed", default=0, show_default=True, help="Seed of the made-up inputs, without --inputs.")
@click.option("--threads", default=1, show_default=True, help="Threads within one operator.")
@click.option("--repeats", default=20, show_default=True, help="Turns that each model gets.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(
    a: str, b: str | None, inputs: str | None, seed: int, threads: int, repeats: int, as_json: bool
) -> None:
    """Time A, or A against B: an .onnx file in ONNX Runtime, the folder of a build in TVM.

    Two models are timed in turns, so that what else the machine does hits both alike. The figure to
    trust is the speedup: the median, over the turns, of A's time by B's, with its quartiles. Where
    the quartiles lie on both sides of 1, no difference was found.
    """
    from effic.bench import bench as run
    from effic.ir.evaluate import load_inputs

    arrays = None if inputs is None else load_inputs(inputs)
    with console.progress(as_json) as bar:
        task = None if bar is None else bar.add_task("timing", total=repeats)

        def advance(done: int, total: int) -> None:
            if bar is not None:
                bar.update(task, completed=done, total=total)

        result = run(a, b, arrays, threads=threads, repeats=repeats, seed=seed, progress=advance)
    if as_json:
        console.print_json(result.to_dict())
    else:
        _print(result)


def _print(result: BenchResult) -> None:
    machine = result.machine
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    inputs = ", ".join(f"{name} {text}" for name, text in result.inputs.items())
    timings = [result.a] if result.b is None else [result.a, result.b]
    rows = [
        [
            timing.path,
            _ms(timing.median_ms),
            f"{_ms(timing.low_ms)} … {_ms(timing.high_ms)}",
            _ms(timing.load_ms),
            str(timing.runs_per_batch * result.repeats),
        ]
        for timing in timings
    ]
    console.print_result(
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        f"{versions}; threads {result.threads}; inputs: {inputs or 'none'}",
        "",
        console.table("model", ">median", ">quartiles", ">load", ">runs", rows=rows),
    )
    if result.speedup is not None:
        console.print_result("", console.faster_text(result.to_dict(), "B", "A"))


def _ms(milliseconds: float) -> str:
    return console.seconds(milliseconds / 1e3)
