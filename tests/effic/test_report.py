"""What a report is made of: rows from records and files, weights known again, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import effic
from effic.cli.main import main
from effic.ir.errors import MissingExtraError, UsageError
from effic.ir.onnx_format import read_onnx
from effic.ir.weights import weight_sites
from effic.models import digits_path
from effic.report import report
from effic.report.gather import Output, match_sites, read_output, read_source
from effic.report.page import SCRIPTS, script_json
from effic.report.rows import passes_of_record
from effic.report.sites import weight_sqnr

pytest.importorskip("plotly")

DIGITS = Path(digits_path())
DATA = DIGITS.with_name("digits_test.npz")
ALL = "fuse-conv-bn,quantize-rtn{bits=8,kinds=[Conv,Gemm],min_size=0}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    effic.optimize(str(DIGITS), "fuse-conv-bn,quantize-rtn{bits=4}", output=folder / "int4.onnx")
    effic.optimize(str(DIGITS), ALL, output=folder / "all8.onnx")
    return folder


def page_data(path: Path) -> dict[str, Any]:
    text = path.read_text()
    start = text.index('<script type="application/json" id="data">') + len(
        '<script type="application/json" id="data">'
    )
    return json.loads(text[start : text.index("</script>", start)])


def gathered(path: Path) -> Output:
    output, original = read_output(path)
    match_sites(output, None if original is None else read_source(original))
    return output


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.output


def test_it_is_one_file_that_names_no_other(built: Path, tmp_path: Path) -> None:
    written = report([built / "int4.onnx"], tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text()
    assert written.bytes == (tmp_path / "out.html").stat().st_size < 6e6
    library = text.index("<script>")
    frame = text[:library]
    assert "default-src &#x27;none&#x27;" in frame
    assert "http" not in frame.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize(
    "passes",
    [
        ALL,
        "quantize-easyquant{min_size=0}",
        "quantize-rtn{bits=3,min_size=0,group_size=32}",
        "fuse-conv-bn,prune-magnitude{n=2,m=4,min_size=0},quantize-rtn{min_size=0}",
    ],
)
def test_every_weight_is_known_again(passes: str, target: str, tmp_path: Path) -> None:
    effic.optimize(str(DIGITS), passes, target=target, output=tmp_path / "out.onnx")
    output = gathered(tmp_path / "out.onnx")
    assert [site.name for site in output.sites] == [site.name for site in weight_sites(read_onnx(DIGITS))]
    for site in output.sites:
        assert site.bytes_before == 4 * site.rows * site.columns
        assert site.bytes_after is not None, site
        assert site.stored is not None
    cost = output.source.shown.cost
    assert 0 <= cost.weight_bytes - sum(site.bytes_after or 0 for site in output.sites) < 8000  # the biases
    told = {
        remark.where: remark.data["sqnr_db"]
        for row in output.passes
        for remark in row.remarks
        if "sqnr_db" in remark.data and row.name.startswith("quantize")
    }
    assert sorted(told.values()) == sorted(s.error_db for s in output.sites if s.error_from == "pass")  # type: ignore[type-var]
    assert told


def test_the_error_of_weights_is_measured_where_no_record_tells(built: Path, tmp_path: Path) -> None:
    effic.optimize(
        str(DIGITS), "quantize-rtn{min_size=0}", target="portable", output=tmp_path / "out.onnx", record=False
    )
    source = read_source(DIGITS)
    output, original = read_output(tmp_path / "out.onnx")
    assert original is None
    match_sites(output, source)
    found = {site.name: site for site in output.sites}
    assert (found["stem.conv.weight"].error_from, found["stem.conv.weight"].equal) == ("weights", True)
    old = {s.name: s for s in weight_sites(read_onnx(DIGITS))}["fc1.weight"].read().astype(np.float64)
    new = {s.name: s for s in weight_sites(read_onnx(tmp_path / "out.onnx"))}["fc1.weight"].read()
    want = 10 * math.log10((old**2).sum() / ((old - new) ** 2).sum())
    assert found["fc1.weight"].error_db == pytest.approx(want)
    assert found["fc1.weight"].error_from == "weights"
    assert any("no record out.effic.json" in note for note in output.notes)
    assert output.known == "file"
    assert [(row.text, row.passed) for row in output.passes] == [("quantize-rtn{min_size=0}", 2)]


def test_weights_in_blocks_give_the_same_ratio(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    model = read_onnx(DIGITS)
    site = {s.name: s for s in weight_sites(model)}["fc1.weight"]
    noisy = effic.Model(model.clone().ir)
    other = {s.name: s for s in weight_sites(noisy)}["fc1.weight"]
    noise = np.random.default_rng(0).normal(scale=0.01, size=other.shape)
    other.replace(
        ir.tensor((other.read() if other.in_axis == 1 else other.read().T) + noise.astype(np.float32))
    )
    other = {s.name: s for s in weight_sites(noisy)}["fc1.weight"]
    whole = weight_sqnr(site, other)
    monkeypatch.setattr("effic.report.sites._BLOCK", 1000)
    assert weight_sqnr(site, other) == pytest.approx(whole)
    assert weight_sqnr(site, site) == math.inf
    assert 10 < whole < 60


def test_a_pass_that_was_undone_says_why_and_counts_for_nothing(tmp_path: Path) -> None:
    step = {
        "name": "quantize-rtn",
        "text": "quantize-rtn{bits=2}",
        "passed": 1,
        "rolled_back": "slower",
        "changed": False,
        "remarks": [
            {"kind": "passed", "where": "fc1.weight", "text": "2 bits", "data": {"method": "rtn", "bits": 2}}
        ],
    }
    speed = {
        "steps": [{"text": "quantize-rtn{bits=2}", "speedup": 0.5, "low": 0.4, "high": 0.6, "kept": False}]
    }
    (row,) = passes_of_record({"steps": [step], "speed": speed})
    assert (row.rolled_back, row.speedup) == ("slower", (0.5, 0.4, 0.6))
    source = read_source(DIGITS)
    output = Output(source, [row], "record", {}, {}, {})
    match_sites(output, source)
    assert all(site.method is None and site.bits == 32 for site in output.sites)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(
            ["steps", "speed", "remarks", "data", "distance", "text", "where", "passed", "kind", "sqnr_db"]
        ),
        inner, max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


@given(
    measured=st.dictionaries(
        st.sampled_from(["steps", "speed", "accuracy", "distance", "verdict"]), json_values
    )
)
def test_a_record_of_anyone_breaks_nothing(measured: dict[str, Any]) -> None:
    for row in passes_of_record(measured):
        json.dumps(dataclasses.asdict(row), allow_nan=False)


@given(text=st.text())
def test_nothing_in_the_data_ends_the_script(text: str) -> None:
    found = script_json({"name": text + "</script><!--"})
    assert "<" not in found
    assert found.isascii()
    assert json.loads(found)["name"] == text + "</script><!--"


def test_a_record_of_another_file_is_left_out(built: Path, tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes((built / "all8.onnx").read_bytes())
    (tmp_path / "out.effic.json").write_bytes((built / "int4.effic.json").read_bytes())
    output, original = read_output(tmp_path / "out.onnx")
    assert (output.known, original) == ("file", None)
    assert any("made for another file" in note for note in output.notes)
    (tmp_path / "out.effic.json").write_text("{")
    output, _ = read_output(tmp_path / "out.onnx")
    assert any("cannot be used" in note for note in output.notes)


def test_another_original_is_said_to_be_one(built: Path, tmp_path: Path) -> None:
    effic.optimize(str(DIGITS), "fuse-conv-bn", output=tmp_path / "other.onnx")
    written = report([built / "int4.onnx"], tmp_path / "out.html", reference=tmp_path / "other.onnx")
    assert "made from another file than other.onnx" in str(written.outputs[0]["notes"])


def test_outputs_are_scored_by_one_metric(built: Path, tmp_path: Path) -> None:
    code, out = run(
        "report", built / "int4.onnx", built / "all8.onnx", "--metric", "top1", "--data", DATA, "--json",
        "-o", tmp_path / "out.html",
    )  # fmt: skip
    assert code == 0, out
    written = json.loads(out)
    assert written["quality"] == "top1"
    data = page_data(tmp_path / "out.html")
    assert data["quality"]["reference"] == pytest.approx(0.9889, abs=1e-3)
    scores = [row["quality"] for row in data["outputs"]]
    assert scores == [row["quality"] for row in written["outputs"]]
    want = effic.compare(DIGITS, built / "int4.onnx", accuracy=effic_accuracy()).accuracy
    assert want is not None
    assert scores[0] == want["after"]["value"]


def effic_accuracy() -> Any:
    from effic.guard import Accuracy

    return Accuracy("top1", str(DATA))


def test_without_a_metric_outputs_are_compared_on_inputs(built: Path, tmp_path: Path) -> None:
    report([built / "int4.onnx", built / "all8.onnx"], tmp_path / "out.html", inputs=DATA)
    data = page_data(tmp_path / "out.html")
    assert data["quality"]["unit"] == "dB"
    assert "digits_test.npz" in data["quality"]["how"]
    low, high = (row["quality"] for row in data["outputs"])
    assert 15 < low < high - 10


def test_times_are_taken_beside_the_original(built: Path, tmp_path: Path) -> None:
    code, out = run("report", built / "int4.onnx", "--time", "-o", tmp_path / "out.html")
    assert code == 0, out
    (row,) = page_data(tmp_path / "out.html")["outputs"]
    assert row["speed"]["speedup"] > 0
    assert row["speed"]["when"] == "for this report"


def test_optimize_writes_a_report(tmp_path: Path) -> None:
    code, out = run(
        "optimize", DIGITS, "--passes", "quantize-rtn{bits=8}", "-o", tmp_path / "out.onnx",
        "--html", tmp_path / "out.html", "--no-record", "--metric", "top1", "--data", DATA,
    )  # fmt: skip
    assert code == 0, out
    assert f"wrote {tmp_path / 'out.html'}" in out
    data = page_data(tmp_path / "out.html")
    (row,) = data["outputs"]
    assert data["reference"]["name"] == "digits.onnx"
    assert [each["text"] for each in row["passes"]] == ["quantize-rtn{bits=8}", "ort-cpu"]
    assert row["passes"][0]["sqnr_db"] > 10
    assert data["quality"]["title"] == "top1"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Missing argument"),
        (["{built}/none.onnx"], "none.onnx"),
        (["{built}/int4.onnx", "{built}/int4.onnx"], "is named twice"),
        (["{built}/int4.onnx", "-o", "{built}/int4.onnx"], "would replace a model's file"),
        (["{built}/int4.onnx", "-o", "{tmp}/no/out.html"], "does not exist; make it first"),
        (["{built}/int4.onnx", "-o", "{tmp}"], "is a folder"),
        (["{built}/int4.onnx", "-o", "/dev/null", "--force"], "is a device, and no file"),
        (["{built}/int4.onnx", "-o", "{built}/int4.effic.json", "--force"], "would replace a model's file"),
        (["{tmp}", "-o", "{tmp}/out.html"], "is a folder, and a report shows .onnx files"),
        (["."], "is a folder, and a report shows .onnx files"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--reference", "{tmp}"], "is a folder, and a report shows"),
        (["{built}/int4.onnx", "-o", "{tmp}/there.html"], "give --force to write over it"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--threads", "2"], "--threads does nothing without --time"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--time", "--threads", "0"], "must be at least 1"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--metric", "top1"], "needs data"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--data", "x.npz"], "without a metric"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--bound", "1"], "No such option"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--inputs", "{tmp}/none.npz"], "none.npz"),
        (["{built}/int4.onnx", "-o", "{tmp}/out.html", "--reference", "{tmp}/none.onnx"], "none.onnx"),
        (["{tmp}/lone.onnx", "-o", "{tmp}/out.html", "--time"], "name it with --reference"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(args: list[str], words: str, built: Path, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "lone.onnx").write_bytes(DIGITS.read_bytes())
    code, out = run("report", *[arg.format(built=built, tmp=tmp_path) for arg in args])
    assert code == 2
    assert words in " ".join(out.split())
    assert (tmp_path / "there.html").read_text() == "mine"
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--html", "{tmp}/out.html"], "give -o out.onnx"),
        (["--html", "{tmp}/out.html", "-o", "{tmp}/out.onnx", "--dry-run"], "without --dry-run"),
        (["--html", "{tmp}/out.onnx", "-o", "{tmp}/out.onnx"], "would replace a model's file"),
        (["--html", "{tmp}/out.effic.json", "-o", "{tmp}/out.onnx"], "would replace a model's file"),
        (["--report", "{tmp}/out.effic.json", "-o", "{tmp}/out.onnx"], "would replace a model's file"),
        (
            ["--html", "{tmp}/a", "-o", "{tmp}/out.tvm", "--target", "tvm-cpu"],
            "writes a folder; leave --html",
        ),
        (["--report", "{tmp}/a", "--html", "{tmp}/a", "-o", "{tmp}/out.onnx"], "both name"),
        (["--report", "/dev/null", "-o", "{tmp}/out.onnx"], "is a device, and no file"),
        (["-o", "/dev/null", "--force"], "is a device, and no file; leave it out"),
    ],
)
def test_optimize_refuses_a_report_before_the_work(args: list[str], words: str, tmp_path: Path) -> None:
    code, out = run("optimize", DIGITS, *[arg.format(tmp=tmp_path) for arg in args])
    assert code == 2
    assert words in " ".join(out.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["bare", "empty weight", "scalar", "subgraph", "function", "names", "NaN"])
def test_models_of_every_form(form: str, tmp_path: Path) -> None:
    name = "\u202eשלום 🙂\x07</script>" + "n" * 1000 if form == "names" else "w"
    shape = {"empty weight": (4, 0), "scalar": ()}.get(form, (4, 4))
    array = np.full(shape, np.nan if form == "NaN" else 0.5, np.float32)
    weight = onnx.numpy_helper.from_array(array, name)
    product = onnx.helper.make_node("Mul" if form == "scalar" else "MatMul", ["x", name], ["y"], name=name)
    nodes, constants, functions, opsets = [product], [weight], [], [onnx.helper.make_opsetid("", 20)]
    out = onnx.helper.make_tensor_value_info("y", 1, None)
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [1, 4])]
    if form == "bare":
        nodes, constants, out = [], [], inputs[0]
    elif form == "subgraph":
        branches = {key: onnx.helper.make_graph(nodes, key, [], [out], constants) for key in ("then", "else")}
        given = {f"{key}_branch": branch for key, branch in branches.items()}
        nodes, constants = [onnx.helper.make_node("If", ["c"], ["y"], **given)], []
        inputs.append(onnx.helper.make_tensor_value_info("c", 9, []))
    elif form == "function":
        inner = [onnx.helper.make_node("Constant", [], [name], value=weight), product]
        functions = [onnx.helper.make_function("own", "F", ["x"], ["y"], inner, opsets)]
        nodes, constants = [onnx.helper.make_node("F", ["x"], ["y"], domain="own")], []
        opsets = [*opsets, onnx.helper.make_opsetid("own", 1)]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [out], constants)
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.save(made, tmp_path / "out.onnx")
    onnx.save(made, tmp_path / "in.onnx")
    report([tmp_path / "out.onnx"], tmp_path / "out.html", reference=tmp_path / "in.onnx")
    (row,) = page_data(tmp_path / "out.html")["outputs"]
    # Weights of one name in two branches share a row, with the bytes of both.
    weights = {"bare": [], "scalar": [], "empty weight": [(name, 0)], "subgraph": [(name, 128)]}
    found = [(site["name"], site["bytes_after"]) for site in row["sites"]]
    assert found == weights.get(form, [(name, 64)])
    assert row["graph"]["hidden"] == {"subgraph": 2, "function": 1}.get(form, 0)


def test_a_missing_library_is_one_sentence(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'effic\[report\]'"):
        report([built / "int4.onnx"], tmp_path / "out.html")
    assert run("report", built / "int4.onnx", "-o", tmp_path / "out.html")[0] == 3
    with pytest.raises(UsageError, match="nothing to report on"):
        report([], tmp_path / "out.html")


def test_scripts_make_no_markup_of_texts() -> None:
    from importlib.resources import files

    for name in SCRIPTS:
        text = files("effic.report").joinpath("assets", name).read_text()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "http:",
            "https:",
        ):
            assert word not in text.replace("http://www.w3.org/2000/svg", ""), f"{name}: {word}"
        assert len(text.splitlines()) < 600
