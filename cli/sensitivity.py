"""``effic sensitivity``: what a pass costs at each of its sites alone."""

from __future__ import annotations

from typing import Any

import click

from effic.cli import console
from effic.cli.accuracy import accuracy, metric_options
from effic.cli.sequence import sequence, sequence_options

ROWS = 20
"""Sites that are printed; the CSV file has them all."""


@click.command()
@click.argument("model", type=click.Path())
@sequence_options
@click.option(
    "--number", type=int, metavar="N", help="Which pass, from 1.  [default: the last one with sites]"
)
@click.option("--inputs", metavar="NPZ", help="Measure on these inputs (arrays by input name).")
@metric_options
@click.option("--spare", type=int, metavar="N", help="Sites to leave out in the text printed at the end.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write all rows to this file.")
@click.option("--picture", metavar="FILE", help="Draw the costliest sites (.png, .svg, .pdf).")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def sensitivity(
    model: str,
    number: int | None,
    inputs: str | None,
    spare: int | None,
    csv_file: str | None,
    picture: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Rank the sites of a pass by what each costs alone.

    The passes before it are applied in full, then the pass at one site after the other: the outputs'
    distance and, with --metric, the score are measured each time. At the end stands the text of the
    passes that leaves the costliest tenth of the sites out, or gives them 8 bits.

    \b
      effic sensitivity model.onnx --passes 'quantize-rtn{bits=4}' --csv sites.csv --picture sites.svg
    """
    from effic.ir.errors import UsageError
    from effic.sensitivity import check_picture
    from effic.sensitivity import sensitivity as run

    wanted = sequence(options)
    scoring = accuracy(options)
    if spare is not None and spare < 1:
        raise UsageError(f"--spare is {spare}; it must be at least 1")
    if picture is not None:
        check_picture(picture)
    with console.progress(quiet or as_json) as bar:
        task = None if bar is None else bar.add_task("reading", total=None)

        def advance(text: str, at: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=text, completed=at, total=total)

        found = run(model, number=number, inputs=inputs, accuracy=scoring, progress=advance, **wanted)
    if csv_file is not None:
        found.write_csv(csv_file)
    if picture is not None:
        found.draw(picture)
    if as_json:
        console.print_json(found.to_dict())
        return
    scored = found.metric is not None
    rows = [
        [
            row.site,
            console.figure(row.max_rel),
            "equal" if row.sqnr_db == float("inf") else f"{row.sqnr_db:.1f} dB",
            *([f"{row.score:.4f}"] if scored and row.score is not None else []),
            "" if row.bytes_saved is None else console.size(row.bytes_saved),
        ]
        for row in found.rows[:ROWS]
    ]
    columns = ["site", ">of range", ">SQNR", *([f">{found.metric}"] if scored else []), ">saves"]
    console.print_result(f"{found.step}: each of its {len(found.rows)} sites alone", "")
    console.print_result(console.table(*columns, rows=rows))
    if len(found.rows) > ROWS:
        console.print_result(f"… {len(found.rows) - ROWS} more: see {csv_file or '--csv FILE'}")
    count = spare or max(1, len(found.rows) // 10)
    skipped, finer = found.spare(min(count, len(found.rows)))
    word = "the costliest site" if count == 1 else f"the {count} costliest sites"
    console.print_result("", f"to leave {word} out:", f"  --passes '{skipped}'")
    if finer is not None:
        console.print_result(f"to give {'it' if count == 1 else 'them'} 8 bits:", f"  --passes '{finer}'")
