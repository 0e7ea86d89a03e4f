"""What a pretrained pipeline is asked for: each task says what is sampled, and gives latents.

    pipeline, params = load("stable-diffusion-v1-5")
    cond, null = encode_prompts(pipeline, params, ["a lighthouse at dusk"], negative=[""])
    sampler = from_diffusers(pipeline.scheduler, steps=30)
    keys = image_keys(seed, range(1))
    latents = text_to_image(pipeline, params, sampler, keys, cond, null, guidance=(links.cfg(7.5),))
    images = decode(pipeline, params, latents)  # [B, H, W, 3] in [-1, 1]

``keys`` [B] hold all randomness: image i depends on ``keys[i]`` alone. ``null`` is what to steer
away from, a negative prompt or the empty one; without it, or at scale 1, there is no guidance.
Networks distilled with an embedding of the guidance scale (LCM) are given it instead.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.pipelines.codec import encode, folded
from diffusion.pipelines.draw import Kept, Steering, draw
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pretrained.schedulers import Sampler, from_diffusers
from diffusion.sampling.guidance import chain, links
from diffusion.sampling.guidance.chain import Chain
from diffusion.sampling.sample import Callback, image_noise

MASKED, LOW_RES, REFINER = range(2**30 + 1, 2**30 + 4)  # folds of the keys
BY_TEXT: Chain = (links.cfg(7.5),)
BY_CLASS: Chain = (links.cfg(4.0),)
BY_TEXT_AND_PICTURE: Chain = (links.instruct(7.5, 1.5),)
WHEN_UPSCALED: Chain = (links.cfg(9.0),)


def text_to_image(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None = None,
    *,
    size: tuple[int, int] | None = None,
    guidance: Chain = BY_TEXT,
    callback: Callback | None = None,
) -> jax.Array:
    """Latents of new pictures.

    Args:
      pipeline, params: the models.
      sampler: what steps to take.
      keys: [B].
      cond, null: of the prompts, leaves [B, ...]; SDXL's with ``micro_conditioning``.
      size: (height, width) in pixels; by default the network's own.
      guidance: its links, with numbers () or [B].
      callback: called after each evaluation (``sampling.progress.Monitor``).
    """
    shape = pipeline.latent_shape(size)
    cond, steering = _steer(pipeline, cond, null, guidance)
    return draw(
        pipeline.network, params["network"], sampler, keys, shape, cond, steering,
        acceleration=pipeline.acceleration, callback=callback,
    )  # fmt: skip


def image_to_image(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None,
    images: Array,
    *,
    guidance: Chain = BY_TEXT,
    callback: Callback | None = None,
) -> jax.Array:
    """Latents of pictures made from pictures: SDEdit (Meng et al., 2021).

    Args:
      sampler: with a ``strength``, which says how much is left of them.
      images: [B, H, W, 3] in [-1, 1], or latents [B, h, w, C]. SDXL's refiner takes what the base
        model has made.
      others: as in ``text_to_image``.
    """
    picture = _latents_of(pipeline, params, images, keys)
    cond, steering = _steer(pipeline, cond, null, guidance)
    return draw(
        pipeline.network, params["network"], sampler, keys, picture.shape[1:], cond, steering,
        picture=picture, acceleration=pipeline.acceleration, callback=callback,
    )  # fmt: skip


def refine(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None,
    latents: Array,
    *,
    guidance: Chain = BY_TEXT,
    callback: Callback | None = None,
) -> jax.Array:
    """Goes on with latents that another model left noisy: both samplers are ``hand_over``'s."""
    keys = folded(keys, REFINER)
    cond, steering = _steer(pipeline, cond, null, guidance)
    return draw(
        pipeline.network, params["network"], sampler, keys, latents.shape[1:], cond, steering,
        x_init=latents, acceleration=pipeline.acceleration, callback=callback,
    )  # fmt: skip


