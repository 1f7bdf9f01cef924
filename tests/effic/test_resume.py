"""A run that is interrupted and goes on makes the same bytes, and does nothing twice."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effic.guard import Accuracy
from effic.ir.errors import UsageError
from effic.ir.onnx_format import read_onnx
from effic.ir.safetensors_format import read_safetensors, write_safetensors
from effic.ir.weights import weight_sites
from effic.optimize import Report, optimize
from effic.passes.adapters.merge_lora import MergeLora
from effic.passes.finished import FinishedSites, Store, _digest
from effic.passes.statistics import Accumulator, RangeAccumulator
from effic.record import get_build
from effic.resume import identity
from tests.effic.test_killed import chain

LAYERS, WIDTH = 4, 64
GPTQ = "quantize-gptq{group_size=32}"


class Stopped(Exception):
    """What ends a run in the middle."""


Count = Callable[..., list[int]]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """``count("module:function", stop=3)`` counts its calls, and ends the run before the fourth."""

    def counted(name: str) -> list[int]:
        module, _, function = name.partition(":")
        place = importlib.import_module(f"effic.{module}")
        real, seen = getattr(place, function), [0, sys.maxsize]

        def called(*args: Any, **named: Any) -> Any:
            if seen[0] >= seen[1]:
                raise Stopped
            seen[0] += 1
            return real(*args, **named)

        monkeypatch.setattr(place, function, called)
        return seen

    return counted


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """``job("passes", "out.onnx")`` optimizes a chain of matrices in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    chain(Path("in.onnx"), 0, layers=LAYERS, width=WIDTH)
    rows = np.random.default_rng(1).standard_normal((64, WIDTH)).astype(np.float32)
    np.savez("calib.npz", h0=rows)

    def run(passes: str, output: str, **options: Any) -> Report:
        options.setdefault("calib", "calib.npz")
        return optimize("in.onnx", passes, output=output, **options)

    return run


def stop(seen: list[int], after: int | None) -> None:
    """Count from zero, and end a run after so many calls."""
    seen[:] = [0, sys.maxsize if after is None else after]


LONG = {
    "quantize-gptq{group_size=32}": "passes.quantize.quantize_gptq:gptq",
    "quantize-gptq{group_size=32,propagate=false,symmetric=false,bits=3}": "passes.quantize.quantize_gptq:gptq",
    "quantize-adadim{group_size=32}": "passes.quantize.quantize_adadim:decide",
    "quantize-adadim{group_size=32,base=gptq,scope=block}": "passes.quantize.quantize_adadim:decide",
    "quantize-easyquant{bits=8}": "passes.quantize.quantize_easyquant:easyquant",
    "quantize-easyquant": "passes.quantize.quantize_easyquant:easyquant",
    "quantize-awq{group_size=32}": "passes.quantize.quantize_awq:search",
    "prune-sparsegpt": "passes.sparsify.prune_sparsegpt:sparsegpt",
    "prune-sparsegpt{density=0.4}": "passes.sparsify.prune_sparsegpt:sparsegpt",
    "prune-wanda": "passes.sparsify.prune_wanda:prune",
    "permute-channels{escape_attempts=0}": "passes.sparsify.permute_channels:search",
    "permute-channels{score=wanda,escape_attempts=0}": "passes.sparsify.permute_channels:search",
}


@pytest.mark.parametrize("text", LONG)
def test_weights_that_are_done_are_not_done_again(
    text: str, job: Callable[..., Report], count: Count
) -> None:
    data_free = text.startswith("quantize-easyquant") or text == "permute-channels{escape_attempts=0}"
    options: dict[str, Any] = {"calib": None} if data_free else {}
    seen = count(LONG[text])
    plain = job(text, "plain.onnx", **options)
    whole = seen[0]
    assert whole >= LAYERS - 1
    after = whole // 2
    stop(seen, after)
    with pytest.raises(Stopped):
        job(text, "out.onnx", resume=True, **options)
    assert not Path("out.onnx").exists()
    stop(seen, None)
    resumed = job(text, "out.onnx", resume=True, **options)
    assert seen[0] == whole - after
    assert resumed.steps[0].resumed == after
    assert Path("out.onnx").read_bytes() == Path("plain.onnx").read_bytes()
    assert get_build(read_onnx("out.onnx")) == get_build(read_onnx("plain.onnx"))
    assert [r for r in resumed.steps[0].remarks if r.kind == "passed"] == [
        r for r in plain.steps[0].remarks if r.kind == "passed"
    ]
    assert any(f"{after} " in note and "resuming: 0 of 1 passes" in note for note in resumed.notes)
    assert not Path("out.onnx.progress").exists()


