"""The constants of a frozen TensorFlow graph, read without TensorFlow.

A ``GraphDef`` is a protocol buffer: fields with a number and a wire type, where type 0 is a varint,
1 and 5 are eight and four bytes, and 2 is a length with as many bytes. Of a graph's nodes (field 1)
those with the operation "Const" have a name (1), an operation (2) and an attribute (5) "value". Its
tensor (8) has a type (1), a shape (2) and the numbers as bytes (4) or as a list (5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffusion.pretrained.files import Tensor, of_array

FLOAT = 1  # in TensorFlow's list of types
Field = tuple[int, int, memoryview | int]


def constants(path: Path) -> dict[str, Tensor]:
    """The float32 constants of a ``.pb`` file by the names of their nodes.

    Raises:
      ValueError: the file is no such graph, is cut off, or a constant has too few numbers.
    """
    found = {}
    try:
        for number, _, node in _fields(memoryview(path.read_bytes())):
            if number == 1:
                name, tensor = _constant(node)
                if tensor is not None:
                    array = _array(tensor)
                    if array is not None:
                        found[name] = of_array(array)
    except (_Damaged, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TensorFlow graph, or is damaged: {error}") from None
    return found


class _Damaged(ValueError):
    pass


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(the number at a place, the place after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(data):
            break
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise _Damaged("a number has no end")


def _bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise _Damaged("a number where a message should be, or a text")
    return value


def _number(value: memoryview | int) -> int:
    if not isinstance(value, int) or value >= 2**31:
        raise _Damaged("a side of a tensor is no number, or is too large")
    return value


def _fields(data: memoryview | int) -> Iterator[Field]:
    """(number, wire type, bytes or varint) of every field of a message."""
    data, at = _bytes(data), 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + length > len(data):
                raise _Damaged(f"{at + length - len(data)} bytes are missing")
            value, at = data[at : at + length], at + length
        else:
            raise _Damaged(f"a field has the unknown wire type {kind}")
        yield key >> 3, kind, value


def _constant(node: memoryview | int) -> tuple[str, memoryview | int | None]:
    """(name, tensor of the attribute "value" if the node is a constant)."""
    name, operation, tensor = "", "", None
    for number, _, value in _fields(node):
        if number == 1:
            name = str(_bytes(value), "utf-8")
        elif number == 2:
            operation = str(_bytes(value), "utf-8")
        elif number == 5:
            entry = {n: v for n, _, v in _fields(value)}
            if 2 in entry and _bytes(entry.get(1, b"")) == b"value":
                tensor = {n: v for n, _, v in _fields(entry[2])}.get(8)
    return name, tensor if operation == "Const" else None


def _array(tensor: memoryview | int) -> np.ndarray | None:
    """A tensor's numbers, or None if they are not float32."""
    kind, shape, content, listed = 0, (), b"", []
    for number, wire, value in _fields(tensor):
        if number == 1:
            kind = value
        elif number == 2:
            sides = [dict((n, v) for n, _, v in _fields(side)) for n, _, side in _fields(value)]
            shape = tuple(_number(side.get(1, 0)) for side in sides)
        elif number == 4:
            content = _bytes(value)
        elif number == 5 and wire in (2, 5):
            listed.append(value)
    if kind != FLOAT:
        return None
    content, count = content or b"".join(listed), math.prod(shape)
    if len(content) % 4:
        raise _Damaged(f"{len(content)} bytes are no whole number of floats")
    numbers = np.frombuffer(content, "<f4")
    if len(numbers) == 1 < count:  # one number stands for all
        return np.broadcast_to(numbers, shape)
    if len(numbers) != count:
        raise _Damaged(f"a tensor of shape {shape} has {len(numbers)} numbers")
    return numbers.reshape(shape)
