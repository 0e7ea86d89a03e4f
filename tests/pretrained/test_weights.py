"""Weights in and out, whole models: round trips, faults, memory."""

import json
import logging
import os
import re
import subprocess
import sys
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoders
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import pretrained
from diffusion.pretrained import folders, models, names, weights
from diffusion.pretrained.files import of_array, open_file, write_file

logging.getLogger("diffusers").setLevel(logging.ERROR)
torch.set_num_threads(1)
BASE = folders.DIFFUSERS
TABLE = names.Names(names.dotted(), ignored="position_ids")
WIDE = {"block_out_channels": (8, 16), "norm_num_groups": 4}


def _unet():
    return diffusers.UNet2DConditionModel(
        **WIDE,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )


def _unconditional():
    return diffusers.UNet2DModel(
        **WIDE,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        sample_size=8,
    )


def _vae():
    return diffusers.AutoencoderKL(
        **WIDE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        sample_size=8,
        out_channels=8,
        num_embeds_ada_norm=10,
    )


BUILDERS = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unconditional,
    "AutoencoderKL": _vae,
    "DiTTransformer2DModel": _dit,
    "CLIPTextModel": tiny_encoders.clip_text,
    "CLIPTextModelWithProjection": lambda: tiny_encoders.clip_text(projection=True),
    "CLIPVisionModelWithProjection": tiny_encoders.clip_vision,
    "T5EncoderModel": tiny_encoders.t5,
}


shapes = cache(models.shapes)


@cache
def model(name):
    """A model with random parameters, norms and biases too."""
    made = tiny_encoders.randomise(BUILDERS[name]())
    if name == "DiTTransformer2DModel":  # embedders of all blocks equal, as in the published files
        first, *others = made.transformer_blocks
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return made


