"""Any model as a torch module: the same numbers, the names kept, and what is refused."""

from __future__ import annotations

import copy
import io

import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.errors import UnsupportedError
from effic.ir.evaluate import Oracle, compare_outputs, runnable_inputs
from effic.ir.model import OPTIONAL_KEY, Model
from effic.ir.torch_capture import capture
from effic.models import builders
from effic.models.sketch import Sketch
from effic.passes.pipeline import run_passes
from effic.passes.spec import parse_passes

torch = pytest.importorskip("torch")

from effic.backends.torch.names import argument_names, state_keys  # noqa: E402
from effic.backends.torch.to_module import RECORD, coverage, to_module  # noqa: E402

BOOL, INT64 = ir.DataType.BOOL, ir.DataType.INT64
BUILDERS = ("cnn", "encoder", "llama", "control_flow", "functions", "shared_weights", "grouped_transposed")
STRAIGHT = tuple(name for name in BUILDERS if name != "control_flow")


def built(name: str, **options) -> Model:
    return Model(getattr(builders, name)(**options))


def arguments(module, inputs):
    return [torch.from_numpy(inputs[name]) for name in module.meta[RECORD].inputs if name in inputs]


def outputs(module, inputs) -> dict[str, np.ndarray]:
    with torch.no_grad():
        got = module(*arguments(module, inputs))
    got = got if isinstance(got, tuple) else (got,)
    return {name: value.numpy() for name, value in zip(module.meta[RECORD].outputs, got, strict=True)}


def assert_equals_oracle(model: Model, module=None, tolerance: float = 1e-5) -> None:
    module = to_module(model) if module is None else module
    inputs, want = runnable_inputs(model, Oracle(model))
    distance = compare_outputs(want, outputs(module, inputs))
    assert distance.shape_mismatch is None
    assert distance.wrong_integers == 0
    assert distance.new_nonfinite == 0
    assert distance.max_rel <= tolerance


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_are_the_oracles(name: str, seed: int) -> None:
    assert_equals_oracle(built(name, seed=seed))


@pytest.mark.parametrize("name", BUILDERS)
def test_train_and_eval_make_no_difference(name: str) -> None:
    model = built(name)
    module = to_module(model).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert_equals_oracle(model, module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_state_dict_keys_are_the_initializers() -> None:
    model = built("cnn")
    module = to_module(model)
    assert set(module.state_dict()) == set(model.graph.initializers)
    parameters = dict(module.named_parameters())
    assert not any("running" in name for name in parameters)
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert {"stem.conv.weight", "stem.bn.weight", "stem.bn.bias"} <= set(parameters)
    frozen = to_module(model, trainable=False)
    assert set(dict(frozen.named_parameters())) == set(parameters)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("name", STRAIGHT)
def test_nothing_is_lost_or_added(name: str) -> None:
    model = built(name)
    module = to_module(model)
    keys = module.meta[RECORD].keys
    assert set(module.state_dict()) == set(keys)
    assert {slot.name for slot in keys.values()} == set(model.graph.initializers)
    renamed = {key: slot.name for key, slot in keys.items() if key != slot.name}
    assert renamed in ({}, {"half_": "half"})  # nn.Module.half


def test_initializers_of_branches_and_bodies_are_in_the_state_dict() -> None:
    model = built("control_flow")
    names = {name for graph in model.graphs() for name in graph.initializers}
    module = to_module(model)
    assert set(module.state_dict()) == names
    assert {"loop.weight", "then.conv.weight", "outer.conv.weight"} <= set(dict(module.named_parameters()))


def test_gradients_flow_through_loops_and_branches() -> None:
    model = built("control_flow")
    module = to_module(model)
    x = torch.ones(2, 3, 8, 8)
    module(x)[0].sum().backward()
    gradients = {name for name, p in module.named_parameters() if p.grad is not None}
    assert {"loop.weight", "loop.bias", "then.conv.weight"} <= gradients
    assert "outer.conv.weight" not in gradients  # the other branch
    module.zero_grad()
    module(-x)[0].sum().backward()
    assert module.get_parameter("outer.conv.weight").grad.abs().sum() > 0


@pytest.mark.parametrize("name", STRAIGHT)
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = built(name)
    assert_equals_oracle(model, _Compiled(to_module(model), fullgraph=True))


def test_compiles_with_graph_breaks_where_values_decide() -> None:
    torch._dynamo.reset()
    model = built("control_flow")
    assert_equals_oracle(model, _Compiled(to_module(model), fullgraph=False))


class _Compiled:
    """A compiled module that still knows its inputs' names."""

    def __init__(self, module, fullgraph: bool) -> None:
        self.meta = module.meta
        self.run = torch.compile(module, backend="eager", fullgraph=fullgraph)

    def __call__(self, *args):
        return self.run(*args)


def test_exports_with_a_dynamic_batch() -> None:
    module = to_module(built("cnn"))
    example = torch.randn(2, 3, 16, 16)
    batch = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(module, (example,), dynamic_shapes=batch)
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program.module()(x), module(x))


