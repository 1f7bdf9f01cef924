"""Resize: every axis by itself, the positions and factors computed while the model is built."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from effic.backends.tvm.lowering import Lowering, dtype_of, shape_of


def resize(lowering: Lowering, node: ir.Node) -> None:
    """Resize with constant sizes or scales, all modes and coordinates; Upsample is the same in an old form.

    An output along an axis is a sum of a few inputs: ``y[o] = sum_t f[o, t] * x[i[o, t]]``.
    """
    x = lowering.tensor(node.inputs[0])
    shape = shape_of(x)
    if not dtype_of(x).startswith("float") and node.attributes.get_string("mode", "nearest") != "nearest":
        lowering.refuse(node, f"interpolates {dtype_of(x)}")
    for axis, plan in _plans(lowering, node, shape):
        indices, factors = plan
        y: Any = None
        for tap in range(indices.shape[1]):
            part = relax.op.take(x, relax.const(indices[:, tap].copy()), axis, mode="clip")
            weights = factors[:, tap]
            if indices.shape[1] > 1 or not (weights == 1).all():
                lie = [-1 if i == axis else 1 for i in range(len(shape))]
                part = relax.op.multiply(part, relax.const(weights.reshape(lie).astype(dtype_of(x))))
            part = lowering.emit(part)
            y = part if y is None else lowering.emit(relax.op.add(y, part))
        x = y
    lowering.set(node.outputs[0], x)


Plan = tuple[np.ndarray, np.ndarray]


def _plans(lowering: Lowering, node: ir.Node, shape: tuple[Any, ...]) -> list[tuple[int, Plan]]:
    """What to do along each axis that changes."""
    get = node.attributes
    old = node.op_type == "Upsample" or lowering.opset < 11
    mode = get.get_string("mode", "nearest")
    coordinates = "asymmetric" if old else get.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else get.get_string("nearest_mode", "round_prefer_floor")
    if "axes" in get:
        axes = [int(a) % len(shape) for a in get["axes"].as_ints()]
    else:
        axes = list(range(len(shape)))
    place = 1 if old else 2
    scales = _given(lowering, node, place)
    if scales is None and "scales" in get:
        scales = np.asarray(get["scales"].as_floats())
    sizes = None if old else _given(lowering, node, 3)
    roi = None
    if coordinates == "tf_crop_and_resize":
        roi = _given(lowering, node, 1)
        if roi is None or get.get_float("extrapolation_value", 0.0) != 0:
            outside = roi is None or bool(((roi < 0) | (roi > 1)).any())
            if outside:
                lowering.refuse(node, "extrapolates")
    wanted: list[tuple[int, int, float]] = []
    for number, axis in enumerate(axes):
        size = shape[axis]
        if not isinstance(size, int):
            if (scales is not None and scales[number] == 1) and sizes is None:
                continue
            lowering.refuse(node, f"resizes axis {axis}, whose size is left open; pin it with shapes")
        if sizes is not None:
            wanted.append((axis, int(sizes[number]), sizes[number] / size))
        elif scales is not None:
            wanted.append((axis, int(np.floor(size * float(scales[number]))), float(scales[number])))
        else:
            lowering.refuse(node, "takes its sizes from the inputs' values")
    policy = get.get_string("keep_aspect_ratio_policy", "stretch")
    if sizes is not None and policy != "stretch":
        ratios = [ratio for _, _, ratio in wanted]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        wanted = [(axis, int(np.floor(ratio * shape[axis] + 0.5)), ratio) for axis, _, _ in wanted]
    found: list[tuple[int, Plan]] = []
    for number, (axis, out, scale) in enumerate(wanted):
        size = shape[axis]
        ends = None if roi is None else (roi[number], roi[number + len(axes)])
        if out == size and scale == 1 and ends in (None, (0, 1)):
            continue
        where = _positions(coordinates, size, out, scale, ends)
        if where is None:
            lowering.refuse(node, f"has the coordinates '{coordinates}', which are not lowered")
        # An old form that shrinks takes the next input, as ONNX Runtime has it; nothing was said of that.
        near = "ceil" if old and scale < 1 else rounding
        found.append((axis, _taps(node, mode, near, where, size, scale)))
    return found


def _given(lowering: Lowering, node: ir.Node, index: int) -> np.ndarray | None:
    """A constant input that is not left out or empty."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    array = lowering.array(value)
    if array is None:
        lowering.refuse(node, f"takes '{value.name}' from the inputs' values")
    return array.reshape(-1) if array.size else None


def _positions(
    mode: str, size: int, out: int, scale: float, ends: tuple[float, float] | None
) -> np.ndarray | None:
    """Where each output lies between the inputs (ONNX, Resize, coordinate_transformation_mode)."""
    at = np.arange(out, dtype=np.float64)
    if mode == "half_pixel":
        return (at + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (at + 0.5) / scale - 0.5 if out > 1 else np.full(1, 0.0)
    if mode == "half_pixel_symmetric":
        adjustment = out / (scale * size)
        return (size / 2) * (1 - adjustment) + (at + 0.5) / scale - 0.5
    if mode == "align_corners":
        # The length that the scale asks for may be fractional, and counts as such.
        length = scale * size
        return at * (size - 1) / (length - 1) if length != 1 else np.zeros(out)
    if mode == "asymmetric":
        return at / scale
    if mode == "tf_crop_and_resize" and ends is not None:
        start, end = ends
        if out > 1:
            return start * (size - 1) + at * (end - start) * (size - 1) / (out - 1)
        return np.full(1, 0.5 * (start + end) * (size - 1))
    return None


def _taps(node: ir.Node, mode: str, rounding: str, where: np.ndarray, size: int, scale: float) -> Plan:
    """Which inputs make each output, and their factors: int64 and float64 ``[out, taps]``."""
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(where - 0.5),
            "round_prefer_ceil": np.floor(where + 0.5),
            "floor": np.floor(where),
            "ceil": np.ceil(where),
        }[rounding]
        return np.clip(rounded, 0, size - 1).astype(np.int64)[:, None], np.ones((len(where), 1))
    # With antialias the filter is stretched over all inputs that an output stands for.
    stretch = min(scale, 1.0) if node.attributes.get_int("antialias", 0) else 1.0
    reach = (2 if mode == "cubic" else 1) / stretch
    first = np.floor(where) - np.ceil(reach) + 1
    taps = first[:, None] + np.arange(2 * int(np.ceil(reach)))
    distance = np.abs(taps - where[:, None]) * stretch
    if mode == "cubic":
        factors = _cubic(distance, node.attributes.get_float("cubic_coeff_a", -0.75))
    else:
        factors = np.maximum(0, 1 - distance)
    if node.attributes.get_int("exclude_outside", 0):
        factors = np.where((taps < 0) | (taps >= size), 0, factors)
    factors = factors / factors.sum(axis=1, keepdims=True)
    return np.clip(taps, 0, size - 1).astype(np.int64), factors


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
