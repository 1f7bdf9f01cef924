"""Options with which commands score models: the metric, the data and the limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from effic.cli import console

if TYPE_CHECKING:
    from effic.guard import Accuracy

F = TypeVar("F", bound=Callable[..., Any])

_METRIC = (
    click.option(
        "--metric",
        metavar="TEXT",
        help="Score by top1, top5, perplexity, spearman, agreement, sqnr, cosine, max_abs, or "
        "package.module:function.",
    ),
    click.option(
        "--data",
        metavar="SOURCE",
        help="Score on these: .npz or .safetensors (inputs and 'labels'), token ids as .npy, a folder of "
        "images by label, .tsv pairs, or package.module:function.",
    ),
    click.option("--data-limit", type=int, metavar="N", help="Score on the first N samples only."),
    click.option("--data-window", type=int, metavar="N", help="Tokens of a sample, when it is token ids."),
    click.option("--tokenizer", metavar="FILE", help="The model's tokenizer.json, for .tsv pairs."),
    click.option(
        "--images",
        metavar="TEXT",
        help="How images are prepared: 'resize=256,mean=[0.485,0.456,0.406],std=[0.229,0.224,0.225]'; also "
        "scale=255, channels=rgb|bgr|gray.",
    ),
)
_BOUND = click.option("--bound", type=float, metavar="X", help="The worst score allowed.")
_MAX_DROP = click.option(
    "--max-drop",
    type=float,
    metavar="X",
    help="How much worse than the original it may score: points of per cent, or per cent of a perplexity.",
)
_ON_DROP = click.option(
    "--on-drop",
    type=click.Choice(["rollback", "fail"]),
    help="What happens to a pass that costs more: it is undone (default), or the run fails.",
)


def score_options(command: F) -> F:
    """The metric and the data."""
    for option in reversed(_METRIC):
        command = option(command)
    return command


def metric_options(command: F) -> F:
    """The same, and a bound."""
    return score_options(_BOUND(command))


def accuracy_options(command: F) -> F:
    """The same, and how much may be lost."""
    return metric_options(_MAX_DROP(command))


def loop_options(command: F) -> F:
    """The same, and what happens to a pass that costs too much."""
    return accuracy_options(_ON_DROP(command))


def accuracy(given: dict[str, Any], recipe: dict[str, Any] | None = None) -> Accuracy | None:
    """What the options ask for; None without a metric.

    Args:
        given: the options by their names, None where not given.
        recipe: the ``[accuracy]`` table of a recipe; options count before it.

    Raises:
        UsageError: an option without a metric, or one that is wrong.
    """
    from effic.guard import Accuracy
    from effic.ir.errors import UsageError
    from effic.passes import near

    names = {
        "metric": "metric",
        "data": "data",
        "data_limit": "limit",
        "data_window": "window",
        "tokenizer": "tokenizer",
        "images": "images",
        "bound": "bound",
        "max_drop": "max_drop",
        "on_drop": "on_drop",
    }
    fields: dict[str, Any] = {}
    for key, value in (recipe or {}).items():
        if key not in names:
            raise UsageError(f"the recipe's [accuracy] has an unknown field '{key}'{near(key, list(names))}")
        fields[names[key]] = value
    fields.update({names[key]: value for key, value in given.items() if value is not None})
    if not fields:
        return None
    if "metric" not in fields:
        flag = next(k for k, v in names.items() if v in fields).replace("_", "-")
        raise UsageError(f"--{flag} does nothing without a metric; give one with --metric")
    if "on_drop" in fields and not {"max_drop", "bound"} & set(fields):
        raise UsageError("--on-drop does nothing without a limit; give --max-drop or --bound")
    if fields.get("on_drop", "fail") not in ("rollback", "fail"):
        raise UsageError(f"on_drop is {fields['on_drop']!r}, allowed are rollback, fail")
    for key, kind in (("max_drop", float), ("bound", float), ("limit", int), ("window", int)):
        value = fields.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, kind))):
            raise UsageError(f"{key} is {value!r}, which is no number")
    if "images" in fields:
        fields["images"] = images(fields["images"])
    return Accuracy(**fields)


def images(text: str) -> Any:
    """``resize=256,mean=[…]`` as :class:`effic.metric_data.Images`.

    Raises:
        UsageError: an unknown field, or no number.
    """
    import dataclasses

    from effic.ir.errors import UsageError
    from effic.metric_data import Images
    from effic.passes import near
    from effic.passes.spec import parse_one

    _, _, options = parse_one(f"images{{{text}}}")
    known = [f.name for f in dataclasses.fields(Images)]
    fields: dict[str, Any] = {}
    for name, (raw, _) in options.items():
        if name not in known:
            raise UsageError(f"--images: there is no '{name}'{near(name, known)} (known: {', '.join(known)})")
        try:
            if name == "channels":
                if raw not in ("rgb", "bgr", "gray"):
                    raise UsageError(f"--images: channels is '{raw}', allowed are rgb, bgr, gray")
                fields[name] = raw
            elif name in ("mean", "std"):
                fields[name] = tuple(float(v) for v in (raw if isinstance(raw, list) else [raw]))
            else:
                fields[name] = int(raw) if name == "resize" else float(raw)
        except (TypeError, ValueError):
            raise UsageError(f"--images: {name} is {raw!r}, which is no number") from None
    return Images(**fields)


def print_accuracy(found: dict[str, Any]) -> None:
    """One line: the score before and after, and what was allowed."""
    before, after = found["before"], found["after"]
    drop = ""
    if found["drop"] is not None:
        unit = "%" if before["metric"].startswith("perplexity") else " points"
        word = "worse" if found["drop"] > 0 else "better"
        drop = f" ({abs(found['drop']):.2f}{unit} {word})" if found["drop"] else " (the same)"
    console.print_result(
        f"{found['metric']}: {_figure(before['value'])} → {_figure(after['value'])}{drop}, "
        f"on {before['count']} of {found['data']}"
    )


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}" if abs(value) < 100 else f"{value:.5g}"
