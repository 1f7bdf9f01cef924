"""MaskLLM's learned masks, their files, and BDWP's two masks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import effic
from effic.ir import sparsity
from effic.ir.errors import UsageError
from effic.ir.sparsity import Pattern
from effic.models.builders import BUILDERS

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from effic.backends.torch.sparse_training import (  # noqa: E402
    BDWP,
    STE,
    MaskLLM,
    learn_masks,
    masks_of,
    read_masks,
)
from effic.backends.torch.sparse_training.mask_learning import LearnedMask  # noqa: E402
from effic.backends.torch.sparse_training.masks import Layout, choices, to_groups  # noqa: E402


def learned(
    shape: tuple[int, ...] = (4, 8), pattern: tuple[int, int] = (2, 4), **options: Any
) -> LearnedMask:
    like = torch.randn(shape)
    generator = torch.Generator().manual_seed(0)
    mask = LearnedMask(Pattern(*pattern), options.get("layout", Layout(1)), like, 0.01, generator)
    mask.kappa.fill_(options.get("kappa", 100.0))
    mask.tau.fill_(options.get("tau", 1.0))
    mask.regulariser.fill_(options.get("regulariser", 0.0))
    return mask


# -- MaskLLM --------------------------------------------------------------------------------------


def test_choices_are_in_the_papers_order() -> None:
    rows = ["".join(str(int(bit)) for bit in row) for row in choices(Pattern(2, 4))]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]
    assert choices(Pattern(1, 4)).tolist() == torch.eye(4).tolist()
    with pytest.raises(UsageError, match="12,870 masks to choose from"):
        MaskLLM(8, 16)


@settings(max_examples=40, deadline=None)
@given(
    tau=some.floats(0.01, 100), kappa=some.floats(1, 1e4), n=some.integers(1, 4), m=some.integers(2, 5),
    length=some.integers(5, 17),
)  # fmt: skip
def test_soft_masks_sum_to_n_at_any_temperature(
    tau: float, kappa: float, n: int, m: int, length: int
) -> None:
    if n >= m:
        n = m - 1
    mask = learned((3, length), (n, m), tau=tau, kappa=kappa)
    soft = mask.soft(torch.zeros(3, length))
    sums = to_groups(soft, Layout(1), m).sum(-1)
    full = length // m
    torch.testing.assert_close(sums[..., :full], torch.full_like(sums[..., :full], n), rtol=0, atol=1e-4)
    if length % m:
        rest = torch.full_like(sums[..., full:], min(n, length % m))
        torch.testing.assert_close(sums[..., full:], rest, rtol=0, atol=1e-4)
    assert soft.min() >= 0
    assert soft.max() <= 1 + 1e-5


def test_a_cold_soft_mask_is_one_of_the_patterns() -> None:
    mask = learned((64, 64), tau=1e-6)
    groups = to_groups(mask.soft(torch.zeros(64, 64)), Layout(1), 4).reshape(-1, 4)
    distance = (groups[:, None] - choices(Pattern(2, 4))).abs().amax(-1).amin(-1)
    assert distance.max() < 1e-3
    warm = to_groups(learned((64, 64), tau=100.0).soft(torch.zeros(64, 64)), Layout(1), 4)
    assert (warm - 0.5).abs().max() < 0.2


@settings(max_examples=25, deadline=None)
@given(
    seed=some.integers(0, 999), axis=some.integers(0, 1), pattern=some.sampled_from([(2, 4), (1, 4), (3, 5)])
)
def test_a_strong_prior_is_the_mask_without_training(seed: int, axis: int, pattern: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    like, layout = torch.randn(14, 13), Layout(axis, out_axis=1 - axis)
    mask = learned((14, 13), pattern, layout=layout)
    prior = torch.from_numpy(sparsity.nm_mask(like.abs().numpy(), Pattern(*pattern), axis=axis))
    mask.lean(prior, 100.0)
    assert torch.equal(mask.kept(like), prior)


def test_prior_formula() -> None:
    mask = learned((1, 4))
    before, prior = mask.logits.detach().clone(), torch.tensor([[1.0, 0, 1, 0]])
    mask.lean(prior, 3.0)
    # Overlaps of 1100, 1010, 1001, 0110, 0101, 0011 with 1010, less n / 2.
    agreement = torch.tensor([0.0, 1, 0, 0, -1, 0])
    torch.testing.assert_close(mask.logits.detach(), before + before.std() * 3 * agreement)


def test_gradients_are_those_of_the_loss_less_the_regulariser() -> None:
    layer = nn.Linear(8, 4, bias=False)
    training = MaskLLM(steps=2, regulariser=0.3, tau=(1.0, 1.0)).attach(layer)
    mask, x = layer.parametrizations.weight[0], torch.randn(3, 8)
    torch.manual_seed(7)
    layer(x).square().sum().backward()
    found, mask.logits.grad = mask.logits.grad, None
    weight = layer.parametrizations.weight.original
    torch.manual_seed(7)
    masked = weight * mask.soft(weight)
    (functional.linear(x, masked).square().sum() - 0.3 * masked.square().sum()).backward()
    torch.testing.assert_close(found, mask.logits.grad, rtol=1e-4, atol=1e-5)
    training.step()
    assert mask.regulariser.item() == pytest.approx(0.15)
    training.step()
    assert mask.regulariser.item() == 0.0


def test_schedules_are_linear_and_in_the_recipes_state() -> None:
    recipe = MaskLLM(steps=4)
    layer = nn.Linear(8, 8)
    training = recipe.attach(layer)
    mask = layer.parametrizations.weight[0]
    assert (mask.kappa.item(), mask.tau.item()) == (100, 4)
    training.step()
    assert (mask.kappa.item(), mask.tau.item()) == pytest.approx((200, 3.0125))
    resumed = recipe.attach(nn.Linear(8, 8))
    resumed.load_state_dict({**training.state_dict(), "step": 9})
    twin = resumed.module.parametrizations.weight[0]
    assert (twin.kappa.item(), twin.tau.item()) == pytest.approx((500, 0.05))


def test_training_mode_is_soft_and_eval_mode_is_what_is_baked() -> None:
    module = nn.Linear(8, 8, bias=False).eval()
    weight = module.weight.detach().clone()
    training = MaskLLM(steps=4).attach(module)
    assert not torch.equal(module.weight, module.weight)
    assert not module.train(False).weight.requires_grad
    hard = module.weight.clone()
    assert torch.equal(hard, weight * training.masks()["weight"])
    training.finish()
    assert torch.equal(module.weight, hard)


def test_masks_are_learned_and_weights_stay_bit_for_bit(tmp_path: Path) -> None:
    """The target needs the even inputs alone; magnitude keeps the odd ones, whose weights are larger."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8))
    with torch.no_grad():
        module[0].weight.uniform_(0.2, 0.4)
        module[0].weight[:, 1::2] += 0.3
    needed = torch.zeros(8, 16, dtype=torch.bool)
    needed[:, ::2] = True
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batches = [torch.randn(32, 16) for _ in range(20)]

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        wanted = functional.linear(x, before["0.weight"] * needed, before["0.bias"])
        return functional.mse_loss(module(x), wanted)

    training = MaskLLM(steps=100).attach(module)
    assert [p is module[0].parametrizations.weight[0].logits for p in training.parameters()] == [True]
    # The prior is three standard deviations ahead, not infinitely many.
    assert (training.masks()["0.weight"] & needed).sum() < 8
    losses = learn_masks(training, batches, loss, rate=0.05)
    assert len(losses) == 100
    assert torch.equal(module[0].parametrizations.weight.original, before["0.weight"])
    masks = training.masks()["0.weight"]
    assert torch.equal(masks, needed)
    for path in (tmp_path / "masks.npz", tmp_path / "masks.safetensors"):
        training.save_masks(path)
        stored = read_masks(str(path))["0.weight"]
        assert (stored.shape, stored.dtype) == ((8, 4), np.uint8)
        twin = nn.Sequential(nn.Linear(16, 8))
        again = MaskLLM(steps=4, prior_strength=100.0).attach(twin, prior={"0.weight": stored})
        assert torch.equal(again.masks()["0.weight"], masks)
    finished = training.finish()
    after = module.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        expected = torch.where(masks, value, 0.0) if name == "0.weight" else value
        assert torch.equal(after[name], expected), name
    assert finished.layers["0.weight"].density == 0.5


