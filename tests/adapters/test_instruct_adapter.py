"""A network with a wider first layer: its kernel by hand, and that it begins as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from diffusion.adapters.instruct import instruct, widened
from diffusion.conditioning import Conditioning
from diffusion.models.clip import ClipText
from diffusion.models.dit import DiT
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet

RNG = np.random.default_rng(0)
X, TIME = jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), jnp.float32), jnp.array([0.3, 0.5])
UNET = UNet(widths=(8,), attention=(1,), mid_attention=1, num_heads=2, norm_groups=4)
CASES = {
    "unet": (UNET.clone(attention=0, mid_attention=0), {}, Conditioning()),
    "dit": (DiT(width=8, depth=1, heads=2, patch=2), {"channels": 3}, Conditioning()),
    "text": (
        TextToImage(ClipText(vocab_size=9, length=4, width=8, depth=1, heads=2, hidden=16), UNET),
        {},
        Conditioning(tokens=jnp.array([[1, 2, 3, 8]] * 2)),
    ),
}


def randomised(tree):
    return jax.tree.map(lambda a: jnp.asarray(RNG.normal(0, 0.2, a.shape), jnp.float32), tree)


def test_kernels_are_widened_by_zeros_for_the_picture():
    kernel = RNG.normal(size=(3, 3, 2, 5)).astype(np.float32)
    wide = np.asarray(widened(kernel))
    assert wide.shape == (3, 3, 4, 5)
    np.testing.assert_array_equal(wide[:, :, :2], kernel)
    assert not wide[:, :, 2:].any()
    # A transformer's first layer reads patches, pixel by pixel.
    patches = RNG.normal(size=(4 * 3, 5)).astype(np.float32)
    wide = np.asarray(widened(patches, 3)).reshape(4, 6, 5)
    np.testing.assert_array_equal(wide[:, :3], patches.reshape(4, 3, 5))
    assert not wide[:, 3:].any()


@pytest.mark.parametrize("case", CASES)
def test_it_begins_as_the_base_and_then_sees_the_picture(case):
    base, options, cond = CASES[case]
    params = randomised(base.init(jax.random.key(0), X, TIME, cond)["params"])
    adapter = instruct(**options)
    network, own = adapter.network(base), adapter.init(jax.random.key(0), params)
    before = base.apply({"params": params}, X, TIME, cond)
    cond = cond.replace(image=jnp.asarray(RNG.normal(size=X.shape), jnp.float32))
    after = network.apply({"params": adapter.merge(params, own)}, X, TIME, cond)
    # Only the order differs in which the first layer's products are added.
    np.testing.assert_allclose(after, before, atol=3e-6)
    assert float(jnp.abs(before).max()) > 0.1

    def loss(own):
        return jnp.sum(network.apply({"params": adapter.merge(params, own)}, X, TIME, cond) ** 2)

    first = next(p for p in own if p.endswith(("conv_in/kernel", "x_embedder/kernel")))
    grads = jax.grad(loss)(own)
    grid = grads[first].reshape(-1, 6, grads[first].shape[-1])
    assert bool(jnp.all(jnp.any(grid[:, 3:] != 0, axis=-1)))
    flat = flatten_dict(params, sep="/")
    assert set(own) == {path for path in flat if not path.startswith("text/")}
    assert all(value.dtype == jnp.float32 for value in own.values())


def test_channels_that_a_network_knows_are_doubled():
    assert instruct().network(UNET.clone(in_channels=3)).in_channels == 6
    text = CASES["text"][0]
    text = text.clone(image=UNET.clone(in_channels=3))
    assert instruct().network(text).image.in_channels == 6


def test_mistakes():
    base, *_, cond = CASES["dit"]
    params = base.init(jax.random.key(0), X, TIME, cond)["params"]
    with pytest.raises(ValueError, match=r"patches of 12 numbers .* expected instruct\(channels=4"):
        instruct().init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="channels=5 must divide the 12 rows"):
        instruct(channels=5).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="no parameter has such a path"):
        instruct("nothing").init(
            jax.random.key(0), CASES["unet"][0].init(jax.random.key(0), X, TIME, cond)["params"]
        )
    with pytest.raises(ValueError, match="for a U-Net or a transformer; it has other"):
        instruct().init(jax.random.key(0), {"other": params})
