"""A fine-tuning step with frozen batch norms: memory and time of eval, tune and deploy mode, and torch's own pass.

    python -m benchmarks.conv_bn_modes [--model NAME] [--batch N] [--size N] [--no-compile] [--no-rss]

Every row is one step (forward, cross entropy, backward, SGD) of one network, all parameters trained, batch
norms in eval mode: as it is (eval), after ``effic.tune_conv_bn`` (tune), with the norms folded for good
(deploy: what inference runs, no mode to train in), the last three compiled by ``torch.compile``: as it is,
with PyTorch's ``efficient_conv_bn_eval_fx_passes``, and in effic's tune mode.

*Kept* is what autograd keeps for the backward pass, each storage once, parameters and buffers not counted.
*Peak* is on a CPU the largest resident set of a process of its own that does two steps (interpreter and
torch included), on a GPU the most memory allocated during a step. Times are medians over interleaved rounds:
on a CPU processor time on one core, which other work on the machine disturbs less, on a GPU wall time.
ResNet-50 and MobileNetV2 see 224 x 224 on a GPU and 96 x 96 on a CPU unless ``--size`` says otherwise,
ResNet-56 always 32 x 32. ``output`` is the largest difference from eval mode's logits over their range.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import click
import torch
from torch import nn

import effic
from benchmarks.harness import machine, run, table
from benchmarks.int8_static import mobilenet_v2

BATCHES = (8, 16, 32, 64)
ROUNDS = 5
CPU_SIZE, GPU_SIZE, CIFAR_SIZE = 96, 224, 32
COMPILED = {
    "eval, compiled": False,
    "efficient_conv_bn_eval, compiled": True,
    "tune (effic), compiled": False,
}


class _Bottleneck(nn.Module):
    """Residual block of ResNet-50."""

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(cin, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = stride == 1 and cin == out
        self.short = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(cin, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.body(x) + self.short(x))


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2016, table 1)."""
    blocks: list[nn.Module] = []
    cin = 64
    for stage, (count, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for number in range(count):
            blocks.append(_Bottleneck(cin, width, 2 if number == 0 and stage else 1))
            cin = 4 * width
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000),
    )  # fmt: skip


class _Basic(nn.Module):
    """Residual block of the CIFAR ResNets, with a shortcut without parameters."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip
        self.stride, self.pad = stride, (cout - cin) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        if self.stride > 1:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu_(y + x)


def resnet56() -> nn.Module:
    """ResNet-56 for CIFAR (He et al. 2016, section 4.2)."""
    blocks: list[nn.Module] = []
    cin = 16
    for width in (16, 32, 64):
        for number in range(9):
            blocks.append(_Basic(cin, width, 2 if number == 0 and width > 16 else 1))
            cin = width
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": resnet50, "mobilenet_v2": mobilenet_v2, "resnet56": resnet56,
}  # fmt: skip


def deployed(module: nn.Module) -> nn.Module:
    """A copy with every norm folded into its convolution, by torch's own function."""
    from effic.backends.torch.conv_bn_pairs import find_pairs

    module = copy.deepcopy(module)
    for conv, norm in find_pairs(module).pairs:
        fused = torch.nn.utils.fuse_conv_bn_eval(module.get_submodule(conv), module.get_submodule(norm))
        module.set_submodule(conv, fused)
        module.set_submodule(norm, nn.Identity())
    return module


def tuned(module: nn.Module) -> nn.Module:
    """A copy in effic's tune mode."""
    module = copy.deepcopy(module)
    effic.tune_conv_bn(module)
    return module


@dataclasses.dataclass
class Mode:
    """A way to do the step.

    Attributes:
        step: does one, given a batch; None when the mode cannot be run, for ``reason``.
        module: what it trains.
    """

    module: nn.Module
    compiler: bool | None = None
    reason: str = ""
    compiled: Callable[..., torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-4)
        if self.compiler is not None:
            torch._dynamo.reset()
            # An option of the compilation, not a setting around the call: torch keeps compiled code by the
            # module's code and takes it for every copy of the module, whatever the settings are by then.
            # Options it compares.
            options = {"efficient_conv_bn_eval_fx_passes": self.compiler}
            self.compiled = torch.compile(self.module, options=options)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return (self.compiled or self.module)(x)

    def step(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.logits(x), labels).backward()
        self.optimizer.step()


def kept(mode: Mode, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*mode.module.parameters(), *mode.module.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = mode.logits(x)
    del logits
    return sum(found.values())


def _matches() -> int:
    """Pairs that PyTorch's own pass has rewritten so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["efficient_conv_bn_eval"])


def network(name: str, device: str) -> nn.Module:
    """A network with seeded weights and statistics that fit them, in eval mode."""
    torch.manual_seed(0)
    module = NETWORKS[name]().train()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None  # A plain average.
        module(torch.randn(8, 3, CIFAR_SIZE if name == "resnet56" else 64, 32 if name == "resnet56" else 64))
    return module.eval().to(device)


def build(kind: str, module: nn.Module) -> Mode:
    """A mode of a network, on a copy of it."""
    base = {"eval": copy.deepcopy, "deploy": deployed}.get(kind.split(",")[0], copy.deepcopy)
    made = tuned(module) if kind.startswith("tune") else base(module)
    return Mode(made, COMPILED.get(kind))


def batch_of(count: int, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded images and labels."""
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size).to(device), torch.randint(0, 10, (count,)).to(device)


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    step()
    return time.process_time() - began


