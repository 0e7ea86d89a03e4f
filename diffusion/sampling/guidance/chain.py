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

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from diffusion import predictions
from diffusion.conditioning import Conditioning
from diffusion.denoiser import ConditionalDenoise, Denoise, Stateful
from diffusion.levels import NoiseLevel
from diffusion.predictions import Prediction
from diffusion.sampling import guidance
from diffusion.sampling.acceleration import NONE, Acceleration
from diffusion.sampling.guidance.extrapolation import Rule

PAIR, RULE, ADDITION, AFTER = range(4)


_TASKS = {
    PAIR: "guides the model itself",
    RULE: "says how two estimates are combined",
    ADDITION: "adds to what two estimates are combined to",
}


class Branches(NamedTuple):
    """What links are made of.

    Attributes:
      denoise: the model.
      cond: what to steer towards, batch [B].
      null: what to steer away from; None if the model knows no conditions, or for no guidance.
      middle: conditioning that has the picture but not the text, for ``instruct``, whose ``null``
        has neither.
      prediction: what the model's output means, for ``rescale`` and for a cache of the guidance.
      networks: others by name: "weak", a conditional denoiser; "classifier", (x, level) -> logits.
      acceleration: what makes evaluations cheaper, for as many as the solver makes.
    """

    denoise: ConditionalDenoise
    cond: Conditioning
    null: Conditioning | None = None
    middle: Conditioning | None = None
    prediction: Prediction = predictions.x0
    networks: Mapping[str, Callable] = {}
    acceleration: Acceleration = NONE

    @property
    def plain(self) -> Denoise:
        """The model with its conditioning."""
        return guidance.conditional(self.denoise, self.cond)


class Link:
    """What a chain asks of each of its links.

    Attributes:
      name: of the function that makes it.
      place: PAIR, RULE, ADDITION or AFTER; links of a lower place come first.
      network: the name of another network that it calls (``Branches.networks``), or "".
      remembers: whether its estimate depends on earlier evaluations.
      alone: whether the pair that it makes is the model alone.
      in_one_call: whether it makes its pair with one call on twice the batch.
      clips: whether it keeps x_0_hat in a range, and what it was as ``Estimate.unclipped``.
    """

    name = network = ""
    place = AFTER
    remembers = alone = in_one_call = clips = False

    def pair(self, rule: Rule, b: Branches) -> Denoise | Stateful:
        """A PAIR's two estimates, combined by ``rule``."""
        raise NotImplementedError

    def rule(self, rule: Rule, b: Branches) -> Rule:
        """How two estimates are combined, from what the links before say."""
        raise NotImplementedError

    def after(self, denoise: Denoise | Stateful, b: Branches, before: Chain) -> Denoise | Stateful:
        """The transform of ``denoise``, which is what the links ``before`` give."""
        raise NotImplementedError

    def check_levels(self, level: NoiseLevel, prediction: Prediction) -> None:
        """Raises ValueError if it means nothing at some of the levels."""

    def resolved(self, paths: Sequence[str]) -> Link:
        """The link for a network with these self-attentions."""
        return self


Chain = tuple[Link, ...]


def guide(chain: Chain, branches: Branches) -> Denoise | Stateful:
    """The guided denoiser.

    Raises:
      ValueError: an impossible order, or a link needs what ``branches`` does not have.
    """
    check(chain)
    merged, networks = branches.acceleration.merged, dict(branches.networks)
    if "weak" in networks:
        networks["weak"] = merged(networks["weak"])
    b = branches._replace(denoise=merged(branches.denoise), networks=networks)
    for link in chain:
        if link.network and link.network not in networks:
            raise ValueError(f"{link.name} needs another network, which is not given")
    rule = guidance.linear()
    for link in chain:
        if link.place in (RULE, ADDITION):
            rule = link.rule(rule, b)
    first = pair(chain)
    guided = b.acceleration.cached(b.plain if first is None else first.pair(rule, b))
    for i, link in enumerate(chain):
        if link.place == AFTER:
            guided = link.after(guided, b, chain[:i])
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


def resolve(chain: Chain, paths: Sequence[str]) -> Chain:
    """The chain with the blocks of ``perturbed_attention`` looked up in a network.

    Args:
      chain: the links.
      paths: of the network's self-attentions (``identity_maps.self_attention_paths``).

    Raises:
      ValueError: the pattern matches none of them.
    """
    return tuple(link.resolved(paths) for link in chain)
