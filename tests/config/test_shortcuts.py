"""Caching and token merging as config.sampler says them: they draw, impossible ones are refused."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from configs import digits
from diffusion.config import acceleration
from diffusion.config.experiment import build
from diffusion.models.dit import DiT
from diffusion.models.mlp import MLP
from diffusion.models.unet import UNet
from diffusion.modes.drawer import Drawer
from diffusion.sampling import feature_cache
from diffusion.sampling.acceleration import Shortcuts
from diffusion.sampling.feature_cache import every
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import flops

UNET = UNet(widths=(4, 8), blocks=1, norm_groups=2, attention=(0, "self"))
DIT = DiT(width=16, depth=4, heads=2, patch=2)


def small(**fields):
    c = digits.get_config()
    c.model.unet.update(widths=(4, 4), norm_groups=2, num_heads=2, attention=("self", 0))
    c.model.unet.mid_attention = 0
    c.sampler.steps, c.sampler.batch_size, c.sampler.guidance = 3, 2, 2.0
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
    (plain, params), (cached, _) = drawer(), drawer(cache="every(n=1)")
    full = plain.draw(params, 2)[0]
    np.testing.assert_allclose(cached.draw(params, 2)[0], full, atol=1e-5)
    # Data of the compiled sampler: another schedule is another config, but the same program.
    made = dataclasses.replace(cached.experiment.guidance, shortcuts=Shortcuts(partial(every, 3)))
    cached.experiment = dataclasses.replace(cached.experiment, guidance=made)
    assert np.abs(cached.draw(params, 2)[0] - full).max() > 1e-3


def cost(**fields):
    """Operations of a sampler that is traced, the costliest branch of each evaluation."""
    made, params = drawer(**fields)
    e = made.experiment
    weights = {"model": params, "when": e.guidance.shortcuts.data(e.solver.evaluations)}

    def run(weights, keys):
        denoise = e.guidance.guide(e.guidance.networks(weights), made.conditioning(2), 2.0)
        return sample(denoise, e.solver, keys, e.train.shape)

    return flops.count(run, weights, image_keys(0, np.arange(2)))


def test_combinations_are_traced():
    full = cost()
    assert cost(cache="every(n=2)", guidance_low=0.1, merge_tokens=0.5, merge_from=64) < full
    method = "adaptive_projected(momentum=-0.5)"
    assert cost(guidance_cache="every(n=2)", guidance_low=0.1, guidance_method=method) == full


def test_schedules_are_made_for_each_solver():
    """A sweep's have other numbers of evaluations than the config's."""
    made = acceleration.make(small(cache="every(n=2)"), {"": UNET}, 3)
    assert list(made.data(5)["cache"]) == [True, False, True, False, True]
    made = acceleration.make(small(guidance_cache="dense(n=2, center=0.3)"), {"": UNET}, 3)
    np.testing.assert_array_equal(made.data(9)["guidance"], feature_cache.dense(2, 9, 0.3))
    assert acceleration.make(small(), {"": UNET}, 3) == Shortcuts()
    made = acceleration.make(small(cache="at(rows=(0, 2))"), {"": UNET}, 3)
    with pytest.raises(ValueError, match=r"config.sampler.cache=.at.*no evaluation 2"):
        made.data(2)


@pytest.mark.parametrize(
    "network, fields, told",
    [
        (UNET, {"cache": "often"}, "config.sampler.cache: unknown 'often'"),
        (UNET, {"cache": "every"}, "cache='every': every needs n"),
        (UNET, {"cache": "every(n=0)"}, "config.sampler.cache='every.n=0.': n must"),
        (UNET, {"cache": "at(rows=(0, 7))"}, "no evaluation 7"),
        (UNET, {"cache": "at(rows=3)"}, "config.sampler.cache=.*wrong type"),
        (UNET, {"cache": "adaptive(threshold=-1)"}, "threshold must be >= 0"),
        (UNET, {"guidance_cache": "adaptive(threshold=1)"}, "guidance_cache: unknown 'adaptive'"),
        (UNET, {"cache": "every(n=2)", "guidance_cache": "every(n=2)"}, "no place beside"),
        (UNET, {"cache": "every(n=2)", "cache_keep": 9}, "cache_keep=9.*4 skip connections"),
        (DIT, {"cache": "every(n=2)", "cache_keep": 4}, "cache_keep=4.*3 blocks"),
        (MLP(), {"cache": "every(n=2)"}, "cache_keep=1.*only U-Nets and DiTs"),
        (DIT, {"merge_tokens": 0.5}, "merge_tokens=0.5 .*DiT"),
        (UNET, {"merge_tokens": 0.9}, r"merge_tokens=0.9 must lie in \[0, 0.75\]"),
    ],
)
def test_what_cannot_be(network, fields, told):
    with pytest.raises(ValueError, match=told):
        acceleration.make(small(**fields), {"": network}, 3)


def test_notes_and_correctors():
    notes = build(small(merge_tokens=0.5, guidance=1.0, guidance_cache="every(n=2)")).notes
    assert any("64 tokens, merge_from=1024" in note for note in notes)
    assert any("nothing is guided" in note for note in notes)
    with pytest.raises(ValueError, match=r"corrector.*cannot correct with"):
        build(small(solver="ddim", corrector="langevin", cache="every(n=2)"))
