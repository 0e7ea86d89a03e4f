"""The fields of diffusers' ``scheduler_config.json``: names, defaults and legal values, by class.

As of diffusers 0.42. A file often holds fields of the class from which it was converted, and
diffusers drops them. Here they are accepted only if dropping them cannot change the intended result
(``_harmless``). Any other unknown or unsupported field is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusion.pretrained import folders
from diffusion.pretrained.fields import check

STEPS = {"num_train_timesteps": 1000}
BETAS = {
    **{**STEPS, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "trained_betas": None,
}
LATENT = {**BETAS, "beta_start": 0.00085, "beta_end": 0.012}
OUTPUT = {"prediction_type": "epsilon"}
ZERO_SNR = {"rescale_betas_zero_snr": False}
LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
NO_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
SPREAD = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
RANGE = {"sigma_min": None, "sigma_max": None}
DYNAMIC = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
CLIPPED_LAMBDA = {"lambda_min_clipped": -float("inf"), "variance_type": None}
LOWER = {"lower_order_final": True}
END = {"final_sigmas_type": "zero"}
METHOD = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
INDEXED = {**BETAS, **OUTPUT, **LEADING, **ZERO_SNR}
LAMBDA = {
    **{**BETAS, **OUTPUT, **THRESHOLD, **SPREAD},
    **{"use_flow_sigmas": False, "flow_shift": 1.0},
}
DPM = {**LAMBDA, **CLIPPED_LAMBDA, **METHOD}
K_DIFFUSION = {**LATENT, **OUTPUT, **LINSPACE, **SPREAD}
EDM_SIGMAS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
EDM = {**STEPS, **OUTPUT, **EDM_SIGMAS, **END, "sigma_schedule": "karras"}
DISTILLED = {
    **{**LATENT, **OUTPUT, **NO_CLIP, **THRESHOLD, **LEADING, **ZERO_SNR},
    **{"beta_schedule": "scaled_linear", "set_alpha_to_one": True},
    **{"original_inference_steps": 50, "timestep_scaling": 10.0},
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**INDEXED, **CLIP, **THRESHOLD, "variance_type": "fixed_small"},
    "DDIMScheduler": {**INDEXED, **CLIP, **THRESHOLD, "set_alpha_to_one": True},
    "DDIMInverseScheduler": {**INDEXED, **CLIP, "set_alpha_to_one": True},
    "PNDMScheduler": {
        **{**BETAS, **OUTPUT, **LEADING},
        **{"skip_prk_steps": False, "set_alpha_to_one": False},
    },
    "LMSDiscreteScheduler": {**BETAS, **OUTPUT, **LINSPACE, **SPREAD},
    "EulerDiscreteScheduler": {
        **{**BETAS, **OUTPUT, **LINSPACE, **SPREAD, **RANGE, **ZERO_SNR, **END},
        **{"interpolation_type": "linear", "timestep_type": "discrete"},
    },
    "EulerAncestralDiscreteScheduler": {**BETAS, **OUTPUT, **LINSPACE, **ZERO_SNR},
    "HeunDiscreteScheduler": {**K_DIFFUSION, **NO_CLIP},
    "KDPM2DiscreteScheduler": K_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": K_DIFFUSION,
    "DPMSolverMultistepScheduler": {
        **{**DPM, **LINSPACE, **ZERO_SNR, **DYNAMIC, **LOWER, **END},
        **{"euler_at_final": False, "use_lu_lambdas": False},
    },
    "DPMSolverMultistepInverseScheduler": {**DPM, **LINSPACE, **LOWER, "euler_at_final": False},
    "DPMSolverSinglestepScheduler": {**DPM, **DYNAMIC, **END, "lower_order_final": False},
    "UniPCMultistepScheduler": {
        **{**LAMBDA, **LINSPACE, **ZERO_SNR, **DYNAMIC, **RANGE, **LOWER, **END},
        **{"solver_order": 2, "solver_type": "bh2", "solver_p": None, "predict_x0": True},
        **{"disable_corrector": [], "shift_terminal": None},
    },
    "DEISMultistepScheduler": {
        **{**LAMBDA, **LINSPACE, **DYNAMIC, **LOWER},
        **{"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho"},
    },
    "SASolverScheduler": {
        **{**LAMBDA, **CLIPPED_LAMBDA, **LINSPACE, **LOWER, "algorithm_type": "data_prediction"},
        **{"predictor_order": 2, "corrector_order": 2, "tau_func": None},
    },
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
    "FlowMatchEulerDiscreteScheduler": {
        **{**STEPS, **SPREAD, **DYNAMIC, "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15},
        **{"base_image_seq_len": 256, "max_image_seq_len": 4096, "shift_terminal": None},
        **{"invert_sigmas": False, "stochastic_sampling": False},
    },
    "FlowMatchHeunDiscreteScheduler": {**STEPS, "shift": 1.0},
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": {
        **{**EDM, **THRESHOLD, **METHOD, **LOWER},
        "euler_at_final": False,
    },
    "CMStochasticIterativeScheduler": {
        **EDM_SIGMAS,
        **{"num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True},
    },
}
"""Class -> its fields and their defaults."""

COMMON_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
TWO = {"prediction_type": ("epsilon", "v_prediction")}
THREE = ("epsilon", "sample", "v_prediction")
FOUR = {"prediction_type": (*THREE, "flow_prediction")}
ORDERS = (1, 2, 3, 4)
CHOICES: dict[str, dict[str, tuple]] = {
    "*": {
        "beta_schedule": COMMON_BETAS,
        "prediction_type": THREE,
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "time_shift_type": ("exponential", "linear"),
        "sigma_schedule": ("karras", "exponential"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"),
        "solver_type": ("midpoint", "heun"),
        "solver_order": (1, 2, 3),
        "solver_p": (None,),
        "tau_func": (None,),
    },
    "DDPMScheduler": {
        "beta_schedule": (*COMMON_BETAS, "laplace", "sigmoid"),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    },
    "DDIMInverseScheduler": {"timestep_spacing": ("leading", "trailing")},
    "PNDMScheduler": TWO,
    "EulerDiscreteScheduler": {"prediction_type": (*THREE, "original_sample")},
    "EulerAncestralDiscreteScheduler": TWO,
    "HeunDiscreteScheduler": {"beta_schedule": (*COMMON_BETAS, "exp")},
    "KDPM2DiscreteScheduler": TWO,
    "KDPM2AncestralDiscreteScheduler": TWO,
    "DPMSolverMultistepScheduler": {
        **FOUR,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    },
    "DPMSolverMultistepInverseScheduler": {"algorithm_type": ("dpmsolver", "dpmsolver++")},
    "DPMSolverSinglestepScheduler": {
        **FOUR,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    },
    "UniPCMultistepScheduler": {**FOUR, "solver_type": ("bh1", "bh2"), "solver_order": ORDERS},
    "DEISMultistepScheduler": {**FOUR, "solver_type": ("logrho",), "algorithm_type": ("deis",)},
    "SASolverScheduler": {
        **{**FOUR, "algorithm_type": ("data_prediction", "noise_prediction")},
        **{"predictor_order": ORDERS, "corrector_order": ORDERS},
    },
    # diffusers does not use these two in TCD, so that True would have no effect.
    "TCDScheduler": {"clip_sample": (False,), "thresholding": (False,)},
    "EDMEulerScheduler": TWO,
    "EDMDPMSolverMultistepScheduler": {
        **TWO,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    },
}
"""Legal values by class; "*" holds those of all classes that have none of their own."""

_DPM_REPLACED = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}
REPLACED: dict[str, dict[str, dict[str, str]]] = {
    **{name: _DPM_REPLACED for name in DEFAULTS if "DPMSolver" in name},
    "UniPCMultistepScheduler": {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")
    },
    "DEISMultistepScheduler": {
        "algorithm_type": {"dpmsolver": "deis", "dpmsolver++": "deis"},
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    },
}
"""Values of related classes, and the values by which diffusers replaces them."""


def read(config: Mapping[str, Any] | str | Path) -> tuple[str, SimpleNamespace]:
    """(class name, all of its fields) of a config, its file, or the folder that holds it.

    Raises:
      ValueError: for an unknown class, a field or a value that is not supported.
    """
    if not isinstance(config, Mapping):
        path = Path(config)
        path = path / "scheduler_config.json" if path.is_dir() else path
        config = folders.read_json(path)
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in DEFAULTS:
        near = get_close_matches(str(name), DEFAULTS, 1) or ["/".join(DEFAULTS)]
        raise ValueError(f"_class_name: {name!r} is not supported; nearest: {near[0]}")
    fields = dict(DEFAULTS[name])
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    former = given.pop("set_alpha_to_zero", None) if name == "DDIMInverseScheduler" else None
    if former is not None:
        given["set_alpha_to_one"] = former
    for key, value in given.items():
        if key in fields:
            replaced = REPLACED.get(name, {}).get(key, {})
            fields[key] = replaced.get(value, value) if isinstance(value, str) else value
        elif not _harmless(key, value):
            known = any(key in others for others in DEFAULTS.values())
            near = [] if known else get_close_matches(key, fields, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; diffusers would ignore it"
            raise ValueError(f"{key}: {name} has no such field (value {value!r}){hint}")
    for key, value in fields.items():
        usual = DEFAULTS[name][key]
        if usual is not None and value != usual:  # -inf is one of the defaults
            listed = isinstance(usual, (list, tuple))
            if value is None or isinstance(value, (list, tuple, dict)) != listed:
                raise ValueError(f"{key}={value!r:.200}: {name} takes values such as {usual!r}")
            check(key, value, usual, name)
        legal = CHOICES.get(name, {}).get(key, CHOICES["*"].get(key))
        if legal is not None and value not in legal:
            raise ValueError(f"{key}: {name} supports {', '.join(map(str, legal))}, got {value!r}")
    chosen = [key for key in (*SPREAD, "use_lu_lambdas") if fields.get(key)]
    if len(chosen) > 1:
        raise ValueError(f"{chosen[1]}: {name} takes only one of {chosen}")
    return name, SimpleNamespace(**fields)


def _harmless(key: str, value: Any) -> bool:
    """Whether another class's field can be dropped: it is off, at its default, or only a parameter
    of a switch that this class does not have."""
    owners = [fields for fields in DEFAULTS.values() if key in fields]
    switchless = ("set_alpha_to_one", "skip_prk_steps", "steps_offset", "clip_sample_range")
    parameters = (*switchless, "dynamic_thresholding_ratio", "sample_max_value", "flow_shift")
    if not owners:
        return False
    return key in parameters or not value or any(value == fields[key] for fields in owners)
