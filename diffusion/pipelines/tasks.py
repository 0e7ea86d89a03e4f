"""The tasks of a pipeline: each gives the ``Inputs`` that ``draw`` takes.

    pipeline, params = load("stable-diffusion-v1-5/stable-diffusion-v1-5")
    cond, null = pipeline.conditioner(params, ["a lighthouse at dusk"])
    sampler, keys = samplers.make(pipeline, steps=30), image_keys(0, range(1))
    inputs = new(pipeline, cond, null)
    latents = draw(pipeline, params, sampler, keys, inputs, chain=(links.cfg(7.5),))
    images = pipeline.codec.decode(params, latents)  # [B, H, W, 3] in [-1, 1]

``null`` is what to steer away from, a negative prompt or the empty one; without it there is no
guidance. Pictures are [B, H, W, C] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning, from_batch
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.pipelines.codec import folded
from diffusion.pipelines.draw import Inputs, Kept, check_batch
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pretrained.schedulers import from_diffusers
from diffusion.sampling.sample import image_noise

MASKED, LOW_RES, REFINER = range(2**30 + 1, 2**30 + 4)  # folds of the keys


def new(
    pipeline: Pipeline,
    cond: Conditioning,
    null: Conditioning | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> Inputs:
    """New samples, of ``size`` (height, width) pixels; by default the network's own."""
    return Inputs(cond, null, pipeline.shape_of(size))


def from_picture(
    pipeline: Pipeline,
    params: Params,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None,
    images: Array,
    *,
    encoded: bool = False,
) -> Inputs:
    """Pictures made from pictures: SDEdit (Meng et al., 2021).

    The sampler's ``strength`` is the share of the schedule that remains. With ``encoded``, images
    are latents already, such as those that SDXL's refiner takes from the base model.
    """
    check_batch(keys, images=images, cond=cond, null=null)
    picture = jnp.asarray(images) if encoded else pipeline.codec.encode(params, images, keys)
    return Inputs(cond, null, picture.shape[1:], picture=picture)


def continued(cond: Conditioning, null: Conditioning | None, latents: Array) -> Inputs:
    """Goes on with latents that another model left noisy, with the samplers of ``hand_over``.

    The keys are to be others than that model's: ``folded(keys, REFINER)``.
    """
    return Inputs(cond, null, latents.shape[1:], x_init=latents)


def repainted(
    pipeline: Pipeline,
    params: Params,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None,
    images: Array,
    mask: Array,
    *,
    strength: float = 1.0,
) -> Inputs:
    """Pictures in which what is masked is painted anew.

    A network with channels for mask and masked picture sees these. With any other, the rest of the
    picture is put back, noised, at every evaluation.

    Args:
      mask: [B, H, W, 1] or [H, W, 1] in [0, 1]; what is at least 0.5 is painted.
      strength: 1 starts from noise, less from the noised picture; the sampler's too.

    Raises:
      ValueError: the network has another number of input channels.
    """
    check_batch(keys, images=images, cond=cond, null=null)
    images = jnp.asarray(images)
    mask = jnp.broadcast_to(jnp.asarray(mask) >= 0.5, (*images.shape[:3], 1)).astype(jnp.float32)
    factor, extra = pipeline.codec.factor, pipeline.extra_channels
    small = mask[:, ::factor, ::factor]  # nearest neighbour
    if not np.asarray(small).any():
        raise ValueError(
            f"the mask's white part misses every latent, one for {factor} x {factor} pixels: "
            "nothing would be painted; make it larger"
        )
    picture, kept = pipeline.codec.encode(params, images, keys), None
    if extra == picture.shape[-1] + 1:
        masked = pipeline.codec.encode(params, images * (1 - mask), folded(keys, MASKED))
        more = jnp.concatenate([small, masked], axis=-1)
        cond, null = _with_image(cond, more), _with_image(null, more)
    elif extra == 0:
        noise = image_noise(keys, picture.shape[1:]).astype(picture.dtype)
        kept = Kept(picture, 1 - small, noise)
    else:
        raise ValueError(
            f"a network with {extra} channels beside the picture cannot inpaint; expected none, or "
            f"{picture.shape[-1] + 1} for mask and masked picture"
        )
    start = None if strength == 1 else picture
    return Inputs(cond, null, picture.shape[1:], picture=start, kept=kept)


