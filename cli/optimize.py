"""``effic optimize``: run passes over a model, and say what each did."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from effic.cli import console
from effic.cli.accuracy import accuracy, loop_options, print_accuracy

if TYPE_CHECKING:
    from effic.ir.model import Model
    from effic.optimize import Report
    from effic.passes.base import Pass
    from effic.passes.pipeline import Step

_QUOTED = re.compile(r"'[^']*'")

REASONS = 8
"""Missed reasons that are printed; the report file has them all."""


@click.command()
@click.argument("model", type=click.Path())
@click.option("--passes", metavar="TEXT", help="Passes in order: 'fuse-conv-bn,quantize-rtn{bits=4}'.")
@click.option("--preset", metavar="NAME", help="A named sequence of passes ('effic passes' lists them).")
@click.option("--recipe", metavar="FILE", help="A TOML file of passes, target and checks.")
@click.option("-o", "--output", metavar="FILE", help="The .onnx file to write; for tvm-cpu a folder.")
@click.option(
    "--target", metavar="TEXT", help="What it has to run on: ort-cpu (default), portable or tvm-cpu."
)
@click.option(
    "--lower", multiple=True, metavar="NAME=VALUE", help="An option of the target: --lower decode=call."
)
@click.option("--inputs", metavar="NPZ", help="Check on these inputs (arrays by input name).")
@click.option(
    "--calib",
    metavar="SOURCE",
    help="Data for passes that look at some: .npz, .npy, .safetensors, a folder of them, "
    "package.module:function, or random.",
)
@click.option("--calib-samples", type=int, metavar="N", help="Samples of it to use.  [default: 128]")
@click.option("--calib-window", type=int, metavar="N", help="Tokens of a sample, when it is token ids.")
@click.option(
    "--lora-map", metavar="FILE", help="Lines PATH = NAME for merge-lora, where the file renamed weights."
)
@click.option(
    "--seed", type=int, help="Seed of the made-up inputs, and of the choice of samples.  [default: 0]"
)
@click.option(
    "--check",
    type=click.Choice(["each", "final", "off"]),
    help="Check the numbers after each pass (default), at the end, or never.",
)
@loop_options
@click.option(
    "--keep-if-faster",
    is_flag=True,
    help="Time the model after each pass on the target, and undo what made it slower.",
)
@click.option("--threads", type=int, metavar="N", help="Threads for those timings.  [default: 1]")
@click.option("--require-change", is_flag=True, help="Fail (exit code 1) when a pass changes nothing.")
@click.option("--dry-run", is_flag=True, help="Do everything but write the output.")
@click.option(
    "--print-after", multiple=True, metavar="PASS", help="Print the graph after this pass, on stderr."
)
@click.option("--dump-dir", metavar="DIR", help="Write the model after each pass into this folder.")
@click.option(
    "--report", "report_file", metavar="JSON", help="Write all that was done and measured to this file."
)
@click.option(
    "--html", metavar="FILE", help="Write a report for people as one HTML file that needs no network."
)
@click.option("--force", is_flag=True, help="Allow writing over an existing file, the input included.")
@click.option(
    "--external-data/--single-file",
    default=None,
    help="Weights in a file beside the output, or inside it.  [default: by size]",
)
@click.option(
    "--record/--no-record",
    default=True,
    help="Record how the output was made, in it and beside it (out.effic.json).  [default: record]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep what is done in OUTPUT.progress/, and go on where an interrupted run stopped.",
)
@click.option(
    "--plan",
    is_flag=True,
    help="Say what the run would take (memory, disk, time, places changed), and write nothing.",
)
@click.option(
    "--no-fit-check",
    is_flag=True,
    help="Start even where the run seems not to fit into memory or on the disk.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def optimize(
    model: str,
    passes: str | None,
    preset: str | None,
    recipe: str | None,
    output: str | None,
    target: str | None,
    lower: tuple[str, ...],
    inputs: str | None,
    calib: str | None,
    calib_samples: int | None,
    calib_window: int | None,
    lora_map: str | None,
    seed: int | None,
    check: str | None,
    keep_if_faster: bool,
    threads: int | None,
    require_change: bool,
    dry_run: bool,
    print_after: tuple[str, ...],
    dump_dir: str | None,
    report_file: str | None,
    html: str | None,
    force: bool,
    external_data: bool | None,
    record: bool,
    resume: bool,
    plan: bool,
    no_fit_check: bool,
    as_json: bool,
    quiet: bool,
    **scoring: Any,
) -> None:
    """Run passes over MODEL (an .onnx or .pt2 file) and write the result.

    Without --passes, --preset or --recipe, the preset 'default' is run. After each pass the structure
    is verified and the outputs are compared with those before it; a pass that moves them further
    than it may ends the run, and nothing is written.

    \b
    Examples:
      effic optimize model.onnx -o out.onnx
      effic optimize model.onnx --passes 'fuse-conv-bn,quantize-rtn{bits=4}' -o out.onnx
      effic optimize model.onnx --preset int8 --inputs data.npz --report report.json -o out.onnx
      effic optimize model.onnx --passes quantize-gptq --calib images.npz -o out.onnx
      effic optimize model.onnx --preset int4 --metric top1 --data val.npz --max-drop 0.5 -o out.onnx
      effic optimize model.onnx --preset int4 --plan
    """
    from effic.backends import DEFAULT_TARGET
    from effic.ir.errors import UsageError
    from effic.ir.whole_files import write_whole
    from effic.optimize import optimize as run

    if output is None and not plan and (force or external_data is not None):
        flag = "--force" if force else "--external-data" if external_data else "--single-file"
        raise UsageError(f"{flag} does nothing without an output; give -o out.onnx")
    options = _choose(passes, preset, recipe)
    given = {
        "target": target,
        "check": check,
        "seed": seed,
        "calib": calib,
        "calib_samples": calib_samples,
        "calib_window": calib_window,
    }
    options.update({name: value for name, value in given.items() if value is not None})
    if options.get("check") == "off" and inputs is not None:
        raise UsageError("--inputs does nothing with --check off; leave one of them out")
    made_up = inputs is None and options.get("check") != "off"
    if seed is not None and options.get("calib") is None and not made_up:
        raise UsageError("--seed does nothing here: no inputs are made up, no samples chosen; leave it out")
    options["accuracy"] = accuracy(scoring, options.get("accuracy"))
    _lower(options, lower)
    if lora_map is not None:
        options["passes"] = _mapped(options["passes"], lora_map)
    if threads is not None and not keep_if_faster:
        raise UsageError("--threads does nothing without --keep-if-faster; leave it out")
    if threads is not None:
        options["threads"] = threads
    options["keep_if_faster"] = keep_if_faster
    if require_change:
        options["require_change"] = True
    if plan:
        from effic.cli.plan import show_plan

        more = {
            "output": output,
            "inputs": inputs,
            "external": external_data,
            "resume": resume,
            "force": force,
        }
        show_plan(model, options, as_json=as_json, quiet=quiet, **more)
        return
    _known(print_after, options["passes"])
    _writable(report_file, model, output, html)
    _folder(dump_dir)
    _html(html, output, model, dry_run, force, options.get("target", DEFAULT_TARGET))
    with console.progress(quiet or as_json) as bar:
        task = None if bar is None else bar.add_task("reading", total=None)

        def advance(text: str, number: int, total: int) -> None:
            if bar is not None:
                bar.update(task, description=text, completed=number, total=total)

        report = run(
            model,
            output=output,
            inputs=inputs,
            dry_run=dry_run,
            force=force,
            external=external_data,
            record=record,
            resume=resume,
            fit_check=not no_fit_check,
            after_pass=_after_pass(print_after, dump_dir),
            progress=advance,
            **options,
        )
        if report_file is not None:
            write_whole(report_file, json.dumps(console.plain(report.to_dict()), indent=1).encode())
        if html is not None:
            from effic.report import report_run

            # What it may write over was settled before the work.
            page = report_run(report, html, force=True, progress=advance)
    if as_json:
        console.print_json(report.to_dict())
    elif not quiet:
        _print(report, dry_run, report_file)
        if html is not None:
            console.print_result(f"wrote {html} ({console.size(page.bytes)})")


def _choose(passes: str | None, preset: str | None, recipe: str | None) -> dict[str, Any]:
    """The passes, and what a recipe says besides."""
    from effic.ir.errors import UsageError
    from effic.passes.presets import preset as find
    from effic.passes.spec import parse_passes, read_recipe

    if sum(choice is not None for choice in (passes, preset, recipe)) > 1:
        raise UsageError("--passes, --preset and --recipe exclude each other; give one of them")
    if recipe is not None:
        return read_recipe(recipe)
    return {"passes": parse_passes(passes if passes is not None else find(preset or "default").text)}


def _mapped(passes: list[Pass], path: str) -> list[Pass]:
    """The passes, with the map file given to each merge-lora among them."""
    from effic.ir.errors import UsageError
    from effic.passes.adapters.merge_lora import MergeLora

    mapped = [item for item in passes if isinstance(item, MergeLora)]
    if not mapped:
        raise UsageError("--lora-map does nothing without merge-lora among the passes; leave it out")
    if named := next((item.map for item in mapped if item.map), None):
        raise UsageError(f"merge-lora has a map already, map={named}; give one of the two")
    return [dataclasses.replace(item, map=path) if isinstance(item, MergeLora) else item for item in passes]


def _lower(options: dict[str, Any], lower: tuple[str, ...]) -> None:
    """Add options to the target."""
    if not lower:
        return
    from effic.backends import DEFAULT_TARGET
    from effic.ir.errors import UsageError
    from effic.passes.spec import with_options

    try:
        options["target"] = with_options(options.get("target", DEFAULT_TARGET), lower)
    except UsageError as error:
        raise UsageError(f"--lower: {error}") from error


def _known(print_after: tuple[str, ...], passes: list[Pass]) -> None:
    from effic.ir.errors import UsageError
    from effic.passes import near

    names = [item.name for item in passes]
    for name in print_after:
        if name not in names:
            raise UsageError(
                f"--print-after {name}: no pass of this run has that name{near(name, names)} "
                f"(this run: {', '.join(dict.fromkeys(names)) or 'none'})"
            )


def _writable(path: str | None, model: str, output: str | None, html: str | None) -> None:
    """Refuse a path for the figures before the work is done, above all one that would replace a model."""
    from effic.ir.errors import UsageError
    from effic.record import refuse_report

    if path is None:
        return
    refuse_report(path, "report", [model, *([] if output is None else [output])])
    if html is not None and Path(path).resolve() == Path(html).resolve():
        raise UsageError(f"--report and --html both name {path}; name two files")


def _folder(dump_dir: str | None) -> None:
    from effic.ir.errors import UsageError

    if dump_dir is not None and Path(dump_dir).exists() and not Path(dump_dir).is_dir():
        raise UsageError(f"--dump-dir {dump_dir} is a file; name a folder")


def _html(html: str | None, output: str | None, model: str, dry_run: bool, force: bool, target: str) -> None:
    """Refuse a report that could not be written before the work is done."""
    from effic.ir.errors import UsageError

    if html is None:
        return
    if output is None or dry_run:
        raise UsageError("--html shows the file that was written; give -o out.onnx, without --dry-run")
    from effic.backends import get_backend
    from effic.report.job import check_html

    if get_backend(target).is_folder:
        raise UsageError(f"--html shows .onnx files, and {target} writes a folder; leave --html out")
    check_html(html, model, output, force=force)


def _after_pass(print_after: tuple[str, ...], dump_dir: str | None) -> Any:
    """What to do after each pass: print the graph, write the model."""
    if not print_after and dump_dir is None:
        return None
    if dump_dir is not None:
        Path(dump_dir).mkdir(parents=True, exist_ok=True)

    def after(model: Model, item: Pass, number: int) -> None:
        if item.name in print_after:
            console.note(f"--- after {item.name} ---\n{model.ir}")
        if dump_dir is not None:
            model.save(Path(dump_dir) / f"{number + 1:02d}-{item.name}.onnx", force=True)

    return after


def _print(report: Report, dry_run: bool, report_file: str | None) -> None:
    for text in report.notes:
        console.note(f"note: {text}")
    console.print_result(
        console.table(
            "pass", ">changed", ">missed", ">weights", ">nodes", "numerics", ">time",
            rows=[_row(step) for step in report.steps],
        ),
        "",
        _totals(report),
    )  # fmt: skip
    for row in report.buckets:
        sizes = ", ".join(f"{name}={size}" for name, size in row["sizes"].items())
        console.print_result(f"at {sizes}: {row['verdict']}")
    if report.accuracy is not None:
        print_accuracy(report.accuracy)
    if report.speed is not None:
        _print_speed(report.speed)
    _print_undone(report)
    _print_missed(report, report_file)
    if report.output is not None:
        console.print_result(f"wrote {report.output}{_file_size(report)}")
    elif dry_run:
        console.note("dry run: the model was not written")
    else:
        console.note("the model was not written; give -o out.onnx to keep it")


def _row(step: Step) -> list[str]:
    return [
        f"lower for {step.text}" if step.name == "lower" else step.text,
        str(0 if step.rolled_back else step.passed),
        str(step.missed),
        _move(step.bytes_before, step.bytes_after, console.size),
        _move(step.nodes_before, step.nodes_after, str),
        # A lossy pass's verdict has three figures: the first is enough beside the others.
        step.verdict.partition(", ")[0],
        console.seconds(step.seconds),
    ]


def _move(before: int, after: int, text: Any) -> str:
    was, now = str(text(before)), str(text(after))
    return now if was == now else f"{was} → {now}"


def _totals(report: Report) -> str:
    a, b = report.before, report.after
    parts = [
        f"{name} {_move(was, now, text)}{_percent(was, now)}"
        for name, was, now, text in (
            ("weights", a.weight_bytes, b.weight_bytes, console.size),
            ("nodes", a.nodes, b.nodes, str),
            ("parameters", a.parameters, b.parameters, console.amount),
            ("MACs", a.macs, b.macs, console.amount),
        )
    ]
    return f"total: {', '.join(parts)}; outputs: {report.verdict}; {console.seconds(report.seconds)}"


def _percent(before: float, after: float) -> str:
    text = console.change(before, after)
    return f" ({text})" if text else ""


def _file_size(report: Report) -> str:
    before, after = report.file_bytes
    if after is None:
        return ""
    if before is None:
        return f" ({console.size(after)})"
    return f" ({_move(before, after, console.size)}{_percent(before, after).replace(' (', ', ').rstrip(')')})"


def _print_speed(speed: dict[str, Any]) -> None:
    total, beside = speed["total"], speed["beside"]
    run = f"{console.seconds(total['b']['median_ms'] / 1e3)} a run, threads {total['threads']}"
    console.print_result(f"speed: {console.faster_text(total, 'the result', 'the original')}; {run}")
    if beside is not None:
        text = console.faster_text(beside, "the result", f"the original on {beside['target']}")
        console.print_result(f"speed: {text}")


def _print_undone(report: Report) -> None:
    for step in report.steps:
        if step.rolled_back is not None:
            console.print_result("", f"rolled back: {step.text}: {step.rolled_back}")


def _print_missed(report: Report, report_file: str | None) -> None:
    """Reasons for what was left alone, the most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for step in report.steps:
        for remark in step.remarks:
            if remark.kind == "missed":
                # The same reason names another node at every place.
                key = step.name, _QUOTED.sub("", remark.text)
                counts[key] += 1
                first.setdefault(key, (remark.text, remark.where))
    if not counts:
        return
    console.print_result("", "left alone:")
    for key, count in counts.most_common(REASONS):
        reason, where = first[key]
        others = f" and {count - 1} more" if count > 1 else ""
        console.print_result(f"  {key[0]}: {where}{others}: {reason}")
    if len(counts) > REASONS:
        where = report_file or "--report FILE"
        console.print_result(f"  … {len(counts) - REASONS} more reasons: see {where}")
