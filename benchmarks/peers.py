"""onnxruntime's own quantizers, called as their documentation shows, one function each.

Every function reads an ONNX file, writes another and returns the bits a weight takes: codes, scales
and zero points over the number of weights, without what pads a block. Where onnxruntime has an algorithm but no
kernel for its result (3 bits, or one scale per channel, in HQQ), the algorithm's own Python function is
called and the *decoded* weights are written: same numbers, no small file.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

Feeds = list[dict[str, np.ndarray]]
SCALE_BITS = 32
"""The width of a scale in the files onnxruntime's quantizers write for a float32 model."""


def rtn(source: Path, output: Path, *, bits: int, group: int, symmetric: bool) -> float:
    """``DefaultWeightOnlyQuantConfig``; 3 bits by its ``quant_tensor``, decoded."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor

    if bits != 3 and group > 0:
        return _process(
            source, output, DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=symmetric, bits=bits)
        )

    def decoded(weight: np.ndarray, _: str) -> np.ndarray:
        rows, block = _blocks(weight, group)
        codes, scale, zero = quant_tensor(rows, bits, block, "sym" if symmetric else "asym", "uint")
        return ((codes - zero) * scale).reshape(rows.shape)[:, : weight.shape[0]].T

    return _decoded(source, output, decoded, bits, group, 0 if symmetric else bits)


def k_quant(source: Path, output: Path, *, bits: int, group: int) -> float:
    """``KQuantWeightOnlyQuantConfig``; 3 bits by its own function, decoded."""
    from onnxruntime.quantization.matmul_nbits_quantizer import KQuantWeightOnlyQuantConfig
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    if bits == 4:
        return _process(source, output, KQuantWeightOnlyQuantConfig(), block_size=group)

    def decoded(weight: np.ndarray, _: str) -> np.ndarray:
        rows, block = _blocks(weight, group)
        codes, scale, zero = quant_tensor_k_quant_cpu(rows, bits, block)
        return ((codes - zero) * scale).reshape(rows.shape)[:, : weight.shape[0]].T

    return _decoded(source, output, decoded, bits, group, bits)


def hqq(source: Path, output: Path, *, bits: int, group: int) -> float:
    """``HQQWeightOnlyQuantConfig``; 3 bits, or a scale per channel, by its own function, decoded."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        HQQWeightOnlyQuantConfig,
        HQQWeightOnlyQuantizer,
    )

    if bits != 3 and group > 0:
        return _process(source, output, HQQWeightOnlyQuantConfig(block_size=group, bits=bits))
    import torch

    def decoded(weight: np.ndarray, _: str) -> np.ndarray:
        block = group if group > 0 else weight.shape[0]
        quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=block))
        codes, scale, zero = quantizer.quantize_internal(
            torch.from_numpy(weight.copy()).T, bits=bits, group_size=block
        )
        grouped = codes.reshape(codes.shape[0], -1, block).float()
        values = (grouped - zero[:, :, None]) * scale[:, :, None]
        return values.reshape(codes.shape)[:, : weight.shape[0]].T.numpy()

    return _decoded(source, output, decoded, bits, group, SCALE_BITS)  # its zero points are floats


def gptq(
    source: Path,
    output: Path,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    feeds: Feeds,
    act_order: bool = False,
    mse: bool = False,
    decode: bool = False,
) -> float:
    """``GPTQWeightOnlyQuantConfig``; with ``decode`` only its ``gptq`` function, the weights decoded.

    Its own file holds 4 bits only, and only weights whose inputs are a multiple of the group.
    """
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.matmul_nbits_quantizer import GPTQWeightOnlyQuantConfig
    from onnxruntime.quantization.neural_compressor.weight_only import gptq as algorithm

    if not decode:

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.rest = iter(copy.copy(feeds))

            def __deepcopy__(self, memo: object) -> Reader:
                return Reader()

            def get_next(self) -> Mapping[str, np.ndarray] | None:
                return next(self.rest, None)

        config = GPTQWeightOnlyQuantConfig(Reader(), actorder=act_order, mse=mse)
        return _process(source, output, config, block_size=group, is_symmetric=symmetric)
    moments = _second_moments(source, feeds)

    def decoded(weight: np.ndarray, fed_by: str) -> np.ndarray:
        return np.asarray(
            algorithm(
                weight.copy(), moments[fed_by].copy(), num_bits=bits, actorder=act_order, mse=mse,
                group_size=group if group > 0 else weight.shape[0], scheme="sym" if symmetric else "asym",
            )
        )  # fmt: skip

    return _decoded(source, output, decoded, bits, group, 0 if symmetric else bits)


