"""safetensors files: reading and writing, one tensor at a time.

A file is 8 bytes (the header's length, little-endian), a JSON header
``{key: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`` and the tensors' bytes, one
after another. Tensors are read by their offsets and not mapped into memory: mapped pages count as
this process's memory, so that mapping the whole file would double the memory of loading.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {
    **{"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2")},
    **{"BF16": np.dtype(jnp.bfloat16), "BOOL": np.dtype("bool")},
    **{f"{kind}{8 * n}": np.dtype(f"{kind.lower()}{n}") for kind in "IU" for n in (8, 4, 2, 1)},
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
CONVERT = """import torch; from safetensors.torch import save_file
weights = torch.load({source!r}, map_location="cpu", weights_only=True)
weights = weights.get("state_dict", weights)
tensors = {{k: v.clone().contiguous() for k, v in weights.items() if torch.is_tensor(v)}}
save_file(tensors, {target!r}, {{"format": "pt"}})"""
"""How to convert a pickle, where torch and safetensors are installed."""
PYTORCH = {"format": "pt"}
"""Metadata of weights; transformers refuses files without ``format``."""
_ALIGNMENT = 64  # bytes; XLA on the CPU uses host arrays of this alignment without a copy


@dataclass(frozen=True)
class Tensor:
    """A tensor whose values, an array of this shape and dtype, ``read`` reads later."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)


Tensors = Mapping[str, Tensor]


def of_array(array: np.ndarray) -> Tensor:
    """An array, or a JAX array (copied to the host when it is read), as a ``Tensor``."""
    return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that a JAX array on the CPU can hold without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def open_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, none of them read yet.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a pickle (with the way to convert it), a truncated or damaged file, and a
        dtype that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    header, start = _header(path)
    size = path.stat().st_size - start
    tensors, spans = {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if not _whole(entry):
            raise ValueError(f"{path}: the header's entry for {key!r} is damaged: {entry!r:.200}")
        code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if code not in DTYPES:
            raise ValueError(
                f"{path}: {key!r} is stored as {code}, which is not supported (of floats: F64, F32,"
                " F16, BF16); convert it to BF16 first"
            )
        dtype = DTYPES[code]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path}: {key!r} should take {math.prod(shape) * dtype.itemsize} bytes"
                f" ({code} {list(shape)}), the header gives it {last - first}"
            )
        spans.append((first, last))
        read = _reader(path, start + first, shape, dtype)
        tensors[key] = Tensor(shape, dtype, read)
    spans.sort()
    ends = [0, *(last for _, last in spans)]
    if any(first != end for (first, _), end in zip(spans, ends)):
        raise ValueError(f"{path}: the header's offsets leave gaps or overlap")
    if ends[-1] != size:
        what = "truncated" if ends[-1] > size else "too long"
        raise ValueError(f"{path} is {what}: {ends[-1]} bytes of tensors expected, {size} found")
    return tensors


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata in a file's header, often ``{"format": "pt"}``."""
    return dict(_header(Path(path))[0].get("__metadata__", {}))


def write_file(path: str | Path, tensors: Tensors, metadata: Mapping[str, str] = PYTORCH) -> None:
    """Writes a safetensors file, one tensor in memory at a time, into a folder that exists.

    The file appears under its name only when it is complete: until then it is ``NAME.partial``.
    """
    with written(Path(path), tensors, metadata):
        pass


@contextmanager
def written(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[None]:
    """Writes ``NAME.partial``, which is renamed at the end of the block, or removed on an error."""
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest first, as the reference library does, so that every tensor is aligned to its dtype.
    keys = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    offset = 0
    for key in keys:
        tensor = tensors[key]
        if tensor.dtype not in CODES:
            raise ValueError(
                f"{path}: {key!r} has dtype {tensor.dtype}; legal: {', '.join(DTYPES)}"
            )
        header[key] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for key in keys:
                values = np.ascontiguousarray(tensors[key].read())
                if values.nbytes != tensors[key].nbytes:
                    raise ValueError(f"{path}: {key!r} gave {values.nbytes} bytes when read")
                file.write(values.reshape(-1).view(np.uint8).data)
        yield
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_pickle(path: Path) -> ValueError:
    """The error for a file that only unpickling (or an unsupported library) could read."""
    lines = CONVERT.format(source=str(path), target=str(path.with_suffix(".safetensors")))
    return ValueError(
        f"{path} is not a safetensors file. {path.suffix} files are read by unpickling, which runs"
        " whatever code is in them, so they are refused. Convert it, on a machine where you trust"
        f" it and where torch and safetensors are installed, with these lines of Python:\n{lines}"
    )


def _reader(
    path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        values = aligned(shape, dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            rest = values.reshape(-1).view(np.uint8)
            while rest.size:
                count = file.readinto(rest.data)
                if not count:
                    raise ValueError(f"{path} is truncated: {rest.size} bytes missing")
                rest = rest[count:]
        return values

    return read


def _whole(entry: Any) -> bool:
    """Whether a header's entry has the three fields, of the types that the format has."""

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and numbers(entry.get("shape"))
        and numbers(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _header(path: Path) -> tuple[dict, int]:
    """(header, offset of the tensors' bytes)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer; fetch the file with: git lfs pull")
        if path.suffix in PICKLES or start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03")):
            raise refuse_pickle(path)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or 8 + length > size:
            raise ValueError(
                f"{path} is truncated, or not a safetensors file: a header of {length} bytes in a"
                f" file of {size}"
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length).decode())
        except (ValueError, RecursionError) as error:
            what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{path} is not a safetensors file: its header is {what}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is {type(header).__name__}")
    about = header.get("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise ValueError(f"{path}: the header's __metadata__ must be texts by name: {about!r:.200}")
    return header, 8 + length