def inpaint(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None,
    images: Array,
    mask: Array,
    *,
    strength: float = 1.0,
    guidance: Chain = BY_TEXT,
    callback: Callback | None = None,
) -> jax.Array:
    """Latents of pictures in which what is masked is painted anew.

    A network with 9 input channels sees mask and masked picture. With one of 4, the rest of the
    picture is put back, noised, at every evaluation.

    Args:
      sampler: with the same ``strength``.
      images: [B, H, W, 3] in [-1, 1].
      mask: [B, H, W, 1] or [H, W, 1] in [0, 1]; what is at least 0.5 is painted.
      strength: 1 starts from noise, less from the noised picture.
      others: as in ``text_to_image``.

    Raises:
      ValueError: the network has another number of input channels.
    """
    images = jnp.asarray(images)
    mask = jnp.broadcast_to(jnp.asarray(mask) >= 0.5, (*images.shape[:3], 1)).astype(jnp.float32)
    factor, channels = pipeline.autoencoder.factor, pipeline.autoencoder.latent_channels
    small = mask[:, ::factor, ::factor]  # nearest neighbour
    picture = encode(pipeline, params, images, keys)
    kept = None
    if pipeline.network.in_channels == 2 * channels + 1:
        masked = encode(pipeline, params, images * (1 - mask), folded(keys, MASKED))
        extra = jnp.concatenate([small, masked], axis=-1)
        cond, null = _with_image(cond, extra), _with_image(null, extra)
    elif pipeline.network.in_channels == channels:
        noise = image_noise(keys, picture.shape[1:]).astype(picture.dtype)
        kept = Kept(picture, 1 - small, noise)
    else:
        raise ValueError(
            f"a network of {pipeline.network.in_channels} input channels cannot inpaint; expected "
            f"{channels}, or {2 * channels + 1} for mask and masked picture"
        )
    cond, steering = _steer(pipeline, cond, null, guidance)
    return draw(
        pipeline.network, params["network"], sampler, keys, picture.shape[1:], cond,
        steering.replace(kept=kept), picture=None if strength == 1 else picture,
        acceleration=pipeline.acceleration, callback=callback,
    )  # fmt: skip


def upscale(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning | None,
    images: Array,
    *,
    noise_level: int = 20,
    guidance: Chain = WHEN_UPSCALED,
    callback: Callback | None = None,
) -> jax.Array:
    """Latents of pictures four times as large (Stable Diffusion's x4 upscaler).

    Args:
      images: [B, h, w, 3] in [-1, 1], the small pictures, whose size is that of the latents.
      noise_level: index, 0 to 999 (the published network's limit is 350), of the noise that is
        added to them first.
      others: as in ``text_to_image``.
    """
    config = pipeline.low_res_scheduler
    if config is None:
        raise ValueError(f"{pipeline.kind} has no low_res_scheduler: it is not an upscaler")
    schedule = from_diffusers(config, 1).schedule
    if not 0 <= noise_level < schedule.steps:
        raise ValueError(f"noise_level={noise_level}; expected 0 to {schedule.steps - 1}")
    level = schedule(np.float64((noise_level + 1) / schedule.steps))
    level = NoiseLevel(*(jnp.float32(leaf) for leaf in level))
    images = jnp.asarray(images)
    images = diffuse(images, image_noise(folded(keys, LOW_RES), images.shape[1:]), level)
    label = jnp.full(len(images), noise_level, jnp.int32)
    cond, null = (c and _with_image(c, images).replace(label=label) for c in (cond, null))
    shape = (*images.shape[1:3], pipeline.autoencoder.latent_channels)
    cond, steering = _steer(pipeline, cond, null, guidance)
    return draw(
        pipeline.network,
        params["network"],
        sampler,
        keys,
        shape,
        cond,
        steering,
        acceleration=pipeline.acceleration,
        callback=callback,
    )


