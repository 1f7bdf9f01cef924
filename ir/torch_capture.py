"""torch modules as models: ``nn.Module``, ``ExportedProgram``, ``fx.GraphModule`` and ``.pt2`` files.

The work is torch's: ``torch.export`` traces the module and ``torch.onnx`` translates the trace into
an onnx_ir model. What is added here keeps the result recognisable: weights carry their state-dict
names, tied weights are there once, BatchNormalization stays a node of its own, every node knows the
module it came from, inputs and outputs are named as the module's author named them.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx_ir as ir

from effic.ir.errors import CaptureError, MissingExtraError, UsageError
from effic.ir.model import Model, Origin

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

MODULE_KEY = "effic.module"
"""Key of a node's metadata: the dotted path of the module that made it (``layer1.0.conv1``)."""

ALIASES_KEY = "effic.aliases"
"""Key of a tied weight's metadata: its other state-dict names, as a JSON list."""

ROLE_KEY = "effic.role"
"""Key of an initializer's metadata: ``parameter`` for what torch trains, ``buffer`` for the rest."""

OLDEST_OPSET = 18
"""torch's translations are written for opset 18; nothing older can be produced."""

SCOPES_KEY = "pkg.torch.onnx.name_scopes"

# Long, tied to the machine the module was captured on, and of no use without its sources.
DROPPED_KEYS = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


class Factory(NamedTuple):
    """What a ``package.module:factory`` returned."""

    module: Any
    example_inputs: Any
    dynamic_shapes: Any = None


def capture(
    source: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    share_weights: bool = False,
) -> Model:
    """Turn a torch module into a model.

    The module is captured in eval mode and left as it was. Expressions of constants that torch's
    exporter leaves behind (the shape of a weight, a cast to the type it has) are folded; weights are
    never touched.

    Args:
        source: an ``nn.Module`` (an ``fx.GraphModule`` is one), an ``ExportedProgram``, or the path of
            a ``.pt2`` file. Of a file, only tensors and registered operators are read; one that
            holds pickled objects or compiled code is refused.
        example_inputs: for a module, what to call it with: a tuple of tensors or arrays, one tensor,
            or a dictionary of keyword arguments. A program has its own.
        dynamic_shapes: which dimensions may vary, as ``torch.export.export`` takes them; a dimension
            may be named by a string: ``{"ids": {0: "batch", 1: "sequence"}}``.
        opset: the ONNX opset to produce, 18 or newer; torch's default when None.
        share_weights: leave the weights in the module's own memory. Saves a copy of the model; a
            training step in place then changes the captured model too.

    Returns:
        A model whose initializers have their state-dict names and whose nodes have the path of
        their module under :data:`MODULE_KEY` in their metadata. Graph inputs are named as the
        arguments of ``forward``; outputs are ``output``, ``output_0``, ``output_1`` … or the keys of
        the dictionary it returns.

    Raises:
        CaptureError: torch cannot export it; the text has torch's reason.
        InvalidModelError: the ``.pt2`` file is broken or not safe to read.
        UsageError: ``source`` is none of these, or the example inputs are missing.
        MissingExtraError: torch or onnxscript is not installed.
    """
    _require_torch()
    import torch

    if opset is not None and opset < OLDEST_OPSET:
        raise UsageError(f"torch cannot produce opset {opset}; ask for {OLDEST_OPSET} or newer")
    origin = Origin("torch")
    if isinstance(source, (str, os.PathLike)):
        from effic.ir.torch_archive import read_program

        path = os.fspath(source)
        if not path.endswith(".pt2"):
            raise UsageError(f"'{path}' is not a .pt2 file; save the program with torch.export.save")
        with _torch_in_silence():
            source = read_program(path)
        with open(path, "rb") as file:
            origin = Origin("torch", path, hashlib.file_digest(file, "sha256").hexdigest())
        # Nobody else holds the tensors just read.
        share_weights = True
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(source, torch.export.ExportedProgram):
        if dynamic_shapes is not None:
            raise UsageError("a program has its dynamic shapes already; give them to torch.export.export")
        _refuse_training_program(source)
        state, tensors = source.state_dict, source.state_dict
        trained = set(source.graph_signature.inputs_to_parameters.values())
    elif isinstance(source, torch.nn.Module):
        args, kwargs = _arguments(source, example_inputs)
        state = dict(source.state_dict(keep_vars=True))
        tensors = dict(source.named_parameters()) | dict(source.named_buffers())
        trained = {name for name, _ in source.named_parameters(remove_duplicate=False)}
    else:
        raise UsageError(
            f"cannot capture a {type(source).__name__}; give an nn.Module, an ExportedProgram or a .pt2 file"
        )
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CaptureError(f"'{name}' is on the meta device; load the weights before capturing")

    program, notes = _export(source, args, kwargs, dynamic_shapes, opset)
    model = Model(program.model, origin)
    _settle(model, _first_names(state), share_weights)
    for name, value in model.graph.initializers.items():
        value.metadata_props[ROLE_KEY] = "parameter" if name in trained else "buffer"
    _name_outputs(model, program.exported_program)
    _name_dimensions(model)
    model.forget_names()
    model.origin = Origin(origin.front_end, origin.path, origin.sha256, tuple(notes))
    return model