def test_nothing_is_gathered_or_run_for_what_is_done(
    job: Callable[..., Report], count: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = "prune-sparsegpt,eliminate-identities,quantize-gptq{group_size=32}"
    seen, runs = count("passes.quantize.quantize_gptq:gptq"), count("passes.pipeline:Oracle")
    made: list[int] = []
    begin = Accumulator.__init__
    monkeypatch.setattr(
        Accumulator, "__init__", lambda self, *a, **k: (made.append(1), begin(self, *a, **k))[1]
    )
    job(passes, "plain.onnx")
    assert len(made) == 2 * LAYERS
    oracles = runs[0]
    stop(seen, 2)
    with pytest.raises(Stopped):
        job(passes, "out.onnx", resume=True)
    made.clear()
    stop(seen, None)
    stop(runs, None)
    report = job(passes, "out.onnx", resume=True)
    assert len(made) == LAYERS - 2, "of two weights that GPTQ was done with, and all of SparseGPT, nothing"
    assert runs[0] == oracles - 2, "the outputs after the first two passes were known"
    assert [step.resumed for step in report.steps] == [LAYERS, 0, 2, None]
    assert Path("out.onnx").read_bytes() == Path("plain.onnx").read_bytes()
    assert f"resuming: 2 of 3 passes, 2 of {LAYERS} sites of quantize-gptq were done" in report.notes


def test_ranges_are_measured_once(job: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effic.passes.calibration.PART_BYTES", 1 << 14)
    text = "quantize-int8{bias_correction=false}"
    made: list[int] = []
    begin = RangeAccumulator.__init__

    def counted(self: RangeAccumulator, bins: int) -> None:
        if len(made) >= stopped:
            raise Stopped
        made.append(1)
        begin(self, bins)

    stopped = sys.maxsize
    monkeypatch.setattr(RangeAccumulator, "__init__", counted)
    job(text, "plain.onnx")
    whole, stopped = len(made), len(made) // 2
    assert whole >= LAYERS
    made.clear()
    with pytest.raises(Stopped):
        job(text, "out.onnx", resume=True)
    kept = len(list(Path("out.onnx.progress").glob("01-*.kept")))
    assert 0 < kept <= stopped
    made.clear()
    stopped = sys.maxsize
    job(text, "out.onnx", resume=True)
    assert len(made) == whole - kept
    assert Path("out.onnx").read_bytes() == Path("plain.onnx").read_bytes()


# -- other runs are not continued ------------------------------------------------------------------


@pytest.fixture
def begun(job: Callable[..., Report], count: Count) -> Callable[..., Report]:
    """A run of GPTQ that was stopped after two weights; calling it goes on."""
    seen = count("passes.quantize.quantize_gptq:gptq")
    stop(seen, 2)
    with pytest.raises(Stopped):
        job("quantize-gptq{group_size=32}", "out.onnx", resume=True)
    stop(seen, None)

    def go_on(passes: str = "quantize-gptq{group_size=32}", **options: Any) -> Report:
        return job(passes, "out.onnx", resume=True, **options)

    go_on.seen = seen  # type: ignore[attr-defined]
    return go_on


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seed": 3}, "seed was 0 and is 3"),
        (
            {"passes": "quantize-gptq{group_size=16}"},
            "its passes were 'quantize-gptq{group_size=32}' and are",
        ),
        ({"target": "portable"}, "target was 'ort-cpu' and is 'portable'"),
        ({"check": "final"}, "check was 'each' and is 'final'"),
        ({"calib_samples": 8}, "the calibration data are others"),
        ({"inputs": {"h0": np.ones((2, WIDTH), np.float32)}}, "the inputs of the checks are others"),
        ({"accuracy": Accuracy("sqnr", "calib.npz")}, "the metric, its data or its limits are others"),
    ],
)
def test_another_run_is_not_continued(begun: Callable[..., Report], change: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match="is the progress of another run") as refused:
        begun(**change)
    assert why in str(refused.value)
    assert "remove the folder" in str(refused.value)
    assert len(list(Path("out.onnx.progress").glob("01-quantize-gptq-[0-9a-f]*.kept"))) == 2, "still there"


