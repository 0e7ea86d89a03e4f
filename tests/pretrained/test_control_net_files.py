"""ControlNets and T2I-Adapters in files without settings, in every naming, and in folders."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file

from diffusion.models.controlnet import controlnet_of
from diffusion.models.t2i_adapter import full, full_xl, light
from diffusion.models.unet import UNet
from diffusion.pretrained import files, models, weights
from diffusion.pretrained.networks import controlnet, t2i_adapter
from diffusion.pretrained.single_file import control, keys
from diffusion.pretrained.single_file.control import open_net

COMMON = dict(widths=(8, 16), blocks=1, norm_groups=4, num_heads=2, in_channels=4)
ADDED = dict(added_embedding=True, time_id_width=4, added_width=20, linear_projection=True)
UNETS = {
    12: UNet(**COMMON, attention=(1, 0), mid_attention=1, context_width=12),
    16: UNet(**COMMON, **ADDED, attention=(0, 2), mid_attention=2, context_width=16),
}
"""As small as it gets, by their context's width, which stands for the published ones'."""
WIDTHS = (16, 32, 96, 256)


@pytest.fixture
def small_bases(monkeypatch):
    monkeypatch.setattr(control, "BASES", {w: lambda net=net: net for w, net in UNETS.items()})
    monkeypatch.setattr(models, "shapes", shapes)


shapes = cache(models.shapes)


@cache
def params(net):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes(net))


def saved(path, net, table, extra=(), dtype=None, change=lambda tensors: None):
    """A file of the network's random parameters."""
    tensors = weights.save_params(table, params(net), dtype=dtype)
    tensors |= {key: files.of_array(np.zeros(2, np.float32)) for key in extra}
    change(tensors)
    files.write_file(path, tensors)
    return path


def same(got, net):
    jax.tree.map(np.testing.assert_array_equal, got, params(net))


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("width", UNETS)
def test_a_controlnet_in_the_original_naming(small_bases, tmp_path, width, prefix):
    net = controlnet_of(UNETS[width], WIDTHS)
    path = saved(tmp_path / "net.safetensors", net, keys.controlnet(net, prefix))
    opened = open_net(path)
    assert opened.module == net
    same(opened.load(), net)
    # diffusers' names, from its conversion of this file and from our own table.
    checkpoint, config = load_file(path), controlnet.to_config(net)
    added = [key for key in checkpoint if "label_emb" in key]  # it knows no name for these
    assert len(added) == 4 * (width == 16)
    got = theirs.convert_controlnet_checkpoint(dict(checkpoint), config)
    for key in added:
        place = {"0": "linear_1", "2": "linear_2"}[key.split(".")[-2]]
        got[f"add_embedding.{place}.{key.split('.')[-1]}"] = checkpoint[key]
    wanted = weights.save_params(controlnet.names(net), params(net))
    assert set(got) == set(wanted)
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(got[key], tensor.read(), err_msg=key)


def test_keys_of_the_published_controlnets():
    sd, xl = (controlnet_of(control.BASES[width](), WIDTHS) for width in (768, 2048))
    rename = keys.controlnet(sd, "control_model.").rename
    assert {
        path: rename(path)
        for path in (
            "controlnet_cond_embedding/conv_in",
            "controlnet_cond_embedding/blocks_5",
            "controlnet_cond_embedding/conv_out",
            "controlnet_down_blocks_11",
            "controlnet_mid_block",
            "down_blocks_3/resnets_1/conv2",
        )
    } == {
        "controlnet_cond_embedding/conv_in": "control_model.input_hint_block.0",
        "controlnet_cond_embedding/blocks_5": "control_model.input_hint_block.12",
        "controlnet_cond_embedding/conv_out": "control_model.input_hint_block.14",
        "controlnet_down_blocks_11": "control_model.zero_convs.11.0",
        "controlnet_mid_block": "control_model.middle_block_out.0",
        "down_blocks_3/resnets_1/conv2": "control_model.input_blocks.11.0.out_layers.3",
    }
    rename = keys.controlnet(xl, "").rename
    assert rename("add_embedding/linear_2") == "label_emb.0.2"
    assert rename("controlnet_down_blocks_8") == "zero_convs.8.0"


