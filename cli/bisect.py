"""``effic bisect``: which pass, and which of its sites, breaks a model."""

from __future__ import annotations

from typing import Any

import click

from effic.cli import console
from effic.cli.accuracy import accuracy, accuracy_options
from effic.cli.sequence import sequence_options


@click.command()
@click.argument("model", type=click.Path())
@sequence_options
@click.option("--inputs", metavar="NPZ", help="Judge on these inputs (arrays by input name).")
@click.option("--max-abs", type=float, metavar="X", help="Broken when an output differs by more than X.")
@click.option("--rtol", type=float, metavar="X", help="Broken when it differs by more than X of its range.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Broken when the SQNR is below DB decibels.")
@click.option("--min-cosine", type=float, metavar="X", help="Broken when the cosine is below X.")
@click.option("--min-top1", type=float, metavar="X", help="Broken when fewer top entries agree (0 to 1).")
@accuracy_options
@click.option("--json", "as_json", is_flag=True, help="Print the finding as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def bisect(
    model: str,
    inputs: str | None,
    max_abs: float | None,
    rtol: float | None,
    min_sqnr: float | None,
    min_cosine: float | None,
    min_top1: float | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the pass, then the site, that breaks MODEL.

    The passes are run once; where the model turns from good to bad is found by halving, and so is the
    site within the pass. What is good is told by bounds on the outputs, or by a metric over data with
    --max-drop or --bound.

    \b
      effic bisect model.onnx --preset int4 --min-sqnr 20
      effic bisect model.onnx --passes quantize-gptq --calib c.npz --metric top1 --data v.npz --max-drop 1

    Exits with 1 when a culprit was found, with 0 when nothing breaks the bound.
    """
    from effic.bisect import bisect as run
    from effic.cli.sequence import sequence
    from effic.compare import Bounds

    wanted = sequence(options)
    bounds = Bounds(max_abs, rtol, min_sqnr, min_cosine, min_top1)
    with console.progress(quiet or as_json) as bar:
        task = None if bar is None else bar.add_task("reading", total=None)

        def advance(text: str, number: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=text, completed=number, total=total)

        found = run(
            model,
            bounds=bounds,
            accuracy=accuracy(options),
            inputs=inputs,
            progress=advance,
            **wanted,
        )
    if as_json:
        console.print_json(found.to_dict())
    else:
        console.print_result(found.sentence)
        if found.figures[0]:
            console.print_result(f"  before: {found.figures[0]}", f"  after:  {found.figures[1]}")
        if found.mended is not None:
            word = "keeps" if found.mended else "still breaks"
            console.print_result(f"without that site the pass {word} the bound")
        if found.passes is not None:
            console.print_result("to leave the site out:", f"  --passes '{found.passes}'")
        console.print_result(f"{found.evaluations} evaluations")
    if found.broken:
        raise click.exceptions.Exit(1)
