"""Calibration data: from files, arrays or functions to samples that fit the model."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.passes.calibration_files import SUFFIXES, read_arrays
from effic.passes.named_function import named_function

Arrays = dict[str, np.ndarray]
Progress = Callable[[str, int, int], None]

RANDOM = "random"
"""The name that asks for made-up data."""

DEFAULT_WINDOW = 512
"""Tokens of a sample where neither the caller nor the model says how many."""

# Inputs of language models that follow from the token ids.
_DERIVED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "attention_mask": np.ones_like,
    "input_mask": np.ones_like,
    "token_type_ids": np.zeros_like,
    "segment_ids": np.zeros_like,
    "position_ids": lambda ids: np.broadcast_to(np.arange(ids.shape[-1], dtype=ids.dtype), ids.shape),
}
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_DTYPES_OF_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Feeds of the whole model, read one at a time.

    Attributes:
        source: where they are from, for people.
        count: how many there are.
        read: the feed of a number below ``count``.
        digest: sha256 over names, dtypes, shapes and bytes of all of them.
        random: made-up data.
    """

    source: str
    count: int
    read: Callable[[int], Arrays]
    digest: str
    random: bool = False

    def feeds(self) -> Iterator[Arrays]:
        """All of them, in order."""
        return (self.read(number) for number in range(self.count))


@dataclasses.dataclass(frozen=True)
class _Raw:
    """What a source holds before it is fitted to the model: feeds by number, and their origin."""

    source: str
    count: int
    read: Callable[[int], Mapping[str, Any]]
    unit: str = "samples"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """What the model says of an input; a dynamic dimension is None."""

    name: str
    dtype: ir.DataType | None
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        kind = "?" if self.dtype is None else self.dtype.name.lower()
        if self.shape is None:
            return kind
        return f"{kind}[{','.join('?' if d is None else str(d) for d in self.shape)}]"

    @property
    def is_ids(self) -> bool:
        integer = self.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        return integer and self.shape is not None and len(self.shape) == 2


def held(feeds: Iterable[Mapping[str, Any]], source: str) -> Samples:
    """Samples in memory, as they are.

    Raises:
        UsageError: there are none, or one is no mapping of numbers.
    """
    rows = [_as_arrays(feed, number, source) for number, feed in enumerate(feeds)]
    return _finished(_Raw(source, len(rows), lambda number: rows[number]), list(range(len(rows))), None)


def load_samples(
    data: Any, model: Model, *, samples: int, seed: int, window: int | None, progress: Progress | None
) -> Samples:
    """Samples from any source; see :meth:`effic.passes.calibration.Calibration.load`."""
    for what, value, least in (("samples", samples, 1), ("seed", seed, 0), ("window", window, 1)):
        if value is not None and value < least:
            raise UsageError(f"calibration: {what} is {value}, the least is {least}")
    inputs = model_inputs(model)
    if not inputs:
        raise UsageError("the model has no inputs, so there is nothing to calibrate it on")
    if isinstance(data, (str, os.PathLike)):
        text = os.fspath(data)
        if text == RANDOM:
            return _random(model, samples, seed, window, progress)
        raw = _from_text(text, inputs, samples, window)
    elif isinstance(data, np.ndarray):
        raw = _cut({"": data}, inputs, window, "an array")
    elif isinstance(data, Mapping):
        raw = _cut({str(k): np.asarray(v) for k, v in data.items()}, inputs, window, "arrays")
    elif callable(data):
        name = getattr(data, "__name__", "a function")
        raw = _from_iterable(data, f"{name}()", samples, window)
    else:
        raw = _from_iterable(data, "a list of feeds", samples, window)
    if raw.count == 0:
        raise UsageError(f"the calibration data from {raw.source} hold no samples")
    chosen = list(range(raw.count))
    if raw.count > samples:
        rng = np.random.default_rng(seed)
        chosen = sorted(int(i) for i in rng.choice(raw.count, samples, replace=False))
    return _finished(raw, chosen, inputs, progress)


def model_inputs(model: Model) -> list[ModelInput]:
    """The inputs a caller has to give."""
    found = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        shape = None
        if value.shape is not None:
            shape = tuple(d if isinstance(d, int) else None for d in value.shape)
        found.append(ModelInput(value.name or "", value.dtype, shape))
    return found


