"""The page: data, styles and scripts put together into one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import string
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from effic.ir.errors import MissingExtraError

SCRIPTS = ("elements.js", "charts.js", "table.js", "graph.js", "page.js")
"""In the order in which they are run."""

# Whatever text of a model ended up as markup could not run: only the scripts of these digests may.
_POLICY = (
    "default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def plotting_library() -> str:
    """The source of plotly.js.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report", "the HTML report") from error
    return str(get_plotlyjs())


def page(data: Mapping[str, Any], title: str) -> str:
    """The whole page.

    Args:
        data: JSON-able; what the scripts show. Numbers must be finite.
        title: of the page.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    scripts = [plotting_library(), "\n".join(_asset(name) for name in SCRIPTS)]
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # One substitution into the frame alone, so that nothing in the data is taken for a place to fill.
    return string.Template(_asset("page.html")).substitute(
        title=html.escape(title),
        policy=html.escape(_POLICY.format(digests=digests)),
        style=_asset("page.css"),
        data=script_json(data),
        library=scripts[0],
        script=scripts[1],
    )


def script_json(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element: nothing in it closes the element or opens a comment."""
    found = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: no odd separators of lines
    return found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _asset(name: str) -> str:
    return files("effic.report").joinpath("assets", name).read_text(encoding="utf-8")
