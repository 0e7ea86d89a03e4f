"""T2I-Adapters: where their features enter a U-Net, and what works around a controlled one."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.adapters.controlnet import controlnet
from diffusion.conditioning import Conditioning, Hint, ImagePrompt
from diffusion.models import reuse
from diffusion.models.controlled import Controlled
from diffusion.models.identity_maps import self_attention_paths, with_identity_maps
from diffusion.models.image_tokens import EmbeddingTokens
from diffusion.models.ip_adapter import ImagePrompted
from diffusion.models.t2i_adapter import full, full_xl, light
from diffusion.models.token_merging import with_merged_tokens
from diffusion.models.unet import UNet

UNET = UNet(widths=(8, 8), blocks=1, attention=(0, 1), mid_attention=1, norm_groups=4, num_heads=2)
ADAPTER = full_xl((8, 8, 8), blocks=1, factor=4).clone(halved=(False,) * 3)
WHOLE = Controlled(network=UNET, nets=(ADAPTER,))
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32)
TIME = jnp.array([100.0, 900.0])
COND = Conditioning(context=jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32))
IMAGE = jnp.asarray(rng.uniform(size=(2, 16, 16, 3)), jnp.float32)


def random(net, *args, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), jnp.float32), shapes)


@cache
def given():
    """Parameters of the U-Net and of the adapter."""
    return {"network": random(UNET, X, TIME, COND), "nets_0": random(ADAPTER, IMAGE, seed=1)}


def run(*hints):
    return WHOLE.apply({"params": given()}, X, TIME, COND.replace(hints=hints))


@cache
def base():
    return UNET.apply({"params": given()["network"]}, X, TIME, COND)


def test_squares_of_pixels_become_channels():
    """Channel c of pixel (i, j) of a square is the first convolution's input c r^2 + i r + j."""
    net = full((12,), blocks=1, factor=2)
    params = jax.tree.map(jnp.zeros_like, random(net, IMAGE))
    params["conv_in"]["kernel"] = params["conv_in"]["kernel"].at[1, 1].set(jnp.eye(12))
    (features,) = net.apply({"params": params}, IMAGE)
    for c, i, j in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1)):
        np.testing.assert_array_equal(features[..., 4 * c + 2 * i + j], IMAGE[:, i::2, j::2, c])


def test_halving_takes_means_and_a_last_odd_row_alone():
    net = full((3, 3), blocks=1, factor=1)
    image = jnp.arange(5.0)[None, :, None, None] * jnp.ones((1, 5, 2, 3))
    params = jax.tree.map(jnp.zeros_like, random(net, image))
    params["conv_in"]["kernel"] = params["conv_in"]["kernel"].at[1, 1].set(jnp.eye(3))
    _, coarse = net.apply({"params": params}, image)
    np.testing.assert_allclose(coarse[0, :, 0, 0], [0.5, 2.5, 4])


def test_where_features_are_added():
    """In a level with attention before its downsampling, in another after it; both to the skip."""
    net = UNET.clone(widths=(8, 8, 8), attention=(1, 0, 0))
    params = {"params": random(net, X, TIME, COND)}

    def encode(*extras):
        def method(module):
            emb = module.embed(TIME, COND)
            return module.encode(X, emb, COND, False, extras=extras)

        return net.apply(params, method=method)

    none, mid = encode()  # skips: conv_in; block, halving; block, halving; block
    sizes = (8, 2, 2, 2)
    extras = [jnp.ones((2, size, size, 8)) * (i + 1) for i, size in enumerate(sizes)]
    zeros = [jnp.zeros_like(e) for e in extras]
    first, _ = encode(extras[0], *zeros[1:])
    np.testing.assert_array_equal(first[0], none[0])
    np.testing.assert_allclose(first[1] - none[1], extras[0], atol=1e-5)
    assert float(jnp.abs(first[2] - none[2]).max()) > 0.1  # the next level sees it
    second, _ = encode(zeros[0], extras[1], *zeros[2:])
    np.testing.assert_array_equal(second[3], none[3])
    np.testing.assert_allclose(second[4] - none[4], extras[1], atol=1e-5)
    third, last = encode(*zeros[:2], extras[2], zeros[3])
    np.testing.assert_allclose(third[5] - none[5], extras[2], atol=1e-5)
    np.testing.assert_array_equal(third[4], none[4])
    assert float(jnp.abs(last - mid).max()) > 0.01
    fourth, last = encode(*zeros[:3], extras[3])
    for ours, before in zip(fourth, none):
        np.testing.assert_array_equal(ours, before)
    np.testing.assert_allclose(last - mid, extras[3], atol=1e-5)
    with pytest.raises(ValueError, match="2 features are to be added; expected one for each of th"):
        encode(*extras[:2])
    with pytest.raises(ValueError, match=r"shape \(2, 4, 4, 8\) are to be added to .*\(2, 8, 8, 8"):
        encode(jnp.zeros((2, 4, 4, 8)), *zeros[1:])


