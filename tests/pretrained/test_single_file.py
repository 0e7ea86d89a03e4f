"""Single-file checkpoints in the original naming, against diffusers' reading of them."""

import logging
import re
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file
from unet_cases import PUBLISHED

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.clip import ClipText
from diffusion.models.unet import UNet
from diffusion.pretrained import files, models, weights
from diffusion.pretrained.networks import autoencoder_kl, clip, unet
from diffusion.pretrained.schedulers.catalogue import read
from diffusion.pretrained.single_file import families, keys
from diffusion.pretrained.single_file.checkpoint import (
    _shown,
    open_single_file,
    write_single_file,
)
from diffusion.pretrained.single_file.families import FAMILIES

logging.getLogger("diffusers").setLevel(logging.ERROR)
OWN = {"unet": unet, "vae": autoencoder_kl, "text_encoder": clip, "text_encoder_2": clip}
COMMON = {"norm_groups": 4, "out_channels": 4, "image_size": 8, "in_channels": 4, "num_heads": 2}
ADDED = {"added_embedding": True, "time_id_width": 4, "added_width": 20, "linear_projection": True}
UNETS = {
    "v1": UNet(**COMMON, widths=(8, 16), attention=(1, 0), mid_attention=1, context_width=8),
    "v2": UNet(
        **COMMON,
        widths=(8, 8, 16),
        blocks=1,
        attention=(1, 1, 0),
        mid_attention=1,
        context_width=8,
        linear_projection=True,
    ),
    "xl": UNet(
        **COMMON,
        **ADDED,
        widths=(8, 16),
        blocks=1,
        attention=(0, 2),
        mid_attention=2,
        context_width=16,
    ),
    "upscale": UNet(
        **COMMON | {"in_channels": 7},
        widths=(8, 16),
        blocks=1,
        attention=(0, 1),
        mid_attention=1,
        context_width=8,
        only_cross_attention=(True, False),
        num_classes=5,
        null_class=False,
    ),
}
VAE = AutoencoderKL(widths=(8, 16), blocks=1, norm_groups=4)
TEXT = ClipText(vocab_size=20, width=8, depth=2, heads=2, hidden=12, length=7)
OPEN = TEXT.clone(activation="gelu")
PROJECTED = OPEN.clone(width=16, projection=16)
CASES = {
    "v1": {"unet": UNETS["v1"], "vae": VAE, "text_encoder": TEXT},
    "v2": {"unet": UNETS["v2"], "vae": VAE, "text_encoder": OPEN},
    "xl_base": {
        **{"unet": UNETS["xl"], "vae": VAE, "text_encoder": TEXT},
        "text_encoder_2": PROJECTED,
    },
    "xl_refiner": {"unet": UNETS["xl"], "text_encoder_2": PROJECTED},
    "upscale": {"unet": UNETS["upscale"], "vae": VAE, "text_encoder": OPEN},
}


shapes = cache(models.shapes)


