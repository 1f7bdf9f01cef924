"""adapters-as-inputs: one file for many adapters, which the caller gives at run time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effic.ir.model import OPTIONAL_KEY, Model, constant_tensor, optional_inputs, sole_consumer
from effic.ir.torch_capture import MODULE_KEY
from effic.ir.weights import WeightSite, WeightUse, weight_sites
from effic.passes.adapters.matching import module_of
from effic.passes.base import Numerics, Pass, Remarks, matches, option
from effic.passes.fuse.reading import other_operand

A_SUFFIX, B_SUFFIX = ".lora_A", ".lora_B"
"""What the inputs of a weight are called: its name and this."""

_LINEAR = ("MatMul", "Gemm")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class AdaptersAsInputs(Pass):
    """Give layers low-rank branches whose factors are optional inputs: one file for many adapters.

    Before:  y = MatMul(x, w)
    After:   y = Add(MatMul(x, w), MatMul(MatMul(x, Transpose(A)), Transpose(B)))

    A (``[rank, in]``, called ``w.lora_A``) and B (``[out, rank]``, ``w.lora_B``) are graph inputs with
    zeros as default values: a caller that gives neither gets the base model's outputs, bit for bit. B is
    given with the adapter's scaling multiplied in, and adapters of a lower rank with zeros as further
    rows and columns; ``effic.adapter_feeds`` makes such arrays of a PEFT folder. Weights that are stored
    in few bits get branches too. Quantize before this pass, not after: it makes the branch from the
    weight's readers. Each layer costs two thin products more, whether an adapter is given or not.

    Missed when the weight is not the right operand of a MatMul or the B of a Gemm, is also read as
    something else (an embedding tied to the output layer), is a stack of matrices, lies in a function,
    or has its inputs already.
    """

    name: ClassVar[str] = "adapters-as-inputs"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    adds_inputs: ClassVar[bool] = True

    rank: int = option(8, help="rank of the inputs: the largest rank of an adapter that can be given", ge=1)
    targets: tuple[str, ...] = option((), help="weights that get inputs, as shell patterns; none means all")

    def apply(self, model: Model, remarks: Remarks) -> None:
        added: list[str] = []
        used: set[str] = set()
        for site in weight_sites(model, _LINEAR):
            if _is_input_of_a_branch(site):
                continue
            used |= {pattern for pattern in self.targets if matches(site.name, (pattern,))}
            if self.targets and not matches(site.name, self.targets):
                continue
            if reason := why_not(site, model):
                remarks.missed(site.name, reason)
                continue
            added += self._add(site, model)
            out, into = site.shape_oi
            remarks.passed(
                site.name,
                f"takes adapters of rank {self.rank}",
                rank=self.rank,
                parameters=self.rank * (out + into),
            )
        for pattern in self.targets:
            if pattern not in used:
                remarks.missed(pattern, "matches the name of no weight of a MatMul or Gemm")
        if added:
            names = [*sorted(optional_inputs(model.ir)), *added]
            model.ir.metadata_props[OPTIONAL_KEY] = json.dumps(names)

    def _add(self, site: WeightSite, model: Model) -> list[str]:
        out, into = site.shape_oi
        paths = {path for use in site.uses if (path := module_of(use.node)) is not None}
        factors = []
        for suffix, shape in ((A_SUFFIX, (self.rank, into)), (B_SUFFIX, (out, self.rank))):
            value = model.add_initializer(
                model.graph, site.name + suffix, np.zeros(shape, site.dtype.numpy()), site.dtype
            )
            if len(paths) == 1:
                # For finding the input of a module where the weight's own name says nothing.
                value.metadata_props[MODULE_KEY] = next(iter(paths))
            model.graph.inputs.append(value)
            factors.append(value)
        for use in site.uses:
            _add_branch(use, site.dtype, factors, model)
        return [str(value.name) for value in factors]


def _is_input_of_a_branch(site: WeightSite) -> bool:
    return (site.value.name or "").endswith((A_SUFFIX, B_SUFFIX)) and site.value.is_graph_input()


def why_not(site: WeightSite, model: Model) -> str | None:
    """Why a weight cannot have a branch, as a phrase, or None."""
    if site.why_not is not None and site.dtype != ir.DataType.DOUBLE:
        return site.why_not
    if len(site.shape) != 2:
        return f"has rank {len(site.shape)}; only matrices can have adapters here"
    if site.dtype not in _FLOATS:
        return f"has elements of type {site.dtype.name}"
    names = {site.name + A_SUFFIX, site.name + B_SUFFIX}
    if names & {str(v.name) for v in model.graph.inputs}:
        return "has its inputs already"
    functions = {id(g) for f in model.ir.functions.values() for g in (f.graph, *f.subgraphs())}
    for use in site.uses:
        node = use.node
        if node.op_type not in _LINEAR:
            return f"is read by a {node.op_type} too, which an adapter of the layer would not reach"
        if use.index != 1:
            return f"is the left operand of {node.op_type} '{node.name}'"
        if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1:
            return f"is read by Gemm '{node.name}', which transposes its input"
        if node.op_type == "Gemm" and node.attributes.get_float("alpha", 1.0) != 1.0:
            return f"is scaled by Gemm '{node.name}' (alpha); canonicalize-linear multiplies that in"
        if id(node.graph) in functions:
            return "lies in a function, where inputs of the model cannot be read"
    if site.other_readers:
        return f"is also read by {site.other_readers[0]}, which an adapter of the layer would not reach"
    return None


def _add_branch(use: WeightUse, dtype: ir.DataType, factors: list[ir.Value], model: Model) -> None:
    """Add ``x · Aᵀ · Bᵀ`` to what a node makes: after its bias, so that runtimes still fuse the two."""
    node = use.node
    x, y = node.inputs[0], node.outputs[0]
    adder = sole_consumer(y)
    if adder is not None and adder.op_type == "Add" and adder.graph is node.graph:
        bias = constant_tensor(other_operand(adder, y))
        if bias is not None and len(bias.shape) == 1:
            node, y = adder, adder.outputs[0]
    metadata, after = dict(use.node.metadata_props), node

    def make(op_type: str, inputs: list[ir.Value | None], role: str, shape: ir.Shape | None) -> ir.Value:
        nonlocal after
        made = ir.node(op_type, inputs)
        made.metadata_props.update(metadata)
        out = made.outputs[0]
        out.name, out.shape = model.unique_name(f"{y.name}.{role}"), shape
        # Nodes need not have names, but runtimes take no two of one name.
        made.name = f"{use.node.name}.{role}" if use.node.name else out.name
        out.type = ir.TensorType(dtype)
        if after.graph is not None:
            after.graph.insert_after(after, made)
        after = made
        return out

    a, b = factors
    thin = make("MatMul", [x, make("Transpose", [a], "lora_A_turned", None)], "lora_A_out", None)
    branch = make("MatMul", [thin, make("Transpose", [b], "lora_B_turned", None)], "lora_B_out", y.shape)
    readers = tuple(y.uses())
    total = make("Add", [y, branch], "with_lora", y.shape)
    total.type = y.type or total.type
    for reader, index in readers:
        reader.replace_input_with(index, total)
    graph = y.graph
    if graph is None or not y.is_graph_output():
        return
    for i, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[i] = total
    name, y.name = y.name, model.unique_name(f"{y.name}.without_lora")
    total.name = name
