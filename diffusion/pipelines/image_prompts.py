"""Pictures as prompts: specs of IP-Adapters, checked, and what they add to a pipeline.

    config.image_prompts='ip_adapter("ip-adapter_sd15.safetensors", image="x.png", encoder="DIR")'

Several specs are several adapters. The image encoder and the adapter's projection run once, when
the weights are read; tokens, scales and masks are data of the compiled sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion import errors, specs
from diffusion.adapters.ip_adapter import IPAdapter
from diffusion.adapters.low_rank.merge import merge
from diffusion.conditioning import Conditioning, ImagePrompt
from diffusion.errors import check_range
from diffusion.evaluation.figures import to_uint8
from diffusion.models.ip_adapter import ImagePrompted, block_factors, cross_attentions
from diffusion.models.surroundings import image_network, parts, surrounded, surrounded_params
from diffusion.objectives.adapting import OWN
from diffusion.pipelines import picture_files
from diffusion.pipelines.extension import Extension
from diffusion.pipelines.from_run import Run, is_run, open_run
from diffusion.pipelines.guidance import Specs
from diffusion.pipelines.image_encoders import ImageEncoder, open_encoder, read_embeddings
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pretrained.adapters import ip_adapter as adapter_files
from diffusion.pretrained.adapters import reading

FIELD = "config.image_prompts"


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
      file: a ``.safetensors`` file in the published layout, or the workdir of a run that trained
        an adapter for this model.
      image: the picture, or several, whose tokens are joined.
      scale: of what the adapter adds; 0 leaves the network as it is.
      encoder: of the pictures, see ``image_encoders.open_encoder``; by default that with which a
        run was trained.
      mask: white is where the pictures act, black where they do not; one for all pictures, or one
        for each, whose attention maps are then apart.
      blocks: "all", "style", "layout" (both SDXL's), or factors by block, 0 where there is none:
        {"down": 0.5, "mid": 1, "up": {"block_0": (0, 1, 0)}}.
      embeddings: a ``.npy`` file of features instead of pictures: [D] or [images, D] (FaceID, or
        CLIP's embeddings), or [2, images, patches, D] with those of no picture first.
      lora: strength of the LoRA that a FaceID file holds.
    """
    several = [((v,) if v else ()) if isinstance(v, str) else tuple(v) for v in (image, mask)]
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
    file = open_adapter(spec.file, pipeline.network)
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
        how = () if encoder.own_size else (pipeline.size, pipeline.channels)
        for path in spec.image:
            with errors.field(f"image={path!r}"):
                pictures.append(to_uint8(picture_files.read_image(path, *how)))
    count = len(pictures) if features is None else len(features[0])
    if len(spec.mask) not in (0, 1, count):
        expected = "1" if count == 1 else f"1 or {count}"
        raise ValueError(f"{len(spec.mask)} masks for {count} pictures; expected {expected}")
    masks = []
    for path in spec.mask:
        with errors.field(f"mask={path!r}"):
            masks.append(picture_files.read_mask(path, size))
    mask = np.concatenate(masks, axis=-1) if masks else None
    return ImagePromptExtension(
        number, file, np.float32(spec.scale) * factors, mask, spec.lora, encoder, pictures, features
    )


def _encoder(spec: Spec, file: adapter_files.File | Trained) -> ImageEncoder:
    given = spec.encoder or file.encoder
    if not given:
        raise ValueError(
            f"{spec.file} takes features of an image encoder: give its folder, encoder=..."
        )
    with errors.field(f"encoder={given!r}"):
        encoder = open_encoder(given, patches=len(file.feature) == 2)
    if encoder.width not in (None, file.feature[-1]):
        raise ValueError(
            f"{spec.file} takes features of {file.feature[-1]} numbers, encoder={given!r} "
            f"gives {encoder.width}; published adapters take those of CLIP ViT-H, and SDXL's "
            "first one those of ViT-bigG"
        )
    return encoder


@dataclass(frozen=True)
class Trained:
    """An adapter that a run of this project trained; the names are those of files' adapters.

    Attributes:
      run: the run.
      projection, feature, encoder: see ``adapter_files.File``.
      zero_null: in training no picture was features of zeros.
    """

    run: Run
    projection: nn.Module
    feature: tuple[int, ...]
    encoder: str
    face: bool = False
    has_lora: bool = False
    zero_null: bool = True

    def load(self, network: nn.Module) -> dict[str, Any]:
        """The own parameters of ``ImagePrompted`` around the network."""
        return self.run.restored[0][OWN]

    def lora(self, network: nn.Module) -> dict[str, Any]:
        """There is none."""
        return {}


def open_adapter(path: str, network: nn.Module) -> adapter_files.File | Trained:
    """The adapter in a file or a run's workdir, for a network; no weight is read.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is for another network.
    """
    if not is_run(path):
        file = adapter_files.open_file(reading.find(path))
        file.check(network)
        return file
    run = open_run(path)
    if run.base is None or not isinstance(run.adapter, IPAdapter):
        raise ValueError(f"{path} holds a run of {run.description.network}, not of an IP-Adapter")
    own, base = run.adapter, run.base.pipeline.network
    fits = _sites(base) == _sites(network) and own.context(base) == own.context(network)
    if not fits:
        raise ValueError(f"{path} was trained for the network of {run.description.fields['path']}")
    projection = own.projection(own.context(base))
    return Trained(run, projection, own.feature, own.encoder)


def _sites(network: nn.Module) -> list[tuple[str, int]]:
    """Paths and widths of the attentions to the text."""
    widths = image_network(network).widths
    return [(site.path, widths[site.level]) for site in cross_attentions(network)]


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
    file: adapter_files.File | Trained
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
        features = self.encoder.open()(self.images) if self.features is None else self.features
        features = (features[0], 0 * features[1]) if self.file.zero_null else features
        tokens, null = (_tokens(self.file.projection, own["projection"], f) for f in features)
        null = jnp.broadcast_to(null, tokens.shape)
        # On the host, from where they go to whatever devices draw.
        joined = tuple(np.asarray(a).reshape(1, -1, a.shape[-1]) for a in (tokens, null))
        net = image_network(self.network)
        at = next(path for path, part in parts(self.network).items() if part is net)
        deltas = {f"{at}/{path}": d for path, d in self.file.lora(self.network).items()}
        inner = merge({"network": params["network"]}, [(deltas, self.lora)])["network"]
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


@partial(jax.jit, static_argnums=0)
def _tokens(projection: nn.Module, params: Any, features: jax.Array) -> jax.Array:
    """[I, N, C]"""
    return projection.apply({"params": params}, features)
