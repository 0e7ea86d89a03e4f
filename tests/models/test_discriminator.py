import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion.models.discriminator import PatchDiscriminator


def reference(params, x, layers):
    """Isola et al.'s network in torch."""
    names = ["conv_in", *(f"convs_{k}" for k in range(layers)), "conv_out"]
    h = torch.from_numpy(np.moveaxis(x, -1, 1))
    for k, name in enumerate(names):
        kernel = torch.from_numpy(np.moveaxis(params[name]["kernel"], (2, 3), (1, 0)))
        bias = params[name].get("bias")
        bias = None if bias is None else torch.from_numpy(bias)
        h = torch.nn.functional.conv2d(h, kernel, bias, stride=2 if k < layers else 1, padding=1)
        if 0 < k < len(names) - 1:
            scale, shift = (
                torch.from_numpy(params[f"norms_{k - 1}"][n]) for n in ("scale", "bias")
            )
            h = torch.nn.functional.batch_norm(h, None, None, scale, shift, training=True)
        if k < len(names) - 1:
            h = torch.nn.functional.leaky_relu(h, 0.2)
    return np.moveaxis(h.numpy(), 1, -1)


def test_is_that_of_pix2pix():
    net = PatchDiscriminator(width=4, layers=2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 20, 3)).astype(np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    out = jax.jit(net.apply)({"params": params}, x)
    assert out.shape == (2, 2, 3, 1)
    wanted = reference(params, x, 2)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def test_published_size():
    """pix2pix's 70 x 70 discriminator of two images, on top of each other, of 256 pixels."""
    net = PatchDiscriminator()
    image = jax.ShapeDtypeStruct((1, 256, 256, 6), jnp.float32)
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), image)
    assert out.shape == (1, 30, 30, 1)
    assert sum(p.size for p in jax.tree.leaves(variables)) == 2_768_705


def test_with_group_norm_images_are_judged_alone():
    net = PatchDiscriminator(width=8, layers=1, norm="group")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(1), x)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    apply = jax.jit(net.apply)
    out, alone = apply(params, x), apply(params, np.stack([x[0], 0 * x[1], 5 * x[2]]))
    np.testing.assert_allclose(out[0], alone[0], rtol=1e-5)
    assert abs(out[1] - alone[1]).max() > 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "layer"}, "norm='layer'; expected 'batch'"),
        ({"layers": 0}, "layers=0"),
        ({"width": 12, "norm": "group"}, "multiple of 8"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(**fields)


def test_images_too_small():
    PatchDiscriminator(layers=2).check(12)
    with pytest.raises(ValueError, match="at least 24"):
        PatchDiscriminator(layers=3).check(16)