# -- sources --------------------------------------------------------------------------------------


def _from_text(text: str, inputs: list[ModelInput], samples: int, window: int | None) -> _Raw:
    if os.path.isdir(text):
        return _from_folder(text, inputs, window)
    if os.path.exists(text):
        return _cut(read_arrays(text), inputs, window, os.path.basename(text))
    if _FUNCTION.fullmatch(text):
        return _from_iterable(named_function(text, "the calibration function"), text, samples, window)
    raise UsageError(
        f"the calibration data {text} do not exist; give a file ({', '.join(SUFFIXES)}), a folder of them, "
        f"package.module:function, or '{RANDOM}' for made-up data"
    )


def _from_folder(folder: str, inputs: list[ModelInput], window: int | None) -> _Raw:
    """Every file of a folder, in the order of their names; an ``.npz`` is a feed unless it holds more."""
    names = sorted(n for n in os.listdir(folder) if n.endswith(SUFFIXES) and not n.startswith("."))
    if not names:
        raise UsageError(f"the folder {folder} has no calibration data in it ({', '.join(SUFFIXES)})")
    places: list[tuple[str, int]] = []
    for name in names:
        raw = _cut(read_arrays(os.path.join(folder, name)), inputs, window, name, whole=True)
        places += [(name, number) for number in range(raw.count)]

    def read(number: int) -> Mapping[str, Any]:
        # Opened anew: thousands of files cannot all stay open.
        name, inside = places[number]
        raw = _cut(read_arrays(os.path.join(folder, name)), inputs, window, name, whole=True)
        return raw.read(inside)

    return _Raw(os.path.basename(os.path.abspath(folder)), len(places), read)


def _from_iterable(feeds: Any, source: str, samples: int, window: int | None) -> _Raw:
    if window is not None:
        raise _no_tokens(window, source)
    if callable(feeds):
        feeds = feeds()
    if isinstance(feeds, Mapping):
        feeds = [feeds]
    if not isinstance(feeds, Iterable):
        raise UsageError(
            f"the calibration data from {source} are {type(feeds).__name__}; "
            "give an iterable of mappings from input names to arrays"
        )
    if isinstance(feeds, Sequence):
        return _Raw(source, len(feeds), lambda number: _as_arrays(feeds[number], number, source))
    # Copies: a generator may hand out the same buffer again and again.
    rows = [
        {name: array.copy() for name, array in _as_arrays(feed, number, source).items()}
        for number, feed in enumerate(itertools.islice(feeds, samples))
    ]
    return _Raw(source, len(rows), lambda number: rows[number])


def _as_arrays(feed: Any, number: int, source: str) -> Arrays:
    if not isinstance(feed, Mapping):
        raise UsageError(
            f"calibration sample {number} from {source} is {type(feed).__name__}, "
            "not a mapping from input names to arrays"
        )
    return {str(name): np.asarray(array) for name, array in feed.items()}


def _random(model: Model, samples: int, seed: int, window: int | None, progress: Progress | None) -> Samples:
    from effic.ir.evaluate import TRIED_DIMS, Oracle, runnable_inputs, seeded_inputs

    inputs = model_inputs(model)
    first, other = TRIED_DIMS[0]
    if window is not None:
        if not any(None in i.shape[1:] for i in inputs if i.shape is not None):
            raise UsageError(f"a window of {window} was asked for, and the model's inputs have fixed sizes")
        first, other = 1, window
    elif any(d is None for i in inputs if i.shape is not None for d in i.shape):
        shapes = {k: v.shape for k, v in runnable_inputs(model, Oracle(model), seed)[0].items()}
        for pair in TRIED_DIMS:
            made = seeded_inputs(model, seed, first=pair[0], other=pair[1])
            if {k: v.shape for k, v in made.items()} == shapes:
                first, other = pair
                break

    def read(number: int) -> Mapping[str, Any]:
        return seeded_inputs(model, seed + number, first=first, other=other)

    raw = _Raw("random numbers, made up", samples, read)
    return dataclasses.replace(_finished(raw, list(range(samples)), None, progress), random=True)


