"""extract-lora: what comes out is an adapter that peft loads and merge-lora merges back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import effic
from effic.extract_lora import decompose
from effic.ir.errors import UsageError
from effic.ir.model import Model, constant_tensor
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes.adapters.adapter_files import read_adapter
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes

RNG = np.random.default_rng(3)


def tune(model: Model, rank: int | None, seed: int = 0) -> Model:
    """A copy with every parameter of floats moved, matrices by something of a rank (None: of any)."""
    rng = np.random.default_rng(seed)
    tuned = model.clone()
    for value in tuned.graph.initializers.values():
        tensor = constant_tensor(value)
        if tensor is None or not tensor.dtype.is_floating_point() or not tensor.shape:
            continue
        array = np.array(tensor.numpy())
        delta = rng.standard_normal(array.shape)
        if rank is not None and array.ndim > 1:
            flat = array.reshape(len(array), -1)
            delta = rng.standard_normal((len(flat), rank)) @ rng.standard_normal((rank, flat.shape[1]))
        scale = 0.01 * np.abs(array).max()
        value.const_value = ir.Tensor(
            (array + scale * delta.reshape(array.shape)).astype(array.dtype), name=value.name
        )
    return tuned


def merged_back(base: Model, folder: Path) -> Model:
    model = base.clone()
    options = f'adapters=["{folder}"]' + (
        f',map="{folder}/lora.map"' if (folder / "lora.map").exists() else ""
    )
    run_passes(model, parse_passes(f"merge-lora{{{options}}}"), check="off")
    return model


@pytest.mark.parametrize("built", ["encoder", "cnn"])
def test_full_rank_there_and_back(built: str, tmp_path: Path) -> None:
    base = Model(BUILDERS[built]())
    tuned = tune(base, None)
    found = effic.extract_lora(base, tuned, tmp_path / "a", rank=10_000)
    assert all(site.error < 1e-5 for site in found.sites)
    read_adapter(tmp_path / "a")
    left_out = {name for name, _ in found.not_covered}
    back = merged_back(base, tmp_path / "a")
    old, new, want = (
        {s.name: s.read() for s in weight_sites(m) if constant_tensor(s.value) is not None}
        for m in (base, back, tuned)
    )
    assert {s.name for s in found.sites} | left_out >= set(old)
    for name in old:
        expected = old[name] if name in left_out else want[name]
        np.testing.assert_allclose(new[name], expected, rtol=0, atol=1e-6 * np.abs(want[name]).max())
    for name in found.replaced:
        tensors = [constant_tensor(m.graph.initializers[name]) for m in (back, tuned)]
        assert np.array_equal(*(t.numpy() for t in tensors if t is not None))


def test_the_rank_that_is_there_is_found(tmp_path: Path) -> None:
    base = Model(BUILDERS["encoder"]())
    tuned = tune(base, 3)
    found = effic.extract_lora(base, tuned, tmp_path / "a", energy=1.0)
    assert {site.rank for site in found.sites} == {3}
    two = effic.extract_lora(base, tuned, tmp_path / "b", rank=2)
    for site in two.sites:
        # Eckart and Young: what is lost is the tail of the energy.
        assert site.error == pytest.approx(np.sqrt(1 - site.energy), rel=1e-2, abs=1e-4)
        assert 0 < site.error < 1
    half = effic.extract_lora(base, tuned, tmp_path / "c", energy=0.9)
    assert all(site.energy >= 0.9 for site in half.sites)
    ranks = {site.path: site.rank for site in half.sites}
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    modules = read_adapter(tmp_path / "c").modules
    assert {path: m.rank for path, m in modules.items()} == ranks
    assert len(set(ranks.values())) == 1 or config["rank_pattern"]
    assert all(m.scaling == 1 for m in modules.values())
    scaled = effic.extract_lora(base, tuned, tmp_path / "d", energy=0.9, alpha=16)
    for path, module in read_adapter(scaled.folder).modules.items():
        assert module.scaling == pytest.approx(16 / ranks[path])
        one = modules[path]
        assert module.a is not None
        assert module.b is not None
        assert one.a is not None
        assert one.b is not None
        delta = one.b.reshape(len(one.b), -1) @ one.a.reshape(len(one.a), -1)
        again = module.scaling * module.b.reshape(len(one.b), -1) @ module.a.reshape(len(one.a), -1)
        np.testing.assert_allclose(again, delta, rtol=0, atol=1e-5 * np.abs(delta).max())


def test_choosing_and_refusing(make_pair, tmp_path: Path) -> None:
    base, tuned = make_pair
    found = effic.extract_lora(base, tuned, tmp_path / "a", rank=2, skip=["*.bias"], include=["up*", "*bias"])
    assert [site.path for site in found.sites] == ["up"]
    assert not found.replaced
    with pytest.raises(UsageError, match="exists"):
        effic.extract_lora(base, tuned, tmp_path / "a", rank=2)
    again = effic.extract_lora(base, tuned, tmp_path / "a", rank=1, force=True)
    assert {m.rank for m in read_adapter(again.folder).modules.values()} == {1}
    for options, text in (
        ({}, "either --rank"), ({"rank": 1, "energy": 0.5}, "either --rank"), ({"rank": 0}, "least is 1"),
        ({"energy": 1.5}, "share"), ({"rank": 1, "alpha": -1.0}, "positive"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=text):
            effic.extract_lora(base, tuned, tmp_path / "b", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="do not differ"):
        effic.extract_lora(base, base.clone(), tmp_path / "b", rank=1)
    with pytest.raises(UsageError, match="same exporter"):
        effic.extract_lora(base, Model(BUILDERS["cnn"]()), tmp_path / "b", rank=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.fixture
def make_pair() -> tuple[Model, Model]:
    w = {
        "up.weight": RNG.standard_normal((6, 8)), "up.bias": RNG.standard_normal(8),
        "down.weight": RNG.standard_normal((8, 4)), "gain": RNG.standard_normal((2, 4)),
    }  # fmt: skip
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 6]))
    v = {k: ir.Value(name=k, const_value=ir.Tensor(a.astype(np.float32), name=k)) for k, a in w.items()}
    for value in v.values():
        assert value.const_value is not None
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(value.const_value.shape.numpy())
    h = ir.node("MatMul", [x, v["up.weight"]], name="up")
    b = ir.node("Add", [h.outputs[0], v["up.bias"]], name="bias")
    d = ir.node("MatMul", [b.outputs[0], v["down.weight"]], name="down")
    g = ir.node("Mul", [d.outputs[0], v["gain"]], name="gain")
    for node in (h, b, d, g):
        node.outputs[0].name = f"{node.name}_out"
    graph = ir.Graph([x], g.outputs, nodes=[h, b, d, g], initializers=list(v.values()),
                     opset_imports={"": 18}, name="g")  # fmt: skip
    base = Model(ir.Model(graph, ir_version=8))
    return base, tune(base, None)


def test_what_no_adapter_can_hold_is_reported(make_pair, tmp_path: Path) -> None:
    base, tuned = make_pair
    found = effic.extract_lora(base, tuned, tmp_path / "a", rank=8)
    assert found.replaced == ["up.bias"]
    assert [name for name, _ in found.not_covered] == ["gain"]
    assert found.parameters == 8 + 6 * 6 + 8 * 6 + 4 * 8 + 4 * 4


def test_a_quantized_base(tmp_path: Path) -> None:
    base = Model(BUILDERS["encoder"]())
    tuned = tune(base, 2)
    run_passes(base, parse_passes("quantize-rtn{bits=8,group_size=32}"), check="off")
    found = effic.extract_lora(base, tuned, tmp_path / "a", rank=4)
    assert found.sites
    assert not any("scale" in name for name, _ in found.not_covered)


@pytest.mark.parametrize("shape", [(1500, 1200), (1200, 1500)])
def test_large_matrices_are_decomposed_without_all_of_their_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    delta = (rng.standard_normal((shape[0], 40)) @ rng.standard_normal((40, shape[1]))).astype(np.float32)
    u, s, vt = decompose(delta, None, 0.999999)
    assert len(s) <= 40
    assert np.linalg.norm(delta - (u * s) @ vt) <= 2e-3 * np.linalg.norm(delta)
    assert np.allclose(u.T @ u, np.eye(len(s)), atol=1e-4)


def test_peft_loads_it(tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(11, 12)
            self.conv = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.norm = torch.nn.LayerNorm(24)
            self.up, self.down = torch.nn.Linear(24, 16), torch.nn.Linear(16, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            picture = self.conv(self.table(ids)[:, None])
            return self.down(self.up(self.norm(picture.flatten(2))).relu())

    torch.manual_seed(0)
    base, tuned = Net().eval(), Net().eval()
    tuned.down.weight.data.copy_(base.down.weight)
    ids = torch.randint(0, 11, (2, 8))
    found = effic.extract_lora(
        effic.capture(base, (ids,)), effic.capture(tuned, (ids,)), tmp_path / "a", rank=99
    )
    assert [site.path for site in found.sites] == ["table", "conv", "up"]
    assert found.unchanged == 1
    assert not found.not_covered
    with torch.no_grad():
        want = tuned(ids)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
        torch.testing.assert_close(loaded(ids), want, rtol=0, atol=1e-5)


def test_the_command(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from effic.cli.main import main

    base = Model(BUILDERS["encoder"]())
    tune(base, 2).save(tmp_path / "tuned.onnx")
    base.save(tmp_path / "base.onnx")
    arguments = ["extract-lora", f"{tmp_path}/base.onnx", f"{tmp_path}/tuned.onnx", "-o", f"{tmp_path}/a"]
    done = CliRunner().invoke(main, [*arguments, "--rank", "4"])
    assert done.exit_code == 0, done.output
    assert "wrote" in done.output
    done = CliRunner().invoke(main, [*arguments, "--energy", "0.9", "--force", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["sites"]
    assert CliRunner().invoke(main, arguments).exit_code == 2
