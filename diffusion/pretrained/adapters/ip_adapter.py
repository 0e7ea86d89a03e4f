"""Files of IP-Adapters: "image_proj.*", and "ip_adapter.N.to_k_ip.weight" for attention N.

N counts all of a U-Net's attentions, down, up, mid; those to the text have odd numbers in published
files. FaceID's files also hold a LoRA of every attention, "ip_adapter.N.to_q_lora.down.weight".
The shapes tell which projection it is, and what network it was made for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from diffusion.adapters.low_rank.deltas import Deltas, LowRank
from diffusion.models.image_tokens import (
    HEAD,
    EmbeddingTokens,
    FaceTokens,
    PatchTokens,
    Resampler,
)
from diffusion.models.ip_adapter import attentions, cross_attentions
from diffusion.models.surroundings import image_network
from diffusion.pretrained import files, names, weights
from diffusion.pretrained.adapters.bases import BASES
from diffusion.pretrained.names import Names

LORA = r"ip_adapter\.(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight"
LAYERS = ((r"/layers_(\d+)/(norm\d|to_\w+)", r"/layers.\1.0.\2"),)
LAYERS += ((r"/layers_(\d+)/ff_(\d)", r"/layers.\1.1.\2"), (r"/proj_(\d)", r"/proj.\1"))


@dataclass(frozen=True, eq=False)
class File:
    """An IP-Adapter's file whose tensors are not read yet.

    Attributes:
      path: for messages.
      projection: module of ``image_tokens``.
      width: of the context of the network that it is for.
      feature: (D,) of what is known of one picture, or (0, D) of its patches, however many.
      face: whether that is the embedding of a face.
      tensors: by the published keys.
      encoder: of the pictures, which files do not name.
      zero_null: whether features of zeros are no picture; else those of a picture of zeros.
    """

    path: str
    projection: nn.Module
    width: int
    feature: tuple[int, ...]
    face: bool
    tensors: files.Tensors = field(repr=False)
    encoder: str = ""
    zero_null: bool = False

    @cached_property
    def has_lora(self) -> bool:
        """Whether a LoRA of all attentions belongs to it."""
        return any(re.fullmatch(LORA, key) for key in self.tensors)

    def check(self, network: nn.Module) -> None:
        """Raises ValueError unless the file holds an adapter of this network, and nothing else."""
        net, sites = image_network(network), cross_attentions(network)
        count = len({key for key in self.tensors if key.endswith(".to_k_ip.weight")})
        mine = (net.context_width or self.width, len(sites))
        if mine != (self.width, count):
            raise ValueError(
                f"{self.path} is for {_base(self.width, count)}; this is {_base(*mine)}"
            )
        shapes = {key: tensor.shape for key, tensor in self.tensors.items()}
        table, known = name_table(network), own_shapes(network, self.projection, self._example)
        stored = {key: shape for key, shape in shapes.items() if not re.fullmatch(LORA, key)}
        names.check(names.bind(table, known), stored, self.path)
        self.lora(network, read=False)
        wrong = [k for k, t in self.tensors.items() if not jnp.issubdtype(t.dtype, jnp.floating)]
        if wrong:
            raise ValueError(f"{self.path}: {wrong[0]} holds no floating point numbers")

    def load(self, network: nn.Module, dtype: DTypeLike | None = jnp.float32) -> dict[str, Any]:
        """The own parameters of ``ImagePrompted`` around the network.

        Raises:
          ValueError: a tensor holds NaN or infinity; the message names it.
        """
        shapes = own_shapes(network, self.projection, self._example)
        given = {k: self._finite(k) for k in self.tensors if not re.fullmatch(LORA, k)}
        return weights.load_params(name_table(network), shapes, given, dtype=dtype, what=self.path)

    def lora(self, network: nn.Module, read: bool = True) -> Deltas:
        """FaceID's LoRA, by paths of the network's parameters; without ``read``, only checked."""
        net, found = image_network(network), {}
        factors = {key for key in self.tensors if re.fullmatch(LORA, key)}
        if not factors:
            return {}
        for number, site in enumerate(attentions(net)):
            width = net.widths[site.level]
            for name in ("q", "k", "v", "out"):
                key = f"ip_adapter.{number}.to_{name}_lora"
                taken = self.width if site.crosses and name in "kv" else width
                factors -= {f"{key}.down.weight", f"{key}.up.weight"}
                down, up = (self._factor(f"{key}.{part}.weight") for part in ("down", "up"))
                rank = down.shape[0]
                if down.shape != (rank, taken) or up.shape != (width, rank):
                    raise ValueError(
                        f"{self.path}: {key} has factors {down.shape} and {up.shape}; expected "
                        f"(r, {taken}) and ({width}, r)"
                    )
                if read:
                    down, up = (jnp.asarray(np.asarray(t), jnp.float32) for t in (down, up))
                    layer = "to_out_0" if name == "out" else f"to_{name}"
                    found[f"{site.path}/{layer}/kernel"] = LowRank(down, up, jnp.float32(1))
        if factors:
            raise ValueError(f"{self.path}: no attention of this network has {min(factors)}")
        return found

    @property
    def _example(self) -> jax.ShapeDtypeStruct:
        shape = (1, *(side or 2 for side in self.feature))
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def _factor(self, key: str) -> files.Tensor:
        if key not in self.tensors:
            raise ValueError(f"{self.path}: {key} is missing")
        return self._finite(key)

    def _finite(self, key: str) -> files.Tensor:
        def read() -> np.ndarray:
            values = self.tensors[key].read()
            if not np.isfinite(values.astype(np.float32)).all():
                raise ValueError(f"{self.path}: {key} contains NaN or infinity")
            return values

        return replace(self.tensors[key], read=read)


def open_file(path: str | Path) -> File:
    """The adapter in a ``.safetensors`` file, by its shapes; nothing is read yet.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no file of an IP-Adapter, of a kind that is not supported, or a pickle.
    """
    tensors = files.open_file(path)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    own = "image_proj."
    proj = {k.removeprefix(own): shape for k, shape in shapes.items() if k.startswith(own)}
    keys = [s for k, s in shapes.items() if re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", k)]
    if not proj or not keys:
        part = f"{own}*" if keys else "ip_adapter.N.to_k_ip.weight"
        raise ValueError(f"{path} is no file of an IP-Adapter: it has no tensors {part}")
    width = keys[0][-1]
    try:
        projection, feature, face = _projection(proj, width)
    except KeyError as error:
        raise ValueError(f"{path}: its {own}* are of no known kind: no {error.args[0]}") from None
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path}: its {own}* are not supported: {error}") from None
    return File(str(path), projection, width, feature, face, tensors)


def _projection(
    shapes: Mapping[str, tuple[int, ...]], width: int
) -> tuple[nn.Module, tuple[int, ...], bool]:
    """The module, the shape of its features and whether they are a face's."""
    if any(key.startswith("perceiver_resampler.") for key in shapes):
        raise ValueError("FaceID Plus is not supported; FaceID is")
    if "proj.weight" in shapes:
        rows, wide = shapes["proj.weight"]
        return EmbeddingTokens(rows // width, width), (wide,), False
    if "proj.3.weight" in shapes:
        return PatchTokens(width), (0, shapes["proj.0.weight"][1]), False
    if "proj.2.weight" in shapes:
        hidden, wide = shapes["proj.0.weight"]
        return FaceTokens(shapes["proj.2.weight"][0] // width, width, hidden), (wide,), True
    _, tokens, inner = shapes["latents"]
    heads = shapes["layers.0.0.to_q.weight"][0] // HEAD
    depth = len([key for key in shapes if re.fullmatch(r"layers\.\d+\.0\.to_q\.weight", key)])
    wide = shapes["proj_in.weight"][1]
    return Resampler(tokens, width, inner, heads, depth), (0, wide), False


def save(
    path: str | Path,
    network: nn.Module,
    params: Mapping[str, Any],
    dtype: DTypeLike | None = None,
) -> None:
    """Writes the own parameters of ``ImagePrompted`` around a network in the published layout.

    Args:
      path: a ``.safetensors`` file, replaced if it is there.
      network: with or without what is around it.
      params: "projection", "to_k_ip_0", ...; what else there is is not written.
      dtype: in the file; None leaves the parameters' own.
    """
    own = {key: params[key] for key in params if re.fullmatch(r"projection|to_[kv]_ip_\d+", key)}
    files.write_file(path, weights.save_params(name_table(network), own, dtype=dtype))


def name_table(network: nn.Module) -> Names:
    """Of the own parameters of ``ImagePrompted`` around a network."""
    sites = attentions(image_network(network))
    numbers = [number for number, site in enumerate(sites) if site.crosses]
    within = names.substituted(*LAYERS)

    def rename(path: str) -> str:
        found = re.fullmatch(r"(to_[kv]_ip)_(\d+)", path)
        if found:
            return f"ip_adapter.{numbers[int(found[2])]}.{found[1]}"
        return within(path).replace("projection", "image_proj", 1).replace("/", ".")

    return Names(rename)


def own_shapes(
    network: nn.Module, projection: nn.Module, features: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """Shapes of the own parameters of ``ImagePrompted`` around a network."""
    net = image_network(network)
    made = jax.eval_shape(projection.init, jax.random.key(0), features)["params"]
    shapes: dict[str, Any] = {"projection": made}
    for i, site in enumerate(cross_attentions(network)):
        kernel = jax.ShapeDtypeStruct((projection.width, net.widths[site.level]), jnp.float32)
        shapes |= {f"{name}_{i}": {"kernel": kernel} for name in ("to_k_ip", "to_v_ip")}
    return shapes


def _base(width: int, count: int) -> str:
    about = f"a context {width} wide and {count} cross-attentions"
    return f"{BASES[width]} ({about})" if width in BASES else f"a network with {about}"