# -- from arrays to samples -----------------------------------------------------------------------


def _cut(
    arrays: Mapping[str, np.ndarray],
    inputs: list[ModelInput],
    window: int | None,
    source: str,
    whole: bool = False,
) -> _Raw:
    """Samples along the leading axis of arrays of many, or windows of a row of tokens.

    Args:
        arrays: by name.
        inputs: of the model.
        window: tokens of a window.
        source: of the arrays.
        whole: whether arrays are one feed where the model's batch is dynamic.
    """
    named = _name(arrays, inputs, source)
    by_name = {i.name: i for i in inputs}
    if len(named) == 1:
        ((name, array),) = named.items()
        if by_name[name].is_ids and array.ndim == 1 and array.dtype.kind in "iu":
            return _windows(name, array, by_name[name], window, source)
    if window is not None:
        raise _no_tokens(window, source)
    counts, batches = {}, {}
    for name, array in named.items():
        batches[name], counts[name] = _samples_in(array, by_name[name], whole)
    most = max(counts.values())
    odd = {n: c for n, c in counts.items() if c not in (1, most)}
    if odd:
        parts = ", ".join(f"'{n}' {c}" for n, c in counts.items())
        raise UsageError(f"the arrays of {source} hold different numbers of samples: {parts}")

    def read(number: int) -> Mapping[str, Any]:
        feed = {}
        for name, array in named.items():
            shape, at = by_name[name].shape, number if counts[name] > 1 else 0
            if shape is not None and array.ndim == len(shape) + 1:
                feed[name] = array[at]
            elif batches[name]:
                feed[name] = array[at * batches[name] : (at + 1) * batches[name]]
            else:
                feed[name] = array  # A scalar, for one, has no rows.
        return feed

    return _Raw(source, most, read)


def _no_tokens(window: int, source: str) -> UsageError:
    return UsageError(
        f"a window of {window} tokens was asked for, and {source} is no row of token ids "
        "(one-dimensional, integer) for a model with one input of ids"
    )


