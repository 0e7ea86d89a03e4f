"""The constants of a frozen TensorFlow graph, read without TensorFlow.

protobuf reads the message; of TensorFlow's schema only the fields that constants need are declared
here, by their published numbers.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from diffusion.pretrained.files import Tensor, of_array

FLOAT = 1  # in TensorFlow's list of types
SCHEMA = {  # message -> field -> (number, type or message, whether it is repeated)
    "Size": {"size": (1, "int64", False)},
    "Shape": {"dim": (2, "Size", True)},
    "Tensor": {
        "dtype": (1, "int32", False),
        "tensor_shape": (2, "Shape", False),
        "tensor_content": (4, "bytes", False),
        "float_val": (5, "float", True),
    },
    "Value": {"tensor": (8, "Tensor", False)},
    "Entry": {"key": (1, "string", False), "value": (2, "Value", False)},
    "Node": {"name": (1, "string", False), "op": (2, "string", False), "attr": (5, "Entry", True)},
    "Graph": {"node": (1, "Node", True)},
}


def constants(path: Path) -> dict[str, Tensor]:
    """The float32 constants of a ``.pb`` file by the names of their nodes.

    Raises:
      ValueError: the file is no such graph, is cut off, or a constant has too few numbers.
    """
    found, graph = {}, _graph()()
    try:
        graph.ParseFromString(path.read_bytes())
        for node in graph.node:
            tensors = [e.value.tensor for e in node.attr if e.key == "value"]
            if node.op == "Const" and tensors and tensors[-1].dtype == FLOAT:
                found[node.name] = of_array(_array(tensors[-1]))
    except (message.DecodeError, ValueError) as error:
        raise ValueError(f"{path} is no TensorFlow graph, or is damaged: {error}") from None
    return found


@cache
def _graph() -> type[message.Message]:
    """The class of ``SCHEMA``'s last message."""
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="graph", package="graph", syntax="proto3")
    for name, fields in SCHEMA.items():
        own = file.message_type.add(name=name)
        for field, (number, of, repeated) in fields.items():
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            one = own.field.add(name=field, number=number, label=label)
            if of in SCHEMA:
                one.type, one.type_name = kind.TYPE_MESSAGE, f".graph.{of}"
            else:
                one.type = getattr(kind, f"TYPE_{of.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("graph.Graph"))


def _array(tensor: message.Message) -> np.ndarray:
    shape = tuple(side.size for side in tensor.tensor_shape.dim)
    content = tensor.tensor_content
    if len(content) % 4:
        raise ValueError(f"{len(content)} bytes are no whole number of floats")
    numbers = np.frombuffer(content, "<f4") if content else np.array(tensor.float_val, np.float32)
    if min(shape, default=0) < 0 or len(numbers) not in (1, math.prod(shape)):
        raise ValueError(f"a tensor of shape {shape} has {len(numbers)} numbers")
    return np.broadcast_to(numbers, shape) if len(numbers) == 1 else numbers.reshape(shape)
