"""``effic reproduce``: build a model again from its record, and compare bit for bit."""

from __future__ import annotations

import click

from effic.cli import console


@click.command()
@click.argument("record", type=click.Path())
@click.option("--source", metavar="FILE", help="Where the input model is now.  [default: as recorded]")
@click.option("--calib", metavar="SOURCE", help="Where the calibration data are now.  [default: as recorded]")
@click.option(
    "--inputs", metavar="NPZ", help="Where the inputs of the checks are now.  [default: as recorded]"
)
@click.option("-o", "--output", metavar="FILE", help="Keep the new build there.")
@click.option("--force", is_flag=True, help="Allow writing over an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
def reproduce(
    record: str,
    source: str | None,
    calib: str | None,
    inputs: str | None,
    output: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build again what RECORD (an out.effic.json) describes, and compare the files bit for bit.

    The input model, the calibration data and the inputs have to be those of the record: their digests
    are compared first. Exits with 0 when every file is the same and with 1 when one differs; what
    differs is named: files, nodes, tensors, metadata, versions of packages.
    """
    from effic.reproduce import reproduce as run

    with console.progress(as_json) as bar:
        task = None if bar is None else bar.add_task("reading", total=None)

        def advance(text: str, number: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=text, completed=number, total=total)

        found = run(
            record, source=source, calib=calib, inputs=inputs, output=output, force=force, progress=advance
        )
    if as_json:
        console.print_json(found.to_dict())
    else:
        for text in found.other_versions:
            console.note(f"note: another version: {text}")
        console.print_result("the same, bit for bit" if found.same else "not the same:")
        console.print_result(*(f"  {text}" for text in found.differences))
        if found.output is not None:
            console.print_result(f"kept as {found.output}")
    if not found.same:
        raise click.exceptions.Exit(1)
