import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.conditioning import Conditioning
from diffusion.models.dit import DiT, patchify, preset, stack_blocks, unpatchify, unstack_blocks
from diffusion.models.kernels.attention import attend
from diffusion.models.positions import rotary_2d, rotate, sincos_2d
from diffusion.models.transformer_layers import SelfAttention, layer_norm, rms_norm
from diffusion.training import flops

B, H, W, C, CLASSES = 2, 4, 6, 3, 5
SMALL = functools.partial(DiT, width=16, depth=1, heads=2, patch=2, num_classes=CLASSES)
MODERN = {
    "positions": "rotary",
    "norm": "rms",
    "mlp": "swiglu",
    "qk_norm": True,
    "learned_variance": True,
}
OPTIONS = {"plain": {}, "modern": MODERN}


def inputs(seed=0):
    x = jax.random.normal(jax.random.key(seed), (B, H, W, C))
    return x, jnp.array([10.0, 700.0]), Conditioning(label=jnp.array([0, 3]))


CONTEXT = jax.random.normal(jax.random.key(5), (B, 4, 7))
MASK = jnp.array([[True, True, False, False], [True, True, True, True]])
FULL = SMALL(**MODERN, depth=2, cross_attention=True, scan=True)


@functools.cache
def initial(net):
    x, time, cond = inputs()
    if net.cross_attention:
        cond = cond.replace(context=CONTEXT, context_mask=MASK)
    return jax.jit(net.init)(jax.random.key(0, impl="rbg"), x, time, cond)["params"]


def perturbed(net, cond=None):
    """Random parameters none of which is zero, as after some training."""
    x, time, default = inputs()
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, time, cond or default)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnames=("net", "train", "features"))
def apply(net, params, x, time, cond, key=None, train=False, features=()):
    rngs = None if key is None else {"dropout": key}
    return net.apply({"params": params}, x, time, cond, train=train, rngs=rngs, features=features)


# The original code's counts: sum(p.numel() for p in model.parameters()), at 256 pixels (latents
# 32 x 32 x 4), 1000 classes, learned sigma. They include the fixed positions, which are not ours.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("S/2", 32_963_360),
        ("B/2", 130_512_416),
        ("L/2", 458_102_816),
        ("XL/2", 675_129_632),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    net = DiT(**preset(name), num_classes=1000, learned_variance=True)
    cond = Conditioning(label=jnp.zeros((1,), jnp.int32))
    shapes = jax.eval_shape(
        net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.ones(1), cond
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count + sincos_2d(16, 16, net.width).size == published


def test_swiglu_and_qk_norm_keep_the_parameter_count():
    cond = Conditioning(label=jnp.zeros((1,), jnp.int32))

    def count(**fields):
        net = DiT(**preset("B/4"), num_classes=10, scan=True, **fields)
        x = jnp.zeros((1, 32, 32, 4))
        shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones(1), cond)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    plain = count()
    # Two thirds of 3072 in both halves of fc1: only the biases of fc1 grow, by 4096 - 3072.
    assert count(mlp="swiglu") == plain + 12 * 1024
    assert count(qk_norm=True) == plain + 12 * 2 * 64
    assert count(norm="rms", positions="rotary") == plain


def test_presets():
    assert preset("S/8") == {"width": 384, "depth": 12, "heads": 6, "patch": 8}
    assert preset("XL/2") == {"width": 1152, "depth": 28, "heads": 16, "patch": 2}
    with pytest.raises(ValueError, match=r"'XL/3'.*S/2.*XL/8"):
        preset("XL/3")


