"""Caching: exact where everything is refreshed, called as often as said, and what is reused."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import predictions, schedules
from diffusion.conditioning import Conditioning, null_like
from diffusion.denoiser import denoiser, thousand_t
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.reuse import check, record, reuse
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.sampling import feature_cache, grids, guidance, solvers
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import flops

STEPS = 6
SCHEDULE = schedules.cosine()
SOLVER = solvers.dpmpp_2m(grids.uniform(SCHEDULE, STEPS))
COND = Conditioning(label=jnp.array([0, 1]))
NULL = null_like(COND, label=2)
SHAPE = (8, 8, 1)
X, TIME = jax.random.normal(jax.random.key(0), (2, *SHAPE)), jnp.array([0.1, 0.7])
FIELDS = {"widths": (4, 8), "blocks": 1, "norm_groups": 2, "num_classes": 2, "mid_attention": 0}
UNET = UNet(**FIELDS)
ADM = UNet(**FIELDS, attention=(0, "self"), resnet_resampling=True, remat=True)
DIT = DiT(width=16, depth=3, heads=2, patch=4, num_classes=2)


def params_of(module, *args):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), shapes)


PARAMS = {net: params_of(net, X, TIME, COND) for net in (UNET, ADM, DIT)}


def guided(net, params, scale=2.0, split=False):
    model = denoiser(partial(net.apply, params), predictions.v, thousand_t)
    return guidance.classifier_free(model, COND, NULL, scale, split=split)


@partial(jax.jit, static_argnums=(0, 1))
def draw(net, keep, params, when):
    denoise, keys = (
        feature_cache.cached(guided(net, params), when, keep),
        image_keys(0, np.arange(2)),
    )
    return sample(denoise, SOLVER, keys, SHAPE)


@pytest.mark.parametrize("net, keep, middle", [(UNET, 2, 0.02), (DIT, 1, 1.2)])
def test_refreshing_at_each_evaluation_is_the_full_sampler(net, keep, middle):
    run, before = partial(draw, net, keep, PARAMS[net]), draw._cache_size()
    full = jax.jit(lambda p: sample(guided(net, p), SOLVER, image_keys(0, np.arange(2)), SHAPE))
    full = full(PARAMS[net])
    np.testing.assert_allclose(run(np.ones(STEPS, bool)), full, atol=1e-5)
    np.testing.assert_allclose(run(np.float32(0)), full, atol=1e-5)
    once = run(feature_cache.every(STEPS)(STEPS))
    assert np.abs(once - full).max() > 1e-3
    # A threshold that nothing reaches is one refresh, one that little reaches some.
    np.testing.assert_allclose(run(np.float32(np.inf)), once, atol=1e-5)
    some = run(np.float32(middle))
    assert np.abs(some - once).max() > 1e-3 and np.abs(some - full).max() > 1e-3
    # Other schedules are other data of the same compiled function; so are other thresholds.
    assert draw._cache_size() == before + 2


@pytest.mark.parametrize("net, keeps", [(UNET, (4,)), (ADM, (2,)), (DIT, (0, 2))])
def test_features_of_the_same_input_give_the_same_output(net, keeps):
    """And other features another one."""

    @jax.jit
    def run(params, x):
        apply = partial(net.apply, params)
        found = []
        for keep in keeps:
            full, features = record(apply, keep)(x, TIME, COND)
            other = jax.tree.map(lambda a: -2 * a, features)
            found.append([full] + [reuse(apply, keep, f)(x, TIME, COND) for f in (features, other)])
        return found

    for full, same, other in run(PARAMS[net], X):
        np.testing.assert_allclose(same, full, atol=1e-5)
        assert np.abs(other - full).max() > 1e-2


def test_how_much_is_evaluated():
    """Counted as operations of what is traced: the deep part is not there."""

    def cost(net, keep):
        apply = partial(net.apply, PARAMS[net])
        features = jax.eval_shape(record(apply, keep), X, TIME, COND)[1]
        return flops.count(lambda f: reuse(apply, keep, f)(X, TIME, COND), features)

    for net in (UNET, DIT):
        full = flops.count(partial(net.apply, PARAMS[net]), X, TIME, COND)
        assert 0 == cost(net, 0) < cost(net, 1) < cost(net, 2) < full
    # Of three blocks, all alike, two are not evaluated.
    assert 2 * (full - cost(net, 2)) == full - cost(net, 1)


CALLS = []


class Scaled(nn.Module):
    """A network that notes when it is called for guidance."""

    def __call__(self, x, time, cond):
        if len(x) == 4:
            jax.debug.callback(lambda: CALLS.append(1), ordered=True)
        return 0.1 * x * cond.label.reshape(-1, 1, 1, 1)


def test_the_network_is_called_as_often_as_said():
    """Counted on the host, at each evaluation; within an interval with two memories, too."""
    model = denoiser(partial(Scaled().apply, {}), predictions.v, thousand_t)

    def counted(when, **interval):
        way = feature_cache.cached(guidance.classifier_free(model, COND, NULL, 2.0), when, 0)
        if interval:
            plain = feature_cache.cached(guidance.conditional(model, COND), when, 0)
            way = guidance.interval(way, plain, **interval)
        del CALLS[:]
        run = jax.jit(lambda keys: sample(way, SOLVER, keys, SHAPE))
        jax.block_until_ready(run(image_keys(0, np.arange(2))))
        jax.effects_barrier()
        return len(CALLS)

    assert counted(feature_cache.every(1)(STEPS)) == STEPS
    assert counted(feature_cache.every(4)(STEPS)) == 2
    assert counted(feature_cache.at((0, 1, 5))(STEPS)) == 3
    assert counted(np.float32(np.inf)) == 1
    # sigma / alpha falls to 1 after half of the evaluations: 0 and 2 lie before, 4 after.
    assert counted(feature_cache.every(2)(STEPS), low=1.1) == 2
    # The first one inside, number 3, is a refresh whatever the schedule says, as is number 4.
    assert counted(feature_cache.every(4)(STEPS), high=1.1) == 2


def test_an_image_does_not_depend_on_its_batch():
    @partial(jax.jit, static_argnums=0)
    def run(count, labels):
        cond = Conditioning(label=labels)
        model = denoiser(partial(Scaled().apply, {}), predictions.v, thousand_t)
        way = feature_cache.cached(
            guidance.conditional(model, cond), feature_cache.every(3)(STEPS), 0
        )
        return sample(way, SOLVER, image_keys(0, np.arange(count)), SHAPE)

    np.testing.assert_allclose(run(1, COND.label[:1])[0], run(2, COND.label)[0], atol=1e-5)


def test_reused_guidance():
    """The difference in the network's output stays; all at each evaluation is plain guidance."""

    def model(x, level, cond):
        a = jnp.where(cond.label < 2, 1.0, 0.2).reshape(-1, 1, 1, 1)
        return predictions.to_x0(predictions.v, level, x, a * jnp.ones_like(x))  # v = a

    @jax.jit
    def run(when):
        def way(**options):
            d = guidance.classifier_free(model, COND, NULL, 3.0, **options)
            return sample(d, SOLVER, image_keys(0, np.arange(2)), SHAPE)

        return way(), way(when=when, space=predictions.v), way(when=when)

    first = feature_cache.at(())(STEPS)
    full, in_v, in_x0 = run(first)
    np.testing.assert_allclose(in_v, full, atol=1e-5)  # v's difference never changes
    assert np.abs(in_x0 - full).max() > 1e-2
    full, in_v, in_x0 = run(np.ones(STEPS, bool))
    np.testing.assert_allclose(in_x0, full, atol=1e-5)