@pytest.fixture(autouse=True)
def known_shapes(monkeypatch):
    """Tracing takes most of the time here: once a module."""
    monkeypatch.setattr("diffusion.pretrained.models.shapes", shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> its folder, as its library saves it."""
    root = tmp_path_factory.mktemp("models")

    def folder(name):
        if not (root / name).exists():
            model(name).save_pretrained(root / name)
        return root / name

    return folder


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", BUILDERS)
def test_ours_to_theirs_to_ours_is_the_identity(saved, tmp_path, name):
    module, params, config = pretrained.load(saved(name), expected=name)
    pretrained.save(tmp_path / "ours", module, params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    theirs, info = type(model(name)).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for (key, one), other in zip(model(name).state_dict().items(), theirs.state_dict().values()):
        assert torch.equal(one, other), key
    theirs.save_pretrained(tmp_path / "theirs")
    again = pretrained.load(tmp_path / "theirs")
    assert again.module == module
    assert_equal(again.params, params)
    # The config that was read may be written again, as it is.
    pretrained.save(tmp_path / "third", module, params, config=config)
    assert json.loads((tmp_path / "third/config.json").read_text()) == config


def test_dtypes_variants_and_devices(saved, tmp_path):
    module, params, _ = pretrained.load(saved("CLIPTextModel"))
    for variant, dtype in (("bf16", jnp.bfloat16), ("fp16", jnp.float16)):
        pretrained.save(tmp_path, module, params, dtype=dtype, variant=variant)
        narrow = pretrained.load(tmp_path, variant=variant, dtype=None).params
        assert_equal(narrow, jax.tree.map(lambda a, d=dtype: np.asarray(a).astype(d), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype("float16")}
    from_brain = pretrained.load(tmp_path, variant="bf16", dtype=jnp.float16).params
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, 0.01), from_brain, narrow))
    wide = pretrained.load(tmp_path, variant="fp16", device=jax.devices()[1]).params
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(wide)} == {jax.devices()[1]}
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype("float32")}
    assert_equal(wide, narrow)


def test_sharded_parameters(saved):
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

    def sharding(shape):
        last = None if shape[-1] % 4 else "x"
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), last))

    spread = pretrained.load(saved("T5EncoderModel"), device=sharding).params
    kernel = spread["shared"]["embedding"]
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 4)
    assert_equal(spread, pretrained.load(saved("T5EncoderModel")).params)


def test_parameters_may_be_donated(tmp_path):
    """On the CPU they are the buffers that the file was read into."""
    write_file(tmp_path / "a.safetensors", {"a.bias": of_array(np.arange(64, dtype=np.float32))})
    shapes = {"a": {"bias": jax.ShapeDtypeStruct((64,), np.float32)}}
    params = weights.load_params(TABLE, shapes, open_file(tmp_path / "a.safetensors"))
    step = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)
    np.testing.assert_array_equal(step(step(params))["a"]["bias"], np.arange(64) + 2)


# --- faults


def test_another_architecture_is_refused(saved, tmp_path):
    unet, vae = saved("UNet2DConditionModel"), saved("AutoencoderKL")
    with pytest.raises(ValueError, match="class AutoencoderKL; expected UNet2DConditionModel"):
        pretrained.load(vae, expected="UNet2DConditionModel")
    # A U-Net's config beside an autoencoder's weights.
    (tmp_path / "config.json").write_text((unet / "config.json").read_text())
    (tmp_path / f"{BASE}.safetensors").write_bytes((vae / f"{BASE}.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not hold this model") as error:
        pretrained.load(tmp_path)
    assert re.search(r"\d+ missing: .*\n  \d+ unexpected: .*, \.\.\.", str(error.value))
    # The same network, wider.
    config = json.loads((vae / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_out_channels": [8, 32]}))
    with pytest.raises(ValueError, match=r"misshapen: .*\(16,.*expected \(32,"):
        pretrained.load(tmp_path)


CONFIGS = {
    "unknown": ({"attention_tpye": "default"}, r"attention_tpye='default'.*no such field"),
    "unsupported": ({"act_fn": "mish"}, r"act_fn='mish'"),
    "class": ({"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel is not supported"),
    "no class": ({"_class_name": None}, "names no class"),
}


@pytest.mark.parametrize("change", CONFIGS)
def test_configs_that_mean_something_else_are_refused(saved, tmp_path, change):
    """Before any weights are looked at: there are none."""
    fields, message = CONFIGS[change]
    config = json.loads((saved("UNet2DConditionModel") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_folders_that_hold_no_model(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        pretrained.load(tmp_path)
    (tmp_path / "config.json").write_text((saved("UNet2DModel") / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"holds no .*; it holds: config\.json"):
        pretrained.load(tmp_path)


SHAPES = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}


def test_tensors_that_are_no_weights():
    kernel = np.arange(6, dtype=np.float32).reshape(3, 2)
    ids = of_array(np.arange(3))
    params = weights.load_params(TABLE, SHAPES, {"a.weight": of_array(kernel), "position_ids": ids})
    np.testing.assert_array_equal(params["a"]["kernel"], kernel.T)
    quantised = {"a.weight": of_array(kernel.astype(np.int8))}
    with pytest.raises(ValueError, match=r"a\.weight \(int8\): quantised"):
        weights.load_params(TABLE, SHAPES, quantised)


def test_what_is_not_the_modules_is_not_saved(saved, tmp_path):
    module, params, config = pretrained.load(saved("AutoencoderKL"))
    with pytest.raises(ValueError, match="params does not hold this model"):
        pretrained.save(tmp_path / "new", module, {"encoder": params["encoder"]})
    with pytest.raises(ValueError, match="another network; it differs in latent_channels"):
        other = {**config, "latent_channels": 16}
        pretrained.save(tmp_path / "new", module, params, config=other)
    with pytest.raises(ValueError, match="Dense has no pretrained format"):
        pretrained.save(tmp_path / "new", __import__("flax").linen.Dense(3), {})
    assert not (tmp_path / "new").exists()


# --- pipelines


def test_pipelines(saved, tmp_path):
    """A pipeline's folder of ours is one that diffusers runs."""
    kinds = {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    for part, name in kinds.items():
        module, params, _ = pretrained.load(saved(name))
        pretrained.save(tmp_path / part, module, params)
    components = {part: ("diffusers", name) for part, name in kinds.items()}
    components["scheduler"] = ("diffusers", "DDIMScheduler")
    index = pretrained.Index("DiTPipeline", components, {"id2label": {"0": "tench"}})
    with pytest.raises(ValueError, match="no subfolder for the components scheduler"):
        pretrained.save_index(tmp_path, index)
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    pretrained.save_index(tmp_path, index)
    assert pretrained.read_index(tmp_path) == index
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert pipeline.labels == {"tench": 0}
    assert torch.equal(pipeline.vae.quant_conv.weight, model("AutoencoderKL").quant_conv.weight)
    theirs = tmp_path / "theirs"
    pipeline.save_pretrained(theirs)
    assert pretrained.read_index(theirs).components == components
    assert_equal(
        pretrained.load(theirs, "transformer").params,
        pretrained.load(tmp_path, "transformer").params,
    )
    vae = pretrained.open_model(theirs, "vae", with_weights=False)
    count = sum(p.numel() for p in model("AutoencoderKL").parameters())
    assert vae.nbytes(jnp.float16) == 2 * count
    with pytest.raises(ValueError, match=r"holds a pipeline; give a subfolder: transformer, vae"):
        pretrained.load(theirs)
    with pytest.raises(FileNotFoundError, match="holds a model, not a pipeline"):
        pretrained.read_index(theirs / "vae")


def test_indices_name_what_there_is_not(tmp_path):
    content = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "a": [1, 2],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    index = pretrained.read_index(tmp_path)
    assert index.components == {"safety_checker": None} and index.options == {"a": [1, 2]}
    pretrained.save_index(tmp_path, index)
    assert json.loads((tmp_path / "model_index.json").read_text()) == content


# --- memory

MEASURE = """
import sys, jax, numpy as np
from diffusion.pretrained import files, names, weights

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

table = names.Names(names.dotted())
stored = files.open_file(sys.argv[1])
shapes = {"big": {"embedding": stored["big.weight"].shape}}
for key, tensor in stored.items():
    if key != "big.weight":
        shapes[key.split(".")[0]] = {"kernel": (*tensor.shape[2:], *tensor.shape[1::-1])}
shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes,
                      is_leaf=lambda s: isinstance(s, tuple))
jax.device_put(np.ones(3)).block_until_ready()
before = status("VmRSS")
params = weights.load_params(table, shapes, stored)
print((status("VmHWM") - before) / weights.nbytes(params))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_loading_takes_little_more_than_the_weights(tmp_path):
    """Stored in another dtype, a third of them in one tensor."""
    ones = np.ones(17_000_000, np.float16)
    shapes = {"big.weight": (20_000, 850)}
    shapes |= {f"layer{i}.weight": (512, 512, 3, 3) for i in range(14)}
    path = tmp_path / "model.safetensors"
    write_file(path, {k: of_array(ones[: np.prod(s)].reshape(s)) for k, s in shapes.items()})
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert 0.95 < float(run.stdout) < 1.3
    assert len(open_file(path)) == 15
