"""Against diffusers' UNet2DModel and UNet2DConditionModel: outputs, names, shapes, configs."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from unet_cases import PUBLISHED, SMALL

from diffusion.conditioning import Conditioning
from diffusion.models import unet as presets
from diffusion.models.unet import UNet
from diffusion.pretrained.names import bind, from_tensors, to_tensors
from diffusion.pretrained.networks import unet

torch.set_num_threads(1)
KEY = jax.random.key(0, impl="unsafe_rbg")


def randomised(model):
    """Every parameter random, outputs of order one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise + float(parameter.data.mean() == 1)  # norms' weights
    return model.eval()


def shapes(net: UNet):
    return jax.eval_shape(net.init, KEY, *unet.example(net))["params"]


def theirs(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def inputs(net, size=(8, 8)):
    """Arguments of our network, and the same as keyword arguments of theirs; batch of two."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(2, *shape)).astype(np.float32)

    time, x = np.array([999.0, 3.5], np.float32), normal(*size, net.in_channels)
    channels = min(net.in_channels, 4)  # the others come as cond.image
    ours, other = {}, {}
    if net.attends_to_context:
        ours["context"] = other["encoder_hidden_states"] = normal(7, net.context_width)
    if net.num_classes is not None:
        ours["label"] = other["class_labels"] = np.array([1, 2])
    if net.guidance_width is not None:
        ours["guidance"] = np.array([1.0, 8.5], np.float32)
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        other["timestep_cond"] = embed(
            None, torch.tensor(ours["guidance"] - 1), embedding_dim=net.guidance_width
        ).numpy()
    if net.added_embedding:
        count = (net.added_width - 10) // net.time_id_width
        ours["pooled"], ours["time_ids"] = normal(10), 500 + 200 * normal(count)
        other["added_cond_kwargs"] = {
            "text_embeds": torch.tensor(ours["pooled"]),
            "time_ids": torch.tensor(ours["time_ids"]),
        }
    if net.in_channels > channels:
        ours["image"] = x[..., channels:]
    other = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in other.items()}
    other |= {"sample": torch.tensor(x).permute(0, 3, 1, 2), "timestep": torch.tensor(time)}
    cond = Conditioning(**jax.tree.map(jnp.asarray, ours))
    return (jnp.asarray(x[..., :channels]), jnp.asarray(time), cond), other


@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_those_of_diffusers(name):
    model = randomised(theirs(SMALL[name]))
    net = unet.from_config(model.config)
    params = from_tensors(unet.names(net), shapes(net), model.state_dict())
    args, other = inputs(net)
    # Not jitted: the cases share the compiled operations.
    ours = net.apply({"params": params}, *args)
    with torch.no_grad():
        expected = model(**other).sample.permute(0, 2, 3, 1)
    assert 0.3 < expected.std() < 10
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    # And back, into the network that they make of our config.
    again = theirs(unet.to_config(net))
    tensors = {k: torch.tensor(v) for k, v in to_tensors(unet.names(net), params)}
    again.load_state_dict(tensors)
    with torch.no_grad():
        same = again.eval()(**other).sample.permute(0, 2, 3, 1)
    np.testing.assert_array_equal(same, expected)
    assert unet.from_config(again.config) == net


@pytest.mark.parametrize("size", [(7, 9), (10, 13)])
def test_odd_sides_are_rounded_up_and_cut_off(size):
    model = randomised(theirs(SMALL["Stable Diffusion 1"]))
    net = unet.from_config(model.config)
    params = from_tensors(unet.names(net), shapes(net), model.state_dict())
    args, other = inputs(net, size)
    with torch.no_grad():
        expected = model(**other).sample.permute(0, 2, 3, 1)
    np.testing.assert_allclose(net.apply({"params": params}, *args), expected, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_the_published(name):
    config, parameters, tensors = PUBLISHED[name]
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in theirs(config).state_dict().items()}
    net = unet.from_config(config)
    matches = bind(unet.names(net), shapes(net))
    assert {key: s for m in matches for key, s in zip(m.theirs, m.shapes)} == expected
    assert sum(int(np.prod(shape)) for shape in expected.values()) == parameters
    assert tensors in (None, len(expected))


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        (presets.sd15(), "Stable Diffusion 1.5"),
        (presets.sd15(guidance_width=256), "latent consistency"),
        (presets.sd21(upcast_attention=True), "Stable Diffusion 2.1"),
        (presets.sdxl(), "SDXL"),
        (presets.sdxl_refiner(), "SDXL refiner"),
        (presets.x4_upscaler(), "x4 upscaler"),
        (presets.ddpm_cifar10(dropout=0.0), "DDPM, CIFAR-10"),
    ],
)
def test_presets_are_the_published_networks(preset, name):
    config, _, _ = PUBLISHED[name]
    net = unet.from_config(config)
    made_for = ("in_channels", "context_width", "added_width", "image_size")
    preset = preset.clone(**{field: getattr(net, field) for field in made_for})
    assert unet.to_config(preset) == unet.to_config(net)


def test_old_names_of_self_attention_are_read():
    net = unet.from_config(SMALL["DDPM"])
    params = jax.tree.map(lambda s: np.random.default_rng(0).normal(size=s.shape), shapes(net))
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in to_tensors(unet.names(net), params):
        for new, old in former.items():
            key = key.replace(f".{new}.", f".{old}.")
        tensors[key] = tensor
    assert "mid_block.attentions.0.proj_attn.weight" in tensors
    again = from_tensors(unet.names(net), shapes(net), tensors)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_bfloat16_parameters_give_what_float32_ones_do_nearly():
    net = unet.from_config(SMALL["Stable Diffusion 1"])
    rng = np.random.default_rng(0)
    params = {"params": jax.tree.map(lambda s: 0.2 * rng.normal(size=s.shape), shapes(net))}
    args, _ = inputs(net)
    expected = net.apply(params, *args)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    out = jax.jit(net.clone(dtype=jnp.bfloat16).apply)(half, *args)
    assert 0 < jnp.abs(out - expected).max() < 0.05 * jnp.abs(expected).max()


CONDITIONAL, OTHER = SMALL["Stable Diffusion 1"], SMALL["DDPM"]
REFUSED = [
    (CONDITIONAL, {"_class_name": "UNet3DConditionModel"}, "expected one of UNet2DModel"),
    (CONDITIONAL, {"norm_group": 8}, "norm_group=8: .* did you mean 'norm_num_groups'"),
    (CONDITIONAL, {"act_fn": "gelu"}, "act_fn='gelu': .* 'silu', 'swish'"),
    (CONDITIONAL, {"encoder_hid_dim": 768}, "encoder_hid_dim=768: .* supported with None"),
    (CONDITIONAL, {"class_embed_type": "projection"}, "class_embed_type='projection'"),
    (CONDITIONAL, {"num_attention_heads": 8}, "num_attention_heads=8"),
    (CONDITIONAL, {"addition_embed_type": "image"}, "addition_embed_type='image'"),
    (CONDITIONAL, {"addition_embed_type": "text_time"}, "addition_time_embed_dim=None"),
    (CONDITIONAL, {"cross_attention_dim": (4, 8)}, r"cross_attention_dim=\(4, 8\)"),
    (CONDITIONAL, {"up_block_types": ("UpBlock2D",) * 3}, "up_block_types=.*expected 2 entries"),
    (CONDITIONAL, {"transformer_layers_per_block": (1, 2, 3)}, "expected 2 entries"),
    (CONDITIONAL, {"transformer_layers_per_block": ((1, 1), 1)}, "reverse_transformer_layers"),
    (
        CONDITIONAL,
        {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")},
        "down_block_types: .* supports DownBlock2D, CrossAttnDownBlock2D, got 'Simple",
    ),
    (OTHER, {"cross_attention_dim": 5}, "cross_attention_dim=5: UNet2DModel has no such field"),
    (OTHER, {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
    (OTHER, {"attn_norm_num_groups": 4}, "attn_norm_num_groups=4: .* 8"),
    (OTHER, {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
    (OTHER, {"downsample_type": "resnet"}, "downsample_type='resnet'"),
    (OTHER, {"attention_head_dim": 5}, "head_width=5: 5 does not divide"),
]


@pytest.mark.parametrize(("config", "change", "message"), REFUSED)
def test_what_is_not_supported_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        unet.from_config({**config, **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels": None}, "in_channels=None: set it"),
        ({"context_width": None}, "context_width=None: set it"),
        ({"time_scale": 1000.0}, "time_scale=1000.0"),
        ({"attention": (1, "self")}, "no other self-attention"),
        ({"mid_attention": "self"}, "mid_attention='self'"),
        ({"resnet_resampling": True}, "resnet_resampling=True"),
        ({"attention": (1, 2), "mid_attention": 1}, "coarsest level's first block, 2"),
    ],
)
def test_networks_that_diffusers_does_not_have(fields, message):
    with pytest.raises(ValueError, match=message):
        unet.to_config(unet.from_config(CONDITIONAL).clone(**fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (8, 8, 5)}, "x and cond.image have 5 channels; expected in_channels=4"),
        ({"context": (7, 5)}, "cond.context have 5 channels; expected context_width=12"),
    ],
)
def test_inputs_of_other_widths_are_refused(change, message):
    net = unet.from_config(CONDITIONAL)
    sizes = {"x": (8, 8, 4), "context": (7, 12), **change}
    x, context = (jnp.zeros((1, *sizes[name])) for name in ("x", "context"))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, KEY, x, jnp.zeros(1), Conditioning(context=context))
