"""Reading ``.pt2`` files without running what is inside them.

``torch.export.load`` trusts its file: it unpickles, loads compiled libraries, evaluates symbolic
shapes with sympy (which is Python's ``eval``) and looks operators up by any dotted path under
``torch``. :func:`read_program` looks at the whole archive first and lets torch have it only when
it holds nothing but tensors, a graph of registered operators, and arithmetic on sizes. That is
what ``torch.export.save`` writes for an ordinary module.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from effic.ir.errors import InvalidModelError, UsageError

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.export.pt2_archive import PT2ArchiveReader

# Everything torch.export.save writes; compiled code (data/aotinductor) and the pickled layout of
# torch before 2.8 (serialized_*.pt) are left out on purpose.
RECORDS = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/(version|serialization_id|\w+)"
    r"|models/[^/]+\.json|data/weights/[^/]+|data/constants/[^/]+|data/sample_inputs/[^/]+\.pt|extra/.+"
)

# Operators a node may name: registered torch operators, and the arithmetic on sizes that
# torch.export itself knows.
OPERATORS = re.compile(
    r"torch\.ops\.[A-Za-z]\w*(\.[A-Za-z]\w*|\._[A-Za-z]\w*){1,2}"
    r"|torch\.(sym_\w+|_sym_\w+)|math\.(trunc|floor|ceil|sqrt|pow)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift"
    r"|getitem)"
)

# What a symbolic size may be made of: sympy's numbers and arithmetic, and torch's additions.
SIZE_NAMES = frozenset(
    {
        "Symbol",
        "Integer",
        "Rational",
        "Float",
        "Mul",
        "Add",
        "Pow",
        "Max",
        "Min",
        "Mod",
        "Abs",
        "floor",
        "ceiling",
        "sqrt",
        "And",
        "Or",
        "Not",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "Equality",
        "Unequality",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "Piecewise",
        "ExprCondPair",
        "oo",
        "int_oo",
        "true",
        "false",
        "True",
        "False",
        "FloorDiv",
        "ModularIndexing",
        "Where",
        "PythonMod",
        "CleanDiv",
        "CeilToInt",
        "FloorToInt",
        "CeilDiv",
        "LShift",
        "RShift",
        "PowByNatural",
        "FloatPow",
        "FloatTrueDiv",
        "IntTrueDiv",
        "IsNonOverlappingAndDenseIndicator",
        "TruncToFloat",
        "TruncToInt",
        "RoundToInt",
        "RoundDecimal",
        "ToFloat",
        "Identity",
    }
)
SIZE_SYMBOL = re.compile(r"[a-z]{1,3}\d+")
SIZE_TEXT = re.compile(r"[\w.+-]*")
SIZE_SYNTAX = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Tuple),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
)


def read_program(path: str) -> ExportedProgram:
    """The program in a ``.pt2`` file that ``torch.export.save`` wrote.

    Args:
        path: the file.

    Raises:
        UsageError: there is no such file.
        InvalidModelError: it is no ``.pt2`` file, is broken, was written by a torch before 2.8, or
            holds something that loading would execute: pickled objects, compiled code, operators
            that are not torch's, expressions that are not arithmetic.
    """
    import torch
    from torch.export.pt2_archive import PT2ArchiveReader

    if not os.path.isfile(path):
        raise UsageError(f"there is no file '{path}'; give a .pt2 file written by torch.export.save")
    if not zipfile.is_zipfile(path):
        raise InvalidModelError(f"'{path}' is not a .pt2 archive; write it with torch.export.save")
    try:
        # AssertionError is how torch says that the archive's format is wrong.
        reader = PT2ArchiveReader(path)
        problem = _find_problem(path, reader)
    except (RuntimeError, AssertionError, ValueError, zipfile.BadZipFile) as error:
        reason = _first_line(error)
        raise InvalidModelError(f"'{path}' is a broken .pt2 archive ({reason}); export it again") from error
    if problem:
        raise InvalidModelError(f"'{path}' is refused because {problem}")
    try:
        program = torch.export.load(path)
    except (RuntimeError, AssertionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModelError(
            f"torch {torch.__version__} cannot read '{path}' ({_first_line(error)}); "
            "export it again with this torch"
        ) from error
    # Guards are lines of Python that torch compiles on the next use of the program. They only check
    # the inputs of a call, which an exported graph never makes.
    program._guards_code = []
    return program


def _find_problem(path: str, reader: PT2ArchiveReader) -> str | None:
    """Why the archive must not be loaded, or None."""
    names = reader.get_file_names()
    # torch falls back to Python's zipfile for the old layout, so both views of the file count.
    with zipfile.ZipFile(path) as archive:
        roots = {name.split("/", 1)[0] for name in archive.namelist()}
        seen = [name.partition("/")[2] for name in archive.namelist()]
    if len(roots) > 1 or len(set(seen)) != len(seen):
        return "it is not laid out as torch 2.8 and newer do; export it again"
    for name in {*names, *seen}:
        if not RECORDS.fullmatch(name):
            return f"it holds '{name}', which may be code; read is only what torch.export.save writes"
    models = [name for name in names if name.startswith("models/")]
    if models != ["models/model.json"]:
        return "it does not hold exactly one program; save one with torch.export.save"
    for name in names:
        if problem := _problem_of_record(name, reader):
            return problem
    return None


def _problem_of_record(name: str, reader: PT2ArchiveReader) -> str | None:
    if name.endswith(".pt") and name.startswith("data/"):
        if not _safe_pickle(reader.read_bytes(name)):
            return f"'{name}' holds pickled objects that are not tensors; export with plain tensor inputs"
    elif name.endswith("_config.json") and name.startswith("data/"):
        for key, payload in json.loads(reader.read_string(name))["config"].items():
            if payload["use_pickle"]:
                return f"'{key}' is a pickled Python object; export a module whose state is plain tensors"
    elif name.startswith("models/"):
        return _problem_of_graph(json.loads(reader.read_string(name)))
    return None


def _safe_pickle(data: bytes) -> bool:
    """Whether torch's restricted unpickler reads it (torch would fall back to the full one)."""
    import torch

    if not data:
        return True
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        return False
    return True


