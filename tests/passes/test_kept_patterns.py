"""The runner says when a pass breaks a declared sparsity pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.sparsity import Pattern, broken, declared, follows
from effic.ir.weights import weight_sites
from effic.passes.base import Numerics, Pass, Remarks
from effic.passes.pipeline import Checker, PipelineResult, run_passes
from effic.passes.spec import parse_passes

MakeNet = Callable[..., Model]


@dataclass(frozen=True)
class AddToWeights(Pass):
    """Break what is declared.

    Before:  w
    After:   w + 1
    """

    name: ClassVar[str] = "add-to-weights"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def apply(self, model: Model, remarks: Remarks) -> None:
        for site in weight_sites(model):
            if site.name == "v":
                with site.matrix() as matrix:
                    changed = np.array(matrix)
                changed[0, :2] += 1
                changed[1, :2] += 1
                changed[2, :2] += 1
                site.replace(ir.Tensor(changed, name="v"))
                remarks.passed("v", "moved")


def net(make_net: MakeNet) -> Model:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((32, 32)).astype(np.float32) for name in "vwu"}
    return make_net(
        "(float[N,32] x) => (float[N,32] y)",
        "a = MatMul(x, v) b = Relu(a) c = MatMul(b, w) t = Transpose<perm=[1,0]>(u) y = MatMul(c, t)",
        **weights,
    )


def run(model: Model, text: str, *more: Pass) -> PipelineResult:
    return run_passes(model, [*parse_passes(text), *more], checker=Checker(model))


def test_a_pass_that_breaks_a_pattern_is_named_and_the_pattern_is_no_longer_declared(
    make_net: MakeNet, tmp_path: Path
) -> None:
    model = net(make_net)
    result = run(model, "prune-magnitude{min_size=0}", AddToWeights())
    assert set(declared(model)) == {"w", "u"}
    (remark,) = [r for r in result.steps[1].remarks if r.kind == "missed"]
    assert remark.where == "v"
    with next(s for s in weight_sites(model) if s.name == "v").matrix() as v:
        count = int(((v.reshape(8, 4, 32) != 0).sum(axis=1) > 2).sum())
    assert 0 < count <= 2
    assert remark.text == (
        f"breaks the 2:4 pattern of v in {count} of 256 groups; sparsity is no longer declared for it"
    )
    assert remark.data == {"pattern": "2:4", "broken_groups": count, "groups": 256}
    assert result.steps[1].to_dict()["remarks"][-1]["data"]["broken_groups"] == count
    model.save(tmp_path / "m.onnx")
    assert set(declared(read_onnx(tmp_path / "m.onnx"))) == {"w", "u"}


def test_a_weight_that_is_replaced_under_another_name_takes_its_pattern_along(make_net: MakeNet) -> None:
    model = net(make_net)
    run(model, "prune-magnitude{min_size=0},canonicalize-linear,eliminate-dead-code")
    assert len(declared(model)) == 3
    assert not broken(model)
    names = {site.name for site in weight_sites(model)}
    assert set(declared(model)) == names
    assert "u" not in names, "the turned copy has a name of its own; else this test shows nothing"


def test_quantizing_keeps_the_declaration(make_net: MakeNet, tmp_path: Path) -> None:
    model = net(make_net)
    run(model, "prune-magnitude{min_size=0},quantize-rtn{min_size=0,group_size=16}")
    assert set(declared(model)) == {"v", "w", "u"}
    assert not broken(model)
    model.save(tmp_path / "m.onnx")
    again = read_onnx(tmp_path / "m.onnx")
    for site in weight_sites(again):
        assert declared(again)[site.name] == Pattern(2, 4)
        assert follows(site.read(), Pattern(2, 4))


def test_folding_a_norm_scales_rows_and_keeps_the_pattern(make_net: MakeNet) -> None:
    rng = np.random.default_rng(0)
    model = make_net(
        "(float[N,8,6,6] x) => (float[N,16,4,4] y)",
        "a = Conv(x, w) y = BatchNormalization(a, s, b, m, v)",
        w=rng.standard_normal((16, 8, 3, 3)).astype(np.float32),
        **{k: (rng.random(16) + 0.5).astype(np.float32) for k in "sbmv"},
    )
    result = run(model, "prune-magnitude{first_conv=true},fuse-conv-bn")
    assert result.steps[1].passed == 1
    (site,) = weight_sites(model)
    assert declared(model) == {site.name: Pattern(2, 4)}
    assert not broken(model)


def test_a_weight_that_disappears_is_said_to(make_net: MakeNet) -> None:
    model = net(make_net)
    run(model, "prune-magnitude{min_size=0}")

    @dataclass(frozen=True)
    class Bypass(Pass):
        """Leave a layer out.

        Before:  MatMul(b, w)
        After:   b
        """

        name: ClassVar[str] = "bypass"
        numerics: ClassVar[Numerics] = Numerics.LOSSY

        def apply(self, model: Model, remarks: Remarks) -> None:
            node = next(n for n in model.nodes("MatMul") if n.inputs[1] and n.inputs[1].name == "w")
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)

    result = run_passes(model, [Bypass()], checker=Checker(model))
    assert [(r.where, r.text) for r in result.steps[0].remarks] == [
        ("w", "is no weight any more; its 2:4 pattern is no longer declared")
    ]
    assert set(declared(model)) == {"v", "u"}


@pytest.mark.parametrize("check", [True, False])
def test_merging_an_adapter_breaks_the_pattern_and_says_so(
    make_net: MakeNet, tmp_path: Path, write_adapter: Callable[..., str], check: bool
) -> None:
    model = net(make_net)
    rng = np.random.default_rng(1)
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            "m.lora_A.weight": rng.standard_normal((2, 32)).astype(np.float32),
            "m.lora_B.weight": rng.standard_normal((32, 2)).astype(np.float32),
        },
    )
    (tmp_path / "map.txt").write_text("m = w")
    passes = parse_passes(
        f'prune-magnitude{{min_size=0}},merge-lora{{adapters=["{adapter}"],map="{tmp_path / "map.txt"}"}}'
    )
    result = run_passes(model, passes, check="each" if check else "off", checker=Checker(model))
    (remark,) = [r for r in result.steps[1].remarks if "breaks" in r.text]
    assert remark.text.startswith("breaks the 2:4 pattern of w in 256 of 256 groups")
    assert set(declared(model)) == {"v", "u"}
