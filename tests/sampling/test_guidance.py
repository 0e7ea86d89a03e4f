"""Guidance: its equation, its fixed points, its references, how often it asks the network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import predictions, schedules
from diffusion.conditioning import Conditioning, null_like
from diffusion.denoiser import Estimate, as_estimate
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids, guidance, solvers
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, sample

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
COND = Conditioning(label=jnp.array([0, 1, 4]), image=jnp.ones((3, 4, 4, 1)))
NULL = null_like(COND, label=9)
LEVEL = NoiseLevel(jnp.float32(0.5), jnp.float32(0.8), jnp.float32(0.6))


def denoise(x, level, cond):
    level = level.expand(x.ndim)
    label = cond.label.reshape(-1, 1, 1, 1)
    return level.alpha * jnp.sin(x + label) + level.sigma * cond.image


def learned(x, level, cond):
    nu = jnp.broadcast_to(cond.label.reshape(-1, 1, 1, 1) / 9, x.shape)
    return Estimate(denoise(x, level, cond), nu)


def guided(scale, level=LEVEL, base=denoise):
    return as_estimate(guidance.classifier_free(base, COND, NULL, scale)(X, level)).x0


@pytest.mark.parametrize(
    "level", [LEVEL, NoiseLevel(*(jnp.linspace(0.2, a, 3) for a in (0.5, 0.8, 0.6)))]
)
def test_classifier_free_is_linear_between_its_ends(level):
    cond, null = denoise(X, level, COND), denoise(X, level, NULL)
    assert np.abs(cond - null).max() > 0.1
    np.testing.assert_allclose(guided(jnp.float32(1), level), cond, atol=1e-6)
    np.testing.assert_allclose(guided(0.0, level), null, atol=1e-6)
    np.testing.assert_allclose(guided(3.5, level), null + 3.5 * (cond - null), atol=1e-5)


def test_scale_per_image_and_traced():
    scales = jnp.array([0.5, 1.0, 4.0])
    each = jax.jit(guided)(scales)
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(each[i], guided(scale)[i], atol=1e-6)


def test_guiding_x0_is_guiding_eps():
    def eps(x0):
        return (X - LEVEL.alpha * x0) / LEVEL.sigma

    cond, null = eps(denoise(X, LEVEL, COND)), eps(denoise(X, LEVEL, NULL))
    np.testing.assert_allclose(eps(guided(2.0)), null + 2 * (cond - null), atol=1e-5)


@pytest.mark.parametrize(("scale", "batches"), [(1, [3]), (1.0, [3]), (2.0, [6]), (0, [6])])
def test_network_calls(scale, batches):
    seen = []

    def counting(x, level, cond):
        seen.append(len(x))
        return denoise(x, level, cond)

    guided(scale, base=counting)
    assert seen == batches


def test_learned_variances_are_those_of_cond():
    x0_hat, nu, _ = guidance.classifier_free(learned, COND, NULL, 3.0)(X, LEVEL)
    np.testing.assert_allclose(x0_hat, guided(3.0), atol=1e-6)
    np.testing.assert_array_equal(nu, learned(X, LEVEL, COND)[1])


@pytest.mark.parametrize(
    ("alpha", "sigma", "inside"),
    [(0.8, 0.08, False), (0.8, 0.6, True), (0.2, 0.9, False), (0.0, 1.0, False), (1, 2.0, True)],
)
@pytest.mark.parametrize("base", [denoise, learned])
def test_interval(alpha, sigma, inside, base):
    both = guidance.classifier_free(base, COND, NULL, 3.0)
    plain = guidance.conditional(base, COND)
    level = NoiseLevel(*map(jnp.float32, (0.5, alpha, sigma)))
    result = guidance.interval(both, plain, 0.3, 2.5)(X, level)
    expected = as_estimate((both if inside else plain)(X, level))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, expected)


def test_clip():
    plain = guidance.conditional(learned, COND)
    x0_hat, nu, unclipped = guidance.clip(plain, -0.5, 0.7)(X, LEVEL)
    np.testing.assert_array_equal(unclipped, plain(X, LEVEL)[0])
    np.testing.assert_array_equal(x0_hat, np.clip(plain(X, LEVEL)[0], -0.5, 0.7))
    np.testing.assert_array_equal(nu, plain(X, LEVEL)[1])


def test_dynamic_threshold():
    scale = jnp.array([0.5, 3.0, 10.0]).reshape(3, 1, 1, 1)
    result = guidance.dynamic_threshold(lambda x, level: scale * x, 0.9)(X, LEVEL).x0
    for i in range(3):
        image = np.asarray(scale * X)[i]
        s = max(np.quantile(np.abs(image), 0.9), 1.0)
        np.testing.assert_allclose(result[i], np.clip(image, -s, s) / s, atol=1e-5)
    inside = 0.1 * X
    np.testing.assert_array_equal(
        guidance.dynamic_threshold(lambda x, level: inside)(X, LEVEL).x0, inside
    )


def test_dynamic_threshold_is_diffusers():
    """Imagen's with an upper bound for s: diffusers' sample_max_value; 1 there is clipping."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    images = np.asarray(X) * np.array([0.3, 2.0, 9.0], np.float32).reshape(3, 1, 1, 1)
    for quantile, largest in [(0.9, 1.0), (0.9, 1.5), (0.995, 100.0)]:
        scheduler = diffusers.DDIMScheduler(
            thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=largest
        )
        expected = scheduler._threshold_sample(torch.from_numpy(images)).numpy()
        ours = guidance.dynamic_threshold(lambda x, level: x, quantile, largest)(images, LEVEL)
        np.testing.assert_allclose(ours.x0, expected, atol=1e-5)
        if largest == 1.0:
            np.testing.assert_allclose(ours.x0, images.clip(-1, 1), atol=1e-6)