def load_factory(text: str) -> Factory:
    """Import ``package.module:factory`` and call it. **This runs the user's code.**

    The current folder is searched first, as ``python -m`` does.

    Args:
        text: the module and the callable in it, ``package.module:name`` or ``package.module:Class.name``.
            Called without arguments, it returns ``(module, example_inputs)`` or
            ``(module, example_inputs, dynamic_shapes)``, as :func:`capture` takes them.

    Raises:
        UsageError: it cannot be found, it failed, or it returned something else.
    """
    _require_torch()
    import torch

    module_name, _, attribute = text.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"'{text}' does not name a factory; write package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        target = _in_users_code(f"cannot import '{module_name}'", importlib.import_module, module_name)
        for part in attribute.split("."):
            if not hasattr(target, part):
                raise UsageError(
                    f"'{module_name}' has no '{attribute}'; name a function that makes the module"
                )
            target = getattr(target, part)
        if isinstance(target, torch.nn.Module) or not callable(target):
            raise UsageError(f"'{text}' is no function; name one that returns (module, example_inputs)")
        made = _in_users_code(f"'{text}' failed", target)
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise UsageError(
            f"'{text}' returned {_kind(made)}; return (module, example_inputs) or "
            "(module, example_inputs, dynamic_shapes)"
        )
    return Factory(*made)


def _in_users_code(complaint: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        where = _place(error)
        text = _first_sentence(str(error)) or "no message"
        raise UsageError(f"{complaint}: {type(error).__name__}: {text}{where}") from error


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of ({', '.join(type(item).__name__ for item in made)})"
    return f"a {type(made).__name__}"


def _require_torch() -> None:
    for package in ("torch", "onnxscript"):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "torch", "capturing a torch module")
    with _torch_in_silence():
        importlib.import_module("torch.onnx")


# -- calling torch -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _torch_in_silence() -> Iterator[None]:
    # torch reports on its own progress, deprecations and missing optional packages, by warnings and by
    # some forty loggers with handlers of their own. None of it is about the user's module: what is,
    # comes as an exception. So both are off while torch's code runs, and only then.
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[bool]:
    """Every submodule in eval mode, and back; yields whether any was training.

    The flags are set directly: ``eval()`` is overridden by modules that merge weights into others
    when called, and by exported GraphModules to refuse.
    """
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield bool(training)
    finally:
        for part in training:
            part.training = True