@pytest.mark.parametrize("net", [SMALL(), FULL], ids=["plain", "full"])
def test_output_at_initialisation_is_zero(net):
    x, time, cond = inputs()
    params = initial(net)
    output = apply(net, params, x, time, cond.replace(context=CONTEXT, context_mask=MASK))
    assert output.shape == (B, H, W, 2 * C if net.learned_variance else C)
    assert output.dtype == jnp.float32
    np.testing.assert_array_equal(output, 0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_initialisation_is_that_of_the_paper():
    params = initial(SMALL())
    assert params["y_embedder"]["embedding"].shape == (CLASSES + 1, 16)
    for leaf in (
        params["y_embedder"]["embedding"],
        params["t_embedder"]["linear_1"]["kernel"],
        params["t_embedder"]["linear_2"]["kernel"],
    ):
        assert 0.015 < leaf.std() < 0.025
    for leaf in (
        params["x_embedder"]["kernel"],
        params["blocks_0"]["attn"]["qkv"]["kernel"],
        params["blocks_0"]["mlp"]["fc2"]["kernel"],
    ):
        bound = np.sqrt(6 / sum(leaf.shape))  # xavier uniform
        assert 0.95 * bound < np.abs(leaf).max() <= bound
    np.testing.assert_array_equal(params["blocks_0"]["adaLN_modulation"]["kernel"], 0)
    np.testing.assert_array_equal(initial(FULL)["blocks"]["cross_attn"]["proj"]["kernel"], 0)


def test_scanned_layers_are_initialised_differently():
    kernel = initial(FULL)["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.shape[0] == FULL.depth
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_blocks_are_the_identity_at_initialisation():
    x, time, cond = inputs()
    net = SMALL()
    params = initial(net)
    _, (after,) = apply(net, params, x, time, cond, features=(1,))
    embedded = patchify(x, 2) @ params["x_embedder"]["kernel"] + sincos_2d(2, 3, 16)
    np.testing.assert_allclose(after.reshape(B, 6, 16), embedded, atol=1e-5)


def test_patchify_orders_tokens_by_rows_and_is_inverted():
    x = jax.random.normal(jax.random.key(0), (B, 4, 8, C))
    tokens = patchify(x, 2)
    assert tokens.shape == (B, 8, 12)
    np.testing.assert_array_equal(tokens[:, 5].reshape(B, 2, 2, C), x[:, 2:4, 2:4])
    np.testing.assert_array_equal(unpatchify(tokens, 2, 4, 8), x)


def test_sincos_positions():
    table = sincos_2d(3, 5, 16).reshape(3, 5, 4, 4)  # quarters: sin, cos of column, then of row
    frequencies = 10_000 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(table[1, 3, 0], np.sin(3 * frequencies), rtol=1e-6)
    np.testing.assert_allclose(table[1, 3, 1], np.cos(3 * frequencies), rtol=1e-6)
    np.testing.assert_allclose(table[1, 3, 2], np.sin(frequencies), rtol=1e-6)
    np.testing.assert_allclose(table[1, 3, 3], np.cos(frequencies), rtol=1e-6)
    flat = table.reshape(15, 16)
    assert len(np.unique(flat.round(4), axis=0)) == 15


def test_rotary_scores_depend_on_relative_positions_only():
    height, width, features = 5, 6, 8
    query, key = jax.random.normal(jax.random.key(0), (2, features))
    cos, sin = rotary_2d(height, width, features)

    def at_every_position(vector):
        return rotate(jnp.broadcast_to(vector, (1, height * width, 1, features)), cos, sin)[0, :, 0]

    scores = at_every_position(query) @ at_every_position(key).T
    scores = np.asarray(scores).reshape(height, width, height, width)
    by_offset = {}
    for i, j, k, m in np.ndindex(scores.shape):
        by_offset.setdefault((k - i, m - j), []).append(scores[i, j, k, m])
    assert all(np.ptp(group) < 1e-5 for group in by_offset.values())
    # Rows and columns both matter, and so does the sign of the offset.
    distinct = [by_offset[offset][0] for offset in ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))]
    assert len(np.unique(np.round(distinct, 4))) == 5
    np.testing.assert_allclose(by_offset[0, 0][0], query @ key, atol=1e-5)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_positions_break_permutation_equivariance(positions):
    """Exchanging two patches of the input does not merely exchange those of the output."""
    x, time, cond = inputs()
    net = SMALL(positions=positions)
    params = perturbed(net)

    def swap(image):
        return image.at[:, :2, :2].set(image[:, 2:, 4:]).at[:, 2:, 4:].set(image[:, :2, :2])

    a, b = apply(net, params, swap(x), time, cond), swap(apply(net, params, x, time, cond))
    assert np.abs(a - b).max() > 1e-2 * np.abs(b).max()


def test_without_position_information_tokens_are_exchangeable():
    """Attention and MLP treat tokens alike: constant tokens give equal outputs under rotation."""
    net = SMALL(positions="rotary")
    _, time, cond = inputs()
    out = apply(net, perturbed(net), jnp.ones((B, H, W, C)), time, cond)
    tokens = patchify(out, 2)
    np.testing.assert_allclose(tokens, jnp.broadcast_to(tokens[:, :1], tokens.shape), atol=1e-4)


