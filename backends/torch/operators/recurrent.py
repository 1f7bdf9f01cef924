"""RNN, GRU and LSTM."""

from __future__ import annotations

from torch import fx

from effic.backends.torch.builder import GraphBuilder, OperatorNode
from effic.backends.torch.functions import recurrent as functions
from effic.backends.torch.operators.arguments import tensor, unpack

_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


def recurrent(node: OperatorNode, graph: GraphBuilder) -> tuple[fx.Node | None, ...]:
    attributes = node.attributes
    kind = node.op_type
    directions = _DIRECTIONS[str(attributes.get("direction", "forward")).lower()]
    activations = _activations(node, len(directions))
    clip = attributes.get("clip") or None
    linear_before_reset = bool(attributes.get("linear_before_reset", 0))
    input_forget = bool(attributes.get("input_forget", 0))
    batch_first = bool(attributes.get("layout", 0))
    x, w, r, b, lengths = tensor(node, 0), tensor(node, 1), tensor(node, 2), node.input(3), node.input(4)
    states = [node.input(5)] if kind != "LSTM" else [node.input(5), node.input(6)]
    peepholes = node.input(7) if kind == "LSTM" else None

    names = [[name for name, _, _ in part] for part in activations]
    default = [[name.lower() for name in _DEFAULTS[kind]]] * len(directions)
    relu = kind == "RNN" and names == [["relu"]] * len(directions)
    plain = (names == default or relu) and clip is None and lengths is None and peepholes is None
    if plain and not input_forget and (kind != "GRU" or linear_before_reset):
        made = graph.call(
            functions.torch_recurrent,
            kind, x, w, r, b, *states,
            directions=directions,
            relu=relu,
            batch_first=batch_first,
        )  # fmt: skip
    else:
        rest = [*states, peepholes] if kind == "LSTM" else states
        made = graph.call(
            functions.recurrent,
            kind, x, w, r, b, lengths, *rest,
            directions=directions,
            activations=activations,
            clip=clip,
            linear_before_reset=linear_before_reset,
            input_forget=input_forget,
            batch_first=batch_first,
        )  # fmt: skip
    return unpack(graph, made, node)


def _activations(node: OperatorNode, directions: int) -> list[list[functions.Named]]:
    """Activations of each direction. ``activation_alpha`` has an entry for each that has an alpha, in order."""
    default = _DEFAULTS[node.op_type]
    names = [str(name).lower() for name in node.attributes.get("activations", default * directions)]
    if len(names) != len(default) * directions:
        # The default that the schema of RNN writes down is that of two directions.
        names = names[: len(default) * directions]
    alphas = list(node.attributes.get("activation_alpha", []))
    betas = list(node.attributes.get("activation_beta", []))
    found: list[functions.Named] = []
    for name in names:
        if name not in functions.ACTIVATIONS:
            node.refuse(f"has the activation {name}, which is not known")
        _, alpha, beta = functions.ACTIVATIONS[name]
        if name in functions.HAS_ALPHA and alphas:
            alpha = alphas.pop(0)
        if name in functions.HAS_BETA and betas:
            beta = betas.pop(0)
        found.append((name, alpha, beta))
    step = len(default)
    return [found[i : i + step] for i in range(0, len(found), step)]
