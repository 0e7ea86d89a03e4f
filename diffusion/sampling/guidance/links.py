"""The links of guidance's chains (``chain.guide``): a function for each checks its arguments.

The functions of ``guidance`` that they name have the equations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import predictions, specs
from diffusion.denoiser import Denoise, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.models.identity_maps import middle_block, with_identity_maps
from diffusion.predictions import Prediction
from diffusion.sampling import guidance
from diffusion.sampling.guidance.chain import ADDITION, PAIR, RULE, Branches, Chain, Link, Number
from diffusion.sampling.guidance.extrapolation import Rule, is_one
from diffusion.sampling.guidance.transform import require

Denoiser = Denoise | Stateful


def cfg(scale: Number, split: bool = False) -> Link:
    """Classifier-free guidance (``guidance.classifier_free``), in one call on twice the batch.

    Args:
      scale: the Python number 1 is the model alone: what to steer away from is not evaluated.
      split: two calls, which need half the memory.
    """
    return Link("cfg", _cfg, _finite(scale=scale), PAIR, alone=is_one(scale), split=split)


def _cfg(link: Link, rule: Rule, b: Branches) -> Denoiser:
    alone = link.alone or b.null is None
    null, scale = (b.cond, 1) if alone else (b.null, link.numbers["scale"])
    options = {"split": link.split, "when": b.acceleration.guidance, "space": b.prediction}
    return guidance.classifier_free(b.denoise, b.cond, null, scale, rule=rule, **options)


def autoguidance(run: str, scale: Number) -> Link:
    """Guidance away from the weaker network of workdir ``run``; scale as that of ``cfg``."""
    numbers, alone = _finite(scale=scale), is_one(scale)
    return Link(
        "autoguidance", _autoguidance, numbers, PAIR, network="weak", run=_run(run), alone=alone
    )


def _autoguidance(link: Link, rule: Rule, b: Branches) -> Denoiser:
    weak = guidance.conditional(b.networks[link.network], b.cond)
    scale = 1 if link.alone else link.numbers["scale"]
    when, space = b.acceleration.guidance, b.prediction
    return guidance.autoguidance(b.plain, weak, scale, rule, when=when, space=space)


def instruct(scale: Number, image_scale: Number) -> Link:
    """InstructPix2Pix's guidance by text and picture (``guidance.instruct``)."""
    return Link("instruct", _instruct, _finite(scale=scale, image_scale=image_scale), PAIR)


def _instruct(link: Link, rule: Rule, b: Branches) -> Denoise:
    if b.middle is None or b.null is None:
        raise ValueError("instruct needs a model that edits a picture as a text says")
    if b.acceleration.guidance is not None:
        raise ValueError("instruct is evaluated whole at each step: it takes no guidance_cache")
    return guidance.instruct(b.denoise, b.cond, b.middle, b.null, **link.numbers)


def rescale(phi: Number = 0.7, space: str = "") -> Link:
    """Brings the guided estimate back to the good one's deviation (``guidance.rescaled``).

    Args:
      phi: in [0, 1]; 0 changes nothing.
      space: a prediction, eps, x0, v, flow or edm; by default what the network predicts.
    """
    if space and space not in predictions.CHOICES:
        raise specs.unknown("space", space, predictions.CHOICES)
    numbers = _numbers(phi=phi)
    guidance.rescaled(**numbers)
    return Link("rescale", _rescale, numbers, RULE, space=space)


def _rescale(link: Link, rule: Rule, b: Branches) -> Rule:
    return guidance.rescaled(link.numbers["phi"], _space(link, b.prediction))


def _space(link: Link, prediction: Prediction) -> Prediction:
    return predictions.CHOICES[link.space] if link.space else prediction


def check_levels(chain: Chain, level: NoiseLevel, prediction: Prediction) -> None:
    """Raises ValueError if ``rescale`` means nothing at some of the levels."""
    for link in chain:
        if link.name != "rescale":
            continue
        with np.errstate(all="ignore"):
            back = predictions.precondition(_space(link, prediction), level)
        if not all(np.all(np.isfinite(leaf)) for leaf in back):
            raise ValueError(
                f"space={link.space!r} says nothing about x_0 at alpha = 0, where sampling starts; "
                "choose x0, v or flow"
            )


def adaptive_projected(
    eta: Number = 0.0, norm_threshold: Number = np.inf, momentum: Number = -0.5
) -> Link:
    """Adaptive projected guidance, for large scales (``guidance.adaptive_projected``)."""
    numbers = _finite(eta=eta) | _numbers(norm_threshold=norm_threshold, momentum=momentum)
    numbers["momentum"] = guidance.adaptive_projected(**numbers).momentum  # None for none
    remembers = numbers["momentum"] is not None
    return Link("adaptive_projected", _adaptive_projected, numbers, RULE, remembers=remembers)


def _adaptive_projected(link: Link, rule: Rule, b: Branches) -> Rule:
    return guidance.adaptive_projected(**link.numbers)


