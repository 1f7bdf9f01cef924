"""fuse-conv-bn{mode=tune} on the torch backend: eval mode's gradients, its steps, its state dict."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

import effic  # noqa: E402
from effic.ir.model import Model  # noqa: E402
from effic.passes.spec import parse_passes  # noqa: E402


def rebuilt(module: nn.Module, x: torch.Tensor, passes: str) -> nn.Module:
    """A module captured, rewritten by passes and rebuilt."""
    model = effic.capture(module, (x,))
    effic.run_passes(model, parse_passes(passes), check="off")
    assert not list(model.nodes("BatchNormalization"))
    return effic.to_module(model)


def convolution(groups: int = 1, bias: bool = True, transposed: bool = False) -> nn.Module:
    torch.manual_seed(1)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = nn.Sequential(kind(4, 8, 3, groups=groups, bias=bias), nn.BatchNorm2d(8), nn.ReLU())
    module[1].running_mean.normal_(), module[1].running_var.uniform_(0.2, 3)
    nn.init.normal_(module[1].weight), nn.init.normal_(module[1].bias)
    return module.double().eval()


def linear() -> nn.Module:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sigmoid())
    module[1].running_mean.normal_(), module[1].running_var.uniform_(0.2, 3)
    nn.init.normal_(module[1].weight)
    return module.double().eval()


def gradients(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"x": x.grad, "y": y.detach(), **found}


CASES = [
    (convolution, (2, 4, 6, 6)),
    (lambda: convolution(2, bias=False), (2, 4, 6, 6)),
    (lambda: convolution(4), (2, 4, 6, 6)),
    (lambda: convolution(1, transposed=True), (2, 4, 6, 6)),
    (lambda: convolution(2, transposed=True), (2, 4, 6, 6)),
    (linear, (5, 4)),
]


@pytest.mark.parametrize(("build", "shape"), CASES)
def test_gradients_and_state_are_those_of_eval_mode(build, shape) -> None:
    module, x = build(), torch.randn(*shape, dtype=torch.float64)
    tuned = rebuilt(module, x, "fuse-conv-bn{mode=tune}")
    got, want = gradients(tuned, x), gradients(module, x)
    assert got.keys() == want.keys()
    for name, reference in want.items():
        assert (got[name] - reference).abs().max() <= 1e-10 * max(1, reference.abs().max()), name
    keys = {name for name in module.state_dict() if not name.endswith("num_batches_tracked")}
    assert set(tuned.state_dict()) == keys
    assert {name for name, _ in tuned.named_parameters()} == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize(("build", "shape"), CASES[:2])
def test_a_step_in_tune_is_one_in_eval_and_not_one_in_deploy(build, shape) -> None:
    module, x = build(), torch.randn(*shape, dtype=torch.float64)
    tuned = rebuilt(module, x, "fuse-conv-bn{mode=tune}")
    deployed = rebuilt(module, x, "fuse-conv-bn")
    for net in (module, tuned, deployed):
        gradients(net, x)
        torch.optim.SGD(net.parameters(), lr=1e-2).step()
    want = module(x)
    torch.testing.assert_close(tuned(x), want, rtol=1e-10, atol=1e-10)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(tuned.get_parameter(name), parameter, rtol=1e-10, atol=1e-10)
    assert (deployed(x) - want).abs().max() > 1e-3 * want.abs().max()


def test_from_a_file_with_no_roles_the_statistics_are_no_parameters(make_conv_norm) -> None:
    tuned = effic.to_module(make_conv_norm)
    assert {name for name, _ in tuned.named_parameters()} == {"w", "n_s", "n_b"}
    assert {"n_m", "n_v"} <= {name for name, _ in tuned.named_buffers()}


@pytest.fixture
def make_conv_norm() -> Model:
    body = "c = Conv(x, w)\n y = BatchNormalization(c, n_s, n_b, n_m, n_v)"
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[2,3,6,6] x) => (float[2,4,4,4] y) { ' + body + " }"
    )
    arrays = {"w": np.ones((4, 3, 3, 3)), **{f"n_{k}": np.ones(4) for k in "sbmv"}}
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    model = Model(ir.from_proto(proto))
    effic.run_passes(model, parse_passes("fuse-conv-bn{mode=tune}"), check="off")
    return model


def test_numbers_beside_the_norm_are_no_parameters() -> None:
    text = """<ir_version: 9, opset_import: ["": 17]> g (float[2, 3, 5] x) => (float[2, 4, 5] y)
    <float c = {0.5}> {
        z = Conv (x, w) n = Sub (z, c) y = BatchNormalization (n, s, b, m, v)
    }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in {"w": (4, 3, 1), "s": (4,), "b": (4,), "m": (4,), "v": (4,)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    model = Model(ir.from_proto(proto))
    trained = set(dict(effic.to_module(model).named_parameters()))
    assert trained == {"w", "s", "b"}
    effic.run_passes(model, parse_passes("fuse-conv-bn{mode=tune}"), check="off")
    assert set(dict(effic.to_module(model).named_parameters())) == trained
