"""Weight sites: which constant is a weight of which node, and which way round it lies.

Quantization, pruning and adapters all ask the same questions: where are the weights, which axis is
the input channel and which the output channel, who else reads the constant, behind which Transpose
or Identity. They are answered here, once.

A weight is handled as a matrix. Its *stored* form has the rows and columns of the file; :meth:`read`
turns it to ``[out, in]``:

===============  ====================  =========================================  =============
node             weight in the file    stored matrix                              summed axis
===============  ====================  =========================================  =============
MatMul, right    ``[K, N]``            the same                                   0
MatMul, left     ``[M, K]``            the same                                   1
Gemm B           ``[K, N]``            the same                                   0 (1 if transB)
Gemm A           ``[M, K]``            the same                                   1 (0 if transA)
Conv             ``[O, I/g, kh, kw]``  ``[O, I/g·kh·kw]``                         1
ConvTranspose    ``[I, O/g, kh, kw]``  ``[I, O/g·kh·kw]``                         0
Gather           ``[V, D]``            the same; a row is an entry of the table   1
===============  ====================  =========================================  =============
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from collections.abc import Collection, Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from effic.ir.compressed import Compressed, recognise_compressed, tensor_of
from effic.ir.encodings import Encoding, build, decode, recognise
from effic.ir.errors import UnsupportedError
from effic.ir.model import ONNX_DOMAINS, Model, constant_tensor, describe
from effic.ir.tensors import borrow

KINDS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
"""Operators that have weights, in the order in which they name a shared site."""

Axis = Literal["oc", "ic"]
"""``"oc"``: groups run along the inputs of one output channel; ``"ic"``: the other way round."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TABLES = (*_FLOATS, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """One reader of a weight.

    Attributes:
        node: the MatMul, Conv, ….
        index: which of its inputs the weight is.
        via: Transpose and Identity nodes between the weight and the node, from the weight on.
        in_axis: axis of the stored matrix that this node sums over (for Gather: 1).
    """

    node: ir.Node
    index: int
    via: tuple[ir.Node, ...]
    in_axis: int


@dataclasses.dataclass(eq=False)
class WeightSite:
    """A constant weight and everyone who reads it.

    Attributes:
        name: name of the initializer (before encoding, for an encoded weight).
        kind: operator of the first use, Gather last.
        value: the constant, or the decoded value of an encoded weight, or what is in its place.
        graph: graph that owns ``value``; None for a value nobody produces.
        uses: every node that reads it as a weight.
        shape: shape as stored; empty when unknown.
        in_axis: axis of the stored matrix that the first use sums over.
        groups: convolution groups.
        opset: version of the standard operators where the weight lives.
        encoding: how it is compressed already, or None.
        other_readers: nodes and graph outputs that read the weight as something else.
        why_not: why the weight cannot be rewritten, as a phrase, or None.
        compressed: how its values (or the codes of its encoding) are stored, where that is not one by
            one; :meth:`read` decompresses.
    """

    name: str
    kind: str
    value: ir.Value
    graph: ir.Graph | None
    uses: list[WeightUse]
    shape: tuple[int, ...]
    in_axis: int
    groups: int
    opset: int
    encoding: Encoding | None
    other_readers: list[str]
    why_not: str | None
    compressed: Compressed | None = None

    @property
    def kinds(self) -> set[str]:
        """Operators of all uses; ``{"Gather", "MatMul"}`` for an embedding tied to the head."""
        return {use.node.op_type for use in self.uses}

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the stored matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def shape_oi(self) -> tuple[int, int]:
        """``(out, in)``, the shape of :meth:`read`."""
        rows, columns = self.matrix_shape
        return (rows, columns) if self.in_axis == 1 else (columns, rows)

    @property
    def dtype(self) -> ir.DataType:
        """Element type the readers see."""
        if self.encoding is not None:
            return self.encoding.dtype
        tensor = constant_tensor(self.value)
        return tensor.dtype if tensor is not None else self.value.dtype or ir.DataType.UNDEFINED

    def run_axis(self, axis: Axis) -> int:
        """Axis of the stored matrix that groups of the given kind run along."""
        return self.in_axis if axis == "oc" else 1 - self.in_axis

    def axis_of(self, encoding: Encoding) -> Axis | None:
        """Which way the groups of an encoding of this weight run; None for one scale for all."""
        run = encoding.run_axis
        if run is None:
            return None
        return "oc" if run == self.in_axis else "ic"

    # -- values ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def matrix(self) -> Iterator[np.ndarray]:
        """The stored matrix, read-only, straight from the file map; valid inside the ``with``."""
        if self.encoding is not None:
            yield decode(self.encoding).reshape(self.matrix_shape)
            return
        tensor = self._tensor()
        with borrow(tensor) as array:
            matrix = array.reshape(self.matrix_shape)
            del array
            yield matrix
            del matrix

    def give_back(self, rows: int) -> None:
        """Drop the file pages of the first ``rows`` rows, while :meth:`matrix` is still open.

        So a weight larger than memory can be walked over from the top.
        """
        tensor = constant_tensor(self.value)
        if not isinstance(tensor, ir.ExternalTensor) or not isinstance(tensor.raw, mmap.mmap):
            return
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = tensor.offset or 0
        stop = start + rows * self.matrix_shape[1] * tensor.dtype.bitwidth // 8
        # The page a neighbour shares stays at the lower end and is left alone at the upper one.
        start -= start % mmap.PAGESIZE
        stop -= stop % mmap.PAGESIZE
        if stop > start:
            tensor.raw.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def read(self) -> np.ndarray:
        """The weight as a float32 array ``[out, in]`` of its own."""
        return self.read_rows(0, self.shape_oi[0])

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Output channels ``start`` to ``stop`` as a float32 array ``[stop - start, in]`` of its own."""
        with self.matrix() as matrix:
            rows = matrix[start:stop] if self.in_axis == 1 else matrix[:, start:stop].T
            return np.array(rows, dtype=np.float32, order="C")

    def _tensor(self) -> ir.TensorProtocol:
        tensor = tensor_of(self.value)
        if tensor is None:
            raise UnsupportedError(
                f"weight '{self.name}' {self.why_not or 'is no constant'}, so it cannot be read"
            )
        return tensor

    # -- rewriting -------------------------------------------------------------------------------

    def write(self, model: Model, encoding: Encoding) -> ir.Value:
        """Let every use read the encoded weight instead.

        Other readers keep the original; it is removed when nobody reads it any more.

        Args:
            model: the model the site was found in.
            encoding: of the same shape and dtype as the weight.

        Returns:
            The decoded weight's value.

        Raises:
            UnsupportedError: the site cannot be rewritten (``why_not``), or the encoding does not fit.
        """
        if self.why_not is not None or self.graph is None:
            raise UnsupportedError(f"weight '{self.name}' {self.why_not}, so it cannot be encoded")
        if encoding.shape != self.shape or encoding.dtype != self.dtype:
            raise UnsupportedError(
                f"an encoding of shape {list(encoding.shape)} and type {encoding.dtype.name} does not fit "
                f"weight '{self.name}' of shape {list(self.shape)} and type {self.dtype.name}"
            )
        entries = list(
            dict.fromkeys((use.via[0], 0) if use.via else (use.node, use.index) for use in self.uses)
        )
        first = entries[0][0]
        before = first if len(entries) == 1 and first.graph is self.graph else None
        new = build(model, self.graph, encoding, self.name, axis_name=self.axis_of(encoding), before=before)
        if self.other_readers:
            for use in self.uses:
                use.node.replace_input_with(use.index, _same_path(model, new, use.via))
        else:
            for node, index in entries:
                node.replace_input_with(index, new)
        for use in self.uses:
            if self.other_readers and use.via:
                _drop_unread(use.via[-1].outputs[0])
        _drop_unread(self.value)
        self.value, self.encoding = new, encoding
        return new

    def replace(self, tensor: ir.TensorProtocol) -> None:
        """Let every reader see another constant, under the same name.

        Args:
            tensor: of the shape and dtype of the weight.

        Raises:
            UnsupportedError: the weight is encoded or no constant, or the tensor does not fit.
        """
        old = self._tensor()
        if self.encoding is not None:
            raise UnsupportedError(f"weight '{self.name}' is encoded, so its values cannot be replaced")
        if tensor.dtype != old.dtype or tuple(tensor.shape.numpy()) != self.shape:
            raise UnsupportedError(
                f"a tensor of shape {list(tensor.shape)} and type {tensor.dtype.name} does not fit "
                f"weight '{self.name}' of shape {list(self.shape)} and type {old.dtype.name}"
            )
        tensor.name = self.value.name
        if (node := self.value.producer()) is not None:
            # The constants of function bodies are nodes.
            node.attributes.clear()
            node.attributes.add(ir.AttrTensor("value", tensor))
        self.value.const_value = tensor

    def redirect(self, model: Model, tensor: ir.TensorProtocol, uses: Collection[WeightUse]) -> ir.Value:
        """Let some uses read a constant of their own, and the others what they read before.

        Args:
            model: the model the site was found in.
            tensor: of the shape of the weight.
            uses: those of :attr:`uses` that get it.

        Raises:
            UnsupportedError: no graph owns the weight.
        """
        if self.graph is None:
            raise UnsupportedError(f"weight '{self.name}' belongs to no graph, so it cannot be replaced")
        new = model.add_initializer(self.graph, self.name, tensor)
        for use in uses:
            old = use.node.inputs[use.index]
            use.node.replace_input_with(use.index, _same_path(model, new, use.via))
            _drop_unread(old)
        return new


