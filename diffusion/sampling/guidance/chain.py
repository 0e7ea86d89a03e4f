"""Guidance as a chain of links, each a named transform with its numbers.

    chain = (cfg(7.5), rescale(0.7), interval(0.3, 5.0), clip())
    denoise = guide(chain, Branches(denoiser, cond, null))

A chain is a tuple of links and a pytree: its numbers are leaves, () or [B] for one per image, so
that it can be an argument of a compiled sampler, which other numbers do not compile again. What
changes the program (``split``, ``blocks``, whether there is momentum) is static. ``links`` has the
functions that make them.

Links act from left to right, the innermost first: each transforms what those before it give.

- ``(cfg(3), interval(0.3, 5), clip())`` guides at medium noise only and clips at every level.
- ``(cfg(3), clip(), interval(0.3, 5))`` also clips at medium noise only, since an interval limits
  everything that stands before it: elsewhere the model is alone.

The first link may make the pair of estimates that guidance extrapolates (``cfg``,
``autoguidance``); how they are combined (``rescale``, ``adaptive_projected``) follows at once, and
then ``perturbed_attention``, which adds to what was combined. All others stand after these, in any
order. ``check`` refuses what has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import flax.struct

from diffusion import predictions
from diffusion.conditioning import Conditioning
from diffusion.denoiser import ConditionalDenoise, Denoise, Stateful
from diffusion.levels import Array
from diffusion.predictions import Prediction
from diffusion.sampling import guidance
from diffusion.sampling.acceleration import NONE, Acceleration

Number = Array | float  # (), or [B]: one per image

PAIR, RULE, ADDITION, AFTER = range(4)

_TASKS = {
    PAIR: "guides the model itself",
    RULE: "says how two estimates are combined",
    ADDITION: "adds to what two estimates are combined to",
}


class Branches(NamedTuple):
    """What links are made of.

    ``null`` is None if the model knows no conditions, or for no guidance. ``middle`` has the
    picture but not the text, for ``instruct``, whose ``null`` has neither. ``prediction`` is for
    ``rescale`` and for a cache of the guidance. ``networks`` are others by name: "weak", a
    conditional denoiser; "classifier", (x, level) -> logits.
    """

    denoise: ConditionalDenoise  # the model
    cond: Conditioning  # what to steer towards, batch [B]
    null: Conditioning | None = None  # what to steer away from
    middle: Conditioning | None = None
    prediction: Prediction = predictions.x0  # what the model's output means
    networks: Mapping[str, Callable] = {}
    acceleration: Acceleration = NONE  # for as many evaluations as the solver makes

    @property
    def plain(self) -> Denoise:
        """The model with its conditioning."""
        return guidance.conditional(self.denoise, self.cond)


def _static(default: str | int | bool) -> str | int | bool:
    return flax.struct.field(pytree_node=False, default=default)


@flax.struct.dataclass
class Link:
    """A named transform with its numbers; all else is static.

    ``act`` of a PAIR is (link, rule, branches) -> the denoiser that combines two estimates by the
    rule; of a RULE or ADDITION, with the same arguments, the rule that it makes of the one before;
    of all others (link, denoise, branches, links before it) -> denoiser.
    """

    name: str = flax.struct.field(pytree_node=False)  # of the function that makes it
    act: Callable = flax.struct.field(pytree_node=False)
    numbers: Mapping[str, Number]
    place: int = _static(AFTER)  # links of a lower place come first
    network: str = _static("")  # the name of another network that it calls
    run: str = _static("")  # that network's workdir
    remembers: bool = _static(False)  # whether its estimate depends on earlier evaluations
    alone: bool = _static(False)  # whether the pair that it makes is the model alone
    clips: bool = _static(False)  # whether it keeps x_0_hat in a range
    split: bool = _static(False)  # option of ``cfg``
    space: str = _static("")  # option of ``rescale``
    blocks: str = _static("")  # option of ``perturbed_attention``


Chain = tuple[Link, ...]


def guide(chain: Chain, branches: Branches) -> Denoise | Stateful:
    """The guided denoiser; a link that needs what ``branches`` does not have is refused."""
    check(chain)
    merged, networks = branches.acceleration.merged, dict(branches.networks)
    if "weak" in networks:
        networks["weak"] = merged(networks["weak"])
    b = branches._replace(denoise=merged(branches.denoise), networks=networks)
    rule = guidance.linear()
    for link in chain:
        if link.network and link.network not in networks:
            raise ValueError(f"{link.name} needs another network, which is not given")
        if link.place in (RULE, ADDITION):
            rule = link.act(link, rule, b)
    first = pair(chain)
    guided = b.acceleration.cached(b.plain if first is None else first.act(first, rule, b))
    for i, link in enumerate(chain):
        if link.place == AFTER:
            guided = link.act(link, guided, b, chain[:i])
    return guided


def pair(chain: Chain) -> Link | None:
    """The link that makes the chain's pair of estimates, if any."""
    return chain[0] if chain and chain[0].place == PAIR else None


def check(chain: Chain) -> None:
    """Raises ValueError, naming the links, if their order or combination means nothing."""
    names = [link.name for link in chain]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands in the chain more than once")
    for place, task in ((PAIR, "makes the two estimates"), (RULE, "combines the two estimates")):
        same = [link.name for link in chain if link.place == place]
        if len(same) > 1:
            raise ValueError(f"each of {same[0]} and {same[1]} {task}: choose one of the two")
    for earlier, later in pairwise(chain):
        if earlier.place > later.place:
            raise ValueError(
                f"{later.name} {_TASKS[later.place]}: it stands before {earlier.name}, not after it"
            )
    first = chain[0] if chain else None
    for link in chain:
        if link.place in (RULE, ADDITION) and first.place != PAIR:
            raise ValueError(
                f"{link.name} {_TASKS[link.place]}: it follows cfg or autoguidance; cfg(1) is the "
                "model alone"
            )
        if link.place in (RULE, ADDITION) and first.name == "instruct":
            raise ValueError(f"{link.name} {_TASKS[link.place]}; instruct makes three estimates")
    if first is not None and first.name == "interval":
        raise ValueError("interval limits what stands before it, and nothing does")
