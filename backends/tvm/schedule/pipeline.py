"""From operators to scheduled functions: what runs on a CPU between building a module and generating code.

TVM's own CPU pipeline legalizes and fuses, and leaves the loops as they come (35 to 190 times slower than
ONNX Runtime). Here operators with a kernel of their own become calls of it, the rest is legalized and fused,
and every function without a schedule gets one.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import ir, relax, tirx
from tvm.relax.backend import cpu_generic

from effic.backends.tvm.codegen import generating
from effic.backends.tvm.cpu import Cpu
from effic.backends.tvm.schedule.choose_kernels import choose_kernels
from effic.backends.tvm.schedule.functions import NAIVE, rooted, scheduled

if TYPE_CHECKING:
    from effic.backends.tvm.tune_records import TunedKernels


def schedule_functions(cpu: Cpu, tuned: TunedKernels | None = None) -> Any:
    """The pass that schedules every PrimFunc without the attribute ``tirx.is_scheduled``, by records where ``tuned``
    has one that was measured faster."""

    def run(module: Any, _context: Any) -> Any:
        for name, function in unscheduled(module).items():
            made = tuned.schedule(function, name, cpu) if tuned is not None else None
            module.update_func(
                module.get_global_var(name), scheduled(function, cpu) if made is None else made
            )
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


def unscheduled(module: Any) -> dict[str, Any]:
    """The PrimFuncs of a module that have no schedule yet."""
    return {
        variable.name_hint: function
        for variable, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc) and not _is_scheduled(function)
    }


def naive_functions(module: Any) -> dict[str, str]:
    """Functions of a scheduled module that stayed naive, and why."""
    found = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and function.attrs is not None and NAIVE in function.attrs:
            found[variable.name_hint] = str(function.attrs[NAIVE])
    return found


def fuse(cpu: Cpu) -> Any:
    """The pass up to functions without a schedule: kernels chosen, operators legalized and fused.

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
    ]
    return _under(target, steps, "effic.Fuse")


def fuse_and_schedule(cpu: Cpu, tuned: TunedKernels | None = None) -> Any:
    """The pass up to scheduled functions: :func:`fuse`, then loops arranged."""
    return _under(cpu.target(), [fuse(cpu), schedule_functions(cpu, tuned)], "effic.FuseAndSchedule")


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
        _without_aliases(),
    ]


def _without_aliases() -> Any:
    """The pass that says of every PrimFunc that its buffers lie apart, as they do.

    TVM's functions that compute shapes do not say so, and its generator of code takes what the last function
    says for all of them: kernels would read their buffers again at every step.
    """

    def run(module: Any, _context: Any) -> Any:
        for variable, function in list(module.functions_items()):
            if isinstance(function, tirx.PrimFunc):
                module.update_func(variable, function.with_attr("tirx.noalias", True))
        return module

    return tvm.transform.module_pass(run, opt_level=0, name="effic.WithoutAliases")


def _under(target: Any, steps: list[Any], name: str) -> Any:
    def run(module: Any, _context: Any) -> Any:
        with target:
            return tvm.transform.Sequential(steps)(module)

    return tvm.transform.module_pass(run, opt_level=0, name=name)


def compile_module(module: Any, cpu: Cpu, tuned: TunedKernels | None = None) -> tuple[Any, dict[str, str]]:
    """Schedule and compile a Relax module, with the schedules that ``tuned`` has.

    Returns:
        The ``tvm.runtime.Executable``, and the functions that stayed naive with the reason of each.
    """
    target = cpu.target()
    with generating():
        ready = fuse_and_schedule(cpu, tuned)(module)  # it compiles, too: what is constant is folded
        executable = tvm.compile(
            ready, target, relax_pipeline=_under(target, _finish(target), "effic.Finish")
        )
    return executable, naive_functions(ready)