def weight_sites(model: Model, kinds: Collection[str] | None = None) -> list[WeightSite]:
    """Every weight of a model: main graph, subgraphs and functions.

    A weight that several nodes read is one site. Nodes whose weight is no constant get a site as
    well, with ``why_not`` set, so that a pass can say why it left them alone; a Gather counts only
    when it reads a constant table of floats.

    Args:
        model: the model; not changed.
        kinds: operators of interest (:data:`KINDS`); a site is listed when any of its uses is one.

    Returns:
        Sites in the order of their first use.
    """
    sites: dict[int, WeightSite] = {}
    for root, opset, owner in _roots(model):
        for graph in (root, *root.subgraphs()):
            for node in graph:
                if node.domain in ONNX_DOMAINS and node.op_type in KINDS:
                    _visit(node, opset, owner, sites)
    for site in sites.values():
        site.uses.sort(key=lambda use: use.node.op_type == "Gather")
        site.kind, site.in_axis = site.uses[0].node.op_type, site.uses[0].in_axis
        site.other_readers = _other_readers(site)
    wanted = set(KINDS if kinds is None else kinds)
    return [site for site in sites.values() if site.kinds & wanted]


def _roots(model: Model) -> Iterator[tuple[ir.Graph, int, str | None]]:
    """Main graph and function bodies, each with its opset and the function's name."""
    yield model.graph, model.opset, None
    for function in model.ir.functions.values():
        yield function.graph, function.opset_imports.get("", model.opset), function.name