def test_deep_copies_and_states_go_to_files() -> None:
    module = to_module(built("encoder"))
    twin = copy.deepcopy(module)
    assert list(twin.state_dict()) == list(module.state_dict())
    assert twin.meta[RECORD] == module.meta[RECORD]
    next(twin.parameters()).data.add_(1)
    assert not torch.equal(next(twin.parameters()), next(module.parameters()))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    inputs, _ = runnable_inputs(built("encoder"), Oracle(built("encoder")))
    assert compare_outputs(outputs(module, inputs), outputs(twin, inputs)).exact


def test_the_module_moves_with_everything_it_makes() -> None:
    """On the meta device: a tensor made on the CPU inside would be an error."""
    for name in STRAIGHT:
        model = built(name)
        module = to_module(model)
        inputs, want = runnable_inputs(model, Oracle(model))
        moved = module.to("meta")
        got = moved(*[argument.to("meta") for argument in arguments(moved, inputs)])
        got = got if isinstance(got, tuple) else (got,)
        assert [tuple(value.shape) for value in got] == [value.shape for value in want.values()]
    assert all(p.device.type == "meta" for p in to_module(built("cnn"), device="meta").parameters())


def test_the_model_is_not_touched() -> None:
    model = built("cnn")
    weight = model.graph.initializers["stem.conv.weight"].const_value.numpy().copy()
    module = to_module(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(model.graph.initializers["stem.conv.weight"].const_value.numpy(), weight)
    assert len(list(model.nodes("Relu"))) == len(list(built("cnn").nodes("Relu")))


@pytest.mark.parametrize(
    "passes",
    [
        "quantize-rtn{bits=4,group_size=16}",
        "quantize-rtn{bits=8}",
        "quantize-easyquant{bits=4}",
        "quantize-rtn{bits=3}",
    ],
)
def test_encoded_weights_run(passes: str) -> None:
    model = built("encoder")
    run_passes(model, parse_passes(passes), check="off")
    assert any(node.op_type == "DequantizeLinear" for node in model.nodes())
    module = to_module(model)
    assert_equals_oracle(model, module)
    assert not any(key.endswith((".codes", ".scales")) for key, _ in module.named_parameters())


# -- names -----------------------------------------------------------------------------------------


def linear_with(name: str, *others: str) -> Model:
    g = Sketch(0)
    h = g.input("input.1", ["N", 4])
    for weight in (name, *others):
        h = g.op("MatMul", h, g.normal(weight, 4, 4, fan_in=4), at="m")
    return Model(g.model(g.output(h, "y", ["N", 4])))


def test_names_that_torch_can_hold_are_kept() -> None:
    names = ["onnx::Conv_12", "a/b", "0.weight", "layers.0.w", "a b", "_x", "é"]
    model = linear_with(*names)
    module = to_module(model)
    assert set(module.state_dict()) == set(names)
    assert_equals_oracle(model, module)
    x = torch.randn(2, 4)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))


@pytest.mark.parametrize(
    "names",
    [("a", "a.b"), ("a.b", "a"), ("a", "a_", "a.b.c"), ("graph", "meta.x"), ("forward.w", "class", "b.def"),
     ("a..b", ".c", "d."), ("training", "weight.parameters.x"), ("a", "a.b", "a.b.c")],
)  # fmt: skip
def test_names_that_collide_are_mapped(names: tuple[str, ...]) -> None:
    model = linear_with(*names)
    module = to_module(model)
    record = module.meta[RECORD]
    assert {slot.name for slot in record.keys.values()} == set(names)
    assert set(record.keys) == set(module.state_dict())
    assert_equals_oracle(model, module)


def test_state_keys_change_as_little_as_can_be() -> None:
    assert state_keys(["a", "a.b", "c"]) == {"a": "a_", "a.b": "a.b", "c": "c"}
    assert state_keys(["a", "a_", "a.b"]) == {"a": "a_1", "a_": "a_", "a.b": "a.b"}
    assert state_keys(["graph"]) == {"graph": "graph_"}


def test_argument_names_are_identifiers() -> None:
    assert argument_names(["x", "input.1", "input_1", "class", "0", "self", "torch"]) == {
        "x": "x", "input.1": "input_1_1", "input_1": "input_1", "class": "input_class", "0": "input_0",
        "self": "input_self", "torch": "input_torch",
    }  # fmt: skip


