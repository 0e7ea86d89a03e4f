"""From specs to a pipeline's guidance: the chain, other networks that it calls, acceleration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from diffusion import specs
from diffusion.conditioning import Conditioning
from diffusion.errors import field, wrong_types
from diffusion.levels import Array
from diffusion.models import reuse, token_merging
from diffusion.models.identity_maps import self_attention_paths
from diffusion.models.surroundings import bare
from diffusion.pipelines import companions
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.draw import Companion
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pretrained.models import example
from diffusion.pretrained.schedulers import Sampler
from diffusion.sampling import acceleration, feature_cache
from diffusion.sampling.acceleration import NONE, Acceleration
from diffusion.sampling.guidance import chain as chains
from diffusion.sampling.guidance import links
from diffusion.sampling.guidance.chain import Chain

Specs = str | Sequence[str]
AUTO = "auto"


@dataclass(frozen=True)
class Guidance:
    """Guidance of a pipeline, checked.

    Attributes:
      pipeline: what is guided; with labels to ask for, where only a classifier knows them.
      chain: the links.
      companions: other networks that they call, by name.
      acceleration: what makes evaluations cheaper.
      paired: whether an evaluation makes two estimates.
      notes: settings that have no effect.
    """

    pipeline: Pipeline
    chain: Chain = ()
    companions: dict[str, Companion] | None = None
    acceleration: Acceleration = NONE
    paired: bool = False
    notes: tuple[str, ...] = ()


def make(
    pipeline: Pipeline,
    sampler: Sampler,
    guidance: Specs = AUTO,
    *,
    negative: Subject | None = None,
    accelerations: Specs = (),
    schedule: str = "",
    corrected: bool = False,
    at: str = "",
) -> Guidance:
    """The guidance of a pipeline.

    Args:
      pipeline: the model.
      sampler: whose levels it is for.
      guidance: specs of ``links.CHOICES``; "auto" are the pipeline's own.
      negative: what to steer away from, or None.
      accelerations: specs of ``acceleration.CHOICES``.
      schedule: the pipeline's, as a spec.
      corrected: whether a corrector follows the solver's steps.
      at: what errors say before the names of the arguments: "config.sampler.".

    Raises:
      ValueError: for impossible specs or combinations; the message names them.
    """
    given = (
        pipeline.defaults.guidance if isinstance(guidance, str) and guidance == AUTO else guidance
    )
    name = f"{at}guidance={given!r}"
    with field(name), wrong_types():
        chain = specs.values(given, links.CHOICES, f"{at}guidance")
        chains.check(chain)
    others: dict[str, Companion] = {}
    for link in chain:
        if link.network == "weak":
            with field(f"{name}: {link.name}'s run"):
                others["weak"] = companions.weak(link.run, pipeline, schedule)
        elif link.network == "classifier":
            with field(f"{name}: {link.name}'s run"):
                others[link.network], labels = companions.classifier(link.run, pipeline, schedule)
            if not pipeline.conditioner.subject:
                pipeline = replace(pipeline, conditioner=labels)
    with field(name):
        _check_distilled(pipeline, chain)
        links.check_levels(chain, sampler.solver.level, sampler.prediction)
        for link in chain:
            if link.name == "instruct" and not pipeline.edits:
                raise ValueError("instruct is for networks that edit pictures (InstructPix2Pix)")
            if link.name == "perturbed_attention":
                chain = links.resolve(chain, _attentions(pipeline))
        if pipeline.edits and not any(link.name == "instruct" for link in chain):
            raise ValueError("this network follows text and picture: expected instruct(7.5, 1.5)")
    pair = chains.pair(chain)
    subject, null = pipeline.conditioner.subject, pipeline.conditioner.null
    guided = pair is not None and not pair.alone
    if negative is not None and pair is not None and pair.network:
        raise ValueError(
            f"{name}: {pair.name} steers away from another network, not from a label or text: "
            f"negative={negative!r} has no place there"
        )
    if guided and not pair.network and subject and not null and negative is None:
        raise ValueError(
            f"{name} needs a model that was also trained without labels or captions "
            "(config.objective.label_dropout, 0.1, say); leave cfg out, or steer away from a label "
            "or caption (negative) or from another network (autoguidance)"
        )
    quick = _acceleration(pipeline, sampler, accelerations, at)
    if corrected:
        _check_corrected(chain, quick, at)
    paired = guided and bool(pair.network or subject) and not pipeline.takes_scale
    notes = _notes(chain, name, negative, paired, quick, pipeline, at)
    return Guidance(pipeline, chain, others, quick, paired, tuple(notes))


def _check_distilled(pipeline: Pipeline, chain: Chain) -> None:
    """Raises ValueError for guidance that a distilled network cannot follow."""
    pair = chains.pair(chain)
    if pipeline.takes_scale:
        if pair is None or pair.name != "cfg":
            raise ValueError("this network takes guidance's scale as an input: expected cfg(8.5)")
        idle = [link.name for link in chain[1:] if link.place != chains.AFTER]
        idle += [link.name for link in chain if link.name == "interval"]
        if idle:
            raise ValueError(
                f"{idle[0]} cannot act: this network takes cfg's scale as an input and makes one "
                "guided estimate, not two"
            )
    elif pipeline.few_steps is not None and pair is not None and pair.name == "cfg":
        pipeline.few_steps.check_scale(float(pair.numbers["scale"]))


def _acceleration(pipeline: Pipeline, sampler: Sampler, given: Specs, at: str) -> Acceleration:
    name = f"{at}acceleration={given!r}"
    with field(name), wrong_types():
        parts = specs.values(
            given, acceleration.CHOICES, f"{at}acceleration", feature_cache.CHOICES
        )
        made = acceleration.accelerate(*parts)
        made.at(sampler.solver.evaluations)  # finds mistakes in time
        if made.cache is not None:
            reuse.check(pipeline.network, made.keep)
        if made.merge:
            token_merging.check(pipeline.network)
    return made


def _check_corrected(chain: Chain, made: Acceleration, at: str) -> None:
    """Raises ValueError if something that is remembered keeps a corrector from its work."""
    for link in chain:
        if link.remembers:
            raise ValueError(
                f"{at}corrector cannot correct with {link.name}, whose momentum is a memory from "
                "step to step; set its momentum=0, or choose one of the two"
            )
    if made.remembers:
        raise ValueError(
            f"{at}corrector cannot correct with {at}acceleration, whose caches remember the "
            "sampler's evaluations"
        )


def _notes(
    chain: Chain,
    name: str,
    negative: Subject | None,
    paired: bool,
    made: Acceleration,
    pipeline: Pipeline,
    at: str,
) -> list[str]:
    """What a user should know: which settings have no effect."""
    pair, found = chains.pair(chain), []
    if pipeline.takes_scale:
        if negative is not None:
            found.append(
                f"negative={negative!r} has no effect: the network takes guidance's scale as an "
                "input, and follows the prompt alone"
            )
    elif pair is not None and not pair.alone and not paired:
        found.append(f"{name}: {pair.name} has no effect: the model is unconditional")
    elif pair is not None and pair.alone:
        idle = [link.name for link in chain if link.place == chains.RULE]
        idle = [pair.network and pair.name, *idle, negative is not None and "the negative"]
        if any(idle):
            listed = ", ".join(filter(None, idle))
            found.append(f"{name}: scale 1 is the model alone: {listed} has no effect")
    elif pair is None and negative is not None:
        found.append(f"negative={negative!r} has no effect without cfg in {at}guidance")
    if made.guidance is not None and not paired:
        found.append(f"{at}acceleration: guidance_cache has no effect: nothing is guided")
    if made.merge:
        most = token_merging.most_tokens(pipeline.network, pipeline.shape)
        if most < made.at_least:
            found.append(
                f"{at}acceleration: merge_tokens({made.merge}) has no effect: the model's largest "
                f"attention has {most} tokens, at_least={made.at_least}"
            )
    return found


def _attentions(pipeline: Pipeline) -> list[str]:
    """Paths of the network's self-attentions, not counting what stands around it."""
    network = bare(pipeline.network)
    x = jax.ShapeDtypeStruct((1, *pipeline.shape), jnp.float32)
    time, cond = jax.ShapeDtypeStruct((1,), jnp.float32), None
    if pipeline.scheduler is None:
        cond, _ = pipeline.conditioner({}, ["" if pipeline.conditioner.subject == "text" else 0])
    else:
        x, time, cond = example(pipeline.image_network)

    def evaluate(x: Array, time: Array, cond: Conditioning) -> Array:
        variables = network.init(jax.random.key(0), x, time, cond)
        return network.apply(variables, x, time, cond)

    return self_attention_paths(evaluate, x, time, cond)
