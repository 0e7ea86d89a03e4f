"""Writes k_diffusion_reference.npz: what k-diffusion's own samplers make of given noise.

    python -m venv .venv-k && .venv-k/bin/pip install torch numpy scipy tqdm pillow safetensors
    .venv-k/bin/pip install --no-deps k-diffusion==0.1.1.post1 torchdiffeq torchsde trampoline
    .venv-k/bin/python tests/sampling/k_diffusion_reference.py

k-diffusion wants NumPy 1 and so cannot be installed beside JAX; hence numbers in a file.
"""

import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

MEANS, STDS, WEIGHTS = (-0.6, 0.7), (0.3, 0.2), (0.4, 0.6)
STEPS, BATCH = 9, 16


def load_sampling():
    """k_diffusion.sampling without the package's __init__, which imports its training code."""
    package = types.ModuleType("k_diffusion")
    package.__path__ = [str(Path(find_spec("torchsde").origin).parent.parent / "k_diffusion")]
    sys.modules["k_diffusion"] = package
    vision = types.ModuleType("torchvision.transforms")  # wanted by its utilities for pictures
    vision.functional = None
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision.transforms"] = sys.modules["torchvision"].transforms = vision
    from k_diffusion import sampling

    return sampling


def denoise(x, sigma):
    """E[x_0 | x] of the mixture, x [B, 1], sigma [B]."""
    mu, std, weight = (torch.tensor(a, dtype=x.dtype) for a in (MEANS, STDS, WEIGHTS))
    v = std**2 + sigma[:, None] ** 2
    r = torch.softmax(weight.log() - 0.5 * v.log() - 0.5 * (x - mu) ** 2 / v, dim=-1)
    return (r * (mu + std**2 / v * (x - mu))).sum(-1, keepdim=True)


class Noise:
    """Hands out increments of one Brownian path, whose time is sigma, in the order of the rows."""

    def __init__(self, noises):
        self.noises, self.stage = list(noises), None

    def __call__(self, sigma, sigma_next):
        z = self.noises.pop(0)
        if self.stage is None or self.stage[0] != sigma:
            self.stage = (sigma, sigma - sigma_next, z)
            return z
        _, first, z_first = self.stage
        share = (first / (sigma - sigma_next)).sqrt()
        return share * z_first + (1 - share**2).sqrt() * z


def main() -> None:
    s = load_sampling()
    rng = np.random.default_rng(0)
    sigmas = np.append(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), STEPS) ** 7, 0.0)
    x, noises = rng.standard_normal((BATCH, 1)) * 80, rng.standard_normal((2 * STEPS, BATCH, 1))
    churn = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    runs = {
        "euler": (s.sample_euler, {}),
        "heun": (s.sample_heun, {}),
        "edm": (s.sample_heun, churn),
        "dpm2": (s.sample_dpm_2, {}),
        "lms": (s.sample_lms, {}),
        "dpmpp_2m": (s.sample_dpmpp_2m, {}),
        "euler_ancestral": (s.sample_euler_ancestral, {"eta": 0.8, "s_noise": 1.1}),
        "dpm2_ancestral": (s.sample_dpm_2_ancestral, {"eta": 0.8, "s_noise": 1.1}),
        "dpmpp_2s_ancestral": (s.sample_dpmpp_2s_ancestral, {"eta": 0.8, "s_noise": 1.1}),
        "dpmpp_sde": (s.sample_dpmpp_sde, {"eta": 0.8, "s_noise": 1.1}),
        "dpmpp_2m_sde": (s.sample_dpmpp_2m_sde, {"eta": 0.8}),
        "dpmpp_2m_sde_heun": (s.sample_dpmpp_2m_sde, {"eta": 0.8, "solver_type": "heun"}),
        "dpmpp_3m_sde": (s.sample_dpmpp_3m_sde, {"eta": 0.8}),
    }
    results = {"sigmas": sigmas, "x": x, "noises": noises}
    for name, (run, options) in runs.items():
        noise = Noise(torch.tensor(noises))
        if "eta" in options:
            options = {**options, "noise_sampler": noise}
        original = torch.randn_like
        # These ask for noise at every step, also where they then add none.
        torch.randn_like = lambda t, noise=noise: noise.noises.pop(0)
        try:
            end = run(denoise, torch.tensor(x), torch.tensor(sigmas), disable=True, **options)
        finally:
            torch.randn_like = original
        results[name] = end.numpy()
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **results)
    print(path, {name: float(np.abs(value).max()) for name, value in results.items()})


if __name__ == "__main__":
    main()
