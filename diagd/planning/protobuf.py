"""The protobuf wire format, as far as ONNX needs it: nothing is copied, and large fields are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from diagd.errors import BundleError

_VARINT: Final = 0
_FIXED64: Final = 1
_LENGTH: Final = 2
_FIXED32: Final = 5
_FIXED_BYTES: Final = {_FIXED64: 8, _FIXED32: 4}


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields, in file order; fixed-size ones come as bytes.

    Raises:
        BundleError: the bytes are no message, or end within one.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _LENGTH:
            size, at = _varint(data, at)
        elif kind in _FIXED_BYTES:
            size = _FIXED_BYTES[kind]
        else:
            raise BundleError(f"byte {at} has wire type {kind}: this is no ONNX file")
        if at + size > len(data):
            raise BundleError(f"a field of {size} bytes at {at} ends behind the file: it is truncated")
        yield number, data[at : at + size]
        at += size


def packed(value: int | memoryview) -> list[int]:
    """A repeated integer field that may be packed."""
    if isinstance(value, int):
        return [value]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def text(value: int | memoryview) -> str:
    """A string field."""
    return "" if isinstance(value, int) else bytes(value).decode("utf-8", "replace")


def message(value: int | memoryview) -> memoryview:
    """An embedded message.

    Raises:
        BundleError: the field is a number.
    """
    if isinstance(value, int):
        raise BundleError("a number stands where a message is expected: this is no ONNX file")
    return value


def encode(number: int, value: int | str | bytes) -> bytes:
    """One field: a varint, or a string or message behind its length."""
    if isinstance(value, int):
        return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _encode_varint(number << 3 | _LENGTH) + _encode_varint(len(content)) + content


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BundleError(f"a number at byte {at} does not end: this is no ONNX file, or it is truncated")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _encode_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
