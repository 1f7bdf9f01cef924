"""``effic capture``: a torch module becomes an ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import onnx_ir as ir


@click.command()
@click.argument("source", metavar="PACKAGE.MODULE:FACTORY | FILE.pt2")
@click.option("-o", "--output", required=True, metavar="FILE.onnx", help="Where the model is written.")
@click.option("--opset", type=int, metavar="N", help="ONNX opset to produce, 18 or newer [torch's default].")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def capture(source: str, output: str, opset: int | None, force: bool, as_json: bool) -> None:
    """Turn a torch module into an ONNX file.

    FACTORY is a function without arguments that returns (module, example_inputs), or
    (module, example_inputs, dynamic_shapes) as torch.export takes them. It is imported and called:
    THIS RUNS YOUR CODE. A .pt2 file is read without running what is in it.

    Weights keep their state-dict names and batch norms stay unfused, for the passes to see.

    \b
    Example, in nets.py:
        def tiny():
            return Tiny().eval(), (torch.randn(1, 3, 32, 32),), {"x": {0: "batch"}}
    and then:
        effic capture nets:tiny -o tiny.onnx
    """
    import os

    from effic.cli.console import amount, note, print_json, print_result, size
    from effic.ir import torch_capture
    from effic.ir.cost import model_cost
    from effic.ir.errors import UsageError
    from effic.ir.onnx_writer import model_bytes

    if os.path.lexists(output) and not force:
        # Said before the work: a capture takes seconds to minutes.
        raise UsageError(f"{output} exists; pass --force to overwrite it.")
    if source.endswith(".pt2"):
        model = torch_capture.capture(source, opset=opset)
    else:
        note(f"effic: importing and running your code: {source}")
        made = torch_capture.load_factory(source)
        # Nobody else uses the module, so its weights need no copy.
        model = torch_capture.capture(
            made.module,
            made.example_inputs,
            dynamic_shapes=made.dynamic_shapes,
            opset=opset,
            share_weights=True,
        )
    model.save(output, force=force)
    cost = model_cost(model)
    stored = model_bytes(model)
    if as_json:
        print_json(
            {
                "source": source,
                "output": output,
                "opset": model.opset,
                "nodes": cost.nodes,
                "parameters": cost.parameters,
                "weight_bytes": cost.weight_bytes,
                "bytes": stored,
                "inputs": {value.name: _dims(value) for value in model.graph.inputs},
                "outputs": {value.name: _dims(value) for value in model.graph.outputs},
                "notes": list(model.origin.notes),
            }
        )
        return
    for text in model.origin.notes:
        note(f"effic: {text}")
    figures = f"{cost.nodes} nodes, {amount(cost.parameters)} parameters, {size(stored)}"
    print_result(f"{output}: {figures}, opset {model.opset}")


def _dims(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