LEVELS = NoiseLevel(*(jnp.linspace(*ends, 3) for ends in ((0.2, 0.9), (0.9, 0.2), (0.4, 0.98))))
RULES = [
    guidance.linear(),
    guidance.rescaled(0.7),
    guidance.rescaled(1.0, predictions.eps),
    guidance.rescaled(0.4, predictions.v),
    guidance.adaptive_projected(0.3, 2.0, 0.0),
]


def cfg(rule, scale, level, split=False, base=denoise):
    guided = guidance.classifier_free(base, COND, NULL, scale, rule=rule, split=split)
    return guided(X, level)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("level", [LEVEL, LEVELS])
def test_every_rule_split_or_not_and_at_scale_one(rule, level):
    one, two = (cfg(rule, 3.0, level, split, learned) for split in (False, True))
    np.testing.assert_allclose(one.x0, two.x0, atol=1e-5)
    np.testing.assert_array_equal(one.nu, two.nu)
    one = cfg(rule, jnp.float32(1), level).x0
    np.testing.assert_allclose(one, denoise(X, level, COND), atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_sees_each_image_by_itself(rule):
    """Level, scale and batch: the image in the middle alone gives what it gives among three."""
    scales = jnp.array([2.0, 5.0, 3.0])
    three = cfg(rule, scales, LEVELS).x0
    alone = jax.tree.map(lambda a: a[1:2], (COND, NULL, X))
    level = jax.tree.map(lambda a: a[1], LEVELS)
    guided = guidance.classifier_free(denoise, *alone[:2], 5.0, rule=rule)
    np.testing.assert_allclose(guided(alone[2], level).x0, three[1:2], atol=1e-5)
    assert np.abs(three - denoise(X, LEVELS, COND)).max() > 0.1


@pytest.mark.parametrize("split", [False, True])
def test_split_calls(split):
    seen = []

    def counting(x, level, cond):
        seen.append(len(x))
        return denoise(x, level, cond)

    cfg(guidance.linear(), 2.0, LEVEL, split, counting)
    assert seen == ([3, 3] if split else [6])


def test_split_within_an_interval_and_scale_as_a_function_of_the_level():
    plain = guidance.conditional(learned, COND)

    def ramp(level):
        return 1 + 4 * level.sigma

    guided = guidance.classifier_free(learned, COND, NULL, ramp, split=True)
    inside = guidance.interval(guided, plain, 0.5, 2.0)
    for alpha, sigma, strength in [(0.8, 0.6, 3.4), (0.9, 0.1, 1.0), (0.1, 0.9, 1.0)]:
        level = NoiseLevel(*map(jnp.float32, (0.5, alpha, sigma)))
        estimate = jax.jit(inside)(X, level)
        np.testing.assert_allclose(estimate.x0, guided_at(strength, level), atol=1e-5)
    # Per image, both are evaluated and one is taken: ratios 0.44, 1.25, 4.9 here.
    each = inside(X, LEVELS)
    np.testing.assert_allclose(each.x0[1:2], guided(X, LEVELS).x0[1:2], atol=1e-6)
    np.testing.assert_allclose(each.x0[::2], plain(X, LEVELS).x0[::2], atol=1e-6)
    assert np.abs(each.x0 - plain(X, LEVELS).x0).max() > 0.1


def guided_at(scale, level):
    return as_estimate(guidance.classifier_free(denoise, COND, NULL, scale)(X, level)).x0


def test_a_negative_label_is_another_null():
    """Conditions are what they are: D_neg + w (D_cond - D_neg), and swapping mirrors the scale."""
    negative = null_like(COND, label=7)
    away = guidance.classifier_free(denoise, COND, negative, 2.5)(X, LEVEL).x0
    bad, good = denoise(X, LEVEL, negative), denoise(X, LEVEL, COND)
    np.testing.assert_allclose(away, bad + 2.5 * (good - bad), atol=1e-5)
    mirrored = guidance.classifier_free(denoise, negative, COND, -1.5)(X, LEVEL).x0
    np.testing.assert_allclose(mirrored, away, atol=1e-5)


def to_output(space, x0):
    row = space(LEVEL)
    return row.a * x0 + row.b * (X - LEVEL.alpha * x0) / LEVEL.sigma


@pytest.mark.parametrize("space", [predictions.eps, predictions.v, predictions.x0])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_is_diffusers_on_the_networks_output(space, phi):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    cond, linear = (to_output(space, x0) for x0 in (denoise(X, LEVEL, COND), guided(6.0)))
    expected = module.rescale_noise_cfg(
        torch.from_numpy(np.array(linear)), torch.from_numpy(np.array(cond)), phi
    ).numpy()
    ours = to_output(space, cfg(guidance.rescaled(phi, space), 6.0, LEVEL).x0)
    np.testing.assert_allclose(ours, expected, atol=2e-5)
    if phi == 1:
        np.testing.assert_allclose(ours.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-4)


def test_adaptive_projected_is_its_parts():
    """eta = 1, no threshold: linear. eta = 0: orthogonal to the good estimate, norm as bounded."""
    plain = guidance.adaptive_projected(eta=1.0, momentum=0.0)
    np.testing.assert_allclose(cfg(plain, 4.0, LEVEL).x0, guided(4.0), atol=1e-5)
    good = denoise(X, LEVEL, COND)
    update = cfg(guidance.adaptive_projected(0.0, 0.8, 0.0), 2.0, LEVEL).x0 - good
    np.testing.assert_allclose(np.einsum("bhwc,bhwc->b", update, good), 0, atol=1e-4)
    assert np.all(np.linalg.norm(update.reshape(3, -1), axis=1) <= 0.8 + 1e-5)
    kept = cfg(guidance.adaptive_projected(1.0, 0.8, 0.0), 2.0, LEVEL).x0 - good
    np.testing.assert_allclose(np.linalg.norm(kept.reshape(3, -1), axis=1), 0.8, rtol=1e-4)
    same = guidance.classifier_free(
        denoise, COND, COND, 3.0, rule=guidance.adaptive_projected(0.0, 1.0, 0.0)
    )
    np.testing.assert_allclose(same(X, LEVEL).x0, good, atol=1e-6)  # no difference, no NaN


@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_adaptive_projected_is_diffusers(momentum):
    """Three evaluations; its scale of the "original formulation" is one less."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    buffer = module.MomentumBuffer(momentum) if momentum else None
    rule = guidance.adaptive_projected(0.2, 2.5, momentum)
    guided = guidance.classifier_free(denoise, COND, NULL, 7.0, rule=rule)
    memory = guided.init(X) if momentum else None
    for i in range(3):
        x = X + i
        cond, null = (denoise(x, LEVEL, c) for c in (COND, NULL))
        expected = module.normalized_guidance(
            *(torch.from_numpy(np.array(d)) for d in (cond, null)), 6.0, buffer, 0.2, 2.5, True
        )
        if momentum:
            estimate, memory = guided.step(x, LEVEL, memory)
        else:
            estimate = guided(x, LEVEL)
        np.testing.assert_allclose(estimate.x0, expected.numpy(), atol=1e-4)


def test_sampling_with_a_memory():
    """The memory goes through the scan, clipping and the interval; without momentum: no matter."""
    solver = solvers.ddim(grids.uniform(schedules.cosine(), 5))
    keys = image_keys(0, range(3))
    plain = guidance.conditional(denoise, COND)

    def wrapped(guided):
        return guidance.clip(guidance.interval(guided, plain, 0.1, 5.0), -2, 2)

    @partial(jax.jit, static_argnums=0)
    def draw(momentum):
        rule = guidance.adaptive_projected(1.0, momentum=momentum)
        guided = guidance.classifier_free(denoise, COND, NULL, 3.0, rule=rule)
        return sample(wrapped(guided), solver, keys, (4, 4, 2), trajectory=True)

    stateful, path = draw(-0.5)
    memory, x0s = jnp.zeros_like(X), []
    for r in range(5):
        level = jax.tree.map(lambda a, r=r: jnp.float32(a[r]), solver.level)
        good, bad = (denoise(path.x[r], level, c) for c in (COND, NULL))
        inside = 0.1 <= level.ratio <= 5.0
        if inside:
            memory = good - bad - 0.5 * memory
        x0s.append(jnp.clip(good + 2 * memory if inside else good, -2, 2))
    np.testing.assert_allclose(path.x0, jnp.stack(x0s), atol=1e-4)
    linear = sample(
        wrapped(guidance.classifier_free(denoise, COND, NULL, 3.0)), solver, keys, (4, 4, 2)
    )
    np.testing.assert_allclose(draw(0.0)[0], linear, atol=1e-4)
    assert np.abs(stateful - linear).max() > 0.01


def weak(x, level):
    return 0.5 * jnp.cos(x)


def test_autoguidance():
    strong = guidance.conditional(learned, COND)
    good, bad = denoise(X, LEVEL, COND), weak(X, LEVEL)
    for scale in (0.0, 1.0, 2.5):
        estimate = guidance.autoguidance(strong, weak, jnp.float32(scale))(X, LEVEL)
        np.testing.assert_allclose(estimate.x0, bad + scale * (good - bad), atol=1e-5)
        np.testing.assert_array_equal(estimate.nu, strong(X, LEVEL).nu)
    assert guidance.autoguidance(strong, None, 1) is strong  # the weak one is not evaluated
    np.testing.assert_allclose(
        guidance.autoguidance(strong, strong, 9.0)(X, LEVEL).x0, good, atol=1e-6
    )


def test_perturbed_attention_adds_to_the_rule():
    """null + w (cond - null) + s (cond - perturbed), and by itself cond + s (cond - perturbed)."""
    cond, null = denoise(X, LEVEL, COND), denoise(X, LEVEL, NULL)
    rule = guidance.perturbed_attention(weak, 3.0)
    push = 3 * (cond - weak(X, LEVEL))
    np.testing.assert_allclose(cfg(rule, 2.0, LEVEL).x0, 2 * cond - null + push, atol=1e-5)
    np.testing.assert_allclose(cfg(rule, 1, LEVEL).x0, cond + push, atol=1e-5)
    off = guidance.perturbed_attention(weak, 0.0)
    np.testing.assert_allclose(cfg(off, 2.0, LEVEL).x0, 2 * cond - null, atol=1e-5)


def test_guidance_moves_what_was_before_clipping_too():
    def clipped(x, level, cond):
        x0 = denoise(x, level, cond)
        return Estimate(jnp.clip(x0, -0.3, 0.3), None, x0)

    estimate = cfg(guidance.linear(), 2.0, LEVEL, base=clipped)
    plain = clipped(X, LEVEL, COND)
    np.testing.assert_allclose(
        estimate.unclipped - estimate.x0, plain.unclipped - plain.x0, atol=1e-6
    )


MEANS = np.array([[0.5, -0.2], [-0.7, 0.4], [0.1, 0.9]])
STDS, WEIGHTS = np.array([0.3, 0.2, 0.4]), np.array([0.5, 0.2, 0.3])


def component_log_prob(x, level, label):
    """log p(k | x_t) of the mixture's components."""
    wide = level.expand(2)
    variance = wide.alpha**2 * STDS**2 + wide.sigma**2  # [B or 1, K]
    square = ((x[:, None] - wide.alpha[..., None] * MEANS) ** 2).sum(-1)
    log_p = jax.nn.log_softmax(jnp.log(WEIGHTS) - jnp.log(variance) - 0.5 * square / variance)
    return jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]


