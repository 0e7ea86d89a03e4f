"""The links of guidance's chains (``chain.guide``): a function for each checks its arguments.

What they compute is said, with its equations, by the functions of ``guidance`` that they name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diffusion import predictions, specs
from diffusion.denoiser import Denoise, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.models.identity_maps import middle_block, with_identity_maps
from diffusion.predictions import Prediction
from diffusion.sampling import guidance
from diffusion.sampling.guidance.chain import ADDITION, PAIR, RULE, Branches, Chain, Link
from diffusion.sampling.guidance.extrapolation import Rule
from diffusion.sampling.guidance.transform import require

Number = Array | float  # (), or [B]: one per image


@flax.struct.dataclass
class ClassifierFree(Link):
    """Made by ``cfg``."""

    scale: Number
    split: bool = flax.struct.field(pytree_node=False, default=False)
    alone: bool = flax.struct.field(pytree_node=False, default=False)
    name, place = "cfg", PAIR

    @property
    def in_one_call(self) -> bool:
        return not self.alone and not self.split

    def pair(self, rule: Rule, b: Branches) -> Denoise | Stateful:
        if self.alone or b.null is None:
            return guidance.classifier_free(b.denoise, b.cond, b.cond, 1, rule=rule)
        seldom = {"when": b.acceleration.guidance, "space": b.prediction}
        return guidance.classifier_free(
            b.denoise, b.cond, b.null, self.scale, rule=rule, split=self.split, **seldom
        )


def cfg(scale: Number, split: bool = False) -> Link:
    """Classifier-free guidance (``guidance.classifier_free``), in one call on twice the batch.

    Args:
      scale: the Python number 1 is the model alone: what to steer away from is not evaluated.
      split: two calls, which need half the memory.
    """
    return ClassifierFree(_finite("scale", scale), split, alone=_is_one(scale))


@flax.struct.dataclass
class Autoguidance(Link):
    """Made by ``autoguidance``."""

    scale: Number
    run: str = flax.struct.field(pytree_node=False)
    alone: bool = flax.struct.field(pytree_node=False, default=False)
    name, place, network = "autoguidance", PAIR, "weak"

    def pair(self, rule: Rule, b: Branches) -> Denoise | Stateful:
        weak = guidance.conditional(b.networks[self.network], b.cond)
        seldom = {"when": b.acceleration.guidance, "space": b.prediction}
        return guidance.autoguidance(b.plain, weak, 1 if self.alone else self.scale, rule, **seldom)


def autoguidance(run: str, scale: Number) -> Link:
    """Guidance away from a weaker network (``guidance.autoguidance``).

    Args:
      run: its workdir.
      scale: as that of ``cfg``.
    """
    return Autoguidance(_finite("scale", scale), _directory(run), _is_one(scale))


@flax.struct.dataclass
class Instruct(Link):
    """Made by ``instruct``."""

    scale: Number
    image_scale: Number
    name, place = "instruct", PAIR

    def pair(self, rule: Rule, b: Branches) -> Denoise | Stateful:
        if b.middle is None or b.null is None:
            raise ValueError("instruct needs a model that edits a picture as a text says")
        if b.acceleration.guidance is not None:
            raise ValueError("instruct is evaluated whole at each step: it takes no guidance_cache")
        return guidance.instruct(b.denoise, b.cond, b.middle, b.null, self.scale, self.image_scale)


def instruct(scale: Number, image_scale: Number) -> Link:
    """InstructPix2Pix's guidance by text and picture (``guidance.instruct``)."""
    return Instruct(_finite("scale", scale), _finite("image_scale", image_scale))


@flax.struct.dataclass
class Rescale(Link):
    """Made by ``rescale``."""

    phi: Number
    space: str = flax.struct.field(pytree_node=False, default="")
    name, place = "rescale", RULE

    def rule(self, rule: Rule, b: Branches) -> Rule:
        return guidance.rescaled(self.phi, self._space(b.prediction))

    def _space(self, prediction: Prediction) -> Prediction:
        return predictions.CHOICES[self.space] if self.space else prediction

    def check_levels(self, level: NoiseLevel, prediction: Prediction) -> None:
        with np.errstate(all="ignore"):
            back = predictions.precondition(self._space(prediction), level)
        if not all(np.all(np.isfinite(leaf)) for leaf in back):
            raise ValueError(
                f"space={self.space!r} says nothing about x_0 at alpha = 0, where sampling starts; "
                "choose x0, v or flow"
            )


def rescale(phi: Number = 0.7, space: str = "") -> Link:
    """Brings the guided estimate back to the good one's deviation (``guidance.rescaled``).

    Args:
      phi: in [0, 1]; 0 changes nothing.
      space: a prediction, eps, x0, v, flow or edm; by default what the network predicts.
    """
    if space and space not in predictions.CHOICES:
        raise specs.unknown("space", space, predictions.CHOICES)
    link = Rescale(_number("phi", phi), space)
    guidance.rescaled(link.phi)
    return link


@flax.struct.dataclass
class AdaptiveProjected(Link):
    """Made by ``adaptive_projected``; ``momentum`` is None where there is none."""

    eta: Number
    norm_threshold: Number
    momentum: Number | None
    name, place = "adaptive_projected", RULE

    @property
    def remembers(self) -> bool:
        return self.momentum is not None

    def rule(self, rule: Rule, b: Branches) -> Rule:
        return guidance.adaptive_projected(self.eta, self.norm_threshold, self.momentum)


