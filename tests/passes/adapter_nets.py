"""What the tests of merging share: small models, adapters for them, and the merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from effic.ir.model import Model, constant_tensor
from effic.ir.verify import verify
from effic.passes.base import Remarks
from effic.passes.spec import parse_passes

MakeNet = Callable[..., Model]
WriteAdapter = Callable[..., str]

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def lora(name: str, out: int, into: int, r: int = 2) -> dict[str, np.ndarray]:
    return {f"{name}.lora_A.weight": normal(r, into), f"{name}.lora_B.weight": normal(out, r)}


def delta(tensors: dict[str, np.ndarray], name: str, scaling: float = 2.0) -> np.ndarray:
    a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    return scaling * (b.astype(np.float64) @ a.astype(np.float64))


def merge(model: Model, folder: str | list[str], name: str = "merge-lora", **options: Any) -> Remarks:
    folders = [folder] if isinstance(folder, str) else folder
    texts = {"adapters": "[" + ",".join(f'"{f}"' for f in folders) + "]"}
    texts |= {key: f'"{value}"' for key, value in options.items()}
    (item,) = parse_passes(f"{name}{{{','.join(f'{k}={v}' for k, v in texts.items())}}}")
    remarks = Remarks()
    item.apply(model, remarks)
    model.forget_names()
    verify(model)
    return remarks


def value_of(model: Model, name: str) -> np.ndarray:
    tensor = constant_tensor(model.graph.initializers[name])
    assert tensor is not None
    return np.array(tensor.numpy())


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def net(make_net: MakeNet, body: str, opset: int = 18, sig: str = "", **weights: np.ndarray) -> Model:
    """A model whose weights have dots in their names where the text has two underscores."""
    model = make_net(sig or "(float[N,4] x) => (float[N,3] y)", body, opset=opset, **weights)
    for name, value in list(model.graph.initializers.items()):
        value.name = name.replace("__", ".")
    return model


def linear(make_net: MakeNet, weight: np.ndarray | None = None) -> Model:
    weight = normal(4, 3) if weight is None else weight
    return net(make_net, "y = MatMul(x, q__weight)", q__weight=weight)


def embedding_net(make_net: MakeNet, table: np.ndarray, tied: bool = False) -> Model:
    body = "h = Gather(e__weight, i)"
    body += " t = Transpose<perm=[1,0]>(e__weight) y = MatMul(h, t)" if tied else " y = Identity(h)"
    return net(make_net, body, sig="(int64[N] i) => (float[N,k] y)", e__weight=table)


def encoded_net(make_net: MakeNet, weight: np.ndarray, options: str) -> Model:
    model = net(
        make_net,
        "y = MatMul(x, q__weight)",
        opset=21,
        sig=f"(float[N,{len(weight)}] x) => (float[N,{weight.shape[1]}] y)",
        q__weight=weight,
    )
    (item,) = parse_passes(f"quantize-rtn{{min_size=0,{options}}}")
    item.apply(model, Remarks())
    model.forget_names()
    return model
