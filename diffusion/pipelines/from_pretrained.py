"""Pipelines' folders, in and out.

opened = open_pipeline("stable-diffusion-v1-5", dtype=jnp.bfloat16)  # no weights yet
pipeline, params = opened.pipeline, opened.load()
save_pipeline("mine", pipeline, params)  # which diffusers reads
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from tqdm import tqdm

from diffusion import pretrained
from diffusion.conditioning import Conditioning
from diffusion.models.dit import DiT
from diffusion.pipelines import memory
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.tiles import Tiling
from diffusion.pipelines.tokenizers import load_tokenizer
from diffusion.pretrained import folders, hub
from diffusion.pretrained.models import Model, example
from diffusion.pretrained.schedulers import catalogue as schedulers

KINDS = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "DiTPipeline",
)
NETWORKS = {"unet": "UNet2DConditionModel", "transformer": "DiTTransformer2DModel"}
ENCODERS = ("text_encoder", "text_encoder_2")
IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
SCHEDULERS = ("scheduler", "low_res_scheduler")


@dataclass(frozen=True)
class Opened:
    """A pipeline whose weights have not been read.

    Attributes:
      pipeline: its networks and configs.
      models: the files of network, autoencoder and encoders, by subfolder.
      dtype: that its parameters will have.
    """

    pipeline: Pipeline
    models: Mapping[str, Model]
    dtype: DTypeLike

    @property
    def nbytes(self) -> int:
        """Of all weights, once they are loaded."""
        return sum(model.nbytes(self.dtype) for model in self.models.values())

    def load(self, progress: bool = False) -> Params:
        """The parameters, on the default device."""
        loaded = {}
        for name in tqdm(self.models, desc="loading", unit="model", disable=not progress):
            loaded[name] = self.models[name].load(dtype=self.dtype)
        network = next(name for name in NETWORKS if name in loaded)
        return {
            "network": loaded[network],
            "autoencoder": loaded["vae"],
            "encoders": [loaded[name] for name in ENCODERS if name in loaded],
        }

    def working_bytes(self, size: tuple[int, int], batch: int) -> int:
        """An estimate of what computing takes beside the weights, for pictures of this size."""
        pipeline, shape = self.pipeline, self.pipeline.latent_shape(size)
        folder = next(name for name in NETWORKS if name in self.models)
        params = _cast(self.models[folder].shapes, self.dtype)
        x = jax.ShapeDtypeStruct((2 * batch, *shape), jnp.float32)  # with and without guidance
        time = jax.ShapeDtypeStruct((2 * batch,), jnp.float32)
        cond = _example(pipeline.network, x)
        steps = memory.peak(pipeline.network.apply, {"params": params}, x, time, cond)
        net, vae = pipeline.autoencoder, _cast(self.models["vae"].shapes, self.dtype)
        side = pipeline.tile // net.factor if pipeline.tile else max(shape[:2])
        z = jax.ShapeDtypeStruct(
            (batch, min(shape[0], side), min(shape[1], side), shape[2]), x.dtype
        )
        decode = memory.peak(lambda p, z: net.apply({"params": p}, z, method="decode"), vae, z)
        return max(steps, decode)


def open_pipeline(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
    tile: int = 0,
) -> Opened:
    """Finds a pipeline and checks all of its files, without reading weights.

    Args:
      path_or_id: a folder as diffusers saves it, or an id on the Hugging Face hub.
      revision: a branch, tag or commit on the hub.
      variant: of the weights, e.g. 'fp16'.
      dtype: of parameters and computation.
      tile: see ``Pipeline``.

    Raises:
      FileNotFoundError: nothing there, or a file is missing.
      ValueError: a pipeline, a model or a setting that is not supported, or weights that are not
        what the configs say.
    """
    folder = hub.locate(path_or_id, variant=variant, revision=revision)
    index = pretrained.read_index(folder)
    if index.kind not in KINDS:
        near = folders.nearest(index.kind, list(KINDS))
        raise ValueError(
            f"{folder}: {index.kind} is not supported{near}; legal: {', '.join(KINDS)}"
        )
    present = [name for name, kind in index.components.items() if kind is not None]
    known = (*NETWORKS, "vae", *ENCODERS, *SCHEDULERS, *IGNORED, "tokenizer", "tokenizer_2")
    strange = [name for name in present if name not in known]
    if strange:
        raise ValueError(f"{folder}: components that are not supported: {', '.join(strange)}")
    wanted = [name for name in (*NETWORKS, "vae", *ENCODERS) if name in present]
    models = {
        name: pretrained.open_model(
            folder,
            name,
            variant=_variant(folder / name, variant),
            expected=index.components[name][1],
        )
        for name in wanted
    }
    modules = {name: model.module.clone(dtype=dtype) for name, model in models.items()}
    if tile and "vae" in modules:
        Tiling(tile).check(modules["vae"])
    network = next((name for name in NETWORKS if name in present), None)
    if network is None or "vae" not in present:
        raise ValueError(f"{folder}: a network (unet or transformer) and a vae are needed")
    configs = {name: _scheduler(folder / name) for name in SCHEDULERS if name in present}
    pipeline = Pipeline(
        index.kind,
        modules[network],
        modules["vae"],
        configs["scheduler"],
        tuple(modules[name] for name in ENCODERS if name in present),
        tuple(load_tokenizer(folder / name.replace("text_encoder", "tokenizer"))
              for name in ENCODERS if name in present),
        configs.get("low_res_scheduler"),
        tile=tile,
        options=index.options,
    )  # fmt: skip
    return Opened(pipeline, models, dtype)


def load_pipeline(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Pipeline, Params]:
    """A pipeline and its parameters: ``open_pipeline`` and ``Opened.load``."""
    opened = open_pipeline(path_or_id, revision=revision, variant=variant, dtype=dtype)
    return opened.pipeline, opened.load()


def save_pipeline(
    folder: str | Path, pipeline: Pipeline, params: Params, dtype: DTypeLike | None = None
) -> None:
    """Writes a folder that ``open_pipeline`` and diffusers' ``DiffusionPipeline`` read.

    Args:
      folder: new, or a pipeline's.
      pipeline, params: what to write.
      dtype: of the weights; by default their own.
    """
    folder = Path(folder)
    dit = isinstance(pipeline.network, DiT)
    name = "transformer" if dit else "unet"
    parts = {name: (pipeline.network, params["network"])}
    parts["vae"] = (pipeline.autoencoder, params["autoencoder"])
    components: dict[str, tuple[str, str] | None] = {}
    if not dit:  # diffusers wants to be told that there is none
        components |= {"safety_checker": None, "feature_extractor": None}
    encoders = zip(ENCODERS, pipeline.encoders, params.get("encoders", ()), pipeline.tokenizers)
    for encoder, module, weights, tokenizer in encoders:
        parts[encoder] = (module, weights)
        where = encoder.replace("text_encoder", "tokenizer")
        tokenizer.save_pretrained(folder / where)
        components[where] = ("transformers", type(tokenizer).__name__)
    for part, (module, weights) in parts.items():
        pretrained.save(folder / part, module, weights, dtype=dtype)
        config = folders.read_json(folder / part / "config.json")
        library = "diffusers" if "_class_name" in config else "transformers"
        kind = config.get("_class_name") or config["architectures"][0]
        components[part] = (library, kind)
    for part in SCHEDULERS:
        config = getattr(pipeline, part)
        if config is not None:
            (folder / part).mkdir(parents=True, exist_ok=True)
            folders.write_json(folder / part / "scheduler_config.json", config)
            components[part] = ("diffusers", config["_class_name"])
    index = pretrained.Index(pipeline.kind, components, pipeline.options)
    pretrained.save_index(folder, index)


def _variant(folder: Path, variant: str | None) -> str | None:
    """Parts of a pipeline that were not saved in the variant are read as they are."""
    return variant if variant in folders.variants(folder) else None


def _scheduler(folder: Path) -> dict[str, Any]:
    config = folders.read_json(folder / "scheduler_config.json")
    try:
        schedulers.read(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return config


def _cast(shapes: Any, dtype: DTypeLike) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), shapes)


def _example(network: Any, x: jax.ShapeDtypeStruct) -> Conditioning:
    """Conditioning for a batch of ``x``, by shape."""
    cond = example(network)[2]
    batch, height, width = x.shape[:3]
    cond = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), cond)
    extra = network.in_channels - x.shape[3]
    if extra:
        cond = cond.replace(image=jax.ShapeDtypeStruct((batch, height, width, extra), x.dtype))
    if cond.context is not None:
        tokens = (batch, 77, cond.context.shape[2])
        cond = cond.replace(context=jax.ShapeDtypeStruct(tokens, x.dtype))
    return cond
