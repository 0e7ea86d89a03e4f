"""Drawing one batch from a pipeline: guided, from noise or from a picture, whole or in part.

What is compiled depends on the network, on what its output means and on shapes alone: parameters,
conditioning, solver tables, seeds, guidance's numbers and masks are arguments, so that another one
of these never compiles again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.denoiser import Denoise, Stateful, denoiser
from diffusion.levels import Array
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pretrained.schedulers import Sampler
from diffusion.sampling import sample as sampling
from diffusion.sampling.acceleration import NONE, Acceleration
from diffusion.sampling.aims import aimed, aims
from diffusion.sampling.editing import inpaint, noised
from diffusion.sampling.guidance import chain as chains
from diffusion.sampling.guidance.chain import Branches, Chain
from diffusion.sampling.langevin import Corrector
from diffusion.sampling.sample import Callback, Draw, image_noise, make_sampler
from diffusion.sampling.tables import Solver


@flax.struct.dataclass
class Kept:
    """The part of a picture that stays.

    Attributes:
      x0: [B, ...] the picture as the network sees it.
      mask: [B, h, w, 1], 1 where it stays.
      noise: [B, ...] what it is noised with.
    """

    x0: Array
    mask: Array
    noise: Array


class Inputs(NamedTuple):
    """The inputs of a batch of samples; each task of ``tasks`` fills in its own.

    Attributes:
      cond: what to steer towards, leaves [B, ...].
      null: what guidance steers away from, or None.
      shape: of one sample as the network sees it.
      middle: conditioning that has the picture but not the text, for ``instruct``.
      picture: [B, *shape] to noise to where the sampler starts, instead of noise alone.
      x_init: [B, *shape] to start from as it is, at the sampler's first level.
      kept: what of a picture stays, or None.
    """

    cond: Conditioning
    null: Conditioning | None
    shape: tuple[int, ...]
    middle: Conditioning | None = None
    picture: Array | None = None
    x_init: Array | None = None
    kept: Kept | None = None


class Companion(NamedTuple):
    """Another network that guides, such as a weaker one or a classifier.

    Attributes:
      network: its parameters -> what a link of the chain calls; hashable.
      params: these parameters.
    """

    network: Callable[[Any], Callable]
    params: Any


@dataclass(frozen=True)
class Program:
    """What a compiled sampler is made for, besides shapes."""

    network: nn.Module
    prediction: Callable
    c_noise: Callable
    transform: Callable[[Denoise], Denoise]
    companions: tuple[tuple[str, Callable], ...] = ()

    def guided(
        self,
        weights: Mapping[str, Any],
        cond: Conditioning,
        null: Conditioning | None,
        chain: Chain,
        middle: Conditioning | None = None,
        kept: Kept | None = None,
        start: Array | float = np.inf,
    ) -> Denoise | Stateful:
        """The denoiser that a sampler runs; ``weights`` as ``weights`` gives them."""

        def apply(x: Array, time: Array, cond: Conditioning) -> Array:
            return self.network.apply({"params": weights["network"]}, x, time, cond)

        denoise = denoiser(apply, self.prediction, self.c_noise)
        if "aims" in weights:
            denoise = aimed(denoise, *weights["aims"])
        branches = Branches(
            denoise,
            cond,
            null,
            middle,
            self.prediction,
            {name: make(weights[name]) for name, make in self.companions},
            weights["acceleration"],
        )
        guided = self.transform(chains.guide(chain, branches))
        if kept is None:
            return guided
        # As diffusers does; the first evaluation sees what sampling starts from.
        return inpaint(guided, kept.x0, kept.mask, noise=kept.noise, start=start)


def program(
    pipeline: Pipeline, sampler: Sampler, companions: Mapping[str, Companion] = {}
) -> Program:
    """What samplers of this pipeline, with companions of these names, are compiled for."""
    return Program(
        pipeline.network,
        _comparable(sampler.prediction),
        _comparable(sampler.c_noise),
        _comparable(sampler.transform),
        tuple((name, companion.network) for name, companion in companions.items()),
    )


def weights(
    pipeline: Pipeline,
    params: Params,
    solver: Solver,
    companions: Mapping[str, Companion] = {},
    acceleration: Acceleration = NONE,
) -> dict[str, Any]:
    """All parameters that ``Program.guided`` takes, when to reuse what was evaluated, and where
    the solver's steps go, for networks that are told."""
    given = {name: companion.params for name, companion in companions.items()}
    given |= {"network": params["network"], "acceleration": acceleration.at(solver.evaluations)}
    if getattr(pipeline.image_network, "two_times", False):
        given["aims"] = aims(solver)
    return given