def _visit(node: ir.Node, opset: int, owner: str | None, sites: dict[int, WeightSite]) -> None:
    """Add a node's weight to ``sites``, keyed by the constant (or by the node, if there is none)."""
    index = _weight_index(node)
    if index is None:
        return
    operand = node.inputs[index]
    if operand is None:
        return
    value, via, transposed = _resolve(operand)
    tensor, encoding = constant_tensor(value), recognise(value)
    compressed = recognise_compressed(value) if tensor is None else None
    known = tensor is not None or encoding is not None or compressed is not None
    key = id(value) if known else id(node)
    in_axis, reason = _summed_axis(node, index, transposed)
    use = WeightUse(node, index, tuple(via), in_axis)
    if key in sites:
        sites[key].uses.append(use)
        sites[key].why_not = sites[key].why_not or reason
        return
    if encoding is not None:
        shape, name = encoding.shape, encoding.weight or encoding.codes.name
        compressed = encoding.compressed
    elif compressed is not None:
        shape, name = compressed.shape, compressed.weight or value.name
        reason = f"is stored {compressed.describe()}; passes that change weights go before compress-nm"
    else:
        shape, name = (tuple(tensor.shape.numpy()) if tensor is not None else ()), value.name
    groups = node.attributes.get("group")
    sites[key] = WeightSite(
        name=name or value.name or describe(node),
        kind=node.op_type,
        value=value,
        graph=value.graph,
        uses=[use],
        shape=shape,
        in_axis=in_axis,
        groups=1 if groups is None or groups.is_ref() else groups.as_int(),
        opset=opset,
        encoding=encoding,
        other_readers=[],
        why_not=_not_constant(value, owner) if not known else (reason or _bad_form(node, shape, tensor, via)),
        compressed=compressed,
    )


def _weight_index(node: ir.Node) -> int | None:
    """Which input is the weight, or None when the node has none to speak of."""
    if len(node.inputs) < 2:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return 1
    if node.op_type == "Gather":
        # Gathers move shapes and indices about everywhere; only tables of floats are embeddings.
        value = _resolve(node.inputs[0])[0] if node.inputs[0] is not None else None
        tensor, encoding = constant_tensor(value), recognise(value)
        if encoding is not None:
            return 0
        return 0 if tensor is not None and tensor.dtype in _TABLES and len(tensor.shape) >= 2 else None
    for index in (1, 0):
        operand = node.inputs[index]
        value = _resolve(operand)[0] if operand is not None else None
        if tensor_of(value) is not None or recognise(value) is not None:
            return index
    # Neither side is constant: the one an input or a chain of nodes over constants hides on, else
    # the right one, which is where weights are.
    return 1


