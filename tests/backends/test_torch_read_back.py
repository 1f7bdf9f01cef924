"""Training a model in torch: equal gradients, and what was learned back in the file."""

from __future__ import annotations

import copy
import functools
import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import effic
from effic.ir.errors import UnsupportedError, UsageError
from effic.ir.evaluate import Oracle
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import declared
from effic.ir.torch_capture import ROLE_KEY
from effic.models import builders
from effic.models.sketch import Sketch
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
nn = torch.nn
F = torch.nn.functional


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, 3))

    def forward(self, x):
        return self.last(F.gelu(self.first(x))) * self.gain + self.shift


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.bn2 = nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        for norm in (self.bn, self.bn2):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.head(F.silu(self.bn2(self.down(x))).mean((2, 3)))


class Block(nn.Module):
    """A transformer block with causal attention and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.RMSNorm(16, eps=1e-6)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        q, k, v = (
            part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm1(h)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return self.head(h + self.down(F.silu(self.up(self.norm2(h)))))


def example(kind: type) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind is Block:
        return torch.randint(0, 20, (2, 7), generator=generator)
    shape = (4, 6) if kind is Perceptron else (4, 3, 10, 10)
    return torch.randn(shape, generator=generator)


def made(kind: type, dtype=torch.float32):
    torch.manual_seed(0)
    module = kind().eval().to(dtype)
    x = example(kind)
    return module, x.to(dtype) if x.is_floating_point() else x


@functools.cache
def captured(kind: type, dtype=torch.float32) -> Model:
    """Of the seeded module; no test changes it."""
    module, x = made(kind, dtype)
    name = "ids" if kind is Block else "x"
    return effic.capture(module, (x,), dynamic_shapes={name: {0: "batch"}})


KINDS = (Perceptron, Convolutional, Block)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_original(kind: type) -> None:
    module, x = made(kind, torch.float64)
    rebuilt = effic.to_module(captured(kind, torch.float64))
    weight = torch.randn(module(x).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (module(x) * weight).sum().backward()
    (rebuilt(x) * weight).sum().backward()
    want = {name: p.grad for name, p in module.named_parameters()}
    got = {name: p.grad for name, p in rebuilt.named_parameters()}
    assert set(want) == set(got)
    for name, gradient in want.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (got[name] - gradient).abs().max().item() <= 1e-10 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_a_parameter_is_one_again(kind: type, tmp_path) -> None:
    module, _ = made(kind)
    model = captured(kind)
    parameters = set(dict(module.named_parameters()))
    assert set(dict(effic.to_module(model).named_parameters())) == parameters
    # The file keeps it, too.
    model.save(tmp_path / "m.onnx")
    again = read_onnx(tmp_path / "m.onnx")
    assert again.graph.initializers[next(iter(parameters))].metadata_props.get(ROLE_KEY) == "parameter"
    assert set(dict(effic.to_module(again).named_parameters())) == parameters


def run_file(path, **feeds: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def step(module, x) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    module(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_training(kind: type, tmp_path) -> None:
    _, x = made(kind)
    model = captured(kind)
    trained = effic.to_module(model)
    untrained = trained(x).detach()
    step(trained, x)
    result = effic.read_back(model, trained)
    result.save(tmp_path / "trained.onnx")
    more = torch.cat([x, x, x])  # another batch size
    want = trained(more).detach().numpy()
    name = "ids" if kind is Block else "x"
    got = run_file(tmp_path / "trained.onnx", **{name: more.numpy()})
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert (trained(x) - untrained).abs().max() > 1e-3
    assert list(result.graph.initializers) == list(model.graph.initializers)
    # The model that was given is as it was.
    old = Oracle(model).run({name: x.numpy()})
    np.testing.assert_allclose(next(iter(old.values())), untrained.numpy(), rtol=1e-4, atol=1e-5)


def test_only_what_changed_is_rewritten() -> None:
    model = Model(builders.cnn())
    module = effic.to_module(model)
    with torch.no_grad():
        module.get_parameter("stem.conv.weight").mul_(2)
    result = effic.read_back(model, module)
    for name, value in result.graph.initializers.items():
        same = value.const_value is model.graph.initializers[name].const_value
        assert same == (name != "stem.conv.weight")


def test_the_captured_module_itself_is_read_back() -> None:
    module, x = made(Block)
    model = captured(Block)
    step(module, x)
    result = effic.read_back(model, module)
    want = module(x).detach().numpy()
    got = Oracle(result).run({"ids": x.numpy()})["output"]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_tied_weights_that_came_apart_are_refused() -> None:
    module, _ = made(Block)
    model = captured(Block)
    module.head.weight = nn.Parameter(module.embed.weight.detach() + 1)
    with pytest.raises(UnsupportedError, match=r"'embed.weight' and 'head.weight' are one weight"):
        effic.read_back(model, module)


def test_weights_inside_branches_and_loops_come_back() -> None:
    model = Model(builders.control_flow())
    module = effic.to_module(model)
    x = torch.ones(2, 3, 8, 8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x)[0].square().sum().backward()
    optimizer.step()
    result = effic.read_back(model, module)
    want = module(x)[0].detach().numpy()
    np.testing.assert_allclose(Oracle(result).run({"x": x.numpy()})["y"], want, rtol=1e-5, atol=1e-6)
    changed = {
        name
        for old, new in zip(model.graphs(), result.graphs(), strict=True)
        for name in old.initializers
        if old.initializers[name].const_value is not new.initializers[name].const_value
    }
    assert {"loop.weight", "then.conv.weight"} <= changed
    assert "outer.conv.weight" not in changed


def test_another_float_type_is_rounded_to_the_models() -> None:
    model = Model(builders.cnn())
    module = effic.to_module(model).double()
    with torch.no_grad():
        module.get_parameter("stem.bn.weight").add_(0.25)
    result = effic.read_back(model, module)
    value = result.graph.initializers["stem.bn.weight"]
    assert value.const_value.dtype == ir.DataType.FLOAT
    before = model.graph.initializers["stem.bn.weight"].const_value.numpy()
    np.testing.assert_allclose(value.const_value.numpy(), before + 0.25, rtol=1e-6)
    untouched = "stem.conv.weight"
    assert result.graph.initializers[untouched].const_value is model.graph.initializers[untouched].const_value


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_encoded_weights_stay_encoded(bits: int) -> None:
    """Norms and biases train around them; scales and codes come back if somebody changes them."""
    model = Model(builders.encoder())
    run_passes(model, parse_passes(f"quantize-rtn{{bits={bits},group_size=16}}"), check="off")
    module = effic.to_module(model)
    codes = next(key for key in module.state_dict() if key.endswith(".codes"))
    scales = codes.replace(".codes", ".scales")
    with torch.no_grad():
        module.get_buffer(codes).reshape(-1)[0] = 1
        module.get_buffer(codes).reshape(-1)[1] = 0
        module.get_buffer(scales).mul_(1.5)
    result = effic.read_back(model, module)
    old, new = (m.graph.initializers[codes].const_value for m in (model, result))
    assert new.dtype == old.dtype
    assert new.numpy().reshape(-1)[:2].astype(int).tolist() == [1, 0]
    np.testing.assert_array_equal(
        new.numpy().reshape(-1)[2:].astype(int), old.numpy().reshape(-1)[2:].astype(int)
    )
    feeds = {"input_ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
    feeds = {value.name: feeds.get(value.name, feeds["input_ids"] * 0) for value in model.graph.inputs}
    want = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    want = want if isinstance(want, tuple) else (want,)
    for got, expected in zip(Oracle(result).run(feeds).values(), want, strict=True):
        np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_codes_beyond_their_type_are_refused() -> None:
    model = Model(builders.encoder())
    run_passes(model, parse_passes("quantize-rtn{bits=4,group_size=16}"), check="off")
    module = effic.to_module(model)
    codes = next(key for key in module.state_dict() if key.endswith(".codes"))
    module.get_buffer(codes).reshape(-1)[0] = 99
    with pytest.raises(UsageError, match=r"codes beyond U?INT4"):
        effic.read_back(model, module)


def test_numbers_in_the_code_cannot_be_read_back() -> None:
    g = Sketch(0)
    x = g.input("x", ["N", 4])
    y = g.op("Reshape", x, g.ints("shape", -1, 2), at="r")
    model = Model(g.model(g.output(y, "y", ["M", 2])))
    module = effic.to_module(model)
    module.get_buffer("shape").copy_(torch.tensor([-1, 4]))
    with pytest.raises(
        UnsupportedError, match=r"'shape' was changed, but its values are part of the module's code"
    ):
        effic.read_back(model, module)


def test_what_does_not_fit_is_refused() -> None:
    model = Model(builders.cnn())
    module = effic.to_module(model)

    diverged = copy.deepcopy(module)
    with torch.no_grad():
        diverged.get_parameter("stem.bn.bias")[0] = float("nan")
    with pytest.raises(UsageError, match=r"'stem.bn.bias' has 1 values that are NaN or infinite"):
        effic.read_back(model, diverged)

    reshaped = copy.deepcopy(module)
    stem = reshaped.get_submodule("stem.bn")
    stem.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match=r"'stem.bn.bias' has the shape \(3,\)"):
        effic.read_back(model, reshaped)

    parametrized = copy.deepcopy(module)
    conv = parametrized.get_submodule("stem.conv")
    nn.utils.parametrizations.weight_norm(conv, "weight")
    with pytest.raises(UsageError, match=r"no 'stem.conv.weight' any more"):
        effic.read_back(model, parametrized)

    with pytest.raises(UsageError, match=r"the model has no initializer"):
        effic.read_back(Model(builders.encoder()), module)
    with pytest.raises(UsageError, match=r"no entry of the module's state dict"):
        effic.read_back(model, nn.Linear(2, 2))


def test_a_compiled_module_is_read_back() -> None:
    _, x = made(Perceptron)
    model = captured(Perceptron)
    torch._dynamo.reset()
    compiled = torch.compile(effic.to_module(model), backend="aot_eager", fullgraph=True)
    step(compiled, x)
    result = effic.read_back(model, compiled)
    want = compiled(x).detach().numpy()
    np.testing.assert_allclose(Oracle(result).run({"x": x.numpy()})["output"], want, rtol=1e-5, atol=1e-6)


def test_running_statistics_come_back() -> None:
    model = Model(builders.cnn())
    module = effic.to_module(model)
    module.get_buffer("stem.bn.running_mean").add_(1.0)
    result = effic.read_back(model, module)
    before, after = (
        m.graph.initializers["stem.bn.running_mean"].const_value.numpy() for m in (model, result)
    )
    np.testing.assert_allclose(after, before + 1.0, rtol=1e-6)


def test_metadata_of_a_tied_weight_is_kept() -> None:
    _, x = made(Block)
    model = captured(Block)
    rebuilt = effic.to_module(model)
    step(rebuilt, x)
    value = effic.read_back(model, rebuilt).graph.initializers["embed.weight"]
    assert json.loads(value.metadata_props["effic.aliases"]) == ["head.weight"]


def test_a_pattern_that_training_broke_is_no_longer_declared() -> None:
    model = Model(builders.encoder())
    run_passes(model, parse_passes("prune-magnitude{n=2,m=4}"), check="off")
    names = sorted(declared(model))
    assert len(names) > 1
    module = effic.to_module(model)
    with torch.no_grad():
        module.get_parameter(names[0]).fill_(1.0)
    result = effic.read_back(model, module)
    assert sorted(declared(result)) == names[1:]
    assert any(names[0] in note for note in result.origin.notes)
    assert sorted(declared(model)) == names
