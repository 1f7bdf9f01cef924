from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from effic.ir.model import Model
from effic.ir.weights import WeightSite, weight_sites
from effic.passes.quantize import measured_blocks
from effic.passes.quantize.adadim import choose, rounded
from effic.passes.quantize.affine import Grid
from effic.passes.quantize.measured_blocks import find_blocks
from tests.passes.adadim_nets import apply, decoded, output_error, parse, passed, random, run

GATED = """g (float[N,32] x) => (float[N,32] z) WEIGHTS {
    h = Relu (x)
    a = MatMul (h, gate)
    s = Sigmoid (a)
    b = MatMul (h, up)
    c = Mul (s, b)
    y = MatMul (c, down)
    z = Add (y, x)
}"""


def gated() -> dict[str, np.ndarray]:
    return {"gate": random(32, 48), "up": random(32, 48, seed=1), "down": random(48, 32, seed=2)}


def test_gate_and_up_are_judged_at_the_down_projection_one_after_the_other() -> None:
    weights, x = gated(), random(50, 32, seed=9)
    model = parse(GATED, **weights)
    remarks = passed(apply(model, {"x": x}, scope="block", bits=2, group_size=16))
    h = np.maximum(x, 0)

    def module(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        a = (h @ gate).astype(np.float64)
        return ((1 / (1 + np.exp(-a))) * (h @ up)) @ weights["down"]

    def rtn(name: str, axis: Any) -> np.ndarray:
        candidate = rounded(weights[name], axis, 0, Grid(2, 16))
        assert candidate is not None
        return candidate.decode()

    exact = module(weights["gate"], weights["up"])
    gate = {a: float(np.mean((module(rtn("gate", a), weights["up"]) - exact) ** 2)) for a in ("oc", "ic")}
    data = remarks["gate"].data
    assert data["measured_at"] == "y"
    assert {a: data[f"error_{a}"] for a in gate} == pytest.approx(gate, rel=1e-4)
    best = rtn("gate", data["axis"])
    assert data["axis"] == choose(gate)  # type: ignore[arg-type]
    # The reference for the next weight has the first one quantized.
    exact = module(best, weights["up"])
    up = {a: float(np.mean((module(best, rtn("up", a)) - exact) ** 2)) for a in ("oc", "ic")}
    data = remarks["up"].data
    assert {a: data[f"error_{a}"] for a in up} == pytest.approx(up, rel=1e-4)
    # The down projection reads what no other weight reads.
    data = remarks["down"].data
    assert "measured_at" not in data
    exact_input = (1 / (1 + np.exp(-(h @ weights["gate"])))) * (h @ weights["up"])
    assert data["output_error"] == pytest.approx(
        output_error(weights["down"], decoded(model, "down"), exact_input), rel=1e-3
    )


def sites_of(model: Model) -> list[WeightSite]:
    return [s for s in weight_sites(model, ("MatMul", "Gemm", "Conv")) if s.why_not is None]


ATTENTION = """g (float[N,T,32] x, float[N,1,T] mask) => (float[N,T,32] z) WEIGHTS {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    kt = Transpose <perm=[0,2,1]> (k)
    scores = MatMul (q, kt)
    masked = Add (scores, mask)
    p = Softmax <axis=-1> (masked)
    mixed = MatMul (p, v)
    shape = Shape (x)
    back = Reshape (mixed, shape)
    o = MatMul (back, wo)
    z = Add (o, x)
}"""


def test_attention_is_judged_at_its_output_projection() -> None:
    weights = {n: random(32, 32, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
    model = parse(ATTENTION, **weights)
    blocks, reasons = find_blocks(model, sites_of(model))
    (block,) = blocks
    assert not reasons
    assert [s.name for s in block.sites] == ["wq", "wk", "wv"]
    assert block.where == "o"
    assert {v.name for v in block.inputs} == {"x", "mask", "shape"}
    feeds = {"x": random(2, 7, 32), "mask": np.zeros((2, 1, 7), np.float32)}
    for base in ("rtn", "gptq"):
        copy = model.clone()
        found = passed(apply(copy, feeds, scope="block", base=base, select=base, group_size=16))
        assert [r.data.get("measured_at") for r in found.values()] == ["o", "o", "o", None]
        assert np.isfinite(run(copy, **feeds)[0]).all()


def test_blocks_are_judged_in_batches_when_weights_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = gated(), random(20, 32)
    one, many = parse(GATED, **weights), parse(GATED, **weights)
    first = passed(apply(one, {"x": x}, scope="block", group_size=16))
    monkeypatch.setattr(measured_blocks, "_BATCH_BYTES", 1)
    second = passed(apply(many, {"x": x}, scope="block", group_size=16))
    assert {n: r.data for n, r in first.items()} == {n: r.data for n, r in second.items()}


@pytest.mark.parametrize(
    ("body", "outputs", "where", "reason"),
    [
        # Joined by an Add, whose value forks: measured there.
        (
            "c = MatMul (x, a)\n d = MatMul (x, b)\n e = Add (c, d)\n y = Relu (e)\n z = Sigmoid (e)",
            "yz",
            "e",
            "",
        ),
        # At a graph output at the latest.
        ("c = MatMul (x, a)\n d = MatMul (x, b)\n e = Add (c, d)\n y = Relu (e)", "y", "y", ""),
        ("y = MatMul (x, a)\n z = MatMul (x, b)", "yz", "", "do not meet again"),
        (
            "c = MatMul (x, a)\n d = MatMul (x, b)\n z = Relu (d)\n y = Add (c, d)",
            "yz",
            "",
            "do not meet again",
        ),
        ("c = MatMul (x, a)\n d = MatMul (c, b)\n y = Relu (d)", "y", "", ""),
        (
            "c = MatMul (x, a)\n d = MatMul (x, b)\n e = MatMul (c, a2)\n f = MatMul (d, b2)\n"
            " g = MatMul (e, a3)\n y = Add (f, g)",
            "y",
            "",
            "meet only behind 3 other weights",
        ),
        (
            "c = MatMul (x, a)\n d = MatMul (x, b)\n e = MatMul (c, a)\n f = Add (d, e)\n y = Relu (f)",
            "y",
            "",
            "",
        ),
    ],
)
def test_where_paths_meet_is_found_or_the_reason_given(
    body: str, outputs: str, where: str, reason: str
) -> None:
    names = [n for n in ("a", "b", "a2", "b2", "a3") if f", {n})" in body]
    typed = ", ".join(f"float[N,32] {n}" for n in outputs)
    weights = {n: random(32, 32, seed=i) for i, n in enumerate(names)}
    model = parse(f"g (float[N,32] x) => ({typed}) WEIGHTS {{ {body} }}", **weights)
    blocks, reasons = find_blocks(model, sites_of(model))
    assert [b.where for b in blocks] == ([where] if where else [])
    assert bool(reasons) == bool(reason)
    assert all(reason in text for text in reasons.values())
    remarks = passed(apply(model, {"x": random(6, 32)}, scope="block", group_size=16))
    assert len(remarks) == len(names)
    for text in (r.data.get("fallback", "") for r in remarks.values() if reason):
        assert not text or text.startswith("judged at its own output: ")


def test_convolutions_that_share_an_input_are_a_block() -> None:
    model = parse(
        """g (float[N,8,6,6] x) => (float[N,16,6,6] y) WEIGHTS {
            c = Conv <pads=[1,1,1,1], kernel_shape=[3,3]> (x, a)
            r = Relu (c)
            d = Conv <pads=[1,1,1,1], kernel_shape=[3,3]> (r, a2)
            e = Conv <kernel_shape=[1,1]> (x, b)
            s = Add (d, e)
            y = Relu (s)
        }""",
        a=random(16, 8, 3, 3),
        a2=random(16, 16, 3, 3),
        b=random(16, 8, 1, 1),
    )
    x = {"x": random(2, 8, 6, 6)}
    found = passed(apply(model, x, scope="block", kinds=("Conv",), group_size=16))
    assert {n: r.data.get("measured_at") for n, r in found.items()} == {"a": "y", "b": "y", "a2": None}