def upscaled(
    pipeline: Pipeline,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None,
    images: Array,
    *,
    noise_level: int = 20,
) -> Inputs:
    """Pictures four times as large (Stable Diffusion's x4 upscaler).

    Args:
      images: [B, h, w, 3], the small pictures, whose size is that of the latents.
      noise_level: index, 0 to 999 (the published network's limit is 350), of the noise that is
        added to them first.
    """
    config = pipeline.low_res_scheduler
    if config is None:
        raise ValueError(f"{pipeline.kind} has no low_res_scheduler: it is not an upscaler")
    schedule = from_diffusers(config, 1).schedule
    if not 0 <= noise_level < schedule.steps:
        raise ValueError(f"noise_level={noise_level}; expected 0 to {schedule.steps - 1}")
    level = schedule(np.float64((noise_level + 1) / schedule.steps))
    level = NoiseLevel(*(jnp.float32(leaf) for leaf in level))
    check_batch(keys, images=images, cond=cond, null=null)
    images = jnp.asarray(images)
    images = diffuse(images, image_noise(folded(keys, LOW_RES), images.shape[1:]), level)
    label = jnp.full(len(images), noise_level, jnp.int32)
    cond, null = (c and _with_image(c, images).replace(label=label) for c in (cond, null))
    return Inputs(cond, null, (*images.shape[1:3], pipeline.shape[-1]))


def edited(
    pipeline: Pipeline,
    params: Params,
    cond: Conditioning,
    null: Conditioning,
    images: Array,
    *,
    encoded: bool = False,
) -> Inputs:
    """Pictures edited by an instruction, the prompt: InstructPix2Pix (Brooks et al., 2023).

    The chain has the link ``instruct(scale, image_scale)``. With ``encoded``, images are what the
    network sees of them already, unscaled latents.
    """
    latents = jnp.asarray(images)
    if not encoded:
        latents = pipeline.codec.encode(params, images, scaled=False)
    return Inputs(
        _with_image(cond, latents),
        _with_image(null, jnp.zeros_like(latents)),
        latents.shape[1:],
        middle=_with_image(null, latents),
    )


def followed(
    cond: Conditioning, null: Conditioning | None, given: Mapping[str, Array]
) -> tuple[Conditioning, Conditioning | None]:
    """Both with the hints and the pictures' features that are given as a batch has them.

    Hints are followed with and without text; what stands for no picture is a feature of zeros.
    """
    rows = from_batch(given)
    without = jax.tree.map(jnp.zeros_like, rows.image_prompts)
    cond = cond.replace(hints=rows.hints, image_prompts=rows.image_prompts)
    if null is not None:
        null = null.replace(hints=rows.hints, image_prompts=without)
    return cond, null


def micro_conditioning(
    cond: Conditioning | None,
    size: tuple[int, int],
    *,
    original: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    aesthetic: float | None = None,
) -> Conditioning | None:
    """``cond`` with SDXL's sizes (Podell et al., 2023, section 2.2), or the refiner's.

    Args:
      cond: of prompts; None stays None.
      size: (height, width) of the picture.
      original: that the training picture would have had before it was scaled; by default ``size``.
      crop: (top, left) of what was cut out of it.
      aesthetic: score, about 2 to 7, which the refiner takes instead of ``size`` (6 to steer
        towards, 2.5 away from).
    """
    if cond is None:
        return None
    last = size if aesthetic is None else (aesthetic,)
    ids = np.asarray([*(original or size), *crop, *last], np.float32)
    return cond.replace(time_ids=jnp.tile(ids, (len(cond.context), 1)))


def _with_image(cond: Conditioning | None, image: Array) -> Conditioning | None:
    return None if cond is None else cond.replace(image=image)
