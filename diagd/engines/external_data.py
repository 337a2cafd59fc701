"""Which files an ONNX graph's weights lie in, and how many bytes of them it reads; needs no ONNX package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# A TensorProto's external_data is a list of StringStringEntryProto: key (field 1), then value (field 2).
_LOCATION = re.compile(rb"\x0a\x08location\x12(.)", re.DOTALL)
_LENGTH = re.compile(rb"\x0a\x06length\x12.(\d+)", re.DOTALL)


@dataclass(frozen=True)
class ExternalData:
    """Names of weights files beside a graph, sorted, and the bytes of them that are its weights."""

    files: tuple[str, ...]
    bytes: int


def external_data(graph: Path) -> ExternalData:
    """Read where the weights of an ONNX file are, from the entries of its external tensors."""
    content = graph.read_bytes()
    files = set()
    for match in _LOCATION.finditer(content):
        length = match.group(1)[0]  # file names are shorter than 128 bytes: the varint is one byte
        files.add(content[match.end() : match.end() + length].decode())
    return ExternalData(tuple(sorted(files)), sum(int(length) for length in _LENGTH.findall(content)))
