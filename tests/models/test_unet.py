"""The U-Net: published sizes, what enters it and where, precision, and its errors."""

import dataclasses
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.conditioning import Conditioning
from diffusion.models import unet
from diffusion.models.unet import UNet
from diffusion.models.unet_blocks import Downsample, average_pool, nearest_upsample
from diffusion.models.unet_encoder import Encoder

# These tests spend their time on compiling, not on computing.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KEY = jax.random.key(0, impl="unsafe_rbg")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes(net, channels, **cond):
    """Shapes of the parameters, without making them; ``cond`` gives shapes after the batch axis."""
    size = 2 ** (len(net.widths) - 1)
    if "image" in cond:
        cond["image"] = (size, size, cond["image"])
    arrays = {k: jnp.zeros((1, *s), int if k == "label" else float) for k, s in cond.items()}
    x = jnp.zeros((1, size, size, channels))
    init = jax.eval_shape(net.init, KEY, x, jnp.zeros(1), Conditioning(**arrays))
    return init["params"]


@pytest.mark.parametrize(
    ("net", "parameters"), [(unet.adm64(), 295_904_454), (unet.adm256(), 553_838_086)]
)
def test_presets_have_the_published_parameters(net, parameters):
    leaves = jax.tree.leaves(shapes(net, 3, label=()))
    assert sum(leaf.size for leaf in leaves) == parameters


def test_names_are_diffusers_keys():
    net = UNet((8, 16), 1, (0, 1), norm_groups=4)
    params = shapes(net, 3, context=(2, 5))
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)}
    assert paths >= {
        "conv_in/kernel",
        "time_embedding/linear_2/bias",
        "down_blocks_0/resnets_0/time_emb_proj/kernel",
        "down_blocks_0/downsamplers_0/conv/kernel",
        "down_blocks_1/resnets_0/conv_shortcut/kernel",
        "down_blocks_1/attentions_0/norm/scale",
        "down_blocks_1/attentions_0/transformer_blocks_0/attn1/to_out_0/bias",
        "down_blocks_1/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel",
        "mid_block/attentions_0/group_norm/scale",
        "mid_block/resnets_1/norm2/bias",
        "up_blocks_0/upsamplers_0/conv/kernel",
        "up_blocks_1/resnets_1/conv2/kernel",
        "conv_norm_out/scale",
        "conv_out/bias",
    }


BASE = {"widths": (8, 16), "blocks": 1, "attention": (0, "self"), "norm_groups": 4}
X, TIME, EMPTY = normal(2, 4, 4, 3), jnp.array([10.0, 700.0]), Conditioning()
FULL = UNet(
    (8,),
    1,
    1,
    "self",
    head_width=4,
    scale_shift=True,
    num_classes=2,
    added_embedding=True,
    time_id_width=4,
    guidance_width=8,
    dropout=0.5,
    norm_groups=4,
)
PLAIN = UNet((8,), 1, 0, "self", norm_groups=4)
TWO_LEVELS = UNet((8, 16), 1, 0, 0, norm_groups=4)
FULL_COND = Conditioning(
    label=jnp.array([0, 2]),
    context=normal(2, 3, 5, seed=1),
    context_mask=jnp.array([[True, True, False], [True, True, True]]),
    pooled=normal(2, 6, seed=2),
    time_ids=jnp.array([[8.0, 0.0], [4.0, 2.0]]),
    guidance=jnp.array([1.5, 8.0]),
    image=normal(2, 4, 4, 2, seed=3),
)


@cache
def random_params(net):
    """Parameters drawn without running the network; none is zero."""
    rng = np.random.default_rng(0)
    cond = FULL_COND if net.num_classes else EMPTY
    tree = jax.eval_shape(net.init, KEY, X, TIME, cond)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), tree)


@cache
def compiled(net):
    return jax.jit(net.apply, static_argnames="train", compiler_options=QUICK)


def full(x=X, time=TIME, **changes):
    return compiled(FULL)(random_params(FULL), x, time, FULL_COND.replace(**changes))


def difference(a, b):
    return float(jnp.abs(a - b).max())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"widths": (8, 8, 16), "attention": 0, "mid_attention": 0, "blocks": (1, 2, 3)},
        {"attention": ("self", 2), "num_heads": (2, 4)},
        {"asymmetric_downsampling": True, "linear_projection": True, "mid_attention": 2},
        {"resnet_resampling": True, "scale_shift": True, "time_width": 12, "out_channels": 6},
        {"dtype": jnp.bfloat16, "time_cos_first": False, "time_freq_shift": 1.0},
    ],
)
def test_output_has_the_shape_and_dtype_of_x(fields):
    cond = Conditioning(context=jnp.zeros((2, 3, 5)))
    x = jnp.zeros((2, 8, 12, 3))
    net = UNet(**{**BASE, **fields})
    out, variables = jax.eval_shape(net.init_with_output, KEY, x, TIME, cond)
    assert out.shape == (2, 8, 12, fields.get("out_channels", 3)) and out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_output_starts_at_zero_and_only_what_should():
    init = jax.jit(PLAIN.init_with_output, compiler_options=QUICK)
    out, params = init(KEY, X, TIME, EMPTY)
    np.testing.assert_array_equal(out, jnp.zeros_like(X))
    zeros = {
        path[-2].key
        for path, leaf in jax.tree.leaves_with_path(params)
        if path[-1].key == "kernel" and not leaf.any()
    }
    assert zeros == {"conv2", "to_out_0", "conv_out"}


