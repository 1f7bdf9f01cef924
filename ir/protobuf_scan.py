"""A model file's structure without its weights: walk the protobuf wire format, leave big payloads out.

A protobuf parser copies every byte of a message. An ``.onnx`` file is mostly weights, so
:func:`skeleton` copies only the rest: each ``TensorProto`` with a long ``raw_data`` comes out as a
tensor with *external data* whose location is a marker and whose offset and length point into the
original file. The walk touches only tags, lengths and small fields; the pages of the weights are
never read.

Wire format: https://protobuf.dev/programming-guides/encoding/ ; field numbers: onnx.proto.
"""

from __future__ import annotations

import mmap

# Payloads shorter than this are copied: a span costs about as much as it saves.
INLINE_BYTES = 4096
# What a protobuf parser itself accepts before it gives up.
MESSAGE_DEPTH = 100

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Which length-delimited fields hold messages that may hold tensors.
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph"},
    "Tensor": {},
}
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14


class ScanError(ValueError):
    """The bytes are no well-formed protobuf message; the text says where."""


def skeleton(buffer: bytes | mmap.mmap, marker: str, threshold: int = INLINE_BYTES) -> bytes:
    """The serialized ``ModelProto`` in ``buffer`` without its long tensor payloads.

    Args:
        buffer: the file.
        marker: location written into the external data of the tensors that were cut.
        threshold: payloads of at least this many bytes are cut.

    Returns:
        The shortened message.

    Raises:
        ScanError: the bytes are truncated or malformed.
    """
    scanner = _Scanner(buffer, marker, threshold)
    return b"".join(scanner.message("Model", 0, len(buffer), 0))


class _Scanner:
    def __init__(self, buffer: bytes | mmap.mmap, marker: str, threshold: int) -> None:
        self.buffer = buffer
        self.marker = marker
        self.threshold = threshold
        self.cut = 0

    def varint(self, at: int, end: int) -> tuple[int, int]:
        result = shift = 0
        while True:
            if at >= end:
                raise ScanError(f"the file is cut off or damaged at byte {at}")
            byte = self.buffer[at]
            at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result, at
            shift += 7
            if shift >= 70:
                raise ScanError(f"a number at byte {at} is longer than protobuf allows")

    def field(self, at: int, end: int) -> tuple[int, int, int, int]:
        """One field: (number, wire type, start of its payload, end of its payload)."""
        tag, at = self.varint(at, end)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            length, at = self.varint(at, end)
            stop = at + length
        elif wire == _VARINT:
            _, stop = self.varint(at, end)
        elif wire == _FIXED64:
            stop = at + 8
        elif wire == _FIXED32:
            stop = at + 4
        else:
            raise ScanError(f"byte {at} starts no protobuf field ONNX knows")
        if number == 0:
            raise ScanError(f"byte {at} starts no protobuf field")
        if stop > end:
            raise ScanError(f"the field at byte {at} claims {stop - at} bytes but {end - at} are left")
        return number, wire, at, stop

    def message(self, kind: str, start: int, end: int, depth: int) -> list[bytes]:
        """The pieces of the message in ``[start, end)``, rewritten."""
        if depth > MESSAGE_DEPTH:
            raise ScanError(f"messages are nested more than {MESSAGE_DEPTH} deep at byte {start}")
        if kind == "Tensor":
            return self.tensor(start, end)
        children = _CHILDREN[kind]
        pieces: list[bytes] = []
        kept = at = start
        while at < end:
            field_start = at
            number, wire, payload, at = self.field(at, end)
            child = children.get(number)
            # A message shorter than the threshold cannot hold a payload longer than it.
            if child is None or wire != _BYTES or at - payload < self.threshold:
                continue
            cut = self.cut
            inner = self.message(child, payload, at, depth + 1)
            if self.cut == cut:
                continue
            pieces.append(self.buffer[kept:field_start])
            pieces.append(_varint(number << 3 | _BYTES) + _varint(sum(map(len, inner))))
            pieces.extend(inner)
            kept = at
        pieces.append(self.buffer[kept:end])
        return pieces

    def tensor(self, start: int, end: int) -> list[bytes]:
        at = start
        raw: tuple[int, int, int] | None = None
        plain = True
        while at < end:
            field_start = at
            number, wire, payload, at = self.field(at, end)
            if number == _RAW_DATA and wire == _BYTES:
                # Repeated payloads, or inline and external at once, are left to the checks.
                plain = plain and raw is None
                raw = (field_start, payload, at)
            elif number in (_EXTERNAL_DATA, _DATA_LOCATION):
                plain = plain and number == _DATA_LOCATION and self.buffer[payload:at] == b"\x00"
        if raw is None or not plain or raw[2] - raw[1] < self.threshold:
            return [self.buffer[start:end]]
        field_start, payload, stop = raw
        self.cut += 1
        entries = {"location": self.marker, "offset": str(payload), "length": str(stop - payload)}
        external = b"".join(_bytes_field(_EXTERNAL_DATA, _entry(key, text)) for key, text in entries.items())
        location = _varint(_DATA_LOCATION << 3 | _VARINT) + b"\x01"
        return [self.buffer[start:field_start], self.buffer[stop:end], external, location]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(payload)) + payload


def _entry(key: str, value: str) -> bytes:
    """A StringStringEntryProto."""
    return _bytes_field(1, key.encode()) + _bytes_field(2, value.encode())


def field_header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field, for writers that stream the payload."""
    return _varint(number << 3 | _BYTES) + _varint(length)
