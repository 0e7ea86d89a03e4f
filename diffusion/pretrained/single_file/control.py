"""ControlNets and T2I-Adapters in files without settings, which their keys and shapes determine.

Such a file is in the naming of the authors' code or of diffusers. A ControlNet's other settings are
those of Stable Diffusion 1, 2 or XL.

    net = open_net("control_v11p_sd15_canny.safetensors")
    params = net.load(dtype=jnp.bfloat16)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import numpy as np

from diffusion.models.controlnet import ControlNet, controlnet_of
from diffusion.models.t2i_adapter import T2IAdapter, full, full_xl, light
from diffusion.pretrained import files, models
from diffusion.pretrained.models import Model
from diffusion.pretrained.names import Names
from diffusion.pretrained.single_file import keys
from diffusion.pretrained.single_file.families import FAMILIES, NO_WEIGHTS

CLASSES = ("ControlNetModel", "T2IAdapter")
BASES = {width: FAMILIES[f].parts["unet"][1] for width, f in ((768, "v1"), (1024, "v2"))}
BASES[2048] = FAMILIES["xl_base"].parts["unet"][1]
"""Width of the context -> makes the U-Net that a ControlNet is for."""
UNSUPPORTED = (
    (r"lora_controlnet", "a Control-LoRA, which is not supported"),
    (r"difference", "a ControlNet stored as differences to a U-Net, which is not supported"),
    (r"task_embedding|control_add_embedding\..*", "a union of ControlNets, which is not supported"),
)
OTHERS = (
    (r"lllite_.*", "a ControlNet-LLLite, which is not supported"),
    (r"(style_embedding|transformer_layes.*)", "a style adapter, which is not supported"),
    (r"(image_proj|ip_adapter)\..*", "an IP-Adapter; it is for config.image_prompts"),
    (r"lora_(unet|te)\d?_.*|.*\.lora_A\..*", "a LoRA; it is for config.adapters"),
    (r"(model\.diffusion_model|up_blocks)\..*", "a whole network; it is for config.model.path"),
)
"""Regular expression of a key -> what the file is."""
WHOLE = rf"(model\.diffusion_model|first_stage_model|cond_stage_model)\..*|{NO_WEIGHTS}"
"""Keys beside a ControlNet's where a file also holds the pipeline that it was trained with."""


def open_net(
    path_or_id: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    global_pool: bool | None = None,
    bgr: bool | None = None,
) -> Model:
    """A ControlNet or a T2I-Adapter, whose weights are not read yet.

    Args:
      path_or_id: a .safetensors file, or a folder or an id on the Hugging Face hub.
      variant, revision: of a folder or an id, see ``models.open_model``.
      global_pool, bgr: see ``ControlNet``; by default what config.json says. A file does not say
        it, and is opened with False.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: another kind of model; weights that are missing, misshapen or of no part of it; a
        setting that a T2I-Adapter does not have. Reading a weight that is not finite raises it,
        too.
    """
    path = Path(path_or_id)
    if path.is_file() or path.suffix in (".safetensors", *files.PICKLES):
        model = _of_file(path)
    else:
        model = models.open_model(path_or_id, variant=variant, revision=revision)
        name = type(model.module).__name__
        if models.MODULES[name] not in ("controlnet", "t2i_adapter"):
            kind = model.config.get("_class_name") or name
            raise ValueError(
                f"{model.source} holds a model of class {kind}; expected {' or '.join(CLASSES)}"
            )
    settings = {"global_pool": global_pool, "bgr": bgr}
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings and not isinstance(model.module, ControlNet):
        raise ValueError(
            f"{model.source}: {', '.join(settings)}: a T2I-Adapter has no such setting"
        )
    module = model.module.clone(**settings)
    tensors = {key: _finite(key, tensor, model.source) for key, tensor in model.tensors.items()}
    return replace(model, module=module, config=models.to_config(module), tensors=tensors)


def _finite(key: str, tensor: files.Tensor, source: str) -> files.Tensor:
    """The tensor, whose reading raises ValueError if it holds NaN or infinity."""

    def read() -> np.ndarray:
        values = tensor.read()
        if not np.isfinite(values.astype(np.float32, copy=False)).all():
            raise ValueError(f"{source}: {key} holds values that are not finite (NaN or infinity)")
        return values

    return replace(tensor, read=read)


