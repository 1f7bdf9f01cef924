"""``effic gate``: hold models to their budgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.gate import GateReport, Mover, Verdict


@click.command()
@click.option(
    "--config", metavar="FILE", help="The file with the budgets.  [default: the nearest one, see above]"
)
@click.option("--update", is_flag=True, help="Rewrite the baseline with what is measured now.")
@click.option("--top", default=5, show_default=True, help="Movers to name for a broken budget.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdicts as JSON.")
def gate(config: str | None, update: bool, top: int, as_json: bool) -> None:
    """Hold model files to the budgets of effic.toml ([gate]) or pyproject.toml ([tool.effic.gate]).

    \b
      [gate]
      baseline = "effic-baseline.json"     # committed; rewritten by --update
      [gate.models."models/*.onnx"]        # a file or a glob, from this file's folder
      file_bytes = { max = "2 MB", max_growth = "5%" }
      nodes = { max_growth = 0 }

    Metrics: file_bytes (external data included), weight_bytes, parameters, macs, nodes. The nearest
    effic.toml or pyproject.toml with a gate, from this folder upwards, is read.

    Exits with 1 when a budget is broken, and with 3 when something could not be measured: a model,
    a baseline entry or a figure that is missing never passes.
    """
    from effic.gate import find_config, read_config
    from effic.gate import gate as run

    report = run(read_config(Path(config) if config else find_config(Path())), update=update, top=max(0, top))
    if as_json:
        console.print_json(report.to_dict())
    else:
        _print(report)
    if report.exit_code:
        raise click.exceptions.Exit(report.exit_code)


def _print(report: GateReport) -> None:
    if report.updated:
        count = len(report.updated)
        console.note(f"wrote {_near(report.baseline)} ({count} model{'' if count == 1 else 's'}); commit it")
    console.print_result(
        console.table(
            "", "model", "metric", "bound", ">limit", ">value", ">room",
            rows=[_row(verdict) for verdict in report.verdicts],
            flexible=1,
        )
    )  # fmt: skip
    for verdict in report.verdicts:
        if verdict.status == "broken":
            _print_broken(verdict, report)
    for verdict in report.verdicts:
        if verdict.status == "unmeasured":
            console.print_result(
                "", f"not measured: {verdict.model}: {verdict.metric} ({verdict.bound})", f"  {verdict.why}"
            )
    counts = {s: sum(v.status == s for v in report.verdicts) for s in ("ok", "broken", "unmeasured")}
    words = {"ok": "kept", "broken": "broken", "unmeasured": "not measured"}
    summary = ", ".join(f"{count} {words[status]}" for status, count in counts.items() if count)
    console.print_result("", f"budgets: {summary}")


def _row(verdict: Verdict) -> list[str]:
    mark = {"ok": "ok", "broken": "OVER", "unmeasured": "?"}[verdict.status]
    text = _amount(verdict)
    over = verdict.over
    return [
        mark,
        verdict.model,
        verdict.metric,
        verdict.bound,
        "?" if verdict.limit is None else text(verdict.limit),
        "?" if verdict.value is None else text(verdict.value),
        "" if over is None else f"{'-' if over > 0 else ''}{text(abs(over))}",
    ]


def _print_broken(verdict: Verdict, report: GateReport) -> None:
    text = _amount(verdict)
    over, value, limit = verdict.over, verdict.value, verdict.limit
    if over is None or value is None or limit is None:
        return
    share = f" ({100 * over / limit:+.1f}%)" if limit else ""
    lines = [_figure("limit", limit, text), _figure("value", value, text)]
    if verdict.baseline is not None:
        lines.append(f"{_figure('was', verdict.baseline, text)}, in {report.baseline.name}")
    console.print_result(
        "", f"{verdict.model}: {verdict.metric} is {text(over)} over its limit{share}", *lines
    )
    if verdict.movers:
        console.print_result("  what grew:" if verdict.grown else "  what is largest:")
        sign = "+" if verdict.grown else ""
        for mover in verdict.movers:
            console.print_result(f"    {_mover(mover, sign, text)}")
        if verdict.others:
            console.print_result(f"    {sign + text(verdict.others):>10}  the rest")
        if verdict.grown and verdict.shrunk:
            console.print_result(f"    {'-' + text(verdict.shrunk):>10}  shrank or went away")
    console.print_result(f"  to allow it, edit {verdict.key} in {_near(report.config)}")


def _near(path: Path) -> Path:
    """The path from here, where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _figure(name: str, figure: float, text: Callable[[float], str]) -> str:
    exact = f"{figure:,.0f}" if figure == round(figure) else f"{figure:,.1f}"
    rounded = text(figure)
    return f"  {name:<6}{rounded:>10}" + ("" if rounded == exact else f"  ({exact})")


def _mover(mover: Mover, sign: str, text: Callable[[float], str]) -> str:
    if not sign:
        return f"{text(mover.after):>10}  {mover.name}"
    before = "new" if mover.before is None else f"{text(mover.before)} → {text(mover.after)}"
    return f"{sign + text(mover.grew):>10}  {mover.name} ({before})"


def _amount(verdict: Verdict) -> Callable[[float], str]:
    return console.size if verdict.metric.endswith("_bytes") else console.amount
