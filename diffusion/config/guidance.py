"""From ``config.sampler`` to guidance: which methods, with which other networks, how strongly."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import predictions, specs
from diffusion.conditioning import Conditioning, from_batch, null_like
from diffusion.config import acceleration
from diffusion.config.reference_runs import Run, at_its_levels, opened
from diffusion.denoiser import Denoise, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.models.attention import self_attention_paths, with_identity_maps
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising
from diffusion.sampling import guidance
from diffusion.sampling.acceleration import NONE, Shortcuts

PREDICTIONS = specs.choices(predictions, "eps x0 v flow edm")
THRESHOLDS = specs.choices(guidance, "clip dynamic_threshold")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """What ``config.sampler`` says about guidance, checked.

    Attributes:
      sampler: config.sampler.
      objective: the model's.
      rule: how two estimates are combined.
      threshold: keeps x_0 in the data's range; None: nothing does.
      blocks: of perturbed attention.
      weak: the run of autoguidance, if any.
      classifier: that of classifier guidance, if any.
      num_classes: of the labels asked for, by the model or the classifier; 0 for none.
      encode: captions -> what the model is given of them; None without captions.
      shortcuts: what makes evaluations cheaper.
    """

    sampler: ConfigDict
    objective: Denoising
    rule: guidance.Rule
    threshold: Callable[[Denoise], Denoise] | None
    blocks: str
    weak: Run | None
    classifier: Run | None
    num_classes: int
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]] | None = None
    shortcuts: Shortcuts = NONE

    def params(self) -> dict[str, Any]:
        """The other networks' parameters, by name."""
        return {n: run.params() for n, run in self._runs().items()}

    def networks(self, params: dict[str, Any]) -> dict[str, Callable]:
        """Parameters {"model": ..., **self.params()} -> what ``guide`` takes.

        With shortcuts, {"when": shortcuts.data(evaluations)} is one of the parameters.
        """
        merged = self.shortcuts.merged
        networks = {"model": merged(self.objective.denoiser(params["model"]))}
        networks["when"] = params.get("when", {})
        for name, run in self._runs().items():
            make = run.objective.denoiser if name == "weak" else run.objective.classifier
            network = at_its_levels(make(params[name]), run)
            networks[name] = merged(network) if name == "weak" else network
        return networks

    def guide(
        self, networks: dict[str, Callable], cond: Conditioning, scale: Array | float
    ) -> Denoise | Stateful:
        """The guided denoiser; ``scale`` is that of classifier-free guidance or autoguidance."""
        c, denoise, when = self.sampler, networks["model"], networks.get("when", {})
        seldom = {"when": when.get("guidance"), "space": self.objective.prediction}
        plain, rule = guidance.conditional(denoise, cond), self.rule
        if c.perturbed_attention:
            perturbed = with_identity_maps(plain, self.blocks)
            rule = guidance.perturbed_attention(perturbed, c.perturbed_attention, rule)
        if self.weak is not None:
            weak = guidance.conditional(networks["weak"], cond)
            guided = guidance.autoguidance(plain, weak, scale, rule, **seldom)
        elif c.guidance != 1 and (self.encode or (self.num_classes and cond.label is not None)):
            guided = guidance.classifier_free(
                denoise, cond, self._bad(cond), scale, rule=rule, split=c.guidance_split, **seldom
            )
        else:
            guided = guidance.classifier_free(denoise, cond, cond, 1, rule=rule)
        guided = self.shortcuts.cached(guided, when)
        if self.classifier is not None:
            classify = networks["classifier"]

            def log_prob(x: Array, level: NoiseLevel) -> Array:
                log_p = jax.nn.log_softmax(classify(x, level))
                return jnp.take_along_axis(log_p, cond.label[:, None], axis=1)[:, 0]

            guided = guidance.classifier_guidance(guided, log_prob, c.classifier_scale)
        if c.guidance_low > 0 or c.guidance_high != float("inf"):
            plain = self.shortcuts.cached(plain, when)
            guided = guidance.interval(guided, plain, c.guidance_low, c.guidance_high)
        return guided if self.threshold is None else self.threshold(guided)

    def _bad(self, cond: Conditioning) -> Conditioning:
        if self.sampler.negative_caption:
            rows = self.encode([self.sampler.negative_caption])
            return null_like(cond, **{name: value[0] for name, value in rows.items()})
        if self.sampler.negative < 0:
            return self.objective.null(cond)
        return cond.replace(label=jnp.full_like(cond.label, self.sampler.negative))

    def _runs(self) -> dict[str, Run]:
        runs = {"weak": self.weak, "classifier": self.classifier}
        return {name: run for name, run in runs.items() if run is not None}


