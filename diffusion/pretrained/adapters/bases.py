"""For which model an adapter's file was made, and which files are no adapters of weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from diffusion.pretrained.adapters.factors import split
from diffusion.pretrained.files import Tensors

BASES = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "SDXL",
    1280: "SDXL's refiner",
}
"""Width of the text's embeddings -> the model that attends to them."""
KOHYA = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0", 1280: "sdxl_refiner_v1-0"}
"""The same, as kohya's scripts name them in ``ss_base_model_version``."""
NAMED = (
    (r"refiner", 1280),
    (r"sdxl|sd_xl|stable-diffusion-xl", 2048),
    (r"sd_?v?2|stable-diffusion-v2", 1024),
    (r"sd_?v?1|stable-diffusion-v1", 768),
)
"""Regular expression of what the metadata name -> the width."""
OTHERS = (
    (r"lora_controlnet", "a Control-LoRA, which is not supported"),
    (r"(image_proj|ip_adapter)\..*", "an IP-Adapter; it is for config.image_prompts"),
    (
        r"(control_model\.)?(input_hint_block|zero_convs|controlnet_cond_embedding|"
        r"controlnet_down_blocks)\..*",
        "a ControlNet; it is for config.control",
    ),
    (r"(adapter\.)?body\.\d+\..*", "a T2I-Adapter; it is for config.control"),
    (
        r"model\.diffusion_model\.(?!.*[._]lora[._]).*\.(weight|bias)|"
        r"(conv_in|time_embedding\.linear_1)\.weight",
        "a whole network; it is for config.model.path",
    ),
    (r"lllite_.*", "a ControlNet-LLLite, which is not supported"),
    (
        r"(lora_)?transformer[._].*|(diffusion_model\.|lora_unet_)(double|single|joint)_blocks.*",
        "for a transformer such as SD3 or FLUX, which is not supported",
    ),
)
"""Regular expression of a key -> what the file is."""
_CROSS = re.compile(r".*attn2[._](?:processor\.)?to_[kv]")


def other(keys: Collection[str]) -> str | None:
    """What a file is, by a key that is none of an adapter of weights; None if it has none."""
    for pattern, what in OTHERS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return what
    return None


def named(about: Mapping[str, str]) -> int | None:
    """The width of the base that a file's metadata name, where they name a known one."""
    text = about.get("ss_base_model_version") or about.get("modelspec.architecture", "")
    return next((width for pattern, width in NAMED if re.search(pattern, text.lower())), None)


def width(tensors: Tensors) -> int | None:
    """The width of the text's embeddings that a file's cross-attention reads, if it has any."""
    for key, tensor in tensors.items():
        name, part = split(key) or ("", "")
        if part in ("down", "hada_w1_b") and _CROSS.fullmatch(name) and len(tensor.shape) > 1:
            return tensor.shape[1]
    return None


def check(tensors: Tensors, about: Mapping[str, str], context: int | None) -> None:
    """Raises ValueError for a file that was made for another base than one with this context."""
    found = width(tensors)
    if found is None and context in BASES:
        found = named(about)
    check_context(found, context)


def check_context(found: int | None, context: int | None) -> None:
    """Raises ValueError for an adapter of a model with other text embeddings than this one has."""
    if found is not None and context is not None and found != context:
        raise ValueError(f"it was made for {_called(found)}, this model is {_called(context)}")


def _called(width: int) -> str:
    what = f"text embeddings of {width} numbers"
    return f"{BASES[width]} ({what})" if width in BASES else f"a model with {what}"