def static_int8(
    source: Path,
    output: Path,
    *,
    feeds: Feeds,
    method: str = "MinMax",
    per_channel: bool = True,
    activations: str = "QUInt8",
) -> float:
    """``quantize_static`` to QDQ after ``quant_pre_process``, as its documentation advises."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.rest, None)

    prepared = output.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType[activations],
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
        calibrate_method=CalibrationMethod[method],
    )
    prepared.unlink()
    return 8.0


def dynamic_int8(source: Path, output: Path, *, per_channel: bool = True) -> float:
    """``quantize_dynamic`` of the matrix products (its convolutions have no fast kernel)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(source), str(output), op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=per_channel, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return 8.0


METHODS: dict[str, Callable[..., float]] = {
    "rtn": rtn,
    "k_quant": k_quant,
    "hqq": hqq,
    "gptq": gptq,
    "static_int8": static_int8,
    "dynamic_int8": dynamic_int8,
}


def _process(source: Path, output: Path, config: Any, **options: Any) -> float:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.INFO)  # it reports every node
    # A model of over 2 GB, or with external data, has to be given by its path; and then it is found only
    # from its own folder.
    os.chdir(source.parent)
    large = sum(p.stat().st_size for p in source.parent.glob(f"{source.name}*")) > 1 << 30
    model = str(source) if large else onnx.load(source)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config, **options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output), large)
    return bits_per_weight(output)


def bits_per_weight(path: Path) -> float:
    """Bits of a weight in the n-bit products of a file: code, scale and zero point, no padding."""
    model = onnx.load(path, load_external_data=False)
    held = {t.name: t for t in model.graph.initializer}
    stored = weights = 0
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            inputs, outputs, bits = sizes["K"], sizes["N"], sizes["bits"]
            zero = held.get(node.input[3]) if len(node.input) > 3 else None
            floating = zero is not None and zero.data_type == onnx.TensorProto.FLOAT
            zero_bits = 0 if zero is None else SCALE_BITS if floating else bits
            groups = -(-inputs // sizes["block_size"])
            weights += inputs * outputs
            stored += inputs * outputs * bits + outputs * groups * (SCALE_BITS + zero_bits)
    return stored / weights


def _blocks(weight: np.ndarray, group: int) -> tuple[np.ndarray, int]:
    """Rows of one output channel each, padded to whole groups; and the group."""
    block = group if group > 0 else weight.shape[0]
    return np.pad(weight.T, ((0, 0), (0, -weight.shape[0] % block))), block


def _decoded(
    source: Path,
    output: Path,
    algorithm: Callable[[np.ndarray, str], np.ndarray],
    bits: int,
    group: int,
    zero_bits: int,
) -> float:
    model = onnx.load(source)
    stored = weights = 0
    for tensor, fed_by in _weights(model):
        weight = numpy_helper.to_array(tensor)
        values = np.ascontiguousarray(algorithm(weight, fed_by), dtype=np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        groups = -(-weight.shape[0] // group) if group > 0 else 1
        weights += weight.size
        stored += weight.size * bits + weight.shape[1] * groups * (SCALE_BITS + zero_bits)
    onnx.save(model, output)
    return stored / weights


def _weights(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    """The matrices that MatMul multiplies with, and what feeds them."""
    held = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in held and len(held[node.input[1]].dims) == 2:
            yield held[node.input[1]], node.input[0]


def _second_moments(source: Path, feeds: Feeds) -> dict[str, np.ndarray]:
    """Mean of x xᵀ of everything that feeds a weight."""
    import onnxruntime as ort

    model = onnx.load(source)
    names = sorted({fed_by for _, fed_by in _weights(model)})
    for name in names:
        if name not in {o.name for o in model.graph.output}:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    moments: dict[str, np.ndarray] = {}
    for feed in feeds:
        for name, value in zip(names, session.run(names, feed), strict=True):
            rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
            moments[name] = moments.get(name, 0) + rows.T @ rows / len(feeds)
    return moments