def test_another_model_is_not_continued(begun: Callable[..., Report]) -> None:
    chain(Path("in.onnx"), 1, layers=LAYERS, width=WIDTH)
    with pytest.raises(UsageError, match="the model file is another one"):
        begun()


def test_another_version_is_not_continued(begun: Callable[..., Report]) -> None:
    run = Path("out.onnx.progress/run.json")
    data = json.loads(run.read_text())
    data["versions"]["numpy"] = "1.0"
    run.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=r"numpy was 1\.0 and is "):
        begun()


def test_a_file_that_a_pass_reads_counts(job: Callable[..., Report], count: Count) -> None:
    weights = read_onnx("in.onnx").graph.initializers

    def masks(kept: int) -> None:
        value = weights["w0"].const_value
        assert value is not None
        mask = np.arange(WIDTH * WIDTH).reshape(WIDTH, WIDTH) % 4 < kept
        write_safetensors("masks.safetensors", {"w0": mask})

    masks(2)
    passes = "apply-masks{masks=masks.safetensors},quantize-gptq{group_size=32}"
    seen = count("passes.quantize.quantize_gptq:gptq")
    stop(seen, 1)
    with pytest.raises(Stopped):
        job(passes, "out.onnx", resume=True)
    masks(1)
    with pytest.raises(UsageError, match="a file that a pass reads is another one"):
        job(passes, "out.onnx", resume=True)


