"""Runs a scheduler of diffusers, and ours of the same config, on one network and one noise."""

import logging
import sys
import warnings
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from diffusion.denoiser import Estimate, Stateful
from diffusion.levels import NoiseLevel
from diffusion.predictions import precondition
from diffusion.pretrained.schedulers import from_diffusers
from diffusion.sampling.sample import image_keys, sample
from diffusion.sampling.tables import REGISTERS, Solver

logging.getLogger("diffusers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="diffusers")

ROWS, BATCH, SIZE = 64, 2, 8
RNG = np.random.default_rng(0)
NOISES = RNG.normal(size=(ROWS + 1, BATCH, SIZE)).astype(np.float32)
W = (RNG.normal(size=(SIZE, SIZE)) / SIZE**0.5).astype(np.float32)
PHASES = RNG.uniform(0, 6, SIZE).astype(np.float32)


def network(x, t, freq, xp, channels=SIZE):
    """[B, SIZE], () -> [B, channels]: smooth, nonlinear, and strongly dependent on t."""
    hidden = xp.sin(freq * t + PHASES_OF[xp])
    mixed = xp.tanh(x @ W_OF[xp] + hidden)
    out = 0.5 * x + 0.5 * mixed + 0.4 * hidden * xp.cos(1.7 * freq * t + PHASES_OF[xp])
    if channels == SIZE:
        return out
    both = [out, xp.tanh(mixed - 0.3 * x)]
    return xp.concatenate(both, axis=-1)


PHASES_OF = {np: PHASES, jnp: jnp.asarray(PHASES), torch: torch.from_numpy(PHASES)}
W_OF = {np: W, jnp: jnp.asarray(W), torch: torch.from_numpy(W)}


def theirs(config, steps, x_init, freq, channels, strength=None, double=False, **arguments):
    """(timesteps, the last latents [B, SIZE], initial deviation) of diffusers."""
    cls = getattr(diffusers, config["_class_name"])
    scheduler = cls.from_config(config)
    step_names = ("eta", "use_clipped_model_output")
    step_arguments = {k: arguments.pop(k) for k in step_names if k in arguments}
    if "LCM" in cls.__name__ or "TCD" in cls.__name__:
        arguments["strength"], strength = strength or 1.0, None
    if steps is not None and not ("Flow" in cls.__name__ and "sigmas" in arguments):
        arguments["num_inference_steps"] = steps
    if "UniPC" in cls.__name__ and "sigmas" in arguments:
        arguments["sigmas"] = np.asarray(arguments["sigmas"])
    scheduler.set_timesteps(**arguments)
    timesteps = scheduler.timesteps
    twice = len(timesteps) > 1 and timesteps[0] == timesteps[1]
    if twice and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # or it would begin at the second
    if strength is not None:
        count = steps or len(timesteps)
        start = count - min(int(count * strength), count)
        if "Flow" in cls.__name__:
            start = int(max(count - min(count * strength, count), 0))
        timesteps = timesteps[start * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start * scheduler.order)
    if double:
        scheduler.sigmas = scheduler.sigmas.double()
    deviation = float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0
    calls = []
    module = sys.modules[cls.__module__]
    drawn = getattr(module, "randn_tensor", None)

    def randn_tensor(shape, **_):
        assert tuple(shape) == (BATCH, SIZE, 1, 1)
        return torch.from_numpy(NOISES[len(calls)]).reshape(shape)

    if drawn is not None:
        module.randn_tensor = randn_tensor
    try:
        x = torch.from_numpy(x_init * (deviation if strength is None else 1))
        x = x.to(torch.float64 if double else torch.float32).reshape(BATCH, SIZE, 1, 1)
        for t in timesteps:
            calls.append(t)
            scaled = x
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(x, t)
            flat = scaled.reshape(BATCH, SIZE).float()
            out = network(flat, t.float(), freq, torch, channels)
            out = out.to(x.dtype).reshape(BATCH, channels, 1, 1)
            x = scheduler.step(out, t, x, return_dict=False, **step_arguments)[0]
    finally:
        if drawn is not None:
            module.randn_tensor = drawn
    return timesteps.numpy(), x.reshape(BATCH, SIZE).numpy()


@partial(jax.jit, static_argnames=("transform", "channels"))
def _run(solver, coefficients, x_init, freq, transform, channels):
    def denoise(x, level, r):
        c_in, c_skip, c_out, c_noise = coefficients[r]

        def bare(x, level):
            out = network(c_in * x, c_noise, freq, jnp, channels)
            x0 = c_skip * x + c_out * out[:, :SIZE]
            if channels == SIZE:
                return x0
            return Estimate(x0, (out[:, SIZE:] + 1) / 2)

        return transform(bare)(x, level), r + 1

    keys = image_keys(0, range(BATCH))
    counted = Stateful(lambda x: 0, denoise)
    return sample(counted, solver, keys, (SIZE,), x_init=x_init, noises=NOISES)


TRANSFORMS = {}


def canonical(transform):
    """Equal partial functions become one, so that they compile once."""
    if not isinstance(transform, partial):
        return transform
    key = (transform.func, tuple(sorted(transform.keywords.items())))
    return TRANSFORMS.setdefault(key, transform)


def padded(solver):
    """With rows that leave x as it is, so that all tables have one shape."""
    extra = ROWS - solver.evaluations
    assert extra >= 0
    A = np.zeros((extra, REGISTERS, REGISTERS))
    A[:, 0, 0] = 1
    zeros = np.zeros((extra, REGISTERS))
    level = NoiseLevel(*(np.append(a, np.full(extra, a[-1])) for a in solver.level))
    new = [np.concatenate([solver.A, A])]
    new += [np.concatenate([a, zeros]) for a in solver[2:6]]
    return Solver(level, *new, solver.init)


def compare(config, steps=None, double=False, **arguments):
    """(relative error of the last x, worst of the norm's and the largest entry's)."""
    sampler = from_diffusers(config, steps, **arguments)
    freq = np.float32(0.02 if np.abs(sampler.timesteps).max() > 10 else 3.0)
    learned = config.get("variance_type") == "learned_range"
    learned = learned and "DDPM" in config["_class_name"]
    channels = 2 * SIZE if learned else SIZE
    partway = arguments.get("strength") is not None and "CM" not in config["_class_name"][:2]
    z = NOISES[0]
    solver = padded(sampler.solver)
    level = NoiseLevel(*(jnp.asarray(a, jnp.float32) for a in solver.level))
    told = np.asarray(sampler.c_noise(level))
    coefficients = [*precondition(sampler.prediction, level), told]
    x_init = z * (sampler.scales[0] if partway else solver.init)
    if partway and config["_class_name"] in ("LCMScheduler", "TCDScheduler"):
        x_init = z
    ours = _run(
        solver,
        jnp.stack(coefficients, -1),
        x_init.astype(np.float32),
        freq,
        canonical(sampler.transform),
        channels,
    )
    ours = np.asarray(ours, np.float64)
    timesteps, x = theirs(config, steps, z, freq, channels, double=double, **arguments)
    np.testing.assert_allclose(sampler.timesteps, timesteps, rtol=1e-5, atol=2e-3)
    count = sampler.solver.evaluations
    np.testing.assert_allclose(told[:count], timesteps, rtol=1e-5, atol=2e-3)
    x = x * sampler.scales[1]
    assert np.all(np.isfinite(x)), "diffusers gives NaN"
    norm = np.linalg.norm(ours - x) / np.linalg.norm(x)
    return max(norm, np.abs(ours - x).max() / np.abs(x).max())