def test_scales_by_example_and_features_made_once():
    full_strength = run(Hint(IMAGE))
    assert float(jnp.abs(full_strength - base()).max()) > 1e-2
    features = ADAPTER.apply({"params": given()["nets_0"]}, IMAGE)
    np.testing.assert_allclose(run(Hint(features=features)), full_strength, atol=1e-6)
    one = run(Hint(IMAGE, scale=jnp.array([[0.0], [1.0]])))
    np.testing.assert_array_equal(one[0], base()[0])
    np.testing.assert_allclose(one[1], full_strength[1], atol=1e-6)
    # What is not finite and does not act leaves no trace.
    off = run(Hint(IMAGE * jnp.nan, scale=jnp.zeros((2, 1))))
    np.testing.assert_array_equal(off, base())
    late = run(Hint(IMAGE, first=jnp.full(2, 200.0), last=jnp.full(2, 999.0)))
    np.testing.assert_array_equal(late[0], base()[0])
    np.testing.assert_allclose(late[1], full_strength[1], atol=1e-6)
    halves = run(Hint(IMAGE, scale=jnp.tile(jnp.array([0.0, 0.0, 0.5]), (2, 1))))
    extras = [*[jnp.zeros((2, 4, 4, 8))] * 2, 0.5 * features[2]]
    expected = UNET.apply({"params": given()["network"]}, X, TIME, COND, control_levels=extras)
    np.testing.assert_allclose(halves, expected, atol=1e-5)


@cache
def with_controlnet():
    """A ControlNet and the adapter around the U-Net: (network, variables, conditioning)."""
    trained = controlnet((4, 8))
    net = trained.network(UNET).nets[0]
    whole = Controlled(network=UNET, nets=(net, ADAPTER))
    own = random(net, X, TIME, COND, IMAGE, seed=2)
    params = {"network": given()["network"], "nets_0": own, "nets_1": given()["nets_0"]}
    return whole, {"params": params}, COND.replace(hints=(Hint(IMAGE), Hint(1 - IMAGE)))


@pytest.mark.parametrize("keep", [0, 2])
def test_features_of_a_controlled_network_are_kept(keep):
    net, variables, cond = with_controlnet()
    expected = net.apply(variables, X, TIME, cond)
    got, features = reuse.record(net.apply, keep)(variables, X, TIME, cond)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    reuse.check(net, keep)
    again = reuse.reuse(net.apply, keep, features)(variables, X, TIME, cond)
    np.testing.assert_allclose(again, expected, atol=1e-5)
    other = reuse.reuse(net.apply, keep, features)(
        variables,
        X,
        TIME,
        cond.replace(hints=(Hint(IMAGE, scale=jnp.zeros((2, 1))), cond.hints[1])),
    )
    assert keep == 0 or float(jnp.abs(other - expected).max()) > 1e-3


def test_only_the_u_nets_maps_become_identities():
    net, variables, cond = with_controlnet()
    paths = self_attention_paths(net.apply, variables, X, TIME, cond)
    assert paths and all(path.startswith("network/") for path in paths)
    out = with_identity_maps(net.apply, "mid_block/")(variables, X, TIME, cond)
    residuals = net.nets[0].apply({"params": variables["params"]["nets_0"]}, X, TIME, COND, IMAGE)
    added = ADAPTER.apply({"params": given()["nets_0"]}, 1 - IMAGE)
    expected = with_identity_maps(UNET.apply, "mid_block/")(
        {"params": given()["network"]}, X, TIME, COND, control=residuals, control_levels=added
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert float(jnp.abs(out - net.apply(variables, X, TIME, cond)).max()) > 1e-4


def test_tokens_are_merged_within():
    net, variables, cond = with_controlnet()
    plain, merged = (
        with_merged_tokens(net.apply, ratio, least=4)(variables, X, TIME, cond)
        for ratio in (0, 0.5)
    )
    assert 1e-4 < float(jnp.abs(merged - plain).max()) < float(jnp.abs(plain).max())


def test_image_prompts_go_inside_or_outside():
    net, variables, cond = with_controlnet()
    own = variables["params"]
    cond = cond.replace(image_prompts=(ImagePrompt(tokens=COND.context[:, :2]),))
    maps = random(ImagePrompted(UNET, EmbeddingTokens(2, 8)), X, TIME, cond, seed=5)
    maps = {name: value for name, value in maps.items() if name != "network"}
    inside = net.clone(network=ImagePrompted(UNET, EmbeddingTokens(2, 8)))
    within = {**own, "network": {"network": own["network"], **maps}}
    outside = ImagePrompted(net, EmbeddingTokens(2, 8))
    first = inside.apply({"params": within}, X, TIME, cond)
    second = outside.apply({"params": {"network": own, **maps}}, X, TIME, cond)
    np.testing.assert_allclose(first, second, atol=1e-6)
    without = net.apply(variables, X, TIME, cond.replace(image_prompts=()))
    assert float(jnp.abs(first - without).max()) > 1e-3


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match=r"widths=\(8, 7\); expected multiples of 4"):
        light((8, 7))
    with pytest.raises(ValueError, match=r"halved=\(True,\) has 1 entries; expected 2"):
        full((8, 8)).clone(halved=(True,))
    with pytest.raises(ValueError, match="the hint has 4 channels; expected hint_channels=3"):
        jax.eval_shape(full((8,)).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match="the hint has 12 x 8 pixels; expected multiples of 8"):
        jax.eval_shape(full((8,)).init, jax.random.key(0), jnp.zeros((1, 12, 8, 3)))
    with pytest.raises(ValueError, match="1 hints for 2 nets"):
        net, variables, cond = with_controlnet()
        net.apply(variables, X, TIME, cond.replace(hints=cond.hints[:1]))
