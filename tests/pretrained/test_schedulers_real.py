"""Schedulers of published models, and the whole path through ``sample``."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_run import BATCH, NOISES, PHASES, SIZE, compare, network, theirs

from diffusion import predictions
from diffusion.conditioning import Conditioning
from diffusion.denoiser import Stateful, denoiser
from diffusion.levels import NoiseLevel
from diffusion.pretrained.schedulers import CLASSES, dynamic_mu, from_diffusers
from diffusion.pretrained.schedulers.catalogue import DEFAULTS
from diffusion.sampling.guidance import conditional
from diffusion.sampling.sample import image_keys, sample
from diffusion.sampling.solvers.dpm_solver import multistep

# Fields as the published files have them, those of other classes included.
SD = {
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL = {
    **SD,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
MODELS = {
    "sd15": {"_class_name": "PNDMScheduler", **SD},
    "sd21": {"_class_name": "DDIMScheduler", **SD, "prediction_type": "v_prediction"},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", **SDXL},
    "sd_turbo": {"_class_name": "EulerDiscreteScheduler", **SDXL, "timestep_spacing": "trailing"},
    "sdxl_turbo": {
        "_class_name": "EulerAncestralDiscreteScheduler",
        **SDXL,
        "timestep_spacing": "trailing",
    },
    "lcm": {
        "_class_name": "LCMScheduler",
        **{**SD, "set_alpha_to_one": True},
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
    },
    "svd": {
        "_class_name": "EulerDiscreteScheduler",
        **SDXL,
        "prediction_type": "v_prediction",
        "sigma_max": 700.0,
        "sigma_min": 0.002,
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    },
    "sd3": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
    "flux_dev": FLUX,
    "flux_schnell": {**FLUX, "shift": 1.0, "use_dynamic_shifting": False},
    "playground": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "sample_max_value": 1.0,
        "sigma_data": 0.5,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
    },
    "ddpm_cifar": {
        "_class_name": "DDPMScheduler",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    },
}
EULER, DPM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
UNIPC = "UniPCMultistepScheduler"


def flux_sigmas(steps):
    return np.linspace(1.0, 1 / steps, steps)


# The first and last timestep, and the initial deviation in diffusers' scale, as published.
@pytest.mark.parametrize(
    ("model", "steps", "arguments", "first", "last", "deviation"),
    [
        ("sd15", 50, {}, 981, 1, 1),
        ("sd15", 30, {}, 958, 1, 1),
        ("sd21", 50, {}, 981, 1, 1),
        ("sdxl", 30, {}, 958, 1, None),
        ("sd_turbo", 1, {}, 999, 999, 14.6146),
        ("sdxl_turbo", 4, {}, 999, 249, 14.6146),
        ("lcm", 4, {}, 999, 259, 1),
        ("svd", 25, {}, 1.6378, -1.5537, 700.0007),
        ("sd3", 28, {}, 1000, 8.9286, 1),
        ("flux_dev", None, {"sigmas": flux_sigmas(28), "mu": 1.15}, 1000, None, 1),
        ("flux_schnell", None, {"sigmas": flux_sigmas(4), "mu": None}, 1000, 250, 1),
        ("playground", 25, {}, 1.0955, -1.5537, 80.0062),
        ("ddpm_cifar", 50, {}, 980, 0, 1),
    ],
)
def test_models(model, steps, arguments, first, last, deviation):
    config = MODELS[model]
    arguments = {name: value for name, value in arguments.items() if value is not None}
    assert compare(config, steps, **arguments) < 1e-4
    sampler = from_diffusers(config, steps, **arguments)
    assert sampler.timesteps[0] == pytest.approx(first, rel=1e-4)
    if last is not None:
        assert sampler.timesteps[-1] == pytest.approx(last, rel=1e-4)
    if deviation is not None:
        assert sampler.solver.init / sampler.scales[0] == pytest.approx(deviation, rel=1e-5)


def test_one_config_under_other_classes():
    """What people do with a pipeline's config: the same model, another scheduler."""
    for name, more in (
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverSinglestepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DDIMScheduler", {}),
        ("TCDScheduler", {}),
    ):
        assert compare({**MODELS["sdxl"], "_class_name": name, **more}, 8) < 1e-4


