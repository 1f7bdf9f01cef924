"""What a plan promises, held against the run: in processes of their own, within 25 %."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from effic.fit import Need, Room, least_need, misfits
from effic.ir.errors import DoesNotFitError, UsageError
from effic.ir.model import Model
from effic.ir.onnx_format import read_onnx
from effic.ir.weights import WeightSite, weight_sites
from effic.models.large import llama_like_file
from effic.optimize import optimize
from effic.passes.spec import parse_passes
from effic.plan import plan

HERE = Path(__file__).parent
DIGITS = Path(__file__).parents[2] / "models" / "digits.onnx"
CLOSE = 0.25
# Below this a figure is the interpreter's and the allocator's own doing, and tells nothing of the run.
SLACK = 2 << 20


def child(what: str, options: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "planned_run.py"), what, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder of 80 MB with four like layers or more, and token ids for it."""
    folder = tmp_path_factory.mktemp("llama")
    path = llama_like_file(folder / "m.onnx", 0.08, dim=512, hidden=1376, heads=8, vocab=4000)
    ids = folder / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 4000, 4 * 32))
    return path, ids


def held(options: dict[str, Any], tmp_path: Path) -> None:
    """Plan and run, and compare."""
    promised = child("plan", options)
    measured = child("run", {**options, "output": str(tmp_path / "out.onnx")})
    assert promised["file"] == pytest.approx(measured["file"], rel=0.01, abs=2000)
    assert promised["sites"] == measured["sites"]
    # What is said of the model as a whole may count what only the run can count.
    assert promised["missed"][:-1] == pytest.approx(measured["missed"][:-1], abs=1)
    for name in ("memory", "temporary"):
        assert promised[name] == pytest.approx(measured[name], rel=CLOSE, abs=SLACK), name


