"""ControlNets and T2I-Adapters for a pipeline: from files or runs, checked against its U-Net."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion.conditioning import Hint
from diffusion.errors import field
from diffusion.models.controlled import check_fit
from diffusion.models.controlnet import controlnet_of
from diffusion.models.fields import per_level
from diffusion.objectives.adapting import OWN
from diffusion.pipelines.from_run import Run, is_run, open_run
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pretrained.adapters.bases import BASES
from diffusion.pretrained.single_file import control as files


@dataclass(frozen=True, eq=False)
class Net:
    """A ControlNet or a T2I-Adapter whose weights have not been read.

    Attributes:
      module: the network.
      load: a dtype -> its parameters; None: the pipeline has them already.
    """

    module: nn.Module
    load: Callable[[DTypeLike], Mapping[str, Any]] | None = None

    @property
    def timeless(self) -> bool:
        """Whether what it adds is the same at all steps: a T2I-Adapter."""
        return not hasattr(self.module, "hint_widths")

    @property
    def channels(self) -> int:
        """Of the map that it reads."""
        return self.module.hint_channels

    @property
    def pools(self) -> bool:
        """Whether it takes colours and not places from its map."""
        return getattr(self.module, "global_pool", False)

    @property
    def bgr(self) -> bool:
        """Whether it takes the map's channels as blue, green and red by itself."""
        return getattr(self.module, "bgr", False)

    @property
    def unit(self) -> int:
        """Pixels of which its map's sides must be multiples."""
        return getattr(self.module, "factor", 1)

    @property
    def places(self) -> int:
        """K, where it adds something: skip connections and mid block, or levels."""
        net = self.module
        if self.timeless:
            return len(net.widths)
        return sum(per_level(net.blocks, i) + 1 for i in range(len(net.widths))) + 1

    def hint(self, params: Mapping[str, Any], image: jax.Array) -> Hint:
        """What is followed, of its map, image [1, H, W, C]."""
        if not self.timeless:
            return Hint(image)
        return Hint(features=tuple(jax.jit(self.module.apply)({"params": params}, image)))


def open_net(path: str, pipeline: Pipeline, pool: bool = False) -> Net:
    """The net in a folder, a file or a run's workdir, or on the hub, for a pipeline's U-Net.

    Args:
      path: where it is.
      pipeline: what it is for.
      pool: it takes means over the picture, which its file does not say.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no such net, or for another network.
    """
    with field(f"net={path!r}"):
        if is_run(path):
            run = open_run(path)
            if run.base is None or not hasattr(run.adapter, "hint_widths"):
                raise ValueError("this run trained no ControlNet")
            unet = run.base.pipeline.image_network
            net = Net(controlnet_of(unet, run.adapter.hint_widths), partial(_trained, run))
        else:
            model = files.open_net(path, global_pool=pool or None)
            net = Net(model.module, lambda dtype: model.load(dtype=dtype))
        check(net, pipeline)
    return Net(net.module.clone(dtype=pipeline.image_network.dtype), net.load)


def check(net: Net, pipeline: Pipeline) -> None:
    """Raises ValueError unless the net is for the pipeline's network."""
    unet = pipeline.image_network
    if not hasattr(unet, "mid_attention"):
        raise ValueError(f"it is for a U-Net; this model's network is a {type(unet).__name__}")
    if net.channels not in (1, 3):
        raise ValueError(f"it reads a map of {net.channels} channels; expected 1 or 3")
    base = BASES.get(getattr(net.module, "context_width", None))
    known = base is not None and base != BASES.get(unet.context_width)
    with field(f"it was made for {base}") if known else nullcontext():
        check_fit(net.module, unet, pipeline.codec.factor)


def _trained(run: Run, dtype: DTypeLike) -> Mapping[str, Any]:
    """What a run trained."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), run.restored[0][OWN])
