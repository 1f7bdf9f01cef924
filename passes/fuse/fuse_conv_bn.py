"""fuse-conv-bn: fold batch norms, and constant scales and shifts, into the layers beside them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx_ir as ir

from effic.ir.model import Model, describe, sole_consumer
from effic.passes.base import Numerics, Pass, Remarks, option
from effic.passes.fuse.affine import LARGE_SCALE, AffineMap
from effic.passes.fuse.layers import CONVOLUTIONS, LINEARS, Folded, Layer, MatMulLayer, read_layer, rewrite
from effic.passes.fuse.lone_norm import merge_norms
from effic.passes.fuse.pointwise import merge_pointwise
from effic.passes.fuse.reading import NORM, Orphans, Refused, is_pass_through, read_map, refuse_broadcast
from effic.passes.fuse.steps import Step, is_norm, steps_after, steps_before
from effic.passes.fuse.tune_form import activation_bytes, make_live, tune_form


@dataclass(frozen=True)
class FuseConvBN(Pass):
    """Fold batch norms into the convolutions and linear layers beside them.

    A batch norm with frozen statistics is y = a·x + t per channel, with a = scale / √(var + ε)
    and t = bias - a·mean.

    Before:  y = Conv(x, w, b);  z = BatchNormalization(y, scale, bias, mean, var)
    After:   z = Conv(x, a·w, a·b + t)

    Folded backward into the Conv, ConvTranspose (any groups), Gemm, MatMul or embedding Gather
    that makes its input, else forward into the Conv, Gemm or MatMul layers that read its output.
    Neg, and Mul, Add, Sub and Div by one constant per channel, are scales and shifts as well: backward into
    any layer, forward into convolutions (a scale before a MatMul is left, because it is most often
    the end of a layer norm that a runtime recognises whole). Batch norms in a row become one.
    A 1x1 Conv and the Conv beside it become one where that leaves fewer weights. Identity and
    inference Dropout in between are crossed. Scales and shifts are computed in float64 and rounded once;
    a weight of up to 32 bits is scaled in float32.

    mode=deploy is for inference. mode=tune is for fine-tuning: a·w and a·b + t stay in the graph as
    arithmetic over the parameters, which keep their names, so that gradients are those of the model with
    its norms while the convolution's output is not kept for the backward pass. Only what follows a Conv,
    ConvTranspose, Gemm or MatMul has a tune form, and only with a norm in it; the rest is left.
    fold-constants computes that arithmetic: it turns tune into deploy, bit for bit (a weight that several
    layers share is copied only with max_growth). So the cleanup presets, which fold, go before it.

    Missed when the layer's output is read elsewhere or is a graph output, when the weight or the
    statistics are computed at run time or quantized, in training mode, when the norm is not on the
    layer's output channels, when a padded convolution would see the shift at its border, or when
    the folded weight would overflow its type. A negative variance is an error.
    """

    name: ClassVar[str] = "fuse-conv-bn"
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    mode: Literal["deploy", "tune"] = option(
        "deploy", help="deploy: new constants; tune: arithmetic over the live parameters, for fine-tuning"
    )
    fold_linear: bool = option(True, help="fold into Gemm, MatMul and embedding Gather as well")
    fold_transposed: bool = option(True, help="fold into ConvTranspose as well")
    fold_bn_conv: bool = option(True, help="fold forward into the layers that read the batch norm")
    bn_conv_padding: Literal["skip", "bias_map"] = option(
        "skip", help="before a padded Conv: leave the norm, or add its exact shift as a [1, C, H, W] constant"
    )
    fold_scale_shift: bool = option(True, help="fold Mul, Add, Sub, Div by per-channel constants as well")
    fold_pointwise: bool = option(
        True, help="merge a 1x1 Conv with the Conv beside it where that leaves fewer weights"
    )
    # One BatchNormalization kernel was measured 1.8 times as fast as Mul and Add in ONNX Runtime on
    # a CPU (64 channels, 56x56), so a norm without a neighbour stays one.
    lone_norm: Literal["keep", "mul_add"] = option(
        "keep", help="a batch norm with no layer beside it: keep it, or write it as Mul and Add"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "tune":
            self.refuse_idle("mode=tune", "fold_bn_conv", "bn_conv_padding", "fold_pointwise", "lone_norm")

    def apply(self, model: Model, remarks: Remarks) -> None:
        """Rewrite ``model`` in place, leaving remarks."""
        kinds = ["Conv", *(LINEARS if self.fold_linear else ())]
        if self.fold_transposed:
            kinds.append("ConvTranspose")
        work = _Folding(self, model, remarks, frozenset(kinds))
        layers = list(model.nodes(*kinds))
        for node in layers:
            work.fold_backward(node)
        if self.fold_bn_conv and self.mode == "deploy":
            for node in layers:
                work.fold_forward(node)
        for norm in model.nodes(NORM):
            work.settle(norm)
        if self.fold_pointwise and self.mode == "deploy":
            for node in model.nodes("Conv"):
                work.merge_convs(node)
        work.orphans.sweep()


@dataclass(eq=False)
class _Folding:
    """One run of the pass: what is being folded, and why a norm has not been so far."""

    options: FuseConvBN
    model: Model
    remarks: Remarks
    kinds: frozenset[str]
    reasons: dict[ir.Node, list[str]] = field(default_factory=dict)
    orphans: Orphans = field(default_factory=Orphans)
    looked_at: set[ir.Value] = field(default_factory=set)

    def note(self, node: ir.Node, reason: str) -> None:
        """Keep why a norm was not folded this way (another may work); report anything else now."""
        if is_norm(node):
            self.reasons.setdefault(node, []).append(reason)
        else:
            self.remarks.missed(node, reason)

    def fold_backward(self, node: ir.Node) -> None:
        """Fold the scales and shifts after ``node`` into it."""
        steps = steps_after(node.outputs[0], self.model, self.options.fold_scale_shift)
        if not steps:
            return
        try:
            layer = read_layer(node)
        except Refused as refusal:
            # A MatMul of two activations is no layer: only a norm after it is worth a word.
            for step in steps[:1]:
                if is_norm(step.node):
                    self.note(step.node, f"{describe(node)}: {refusal}")
            return
        done: list[Step] = []
        maps: list[AffineMap] = []
        for step in steps:
            try:
                maps.append(read_map(step.node, step.value, layer.outputs, self.model))
            except Refused as refusal:
                self.note(step.node, str(refusal))
                break
            done.append(step)
        if not done:
            return
        total = functools.reduce(AffineMap.then, maps)
        if len(done) == 1 and total.only_shifts and isinstance(layer, MatMulLayer):
            return  # A MatMul with its bias, as it should be.
        if self.options.mode == "tune":
            self.keep_live(layer, done, maps, total)
            return
        try:
            refuse_copy(layer, total, done)
            folded = layer.fold_outputs(total)
        except Refused as refusal:
            self.note(done[0].node, f"{describe(node)}: {refusal}")
            return
        last = done[-1].node.outputs[0]
        result = rewrite(layer, folded, self.model, self.orphans)
        result.type, result.shape = result.type or last.type, result.shape or last.shape
        self.model.replace_value(last, result)
        self.remove(done)
        for step, found in zip(done, maps, strict=True):
            self.report(step.node, found, f"folded into {describe(node)}")

    def keep_live(self, layer: Layer, done: list[Step], maps: list[AffineMap], total: AffineMap) -> None:
        """Put the scales and shifts after a layer into its weight and bias, as arithmetic over them."""
        node = layer.node
        if not any(is_norm(step.node) for step in done):
            self.note(done[0].node, "tune mode leaves scales and shifts without a batch norm")
            return
        try:
            layer.fold_outputs(total)  # What training starts from has to fit its type.
            weight, bias, addend = tune_form(layer, done, self.model)
        except Refused as refusal:
            self.note(next(s.node for s in done if is_norm(s.node)), f"{describe(node)}: {refusal}")
            return
        saved = activation_bytes(node.outputs[0])
        last = done[-1].node.outputs[0]
        result = make_live(layer, weight, bias, addend, self.model)
        result.type, result.shape = result.type or last.type, result.shape or last.shape
        self.model.replace_value(last, result)
        self.remove(done)
        for step, found in zip(done, maps, strict=True):
            norm = is_norm(step.node)
            data = {"activation_bytes": saved} if norm and saved is not None else {}
            self.report(
                step.node, found, f"computed with the weight of {describe(node)} on every run", **data
            )

    def fold_forward(self, node: ir.Node) -> None:
        """Fold the scales and shifts before ``node`` into it and all others that read them."""
        if node.op_type == "Gather" or node.inputs[0] is None:
            return
        steps = steps_before(node.inputs[0], self.model, self.options.fold_scale_shift)
        if not steps or steps[-1].node.outputs[0] in self.looked_at:
            return
        result = steps[-1].node.outputs[0]
        self.looked_at.add(result)
        normed = any(is_norm(step.node) for step in steps)
        if not normed and node.op_type not in CONVOLUTIONS:
            return
        try:
            layers, crossed = self.readers(result)
        except Refused as refusal:
            if normed:
                self.note(next(s.node for s in reversed(steps) if is_norm(s.node)), str(refusal))
            return
        total = AffineMap.identity(layers[0].inputs.channels)
        done: list[Step] = []
        maps: list[AffineMap] = []
        for step in reversed(steps):
            try:
                refuse_broadcast(step.node, step.value, layers[0].inputs)
                found = read_map(step.node, step.value, layers[0].inputs, self.model)
            except Refused as refusal:
                self.note(step.node, str(refusal))
                break
            total = found.then(total)
            done.insert(0, step)
            maps.insert(0, found)
        if not done:
            return
        try:
            plans = self.plan_forward(layers, total, done)
        except Refused as refusal:
            self.note(done[-1].node, str(refusal))
            return
        source = done[0].value
        for layer, folded in zip(layers, plans, strict=True):
            layer.node.replace_input_with(0, source)
            self.rewrite_in_place(layer, folded)
        for pass_through in reversed(crossed):
            self.orphans.remove_node(pass_through)
        self.remove(done)
        names = ", ".join(describe(layer.node) for layer in layers)
        for step, found in zip(done, maps, strict=True):
            self.report(step.node, found, f"folded into {names}")

    def readers(self, value: ir.Value) -> tuple[list[Layer], list[ir.Node]]:
        """The layers that read ``value``, all with one layout, and the pass-through nodes before them."""
        if value.is_graph_output():
            raise Refused("its result is an output of the graph")
        layers: list[Layer] = []
        crossed: list[ir.Node] = []
        for use in value.uses():
            reached, node = value, use.node
            while is_pass_through(node, self.model):
                crossed.append(node)
                reached, before = node.outputs[0], node
                found = sole_consumer(reached)
                if found is None:
                    raise Refused(f"its result is read through {describe(before)} more than once")
                node = found
            if (
                node.op_type not in self.kinds
                or node.inputs[0] is not reached
                or node.graph is not value.graph
            ):
                raise Refused(f"its result is read by {describe(node)}, which cannot take it in")
            try:
                layers.append(read_layer(node))
            except Refused as refusal:
                raise Refused(f"{describe(node)} reads its result: {refusal}") from None
        if any(layer.inputs != layers[0].inputs for layer in layers):
            raise Refused("the layers that read its result take different channels")
        return layers, crossed

    def plan_forward(self, layers: list[Layer], total: AffineMap, done: list[Step]) -> list[Folded]:
        by_map = self.options.bn_conv_padding == "bias_map"
        for layer in layers:
            refuse_copy(layer, total, done)
        return [layer.fold_inputs(total, done[0].value, by_map) for layer in layers]

    def rewrite_in_place(self, layer: Layer, folded: Folded) -> None:
        output = layer.node.outputs[0]
        result = rewrite(layer, folded, self.model, self.orphans)
        if result is output:
            return
        add = result.producer()
        self.model.replace_value(output, result)
        if output.name is None:
            output.name = self.model.unique_name(f"{result.name}_unshifted")
        if add is not None:
            add.replace_input_with(0, output)
        self.fold_backward(layer.node)  # Joins the new Add with a bias that follows it.

    def remove(self, steps: list[Step]) -> None:
        """Remove folded nodes, last first, with the constants only they read."""
        for step in reversed(steps):
            self.orphans.remove_node(step.node)
            for node in reversed(step.crossed):
                self.orphans.remove_node(node)

    def report(self, node: ir.Node, found: AffineMap, text: str, **data: int) -> None:
        """A passed remark with the largest scale, and a warning when that is suspicious."""
        largest = found.largest_scale
        if largest > LARGE_SCALE:
            text += f"; its largest scale is {largest:.3g}, so a channel's variance is almost zero"
        self.remarks.passed(node, text, max_abs_scale=largest, large_scale=largest > LARGE_SCALE, **data)

    def merge_convs(self, node: ir.Node) -> None:
        """Merge a convolution with the one that alone feeds it, when one of them is 1x1."""
        try:
            merged = merge_pointwise(node, self.model, self.orphans)
        except Refused as refusal:
            self.remarks.missed(node, str(refusal))
            return
        if merged is not None:
            self.remarks.passed(node, "merged with the convolution before it")
            self.merge_convs(merged)

    def settle(self, norm: ir.Node) -> None:
        """Merge what is left of a row of norms, or say why a norm stays."""
        reasons = self.reasons.get(norm, [])
        neighbour = _layer_before(norm)
        blocked = self.blocked(norm, neighbour) if neighbour is not None else None
        reasons = [blocked, *reasons] if blocked else reasons
        alone = neighbour is None and not reasons
        if self.options.mode == "tune":
            text = "tune mode folds a batch norm only into the layer whose output it takes"
            self.remarks.missed(norm, "; ".join(reasons) or text)
            return
        try:
            merged = merge_norms(
                norm, self.model, self.orphans, alone and self.options.lone_norm == "mul_add"
            )
        except Refused as refusal:
            self.remarks.missed(norm, "; ".join(dict.fromkeys([*reasons, str(refusal)])))
            return
        if merged:
            self.remarks.passed(norm, merged)
        else:
            self.remarks.missed(norm, "; ".join(reasons) or "no convolution or linear layer is beside it")

    def blocked(self, norm: ir.Node, layer: ir.Node) -> str | None:
        """Why a norm that follows a layer was not folded into it, judged by the graph alone."""
        if layer.op_type not in self.kinds:
            return f"folding into {describe(layer)} is switched off"
        if layer.graph is not norm.graph:
            return f"{describe(layer)} is in an outer graph"
        value = layer.outputs[0]
        while (node := sole_consumer(value)) is not None and node is not norm:
            value = node.outputs[0]
        if value.is_graph_output():
            return f"the output of {describe(layer)} is an output of the graph"
        return f"the output of {describe(layer)} is read elsewhere" if node is None else None


def refuse_copy(layer: Layer, total: AffineMap, done: list[Step]) -> None:
    """Refuse to copy a shared weight for the sake of a scale.

    A batch norm is worth a copy: it goes with its four vectors and a pass over the feature map. One
    Mul is not, least of all when the weight is a tied embedding.
    """
    if layer.weight.shared and not total.only_shifts and not any(is_norm(step.node) for step in done):
        raise Refused("its weight is shared, and a scaled copy would make the model larger")


def _layer_before(norm: ir.Node) -> ir.Node | None:
    value = norm.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in (*CONVOLUTIONS, *LINEARS) and node.domain == "":
            # Gather picks shapes and rows alike; beside a norm only the latter makes sense.
            return node
        if node.op_type not in ("Identity", "Dropout"):
            return None
        value = node.inputs[0]
    return None