@pytest.mark.parametrize(
    ("passes", "check"),
    [
        ("fuse-conv-bn,eliminate-dead-code", "each"),
        ('quantize-rtn{bits=8,overrides=["layers.0.*=4"]},eliminate-dead-code', "off"),
        # What the runtime works out of compressed weights and what it keeps of codes are the checks' doing.
        ("prune-magnitude,compress-nm", "each"),
        ("quantize-rtn{bits=8}", "each"),
    ],
)
def test_a_large_model_takes_what_was_promised(
    passes: str, check: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    held({"source": str(llama[0]), "passes": passes, "check": check}, tmp_path)


@pytest.mark.parametrize("passes", ["quantize-gptq"])
def test_calibrated_passes_take_what_was_promised(
    passes: str, llama: tuple[Path, Path], tmp_path: Path
) -> None:
    options = {"source": str(llama[0]), "passes": passes, "check": "off"}
    held({**options, "calib": str(llama[1]), "calib_window": 32}, tmp_path)


def test_merging_an_adapter_takes_what_was_promised(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, rng = tmp_path / "adapter", np.random.default_rng(0)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = (f"base_model.model.layers.{layer}.self_attn.q_proj.lora_" for layer in (0, 1, 2))
    arrays = {
        f"{name}{half}.weight": rng.normal(size=shape).astype(np.float32)
        for name in names
        for half, shape in (("A", (4, 512)), ("B", (512, 4)))
    }
    save_file(arrays, folder / "adapter_model.safetensors")
    held({"source": str(llama[0]), "passes": f"merge-lora{{adapters=[{folder}]}}", "check": "each"}, tmp_path)


def test_weights_of_many_shapes_are_not_all_tried(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effic.rehearsal._kinds", lambda model, items: [[(s.name,)] for s in large(model)])
    few = plan(llama[0], "quantize-rtn", check="off")
    assert any("weights are of 4 kinds or more" in note for note in few.notes)
    monkeypatch.undo()
    alike = plan(llama[0], "quantize-rtn", check="off")
    assert few.file == pytest.approx(alike.file, rel=0.05)
    assert few.steps[0].sites == alike.steps[0].sites


def large(model: Model) -> list[WeightSite]:
    """Weights that the pass would quantize, the largest first."""
    found = [site for site in weight_sites(model, ("MatMul",)) if site.elements > 100_000]
    return sorted(found, key=lambda site: -site.elements)


def test_what_is_kept_to_resume_needs_room_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.onnx"
    monkeypatch.setattr("effic.fit._free", lambda folder: 800_000)
    assert plan(DIGITS, "quantize-easyquant", output=output).misfits == []
    found = plan(DIGITS, "quantize-easyquant{kinds=[Conv,Gemm,MatMul]}", output=output, resume=True)
    assert any(note.startswith("--resume keeps up to 0.") for note in found.notes)
    monkeypatch.setattr("effic.fit._free", lambda folder: found.file + found.temporary + 1000)
    assert plan(DIGITS, "quantize-easyquant{kinds=[Conv,Gemm,MatMul]}", output=output).misfits == []
    assert plan(DIGITS, "quantize-easyquant{kinds=[Conv,Gemm,MatMul]}", output=output, resume=True).misfits


def test_a_small_convolutional_model_takes_what_was_promised(tmp_path: Path) -> None:
    held({"source": str(DIGITS), "passes": "fuse-conv-bn,quantize-int8", "calib": "random"}, tmp_path)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = plan(DIGITS, "quantize-rtn", output=tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []
    assert found.misfits == []
    assert found.seconds["total"] > 0
    assert [row["text"] for row in found.steps[0].missed] == [
        "8 convolution weights left in floating point; name Conv in kinds to quantize them"
    ]


def test_what_makes_no_file_elsewhere_is_tried_without(tmp_path: Path) -> None:
    item = parse_passes(f"merge-lora{{adapters=[a],keep_original={tmp_path / 'kept.safetensors'}}}")[0]
    assert item.rehearsed().keep_original == ""  # type: ignore[attr-defined]


def test_compiling_is_not_planned() -> None:
    with pytest.raises(UsageError, match="cannot be planned"):
        plan(DIGITS, target="tvm-cpu")


GB = 1_000_000_000


@pytest.mark.parametrize(
    ("need", "shared", "says"),
    [
        (Need(5 * GB, GB, GB), False, ["5.00 GB of memory, and 4.00 GB can be had"]),
        (Need(0, 3 * GB, GB), False, ["3.00 GB for the output, and 2.00 GB are free in /out"]),
        (Need(0, GB, 3 * GB), False, ["3.00 GB for temporary files, and 2.00 GB are free in /tmp"]),
        (Need(0, GB, GB + 1), True, ["1.00 GB for the output and 1.00 GB for temporary files on one disk"]),
        (Need(4 * GB, 2 * GB, 2 * GB), False, []),
    ],
)
def test_what_does_not_fit_is_said_with_numbers(need: Need, shared: bool, says: list[str]) -> None:
    found = misfits(need, Room(4 * GB, 2 * GB, 2 * GB, shared, "/out", "/tmp"))
    assert len(found) == len(says)
    assert all(text in phrase for text, phrase in zip(says, found, strict=True))


def test_what_is_not_known_refuses_nothing() -> None:
    assert misfits(Need(GB, GB, GB), Room(None, None, None, False, "/out", "/tmp")) == []


def test_the_least_need_counts_what_passes_keep(llama: tuple[Path, Path]) -> None:
    model = read_onnx(llama[0])
    whole = least_need(model, [], "off").file
    assert least_need(model, parse_passes("quantize-rtn{bits=4}"), "off").file == pytest.approx(whole / 8)
    assert least_need(model, parse_passes("fuse-conv-bn"), "off").file == whole
    assert least_need(model, parse_passes("merge-lora{adapters=[a]}"), "off").file == 0
    assert least_need(model, [], "each").temporary == whole


def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effic.fit.available_memory", lambda: 1000)
    with pytest.raises(DoesNotFitError, match=r"0\.51 MB of memory, and 0\.00 MB can be had.*--no-fit-check"):
        optimize(DIGITS, "fuse-conv-bn", output=tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []
    optimize(DIGITS, "fuse-conv-bn", output=tmp_path / "out.onnx", fit_check=False)
    assert (tmp_path / "out.onnx").exists()