@pytest.mark.parametrize(
    "level",
    [
        schedules.cosine()(0.6),
        schedules.EDM()(3.0),
        schedules.RectifiedFlow()(0.3),
        schedules.SubVPSDE()(0.9),
        schedules.cosine()(np.array([0.05, 0.5, 0.95, 0.999])),
    ],
    ids=["cosine", "edm", "flow", "sub_vp", "per image"],
)
def test_exact_classifier_makes_the_exact_conditional_denoiser(level):
    """Bayes: unconditional score + grad log p(y | x_t) = conditional score."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2)))
        label = jnp.array([0, 1, 2, 1])
        level = jax.tree.map(jnp.asarray, level)
        prior = gaussian_mixture(MEANS, STDS, WEIGHTS)
        log_prob = partial(component_log_prob, label=label)
        guided = jax.jit(guidance.classifier_guidance(prior, log_prob))(x, level).x0
        parts = [gaussian_mixture(MEANS[k : k + 1], STDS[k])(x, level) for k in range(3)]
        exact = jnp.stack(parts)[label, jnp.arange(4)]
        np.testing.assert_allclose(guided, exact, atol=1e-10)
        off = guidance.classifier_guidance(prior, log_prob, 0.0)(x, level).x0
        np.testing.assert_allclose(off, prior(x, level), atol=1e-12)
        scales = jnp.array([0.0, 1.0, 2.0, 3.0])
        each = guidance.classifier_guidance(prior, log_prob, scales)(x, level).x0
        np.testing.assert_allclose(each, off + scales[:, None] * (exact - off), atol=1e-10)


def test_classifier_guidance_without_signal():
    """At alpha = 0 x_t says nothing about the label, whatever a network thinks."""
    noisy = NoiseLevel(*map(jnp.float32, (1.0, 0.0, 1.0)))
    guided = guidance.classifier_guidance(weak, lambda x, level: x.sum((1, 2, 3)), 2.0)
    np.testing.assert_array_equal(guided(X, noisy).x0, weak(X, noisy))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: guidance.rescaled(1.5), r"phi must lie in \[0, 1\], got 1.5"),
        (lambda d: guidance.adaptive_projected(norm_threshold=0.0), "inf for none"),
        (lambda d: guidance.adaptive_projected(momentum=-1.0), r"momentum must lie in \(-1, 1\)"),
        (lambda d: guidance.dynamic_threshold(d, largest=0.5), "largest must be at least 1"),
        (lambda d: guidance.clip(d, 1, -1), "low < high, got low=1 and high=-1"),
        (lambda d: guidance.interval(d, d, 2, 1), "low < high"),
        (lambda d: guidance.dynamic_threshold(d, 99.5), r"\(0, 1\], got 99.5"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(guidance.conditional(denoise, COND))
