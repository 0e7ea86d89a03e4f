"""Runs any solver's table: one ``lax.scan`` over its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.denoiser import ConditionalDenoise, Denoise, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.guidance import conditional
from diffusion.sampling.guidance.transform import remembering
from diffusion.sampling.langevin import Corrector
from diffusion.sampling.tables import Solver
from diffusion.sharding import examples_stay, is_cut

Guide = Callable[..., Denoise | Stateful]  # (ConditionalDenoise, Conditioning, *arguments)
Draw = Callable[..., jax.Array]  # (params, solver, keys, cond, *arguments, x_init) -> images
Callback = Callable[..., None]  # (evaluation (), x_0_hat [B, ...], *callback_arguments)


class Trajectory(NamedTuple):
    """The denoiser's input x at each of the solver's levels, and its estimates of x_0."""

    x: Array  # [R, B, ...]
    x0: Array  # [R, B, ...]


def image_keys(seed: int, indices: Sequence[int] | Array) -> jax.Array:
    """Keys [B], one per image: image i of a seed is the same in every batch."""
    return _image_keys(seed, jnp.asarray(indices))


@jax.jit
def _image_keys(seed: Array, indices: Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def image_noise(keys: jax.Array, shape: tuple[int, ...], fold: Array | int = 0) -> jax.Array:
    """Standard normal [B, *shape], image i's from ``keys[i]``; fold 0 is the initial noise."""
    folded = jax.vmap(lambda key: jax.random.fold_in(key, fold))(keys)
    # The same numbers as in the image's shape, but drawn flat they compile much faster on a CPU.
    size, dtype = math.prod(shape), jnp.result_type(float)
    flat = jax.vmap(lambda key: jax.random.normal(key, (size,), dtype))(folded)
    return flat.reshape(len(keys), *shape)


def sample(
    denoise: Denoise | Stateful,
    solver: Solver,
    keys: jax.Array,
    shape: tuple[int, ...],
    *,
    x_init: Array | None = None,
    noises: Array | None = None,
    corrector: Corrector | None = None,
    callback: Callback | None = None,
    callback_arguments: tuple[Array, ...] = (),
    trajectory: bool = False,
) -> Array | tuple[Array, Trajectory]:
    """Draws images; traceable, differentiable in everything, and ``vmap`` over tables works.

    Image i's noise comes from ``keys[i]`` alone: fold 0 is the initial noise, fold r + 1 that of
    row r. It does not depend on the batch or the devices. Memory does not grow with the number of
    evaluations, unless the trajectory is returned or gradients are taken.

    Args:
      denoise: takes levels with leaves (); the scan carries the memory of a ``Stateful`` one.
      solver: the table.
      keys: [B] typed keys (``image_keys``).
      x_init: [B, *shape] where to start instead of noise; it must be at ``solver.level[0]``.
      noises: [R + 1 or more, B, *shape] standard normal numbers to use instead of drawing: the
        initial noise and each row's.
      corrector: applied to x after each row but the last, at the next row's level: predictor-
        corrector sampling, with a solver of one evaluation per step (``langevin``) and a denoiser
        without memory. Row r's keys are fold r of each image's fold 2^31.
      callback: called on the host after each evaluation with its number, x_0_hat and
        ``callback_arguments``, for progress bars and previews.
      trajectory: whether to return every evaluation as well.

    Returns:
      x [B, *shape] at the grid's last level, in float32 (float64 if JAX has it enabled); with
      ``trajectory`` the pair (x, Trajectory).
    """
    if corrector is not None and isinstance(denoise, Stateful):
        raise ValueError(
            "a corrector cannot evaluate a denoiser that has a memory; expected a plain denoiser"
        )
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.ndim != 1:
        raise ValueError(
            f"keys must be typed keys [B] (jax.random.key), got {keys.dtype} of shape {keys.shape}"
        )
    size = (len(keys), *shape)
    if x_init is not None and x_init.shape != size:
        raise ValueError(f"x_init must have shape {size}, got {x_init.shape}")
    least = solver.evaluations + 1
    if noises is not None and (noises.shape[1:] != size or len(noises) < least):
        raise ValueError(f"noises must have shape {(least, *size)}, got {noises.shape}")

    init, step, _ = remembering(denoise)
    dtype = jnp.result_type(float)
    solver = jax.tree.map(lambda a: jnp.asarray(a, dtype), solver)

    def draw_noise(fold: Array | int) -> Array:
        if noises is not None:
            return jnp.asarray(noises, dtype)[fold]
        return image_noise(keys, shape, fold)

    def correct(registers: Array, r: Array) -> Array:
        folded = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, 2**31), r))(keys)
        level = NoiseLevel(*(a[r + 1] for a in solver.level))
        return registers.at[0].set(corrector(denoise, registers[0], level, folded))

    def evaluate(state: tuple[Array, Any], row: tuple) -> tuple[tuple, Trajectory | None]:
        registers, memory = state
        r, level, A, b, b_raw, noise, noise_upper = row
        x = registers[0]
        (x0, nu, unclipped), memory = step(x, level, memory)
        x0 = x0.astype(dtype)
        if callback is not None:
            jax.debug.callback(callback, r, x0, *callback_arguments)
        if unclipped is None:  # b and b_raw apply to the same array
            new = _combine(A, registers) + _outer(b + b_raw, x0)
        else:
            new = _combine(A, registers) + _outer(b, x0) + _outer(b_raw, unclipped.astype(dtype))
        new = jax.lax.cond(
            jnp.any(noise_upper != 0),
            lambda y: y + _deviation(noise, noise_upper, nu, x.ndim) * draw_noise(r + 1),
            lambda y: y,
            new,
        )
        if corrector is not None:
            new = jax.lax.cond(r < solver.evaluations - 1, correct, lambda y, _: y, new, r)
        return (new, memory), Trajectory(x, x0) if trajectory else None

    x = solver.init * draw_noise(0) if x_init is None else jnp.asarray(x_init, dtype)
    registers = jnp.zeros((solver.b.shape[-1], *size), dtype).at[0].set(x)
    rows = (jnp.arange(solver.evaluations), *solver[:-1])
    (registers, _), path = jax.lax.scan(evaluate, (registers, init(x)), rows)
    return (registers[0], path) if trajectory else registers[0]


