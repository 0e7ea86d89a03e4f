"""config.sampler.acceleration: caches and merged tokens draw, impossible ones are refused."""

import dataclasses

import jax
import numpy as np
import pytest
from diffusion.modes.drawer import Drawer

from configs import digits
from diffusion.config import acceleration
from diffusion.config.experiment import build
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.unet import UNet
from diffusion.sampling import feature_cache
from diffusion.sampling.acceleration import Acceleration
from diffusion.sampling.feature_cache import every
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import flops

UNET = UNet(widths=(4, 8), blocks=1, norm_groups=2, attention=(0, "self"))
DIT = DiT(width=16, depth=4, heads=2, patch=2)


def small(**fields):
    c = digits.get_config()
    c.model.unet.update(widths=(4, 4), norm_groups=2, num_heads=2, attention=("self", 0))
    c.model.unet.mid_attention = 0
    c.sampler.steps, c.sampler.batch_size, c.sampler.guidance = 3, 2, "cfg(2), clip()"
    c.sampler.update(fields)
    return c


def drawer(**fields):
    """With random parameters, the same for all."""
    experiment = build(small(**fields))
    batch = {"x": np.zeros((1, 8, 8, 1), np.float32), "label": np.zeros(1, np.int32)}
    shapes = jax.eval_shape(experiment.objective.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
    return Drawer(experiment), params


def test_a_cache_draws():
    (plain, params), (cached, _) = drawer(), drawer(acceleration="cache(every(1))")
    full = plain.draw(params, 2)[0]
    np.testing.assert_allclose(cached.draw(params, 2)[0], full, atol=1e-5)
    # Data of the compiled sampler: another schedule is another config, but the same program.
    other = Acceleration(cache=every(3))
    made = dataclasses.replace(cached.experiment.guidance, acceleration=other)
    cached.experiment = dataclasses.replace(cached.experiment, guidance=made)
    assert np.abs(cached.draw(params, 2)[0] - full).max() > 1e-3


def cost(**fields):
    """Operations of a sampler that is traced, the costliest branch of each evaluation."""
    made, params = drawer(**fields)
    e = made.experiment
    weights = {"model": params, "acceleration": e.guidance.acceleration.at(e.solver.evaluations)}

    def run(weights, keys):
        networks, cond = e.guidance.networks(weights), made.conditioning(2)
        denoise = e.guidance.guide(networks, cond, e.guidance.chain)
        return sample(denoise, e.solver, keys, e.train.shape)

    return flops.count(run, weights, image_keys(0, np.arange(2)))


def test_combinations_are_traced():
    full, inside = cost(), "cfg(2), interval(low=0.1), clip()"
    both = "cache(every(2)), merge_tokens(0.5, at_least=64)"
    assert cost(acceleration=both, guidance=inside) < full
    remembering = "cfg(2), adaptive_projected(momentum=-0.5), interval(low=0.1), clip()"
    assert cost(acceleration="guidance_cache(every(2))", guidance=remembering) == full


def made(text, network=UNET):
    return acceleration.make(small(acceleration=text), {"": network}, 3)


def test_schedules_are_made_for_each_solver():
    """A sweep's have other numbers of evaluations than the config's."""
    assert list(made("cache(every(2))").at(5).cache) == [True, False, True, False, True]
    refreshes = made("guidance_cache(dense(2, center=0.3))").at(9).guidance
    np.testing.assert_array_equal(refreshes, feature_cache.dense(2, 0.3)(9))
    assert made("") == made(()) == Acceleration()
    assert made("cache(adaptive(0.1), keep=0)").at(7).cache == np.float32(0.1)
    with pytest.raises(ValueError, match=r"no evaluation 2"):
        made("cache(at((0, 2)))").at(2)


@pytest.mark.parametrize(
    "network, text, message",
    [
        (UNET, "cash(every(2))", "config.sampler.acceleration: unknown 'cash'.*mean 'cache'"),
        (UNET, "cache(often)", "config.sampler.acceleration: unknown 'often'.*adaptive, at, dense"),
        (UNET, "cache(every)", r"acceleration=?.*every\(n: .*missing a required argument: 'n'"),
        (UNET, "cache(every(0))", r"config.sampler.acceleration='cache\(every\(0\)\)': n must"),
        (UNET, "cache(2)", r"cache goes by a schedule, as in cache\(every\(3\)\), got 2"),
        (UNET, "cache(at((0, 7)))", "no evaluation 7"),
        (UNET, "cache(at(3))", "expected the numbers of evaluations"),
        (UNET, "cache(adaptive(-0.5))", "threshold must be >= 0"),
        (UNET, "cache(adaptive('a'))", "an option has a wrong type"),
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
        made(text, network)


def test_notes_and_correctors():
    text = "guidance_cache(every(2)), merge_tokens(0.5)"
    notes = build(small(acceleration=text, guidance="clip()")).notes
    assert any("64 tokens, at_least=1024" in note for note in notes)
    assert any("nothing is guided" in note for note in notes)
    with pytest.raises(ValueError, match=r"corrector.*cannot correct with"):
        build(small(solver="ddim", corrector="langevin", acceleration="cache(every(2))"))
