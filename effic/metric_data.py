"""Data to score a model on: labelled samples, rows of token ids, pairs of sentences; read batch by batch.

===================================  ==================================================================
source                               what it holds
===================================  ==================================================================
``x.npz``, ``x.safetensors``         arrays by input name, one sample a row, and ``labels``
``ids.npy``                          a row of token ids, cut into windows
a folder with a sub-folder a label   images (needs Pillow); prepared as :class:`Images` says
``pairs.tsv``                        score, sentence, sentence (needs ``tokenizers`` and a tokenizer.json)
``package.module:function``          yields feeds, ``(feed, labels)`` or ``(feed, feed, scores)``
===================================  ==================================================================
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from effic.ir.errors import MissingExtraError, UsageError
from effic.ir.model import Model
from effic.passes.calibration_data import DEFAULT_WINDOW, ModelInput, fit_feed, model_inputs
from effic.passes.calibration_files import SUFFIXES, read_arrays
from effic.passes.named_function import named_function

Arrays = dict[str, np.ndarray]
Kind = Literal["samples", "tokens", "pairs"]

LABELS = ("labels", "label", "y", "targets")
"""Names under which an array of labels is looked for."""

BATCH = 32
"""Rows of a batch where the model takes any number."""

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# An image that says it is larger is refused before it is unpacked.
_MOST_PIXELS = 100_000_000


@dataclass(frozen=True)
class Batch:
    """Some samples at once.

    Attributes:
        start: number of the first.
        count: how many; a batch of a model with a fixed batch size may hold more rows, which do not count.
        feeds: one set of inputs, or two for pairs.
        labels: integers ``[count]``, or the scores of pairs, or None.
        rows: rows of the feeds, or None where the first axis is no batch.
    """

    start: int
    count: int
    feeds: tuple[Arrays, ...]
    labels: np.ndarray | None = None
    rows: int | None = None

    def cut(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Inputs or outputs without the rows that only fill the batch."""
        if self.rows is None or self.rows == self.count:
            return dict(arrays)
        return {
            name: array[: self.count] if array.ndim and len(array) == self.rows else array
            for name, array in arrays.items()
        }


@dataclass(frozen=True)
class Images:
    """How images become the model's input: what its training did.

    Attributes:
        resize: length of the shorter side, bilinear; 0 leaves the size alone.
        mean, std: per channel, of pixels divided by ``scale``.
        scale: what pixels (0 to 255) are divided by.
        channels: ``rgb``, ``bgr`` or ``gray``.

    The size and the layout (NCHW or NHWC) are the model's: the middle of the image is cut out.
    """

    resize: int = 0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0
    channels: Literal["rgb", "bgr", "gray"] = "rgb"

    def __post_init__(self) -> None:
        if self.resize < 0 or self.scale <= 0 or not all(s > 0 for s in self.std):
            raise UsageError("the preparation of images needs resize >= 0, scale > 0 and std > 0")


@dataclass(frozen=True)
class MetricData:
    """What a model is scored on.

    Attributes:
        source: where it is from, for people.
        kind: ``samples``, ``tokens`` or ``pairs``.
        count: samples, windows or pairs.
        labelled: whether there are labels.
        make: yields all batches, in order; it can be called again.
        digest: sha256 of all of it.
    """

    source: str
    kind: Kind
    count: int
    labelled: bool
    make: Callable[[], Iterator[Batch]]
    digest: str = ""

    def batches(self) -> Iterator[Batch]:
        """The samples, up to :attr:`count`, in order."""
        for batch in self.make():
            over = batch.start + batch.count - self.count
            if over >= batch.count:
                return
            if over > 0:
                kept = batch.count - over
                labels = None if batch.labels is None else batch.labels[:kept]
                batch = dataclasses.replace(batch, count=kept, labels=labels, rows=batch.rows or batch.count)
            yield batch

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | Callable[[], Any] | Iterable[Any] | Mapping[str, np.ndarray],
        model: Model,
        *,
        limit: int | None = None,
        window: int | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        images: Images | None = None,
    ) -> MetricData:
        """Data that fit a model.

        Args:
            source: see the table above; or arrays by name, or what a function would yield.
            model: whose inputs they are for.
            limit: use the first so many samples only.
            window: tokens of a window; the model's own length, or 512.
            tokenizer: a ``tokenizer.json`` or a folder with one, for pairs.
            images: how to prepare images.

        Raises:
            UsageError: no such data, or they do not fit the model or the options.
            MissingExtraError: Pillow or tokenizers is not installed.
        """
        if limit is not None and limit < 1:
            raise UsageError(f"the limit of samples is {limit}; it must be at least 1")
        inputs = model_inputs(model)
        if not inputs:
            raise UsageError("the model has no inputs, so there is nothing to score it on")
        text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
        found = _from_text(text, inputs, window, tokenizer, images) if text is not None else None
        if found is None:
            found = _from_objects(source, inputs, "the given data")
        if found.count == 0:
            raise UsageError(f"{found.source} holds no samples")
        if limit is not None and limit < found.count:
            found = dataclasses.replace(found, count=limit, source=f"{found.source}, the first {limit}")
        return dataclasses.replace(found, digest=_digest(found))


