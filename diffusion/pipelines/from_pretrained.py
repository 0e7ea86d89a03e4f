"""Pipelines from folders as diffusers saves them, and from the hub.

opened = open_pipeline("stable-diffusion-v1-5", dtype=jnp.bfloat16)  # no weights yet
pipeline, params = opened.pipeline, opened.load()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from tqdm import tqdm

from diffusion import pretrained
from diffusion.conditioning import Conditioning
from diffusion.errors import field
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.pipelines import memory
from diffusion.pipelines.codec import KL, Codec
from diffusion.pipelines.conditioners import Conditioner, Labels
from diffusion.pipelines.extension import Attachment
from diffusion.pipelines.pipeline import Defaults, Params, Pipeline
from diffusion.pipelines.prompts import Prompts
from diffusion.pipelines.tiles import Tiling
from diffusion.pipelines.tokenizers import load_tokenizer
from diffusion.pretrained import files, folders, hub, models
from diffusion.pretrained.models import Model, example
from diffusion.pretrained.schedulers import catalogue as schedulers
from diffusion.pretrained.schedulers import from_diffusers

EDITOR = "StableDiffusionInstructPix2PixPipeline"
KINDS = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    EDITOR,
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "ConsistencyModelPipeline",
    "DiTPipeline",
    "DDPMPipeline",
    "DDIMPipeline",
)
PIXELS = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
"""Kinds without an autoencoder."""
STEPS = 10  # of a sampler that is only made to read what the network's output means
DEFAULTS = {
    "StableDiffusionUpscalePipeline": Defaults("", "uniform", 75, ("cfg(9)",)),
    EDITOR: Defaults("", "uniform", 100, ("instruct(7.5, 1.5)",)),
    "LatentConsistencyModelPipeline": Defaults("", "uniform", 4, ("cfg(8.5)",)),
    "ConsistencyModelPipeline": Defaults("", "uniform", 1, ("cfg(1)",)),
    "DiTPipeline": Defaults("", "uniform", 50, ("cfg(4)",)),
    "DDPMPipeline": Defaults("", "uniform", 1000, ("cfg(1)",)),
    "DDIMPipeline": Defaults("", "uniform", 50, ("cfg(1)",)),
}
"""Default steps and guidance, those of diffusers' pipelines."""
NETWORKS = {"unet": "UNet2DConditionModel", "transformer": "DiTTransformer2DModel"}
ENCODERS = ("text_encoder", "text_encoder_2")
IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
LOW_RES = "low_res_scheduler"
SCHEDULERS = ("scheduler", LOW_RES)


