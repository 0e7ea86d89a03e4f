"""What ControlNets and T2I-Adapters follow: specs, checked, and what they add to a pipeline.

    config.control='canny(net="sd-controlnet-canny", image="x.png", scale=0.8)'

Several specs are several nets, whose effects add up. Maps, scales and the noise levels at which a
net acts are data of the compiled sampler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion import specs
from diffusion.conditioning import Conditioning
from diffusion.conditions.pixels import grey
from diffusion.errors import field, wrong_types
from diffusion.models.controlled import Controlled, nets_around
from diffusion.models.surroundings import surrounded, surrounded_params
from diffusion.pipelines.condition_maps import CHOICES, Control, Pictures
from diffusion.pipelines.control_nets import Net, open_net
from diffusion.pipelines.extension import Extension
from diffusion.pipelines.guidance import Specs
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pretrained.schedulers import Sampler

FIELD = "config.control"
FAINTEST = 0.1  # of guess mode's factors: that of the finest feature


def make(
    pipeline: Pipeline, sampler: Sampler, given: Specs, size: tuple[int, int], pictures: Pictures
) -> Sequence[Extension]:
    """The one extension of all specs, such as those of config; none of ().

    Args:
      pipeline: the model.
      sampler: whose steps ``start`` and ``end`` count.
      given: specs of ``CHOICES``.
      size: (height, width) of the pictures that are made, in pixels.
      pictures: what they are made from: "image" [H, W, C] in [-1, 1] and "mask", where there are.

    Raises:
      ValueError, FileNotFoundError: something does not fit; no weight has been read.
    """
    texts, own = specs.texts(given), nets_around(pipeline.network)
    if own and len(texts) != len(own):
        raise ValueError(
            f"{FIELD}={given!r}: this model has {len(own)} ControlNet of its own, which follows a "
            'map; expected a spec without net, as in canny(image="x.png")'
        )
    nets = [Net(module) for module in own] or [None] * len(texts)
    made = [_followed(*each, pipeline, sampler, size, pictures) for each in zip(texts, nets)]
    return (Following(None if own else pipeline.network, tuple(made)),) if made else ()


@dataclass(frozen=True, eq=False)
class Followed:
    """A net and what it follows.

    Attributes:
      name: of the kind of map.
      net: its weights, not read yet.
      map: [H, W, C], as the net reads it.
      scale, null_scale: [K] factors of what the net adds, to what is steered towards and away from.
      first, last: the c_noise between which it acts.
    """

    name: str
    net: Net
    map: np.ndarray
    scale: np.ndarray
    null_scale: np.ndarray
    first: float
    last: float


def _followed(
    text: str,
    own: Net | None,
    pipeline: Pipeline,
    sampler: Sampler,
    size: tuple[int, int],
    pictures: Pictures,
) -> Followed:
    with field(f"{FIELD}={text!r}"), wrong_types():
        (control,) = specs.values((text,), CHOICES, FIELD)
        if bool(control.net) == bool(own):
            raise ValueError(
                "the model's own ControlNet takes no other net"
                if own
                else f'{control.name} needs net="...", a folder, a file or a run'
            )
        first, last = interval(sampler, control.start, control.end)
        net = own or open_net(control.net, pipeline, control.pool)
        check_effects(control, net, size)
        made = control.map(size, pictures)
        if net.channels == 1:
            made = grey(made)[..., None].astype(np.float32)
        made = made[..., ::-1] if control.bgr and not net.bgr else made
        scale = factors(control, net)
        null = scale * (not (control.guess or net.pools))
    return Followed(control.name, net, made, scale, null, first, last)


def check_effects(control: Control, net: Net, size: tuple[int, int]) -> None:
    """Raises ValueError for what cannot act on this net, or a size that the net does not take."""
    if control.bgr and net.channels == 1:
        raise ValueError("bgr=True has no effect: the net reads a grey map")
    if control.pool and not net.pools:
        raise ValueError("pool=True has no effect: it is for ControlNets of files and folders")
    if size[0] % net.unit or size[1] % net.unit:
        raise ValueError(
            f"a picture of {size[0]} x {size[1]} pixels: the net takes multiples of {net.unit}"
        )


def factors(control: Control, net: Net) -> np.ndarray:
    """[K] the factors of what a net adds, those of guess mode included.

    Raises:
      ValueError: another number of scales than of places where the net adds something.
    """
    scale = np.atleast_1d(np.float32(control.scale))
    if len(scale) not in (1, net.places):
        raise ValueError(
            f"scale={control.scale} has {len(scale)} numbers; expected 1, or {net.places}: one for "
            "each place where the net adds something"
        )
    if control.guess and not net.pools:
        scale = scale * np.geomspace(FAINTEST, 1, net.places, dtype=np.float32)
    return np.broadcast_to(scale, net.places)


def interval(sampler: Sampler, start: float, end: float) -> tuple[float, float]:
    """The c_noise between which all evaluations lie that belong to steps between start and end.

    Step i of n is one of them where i / n >= start and (i + 1) / n <= end. An evaluation belongs to
    the step in which its level lies; at the level where one step ends and another starts, to the
    latter.

    Raises:
      ValueError: no step is between.
    """
    nodes, level = np.asarray(sampler.grid.t), sampler.solver.level
    steps = len(nodes) - 1
    # Of an evaluation: how many nodes are at least as noisy, but for rounding.
    step = (nodes[None, :-1] >= np.asarray(level.t)[:, None] * (1 - 1e-9)).sum(1) - 1
    step = step.clip(0)
    acts = (step / steps >= start) & ((step + 1) / steps <= end)
    if not acts.any():
        raise ValueError(
            f"start={start} and end={end} leave no step of {steps}, each of which is "
            f"{1 / steps:.3g} of the way, whole"
        )
    seen = np.asarray(sampler.c_noise(level), np.float64)
    first, last = seen[acts].min(), seen[acts].max()
    below, above = seen[~acts & (seen < first)], seen[~acts & (seen > last)]
    first = (first + below.max()) / 2 if below.size else -np.inf
    last = (last + above.min()) / 2 if above.size else np.inf
    return float(first), float(last)


@dataclass(frozen=True, eq=False)
class Following:
    """Nets around a pipeline; ``Extension`` describes the methods.

    Attributes:
      network: what they stand around; None: the pipeline has them already.
      followed: the nets and what they follow.
    """

    network: nn.Module | None
    followed: tuple[Followed, ...]

    @property
    def pictures(self) -> Mapping[str, np.ndarray]:
        """The maps [H, W, C] in [-1, 1]: "canny", and of several of a kind "canny_2"."""
        shown: dict[str, np.ndarray] = {}
        for each in self.followed:
            same = sum(other.name == each.name for other in self.followed[: len(shown)])
            name = f"{each.name}_{same + 1}" if same else each.name
            shown[name] = 2 * each.map.clip(0, 1) - 1
        return shown

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        if self.network is None:
            return pipeline
        nets = tuple(each.net.module for each in self.followed)
        network = surrounded(pipeline.network, partial(Controlled, nets=nets))
        return replace(pipeline, network=network)

    def load(self, params: Params) -> Params:
        """Also, as "control", what each net follows: a map or a T2I-Adapter's features of it."""
        dtype = jax.tree.leaves(params["network"])[0].dtype
        own = {
            f"nets_{i}": each.net.load(dtype)
            for i, each in enumerate(self.followed)
            if each.net.load is not None
        }
        hints = [
            each.net.hint(own.get(f"nets_{i}", {}), jnp.asarray(each.map[None]))
            for i, each in enumerate(self.followed)
        ]
        network = params["network"]
        if self.network is not None:
            network = surrounded_params(self.network, network, own)
        return {**params, "network": network, "control": hints}

    def condition(
        self, params: Params, keys: jax.Array, cond: Conditioning, null: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        count = len(keys)

        def repeated(value: Any) -> jax.Array:
            return jnp.repeat(jnp.asarray(value, jnp.float32)[None], count, axis=0)

        def following(c: Conditioning | None, towards: bool) -> Conditioning | None:
            if c is None:
                return None
            hints = [
                jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), hint).replace(
                    scale=repeated(each.scale if towards else each.null_scale),
                    first=repeated(each.first),
                    last=repeated(each.last),
                )
                for each, hint in zip(self.followed, params["control"])
            ]
            return c.replace(hints=(*c.hints, *hints))

        return following(cond, True), following(null, False)
