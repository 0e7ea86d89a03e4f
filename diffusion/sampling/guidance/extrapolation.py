"""Guidance by two estimates: through a good one, away from a worse one.

    D = D_good + (w - 1) (D_good - D_bad)

Which two they are makes the method: with and without the condition (classifier-free guidance),
with it and with another to avoid (negative prompts), a strong and a weak network (autoguidance),
the network and the same with its attention disturbed. How they are combined is a ``Rule``, chosen
apart: ``linear`` as above, ``rescaled`` or ``adaptive_projected``. w = 1 is D_good, w = 0 is D_bad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion import predictions
from diffusion.conditioning import Conditioning, concatenate
from diffusion.denoiser import ConditionalDenoise, Denoise, Estimate, Stateful, as_estimate
from diffusion.levels import Array, NoiseLevel
from diffusion.predictions import Prediction
from diffusion.sampling.guidance.transform import Scale, dot, move, per_image, require, weight

Pair = Callable[[Array, NoiseLevel], tuple[Estimate, Estimate]]  # good, bad


class Rule(NamedTuple):
    """How two estimates become one: combine(x, level, good, good - bad, w) -> x_0_hat [B, ...].

    With ``momentum`` beta the difference is replaced by its running sum d <- good - bad + beta d.
    Each of the pairs (denoiser, s) in ``away`` adds s (good - denoiser(x, level)).
    """

    combine: Callable[[Array, NoiseLevel, Array, Array, Array], Array]
    momentum: Array | float | None = None
    away: tuple[tuple[Denoise, Scale], ...] = ()


def linear() -> Rule:
    """good + (w - 1) (good - bad) (Ho & Salimans, 2022, eq. 6, whose w is one less)."""
    return Rule(lambda x, level, good, difference, w: good + (w - 1) * difference)


LINEAR = linear()


def rescaled(phi: Array | float = 0.7, space: Prediction = predictions.x0) -> Rule:
    """``linear``, then brought back to the good estimate's standard deviation, per image.

    F <- phi F std(F_good) / std(F) + (1 - phi) F (Lin et al., 2023, "Common diffusion noise
    schedules", section 3.4), so that large scales do not overexpose; phi in [0, 1], () or [B]. F is
    the network's output as the prediction ``space`` has it: the paper and diffusers take whatever
    the network predicts (so eps for Stable Diffusion 1, v for 2), x0 rescales the image itself. eps
    cannot be inverted at alpha = 0.
    """
    require((phi >= 0) & (phi <= 1), f"phi must lie in [0, 1], got {phi}")

    def combine(x: Array, level: NoiseLevel, good: Array, difference: Array, w: Array) -> Array:
        wide = level.expand(x.ndim)
        a, b, _ = space(wide)

        def output(x0: Array) -> Array:
            return a * x0 + b * (x - wide.alpha * x0) / wide.sigma

        guided = output(good + (w - 1) * difference)
        axes = tuple(range(1, x.ndim))
        before, after = (f.std(axes, keepdims=True) for f in (output(good), guided))
        factor = jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)
        share = per_image(phi, x)
        mixed = (share * factor + (1 - share)) * guided
        return predictions.to_x0(space, level, x, mixed).astype(x.dtype)

    return Rule(combine)


def adaptive_projected(
    eta: Array | float = 0.0,
    norm_threshold: Array | float = jnp.inf,
    momentum: Array | float | None = -0.5,
) -> Rule:
    """Adaptive projected guidance (Sadat et al., 2024, alg. 1), for large scales.

    The difference is (1) summed up with (negative) momentum, (2) shortened to the norm
    ``norm_threshold``, (3) split into its part along the good estimate, which oversaturates and is
    multiplied by eta, and the rest. All three numbers are () or [B].

    Args:
      eta: 1 keeps all of the parallel part; with no threshold and momentum that is ``linear``.
      norm_threshold: r > 0, the largest Euclidean norm per image; the paper's are 2.5 to 15.
      momentum: beta in (-1, 1); None, or the Python number 0, needs no memory.
    """
    require(
        norm_threshold > 0, f"norm_threshold must be positive (inf for none), got {norm_threshold}"
    )
    if isinstance(momentum, int | float) and momentum == 0:
        momentum = None
    if momentum is not None:
        require((momentum > -1) & (momentum < 1), f"momentum must lie in (-1, 1), got {momentum}")

    def combine(x: Array, level: NoiseLevel, good: Array, difference: Array, w: Array) -> Array:
        square = dot(difference, difference)
        norm = jnp.sqrt(jnp.where(square > 0, square, 1))
        update = per_image(jnp.minimum(1, norm_threshold / norm), x) * difference
        along = dot(good, good)
        share = dot(update, good) / jnp.where(along > 0, along, 1)
        update = update - (1 - per_image(eta, x)) * per_image(share, x) * good
        return good + (w - 1) * update

    return Rule(combine, momentum)


def perturbed_attention(perturbed: Denoise, scale: Scale, rule: Rule = LINEAR) -> Rule:
    """``rule``, plus scale (good - perturbed) (Ahn et al., 2024).

    ``perturbed`` is the good denoiser with the self-attention maps of some blocks replaced by the
    identity: ``models.identity_maps.with_identity_maps``. With scale 1 of ``classifier_free`` it is
    the only guidance, in two evaluations.
    """
    return rule._replace(away=(*rule.away, (perturbed, scale)))


def conditional(denoise: ConditionalDenoise, cond: Conditioning) -> Denoise:
    """The denoiser with its conditioning filled in."""
    return lambda x, level: denoise(x, level, cond)


def classifier_free(
    denoise: ConditionalDenoise,
    cond: Conditioning,
    null: Conditioning,
    scale: Scale,
    *,
    rule: Rule = LINEAR,
    split: bool = False,
    when: Array | None = None,
    space: Prediction = predictions.x0,
) -> Denoise | Stateful:
    """D = D_null + scale (D_cond - D_null) (Ho & Salimans, 2022), in one call on twice the batch.

    Args:
      denoise: the conditional denoiser. Of learned variances, those of ``cond`` are kept.
      cond: the conditioning, batch [B].
      null: what to steer away from, with the same fields: ``conditioning.null_like(cond, ...)``,
        or a negative prompt or label.
      scale: 1 is purely conditional, and if it is the Python number 1, ``null`` is not evaluated;
        0 is ``null`` alone.
      rule: with momentum the result is ``Stateful``.
      split: two calls instead, which need half the memory.
      when: [R] bool, by number of the evaluation: where both are evaluated. In between ``cond`` is
        alone, and the difference is that of the last time (the cache of FasterCache, Lyu et al.,
        2024, without its extrapolation). The first evaluation always has both. None: each has.
      space: of a network's output, in which the difference stays the same.
    """
    good, bad = conditional(denoise, cond), conditional(denoise, null)
    if split or is_one(scale):
        return autoguidance(good, bad, scale, rule, when=when, space=space)
    both = concatenate(cond, null)

    def pair(x: Array, level: NoiseLevel) -> tuple[Estimate, Estimate]:
        estimate = as_estimate(denoise(jnp.concatenate([x, x]), _tiled(level, 2), both))
        halves = jax.tree.map(lambda leaf: jnp.split(leaf, 2), estimate)
        return jax.tree.transpose(jax.tree.structure(estimate), None, halves)

    return _guide(pair, good, scale, rule, when, space)


def instruct(
    denoise: ConditionalDenoise,
    cond: Conditioning,
    middle: Conditioning,
    null: Conditioning,
    scale: Array | float,
    image_scale: Array | float,
) -> Denoise:
    """D_null + s_I (D_middle - D_null) + s_T (D - D_middle), in one call on thrice the batch.

    InstructPix2Pix's guidance by two signals (Brooks et al., 2023, eq. 3): ``middle`` has the
    picture c_I but not the text c_T, ``null`` neither. Scales are () or [B]. Of learned variances,
    those of ``cond`` are kept.
    """
    all_three = concatenate(cond, middle, null)

    def guided(x: Array, level: NoiseLevel) -> Estimate:
        estimate = as_estimate(denoise(jnp.concatenate([x] * 3), _tiled(level, 3), all_three))
        both, picture, neither = jnp.split(estimate.x0, 3)
        x0 = neither + per_image(image_scale, x) * (picture - neither)
        nu = None if estimate.nu is None else jnp.split(estimate.nu, 3)[0]
        return Estimate(x0 + per_image(scale, x) * (both - picture), nu)

    return guided


def autoguidance(
    strong: Denoise,
    weak: Denoise,
    scale: Scale,
    rule: Rule = LINEAR,
    *,
    when: Array | None = None,
    space: Prediction = predictions.x0,
) -> Denoise | Stateful:
    """D = D_weak + scale (D_strong - D_weak) (Karras et al., 2024, "a bad version"), in two calls.

    ``weak`` is worse in the same way, only more so: smaller or trained for less time. Both get the
    same conditioning, so that the images do not lose variety as with classifier-free guidance. Its
    parameters should be arguments of what is jitted, as ``strong``'s are. ``when`` and ``space``
    are ``classifier_free``'s.
    """

    def pair(x: Array, level: NoiseLevel) -> tuple[Estimate, Estimate]:
        return as_estimate(strong(x, level)), as_estimate(weak(x, level))

    return _guide(pair, strong, scale, rule, when, space)


def _seldom(pair: Pair, good_alone: Denoise, when: Array, space: Prediction) -> Stateful:
    """``pair``, whose bad estimate is evaluated at some evaluations only.

    Its memory: the number of the evaluation, how many had both, and the last difference in
    ``space``.
    """

    def step(x: Array, level: NoiseLevel, memory: tuple) -> tuple[tuple, tuple]:
        count, evaluated, difference = memory
        c_out = jnp.asarray(predictions.precondition(space, level.expand(x.ndim)).c_out, x.dtype)

        def both(x: Array, difference: Array) -> tuple[Estimate, Estimate, Array]:
            good, bad = pair(x, level)
            return good, bad.x0, ((good.x0 - bad.x0) / c_out).astype(x.dtype)

        def one(x: Array, difference: Array) -> tuple[Estimate, Estimate, Array]:
            good = as_estimate(good_alone(x, level))
            return good, good.x0 - c_out * difference, difference

        needed = jnp.asarray(when)[count] | (evaluated == 0)
        good, bad, difference = jax.lax.cond(needed, both, one, x, difference)
        return (good, Estimate(bad)), (count + 1, evaluated + needed, difference)

    return Stateful(
        lambda x: (jnp.int32(0), jnp.int32(0), jnp.zeros_like(x)),
        step,
        lambda memory: (memory[0] + 1, *memory[1:]),
    )


def is_one(scale: Scale) -> bool:
    """Whether only the good estimate is evaluated."""
    return isinstance(scale, int | float) and scale == 1


def _guide(
    pair: Pair,
    good_alone: Denoise,
    scale: Scale,
    rule: Rule,
    when: Array | None,
    space: Prediction,
) -> Denoise | Stateful:
    if is_one(scale):  # what is left: the good estimate and what else the rule steers away from
        if not rule.away:
            return good_alone
        pair, when = lambda x, level: [as_estimate(good_alone(x, level))] * 2, None
        rule = LINEAR._replace(away=rule.away)
    combine, momentum, away = rule
    init, both, skip = (
        Stateful(lambda x: None, lambda x, level, memory: (pair(x, level), memory))
        if when is None
        else _seldom(pair, good_alone, when, space)
    )

    def evaluate(x: Array, level: NoiseLevel, memory: tuple) -> tuple[Estimate, tuple]:
        before, memory = memory
        (good, bad), memory = both(x, level, memory)
        difference = good.x0 - bad.x0
        if momentum is not None:
            difference = difference + per_image(momentum, x) * before
        x0 = combine(x, level, good.x0, difference, weight(scale, level, x))
        for other, s in away:
            x0 = x0 + weight(s, level, x) * (good.x0 - as_estimate(other(x, level)).x0)
        return move(good, x0 - good.x0), (None if momentum is None else difference, memory)

    if momentum is not None or when is not None:
        return Stateful(
            lambda x: (None if momentum is None else jnp.zeros_like(x), init(x)),
            evaluate,
            lambda memory: (memory[0], skip(memory[1])),
        )
    return lambda x, level: evaluate(x, level, (None, None))[0]


def _tiled(level: NoiseLevel, n: int) -> NoiseLevel:
    """The level of ``n`` batches that were put one after another."""
    return NoiseLevel(*(jnp.concatenate([a] * n) if jnp.ndim(a) else a for a in level))
