"""Train the model that ships with effic: ``python -m effic.models.train_digits [--folder DIR]``.

Needs torch and scikit-learn, which holds the data (a copy of the test set of the UCI "Optical
Recognition of Handwritten Digits": 1797 images of 8 x 8 pixels). The same seed gives the same
weights on the same torch build and processor family.

The ONNX file is drawn by hand from the state dict, so that batch norms stay unfused and the file does
not change with the exporter's version.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from effic.models.sketch import Sketch

SEED = 0
TEST_SHARE = 0.25
EPOCHS = 60
BATCH = 64
PIXEL_MAX = 16.0
"""The images count ink in 4 x 4 blocks: pixels are 0 to 16."""

Data = tuple[np.ndarray, np.ndarray]


class ConvNorm(nn.Module):
    """A bias-free convolution with "same" padding, then a batch norm."""

    def __init__(self, cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, cin, H, W] to [N, cout, H / stride, W / stride]."""
        y: Tensor = self.bn(self.conv(x))
        return y


class DigitNet(nn.Module):
    """Two residual blocks around an inverted bottleneck with a depthwise convolution; two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 24)
        self.block1 = nn.ModuleList([ConvNorm(24, 24), ConvNorm(24, 24)])
        self.block2 = nn.ModuleList([ConvNorm(24, 72, 1), ConvNorm(72, 72, 3, 2, 72), ConvNorm(72, 48, 1)])
        self.block3 = nn.ModuleList([ConvNorm(48, 48), ConvNorm(48, 48)])
        self.fc1 = nn.Linear(48 * 2 * 2, 128)
        self.dropout = nn.Dropout(0.2)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] to logits [N, 10]."""
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.block1[1](torch.relu(self.block1[0](x))))
        x = torch.relu(self.block2[1](torch.relu(self.block2[0](x))))
        x = self.block2[2](x)
        x = torch.relu(x + self.block3[1](torch.relu(self.block3[0](x))))
        x = functional.avg_pool2d(x, 2).flatten(1)
        logits: Tensor = self.fc2(self.dropout(torch.relu(self.fc1(x))))
        return logits


def split() -> tuple[Data, Data]:
    """Training and held-out data: images float32 [N, 1, 8, 8] in [0, 1], labels int64 [N].

    The split is seeded and keeps the share of each digit.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / PIXEL_MAX).astype(np.float32)
    parts = train_test_split(
        images, labels.astype(np.int64), test_size=TEST_SHARE, stratify=labels, random_state=SEED
    )
    return (parts[0], parts[2]), (parts[1], parts[3])


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by at most one pixel either way, the edge filled with background."""
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator)
    padded = functional.pad(images, (1, 1, 1, 1))
    steps = torch.arange(8)
    rows = (offsets[:, :1] + steps)[:, None, :, None]
    columns = (offsets[:, 1:] + steps)[:, None, None, :]
    return padded[torch.arange(len(images))[:, None, None, None], 0, rows, columns]


def train(data: Data, epochs: int = EPOCHS, seed: int = SEED) -> dict[str, np.ndarray]:
    """Train a :class:`DigitNet`, on one thread and with deterministic kernels.

    Args:
        data: images [N, 1, 8, 8] and labels [N].
        epochs: passes over the data.
        seed: of the initial weights, the order of the images, their shifts and the dropout.

    Returns:
        The state dict as arrays.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DigitNet().train()
    images, labels = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(images), generator=generator), BATCH):
            logits = net(shifted(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return {name: value.numpy().copy() for name, value in net.state_dict().items()}


def to_onnx(state: Mapping[str, np.ndarray]) -> ir.Model:
    """The network as ONNX, initializers named as in the state dict, batch norms in inference form."""
    g = Sketch()
    x = g.input("images", ["N", 1, 8, 8])

    def conv_norm(x: ir.Value, at: str, stride: int = 1) -> ir.Value:
        weight = state[f"{at}.conv.weight"]
        cout, _, kernel, _ = weight.shape
        groups = cout if weight.shape[1] == 1 and at != "stem" else 1
        y = g.op(
            "Conv",
            x,
            g.weight(f"{at}.conv.weight", weight),
            at=f"{at}.conv",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
        )
        names = [f"{at}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        return g.op(
            "BatchNormalization", y, *(g.weight(n, state[n]) for n in names), at=f"{at}.bn", epsilon=1e-5
        )

    def relu(x: ir.Value, at: str) -> ir.Value:
        return g.op("Relu", x, at=at)

    def residual(x: ir.Value, at: str) -> ir.Value:
        y = conv_norm(relu(conv_norm(x, f"{at}.0"), at), f"{at}.1")
        return relu(g.op("Add", x, y, at=at), at)

    def linear(x: ir.Value, at: str) -> ir.Value:
        weight, bias = (g.weight(f"{at}.{part}", state[f"{at}.{part}"]) for part in ("weight", "bias"))
        return g.op("Gemm", x, weight, bias, at=at, transB=1)

    h = relu(conv_norm(x, "stem"), "stem")
    h = residual(h, "block1")
    h = relu(conv_norm(h, "block2.0"), "block2")
    h = relu(conv_norm(h, "block2.1", stride=2), "block2")
    h = conv_norm(h, "block2.2")
    h = residual(h, "block3")
    h = g.op("AveragePool", h, at="pool", kernel_shape=[2, 2], strides=[2, 2])
    h = relu(linear(g.op("Flatten", h, at="pool", axis=1), "fc1"), "fc1")
    return g.model(g.output(linear(h, "fc2"), "logits", ["N", 10]))


def torch_logits(state: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """What torch computes from a state dict, to hold the ONNX file against: [N, 10]."""
    net = DigitNet().eval()
    net.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    with torch.no_grad():
        return np.asarray(net(torch.from_numpy(images)).numpy())


def main(arguments: list[str] | None = None) -> None:
    """Train, write ``digits.onnx`` and ``digits_test.npz``, and report the accuracy of the file."""
    parser = argparse.ArgumentParser(description="Train the digits model that ships with effic.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="where to write")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    training, (images, labels) = split()
    state = train(training, options.epochs)
    proto = ir.to_proto(to_onnx(state))
    onnx.checker.check_model(proto, full_check=True)
    data = proto.SerializeToString(deterministic=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(None, {"images": images})[0])
    difference = float(np.abs(logits - torch_logits(state, images)).max())
    # Both compute in float32; the graph was drawn by hand, so a slip must not go unnoticed.
    if difference > 1e-4:
        raise SystemExit(f"the ONNX graph and the torch module disagree by {difference:.1e}")
    (options.folder / "digits.onnx").write_bytes(data)
    np.savez_compressed(options.folder / "digits_test.npz", images=images, labels=labels)

    right = int((logits.argmax(axis=1) == labels).sum())
    parameters = sum(v.size for n, v in state.items() if not n.endswith("num_batches_tracked"))
    print(f"{parameters} parameters, {len(data)} bytes, torch and ONNX Runtime differ by {difference:.1e}")
    print(f"test accuracy {right / len(labels):.4f} ({right} of {len(labels)})")


if __name__ == "__main__":
    main()