def instruct(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    cond: Conditioning,
    null: Conditioning,
    images: Array,
    *,
    guidance: Chain = BY_TEXT_AND_PICTURE,
    callback: Callback | None = None,
) -> jax.Array:
    """Latents of pictures edited as the prompt says: InstructPix2Pix (Brooks et al., 2023).

    Args:
      images: [B, H, W, 3] in [-1, 1].
      guidance: ``instruct`` says how closely to follow the text, and how closely the picture.
      others: as in ``text_to_image``; ``null`` is needed.
    """
    latents = encode(pipeline, params, images, scaled=False)
    steering = Steering(
        null=_with_image(null, jnp.zeros_like(latents)),
        chain=guidance,
        middle=_with_image(null, latents),
    )
    return draw(
        pipeline.network, params["network"], sampler, keys, latents.shape[1:],
        _with_image(cond, latents), steering, acceleration=pipeline.acceleration, callback=callback,
    )  # fmt: skip


def class_to_image(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    labels: Array,
    *,
    guidance: Chain = BY_CLASS,
    callback: Callback | None = None,
) -> jax.Array:
    """Latents of pictures of classes [B] (DiT); the null class is the last one, number 1000."""
    labels = jnp.asarray(labels, jnp.int32)
    null = Conditioning(label=jnp.full_like(labels, pipeline.network.num_classes))
    return text_to_image(
        pipeline, params, sampler, keys, Conditioning(label=labels), null, guidance=guidance,
        callback=callback,
    )  # fmt: skip


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
      size: (height, width) that is asked for.
      original: that the training picture would have had before it was scaled; by default ``size``.
      crop: (top, left) of what was cut out of it.
      aesthetic: score, about 2 to 7, which the refiner takes instead of ``size`` (6 is asked for,
        2.5 steered away from).
    """
    if cond is None:
        return None
    last = size if aesthetic is None else (aesthetic,)
    ids = np.asarray([*(original or size), *crop, *last], np.float32)
    return cond.replace(time_ids=jnp.tile(ids, (len(cond.context), 1)))


def hand_over(base: Any, refiner: Any, steps: int, fraction: float) -> tuple[Sampler, Sampler]:
    """Samplers of two models that share one run: the base takes the first ``fraction`` of the time.

    Args:
      base, refiner: their scheduler configs.
      steps: of the whole run.
      fraction: of the schedule, in (0, 1); diffusers' denoising_end and denoising_start.

    Raises:
      ValueError: one of the two would have no step.
    """
    first = from_diffusers(base, steps)
    last = from_diffusers(refiner, steps)
    cutoff = round(first.schedule.steps - fraction * first.schedule.steps)
    count = int(np.sum(first.timesteps >= cutoff))
    left = int(np.sum(last.timesteps < cutoff))
    order = len(last.timesteps) // steps
    if order == 2 and left % 2 == 0:
        left += 1  # not between the two evaluations of a step
    if not 0 < count < len(first.timesteps) or not 0 < left < len(last.timesteps):
        raise ValueError(
            f"fraction={fraction} of {steps} steps leaves one of the two models without any; "
            f"expected a number in (0, 1), {1 / steps:.3g} or more from both ends"
        )
    rows = jax.tree.map(lambda leaf: leaf[:count], first.solver._replace(init=None))
    solver = rows._replace(init=first.solver.init)
    strength = (-(-left // order) + 0.5) / steps
    return first._replace(solver=solver), from_diffusers(refiner, steps, strength=strength)


def _steer(
    pipeline: Pipeline, cond: Conditioning, null: Conditioning | None, guidance: Chain
) -> tuple[Conditioning, Steering]:
    if getattr(pipeline.network, "guidance_width", None) is None:
        return cond, Steering(null=null, chain=guidance)
    # A network that was distilled with guidance is given the scale instead.
    pair, count = chain.pair(guidance), len(jax.tree.leaves(cond)[0])
    scale = jnp.asarray(1.0 if pair is None else pair.scale, jnp.float32)
    return cond.replace(guidance=jnp.broadcast_to(scale, (count,))), Steering(chain=guidance)


def _latents_of(pipeline: Pipeline, params: Params, images: Array, keys: jax.Array) -> jax.Array:
    if images.shape[-1] == pipeline.autoencoder.latent_channels:
        return jnp.asarray(images)
    return encode(pipeline, params, images, keys)


def _with_image(cond: Conditioning | None, image: Array) -> Conditioning | None:
    return None if cond is None else cond.replace(image=image)
