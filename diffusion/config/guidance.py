"""From ``config.sampler.guidance`` and ``config.samples.negative`` to a chain and its networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import specs
from diffusion.conditioning import Conditioning, from_batch, null_like
from diffusion.config import acceleration
from diffusion.config.errors import field, wrong_types
from diffusion.config.reference_runs import Run, at_its_levels, opened
from diffusion.denoiser import Denoise, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.models.identity_maps import self_attention_paths
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising
from diffusion.sampling.acceleration import NONE, Acceleration
from diffusion.sampling.guidance import chain as chains
from diffusion.sampling.guidance import links
from diffusion.sampling.guidance.chain import Branches, Chain

FIELD = "config.sampler.guidance"
KINDS = {"weak": Denoising, "classifier": Classification}

Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]  # captions -> what the model is given


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What ``config.sampler`` says about guidance, checked.

    Attributes:
      chain: the links.
      objective: the model's.
      conditional: whether the model is given labels or captions.
      num_classes: of the labels that are drawn, by the model or a classifier; 0 for none.
      negative: a label or a caption to steer away from; "" is the null class or no caption.
      runs: the other networks' runs, by what links call them.
      encode: captions -> what the model is given of them; None without captions.
      acceleration: what makes evaluations cheaper.
    """

    chain: Chain
    objective: Denoising
    conditional: bool
    num_classes: int
    negative: int | str = ""
    runs: dict[str, Run] = dataclasses.field(default_factory=dict)
    encode: Encode | None = None
    acceleration: Acceleration = NONE

    @property
    def paired(self) -> bool:
        """Whether an evaluation makes two estimates."""
        pair = chains.pair(self.chain)
        return pair is not None and not pair.alone and bool(pair.network or self.conditional)

    def params(self) -> dict[str, Any]:
        """The other networks' parameters, by name."""
        return {name: run.params() for name, run in self.runs.items()}

    def networks(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters {"model": ..., **self.params()} -> what ``guide`` takes.

        With an acceleration, {"acceleration": acceleration.at(evaluations)} is one of them.
        """
        networks = {
            "model": self.objective.denoiser(params["model"]),
            "acceleration": params.get("acceleration", NONE),
        }
        for name, run in self.runs.items():
            make = run.objective.denoiser if name == "weak" else run.objective.classifier
            networks[name] = at_its_levels(make(params[name]), run)
        return networks

    def guide(
        self, networks: dict[str, Any], cond: Conditioning, chain: Chain
    ) -> Denoise | Stateful:
        """The denoiser that ``chain`` guides; its numbers may be others than ``self.chain``'s."""
        branches = Branches(
            networks["model"],
            cond,
            self._null(cond),
            prediction=self.objective.prediction,
            networks={name: networks[name] for name in KINDS if name in networks},
            acceleration=networks.get("acceleration", NONE),
        )
        return chains.guide(chain, branches)

    def _null(self, cond: Conditioning) -> Conditioning | None:
        if not self.conditional:
            return None
        if self.negative == "":
            return self.objective.null(cond)
        if self.encode is None:
            return cond.replace(label=jnp.full_like(cond.label, self.negative))
        rows = self.encode([self.negative])
        return null_like(cond, **{name: value[0] for name, value in rows.items()})


def read(config: ConfigDict) -> Chain:
    """The links of ``config.sampler.guidance``, in an order that means something.

    Raises:
      ValueError: for a wrong one; the message names the field.
    """
    given = config.sampler.guidance
    with field(f"{FIELD}={given!r}"), wrong_types():
        chain = specs.values(given, links.CHOICES, FIELD)
        chains.check(chain)
    return chain


def make(
    config: ConfigDict,
    objective: Denoising,
    num_classes: int,
    shape: tuple[int, ...],
    levels: NoiseLevel,
    load: Callable[[ConfigDict], tuple[Any, int, tuple[int, ...]]],
    encode: Encode | None = None,
) -> Guidance:
    """The guidance of a config.

    Args:
      config: the whole config.
      objective: the model's.
      num_classes: of the labels that the model is given.
      shape: of the data.
      levels: where the solver evaluates.
      load: another run's config -> its objective, num_classes and data shape.
      encode: captions -> what the model is given of them; None without captions.

    Raises:
      ValueError: for impossible combinations; the message names the field.
    """
    chain, runs = read(config), {}
    for link in chain:
        if link.network:
            kind = KINDS[link.network]
            name = f"{FIELD}: {link.name}'s run"
            runs[link.network] = opened(link.run, name, config, kind, num_classes, shape, load)
    with field(f"{FIELD}={config.sampler.guidance!r}"):
        for link in chain:
            link.check_levels(levels, objective.prediction)
            if link.name == "instruct":
                raise ValueError("instruct guides networks that edit pictures (--mode=generate)")
            if link.name == "perturbed_attention":
                chain = chains.resolve(chain, _attentions(objective, num_classes, shape, encode))
    negative = _negative(config, num_classes, encode)
    pair = chains.pair(chain)
    if negative != "" and pair is not None and pair.network:
        raise ValueError(
            f"{FIELD}: {pair.name} steers away from another network, not from a label or caption: "
            f"config.samples.negative={negative!r} has no place there"
        )
    conditional = bool(num_classes or encode)
    away = pair is not None and not pair.alone and not pair.network and conditional
    if away and negative == "" and not config.objective.label_dropout:
        raise ValueError(
            f"{FIELD}={config.sampler.guidance!r} needs a model that was also trained without "
            "labels or captions; set config.objective.label_dropout (0.1, say), leave cfg out, or "
            "steer away from a label or caption (config.samples.negative) or from another network "
            "(autoguidance)"
        )
    networks = {"": objective.network}
    networks |= {"autoguidance": runs["weak"].objective.network} if "weak" in runs else {}
    judge = runs.get("classifier")
    return Guidance(
        chain=chain,
        objective=objective,
        conditional=conditional,
        num_classes=num_classes or (judge.num_classes if judge else 0),
        negative=negative,
        runs=runs,
        encode=encode,
        acceleration=acceleration.make(config, networks, len(levels.t)),
    )


def check_corrector(config: ConfigDict, guidance: Guidance) -> None:
    """Raises ValueError if something that is remembered keeps a corrector from its work."""
    name = f"config.sampler.corrector={config.sampler.corrector!r} cannot correct with"
    for link in guidance.chain:
        if link.remembers:
            raise ValueError(
                f"{name} {link.name}, whose momentum is a memory from step to step; set its "
                "momentum=0, or choose one of the two"
            )
    if guidance.acceleration.remembers:
        raise ValueError(
            f"{name} config.sampler.acceleration={config.sampler.acceleration!r}, whose caches "
            "remember the sampler's evaluations"
        )


def notes(config: ConfigDict, guidance: Guidance) -> list[str]:
    """What a user should know: which settings have no effect."""
    chain, pair, found = guidance.chain, chains.pair(guidance.chain), []
    name = f"{FIELD}={config.sampler.guidance!r}"
    if pair is not None and not pair.alone and not guidance.paired:
        found.append(f"{name}: {pair.name} has no effect: the model is unconditional")
    if pair is not None and pair.alone:
        idle = [link.name for link in chain if link.place == chains.RULE]
        idle = [pair.network and pair.name, *idle, guidance.negative != "" and "samples.negative"]
        if any(idle):
            listed = ", ".join(filter(None, idle))
            found.append(f"{name}: scale 1 is the model alone: {listed} has no effect")
    elif pair is None and guidance.negative != "":
        found.append(
            f"config.samples.negative={guidance.negative!r} has no effect without cfg in {FIELD}"
        )
    if guidance.acceleration.guidance is not None and not guidance.paired:
        found.append(f"{acceleration.FIELD}: guidance_cache has no effect: nothing is guided")
    return found


def _negative(config: ConfigDict, num_classes: int, encode: Encode | None) -> int | str:
    """What to steer away from, a label or a caption; "" if nothing is given."""
    value = config.samples.negative
    name = f"config.samples.negative={value!r}"
    if value == "" or (isinstance(value, str) and encode is not None):
        return value
    if isinstance(value, str):
        raise ValueError(f"{name}: this model knows no captions")
    if encode is not None:
        raise ValueError(f"{name}: this model takes captions; expected a text")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
        valid = f"choose 0..{num_classes - 1}" if num_classes else "this model has none"
        raise ValueError(f"{name} is no label; {valid}")
    return value


def _attentions(
    objective: Denoising, num_classes: int, shape: tuple[int, ...], encode: Encode | None
) -> list[str]:
    """Paths of the network's self-attentions."""

    def evaluate(x: Array, time: Array, label: Array) -> Array:
        cond = from_batch(encode([""]) if encode else {"label": label} if num_classes else {})
        variables = objective.network.init(jax.random.key(0), x, time, cond)
        return objective.network.apply(variables, x, time, cond)

    x, time = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), "float32")
    return self_attention_paths(evaluate, x, time, jax.ShapeDtypeStruct((1,), jnp.int32))
