"""tune_conv_bn on live modules: eval mode's numbers and gradients, train mode untouched, less memory."""

from __future__ import annotations

import copy
import io

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # noqa: E402

import effic  # noqa: E402
from effic.backends.torch import fused_conv  # noqa: E402
from effic.ir.errors import InvalidModelError  # noqa: E402

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with statistics and parameters that do something."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            if part.running_mean is not None:
                part.running_mean.normal_(generator=generator)
                part.running_var.uniform_(0.2, 3, generator=generator)
            if part.affine:
                with torch.no_grad():
                    part.weight.normal_(generator=generator).add_(torch.sign(part.weight) * 0.5)
                    part.bias.normal_(generator=generator)
    return module


def small(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=bias), nn.BatchNorm2d(8), nn.ReLU(),
        )
    )  # fmt: skip


def gradients(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradients of a loss with respect to input and parameters."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return y.detach(), {"x": x.grad, **found}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, reference in want.items():
        error = (got[name] - reference).abs().max()
        assert error <= tolerance * max(1.0, float(reference.abs().max())), name


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    axes=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    groups=st.sampled_from([1, 2, 6]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["zeros", "reflect", "circular", "replicate", "same", "valid"]),
    kernel=st.sampled_from([2, 3]),
    transposed=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 100),
)
def test_outputs_and_gradients_are_those_of_eval_mode(
    axes, bias, affine, groups, stride, dilation, padding, kernel, transposed, frozen, seed
) -> None:
    torch.manual_seed(seed)
    if transposed:
        conv = TRANSPOSED[axes](
            6, 12, kernel, stride, padding=1, output_padding=stride - 1, groups=groups, bias=bias,
            dilation=dilation if stride == 1 else 2,
        )  # fmt: skip
    else:
        pad = padding if padding in ("same", "valid") else 1
        mode = "zeros" if padding in ("same", "valid") else padding
        stride = 1 if padding == "same" else stride
        conv = CONVS[axes](
            6, 12, kernel, stride, padding=pad, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
        )
    module = randomised(nn.Sequential(conv, NORMS[axes](12, affine=affine)), seed).double().eval()
    if frozen:
        conv.weight.requires_grad_(False)
    x = torch.randn(2, 6, *[6] * axes, dtype=torch.float64)
    want, want_gradients = gradients(module, x)
    report = effic.tune_conv_bn(module)
    assert [(pair.conv, pair.norm) for pair in report.pairs] == [("0", "1")]
    got, got_gradients = gradients(module, x)
    assert_same({"y": got}, {"y": want}, 1e-12)
    assert_same(got_gradients, want_gradients, 1e-10)


def test_second_derivatives() -> None:
    module = small(bias=True).double().eval()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def penalty() -> torch.Tensor:
        (grad,) = torch.autograd.grad((module(x) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), [x, module[0].weight, module[1].weight, module[1].bias])

    want = penalty()
    effic.tune_conv_bn(module)
    for got, reference in zip(penalty(), want, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-9)


def step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    gradients(module, x)
    optimizer.step()
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_step_in_tune_is_one_in_eval_and_not_one_in_deploy() -> None:
    torch.manual_seed(0)
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tuned, deployed = copy.deepcopy(module), copy.deepcopy(module)
    effic.tune_conv_bn(tuned)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(deployed[0], deployed[1])
    want, got = step(module, x), step(tuned, x)
    assert_same(got, want, 1e-10)
    step(fused, x)
    torch.testing.assert_close(tuned(x), module(x), rtol=1e-10, atol=1e-10)
    assert (fused(x) - module(x)).abs().max() > 1e-3 * module(x).abs().max()


def test_the_state_dict_and_an_optimizer_made_before_stay() -> None:
    module = small().eval()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    keys, parameters = list(module.state_dict()), [id(p) for p in module.parameters()]
    effic.tune_conv_bn(module)
    assert list(module.state_dict()) == keys
    assert [id(p) for p in module.parameters()] == parameters
    assert len(list(module.modules())) == 7
    before = module(torch.ones(1, 3, 8, 8)).sum()
    before.backward()
    optimizer.step()
    assert module(torch.ones(1, 3, 8, 8)).sum() != before


def test_train_mode_reproduces_outputs_and_statistics() -> None:
    module = small()
    tuned = copy.deepcopy(module)
    effic.tune_conv_bn(tuned.eval())
    module.train(), tuned.train()
    x = torch.randn(4, 3, 8, 8)
    want, want_gradients = gradients(module, x)
    got, got_gradients = gradients(tuned, x)
    assert torch.equal(got, want)
    assert_same(got_gradients, want_gradients, 0)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor), name
    assert module[1].num_batches_tracked == 1
    # And back: eval mode uses what training has changed.
    torch.testing.assert_close(tuned.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-4)


