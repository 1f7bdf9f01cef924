"""RNN, GRU and LSTM as ONNX defines them (gates in the order iofc and zrh), step by step.

``X`` is ``[T, N, I]``, weights are those of one direction, ``W [gates·H, I]``, ``R [gates·H, H]``, biases
``[gates·H]`` or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]

# Name -> function of (x, alpha, beta), and the values of alpha and beta when none are given.
ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor, float, float], torch.Tensor], float, float]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "elu": (lambda x, alpha, beta: F.elu(x, alpha), 1.0, 0.0),
    "hardsigmoid": (lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0.0, 1.0), 0.2, 0.5),
    "leakyrelu": (lambda x, alpha, beta: F.leaky_relu(x, alpha), 0.01, 0.0),
    "relu": (lambda x, alpha, beta: torch.relu(x), 0.0, 0.0),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), 1.0, 1.0),
    "sigmoid": (lambda x, alpha, beta: torch.sigmoid(x), 0.0, 0.0),
    "softplus": (lambda x, alpha, beta: F.softplus(x), 0.0, 0.0),
    "softsign": (lambda x, alpha, beta: F.softsign(x), 0.0, 0.0),
    "tanh": (lambda x, alpha, beta: torch.tanh(x), 0.0, 0.0),
    "thresholdedrelu": (lambda x, alpha, beta: torch.where(x > alpha, x, torch.zeros_like(x)), 1.0, 0.0),
}

# ONNX takes alpha and beta from its lists only for activations that have them.
HAS_ALPHA = ("affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu")
HAS_BETA = ("affine", "hardsigmoid", "scaledtanh")

# (name, alpha, beta)
Named = tuple[str, float, float]


def activate(x: torch.Tensor, activation: Named, clip: float | None) -> torch.Tensor:
    """An activation by its name; ``clip`` bounds what goes into it."""
    if clip is not None:
        x = x.clamp(-clip, clip)
    name, alpha, beta = activation
    return ACTIVATIONS[name][0](x, alpha, beta)


def _scan(
    steps: torch.Tensor,
    state: tuple[torch.Tensor, ...],
    cell: Callable[[torch.Tensor, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]],
    lengths: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run ``cell`` over the first axis of ``steps``; items whose sequence is over keep their state.

    Returns:
        The first part of the state after every step ``[T, N, H]`` (zeros past an item's end), and the
        last state.
    """
    count = steps.shape[0]
    outputs = []
    for t in range(count - 1, -1, -1) if reverse else range(count):
        new = cell(steps[t], state)
        if lengths is None:
            outputs.append(new[0])
        else:
            going = (t < lengths).reshape(-1, 1)
            outputs.append(torch.where(going, new[0], torch.zeros_like(new[0])))
            new = tuple(torch.where(going, a, b) for a, b in zip(new, state, strict=True))
        state = new
    if not outputs:
        return steps.new_zeros((0, *state[0].shape)), state
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _project(x: torch.Tensor, w: torch.Tensor, *biases: torch.Tensor | None) -> torch.Tensor:
    result = torch.matmul(x, w.transpose(0, 1))
    for bias in biases:
        if bias is not None:
            result = result + bias
    return result


