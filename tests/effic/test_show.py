"""What a model is said to hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import effic
from effic.cli.show import show
from effic.ir.model import Model, PassRecord
from effic.ir.onnx_format import read_onnx
from effic.models import digits_path
from effic.models.builders import BUILDERS
from effic.report.sites import stored_sites
from effic.show import inspect_model


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_every_kind_of_model_is_described(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.onnx"
    Model(BUILDERS[name]()).save(path)
    shown = inspect_model(path)
    assert shown.measurement.file_bytes == path.stat().st_size
    assert sum(row.count for row in shown.ops) == shown.cost.nodes
    assert sum(row.macs for row in shown.ops) == shown.cost.macs
    assert shown.inputs
    assert shown.outputs
    assert shown.sites
    assert all(site.bytes > 0 and site.shape_oi != (0, 0) for site in shown.sites)
    data = json.loads(json.dumps(shown.to_dict()))
    assert data["cost"]["nodes"] == shown.cost.nodes
    assert data["sha256"] == shown.sha256


def test_subgraphs_and_functions_are_counted(tmp_path: Path) -> None:
    Model(BUILDERS["control_flow"]()).save(tmp_path / "c.onnx")
    Model(BUILDERS["functions"]()).save(tmp_path / "f.onnx")
    assert inspect_model(tmp_path / "c.onnx").graphs > 1
    assert inspect_model(tmp_path / "f.onnx").functions > 0


def test_the_most_expensive_comes_first(tmp_path: Path) -> None:
    Model(BUILDERS["llama"]()).save(tmp_path / "m.onnx")
    shown = inspect_model(tmp_path / "m.onnx")
    cost = shown.cost
    shares = [max(n.weight_bytes / cost.weight_bytes, (n.macs or 0) / cost.macs) for n in shown.nodes]
    assert shares == sorted(shares, reverse=True)


def test_how_the_file_was_made_is_told(tmp_path: Path) -> None:
    model = Model(BUILDERS["cnn"]())
    model.record.append(PassRecord("fuse-conv-bn", "0.1.0", 3, 1, 100, 90))
    model.write_record()
    model.save(tmp_path / "m.onnx")
    assert inspect_model(tmp_path / "m.onnx").record == model.record


def test_encodings_are_named(tmp_path: Path) -> None:
    from effic.passes.pipeline import run_passes
    from effic.passes.spec import parse_passes

    model = Model(BUILDERS["encoder"]())
    run_passes(model, parse_passes("quantize-rtn{bits=4,group_size=16}"), check="off")
    model.save(tmp_path / "m.onnx")
    sites = inspect_model(tmp_path / "m.onnx").sites
    encoded = [site for site in sites if site.storage.startswith("4-bit")]
    assert encoded
    assert all("groups of 16 per oc" in site.storage for site in encoded)
    assert all(4 < site.bits < 8 for site in encoded)


@pytest.mark.parametrize(("name", "kind"), [("encoder", "MatMulNBits"), ("llama", "GatherBlockQuantized")])
def test_lowered_weights_are_named_too(tmp_path: Path, name: str, kind: str) -> None:
    from effic.optimize import optimize

    passes = "quantize-rtn{bits=4,group_size=16,embeddings=true,min_size=1,kinds=[MatMul,Gemm,Gather]}"
    optimize(Model(BUILDERS[name]()), passes, output=tmp_path / "m.onnx", check="off")
    shown = inspect_model(tmp_path / "m.onnx")
    lowered = [site for site in shown.sites if site.kind == kind]
    assert lowered
    assert all(site.storage == "4-bit symmetric, blocks of 16" and 4 < site.bits <= 6 for site in lowered)


def test_sparsity_is_shown(tmp_path: Path) -> None:
    """Declared patterns with the density as it is, and zeros that nobody declared."""
    rng = np.random.default_rng(0)
    w, v, u = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(3))
    w[2::4], w[3::4], v[:48] = 0, 0, 0
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("MatMul", ["a", "v"], ["b"]),
            node("MatMul", ["b", "u"], ["y"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["n", 64])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", 64])],
        [onnx.numpy_helper.from_array(a, n) for n, a in (("w", w), ("v", v), ("u", u))],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.helper.set_model_props(proto, {"effic.sparsity": '{"w": "2:4"}'})
    onnx.save(proto, tmp_path / "m.onnx")
    rows = {site.name: (site.pattern, site.density) for site in inspect_model(tmp_path / "m.onnx").sites}
    assert rows == {"w": ("2:4", 0.5), "v": (None, 0.25), "u": (None, 1.0)}
    result = CliRunner().invoke(show, [str(tmp_path / "m.onnx")])
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert ["MatMul", "2:4", "1", "4096", "50.0%"] in lines, result.output
    assert ["MatMul", "none", "1", "4096", "25.0%"] in lines


def test_weights_that_are_decoded_when_loaded_are_weights_and_their_scales_are_not(tmp_path: Path) -> None:
    passes = "fuse-conv-bn,quantize-rtn{bits=4,group_size=16,min_size=0,kinds=[Conv,Gemm]}"
    effic.optimize(digits_path(), passes, output=tmp_path / "low.onnx", check="off", record=False)
    rows = inspect_model(tmp_path / "low.onnx").sites
    assert not [row.name for row in rows if "scales" in row.name or row.kind == "Gather"]
    convolutions = [row for row in rows if row.kind == "Conv"]
    assert len(convolutions) == 8
    assert all(row.decoded and row.storage == "int4, decoded when loaded" for row in convolutions)
    # Codes of 4 bits and a scale for each group of at most 16.
    assert all(4 < row.bits < 16 for row in convolutions)
    stored = {
        row.name: row
        for row in stored_sites(read_onnx(tmp_path / "low.onnx"), inspect_model(tmp_path / "low.onnx"))
    }
    assert {row.name for row in convolutions} <= set(stored)
    printed = CliRunner().invoke(show, [str(tmp_path / "low.onnx")]).output
    assert printed.count("int4, decoded when loaded") == 1
    assert "not to be rewritten" not in printed
