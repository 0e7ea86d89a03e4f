"""Every layer of a model that an adapter may change, and every name that files give it.

There is one table for each model, made from its own structure. A name is a key of a file without
its ending: ``unet.down_blocks.0.attentions.0.proj_in`` of diffusers and PEFT, or
``lora_unet_down_blocks_0_attentions_0_proj_in`` of kohya's scripts, which also number the blocks as
the original code of latent diffusion does (``lora_unet_input_blocks_1_1_proj_in``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn

from diffusion.models.surroundings import parts
from diffusion.pretrained import models
from diffusion.pretrained.names import Match, Names, bind
from diffusion.pretrained.single_file import keys

UNET, TEXT, TEXT_2, OWN = "unet", "text_encoder", "text_encoder_2", "network"
"""Components, as files name them; the last is of networks that only this project has."""
PEFT = "base_model.model."
FORMER_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
_PROJECTION = re.compile(r"(.*)\.(to_[qkv]|to_out)(?:\.0)?")


@dataclass(frozen=True)
class Layer:
    """A layer, and what its parameters are called.

    Attributes:
      component: "unet", "text_encoder", "text_encoder_2" or "network".
      name: its own, in PEFT's naming, without the component: "down_blocks.0.attentions.0.proj_in".
      kohya: the whole name in kohya's naming.
      paths: of our parameters in a pipeline's, by "weight" and "bias".
      shapes: in PyTorch's layout, likewise.
    """

    component: str
    name: str
    kohya: str
    paths: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def peft(self) -> str:
        """The whole name in PEFT's naming."""
        return f"{self.component}.{self.name}"


class Table(NamedTuple):
    """All layers of a model.

    Attributes:
      layers: each once.
      aliases: every name of a layer -> the layer.
      context: width of the text's embeddings that a U-Net attends to, or None.
    """

    layers: tuple[Layer, ...]
    aliases: Mapping[str, Layer]
    context: int | None


def table(network: nn.Module, encoders: Sequence[nn.Module], shapes: Mapping[str, Any]) -> Table:
    """The layers of a pipeline's network and text encoders.

    Args:
      network, encoders: the modules.
      shapes: of their parameters, arrays or ``jax.ShapeDtypeStruct``s: {"network": ...,
        "encoders": [...]}.
    """
    found: list[Layer] = []
    aliases: dict[str, Layer] = {}
    modules = parts(network) | {f"encoders/{i}": net for i, net in enumerate(encoders)}
    for path, module in modules.items():
        kind = KINDS.get(type(module).__name__, _own)
        for layer, names in kind(module, path, _below(shapes, path), len(encoders) > 1):
            found.append(layer)
            for name in dict.fromkeys(names):
                if aliases.setdefault(name, layer) is not layer:
                    raise ValueError(f"{name} would be both {aliases[name].peft} and {layer.peft}")
    widths = [x.shapes["weight"][1] for x in found if x.peft.endswith(".attn2.to_k")]
    return Table(tuple(found), aliases, widths[0] if widths else None)


Named = Iterator[tuple[Layer, list[str]]]


def _unet(net: nn.Module, path: str, params: Any, several: bool) -> Named:
    """Of a U-Net: names of diffusers, of the original code, and of former attention processors."""
    original = _original(net, params)
    # Files for SDXL have the original code's numbers, others diffusers'.
    numbered = net.added_embedding and original
    for name, group in _grouped(bind(models.table(net), params)).items():
        theirs = original.get(group[0].ours[0], "")
        dotted = [name, *([theirs] if theirs else [])]
        prefixes = ("lora_unet_", "lycoris_unet_", "lycoris_")
        names = [f"{p}{n.replace('.', '_')}" for n in dotted for p in prefixes]
        names += _prefixed(UNET, name)
        names += [f"{p}{theirs}" for p in ("diffusion_model.", "model.diffusion_model.") if theirs]
        if found := _PROJECTION.fullmatch(name):
            former = f"{found[1]}.processor.{found[2]}"
            names += [former, f"{UNET}.{former}"]
        kohya = "lora_unet_" + (theirs if numbered else name).replace(".", "_")
        yield _layer(UNET, name, kohya, path, group), names


