"""The adapters that can be trained, by the name that a spec gives them."""

from __future__ import annotations

from collections.abc import Callable

from diffusion.adapters.adapter import Adapter
from diffusion.adapters.controlnet import controlnet
from diffusion.adapters.full import full
from diffusion.adapters.instruct import instruct
from diffusion.adapters.ip_adapter import ip_adapter
from diffusion.adapters.low_rank.lora import lora

CHOICES: dict[str, Callable[..., Adapter]] = {
    "controlnet": controlnet,
    "full": full,
    "instruct": instruct,
    "ip_adapter": ip_adapter,
    "lora": lora,
}
