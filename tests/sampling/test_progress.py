"""What is reported while a sampler runs, on one device and several, and that nothing is if off."""

from functools import partial

import jax
import numpy as np
import pytest

from diffusion import schedules
from diffusion.conditioning import Conditioning
from diffusion.sampling import grids, solvers
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.progress import Monitor
from diffusion.sampling.sample import image_keys, make_sampler, sample

SHAPE = (2, 2, 1)
MIXTURE = gaussian_mixture(np.linspace(-0.8, 0.8, 8).reshape(2, *SHAPE), [0.2, 0.1])
TABLE = solvers.ddpm(grids.uniform(schedules.cosine(), 4))


def denoiser(params):
    return lambda x, level, cond: MIXTURE(x, level) * params


def test_the_callback_sees_every_evaluation():
    seen = {}
    keys = image_keys(0, range(8))
    follow = jax.jit(
        partial(
            sample,
            MIXTURE,
            shape=SHAPE,
            trajectory=True,
            callback=lambda r, x0: seen.update({int(r): np.array(x0)}),
        )
    )
    _, path = follow(solver=TABLE, keys=keys)
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2, 3]
    for r, x0 in seen.items():
        np.testing.assert_array_equal(x0, path.x0[r])


def test_off_costs_nothing():
    """The compiled program calls nothing on the host; with a callback it does."""
    keys = image_keys(0, range(8))
    texts = [
        jax.jit(partial(sample, MIXTURE, shape=SHAPE, callback=callback))
        .lower(solver=TABLE, keys=keys)
        .compile()
        .as_text()
        for callback in (None, lambda r, x0: None)
    ]
    assert ["callback" in text for text in texts] == [False, True]


@pytest.mark.parametrize("devices", [1, 4])
def test_previews_are_whole_batches_in_order(devices, capsys):
    previews = {}

    def preview(batch, evaluation, x0):
        previews[batch, evaluation] = x0

    monitor = Monitor(devices, preview, every=2)
    draw = make_sampler(denoiser, SHAPE, devices=jax.local_devices()[:devices], callback=monitor)
    with monitor.watch(batches=2, evaluations=4):
        parts = [image_keys(3, range(start, start + 8)) for start in (0, 8)]
        x = np.concatenate([draw(1.0, TABLE, keys, Conditioning()) for keys in parts])
    assert sorted(previews) == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert "8/8" in capsys.readouterr().err
    # The last step goes to the estimate itself: the preview after it is the picture.
    np.testing.assert_allclose(np.concatenate([previews[0, 4], previews[1, 4]]), x, atol=1e-6)
    assert np.abs(previews[0, 2] - x[:8]).max() > 0.01


def test_a_monitor_without_previews_only_counts(capsys):
    monitor = Monitor(1)
    draw = make_sampler(denoiser, SHAPE, devices=jax.local_devices()[:1], callback=monitor)
    with monitor.watch(batches=1, evaluations=4, bar=False):
        draw(1.0, TABLE, image_keys(0, range(8)), Conditioning())
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="every must be >= 0, got -1"):
        Monitor(1, every=-1)