def test_adapters_count(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    item = MergeLora(adapters=(str(adapter),))

    def named() -> Any:
        return identity(
            front_end="onnx",
            files=[],
            sequence=[item],
            target="portable",
            seed=0,
            check="off",
            calibration=None,
            inputs=None,
            accuracy=None,
        )["named"]

    before = named()
    (adapter / "adapter_config.json").write_text("{}")
    assert named() != before
    assert named() == named()


# -- damaged and hostile folders -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "swapped", "link"])
def test_what_is_damaged_is_done_again(begun: Any, job: Callable[..., Report], how: str) -> None:
    first, second = sorted(Path("out.onnx.progress").glob("01-quantize-gptq-[0-9a-f]*.kept"))
    data = bytearray(first.read_bytes())
    if how == "swapped":
        data[:] = second.read_bytes()
    elif how == "flipped":
        data[-5] ^= 1
    if how == "link":
        shutil.move(first, "elsewhere")
        first.symlink_to(Path("elsewhere").resolve())
    else:
        first.write_bytes(data[: len(data) // 2] if how == "cut" else b"" if how == "empty" else data)
    report = begun()
    assert begun.seen[0] == LAYERS - 1
    assert any(f"{first.name} in " in note and "is damaged" in note for note in report.notes)
    job("quantize-gptq{group_size=32}", "plain.onnx")
    assert Path("out.onnx").read_bytes() == Path("plain.onnx").read_bytes()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is kept of a run of GPTQ."""
    folder = tmp_path_factory.mktemp("kept")
    chain(folder / "in.onnx", 0, layers=1, width=WIDTH)
    np.savez(folder / "c.npz", h0=np.random.default_rng(1).standard_normal((64, WIDTH)).astype(np.float32))
    options = {"calib": folder / "c.npz", "resume": True, "dry_run": True, "check": "off"}
    optimize(folder / "in.onnx", GPTQ, output=folder / "out.onnx", **options)
    return folder / "out.onnx.progress"


def forged(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Rewrite a kept weight, with a digest that is right."""
    found = read_safetensors(path)
    whole, arrays = json.loads(found.metadata["effic"]), {k: np.array(v) for k, v in found.tensors.items()}
    change(whole["description"], arrays)
    text = json.dumps(whole, separators=(",", ":"))
    write_safetensors(path, arrays, {"effic": text, "sha256": _digest(text, arrays)})


@pytest.mark.parametrize(
    "change",
    [
        lambda row, arrays: row.update(codes="FLOAT"),
        lambda row, arrays: row.update(codes="INT8"),
        lambda row, arrays: row.update(codes_shape=[1 << 40, 1 << 40]),
        lambda row, arrays: row.update(codes_shape=7),
        lambda row, arrays: row.update(axis=9),
        lambda row, arrays: row.update(block_size=-1),
        lambda row, arrays: row.update(bits=40),
        lambda row, arrays: row.update(kind="pickle"),
        lambda row, arrays: row.update(weight=[1]),
        lambda row, arrays: row.update(remarks=[{"kind": "passed"}]),
        lambda row, arrays: row.pop("remarks"),
        lambda row, arrays: arrays.pop("codes"),
        lambda row, arrays: arrays.update(scales=arrays["scales"][:1]),
        lambda row, arrays: arrays.update(scales=arrays["scales"].astype(np.float64)),
        lambda row, arrays: arrays.update(zero_points=np.zeros(3, np.uint8)),
        lambda row, arrays: arrays.update(indices=np.array([1 << 40]), values=np.ones(1, np.float32)),
        lambda row, arrays: arrays.update(more=np.zeros(1 << 22, np.uint8)),
    ],
)
def test_what_somebody_forged_is_not_taken(kept: Path, tmp_path: Path, change: Any) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(kept, folder)
    (site,) = [site for site in weight_sites(read_onnx(kept.parent / "in.onnx")) if site.name == "w0"]
    # As the pass saw it: at the opset that its result needs.
    site.opset = 21
    sites = FinishedSites(folder, f"01-{GPTQ.partition('{')[0]}", GPTQ)
    assert sites.has(site)
    forged(Path(sites.path(sites._key(site) or {})), change)
    assert not sites.has(site)
    assert len(sites.damaged) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_store_gives_back_what_was_put_or_nothing(tmp_path_factory: Any, data: st.DataObject) -> None:
    store = Store(tmp_path_factory.mktemp("store"), "any")
    key = {"n": data.draw(st.integers(0, 9)), "name": data.draw(st.text(max_size=8))}
    array = np.frombuffer(data.draw(st.binary(min_size=1, max_size=40)), np.uint8)
    store.put(key, {"x": 0.1}, {"a": array})
    found = store.get(key)
    assert found is not None
    assert found[0] == {"x": 0.1}
    np.testing.assert_array_equal(found[1]["a"], array)
    assert store.get({**key, "n": 10}) is None
    path = Path(store.path(key))
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    # A bit in the padding of the header, or in how a name is written, may say the same.
    again = store.get(key)
    assert again is None or (again[0] == {"x": 0.1} and np.array_equal(again[1]["a"], array))


def test_a_folder_of_somebody_else_is_left_alone(job: Callable[..., Report]) -> None:
    folder = Path("out.onnx.progress")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt.*no progress of effic"):
        job("quantize-easyquant", "out.onnx", calib=None, resume=True)
    assert (folder / "thesis.txt").read_text() == "mine"
    shutil.rmtree(folder)
    Path("home").mkdir()
    folder.symlink_to("home")
    with pytest.raises(UsageError, match="is no folder"):
        job("quantize-easyquant", "out.onnx", calib=None, resume=True)
    folder.unlink()
    folder.write_text("a file")
    with pytest.raises(UsageError, match="is no folder"):
        job("quantize-easyquant", "out.onnx", calib=None, resume=True)


def test_a_file_put_among_the_progress_stays(begun: Any) -> None:
    Path("out.onnx.progress/notes.txt").write_text("mine")
    assert begun().output == "out.onnx"
    assert [file.name for file in Path("out.onnx.progress.done").iterdir()] == ["notes.txt"]


def test_a_damaged_description_of_the_run_is_refused(begun: Any) -> None:
    Path("out.onnx.progress/run.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"run\.json is damaged; remove the folder"):
        begun()


def test_two_runs_do_not_work_in_one_folder(begun: Any) -> None:
    fcntl = pytest.importorskip("fcntl")
    gc.collect()  # the run that was stopped held it, while its traceback lived
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()",
            "out.onnx.progress/lock",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert fcntl is not None
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another run is working in"):
            begun()
        assert holder.stdin is not None
        holder.stdin.close()
    assert begun().output == "out.onnx"


# -- what goes with it, and what does not ----------------------------------------------------------


def test_passes_that_were_rolled_back_stay_so(job: Callable[..., Report], count: Count) -> None:
    passes = "quantize-rtn{bits=2,group_size=32},prune-sparsegpt,quantize-gptq{group_size=32,bits=8}"
    options = {"accuracy": Accuracy("sqnr", "calib.npz", bound=12.0)}
    plain = job(passes, "plain.onnx", **options)
    assert [step.rolled_back is not None for step in plain.steps] == [True, True, False, False]
    seen, scored = count("passes.quantize.quantize_gptq:gptq"), count("guard:score")
    stop(seen, 1)
    with pytest.raises(Stopped):
        job(passes, "out.onnx", resume=True, **options)
    first = scored[0]
    stop(seen, None)
    stop(scored, None)
    resumed = job(passes, "out.onnx", resume=True, **options)
    assert first == 3, "the original, and after two passes"
    assert scored[0] == 3, "the original, after the third pass, and the end"
    assert [step.rolled_back for step in resumed.steps] == [step.rolled_back for step in plain.steps]
    assert [step.score for step in resumed.steps] == [step.score for step in plain.steps]
    assert Path("out.onnx").read_bytes() == Path("plain.onnx").read_bytes()


def test_a_dry_run_leaves_its_work_to_the_next(job: Callable[..., Report], count: Count) -> None:
    seen = count("passes.quantize.quantize_gptq:gptq")
    dry = job("quantize-gptq{group_size=32}", "out.onnx", resume=True, dry_run=True)
    assert not Path("out.onnx").exists()
    assert any("without --dry-run" in note for note in dry.notes)
    stop(seen, None)
    job("quantize-gptq{group_size=32}", "out.onnx", resume=True)
    assert seen[0] == 0
    assert not Path("out.onnx.progress").exists()


def test_an_older_output_is_not_in_the_way(begun: Any) -> None:
    Path("out.onnx").write_bytes(b"older")
    with pytest.raises(UsageError, match="give --force"):
        begun()
    assert Path("out.onnx").read_bytes() == b"older"
    assert begun(force=True).output == "out.onnx"
    assert begun.seen[0] == LAYERS - 2


def test_a_model_in_memory_cannot_be_resumed(job: Callable[..., Report]) -> None:
    with pytest.raises(UsageError, match="only a model from a file"):
        optimize(read_onnx("in.onnx"), "quantize-easyquant", output="out.onnx", resume=True)


def effic(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "effic.cli.main", *argv], capture_output=True, text=True, check=False
    )


def test_from_the_command_line(begun: Any) -> None:
    none = effic("optimize", "in.onnx", "--resume")
    assert none.returncode == 2
    assert "give -o out.onnx" in none.stderr
    timed = effic("optimize", "in.onnx", "-o", "o.onnx", "--resume", "--keep-if-faster")
    assert timed.returncode == 2
    assert "--resume cannot go on with --keep-if-faster" in timed.stderr
    argv = ["optimize", "in.onnx", "-o", "out.onnx", "--passes", "quantize-gptq{group_size=32}", "--resume"]
    other = effic(*argv, "--calib", "calib.npz", "--seed", "4")
    assert other.returncode == 2
    assert "seed was 0 and is 4" in other.stderr
    on = effic(*argv, "--calib", "calib.npz")
    assert on.returncode == 0
    assert f"resuming: 0 of 1 passes, 2 of {LAYERS} sites of quantize-gptq were done" in on.stderr


def test_ctrl_c_says_how_to_go_on(
    job: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from effic.cli.main import main

    def interrupted(*args: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("effic.passes.quantize.quantize_easyquant.easyquant", interrupted)
    argv = ["optimize", "in.onnx", "--passes", "quantize-easyquant", "-o", "out.onnx", "-q"]
    for more, said in ((["--resume"], True), ([], False)):
        with pytest.raises(SystemExit) as left:
            main([*argv, *more])
        assert left.value.code == 130
        assert ("the same command goes on from here" in capsys.readouterr().err) is said
    assert os.path.isdir("out.onnx.progress")