def perturbed_attention(scale: Number, blocks: str = "auto") -> Link:
    """Adds scale times the difference to an estimate without self-attention's maps.

    See ``guidance.perturbed_attention``. ``blocks`` is a regular expression, searched for in the
    attentions' paths; "auto" is a U-Net's mid block or the middle block of a DiT.
    """
    try:
        re.compile(blocks)
    except re.error as error:
        raise ValueError(f"blocks={blocks!r} is no regular expression: {error}") from None
    numbers = _finite(scale=scale)
    return Link("perturbed_attention", _perturbed_attention, numbers, ADDITION, blocks=blocks)


def _perturbed_attention(link: Link, rule: Rule, b: Branches) -> Rule:
    if link.blocks == "auto":
        raise ValueError('perturbed_attention: blocks="auto" is looked up first, by resolve')
    perturbed = with_identity_maps(b.plain, link.blocks)
    return guidance.perturbed_attention(perturbed, link.numbers["scale"], rule)


def resolve(chain: Chain, paths: Sequence[str]) -> Chain:
    """The chain with the blocks of ``perturbed_attention`` looked up in a network.

    ``paths`` are of its self-attentions (``identity_maps.self_attention_paths``); the pattern must
    match one of them.
    """

    def resolved(link: Link) -> Link:
        blocks = middle_block(paths) if link.blocks == "auto" else link.blocks
        if not any(re.search(blocks, path) for path in paths):
            raise ValueError(
                f"blocks={link.blocks!r} names no self-attention of this network; it has "
                f"{', '.join(paths) or 'none'}"
            )
        return link.replace(blocks=blocks)

    return tuple(resolved(link) if link.blocks else link for link in chain)


def classifier(run: str, scale: Number = 1.0) -> Link:
    """Guidance by the gradient of a classifier of noised data (``guidance.classifier_guidance``).

    ``run`` is the classifier's workdir.
    """
    numbers = _finite(scale=scale)
    return Link("classifier", _classifier, numbers, network="classifier", run=_run(run))


def _classifier(link: Link, denoise: Denoiser, b: Branches, before: Chain) -> Denoiser:
    classify, label = b.networks[link.network], b.cond.label

    def log_prob(x: Array, level: NoiseLevel) -> Array:
        log_p = jax.nn.log_softmax(classify(x, level))
        return jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]

    return guidance.classifier_guidance(denoise, log_prob, link.numbers["scale"])


def interval(low: Number = 0.0, high: Number = np.inf) -> Link:
    """What stands before it where low <= sigma / alpha <= high; elsewhere the model alone."""
    numbers = _numbers(low=low, high=high)
    guidance.interval(_any, _any, **numbers)
    return Link("interval", _interval, numbers)


def _interval(link: Link, denoise: Denoiser, b: Branches, before: Chain) -> Denoiser:
    plain = b.acceleration.cached(b.plain)
    if any(link.clips for link in before):  # both branches give what was before clipping
        plain = guidance.clip(plain, -np.inf, np.inf)
    return guidance.interval(denoise, plain, **link.numbers)


def clip(low: Number = -1.0, high: Number = 1.0) -> Link:
    """Clips x_0_hat to the data's range (``guidance.clip``)."""
    return _threshold("clip", low=low, high=high)


def dynamic_threshold(quantile: Number = 0.995, largest: Number = np.inf) -> Link:
    """Imagen's threshold, by quantiles of each image (``guidance.dynamic_threshold``)."""
    return _threshold("dynamic_threshold", quantile=quantile, largest=largest)


def _threshold(name: str, **values: Number) -> Link:
    numbers = _numbers(**values)
    getattr(guidance, name)(_any, **numbers)
    return Link(name, _thresholded, numbers, clips=True)


def _thresholded(link: Link, denoise: Denoiser, b: Branches, before: Chain) -> Denoiser:
    return getattr(guidance, link.name)(denoise, **link.numbers)


def _numbers(**values: Any) -> dict[str, Number]:
    """The values as a link's leaves: numbers, or arrays [B]."""
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = float(value)  # of one type, so that another is not another program
        elif not isinstance(value, jax.Array | np.ndarray | np.generic) or value.ndim > 1:
            raise ValueError(
                f"{name} must be a number, or an array of one per image, got {value!r}"
            )
    return values


def _finite(**values: Any) -> dict[str, Number]:
    numbers = _numbers(**values)
    for name, value in numbers.items():
        require(abs(value) < np.inf, f"{name} must be a finite number, got {value}")
    return numbers


def _run(run: str) -> str:
    if not isinstance(run, str) or not run:
        raise ValueError(f"run must be the workdir of a run, in quotes, got {run!r}")
    return run


def _any(x: Array, level: NoiseLevel) -> Array:
    """A denoiser to check what is made of one."""
    return x


CHOICES = {
    f.__name__: f
    for f in (
        cfg,
        autoguidance,
        instruct,
        rescale,
        adaptive_projected,
        perturbed_attention,
        classifier,
        interval,
        clip,
        dynamic_threshold,
    )
}