def test_priors_and_batches_that_do_not_fit() -> None:
    module = nn.Linear(8, 8)
    with pytest.raises(
        UsageError, match=r"'weight' has shape \[3, 3\]; give bools of the weight's, \[8, 8\], or"
    ):
        MaskLLM().attach(module, prior={"weight": np.ones((3, 3), bool)})
    with pytest.raises(UsageError, match="no prior 'large'"):
        MaskLLM().attach(module, prior="large")  # type: ignore[arg-type]
    # Nothing was left behind.
    assert type(module) is nn.Linear
    training = MaskLLM(steps=2).attach(module, prior={"other": np.ones((3, 3), bool)})
    with pytest.raises(UsageError, match="there are no batches"):
        learn_masks(training, [], lambda m, b: m(b).sum())
    training.abandon()
    assert module.weight.requires_grad
    with pytest.raises(UsageError, match="learned with MaskLLM"):
        learn_masks(STE().attach(module), [], lambda m, b: m(b).sum())


def test_saved_masks_prune_the_model_they_were_learned_for(tmp_path: Path) -> None:
    """Through apply-masks: convolutions by pattern number, a short last group and groups of a
    transposed convolution as bools."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3), nn.ConvTranspose2d(6, 8, 2), nn.ConvTranspose2d(8, 8, 2, groups=2),
        nn.Flatten(), nn.Linear(8 * 6 * 6, 16), nn.Linear(16, 4),
    )  # fmt: skip
    model = effic.capture(module, (torch.zeros(1, 8, 8, 8),))
    training = MaskLLM(steps=2).attach(module, prior=None, first_conv=True)
    masks = {name: mask.numpy() for name, mask in training.masks().items()}
    for path in (tmp_path / "masks.npz", tmp_path / "masks.safetensors"):
        training.save_masks(path)
        assert sorted(a.dtype.name for a in read_masks(str(path)).values()) == ["bool"] * 2 + ["uint8"] * 4
        pruned = model.clone()
        effic.run_passes(pruned, effic.parse_passes(f"apply-masks{{masks={path}}}"), check="off")
        found = masks_of(pruned)
        assert found.keys() == masks.keys() == training.patterns.keys()
        for name, mask in masks.items():
            assert np.array_equal(found[name], mask), name
    with pytest.raises(UsageError, match="is neither"):
        training.save_masks(tmp_path / "masks.txt")


# -- BDWP -----------------------------------------------------------------------------------------


def two_ways(weight: torch.Tensor, pattern: Pattern, axis: int) -> torch.Tensor:
    """The weight masked along one of its axes, by NumPy."""
    return weight * torch.from_numpy(sparsity.nm_mask(weight.abs().numpy(), pattern, axis=axis))


@settings(max_examples=25, deadline=None)
@given(seed=some.integers(0, 999), bias=some.booleans(), batch=some.sampled_from([(), (3,), (2, 3)]))
def test_bdwp_linear_has_three_products_each_with_its_own_weight(
    seed: int, bias: bool, batch: tuple[int, ...]
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(16, 24, bias=bias, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    BDWP().attach(layer)
    x = torch.randn(*batch, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    forwards, backwards = two_ways(weight, Pattern(2, 8), 1), two_ways(weight, Pattern(2, 8), 0)
    assert not torch.equal(forwards, backwards)
    close = {"rtol": 0.0, "atol": 1e-13}
    torch.testing.assert_close(y.detach(), functional.linear(x.detach(), forwards, layer.bias), **close)
    torch.testing.assert_close(x.grad, dy @ backwards, **close)
    dense = dy.reshape(-1, 24).T @ x.detach().reshape(-1, 16)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, dense, **close)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dy.reshape(-1, 24).sum(0), **close)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bdwp_convolutions(rank: int, transposed: bool) -> None:
    torch.manual_seed(rank)
    cls = getattr(nn, f"Conv{'Transpose' * transposed}{rank}d")
    options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2, "dtype": torch.float64}
    layer, plain, back = (cls(16, 16, 3, **options) for _ in range(3))
    # Inside a convolution group; axis 0 holds the groups' channels one after another.
    first, second = (0, 1) if transposed else (1, 0)
    weight = layer.weight.detach().clone()
    for other, axis in ((plain, first), (back, second)):
        halves = weight.chunk(2) if axis == 0 else (weight,)
        other.weight.data = torch.cat([two_ways(half, Pattern(2, 8), axis) for half in halves])
        other.bias.data = layer.bias.data
    BDWP().attach(layer)
    xs = [torch.randn(2, 16, *[7] * rank, dtype=torch.float64, requires_grad=True)]
    xs += [xs[0].detach().clone().requires_grad_() for _ in range(2)]
    ys = [module(x) for module, x in zip((layer, plain, back), xs, strict=True)]
    dy = torch.randn_like(ys[0])
    for y in ys:
        y.backward(dy)
    close = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(ys[0], ys[1], **close)
    torch.testing.assert_close(xs[0].grad, xs[2].grad, **close)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, plain.weight.grad, **close)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **close)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_bdwp_named_paddings_and_single_images(padding: str) -> None:
    layer = nn.Conv2d(8, 8, (3, 4), padding=padding, dilation=(1, 2))
    x = torch.randn(8, 9, 11)
    plain = nn.Conv2d(8, 8, (3, 4), padding=padding, dilation=(1, 2))
    plain.load_state_dict({**layer.state_dict(), "weight": two_ways(layer.weight.detach(), Pattern(2, 8), 1)})
    BDWP().attach(layer)
    with warnings.catch_warnings():
        # torch says once that an even kernel makes it pad unevenly.
        warnings.simplefilter("ignore")
        expected = plain(x)
    torch.testing.assert_close(layer(x), expected)


def test_bdwp_is_not_the_gradient_of_its_forward() -> None:
    layer = nn.Linear(8, 8, bias=False, dtype=torch.float64)
    BDWP().attach(layer)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(layer, (x,))


def test_bdwp_in_a_graph_module() -> None:
    """MatMul [K, N], Gemm and a convolution as to_module writes them."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.right, self.turned = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(16, 8))
            self.bias, self.left = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                torch.addmm(self.bias, x @ self.right, self.turned.t()).reshape(8, -1) + self.left @ self.left
            )

    module = torch.fx.symbolic_trace(Calls())
    right, turned = module.right.detach().clone(), module.turned.detach().clone()
    training = BDWP().attach(module)
    assert list(training.patterns) == ["right", "turned"]
    x = torch.randn(4, 16, requires_grad=True)
    h = x.detach() @ two_ways(right, Pattern(2, 8), 0)
    y = torch.addmm(module.bias, x @ module.right, module.turned.t())
    y.sum().backward()
    torch.testing.assert_close(y, torch.addmm(module.bias, h, two_ways(turned, Pattern(2, 8), 1).t()))
    dh = torch.ones(4, 16) @ two_ways(turned, Pattern(2, 8), 0)
    torch.testing.assert_close(x.grad, dh @ two_ways(right, Pattern(2, 8), 1).t())
    torch.testing.assert_close(module.parametrizations.right.original.grad, x.detach().t() @ dh)


def test_bdwp_leaves_what_it_cannot_reach() -> None:
    module = nn.ModuleDict({
        "attention": nn.MultiheadAttention(16, 2), "narrow": nn.Linear(16, 4), "wide": nn.Linear(16, 16),
    })  # fmt: skip
    training = BDWP().attach(module)
    assert list(training.patterns) == ["wide.weight"]
    assert "gradient cannot be given a mask" in training.skipped["attention.in_proj_weight"]
    assert training.skipped["narrow.weight"] == "has 4 output channels, fewer than a group of 2:8"


@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_learned_masks_of_a_model_from_the_ir(name: str) -> None:
    model = effic.Model(BUILDERS[name]())
    module = effic.to_module(model)
    training = MaskLLM(1, 4, steps=2).attach(module)
    training.step()
    finished = training.finish()
    trained = effic.read_back(model, module)
    finished.declare(trained)
    assert sparsity.broken(trained) == []
    assert len(sparsity.declared(trained)) == len(finished.layers) > 0