def _digest(data: MetricData) -> str:
    digest = hashlib.sha256()
    for batch in data.batches():
        for feed in batch.feeds:
            for name, array in sorted(feed.items()):
                digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
                if array.dtype.hasobject or array.dtype.kind in "US":
                    digest.update(repr(array.tolist()).encode())
                elif array.size:
                    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        if batch.labels is not None:
            digest.update(np.ascontiguousarray(batch.labels).tobytes())
    return digest.hexdigest()


def _from_text(
    text: str,
    inputs: list[ModelInput],
    window: int | None,
    tokenizer: str | os.PathLike[str] | None,
    images: Images | None,
) -> MetricData:
    if os.path.isdir(text):
        return _folder(text, inputs, images or Images())
    if not os.path.exists(text):
        module, colon, name = text.partition(":")
        if colon and all(part.isidentifier() for part in [*module.split("."), name]):
            return _from_objects(named_function(text, "the data"), inputs, text)
        raise UsageError(
            f"the data {text} do not exist; give a file ({', '.join(SUFFIXES)}, .tsv), a folder of images by "
            "label, or package.module:function"
        )
    if text.endswith(".tsv"):
        return _pairs(text, inputs, tokenizer)
    return _arrays(read_arrays(text), inputs, os.path.basename(text), window)


# -- arrays ---------------------------------------------------------------------------------------


def _arrays(
    arrays: Mapping[str, np.ndarray], inputs: list[ModelInput], source: str, window: int | None = None
) -> MetricData:
    names = {item.name for item in inputs}
    key = next((k for k in LABELS if k in arrays and k not in names), None)
    labels = None if key is None else _labels(arrays[key], source)
    given = {name: array for name, array in arrays.items() if name != key}
    if len(given) == 1 and labels is None:
        ((name, array),) = given.items()
        ids = [item for item in inputs if item.is_ids and (item.name == name or name not in names)]
        if ids and array.ndim == 1 and array.dtype.kind in "iu":
            return _windows(array, inputs, ids[0], window, source)
    if window is not None:
        raise UsageError(f"a window of {window} was asked for, and {source} is no row of token ids")
    if not given:
        raise UsageError(f"{source} holds labels and no inputs")
    counts = {name: len(array) if array.ndim else 0 for name, array in given.items()}
    most = max(counts.values())
    if labels is not None and len(labels) != most:
        raise UsageError(f"{source} holds {most} samples and {len(labels)} labels")
    if odd := [name for name, count in counts.items() if count != most]:
        raise UsageError(
            f"the arrays of {source} hold different numbers of samples: '{odd[0]}' {counts[odd[0]]}, "
            f"others {most}"
        )
    kind: Kind = "tokens" if all(a.dtype.kind in "iu" for a in given.values()) and not key else "samples"

    def read(start: int, stop: int) -> tuple[Arrays, np.ndarray | None]:
        part = {name: np.asarray(array[start:stop]) for name, array in given.items()}
        return part, None if labels is None else labels[start:stop]

    return MetricData(source, kind, most, labels is not None, _cut_up(most, read, inputs, source, BATCH))


def _cut_up(
    count: int,
    read: Callable[[int, int], tuple[Arrays, np.ndarray | None]],
    inputs: list[ModelInput],
    source: str,
    preferred: int,
) -> Callable[[], Iterator[Batch]]:
    """Batches of the size the model takes, or of the preferred one; the last of a fixed size is filled up."""
    fixed = next((item.shape[0] for item in inputs if item.shape), None)
    size = fixed or preferred
    if fixed is not None:
        inputs = [
            dataclasses.replace(i, shape=(None, *i.shape[1:])) if i.shape and i.shape[0] == fixed else i
            for i in inputs
        ]

    def make() -> Iterator[Batch]:
        for start in range(0, count, size):
            stop = min(start + size, count)
            part, labels = read(start, stop)
            feed = fit_feed(part, inputs, f"the data ({source})")
            if fixed is not None and stop - start < size:
                fill = size - (stop - start)
                feed = {k: np.concatenate([a, np.repeat(a[-1:], fill, 0)]) for k, a in feed.items()}
            yield Batch(start, stop - start, (feed,), labels, None if fixed is None else size)

    return make


