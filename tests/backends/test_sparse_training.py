"""Recipes that train weights to N:M: gradients, schedules, what is pruned, what is left when it is over."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import effic
from effic.ir import sparsity
from effic.ir.errors import CheckFailedError, UnsupportedError, UsageError
from effic.ir.evaluate import start_session
from effic.ir.sparsity import Pattern
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

from effic.backends.torch.sparse_training import (  # noqa: E402
    BDWP,
    SRSTE,
    STE,
    MaskLLM,
    MdGf,
    Recipe,
    SdGf,
    finish,
    weights,
)
from effic.backends.torch.sparse_training.masks import Layout, from_groups, nm_mask, to_groups  # noqa: E402
from effic.backends.torch.sparse_training.schedules import (  # noqa: E402
    boundaries,
    geometric,
    last_begun,
    mask_decay,
    stepwise,
)

ALL: tuple[Recipe, ...] = (
    STE(), SRSTE(), MdGf(decay=4), MdGf(kind="exp", decay=4, grad_mode="exact"), SdGf(total=4),
    SdGf(total=4, kind="geometric", k=2), BDWP(2, 4), MaskLLM(steps=4),
)  # fmt: skip


def conv_net() -> nn.Module:
    """Every layout: convolution, groups, depthwise, transposed with groups, linear."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(16, 16, 1, groups=16),
        nn.ReLU(), nn.ConvTranspose2d(16, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 6 * 6, 10),
    )  # fmt: skip


def train(module: nn.Module, training: Any) -> Any:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(training.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(4, 4, 8, 8)).square().mean().backward()
        optimizer.step()
        training.step()
    return optimizer