def test_schedules():
    assert list(np.flatnonzero(feature_cache.every(3)(8))) == [0, 3, 6]
    assert list(np.flatnonzero(feature_cache.at((5, 2))(8))) == [0, 2, 5]
    for n, evaluations, center in [(3, 20, 0.5), (1, 7, 0.3), (5, 50, 0.0), (2, 2, 1.0)]:
        refresh = feature_cache.dense(n, center)(evaluations)
        assert refresh.sum() == -(-evaluations // n) and refresh[0]
    gaps = np.diff(np.flatnonzero(feature_cache.dense(5, 0.5, 2.0)(100)))
    assert gaps[0] > gaps[len(gaps) // 2] < gaps[-1]
    for make in (
        lambda: feature_cache.every(0)(8),
        lambda: feature_cache.every(2.5)(8),
        lambda: feature_cache.dense(2, center=2),
        lambda: feature_cache.dense(2, power=np.inf),
        lambda: feature_cache.at((8,))(8),
        lambda: feature_cache.adaptive(-1.0),
    ):
        with pytest.raises(ValueError, match=r"must|expected"):
            make()


def test_what_cannot_be_kept():
    check(TextToImage(text=MLP(), image=UNET), 4)
    check(MLP(), 0)
    for network, keep, told in [
        (UNET, 5, "it has 4 skip connections"),
        (DIT, 3, "2 blocks before the last"),
        (DIT.clone(scan=True), 1, "scan"),
        (MLP(), 1, "only U-Nets and DiTs"),
        (UNET, -1, "keep=-1"),
    ]:
        with pytest.raises(ValueError, match=told):
            check(network, keep)