def _labels(array: np.ndarray, source: str) -> np.ndarray:
    found = np.asarray(array)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or not (found.dtype.kind in "iu" or np.array_equal(found, np.floor(found))):
        raise UsageError(
            f"the labels of {source} have the type {found.dtype} and the shape {list(found.shape)}; "
            "give one class number a sample"
        )
    return found.astype(np.int64)


def _windows(
    ids: np.ndarray, inputs: list[ModelInput], item: ModelInput, window: int | None, source: str
) -> MetricData:
    static = (item.shape or (None, None))[1]
    if window is not None and static is not None and window != static:
        raise UsageError(f"a window of {window} tokens was asked for, and the model takes {static} exactly")
    size = window or static or min(DEFAULT_WINDOW, max(len(ids), 1))
    if size < 2:
        raise UsageError(f"windows of {size} tokens have no next token to score; give at least 2")
    count = len(ids) // size
    if count == 0:
        raise UsageError(f"{source} holds {len(ids)} tokens, fewer than one window of {size}")

    def read(start: int, stop: int) -> tuple[Arrays, None]:
        return {item.name: np.asarray(ids[start * size : stop * size]).reshape(stop - start, size)}, None

    # A window at a time: logits over a vocabulary are large.
    make = _cut_up(count, read, inputs, source, 1)
    return MetricData(f"{source}, {count} windows of {size}", "tokens", count, False, make)


# -- objects --------------------------------------------------------------------------------------


def _from_objects(source: Any, inputs: list[ModelInput], where: str) -> MetricData:
    found = source() if callable(source) else source
    if isinstance(found, Mapping):
        return _arrays({str(k): np.asarray(v) for k, v in found.items()}, inputs, where)
    if not isinstance(found, Iterable):
        raise UsageError(
            f"{where} gives {type(found).__name__}; it must give feeds, (feed, labels) or (feed, feed, scores)"
        )
    parts = [_parts(row, number, where) for number, row in enumerate(found)]
    if len({(len(feeds), labels is not None) for feeds, labels in parts}) > 1:
        raise UsageError(f"{where} gives samples of different kinds; give labels with all of them or none")
    starts = list(itertools.accumulate((_rows(*part) for part in parts), initial=0))

    def make() -> Iterator[Batch]:
        for number, (feeds, labels) in enumerate(parts):
            fitted = tuple(fit_feed(f, inputs, f"the data ({where}, sample {number})") for f in feeds)
            yield Batch(starts[number], starts[number + 1] - starts[number], fitted, labels)

    kind: Kind = "samples"
    labelled = bool(parts) and parts[0][1] is not None
    if parts and len(parts[0][0]) == 2:
        kind = "pairs"
    elif parts and not labelled and all(np.asarray(a).dtype.kind in "iu" for a in parts[0][0][0].values()):
        kind = "tokens"
    return MetricData(where, kind, starts[-1], labelled, make)


def _rows(feeds: tuple[Mapping[str, Any], ...], labels: np.ndarray | None) -> int:
    return 1 if labels is None else len(labels)


def _parts(row: Any, number: int, where: str) -> tuple[tuple[Mapping[str, Any], ...], np.ndarray | None]:
    items = row if isinstance(row, tuple) else (row,)
    feeds = tuple(item for item in items if isinstance(item, Mapping))
    rest = items[len(feeds) :]
    if len(feeds) not in (1, 2) or len(rest) > 1 or items[: len(feeds)] != feeds:
        raise UsageError(
            f"{where}: sample {number} is {type(row).__name__}; give a feed, (feed, labels) or "
            "(feed, feed, scores)"
        )
    if len(feeds) == 2 and not rest:
        raise UsageError(f"{where}: sample {number} is a pair without a score")
    if not rest:
        return feeds, None
    labels = np.atleast_1d(np.asarray(rest[0]))
    return feeds, labels if len(feeds) == 2 else _labels(labels, f"{where}, sample {number}")


# -- pairs of sentences ---------------------------------------------------------------------------


