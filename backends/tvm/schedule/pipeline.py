"""From operators to scheduled functions: what runs on a CPU between building a module and generating code.

TVM's own CPU pipeline legalizes and fuses, and leaves the loops as they come (35 to 190 times slower than
ONNX Runtime). Here operators with a kernel of their own become calls of it, the rest is legalized and fused,
and every function without a schedule gets one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, relax, tirx
from tvm.relax.backend import cpu_generic

from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.schedule.choose_kernels import choose_kernels
from effic.backends.tvm.schedule.functions import NAIVE, rooted, scheduled


def schedule_functions(cpu: Cpu) -> Any:
    """The pass that schedules every PrimFunc without the attribute ``tirx.is_scheduled``."""

    def run(module: Any, _context: Any) -> Any:
        changed = {}
        for variable, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc) and not _is_scheduled(function):
                changed[variable] = scheduled(function, cpu)
        for variable, function in changed.items():
            module.update_func(variable, function)
        return module

    return tvm.transform.module_pass(run, opt_level=0, name="effic.ScheduleFunctions")


def _root_functions() -> Any:
    """The pass that puts bare bodies into a root block: the next one fails on them otherwise."""

    def run(module: Any, _context: Any) -> Any:
        for variable, function in list(module.functions_items()):
            if isinstance(function, tirx.PrimFunc):
                body = rooted(function.body)
                if not body.same_as(function.body):
                    module.update_func(variable, function.with_body(body))
        return module

    return tvm.transform.module_pass(run, opt_level=0, name="effic.RootFunctions")


def _drop_unused() -> Any:
    """The pass that drops functions nobody calls, kernels with a name of their own among them."""

    def run(module: Any, _context: Any) -> Any:
        module = relax.transform.DeadCodeElimination()(module)
        called: set[str] = set()
        for _, function in module.functions_items():
            # The function's own body, not its variable: nobody calls a kernel from itself.
            tvm_ffi.structural_walk(function.body, (ir.GlobalVar, lambda v: called.add(v.name_hint)))
        kept = {
            variable: function
            for variable, function in module.functions_items()
            if isinstance(function, relax.Function) or variable.name_hint in called
        }
        return ir.IRModule(kept, attrs=module.attrs, global_infos=module.global_infos)

    return tvm.transform.module_pass(run, opt_level=0, name="effic.DropUnused")


def called_functions(module: Any) -> dict[str, int]:
    """How often each function is called from the module's Relax functions, dead calls left out."""
    module = relax.transform.DeadCodeElimination()(module)
    found: Counter[str] = Counter()

    def count(call: Any) -> None:
        if call.op == ir.Op.get("relax.call_tir") and isinstance(call.args[0], ir.GlobalVar):
            found[call.args[0].name_hint] += 1

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            tvm_ffi.structural_walk(function.body, (relax.Call, count))
    return dict(found)


def _is_scheduled(function: Any) -> bool:
    return bool(function.attrs is not None and function.attrs.get("tirx.is_scheduled", False))


def naive_functions(module: Any) -> dict[str, str]:
    """Functions of a scheduled module that stayed naive, and why."""
    found = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and function.attrs is not None and NAIVE in function.attrs:
            found[variable.name_hint] = str(function.attrs[NAIVE])
    return found


def fuse_and_schedule(cpu: Cpu) -> Any:
    """The pass up to scheduled functions: kernels chosen, operators legalized and fused, loops arranged.

    Parameters are inputs of the function and so are never folded; only what is constant in the code
    itself is.
    """
    target = cpu.target()
    steps = [
        relax.transform.DeadCodeElimination(),  # what a kernel made needless gets none
        choose_kernels(cpu),
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        *cpu_generic.library_dispatch_passes(target),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        _drop_unused(),
        _root_functions(),
        relax.transform.RewriteDataflowReshape(),
        schedule_functions(cpu),
    ]
    return _under(target, steps, "effic.FuseAndSchedule")


def pipeline(cpu: Cpu) -> Any:
    """The whole Relax pipeline for ``tvm.compile(module, target, relax_pipeline=pipeline(cpu))``."""
    target = cpu.target()
    return _under(target, [fuse_and_schedule(cpu), *_finish(target)], "effic.Pipeline")


def _finish(target: Any) -> list[Any]:
    """From scheduled functions to what the virtual machine runs."""
    return [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        *cpu_generic.finalize_passes(target),
    ]


def _under(target: Any, steps: list[Any], name: str) -> Any:
    def run(module: Any, _context: Any) -> Any:
        with target:
            return tvm.transform.Sequential(steps)(module)

    return tvm.transform.module_pass(run, opt_level=0, name=name)


def compile_module(module: Any, cpu: Cpu) -> tuple[Any, dict[str, str]]:
    """Schedule and compile a Relax module.

    Returns:
        The ``tvm.runtime.Executable``, and the functions that stayed naive with the reason of each.
    """
    ready = fuse_and_schedule(cpu)(module)
    target = cpu.target()
    executable = tvm.compile(ready, target, relax_pipeline=_under(target, _finish(target), "effic.Finish"))
    return executable, naive_functions(ready)