def make(
    config: ConfigDict,
    objective: Denoising,
    num_classes: int,
    shape: tuple[int, ...],
    levels: NoiseLevel,
    load: Callable[[ConfigDict], tuple[Any, int, tuple[int, ...]]],
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]] | None = None,
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
    c = config.sampler
    others = num_classes, shape, load
    weak = judge = None
    if c.autoguidance:
        weak = opened(c.autoguidance, "config.sampler.autoguidance", config, Denoising, *others)
    if c.classifier:
        judge = opened(c.classifier, "config.sampler.classifier", config, Classification, *others)
    if not 0 <= c.guidance_low < c.guidance_high:
        raise ValueError(
            "expected 0 <= config.sampler.guidance_low < guidance_high (sigma / alpha), got "
            f"{c.guidance_low} and {c.guidance_high}"
        )
    if not -1 <= c.negative < max(num_classes, 0):
        raise ValueError(
            f"config.sampler.negative={c.negative} is no label; "
            + (f"choose 0..{num_classes - 1}, or " if num_classes else "this model has none: ")
            + "-1 for the null class"
        )
    if c.negative_caption and encode is None:
        raise ValueError(
            f"config.sampler.negative_caption={c.negative_caption!r}: this model knows no captions"
        )
    unused = {"negative": c.negative >= 0, "negative_caption": c.negative_caption}
    unused = [
        name for name, given in (unused | {"guidance_split": c.guidance_split}).items() if given
    ]
    if weak is not None and unused:
        field = unused[0]
        raise ValueError(
            f"config.sampler.autoguidance steers away from another network, not from a label: "
            f"config.sampler.{field} has no place there"
        )
    away = c.negative >= 0 or c.negative_caption
    needs_null = (num_classes or encode) and c.guidance != 1 and weak is None and not away
    if needs_null and not config.objective.label_dropout:
        raise ValueError(
            f"config.sampler.guidance={c.guidance} needs a model that was also trained without "
            "labels or captions; set config.objective.label_dropout (0.1, say), guidance=1, a "
            "label or caption to steer away from (config.sampler.negative, negative_caption) or "
            "another network (config.sampler.autoguidance)"
        )
    return Guidance(
        sampler=c,
        objective=objective,
        rule=_rule(config, objective, levels),
        threshold=_threshold(c.threshold, c.clip),
        blocks=_blocks(config, objective, num_classes, shape, encode),
        weak=weak,
        classifier=judge,
        num_classes=num_classes or (judge.num_classes if judge else 0),
        encode=encode,
        shortcuts=acceleration.make(
            config,
            {"": objective.network} | ({"autoguidance": weak.objective.network} if weak else {}),
            len(levels.t),
        ),
    )


def notes(config: ConfigDict, conditional: bool) -> list[str]:
    """What a user should know: which settings have no effect."""
    c, found = config.sampler, []
    pairs = (conditional or c.autoguidance) and c.guidance != 1
    if c.guidance != 1 and not pairs:
        found.append(
            f"config.sampler.guidance={c.guidance} has no effect: the model is unconditional"
        )
    without = (c.autoguidance, c.negative >= 0, c.negative_caption, c.guidance_method != "linear")
    if c.guidance == 1 and any(without):
        found.append(
            "config.sampler.guidance=1 is the model alone: autoguidance, negative and "
            "guidance_method have no effect"
        )
    if c.classifier_scale != 1 and not c.classifier:
        found.append("config.sampler.classifier_scale has no effect without classifier")
    return found


def _rule(config: ConfigDict, objective: Denoising, levels: NoiseLevel) -> guidance.Rule:
    field = "config.sampler.guidance_method"

    def rescaled(phi: float = 0.7, space: str = "") -> guidance.Rule:
        if space and space not in PREDICTIONS:
            raise specs.unknown(f"{field}: space", space, PREDICTIONS)
        prediction = PREDICTIONS[space] if space else objective.prediction
        with np.errstate(all="ignore"):
            back = predictions.precondition(prediction, levels)
        if not all(np.all(np.isfinite(leaf)) for leaf in back):
            raise ValueError(
                f"{field}: space={space!r} says nothing about x_0 at alpha = 0, where sampling "
                "starts; choose x0, v or flow"
            )
        return guidance.rescaled(phi, prediction)

    methods = {
        "linear": guidance.linear,
        "rescaled": rescaled,
        "adaptive_projected": guidance.adaptive_projected,
    }
    text = config.sampler.guidance_method
    try:
        return specs.function(text, methods, field)()
    except ValueError as error:
        raise _named(error, f"{field}={text!r}") from error


def _threshold(text: str, clipped: bool) -> Callable[[Denoise], Denoise] | None:
    if not text:
        return guidance.clip if clipped else None
    field = "config.sampler.threshold"
    threshold = specs.function(text, THRESHOLDS, field)
    try:
        threshold(lambda x, level: x)
    except ValueError as error:
        raise _named(error, f"{field}={text!r}") from error
    return threshold


def _blocks(
    config: ConfigDict,
    objective: Denoising,
    num_classes: int,
    shape: tuple[int, ...],
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]] | None,
) -> str:
    """The pattern of ``perturbed_blocks``: by default the mid block, or the middle one of a DiT."""
    c = config.sampler
    if not c.perturbed_attention:
        return ""

    def evaluate(x: Array, time: Array, label: Array) -> Array:
        cond = from_batch(encode([""]) if encode else {"label": label} if num_classes else {})
        variables = objective.network.init(jax.random.key(0), x, time, cond)
        return objective.network.apply(variables, x, time, cond)

    x, time = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), "float32")
    paths = self_attention_paths(evaluate, x, time, jax.ShapeDtypeStruct((1,), jnp.int32))
    blocks = c.perturbed_blocks
    if blocks == "auto":
        middle = f"blocks_{config.model.dit.depth // 2}/"
        blocks = "mid_block/" if config.model.name == "unet" else middle
        if config.model.name == "dit" and config.model.dit.scan:
            blocks = "blocks/"
    try:
        matches = [path for path in paths if re.search(blocks, path)]
    except re.error as error:
        raise ValueError(f"config.sampler.perturbed_blocks={blocks!r}: {error}") from error
    if not matches:
        raise ValueError(
            f"config.sampler.perturbed_blocks={c.perturbed_blocks!r} names no self-attention of "
            f"this {config.model.name}; it has {', '.join(paths) or 'none'}"
        )
    return blocks


def _named(error: ValueError, field: str) -> ValueError:
    return error if str(error).startswith("config.") else ValueError(f"{field}: {error}")
