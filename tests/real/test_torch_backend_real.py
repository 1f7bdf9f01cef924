"""Real models as torch modules: the oracle's numbers, and an ONNX file trained in torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import effic
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.models.sketch import Sketch

torch = pytest.importorskip("torch")

# Against the oracle, of the largest output. basic_pitch divides spectra by their own range.
FILES = {
    "basic_pitch_nmp.onnx": 1e-4,
    "mobilenet_v1_075_224.onnx": 1e-5,
    "resnet20_cifar.onnx": 1e-5,
    "stories260k.onnx": 1e-5,
    "version-RFB-320.onnx": 1e-5,
}


def test_every_file_is_listed(data_dir: Path) -> None:
    assert {path.name for path in (data_dir / "onnx").glob("*.onnx")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_outputs_are_the_oracles(data_dir: Path, name: str) -> None:
    model = read_onnx(data_dir / "onnx" / name)
    module = effic.to_module(model)
    inputs, want = runnable_inputs(model, Oracle(model))
    order = module.meta["effic"].inputs
    with torch.no_grad():
        got = module(*[torch.from_numpy(inputs[name]) for name in order if name in inputs])
    got = got if isinstance(got, tuple) else (got,)
    have = {key: value.numpy() for key, value in zip(module.meta["effic"].outputs, got, strict=True)}
    distance = compare_outputs(want, have)
    assert distance.shape_mismatch is None
    assert distance.max_rel <= FILES[name]
    assert set(module.state_dict()) == set(model.graph.initializers)


@pytest.mark.parametrize("name", ["resnet20_cifar.onnx", "stories260k.onnx"])
def test_compiles_without_graph_breaks(data_dir: Path, name: str) -> None:
    torch._dynamo.reset()
    model = read_onnx(data_dir / "onnx" / name)
    module = effic.to_module(model, trainable=False)
    inputs, _ = runnable_inputs(model, Oracle(model))
    feeds = [torch.from_numpy(array) for array in inputs.values()]
    got = torch.compile(module, backend="eager", fullgraph=True)(*feeds)
    torch.testing.assert_close(got, module(*feeds))


def test_a_classifier_from_a_file_learns_and_goes_back(load: ModuleType, data_dir: Path, tmp_path) -> None:
    """Ten steps on calibration images lower the loss there; the file written says the same as torch."""
    model = read_onnx(data_dir / "onnx" / "resnet20_cifar.onnx")
    module = effic.to_module(model)
    images, labels = load.cifar10("calib_lossless")
    x = load.cifar_preprocess(images[:64])
    y = torch.as_tensor(np.asarray(labels[:64]), dtype=torch.int64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    effic.read_back(model, module).save(tmp_path / "trained.onnx")
    with torch.no_grad():
        want = module(x).numpy()
    trained = Oracle(read_onnx(tmp_path / "trained.onnx"))
    got = trained.run({trained.inputs[0]: x.numpy()})[trained.outputs[0]]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_the_language_model_has_the_gradients_of_its_source(load: ModuleType, data_dir: Path) -> None:
    source = load.stories_lm().double()
    ids = torch.from_numpy(load.stories_ids("eval"))[:2, :24]
    rebuilt = effic.to_module(effic.capture(source, (ids,)))
    for module in (source, rebuilt):
        logits = module(ids[:, :-1]) if module is source else module(ids)[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().long()).backward()
    want = {name: p.grad for name, p in source.named_parameters()}
    got = {name: p.grad for name, p in rebuilt.named_parameters()}
    assert set(got) == set(want)
    # 1e-10 for everything but the epsilon of the norms, which the export holds in float32.
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() <= 1e-7 * gradient.abs().max().clamp(min=1e-3), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of parts that inductor imports
def test_inductor_compiles_and_trains_a_small_one() -> None:
    torch._dynamo.reset()
    g = Sketch(0)
    product = g.op("MatMul", g.input("x", ["N", 8]), g.normal("w", 8, 8, fan_in=8), at="a")
    model = Model(g.model(g.output(g.op("Relu", product, at="b"), "y", ["N", 8])))
    module = effic.to_module(model)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    got = torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(got, module(x))
    got.sum().backward()
    compiled = module.get_parameter("w").grad.clone()
    module.zero_grad()
    module(x).sum().backward()
    torch.testing.assert_close(compiled, module.get_parameter("w").grad)
