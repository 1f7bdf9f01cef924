"""``effic report``: one HTML file that shows what was done to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from effic.cli import console
from effic.cli.accuracy import accuracy, score_options

if TYPE_CHECKING:
    from effic.report import ReportWritten


@click.command()
@click.argument("outputs", type=click.Path(), nargs=-1, required=True)
@click.option("-o", "--output", "html", metavar="HTML", help="The file to write.  [default: FIRST.html]")
@click.option(
    "--reference", metavar="ONNX", help="The original.  [default: what the records name, if it is there]"
)
@score_options
@click.option("--inputs", metavar="NPZ", help="Compare outputs with the original on these, without --metric.")
@click.option("--time", "timed", is_flag=True, help="Time each output beside the original.")
@click.option("--threads", type=int, metavar="N", help="Threads for those timings.  [default: 1]")
@click.option("--force", is_flag=True, help="Allow writing over an existing report.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def report(
    outputs: tuple[str, ...],
    html: str | None,
    reference: str | None,
    inputs: str | None,
    timed: bool,
    threads: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **scoring: Any,
) -> None:
    """Write one HTML file that shows what was done to each of OUTPUTS; it needs no network.

    Bytes, time and error pass by pass, where the bytes are, a table of all weights, the graph around
    any node, before and after. All comes from the outputs, their records (out.effic.json) and the
    original. Several outputs are set beside each other by size and quality: by --metric on --data,
    else by the metric their builds recorded, else by their outputs' distance from the original's (on
    --inputs, or made-up ones).

    \b
    Examples:
      effic report out.onnx
      effic report int4.onnx int8.onnx --reference model.onnx --metric top1 --data val.npz -o all.html
    """
    from effic.ir.errors import UsageError
    from effic.report import report as run

    wanted = accuracy(scoring)
    if threads is not None and not timed:
        raise UsageError("--threads does nothing without --time; leave it out")
    path = html if html is not None else f"{outputs[0].removesuffix('.onnx')}.html"
    with console.progress(quiet or as_json) as bar:
        task = None if bar is None else bar.add_task("reading", total=None)

        def advance(text: str, at: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=text, completed=at, total=total)

        written = run(
            outputs,
            path,
            reference=reference,
            accuracy=wanted,
            inputs=inputs,
            timed=timed,
            threads=1 if threads is None else threads,
            force=force,
            progress=advance,
        )
    if as_json:
        console.print_json(written.to_dict())
    elif not quiet:
        _print(written)


def _print(written: ReportWritten) -> None:
    for text in written.notes:
        console.note(f"note: {text}")
    for row in written.outputs:
        for text in row["notes"]:
            console.note(f"note: {row['name']}: {text}")
    if len(written.outputs) > 1:
        rows = [
            [
                row["name"],
                console.size(row["file_bytes"]),
                console.figure(row["quality"]),
                "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            ]
            for row in written.outputs
        ]
        title = written.quality or "quality"
        console.print_result(console.table("output", ">file", f">{title}", ">speed", rows=rows), "")
    console.print_result(f"wrote {written.path} ({console.size(written.bytes)})")