@dataclass(frozen=True)
class Opened:
    """A pipeline whose weights have not been read.

    Attributes:
      pipeline: its networks and configs.
      models: the files of network, autoencoder and encoders, by subfolder.
      dtype: that its parameters will have.
      name: what pictures call the model.
      attached: what changes the parameters once they are read, in turn.
    """

    pipeline: Pipeline
    models: Mapping[str, Model]
    dtype: DTypeLike
    name: str = ""
    attached: tuple[Attachment, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of all weights, once they are loaded."""
        return sum(model.nbytes(self.dtype) for model in self.models.values())

    @property
    def shapes(self) -> Params:
        """Of the parameters of network and encoders, ``jax.ShapeDtypeStruct``s."""
        network = next(name for name in NETWORKS if name in self.models)
        encoders = [self.models[name].shapes for name in ENCODERS if name in self.models]
        return {"network": self.models[network].shapes, "encoders": encoders}

    def with_autoencoder(self, path_or_id: str | Path) -> Opened:
        """With the autoencoder of another folder or hub id, one of the same latents' shape.

        Raises:
          ValueError: this model has none, or the other's latents have another shape.
        """
        if "vae" not in self.models:
            raise ValueError(f"vae={path_or_id}: {self.pipeline.kind} has no autoencoder")
        model = pretrained.open_model(path_or_id, expected="AutoencoderKL")
        codec, net = self.pipeline.codec, model.module.clone(dtype=self.dtype)
        latents = [(n.latent_channels, n.factor) for n in (net, codec.network)]
        if latents[0] != latents[1]:
            raise ValueError(
                f"vae={path_or_id}: its latents have (channels, pixels) {latents[0]}, this "
                f"model's {latents[1]}"
            )
        pipeline = replace(self.pipeline, codec=replace(codec, network=net))
        return replace(self, pipeline=pipeline, models={**self.models, "vae": model})

    def with_network(self, path_or_id: str | Path) -> Opened:
        """With another network of the same inputs, such as a distilled one.

        ``path_or_id`` is a model's folder or hub id; or a .safetensors file of weights in
        diffusers' naming, of a network with this one's config.

        Raises:
          FileNotFoundError: there is no such model.
          ValueError: the weights, or the network's inputs and outputs, do not fit.
        """
        part = next(name for name in NETWORKS if name in self.models)
        own, path = self.models[part], Path(path_or_id).expanduser()
        with field(f"network={path_or_id}"):
            if path.is_file():
                names = models.table(own.module)
                model = replace(own, names=names, tensors=files.open_file(path), source=str(path))
                model.check()
            else:
                model = models.open_model(path_or_id, expected=models.class_name(own.config))
            fits, needs = _inputs(model.module), _inputs(own.module)
            if fits != needs:
                raise ValueError(f"its inputs and outputs are {fits}; this model's are {needs}")
        pipeline = replace(self.pipeline, network=model.module.clone(dtype=self.dtype))
        return replace(self, pipeline=pipeline, models={**self.models, part: model})

    def attach(self, attachment: Attachment) -> Opened:
        """With something attached."""
        pipeline = attachment.pipeline(self.pipeline)
        return replace(self, pipeline=pipeline, attached=(*self.attached, attachment))

    def load(self, progress: bool = False) -> Params:
        """The parameters, on the default device."""
        loaded = {}
        for name in tqdm(self.models, desc="loading", unit="model", disable=not progress):
            loaded[name] = self.models[name].load(dtype=self.dtype)
        network = next(name for name in NETWORKS if name in loaded)
        params = {"network": loaded[network]}
        if "vae" in loaded:
            params["autoencoder"] = loaded["vae"]
        params |= {"encoders": [loaded[name] for name in ENCODERS if name in loaded]}
        for attachment in self.attached:
            params = attachment.load(params)
        return params

    def working_bytes(self, size: tuple[int, int], batch: int) -> int:
        """An estimate of what computing takes beside the weights, for pictures of this size."""
        pipeline, shape = self.pipeline, self.pipeline.shape_of(size)
        folder = next(name for name in NETWORKS if name in self.models)
        params = _cast(self.models[folder].shapes, self.dtype)
        x = jax.ShapeDtypeStruct((2 * batch, *shape), jnp.float32)  # with and without guidance
        time = jax.ShapeDtypeStruct((2 * batch,), jnp.float32)
        cond = _example(pipeline.network, x)
        steps = memory.peak(pipeline.network.apply, {"params": params}, x, time, cond)
        if "vae" not in self.models:
            return steps
        net, vae = pipeline.codec.network, _cast(self.models["vae"].shapes, self.dtype)
        side = pipeline.codec.tile // net.factor or max(shape[:2])
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

    ``path_or_id`` is a folder as diffusers saves it or an id on the Hugging Face hub; the other
    arguments are those of ``pipelines.open_any``.

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
    names = [name for name in (*NETWORKS, "vae", *ENCODERS) if name in present]
    models = {
        name: pretrained.open_model(
            folder,
            name,
            variant=_variant(folder / name, variant),
            expected=index.components[name][1],
        )
        for name in names
    }
    modules = {name: model.module.clone(dtype=dtype) for name, model in models.items()}
    if tile:
        if "vae" not in modules:
            raise ValueError(f"tile={tile} has no effect: {index.kind} has no autoencoder")
        Tiling(tile).check(modules["vae"])
    name = next((name for name in NETWORKS if name in present), None)
    if name is None or ("vae" not in present and index.kind not in PIXELS):
        raise ValueError(f"{folder}: a network (unet or transformer) and a vae are needed")
    encoders = [name for name in ENCODERS if name in present]
    tokenizers = [load_tokenizer(folder / e.replace("text_encoder", "tokenizer")) for e in encoders]
    pipeline = assemble(
        index.kind,
        modules[name],
        modules.get("vae"),
        _scheduler(folder / "scheduler"),
        [modules[encoder] for encoder in encoders],
        tokenizers,
        tile=tile,
        low_res=_scheduler(folder / LOW_RES) if LOW_RES in present else None,
        options=index.options,
    )
    return Opened(pipeline, models, dtype, Path(path_or_id).name)


def assemble(
    kind: str,
    network: nn.Module,
    autoencoder: AutoencoderKL | None,
    scheduler: Mapping[str, Any],
    encoders: Sequence[nn.Module] = (),
    tokenizers: Sequence[Any] = (),
    *,
    tile: int = 0,
    low_res: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Pipeline:
    """The pipeline that a kind of diffusers' makes of its components.

    Args:
      kind: diffusers' class.
      network, autoencoder, scheduler, encoders, tokenizers: its components; None for an
        autoencoder: the network sees pixels.
      tile: pixels of the autoencoder's tiles, for large pictures; 0: they are not cut.
      low_res: config of what noises an upscaler's small picture.
      options: other fields of ``model_index.json``.

    Raises:
      ValueError: the network does not say what size it was trained on.
    """
    trained = from_diffusers(scheduler, STEPS)
    codec = Codec() if autoencoder is None else KL(autoencoder, tile)
    channels = network.in_channels if autoencoder is None else autoencoder.latent_channels
    side = network.image_size
    if side is None:
        raise ValueError(f"{kind}: the network does not say what size it was trained on")
    if encoders:
        zeros = options.get("force_zeros_for_empty_prompt", True)
        conditioner = Prompts(tuple(encoders), tuple(tokenizers), zeros)
    elif network.num_classes:
        conditioner = _labels(network.num_classes, options)
    else:
        conditioner = Conditioner()
    return Pipeline(
        kind,
        network,
        trained.schedule,
        trained.prediction,
        trained.c_noise,
        (*(side if isinstance(side, tuple) else (side, side)), channels),
        codec,
        conditioner,
        defaults=DEFAULTS.get(kind, Defaults("", "uniform", 30, ("cfg(7.5)",))),
        scheduler=scheduler,
        low_res_scheduler=low_res,
        edits=kind == EDITOR,
        options=options,
    )


def _inputs(network: nn.Module) -> dict[str, Any]:
    """What a network takes and gives besides guidance's scale: channels, and a batch's shapes."""
    x, _, cond = example(network)
    given = {k: v for k, v in vars(cond).items() if hasattr(v, "shape") and k != "guidance"}
    shapes = {name: value.shape for name, value in given.items()}
    return {"in": x.shape[-1], "out": network.out_channels, **shapes}


def _labels(rows: int, options: Mapping[str, Any]) -> Labels:
    """Of a network whose embedding has so many rows; DiT and our runs have one more, the null."""
    if options.get("null_class"):
        return Labels(rows - 1, tuple(options.get("class_names", ())))
    names = options.get("id2label", {})
    return Labels(rows, tuple(names.get(str(i), "") for i in range(rows)) if names else ())


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