def _original(net: nn.Module, params: Any) -> dict[str, str]:
    """Our parameter -> its layer's name in the original code, where that has such a network."""
    try:
        matches = bind(keys.unet(net, ""), params)
    except ValueError:
        return {}
    return {m.ours[0]: m.theirs[0].rpartition(".")[0] for m in matches}


def _clip(net: nn.Module, path: str, params: Any, several: bool) -> Named:
    """Of a CLIP text encoder, one of several or not; one with a projection is SDXL's second."""
    second = net.projection is not None
    component = TEXT_2 if second else TEXT
    kohya = "lora_te2_" if second else "lora_te1_" if several else "lora_te_"
    first = path != "encoders/1"
    prefixes = ("lora_te2_", "lycoris_te2_") if second else ("lora_te_", "lora_te1_", "lycoris_te_")
    for name, group in _grouped(bind(models.table(net), params)).items():
        # Newer versions of transformers leave text_model out.
        dotted = list(dict.fromkeys([name, name.removeprefix("text_model.")]))
        names = [f"{p}{n.replace('.', '_')}" for n in dotted for p in prefixes]
        head, _, last = name.rpartition(".")
        if last in FORMER_TEXT:
            former = f"{head}.{FORMER_TEXT[last]}"
            dotted += [former, former.removeprefix("text_model.")]
        names += [n for d in dotted for n in _prefixed(component, d, alone=first)]
        yield _layer(component, name, kohya + name.replace(".", "_"), path, group), names


def _own(net: nn.Module, path: str, params: Any, several: bool) -> Named:
    """Of any other network: the paths of our parameters, with dots, and numbers in stacks."""
    below = path.removeprefix("network").removeprefix("/")
    rule = Names(lambda module: f"{below}/{module}".strip("/").replace("/", "."))
    for name, group in _grouped(bind(rule, params)).items():
        for layer in _unstacked(_layer(OWN, name, _own_kohya(name), path, group)):
            yield layer, [layer.peft, layer.kohya]


def _own_kohya(name: str) -> str:
    return f"lora_network_{name.replace('.', '_')}"


def _unstacked(layer: Layer) -> Iterator[Layer]:
    """The layer, or each one of a stack, and what is left of the stack without its matrices."""
    shape = layer.shapes.get("weight", ())
    if len(shape) != 3:
        yield layer
        return
    for i in range(shape[2]):
        name, paths = f"{layer.name}.{i}", {"weight": f"{layer.paths['weight']}/{i}"}
        yield Layer(OWN, name, _own_kohya(name), paths, {"weight": shape[:2]})
    paths, shapes = dict(layer.paths), dict(layer.shapes)
    del paths["weight"], shapes["weight"]
    yield replace(layer, paths=paths, shapes=shapes)


KINDS: dict[str, Callable[[nn.Module, str, Any, bool], Named]] = {"UNet": _unet, "ClipText": _clip}
"""Classes whose layers have names in others' files, as in ``models.MODULES``."""


def _prefixed(component: str, name: str, alone: bool = True) -> list[str]:
    prefixes = [f"{component}.", f"{component}.{PEFT}", *(["", PEFT] if alone else [])]
    return [prefix + name for prefix in prefixes]


def _grouped(matches: Sequence[Match]) -> dict[str, list[Match]]:
    """Weight and bias of each layer, by the layer's name."""
    groups: dict[str, list[Match]] = {}
    for match in matches:
        name, _, leaf = match.theirs[0].rpartition(".")
        if name and leaf in ("weight", "bias"):
            groups.setdefault(name, []).append(match)
    return groups


def _layer(component: str, name: str, kohya: str, path: str, group: Sequence[Match]) -> Layer:
    leaves = [match.theirs[0].rpartition(".")[2] for match in group]
    paths = {leaf: f"{path}/{match.ours[0]}" for leaf, match in zip(leaves, group)}
    return Layer(component, name, kohya, paths, dict(zip(leaves, (m.shapes[0] for m in group))))


def _below(shapes: Mapping[str, Any], path: str) -> Any:
    first, *rest = path.split("/")
    if first == "encoders":
        return shapes[first][int(rest[0])]
    tree = shapes[first]
    for name in rest:
        tree = tree[name]
    return tree