def _rnn(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    wb: torch.Tensor | None,
    rb: torch.Tensor | None,
    h: torch.Tensor,
    activations: Sequence[Named],
    clip: float | None,
    lengths: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    def cell(step: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (activate(step + _project(state[0], r), activations[0], clip),)

    return _scan(_project(x, w, wb, rb), (h,), cell, lengths, reverse)


def _gru(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    wb: torch.Tensor | None,
    rb: torch.Tensor | None,
    h: torch.Tensor,
    activations: Sequence[Named],
    clip: float | None,
    linear_before_reset: bool,
    lengths: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    hidden = h.shape[-1]
    gates, last = r[: 2 * hidden], r[2 * hidden :]
    gate_bias = None if rb is None else rb[: 2 * hidden]
    last_bias = None if rb is None else rb[2 * hidden :]

    def cell(step: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        before = state[0]
        both = activate(step[:, : 2 * hidden] + _project(before, gates, gate_bias), activations[0], clip)
        z, reset = both[:, :hidden], both[:, hidden:]
        if linear_before_reset:
            inner = reset * _project(before, last, last_bias)
        else:
            inner = _project(reset * before, last, last_bias)
        candidate = activate(step[:, 2 * hidden :] + inner, activations[1], clip)
        return ((1 - z) * candidate + z * before,)

    return _scan(_project(x, w, wb), (h,), cell, lengths, reverse)


def _lstm(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    wb: torch.Tensor | None,
    rb: torch.Tensor | None,
    h: torch.Tensor,
    c: torch.Tensor,
    peepholes: torch.Tensor | None,
    activations: Sequence[Named],
    clip: float | None,
    input_forget: bool,
    lengths: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    hidden = h.shape[-1]
    # Peepholes come as input, output, forget.
    peep = [None] * 3 if peepholes is None else list(torch.split(peepholes, hidden))

    def see(gate: torch.Tensor, which: int, memory: torch.Tensor) -> torch.Tensor:
        weights = peep[which]
        return gate if weights is None else gate + weights * memory

    def cell(step: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        before, memory = state
        i, o, f, g = torch.split(step + _project(before, r), hidden, dim=-1)
        entry = activate(see(i, 0, memory), activations[0], clip)
        forget = 1 - entry if input_forget else activate(see(f, 2, memory), activations[0], clip)
        memory = forget * memory + entry * activate(g, activations[1], clip)
        exit_ = activate(see(o, 1, memory), activations[0], clip)
        # The clip bounds what goes into the gates; the memory is none, for ONNX Runtime as well.
        return exit_ * activate(memory, activations[2], None), memory

    return _scan(_project(x, w, wb, rb), (h, c), cell, lengths, reverse)


def recurrent(
    kind: str,
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None,
    lengths: torch.Tensor | None,
    h: torch.Tensor | None,
    c: torch.Tensor | None = None,
    peepholes: torch.Tensor | None = None,
    *,
    directions: Sequence[bool],
    activations: Sequence[Sequence[Named]],
    clip: float | None = None,
    linear_before_reset: bool = False,
    input_forget: bool = False,
    batch_first: bool = False,
) -> tuple[torch.Tensor, ...]:
    """An ONNX RNN, GRU or LSTM.

    Args:
        kind: the operator's name.
        x: ``[T, N, I]``, or ``[N, T, I]`` with ``batch_first``.
        w, r, b: with a first axis for the directions, as ONNX has them.
        lengths: ``[N]``, how many steps of each item count; all when None.
        h, c: initial states ``[directions, N, H]`` (``[N, directions, H]`` with ``batch_first``), zeros
            when None.
        peepholes: ``[directions, 3·H]``.
        directions: for each direction, whether it runs backwards.
        activations: for each direction, the activations of its gates.

    Returns:
        ``Y [T, directions, N, H]`` (``[N, T, directions, H]``), the last ``h`` and, of an LSTM, ``c``.
    """
    if batch_first:
        x = x.transpose(0, 1)
        h = None if h is None else h.transpose(0, 1)
        c = None if c is None else c.transpose(0, 1)
    hidden = r.shape[-1]
    nothing = x.new_zeros((x.shape[1], hidden))
    outputs, states = [], []
    for d, reverse in enumerate(directions):
        wb, rb = (None, None) if b is None else b[d].chunk(2)
        start = nothing if h is None else h[d]
        common = (x, w[d], r[d], wb, rb, start)
        if kind == "RNN":
            y, state = _rnn(*common, activations[d], clip, lengths, reverse)
        elif kind == "GRU":
            y, state = _gru(*common, activations[d], clip, linear_before_reset, lengths, reverse)
        else:
            memory = nothing if c is None else c[d]
            weights = None if peepholes is None else peepholes[d]
            y, state = _lstm(*common, memory, weights, activations[d], clip, input_forget, lengths, reverse)
        outputs.append(y)
        states.append(state)
    return _arrange(
        torch.stack(outputs, 1), [torch.stack(parts) for parts in zip(*states, strict=True)], batch_first
    )


def _arrange(y: torch.Tensor, states: Sequence[torch.Tensor], batch_first: bool) -> tuple[torch.Tensor, ...]:
    if not batch_first:
        return (y, *states)
    return (y.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in states))


# From ONNX's order of gates to torch's: iofc to ifgo, zrh to rzn.
GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 2, 3, 1)}


def torch_recurrent(
    kind: str,
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None,
    h: torch.Tensor | None,
    c: torch.Tensor | None = None,
    *,
    directions: Sequence[bool],
    relu: bool = False,
    batch_first: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The same where torch's own kernels can do it: default activations, no lengths, clip or peepholes.

    A GRU has to be ``linear_before_reset``. Arguments and results as those of :func:`recurrent`.
    """
    if batch_first:
        x = x.transpose(0, 1)
        h = None if h is None else h.transpose(0, 1)
        c = None if c is None else c.transpose(0, 1)
    hidden, count = r.shape[-1], len(directions)
    backwards = count == 1 and directions[0]
    if backwards:
        x = x.flip(0)
    start = x.new_zeros((count, x.shape[1], hidden)) if h is None else h.contiguous()
    parameters: list[torch.Tensor] = []
    for d in range(count):
        parts = [w[d], r[d]] if b is None else [w[d], r[d], *b[d].chunk(2)]
        parameters.extend(_reorder(part, hidden, GATES[kind]) for part in parts)
    rest = (parameters, b is not None, 1, 0.0, False, count == 2, False)
    states: tuple[torch.Tensor, ...]
    if kind == "LSTM":
        memory = torch.zeros_like(start) if c is None else c.contiguous()
        y, *states_found = torch.lstm(x, (start, memory), *rest)
        states = tuple(states_found)
    else:
        function = torch.gru if kind == "GRU" else torch.rnn_relu if relu else torch.rnn_tanh
        y, last = function(x, start, *rest)
        states = (last,)
    if backwards:
        y = y.flip(0)
    y = y.reshape(*y.shape[:2], count, hidden).transpose(1, 2)
    return _arrange(y, states, batch_first)


def _reorder(part: torch.Tensor, hidden: int, gates: Sequence[int]) -> torch.Tensor:
    if len(gates) == 1:
        return part
    pieces = torch.split(part, hidden)
    return torch.cat([pieces[gate] for gate in gates])