def adaptive_projected(
    eta: Number = 0.0, norm_threshold: Number = np.inf, momentum: Number = -0.5
) -> Link:
    """Adaptive projected guidance, for large scales (``guidance.adaptive_projected``)."""
    eta, momentum = _finite("eta", eta), _number("momentum", momentum)
    norm_threshold = _number("norm_threshold", norm_threshold)
    rule = guidance.adaptive_projected(eta, norm_threshold, momentum)
    return AdaptiveProjected(eta, norm_threshold, rule.momentum)


@flax.struct.dataclass
class PerturbedAttention(Link):
    """Made by ``perturbed_attention``."""

    scale: Number
    blocks: str = flax.struct.field(pytree_node=False, default="auto")
    name, place = "perturbed_attention", ADDITION

    def rule(self, rule: Rule, b: Branches) -> Rule:
        if self.blocks == "auto":
            raise ValueError('perturbed_attention: blocks="auto" is looked up first, by resolve')
        perturbed = with_identity_maps(b.plain, self.blocks)
        return guidance.perturbed_attention(perturbed, self.scale, rule)

    def resolved(self, paths: Sequence[str]) -> PerturbedAttention:
        """With the blocks of a network with these self-attentions."""
        blocks = middle_block(paths) if self.blocks == "auto" else self.blocks
        if not any(re.search(blocks, path) for path in paths):
            raise ValueError(
                f"blocks={self.blocks!r} names no self-attention of this network; it has "
                f"{', '.join(paths) or 'none'}"
            )
        return self.replace(blocks=blocks)


def perturbed_attention(scale: Number, blocks: str = "auto") -> Link:
    """Adds scale times the difference to an estimate without self-attention's maps.

    See ``guidance.perturbed_attention``.

    Args:
      scale: 0 adds nothing.
      blocks: regular expression, searched for in the attentions' paths; "auto" is a U-Net's mid
        block or the middle block of a DiT.
    """
    try:
        re.compile(blocks)
    except re.error as error:
        raise ValueError(f"blocks={blocks!r} is no regular expression: {error}") from None
    return PerturbedAttention(_finite("scale", scale), blocks)


@flax.struct.dataclass
class Classifier(Link):
    """Made by ``classifier``."""

    scale: Number
    run: str = flax.struct.field(pytree_node=False)
    name, network = "classifier", "classifier"

    def after(self, denoise: Denoise | Stateful, b: Branches, before: Chain) -> Denoise | Stateful:
        classify, label = b.networks[self.network], b.cond.label

        def log_prob(x: Array, level: NoiseLevel) -> Array:
            log_p = jax.nn.log_softmax(classify(x, level))
            return jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]

        return guidance.classifier_guidance(denoise, log_prob, self.scale)


def classifier(run: str, scale: Number = 1.0) -> Link:
    """Guidance by the gradient of a classifier of noised data (``guidance.classifier_guidance``).

    Args:
      run: its workdir.
      scale: 0 changes nothing.
    """
    return Classifier(_finite("scale", scale), _directory(run))


@flax.struct.dataclass
class Interval(Link):
    """Made by ``interval``."""

    low: Number
    high: Number
    name = "interval"

    def after(self, denoise: Denoise | Stateful, b: Branches, before: Chain) -> Denoise | Stateful:
        plain = b.acceleration.cached(b.plain)
        if any(link.clips for link in before):  # both branches give what was before clipping
            plain = guidance.clip(plain, -np.inf, np.inf)
        return guidance.interval(denoise, plain, self.low, self.high)


def interval(low: Number = 0.0, high: Number = np.inf) -> Link:
    """What stands before it where low <= sigma / alpha <= high; elsewhere the model alone."""
    link = Interval(_number("low", low), _number("high", high))
    guidance.interval(_any, _any, link.low, link.high)
    return link


@flax.struct.dataclass
class Clip(Link):
    """Made by ``clip``."""

    low: Number
    high: Number
    name, clips = "clip", True

    def after(self, denoise: Denoise | Stateful, b: Branches, before: Chain) -> Denoise | Stateful:
        return guidance.clip(denoise, self.low, self.high)


def clip(low: Number = -1.0, high: Number = 1.0) -> Link:
    """Clips x_0_hat to the data's range (``guidance.clip``)."""
    link = Clip(_number("low", low), _number("high", high))
    guidance.clip(_any, link.low, link.high)
    return link


@flax.struct.dataclass
class DynamicThreshold(Link):
    """Made by ``dynamic_threshold``."""

    quantile: Number
    largest: Number
    name, clips = "dynamic_threshold", True

    def after(self, denoise: Denoise | Stateful, b: Branches, before: Chain) -> Denoise | Stateful:
        return guidance.dynamic_threshold(denoise, self.quantile, self.largest)


def dynamic_threshold(quantile: Number = 0.995, largest: Number = np.inf) -> Link:
    """Imagen's threshold, by quantiles of each image (``guidance.dynamic_threshold``)."""
    link = DynamicThreshold(_number("quantile", quantile), _number("largest", largest))
    guidance.dynamic_threshold(_any, link.quantile, link.largest)
    return link


def _number(name: str, value: Any) -> Number:
    """``value`` as a leaf of a link."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)  # of one type, so that another number is not another program
    if not isinstance(value, jax.Array | np.ndarray | np.generic) or value.ndim > 1:
        raise ValueError(f"{name} must be a number, or an array of one per image, got {value!r}")
    return value


def _finite(name: str, value: Any) -> Number:
    value = _number(name, value)
    require(abs(value) < np.inf, f"{name} must be a finite number, got {value}")
    return value


def _is_one(scale: Number) -> bool:
    return isinstance(scale, int | float) and scale == 1


def _directory(run: str) -> str:
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
