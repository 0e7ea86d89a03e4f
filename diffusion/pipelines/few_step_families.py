"""Few-step checkpoints: how the authors of each family sample from it, and what it cannot do.

A spec such as "lightning(steps=4)" names a family, which gives a pipeline solver, steps and
guidance; others are refused where its networks cannot follow them. Guidance's scale 1 is the model
alone, as diffusers' guidance_scale=0 is. Table steps count from 0, the cleanest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from diffusion.errors import check_range

SDXL, CONSISTENCY = "StableDiffusionXL", "ConsistencyModel"
TRAILING = "timestep_spacing='trailing'"
EULER = f"EulerDiscreteScheduler({TRAILING})"
ANCESTRAL = f"EulerAncestralDiscreteScheduler({TRAILING})"
DDIM = f"DDIMScheduler({TRAILING}, clip_sample=False, set_alpha_to_one=False)"
LCM, TCD, CM = "LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler"
NODES = range(1, 51)
"""Latent consistency models are distilled on 50 table steps."""


class FewSteps(NamedTuple):
    """How a few-step checkpoint is sampled.

    Attributes:
      solver: a class of diffusers with its fields; all other fields are the base model's.
      steps: the numbers of steps that it can be sampled with.
      usual: the number that is taken by default.
      scale, most: of guidance, by default and at most.
      embedded: whether the network takes the scale as an input.
      timesteps: number of steps -> table steps, where they are not the solver's own.
      eta: share of noise in TCD's steps (gamma in the paper); None for other solvers.
      prediction: what the network predicts, as diffusers calls it; "": what the base model does.
      base: how the names of its kinds of pipeline begin; "": it is for any.
      side: of the pictures that it was trained on, in pixels, where it is less than the base's.
      name: its spec.
    """

    solver: str
    steps: Sequence[int]
    usual: int
    scale: float = 1.0
    most: float = 1.0
    embedded: bool = False
    timesteps: Mapping[int, Sequence[int]] = MappingProxyType({})
    eta: float | None = None
    prediction: str = ""
    base: str = ""
    side: int = 0
    name: str = ""

    def check_steps(self, steps: int, name: str) -> None:
        """Raises ValueError for a number of steps that it cannot be sampled with."""
        if steps not in self.steps:
            raise ValueError(
                f"{name}={steps}: {self.name} was distilled for {_listed(self.steps)}, and its "
                "pictures break with another number of them; take that, or a checkpoint for "
                f"{steps}"
            )

    def check_scale(self, scale: float) -> None:
        """Raises ValueError for a scale of classifier-free guidance that it cannot follow."""
        if 1 <= scale <= self.most:
            return
        why = "it was distilled to finished samples, and more guidance breaks them"
        if scale < 1:
            why = "that draws without the prompt; its authors' guidance_scale=0 is cfg(1)"
        most = "cfg(1), the model alone" if self.most == 1 else f"cfg from 1 to {self.most:g}"
        raise ValueError(f"{self.name} cannot follow cfg({scale:g}): {why}; expected {most}")

    def arguments(self, steps: int, strength: float | None) -> dict[str, Any]:
        """Those of ``from_diffusers`` for its own solver; strength is that of image to image."""
        given: dict[str, Any] = {} if self.eta is None else {"eta": self.eta}
        if steps not in self.timesteps:
            return given | {"steps": steps, "strength": strength}
        left = steps if strength is None else min(int(steps * strength), steps)
        if left == 0:
            raise ValueError(f"strength={strength} leaves none of the {steps} steps")
        return given | {"timesteps": self.timesteps[steps][steps - left :]}


def lcm(steps: int = 4) -> FewSteps:
    """Latent consistency models (Luo et al., 2023), whose network takes guidance's scale."""
    _check(steps, NODES)
    return FewSteps(LCM, NODES, steps, 8.5, math.inf, embedded=True)


def lcm_lora(steps: int = 4) -> FewSteps:
    """LCM-LoRA (Luo et al., 2023), on any model like its base; a little guidance is possible."""
    _check(steps, NODES)
    return FewSteps(LCM, NODES, steps, most=2.0)