@cache
def params(module):
    """All of them random."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes(module))


@pytest.fixture(autouse=True)
def known_shapes(monkeypatch):
    """Tracing takes most of the time here: once a module."""
    monkeypatch.setattr("diffusion.pretrained.single_file.checkpoint.shapes", shapes)
    monkeypatch.setattr("diffusion.pretrained.models.shapes", shapes)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """family -> a checkpoint of ours."""
    root = tmp_path_factory.mktemp("single")

    def path(name):
        file = root / f"{name}.safetensors"
        if not file.exists():
            parts = {part: (module, params(module)) for part, module in CASES[name].items()}
            write_single_file(file, name, parts)
        return file

    return path


def converted(checkpoint, part, module, prefix):
    """What diffusers makes of it."""
    config = models.to_config(module)
    if part == "unet":
        return theirs.convert_ldm_unet_checkpoint(dict(checkpoint), config)
    if part == "vae":
        return theirs.convert_ldm_vae_checkpoint(dict(checkpoint), config)
    if prefix in (families.CLIP, families.XL_CLIP):
        return theirs.convert_ldm_clip_checkpoint(dict(checkpoint))
    empty = SimpleNamespace(config=SimpleNamespace(hidden_size=module.width))
    return theirs.convert_open_clip_checkpoint(empty, dict(checkpoint), prefix)


@pytest.mark.parametrize("name", CASES)
def test_ours_to_a_file_to_ours_and_to_diffusers(written, name):
    path = written(name)
    checkpoint = load_file(path)
    opened = open_single_file(path, modules=CASES[name])
    assert opened.family == name and set(opened.components) == set(CASES[name])
    for part, module in CASES[name].items():
        read = opened.components[part].load()
        jax.tree.map(np.testing.assert_array_equal, read, params(module))
        # diffusers' names, from its conversion of this file and from our own table.
        got = converted(checkpoint, part, module, FAMILIES[name].parts[part][0])
        wanted = weights.save_params(OWN[part].names(module), params(module))
        assert set(got) == set(wanted)
        for key, tensor in wanted.items():
            np.testing.assert_array_equal(got[key], tensor.read(), err_msg=key)


KEYS = {  # of the published files
    "v1": {
        "down_blocks_0/downsamplers_0/conv": "input_blocks.3.0.op",
        "down_blocks_3/resnets_1/norm1": "input_blocks.11.0.in_layers.0",
        "up_blocks_0/upsamplers_0/conv": "output_blocks.2.1.conv",
        "up_blocks_1/upsamplers_0/conv": "output_blocks.5.2.conv",
        "up_blocks_3/attentions_2/proj_out": "output_blocks.11.1.proj_out",
        "mid_block/resnets_1/time_emb_proj": "middle_block.2.emb_layers.1",
    },
    "xl_base": {
        "add_embedding/linear_2": "label_emb.0.2",
        "down_blocks_2/attentions_1/transformer_blocks_9/norm2": (
            "input_blocks.8.1.transformer_blocks.9.norm2"
        ),
        "up_blocks_1/upsamplers_0/conv": "output_blocks.5.2.conv",
        "up_blocks_2/resnets_2/conv_shortcut": "output_blocks.8.0.skip_connection",
    },
    "upscale": {
        "class_embedding": "label_emb",
        "up_blocks_2/upsamplers_0/conv": "output_blocks.8.2.conv",
    },
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_the_published_files(name):
    """Where diffusers' conversion takes several spellings, the original code takes one."""
    prefix, build = FAMILIES[name].parts["unet"]
    rename = keys.unet(build(), prefix).rename
    assert {path: rename(path) for path in KEYS[name]} == {
        path: prefix + key for path, key in KEYS[name].items()
    }


def test_components_in_another_dtype(written, tmp_path):
    parts = {part: (module, params(module)) for part, module in CASES["v1"].items()}
    write_single_file(tmp_path / "half.safetensors", "v1", parts, dtype=jnp.float16)
    stored = files.open_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype("float16")}
    read = open_single_file(tmp_path / "half.safetensors", modules=CASES["v1"])
    bias = read.components["unet"].load(dtype=jnp.bfloat16)["conv_in"]["bias"]
    assert bias.dtype == jnp.bfloat16


PUBLISHED_AS = {
    "v1": "Stable Diffusion 1.5",
    "inpainting": "inpainting",
    "instruct-pix2pix": "InstructPix2Pix",
    "v2": "Stable Diffusion 2.1",
    "xl_base": "SDXL",
    "xl_refiner": "SDXL refiner",
    "upscale": "x4 upscaler",
}


@pytest.mark.parametrize("name", PUBLISHED_AS)
def test_networks_of_families_are_the_published(name):
    _, build = FAMILIES[name].parts["unet"]
    made, wanted = (
        unet.to_config(build()),
        unet.to_config(unet.from_config(PUBLISHED[PUBLISHED_AS[name]][0])),
    )
    wanted["upcast_attention"] = made["upcast_attention"]  # of no consequence
    assert made == wanted


FIRST, CONTEXT = (
    f"{families.UNET}input_blocks.0.0.weight",
    f"{families.UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
)
V2_CONTEXT = theirs.CHECKPOINT_KEY_NAMES["v2"]


