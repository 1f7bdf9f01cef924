"""fuse-lora-branches: parallel linear branches in any order and form, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.ir.evaluate import Oracle
from effic.ir.model import Model, constant_array
from effic.passes.adapters.fuse_lora_branches import FuseLoRABranches
from effic.passes.base import Remarks
from effic.passes.pipeline import Checker, run_passes
from effic.passes.spec import parse_passes

X = "(float[N,6] x) => (float[N,5] y)"
RNG = np.random.default_rng(0)


def w(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) / 2).astype(dtype)


def count(model: Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in model.nodes():
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def reason(remarks: Remarks) -> str:
    assert not remarks.count("passed")
    assert remarks.count("missed") == 1
    return remarks.items[0].text


# Three consecutive places a scale or something harmless can be put, and the order of the sum.
PLACES = ("", "Mul({}, s)", "Mul(s, {})", "Div({}, s)", "Identity({})", "Dropout({})", "Neg({})")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    places=st.lists(st.sampled_from(PLACES), min_size=4, max_size=4),
    base=st.sampled_from(
        [
            "MatMul(x, w)",
            "Gemm<transB=1, alpha=0.5>(x, wt)",
            "Gemm(x, w, bias)",
            "Add(MatMul(x, w), bias)",
            "Add(bias, MatMul(x, w))",
            "MatMul(x, Transpose<perm=[1,0]>(wt))",
            "Mul(MatMul(x, w), s)",
        ]
    ),
    first=st.sampled_from(
        [
            "MatMul({}, a)",
            "Gemm<transB=1>({}, at)",
            "Gemm<beta=2.0>({}, a, abias)",
            "Add(MatMul({}, a), abias)",
        ]
    ),
    second=st.sampled_from(["MatMul({}, b)", "Gemm<alpha=3.0>({}, b)", "Add(MatMul({}, b), bias2)"]),
    swap=st.booleans(),
)
def test_any_form_gives_the_same_numbers(
    places: list[str], base: str, first: str, second: str, swap: bool
) -> None:
    import onnx.parser
    from onnx import numpy_helper

    lines: list[str] = []

    def emit(expression: str) -> str:
        """Nested calls, one line each."""
        depth, inner = 0, expression
        while inner.count("(") > 1:
            close = inner.index(")")
            start = max(
                inner.rfind(" ", 0, inner.rfind("(", 0, close)),
                inner.rfind("(", 0, inner.rfind("(", 0, close)),
            )
            call = inner[start + 1 : close + 1]
            name = f"v{len(lines)}"
            lines.append(f"{name} = {call}")
            inner = inner[: start + 1] + name + inner[close + 1 :]
            depth += 1
        name = f"v{len(lines)}"
        lines.append(f"{name} = {inner}")
        return name

    def put(place: str, value: str) -> str:
        return emit(place.format(value)) if place else value

    base = base.replace(", alpha=0.5", ",alpha=0.5").replace("Transpose<perm=[1,0]>", "Transpose")
    one = emit(base)
    value = put(places[0], "x")
    value = put(places[1], emit(first.format(value)))
    value = put(places[2], emit(second.format(value)))
    value = put(places[3], value)
    body = (
        "\n".join(lines) + f"\ny = Add({value}, {one})"
        if swap
        else "\n".join(lines) + f"\ny = Add({one}, {value})"
    )
    text = f'<ir_version: 8, opset_import: ["": 18]> g (double[N,6] x) => (double[N,5] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    arrays = {
        "w": w(6, 5), "wt": w(5, 6), "bias": w(5), "bias2": w(5) + 1, "abias": w(2), "a": w(6, 2),
        "at": w(2, 6), "b": w(2, 5), "s": np.array([1.7]),
    }  # fmt: skip
    for name, array in arrays.items():
        if any(
            name in line.replace("(", ",").replace(")", ",").replace(" ", "").split(",") for line in lines
        ):
            proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float64), name))
    model = Model(ir.from_proto(proto))
    feeds = {"x": RNG.standard_normal((3, 6))}
    want = Oracle(model).run(feeds)["y"]
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert remarks.count("passed") == 1, (remarks.items, lines)
    got = Oracle(model).run(feeds)["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    assert count(model).get("MatMul", 0) + count(model).get("Gemm", 0) == 1
    assert not {"a", "b", "at"} & set(model.graph.initializers)
    again = Remarks()
    FuseLoRABranches().apply(model, again)
    assert not again.items


def test_the_usual_form_keeps_the_name_of_the_weight(make_net, check) -> None:
    model = make_net(
        X, "h = MatMul(x, w) a1 = MatMul(x, a) b1 = MatMul(a1, b) c = Mul(b1, s) y = Add(h, c)",
        w=w(6, 5), a=w(6, 2), b=w(2, 5), s=np.float32(4),
    )  # fmt: skip
    remarks = check(model, FuseLoRABranches())
    assert list(model.graph.initializers) == ["w"]
    assert count(model) == {"MatMul": 1}
    assert remarks.items[0].data["rank"] == 2
    np.testing.assert_allclose(
        constant_array(model.graph.initializers["w"]), w(6, 5) + 4 * w(6, 2) @ w(2, 5), rtol=1e-5
    )


def test_nothing_learned_leaves_every_bit(make_net, check) -> None:
    weight = w(6, 5)
    weight[0, 0] = -0.0
    model = make_net(
        X, "h = MatMul(x, w) a1 = MatMul(x, a) c = MatMul(a1, b) y = Add(h, c)",
        w=weight, a=w(6, 2), b=np.zeros((2, 5), np.float32),
    )  # fmt: skip
    check(model, FuseLoRABranches())
    found = constant_array(model.graph.initializers["w"])
    assert found is not None
    assert found.tobytes() == weight.tobytes()
    assert count(model) == {"MatMul": 1}


def test_several_branches_and_other_terms(make_net, check) -> None:
    model = make_net(
        "(float[N,6] x, float[N,5] r) => (float[N,5] y)",
        """p = MatMul(x, a) q = MatMul(p, b) h = MatMul(x, w) t = Add(q, r)
        u = MatMul(x, c) v = MatMul(u, d) hb = Add(h, bias) s1 = Add(t, hb) n = MatMul(x, w2)
        s2 = Add(v, s1) y = Sum(s2, n, r)""",
        w=w(6, 5), a=w(6, 2), b=w(2, 5), c=w(6, 3), d=w(3, 5), bias=w(5), w2=w(6, 5) + 1,
    )  # fmt: skip
    remarks = check(model, FuseLoRABranches())
    assert remarks.count("passed") == 3
    assert count(model)["MatMul"] == 1


def test_casts_of_half_precision_adapters(make_net, check) -> None:
    model = make_net(
        X,
        """xh = Cast<to=10>(x) a1 = MatMul(xh, a) b1 = MatMul(a1, b) c = Cast<to=1>(b1)
        h = MatMul(x, w) y = Add(h, c)""",
        w=w(6, 5), a=w(6, 2, dtype=np.float16), b=np.full((2, 5), 1e-3, np.float16),
    )  # fmt: skip
    run_passes(model, [FuseLoRABranches()], checker=Checker(model))
    assert count(model) == {"MatMul": 1}


@pytest.mark.parametrize("attributes", ["", "<pads=[1,1,1,1], strides=[2,2]>", '<auto_pad="SAME_UPPER">'])
def test_convolutions(make_net, check, attributes: str) -> None:
    model = make_net(
        "(float[N,3,7,7] x) => (float[N,4,H,W] y)",
        f"""h = Conv{attributes}(x, w, bias) a1 = Conv{attributes}(x, a, abias) b1 = Conv(a1, b)
        c = Mul(b1, s) y = Add(h, c)""",
        w=w(4, 3, 3, 3), bias=w(4), a=w(2, 3, 3, 3), abias=w(2), b=w(4, 2, 1, 1), s=np.float32(0.5),
    )  # fmt: skip
    assert check(model, FuseLoRABranches()).count("passed") == 1
    assert count(model) == {"Conv": 1, "Add": 1}


@pytest.mark.parametrize(
    ("base", "a", "b", "text"),
    [
        ("<pads=[1,1,1,1]>", "", "", "differ in kernel"),
        ("<strides=[2,2]>", "", "<strides=[2,2]>", "differ in kernel"),
        ("", "", "<pads=[1,1,1,1]>", "plain 1x1"),
        ("<group=2>", "<group=2>", "", "groups"),
    ],
)
def test_convolutions_that_do_not_fit(make_net, base: str, a: str, b: str, text: str) -> None:
    groups = 2 if "group" in base else 1
    model = make_net(
        "(float[N,4,7,7] x) => (float[N,4,H,W] y)",
        f"h = Conv{base}(x, w) a1 = Conv{a}(x, a) b1 = Conv{b}(a1, b) y = Add(h, b1)",
        w=w(4, 4 // groups, 3, 3), a=w(2, 4 // groups, 3, 3), b=w(4, 2, 1, 1),
    )  # fmt: skip
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert text in reason(remarks)


def test_embeddings(make_net, check) -> None:
    model = make_net(
        "(int64[N,S] ids) => (float[N,S,5] y)",
        "h = Gather(e, ids) t = Transpose(a) a1 = Gather(t, ids) c = MatMul(a1, b) d = Mul(c, s) y = Add(h, d)",
        e=w(9, 5), a=w(2, 9), b=w(2, 5), s=np.float32(2),
    )  # fmt: skip
    assert check(model, FuseLoRABranches()).count("passed") == 1
    assert count(model) == {"Gather": 1}


def test_stacks_of_matrices(make_net, check) -> None:
    signature = "(float[3,N,6] x) => (float[3,N,5] y)"
    body = "h = MatMul(x, w) a1 = MatMul(x, a) b1 = MatMul(a1, b) y = Add(h, b1)"
    model = make_net(signature, body, w=w(3, 6, 5), a=w(3, 6, 2), b=w(3, 2, 5))
    assert check(model, FuseLoRABranches()).count("passed") == 1
    model = make_net(signature, body, w=w(3, 6, 5), a=w(6, 2), b=w(3, 2, 5))
    assert check(model, FuseLoRABranches()).count("passed") == 1
    model = make_net(signature, body, w=w(6, 5), a=w(3, 6, 2), b=w(3, 2, 5))
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert "does not fit" in reason(remarks)


def test_a_shared_weight_is_copied(make_net, check) -> None:
    model = make_net(
        "(float[N,5] x) => (float[N,5] y)",
        "h = MatMul(x, w) a1 = MatMul(x, a) b1 = MatMul(a1, b) s = Add(h, b1) y = MatMul(s, w)",
        w=w(5, 5), a=w(5, 2), b=w(2, 5),
    )  # fmt: skip
    remarks = check(model, FuseLoRABranches())
    assert "a copy of its own" in remarks.items[0].text
    found = constant_array(model.graph.initializers["w"])
    assert found is not None
    assert found.tobytes() == w(5, 5).tobytes()
    assert len(model.graph.initializers) == 2


@pytest.mark.parametrize(
    ("signature", "body", "text"),
    [
        ("(float[N,6] x, float[6,2] a)", "a1 = MatMul(x, a) c = MatMul(a1, b)", "graph input 'a'"),
        ("(float[N,6] x, float[2,6] at)", "t = Transpose(at) a1 = MatMul(x, t) c = MatMul(a1, b)", "'at'"),
        ("(float[N,6] x, float[1] s)", "a1 = MatMul(x, a) b1 = MatMul(a1, b) c = Mul(b1, s)", "input 's'"),
        ("(float[N,6] x)", "a1 = MatMul(x, a) r = Relu(a1) c = MatMul(r, b)", "Relu"),
        ("(float[N,6] x, float[N,6] z)", "a1 = MatMul(z, a) c = MatMul(a1, b)", "different inputs"),
        ("(float[N,6] x)", "a1 = MatMul(x, a) b1 = MatMul(a1, b) c = Mul(b1, v)", "5 values"),
        ("(float[N,6] x)", "a0 = Add(x, u) a1 = MatMul(a0, a) c = MatMul(a1, b)", "shifts its input"),
    ],
)
def test_what_is_left_alone(make_net, signature: str, body: str, text: str) -> None:
    used = {name: array for name, array in
            {"w": w(6, 5), "a": w(6, 2), "b": w(2, 5), "v": w(5), "u": w(6)}.items()
            if f"{name})" in body or name == "w"}  # fmt: skip
    if "float[6,2] a" in signature:
        used.pop("a")
    model = make_net(f"{signature} => (float[N,5] y)", f"h = MatMul(x, w) {body} y = Add(h, c)", **used)
    before = model.clone()
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert text in reason(remarks)
    assert count(model) == count(before)


@pytest.mark.parametrize("tapped", ["h", "a1", "c"])
def test_a_tensor_that_is_read_elsewhere(make_net, tapped: str) -> None:
    model = make_net(
        "(float[N,6] x) => (float[N,5] y, float[N,K] z)",
        f"h = MatMul(x, w) a1 = MatMul(x, a) c = MatMul(a1, b) y = Add(h, c) z = Relu({tapped})",
        w=w(6, 5), a=w(6, 2), b=w(2, 5),
    )  # fmt: skip
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert "read elsewhere" in reason(remarks)


def test_a_quantized_base_is_left_to_merge_lora(make_net) -> None:
    model = make_net(
        "(float[N,64] x) => (float[N,32] y)",
        "h = MatMul(x, w) a1 = MatMul(x, a) c = MatMul(a1, b) y = Add(h, c)",
        opset=21, w=w(64, 32), a=w(64, 2), b=w(2, 32),
    )  # fmt: skip
    run_passes(model, parse_passes("quantize-rtn{bits=8,group_size=32}"), check="off")
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert "requantize" in remarks.items[0].text


def test_inside_functions_and_branches(make_net, check) -> None:
    function = """<domain: "f", opset_import: ["": 18]> layer (x) => (y) {
        w = Constant<value = float[2,2] {1.0, 2.0, 3.0, 4.0}>() a = Constant<value = float[2,1] {1.0, 2.0}>()
        b = Constant<value = float[1,2] {3.0, 4.0}>()
        h = MatMul(x, w) a1 = MatMul(x, a) c = MatMul(a1, b) y = Add(c, h) }"""
    model = make_net("(float[N,2] x) => (float[N,2] y)", "y = f.layer(x)", functions=function)
    assert check(model, FuseLoRABranches()).count("passed") == 1
    model = make_net(
        "(float[N,6] x, bool k) => (float[N,5] y)",
        """y = If (k) <then_branch = t () => (float[N,5] o) {
            h = MatMul(x, w) a1 = MatMul(x, a) c = MatMul(a1, b) o = Add(h, c) },
            else_branch = e () => (float[N,5] p) { p = MatMul(x, w) }>""",
        w=w(6, 5), a=w(6, 2), b=w(2, 5),
    )  # fmt: skip
    remarks = check(model, FuseLoRABranches())
    assert "a copy of its own" in remarks.items[0].text


def test_overflow_in_half_precision_is_refused(make_net) -> None:
    model = make_net(
        "(float16[N,6] x) => (float16[N,5] y)",
        "h = MatMul(x, w) a1 = MatMul(x, a) c = MatMul(a1, b) y = Add(h, c)",
        w=w(6, 5, dtype=np.float16), a=np.full((6, 2), 300, np.float16), b=np.full((2, 5), 300, np.float16),
    )  # fmt: skip
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert "overflow" in reason(remarks)


def test_attention_with_relative_positions_is_not_touched(make_net) -> None:
    model = make_net(
        "(float[N,6] q, float[6,5] k, float[6,5] r) => (float[N,5] y)",
        "h = MatMul(q, k) c = MatMul(q, r) y = Add(h, c)",
    )
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert remarks.count("missed") == 1


def test_a_captured_model_with_peft_adapters_beside_its_layers() -> None:
    """What torch exports of an unmerged peft model becomes what peft merges."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from effic.ir.torch_capture import capture

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(11, 12)
            self.conv = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.up, self.down = torch.nn.Linear(24, 16), torch.nn.Linear(16, 5, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            picture = self.conv(self.table(ids)[:, None])
            return self.down(self.up(picture.flatten(2)).relu())

    torch.manual_seed(0)
    names = ["table", "conv", "up", "down"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, lora_dropout=0.1)
    tuned = peft.get_peft_model(Net(), config).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(0, 11, (2, 8))
    model = capture(tuned, (ids,))
    remarks = Remarks()
    FuseLoRABranches().apply(model, remarks)
    assert remarks.count("passed") == 4
    assert not remarks.count("missed")
    assert not any("lora" in name for name in model.graph.initializers)
    (name,) = [v.name for v in model.graph.inputs]
    (got,) = Oracle(model).run({name: ids.numpy()}).values()
    with torch.no_grad():
        want = tuned.merge_and_unload()(ids).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
