"""Resume: what an interrupted run has done lies in a folder beside its output, and the next run goes on behind it.

``out.onnx`` has ``out.onnx.progress/``, which goes when the output is whole. What takes long (a weight that
GPTQ is done with, a search for an order of channels, the outputs that a check compares, a score) is kept
there as soon as it is known; passes that take no longer than reading what they made are done again. So a
resumed run walks the same path as one that was never interrupted, and makes the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import stat
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from effic.guard import Accuracy
from effic.ir.cost import weight_bytes
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.safetensors_format import DTYPES
from effic.ir.whole_files import Stamp, stamp, write_whole
from effic.passes.base import Pass, options_of
from effic.passes.finished import SUFFIX, FinishedSites, Store
from effic.passes.pipeline import Checker, Instead, Keep, Step
from effic.passes.spec import to_text
from effic.record import build_of, file_digest

fcntl: ModuleType | None
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows: two runs with one output are the user's to avoid
    fcntl = None

FOLDER = ".progress"
"""What is added to the output's name."""

_RUN, _LOCK, _SAVING = "run.json", "lock", "saving"
_OURS = re.compile(rf"[a-z0-9-]+-[0-9a-f]{{24}}{re.escape(SUFFIX)}|\.effic-[0-9a-f]{{16}}\.tmp")
_MOST_RUN_BYTES = 64 << 20
# Of a folder that an option names, as many files are told apart by what is in them.
_MOST_FILES = 10_000


def progress_folder(output: str | os.PathLike[str]) -> Path:
    """Where the progress of a run lies: ``out.onnx.progress`` beside ``out.onnx``."""
    path = Path(output)
    return path.with_name(path.name + FOLDER)


def was_saving(output: str | os.PathLike[str] | None) -> bool:
    """Whether a run was killed while its files took their names, and what has the output's name is its own,
    or what that run was allowed to replace. What somebody has put there since is neither."""
    if output is None:
        return False
    return stamp(output) in _read_saving(progress_folder(output)).get(Path(output).name, [])


def refuse(source: Any, output: Any, keep_if_faster: bool) -> None:
    """Say what cannot be resumed, before anything is read.

    Raises:
        UsageError: no output, a model from memory, or passes that are chosen by timing.
    """
    if output is None:
        raise UsageError("--resume keeps its progress beside the output; give -o out.onnx")
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError("only a model from a file can be resumed: one in memory may have changed meanwhile")
    if keep_if_faster:
        raise UsageError(
            "--resume cannot go on with --keep-if-faster: times taken in two runs tell nothing about each other; "
            "leave one of them out"
        )


def identity(
    *,
    front_end: str,
    files: Sequence[Path],
    sequence: Sequence[Pass],
    target: str,
    seed: int,
    check: str,
    calibration: Mapping[str, Any] | None,
    inputs: Any,
    accuracy: Accuracy | None,
) -> dict[str, Any]:
    """All that decides what a run makes, JSON-able: two runs of the same identity make the same bytes.

    Args:
        front_end: how the model was read.
        files: the model and its external data.
        sequence: the passes.
        target, seed, check: as :func:`effic.optimize.optimize` takes them.
        calibration: what a record keeps of the samples, or None.
        inputs: the file or the arrays for checks, or None.
        accuracy: what is scored, or None.
    """
    steps = [Step(p.name, to_text(p), p.numerics, options=dataclasses.asdict(p)) for p in sequence]
    path = inputs if isinstance(inputs, (str, os.PathLike)) else None
    found = build_of(
        front_end=front_end,
        files=[file_digest(file) for file in files],
        steps=steps,
        target=target,
        seed=seed,
        check=check,
        external=None,
        calibration=calibration,
        inputs=None if path is None else file_digest(path),
    )
    if path is None and inputs is not None:
        found["inputs"] = {name: _array_digest(np.asarray(array)) for name, array in inputs.items()}
    # What passes read from files is not in their options.
    found["named"] = [_named(text) for item in sequence for text in _texts(item)]
    if accuracy is not None:
        row = {field.name: getattr(accuracy, field.name) for field in dataclasses.fields(accuracy)}
        found["accuracy"] = {name: str(value) for name, value in row.items()} | {
            "digest": _named(accuracy.data)
        }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