def child_peak(name: str, kind: str, count: int, size: int) -> int:
    """Largest resident set of a process that does two steps on the CPU."""
    return run(
        "import torch; torch.set_num_threads(1)\n"
        "from benchmarks.conv_bn_modes import batch_of, build, network\n"
        f"mode = build({kind!r}, network({name!r}, 'cpu')); x, y = batch_of({count}, {size}, 'cpu')\n"
        "mode.step(x, y); mode.step(x, y)"
    ).peak


def measure(
    name: str, count: int, size: int, device: str, kinds: Sequence[str], rounds: int, rss: bool
) -> list[tuple[object, ...]]:
    """Rows of the table: one network, one batch size, all modes interleaved."""
    module = network(name, device)
    x, labels = batch_of(count, size, device)
    modes = {kind: build(kind, module) for kind in kinds}
    want = modes["eval"].logits(x).detach()
    differences, bytes_kept, failed = {}, {}, {}
    for kind, mode in modes.items():
        try:
            before = _matches()
            got = mode.logits(x).detach()
            mode.step(x, labels)
            if mode.compiler and _matches() == before:
                failed[kind] = "the compiler pass found no pair in this network"
                continue
        except (RuntimeError, ImportError, OSError) as error:  # No compiler, or one that cannot do it.
            failed[kind] = str(error).strip().splitlines()[0][:80]
            continue
        differences[kind] = float((got - want).abs().max() / want.abs().max())
        bytes_kept[kind] = kept(mode, x)
    times: dict[str, list[float]] = {kind: [] for kind in modes if kind not in failed}
    for _ in range(rounds):
        for kind, values in times.items():
            values.append(timed(lambda mode=modes[kind]: mode.step(x, labels), device))  # type: ignore[misc]
    rows: list[tuple[object, ...]] = []
    for kind in modes:
        if kind in failed:
            rows.append((name, count, size, kind, f"not usable: {failed[kind]}", *[""] * 5))
            continue
        ratios = [a / b for a, b in zip(times[kind], times["eval"], strict=True)]
        rows.append((
            name, count, size, kind, f"{bytes_kept[kind] / 1e6:.1f} MB",
            f"{bytes_kept[kind] / bytes_kept['eval']:.2f} x",
            _peak(name, kind, count, size, device, modes[kind], (x, labels), rss),
            f"{1000 * statistics.median(times[kind]):.1f} ms", f"{statistics.median(ratios):.2f} x",
            f"{differences[kind]:.0e}",
        ))  # fmt: skip
    return rows


def _peak(
    name: str, kind: str, count: int, size: int, device: str, mode: Mode,
    data: tuple[torch.Tensor, torch.Tensor], rss: bool,
) -> str:  # fmt: skip
    if device == "cuda":
        mode.optimizer.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mode.step(*data)
        mode.optimizer.zero_grad(set_to_none=True)
        return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.0f} MB"
    # A compiling process is as large as its compiler.
    return f"{child_peak(name, kind, count, size) / 1e6:.0f} MB" if rss and kind not in COMPILED else ""


def main(
    models: Sequence[str] = (), batches: Sequence[int] = (), size: int | None = None, rounds: int = ROUNDS,
    compiled: bool = True, rss: bool = True,
) -> None:  # fmt: skip
    """Print the tables."""
    print(machine("effic", "torch"))
    head = ("network", "batch", "pixels", "mode", "kept", "of eval", "peak", "a step", "of eval", "output")
    kinds = ("eval", "tune (effic)", "deploy", *(COMPILED if compiled else ()))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    torch.set_num_threads(1)
    # A compilation found on disk runs no pass, and counts no pairs.
    torch.compiler.config.force_disable_caches = True
    for device in devices:
        rows: list[tuple[object, ...]] = []
        for name in models or NETWORKS:
            for count in batches or BATCHES:
                pixels = (
                    CIFAR_SIZE if name == "resnet56" else size or (GPU_SIZE if device == "cuda" else CPU_SIZE)
                )
                rows += measure(name, count, pixels, device, kinds, rounds, rss)
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"
        table(f"A fine-tuning step with frozen batch norms, float32, {where}", head, rows)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(NETWORKS)), help="default: all")
@click.option("--batch", "batches", multiple=True, type=int, help=f"default: {', '.join(map(str, BATCHES))}")
@click.option("--size", type=int, help="pixels per side of resnet50 and mobilenet_v2")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, help="also the compiled modes")
@click.option("--rss/--no-rss", default=True, help="on a CPU: also the peak of a process of its own")
def command(**options: object) -> None:
    """The benchmark as a command."""
    main(**options)  # type: ignore[arg-type]


if __name__ == "__main__":
    command()
