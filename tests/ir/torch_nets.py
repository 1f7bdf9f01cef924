"""Torch modules to capture, and their numbers beside the captured model's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effic.ir.model import Model

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
nn = torch.nn
F = torch.nn.functional


def run(model: Model, *arrays: object) -> list[np.ndarray]:
    """Outputs by ONNX Runtime with every optimisation off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model.ir).SerializeToString(), options)
    feeds = {i.name: np.asarray(a) for i, a in zip(session.get_inputs(), arrays, strict=True)}
    return session.run(None, feeds)


def assert_same(model: Model, module, *tensors, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        want = module(*tensors)
    wants = [want] if isinstance(want, torch.Tensor) else list(want)
    gots = run(model, *[t.numpy() for t in tensors])
    assert len(wants) == len(gots)
    for w, g in zip(wants, gots, strict=True):
        assert w.shape == g.shape
        np.testing.assert_allclose(g, w.numpy(), rtol=tolerance, atol=tolerance)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.depthwise(F.relu(self.bn(self.conv(x))))))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False)
        self.head = nn.Linear(4, 5)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                norm.weight.data.uniform_(0.5, 2)
                norm.bias.data.normal_()

    def forward(self, image):
        x = self.up(self.blocks(self.stem(image)))
        return self.head(F.dropout(x, 0.5, self.training).mean((2, 3)))


class Decoder(nn.Module):
    """A transformer whose output weight is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(32, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.1, activation="gelu")
        self.norm = nn.LayerNorm(16)
        self.output = nn.Linear(16, 32, bias=False)
        self.output.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("offset", torch.arange(16.0), persistent=False)

    def forward(self, ids):
        x = self.embed(ids) * self.scale + self.offset
        return self.output(self.norm(self.layer(x)))