class Unfinished:
    """The progress of a run, in a folder of its own.

    Attributes:
        folder: where it lies.
        notes: what was found there, each a sentence.
    """

    def __init__(self, output: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        """Begin a run, or go on with one.

        Args:
            output: the file the run will write.
            run: of :func:`identity`.

        Raises:
            UsageError: the folder holds something else, the progress of another run, or is in use.
        """
        self.folder = progress_folder(output)
        self._texts: Sequence[str] = run["passes"]
        self._release: Callable[[], Any] | None = None
        try:
            self._open(run)
        except OSError as error:
            raise UsageError(f"cannot use {self.folder}: {error.strerror or error}") from error
        self._remove_leftover(Path(output))
        self._sites: FinishedSites | None = None
        self._all: list[Store] = []
        self._checks = self._store("check")
        self._scores = self._store("score")
        self._passes = self._store("pass")
        self.before = self._done_before()
        self.notes = tuple(self._found())

    def _open(self, run: Mapping[str, Any]) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UsageError(f"{self.folder} is no folder, and the progress has to lie there; remove it")
        self.folder.mkdir(exist_ok=True)
        record = self.folder / _RUN
        if not record.exists():
            foreign = sorted(
                n for n in os.listdir(self.folder) if n not in (_LOCK, _SAVING) and not _OURS.fullmatch(n)
            )
            if foreign:
                raise UsageError(
                    f"{self.folder} holds '{foreign[0]}', which is no progress of effic; move it away"
                )
        self._take()
        if record.exists():
            if why := _difference(_read_run(record), run):
                raise UsageError(
                    f"{self.folder} is the progress of another run: {why}; "
                    "give what was given then, or remove the folder to begin anew"
                )
        else:
            write_whole(record, (json.dumps(run, indent=1) + "\n").encode())

    def _take(self) -> None:
        """Let no other process work in the folder until this one ends."""
        if fcntl is None:
            return
        # Of the process, not of the file handle: it goes when the process is killed.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        lock = os.open(self.folder / _LOCK, flags, 0o666)
        self._release = weakref.finalize(self, os.close, lock)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise UsageError(f"another run is working in {self.folder}; wait for it, or end it") from error
        except OSError:
            pass  # a file system without locks

    def _store(self, prefix: str) -> Store:
        store = Store(self.folder, prefix)
        self._all.append(store)
        return store

    # -- passes ------------------------------------------------------------------------------------

    def sites(self, number: int, item: Pass) -> FinishedSites:
        """Where a pass keeps the weights it is done with.

        Args:
            number: of the pass, from 0.
            item: the pass.
        """
        self._sites = FinishedSites(self.folder, f"{number + 1:02d}-{item.name}", to_text(item))
        self._all.append(self._sites)
        return self._sites

    def done(self, number: int, step: Step) -> None:
        """Note that a pass is finished, and in its step what of it was done by an earlier run."""
        key = {"pass": number, "text": step.text}
        if self._sites is not None and self._sites.taken:
            step.resumed = self._sites.taken
        if (found := self._passes.get(key)) is not None:
            seconds = found[0].get("seconds")
            step.seconds = float(seconds) if isinstance(seconds, (int, float)) else step.seconds
            step.resumed = step.resumed or 0
        else:
            self._passes.put(key, {"seconds": step.seconds}, {})

    def _done_before(self) -> int:
        """Passes that an earlier run had finished."""
        number = 0
        while number < len(self._texts):
            if self._passes.get({"pass": number, "text": self._texts[number]}) is None:
                break
            number += 1
        return number

    def _found(self) -> list[str]:
        """What an earlier run had done, in a sentence, or nothing."""
        text, count, total = "", 0, None
        if self.before < len(self._texts):
            text = self._texts[self.before]
            name = text.partition("{")[0]
            here = FinishedSites(self.folder, f"{self.before + 1:02d}-{name}", text)
            count, total = here.count(), here.total
        if not self.before and not count:
            return []
        passes = f"{self.before} of {len(self._texts)} passes"
        of = f" of {total}" if total is not None else ""
        return [f"resuming: {passes}" + (f", {count}{of} sites of {name}" if count else "") + " were done"]

    def told(self, dry_run: bool) -> list[str]:
        """What people are to know at the end of the run, each a sentence."""
        told = list(self.notes)
        names = sorted({name for store in self._all for name in store.damaged})
        if names:
            more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
            told.append(f"{names[0]}{more} in {self.folder} is damaged; what it held was done again")
        if dry_run:
            told.append(
                f"what was done is kept in {self.folder}; without --dry-run, the next run goes on from it"
            )
        return told

    # -- checks and scores ---------------------------------------------------------------------------

    def checker(self, model: Model, inputs: Mapping[str, np.ndarray] | None, seed: int) -> Checker:
        """A checker that runs no model which an earlier run has run at the same point."""
        return _KeptChecker(self._checks, model, inputs, seed)

    def keep(self, keep: Keep) -> Keep:
        """The same verdicts, those of an earlier run first."""
        asked = 0

        def kept(before: Model, model: Model, item: Pass, step: Step) -> str | Instead | None:
            nonlocal asked
            asked += 1
            key = {"verdict": asked, **_state(model), "text": step.text}
            if (found := self._scores.get(key)) is not None:
                verdict, score = found[0].get("verdict"), found[0].get("score")
                step.score = float(score) if isinstance(score, (int, float)) else None
                return verdict if isinstance(verdict, str) else None
            answer = keep(before, model, item, step)
            if not isinstance(answer, Instead):
                self._scores.put(key, {"verdict": answer, "score": step.score}, {})
            return answer

        return kept

    # -- the end -----------------------------------------------------------------------------------

    def saving(self, files: Mapping[str, Stamp]) -> None:
        """Note that the output's files are about to take their names; see :func:`was_saving`.

        Args:
            files: their names and stamps.
        """
        # What has a name now may be replaced: the run was allowed to, or would not have come so far.
        row = {os.path.basename(path): [new, stamp(path)] for path, new in files.items()}
        write_whole(self.folder / _SAVING, json.dumps(row).encode())

    def _remove_leftover(self, output: Path) -> None:
        """Remove the data of a run that was killed before the model that reads them took its name."""
        noted = _read_saving(self.folder)
        new = {name: stamps[0] for name, stamps in noted.items() if stamps}
        if output.name not in new or stamp(output) == new[output.name]:
            return
        for name in new:
            path = output.with_name(name)
            if path != output and not path.is_dir() and stamp(path) == new[name]:
                with contextlib.suppress(OSError):
                    path.unlink()

    def remove(self) -> None:
        """Remove the folder: the output is whole. What somebody else put there stays."""
        if self._release is not None:
            self._release()
        # At once: of a removal that is interrupted nothing is left that a run could go on with.
        over = self.folder.with_name(self.folder.name + ".done")
        with contextlib.suppress(OSError):
            _empty(over)
            self.folder.rename(over)
            _empty(over)


def _empty(folder: Path) -> None:
    """Remove a folder of ours, but for what is not ours."""
    if folder.is_symlink() or not folder.is_dir():
        return
    names = [name for name in os.listdir(folder) if _OURS.fullmatch(name) or name in (_RUN, _LOCK, _SAVING)]
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class _KeptChecker(Checker):
    """A checker that keeps the outputs of every model it runs, in the order in which it is asked to."""

    def __init__(
        self, store: Store, model: Model, inputs: Mapping[str, np.ndarray] | None, seed: int
    ) -> None:
        super().__init__(model, inputs, seed)
        self._store, self._asked = store, 0

    def _run(self, model: Model, name: str) -> dict[str, np.ndarray]:
        self._asked += 1
        key = {"check": self._asked, "of": name, **_state(model)}
        if (found := self._store.get(key)) is not None and found[1].keys() == self.original.keys():
            return {output: np.array(array) for output, array in found[1].items()}
        outputs = super()._run(model, name)
        if all(array.dtype in DTYPES.values() for array in outputs.values()):
            self._store.put(key, {}, outputs)
        return outputs


def _state(model: Model) -> dict[str, int]:
    """What tells a model's states in a run apart, at no cost."""
    return {"nodes": sum(len(graph) for graph in model.graphs()), "bytes": weight_bytes(model)}


def _texts(item: Pass) -> Iterator[str]:
    """What a pass's options say in free text, where files may be named."""
    for field, kind in options_of(type(item)):
        value = getattr(item, field.name)
        if kind is str:
            yield value
        elif typing.get_origin(kind) is tuple and "choices" not in field.metadata:
            yield from value


def _named(value: Any) -> Any:
    """Digests of the file or the folder that a value names; None where it names none."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        return None
    path = Path(value)
    try:
        if path.is_file():
            return dataclasses.asdict(file_digest(path))
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())[:_MOST_FILES]
            return [dataclasses.asdict(file_digest(file)) for file in files]
    except (OSError, ValueError):
        return None
    return None


def _array_digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


def _read_json(path: Path) -> Any:
    """What a file of ours holds.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is no JSON, or none of ours.
    """
    if not stat.S_ISREG(path.lstat().st_mode) or path.stat().st_size > _MOST_RUN_BYTES:
        raise ValueError("too large, or no file")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_saving(folder: Path) -> dict[str, list[Stamp]]:
    """What :meth:`Unfinished.saving` noted: of each name the new file's stamp and the older one's."""
    try:
        row = _read_json(folder / _SAVING)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(row, dict) or not all(isinstance(each, list) for each in row.values()):
        return {}
    return {
        # None is a name that was free, and would be as well a file that is gone: neither is to be replaced.
        os.path.basename(name): [
            (one[0], one[1]) for one in stamps if isinstance(one, list) and len(one) == 2
        ]
        for name, stamps in row.items()
    }


def _read_run(path: Path) -> Any:
    try:
        return _read_json(path)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged; remove the folder {path.parent} to begin anew") from error


_WORDS = {
    "source": "the model file is another one",
    "options": "the options of its passes differ",
    "calibration": "the calibration data are others",
    "inputs": "the inputs of the checks are others",
    "named": "a file that a pass reads is another one",
    "accuracy": "the metric, its data or its limits are others",
}


def _difference(was: Any, now: Mapping[str, Any]) -> str | None:
    """What tells two runs apart, as a phrase, or None."""
    if not isinstance(was, dict):
        return "it was written by another version of effic"
    for key in ("versions", *now, *was):
        old, new = was.get(key), now.get(key)
        if old == new:
            continue
        if key == "versions":
            if not isinstance(old, dict) or not isinstance(new, dict):
                return "it was written by another version of effic"
            name = next(n for n in {**old, **new} if old.get(n) != new.get(n))
            return f"{name} was {old.get(name, 'missing')} and is {new.get(name, 'missing')}"
        if key == "passes" and isinstance(old, list) and isinstance(new, list):
            return f"its passes were '{_short(old)}' and are '{_short(new)}'"
        return _WORDS.get(key) or f"{key} was {old!r:.80} and is {new!r:.80}"
    return None


def _short(texts: Sequence[Any]) -> str:
    text = ",".join(map(str, texts))
    return text if len(text) <= 200 else f"{text[:199]}…"
