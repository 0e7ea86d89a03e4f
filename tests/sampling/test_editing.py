"""Image to image, inpainting as a transform of a denoiser, interpolation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.denoiser import Estimate, Stateful, as_estimate
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids, solvers
from diffusion.sampling.editing import between, consistent, image_to_image, inpaint, noised, slerp
from diffusion.sampling.measurements import average_pool, repeat_pixels
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, image_noise, sample

FLOW, COSINE = schedules.RectifiedFlow(), schedules.cosine()
PRIOR = gaussian_mixture([[-0.6, 0.5, 0.0], [0.7, -0.2, 0.4]], [0.3, 0.2])
KNOWN, MASK = np.array([0.9, -0.4, np.nan]), np.array([1.0, 0.25, 0.0])
COUNT = 2000
KEYS = image_keys(0, range(COUNT))


def test_noised_is_the_forward_process_with_the_samplers_noise():
    table = solvers.ddim(grids.partial(grids.uniform(COSINE, 10), 0.6))
    x0 = np.random.default_rng(0).uniform(-1, 1, (5, 2, 3)).astype(np.float32)
    level = COSINE(0.6)
    keys = image_keys(4, range(5))
    x = noised(x0, table, keys)
    np.testing.assert_allclose(
        x, level.alpha * x0 + level.sigma * image_noise(keys, (2, 3)), rtol=1e-5, atol=1e-6
    )
    # An image's noise is its own, whatever it is drawn with.
    np.testing.assert_allclose(noised(x0[3:], table, keys[3:]), x[3:], rtol=1e-6)


def test_at_strength_1_from_pure_noise_the_picture_has_no_say():
    table = solvers.ddpm(grids.partial(grids.uniform(FLOW, 6), 1.0))
    keys = image_keys(0, range(4))
    x0 = np.full((4, 3), 0.8, np.float32)
    edited = jax.jit(partial(image_to_image, PRIOR))(table, keys, x0)
    drawn = jax.jit(partial(sample, PRIOR, shape=(3,)))(table, keys)
    np.testing.assert_allclose(edited, drawn, atol=1e-6)


def test_strength_is_how_far_from_the_picture():
    x0 = np.tile(np.float32([0.65, -0.25, 0.45]), (200, 1))
    edit = jax.jit(partial(image_to_image, PRIOR, keys=image_keys(0, range(200)), x0=x0))
    distances = []
    for strength, steps in [(0.2, 60), (0.6, 20), (0.95, 13)]:  # 12 evaluations each
        table = solvers.ddim(grids.partial(grids.uniform(COSINE, steps), strength))
        assert table.evaluations == 12
        distances.append(float(np.abs(edit(table) - x0).mean()))
    assert 0.02 < distances[0] < distances[1] < distances[2], distances


@partial(jax.jit, static_argnames="denoise")
def paint(table, denoise=PRIOR):
    x_init = noised(jnp.tile(jnp.asarray([KNOWN[0], 0, 0], jnp.float32), (COUNT, 1)), table, KEYS)
    inpainted = inpaint(denoise, KNOWN, MASK)
    return sample(inpainted, table, KEYS, (3,), x_init=x_init, trajectory=True)


GRID = grids.uniform(COSINE, 9)
EIGHTEEN = [  # evaluations each
    solvers.ddim(grids.uniform(COSINE, 18)),
    solvers.ddpm(grids.uniform(COSINE, 18)),
    solvers.ddpm_large(grids.uniform(COSINE, 18)),
    solvers.ddim(grids.uniform(FLOW, 18), eta=0.5),
    solvers.dpmpp_2m(grids.uniform(COSINE, 18)),
    solvers.dpmpp_2m_sde(grids.uniform(COSINE, 18)),
    solvers.unipc(grids.uniform(COSINE, 18)),
    solvers.consistency(grids.uniform(COSINE, 18), sigma_min=0.0),
    solvers.restart(grids.uniform(COSINE, 10), COSINE, "ddim", 0.3, 2.0, 2, 4),
    solvers.repaint(grids.uniform(COSINE, 10), COSINE, "ddpm", 4, 2),
]


@pytest.mark.parametrize("table", EIGHTEEN)
def test_what_is_known_follows_the_forward_process_and_returns(table):
    """x_t ~ N(alpha known, sigma^2) at each evaluation, whatever the solver; the end is exact."""
    assert table.evaluations == 18
    end, path = paint(table)
    assert np.isfinite(end).all()
    np.testing.assert_allclose(end[:, 0], KNOWN[0], atol=2e-6)
    level, x = table.level, np.asarray(path.x)[..., 0]
    error = np.abs(x.mean(1) - level.alpha * KNOWN[0]) / (level.sigma / np.sqrt(COUNT))
    if table is not EIGHTEEN[2]:  # the posterior is not what ddpm_large draws from
        assert error.max() < 5, error
        spread = np.abs(x.var(1) / level.sigma**2 - 1) / np.sqrt(2 / COUNT)
        assert spread.max() < 5, spread
    # The estimate: known, mixed, the model's own.
    own = np.asarray(PRIOR(path.x[7], NoiseLevel(*(leaf[7] for leaf in level))))
    np.testing.assert_allclose(path.x0[7, :, 0], KNOWN[0], atol=1e-6)
    np.testing.assert_allclose(path.x0[7, :, 1], 0.25 * KNOWN[1] + 0.75 * own[:, 1], atol=1e-4)
    np.testing.assert_allclose(path.x0[7, :, 2], own[:, 2], atol=1e-4)


def constant(x, level):
    return jnp.full_like(x, 0.3)


@pytest.mark.parametrize("table", EIGHTEEN)
def test_a_soft_mask_mixes_in_the_result(table):
    end, _ = paint(table, constant)
    mixed = 0.25 * KNOWN[1] + 0.75 * 0.3
    np.testing.assert_allclose(end, np.tile([KNOWN[0], mixed, 0.3], (COUNT, 1)), atol=2e-6)


def test_ddpm_noises_the_known_anew_and_ddim_keeps_its_noise():
    _, path = paint(EIGHTEEN[0])
    level = EIGHTEEN[0].level
    eps = (np.asarray(path.x)[..., 0] - level.alpha[:, None] * KNOWN[0]) / level.sigma[:, None]
    np.testing.assert_allclose(eps[-1], eps[0], atol=1e-3)
    _, path = paint(EIGHTEEN[1])
    eps = (np.asarray(path.x)[..., 0] - level.alpha[:, None] * KNOWN[0]) / level.sigma[:, None]
    assert abs(np.corrcoef(eps[0], eps[9])[0, 1]) < 0.3


def test_transforms_keep_the_estimates_other_fields_and_memory():
    x, level = jnp.ones((2, 3)), COSINE(0.5)

    def clipped(x, level):
        return Estimate(0.5 * x, 0 * x + 0.25, 2 * x)

    mask = np.array([1.0, 0.0, 0.0])
    result = inpaint(clipped, np.array([7.0, 0, 0]), mask)(x, level)
    np.testing.assert_array_equal(result.x0[0], [7, 0.5, 0.5])
    np.testing.assert_array_equal(result.unclipped[0], [7, 2, 2])
    np.testing.assert_array_equal(result.nu[0], [0, 0.25, 0.25])
    stateful = Stateful(lambda x: 0, lambda x, level, memory: (0.5 * x, memory + 1))
    result, memory = inpaint(stateful, np.ones(3), mask).step(x, level, 4)
    assert memory == 5 and result.x0[0, 0] == 1


def test_consistent_keeps_the_measurement_and_with_a_mask_is_inpainting():
    measure, inverse = partial(average_pool, factor=2), partial(repeat_pixels, factor=2)
    y = jnp.linspace(-1, 1, 8).reshape(2, 2, 2, 1)

    def shrink(x, level):
        return 0.5 * x

    table = solvers.ddpm(grids.uniform(COSINE, 4))
    keys, matched = image_keys(0, range(2)), consistent(shrink, y, measure, inverse)
    end = jax.jit(partial(sample, matched, shape=(4, 4, 1)))(table, keys)
    np.testing.assert_allclose(measure(end), y, atol=1e-6)
    assert np.abs(end - inverse(y)).max() > 0.1  # the rest is the model's
    x, level = jnp.ones((2, 3)), COSINE(0.5)
    mask = np.array([1.0, 0.0, 1.0])
    keep = partial(jnp.multiply, mask)
    known = np.array([0.2, 0.0, -0.3])
    masked = consistent(shrink, mask * known, keep, keep)(x, level).x0
    np.testing.assert_allclose(masked, as_estimate(inpaint(shrink, known, mask)(x, level)).x0)


def test_slerp_keeps_the_norm_and_moves_evenly():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    with jax.enable_x64(True):
        b = b * np.linalg.norm(a.reshape(3, -1), axis=1)[:, None, None]
        b = b / np.linalg.norm(b.reshape(3, -1), axis=1)[:, None, None]
        b = b * np.linalg.norm(a.reshape(3, -1), axis=1)[:, None, None]
        path = np.asarray(between(jnp.asarray(a), jnp.asarray(b), 5))
        np.testing.assert_allclose(path[[0, -1]], [a, b], atol=1e-12)
        flat = path.reshape(5, 3, -1)
        norms = np.linalg.norm(flat, axis=-1)
        np.testing.assert_allclose(norms, norms[:1].repeat(5, 0), rtol=1e-12)
        cosines = (flat[1:] * flat[:-1]).sum(-1) / norms[0] ** 2
        np.testing.assert_allclose(cosines, cosines[:1].repeat(4, 0), rtol=1e-10)
        # A weight per image; an image does not depend on the others.
        mixed = slerp(jnp.asarray(a), jnp.asarray(b), jnp.asarray([0.0, 0.25, 1.0]))
        np.testing.assert_allclose(mixed, [a[0], path[1, 1], b[2]], atol=1e-12)


def test_slerp_of_parallel_and_of_opposite_vectors_is_straight():
    a = np.float32([[3, 4]])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def at_a_quarter(a, b):
        mixed = slerp(a, b, 0.25)
        return mixed.sum(), mixed

    for b, expected in [(2 * a, 1.25 * a), (-a, 0.5 * a), (a, a), (a + np.float32([[1e-4, 0]]), a)]:
        (_, mixed), gradient = at_a_quarter(a, b)
        np.testing.assert_allclose(mixed, expected, rtol=1e-4)
        assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match="count must be at least 2"):
        between(a, a, 1)
