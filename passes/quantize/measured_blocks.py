"""Where weights that share an input are measured together, and what each choice does there.

AdaDim as published judges the projections of an attention module at the output of the module and the
two halves of a gated MLP at the output of the MLP (arXiv 2309.15531 and its code). Stated without
knowledge of such modules: weights that read the same value are measured where their paths have come
together again, and one weight further (the output projection, the down projection).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from effic.ir.model import Model, describe
from effic.ir.probe import Probe, constant_values
from effic.ir.topology import digraph, read_values
from effic.ir.weights import Axis, WeightSite, weight_sites
from effic.passes.activations import operand
from effic.passes.quantize.adadim import Candidate, choose

if TYPE_CHECKING:
    import networkx as nx

    from effic.passes.calibration import Calibration

# These read the shape of a value, which quantization leaves alone.
_SHAPE_READERS = ("Shape", "Size")
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")

# Weights of the groups that are judged in one run over the samples: three times as much is held.
_BATCH_BYTES = 128 << 20


@dataclass(eq=False)
class Block:
    """Weights that share an input, and the module they are measured at.

    Attributes:
        sites: in the order of the graph.
        inputs: values of the main graph that the module reads and that depend on the sample.
        outputs: values that are compared.
    """

    sites: list[WeightSite]
    inputs: list[ir.Value]
    outputs: list[ir.Value]

    @property
    def where(self) -> str:
        """The measured values, for people."""
        return ", ".join(str(v.name) for v in self.outputs)


@dataclass
class Judgement:
    """What was measured for one weight of a block.

    Attributes:
        errors: mean squared difference of the block's outputs, by dimension.
        signal: mean square of the block's outputs.
        where: name of the measured value.
    """

    errors: dict[Axis, float]
    signal: float
    where: str


def find_blocks(model: Model, sites: Sequence[WeightSite]) -> tuple[list[Block], dict[WeightSite, str]]:
    """Group weights that share an input and find where each group is measured.

    Args:
        model: the model; not changed.
        sites: weights of its main graph whose inputs are seen.

    Returns:
        The blocks in the order of the graph, and for weights that share an input but have no measuring
        point the reason, as a phrase. Weights with an input of their own are in neither.
    """
    shared: dict[ir.Value, list[WeightSite]] = {}
    reasons: dict[WeightSite, str] = {}
    for site in sites:
        uses = [use for use in site.uses if use.node.op_type != "Gather"]
        values = {value for use in uses if (value := operand(use)) is not None}
        for value in values if len(values) == 1 else ():
            shared.setdefault(value, []).append(site)
    groups = [group for group in shared.values() if len(group) > 1]
    blocks: list[Block] = []
    if not groups:
        return blocks, reasons
    flow = _Flow(model)
    for group in groups:
        tied = [site for site in group if len(site.uses) > 1]
        reasons.update((site, "the weight is read more than once") for site in tied)
        single = sorted((s for s in group if len(s.uses) == 1), key=lambda s: flow.place[s.uses[0].node])
        if len(single) < 2:
            continue
        found = flow.block(single)
        if isinstance(found, Block):
            blocks.append(found)
        else:
            reasons.update((site, found) for site in single)
    return blocks, reasons


class _Flow:
    """Who feeds whom in the main graph, and where paths meet."""

    def __init__(self, model: Model) -> None:
        import networkx as nx

        self.graph = model.graph
        self.place = {node: number for number, node in enumerate(model.graph)}
        self.view: nx.DiGraph = digraph(model.graph)
        shape_edges = [edge for edge in self.view.edges if edge[1].op_type in _SHAPE_READERS]
        self.view.remove_edges_from(shape_edges)
        self.constants = constant_values(model.graph)
        known = [site for site in weight_sites(model) if site.shape and site.kinds != {"Gather"}]
        self.weights = {use.node for site in known for use in site.uses if use.node.op_type != "Gather"}
        end = object()
        turned = self.view.reverse()
        for value in model.graph.outputs:
            if (node := value.producer()) is not None:
                turned.add_edge(end, node)
        self.next_common = dict(nx.immediate_dominators(turned, end)) if end in turned else {}
        self.end = end

    def block(self, sites: list[WeightSite]) -> Block | str:
        """The block of weights that share an input, or why there is none."""
        nodes = [site.uses[0].node for site in sites]
        join = self._join(nodes)
        if join is None:
            return "the paths of the weights that share its input do not meet again before the outputs"
        last = self._forward(join)
        outputs = _used(last)
        inside = self._between(nodes, last)
        others = [node for node in inside if node in self.weights and node not in nodes and node is not last]
        if len(others) > len(nodes):
            return (
                f"the paths of the weights that share its input meet only behind {len(others)} other weights"
            )
        drawn = next((n for n in inside if n.op_type.startswith(_RANDOM) and not _sure(n)), None)
        if drawn is not None:
            return f"{describe(drawn)} draws random numbers on the way to where it would be measured"
        inputs: dict[int, ir.Value] = {}
        weights = {id(site.value) for site in sites}
        for node in inside:
            for value in read_values(node):
                fixed = id(value) in weights or value in self.constants or value.graph is not self.graph
                if not fixed and value.producer() not in inside:
                    inputs.setdefault(id(value), value)
        if odd := [v for v in (*inputs.values(), *outputs) if not isinstance(v.type, ir.TensorType | None)]:
            return f"'{odd[0].name}', which would have to be recorded, is no tensor"
        return Block(sites, list(inputs.values()), outputs)

    def _join(self, nodes: list[ir.Node]) -> ir.Node | None:
        """The first node that every path from each of the nodes runs through."""
        rest = [set(self._chain(node)) for node in nodes[1:]]
        return next((n for n in self._chain(nodes[0]) if all(n in chain for chain in rest)), None)

    def _chain(self, node: ir.Node) -> Iterator[ir.Node]:
        """What every path from a node to the outputs runs through, in order."""
        current: ir.Node | object | None = self.next_common.get(node)
        while isinstance(current, ir.Node):
            yield current
            current = self.next_common.get(current)

    def _forward(self, node: ir.Node) -> ir.Node:
        """The next node with a weight, or where the single path from ``node`` ends or forks."""
        while node not in self.weights:
            outputs = _used(node)
            if len(outputs) != 1 or outputs[0].is_graph_output():
                break
            readers = {use.node for use in outputs[0].uses() if use.node.op_type not in _SHAPE_READERS}
            if len(readers) != 1 or (reader := readers.pop()).graph is not self.graph:
                break
            node = reader
        return node

    def _between(self, nodes: list[ir.Node], last: ir.Node) -> set[ir.Node]:
        import networkx as nx

        after = set(nodes).union(*(nx.descendants(self.view, node) for node in nodes))
        return after & ({last} | set(nx.ancestors(self.view, last)))


def _used(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.outputs if value.uses() or value.is_graph_output()]


def _sure(node: ir.Node) -> bool:
    """Whether a Dropout is switched off, as it is without its training flag."""
    return node.op_type == "Dropout" and (len(node.inputs) < 3 or node.inputs[2] is None)


def judge_blocks(
    model: Model,
    calibration: Calibration,
    blocks: Sequence[Block],
    candidates: Mapping[WeightSite, Mapping[Axis, Candidate]],
) -> dict[WeightSite, Judgement]:
    """Decide the weights of some blocks one after another, greedily.

    All blocks go through the samples together, in as many runs as the largest has weights. Inputs are
    those of the model as it is; what is compared is the block with the weight in question exact and
    with it quantized, weights of the block that were decided before being quantized in both.

    Args:
        model: the model; not changed.
        calibration: the samples.
        blocks: to judge; their weights are held in memory.
        candidates: the weights quantized along each dimension they may take.
    """
    judged: dict[WeightSite, Judgement] = {}
    held = {site: _exact(site) for block in blocks for site in block.sites}
    for turn in range(max((len(block.sites) for block in blocks), default=0)):
        trials = [_Trial(model, block, turn, candidates) for block in blocks if turn < len(block.sites)]
        inputs = {id(value): value for trial in trials for value in trial.block.inputs}
        for values in calibration.record(model, list(inputs.values())):
            for trial in trials:
                trial.add(values, held)
        for trial in trials:
            judgement = trial.judgement()
            judged[trial.site] = judgement
            held[trial.site] = trial.weights[choose(judgement.errors)]
            trial.probe.close()
    return judged


def batches(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks that are judged together, so that their weights fit into memory."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        here = sum(int(site.elements * 4) for site in block.sites)
        if batch and size + here > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += here
    if batch:
        yield batch


def _exact(site: WeightSite) -> np.ndarray:
    with site.matrix() as matrix:
        return np.array(matrix).reshape(site.shape)


@dataclass(eq=False)
class _Trial:
    """One weight of a block under test."""

    model: Model
    block: Block
    turn: int
    candidates: Mapping[WeightSite, Mapping[Axis, Candidate]]
    count: int = 0
    signal: float = 0.0
    noise: dict[Axis, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.site = self.block.sites[self.turn]
        weights = [site.value for site in self.block.sites]
        self.probe = Probe(self.model, [*self.block.inputs, *weights], self.block.outputs, threads=1)
        self.weights = {
            axis: candidate.decode().reshape(self.site.shape)
            for axis, candidate in self.candidates[self.site].items()
        }
        self.noise = dict.fromkeys(self.weights, 0.0)

    def add(self, values: dict[str, np.ndarray], held: dict[WeightSite, np.ndarray]) -> None:
        """Take a sample in."""
        feeds = {**values, **{str(site.value.name): held[site] for site in self.block.sites}}
        exact = self.probe.run(feeds)
        for array in exact.values():
            self.count += array.size
            self.signal += _energy(array)
        for axis, weight in self.weights.items():
            got = self.probe.run({**feeds, str(self.site.value.name): weight})
            self.noise[axis] += sum(
                _energy(exact[name].astype(np.float32) - got[name].astype(np.float32)) for name in exact
            )

    def judgement(self) -> Judgement:
        """The errors over all samples."""
        count = max(self.count, 1)
        errors = {axis: noise / count for axis, noise in self.noise.items()}
        return Judgement(errors, self.signal / count, self.block.where)


def _energy(array: np.ndarray) -> float:
    flat = array.astype(np.float32).reshape(-1)
    # Many values: summed in float64, some at a time.
    return sum(float(np.dot(part, part)) for part in np.array_split(flat, max(1, flat.size >> 16)))