def test_one_norm_in_training_beside_one_that_is_frozen() -> None:
    module = small().train()
    module[1].eval()
    tuned = copy.deepcopy(module)
    effic.tune_conv_bn(tuned)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(tuned(x), module(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tuned[4].running_var, module[4].running_var)
    assert tuned[1].num_batches_tracked == 0


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("small_weights", [True, False])
def test_the_output_of_the_convolution_is_not_kept(small_weights: bool, monkeypatch) -> None:
    if not small_weights:
        monkeypatch.setattr(fused_conv, "SMALL", 1 << 30)
    module, x = small().eval(), torch.randn(4, 3, 16, 16)
    outputs = 4 * 8 * (16 * 16 + 7 * 7) * 4
    before = saved_bytes(module, x)
    report = effic.tune_conv_bn(module, (x,))
    after = saved_bytes(module, x)
    assert report.activation_bytes == outputs
    assert sum(pair.activation_bytes for pair in report.pairs) == outputs
    named = x.nbytes + outputs  # x, and the outputs of both ReLUs.
    if small_weights:
        weights = 4 * (module[0].weight.numel() + module[3].weight.numel())
        assert named < after <= named + weights + 4 * 4 * 8 * 4  # And some vectors per channel.
        assert after <= 0.8 * before
    else:
        # Not a byte more than what it names: neither the outputs nor a copy of a weight are kept.
        assert after == named


def test_nothing_is_kept_for_frozen_layers(monkeypatch) -> None:
    monkeypatch.setattr(fused_conv, "SMALL", 1 << 30)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval().requires_grad_(False)
    effic.tune_conv_bn(module)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert saved_bytes(module, x) == 0
    module[1].bias.requires_grad_()  # Its gradient needs nothing but the output's.
    assert saved_bytes(module, x) == 0


def test_copies_files_and_undoing() -> None:
    module, x = small().eval(), torch.randn(2, 3, 8, 8)
    want = module(x)
    effic.tune_conv_bn(module)
    assert len(effic.tune_conv_bn(module).pairs) == 2, "a second call finds the same"
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin[1].bias.add_(1)
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(twin(x), want, rtol=1e-2, atol=1e-2)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), want, rtol=1e-4, atol=1e-4)
    assert effic.untune_conv_bn(module) == 2
    assert effic.untune_conv_bn(module) == 0
    assert [type(part) for part in module] == [type(part) for part in small()]
    assert torch.equal(module(x), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fused_in_float32(dtype: torch.dtype) -> None:
    module = small().to(dtype).eval()
    x = torch.randn(2, 3, 8, 8).to(dtype)
    exact = copy.deepcopy(module).double()(x.double())
    effic.tune_conv_bn(module)
    y = module(x)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_half_weights_before_a_float_norm() -> None:
    module = small().eval()
    module[0].half(), module[3].half()
    effic.tune_conv_bn(module[:2])
    fused = module[0](torch.randn(1, 3, 8, 8).half())
    assert fused.dtype == torch.float16
    assert torch.isfinite(fused).all()


def test_autocast() -> None:
    module, x = small(bias=True).eval(), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        want, want_gradients = gradients(module, x)
    effic.tune_conv_bn(module)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_gradients = gradients(module, x)
    assert got.dtype == want.dtype
    assert {n: g.dtype for n, g in got_gradients.items()} == {n: g.dtype for n, g in want_gradients.items()}
    assert_same({"y": got, **got_gradients}, {"y": want, **want_gradients}, 0.06)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    module, x = small().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = gradients(module, x)[1]
    effic.tune_conv_bn(module)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.body, x, use_reentrant=reentrant)

    got = gradients(Checkpointed(), x)[1]
    assert_same({name.removeprefix("body."): g for name, g in got.items()}, want, 1e-10)
    # A segment may end between a convolution and its norm.
    x = x.clone().requires_grad_()
    y = checkpoint_sequential(module, 6, x, use_reentrant=reentrant)
    torch.testing.assert_close(y, module(x))


def test_torch_func() -> None:
    module, x = small().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(module, values, (x,)).pow(2).sum()

    want = torch.func.grad(loss)(parameters)
    effic.tune_conv_bn(module)
    assert_same(torch.func.grad(loss)(parameters), want, 1e-10)


