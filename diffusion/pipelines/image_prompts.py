"""Pictures as prompts: specs of IP-Adapters, checked, and what they add to a pipeline.

    config.image_prompts='ip_adapter("ip-adapter_sd15.safetensors", image="x.png", encoder="DIR")'

Several specs are several adapters. The image encoder and the adapter's projection run once, when
the weights are read; tokens, scales and masks are data of the compiled sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion import errors, specs
from diffusion.adapters.low_rank.deltas import LowRank
from diffusion.conditioning import Conditioning, ImagePrompt
from diffusion.errors import check_range
from diffusion.evaluation.figures import to_uint8
from diffusion.models.ip_adapter import ImagePrompted, cross_attentions
from diffusion.models.text_to_image import (
    image_network,
    image_path,
    surrounded,
    surrounded_params,
)
from diffusion.pipelines import picture_files
from diffusion.pipelines.extension import Extension
from diffusion.pipelines.guidance import Specs
from diffusion.pipelines.image_encoders import ImageEncoder, open_encoder
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pretrained.adapters import ip_adapter as adapter_files

FIELD = "config.image_prompts"
BLOCKS: dict[str, Mapping[str, Any]] = {
    "style": {"up": {"block_0": (0, 1, 0)}},
    "layout": {"down": {"block_2": (0, 1)}},
}
"""The blocks of SDXL that take style or layout over (InstantStyle; Wang et al., 2024)."""


@dataclass(frozen=True)
class Spec:
    """One adapter as a spec gives it; ``ip_adapter`` describes the fields."""

    file: str
    image: tuple[str, ...] = ()
    scale: float = 1.0
    encoder: str = ""
    mask: tuple[str, ...] = ()
    blocks: str | Mapping[str, Any] = "all"
    embeddings: str = ""
    lora: float = 1.0


def ip_adapter(
    file: str,
    image: str | Sequence[str] = (),
    scale: float = 1.0,
    encoder: str = "",
    mask: str | Sequence[str] = (),
    blocks: str | Mapping = "all",
    embeddings: str = "",
    lora: float = 1.0,
) -> Spec:
    """An IP-Adapter and its pictures.

    Args:
      file: a ``.safetensors`` file in the published layout.
      image: the picture, or several, whose tokens are joined.
      scale: of what the adapter adds; 0 leaves the network as it is.
      encoder: of the pictures, see ``image_encoders.open_encoder``.
      mask: white is where the pictures act, black where they do not; one for all pictures, or one
        for each, whose attention maps are then apart.
      blocks: "all", "style", "layout" (both SDXL's), or factors by block, 0 where there is none:
        {"down": 0.5, "mid": 1, "up": {"block_0": (0, 1, 0)}}.
      embeddings: a ``.npy`` file of features instead of pictures: [D] or [images, D] (FaceID, or
        CLIP's embeddings), or [2, images, patches, D] with those of no picture first.
      lora: strength of the LoRA that a FaceID file holds.
    """
    several = [(v,) if isinstance(v, str) else tuple(v) for v in (image, mask)]
    return Spec(file, several[0], scale, encoder, several[1], blocks, embeddings, lora)


CHOICES = {"ip_adapter": ip_adapter}


def make(
    pipeline: Pipeline, sampler: Any, given: Specs, size: tuple[int, int]
) -> Sequence[Extension]:
    """The extensions of specs, such as those of config; none of ().

    Raises:
      ValueError, FileNotFoundError: something does not fit; no weight has been read.
    """
    del sampler
    made: list[Extension] = []
    with errors.field(f"{FIELD}={given!r}"), errors.wrong_types():
        for spec in specs.values(given, CHOICES, FIELD):
            made.append(_checked(spec, len(made), pipeline, size))
    return made


def _checked(
    spec: Spec, number: int, pipeline: Pipeline, size: tuple[int, int]
) -> ImagePromptExtension:
    check_range("scale", spec.scale)
    check_range("lora", spec.lora)
    file = adapter_files.open_file(spec.file)
    file.check(pipeline.network)
    factors = block_factors(pipeline.network, spec.blocks)
    if spec.lora != 1 and not file.has_lora:
        raise ValueError(f"lora={spec.lora} has no effect: {spec.file} holds no LoRA")
    if bool(spec.image) == bool(spec.embeddings):
        raise ValueError('expected either image="x.png" or embeddings="x.npy"')
    features, encoder, pictures = None, None, []
    if spec.embeddings:
        if spec.encoder:
            raise ValueError(f"encoder={spec.encoder!r} has no effect: embeddings are given")
        features = read_embeddings(spec.embeddings, file.feature)
    elif file.face:
        raise ValueError(
            f"{spec.file} takes the embedding of a face (ArcFace, {file.feature[0]} numbers) and "
            'not a picture: give embeddings="face.npy"'
        )
    else:
        encoder = _encoder(spec, file)
        fitted = None if encoder.own_size else pipeline.size
        for path in spec.image:
            with errors.field(f"image={path!r}"):
                pictures.append(to_uint8(picture_files.read_image(path, fitted)))
    count = len(pictures) if features is None else len(features[0])
    if len(spec.mask) not in (0, 1, count):
        raise ValueError(f"{len(spec.mask)} masks for {count} pictures; expected 1 or {count}")
    masks = []
    for path in spec.mask:
        with errors.field(f"mask={path!r}"):
            masks.append(picture_files.read_mask(path, size))
    mask = np.concatenate(masks, axis=-1) if masks else None
    return ImagePromptExtension(
        number, file, np.float32(spec.scale) * factors, mask, spec.lora, encoder, pictures, features
    )


def _encoder(spec: Spec, file: adapter_files.File) -> ImageEncoder:
    if not spec.encoder:
        raise ValueError(
            f"{spec.file} takes features of an image encoder: give its folder, encoder=..."
        )
    with errors.field(f"encoder={spec.encoder!r}"):
        encoder = open_encoder(spec.encoder, patches=len(file.feature) == 2)
    if encoder.width not in (None, file.feature[-1]):
        raise ValueError(
            f"{spec.file} takes features of {file.feature[-1]} numbers, encoder={spec.encoder!r} "
            f"gives {encoder.width}; published adapters take those of CLIP ViT-H, and SDXL's "
            "first one those of ViT-bigG"
        )
    return encoder


@dataclass(eq=False)
class ImagePromptExtension:
    """An IP-Adapter around a pipeline; ``Extension`` describes the methods.

    Attributes:
      number: which of a pipeline's adapters it is.
      file: its weights, not read yet.
      scale: [A] of each cross-attention.
      mask: [H, W, M] in [0, 1], as large as the picture that is made, or None.
      lora: strength of the file's LoRA.
      encoder: of ``images``, uint8 [H, W, 3] each; or None, and ``features`` are known: those of
        the pictures [I, ...], and of no picture [1 or I, ...].
      network: what it stands around, once it does.
    """

    number: int
    file: adapter_files.File
    scale: np.ndarray
    mask: np.ndarray | None
    lora: float
    encoder: ImageEncoder | None
    images: Sequence[np.ndarray]
    features: tuple[np.ndarray, np.ndarray] | None
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    network: nn.Module | None = None

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        self.network = pipeline.network
        around = surrounded(self.network, partial(ImagePrompted, projection=self.file.projection))
        return replace(pipeline, network=around)

    def load(self, params: Params) -> Params:
        own = self.file.load(self.network)
        features = self.encoder.encode(self.images) if self.features is None else self.features
        tokens, null = (_tokens(self.file.projection, own["projection"], f) for f in features)
        null = jnp.broadcast_to(null, tokens.shape)
        joined = tuple(a.reshape(1, -1, a.shape[-1]) for a in (tokens, null))
        inner = params["network"]
        deltas = self.file.lora(self.network)
        for path, delta in deltas.items():
            inner = _with_delta(
                inner, (*image_path(self.network), *path.split("/")), delta, self.lora
            )
        return {
            **params,
            "network": surrounded_params(self.network, inner, own),
            "image_prompts": {**params.get("image_prompts", {}), self.number: joined},
        }

    def condition(
        self, params: Params, keys: jax.Array, cond: Conditioning, null: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        def prompted(c: Conditioning | None, tokens: jax.Array) -> Conditioning | None:
            if c is None:
                return None
            scale = jnp.tile(self.scale, (len(keys), 1))
            mask = None if self.mask is None else jnp.tile(self.mask, (len(keys), 1, 1, 1))
            prompt = ImagePrompt(jnp.tile(tokens, (len(keys), 1, 1)), scale=scale, mask=mask)
            return c.replace(image_prompts=(*c.image_prompts, prompt))

        tokens = params["image_prompts"][self.number]
        return prompted(cond, tokens[0]), prompted(null, tokens[1])


def block_factors(network: nn.Module, blocks: str | Mapping[str, Any]) -> np.ndarray:
    """A factor [A] for each cross-attention, from ``ip_adapter``'s ``blocks``.

    Raises:
      ValueError: the network has no such block, or another number of attentions in it.
    """
    sites, net = cross_attentions(network), image_network(network)
    if isinstance(blocks, str):
        if blocks == "all":
            return np.ones(len(sites), np.float32)
        if blocks not in BLOCKS:
            raise specs.unknown("blocks", blocks, ("all", *BLOCKS))
        if not net.added_embedding or len(net.widths) != 3:
            raise ValueError(
                f"blocks={blocks!r}: which blocks these are is known of SDXL alone; name this "
                'network\'s, as in blocks={"up": {"block_1": 1}}'
            )
        blocks = BLOCKS[blocks]
    counts = {site.block: site.place + 1 for site in sites}  # attentions of each block
    factors: dict[str, list[float]] = {}
    for part, value in blocks.items():
        names = [b.partition(".")[2] for b in counts if b.split(".")[0] == part]
        if not names:
            raise specs.unknown("blocks", part, {b.split(".")[0] for b in counts})
        for name, one in (
            value if isinstance(value, Mapping) else dict.fromkeys(names, value)
        ).items():
            if name not in names:
                raise specs.unknown(f"blocks: {part}", name, names)
            block = f"{part}.{name}".rstrip(".")
            count = counts[block]
            several = isinstance(one, tuple | list)
            factors[block] = list(one) if several else [one] * count
            if len(factors[block]) != count:
                raise ValueError(f"blocks: {block} has {count} attentions, got factors {one}")
            for factor in factors[block]:
                check_range(f"blocks: {block}", factor)
    given = [factors[s.block][s.place] if s.block in factors else 0 for s in sites]
    return np.array(given, np.float32)


def read_embeddings(path: str, feature: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The features of pictures [I, ...], and of no picture [1 or I, ...], of a ``.npy`` file.

    Args:
      path: of an array [D], [images, D] or [2, images, D], the last with those of no picture first,
        which else are zeros; of patches [2, images, N, D].
      feature: (D,) of embeddings, (0, D) of patches.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        given = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array that NumPy reads without unpickling") from error
    wide, patches = feature[-1], len(feature) == 2
    what = f"[2, images, patches, {wide}], those of no picture first"
    what = what if patches else f"[{wide}], [images, {wide}] or [2, images, {wide}]"
    ranks = (4,) if patches else (1, 2, 3)
    shape = getattr(given, "shape", ())
    fits = len(shape) in ranks and shape[-1] == wide and 0 not in shape
    if not fits or (len(shape) == ranks[-1] and shape[0] != 2) or given.dtype.kind != "f":
        about = f"{given.dtype} {shape}" if shape else "no single array"
        raise ValueError(f"{path} holds {about}; expected floats {what}")
    given = np.asarray(given, np.float32)
    if not np.isfinite(given).all():
        raise ValueError(f"{path} contains NaN or infinity")
    if len(shape) == ranks[-1]:
        return given[1], given[0]
    given = given.reshape(-1, wide)
    return given, np.zeros_like(given[:1])


@partial(jax.jit, static_argnums=0)
def _tokens(projection: nn.Module, params: Any, features: jax.Array) -> jax.Array:
    """[I, N, C]"""
    return projection.apply({"params": params}, features)


def _with_delta(params: Params, path: Sequence[str], delta: LowRank, strength: float) -> Params:
    """``params`` with W + strength dW for one kernel, the others shared."""
    first, *rest = path
    if rest:
        return {**params, first: _with_delta(params[first], rest, delta, strength)}
    kernel = params[first]
    change = strength * delta.scale * (delta.up @ delta.down).T
    return {**params, first: (kernel.astype(jnp.float32) + change).astype(kernel.dtype)}