def _of_file(path: Path) -> Model:
    tensors = files.open_file(path)
    try:
        module, table, used = _recognised(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    unused = sorted(set(tensors) - set(used))
    if unused:
        some = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        warnings.warn(f"{path}: {len(unused)} tensors are not used: {some}", stacklevel=3)
    model = Model(module, models.to_config(module), table, used, str(path))
    model.check()
    return model


def _recognised(tensors: files.Tensors) -> tuple[nn.Module, Names, files.Tensors]:
    """The network that a file holds, its name table, and its tensors."""
    _refuse(tensors, UNSUPPORTED)
    hint = "input_hint_block.0.weight"
    prefix = "control_model." if f"control_model.{hint}" in tensors else ""
    if f"{prefix}{hint}" in tensors:
        others = WHOLE if prefix else NO_WEIGHTS
        own = {key: t for key, t in tensors.items() if not re.fullmatch(others, key)}
        net = _controlnet(own, f"{prefix}{hint}", f"{prefix}input_blocks.0.0.weight")
        return net, keys.controlnet(net, prefix), own
    hint = "controlnet_cond_embedding.conv_in.weight"
    if hint in tensors:
        net = _controlnet(tensors, hint, "conv_in.weight")
        return net, models.table(net), tensors
    if any(re.match(r"(adapter\.)?body\.\d", key) for key in tensors):
        prefix = "adapter." if any(key.startswith("adapter.") for key in tensors) else ""
        net = _t2i_adapter(tensors, prefix)
        return net, models.table(net) if prefix else keys.t2i_adapter(net), tensors
    _refuse(tensors, OTHERS)
    some = ", ".join(sorted(tensors)[:3])
    raise ValueError(f"no ControlNet or T2I-Adapter that is known; it begins with {some}")


def _refuse(tensors: files.Tensors, kinds: Sequence[tuple[str, str]]) -> None:
    for pattern, what in kinds:
        if any(re.fullmatch(pattern, key) for key in tensors):
            raise ValueError(f"expected a ControlNet or a T2I-Adapter, this is {what}")


def _controlnet(tensors: files.Tensors, hint: str, first: str) -> ControlNet:
    """The ControlNet of a published U-Net; the keys are of the first weights."""
    found = (t.shape[-1] for key, t in tensors.items() if key.endswith("attn2.to_k.weight"))
    context = next(found, None)
    if context not in BASES:
        raise ValueError(
            f"a ControlNet of no known network: it attends to a context of width {context}, known "
            f"are {', '.join(map(str, BASES))}; put it into a folder with its config.json"
        )
    net = controlnet_of(BASES[context](), ControlNet.hint_widths)
    return net.clone(in_channels=_shape(tensors, first)[1], hint_channels=tensors[hint].shape[1])


def _t2i_adapter(tensors: files.Tensors, prefix: str) -> T2IAdapter:
    """The adapter with widths and numbers of blocks as its tensors have them."""
    body = f"{prefix}body."
    bottleneck = f"{body}0.out_conv.weight" in tensors
    numbered = (re.match(rf"{re.escape(body)}(\d+)\.", key) for key in tensors)
    count = 1 + max(int(found[1]) for found in numbered if found)
    if bottleneck or prefix:
        part = "resnets" if prefix else "body"
        inner = rf"{re.escape(body)}0\.{part}\.\d+\.block1\.weight"
        blocks = sum(re.fullmatch(inner, key) is not None for key in tensors)
        last = "out_conv" if bottleneck else "resnets.0.block1"
        stages = [f"{body}{i}.{last}.weight" for i in range(count)]
    else:  # one list of all blocks, two for each stage
        blocks, stages = 2, [f"{body}{i}.block1.weight" for i in range(0, count, 2)]
    widths = tuple(_shape(tensors, key)[0] for key in stages)
    first = _shape(tensors, f"{body}0.in_conv.weight" if bottleneck else f"{prefix}conv_in.weight")
    # SDXL's start with squares of 16 pixels of one or three channels, the others with 8.
    factor = 16 if first[1] in (256, 768) else 8
    make = light if bottleneck else full_xl if factor == 16 else full
    return make(widths, blocks=blocks, factor=factor, hint_channels=first[1] // factor**2)


def _shape(tensors: files.Tensors, key: str) -> tuple[int, ...]:
    if key not in tensors:
        raise ValueError(f"{key} is missing")
    return tensors[key].shape