def test_every_signal_matters():
    base = full()
    assert difference(full(x=X + 0.1), base) > 1e-3
    assert difference(full(time=TIME + 1), base) > 1e-3
    assert difference(full(label=jnp.array([1, 2])), base) > 1e-3
    for name in ("pooled", "time_ids", "guidance", "image"):
        assert difference(full(**{name: getattr(FULL_COND, name) + 1}), base) > 1e-3, name


def test_masked_tokens_do_not_matter():
    moved = full(context=FULL_COND.context.at[:, 2].add(5.0))
    np.testing.assert_array_equal(moved[0], full()[0])
    assert difference(moved[1], full()[1]) > 1e-4


def test_examples_do_not_see_each_other():
    moved = full(x=X.at[0].add(1.0))
    np.testing.assert_array_equal(moved[1], full()[1])


def test_gradients_reach_every_parameter_and_survive_recomputation():
    net = PLAIN.clone(mid_attention=1, dropout=0.5)
    cond, rngs = Conditioning(context=FULL_COND.context), {"dropout": KEY}
    shapes = jax.eval_shape(net.init, KEY, X, TIME, cond)
    params = jax.tree.map(lambda s: normal(*s.shape), shapes)

    def gradient(net):
        return jax.grad(lambda p: jnp.square(net.apply(p, X, TIME, cond, True, rngs=rngs)).mean())

    remat = net.clone(remat=True)
    assert "remat" not in str(jax.make_jaxpr(gradient(net))(params))
    assert "remat" in str(jax.make_jaxpr(gradient(remat))(params))
    expected = jax.jit(gradient(net), compiler_options=QUICK)(params)
    recomputed = jax.jit(gradient(remat), compiler_options=QUICK)(params)
    for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(recomputed)):
        assert a.any(), path
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * float(jnp.abs(a).max()) + 1e-6)


def test_dropout_only_when_training():
    first, second = (
        compiled(FULL)(random_params(FULL), X, TIME, FULL_COND, train=True, rngs={"dropout": key})
        for key in jax.random.split(KEY)
    )
    assert difference(first, second) > 1e-3
    full()  # without an rng, which dropout could not do without


def test_bfloat16_is_close_to_float32():
    half = compiled(FULL.clone(dtype=jnp.bfloat16))(random_params(FULL), X, TIME, FULL_COND)
    assert 0 < difference(half, full()) < 0.05 * float(jnp.abs(full()).max())


def test_time_scale_multiplies_time():
    def embed(net, time):
        return net.apply(random_params(PLAIN), time, EMPTY, method="embed")

    scaled = embed(PLAIN.clone(time_scale=4.0), TIME)
    np.testing.assert_allclose(scaled, embed(PLAIN, 4 * TIME), rtol=1e-6)
    assert difference(scaled, embed(PLAIN, TIME)) > 1e-3


def test_encoder_alone_runs_on_the_unets_parameters_and_control_reaches_every_feature():
    fields = {f.name: getattr(TWO_LEVELS, f.name) for f in dataclasses.fields(Encoder)}
    encoder = Encoder(**{k: v for k, v in fields.items() if k not in ("parent", "name")})
    params = random_params(TWO_LEVELS)

    @partial(jax.jit, compiler_options=QUICK)
    def encode(x):
        emb = encoder.apply(params, TIME, EMPTY, method="embed")
        features, mid = encoder.apply(params, x, emb, EMPTY, False, method="encode")
        return (*features, mid)

    net, here, there = compiled(TWO_LEVELS), encode(X), encode(X + 1)
    assert [f.shape[1:] for f in here] == [(4, 4, 8), (4, 4, 8), (2, 2, 8), (2, 2, 16), (2, 2, 16)]
    # Residuals that turn the features of one image into those of another turn its output, too.
    control = tuple(b - a for a, b in zip(here, there))
    out = net(params, X, TIME, EMPTY, control=control)
    none = tuple(jnp.zeros_like(c) for c in control)
    expected = net(params, X + 1, TIME, EMPTY, control=none)
    assert difference(expected, net(params, X, TIME, EMPTY, control=none)) > 1e-2
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_resampling():
    x = normal(1, 4, 6, 1)
    up = nearest_upsample(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(x, 2, 1), 2, 2))
    np.testing.assert_allclose(average_pool(up), x)
    # A kernel that picks its first pixel shows where the window starts.
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    params = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}
    np.testing.assert_array_equal(Downsample(asymmetric=True).apply(params, x), x[:, ::2, ::2])
    symmetric = Downsample().apply(params, x)
    np.testing.assert_array_equal(symmetric[:, 1:, 1:], x[:, 1:-1:2, 1:-1:2])
    assert not symmetric[:, 0].any() and not symmetric[:, :, 0].any()


