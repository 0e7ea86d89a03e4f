"""VGGish's features of sound, in which FAD is taken (Kilgour et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from diffusion.evaluation.networks.network import Network, Run, existing
from diffusion.levels import Array
from diffusion.models.vggish import PATCH, VGGish
from diffusion.pretrained.networks import vggish as weights_of

RATE = 16_000  # samples a second
WINDOW, HOP, LENGTH = 400, 160, 512  # samples: 25 ms, 10 ms, and the Fourier transform's
LOW, HIGH = 125, 7500  # Hz
OFFSET = 0.01
FRAMES, BANDS = PATCH
FEWEST = WINDOW + (FRAMES - 1) * HOP  # samples of one patch


@jax.jit
def _forward(params: Any, x: Array) -> Array:
    return VGGish().apply({"params": params}, x)


def vggish(weights: str) -> Network:
    """VGGish; "features" [B, 128] of waveforms [B, L] or [B, L, 1] in [-1, 1] at 16 kHz.

    FAD is ``frechet(vggish("FILE.safetensors"))``. The features are those of patches of 0.96 s that
    follow one another, averaged over the patches of a waveform; what is left at the end is not
    heard. Published figures take every patch as an example: they agree with those of waveforms of
    one patch, 15,600 to 30,959 samples. Compare only figures of equal lengths.

    Args:
      weights: a file as ``diffusion.pretrained.networks.vggish.load`` reads it.
    """
    path = existing("vggish", weights)

    def open_weights() -> Run:
        params = weights_of.load(path)

        def run(x: np.ndarray, _: Sequence[Any]) -> dict[str, np.ndarray]:
            found = patches(x)
            values = _forward(params, found.reshape(-1, *PATCH))
            return {"features": np.asarray(values).reshape(*found.shape[:2], -1).mean(1)}

        return run

    about = "16 kHz, log-mel patches of 0.96 s, mean over the patches of a waveform"
    return Network("vggish", open_weights, ("features",), (path,), about, pictures=False, batch=16)


def patches(x: np.ndarray) -> np.ndarray:
    """Log-mel patches [B, P, 96, 64], float32, of waveforms [B, L] or [B, L, 1] at 16 kHz.

    log(|STFT| M + 0.01): windows of 25 ms every 10 ms, weighted by Hann's periodic curve and padded
    to 512 samples, without padding at the ends; M as ``mel_weights``. Computed in float64.

    Raises:
      ValueError: the waveforms are too short, of several channels, or far outside of [-1, 1].
    """
    x = x[..., 0] if x.ndim == 3 and x.shape[-1] == 1 else x
    if x.ndim != 2 or x.shape[1] < FEWEST:
        raise ValueError(
            f"vggish takes waveforms [N, L] or [N, L, 1] of {FEWEST} samples or more at 16 kHz, "
            f"got {x.shape}: mix several channels, and fill short ones up with silence"
        )
    if (peak := np.abs(x).max()) > 2:
        raise ValueError(
            f"vggish takes waveforms in [-1, 1], got values up to {peak:.5g}; divide 16-bit "
            "numbers by 32768"
        )
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), WINDOW, 1)[:, ::HOP]
    spectrum = np.abs(np.fft.rfft(windows * hann, LENGTH))
    logs = np.log(spectrum @ mel_weights() + OFFSET).astype(np.float32)
    count = logs.shape[1] // FRAMES
    return logs[:, : count * FRAMES].reshape(len(x), count, FRAMES, BANDS)


@cache
def mel_weights() -> np.ndarray:
    """Weights [257, 64] of frequencies in mel bands, float64.

    Triangles over m(f) = 1127 log(1 + f / 700), whose corners are evenly spaced from 125 to 7500
    Hz; neighbours overlap by half. The frequency 0 counts nowhere.
    """

    def mel(f: np.ndarray) -> np.ndarray:
        return 1127 * np.log1p(f / 700)

    corners = np.linspace(mel(LOW), mel(HIGH), BANDS + 2)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    m = mel(np.linspace(0, RATE / 2, LENGTH // 2 + 1))[:, None]
    weights = np.minimum((m - low) / (centre - low), (high - m) / (high - centre)).clip(0)
    weights[0] = 0
    return weights