def test_norms():
    x = 3 + 5 * jax.random.normal(jax.random.key(0), (7, 64))
    np.testing.assert_allclose(layer_norm(x).mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(layer_norm(x).std(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(rms_norm(x), x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_time_and_label_matter(options):
    x, time, cond = inputs()
    net = SMALL(**options)
    params = perturbed(net)
    out = apply(net, params, x, time, cond)
    other_time = apply(net, params, x, time.at[0].add(1.0), cond)
    other_label = apply(net, params, x, time, cond.replace(label=jnp.array([CLASSES, 3])))
    for other in (other_time, other_label):
        assert np.abs(other - out)[0].max() > 1e-3
        np.testing.assert_allclose(other[1], out[1], atol=1e-5)  # examples do not mix


def test_options_change_the_function():
    """Each option, with the parameters of the plain network, gives another output."""
    x, time, cond = inputs()
    params = perturbed(SMALL(qk_norm=True))
    plain = apply(SMALL(), params, x, time, cond)
    for fields in ({"positions": "rotary"}, {"norm": "rms"}, {"qk_norm": True}):
        assert np.abs(apply(SMALL(**fields), params, x, time, cond) - plain).max() > 1e-2


def test_learned_variance_doubles_the_channels():
    for learned, channels in ((False, C), (True, 2 * C)):
        net = SMALL(learned_variance=learned)
        output, _ = jax.eval_shape(net.init_with_output, jax.random.key(0), *inputs())
        assert output.shape == (B, H, W, channels)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scan_computes_what_unrolled_blocks_compute(options):
    x, time, cond = inputs()
    unrolled, scanned = (SMALL(**options, depth=2, scan=scan) for scan in (False, True))
    params = perturbed(unrolled)
    stacked = stack_blocks(params)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), x, time, cond)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), params)

    a, features_a = apply(unrolled, params, x, time, cond, features=(1, 2))
    b, features_b = apply(scanned, stacked, x, time, cond, features=(1, 2))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for feature_a, feature_b in zip(features_a, features_b):
        np.testing.assert_allclose(feature_a, feature_b, rtol=1e-4, atol=1e-4)


def test_remat_gives_the_same_gradients_unrolled_and_scanned():
    x, time, cond = inputs()

    def loss(params, net):
        return jnp.square(net.apply({"params": params}, x, time, cond) - 1).mean()

    plain, remat = SMALL(), SMALL(remat=True)
    scanned = SMALL(remat=True, scan=True, remat_keeps_products=True)
    params = perturbed(plain)
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    expected = grad(params, plain)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, grad(params, remat), expected)
    jax.tree.map(close, unstack_blocks(grad(stack_blocks(params), scanned)), expected)

    for net, tree in ((plain, params), (remat, params), (scanned, stack_blocks(params))):
        program = str(jax.make_jaxpr(loss, static_argnums=1)(tree, net))
        assert ("remat" in program) == net.remat


def test_remat_that_keeps_products_computes_only_attention_anew():
    def of_gradient(**options):
        net = SMALL(attention_implementation="xla", **options)
        x, time, cond = inputs()
        params = jax.eval_shape(net.init, jax.random.key(0), x, time, cond)
        return flops.count(jax.grad(lambda p: net.apply(p, x, time, cond).sum()), params)

    plain, all_anew = of_gradient(), of_gradient(remat=True)
    keeps = of_gradient(remat=True, remat_keeps_products=True)
    batch, height, width, _ = inputs()[0].shape
    tokens = height * width // SMALL().patch ** 2
    attention = 2 * 2 * batch * tokens**2 * SMALL().width * SMALL().depth
    assert plain < keeps == plain + attention < all_anew


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bfloat16_is_close_to_float32(options):
    x, time, cond = inputs()
    params = perturbed(SMALL(**options))
    exact = apply(SMALL(**options), params, x, time, cond)
    rounded = apply(SMALL(**options, dtype=jnp.bfloat16), params, x, time, cond)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < 0.02  # not zero, or bfloat16 was not used