def _samples_in(array: np.ndarray, item: ModelInput, whole: bool) -> tuple[int, int]:
    """Rows of a sample (0: all of the array) and how many samples an array holds."""
    if item.shape is None or array.ndim < len(item.shape):
        return 0, 1
    if array.ndim == len(item.shape) + 1:
        return 0, len(array)
    if not item.shape:
        return 0, 1
    batch = item.shape[0]
    if batch is None:
        return (0, 1) if whole else (1, len(array))
    # A remainder that fills no batch is left out.
    return (batch, len(array) // batch) if batch and len(array) > batch else (0, 1)


def _name(arrays: Mapping[str, np.ndarray], inputs: list[ModelInput], source: str) -> Arrays:
    """The arrays that are inputs of the model; a single one need not be named."""
    wanted = {i.name for i in inputs}
    named = {name: array for name, array in arrays.items() if name in wanted}
    if named:
        return named
    open_inputs = [i.name for i in inputs if i.name not in _DERIVED] or [i.name for i in inputs]
    if len(arrays) == 1 and len(open_inputs) == 1:
        return {open_inputs[0]: next(iter(arrays.values()))}
    have = ", ".join(sorted(filter(None, arrays))) or "one array without a name"
    raise UsageError(
        f"{source} holds {have}, and the model takes {', '.join(f'{i.name}: {i}' for i in inputs)}"
    )


def _windows(name: str, tokens: np.ndarray, item: ModelInput, window: int | None, source: str) -> _Raw:
    shape = item.shape or (None, None)
    batch, static = shape[0] or 1, shape[1]
    if window is not None and static is not None and window != static:
        raise UsageError(f"a window of {window} tokens was asked for, and the model takes {static} exactly")
    size = window or static or min(DEFAULT_WINDOW, max(len(tokens), 1))
    count = len(tokens) // (size * batch)
    if count == 0:
        raise UsageError(f"{source} holds {len(tokens)} tokens, fewer than one window of {size * batch}")

    def read(number: int) -> Mapping[str, Any]:
        start = number * size * batch
        return {name: np.asarray(tokens[start : start + size * batch]).reshape(batch, size)}

    return _Raw(source, count, read, "windows", f" of {size}")


# -- fitting --------------------------------------------------------------------------------------


def _finished(
    raw: _Raw, chosen: list[int], inputs: list[ModelInput] | None, progress: Progress | None = None
) -> Samples:
    """Samples that were looked at once: fitted, finite, and summed up in a digest."""

    def read(number: int) -> Arrays:
        feed = raw.read(chosen[number])
        if inputs is None:
            return {name: np.asarray(array) for name, array in feed.items()}
        return fit_feed(feed, inputs, f"the calibration data ({raw.source}, sample {chosen[number]})")

    if not chosen:
        raise UsageError(f"the calibration data from {raw.source} hold no samples")
    digest = hashlib.sha256()
    for number in range(len(chosen)):
        if progress is not None:
            progress("reading calibration data", number, len(chosen))
        for name, array in sorted(read(number).items()):
            if not _finite(array):
                raise UsageError(
                    f"the calibration data from {raw.source}: array '{name}' of sample {chosen[number]} "
                    "holds values that are infinite or not numbers"
                )
            digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
            if array.dtype.hasobject or array.dtype.kind in "US":
                digest.update(repr(array.tolist()).encode())
            elif array.size:
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    unit = raw.unit[:-1] if len(chosen) == 1 else raw.unit
    return Samples(f"{raw.source}, {len(chosen)} {unit}{raw.note}", len(chosen), read, digest.hexdigest())


def _finite(array: np.ndarray) -> bool:
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        return True
    return bool(np.isfinite(array).all())


def fit_feed(feed: Mapping[str, Any], inputs: list[ModelInput], where: str) -> Arrays:
    """One feed with every input of the model, in its types.

    Args:
        feed: arrays by input name; a single one need not be named, and masks and positions follow from ids.
        inputs: of :func:`model_inputs`.
        where: whose arrays these are, as the subject of an error: ``the calibration data (x.npz)``.

    Raises:
        UsageError: an input is missing, or has another shape or type.
    """
    named = _name({str(k): np.asarray(v) for k, v in feed.items()}, inputs, where)
    ids = next(
        (named[i.name] for i in inputs if i.is_ids and i.name in named and i.name not in _DERIVED), None
    )
    result: Arrays = {}
    for item in inputs:
        array = named.get(item.name)
        if array is None and ids is not None and item.name in _DERIVED:
            array = _DERIVED[item.name](ids)
        if array is None:
            raise UsageError(
                f"{where} lack the input '{item.name}' ({item}); give an .npz file with all inputs by name"
            )
        result[item.name] = _cast(_shaped(array, item, where), item, where)
    return result


def _shaped(array: np.ndarray, item: ModelInput, where: str) -> np.ndarray:
    if item.shape is None:
        return array
    if array.ndim == len(item.shape) - 1 and item.shape[0] in (1, None):
        array = array[None]
    fits = array.ndim == len(item.shape) and all(
        want in (None, size) for want, size in zip(item.shape, array.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"{where} give the input '{item.name}' the shape {list(array.shape)}, and the model takes {item}"
        )
    return array


def _cast(array: np.ndarray, item: ModelInput, where: str) -> np.ndarray:
    if item.dtype is None:
        return array
    if item.dtype == ir.DataType.STRING:
        raise UsageError(f"the model's input '{item.name}' takes text, on which it cannot be calibrated")
    wanted = item.dtype.numpy()
    if array.dtype == wanted:
        return array
    floats = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    if item.dtype in _DTYPES_OF_FLOATS and floats:
        return array.astype(wanted)
    if item.dtype.is_integer() and array.dtype.kind in "iub":
        cast = array.astype(wanted)
        if np.array_equal(cast, array):
            return cast
    hint = ""
    if item.dtype in _DTYPES_OF_FLOATS and array.dtype.kind in "iu":
        hint = (
            "; scale and normalize them as the model expects (nothing is scaled here) and save them as floats"
        )
    raise UsageError(
        f"{where} give the input '{item.name}' as {array.dtype}, and the model takes {item}{hint}"
    )
