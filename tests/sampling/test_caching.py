"""Caching: exact where everything is refreshed, called as often as said, and what is reused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import predictions, schedules
from diffusion.conditioning import Conditioning, null_like
from diffusion.denoiser import Stateful, denoiser, thousand_t
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.reuse import check, record, reuse
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.sampling import caching, grids, guidance, solvers
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import flops

STEPS = 6
SCHEDULE = schedules.cosine()
SOLVER = solvers.dpmpp_2m(grids.uniform(SCHEDULE, STEPS))
COND = Conditioning(label=jnp.array([0, 1]))
NULL = null_like(COND, label=2)
SHAPE = (8, 8, 1)
X, TIME = jax.random.normal(jax.random.key(0), (2, *SHAPE)), jnp.array([0.1, 0.7])
FIELDS = {"widths": (4, 8), "blocks": 1, "norm_groups": 2, "num_classes": 2, "attention": (0, "self")}
UNET = UNet(**FIELDS)
ADM = UNet(**FIELDS, resnet_resampling=True, remat=True)
DIT = DiT(width=16, depth=4, heads=2, patch=2, num_classes=2)
MLP_ = MLP(width=16, depth=2, num_classes=2)


def params_of(module, *args):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), shapes)


PARAMS = {net: params_of(net, X, TIME, COND) for net in (UNET, ADM, DIT)}


def guided(net, params, scale=2.0, split=False):
    model = denoiser(partial(net.apply, params), predictions.v, thousand_t)
    return guidance.classifier_free(model, COND, NULL, scale, split=split)


@partial(jax.jit, static_argnums=(0, 1))
def draw(net, keep, params, refresh, threshold):
    """Images in full, by a schedule, and adaptively."""
    denoise, keys = guided(net, params), image_keys(0, np.arange(2))
    ways = [
        denoise,
        caching.cached(denoise, refresh, keep),
        caching.adaptive(denoise, threshold, keep),
    ]
    return [sample(way, SOLVER, keys, SHAPE) for way in ways]


@pytest.mark.parametrize("net, keep", [(UNET, 1), (UNET, 3), (ADM, 2), (DIT, 1), (DIT, 0)])
def test_refreshing_at_each_evaluation_is_the_full_sampler(net, keep):
    full, cached, adaptive = draw(net, keep, PARAMS[net], np.ones(STEPS, bool), 0.0)
    np.testing.assert_allclose(cached, full, atol=1e-5)
    np.testing.assert_allclose(adaptive, full, atol=1e-5)
    # The same compiled function, with other data:
    refresh = caching.every(3, STEPS)
    same, cached, adaptive = draw(net, keep, PARAMS[net], refresh, np.inf)
    np.testing.assert_array_equal(same, full)
    assert np.abs(cached - full).max() > 1e-3 and np.abs(adaptive - full).max() > 1e-3
    # A threshold that nothing reaches is one refresh.
    once = draw(net, keep, PARAMS[net], caching.every(STEPS, STEPS), 0.0)[1]
    np.testing.assert_allclose(adaptive, once, atol=1e-5)


@pytest.mark.parametrize("net, most", [(UNET, 4), (ADM, 4), (DIT, 3)])
def test_features_of_the_same_input_give_the_same_output(net, most):
    """And those of another input another one, unless the deep part does not read it."""

    @jax.jit
    def run(params, x):
        apply = partial(net.apply, params)
        found = []
        for keep in (0, 2, most):
            full, features = record(apply, keep)(x, TIME, COND)
            other = jax.tree.map(lambda a: a + 1, features)
            found.append([full] + [reuse(apply, keep, f)(x, TIME, COND) for f in (features, other)])
        return found

    for full, same, other in run(PARAMS[net], X):
        np.testing.assert_allclose(same, full, atol=1e-5)
        assert np.abs(other - full).max() > 1e-2


def test_how_much_is_evaluated():
    """Counted as operations of what is traced: the deep part is not there."""
    for net in (UNET, ADM, DIT):
        apply = partial(net.apply, PARAMS[net])
        full = flops.count(apply, X, TIME, COND)
        cost = []
        for keep in range(4):
            features = jax.eval_shape(record(apply, keep), X, TIME, COND)[1]
            cost.append(
                flops.count(lambda f, k=keep, a=apply: reuse(a, k, f)(X, TIME, COND), features)
            )
        assert cost[0] == 0 and cost == sorted(cost) and cost[3] < full
    # DiT: of four blocks one is evaluated, besides embeddings and last layer.
    parts = [flops.count(partial(n.apply, params_of(n, X, TIME, COND)), X, TIME, COND)
             for n in (DIT, DIT.clone(depth=3))]  # fmt: skip
    assert cost[1] == full - 3 * (parts[0] - parts[1])


def calls(way, level=SOLVER.level):
    """Which evaluations asked the network: along a sampler, counted on the host."""
    noted = []

    def network(x, time, cond):
        jax.debug.callback(lambda t: noted.append(float(t)), time[0])
        return UNET.apply(PARAMS[UNET], x, time, cond)

    denoise = way(denoiser(network, predictions.v, thousand_t))
    run = jax.jit(lambda keys: sample(denoise, SOLVER, keys, SHAPE))
    jax.block_until_ready(run(image_keys(0, np.arange(2))))
    jax.effects_barrier()
    return [int(np.argmin(np.abs(1000 * level.t - t))) for t in noted]
