"""What a feature network is: examples in, features out, and all that figures by it depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.evaluation.figures import to_uint8

Features = dict[str, np.ndarray]
Run = Callable[[np.ndarray, Sequence[Any]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Network:
    """A feature network whose weights are read when it is first used.

    Attributes:
      name: part of the names of figures, such as "inception2015": lower-case letters, digits, "_".
      open: reads the weights and returns (x [B, ...], subjects of length B) -> {output: [B, ...]}.
      outputs: what it gives; "features" [B, D] are those that most metrics are taken in.
      files: the files of its weights.
      preparation: what is done with pictures before, such as "PIL bicubic to 224 x 224".
      pictures: whether it takes pictures, uint8 [B, H, W, 3] (grey ones are repeated), or else
        float32 examples as the data have them.
      clips: whether its pictures come as clips, [B, T, H, W, 3].
      batch: examples at a time.
    """

    name: str
    open: Callable[[], Run]
    outputs: tuple[str, ...] = ("features",)
    files: tuple[Path, ...] = ()
    preparation: str = ""
    pictures: bool = True
    clips: bool = False
    batch: int = 64

    @cached_property
    def checksum(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the weights' files; "" without files."""
        if not self.files:
            return ""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @property
    def key(self) -> str:
        """Names the network together with its weights: networks of one key are one."""
        return f"{self.name}-{self.checksum}" if self.files else self.name

    @property
    def about(self) -> dict[str, Any]:
        """What a report says of it: JSON."""
        said = {"network": self.name, "weights": self.checksum, "preparation": self.preparation}
        return said | {"quantised": self.pictures}

    def __post_init__(self) -> None:
        object.__setattr__(self, "open", cache(self.open))  # weights are read once

    def __call__(
        self, x: np.ndarray, subjects: Sequence[Any], outputs: Sequence[str] = ("features",)
    ) -> Features:
        """The named outputs [N, ...] of examples [N, ...], ``batch`` at a time, compiled once.

        Args:
          x: uint8 pictures [N, H, W, 1 or 3] or clips of them, or float examples; pictures in
            [-1, 1] are rounded to uint8 for a network of pictures.
          subjects: class, caption or prompt of each example.
          outputs: of ``self.outputs``.

        Raises:
          ValueError: there are no examples, x are no pictures or clips, or a feature is not finite.
        """
        if not len(x):
            raise ValueError(f"{self.name} needs one example at least, got none")
        x, parts = self.seen(x), {output: [] for output in outputs}
        for start in range(0, len(x), self.batch):
            # The last batch is filled up, so that nothing compiles twice.
            index = np.minimum(np.arange(start, start + self.batch), len(x) - 1)
            given = self.open()(x[index], [subjects[i] for i in index])
            for output in outputs:
                values = np.asarray(given[output])[: len(x) - start]
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    raise ValueError(f"{self.name}: {output} contain NaN or infinity")
                parts[output].append(values)
        return {output: np.concatenate(arrays) for output, arrays in parts.items()}

    def seen(self, x: np.ndarray) -> np.ndarray:
        """Examples as the network takes them."""
        if not self.pictures:
            return np.asarray(x, np.float32) if x.dtype != np.uint8 else x / np.float32(127.5) - 1
        kind, axes = ("clips [N, T,", 5) if self.clips else ("pictures [N,", 4)
        if x.ndim != axes or x.shape[-1] not in (1, 3):
            raise ValueError(f"{self.name} judges {kind} H, W, 1 or 3], got {x.shape}")
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise ValueError(f"{self.name} judges uint8 or floats, got {x.dtype}")
        x = x if x.dtype == np.uint8 else to_uint8(x)
        return np.broadcast_to(x, (*x.shape[:-1], 3)) if x.shape[-1] == 1 else x


def pixels() -> Network:
    """The examples themselves, flattened and not rounded: pixels, coordinates or latents."""
    return PIXELS


PIXELS = Network("pixels", lambda: lambda x, _: {"features": x.reshape(len(x), -1)}, pictures=False)


def existing(name: str, path: str) -> Path:
    """The path of a network's weights, if there is such a file."""
    if not Path(path).is_file():
        raise ValueError(f"{name} needs the file of its weights; there is no file {path!r}")
    return Path(path)
