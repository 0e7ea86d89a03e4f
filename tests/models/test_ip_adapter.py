"""The second attention map: its equation, where it acts, and that it can be left out."""

from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion.conditioning import Conditioning, Hint, ImagePrompt, concatenate
from diffusion.models.image_tokens import EmbeddingTokens
from diffusion.models.ip_adapter import (
    ImagePrompted,
    attentions,
    bicubic,
    cross_attentions,
    halved,
)
from diffusion.models.surroundings import Around, surrounded, surrounded_params
from diffusion.models.unet import UNet, sd15, sdxl

rng = np.random.default_rng(0)
FIELDS = dict(widths=(4, 8), attention=(0, 1), up_attention=(0, (1, 0)), blocks=1, norm_groups=2)
NET = UNet(**FIELDS, mid_blocks=0, num_heads=2, context_width=6)
SITES = cross_attentions(NET)
PROJECTION = EmbeddingTokens(3, 6)
AROUND = ImagePrompted(NET, PROJECTION)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


X, TIME = normal(2, 8, 6, 4), jnp.array([0.3, 0.8])
COND = Conditioning(context=normal(2, 5, 6))
TOKENS = normal(2, 3, 6)


def random_params(module, cond=COND):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), X, TIME, cond))["params"]
    return jax.tree.map(lambda s: normal(*s.shape) / max(s.shape[0], 4) ** 0.5, shapes)


def prompted(*prompts):
    return COND.replace(image_prompts=prompts)


PARAMS = random_params(AROUND, prompted(ImagePrompt(features=normal(2, 7))))


@partial(jax.jit, static_argnums=1)
def compiled(cond, module, params):
    return module.apply({"params": params}, X, TIME, cond)


def run(cond, module=AROUND, params=PARAMS):
    return compiled(cond, module, params)


def eager(cond, module=AROUND, params=PARAMS):
    return module.apply({"params": params}, X, TIME, cond)


def test_published_numbers_of_attentions():
    """Stable Diffusion 1: 1..31; SDXL: by block. Of their fields alone."""
    numbers = [n for n, site in enumerate(attentions(sd15())) if site.crosses]
    assert numbers == [*range(1, 32, 2)]
    blocks = {}
    for n, site in enumerate(attentions(sdxl())):
        if site.crosses:
            blocks.setdefault(site.block, []).append(n)
    ends = {block: (found[0], found[-1]) for block, found in blocks.items()}
    assert ends == {
        "down.block_1": (1, 7),
        "down.block_2": (9, 47),
        "up.block_0": (49, 107),
        "up.block_1": (109, 119),
        "mid": (121, 139),
    }