@pytest.mark.parametrize(
    ("config", "steps", "arguments"),
    [
        ({**MODELS["svd"]}, 10, {}),
        ({**MODELS["ddpm_cifar"], "variance_type": "learned_range"}, 10, {}),
        ({"_class_name": "DDIMScheduler", "clip_sample_range": 2.0}, 10, {"eta": 0.5}),
    ],
)
def test_through_denoiser_and_sample(config, steps, arguments, tmp_path):
    """As a user writes it, from a folder with the file, the initial noise included."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    sampler = from_diffusers(tmp_path, steps, **arguments)
    freq = 0.02 if sampler.timesteps.max() > 10 else 3.0
    channels = 2 * SIZE if config.get("variance_type") == "learned_range" else SIZE

    def net(x, t, cond):  # the same network, told each example's timestep
        rows = [network(x[i : i + 1], t[i], freq, jnp, channels) for i in range(BATCH)]
        return jnp.concatenate(rows)

    @jax.jit
    def draw(solver):
        denoise = denoiser(net, sampler.prediction, sampler.c_noise)
        denoise = sampler.transform(conditional(denoise, Conditioning()))
        return sample(denoise, solver, image_keys(0, range(BATCH)), (SIZE,), noises=NOISES)

    ours = np.asarray(draw(sampler.solver))
    timesteps, x = theirs(config, steps, NOISES[0], freq, channels, **arguments)
    np.testing.assert_allclose(sampler.timesteps, timesteps, rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(ours, x * sampler.scales[1], atol=1e-4 * np.abs(x).max())


@pytest.mark.parametrize("name", [name for name in CLASSES if "Inverse" not in name])
def test_exact_data(name):
    """Told the truth, every class ends at the data (as closely as its last level is clean)."""
    config = {"_class_name": name}
    if "clip_sample" in DEFAULTS[name]:
        config["clip_sample"] = False
    sampler = from_diffusers(config, 4)
    data = jnp.asarray(PHASES[None].repeat(BATCH, 0) / 6)  # within [-1, 1]
    # The truth is that already which a consistency model's boundary condition would make of it.
    consistency = name == "CMStochasticIterativeScheduler"
    told = lambda x, level: data
    denoise = told if consistency else sampler.transform(told)
    x = sample(denoise, sampler.solver, image_keys(0, range(BATCH)), (SIZE,), noises=NOISES)
    last = NoiseLevel(*(leaf[-1] for leaf in sampler.grid))
    error = np.abs(np.asarray(x) - last.alpha * np.asarray(data)).max()
    assert error < 5 * last.sigma + 1e-5


@pytest.mark.parametrize(
    ("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63)], ids=["least", "most", "between"]
)
def test_dynamic_mu(tokens, mu):
    assert dynamic_mu(FLUX, tokens) == pytest.approx(mu)


def test_scales():
    """x here is alpha times diffusers' latents in sigma space; the same in the others."""
    sampler = from_diffusers(MODELS["sdxl"], 10)
    ratio = float(sampler.grid.ratio[0])
    assert sampler.scales == (pytest.approx(1 / np.sqrt(1 + ratio**2)), 1.0)
    assert sampler.solver.init == pytest.approx(1.0)  # leading: sqrt(sigma^2 + 1)
    ends_noisy = {**MODELS["sdxl"], "final_sigmas_type": "sigma_min"}
    assert from_diffusers(ends_noisy, 10).scales[1] == pytest.approx(0.99957, abs=1e-5)
    assert from_diffusers(MODELS["sd15"], 10).scales == (1.0, 1.0)