def _pairs(path: str, inputs: list[ModelInput], tokenizer: str | os.PathLike[str] | None) -> MetricData:
    if tokenizer is None:
        raise UsageError(
            f"{path} holds sentences, and the model takes token ids; give the model's tokenizer.json with "
            "--tokenizer FILE"
        )
    encode = _tokenizer(os.fspath(tokenizer), inputs)
    rows: list[tuple[float, str, str]] = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
                if not row:
                    continue
                try:
                    value, first, second = row[:3]
                    rows.append((float(value), first, second))
                except ValueError:
                    if number == 1:
                        continue  # a line of titles
                    raise UsageError(
                        f"{path}, line {number}: expected a score and two sentences with tabs between"
                    ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error

    def make() -> Iterator[Batch]:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            feeds = encode([row[1] for row in part]), encode([row[2] for row in part])
            yield Batch(start, len(part), feeds, np.array([row[0] for row in part]))

    return MetricData(os.path.basename(path), "pairs", len(rows), True, make)


def _tokenizer(path: str, inputs: list[ModelInput]) -> Callable[[list[str]], Arrays]:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "data", "scoring pairs of sentences") from error
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise UsageError(f"there is no tokenizer {file}; give a tokenizer.json")
    try:
        made = Tokenizer.from_file(file)
    except Exception as error:
        raise UsageError(f"cannot read the tokenizer {file}: {error}") from error
    static = next((i.shape[1] for i in inputs if i.is_ids and i.shape and i.shape[1] is not None), None)
    longest = static or min((made.truncation or {}).get("max_length", DEFAULT_WINDOW), DEFAULT_WINDOW)
    made.enable_truncation(longest)
    padding = made.padding or {}
    options = {k: padding[k] for k in ("pad_id", "pad_type_id", "pad_token") if k in padding}
    made.enable_padding(length=static, **options)

    def encode(sentences: list[str]) -> Arrays:
        found = made.encode_batch(sentences)
        arrays = {
            "input_ids": np.array([e.ids for e in found], np.int64),
            "attention_mask": np.array([e.attention_mask for e in found], np.int64),
            "token_type_ids": np.array([e.type_ids for e in found], np.int64),
        }
        names = {item.name for item in inputs}
        return fit_feed({k: a for k, a in arrays.items() if k in names}, inputs, f"the tokenizer {file}")

    return encode


# -- images ---------------------------------------------------------------------------------------


def _folder(path: str, inputs: list[ModelInput], images: Images) -> MetricData:
    """Images of a folder with a sub-folder a class; numbered by name, or by order of the names."""
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    files = [
        (os.path.join(path, name, file), name)
        for name in folders
        for file in sorted(os.listdir(os.path.join(path, name)))
        if file.lower().endswith(_IMAGES)
    ]
    if not files:
        raise UsageError(
            f"the folder {path} holds no sub-folders of images ({', '.join(_IMAGES)}); name them by class"
        )
    numbers = {n: int(n) if all(f.isdecimal() for f in folders) else i for i, n in enumerate(folders)}
    item = next((i for i in inputs if i.shape is not None and len(i.shape) == 4), None)
    if item is None or len(inputs) != 1:
        raise UsageError("images need a model with one input of four dimensions (NCHW or NHWC)")
    prepare = _preparation(item, images)
    labels = np.array([numbers[name] for _, name in files], np.int64)

    def read(start: int, stop: int) -> tuple[Arrays, np.ndarray]:
        return {item.name: np.stack([prepare(file) for file, _ in files[start:stop]])}, labels[start:stop]

    source = f"{os.path.basename(os.path.abspath(path))}, {len(files)} images of {len(folders)} classes"
    return MetricData(source, "samples", len(files), True, _cut_up(len(files), read, inputs, source, BATCH))


def _preparation(item: ModelInput, images: Images) -> Callable[[str], np.ndarray]:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "data", "scoring images") from error
    shape = item.shape or ()
    wanted = 1 if images.channels == "gray" else 3
    if shape[1] == wanted:
        layout, size = "nchw", shape[2:]
    elif shape[3] == wanted:
        layout, size = "nhwc", shape[1:3]
    else:
        raise UsageError(f"the input '{item.name}' ({item}) takes no {images.channels} images")
    mean, std = (np.asarray(v, np.float32) for v in (images.mean, images.std))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, wanted):
            raise UsageError(
                f"the preparation of images has {len(values)} values in {name} for {wanted} channels"
            )

    def prepare(path: str) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise UsageError(f"the image {path} is {image.width} x {image.height}; that is too large")
                pixels = image.convert("L" if wanted == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(f"cannot read the image {path}: {error}") from error
        if images.resize:
            scale = images.resize / min(pixels.size)
            whole = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
            pixels = pixels.resize(whole, Image.Resampling.BILINEAR)
        height, width = (want or have for want, have in zip(size, (pixels.height, pixels.width), strict=True))
        if pixels.width < width or pixels.height < height:
            raise UsageError(
                f"the image {path} is {pixels.width} x {pixels.height} and the model takes {width} x {height}; "
                "enlarge it with resize"
            )
        left, top = (pixels.width - width) // 2, (pixels.height - height) // 2
        array = np.asarray(pixels.crop((left, top, left + width, top + height)), np.float32)
        array = array.reshape(height, width, wanted)
        if images.channels == "bgr":
            array = array[:, :, ::-1]
        array = (array / np.float32(images.scale) - mean) / std
        return np.ascontiguousarray(array.transpose(2, 0, 1) if layout == "nchw" else array)

    return prepare