def test_features_are_block_outputs_and_leave_the_output_alone():
    x, time, cond = inputs()
    deep, shallow = SMALL(depth=2), SMALL()
    params = perturbed(deep)
    out, (second, first) = apply(deep, params, x, time, cond, features=(2, 1))
    np.testing.assert_allclose(apply(deep, params, x, time, cond), out, atol=1e-5)
    assert first.shape == second.shape == (B, H // 2, W // 2, 16)
    assert np.abs(first - second).max() > 1e-2
    # The features after block 1 are the last features of a network cut there.
    kept = {name: value for name, value in params.items() if name != "blocks_1"}
    _, (last,) = apply(shallow, kept, x, time, cond, features=(1,))
    np.testing.assert_allclose(first, last, atol=1e-5)


def test_dropout_acts_in_training_only():
    x, time, cond = inputs()
    net = SMALL(dropout=0.5)
    params = perturbed(net)
    still = apply(net, params, x, time, cond)
    np.testing.assert_allclose(still, apply(SMALL(), params, x, time, cond), atol=1e-5)
    a, b = (
        apply(net, params, x, time, cond, key=jax.random.key(i, impl="rbg"), train=True)
        for i in range(2)
    )
    assert np.abs(a - b).max() > 1e-2 and np.abs(a - still).max() > 1e-2


def test_cross_attention_sees_the_unmasked_context():
    x, time, cond = inputs()
    cond = cond.replace(context=CONTEXT, context_mask=MASK)
    net = SMALL(cross_attention=True, qk_norm=True)
    params = perturbed(net, cond)
    out = apply(net, params, x, time, cond)
    hidden = apply(net, params, x, time, cond.replace(context=CONTEXT.at[:, 2:].add(1.0)))
    np.testing.assert_allclose(hidden[0], out[0], atol=1e-5)
    assert np.abs(hidden[1] - out[1]).max() > 1e-3


def test_pooled_and_image_conditioning():
    x, time, cond = inputs()
    cond = cond.replace(pooled=jnp.ones((B, 7)), image=jnp.ones((B, H, W, 2)))
    net = SMALL(pooled=True)
    params = perturbed(net, cond)
    out = apply(net, params, x, time, cond)
    assert out.shape == x.shape
    for changed in (cond.replace(pooled=-cond.pooled), cond.replace(image=-cond.image)):
        assert np.abs(apply(net, params, x, time, changed) - out).max() > 1e-3


def test_unconditional_network_ignores_labels():
    x, time, cond = inputs()
    net = SMALL(num_classes=0)
    params = perturbed(net)
    assert "y_embedder" not in params
    a, b = apply(net, params, x, time, cond), apply(net, params, x, time, Conditioning())
    np.testing.assert_array_equal(a, b)


def test_self_attention_splits_the_fused_kernel():
    """softmax(q k^T / sqrt(D)) v, where the fused kernel holds q, k, v and each its heads."""
    layer = SelfAttention(2, False, jnp.float32, None)
    rng = np.random.default_rng(0)
    x, qkv, proj = (
        rng.normal(size=shape).astype(np.float32) for shape in ((B, 5, 8), (8, 24), (8, 8))
    )
    p = {
        "qkv": {"kernel": qkv, "bias": np.zeros(24, np.float32)},
        "proj": {"kernel": proj, "bias": np.zeros(8, np.float32)},
    }
    q, k, v = (
        (x @ kernel).reshape(B, 5, 2, 4) for kernel in np.split(p["qkv"]["kernel"], 3, axis=1)
    )
    expected = attend(q, k, v).reshape(B, 5, 8) @ p["proj"]["kernel"]
    np.testing.assert_allclose(layer.apply({"params": p}, x, None), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 384, "heads": 5}, r"heads=5 must divide width=384; nearest: 4 or 6"),
        ({"width": 16, "heads": 99}, r"heads=99 .*nearest: 16"),
        ({"width": 24, "heads": 4, "positions": "rotary"}, r"rotary\); nearest: 3 or 6"),
        ({"width": 18}, r"width=18 .*nearest: 16 or 20"),
        ({"positions": "learned"}, r"positions='learned'.*sincos.*rotary"),
        ({"norm": "batch"}, r"norm='batch'.*layer.*rms"),
        ({"mlp": "relu"}, r"mlp='relu'.*gelu.*swiglu"),
        ({"depth": 0}, r"depth=0"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SMALL(**fields)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((B, 30, 28, C), r"30 x 28 .*patch=8; nearest: 32 x 32"),
        ((B, 3, 16, C), r"3 x 16 .*patch=8; nearest: 8 x 16"),
        ((B, 2), r"\[B, H, W, C\].*\(2, 2\)"),
    ],
)
def test_image_sizes_that_do_not_fit_are_named(shape, message):
    _, time, cond = inputs()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL(patch=8).init, jax.random.key(0), jnp.zeros(shape), time, cond)


def test_missing_conditioning_and_features_out_of_range_are_named():
    x, time, cond = inputs()

    def build(net, cond, **kwargs):
        init = functools.partial(net.init, **kwargs)
        jax.eval_shape(init, jax.random.key(0), x, time, cond)

    with pytest.raises(ValueError, match=r"cond\.label \[B\], with 5 for none"):
        build(SMALL(), Conditioning())
    with pytest.raises(ValueError, match=r"cond\.context"):
        build(SMALL(cross_attention=True), cond)
    with pytest.raises(ValueError, match=r"cond\.pooled"):
        build(SMALL(pooled=True), cond)
    with pytest.raises(ValueError, match=r"features=\(0, 3\).*1\.\.2"):
        build(SMALL(depth=2), cond, features=(0, 3))
    with pytest.raises(ValueError, match=r"features.*1\.\.2"):
        build(SMALL(depth=2), cond, features=(3,))