def test_inputs_by_name() -> None:
    module = to_module(linear_with("w"))
    assert module.meta[RECORD].inputs == {"input.1": "input_1"}
    x = torch.randn(3, 4)
    assert torch.equal(module(input_1=x), module(x))


# -- inputs with defaults, branches, what is known while building -------------------------------------


def test_an_optional_input_has_its_default() -> None:
    g = Sketch(0)
    scale = g.normal("scale", 4, fan_in=4)
    x = g.input("x", ["N", 4])
    model = Model(g.model(g.output(g.op("Mul", x, scale, at="m"), "y", ["N", 4])))
    model.graph.inputs.insert(0, model.graph.initializers["scale"])
    model.ir.metadata_props[OPTIONAL_KEY] = '["scale"]'
    module = to_module(model)
    assert list(module.meta[RECORD].inputs) == ["x", "scale"]
    ones = torch.ones(2, 4)
    torch.testing.assert_close(module(ones)[0], module.get_parameter("scale"))
    torch.testing.assert_close(module(ones, scale=ones[0] * 3), ones * 3)


def test_a_branch_that_is_known_is_taken_while_building() -> None:
    g = Sketch(0)
    x = g.input("x", ["N", 4])
    branches = {}
    for name, operator in (("then_branch", "Relu"), ("else_branch", "Neg")):
        inner = Sketch(g.rng, g.opset, name)
        branches[name] = inner.graph(inner.output(inner.op(operator, x, at=name), f"{name}_out", ["N", 4]))
    # Rank 2: the shape has two entries.
    rank = g.op("Size", g.op("Shape", x, at="s"), at="s")
    y = g.op("If", g.op("Equal", rank, g.scalar("two", 2), at="c"), at="if", **branches)
    model = Model(g.model(g.output(y, "y", ["N", 4])))
    module = to_module(model)
    assert_equals_oracle(model, module)
    called = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert called == [torch.relu]


def test_two_branches_may_name_a_weight_the_same() -> None:
    g = Sketch(0)
    x = g.input("x", [1, 4])
    branches = {}
    for name in ("then_branch", "else_branch"):
        inner = Sketch(g.rng, g.opset, name)
        product = inner.op("MatMul", x, inner.normal("w", 4, 4, fan_in=4), at=name)
        branches[name] = inner.graph(inner.output(product, f"{name}_out", [1, 4]))
    positive = g.op("Greater", g.op("ReduceSum", x, at="c", keepdims=0), g.scalar("zero", 0.0), at="c")
    y = g.op("If", positive, at="if", **branches)
    model = Model(g.model(g.output(y, "y", [1, 4])))
    module = to_module(model)
    assert len(module.state_dict()) == 3
    for sign in (1.0, -1.0):
        x_ = np.full((1, 4), sign, np.float32)
        want = Oracle(model).run({"x": x_})["y"]
        np.testing.assert_allclose(module(torch.from_numpy(x_)).detach().numpy(), want, rtol=1e-5)


def loop_model(trips: bool, stops: bool, ascending: bool = False) -> Model:
    """``h = h * 2`` until a limit of trips, or until its sum is over 100; stacks every ``h``."""
    g = Sketch(0)
    x = g.input("x", [2])
    limit = g.input("limit", [], INT64)
    body = Sketch(g.rng, g.opset, "body")
    iteration = body.input("iteration", [], INT64)
    going = body.input("going", [], BOOL)
    h = body.input("h", [2])
    if ascending:
        h = body.op("Add", h, body.op("Cast", iteration, at="b", to=1), at="b")
    h = body.op("Mul", h, body.scalar("two", 2.0), at="b")
    if stops:
        going = body.op(
            "Less", body.op("ReduceSum", h, at="b", keepdims=0), body.scalar("most", 100.0), at="b"
        )
    inner = body.graph(
        body.output(body.op("Identity", going, at="b"), "going_out", [], BOOL),
        body.output(h, "h_out", [2]),
        body.output(body.op("Identity", h, at="b"), "step", [2]),
    )
    y, steps = g.multi(
        "Loop", limit if trips else None, g.scalar("go", True), x, outputs=2, at="l", body=inner
    )
    return Model(g.model(g.output(y, "y", [2]), g.output(steps, "steps", ["T", 2])))


