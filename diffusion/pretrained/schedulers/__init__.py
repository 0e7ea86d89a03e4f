"""diffusers' schedulers: a ``scheduler_config.json`` -> schedule, prediction, grid, solver table.

    sampler = from_diffusers("scheduler_config.json", steps=30)
    denoise = guide(denoiser(network, sampler.prediction, sampler.c_noise), cond)
    images = sample(sampler.transform(denoise), sampler.solver, keys, shape)

gives what diffusers 0.42 computes with the same network and noise, to float32's rounding, for the
classes in ``CLASSES`` and every field that changes their numbers. The docstring of each class's
function lists which peculiarities are kept. A field is refused where diffusers gives NaN or ignores
the field, except for these cases, which are finite here:

- DDIM with eta=1 from zero terminal SNR; KDPM2 ancestral where sigma falls more than a
  thousandfold in a step (the first of squaredcos_cap_v2 with "linspace");
- lists that begin with the same timestep twice, where diffusers begins at the second.

Not fields of a config and not here: ``step``'s s_churn, s_tmin, s_tmax and s_noise
(``solvers.edm``), LMS's order and SA-Solver's tau_func.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.pretrained.schedulers import discrete, dpm, flows, multistep
from diffusion.pretrained.schedulers import sigmas as sigma_space
from diffusion.pretrained.schedulers.catalogue import DEFAULTS, read
from diffusion.pretrained.schedulers.scheduler import Request, Sampler

CLASSES = {
    "DDPMScheduler": (discrete.ddpm, "timesteps strength"),
    "DDIMScheduler": (discrete.ddim, "strength eta use_clipped_model_output"),
    "DDIMInverseScheduler": (discrete.ddim_inverse, ""),
    "PNDMScheduler": (discrete.pndm, "strength"),
    "LCMScheduler": (discrete.lcm, "timesteps strength original_inference_steps"),
    "TCDScheduler": (discrete.tcd, "timesteps strength eta"),
    "LMSDiscreteScheduler": (sigma_space.lms, "strength"),
    "EulerDiscreteScheduler": (sigma_space.euler, "timesteps sigmas strength"),
    "EulerAncestralDiscreteScheduler": (sigma_space.euler_ancestral, "timesteps strength"),
    "HeunDiscreteScheduler": (sigma_space.heun, "timesteps strength"),
    "KDPM2DiscreteScheduler": (sigma_space.kdpm2, "strength"),
    "KDPM2AncestralDiscreteScheduler": (sigma_space.kdpm2_ancestral, "strength"),
    "DPMSolverMultistepScheduler": (dpm.multistep_class, "timesteps mu strength"),
    "DPMSolverSinglestepScheduler": (dpm.singlestep_class, "timesteps mu strength"),
    "DPMSolverMultistepInverseScheduler": (dpm.inverse, ""),
    "UniPCMultistepScheduler": (multistep.unipc, "sigmas mu strength"),
    "DEISMultistepScheduler": (multistep.deis, "mu strength"),
    "SASolverScheduler": (multistep.sa_solver, "strength"),
    "FlowMatchEulerDiscreteScheduler": (flows.euler, "timesteps sigmas mu strength"),
    "FlowMatchHeunDiscreteScheduler": (flows.heun, "strength"),
    "EDMEulerScheduler": (sigma_space.edm_euler, ""),
    "EDMDPMSolverMultistepScheduler": (sigma_space.edm_dpm, ""),
    "CMStochasticIterativeScheduler": (sigma_space.consistency, "timesteps"),
}
"""Class -> (the function that makes its sampler, its arguments besides ``steps``). Those that take
``strength`` also take ``begin``."""
TWO_STAGES = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)
"""Classes with two evaluations in each step but the last (diffusers' ``order``)."""


def from_diffusers(
    config: Mapping[str, Any] | str | Path,
    steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    strength: float | None = None,
    eta: float | None = None,
    use_clipped_model_output: bool | None = None,
    original_inference_steps: int | None = None,
    begin: int | None = None,
) -> Sampler:
    """The sampler that a diffusers scheduler with this config is.

    Args:
      config: the fields of a ``scheduler_config.json``, with ``_class_name``; or its path, or the
        path of the folder it lies in. To change a field or the class: ``{**config, ...}``.
      steps: N, diffusers' num_inference_steps.
      timesteps, sigmas: the caller's own instead, in the classes that take them, as they take
        them (Euler's sigmas include the final 0, flow matching's do not). Euler ancestral takes
        timesteps here alone.
      mu: of use_dynamic_shifting (``dynamic_mu``).
      strength: in (0, 1], of image to image: the part of the steps that is taken, the last ones.
      eta: DDIM's (default 0) or TCD's gamma (default 0.3).
      use_clipped_model_output: DDIM's.
      original_inference_steps: LCM's, instead of the config's.
      begin: the first step that is taken, from 0, instead of ``strength``: diffusers'
        ``set_begin_index`` (PNDM's evaluations count as steps there).

    Raises:
      ValueError: for anything unknown or unsupported, by the name of the field or argument.
    """
    name, fields = read(config)
    build, accepted = CLASSES[name]
    request = Request(
        steps,
        None if timesteps is None else np.asarray(timesteps),
        None if sigmas is None else np.asarray(sigmas, np.float64),
        mu,
        strength,
        eta,
        use_clipped_model_output,
        original_inference_steps,
        begin,
    )
    accepted = accepted.replace("strength", "strength begin")
    for argument, value in vars(request).items():
        if value is not None and argument not in ("steps", *accepted.split()):
            raise ValueError(f"{argument}: {name} takes steps {accepted}, got {argument}={value}")
    flow = name == "FlowMatchEulerDiscreteScheduler"
    given = sum(value is not None for value in (steps, timesteps, sigmas))
    if given == 0 or (given > 1 and not flow):
        raise ValueError(
            f"expected one of steps, timesteps and sigmas, got steps={steps}, "
            f"timesteps={timesteps}, sigmas={sigmas}"
        )
    if steps is not None and (int(steps) != steps or steps < 1):
        raise ValueError(f"steps must be a whole number >= 1, got {steps!r}")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    if strength is not None and begin is not None:
        raise ValueError("expected one of strength and begin")
    if begin is not None and not 0 <= begin < request.count + (name == "PNDMScheduler"):
        raise ValueError(f"begin: {begin} is no step of the {request.count}")
    shortens = name in ("LCMScheduler", "TCDScheduler")  # strength, a list of timesteps
    if not shortens and strength is not None and request.start(request.count) == request.count:
        raise ValueError(f"strength: {strength} leaves none of the {request.count} steps")
    return build(fields, request)


def dynamic_mu(config: Mapping[str, Any] | str | Path, tokens: int) -> float:
    """mu for an image of this many tokens (FLUX: height/16 * width/16), linear between the
    config's base_shift at base_image_seq_len and max_shift at max_image_seq_len.
    """
    name, c = read(config)
    if name != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"_class_name: only FlowMatchEulerDiscreteScheduler has mu, got {name}")
    slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    return c.base_shift + slope * (tokens - c.base_image_seq_len)


__all__ = ["CLASSES", "DEFAULTS", "Sampler", "dynamic_mu", "from_diffusers"]
