"""``effic gate``: hold models to their budgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.gate_verdicts import GateReport, Mover, Verdict


@click.command()
@click.option(
    "--config", metavar="FILE", help="The file with the budgets.  [default: the nearest one, see above]"
)
@click.option("--update", is_flag=True, help="Rewrite the baseline with what is measured now.")
@click.option(
    "--headroom",
    metavar="SHARE",
    help="With --update: the baseline may be exceeded by so much before growth counts, such as 2%.",
)
@click.option(
    "--allow-unlike",
    is_flag=True,
    help="Compare with a baseline of another source model, or scores of other data, runtime or machine.",
)
@click.option("--why", is_flag=True, help="Tell of a broken budget which passes, nodes and tensors moved.")
@click.option("--top", default=5, show_default=True, help="Movers to name for a broken budget.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
@click.option("--junit", metavar="FILE", help="Write the verdicts as JUnit XML too.")
@click.option(
    "--markdown",
    metavar="FILE",
    help="Write the verdicts as Markdown too; added to the file where it is $GITHUB_STEP_SUMMARY.",
)
@click.option("--github", is_flag=True, help="Print GitHub annotations, at the lines of the budgets.")
def gate(
    config: str | None,
    update: bool,
    headroom: str | None,
    allow_unlike: bool,
    why: bool,
    top: int,
    as_json: bool,
    junit: str | None,
    markdown: str | None,
    github: bool,
) -> None:
    """Hold model files to the budgets of effic.toml ([gate]) or pyproject.toml ([tool.effic.gate]).

    \b
      [gate]
      baseline = "effic-baseline.json"     # committed; rewritten by --update
      [gate.models."models/*.onnx"]        # a file or a glob, from this file's folder
      file_bytes = { max = "2 MB", max_growth = "5%" }
      nodes = { max_growth = 0 }
      ops_allowed = "ort-cpu"
      accuracy = { metric = "top1", data = "val.npz", min = 0.98 }

    Figures: file_bytes (external data included), weight_bytes, peak_bytes, parameters, macs, nodes,
    float_weights, decoded_weights, ops.NAME, ops_allowed; of parts of a model: components. Runs:
    accuracy, agreement, latency. docs/gate.md tells of each. The nearest effic.toml or pyproject.toml
    with a gate, from this folder upwards, is read.

    Exits with 1 when a budget is broken; else with 2 when a model or what it is compared with cannot be
    used; else with 3 when something could not be measured: a model, a baseline entry or a figure that
    is missing never passes.
    """
    from effic.gate import gate as run
    from effic.gate_config import find_config, read_config
    from effic.gate_reports import github_annotations, write_report
    from effic.gate_reports import junit as to_junit
    from effic.gate_reports import markdown as to_markdown

    found = read_config(Path(config) if config else find_config(Path()))
    with console.progress(quiet=as_json) as bar:
        report = run(
            found,
            update=update,
            headroom=_share(headroom),
            allow_unlike=allow_unlike,
            top=max(0, top),
            progress=None if bar is None else _on(bar),
        )
    for path, text in ((junit, to_junit), (markdown, to_markdown)):
        if path is not None:
            write_report(path, text(report))
    if as_json:
        console.print_json(report.to_dict())
    else:
        _print(report, why)
    if github:
        for line in github_annotations(report):
            # GitHub reads both; JSON alone belongs on stdout.
            click.echo(line, err=as_json)
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)


def _share(text: str | None) -> float:
    from effic.gate_config import parse_limit
    from effic.ir.errors import UsageError

    if text is None:
        return 0.0
    figure, relative = parse_limit(text, False, "--headroom")
    if not relative:
        raise UsageError(f"--headroom is {text!r}, which is no share; write for example 2%")
    return figure


def _on(bar: Any) -> Callable[[str, int, int], None]:
    task = bar.add_task("", total=None)
    return lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def _print(report: GateReport, why: bool) -> None:
    if report.updated:
        count = len(report.updated)
        headroom = f", with {100 * report.headroom:g}% headroom" if report.headroom else ""
        console.note(
            f"wrote {_near(report.baseline)} ({count} model{'' if count == 1 else 's'}{headroom}); commit it"
        )
    for note in report.notes:
        console.note(note)
    console.print_result(
        console.table(
            "", "model", "metric", "bound", ">limit", ">value", ">room",
            rows=[_row(verdict) for verdict in report.verdicts],
            flexible=1,
        )
    )  # fmt: skip
    for verdict in report.verdicts:
        if verdict.status == "broken":
            _print_broken(verdict, report, why)
    for status, words in (("error", "failed"), ("unmeasured", "not measured")):
        for verdict in report.verdicts:
            if verdict.status == status:
                where = f"{words}: {verdict.model}: {verdict.metric} ({verdict.bound})"
                console.print_result("", where, f"  {verdict.why}")
    told = [
        v
        for v in report.verdicts
        if v.why and (v.status == "info" or (v.status == "ok" and v.unit == "ratio"))
    ]
    if told:
        console.print_result("", *(f"{v.model}: {v.metric} ({v.bound}): {v.why}" for v in told))
    console.print_result("", f"budgets: {report.summary}")


def _row(verdict: Verdict) -> list[str]:
    mark = {"ok": "ok", "broken": "OVER", "error": "ERROR", "unmeasured": "?", "info": "info"}[verdict.status]
    if verdict.status == "broken" and verdict.bound.startswith("min"):
        mark = "UNDER"
    text = _amount(verdict)
    over = verdict.over
    missing = "" if verdict.status == "info" else "?"
    return [
        mark,
        verdict.model,
        verdict.metric,
        verdict.bound,
        missing if verdict.limit is None else text(verdict.limit),
        missing if verdict.value is None else text(verdict.value),
        "" if over is None else f"{'-' if over > 0 else ''}{text(abs(over))}",
    ]


def _print_broken(verdict: Verdict, report: GateReport, why: bool) -> None:
    from effic.gate_reports import pass_lines
    from effic.gate_verdicts import subject

    text = _amount(verdict)
    over, value, limit = verdict.over, verdict.value, verdict.limit
    if over is not None and value is not None and limit is not None:
        share = f" ({100 * over / limit:+.1f}%)" if limit > 0 and verdict.unit in ("bytes", "count") else ""
        lines = [_figure("limit", limit, verdict), _figure("value", value, verdict)]
        if verdict.baseline is not None:
            spare = f" (+{100 * report.headroom:g}% headroom)" if report.headroom else ""
            lines.append(f"{_figure('was', verdict.baseline, verdict)}, in {report.baseline.name}{spare}")
        word = "under" if verdict.bound.startswith("min") else "over"
        console.print_result(
            "", f"{verdict.model}: {subject(verdict)} is {text(over)} {word} its limit{share}", *lines
        )
    else:
        console.print_result("", f"{verdict.model}: {subject(verdict)} breaks its limit")
    if verdict.why:
        console.print_result(f"  {verdict.why}")
    if why and verdict.passes:
        console.print_result("  what the passes did:", *(f"    {line}" for line in pass_lines(verdict)))
    if verdict.movers:
        ones = all(mover.after == 1 for mover in verdict.movers)
        console.print_result(
            "  what grew:" if verdict.grown else "  which they are:" if ones else "  what is largest:"
        )
        sign = "+" if verdict.grown else ""
        for mover in verdict.movers:
            console.print_result(f"    {_mover(mover, sign, text, why)}")
            if why:
                console.print_result(*(f"{'':16}{line}" for line in mover.said))
        if verdict.others:
            console.print_result(f"    {sign + text(verdict.others):>10}  the rest")
        if verdict.grown and verdict.shrunk:
            console.print_result(f"    {'-' + text(verdict.shrunk):>10}  shrank or went away")
    line = "" if verdict.line is None else f", line {verdict.line}"
    console.print_result(f"  to allow it, edit {verdict.key} in {_near(report.config)}{line}")


def _near(path: Path) -> Path:
    """The path from here, where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _figure(name: str, figure: float, verdict: Verdict) -> str:
    from effic.gate_verdicts import exact

    rounded, whole = _amount(verdict)(figure), exact(figure, verdict.unit).removesuffix(" B")
    same = whole in (rounded, rounded.removesuffix(" B"))
    return f"  {name:<6}{rounded:>12}" + ("" if same else f"  ({whole})")


def _mover(mover: Mover, sign: str, text: Callable[[float], str], why: bool) -> str:
    name = mover.name if mover.reader is None or not why else f"{mover.reader} → {mover.name}"
    if not sign:
        return f"{text(mover.after):>10}  {name}"
    before = "new" if mover.before is None else f"{text(mover.before)} → {text(mover.after)}"
    return f"{sign + text(mover.grew):>10}  {name} ({before})"


def _amount(verdict: Verdict) -> Callable[[float], str]:
    from effic.gate_verdicts import exact

    if verdict.unit == "bytes":
        return console.size
    return console.amount if verdict.unit == "count" else lambda figure: exact(figure, verdict.unit)
