"""Reads the tensors and nodes of an ONNX file: the few fields of its protocol buffers that a converter needs.

https://github.com/onnx/onnx/blob/main/onnx/onnx.proto: ModelProto.graph = 7; GraphProto.node = 1,
.initializer = 5; NodeProto.input = 1, .output = 2, .op_type = 4; TensorProto.dims = 1, .data_type = 2,
.name = 8, .raw_data = 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FLOAT = 1  # TensorProto.DataType


class Node(NamedTuple):
    """One operation: its kind and the names of its tensors."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph(NamedTuple):
    """The operations and the constant float32 tensors by name."""

    nodes: list[Node]
    tensors: dict[str, Any]


def read(path: Path) -> Graph:
    """Returns the graph of an ONNX file."""
    (graph,) = (value for number, value in fields(memoryview(path.read_bytes())) if number == 7)
    nodes = [_node(value) for number, value in fields(graph) if number == 1]
    tensors = dict(found for number, value in fields(graph) if number == 5 and (found := _tensor(value)))
    return Graph(nodes, tensors)


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yields (field number, value): an integer, or the bytes of a string, a message or a packed list."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
        else:
            size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            yield number, data[at : at + size]
            at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _node(data: memoryview) -> Node:
    found = list(fields(data))
    texts = {n: tuple(bytes(v).decode() for k, v in found if k == n) for n in (1, 2, 4)}
    return Node(texts[4][0], texts[1], texts[2])


def _tensor(data: memoryview) -> tuple[str, Any] | None:
    import torch

    found = list(fields(data))
    kinds = [v for n, v in found if n == 2]
    raw = [v for n, v in found if n == 9]
    if kinds != [FLOAT] or not raw:
        return None
    dims = [v for n, v in found if n == 1 and isinstance(v, int)]
    for packed in (v for n, v in found if n == 1 and not isinstance(v, int)):
        at = 0
        while at < len(packed):
            value, at = _varint(packed, at)
            dims.append(value)
    name = next(bytes(v).decode() for n, v in found if n == 8)
    return name, torch.frombuffer(bytearray(raw[0]), dtype=torch.float32).reshape(dims)