def test_the_null_class_is_an_extra_row():
    for null_class, rows in ((True, 4), (False, 3)):
        params = shapes(UNet(**BASE, num_classes=3, null_class=null_class), 3, label=())
        assert params["class_embedding"]["embedding"].shape == (rows, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (8, 9)}, r"widths=\(8, 9\); expected even widths >= 2, one per level"),
        ({"widths": ()}, r"widths=\(\); expected even widths"),
        ({"attention": (0, 1, 0)}, r"attention=\(0, 1, 0\) has 3 entries; expected one value or 2"),
        ({"attention": (0, "cross")}, "'cross' is neither 0"),
        ({"blocks": (1, 0)}, "expected at least 1 ResNet block"),
        ({"norm_groups": 6}, r"norm_groups=6 does not divide .* nearest: 4"),
        ({"num_heads": 5}, "num_heads=5: 5 does not divide width 16 of level 1; nearest: 4"),
        ({"head_width": 12}, "head_width=12: 12 does not divide width 16 .* nearest: 8"),
        ({"num_heads": 2, "head_width": 4}, "give at most one"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"guidance_width": 7}, "guidance_width=7; expected an even number"),
        ({"dropout": 1.5}, "dropout=1.5; expected a rate"),
    ],
)
def test_fields_are_checked_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**BASE, **fields})


def test_image_size_is_checked():
    net = unet.ddpm_cifar10()
    net.check(32)
    net.check((8, 16))
    with pytest.raises(ValueError, match=r"image size 28 is not divisible by 8 .* nearest: 32"):
        net.check(28)


@pytest.mark.parametrize(
    ("net", "x", "time", "control", "message"),
    [
        (UNet(**{**BASE, "attention": (0, 1)}), X, TIME, None, r"cond\.context is None"),
        (UNet(**BASE, num_classes=2), X, TIME, None, r"cond\.label is None.* num_classes"),
        (UNet(**BASE, guidance_width=8), X, TIME, None, r"cond\.guidance is None"),
        (UNet(**BASE, added_embedding=True), X, TIME, None, r"cond\.pooled is None"),
        (
            UNet(**BASE, resnet_resampling=True),
            *(X[:, :3], TIME, None, "image size 3 is not divisible by 2"),
        ),
        (UNet(**BASE), X[:, :1], TIME, None, "image size 1 is too small for 2 widths"),
        (UNet(**BASE), X, TIME[:1], None, r"time has shape \(1,\); expected \(2,\)"),
        (UNet(**BASE), X, TIME, (X,), "control holds 1 residuals; expected 4 for the skip"),
    ],
)
def test_inputs_are_checked(net, x, time, control, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: net.init(KEY, x, time, EMPTY, False, control))


def test_a_conditioning_image_must_have_the_size_of_x():
    cond = Conditioning(image=jnp.zeros((2, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"cond\.image has shape \(2, 2, 2, 1\)"):
        jax.eval_shape(lambda: UNet(**BASE).init(KEY, X, TIME, cond))


def test_features_are_what_the_blocks_give():
    """1 and 2 are the levels' last ResNet or attention blocks, 3 is the mid block."""
    net = UNet(widths=(8, 16), blocks=2, attention=(0, "self"), norm_groups=4)
    x, time, given = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), {}
    variables = {"params": shapes(net, 3)}

    def note(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            given["/".join(context.module.path)] = out
        return out

    def check(variables):
        with nn.intercept_methods(note):
            out, found = net.apply(variables, x, time, Conditioning(), features=(3, 1, 2))
        names = ("mid_block", "down_blocks_0/resnets_1", "down_blocks_1/attentions_1")
        assert all(a is given[name] for a, name in zip(found, names, strict=True))
        return out, found

    out, found = jax.eval_shape(check, variables)
    assert out.shape == (2, 8, 8, 3)
    assert [f.shape for f in found] == [(2, 4, 4, 16), (2, 8, 8, 8), (2, 4, 4, 16)]
    with pytest.raises(ValueError, match=r"features=\(4,\) must be blocks 1\.\.3"):
        jax.eval_shape(lambda v: net.apply(v, x, time, Conditioning(), features=(4,)), variables)
