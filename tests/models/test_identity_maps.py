"""Perturbed attention's hook: which maps it replaces, and that it leaves everything else alone."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.models.attention import Attention, TransformerBlock
from diffusion.models.dit import DiT, stack_blocks
from diffusion.models.identity_maps import self_attention_paths, with_identity_maps
from diffusion.models.unet import UNet

rng = np.random.default_rng(0)
X, TIME = jnp.asarray(rng.standard_normal((2, 4, 4, 1)), jnp.float32), jnp.array([0.1, 0.7])
COND = Conditioning()


def params_of(module, *args):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes)


def outputs(module, params, *args, patterns=()):
    """Of one network as it is and with each pattern's maps replaced, compiled together."""

    def run(params, *args):
        changed = [with_identity_maps(module.apply, p)(params, *args) for p in patterns]
        return [module.apply(params, *args), *changed, module.apply(params, *args)]

    return jax.jit(run)(params, *args)


def test_identity_gives_every_token_its_own_value():
    x = X.reshape(2, 4, 4)
    module = Attention(2)
    params = params_of(module, x)
    plain, changed, after = outputs(module, params, x, patterns=[""])
    p = params["params"]
    own = x @ p["to_v"]["kernel"] @ p["to_out_0"]["kernel"] + p["to_out_0"]["bias"]
    np.testing.assert_allclose(changed, own, atol=1e-5)
    assert np.abs(plain - own).max() > 1e-2
    np.testing.assert_array_equal(after, plain)
    assert "attend" not in p
    one, same, _ = outputs(module, params, x[:, :1], patterns=[""])
    np.testing.assert_allclose(one, same, atol=1e-6)  # one token attends to itself anyway


def test_cross_attention_is_left_alone():
    x, context = X.reshape(2, 4, 4), jnp.ones((2, 3, 5)) * jnp.arange(3)[:, None]
    module = TransformerBlock(2)
    params = params_of(module, x, context)
    plain, second, first = outputs(module, params, x, context, patterns=["attn2", "attn1"])[:3]
    np.testing.assert_allclose(second, plain, atol=1e-6)
    assert np.abs(first - plain).max() > 1e-3
    assert self_attention_paths(module.apply, params, x, context) == ["attn1/"]
    only = TransformerBlock(2, only_cross_attention=True)
    assert self_attention_paths(only.apply, params_of(only, x, context), x, context) == []


def test_unet_blocks_are_chosen_by_path():
    """Recomputed or not: here some blocks are, and the interceptor reaches them all the same."""
    fields = {"widths": (4, 4), "blocks": 1, "attention": ("self", 0), "norm_groups": 2}
    net = UNet(**fields, remat=True)
    params = params_of(net, X, TIME, COND)
    expected = [
        *("down_blocks_0/attentions_0/", "mid_block/attentions_0/"),
        *("up_blocks_1/attentions_0/", "up_blocks_1/attentions_1/"),
    ]
    for same in (net, UNet(**fields)):
        assert self_attention_paths(same.apply, params, X, TIME, COND) == expected
    plain, mid = outputs(net, params, X, TIME, COND, patterns=["mid_block"])[:2]
    assert np.abs(mid - plain).max() > 1e-3


def test_dit_blocks_unrolled_and_scanned():
    fields = {"width": 16, "depth": 2, "heads": 2, "patch": 2}
    net, scanned = DiT(**fields), DiT(**fields, scan=True)
    params = params_of(net, X, TIME, COND)
    assert self_attention_paths(net.apply, params, X, TIME, COND) == [
        "blocks_0/attn/",
        "blocks_1/attn/",
    ]
    plain, last, both, none, _ = outputs(
        net, params, X, TIME, COND, patterns=["blocks_1/", "attn", "cellar"]
    )
    assert np.abs(last - plain).max() > 1e-3 and np.abs(both - last).max() > 1e-3
    np.testing.assert_array_equal(none, plain)
    stacked = {"params": stack_blocks(params["params"])}
    assert self_attention_paths(scanned.apply, stacked, X, TIME, COND) == ["blocks/attn/"]
    plain_, both_, _ = outputs(scanned, stacked, X, TIME, COND, patterns=["blocks"])
    np.testing.assert_allclose(plain_, plain, atol=1e-5)
    np.testing.assert_allclose(both_, both, atol=1e-5)
