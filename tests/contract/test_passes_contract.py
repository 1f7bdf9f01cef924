"""What holds for every pass of the table, on every seeded model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from effic.backends import TARGETS, get_backend
from effic.ir.errors import UsageError
from effic.ir.model import Model
from effic.ir.weights import weight_sites
from effic.models.builders import BUILDERS
from effic.passes import PASSES, load_pass
from effic.passes.base import Pass, options_of
from effic.passes.pipeline import Checker, run_passes
from effic.passes.presets import PRESETS
from effic.passes.spec import parse_passes
from effic.testing import (
    MODELS,
    check_documented,
    check_pass,
    check_target,
    check_text_form,
    made_up_data,
    seeded_model,
)

WriteAdapter = Callable[..., str]


def adapter_options(model: Model, folder: Path, write_adapter: WriteAdapter) -> str:
    """Options of merge-lora: an adapter for every matrix of a model, and a map to find them by."""
    rng = np.random.default_rng(0)
    tensors, lines = {}, []
    for number, site in enumerate(weight_sites(model, ("MatMul", "Gemm"))):
        if site.why_not is None and "Gather" not in site.kinds:
            out, into = site.shape_oi
            tensors[f"m{number}.lora_A.weight"] = rng.standard_normal((2, into)).astype(np.float32)
            tensors[f"m{number}.lora_B.weight"] = rng.standard_normal((out, 2)).astype(np.float32) / 100
            lines.append(f"m{number} = {site.name}")
    if not lines:
        pytest.skip("the model has no matrix to adapt")
    (folder / "map.txt").write_text("\n".join(lines))
    return f'adapters=["{write_adapter(folder / "adapter", tensors)}"],map="{folder / "map.txt"}"'


# Passes that do nothing without arguments, and how to get some for a model.
ARGUMENTS: dict[str, Callable[[Model, Path, WriteAdapter], str]] = {
    "merge-lora": lambda model, folder, write: f"merge-lora{{{adapter_options(model, folder, write)}}}",
    "unmerge-lora": lambda model, folder, write: unmerge(model, folder, write),
    "apply-masks": lambda model, folder, _: masks(model, folder),
}


def unmerge(model: Model, folder: Path, write_adapter: WriteAdapter) -> str:
    options, kept = adapter_options(model, folder, write_adapter), folder / "kept.safetensors"
    run_passes(model, parse_passes(f'merge-lora{{{options},keep_original="{kept}"}}'), check="off")
    return f'unmerge-lora{{originals="{kept}"}}'


def masks(model: Model, folder: Path) -> str:
    """apply-masks, with a 2:4 mask for every matrix of a model."""
    arrays = {}
    for site in weight_sites(model, ("MatMul", "Gemm")):
        if site.why_not is None and site.encoding is None:
            kept = np.arange(site.shape_oi[1]) % 4 < 2
            mask = np.broadcast_to(kept, site.shape_oi)
            arrays[site.name] = np.array(mask if site.in_axis == 1 else mask.T).reshape(site.shape)
    np.savez(folder / "masks.npz", **arrays)
    return f'apply-masks{{masks="{folder / "masks.npz"}"}}'


def instance(name: str, model: Model, folder: Path, write_adapter: WriteAdapter) -> Pass:
    """The pass with its defaults, or with arguments for ``model``."""
    if name in ARGUMENTS:
        return parse_passes(ARGUMENTS[name](model, folder, write_adapter))[0]
    return load_pass(name)()


@pytest.mark.parametrize("name", PASSES)
def test_one_name_in_four_places(name: str) -> None:
    cls = load_pass(name)
    assert cls.name == name
    module = importlib.import_module(cls.__module__)
    assert module.__name__.rsplit(".", 1)[-1] == name.replace("-", "_")
    assert cls.__name__.lower() == name.replace("-", "")


@pytest.mark.parametrize("name", PASSES)
def test_pass_is_a_documented_frozen_value(name: str) -> None:
    cls = load_pass(name)
    check_documented(cls)
    if name in ARGUMENTS:
        with pytest.raises(UsageError):
            parse_passes(name)
    else:
        check_text_form(cls())


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("built", MODELS)
def test_pass_is_verified_checked_and_idempotent(
    name: str, built: str, tmp_path: Path, write_adapter: WriteAdapter
) -> None:
    model = seeded_model(built)
    item = instance(name, model, tmp_path, write_adapter)
    check_text_form(item)
    check_pass(item, model)


# What is compiled has fixed sizes and operators of its own, and is tried in tests/backends/tvm.
@pytest.mark.parametrize(
    "name", [name for name in TARGETS if not name.startswith("tvm-") and not name.endswith("-cuda")]
)
@pytest.mark.parametrize("built", MODELS)
def test_target_lowers_and_runs(name: str, built: str) -> None:
    check_target(get_backend(name), seeded_model(built))


def test_the_kit_has_every_seeded_model() -> None:
    assert set(MODELS) == set(BUILDERS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_give_reasons(name: str) -> None:
    assert parse_passes(PRESETS[name].text)
    assert all(reason for _, reason in PRESETS[name].lines)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("built", MODELS)
def test_presets_keep_every_seeded_model_right(name: str, built: str) -> None:
    model = seeded_model(built)
    passes = parse_passes(PRESETS[name].text)
    run_passes(model, passes, checker=Checker(model), calibration=made_up_data(model, *passes))


@pytest.mark.parametrize(
    "text",
    [
        "quantize-rtn{symmetric=false,scale=absmax}",
        "quantize-gptq{axis=ic,static_groups=false}",
        "quantize-adadim{dim=oc,scope=block}",
        "quantize-adadim{dim=ic,base=gptq,select=gptq}",
        "quantize-adadim{percdamp=0.1}",
        "quantize-adadim{act_order=false}",
        "quantize-adadim{base=gptq,sketch=64}",
        "quantize-easyquant{lr=0.01}",
        "quantize-easyquant{optimizer=adam,steps=0,lr=0.01}",
        "prune-magnitude{density=0.5,m=8}",
        "prune-wanda{density=0.5,n=1}",
        "quantize-int8{reduce_range=true}",
        "quantize-int8{percentile=99}",
        "quantize-int8{mode=dynamic,first=float}",
        "quantize-int8{mode=dynamic,ranges=minmax}",
    ],
)
def test_options_that_do_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="does nothing with"):
        parse_passes(text)


@pytest.mark.parametrize(
    "name", [n for n in PASSES if "skip" in {f.name for f, _ in options_of(load_pass(n))}]
)
def test_patterns_that_match_nothing_are_said(name: str) -> None:
    model = seeded_model("encoder")
    passes = parse_passes(f"{name}{{skip=[nobody*,kind:MatMul]}}")
    result = run_passes(model, passes, check="off", calibration=made_up_data(model, *passes))
    texts = [r.text for r in result.steps[0].remarks]
    assert [t for t in texts if "matches no weight" in t] == [
        "skip names 'nobody*', which matches no weight and no node"
    ]
