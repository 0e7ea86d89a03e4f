"""ControlNets and T2I-Adapters against diffusers: outputs, sums, files in every naming."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from unet_cases import CROSS, PLAIN, SD1, SD2, SDXL, SMALL, blocks

from diffusion.conditioning import Conditioning, Hint
from diffusion.models.controlled import Controlled, check_fit
from diffusion.models.controlnet import controlnet_of
from diffusion.models.t2i_adapter import T2IAdapter, full, full_xl, light
from diffusion.pretrained import files, models, weights
from diffusion.pretrained.networks import controlnet, t2i_adapter, unet
from diffusion.pretrained.single_file import control

NOT_SHARED = ("up_block_types", "sample_size", "dual_cross_attention", "dropout")


def of(config, **fields):
    """The config of a ControlNet for a U-Net's."""
    shared = {name: value for name, value in config.items() if name not in NOT_SHARED}
    return shared | {"_class_name": "ControlNetModel"} | fields


def down(*kinds):
    return {"down_block_types": blocks(*kinds)["down_block_types"]}


HINT = {"conditioning_embedding_out_channels": (4, 6)}
SMALL_SDXL = SMALL["SDXL"]
CASES = {
    "Stable Diffusion 1": of(SMALL["Stable Diffusion 1"], **HINT),
    "SDXL, blue first": of(SMALL_SDXL, **HINT, controlnet_conditioning_channel_order="bgr"),
    "projections alone": of(
        SMALL_SDXL, **HINT, **down(CROSS, CROSS), transformer_layers_per_block=(0, 1)
    ),
    "no attention": of(SMALL_SDXL, **HINT, **down(PLAIN, PLAIN), mid_block_type="UNetMidBlock2D"),
    "pooled, with classes": of(
        SMALL["x4 upscaler"],
        **HINT,
        conditioning_channels=1,
        global_pool_conditions=True,
        resnet_time_scale_shift="scale_shift",
        downsample_padding=0,
    ),
}


def randomise(model, seed):
    """Every parameter random, outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.data = noise / fan_in**0.5 + float(parameter.data.mean() == 1)  # norms' weights
    return model.eval()


def torch_of(a):
    return torch.tensor(np.asarray(a)).movedim(-1, 1)


def numpy_of(tensor):
    return tensor.detach().movedim(1, -1).numpy()


def inputs(net, size=8):
    """(x, time, conditioning, hint) for a batch of two, and diffusers' keyword arguments."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(2, *shape)).astype(np.float32)

    x, time = normal(size, size, net.in_channels), np.array([999.0, 3.5], np.float32)
    cond, other = {"context": normal(7, 12)}, {}
    if net.num_classes:
        cond["label"] = np.array([1, 2])
        other["class_labels"] = torch.tensor(cond["label"])
    if net.added_embedding:
        cond |= {"pooled": normal(10), "time_ids": 500 + 200 * normal(6)}
        other["added_cond_kwargs"] = {
            "text_embeds": torch.tensor(cond["pooled"]),
            "time_ids": torch.tensor(cond["time_ids"]),
        }
    hint = rng.uniform(size=(2, 2 * size, 2 * size, 3)).astype(np.float32)
    other |= {"sample": torch_of(x), "timestep": torch.tensor(time)}
    other["encoder_hidden_states"] = torch.tensor(cond["context"])
    cond = Conditioning(**jax.tree.map(jnp.asarray, cond))
    return jnp.asarray(x), jnp.asarray(time), cond, jnp.asarray(hint), other


def loaded(model, file):
    """Our module and parameters of diffusers' model."""
    net = file.from_config(model.config)
    tensors = {k: files.of_array(v.numpy()) for k, v in model.state_dict().items()}
    return net, weights.load_params(file.names(net), models.shapes(net), tensors)


@pytest.mark.parametrize("name", CASES)
def test_residuals_are_those_of_diffusers(name):
    model = randomise(diffusers.ControlNetModel.from_config(CASES[name]), 3)
    net, params = loaded(model, controlnet)
    x, time, cond, hint, other = inputs(net)
    hint = hint[..., : net.hint_channels]
    got = net.apply({"params": params}, x, time, cond, hint)
    with torch.no_grad():
        levels, mid = model(controlnet_cond=torch_of(hint), return_dict=False, **other)
    expected = [*levels, mid]
    assert len(got) == len(expected) and min(float(e.std()) for e in expected) > 0.1
    for ours, wanted in zip(got, expected):
        np.testing.assert_allclose(ours, numpy_of(wanted), atol=1e-4)
    # And back, into the network that they make of our config.
    again = diffusers.ControlNetModel.from_config(controlnet.to_config(net))
    assert controlnet.from_config(again.config) == net
    own = weights.save_params(controlnet.names(net), params)
    state = model.state_dict()
    assert set(own) == set(again.state_dict()) == set(state)
    for key, tensor in own.items():
        np.testing.assert_array_equal(tensor.read(), state[key].numpy(), err_msg=key)