def turbo(steps: int = 1, ancestral: bool = True, tenths: bool = False) -> FewSteps:
    """SD Turbo and SDXL Turbo (Sauer et al., 2023), of 512 x 512 pixels.

    Args:
      steps: 1 to 4.
      ancestral: with new noise in each step but the last.
      tenths: the table steps of Stability's code, 999, 899, 799, 699, instead of diffusers' evenly
        spaced ones, 999, 749, 499, 249.
    """
    few = range(1, 5)
    _check(steps, few)
    times = {n: (999, 899, 799, 699)[:n] for n in few} if tenths else {}
    solver = ANCESTRAL if ancestral else EULER
    return FewSteps(solver, few, steps, timesteps=times, prediction="epsilon", side=512)


def lightning(steps: int = 4) -> FewSteps:
    """SDXL-Lightning (Lin et al., 2024): checkpoints of 2, 4 and 8 steps; of 1 step, for x_0."""
    _check(steps, (1, 2, 4, 8))
    output = "sample" if steps == 1 else "epsilon"
    return FewSteps(EULER, (steps,), steps, prediction=output, base=SDXL)


def hyper(steps: int = 8) -> FewSteps:
    """Hyper-SD's LoRAs of 2, 4 and 8 steps (Ren et al., 2024), for SD 1.5 and SDXL."""
    _check(steps, (2, 4, 8))
    return FewSteps(DDIM, (steps,), steps)


def hyper_cfg(steps: int = 8) -> FewSteps:
    """Hyper-SD's LoRAs of 8 and 12 steps that take guidance of 5 to 8, and negative prompts."""
    _check(steps, (8, 12))
    return FewSteps(DDIM, (steps,), steps, 5.0, 8.0)


def hyper_unified(steps: int = 1, eta: float = 1.0) -> FewSteps:
    """Hyper-SD's LoRA of 1 step, which also takes up to 8; a smaller eta gives more detail."""
    few = range(1, 9)
    _check(steps, few)
    check_range("eta", eta, 0, 1)
    return FewSteps(TCD, few, steps, eta=eta)


def hyper_unet() -> FewSteps:
    """Hyper-SDXL's U-Net of 1 step, which is told that noise is table step 800."""
    return FewSteps(LCM, (1,), 1, timesteps={1: (800,)}, base=SDXL)


def tcd(steps: int = 4, eta: float = 0.3) -> FewSteps:
    """TCD's LoRAs (Zheng et al., 2024); with more steps, a larger eta is better."""
    _check(steps, NODES)
    check_range("eta", eta, 0, 1)
    return FewSteps(TCD, NODES, steps, most=2.0, eta=eta)


def dmd2(steps: int = 4) -> FewSteps:
    """DMD2 for SDXL (Yin et al., 2024), of 4 steps or 1, which is told that noise is step 399."""
    _check(steps, (1, 4))
    times = {1: (399,), 4: (999, 749, 499, 249)}
    return FewSteps(LCM, (steps,), steps, timesteps=times, base=SDXL)


def flash(steps: int = 4) -> FewSteps:
    """Flash Diffusion's LoRAs (Chadebec et al., 2024), of up to 4 steps."""
    few = range(1, 5)
    _check(steps, few)
    return FewSteps(LCM, few, steps)


def consistency(steps: int = 1, second: int = 0) -> FewSteps:
    """OpenAI's consistency models (Song et al., 2023).

    Args:
      steps: evenly spaced among the nodes of training.
      second: the node of the second of 2 steps instead, counted from the noisiest.
    """
    nodes = range(1, 202)
    _check(steps, nodes)
    if not 0 <= second <= nodes[-1]:
        raise ValueError(f"second={second} must be a node in 0..{nodes[-1]}")
    times = {2: (second, 0)} if second else {}
    return FewSteps(CM, nodes, steps, timesteps=times, base=CONSISTENCY)


CHOICES = {
    f.__name__: f
    for f in (
        *(lcm, lcm_lora, turbo, lightning, hyper, hyper_cfg, hyper_unified, hyper_unet),
        *(tcd, dmd2, flash, consistency),
    )
}


def _check(steps: int, made: Sequence[int]) -> None:
    if steps not in made:
        raise ValueError(f"steps={steps}: its checkpoints are for {_listed(made)}")


def _listed(steps: Sequence[int]) -> str:
    """1, 2 and 4 steps."""
    if isinstance(steps, range) and len(steps) > 1:
        return f"{steps[0]} to {steps[-1]} steps"
    *first, last = map(str, steps)
    unit = "step" if last == "1" else "steps"
    return f"{', '.join(first)} and {last} {unit}" if first else f"{last} {unit}"
