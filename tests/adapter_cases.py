"""Tiny pipelines, and files of adapters for them in every naming."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import tiny_pipelines as tiny

from diffusion.pipelines import open_any
from diffusion.pretrained.adapters import layers

FOLDER = TemporaryDirectory()
KINDS = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
UNET = {  # diffusers' names -> those of the original code
    "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (
        "middle_block.1.transformer_blocks.0.attn2.to_k"
    ),
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0": (
        "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj": (
        "output_blocks.3.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "down_blocks.1.resnets.0.conv1": "input_blocks.3.0.in_layers.2",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.3.0.emb_layers.1",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "time_embedding.linear_2": "time_embed.2",
    "conv_out": "out.2",
}
TEXT = ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
TEXT = tuple(f"text_model.encoder.layers.1.{name}" for name in TEXT)
FORMER = {"q_proj": "to_q", "out_proj": "to_out"}


def under(name):
    return name.replace(".", "_")


def processor(name):
    attention, _, projection = name.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{projection}_lora"


def former(name):
    head, _, last = name.rpartition(".")
    return f"{head}.{FORMER[last]}_lora"


PEFT, OLD, LINEAR, KOHYA = (
    {"down": ".lora_A.weight", "up": ".lora_B.weight"},
    {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    {"down": ".lora_linear_layer.down.weight", "up": ".lora_linear_layer.up.weight"},
    {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"},
)
JOINED = {"down": ".down.weight", "up": ".up.weight"}
NAMED = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
# component, naming of a module, endings, and which modules have such names
FORMATS = {
    "peft": ("unet", lambda n: f"unet.{n}", PEFT),
    "peft, no prefix": ("unet", lambda n: n, PEFT),
    "peft folder": ("unet", lambda n: f"base_model.model.{n}", PEFT),
    "peft, adapter's name": ("unet", lambda n: f"unet.base_model.model.{n}", NAMED),
    "diffusers 2023": ("unet", lambda n: f"unet.{n}", OLD),
    "processors": ("unet", lambda n: f"unet.{processor(n)}", JOINED),
    "processors, no prefix": ("unet", processor, JOINED),
    "kohya": ("unet", lambda n: f"lora_unet_{under(n)}", KOHYA),
    "kohya, original blocks": ("unet", lambda n: f"lora_unet_{under(UNET[n])}", KOHYA),
    "lycoris": ("unet", lambda n: f"lycoris_{under(n)}", KOHYA),
    "dotted original": ("unet", lambda n: f"diffusion_model.{UNET[n]}", KOHYA),
    "text, peft": ("text_encoder", lambda n: f"text_encoder.{n}", PEFT),
    "text, flat": ("text_encoder", lambda n: f"text_encoder.{n[11:]}", PEFT),
    "text, 2023": ("text_encoder", lambda n: f"text_encoder.{n}", LINEAR),
    "text, former": ("text_encoder", lambda n: f"text_encoder.{former(n)}", JOINED),
    "text, folder": ("text_encoder", lambda n: f"base_model.model.{n}", PEFT),
    "text, kohya": ("text_encoder", lambda n: f"lora_te_{under(n)}", KOHYA),
    "text, kohya 1": ("text_encoder", lambda n: f"lora_te1_{under(n)}", KOHYA),
    "text 2, kohya": ("text_encoder_2", lambda n: f"lora_te2_{under(n)}", KOHYA),
    "text 2, peft": ("text_encoder_2", lambda n: f"text_encoder_2.{n}", PEFT),
    "text 2, former": ("text_encoder_2", lambda n: f"text_encoder_2.{former(n)}", JOINED),
}


@cache
def tiny_models():
    """Of each kind: the folder, the opened pipeline, its layers, and the weights elsewhere."""
    made = {}
    for name, kind in KINDS.items():
        folder = Path(FOLDER.name) / name
        theirs = tiny.whole(kind, folder)
        opened = open_any(folder)
        table = layers.table(
            opened.pipeline.network, opened.pipeline.conditioner.encoders, opened.shapes
        )
        parts = ("unet", "text_encoder", "text_encoder_2")
        weights = {
            part: {k: v.numpy() for k, v in getattr(theirs, part).state_dict().items()}
            for part in parts
            if getattr(theirs, part, None) is not None
        }
        for part in parts[1:]:  # versions of transformers differ in the prefix
            if part in weights:
                named = {k.removeprefix("text_model."): v for k, v in weights[part].items()}
                weights[part] = {
                    k if k.startswith("text_projection") else f"text_model.{k}": v
                    for k, v in named.items()
                }
        made[name] = SimpleNamespace(
            folder=folder, opened=opened, table=table, weights=weights, theirs=theirs
        )
    return made


def chosen(name, model):
    """The modules that have names in a format, and their weights' shapes."""
    component = FORMATS[name][0]
    modules = list(UNET) if component == "unet" else list(TEXT)
    if "processors" in name:
        modules = [m for m in modules if "attn" in m]
    if "former" in name:
        modules = [m for m in modules if "self_attn" in m]
    weights = model.weights[component]
    return {m: weights[f"{m}.weight"].shape for m in modules}


def factors(modules, ranks, dtype=np.float32, seed=0):
    """Random A and B of every module."""
    rng = np.random.default_rng(seed)
    made = {}
    for i, (module, (out, width, *kernel)) in enumerate(modules.items()):
        r = ranks[i % len(ranks)]
        down = rng.normal(size=(r, width, *kernel)).astype(dtype)
        made[module] = down, rng.normal(size=(out, r, *(1 for _ in kernel))).astype(dtype)
    return made


def by_hand(down, up, alpha):
    """alpha / r B A in float64."""
    r = len(down)
    matrix = up.reshape(len(up), r).astype(np.float64) @ down.reshape(r, -1).astype(np.float64)
    return (alpha or r) / r * matrix.reshape(len(up), *down.shape[1:])


def place(model, component, module):
    """Path and layer of a module."""
    layer = model.table.aliases[f"{component}.{module}"]
    return layer.paths["weight"], layer.shapes["weight"]


def assert_close(actual, expected, limit=1e-6):
    assert np.abs(np.asarray(actual) - expected).max() <= limit * np.abs(expected).max()


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def lora(model, name="kohya", ranks=(2,)):
    """A file's tensors, in a format."""
    _, naming, endings = FORMATS[name]
    tensors = {}
    for module, (down, up) in factors(chosen(name, model), ranks).items():
        tensors |= {naming(module) + endings["down"]: down, naming(module) + endings["up"]: up}
    return tensors