def _resolve(value: ir.Value) -> tuple[ir.Value, list[ir.Node], bool]:
    """Walk up through Identity and 2-D Transpose: the value behind, the nodes passed, turned or not."""
    via: list[ir.Node] = []
    turned = False
    while (node := value.producer()) is not None and node.domain in ONNX_DOMAINS:
        source = node.inputs[0] if node.inputs else None
        if source is None or node.op_type not in ("Identity", "Transpose"):
            break
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            rank = len(source.shape) if source.shape is not None else None
            if perm is None:
                if rank != 2:
                    break
                turned = not turned
            elif perm.is_ref() or list(perm.as_ints()) not in ([1, 0], [0, 1]):
                break
            elif list(perm.as_ints()) == [1, 0]:
                turned = not turned
        via.insert(0, node)
        value = source
    return value, via, turned


def _summed_axis(node: ir.Node, index: int, transposed: bool) -> tuple[int, str | None]:
    """Axis of the stored matrix that the node sums over, or a reason why that is not known."""
    for name in ("transA", "transB", "group", "axis", "perm"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            return 0, f"is read by {describe(node)}, whose attribute '{name}' is a parameter of the function"
    if node.op_type == "Conv":
        return 1, None
    if node.op_type == "ConvTranspose":
        return 0, None
    if node.op_type == "Gather":
        axis = node.attributes.get_int("axis", 0)
        if axis not in (0, -2):
            return 1, f"is read by {describe(node)} along axis {axis}, not as a table of rows"
        if transposed:
            return 0, None
        return 1, None
    axis = 1 - index
    flag = "transB" if index else "transA"
    if node.op_type == "Gemm" and node.attributes.get_int(flag, 0) == 1:
        axis = 1 - axis
    return (1 - axis if transposed else axis), None


def _not_constant(value: ir.Value, owner: str | None) -> str:
    if value.is_graph_input():
        if owner is not None and value.graph is not None and value in value.graph.inputs:
            return f"is an input of the function '{owner}'"
        if value.is_initializer():
            return "is listed among the graph inputs, so that a caller may override it"
        return "is a graph input"
    node = value.producer()
    return "is computed at run time" + (f" by {describe(node)}" if node is not None else "")


def _bad_form(
    node: ir.Node, shape: tuple[int, ...], tensor: ir.TensorProtocol | None, via: list[ir.Node]
) -> str | None:
    if tensor is not None and tensor.dtype not in _FLOATS:
        return f"has elements of type {tensor.dtype.name}"
    if math.prod(shape) == 0:
        return "is empty"
    if node.op_type in ("Conv", "ConvTranspose"):
        if len(shape) < 3:
            return f"has rank {len(shape)}, which {node.op_type} does not take"
        return None
    if len(shape) != 2:
        return f"has rank {len(shape)}; only matrices can be encoded here" + (
            " (a batch of matrices)" if len(shape) > 2 and node.op_type == "MatMul" else ""
        )
    return None


def _other_readers(site: WeightSite) -> list[str]:
    """Who reads the weight, or a value between it and its uses, as something else."""
    if site.why_not is not None and tensor_of(site.value) is None and site.encoding is None:
        return []
    uses = {(use.node, use.index) for use in site.uses}
    between = {node for use in site.uses for node in use.via}
    readers: list[str] = []
    for value in (site.value, *(node.outputs[0] for node in between)):
        readers += [
            describe(node)
            for node, index in value.uses()
            if (node, index) not in uses and node not in between
        ]
        if value.is_graph_output():
            readers.append(f"graph output '{value.name}'")
    return sorted(set(readers))


def _same_path(model: Model, value: ir.Value, via: tuple[ir.Node, ...]) -> ir.Value:
    """Copies of the Transpose and Identity nodes of a path, over another value."""
    for node in via:
        copy = ir.node(node.op_type, [value], attributes=dict(node.attributes), name=f"{node.name}.copy")
        old, new = node.outputs[0], copy.outputs[0]
        new.name, new.type, new.shape = model.unique_name(f"{old.name}.copy"), old.type, old.shape
        if node.graph is not None:
            node.graph.insert_after(node, copy)
        value = new
    return value


def _drop_unread(value: ir.Value | None) -> None:
    """Remove a value nobody reads: its node or initializer, and what only they read."""
    if value is None or value.uses() or value.is_graph_output() or value.graph is None:
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.is_graph_input() and value.name is not None:
            value.graph.initializers.pop(value.name)
        return
    if node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
        return
    inputs = tuple(node.inputs)
    node.graph.remove(node, safe=True)
    for source in dict.fromkeys(inputs):
        _drop_unread(source)
