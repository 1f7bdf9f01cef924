"""``effic report`` on real models: every weight is known again, by name or by the node that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

import effic
from effic.report import report
from effic.report.gather import match_sites, read_output, read_source

pytest.importorskip("plotly")


@pytest.mark.parametrize(
    ("model", "passes", "weights"),
    [
        ("mobilenet_v1_075_224", "fuse-conv-bn,quantize-rtn{bits=8,kinds=[Conv,Gemm],min_size=0}", 28),
        ("resnet20_cifar", "fuse-conv-bn,quantize-rtn{bits=4,kinds=[Conv,Gemm,MatMul],min_size=0}", 20),
        ("stories260k", "quantize-rtn{bits=4,group_size=32,min_size=0,embeddings=true}", 36),
    ],
)
def test_every_weight_is_known_again(
    model: str, passes: str, weights: int, data_dir: Path, tmp_path: Path
) -> None:
    source = data_dir / "onnx" / f"{model}.onnx"
    effic.optimize(source, passes, output=tmp_path / "out.onnx", check="off")
    output, original = read_output(tmp_path / "out.onnx")
    assert original is not None
    match_sites(output, read_source(original))
    assert len(output.sites) == weights
    assert all(site.bytes_before and site.bytes_after and site.method == "rtn" for site in output.sites)
    assert all(site.bytes_after < site.bytes_before for site in output.sites)  # type: ignore[operator]
    known = sum(site.bytes_after or 0 for site in output.sites)
    # What is left are biases, tables of cosines, shapes.
    assert 0 <= output.source.shown.cost.weight_bytes - known < 0.3 * output.source.shown.cost.weight_bytes
    nodes = {node[0] for node in output.to_dict()["graph"]["nodes"]}
    assert all(site.node_after in nodes for site in output.sites)


def test_two_builds_of_a_language_model_by_perplexity(data_dir: Path, tmp_path: Path) -> None:
    from effic.guard import Accuracy

    source = data_dir / "onnx" / "stories260k.onnx"
    for bits in (4, 8):
        effic.optimize(source, f"quantize-rtn{{bits={bits},min_size=0}}", output=tmp_path / f"{bits}.onnx")
    written = report(
        [tmp_path / "4.onnx", tmp_path / "8.onnx"],
        tmp_path / "out.html",
        accuracy=Accuracy("perplexity", str(data_dir / "stories" / "ids_eval.npy"), limit=4),
    )
    four, eight = (row["quality"] for row in written.outputs)
    assert 3 < eight < four < 6
