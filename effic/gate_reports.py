"""A gate's verdicts as other programs read them: JUnit XML, Markdown, and annotations of GitHub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from xml.etree import ElementTree

from effic.gate_config import relative_to_here
from effic.gate_verdicts import WORDS, GateReport, Mover, Verdict, exact, headline
from effic.ir.whole_files import write_whole

_MARKS = {"ok": "✅ kept", "broken": "❌ broken", "error": "❌ failed", "unmeasured": "❌ not measured"}
SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable with the file of a job's summary, which other steps write to as well."""

# What XML 1.0 has no way to write; a model's names may hold anything.
_NO_XML = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 65534, 65535), "�")


def junit(report: GateReport) -> str:
    """JUnit XML: a suite for each model, a case for each budget.

    A budget that is not measured is an error and not skipped: CI systems count what is skipped as well.
    """
    root = ElementTree.Element("testsuites", name="effic gate")
    totals = dict.fromkeys(("tests", "failures", "errors"), 0)
    for model, verdicts in _by_model(report):
        suite = ElementTree.SubElement(root, "testsuite", name=_xml(model))
        counts = dict.fromkeys(totals, 0)
        for verdict in verdicts:
            counts["tests"] += 1
            case = ElementTree.SubElement(
                suite, "testcase", classname=_xml(model), name=_xml(f"{verdict.metric} {verdict.bound}")
            )
            if verdict.status == "broken":
                counts["failures"] += 1
                found = ElementTree.SubElement(
                    case, "failure", type="budget", message=_xml(headline(verdict))
                )
                found.text = _xml("\n".join(details(verdict, report)))
            elif verdict.status in ("error", "unmeasured"):
                counts["errors"] += 1
                ElementTree.SubElement(case, "error", type=verdict.status, message=_xml(headline(verdict)))
            else:
                ElementTree.SubElement(case, "system-out").text = _xml(headline(verdict))
        for key, count in counts.items():
            suite.set(key, str(count))
            totals[key] += count
    for key, count in totals.items():
        root.set(key, str(count))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(report: GateReport) -> str:
    """A summary of a job: a table of the verdicts, and the causes of what is broken."""
    lines = [f"## effic gate: {report.summary}", ""]
    lines += ["| | model | metric | bound | limit | value |", "|---|---|---|---|---:|---:|"]
    for verdict in report.verdicts:
        figures = [None if f is None else exact(f, verdict.unit) for f in (verdict.limit, verdict.value)]
        cells = [
            _MARKS.get(verdict.status, WORDS[verdict.status]),
            *(_cell(text) for text in (verdict.model, verdict.metric, verdict.bound)),
            *("?" if figure is None else figure for figure in figures),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for verdict in report.verdicts:
        if verdict.status in ("broken", "error", "unmeasured"):
            lines += ["", f"**{_markdown(headline(verdict))}**", ""]
            if verdict.status == "broken":
                lines += [
                    "```text",
                    *(line.replace("```", "'''") for line in details(verdict, report)),
                    "```",
                ]
    lines += ["", *(f"{_markdown(note)}" for note in report.notes)]
    return "\n".join(lines).rstrip() + "\n"


def github_annotations(report: GateReport) -> Iterator[str]:
    """Workflow commands that GitHub shows at the lines of the configuration in a pull request.

    They need no token and work on forks.
    """
    file = relative_to_here(report.config)
    for verdict in report.verdicts:
        if verdict.status in ("broken", "error", "unmeasured"):
            place = {"file": file, "line": verdict.line or 1, "title": f"effic gate: {verdict.metric}"}
            fields = ",".join(f"{key}={_property(str(value))}" for key, value in place.items())
            yield f"::error {fields}::{_data(headline(verdict))}"


def details(verdict: Verdict, report: GateReport) -> list[str]:
    """What moved a broken budget and where to edit it, a line each."""
    lines = []
    if verdict.baseline is not None:
        lines.append(f"was {exact(verdict.baseline, verdict.unit)} in {report.baseline.name}")
    if verdict.movers or not verdict.why:
        sign = "+" if verdict.grown else ""
        rows = [
            (sign + exact(m.grew if verdict.grown else m.after, verdict.unit), _mover(m))
            for m in verdict.movers
        ]
        if verdict.others:
            rows.append((sign + exact(verdict.others, verdict.unit), "the rest"))
        if verdict.shrunk:
            rows.append(("-" + exact(verdict.shrunk, verdict.unit), "shrank or went away"))
        lines += aligned(rows)
    else:
        lines.append(verdict.why)
    lines += pass_lines(verdict)
    return [*lines, f"to allow it, edit {verdict.key} in {relative_to_here(report.config)}"]


def pass_lines(verdict: Verdict) -> list[str]:
    """What each pass does otherwise than in the baseline, a sentence each."""
    lines = []
    for item in verdict.passes:
        now, then = _saving(item.saved), _saving(item.saved_before)
        if item.after is None:
            lines.append(f"{item.before} did not run; it {then} in the baseline")
        elif item.before is None:
            lines.append(f"{item.after} {now}; it did not run in the baseline")
        elif item.before == item.after:
            lines.append(f"{item.after} {now}; it {then} in the baseline")
        else:
            lines.append(f"{item.after} {now}; in the baseline {item.before} {then}")
    return lines


def aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Figures to the right in their column, names after them."""
    kept = list(rows)
    width = max((len(figure) for figure, _ in kept), default=0)
    return [f"{figure:>{width}}  {name}" for figure, name in kept]


def write_report(path: str, text: str) -> None:
    """Write a report, all of it or nothing; to the summary of a GitHub job it is added."""
    if path == os.environ.get(SUMMARY):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
        return
    write_whole(path, text.encode())


def _by_model(report: GateReport) -> Iterator[tuple[str, list[Verdict]]]:
    for model in dict.fromkeys(verdict.model for verdict in report.verdicts):
        yield model, [verdict for verdict in report.verdicts if verdict.model == model]


def _saving(saved: int) -> str:
    if saved == 0:
        return "took nothing away"
    return f"{'took' if saved > 0 else 'added'} {exact(abs(saved), 'bytes')}{' away' if saved > 0 else ''}"


def _mover(mover: Mover) -> str:
    name = mover.name if mover.reader is None else f"{mover.reader}: {mover.name}"
    return f"{name} ({'; '.join(mover.said)})" if mover.said else name


def _xml(text: str) -> str:
    return text.translate(_NO_XML)


def _cell(text: str) -> str:
    return _markdown(text).replace("|", "\\|")


def _markdown(text: str) -> str:
    """A text in a line of Markdown: no line ends, and nothing that would be read as HTML or emphasis."""
    line = " ".join(text.split())
    for letter in "\\`*_<>[]":
        line = line.replace(letter, f"\\{letter}")
    return line


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
