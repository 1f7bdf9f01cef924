"""``effic compare``: how far apart two models' outputs are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from effic.cli import console
from effic.cli.accuracy import accuracy, accuracy_options, print_accuracy

if TYPE_CHECKING:
    from effic.compare import Comparison


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path(), required=False)
@click.option(
    "--backends", metavar="TEXT", help="Compare A on two targets instead: --backends ort-cpu,tvm-cpu."
)
@click.option("--taps", is_flag=True, help="With --backends: compare the values of all nodes too.")
@click.option("--inputs", metavar="NPZ", help="Run both on these inputs (arrays by input name).")
@click.option("--seed", default=0, show_default=True, help="Seed of the made-up inputs, without --inputs.")
@click.option("--count", default=4, show_default=True, help="Sets of made-up inputs.")
@click.option(
    "--as-written",
    is_flag=True,
    help="Run the graphs as written. By default ONNX Runtime optimises both files, as it does for "
    "whoever uses them; that alone may move numbers (quantized weights: about 0.5 % of the range).",
)
@click.option("--max-abs", type=float, metavar="X", help="Fail when an output differs by more than X.")
@click.option(
    "--rtol", type=float, metavar="X", help="Fail when it differs by more than X of A's largest magnitude."
)
@click.option(
    "--min-sqnr", type=float, metavar="DB", help="Fail when the signal to noise ratio is below DB decibels."
)
@click.option("--min-cosine", type=float, metavar="X", help="Fail when the cosine is below X.")
@click.option(
    "--min-top1", type=float, metavar="X", help="Fail when fewer top entries agree than this share (0 to 1)."
)
@accuracy_options
@click.option("--json", "as_json", is_flag=True, help="Print the distances as JSON.")
def compare(
    a: str,
    b: str | None,
    backends: str | None,
    taps: bool,
    inputs: str | None,
    seed: int,
    count: int,
    as_written: bool,
    max_abs: float | None,
    rtol: float | None,
    min_sqnr: float | None,
    min_cosine: float | None,
    min_top1: float | None,
    as_json: bool,
    **scoring: Any,
) -> None:
    """How far the outputs of B lie from those of A, on the same inputs.

    Each is an .onnx file or the folder of a build for tvm-cpu. With --backends, A is built for two
    targets, and what they compute is compared, the first being the reference.

    With --metric both are scored on --data as well, A being the reference.

    Exits with 1 when a bound is broken, when an output has another shape or type, or when B yields
    NaN or Inf where A does not.
    """
    from effic.compare import Bounds
    from effic.compare import compare as run
    from effic.cross_check import cross_check
    from effic.ir.errors import UsageError

    bounds = Bounds(max_abs, rtol, min_sqnr, min_cosine, min_top1)
    wanted = accuracy(scoring)
    if (b is None) == (backends is None):
        raise click.UsageError(
            "name a second model, or two targets with --backends ort-cpu,tvm-cpu; one of the two"
        )
    if taps and backends is None:
        raise UsageError("--taps does nothing without --backends; leave it out")
    if b is not None:
        comparison = run(
            a,
            b,
            inputs=inputs,
            seed=seed,
            count=count,
            as_written=as_written,
            bounds=bounds,
            accuracy=wanted,
        )
    else:
        if as_written or wanted is not None:
            raise UsageError("--as-written and --metric do nothing with --backends; leave them out")
        comparison = cross_check(
            a, backends or "", inputs=inputs, seed=seed, count=count, taps=taps, bounds=bounds
        )
    if as_json:
        console.print_json(comparison.to_dict())
    else:
        _print(comparison)
    if comparison.broken:
        raise click.exceptions.Exit(1)


def _print(comparison: Comparison) -> None:
    for text in comparison.notes:
        console.note(f"note: {text}")
    rows = []
    for name, distance in comparison.outputs.items():
        if distance.shape_mismatch:
            rows.append([name, "not comparable", *[""] * 4])
            continue
        rows.append(
            [
                name,
                console.figure(distance.max_abs)
                if not distance.wrong_integers
                else f"{distance.wrong_integers} differ",
                console.figure(distance.max_rel),
                f"{distance.sqnr_db:.1f} dB" if distance.sqnr_db < float("inf") else "equal",
                f"{distance.cosine:.6f}",
                "" if distance.top1 is None else f"{100 * distance.top1:.1f}%",
            ]
        )
    console.print_result(
        f"{comparison.a} against {comparison.b}: {comparison.inputs}; {comparison.engine}",
        "",
        console.table("output", ">max |Δ|", ">of range", ">SQNR", ">cosine", ">top-1", rows=rows),
    )
    if comparison.accuracy is not None:
        print_accuracy(comparison.accuracy)
    for text in comparison.broken:
        console.note(f"broken: {text}")