def draw(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    inputs: Inputs,
    chain: Chain = (),
    *,
    companions: Mapping[str, Companion] = {},
    acceleration: Acceleration = NONE,
    corrector: Corrector | None = None,
    devices: Sequence[jax.Device] | None = None,
    callback: Callback | None = None,
) -> jax.Array:
    """Samples [B, *shape] at the sampler's last level; the batch is shared among the devices.

    Args:
      pipeline, params: the model.
      sampler: the table, and what the network's output means to it.
      keys: [B] typed keys, of all noise: sample i depends on ``keys[i]`` alone.
      inputs: conditioning and pictures.
      chain: of guidance. Networks that were distilled with an embedding of its scale (LCM) get the
        scale of ``cfg`` as a condition instead.
      companions: other networks that the chain calls, by name.
      acceleration: what makes evaluations cheaper.
      corrector: follows each of the solver's steps, see ``sample``.
      devices: by default all local ones.
      callback: as ``make_sampler``'s.
    """
    check_batch(keys, **inputs._asdict() | {"shape": None})
    inputs, chain = distilled(pipeline, inputs, chain)
    x_init = inputs.x_init
    if inputs.picture is not None:
        x_init = noised(inputs.picture, sampler.solver, keys)
    elif x_init is None:  # given in any case, so that with and without are compiled once
        x_init = image_noise(keys, inputs.shape) * np.float32(sampler.solver.init)
    compiled = _compiled(
        program(pipeline, sampler, companions),
        inputs.shape,
        tuple(jax.local_devices() if devices is None else devices),
        _comparable(corrector),
        callback,
    )
    start = np.float32(sampler.solver.level.t[0])
    given = weights(pipeline, params, sampler.solver, companions, acceleration)
    arguments = inputs.null, chain, inputs.middle, inputs.kept, start
    x = compiled(given, sampler.solver, keys, inputs.cond, *arguments, x_init=x_init)
    if inputs.kept is not None:
        x = inputs.kept.mask * inputs.kept.x0 + (1 - inputs.kept.mask) * x
    return x


def trajectory(
    pipeline: Pipeline,
    params: Params,
    sampler: Sampler,
    keys: jax.Array,
    inputs: Inputs,
    chain: Chain = (),
    *,
    companions: Mapping[str, Companion] = {},
    acceleration: Acceleration = NONE,
    corrector: Corrector | None = None,
) -> np.ndarray:
    """x [R + 1, B, *shape] before each evaluation and at the end, on one device.

    Divided by sqrt(alpha^2 + sigma^2), so that noise looks alike on every schedule.
    """
    inputs, chain = distilled(pipeline, inputs, chain)
    check_batch(keys, **inputs._asdict() | {"shape": None})
    made, solver = program(pipeline, sampler, companions), sampler.solver

    @jax.jit
    def run(given: Any, solver: Any, cond: Any, null: Any, chain: Chain, middle: Any) -> tuple:
        denoise = made.guided(given, cond, null, chain, middle)
        options = {"corrector": corrector, "trajectory": True}
        return sampling.sample(denoise, solver, keys, inputs.shape, **options)

    given = weights(pipeline, params, solver, companions, acceleration)
    x, path = run(given, solver, inputs.cond, inputs.null, chain, inputs.middle)
    scale = np.hypot(solver.level.alpha, solver.level.sigma)
    path = np.asarray(path.x) / scale.reshape((-1,) + (1,) * x.ndim)
    return np.concatenate([path, np.asarray(x)[None]])


def check_batch(keys: jax.Array, **arrays: Any) -> None:
    """Raises ValueError unless keys are typed and [B], and all arrays have B rows."""
    dtype, shape = getattr(keys, "dtype", type(keys).__name__), np.shape(keys)
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key) or len(shape) != 1:
        raise ValueError(
            f"keys: expected [B] typed keys, such as image_keys(0, range(B)) or "
            f"jax.random.split(jax.random.key(0), B), got {dtype} of shape {shape}"
        )
    for name, tree in arrays.items():
        for leaf in jax.tree.leaves(tree):
            if np.ndim(leaf) == 0 or len(leaf) != len(keys):
                raise ValueError(
                    f"{name} has an array of shape {np.shape(leaf)} for {len(keys)} keys; expected "
                    "a row for each key"
                )


def distilled(pipeline: Pipeline, inputs: Inputs, chain: Chain) -> tuple[Inputs, Chain]:
    """For networks that know guidance's scale, the scale as a condition instead of a link."""
    pair = chains.pair(chain)
    if not pipeline.takes_scale or pair is None:
        return inputs, chain
    count = len(jax.tree.leaves(inputs.cond)[0])
    scale = jnp.broadcast_to(jnp.asarray(pair.numbers["scale"], jnp.float32), (count,))
    return inputs._replace(cond=inputs.cond.replace(guidance=scale), null=None), chain[1:]


@cache
def _compiled(
    made: Program,
    shape: tuple[int, ...],
    devices: tuple[jax.Device, ...],
    corrector: Corrector | None,
    callback: Callback | None,
) -> Draw:
    def guide(given: Mapping[str, Any], cond: Conditioning, *arguments: Any) -> Denoise | Stateful:
        return made.guided(given, cond, *arguments)

    return make_sampler(lambda given: given, shape, guide, devices, corrector, callback)


@dataclass(frozen=True)
class _Call:
    """A function with options that is equal to another with the same ones; ``partial`` is not."""

    function: Callable
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.options))


def _comparable(function: Callable | None) -> Callable | None:
    if isinstance(function, partial) and not function.args:
        return _Call(function.func, tuple(sorted(function.keywords.items())))
    return function
