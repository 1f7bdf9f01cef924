"""ONNX's own test cases of single nodes on TVM: the outputs are those of ONNX, or the node is refused by name.

The first case of each operator is run here; all two thousand forms with ``EFFIC_ALL_NODE_CASES=1``.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import onnx
import pytest

pytest.importorskip("tvm", reason="needs the tvm extra")

from effic.backends.tvm.operators import CONVERTERS, find_converter
from effic.backends.tvm.private_api import importer_knows
from tests.backends.tvm.node_cases import ALL, Form, Group, check, form, load_cases

# What is not run: words of case names, and the reason.
EXCEPTIONS = {
    "training_dropout": "draws random numbers",
}

# Forms that are compiled together.
_TOGETHER = 40

DOCS = Path(__file__).parents[3] / "docs" / "tvm.md"

CASES = load_cases()


def chosen() -> list[tuple[str, bool]]:
    """Names of cases, and whether all inputs but the first are constants."""
    found: list[tuple[str, bool]] = []
    seen: set[str] = set()
    for name, case in CASES.items():
        assert case.model is not None
        graph = case.model.graph
        if any(word in name for word in EXCEPTIONS) or (not ALL and "_expanded" in name):
            continue
        operators = {node.op_type for node in graph.node}
        if not ALL and operators <= seen:
            continue
        if len(graph.input) > 1:
            found.append((name, True))
        if ALL or len(graph.input) == 1:
            found.append((name, False))
        seen |= operators
    return found


CHOSEN = chosen()


@functools.lru_cache(maxsize=1)
def group(number: int) -> Group:
    """The forms of one piece of :data:`CHOSEN`, compiled."""
    part = CHOSEN[number * _TOGETHER : (number + 1) * _TOGETHER]
    forms = [form(CASES[name], constants=constants) for name, constants in part]
    return Group(one for one in forms if one is not None)


@pytest.mark.parametrize("index", range(len(CHOSEN)), ids=[f"{name}-{c}" for name, c in CHOSEN])
def test_case(index: int) -> None:
    name, constants = CHOSEN[index]
    one: Form | None = form(CASES[name], constants=constants)
    if one is None:
        pytest.skip("inputs or outputs are no tensors")
    made = group(index // _TOGETHER)
    if one.name in made.refused:
        # By name: an operator, a node or an input, and a reason.
        assert re.match(r"TVM cannot run [\w.:]+ '.*': .{8,}", made.refused[one.name])
        return
    check(one, made.run(one.name))


@pytest.mark.parametrize("word", EXCEPTIONS)
def test_exceptions_are_of_cases_there_are(word: str) -> None:
    assert any(word in name for name in CASES)


def test_operators_of_the_table_are_there() -> None:
    for key in CONVERTERS:
        assert callable(find_converter(key))


def test_the_page_lists_what_has_no_converter() -> None:
    lacking = sorted(
        {
            schema.name
            for schema in onnx.defs.get_all_schemas()
            if schema.domain == ""
            and not schema.deprecated
            and find_converter(schema.name) is None
            and not importer_knows(schema.name)
            and not schema.has_function
            and not schema.has_context_dependent_function
        }
    )
    text = " ".join(DOCS.read_text().split())
    assert ", ".join(f"`{name}`" for name in lacking) in text