def _problem_of_graph(document: Any) -> str | None:
    for key, value in _entries(document):
        if key == "__enum__":
            return "its graph names a Python class to import; export with plain tuples and dictionaries"
        if key == "target" and isinstance(value, str) and not OPERATORS.fullmatch(value):
            # Signatures have a "target" too: the state-dict name of a parameter, never looked up.
            if value.startswith(("torch", "_operator", "math", "#")):
                return f"its graph calls '{value}', which is no registered torch operator"
        elif key == "expr_str" and isinstance(value, str) and not _is_size(value):
            return f"a size in its graph is no arithmetic: {value[:60]!r}"
    return None


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of nested JSON, including JSON kept in strings (torch's tree specs)."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for key, inner in item.items():
                yield key, inner
                pending.append(inner)
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, str) and "{" in item:
            try:
                pending.append(json.loads(item))
            except ValueError:
                # Ordinary text with a brace, such as a stack trace.
                continue


def _is_size(text: str) -> bool:
    """Whether ``text`` is arithmetic over known functions, numbers and size symbols."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, SIZE_SYNTAX):
            return False
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            return False
        if isinstance(node, ast.Name) and node.id not in SIZE_NAMES and not SIZE_SYMBOL.fullmatch(node.id):
            return False
        if isinstance(node, ast.Constant):
            known = isinstance(node.value, (bool, int, float)) or node.value is None
            # sympy parses text it is given: keep it to a bare name or number.
            plain = isinstance(node.value, str) and SIZE_TEXT.fullmatch(node.value) and "__" not in node.value
            if not (known or plain):
                return False
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