def _outer(coefficients: Array, x: Array) -> Array:
    """[m] and [B, ...] -> [m, B, ...]."""
    return coefficients.reshape((-1,) + (1,) * x.ndim) * x


def _combine(A: Array, registers: Array) -> Array:
    """A Y for A [m, m], Y [m, B, ...]; as a sum it stays in float32 and fuses."""
    return sum(_outer(A[:, j], registers[j]) for j in range(len(registers)))


def _deviation(noise: Array, noise_upper: Array, nu: Array | None, ndim: int) -> Array:
    """[m, B, ...]: lower^(1 - nu) upper^nu, without log 0 in value or gradient.

    A negative deviation, of noise that a method subtracts again, has no logarithm and stays.
    """
    lower, upper = (a.reshape((-1,) + (1,) * ndim) for a in (noise, noise_upper))
    if nu is None:
        return lower
    positive = (lower > 0) & (upper > 0)
    ratio = jnp.where(positive, upper, 1) / jnp.where(positive, lower, 1)
    return lower * ratio ** nu.astype(lower.dtype)


def make_sampler(
    denoiser: Callable[[Any], ConditionalDenoise],
    shape: tuple[int, ...],
    guide: Guide = conditional,
    devices: Sequence[jax.Device] | None = None,
    corrector: Corrector | None = None,
    callback: Callback | None = None,
) -> Draw:
    """Compiles ``sample`` with weights, solver, keys and conditioning as arguments.

    Each device draws its share of the batch by itself. A batch whose size is no multiple of the
    number of devices is filled up, and the additional images are removed. One program is compiled
    per batch size and number of evaluations. Parameters that are sharded over the devices (fsdp)
    stay sharded, and each layer's are gathered where they are used; with a callback, all are
    gathered at once.

    Args:
      denoiser: params -> conditional denoiser; ``params`` is any pytree. Only ``guide`` uses the
        result, so that it may be several denoisers.
      shape: of one image.
      guide: (denoise, cond, *arguments) -> Denoise. For classifier-free guidance:
        ``lambda d, cond, scale: classifier_free(d, cond, null_like(cond, label=10), scale)``.
      devices: by default all local ones.
      corrector, callback: as ``sample``'s. The callback is called for each device's share of the
        batch, in any order; its third argument is the share's number ().

    Returns:
      (params, solver, keys [B], cond, *arguments, x_init=None) -> images [B, *shape], jitted.
      ``arguments`` are ``guide``'s, each a scalar or batch-first [B, ...]; changing them does not
      compile again. ``x_init`` [B, *shape] is where to start instead of noise.
    """
    devices = jax.local_devices() if devices is None else devices
    mesh = Mesh(np.asarray(devices), ("batch",))
    whole, split = PartitionSpec(), PartitionSpec("batch")

    def local(params, solver, keys, cond, arguments, x_init):
        denoise = guide(denoiser(params), cond, *arguments)
        options = {"x_init": x_init, "corrector": corrector}
        if callback is not None:
            share = (jax.lax.axis_index("batch"),)
            options |= {"callback": callback, "callback_arguments": share}
        return sample(denoise, solver, keys, shape, **options)

    @jax.jit
    def draw(params, solver, keys, cond, arguments, x_init):
        specs = jax.tree.map(lambda a: split if jnp.ndim(a) else whole, arguments)
        # Per-device programs rather than one partitioned one: guidance's concatenation along the
        # batch would otherwise move images between devices.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, whole, split, split, specs, split),
            out_specs=split,
            check_vma=False,
        )(params, solver, keys, cond, arguments, x_init)

    @jax.jit
    def draw_cut(params, solver, keys, cond, arguments, x_init):
        with examples_stay(NamedSharding(mesh, split), len(keys)):
            return local(params, solver, keys, cond, arguments, x_init)

    def padded(params, solver, keys, cond, *arguments, x_init=None):
        count = len(keys)
        batch = (keys, cond, arguments, x_init)
        extra = -count % len(devices)
        if extra:
            index = np.arange(count + extra) % count
            batch = jax.tree.map(lambda a: a[index] if jnp.ndim(a) else a, batch)
        everywhere = NamedSharding(mesh, whole)
        if callback is None and any(map(is_cut, jax.tree.leaves(params))):
            params = jax.tree.map(
                lambda x: x if is_cut(x) else jax.device_put(x, everywhere), params
            )
            shares = NamedSharding(mesh, split)
            batch = jax.tree.map(
                lambda a: jax.device_put(a, shares if jnp.ndim(a) else everywhere), batch
            )
            return draw_cut(params, solver, *batch)[:count]
        return draw(jax.device_put(params, everywhere), solver, *batch)[:count]

    return padded
