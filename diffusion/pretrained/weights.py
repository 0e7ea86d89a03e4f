"""Parameters from stored tensors and back, by a model's name table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from diffusion.pretrained import names as tables
from diffusion.pretrained.files import Tensor, aligned
from diffusion.pretrained.names import Match, Names

Place = jax.Device | Sharding


def load_params(
    names: Names,
    shapes: Any,
    tensors: Mapping[str, Tensor],
    *,
    dtype: DTypeLike | None = jnp.float32,
    device: Place | Callable[[tuple[int, ...]], Place] | None = None,
    what: str = "checkpoint",
) -> dict:
    """The parameters that a checkpoint holds, on the device.

    The parameters go from the file to the device one by one, so that the host holds only one of
    them at a time. On the CPU, where host and device share memory, no second copy is made.

    Args:
      names: the model's name table.
      shapes: the model's parameters, arrays or ``jax.ShapeDtypeStruct``s.
      tensors: key -> stored tensor.
      dtype: of the parameters; None leaves them as stored.
      device: a device, a sharding, or a function that gives one for a parameter's shape; the
        default device by default.
      what: names the checkpoint in errors.

    Raises:
      ValueError: tensors are missing, unexpected, misshapen, or not floating point (quantised);
        nothing is read then.
    """
    stored = tables.canonical(names, tensors)
    wrong = [k for k in stored.values() if not jnp.issubdtype(tensors[k].dtype, jnp.floating)]
    if wrong:
        raise ValueError(
            f"{what}: weights are floating point; {len(wrong)} are not, such as {wrong[0]}"
            f" ({tensors[wrong[0]].dtype}): quantised weights are not supported"
        )

    def put(array: np.ndarray) -> jax.Array:
        target = array.dtype if dtype is None else np.dtype(dtype)
        if target.itemsize <= array.dtype.itemsize:
            # In its memory order, and before the conversion to a wider type could double it.
            array = array.astype(target, order="K", copy=False)
        if target != array.dtype or not array.flags.c_contiguous:
            array, given = aligned(array.shape, target), array
            np.copyto(array, given, casting="unsafe")  # also between bfloat16 and float16
        place = device(array.shape) if callable(device) else device
        return jax.device_put(array, place).block_until_ready()

    return tables.from_tensors(names, shapes, tensors, put, what)


def save_params(names: Names, params: Any, *, dtype: DTypeLike | None = None) -> dict[str, Tensor]:
    """Parameters as tensors to write, each brought to the host only when it is read.

    ``params`` may be shapes, whose tensors cannot be read. A dtype of None is the parameters' own.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for match in tables.bind(names, params):
        kind = np.dtype(dtype if dtype is not None else flat[match.ours[0]].dtype)
        for i, (key, shape) in enumerate(zip(match.theirs, match.shapes)):
            tensors[key] = Tensor(tuple(shape), kind, _reader(flat, match, i, kind))
    return tensors


def _reader(flat: Mapping[str, Any], match: Match, i: int, dtype: np.dtype) -> Callable:
    def read() -> np.ndarray:
        values = match.layout.split([np.asarray(flat[path]) for path in match.ours])[i]
        return np.ascontiguousarray(values, dtype)

    return read


def nbytes(shapes: Any, dtype: DTypeLike | None = None) -> int:
    """Bytes of parameters, arrays or shapes, in ``dtype`` or their own dtypes."""
    return sum(
        leaf.size * np.dtype(dtype or leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes)
    )
