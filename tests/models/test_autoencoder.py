import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.autoencoder import AutoencoderKL, Gaussian

NET = AutoencoderKL(widths=(8, 8), blocks=1, norm_groups=4, dropout=0.3)


def test_gaussian():
    """The divergence and the sample's moments of a known normal distribution."""
    mean, std = 0.7, 0.4
    latents = Gaussian(jnp.full((2, 50, 50, 4), mean), jnp.full((2, 50, 50, 4), 2 * np.log(std)))
    divergence = 0.5 * (mean**2 + std**2 - 1) - np.log(std)
    np.testing.assert_allclose(latents.kl(), [10_000 * divergence] * 2, rtol=1e-4)
    z = latents.sample(jax.random.key(0))
    assert abs(z.mean() - mean) < 0.02 and abs(z.std() - std) < 0.02
    assert (latents.mode() == latents.mean).all()


def test_latents_are_shifted_and_scaled():
    """(z - shift) * factor as in SD 3, and (z - mean) * factor / std as in SDXL; and back."""
    z = jax.random.normal(jax.random.key(0), (1, 2, 2, 4))
    net = NET.clone(scaling_factor=1.5, shift_factor=0.1)
    np.testing.assert_allclose(net.to_latents(z), (z - 0.1) * 1.5, rtol=1e-5)
    mean, std = (0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0)
    net = NET.clone(scaling_factor=1.5, latents_mean=mean, latents_std=std)
    np.testing.assert_allclose(
        net.to_latents(z), (z - np.array(mean)) * 1.5 / np.array(std), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(net.from_latents(net.to_latents(z)), z, rtol=1e-5, atol=1e-6)


def random_params(net, x):
    shapes = jax.eval_shape(net.init, jax.random.key(1), x)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(np.float32), shapes)


def test_call_encodes_samples_and_decodes():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    params, key = random_params(NET, x), jax.random.key(3)

    def parts(params):
        latents = NET.apply(params, x, method=NET.encode)
        return NET.apply(params, latents.sample(key), method=NET.decode), latents

    wanted, latents = jax.jit(parts)(params)
    assert wanted.shape == x.shape and latents.mean.shape == (2, 2, 3, 4)
    out, _ = jax.jit(NET.clone(remat=True).apply)(params, x, key)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    rngs = {"dropout": jax.random.key(4)}
    dropped, _ = jax.jit(lambda p: NET.apply(p, x, key, train=True, rngs=rngs))(params)
    assert abs(dropped - wanted).max() > 1e-3


def test_log_variance_is_bounded():
    x = jnp.ones((1, 4, 4, 3))
    params = random_params(NET, x)
    params["params"]["quant_conv"]["bias"] = 1e3 * jnp.array([0, 0, 0, 0, 1, 1, -1, -1])
    latents = jax.jit(lambda p: NET.apply(p, x, method=NET.encode))(params)
    assert latents.log_variance.max() == 20 and latents.log_variance.min() == -30


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"widths": ()}, "widths"),
        ({"norm_groups": 3}, "norm_groups=3 .* nearest: [24]"),
        ({"attention": (True,)}, "attention=.* expected 2"),
        ({"latents_std": (1.0,)}, "latents_std=.* expected 4"),
        ({"scaling_factor": 0.0}, "scaling_factor=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"dropout": 1.0}, "dropout=1"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        NET.clone(**fields)


def test_image_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"image size 7 is not divisible by 2 .*nearest: 8"):
        jax.eval_shape(NET.init, jax.random.key(0), jnp.ones((1, 6, 7, 3)))