def _arguments(module: Any, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, arrays turned into tensors."""
    import torch
    from torch.utils import _pytree

    if example_inputs is None:
        raise UsageError(f"capturing a {type(module).__name__} needs example inputs; give a tuple of tensors")

    def tensor(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            # torch.export takes one tensor given for two inputs for one input, in silence.
            return leaf.detach().clone()
        return torch.from_numpy(np.array(leaf)) if isinstance(leaf, (np.ndarray, np.generic)) else leaf

    with _torch_in_silence():
        made = _pytree.tree_map(tensor, example_inputs)
    if isinstance(made, Mapping):
        return (), dict(made)
    return (tuple(made) if isinstance(made, (tuple, list)) else (made,)), {}


def _export(
    source: Any, args: Any, kwargs: Any, dynamic_shapes: Any, opset: int | None
) -> tuple[Any, list[str]]:
    """torch's ``ONNXProgram`` for ``source``, and what to know about it."""
    import torch

    notes = []
    # torch prints the graph it had so far when it gives up. What the module prints is let through.
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        if isinstance(source, torch.nn.Module) and stack.enter_context(_eval_mode(source)):
            notes.append("the module was in training mode; it was captured in eval mode")
        stack.enter_context(_torch_in_silence())
        try:
            # optimize=False: torch's optimiser fuses BatchNormalization into the convolutions, which
            # is a pass's decision, and renames what it rewrites.
            with contextlib.redirect_stderr(said):
                program: Any = torch.onnx.export(
                    source,
                    args,
                    kwargs=kwargs,
                    dynamic_shapes=dynamic_shapes,
                    opset_version=opset,
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                )
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            # Nearly all are torch.onnx's own errors; malformed dynamic shapes and opsets beyond its
            # converter are reported bare.
            raise CaptureError(f"torch cannot export {_named(source)}: {_reason(error)}") from error
    sys.stderr.write(said.getvalue())
    made = program.model.opset_imports.get("", 0)
    if opset is not None and made != opset:
        raise CaptureError(f"torch produced opset {made}, not {opset}; ask for {made} or for none")
    _refuse_projections(program.exported_program)
    for spec in program.exported_program.graph_signature.output_specs:
        if spec.kind.name == "BUFFER_MUTATION":
            notes.append(
                f"forward updates the buffer '{spec.target}'; the captured model keeps its present value"
            )
    return program, notes


def _named(source: Any) -> str:
    return "the program" if hasattr(source, "graph_signature") else f"{type(source).__name__}"


def _refuse_training_program(program: ExportedProgram) -> None:
    """A program traced in training mode has dropout and batch statistics in it, for good."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        given = {
            arg.name: value for arg, value in zip(schema.arguments, node.args, strict=False)
        } | node.kwargs
        # Without running statistics a norm always uses the batch's: that is not a training mode.
        uses_batch = given.get("training") is True and given.get("running_mean") is not None
        drops = given.get("train") is True and "dropout" in schema.name and given.get("p", 1.0) != 0.0
        if uses_batch or drops:
            raise CaptureError(
                f"the program was exported in training mode ('{node.name}' is not the same in eval mode); "
                "call eval() on the module before torch.export.export"
            )


def _refuse_projections(program: ExportedProgram) -> None:
    """ONNX's LSTM has no projection of its state; torch's translation leaves it out in silence."""
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) == "aten.lstm.input":
            _, _, weights, biases, layers, _, _, both_ways, *_ = node.args
            if len(weights) != (4 if biases else 2) * layers * (2 if both_ways else 1):
                raise CaptureError(
                    f"ONNX has no LSTM with a projection ('{node.name}' has proj_size); "
                    "apply the projection as a Linear of its own, or use proj_size=0"
                )


def _reason(error: BaseException) -> str:
    """torch's reason in one sentence: the innermost cause, and where in the user's code."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    sentence = _first_sentence(text) or type(cause).__name__
    if type(cause).__name__ in ("GuardOnDataDependentSymNode", "UserErrorType"):
        sentence = f"its control flow depends on the values in a tensor ({sentence})"
    quoted = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    if quoted:
        file, line, function = quoted[-1]
        return f"{sentence} (at {file}:{line}, in {function})"
    return sentence + _place(cause)


def _first_sentence(text: str) -> str:
    """The first line that says something, without colours and without the full stop."""
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        if line := " ".join(line.split()):
            return line.rstrip(".")
    return ""


def _place(error: BaseException) -> str:
    """`` (at file:line, in function)`` of the user's innermost line that torch was running, or nothing."""
    inside = tuple(
        os.path.dirname(os.path.abspath(sys.modules[name].__file__ or "")) + os.sep
        for name in ("torch", "effic.ir", "onnx_ir", "importlib")
        if name in sys.modules
    )
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")
    ]
    first = next((i for i, frame in enumerate(frames) if frame.filename.startswith(inside)), len(frames))
    users = [frame for frame in frames[first:] if not frame.filename.startswith(inside)]
    if not users:
        return ""
    return f" (at {users[-1].filename}:{users[-1].lineno}, in {users[-1].name})"