THREE = {**SMALL_SDXL, "block_out_channels": (16, 16, 16)}
THREE |= {**blocks(PLAIN, CROSS, CROSS), "attention_head_dim": 4}
THREE |= {"transformer_layers_per_block": 1}
WHOLE = {
    "Stable Diffusion 1": (SMALL["Stable Diffusion 1"], "full_adapter", [16, 16], 2),
    "SDXL": (THREE, "full_adapter_xl", [16, 16, 16, 16], 4),
}


@pytest.mark.parametrize("name", WHOLE)
def test_two_controlnets_and_an_adapter_around_a_u_net(name):
    config, kind, channels, factor = WHOLE[name]
    model = randomise(diffusers.UNet2DConditionModel.from_config(config), 1)
    small = of(config, **HINT)
    first, second = (
        randomise(diffusers.ControlNetModel.from_config(small), seed) for seed in (2, 3)
    )
    adapter = diffusers.T2IAdapter(
        channels=channels, downscale_factor=factor, adapter_type=kind, num_res_blocks=1
    )
    randomise(adapter, 4)
    net, params = loaded(model, unet)
    pairs = [loaded(first, controlnet), loaded(second, controlnet), loaded(adapter, t2i_adapter)]
    for own, _ in pairs:
        check_fit(own, net, 2)
    x, time, cond, hint, other = inputs(net)
    scales, guess = (0.7, 0.4, 0.9), np.logspace(-1, 0, len(first.controlnet_down_blocks) + 1)
    with torch.no_grad():
        options = {"controlnet_cond": torch_of(hint), "return_dict": False, **other}
        several = diffusers.MultiControlNetModel([first, second])
        images = {"controlnet_cond": [torch_of(hint), torch_of(1 - hint)]}
        levels, mid = several(**options | images, conditioning_scale=scales[:2])
        residuals = [scales[2] * f for f in adapter(torch_of(hint))]
        expected = model(
            **other,
            down_block_additional_residuals=levels,
            mid_block_additional_residual=mid,
            down_intrablock_additional_residuals=residuals,
        ).sample
        guessed, last = first(**options, guess_mode=True)
        alone = model(
            **other,
            down_block_additional_residuals=guessed,
            mid_block_additional_residual=last,
        ).sample
        bare = model(**other).sample
    hints = [Hint(h, scale=jnp.full((2, 1), s)) for h, s in zip((hint, 1 - hint, hint), scales)]
    whole = Controlled(network=net, nets=tuple(own for own, _ in pairs))
    given = {"network": params} | {f"nets_{i}": own for i, (_, own) in enumerate(pairs)}
    run = whole.apply  # not jitted: the cases share the compiled operations
    out = run({"params": given}, x, time, cond.replace(hints=tuple(hints)))
    assert float((expected - bare).abs().max()) > 0.1
    np.testing.assert_allclose(out, numpy_of(expected), atol=1e-4)
    # Guess mode is a scale for each residual; scales of 0 switch the others off.
    one = jnp.asarray(np.tile(guess, (2, 1)), jnp.float32)
    hints = [h.replace(scale=s) for h, s in zip(hints, (one, jnp.zeros((2, 1)), jnp.zeros((2, 1))))]
    out = run({"params": given}, x, time, cond.replace(hints=tuple(hints)))
    np.testing.assert_allclose(out, numpy_of(alone), atol=1e-4)


@pytest.mark.parametrize(
    "kind, channels",
    [("full_adapter", [8, 12]), ("full_adapter_xl", [8, 12, 16, 16]), ("light_adapter", [8, 12])],
)
def test_an_adapters_features_are_those_of_diffusers(kind, channels):
    model = randomise(diffusers.T2IAdapter(1, channels, 2, 2, kind), 0)
    net, params = loaded(model, t2i_adapter)
    image = np.random.default_rng(0).uniform(size=(2, 6, 10, 1)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch_of(image))
    for ours, wanted in zip(net.apply({"params": params}, image), expected, strict=True):
        np.testing.assert_allclose(ours, numpy_of(wanted), atol=1e-4)
    again = diffusers.T2IAdapter.from_config(t2i_adapter.to_config(net))
    assert t2i_adapter.from_config(again.config) == net
    own = weights.save_params(t2i_adapter.names(net), params)
    assert set(own) == set(model.state_dict()) == set(again.state_dict())
    for key, tensor in own.items():
        np.testing.assert_array_equal(tensor.read(), model.state_dict()[key].numpy())