@pytest.mark.parametrize(
    ("trips", "stops", "limit"),
    [(True, False, 3), (True, False, 0), (True, True, 4), (True, True, 50), (False, True, 9)],
)
def test_loops_stop_when_onnx_says(trips: bool, stops: bool, limit: int) -> None:
    model = loop_model(trips, stops, ascending=True)
    feeds = {"x": np.array([1.0, 2.0], np.float32), "limit": np.array(limit, np.int64)}
    oracle = Oracle(model)
    want = oracle.run({name: feeds[name] for name in oracle.inputs})
    got = to_module(model)(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    for value, name in zip(got, ("y", "steps"), strict=True):
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.detach().numpy(), want[name], rtol=1e-6)


def test_sizes_never_become_tensors() -> None:
    g = Sketch(0)
    x = g.input("x", ["N", "T", 6])
    shape = g.op("Shape", x, at="s")
    batch = g.op("Gather", shape, g.scalar("i0", 0), at="s", axis=0)
    time = g.op("Slice", shape, g.ints("from", 1), g.ints("to", 2), at="s")
    twice = g.op("Mul", time, g.ints("two", 2), at="s")
    batch = g.op("Unsqueeze", batch, g.ints("axis", 0), at="s")
    target = g.op("Concat", batch, twice, g.ints("rest", -1), at="s", axis=0)
    model = Model(g.model(g.output(g.op("Reshape", x, target, at="r"), "y", ["N", "T2", 3])))
    module = to_module(model)
    assert_equals_oracle(model, module)
    assert not [n for n in module.graph.nodes if n.op == "get_attr"]
    assert {str(n.target) for n in module.graph.nodes if n.op == "call_method"} == {"size"}
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    assert compiled(torch.randn(3, 5, 6)).shape == (3, 10, 3)


def test_gradients_reach_statistics_that_are_computed() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv1d(3, 4, 3), torch.nn.BatchNorm1d(4, track_running_stats=False)
    ).eval()
    x = torch.randn(2, 3, 9)
    module = to_module(capture(net, (x,)))
    for one in (net, module):
        one(x).pow(3).sum().backward()
    torch.testing.assert_close(module(x), net(x))
    made = dict(module.named_parameters())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(made[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_half_precision_as_written() -> None:
    for dtype, kind in ((ir.DataType.FLOAT16, torch.float16), (ir.DataType.BFLOAT16, torch.bfloat16)):
        g = Sketch(0)
        x = g.input("x", ["N", 8], dtype)
        values = g.rng.standard_normal((8, 4)).astype(dtype.numpy())
        y = g.op("MatMul", x, g.weight("w", ir.Tensor(values, dtype=dtype, name="w")), at="m")
        model = Model(g.model(g.output(y, "y", ["N", 4], dtype)))
        module = to_module(model)
        assert module.get_parameter("w").dtype == kind
        x_ = torch.randn(3, 8).to(kind)
        want = x_.float() @ torch.from_numpy(values.astype(np.float32))
        assert module(x_).dtype == kind
        torch.testing.assert_close(module(x_).float(), want, rtol=2e-2, atol=2e-2)


# -- what is refused ---------------------------------------------------------------------------------


def test_everything_that_is_missing_is_named_at_once() -> None:
    g = Sketch(0)
    x = g.input("x", ["N", 4])
    h = g.op("Relu", g.op("Fancy", x, at="a", domain="my.own"), at="b")
    h = g.op("Plain", g.op("Fancy", h, at="c", domain="my.own"), at="d", domain="my.own")
    model = Model(g.model(g.output(h, "y", ["N", 4])))
    names = [node.name for node in model.nodes(domain="my.own")]
    missing = coverage(model)
    assert len(missing) == 3
    with pytest.raises(UnsupportedError) as error:
        to_module(model)
    text = str(error.value)
    assert "my.own::Fancy" in text
    assert "my.own::Plain" in text
    assert all(name in text for name in names)
    assert coverage(built("encoder")) == []


def test_strings_are_refused_with_the_node() -> None:
    g = Sketch(0)
    x = g.input("x", ["N"], ir.DataType.STRING)
    y = g.op("Equal", x, x, at="words")
    model = Model(g.model(g.output(y, "y", ["N"], BOOL)))
    with pytest.raises(UnsupportedError, match=r"Equal '.*' has strings"):
        to_module(model)


def test_types_that_torch_has_not_are_refused_by_name() -> None:
    g = Sketch(0)
    x = g.input("x", ["N", 4])
    values = ir.Tensor(np.zeros((4, 4), ir.DataType.FLOAT4E2M1.numpy()), name="tiny")
    y = g.op("MatMul", x, g.op("Cast", g.weight("tiny", values), at="c", to=1), at="m")
    model = Model(g.model(g.output(y, "y", ["N", 4])))
    with pytest.raises(UnsupportedError, match="initializer 'tiny' is of type FLOAT4E2M1"):
        to_module(model)
