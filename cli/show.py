"""``effic show``: what is in a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.show import Port, Shown

WEIGHT_KINDS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
"""Operators whose weights passes rewrite; a kernel's own form is not worth a complaint."""

SPARSE = 0.9
"""Undeclared weights of a density up to this are listed as sparse; a few zeros are nothing to tell."""


@click.command()
@click.argument("model", type=click.Path())
@click.option("--top", default=10, show_default=True, help="How many operators and nodes to list.")
@click.option(
    "--target", metavar="TEXT", help="Tell how a target that compiles would run it: 'tvm-cpu{shapes=…}'."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, nothing left out.")
def show(model: str, top: int, target: str | None, as_json: bool) -> None:
    """What is in MODEL: operators, sizes, weight sites and encodings, and what costs most.

    MACs are multiply-adds of one run, each dynamic dimension counted as 1. With --target, how many nodes of
    each operator run on effic's kernels, are lowered otherwise, or cannot be (exit code 1). MODEL may be
    the folder of a build for tvm-cpu: its manifest is printed.
    """
    from effic.backends.tvm.manifest import is_artifact
    from effic.cli.show_tvm import print_artifact, print_coverage

    if target is not None:
        print_coverage(model, target, as_json)
        return
    if is_artifact(model):
        print_artifact(model, as_json)
        return
    from effic.show import inspect_model

    shown = inspect_model(model)
    if as_json:
        console.print_json(shown.to_dict())
    else:
        _print(shown, max(0, top))


def _print(shown: Shown, top: int) -> None:
    cost = shown.cost
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in shown.opsets.items())
    nested = shown.graphs - 1 - shown.functions
    extra = "".join(
        f", {count} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((nested, "subgraph"), (shown.functions, "function"))
        if count > 0
    )
    dims = " with " + ", ".join(f"{name}={size}" for name, size in cost.dims.items()) if cost.dims else ""
    macs = f"{console.amount(cost.macs)} MACs{dims}"
    if cost.macs_unknown:
        macs = f"at least {macs} ({cost.macs_unknown} nodes have unknown shapes)"
    console.print_result(
        f"{shown.path}: {console.size(shown.measurement.file_bytes)}, IR version {shown.ir_version}, "
        f"opset {opsets}" + (f", made by {shown.producer}" if shown.producer else ""),
        f"{cost.nodes} nodes{extra}, {console.amount(cost.parameters)} parameters, "
        f"{console.size(cost.weight_bytes)} of weights",
        macs,
        *(f"  in   {_port(port)}" for port in shown.inputs),
        *(f"  out  {_port(port)}" for port in shown.outputs),
        "",
    )
    for note in shown.notes:
        console.print_result(f"note: {note}")
    _print_ops(shown, top)
    _print_sites(shown)
    _print_sparsity(shown)
    _print_movers(shown, top)
    if shown.record:
        console.print_result("", "made by effic with:")
        for entry in shown.record:
            sizes = f"{console.size(entry.bytes_before)} → {console.size(entry.bytes_after)}"
            counts = f"{entry.passed} changed, {entry.missed} missed"
            console.print_result(f"  {entry.text}  ({counts}, {sizes}; effic {entry.version})")
    if shown.build is not None:
        console.print_result("", *_build(shown.build))


def _build(build: dict[str, Any]) -> list[str]:
    """Where the model came from and for what it was made, in lines; of a file that anybody may have written."""
    source, calibration = build["source"], build.get("calibration")
    files = source["files"]
    origin = f"a file with the sha256 {files[0]['sha256'][:16]}…" if files else "a model in memory"
    lines = [f"from {origin}, for {build['target']}, seed {build['seed']}"]
    if isinstance(calibration, dict):
        random = "random numbers" if calibration.get("random") else "data"
        lines.append(f"calibrated on {random} with the sha256 {str(calibration.get('digest'))[:16]}…")
    versions = build.get("versions")
    if isinstance(versions, dict):
        lines.append("with " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    return lines


def _port(port: Port) -> str:
    return f"{port.name}: {port.dtype}" + (
        " of unknown rank" if port.shape is None else console.shape_text(port.shape)
    )


def _print_ops(shown: Shown, top: int) -> None:
    cost = shown.cost
    rows = [
        [
            row.op,
            str(row.count),
            console.size(row.weight_bytes),
            _share(row.weight_bytes, cost.weight_bytes),
            console.amount(row.macs),
            _share(row.macs, cost.macs),
        ]
        for row in shown.ops[:top]
    ]
    console.print_result(console.table("operator", ">nodes", ">weights", ">", ">MACs", ">", rows=rows))
    rest = shown.ops[top:]
    if rest:
        names = ", ".join(f"{row.op} {row.count}" for row in rest)
        console.print_result(f"and {names}")


def _print_sites(shown: Shown) -> None:
    if not shown.sites:
        return
    counts: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    reasons: dict[str, list[str]] = defaultdict(list)
    for site in shown.sites:
        key = site.kind, site.storage
        counts[key] += 1
        elements[key] += site.shape_oi[0] * site.shape_oi[1]
        nbytes[key] += site.bytes
        if site.why_not is not None and site.kind in WEIGHT_KINDS and not site.decoded:
            reasons[site.why_not].append(site.name)
    rows = [
        [
            kind,
            storage,
            str(counts[kind, storage]),
            console.amount(elements[kind, storage]),
            console.size(total),
            f"{8 * total / max(1, elements[kind, storage]):.2f}",
        ]
        for (kind, storage), total in nbytes.most_common()
    ]
    console.print_result(
        "",
        console.table(
            "weights of", "stored as", ">sites", ">elements", ">bytes", ">bits each", rows=rows, flexible=1
        ),
    )
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print_result(f"not to be rewritten: {names[0]}{others}: {reason}")


def _print_sparsity(shown: Shown) -> None:
    """Weights with a declared pattern, and others a good part of which is zero."""
    counts: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    for site in shown.sites:
        if site.density is None or (site.pattern is None and site.density > SPARSE):
            continue
        key, size = (site.kind, site.pattern or "none"), site.shape_oi[0] * site.shape_oi[1]
        counts[key] += 1
        elements[key] += size
        kept[key] += round(site.density * size)
    rows = [
        [kind, pattern, str(counts[key]), console.amount(size), f"{100 * kept[key] / max(1, size):.1f}%"]
        for key, size in elements.most_common()
        for kind, pattern in [key]
    ]
    if rows:
        header = ("sparse weights of", "declared pattern", ">sites", ">elements", ">not zero")
        console.print_result("", console.table(*header, rows=rows))


def _print_movers(shown: Shown, top: int) -> None:
    cost = shown.cost
    rows = [
        [
            node.name,
            console.size(node.weight_bytes),
            _share(node.weight_bytes, cost.weight_bytes),
            console.amount(node.macs),
            _share(node.macs or 0, cost.macs),
        ]
        for node in shown.nodes[:top]
    ]
    if rows:
        console.print_result("", console.table("costs most", ">weights", ">", ">MACs", ">", rows=rows))
    if len(shown.nodes) > top:
        console.print_result(f"… {len(shown.nodes) - top} more nodes: --top {len(shown.nodes)} or --json")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if part and whole else ""
