"""The engine's promises: one compilation, images that depend on their key alone, gradients."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import ALL

from diffusion import schedules
from diffusion.conditioning import Conditioning, null_like
from diffusion.denoiser import Estimate
from diffusion.sampling import grids, solvers
from diffusion.sampling.guidance import classifier_free
from diffusion.sampling.mixture import gaussian_mixture
from diffusion.sampling.sample import image_keys, make_sampler, sample
from diffusion.sampling.tables import REGISTERS
from diffusion.sharding import is_cut
from diffusion.training import parallel

SHAPE = (4, 4, 1)
MEANS = np.linspace(-0.8, 0.8, 32).reshape(2, *SHAPE)
MIXTURE = gaussian_mixture(MEANS, [0.2, 0.1])
GRID = grids.uniform(schedules.cosine(), 5)
FIVE_HEUN = solvers.heun(grids.uniform(schedules.RectifiedFlow(), 3))  # five evaluations too
run = jax.jit(lambda solver, keys: sample(MIXTURE, solver, keys, SHAPE))


def toy(params):
    """A conditional denoiser whose label moves the means; label 2 is null."""

    def denoise(x, level, cond):
        shift = jnp.where(cond.label == 2, 0.0, cond.label - 0.5).reshape(-1, 1, 1, 1)
        return MIXTURE(x, level) * params["scale"] + shift

    return denoise


def guide(denoise, cond, scale):
    return classifier_free(denoise, cond, null_like(cond, label=2), scale)


PARAMS = {"scale": jnp.float32(0.9)}
LABELS = np.arange(11, dtype=np.int32) % 2


def six_evaluations():
    """A table of six evaluations of every solver that can have as many."""
    schedule, tables = schedules.cosine(), {}
    for name, make in ALL.items():
        for steps in range(2, 8):
            table = make(grids.linspace(schedule, steps, clean=False), schedule)
            if table.evaluations == 6:
                tables[name] = table
    return tables


SIX_EVALUATIONS = six_evaluations()


def test_solvers_with_as_many_evaluations_compile_once():
    traces = []

    def denoise(x, level):
        traces.append(x)
        return MIXTURE(x, level)

    draw = jax.jit(lambda solver, keys: sample(denoise, solver, keys, SHAPE))
    keys = image_keys(0, range(2))
    tables = list(SIX_EVALUATIONS.values())
    assert len(tables) > 45
    draw(tables[0], keys)
    once = len(traces)
    images = [np.asarray(draw(table, keys)) for table in tables]
    assert len(traces) == once and draw._cache_size() == 1
    assert all(np.isfinite(i).all() for i in images)
    assert not np.allclose(images[0], images[-1], atol=1e-2)  # ddim and multistep consistency


def test_vmap_over_tables():
    tables = [solvers.ddim(GRID), solvers.ddpm(GRID), solvers.dpmpp_2m(GRID)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *tables)
    keys = image_keys(1, range(8))
    together = jax.vmap(run, in_axes=(0, None))(stacked, keys)
    for one, table in zip(together, tables):
        np.testing.assert_allclose(one, run(table, keys), atol=1e-5)


def test_gradient_through_the_table():
    """Against central differences, for every leaf; at float64."""
    with jax.enable_x64(True):
        table = jax.tree.map(jnp.asarray, solvers.ddpm(GRID))
        keys = image_keys(2, range(2))

        @jax.jit
        @jax.value_and_grad
        def loss(solver):
            return jnp.sum(sample(MIXTURE, solver, keys, SHAPE) ** 2)

        _, gradient = loss(table)
        rng = np.random.default_rng(0)
        # Where there is no noise, none is drawn, so its derivative there is 0 by definition.
        direction = jax.tree.map(lambda a: a * rng.standard_normal(a.shape), table)
        slope = sum(
            jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
        )

        def moved(h):
            return loss(jax.tree.map(lambda a, d: a + h * d, table, direction))[0]

        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert abs(numeric) > 1e-2
        np.testing.assert_allclose(slope, numeric, rtol=1e-6)


@pytest.mark.parametrize("table", [solvers.ddpm(GRID), FIVE_HEUN], ids=["ddpm", "heun"])
def test_an_image_is_the_same_in_any_batch(table):
    eight = np.asarray(run(table, image_keys(7, range(8))))
    for batch in [[5], [6, 0, 3]]:
        np.testing.assert_allclose(run(table, image_keys(7, batch)), eight[batch], atol=1e-5)
    assert np.abs(eight[0] - eight[1]).max() > 0.01


def only_noise(row=None):
    """A table that returns the noise of one row, or the initial noise, and nothing else."""
    table = jax.tree.map(np.copy, solvers.ddpm(GRID))
    table.A[:], table.b[:], table.noise[:], table.noise_upper[:] = np.eye(REGISTERS), 0, 0, 0
    if row is not None:
        table.A[row], table.noise[row], table.noise_upper[row] = 0, 1, 1
    return table._replace(init=np.float64(1))


def test_noise_is_the_same_to_the_bit_in_any_batch_and_used_once():
    drawn = []
    for row in [None, 0, 1, 2, 3, 4]:
        eight = np.asarray(run(only_noise(row), image_keys(7, range(8))))
        np.testing.assert_array_equal(run(only_noise(row), image_keys(7, [5])), eight[5:6])
        drawn.append(eight.ravel())
    assert len(np.unique(drawn)) == np.size(drawn)


def test_the_same_images_on_one_and_four_devices():
    assert len(jax.local_devices()) == 4
    table, keys = solvers.ddpm(GRID), image_keys(0, range(6))  # six images on four devices
    cond = Conditioning(label=LABELS[:6])
    scales = np.linspace(1, 3, 6)
    one = make_sampler(toy, SHAPE, guide, devices=jax.local_devices()[:1])
    four = make_sampler(toy, SHAPE, guide)
    images = four(PARAMS, table, keys, cond, scales)
    assert images.shape == (6, *SHAPE)
    np.testing.assert_allclose(one(PARAMS, table, keys, cond, scales), images, atol=1e-5)
    # Weights that lie on one device are brought to all.
    params = jax.device_put(PARAMS, jax.local_devices()[1])
    np.testing.assert_array_equal(four(params, table, keys, cond, scales), images)


def test_parameters_that_are_cut_over_the_devices_stay_so():
    net = nn.Dense(128)
    params = net.init(jax.random.key(0), jnp.zeros((1, 128)))

    def denoiser(params):
        return lambda x, level, cond: net.apply(params, x) * level.alpha

    table, keys, cond = solvers.ddpm(GRID), image_keys(0, range(6)), Conditioning()
    draw = make_sampler(denoiser, (128,))
    layout = parallel.make("fsdp", jax.local_devices())
    cut = parallel.place(layout, params)
    assert is_cut(cut["params"]["kernel"])
    with pytest.MonkeyPatch.context() as patch:  # what would gather them whole
        patch.setattr(jax, "shard_map", None)
        images = draw(cut, table, keys, cond)
    np.testing.assert_allclose(draw(params, table, keys, cond), images, rtol=1e-4, atol=1e-5)
    watched = make_sampler(denoiser, (128,), callback=lambda *_: None)
    np.testing.assert_allclose(watched(cut, table, keys, cond), images, rtol=1e-4, atol=1e-5)


def test_trajectory_and_x_init():
    keys = image_keys(0, range(8))
    x_init = run(only_noise(), keys)
    follow = jax.jit(partial(sample, MIXTURE, shape=SHAPE, trajectory=True))
    end, path = follow(solver=solvers.ddpm(GRID), keys=keys, x_init=x_init)
    assert path.x.shape == path.x0.shape == (5, 8, *SHAPE)
    np.testing.assert_array_equal(path.x[0], x_init)
    np.testing.assert_allclose(end, run(solvers.ddpm(GRID), keys), atol=1e-5)
    np.testing.assert_allclose(path.x0[-1], end, atol=1e-6)  # the last step goes to D
    level = jax.tree.map(lambda a: jnp.float32(a[3]), solvers.ddpm(GRID).level)
    np.testing.assert_allclose(MIXTURE(path.x[3], level), path.x0[3], atol=1e-5)


def test_memory_does_not_grow_with_steps():
    def memory(steps, trajectory):
        table = solvers.ddpm(grids.uniform(schedules.cosine(), steps))
        run = jax.jit(partial(sample, lambda x, level: x, shape=SHAPE, trajectory=trajectory))
        keys = image_keys(0, range(64))
        stats = run.lower(solver=table, keys=keys).compile().memory_analysis()
        return stats.temp_size_in_bytes + stats.output_size_in_bytes

    few, many = memory(20, False), memory(200, False)
    image = 64 * 16 * 4
    assert many - few < 180 * image / 2  # the table itself, in float32, has 63 numbers a row
    assert memory(200, True) - many > 200 * image


@jax.jit
def run_learned(nu, solver, keys):
    def denoise(x, level):
        return Estimate(MIXTURE(x, level), jnp.full_like(x, nu))

    return sample(denoise, solver, keys, SHAPE)


def test_learned_variances_interpolate_geometrically():
    keys, table = image_keys(0, range(8)), solvers.ddpm(GRID)
    middle = np.sqrt(table.noise * table.noise_upper)
    for nu, noise in [(0.0, table.noise), (0.5, middle), (1.0, table.noise_upper)]:
        fixed = table._replace(noise=noise, noise_upper=noise)
        np.testing.assert_allclose(run_learned(nu, table, keys), run(fixed, keys), atol=1e-5)
    for other in [solvers.ddim(GRID, eta=0.5), solvers.ddpm_large(GRID)]:  # theirs is not learned
        np.testing.assert_allclose(run_learned(0.7, other, keys), run(other, keys), atol=1e-5)


def test_learned_variances_have_finite_gradients():
    table = jax.tree.map(jnp.float32, solvers.ddpm(GRID))
    total = jax.jit(lambda nu, table: run_learned(nu, table, image_keys(0, range(8))).sum())
    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(0.4, table)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert abs(gradients[0]) > 0


def test_bfloat16_denoiser_keeps_float32_state():
    def half(x, level):
        return MIXTURE(x, level).astype(jnp.bfloat16)

    x = jax.eval_shape(lambda: sample(half, solvers.ddpm(GRID), image_keys(0, [0]), SHAPE))
    assert x.dtype == jnp.float32


@pytest.mark.parametrize(
    ("keys", "x_init", "message"),
    [
        (np.zeros((2, 2), np.uint32), None, "typed keys"),
        (image_keys(0, [0])[0], None, "typed keys"),
        (image_keys(0, [0]), jnp.zeros((2, *SHAPE)), r"x_init must have shape \(1, 4, 4, 1\)"),
    ],
)
def test_errors(keys, x_init, message):
    with pytest.raises(ValueError, match=message):
        sample(MIXTURE, solvers.ddim(GRID), keys, SHAPE, x_init=x_init)


@pytest.mark.parametrize(
    "estimate, name",
    [
        (lambda x: x[:1], "x0"),
        (lambda x: x[..., :1], "x0"),
        (lambda x: jnp.zeros(()), "x0"),
        (lambda x: x[None], "x0"),
        (lambda x: Estimate(x, nu=x[:, :1]), "nu"),
        (lambda x: Estimate(x, unclipped=x[:1]), "unclipped"),
    ],
)
def test_estimates_of_another_shape_are_not_broadcast(estimate, name):
    table = solvers.ddim(grids.uniform(schedules.cosine(), 3))
    with pytest.raises(ValueError, match=rf"its input, \(4, 2, 3\), got .* \({name}\)"):
        sample(lambda x, level: estimate(x), table, image_keys(0, range(4)), (2, 3))


def test_noises_of_another_shape_are_refused():
    table = solvers.ddim(grids.uniform(schedules.cosine(), 3))
    with pytest.raises(ValueError, match=r"noises must have shape \(4, 2, 3\), got \(2, 2, 3\)"):
        noises = np.zeros((2, 2, 3))
        sample(lambda x, level: x, table, image_keys(0, range(2)), (3,), noises=noises)
