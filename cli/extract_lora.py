"""``effic extract-lora``: what fine-tuning changed, as a LoRA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.extract_lora import Extraction


@click.command("extract-lora")
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--output", required=True, metavar="FOLDER", help="The PEFT folder to write.")
@click.option("--rank", type=int, metavar="N", help="Singular values to keep in each weight.")
@click.option("--energy", type=float, metavar="SHARE", help="Instead: share of each weight's ‖Δ‖² to keep.")
@click.option("--alpha", type=float, metavar="X", help="α to write, one for all [the rank, so that σ = 1].")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only weights of these names (*.query.*).")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave out weights and biases of these names.")
@click.option("--top", default=20, show_default=True, help="How many weights to list, the worst first.")
@click.option("--force", is_flag=True, help="Replace the adapter in a folder that exists.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, every weight listed.")
def extract_lora(
    base: str,
    tuned: str,
    output: str,
    rank: int | None,
    energy: float | None,
    alpha: float | None,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    top: int,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """What fine-tuning changed between BASE and TUNED, as a LoRA adapter (a PEFT folder).

    Both are versions of one model, with weights of the same names. Each weight's difference is
    approximated by the product of two thin matrices, the best of their rank.
    """
    from effic.extract_lora import extract_lora as run

    with console.progress(quiet or as_json) as bar:
        task = None if bar is None else bar.add_task("")

        def show(name: str, number: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=name, completed=number, total=total)

        found = run(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            alpha=alpha,
            include=include,
            skip=skip,
            force=force,
            progress=show,
        )
    if as_json:
        console.print_json(found.to_dict())
    elif not quiet:
        _print(found, max(0, top))


def _print(found: Extraction, top: int) -> None:
    sites = sorted(found.sites, key=lambda site: -site.error)
    if sites[:top]:
        rows = [
            [
                site.path,
                console.shape_text(site.shape),
                str(site.rank),
                f"{100 * site.energy:.2f} %",
                console.figure(site.error),
                console.figure(site.relative),
            ]
            for site in sites[:top]
        ]
        columns = ("module", ">shape", ">rank", ">energy", ">error", ">‖Δ‖/‖W‖")
        console.print_result(console.table(*columns, rows=rows), "")
    if len(sites) > top:
        console.print_result(
            f"… {len(sites) - top} more weights with smaller errors: --top {len(sites)} or --json"
        )
    if found.replaced:
        names = ", ".join(found.replaced[:3]) + (" …" if len(found.replaced) > 3 else "")
        console.print_result(f"stored whole: {len(found.replaced)} biases and norms ({names})")
    for name, reason in found.not_covered:
        console.print_result(f"not covered: '{name}' {reason}")
    if found.mapped:
        console.print_result(
            f"merging needs the map in the folder: merge-lora{{map={found.folder}/lora.map,…}}"
        )
    weights = f"{len(found.sites)} weight{'' if len(found.sites) == 1 else 's'}"
    console.print_result(
        f"wrote {found.folder} ({weights}, {found.unchanged} unchanged; "
        f"{console.amount(found.parameters)} parameters)"
    )
