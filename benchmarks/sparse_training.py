"""What training is worth to sparse models: ResNet-20 fine-tuned by recipe, masks learned on stories260k.

    python -m benchmarks.sparse_training [--model resnet20|stories260k]… [--epochs 4] [--steps 200] [--seed 0]

ResNet-20: 1000 JPEG training images, 5000 JPEG test images. Every row starts from the published weights;
all that are trained have the same epochs, rates, batches and seed, and those of "dense" have no mask:
what training on so few images does by itself. BatchNorm runs in training mode. The result is captured,
cleaned, declared, checked against its pattern and run by ONNX Runtime.

stories260k: 18 windows of 512 ids to learn from, 116 others for the perplexity. Masks are learned with the
weights frozen, on the module that to_module makes of the file.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

import effic
from benchmarks.harness import machine, table
from benchmarks.subjects import CONVOLUTIONAL, CifarResNet, Stories
from effic.ir.sparsity import broken, declared

PATTERNS = ((2, 4), (1, 4))
MODELS = ("resnet20", "stories260k")


@dataclasses.dataclass(frozen=True)
class FineTune:
    """Settings of the fine-tuning, the same for every row.

    Attributes:
        epochs: over 1000 images; every batch has a random flip and shift of up to 4 pixels.
        batch: images of a step.
        rate: first learning rate of SGD with momentum 0.9, falling to 0 along a cosine.
        weight_decay: of all parameters.
        seed: of the order of images, flips and shifts.
    """

    epochs: int = 4
    batch: int = 50
    rate: float = 0.01
    weight_decay: float = 1e-4
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.epochs * math.ceil(1000 / self.batch)


def recipes(n: int, m: int, steps: int) -> dict[str, Any]:
    """The rows that are trained: nothing is masked in the first."""
    st = effic.sparse_training
    last = steps // 4
    return {
        "dense": None,
        "STE": st.STE(n, m),
        "SR-STE": st.SRSTE(n, m),
        "MdGf linear": st.MdGf(n, m, kind="linear", decay=steps - last),
        "MdGf exp": st.MdGf(n, m, kind="exp", decay=steps - last),
        "SdGf stepwise": st.SdGf(n, m, total=steps, kind="stepwise", finetune=last),
        "SdGf geometric": st.SdGf(n, m, total=steps, kind="geometric", k=4, finetune=last),
    }


def batches(images: Any, labels: Any, settings: FineTune) -> Iterator[tuple[Any, Any]]:
    """All batches of a training, on normalised images ``[N, 3, 32, 32]``."""
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(settings.seed)
    padded = functional.pad(images, (4, 4, 4, 4))
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(settings.batch):
            dy, dx, flip = torch.randint(0, 18, (3,), generator=generator).tolist()
            x = padded[chosen][:, :, dy % 9 : dy % 9 + 32, dx % 9 : dx % 9 + 32]
            yield (x.flip(-1) if flip % 2 else x), labels[chosen]


def fine_tune(module: Any, training: Any, images: Any, labels: Any, settings: FineTune) -> None:
    """Train a module in place; ``training`` is what a recipe's ``attach`` gave, or None."""
    import torch
    from torch.nn import functional

    module.train()
    optimizer = torch.optim.SGD(
        module.parameters(), settings.rate, momentum=0.9, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for x, y in batches(images, labels, settings):
        optimizer.zero_grad()
        functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        schedule.step()
        if training is not None:
            training.step()
    module.eval()


def deployed(module: Any, finished: Any, path: Path) -> None:
    """Capture a trained module, declare its patterns, clean it, check the patterns, write the file."""
    import torch

    model = effic.capture(
        module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    if finished is not None:
        finished.declare(model)
    effic.optimize(model, CONVOLUTIONAL, output=path, target="portable", force=True)
    written = effic.read_onnx(path)
    if broken(written) or (finished is not None and len(declared(written)) != len(finished.layers)):
        raise SystemExit("the written file does not follow the patterns it was trained for")


def resnet20(folder: Path, settings: FineTune) -> None:
    """The table of ResNet-20."""
    import torch

    subject = CifarResNet(folder)
    images, labels = subject.load.cifar10("calib")
    x, y = subject.load.cifar_preprocess(images), torch.from_numpy(labels)
    head = ["weights", "recipe", *subject.images, "kept energy", "seconds of training"]
    print(f"\nResNet-20, {settings}, {settings.steps} steps; 2:4 and 1:4 of all convolutions but the first")
    rows: list[Sequence[object]] = [_row(subject, "all", "fp32", subject.fp32)]
    dense = False
    for n, m in PATTERNS:
        made = recipes(n, m, settings.steps)
        plain = subject.load.cifar_resnet(20)
        finished = made["STE"].attach(plain, skip=["linear.weight"]).finish()
        path = folder / "tuned.onnx"
        deployed(plain, finished, path)
        rows.append(_row(subject, f"{n}:{m}", "one-shot magnitude", path, finished))
        for name, recipe in made.items():
            if recipe is None and dense:
                continue
            dense = True
            module = subject.load.cifar_resnet(20)
            training = None if recipe is None else recipe.attach(module, skip=["linear.weight"])
            began = time.perf_counter()
            fine_tune(module, training, x, y, settings)
            seconds = time.perf_counter() - began
            finished = None if training is None else training.finish()
            deployed(module, finished, path)
            label = "all" if recipe is None else f"{n}:{m}"
            text = "dense" if recipe is None else f"{name}: `{recipe}`"
            rows.append(_row(subject, label, text, path, finished, seconds))
    table("ResNet-20, top-1", head, rows)


def _row(
    subject: CifarResNet,
    weights: str,
    recipe: str,
    path: Path,
    finished: Any = None,
    seconds: float | None = None,
) -> list[object]:
    scores = subject.score(path).cells
    energy = "" if finished is None else f"{_mean(x.kept_energy for x in finished.layers.values()):.3f}"
    took = "" if seconds is None else f"{seconds:.0f}"
    return [weights, recipe, *(f"{scores[name]:.4f}" for name in subject.images), energy, took]


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def stories260k(folder: Path, steps: int, rate: float, seed: int) -> None:
    """The table of stories260k."""
    import torch
    from torch.nn import functional

    st = effic.sparse_training
    subject = Stories(folder)
    rows: list[Sequence[object]] = [["fp32", _perplexity(subject, subject.fp32), "", ""]]
    priors: dict[str, Any] = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        path = folder / f"{name}.onnx"
        given = {} if name == "magnitude" else {"calib": subject.calibration}
        began = time.perf_counter()
        effic.optimize(subject.fp32, f"prune-{name}", output=path, target="portable", check="off", **given)
        rows.append([f"prune-{name}", _perplexity(subject, path), f"{time.perf_counter() - began:.1f}", ""])
        priors[name] = st.masks_of(effic.read_onnx(path))
    ids = torch.from_numpy(subject.load.stories_ids("calib"))
    recipe = st.MaskLLM(2, 4, steps=steps, seed=seed)
    print(f"\nstories260k: {recipe}, rate {rate}, one window of 512 ids per step")

    def loss(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = module(batch)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    source = effic.read_onnx(subject.fp32)
    for name in ("magnitude", "sparsegpt"):
        torch.manual_seed(seed)
        module = effic.to_module(source)
        training = recipe.attach(module, prior=priors[name])
        began = time.perf_counter()
        losses = st.learn_masks(training, ids.split(1), loss, rate=rate)
        seconds = time.perf_counter() - began
        changed = _changed(training, priors[name])
        finished = training.finish()
        model = effic.read_back(source, module)
        finished.declare(model)
        path = folder / "learned.onnx"
        effic.optimize(model, "eliminate-dead-code", output=path, target="portable", check="off", force=True)
        if broken(effic.read_onnx(path)):
            raise SystemExit("the written file does not follow the pattern it was trained for")
        text = f"MaskLLM, {steps} steps from the {name} mask"
        last = _mean(losses[-18:])
        more = f"{changed:.1%} of the mask changed; loss of the last 18 steps {last:.3f}"
        rows.append([text, _perplexity(subject, path), f"{seconds:.0f}", more])
    table("stories260k at 2:4, perplexity", ["method", "perplexity", "seconds", ""], rows)


def _perplexity(subject: Stories, path: Path) -> str:
    return f"{subject.score(path).cells['perplexity']:.4f}"


def _changed(training: Any, prior: dict[str, Any]) -> float:
    """Share of the weights whose mask is not the prior's."""
    masks = {name: mask.numpy() for name, mask in training.masks().items() if name in prior}
    different = sum(int((mask != prior[name]).sum()) for name, mask in masks.items())
    return different / max(1, sum(mask.size for mask in masks.values()))


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="All by default.")
@click.option("--epochs", default=4, show_default=True, help="ResNet-20: over 1000 images.")
@click.option("--rate", default=0.01, show_default=True, help="ResNet-20: first learning rate.")
@click.option("--steps", default=200, show_default=True, help="stories260k: of mask learning.")
@click.option("--mask-rate", default=0.02, show_default=True, help="stories260k: of the logits.")
@click.option("--seed", default=0, show_default=True)
def command(
    models: tuple[str, ...], epochs: int, rate: float, steps: int, mask_rate: float, seed: int
) -> None:
    """Sparse models, one-shot and trained."""
    print(machine("effic", "torch", "onnxruntime"))
    for name in models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            if name == "resnet20":
                resnet20(Path(folder), FineTune(epochs, rate=rate, seed=seed))
            else:
                stories260k(Path(folder), steps, mask_rate, seed)


def main() -> None:
    """All tables, for ``python -m benchmarks``."""
    command(args=[], standalone_mode=False)


if __name__ == "__main__":
    command()