@pytest.mark.parametrize("name", [EULER, "EulerAncestralDiscreteScheduler", DPM, UNIPC])
def test_zero_terminal_snr_is_2_to_the_minus_24(name):
    """Where diffusers puts alpha-bar so that sigma is finite; DDIM keeps the exact 0."""
    fields = {
        **{key: value for key, value in SD.items() if "beta" in key},
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    sampler = from_diffusers({"_class_name": name, **fields}, 4)
    assert sampler.grid.ratio[0] == pytest.approx(4096, rel=1e-6)
    exact = from_diffusers({"_class_name": "DDIMScheduler", **fields}, 4)
    assert exact.grid.alpha[0] == 0


@pytest.mark.parametrize(
    ("name", "fields", "arguments"),
    [
        (
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False},
            {"eta": 1.0},
        ),
        ("KDPM2AncestralDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}, {}),
    ],
)
def test_finite_where_diffusers_is_not(name, fields, arguments):
    """Where its float32 takes the root of a difference below 0; else this would be an error."""
    config = {"_class_name": name, **fields, "prediction_type": "v_prediction"}
    _, x = theirs(config, 10, NOISES[0], 0.02, SIZE, **arguments)
    assert np.isnan(x).all()
    solver = from_diffusers(config, 10, **arguments).solver
    x = sample(lambda x, level: 0.5 * x, solver, image_keys(0, range(BATCH)), (SIZE,))
    assert np.isfinite(x).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 0.5}),
        ("DDIMInverseScheduler", {}),
        ("CMStochasticIterativeScheduler", {}),
    ],
)
def test_transforms_keep_memory(name, fields):
    """Clipping a denoiser with a memory (momentum, cached features) leaves it one."""
    sampler = from_diffusers({"_class_name": name, **fields}, 4)
    plain = lambda x, level: 3 * x + level.alpha
    counting = Stateful(lambda x: 0, lambda x, level, n: (plain(x, level), n + 1))
    level = NoiseLevel(*(jnp.float32(leaf[1]) for leaf in sampler.solver.level))
    expected = sampler.transform(plain)(NOISES[0], level)
    result, count = sampler.transform(counting).step(NOISES[0], level, 4)
    assert count == 5
    assert np.array_equal(result.x0, expected.x0) and np.abs(result.x0).max() <= 1
    assert np.array_equal(result.unclipped, plain(NOISES[0], level))


def test_multistep_along_a_rising_grid():
    """Up and down again between two levels is where it began, to the method's order."""
    grid = from_diffusers({"_class_name": DPM}, 40).grid
    inner = NoiseLevel(*(leaf[10:30] for leaf in grid))
    reverse = NoiseLevel(*(leaf[::-1] for leaf in inner))

    def denoise(x, level):
        return jnp.tanh(level.alpha * x / (level.alpha**2 + level.sigma**2))

    x = jnp.asarray(NOISES[0])
    keys = image_keys(0, range(BATCH))
    up = sample(denoise, multistep(reverse, 2, rising=True), keys, (SIZE,), x_init=x)
    down = sample(denoise, multistep(inner, 2), keys, (SIZE,), x_init=up)
    assert np.abs(np.asarray(up - x)).max() > 0.1
    np.testing.assert_allclose(down, x, atol=0.01)
    with pytest.raises(ValueError, match="eta must be 0 on a rising grid"):
        multistep(reverse, 2, rising=True, eta=1.0)
    with pytest.raises(ValueError, match="must increase strictly; node 0"):
        multistep(inner, 2, rising=True)


def test_learned_variances_of_dpm():
    """DPM-Solver's variance_type only says that there are more channels, which go unused."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned_range"}
    sampler = from_diffusers(config, 5)
    assert np.array_equal(sampler.solver.noise, sampler.solver.noise_upper)
    assert sampler.prediction is predictions.eps