def gradients(recipe: Recipe, weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, Any, nn.Linear]:
    """dW of ``(x W̃ᵀ · v).sum()`` and G, the gradient of W̃."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    training = recipe.attach(layer)
    v = torch.linspace(-1, 1, len(weight), dtype=weight.dtype)
    (layer(x) * v).sum().backward()
    (parameter,) = training.parameters()
    return parameter.grad, v[:, None] * x.sum(0), layer


# -- masks ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=some.integers(1, 5), columns=some.integers(1, 40), m=some.integers(2, 20), data=some.data(),
    seed=some.integers(0, 999),
)  # fmt: skip
def test_masks_are_those_of_the_pruning_passes(rows: int, columns: int, m: int, data: Any, seed: int) -> None:
    """Ties (few distinct scores), short last groups, long groups that are sorted instead of ranked."""
    pattern = Pattern(data.draw(some.integers(1, m - 1)), m)
    score = np.random.default_rng(seed).integers(0, 4, (rows, columns)).astype(np.float32)
    found = nm_mask(torch.from_numpy(score), pattern, Layout(1)).numpy()
    assert np.array_equal(found, sparsity.nm_mask(score, pattern))


@settings(max_examples=30, deadline=None)
@given(
    blocks=some.integers(1, 3), length=some.integers(1, 9), other=some.integers(1, 4), axis=some.integers(0, 1),
    m=some.integers(2, 5),
)  # fmt: skip
def test_groups_are_put_back(blocks: int, length: int, other: int, axis: int, m: int) -> None:
    shape = (other, blocks * length, 2, 3) if axis else (blocks * length, other, 2, 3)
    weight, layout = torch.randn(shape), Layout(axis, blocks)
    groups = to_groups(weight, layout, m)
    assert groups.shape[-2:] == (-(-length // m), m)
    assert torch.equal(from_groups(groups, layout, weight), weight)


# -- which weights --------------------------------------------------------------------------------


def test_layouts_of_modules() -> None:
    module = nn.ModuleDict({
        "linear": nn.Linear(8, 12), "conv": nn.Conv1d(8, 12, 3, groups=2),
        "transposed": nn.ConvTranspose3d(8, 12, 3, groups=4), "attention": nn.MultiheadAttention(8, 2),
    })  # fmt: skip
    found = {w.name: w for w in weights(module)}
    assert found["linear.weight"].layout == Layout(1)
    assert found["conv.weight"].layout == Layout(1, 1, 0, 2)
    assert found["transposed.weight"].layout == Layout(0, 4, 1, 1)
    assert found["attention.in_proj_weight"].layout == Layout(1)
    assert {name: w.plain for name, w in found.items() if "attention" in name} == {
        "attention.in_proj_weight": False, "attention.out_proj.weight": False,
    }  # fmt: skip


class Calls(nn.Module):
    """Weights that only the calls tell the layout of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.turned = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.right, self.left = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.kernel, self.both = nn.Parameter(torch.randn(8, 4, 3)), nn.Parameter(torch.randn(8, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x, self.linear, self.bias) @ self.turned.t()
        x = torch.addmm(self.bias, x, self.right)
        x = torch.matmul(self.left, x.transpose(0, 1)).transpose(0, 1)
        x = functional.conv1d(x[..., None], self.kernel, None, 1, 1, 1, 2)[..., 0]
        return torch.matmul(functional.linear(x, self.both), self.both)


def test_layouts_of_graph_modules() -> None:
    module = torch.fx.symbolic_trace(Calls())
    found = {w.name: w for w in weights(module)}
    assert {name: w.layout.axis for name, w in found.items() if w.why_not is None} == {
        "linear": 1, "turned": 1, "right": 0, "left": 1, "kernel": 1,
    }  # fmt: skip
    assert found["both"].why_not == "is read along two different axes"
    assert found["kernel"].layout == Layout(1, 1, 0, 2)
    training = STE().attach(module)
    x = torch.randn(8, 8)
    expected, twin = module(x), copy.deepcopy(module)
    assert torch.equal(twin(x), expected)
    training.finish()
    finish(twin)
    assert torch.equal(module(x), expected)
    assert torch.equal(twin(x), expected)
    assert type(twin).__mro__[1:] == torch.fx.GraphModule.__mro__


def test_skips_have_reasons() -> None:
    module = nn.ModuleDict({
        "first": nn.Conv2d(4, 8, 3), "depthwise": nn.Conv2d(8, 8, 3, groups=8), "small": nn.Linear(3, 8),
        "table": nn.Embedding(32, 8), "inner": nn.Linear(8, 8), "named": nn.Linear(8, 8),
        "recurrent": nn.LSTM(8, 8), "lazy": nn.LazyLinear(4), "head": nn.Linear(8, 32),
    })  # fmt: skip
    parametrize.register_parametrization(module["named"], "weight", nn.Identity())
    training = STE().attach(module)
    assert training.patterns == {"inner.weight": Pattern(2, 4)}
    reasons = {
        "first.weight": "first convolution", "depthwise.weight": "depthwise", "small.weight": "3 input channels",
        "table.weight": "embedding", "named.parametrizations.weight.original": "parametrized already",
        "recurrent.weight_ih_l0": "recurrent", "head.weight": "vocabulary", "lazy.weight": "no shape yet",
    }  # fmt: skip
    for name, part in reasons.items():
        assert part in training.skipped[name]
    training.abandon()
    training = STE().attach(module, first_conv=True, head=True, skip=["inner*"])
    assert list(training.patterns) == ["first.weight", "head.weight"]
    assert training.skipped["inner.weight"] == "is to be skipped"


def test_overrides_and_shared_weights() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    training = SRSTE().attach(module, overrides={"0.*": "1:4", "3.*": None})
    assert training.patterns == {"0.weight": Pattern(1, 4), "1.weight": Pattern(2, 4)}
    assert module[2].parametrizations.weight[0] is module[0].parametrizations.weight[0]
    assert list(training.masks()) == ["0.weight", "1.weight"]
    finished = training.finish()
    assert {name: layer.density for name, layer in finished.layers.items()} == {
        "0.weight": 0.25,
        "1.weight": 0.5,
    }
    assert module[2].weight is module[0].weight
    assert not parametrize.is_parametrized(module[2])


# -- gradients ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=some.integers(0, 999), decay=some.sampled_from([0.0, 2e-4, 0.5]))
def test_ste_and_sr_ste_gradients(seed: int, decay: float) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(4, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    grad, g, layer = gradients(SRSTE(decay=decay), weight, x)
    mask = torch.from_numpy(sparsity.nm_mask(weight.abs().numpy(), Pattern(2, 4)))
    assert torch.allclose(grad, g + decay * torch.where(mask, 0, weight), rtol=0, atol=1e-14)
    assert torch.equal(layer.weight, weight * mask)
    assert torch.allclose(gradients(STE(), weight, x)[0], g, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", ["ste", "exact"])
def test_mdgf_gradients(mode: Any) -> None:
    weight, x = torch.randn(4, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    layer = nn.Linear(8, 4, bias=False, dtype=torch.float64)
    layer.weight.data = weight.clone()
    training = MdGf(decay=4, grad_mode=mode).attach(layer)
    training.step()
    mask = torch.from_numpy(sparsity.nm_mask(weight.abs().numpy(), Pattern(2, 4)))
    scale = mask + 0.75 * ~mask
    assert torch.allclose(layer.weight, weight * scale, rtol=0, atol=1e-15)
    layer(x).sum().backward()
    g = x.sum(0).expand(4, 8)
    grad = layer.parametrizations.weight.original.grad
    assert torch.allclose(grad, g if mode == "ste" else g * scale, rtol=0, atol=1e-14)


def test_sr_ste_decay_reaches_momentum() -> None:
    """Pruned weights without a gradient of their own shrink faster than plain decay would make them."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, 3.0, 1.0, 1.0]])
    training = SRSTE(decay=0.1).attach(layer)
    optimizer = torch.optim.SGD(training.parameters(), 1.0, momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.zeros(1, 4)).sum().backward()
        optimizer.step()
    # Steps of 0.1 w, then of 0.1 w + 0.5 times the first one.
    pruned = layer.parametrizations.weight.original[0, 2].item()
    assert pruned == pytest.approx(0.9 - (0.09 + 0.05), abs=1e-6)
    assert layer.parametrizations.weight.original[0, 0].item() == 4.0


# -- schedules ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(t=some.integers(0, 10_000), rho=some.floats(1e-6, 1.0))
def test_mask_decay_formulas(t: int, rho: float) -> None:
    assert mask_decay("linear", rho, t) == max(1 - rho * t, 0)
    assert mask_decay("exp", rho, t) == math.exp(-rho * t)


def test_mdgf_phases() -> None:
    def betas(recipe: MdGf, steps: int) -> list[float]:
        layer = nn.Linear(8, 8)
        training, mask, found = recipe.attach(layer), layer.parametrizations.weight[0], []
        for _ in range(steps):
            found.append(1.0 if mask.current is None else mask.beta.item())
            training.step()
        return found

    assert betas(MdGf(dense=2, decay=4), 8) == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert betas(MdGf(dense=1, decay=6, rho=0.5), 5) == [1, 1, 0.5, 0, 0]
    exp = betas(MdGf(kind="exp", dense=1, decay=3), 6)
    assert exp == pytest.approx([1, 1, 0.01 ** (1 / 3), 0.01 ** (2 / 3), 0, 0])


def test_mdgf_counts_phases_in_epochs_and_beta_in_steps() -> None:
    layer = nn.Linear(8, 8)
    training = MdGf(dense=1, decay=2, rho=0.25, unit="epoch").attach(layer)
    mask, found = layer.parametrizations.weight[0], []
    for _ in range(4):
        for _ in range(2):
            found.append(1.0 if mask.current is None else mask.beta.item())
            training.step()
        training.end_epoch()
    assert found == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_sdgf_intervals() -> None:
    assert [str(p) for p in stepwise(Pattern(1, 16))] == ["15:16", "8:16", "4:16", "2:16", "1:16"]
    assert [str(p) for p in stepwise(Pattern(2, 4))] == ["3:4", "2:4"]
    assert [str(p) for p in geometric(Pattern(1, 8), 16, 128)] == ["16:128", "8:64", "4:32", "2:16", "1:8"]
    # 24 is divided by 24, no longer group: the first intervals are clamped.
    assert [str(p) for p in geometric(Pattern(1, 3), 16, 24)] == ["8:24", "8:24", "4:12", "2:6", "1:3"]
    assert [str(p) for p in geometric(Pattern(2, 4), 4, 10)] == ["2:4", "2:4", "2:4"]


@settings(max_examples=50, deadline=None)
@given(
    count=some.integers(1, 6),
    start=some.integers(0, 9),
    length=some.integers(0, 50),
    now=some.integers(0, 70),
)
def test_boundaries_are_equal_and_looked_up_by_the_last_begun(
    count: int, start: int, length: int, now: int
) -> None:
    if length < count:
        with pytest.raises(UsageError, match="too short"):
            boundaries(count, start, start + length)
        return
    starts = boundaries(count, start, start + length)
    lengths = np.diff([*starts, start + length])
    assert starts[0] == start
    assert lengths.max() - lengths.min() <= 1
    begun = last_begun(starts, now)
    assert begun == (None if now < start else int(np.searchsorted(starts, now, side="right")) - 1)


def test_sdgf_resumes_past_a_boundary() -> None:
    recipe = SdGf(1, 16, total=20, dense=2, finetune=3, unit="epoch")
    layer = nn.Linear(32, 4, bias=False)
    training = recipe.attach(layer)
    seen = []
    for _ in range(20):
        current = layer.parametrizations.weight[0].current
        seen.append(None if current is None else current.n)
        kept = int((layer.weight.reshape(4, 2, 16) != 0).sum(-1).max())
        assert kept == (seen[-1] or 16)
        training.end_epoch()
    assert seen == [None] * 2 + [15] * 3 + [8] * 3 + [4] * 3 + [2] * 3 + [1] * 6
    for epoch in range(20):
        resumed = recipe.attach(nn.Linear(32, 4, bias=False))
        resumed.load_state_dict({**training.state_dict(), "epoch": epoch})
        current = resumed.module.parametrizations.weight[0].current
        assert (None if current is None else current.n) == seen[epoch]


def test_sdgf_says_what_it_clamps() -> None:
    training = SdGf(2, 4, total=40, kind="geometric", k=8).attach(
        nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8))
    )
    assert training.notes == {"1.weight": "starts with 8:16: groups of 32 do not divide its vectors of 48"}


def test_training_resumes_as_if_it_had_not_stopped() -> None:
    recipe = MdGf(kind="exp", dense=2, decay=6)

    def run(stop: int | None) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Linear(8, 8)
        training = recipe.attach(module)
        optimizer = torch.optim.AdamW(training.parameters(), 0.01)
        for step in range(8):
            if step == stop:
                saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), training.state_dict()))
                module = nn.Linear(8, 8)
                training = recipe.attach(module)
                optimizer = torch.optim.AdamW(training.parameters(), 0.5)
                for thing, state in zip((module, optimizer, training), saved, strict=True):
                    thing.load_state_dict(state)
            optimizer.zero_grad()
            x = torch.linspace(-1, 1, 32).reshape(4, 8) * (step + 1)
            module(x).square().mean().backward()
            optimizer.step()
            training.step()
        training.finish()
        return module

    whole = run(None)
    for stop in (1, 3, 7):
        assert torch.equal(run(stop).weight, whole.weight)


# -- when it is over ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: type(r).__name__)
def test_finish_leaves_a_plain_module_that_follows_the_pattern(recipe: Recipe) -> None:
    module, x = conv_net(), torch.randn(2, 4, 8, 8)
    before = [(name, p) for name, p in module.named_parameters()]
    keys, classes = list(module.state_dict()), [type(m) for m in module.modules()]
    training = recipe.attach(module)
    optimizer = train(module, training)
    twin, kept = copy.deepcopy(module), training.masks()
    finished = training.finish()
    assert [(n, id(p)) for n, p in module.named_parameters()] == [(n, id(p)) for n, p in before]
    assert list(module.state_dict()) == keys
    assert [type(m) for m in module.modules()] == classes
    assert not any(parametrize.is_parametrized(m) for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    assert set(finished.layers) == {"2.weight", "5.weight", "7.weight"}
    for name, layer in finished.layers.items():
        weight = module.get_parameter(name)
        assert torch.equal(weight != 0, kept[name])
        assert layer.density == 0.5
        # The transposed convolution's groups are 8 of its 16 input channels each.
        rows = weight.detach().movedim(0 if name == "5.weight" else 1, -1).numpy()
        assert sparsity.follows(rows, layer.pattern)
        assert (np.add.reduceat(rows != 0, np.arange(0, rows.shape[-1], 4), axis=-1) == 2).all()
    finish(twin)
    assert torch.equal(twin(x), module(x))
    if not isinstance(recipe, MaskLLM):
        # The optimizer's parameters are still the module's.
        optimizer.step()
        assert not torch.equal(twin(x), module(x))
    assert finished.layers["7.weight"].kept_energy == pytest.approx(0.8, abs=0.1)


def test_finish_sets_positive_zeros_and_keeps_the_others() -> None:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[-1.0, -4.0, -2.0, -3.0], [0.0, 0.0, 0.0, 5.0]])
    STE().attach(layer).finish()
    assert layer.weight.tolist() == [[0.0, -4.0, 0.0, -3.0], [0.0, 0.0, 0.0, 5.0]]
    assert not torch.signbit(layer.weight)[0, 0]


@pytest.mark.parametrize("recipe", [BDWP(2, 4), MaskLLM(steps=4)], ids=lambda r: type(r).__name__)
def test_a_trained_module_goes_back_into_the_ir_and_through_onnxruntime(
    recipe: Recipe, tmp_path: Path
) -> None:
    module, x = conv_net(), torch.randn(2, 4, 8, 8)
    training = recipe.attach(module)
    train(module, training)
    finished = training.finish()
    model = effic.capture(module, (x,))
    assert not {n.op_type for n in model.nodes()} & {"TopK", "Where", "Mul", "Greater", "ScatterElements"}
    finished.declare(model)
    assert sparsity.declared(model) == training.patterns
    assert sparsity.broken(model) == []
    path = tmp_path / "sparse.onnx"
    effic.optimize(model, "eliminate-dead-code", output=path, target="portable")
    written = effic.read_onnx(path)
    assert sparsity.declared(written) == training.patterns
    for site in weight_sites(written):
        if site.name in training.patterns:
            assert sparsity.follows(sparsity.by_reduction(site, site.read()), Pattern(2, 4))
    (name,) = (value.name for value in written.graph.inputs)
    (found,) = start_session(str(path)).run(None, {name: x.numpy()})
    np.testing.assert_allclose(found, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_an_onnx_model_is_trained_and_read_back(tmp_path: Path) -> None:
    """MatMul weights [K, N], one at the module's root, names that torch cannot hold, a Gemm."""
    rng = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, (3, 16))
    first, second, third = (
        ir.Value(name=name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in (("W", (16, 8)), ("body..weight", (8, 12)), ("head.weight", (6, 12)))
    )
    nodes = [ir.node("MatMul", [x, first]), ir.node("Relu", [ir.Value()])]
    nodes[1].replace_input_with(0, nodes[0].outputs[0])
    nodes.append(ir.node("MatMul", [nodes[1].outputs[0], second]))
    nodes.append(ir.node("Gemm", [nodes[2].outputs[0], third], {"transB": 1}))
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"y{number}", ir.DataType.FLOAT
    graph = ir.Graph(
        [x], [nodes[-1].outputs[0]], nodes=nodes, initializers=[first, second, third], opset_imports={"": 20}
    )
    model = effic.Model(ir.Model(graph, ir_version=10))
    module = effic.to_module(model)
    training = SRSTE().attach(module)
    assert len(training.patterns) == 3, training.skipped
    assert copy.deepcopy(module)(torch.ones(3, 16)).shape == (3, 6)
    optimizer = torch.optim.SGD(training.parameters(), 0.01)
    for _ in range(2):
        module(torch.randn(3, 16)).square().mean().backward()
        optimizer.step()
        training.step()
    finished = training.finish()
    trained = effic.read_back(model, module)
    with pytest.raises(CheckFailedError, match=r"breaks the 2:4 pattern in \d+ of"):
        finished.declare(model)
    finished.declare(trained)
    assert set(sparsity.declared(trained)) == {"W", "body..weight", "head.weight"}
    assert sparsity.broken(trained) == []
    path = tmp_path / "trained.onnx"
    effic.optimize(trained, "eliminate-dead-code", output=path, target="portable")
    x_value = torch.randn(3, 16)
    (found,) = start_session(str(path)).run(None, {"x": x_value.numpy()})
    np.testing.assert_allclose(found, module(x_value).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"control_flow"}))
def test_without_training_the_result_is_prune_magnitudes(name: str) -> None:
    """The same weights are chosen, and the same of them stay, in a model from the IR."""
    model = effic.Model(BUILDERS[name]())
    pruned = model.clone()
    effic.run_passes(pruned, effic.parse_passes("prune-magnitude{min_size=0,first_conv=true}"), check="off")
    module = effic.to_module(model)
    finished = STE().attach(module, first_conv=True).finish()
    trained = effic.read_back(model, module)
    undeclared = finished.declare(trained)
    assert sparsity.broken(trained) == []
    assert sparsity.declared(trained) == sparsity.declared(pruned)
    # Weights that the call of a function reads are no weights where that is written.
    assert bool(undeclared) == (name == "functions")
    declared = sparsity.declared(trained)
    kept = [{s.name: s.read() for s in weight_sites(m) if s.name in declared} for m in (trained, pruned)]
    assert kept[0].keys() == kept[1].keys() == declared.keys()
    for weight, array in kept[0].items():
        assert np.array_equal(array, kept[1][weight]), weight


def test_weights_of_loops_and_branches_are_refused() -> None:
    module = effic.to_module(effic.Model(BUILDERS["control_flow"]()))
    with pytest.raises(UnsupportedError, match=r"'loop\.weight' is read by 'loop'"):
        STE().attach(module)


# -- surroundings ---------------------------------------------------------------------------------


# Dynamo makes one of torch's own objects in a way that torch warns about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("recipe", [SRSTE(), BDWP(2, 4), MaskLLM(steps=4)], ids=lambda r: type(r).__name__)
def test_compiled_modules_compute_the_same(recipe: Recipe) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    training = recipe.attach(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        results = []
        for run in (module, compiled):
            x = torch.ones(2, 16, requires_grad=True)
            torch.manual_seed(5)
            y = run(x)
            y.sum().backward()
            results.append([y, x.grad, *(p.grad.clone() for p in training.parameters())])
            module.zero_grad()
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-6)
        training.step()


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: type(r).__name__)
def test_autocast(recipe: Recipe) -> None:
    module = conv_net()
    training = recipe.attach(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(2, 4, 8, 8)).float().square().mean().backward()
    for parameter in training.parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


def test_errors() -> None:
    with pytest.raises(UsageError, match="4:4 is no sparsity pattern"):
        SRSTE(4, 4)
    with pytest.raises(UsageError, match="no power of two away"):
        SdGf(2, 6, total=100)
    with pytest.raises(UsageError, match="too short"):
        SdGf(1, 16, total=4)
    with pytest.raises(UsageError, match="give rho as well"):
        MdGf(unit="epoch")
    with pytest.raises(UsageError, match="MdGf has no kind 'cosine'; there are linear, exp"):
        MdGf(kind="cosine")  # type: ignore[arg-type]
    module = conv_net()
    with pytest.raises(UsageError, match=r"'9.*' matches no weight of the module; they are called 0.weight"):
        STE().attach(module, skip=["9.*"])
    with pytest.raises(
        UnsupportedError, match=r"no weight of the module can be pruned: 'weight' has 3 input"
    ):
        STE().attach(nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match="it has none"):
        STE().attach(nn.ReLU())
    training = STE().attach(module)
    with pytest.raises(UsageError, match="already has a recipe"):
        SRSTE().attach(module)
    with pytest.raises(UsageError, match=r"state of SRSTE\(.*and the recipe is STE\("):
        training.load_state_dict(SRSTE().attach(conv_net()).state_dict())
    training.finish()
    for action in (training.finish, training.step, training.end_epoch, training.masks, training.abandon):
        with pytest.raises(UsageError, match="the recipe is finished, so"):
            action()
    with pytest.raises(UsageError, match="has no masks"):
        finish(module)


def test_diverged_weights_are_not_baked() -> None:
    module = conv_net()
    training = STE().attach(module)
    with torch.no_grad():
        module[7].parametrizations.weight.original[0, 0] = math.nan
    with pytest.raises(CheckFailedError, match=r"weight '7.weight' holds NaN"):
        training.finish()
    with torch.no_grad():
        module[7].parametrizations.weight.original[0, 0] = 0.0
    training.finish()
