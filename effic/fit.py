"""Whether a run fits on this machine, judged before it starts from what is known without doing anything.

The figures are the least that a run can do with, so that nothing that would fit is refused; a plan
(:mod:`effic.plan`) tries things out and says what a run will take.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from effic.ir.cost import weight_bytes
from effic.ir.errors import DoesNotFitError
from effic.ir.memory import available_memory
from effic.ir.model import Model, constant_tensor
from effic.passes.base import Pass
from effic.passes.pipeline import RUN_MEMORY, Check

# Output and working buffer of a pass that takes the largest weight in pieces.
_WORKING_COPIES = 1.0


@dataclass(frozen=True)
class Need:
    """What a run takes, in bytes.

    Attributes:
        memory: beyond what the process holds already.
        file: in the output's folder.
        temporary: in the folder for temporary files.
    """

    memory: int
    file: int
    temporary: int


@dataclass(frozen=True)
class Room:
    """What the machine has, in bytes; None where the system does not tell.

    Attributes:
        memory: that can be had without swapping, within the limits of the process's control groups.
        output: free in the output's folder.
        temporary: free in the folder for temporary files.
        shared: whether these two are on the same file system.
        folder: of the output, or None.
        temporary_folder: the other one.
    """

    memory: int | None
    output: int | None
    temporary: int | None
    shared: bool
    folder: str | None
    temporary_folder: str


def room(output: str | os.PathLike[str] | None) -> Room:
    """What there is for a run that writes ``output`` (None: nothing)."""
    temporary = tempfile.gettempdir()
    folder = None if output is None else os.path.dirname(os.path.abspath(output))
    shared = folder is not None and _device(folder) == _device(temporary)
    free = None if folder is None else _free(folder)
    return Room(available_memory(), free, _free(temporary), shared, folder, temporary)


def misfits(need: Need, have: Room) -> list[str]:
    """What does not fit, each as a phrase with both numbers."""
    found = []
    if have.memory is not None and need.memory > have.memory:
        found.append(f"{_size(need.memory)} of memory, and {_size(have.memory)} can be had")
    file = 0 if have.folder is None else need.file
    if have.shared and have.output is not None:
        if file + need.temporary > have.output:
            found.append(
                f"{_size(file)} for the output and {_size(need.temporary)} for temporary files on one disk, "
                f"and {_size(have.output)} are free in {have.folder}"
            )
        return found
    if have.output is not None and file > have.output:
        found.append(f"{_size(file)} for the output, and {_size(have.output)} are free in {have.folder}")
    if have.temporary is not None and need.temporary > have.temporary:
        found.append(
            f"{_size(need.temporary)} for temporary files, and {_size(have.temporary)} are free in "
            f"{have.temporary_folder} (TMPDIR names another folder)"
        )
    return found


def least_need(model: Model, sequence: Sequence[Pass], check: Check) -> Need:
    """The least a run can do with: weights are not read, and no pass is asked what it would do.

    A check holds the weights, the runtime's copies and a copy in a file. Without one it is the largest
    weight. The output keeps what the passes are sure to keep.
    """
    weights = weight_bytes(model)
    kept = float(weights)
    for item in sequence:
        kept *= item.stays()
    largest = max(
        (t.nbytes for g in model.graphs() for v in g.initializers.values() if (t := constant_tensor(v))),
        default=0,
    )
    memory = RUN_MEMORY * weights if check != "off" else _WORKING_COPIES * largest
    return Need(int(memory), int(kept), weights if check != "off" else 0)


def refuse_misfit(
    model: Model, sequence: Sequence[Pass], check: Check, output: str | os.PathLike[str] | None
) -> None:
    """Refuse a run that cannot fit.

    Raises:
        DoesNotFitError: with the numbers.
    """
    need = least_need(model, sequence, check)
    if found := misfits(need, room(output)):
        without = "--check off, which takes less, " if check != "off" else ""
        raise DoesNotFitError(
            f"this run needs at least {'; and '.join(found)}: use a larger machine, {without}"
            "or --no-fit-check to try all the same"
        )


def _free(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _device(folder: str) -> int | None:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return None


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count / 1e6:.2f} MB"
