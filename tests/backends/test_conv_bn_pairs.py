"""Which convolutions and norms of a live module are computed as one, and which are left, with the reason."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import effic  # noqa: E402
from effic.ir.errors import UnsupportedError  # noqa: E402


class Net(nn.Module):
    """A convolution, a norm, and a forward given by the test."""

    def __init__(self, run, norm: nn.Module | None = None, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, channels, 3, padding=1), norm or nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.drop, self.none = nn.Dropout(), nn.Identity()
        self.run = run
        for part in (self.bn, self.other):
            if getattr(part, "running_mean", None) is not None:
                part.running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def outputs_stay(module: nn.Module, *inputs: torch.Tensor) -> effic.TuneReport:
    """Tune a module, with the same outputs in evaluation and in training."""
    inputs = inputs or (torch.randn(2, 4, 5, 5),)
    module.eval()
    want = module(*inputs)
    plain = copy.deepcopy(module)
    report = effic.tune_conv_bn(module)
    torch.testing.assert_close(module(*inputs), want, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    expected = plain.train()(*inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(module.train()(*inputs), expected)
    return report


PAIRS = [
    lambda m, x: m.bn(m.conv(x)),
    lambda m, x: m.bn(m.none(m.conv(x))),
    lambda m, x: m.bn(m.conv(F.relu(m.bn(m.conv(x))))),  # A block called twice.
    lambda m, x: m.bn(m.conv(m.other(x))),
]


@pytest.mark.parametrize("run", PAIRS)
def test_pairs(run) -> None:
    assert [(p.conv, p.norm) for p in outputs_stay(Net(run)).pairs] == [("conv", "bn")]


def functional_convolution(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1)


def sometimes(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return m.bn(y) if m.training else y


def in_training_another(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.conv(x)) if m.training else m.other(m.conv(x))


def add_and_norm(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return m.bn(y) + y


def two_norms(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.conv(x)) + m.other(m.conv(x))


def one_norm_of_two_layers(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.conv(x)) + m.bn(x)


LEFT = [
    (add_and_norm, "is read elsewhere as well"),
    (lambda m, x: (m.conv(x), m.bn(m.conv(x)))[1], "feeds other modules as well|is read elsewhere as well"),
    (two_norms, "feeds other modules as well"),
    (one_norm_of_two_layers, "called on the outputs of different layers"),
    (lambda m, x: m.bn(m.drop(m.conv(x))), "made by a Dropout"),
    (lambda m, x: m.bn(F.relu(m.conv(x))), "made by no module"),
    (lambda m, x: m.bn(x), "made by no module"),
    (functional_convolution, "are read from outside"),
    (lambda m, x: m.bn(m.conv.forward(x)), "made by no module"),
    (lambda m, x: m.bn(m.conv(x)) + m.conv.forward(x), "are read from outside"),
    (sometimes, "only in training, or only in evaluation"),
    (in_training_another, "only in training, or only in evaluation"),
    (lambda m, x: m.conv(x), "nothing calls it"),
]


@pytest.mark.parametrize(("run", "reason"), LEFT)
def test_what_is_left_with_its_reason(run, reason: str) -> None:
    module = Net(run)
    report = outputs_stay(module)
    assert report.pairs == ()
    assert any(part in report.skipped["bn"] for part in reason.split("|")), report.skipped


def test_hooks_parametrizations_and_statistics() -> None:
    def run(m: Net, x: torch.Tensor) -> torch.Tensor:
        return m.bn(m.conv(x))

    hooked = Net(run)
    hooked.conv.register_forward_hook(lambda module, args, output: None)
    assert "the convolution before it has hooks" in outputs_stay(hooked).skipped["bn"]
    hooked = Net(run)
    hooked.bn.register_full_backward_hook(lambda module, before, after: None)
    assert "it has hooks" in outputs_stay(hooked).skipped["bn"]
    parametrized = Net(run)
    nn.utils.parametrizations.weight_norm(parametrized.conv)
    assert "has a parametrization" in outputs_stay(parametrized).skipped["bn"]
    without = Net(run, nn.BatchNorm2d(4, track_running_stats=False))
    assert "no running statistics" in outputs_stay(without).skipped["bn"]
    patched = Net(run)
    patched.conv.forward = patched.conv.forward
    assert "has a forward of its own" in outputs_stay(patched).skipped["bn"]

    class Standardised(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    own = Net(run)
    own.conv = Standardised(4, 4, 3)
    assert "is a Standardised" in outputs_stay(own).skipped["bn"]
    linear = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert "made by a Linear" in outputs_stay(linear, torch.randn(5, 4)).skipped["1"]


def depends_on_values(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return m.bn(y) if y.sum() > -1e9 else y


def test_a_module_that_cannot_be_traced_is_refused_by_name() -> None:
    module = Net(depends_on_values)
    with pytest.raises(UnsupportedError, match=r"the forward of Net cannot be traced .*control flow"):
        effic.tune_conv_bn(module)
    assert type(module.conv) is nn.Conv2d


class Branching(nn.Module):
    """Its forward looks at values; its blocks' do not, except for the last one's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Net(lambda m, x: m.bn(m.conv(x)))
        self.blocks = nn.ModuleList([Net(lambda m, x: m.bn(m.conv(x))), Net(depends_on_values)])
        self.outer = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.outer(x) if x.max() > -1e9 else x


def test_what_can_be_traced_inside_of_what_cannot() -> None:
    report = outputs_stay(Branching())
    assert [p.norm for p in report.pairs] == ["stem.bn", "blocks.0.bn"]
    assert "cannot be traced" in report.skipped["blocks.1.bn"]
    assert "cannot be traced" in report.skipped["outer"]
    # One block that cannot be traced does not hide what surrounds it.
    report = outputs_stay(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Net(depends_on_values)))
    assert [p.norm for p in report.pairs] == ["1"]
    assert "cannot be traced" in report.skipped["2.bn"]


def test_a_convolution_that_an_untraceable_module_also_holds() -> None:
    hidden = Net(depends_on_values)
    module = nn.Sequential(hidden.conv, hidden.bn, hidden)
    report = outputs_stay(module)
    assert report.pairs == ()
    assert "part of a module that cannot be traced" in report.skipped["1"] + report.skipped.get("0", "")


def test_modes_are_as_they_were() -> None:
    module = Net(lambda m, x: m.bn(m.conv(x))).train()
    module.bn.eval()
    effic.tune_conv_bn(module, (torch.randn(1, 4, 5, 5),))
    assert module.training
    assert not module.bn.training
    assert module.bn.num_batches_tracked == 0


def test_modules_without_norms_have_nothing_to_do() -> None:
    report = effic.tune_conv_bn(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    assert report.pairs == ()
    assert report.skipped == {}
    assert report.max_scale == 0
    assert report.activation_bytes is None
