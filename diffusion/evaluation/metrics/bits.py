"""Bits per dimension of data under a trained model: by the ODE or the variational bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import predictions
from diffusion.conditioning import Conditioning
from diffusion.data import densities
from diffusion.data.sources import Source
from diffusion.denoiser import ConditionalDenoise
from diffusion.errors import check_range
from diffusion.evaluation.metrics.bound import variational_bound
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling import grids, likelihood
from diffusion.sampling.sample import image_keys
from diffusion.schedules import Schedule, Table
from diffusion.specs import unknown

DIVERGENCES = ("exact", "hutchinson", "hutchinson_gaussian")
DEQUANTIZATIONS = ("truncated_normal", "uniform")
MOST = 100_000  # steps, draws or probes of one estimate


class Bits(NamedTuple):
    """Of each example: bits per dimension [B], and evaluations of the network [B]."""

    bits: Array
    evaluations: Array


# (denoise, schedule, x [B, ...], keys [B], cond, grey levels; 0: continuous) -> Bits
Estimator = Callable[[ConditionalDenoise, Schedule, Array, jax.Array, Conditioning, int], Bits]


def ode(
    divergence: str = "hutchinson",
    probes: int = 1,
    dequantization: str = "uniform",
    samples: int = 1,
    sigma_min: float | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_steps: int = 4096,
) -> Estimator:
    """The estimator by the probability-flow ODE; ``sampling.likelihood`` explains the options."""
    if divergence not in DIVERGENCES:
        raise unknown("divergence", divergence, DIVERGENCES)
    if dequantization not in DEQUANTIZATIONS:
        raise unknown("dequantization", dequantization, DEQUANTIZATIONS)
    for option, value in (("probes", probes), ("samples", samples), ("max_steps", max_steps)):
        check_range(option, value, 1, MOST)
    for option, value in (("rtol", rtol), ("atol", atol), ("sigma_min", sigma_min)):
        if value is not None:
            check_range(option, value, 0, above=True)
    trace, noise = getattr(likelihood, divergence), getattr(likelihood, dequantization)
    if divergence != "exact":
        trace = partial(trace, probes=probes)

    def estimate(denoise, schedule, x, keys, cond, levels):
        low, _ = likelihood.noise_range(schedule, sigma_min, None)
        options = {"rtol": rtol, "atol": atol, "max_steps": max_steps}
        options |= {"cond": cond, "divergence": trace, "sigma_min": low}
        log_p = partial(likelihood.log_likelihood, denoise, schedule, **options)
        if levels:
            options = {"sigma": low, "dequantization": noise, "samples": samples}
            result = likelihood.discrete_log_likelihood(log_p, x, keys, levels, **options)
        else:
            result = log_p(x, keys)
        return Bits(likelihood.bits_per_dim(result.log_p, x.shape[1:]), result.evaluations)

    return estimate


def bound(steps: int = 0, draws: int = 0, nu: float = 0.0) -> Estimator:
    """The estimator by the variational bound (``evaluation.metrics.bound``).

    Args:
      steps: T; 0 means the steps of a table, and 1000 for other schedules. They are evenly spaced
        in a table's time, for other schedules in log SNR.
      draws: number of these steps, drawn at random, that each example evaluates; 0 means all.
      nu: position of variances that are not learned, see ``variational_bound``.
    """
    check_range("steps", steps, 0, MOST)
    check_range("draws", draws, 0, MOST)
    check_range("nu", nu, 0, 1)

    def estimate(denoise, schedule, x, keys, cond, levels):
        if isinstance(schedule, Table):
            grid = grids.uniform(schedule, steps or schedule.steps)
        else:
            grid = grids.exponential(schedule, steps or 1000)
        options = {"levels": levels or None, "nu": nu, "draws": draws or None}

        def given(x, level):
            return denoise(x, level, cond)

        result = variational_bound(given, grid, x, keys, **options)
        evaluations = draws + 1 if draws else len(grid.sigma) - 1
        return Bits(result.total, jnp.full(len(x), evaluations))

    return estimate


def evaluate_bits(
    estimator: Estimator,
    denoiser: Callable[[Any], ConditionalDenoise],
    schedule: Schedule,
    params: Any,
    sources: dict[str, Source],
    *,
    count: int,
    batch_size: int,
    labels: bool,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Bits per dimension of some examples of each source; each device takes its share of a batch.

    Args:
      estimator: ``ode(...)`` or ``bound(...)``.
      denoiser: params -> conditional denoiser, without guidance or clipping, which would change the
        model's distribution.
      schedule: the one it was trained on.
      count: examples of each, chosen at random (all, if there are fewer).
      batch_size: per call, over all devices.
      labels: whether the model gets each example's label; the result is then about p(x | label).
      seed: of the choice and of the estimator's noise.

    Returns:
      For each source JSON-ready numbers: bits_per_dim, its standard_error over examples, nats (per
      example), evaluations (mean) and count; failed, the number of examples whose ODE was not
      solved within max_steps; all other figures leave them out.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.asarray(devices), ("batch",))
    whole, split = PartitionSpec(), PartitionSpec("batch")
    levels = {source.levels for source in sources.values()}
    if len(levels) != 1:
        raise ValueError(f"sources must have the same number of grey levels, got {levels}")
    (levels,) = levels

    def local(params, x, keys, cond):
        return estimator(denoiser(params), schedule, x, keys, cond, levels)

    specs = {"in_specs": (whole, split, split, split), "out_specs": split}
    run = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=False, **specs))
    params = jax.device_put(params, NamedSharding(mesh, whole))
    size = -(-min(batch_size, count) // len(devices)) * len(devices)
    results = {}
    for name, source in sources.items():
        chosen = np.sort(chosen_examples(source, count, seed))
        parts = []
        for start in range(0, len(chosen), size):
            index = np.minimum(np.arange(start, start + size), len(chosen) - 1)
            batch = source.read(chosen[index])
            cond = Conditioning(label=batch["label"] if labels else None)
            part = run(params, batch["x"], image_keys(seed, chosen[index]), cond)
            parts.append([np.asarray(leaf)[: len(chosen) - start] for leaf in part])
        bits, evaluations = (np.concatenate(leaf).astype(np.float64) for leaf in zip(*parts))
        solved = np.isfinite(bits)
        results[name] = summary(bits[solved], source.shape) | {
            "evaluations": float(evaluations.mean()),
            "failed": int((~solved).sum()),
        }
    return results


def chosen_examples(source: Source, count: int, seed: int) -> np.ndarray:
    """The indices of the ``count`` examples that are evaluated, [min(count, N)]."""
    return np.random.default_rng(seed).permutation(len(source))[:count]


def summary(bits: np.ndarray, shape: tuple[int, ...]) -> dict[str, Any]:
    """Mean and standard error of bits per dimension [N], and the mean in nats per example."""
    if not len(bits):
        return {"bits_per_dim": math.nan, "standard_error": math.nan, "nats": math.nan, "count": 0}
    error = bits.std(ddof=1) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return {
        "bits_per_dim": float(bits.mean()),
        "standard_error": float(error),
        "nats": float(bits.mean() * math.prod(shape) * math.log(2)),
        "count": len(bits),
    }


CHOICES = {f.__name__: f for f in (ode, bound)}


def metric(estimator: Estimator, count: int = 500, batch_size: int = 100, seed: int = 0) -> Metric:
    """``evaluate_bits`` of ``count`` held-out and as many training examples.

    Figures: bits_held_out and bits_train, each with the numbers of ``evaluate_bits``.
    """
    if not callable(estimator):
        raise ValueError(f"expected ode() or bound(), as in bits(ode()), got {estimator!r}")
    check_range("count", count, 1)
    check_range("batch_size", batch_size, 1)
    check_range("seed", seed, 0)

    def measure(judged: Judged) -> dict[str, Any]:
        pipeline, data = judged.pipeline, judged.data()
        check(pipeline)
        splits = {"held_out": data.held_out, "train": data.train}
        result = evaluate_bits(
            estimator,
            pipeline.denoiser,
            pipeline.schedule,
            judged.params,
            splits,
            count=count,
            batch_size=batch_size,
            labels=pipeline.conditioner.subject == "label",
            seed=seed,
        )
        for name, numbers in result.items():
            if len(splits[name].shape) == 1:
                index = chosen_examples(splits[name], count, seed)
                x = splits[name].read(index)["x"]
                known = densities.log_density(splits[name].name, x)
                if known is not None:
                    numbers["nats_of_the_density"] = float(-known.mean())
        return {f"bits_{name}": numbers for name, numbers in result.items()}

    return Metric(measure, outputs=())


def check(pipeline: Any) -> None:
    """Raises ValueError unless the network says something about x_0 at the noisiest level."""
    with jax.enable_x64(False), np.errstate(all="ignore"):
        level = pipeline.schedule(np.float64(pipeline.schedule.t_max))
        level = NoiseLevel(*(np.asarray(leaf, np.float32) for leaf in level))
        coefficients = predictions.precondition(pipeline.prediction, level)
        c_noise = pipeline.c_noise(level)
    if not all(np.all(np.isfinite(leaf)) for leaf in (*coefficients, c_noise)):
        raise ValueError(
            "likelihoods begin at the schedule's noisiest level, where alpha = 0 here; this needs "
            "the prediction x0, v, flow or edm, and c_noise ddpm_index or thousand_t"
        )
