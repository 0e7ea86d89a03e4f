"""What stands around a denoiser's network, such as ControlNets and IP-Adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn

from diffusion.models.text_to_image import TextToImage


class Around(nn.Module):
    """A denoiser's network with something around it, such as a ControlNet; others derive.

    Its parameters are {"network": the inner one's, ...}, and its inner network may again have
    something around it.

    Attributes:
      network: the inner one.
      column: what a batch calls that which it reads (see ``conditioning.from_batch``).
    """

    network: nn.Module
    column: ClassVar[str] = ""


def image_network(network: nn.Module) -> nn.Module:
    """The innermost denoiser's network within ``network``, without text encoder and adapters."""
    while isinstance(network, TextToImage | Around):
        network = network.image if isinstance(network, TextToImage) else network.network
    return network


def with_image_network(network: nn.Module, image: nn.Module) -> nn.Module:
    """``network`` with another innermost denoiser's network; what is around it stays."""
    if isinstance(network, TextToImage):
        return network.clone(image=with_image_network(network.image, image))
    if isinstance(network, Around):
        return network.clone(network=with_image_network(network.network, image))
    return image


def bare(network: nn.Module) -> nn.Module:
    """``network`` without what stands around its denoiser; a text encoder stays."""
    if isinstance(network, TextToImage):
        return network.clone(image=bare(network.image))
    return bare(network.network) if isinstance(network, Around) else network


def around(network: nn.Module) -> list[Around]:
    """What stands around the denoiser's network within ``network``, outermost first."""
    if isinstance(network, TextToImage):
        return around(network.image)
    return [network, *around(network.network)] if isinstance(network, Around) else []


def parts(network: nn.Module, path: str = "network") -> dict[str, nn.Module]:
    """The networks within ``network`` by the paths of their parameters, without what is around
    them: {"network/text": ..., "network/image": ...}, or {"network": network}."""
    if isinstance(network, TextToImage):
        return parts(network.text, f"{path}/text") | parts(network.image, f"{path}/image")
    if isinstance(network, Around):
        return parts(network.network, f"{path}/network")
    return {path: network}


def columns(network: nn.Module) -> tuple[str, ...]:
    """What a batch must have, besides labels or texts, for what stands around a denoiser."""
    return tuple(each.column for each in around(network))


def surrounded(network: nn.Module, make: Callable[[nn.Module], Around]) -> nn.Module:
    """``network`` with something around its denoiser; a text encoder stays outside."""
    if isinstance(network, TextToImage):
        return network.clone(image=make(network.image))
    return make(network)


def surrounded_params(network: nn.Module, params: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of ``surrounded(network, ...)``: those of ``network`` and the surrounding's own,
    by the names of its submodules."""
    if isinstance(network, TextToImage):
        return {**params, "image": {"network": params["image"], **own}}
    return {"network": params, **own}
