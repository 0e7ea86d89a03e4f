"""config.sampler.acceleration: caches and merged tokens draw, impossible ones are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from diffusion import denoiser, predictions, schedules
from diffusion.conditioning import Conditioning
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.unet import UNet
from diffusion.pipelines import draw, guidance, samplers
from diffusion.pipelines.conditioners import Labels
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.pipeline import Pipeline
from diffusion.sampling import feature_cache
from diffusion.sampling.acceleration import Acceleration
from diffusion.sampling.feature_cache import every
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import flops

UNET = UNet(widths=(4, 8), blocks=1, norm_groups=2, attention=(0, "self"))
DIT = DiT(width=16, depth=4, heads=2, patch=2)
SMALL = UNet(
    widths=(4, 4),
    blocks=1,
    norm_groups=2,
    num_heads=2,
    attention=("self", 0),
    mid_attention=0,
    num_classes=10,
    out_channels=1,
)


def made(acceleration="", guided="cfg(2), clip()", network=UNET):
    """The sampler and the guidance of three steps of a network of digits."""
    model = schedules.cosine(), predictions.v, denoiser.ddpm_index, (8, 8, 1)
    pipeline = Pipeline("run", network, *model, conditioner=Labels(10))
    sampler = samplers.make(pipeline, steps=3)
    options = dict(accelerations=acceleration, at="config.sampler.")
    return sampler, guidance.make(pipeline, sampler, guided, **options)


def drawer(acceleration="", guided="cfg(2), clip()"):
    """With random parameters, the same for all."""
    sampler, found = made(acceleration, guided, SMALL)
    x, cond = np.zeros((1, 8, 8, 1), np.float32), Conditioning(label=np.zeros(1, np.int32))
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0), x, np.zeros(1, np.float32), cond)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
    options = dict(acceleration=found.acceleration, batch_size=2)
    return Drawer(found.pipeline, sampler, found.chain, **options), {"network": params["params"]}


def test_a_cache_draws():
    (plain, params), (cached, _) = drawer(), drawer("cache(every(1))")
    full = plain.draw(params, [0, 1])
    np.testing.assert_allclose(cached.draw(params, [0, 1]), full, atol=1e-5)
    # When to refresh is data of the compiled sampler: another schedule is the same program.
    cached = dataclasses.replace(cached, acceleration=Acceleration(cache=every(3)))
    assert np.abs(cached.draw(params, [0, 1]) - full).max() > 1e-3


def cost(acceleration="", guided="cfg(2), clip()"):
    """Operations of a sampler that is traced, the costliest branch of each evaluation."""
    made, params = drawer(acceleration, guided)
    program, solver = draw.program(made.pipeline, made.sampler), made.sampler.solver
    cond, null = made.conditioning(params, [0, 1])

    def run(weights, keys):
        denoise = program.guided(weights, cond, null, made.chain)
        return sample(denoise, solver, keys, made.pipeline.shape)

    weights = draw.weights(made.pipeline, params, solver, acceleration=made.acceleration)
    return flops.count(run, weights, image_keys(0, np.arange(2)))


def test_combinations_are_traced():
    full, inside = cost(), "cfg(2), interval(low=0.1), clip()"
    assert cost("cache(every(2)), merge_tokens(0.5, at_least=64)", inside) < full
    remembering = "cfg(2), adaptive_projected(momentum=-0.5), interval(low=0.1), clip()"
    assert cost("guidance_cache(every(2))", remembering) == full


def test_schedules_are_made_for_each_solver():
    """A sweep's have other numbers of evaluations than the config's."""

    def accelerated(text):
        return made(text)[1].acceleration

    assert list(accelerated("cache(every(2))").at(5).cache) == [True, False, True, False, True]
    refreshes = accelerated("guidance_cache(dense(2, center=0.3))").at(9).guidance
    np.testing.assert_array_equal(refreshes, feature_cache.dense(2, 0.3)(9))
    assert accelerated("") == accelerated(()) == Acceleration()
    assert accelerated("cache(adaptive(0.1), keep=0)").at(7).cache == np.float32(0.1)
    with pytest.raises(ValueError, match=r"no evaluation 2"):
        accelerated("cache(at((0, 2)))").at(2)


@pytest.mark.parametrize(
    "network, text, message",
    [
        (UNET, "cash(every(2))", "config.sampler.acceleration: unknown 'cash'.*mean 'cache'"),
        (UNET, "cache(often)", "config.sampler.acceleration: unknown 'often'.*adaptive, at, dense"),
        (UNET, "cache(every)", r"acceleration=?.*every\(n: .*missing a required argument: 'n'"),
        (UNET, "cache(every(0))", r"config.sampler.acceleration='cache\(every\(0\)\)': n must"),
        (UNET, "cache(2)", r"cache goes by a schedule, as in cache\(every\(3\)\), got 2"),
        (UNET, "cache(at((0, 7)))", "no evaluation 7"),
        (UNET, "cache(at(3))", "rows=3. has the wrong type; expected several, as in"),
        (UNET, "cache(adaptive(-0.5))", "threshold must be >= 0"),
        (UNET, "cache(adaptive('a'))", "threshold='a'. has the wrong type; expected float"),
        (UNET, "guidance_cache(adaptive(1))", "guidance_cache takes no threshold"),
        (UNET, "cache(every(2)), guidance_cache(every(2))", "no place beside"),
        (UNET, "cache(every(2)), cache(every(3))", "once at most"),
        (UNET, "cache(every(2), keep=9)", "keep=9.*4 skip connections"),
        (DIT, "cache(every(2), keep=4)", "keep=4.*3 blocks"),
        (MLP(), "cache(every(2))", "keep=1.*only U-Nets and DiTs"),
        (DIT, "merge_tokens(0.5)", "merge_tokens is for U-Nets; this is a DiT"),
        (UNET, "merge_tokens(0.9)", r"ratio must lie in \[0, 0.75\]"),
    ],
)
def test_what_cannot_be(network, text, message):
    with pytest.raises(ValueError, match=message):
        made(text, network=network)


def test_what_has_no_effect_is_noted():
    notes = made("guidance_cache(every(2)), merge_tokens(0.5)", "clip()", SMALL)[1].notes
    assert any("64 tokens, at_least=1024" in note for note in notes)
    assert any("nothing is guided" in note for note in notes)