@pytest.mark.parametrize(
    "net, count",
    [
        (controlnet.from_config(of(SD1)), 361_279_120),
        (controlnet.from_config(of(SD2)), 364_228_240),
        (controlnet.from_config(of(SDXL)), 1_251_014_160),
        (full(), 77_369_280),
        (light(), 18_689_200),
        (full_xl(), 79_028_160),
    ],
)
def test_published_counts_of_parameters(net, count):
    assert sum(a.size for a in jax.tree.leaves(models.shapes(net))) == count


SMALL_NET = controlnet.from_config(CASES["Stable Diffusion 1"])
REFUSED = [
    ({"up_block_types": ("UpBlock2D",)}, "up_block_types=.* ControlNetModel has no such field"),
    ({"class_embed_type": "projection"}, "class_embed_type='projection'"),
    ({"mid_block_type": None}, "mid_block_type=None"),
    ({"controlnet_conditioning_channel_order": "gbr"}, "channel_order='gbr'.* 'rgb', 'bgr'"),
    ({"down_block_types": ("DownBlock2D",)}, "down_block_types=.* expected 2 entries"),
    ({"encoder_hid_dim": 8}, "encoder_hid_dim=8"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_configs_that_are_not_supported(change, message):
    with pytest.raises(ValueError, match=message):
        controlnet.from_config(CASES["Stable Diffusion 1"] | change)


@pytest.mark.parametrize(
    "net, message",
    [
        (SMALL_NET.clone(time_scale=1000.0), "time_scale=1000.0: ControlNetModel has only 1"),
        (SMALL_NET.clone(guidance_width=8), "guidance_width=8"),
        (SMALL_NET.clone(in_channels=None), "in_channels=None: set it"),
        (SMALL_NET.clone(blocks=(1, 2)), r"blocks=\(1, 2\)"),
        (SMALL_NET.clone(attention="self"), "no other self-attention"),
        (full((8, 8)).clone(halved=(True, False)), r"halved=\(True, False\)"),
        (light((8, 12)), "the last two stages of a light adapter are equal"),
        (full_xl((8, 8, 8, 12)), "one width from its third stage"),
    ],
)
def test_networks_that_diffusers_does_not_have(net, message):
    with pytest.raises(ValueError, match=message):
        models.to_config(net)


WIDTHS = (16, 32, 96, 256)
SD, XL = (control.BASES[width]() for width in (768, 2048))
FITS = [
    *((controlnet_of(unet, WIDTHS), unet) for unet in (SD, XL)),
    *(
        (full(), SD),
        (light(), SD),
        (full_xl(), XL),
        (T2IAdapter((320, 640, *[1280] * 3), halved=(False, *[True] * 3, False)), SD),
    ),
]
MISFITS = [
    (controlnet_of(XL, WIDTHS), SD, 8, r"widths=\(320, 640, 1280\) does not fit"),
    (
        controlnet_of(SD, WIDTHS),
        control.BASES[1024](),
        8,
        "context_width=768 .* context_width=1024",
    ),
    (controlnet_of(SD, WIDTHS), SD, 4, "for squares of 8 pixels .* for squares of 4"),
    (controlnet_of(SD.clone(blocks=1), WIDTHS), SD, 8, r"blocks=\(1, 1, 1, 1\)"),
    (controlnet_of(XL, WIDTHS), XL.clone(added_embedding=False), 8, "added_embedding=True does"),
    (full(), XL, 8, "stage 1 has squares of 8 pixels .* squares of 16 there"),
    (full_xl(), SD, 8, "stage 1 has squares of 16 pixels .* squares of 8 there"),
    (full((320, 640, 1280)), SD, 8, r"widths \(320, 640, 1280\) does not fit"),
    (full((64, 128, 256, 256)), SD, 8, r"widths \(64, 128, 256, 256\) does not fit"),
]


def test_which_nets_fit_a_u_net():
    for net, unet_of in FITS:
        check_fit(net, unet_of, 8)
    for net, unet_of, factor, message in MISFITS:
        with pytest.raises(ValueError, match=message):
            check_fit(net, unet_of, factor)