def test_torch_compile_and_export() -> None:
    module, x = small().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = gradients(module, x)
    effic.tune_conv_bn(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    got = gradients(compiled, x)
    assert_same({"y": got[0]}, {"y": want[0]}, 1e-12)
    assert_same({name.removeprefix("_orig_mod."): g for name, g in got[1].items()}, want[1], 1e-10)
    module.train()
    torch.testing.assert_close(compiled(x), copy.deepcopy(module)(x))
    program = torch.export.export(module.eval(), (x,))
    torch.testing.assert_close(program.module()(x), module(x))
    assert "batch_norm" not in str(program.graph)


def test_replicas_of_dataparallel_compute_what_eval_mode_does() -> None:
    module, x = small().eval(), torch.randn(2, 3, 8, 8)
    want = module(x)
    effic.tune_conv_bn(module)
    replica = copy.copy(module)
    replica._modules = {n: part._replicate_for_data_parallel() for n, part in module._modules.items()}
    for part, original in zip(replica, module, strict=True):
        for name, parameter in original._parameters.items():
            setattr(part, name, parameter)  # What torch.nn.parallel.replicate does with its copies.
        for name, tensor in original._buffers.items():
            part._buffers[name] = tensor
    torch.testing.assert_close(replica(x), want)


def test_an_input_without_a_batch_axis() -> None:
    module = nn.Sequential(nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5)).eval()
    randomised(module)
    x = torch.randn(3, 5)  # BatchNorm1d takes the output [5, 5] for a batch of 5.
    want = module(x)
    effic.tune_conv_bn(module)
    assert torch.equal(module(x), want)


def test_synchronised_norms() -> None:
    module = nn.SyncBatchNorm.convert_sync_batchnorm(small()).eval()
    x = torch.randn(2, 3, 8, 8)
    want = module(x)
    assert len(effic.tune_conv_bn(module).pairs) == 2
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)


def test_broken_checkpoints_are_errors_and_change_nothing() -> None:
    module = small().eval()
    module[4].running_var[1] = -1e-3
    with pytest.raises(InvalidModelError, match="'4' has a negative variance"):
        effic.tune_conv_bn(module)
    module[4].running_var[1] = float("nan")
    with pytest.raises(InvalidModelError, match="'3' times the scale of '4' is not finite"):
        effic.tune_conv_bn(module)
    assert effic.untune_conv_bn(module) == 0
    module = small().half().eval()
    with torch.no_grad():
        module[0].weight.fill_(200), module[1].weight.fill_(200), module[1].running_var.zero_()
    with pytest.raises(InvalidModelError, match=r"not finite in torch\.float16"):
        effic.tune_conv_bn(module)


def test_large_scales_are_said() -> None:
    module = small().eval()
    module[1].running_var.zero_()
    with torch.no_grad():
        module[1].weight.fill_(8)
    report = effic.tune_conv_bn(module)
    assert report.max_scale == pytest.approx(8 / 1e-5**0.5)
    assert "1: its largest scale is 2.53e+03" in str(report)


def test_f_batch_norm_after_a_convolution_is_no_pair() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var)

    assert effic.tune_conv_bn(Net()).pairs == ()


class Doubled(nn.Module):
    """A parametrization: twice the weight."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_parametrizations_that_come_after_tuning() -> None:
    module, x = small().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    tuned = copy.deepcopy(module)
    effic.tune_conv_bn(tuned)
    for net in (module, tuned):
        nn.utils.parametrize.register_parametrization(net[0], "weight", Doubled())
    torch.testing.assert_close(tuned(x), module(x))
    torch.testing.assert_close(tuned.train()(x), module.train()(x))
    assert effic.untune_conv_bn(tuned.eval()) == 2  # While torch's own subclass is in the way.
    torch.testing.assert_close(tuned(x), module.eval()(x))
    nn.utils.parametrize.remove_parametrizations(tuned[0], "weight")
    assert len(effic.tune_conv_bn(tuned).pairs) == 2
    torch.testing.assert_close(tuned(x), module(x))


def test_undoing_a_part_undoes_its_pairs() -> None:
    module, x = small().eval(), torch.randn(2, 3, 8, 8)
    want = module(x)
    for part in (0, 1):
        effic.tune_conv_bn(module)
        assert effic.untune_conv_bn(module[part]) == 1 - part
        torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own rules are scripted.
def test_forward_mode_derivatives() -> None:
    module, x = small().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(x)

    def tangent() -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            made = module(torch.autograd.forward_ad.make_dual(x, direction))
            return torch.autograd.forward_ad.unpack_dual(made).tangent

    want = tangent()
    effic.tune_conv_bn(module)
    torch.testing.assert_close(tangent(), want)


def test_autocast_leaves_doubles() -> None:
    module, x = small().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        want = module(x)
        effic.tune_conv_bn(module)
        torch.testing.assert_close(module(x), want)


def test_statistics_that_are_taken_away() -> None:
    module, x = small().eval(), torch.randn(2, 3, 8, 8)
    module[1].running_mean = module[1].running_var = None
    want = module(x)
    module = small().eval()
    effic.tune_conv_bn(module)
    module[1].running_mean = module[1].running_var = None
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