ADAPTERS = {
    "full": (full((8, 12)), {"body.2.in_conv.bias": (12,), "body.3.block2.weight": (12, 12, 1, 1)}),
    "light": (
        light((8, 8), blocks=3),
        {"body.1.out_conv.bias": (8,), "body.0.body.2.block2.weight": (2, 2, 3, 3)},
    ),
    "SDXL": (
        full_xl((8, 12, 8, 8), hint_channels=1),
        {"body.4.in_conv.bias": (8,), "body.7.block1.bias": (8,), "conv_in.bias": (8,)},
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_in_its_authors_naming_and_in_diffusers(small_bases, tmp_path, name):
    net, some = ADAPTERS[name]
    path = saved(tmp_path / "net.safetensors", net, keys.t2i_adapter(net))
    stored = files.open_file(path)
    assert {key: stored[key].shape for key in some} == some
    for table in (keys.t2i_adapter(net), t2i_adapter.names(net)):
        opened = open_net(saved(path, net, table))
        assert opened.module == net
        same(opened.load(), net)


def test_what_else_files_hold(small_bases, tmp_path):
    net = controlnet_of(UNETS[12], WIDTHS)
    path = tmp_path / "net.safetensors"
    # With the pipeline that it was trained with, as the first ones were published.
    extra = ("model.diffusion_model.out.2.bias", "first_stage_model.x", "betas")
    table = keys.controlnet(net, "control_model.")
    with pytest.warns(UserWarning, match="3 tensors are not used: betas, first_stage"):
        same(open_net(saved(path, net, table, extra)).load(), net)
    # In diffusers' naming; in half precision.
    opened = open_net(saved(path, net, models.table(net), dtype=jnp.float16), bgr=True)
    assert opened.module == net.clone(bgr=True)
    assert opened.config["controlnet_conditioning_channel_order"] == "bgr"
    half = opened.load(dtype=jnp.bfloat16)["conv_in"]["kernel"]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, params(net)["conv_in"]["kernel"], rtol=2**-7)


def test_folders(small_bases, tmp_path):
    for i, net in enumerate(
        (controlnet_of(UNETS[16], (4, 6)).clone(global_pool=True, null_class=False), full((8,)))
    ):
        models.save(tmp_path / str(i), net, params(net))
        opened = open_net(tmp_path / str(i))
        assert opened.module == net and models.to_config(net) == opened.config
        same(opened.load(), net)
    with pytest.raises(ValueError, match="bgr: a T2I-Adapter has no such setting"):
        open_net(tmp_path / "1", bgr=True)
    net = UNETS[12].clone(out_channels=4)
    models.save(tmp_path / "unet", net, params(net))
    with pytest.raises(ValueError, match="class UNet2DConditionModel; expected ControlNetModel or"):
        open_net(tmp_path / "unet")


def put(key, value):
    return lambda tensors: tensors.update({key: files.of_array(np.asarray(value, np.float32))})


FAULTS = {
    "Control-LoRA": (put("lora_controlnet", [0]), "a Control-LoRA, which is not supported"),
    "differences": (put("difference", [0]), "stored as differences"),
    "union": (put("task_embedding", [[0]]), "a union of ControlNets"),
    "unknown key": (put("time_embed.1.weight", [0]), r"1 unexpected: time_embed.1.weight"),
    "missing": (lambda t: t.pop("zero_convs.1.0.weight"), "1 missing: zero_convs.1.0.weight"),
    "shape": (put("zero_convs.1.0.bias", [0]), r"1 misshapen: zero_convs.1.0.bias \(1,\), exp"),
    "another base": (
        lambda t: t.update({k: files.of_array(np.zeros((8, 9))) for k in t if "attn2.to_k" in k}),
        "a context of width 9, known are 12, 16",
    ),
    "NaN": (put("zero_convs.1.0.bias", [0] * 7 + [np.nan]), "zero_convs.1.0.bias .* not finite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_controlnets_file(small_bases, tmp_path, name):
    change, message = FAULTS[name]
    net = controlnet_of(UNETS[12], WIDTHS)
    path = saved(tmp_path / "net.safetensors", net, keys.controlnet(net, ""), change=change)
    with pytest.raises(ValueError, match=re.escape(str(path)) + f"(.|\n)*{message}"):
        open_net(path).load()


OTHERS = {
    "lora_unet_mid_block.alpha": "a LoRA; it is for config.adapters",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter; it is for config.image_prompts",
    "model.diffusion_model.out.2.bias": "a whole network; it is for config.model.path",
    "transformer_layes.0.ln_1.bias": "a style adapter",
    "lllite_unet_1.up.0.weight": "a ControlNet-LLLite",
    "x.weight": "no ControlNet or T2I-Adapter that is known; it begins with x.weight",
    "body.0.block1.weight": "conv_in.weight is missing",
    "adapter.body.0.in_conv.weight": "adapter.body.0.resnets.0.block1.weight is missing",
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_files(tmp_path, key):
    path = tmp_path / "net.safetensors"
    files.write_file(path, {key: files.of_array(np.zeros((2, 2), np.float32))})
    with pytest.raises(ValueError, match=OTHERS[key]):
        open_net(path)


def test_pickles_and_no_file(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="read by unpickling"):
        open_net(tmp_path / "net.pth")
    with pytest.raises(FileNotFoundError):
        open_net(tmp_path / "none.safetensors")
