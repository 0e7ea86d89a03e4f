"""Chains of links: each is its equation, order means what is written, numbers compile nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import predictions, schedules
from diffusion.conditioning import Conditioning, null_like
from diffusion.denoiser import Stateful, as_estimate
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids, guidance, solvers
from diffusion.sampling.acceleration import accelerate, cache, guidance_cache
from diffusion.sampling.feature_cache import adaptive, every
from diffusion.sampling.guidance import chain as chains
from diffusion.sampling.guidance import links
from diffusion.sampling.guidance.chain import Branches, guide
from diffusion.sampling.guidance.links import cfg, clip, interval, rescale
from diffusion.sampling.sample import image_keys, make_sampler

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
COND = Conditioning(label=jnp.array([0, 1, 4]))
NULL, MIDDLE = null_like(COND, label=9), null_like(COND, label=7)
LEVEL = NoiseLevel(*map(jnp.float32, (0.5, 0.8, 0.6)))  # sigma / alpha = 0.75


def denoise(x, level, cond):
    return jnp.sin(x + 0.3 * cond.label.reshape(-1, 1, 1, 1))


def weak(x, level, cond):
    return 0.5 * jnp.cos(x)


def classify(x, level):
    return x.reshape(len(x), -1)[:, :10]


BRANCHES = Branches(
    denoise, COND, NULL, MIDDLE, predictions.v, {"weak": weak, "classifier": classify}
)
GOOD, BAD, PICTURE = (denoise(X, LEVEL, c) for c in (COND, NULL, MIDDLE))


def guided(*chain, branches=BRANCHES, level=LEVEL):
    return as_estimate(guide(chain, branches)(X, level)).x0


def combined(rule, scale):
    return guidance.classifier_free(denoise, COND, NULL, scale, rule=rule)(X, LEVEL).x0


def log_prob(x, level):
    log_p = jax.nn.log_softmax(classify(x, level))
    return log_p[jnp.arange(3), COND.label]


PLAIN = guidance.conditional(denoise, COND)
EQUATIONS = [
    ((), GOOD),
    ((cfg(1),), GOOD),
    ((cfg(3.0),), BAD + 3 * (GOOD - BAD)),
    ((cfg(3, split=True),), BAD + 3 * (GOOD - BAD)),
    (
        (cfg(np.array([1.0, 2.0, 5.0])),),
        BAD + np.array([1, 2, 5]).reshape(3, 1, 1, 1) * (GOOD - BAD),
    ),
    ((links.autoguidance("weak run", 2.0),), weak(X, LEVEL, COND) * -1 + 2 * GOOD),
    ((links.instruct(5.0, 1.5),), BAD + 1.5 * (PICTURE - BAD) + 5 * (GOOD - PICTURE)),
    ((cfg(6.0), rescale(0.4)), combined(guidance.rescaled(0.4, predictions.v), 6.0)),
    ((cfg(6.0), rescale(1.0, "eps")), combined(guidance.rescaled(1.0, predictions.eps), 6.0)),
    (
        (cfg(4.0), links.adaptive_projected(0.3, 2.0, 0.0)),
        combined(guidance.adaptive_projected(0.3, 2.0, 0.0), 4.0),
    ),
    (
        (links.classifier("run", 2.0),),
        guidance.classifier_guidance(PLAIN, log_prob, 2.0)(X, LEVEL).x0,
    ),
    ((cfg(9.0), clip(-0.5, 0.7)), np.clip(BAD + 9 * (GOOD - BAD), -0.5, 0.7)),
    (
        (links.dynamic_threshold(0.5, 1.2),),
        guidance.dynamic_threshold(PLAIN, 0.5, 1.2)(X, LEVEL).x0,
    ),
]


@pytest.mark.parametrize("chain, expected", EQUATIONS)
def test_links_are_their_equations(chain, expected):
    """Also with their numbers traced."""
    np.testing.assert_allclose(guided(*chain), expected, atol=1e-5)
    traced = jax.jit(lambda chain: as_estimate(guide(chain, BRANCHES)(X, LEVEL)).x0)(chain)
    np.testing.assert_allclose(traced, expected, atol=1e-5)


def test_without_a_null_the_model_is_alone():
    np.testing.assert_array_equal(guided(cfg(3.0), branches=BRANCHES._replace(null=None)), GOOD)


def test_scale_one_does_not_evaluate_the_null():
    seen = []

    def counting(x, level, cond):
        seen.append(len(x))
        return denoise(x, level, cond)

    for scale, batches in ((1, [3]), (1.0, [3]), (jnp.float32(1), [6])):
        seen.clear()
        guided(cfg(scale), branches=BRANCHES._replace(denoise=counting))
        assert seen == batches


def test_order_is_as_written():
    """An interval limits what stands before it: guidance alone, or the clipping too."""
    outside = (1.0, 5.0)
    np.testing.assert_array_equal(
        guided(cfg(3.0), interval(*outside), clip(-0.1, 0.1)), np.clip(GOOD, -0.1, 0.1)
    )
    np.testing.assert_array_equal(guided(cfg(3.0), clip(-0.1, 0.1), interval(*outside)), GOOD)
    inside = np.clip(BAD + 3 * (GOOD - BAD), -0.1, 0.1)
    for chain in ((interval(0.7, 0.8), clip(-0.1, 0.1)), (clip(-0.1, 0.1), interval(0.7, 0.8))):
        np.testing.assert_allclose(guided(cfg(3.0), *chain), inside, atol=1e-6)
    push = guided(links.classifier("run", 2.0)) - GOOD
    np.testing.assert_allclose(
        guided(clip(-0.1, 0.1), links.classifier("run", 2.0)),
        np.clip(GOOD, -0.1, 0.1) + push,
        atol=1e-6,
    )


def test_an_interval_without_end_holds_at_pure_noise():
    noise = NoiseLevel(*map(jnp.float32, (1.0, 0.0, 1.0)))
    for high in (np.inf, jnp.float32(np.inf)):
        np.testing.assert_allclose(
            guided(cfg(3.0), interval(0.5, high), level=noise),
            guided(cfg(3.0), level=noise),
            atol=1e-6,
        )
    np.testing.assert_array_equal(guided(cfg(3.0), interval(0.5, 80.0), level=noise), GOOD)


def test_numbers_per_image():
    """Each image has what it would have alone with its own numbers."""
    scales, lows = np.array([2.0, 3.0, 4.0]), np.array([0.0, 1.0, 0.5])
    etas, quantiles = np.array([0.0, 0.5, 1.0]), np.array([0.6, 0.9, 1.0])

    def chain(scale, low, eta, quantile):
        return (
            cfg(scale),
            links.adaptive_projected(eta, 2 + eta, 0.0),
            interval(low, low + 2),
            links.dynamic_threshold(quantile, 1 + quantile),
        )

    each = guided(*chain(scales, lows, etas, quantiles))
    for i, numbers in enumerate(zip(scales, lows, etas, quantiles)):
        alone = guided(*chain(*map(float, numbers)))
        np.testing.assert_allclose(each[i], alone[i], atol=1e-5)


def test_momentum_is_a_memory():
    links_of = {m: (cfg(3.0), links.adaptive_projected(momentum=m)) for m in (0.0, -0.5)}
    assert not isinstance(guide(links_of[0.0], BRANCHES), Stateful)
    assert isinstance(guide(links_of[-0.5], BRANCHES), Stateful)
    assert [link.remembers for link in links_of[0.0]] == [False, False]
    assert [link.remembers for link in links_of[-0.5]] == [False, True]


def test_other_numbers_compile_nothing():
    """Solver, grid, seed and every number of a chain and of a cache are arguments."""
    steps, traces = 4, []

    def through(weights):
        def traced(x, level, cond):
            traces.append(None)
            return denoise(x, level, cond)

        return traced, weights

    def make_guide(both, cond, chain):
        traced, acceleration = both
        null = null_like(cond, label=9)
        return guide(chain, Branches(traced, cond, null, acceleration=acceleration))

    draw = make_sampler(through, (4, 4, 2), make_guide)
    drawn, schedule = [], schedules.cosine()

    def run(*chain, seed=0, n=2, grid=grids.uniform, solver=solvers.ddim):
        keys = image_keys(seed, range(3))
        acceleration = accelerate(guidance_cache(every(n))).at(steps)
        drawn.append(draw(acceleration, solver(grid(schedule, steps)), keys, COND, chain))

    def chain(scale=3.0, phi=0.5, low=0.1, high=5.0, quantile=0.9, edge=1.0):
        return (
            cfg(scale),
            rescale(phi, "x0"),
            interval(low, high),
            links.dynamic_threshold(quantile, 2 * edge),
            clip(-edge, edge),
        )

    run(*chain())
    compiled = len(traces)
    for changed in (
        {"scale": 4},
        {"phi": 0.1},
        {"low": 0.5, "high": np.inf},
        {"quantile": 0.6},
        {"edge": 0.7},
    ):
        run(*chain(**changed))
    run(*chain(), seed=1)
    run(*chain(), n=1)
    run(*chain(), grid=grids.karras)
    run(*chain(), solver=solvers.dpmpp_2m)
    assert len(traces) == compiled
    for i, x in enumerate(drawn):
        assert all(np.abs(x - other).max() > 1e-4 for other in drawn[:i])
    run(cfg(3.0))
    assert len(traces) > compiled


def test_the_cache_of_the_guidance_skips_the_null():
    acceleration = accelerate(guidance_cache(every(4))).at(4)
    denoised = guide((cfg(3.0),), BRANCHES._replace(acceleration=acceleration))
    first, memory = denoised.step(X, LEVEL, denoised.init(X))
    np.testing.assert_allclose(first.x0, BAD + 3 * (GOOD - BAD), atol=1e-5)
    _, memory = denoised.step(X, LEVEL, memory)
    assert [int(count) for count in memory[1][:2]] == [2, 1]


def test_accelerations_that_mean_nothing():
    with pytest.raises(ValueError, match="cache reuses both of guidance's estimates"):
        accelerate(cache(every(2)), guidance_cache(every(2)))
    with pytest.raises(ValueError, match="each of cache, guidance_cache and merge_tokens once"):
        accelerate(cache(every(2)), cache(every(3)))
    with pytest.raises(ValueError, match="guidance_cache takes no threshold"):
        accelerate(guidance_cache(adaptive(0.1))).at(4)
    with pytest.raises(ValueError, match=r"cache goes by a schedule, as in cache\(every\(3\)\)"):
        cache(3)
    with pytest.raises(ValueError, match="instruct is evaluated whole"):
        caches = accelerate(guidance_cache(every(2))).at(4)
        guided(links.instruct(5.0, 1.5), branches=BRANCHES._replace(acceleration=caches))


ORDERS = [
    ((cfg(2), cfg(3)), "cfg stands in the chain more than once"),
    ((cfg(2), links.autoguidance("run", 2)), "each of cfg and autoguidance makes the two"),
    ((cfg(2), rescale(), links.adaptive_projected()), "each of rescale and adaptive_projected"),
    ((clip(), cfg(2)), "cfg guides the model itself: it stands before clip"),
    ((cfg(2), clip(), rescale()), "rescale says how two .*: it stands before clip"),
    (
        (cfg(2), links.perturbed_attention(1.0, "a"), rescale()),
        "rescale says how .*: it stands before perturbed_attention",
    ),
    ((rescale(),), r"rescale says how .* it follows cfg or autoguidance; cfg\(1\) is the model"),
    ((links.perturbed_attention(1.0),), "perturbed_attention adds .* it follows cfg"),
    ((links.instruct(2, 1), rescale()), "instruct makes three estimates"),
    ((interval(1, 2), clip()), "interval limits what stands before it, and nothing does"),
]


@pytest.mark.parametrize("chain, message", ORDERS)
def test_impossible_orders(chain, message):
    with pytest.raises(ValueError, match=message):
        chains.check(chain)


def test_links_without_what_they_need():
    for chain, lacking, message in [
        ((links.autoguidance("run", 2),), {"networks": {}}, "autoguidance needs another network"),
        ((links.instruct(2, 1),), {"middle": None}, "needs a model that edits a picture"),
        ((cfg(2), links.perturbed_attention(1.0)), {}, "looked up first, by resolve"),
    ]:
        with pytest.raises(ValueError, match=message):
            guide(chain, BRANCHES._replace(**lacking))


@pytest.mark.parametrize(
    "paths, blocks",
    [
        (["down_blocks_1/attentions_0/", "mid_block/attentions_0/"], "mid_block/"),
        (["text/layers_0/attn/", *(f"image/blocks_{i}/attn/" for i in range(5))], "blocks_2/"),
        (["blocks/attn/"], "blocks/"),
    ],
)
def test_the_middle_block(paths, blocks):
    link = links.resolve((links.perturbed_attention(1.0),), paths)[0]
    assert link.blocks == blocks
    with pytest.raises(ValueError, match=r"blocks='attic' names no self-attention .* it has "):
        links.resolve((links.perturbed_attention(1.0, "attic"),), paths)


NUMBERS = [
    (lambda: cfg("strong"), "scale must be a number, or an array of one per image, got 'strong'"),
    (lambda: cfg(True), "scale must be a number"),
    (lambda: cfg(np.ones((2, 2))), "scale must be a number"),
    (lambda: cfg(np.nan), "scale must be a finite number, got nan"),
    (lambda: rescale(1.5), r"phi must lie in \[0, 1\], got 1.5"),
    (lambda: rescale(np.array([0.5, 1.5])), r"phi must lie in \[0, 1\]"),
    (lambda: rescale(0.7, "epsilon"), "space: unknown 'epsilon'.*Did you mean 'eps'"),
    (lambda: links.adaptive_projected(momentum=-1), r"momentum must lie in \(-1, 1\)"),
    (lambda: links.adaptive_projected(norm_threshold=0), "inf for none"),
    (lambda: links.perturbed_attention(1.0, "mid_("), "no regular expression"),
    (lambda: links.classifier("", 1.0), "run must be the workdir of a run"),
    (lambda: interval(2, 1), "expected 0 <= low < high, got low=2.0 and high=1.0"),
    (lambda: clip(1, -1), "expected low < high"),
    (lambda: links.dynamic_threshold(99.5), r"quantile must lie in \(0, 1\]"),
]


@pytest.mark.parametrize("make, message", NUMBERS)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_space_that_says_nothing_at_pure_noise():
    levels = NoiseLevel(*np.float32([[1.0, 0.5], [0.0, 0.7], [1.0, 0.7]]))
    links.check_levels((rescale(0.7),), levels, predictions.v)
    for link, prediction in ((rescale(0.7, "eps"), predictions.v), (rescale(), predictions.eps)):
        with pytest.raises(ValueError, match="says nothing about x_0 at alpha = 0"):
            links.check_levels((link,), levels, prediction)