def test_sites_are_the_modules_there_are():
    net = UNet(
        **FIELDS | dict(attention=(("self",), 2), up_attention=None, blocks=(1, 2), mid_blocks=3)
    )
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), X, TIME, COND))["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    found = {p.removesuffix("/to_q/kernel"): w for p, w in flat.items() if "to_q/kernel" in p}
    sites = list(attentions(net))
    assert len(sites) == len(found)
    assert {s.path: net.widths[s.level] for s in sites} == {p: w.shape[1] for p, w in found.items()}


def test_equation():
    """Z = att(Q, K, V) + s att(Q, K', V'), in float64, at one attention with all others off."""
    site = 1
    scale = jnp.zeros((2, len(SITES))).at[:, site].set(jnp.array([0.7, -1.3]))
    seen = {}

    def note(call, args, kwargs, context):
        out = call(*args, **kwargs)
        path = "/".join(context.module.path) if context.method_name == "__call__" else ""
        if path.startswith(f"network/{SITES[site].path}/"):
            seen.setdefault(path.rsplit("/", 1)[1], []).append((args, out))
        return out

    with nn.intercept_methods(note):
        eager(prompted(ImagePrompt(TOKENS, scale=scale)))
    (q, k, v, *_), _ = seen["attend"][0]
    (z,), _ = seen["to_out_0"][0]

    def attention(q, k, v):
        q, k, v = (np.asarray(a, np.float64).transpose(0, 2, 1, 3) for a in (q, k, v))
        weights = np.exp(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
        out = weights / weights.sum(-1, keepdims=True) @ v
        return out.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)

    own = [np.asarray(TOKENS) @ PARAMS[f"to_{n}_ip_{site}"]["kernel"] for n in "kv"]
    own = [a.reshape(2, 3, 2, -1) for a in own]
    expected = attention(q, k, v) + np.array([0.7, -1.3])[:, None, None] * attention(q, *own)
    np.testing.assert_allclose(z, expected, atol=1e-5)


def test_without_prompts_and_at_scale_zero_the_network_is_itself():
    base = run(COND, NET, PARAMS["network"])
    np.testing.assert_array_equal(run(COND), base)
    zero = jnp.zeros((2, 1))
    np.testing.assert_array_equal(run(prompted(ImagePrompt(TOKENS, scale=zero))), base)
    assert np.abs(run(prompted(ImagePrompt(TOKENS))) - base).max() > 1e-2
    half = jnp.array([[0.0], [1.0]])  # of one example alone
    mixed = run(prompted(ImagePrompt(TOKENS, scale=half)))
    np.testing.assert_array_equal(mixed[0], base[0])
    assert np.abs(mixed[1] - base[1]).max() > 1e-2


def test_features_become_tokens():
    features = normal(2, 7)
    tokens = PROJECTION.apply({"params": PARAMS["projection"]}, features)
    expected = run(prompted(ImagePrompt(tokens)))
    np.testing.assert_allclose(run(prompted(ImagePrompt(features=features))), expected, atol=1e-5)
    with pytest.raises(ValueError, match="needs tokens"):
        run(prompted(ImagePrompt()))
    with pytest.raises(ValueError, match=r"shape \(2, 5\); expected \[B, 1\], or \[B, 2\]"):
        run(prompted(ImagePrompt(TOKENS, scale=jnp.ones((2, 5)))))


def test_two_adapters_add_up_and_do_not_see_each_other():
    """With equal weights and tokens, scales a and b are one adapter's a + b."""
    own = {name: value for name, value in PARAMS.items() if name != "network"}
    two, both = ImagePrompted(AROUND, PROJECTION), {"network": PARAMS, **own}
    scales = [jnp.full((2, 1), s) for s in (0.4, 0.9)]
    prompts = [ImagePrompt(TOKENS, scale=s) for s in scales]
    expected = run(prompted(ImagePrompt(TOKENS, scale=sum(scales))))
    np.testing.assert_allclose(run(prompted(*prompts), two, both), expected, atol=1e-5)
    alone = run(prompted(prompts[0]))
    silent = ImagePrompt(TOKENS, scale=jnp.zeros((2, 1)))
    np.testing.assert_array_equal(run(prompted(prompts[0], silent), two, both), alone)


def test_masks():
    """Of ones: nothing; of zeros: no prompt; one for each part of the tokens: apart."""
    ones = jnp.ones((2, 32, 24, 1))
    whole = run(prompted(ImagePrompt(TOKENS)))
    np.testing.assert_allclose(run(prompted(ImagePrompt(TOKENS, mask=ones))), whole, atol=1e-5)
    zeros = run(prompted(ImagePrompt(TOKENS, mask=0 * ones)))
    np.testing.assert_array_equal(zeros, run(COND))
    tokens, left = normal(2, 6, 6), ones.at[:, :, 12:].set(0)
    apart = ImagePrompt(tokens, mask=jnp.concatenate([left, 1 - left], -1))
    own = {name: value for name, value in PARAMS.items() if name != "network"}
    two, both = ImagePrompted(AROUND, PROJECTION), {"network": PARAMS, **own}
    first, second = (
        ImagePrompt(t, mask=m) for t, m in ((tokens[:, :3], left), (tokens[:, 3:], 1 - left))
    )
    expected = run(prompted(first, second), two, both)
    np.testing.assert_allclose(run(prompted(apart)), expected, atol=1e-5)


@pytest.mark.parametrize("old, new", [(32, 8), (7, 3), (5, 5), (3, 8)])
def test_bicubic_is_pytorchs(old, new):
    x = rng.standard_normal((old, old)).astype(np.float32)
    size = {"size": (new, new), "mode": "bicubic"}
    expected = torch.nn.functional.interpolate(torch.from_numpy(x)[None, None], **size)[0, 0]
    rows = bicubic(old, new)
    np.testing.assert_allclose(rows @ x @ rows.T, expected, atol=1e-5)
    assert halved((5, 8), 2) == (2, 2)


class Beside(Around):
    """A second U-Net beside the network, as a ControlNet is."""

    other: UNet

    def __call__(self, x, time, cond, train=False, control=None, features=()):
        return self.network(x, time, cond, train) + self.other(x, time, cond, train)


def test_inside_and_outside_of_others():
    """The same number, whether something stands around it or within; hints pass through."""
    own = {name: value for name, value in PARAMS.items() if name != "network"}

    class Plain(Around):
        def __call__(self, x, time, cond, train=False, control=None, features=()):
            options = {} if control is None else {"control": control}
            return self.network(x, time, cond, train, **options)

    cond = prompted(ImagePrompt(TOKENS)).replace(hints=(Hint(normal(2, 8, 6, 3)),))
    expected = run(cond)
    outside = Plain(AROUND)
    np.testing.assert_array_equal(run(cond, outside, {"network": PARAMS}), expected)
    inside = ImagePrompted(Plain(NET), PROJECTION)
    params = {"network": {"network": PARAMS["network"]}, **own}
    np.testing.assert_array_equal(run(cond, inside, params), expected)


def test_recomputed_and_differentiated():
    """Gradients reach keys, values and projection, through blocks that are recomputed as well."""
    cond = prompted(ImagePrompt(features=normal(2, 7)))

    def gradients(module):
        loss = jax.jit(jax.grad(lambda p: (run(cond, module, p) ** 2).mean()))
        return loss(PARAMS)

    plain = gradients(AROUND)
    again = gradients(ImagePrompted(NET.clone(remat=True), PROJECTION))
    for name in ("to_k_ip_0", "to_v_ip_1", "projection"):
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(plain[name])), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_batched_guidance_and_compilation():
    """Two conditionings at once; another scale, picture or mask is data of one program."""
    first, other = (
        prompted(ImagePrompt(normal(2, 3, 6), scale=normal(2, 1), mask=normal(2, 8, 6, 1)))
        for _ in range(2)
    )
    traced = []

    @jax.jit
    def apply(x, time, cond):
        traced.append(1)
        return AROUND.apply({"params": PARAMS}, x, time, cond)

    alone = [apply(X, TIME, cond) for cond in (first, other)]
    assert len(traced) == 1
    both = apply(*(jnp.concatenate([a, a]) for a in (X, TIME)), concatenate(first, other))
    np.testing.assert_allclose(both, jnp.concatenate(alone), atol=1e-5)


def test_networks_without_cross_attention_are_refused():
    for net, message in (
        (UNet(attention="self"), "UNet without any"),
        (PROJECTION, "EmbeddingTok"),
    ):
        with pytest.raises(ValueError, match=f"for U-Nets with cross-attention.*{message}"):
            cross_attentions(net)


def test_surrounded_params():
    own = {name: value for name, value in PARAMS.items() if name != "network"}
    made = surrounded(NET, lambda network: ImagePrompted(network, PROJECTION))
    params = surrounded_params(NET, PARAMS["network"], own)
    cond = prompted(ImagePrompt(TOKENS))
    np.testing.assert_array_equal(run(cond, made, params), run(cond))
