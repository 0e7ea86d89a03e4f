"""ControlNets: zero at the start, scales and intervals, and what is trained first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.adapters.controlnet import controlnet, skip_widths
from diffusion.conditioning import Conditioning, Hint
from diffusion.models.clip import ClipText
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet

FIELDS = dict(widths=(8, 16), blocks=1, attention=(1, 0), mid_attention=1, norm_groups=4)
UNET = UNet(**FIELDS, num_heads=2, out_channels=4)
TEXT = ClipText(vocab_size=11, width=8, depth=1, heads=2, hidden=8, length=5)
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(3, 8, 8, 4)), jnp.float32)
TIME = jnp.array([100.0, 500.0, 900.0])
HINT = jnp.asarray(rng.uniform(size=(3, 16, 16, 3)), jnp.float32)


def random(tree, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.normal(size=a.shape), jnp.float32), tree)


def shapes(net, cond):
    return jax.eval_shape(net.init, jax.random.key(0), X, TIME, cond)["params"]


@pytest.fixture(scope="module", params=["alone", "with text"])
def made(request):
    """(network, its random parameters, conditioning)."""
    if request.param == "alone":
        net, cond = UNET, Conditioning(context=jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32))
    else:
        net, cond = TextToImage(TEXT, UNET), Conditioning(tokens=jnp.ones((3, 5), jnp.int32))
    return net, random(shapes(net, cond)), cond


def test_a_new_net_changes_nothing_and_learns_at_its_zeros_first(made):
    net, base, cond = made
    adapter = controlnet((4, 8))
    whole = adapter.network(net)
    params = adapter.init(jax.random.key(1), base)
    cond_with = cond.replace(hints=(Hint(HINT),))
    expected = shapes(whole, cond_with)
    merged = adapter.merge(base, params)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, expected)
    out = jax.jit(net.apply)({"params": base}, X, TIME, cond)
    same = jax.jit(whole.apply)({"params": merged}, X, TIME, cond_with)
    np.testing.assert_array_equal(same, out)

    def loss(params):
        merged = adapter.merge(base, params)
        return (whole.apply({"params": merged}, X, TIME, cond_with) ** 2).mean()

    grads = jax.jit(jax.grad(loss))(params)
    moved = {name for name in grads if any(jnp.any(g != 0) for g in jax.tree.leaves(grads[name]))}
    zeros = {name for name in params if "_down_blocks_" in name or "_mid_block" in name}
    assert moved == zeros and len(zeros) == len(skip_widths(base.get("image", base))) + 1


def test_scales_and_intervals_by_example(made):
    net, base, cond = made
    adapter = controlnet((4, 8))
    whole, params = adapter.network(net), adapter.init(jax.random.key(1), base)
    variables = {"params": adapter.merge(base, random(params, 2))}

    run = jax.jit(whole.apply)

    def apply(*hints):
        return run(variables, X, TIME, cond.replace(hints=hints))

    out = jax.jit(net.apply)({"params": base}, X, TIME, cond)
    full = apply(Hint(HINT))
    assert float(jnp.abs(full - out).max()) > 1e-2
    scale = jnp.array([[0.0], [1.0], [0.0]])
    some = apply(Hint(HINT, scale=scale))
    np.testing.assert_array_equal(some[::2], out[::2])
    np.testing.assert_allclose(some[1], full[1], atol=1e-6)
    first, last = jnp.full(3, 400.0), jnp.full(3, 900.0)
    late = apply(Hint(HINT, first=first, last=last))
    np.testing.assert_array_equal(late[0], out[0])
    np.testing.assert_allclose(late[1:], full[1:], atol=1e-6)
    # A hint that is not finite and does not act leaves no trace.
    np.testing.assert_array_equal(apply(Hint(HINT * jnp.nan, scale=0 * scale)), out)
    with pytest.raises(ValueError, match="0 hints for 1"):
        apply()
    with pytest.raises(ValueError, match="2 scales for"):
        apply(Hint(HINT, scale=jnp.ones((3, 2))))
    with pytest.raises(ValueError, match="16 x 16 are expected"):
        apply(Hint(HINT[:, :8]))


def test_two_nets_add_up():
    from diffusion.models.controlled import Controlled

    cond = Conditioning(context=jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32))
    base = random(shapes(UNET, cond))
    adapter = controlnet((4, 8))
    net, other = (adapter.network(UNET).nets[0] for _ in range(2))
    one, two = (random(adapter.init(jax.random.key(i), base), i) for i in (1, 2))
    both = Controlled(network=UNET, nets=(net, other))
    hints = (Hint(HINT), Hint(1 - HINT, scale=jnp.full((3, 1), 0.5)))
    given = {"network": base, "nets_0": one, "nets_1": two}
    out = both.apply({"params": given}, X, TIME, cond.replace(hints=hints))
    residuals = [
        a + 0.5 * b
        for a, b in zip(
            net.apply({"params": one}, X, TIME, cond, HINT),
            net.apply({"params": two}, X, TIME, cond, 1 - HINT),
        )
    ]
    expected = UNET.apply({"params": base}, X, TIME, cond, control=residuals)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_only_for_u_nets():
    with pytest.raises(ValueError, match="a ControlNet is for a U-Net"):
        controlnet().network(TEXT)
    with pytest.raises(ValueError, match="positive widths"):
        controlnet(())