# -- the model that torch made, made ours --------------------------------------------------------------


def _first_names(state: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """For every state-dict name, all names of that tensor, in the order of the state dict."""
    same: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.layout.__repr__() != "torch.strided":
            same[name] = [name]
            continue
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        same.setdefault(key, []).append(name)
    return {name: names for names in same.values() for name in names}


def _settle(model: Model, names: Mapping[str, Sequence[str]], share_weights: bool) -> None:
    """Inline, own the weights, fold what is constant, clean up, and note each node's module."""
    from onnx_ir.passes import common

    if model.ir.functions:
        # Branches of torch.cond are made as functions of a private domain.
        common.InlinePass()(model.ir)
    _own_weights(model.graph, names, share_weights)
    weights = set(model.graph.initializers.values())
    from onnxscript import optimizer

    with _torch_in_silence():
        # Folds shapes of weights, casts and the like. It must not fold a weight into something else
        # under another name: that is a pass's decision.
        optimizer.fold_constants_ir(
            model.ir, should_fold=lambda node: False if weights.intersection(node.inputs) else None
        )
    _drop_zero_biases(model, weights)
    common.RemoveUnusedNodesPass()(model.ir)
    common.RemoveUnusedOpsetsPass()(model.ir)
    for value in [value for value in model.graph.initializers.values() if not value.uses()]:
        if not value.is_graph_output() and value.name is not None:
            model.graph.initializers.pop(value.name)
    _separate_outputs(model)
    model.graph.metadata_props.clear()
    for node in model.nodes(domain=None):
        for key in DROPPED_KEYS:
            node.metadata_props.pop(key, None)
        if (path := _module_path(node.metadata_props.get(SCOPES_KEY))) is not None:
            node.metadata_props[MODULE_KEY] = path
    common.NameFixPass()(model.ir)


def _own_weights(graph: ir.Graph, names: Mapping[str, Sequence[str]], share: bool) -> None:
    """Plain tensors for torch's; a tied weight once, under its first name."""
    for name, value in list(graph.initializers.items()):
        if value.const_value is None:
            raise CaptureError(f"torch gave no values for '{name}'; load the weights before capturing")
        aliases = names.get(name, [name])
        first = aliases[0]
        if first != name and first in graph.initializers:
            value.replace_all_uses_with(graph.initializers[first], replace_graph_outputs=True)
            graph.initializers.pop(name)
            continue
        value.name = first
        if len(aliases) > 1:
            value.metadata_props[ALIASES_KEY] = json.dumps(list(aliases[1:]))
        tensor = value.const_value
        array = tensor.numpy()
        array = np.asarray(array, order="C") if share else np.array(array, order="C", copy=True)
        value.const_value = ir.Tensor(array, tensor.dtype, name=first)


def _drop_zero_biases(model: Model, weights: set[ir.Value]) -> None:
    # torch's translation gives every convolution a bias: zeros where the module has none.
    for node in model.nodes("Conv", "ConvTranspose"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None or bias in weights or not bias.is_initializer() or bias.const_value is None:
            continue
        if not bias.const_value.numpy().any():
            node.resize_inputs(2)


def _separate_outputs(model: Model) -> None:
    """Copy what is handed out as it came in, or twice: ONNX wants every output made by a node."""
    seen: set[ir.Value] = set()
    for index, output in enumerate(model.graph.outputs):
        if output.producer() is not None and output not in seen:
            seen.add(output)
            continue
        copy = ir.Node("", "Identity", [output], num_outputs=1, name=f"node_output_{index}")
        copy.outputs[0].name = model.unique_name(f"{output.name}_copy")
        copy.outputs[0].type, copy.outputs[0].shape = output.type, output.shape
        model.graph.append(copy)
        model.graph.outputs[index] = copy.outputs[0]


def _module_path(scopes: str | None) -> str | None:
    """The dotted path of the innermost module in torch's list of scopes, or None.

    The list ends with the fx node; a module called twice is ``conv@1`` the second time.
    """
    if scopes is None:
        return None
    try:
        path = ast.literal_eval(scopes)[-2]
    except (ValueError, SyntaxError, IndexError):
        return None
    if not isinstance(path, str) or path.startswith("_empty_nn_module_stack"):
        return None
    return re.sub(r"@\d+", "", path)


def _name_outputs(model: Model, program: ExportedProgram) -> None:
    """Name the graph's outputs by their place in what forward returned."""
    paths = ["_".join(path) for path in _leaf_paths(program.call_spec.out_spec)]
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    names = []
    for index, spec in enumerate(specs):
        path = paths[index] if len(paths) == len(specs) else str(index)
        name = "output" if path == "" else f"output_{path}" if path[0].isdigit() else path
        if type(spec.arg).__name__ == "ConstantArgument":
            # None where there might have been a tensor (an unused cache, no loss without labels).
            continue
        names.append(name)
    outputs = list(model.graph.outputs)
    if len(names) != len(outputs):
        names = [f"output_{i}" for i in range(len(outputs))]
    fixed = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    values = {out.name: out for node in model.nodes(domain=None) for out in node.outputs if out.name}
    # First everything out of the way, so that an output may take the name another one had.
    for output in outputs:
        output.name = model.unique_name(f"{output.name}_out")
    for output, wanted in zip(outputs, names, strict=True):
        if wanted in fixed:
            wanted = model.unique_name(f"{wanted}_out")
        holder = values.get(wanted)
        if holder is not None and holder.name == wanted:
            holder.name = model.unique_name(wanted)
        output.name = wanted
        fixed.add(wanted)


def _leaf_paths(spec: Any) -> Iterator[tuple[str, ...]]:
    """Keys and positions that lead to each leaf of a tree spec, in the order of its leaves."""
    children = [] if spec.is_leaf() else spec.children()
    if spec.is_leaf():
        yield ()
        return
    context = spec.context
    fields = getattr(context, "_fields", None) or (context if isinstance(context, (list, tuple)) else None)
    for index, child in enumerate(children):
        key = str(fields[index]) if fields is not None and len(fields) == len(children) else str(index)
        for rest in _leaf_paths(child):
            yield (key, *rest)


def _name_dimensions(model: Model) -> None:
    """Give torch's nameless dimensions (``s77``) the name of the input and axis they come from."""
    known: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            text = str(dim.value) if isinstance(dim, ir.SymbolicDim) else ""
            if re.fullmatch(r"s\d+", text):
                known.setdefault(text, f"{value.name}_dim{axis}")
    if not known:
        return
    pattern = re.compile(rf"\b({'|'.join(known)})\b")

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int):
            return dim
        return None if dim.value is None else pattern.sub(lambda found: known[found[0]], dim.value)

    for graph in model.graphs():
        made = (out for node in graph for out in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *made):
            if value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([renamed(dim) for dim in value.shape])