@pytest.mark.parametrize("encoders", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_kinds_are_told_apart_as_diffusers_does(name, encoders):
    module = FAMILIES[name].parts["unet"][1]()
    found = {
        FIRST: torch.empty(320, module.in_channels, 3, 3, device="meta"),
        CONTEXT: torch.empty(640, module.context_width, device="meta"),
    }
    if name in ("v1", "v2", "inpainting", "inpainting_v2", "instruct-pix2pix"):
        found[V2_CONTEXT] = torch.empty(320, module.context_width, device="meta")
    if name == "upscale":
        found[theirs.CHECKPOINT_KEY_NAMES["upscale"]] = torch.empty(512, device="meta")
    for part, (prefix, _) in FAMILIES[name].parts.items():
        if part.startswith("text") and encoders:
            key = theirs.CHECKPOINT_KEY_NAMES["xl_base"].removeprefix(families.XL_OPEN_CLIP)
            found[prefix + key] = torch.empty(5120, device="meta")
    assert families.family(found) == name
    if encoders:  # by which diffusers knows SDXL
        assert theirs.infer_diffusers_model_type(found) == name


def rewritten(path, target, change):
    """The file with other tensors."""
    tensors = dict(files.open_file(path))
    change(tensors)
    files.write_file(target, tensors)
    return target


def test_what_files_hold_beside_weights(written, tmp_path):
    """Training state, unused layers, other spellings."""

    def change(tensors):
        prefix = families.OPEN_CLIP
        extra = [
            *("alphas_cumprod", "model_ema.decay", "first_stage_model.loss.logvar", "betas"),
            *(f"{prefix}{name}" for name in ("logit_scale", "text_projection")),
            *(k.replace("resblocks.1.", "resblocks.2.") for k in tensors if "resblocks.1." in k),
        ]
        tensors |= {name: files.of_array(np.zeros(2, np.float32)) for name in extra}
        for key in [key for key in tensors if "attn_1.q.weight" in key]:
            matrix = tensors[key].read()[:, :, 0, 0]
            tensors[key] = files.of_array(matrix)

    name = "v2"
    path = rewritten(written(name), tmp_path / "more.safetensors", change)
    opened = open_single_file(path, modules=CASES[name])
    for part, module in CASES[name].items():
        jax.tree.map(np.testing.assert_array_equal, opened.components[part].load(), params(module))


def test_former_spellings(written, tmp_path):
    """The encoder without text_model, the autoencoder as vae, none at all."""

    def change(tensors):
        for key in list(tensors):
            new = key.replace("transformer.text_model.", "transformer.")
            new = re.sub("^first_stage_model", "vae", new)
            tensors[new] = tensors.pop(key)
        ids = np.arange(7)[None]
        tensors[f"{families.CLIP}embeddings.position_ids"] = files.of_array(ids)

    path = rewritten(written("v1"), tmp_path / "former.safetensors", change)
    opened = open_single_file(path, modules=CASES["v1"])
    for part, module in CASES["v1"].items():
        jax.tree.map(np.testing.assert_array_equal, opened.components[part].load(), params(module))


def test_moving_averages(written, tmp_path):
    def change(tensors):
        for key in [key for key in tensors if key.startswith(families.UNET)]:
            average = "model_ema." + key.removeprefix("model.").replace(".", "")
            tensors[average] = files.of_array(tensors[key].read() + 1)

    path = rewritten(written("v1"), tmp_path / "ema.safetensors", change)
    wanted = params(UNETS["v1"])
    for ema, shift in ((False, 0), (True, 1)):
        read = open_single_file(path, modules=CASES["v1"], ema=ema).components["unet"].load()
        jax.tree.map(lambda a, b, s=shift: np.testing.assert_array_equal(a, b + s), read, wanted)
    # As diffusers names them.
    theirs_of = theirs.convert_ldm_unet_checkpoint(
        load_file(path), models.to_config(UNETS["v1"]), extract_ema=True
    )
    np.testing.assert_array_equal(theirs_of["conv_in.bias"], wanted["conv_in"]["bias"] + 1)
    with pytest.raises(ValueError, match=r"ema=True, but .* moving averages are missing"):
        open_single_file(written("v1"), modules=CASES["v1"], ema=True)


def test_prediction_type_of_stable_diffusion_2(written, tmp_path):
    def predicts(path, **more):
        return open_single_file(path, modules=CASES["v2"], **more).scheduler["prediction_type"]

    assert predicts(written("v2")) == "v_prediction"
    assert predicts(written("v2"), prediction_type="epsilon") == "epsilon"
    for step, wanted in ((875000, "epsilon"), (110000, "v_prediction")):
        path = rewritten(
            written("v2"),
            tmp_path / f"{step}.safetensors",
            lambda t, s=step: t.update(global_step=files.of_array(np.array(s))),
        )
        assert predicts(path) == wanted
    with pytest.raises(ValueError, match="prediction_type='v': expected"):
        predicts(written("v2"), prediction_type="v")


def test_markers_act(written, tmp_path):
    """What a file says of itself by keys that are no weights; and leftovers, which are named."""

    def opened(family, values, **more):
        path = tmp_path / "marked.safetensors"
        rewritten(
            written(family),
            path,
            lambda t: t.update({k: files.of_array(np.asarray(v)) for k, v in values.items()}),
        )
        return open_single_file(path, modules=CASES[family], **more)

    for family in ("v1", "xl_base"):
        marked = opened(family, {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}).scheduler
        assert marked["prediction_type"] == "v_prediction" and marked["rescale_betas_zero_snr"]
        assert opened(family, {"v_pred": 0.0}, prediction_type="v_prediction").scheduler
        with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*marker v_pred"):
            opened(family, {"v_pred": 0.0}, prediction_type="epsilon")
    mean, std = [0.1, -0.2, 0.3, 0.4], [8.0, 7.0, 6.0, 5.0]
    playground = opened("xl_base", {"edm_mean": mean, "edm_std": np.reshape(std, (1, 4, 1, 1))})
    assert playground.scheduler["_class_name"] == "EDMDPMSolverMultistepScheduler"
    vae = playground.components["vae"].module
    np.testing.assert_allclose((vae.latents_mean, vae.latents_std), (mean, std))
    assert vae.scaling_factor == 0.5
    with pytest.raises(ValueError, match="edm_mean and edm_std must both have 4 numbers"):
        opened("xl_base", {"edm_mean": mean})
    for std, shown in ((0.12, "v_prediction"), (0.05, "epsilon")):
        bias = std * np.resize([1.0, -1.0], 8)
        # Tiny networks have no block of this name; the key alone decides.
        tensors = {families.NORM: files.of_array(bias.astype(np.float32))}
        assert _shown("v2", tensors) == shown and _shown("v1", tensors) is None
    left = {
        "embedding_manager.embedder.x": np.zeros(2),
        "cond_stage_model.transformer.text_projection.weight": np.zeros((2, 2)),
    }
    with pytest.warns(UserWarning, match="2 tensors are not used: cond_stage_model.transformer"):
        assert opened("v1", left).family == "v1"


@pytest.mark.parametrize("name", FAMILIES)
def test_schedulers_are_ones_that_can_be_read(name):
    assert read(families.LOW_RES)[0] == "DDPMScheduler"
    assert read(families.PLAYGROUND)[0] == "EDMDPMSolverMultistepScheduler"
    assert read(FAMILIES[name].scheduler)[0] == FAMILIES[name].scheduler["_class_name"]


FAULTS = {
    "missing": (
        lambda t: t.pop(f"{families.UNET}out.2.bias"),
        r"\(unet\) does not hold this model.*\n.*1 missing: model\.diffusion_model\.out\.2\.bias",
    ),
    "unexpected": (
        lambda t: t.update(lora=files.of_array(np.zeros(1))),
        "1 tensors belong to no part of v1: lora",
    ),
    "misshapen": (
        lambda t: t.update({f"{families.UNET}out.2.bias": files.of_array(np.zeros(3))}),
        r"1 misshapen: .*out\.2\.bias \(3,\), expected \(4,\)",
    ),
    "channels": (
        lambda t: t.update({FIRST: files.of_array(np.zeros((8, 5, 3, 3)))}),
        "takes 5 channels and a context of width 8; known: v1, ",
    ),
    "diffusers": (
        lambda t: (
            t.clear(),
            t.update({"down_blocks.0.resnets.0.norm1.weight": files.of_array(np.zeros(1))}),
        ),
        "in diffusers' naming: put it into a folder",
    ),
    "something else": (
        lambda t: (t.clear(), t.update({"double_blocks.0.w": files.of_array(np.zeros(1))})),
        r"no checkpoint of Stable Diffusion 1, 2 or XL: it begins with double_blocks\.0\.w",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_files_are_refused(written, tmp_path, fault):
    change, message = FAULTS[fault]
    path = rewritten(written("v1"), tmp_path / "other.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        open_single_file(path, modules=CASES["v1"])
    assert "other.safetensors" in str(error.value)


def test_networks_without_an_original_naming(tmp_path):
    file = tmp_path / "x.safetensors"
    lcm = {"unet": (UNETS["v1"].clone(guidance_width=4), {})}
    for kind, parts, message in (
        ("v3", {}, "kind='v3': expected one of v1"),
        ("xl_refiner", {"text_encoder": (TEXT, {})}, "hold unet, vae, text_encoder_2"),
        ("v1", lcm, "guidance_width=4"),
        ("v1", {"text_encoder": (PROJECTED, {})}, "has none in single files"),
    ):
        with pytest.raises(ValueError, match=message):
            write_single_file(file, kind, parts)
    with pytest.raises(ValueError, match="attention in the middle alone"):
        keys.autoencoder(VAE.clone(attention=(False, True)), "first_stage_model.")
    assert not file.exists()
