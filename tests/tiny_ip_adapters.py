"""Random IP-Adapters in the published layout, for diffusers' tiny U-Nets."""

import torch
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from tiny_encoders import VISION, randomise

EMBEDDING, PATCHES, FACE = VISION["projection_dim"], VISION["hidden_size"], 20
KINDS = ("base", "plus", "full", "face")
RENAMES = {
    "base": [("image_embeds", "proj")],
    "full": [("ff.net.0.proj", "proj.0"), ("ff.net.2", "proj.2"), ("norm", "proj.3")],
    "face": [("ff.net.0.proj", "proj.0"), ("ff.net.2", "proj.2")],
    "plus": [(".ln0", ".0.norm1"), (".ln1", ".0.norm2"), (".attn.to_out.0", ".0.to_out")],
}
RENAMES["plus"] += [(".attn.", ".0."), (".ff.1.net.0.proj", ".1.1"), (".ff.1.net.2", ".1.3")]
RENAMES["plus"] += [(".ff.0", ".1.0")]


def projection(kind, width, seed=0):
    """diffusers' module."""
    made = {
        "base": lambda: ImageProjection(EMBEDDING, width, 4),
        "full": lambda: IPAdapterFullImageProjection(PATCHES, width),
        "face": lambda: IPAdapterFaceIDImageProjection(FACE, width, 2, 4),
        "plus": lambda: IPAdapterPlusImageProjection(PATCHES, width, 48, heads=2, num_queries=5),
    }
    return randomise(made[kind](), seed)


def published(module, kind):
    """The keys and tensors of ``image_proj``."""
    found = {}
    for key, value in module.state_dict().items():
        for old, new in RENAMES[kind]:
            key = key.replace(old, new)
        found[key] = value
    if kind == "plus":
        for key in [key for key in found if key.endswith("to_k.weight")]:
            k, v = found.pop(key), found.pop(key.replace("to_k", "to_v"))
            found[key.replace("to_k", "to_kv")] = torch.cat([k, v])
    return found


def adapter(unet, kind="base", seed=0, rank=3):
    """{"image_proj.*", "ip_adapter.N.*"} for a U-Net of diffusers."""
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    state = {
        f"image_proj.{k}": v for k, v in published(projection(kind, width, seed), kind).items()
    }

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    for number, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        at, inner = f"ip_adapter.{number}", attention.to_q.in_features
        if name.endswith("attn2.processor"):
            state[f"{at}.to_k_ip.weight"] = matrix(inner, width)
            state[f"{at}.to_v_ip.weight"] = matrix(inner, width)
        if kind == "face":
            for part in ("q", "k", "v", "out"):
                layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
                down, up = matrix(rank, layer.in_features), matrix(layer.out_features, rank)
                state[f"{at}.to_{part}_lora.down.weight"] = down
                state[f"{at}.to_{part}_lora.up.weight"] = up
    return {key: value.detach().contiguous() for key, value in state.items()}
