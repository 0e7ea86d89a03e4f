"""Training of an adapter: a few parameters beside a network that stays as it is.

    loss(adapter) = denoising loss of merge(base, adapter)

Whatever an adapter is (low-rank factors, a ControlNet, an image prompt's attention, new words), the
denoising objective is that of the whole network. Gradients, optimiser state, averages and
checkpoints are of the adapter alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion import conditioning
from diffusion.adapters.adapter import Adapter
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.few_steps.student import TEACHER
from diffusion.objectives.objective import Batch, Context, Measured, Params

BASE = "base"
"""The frozen network's parameters in ``Context.frozen``."""
OWN = "adapter"
"""The adapter's among the trained ones, beside those of the objective's terms."""


@dataclasses.dataclass(frozen=True)
class Adapting:
    """Trains an adapter.

    Attributes:
      objective: of the network with the adapter, ``adapter.network(base)``.
      adapter: what is trained.
      base: the network without it, whose parameters are ``context.frozen["base"]``.
      part: parameters of the network -> those of the pipeline that it is from.
    """

    objective: Denoising
    adapter: Adapter
    base: nn.Module
    part: Callable[[Params], Params] = lambda params: {"network": params}

    @property
    def step(self) -> Callable | None:
        """The objective's, on the adapter's loss."""
        step_on = getattr(self.objective, "step_on", None)
        return None if step_on is None else step_on(self.loss)

    def init(self, key: Array, batch: Batch) -> Params:
        """{"adapter": ...} beside random parameters of the base, and what else the objective
        trains: the parameters of its terms, or of a method of few steps."""
        x, cond = jnp.asarray(batch["x"]), conditioning.from_batch(batch)
        o = self.objective
        time = o.c_noise(o.schedule(jnp.full(len(x), 0.5 * o.schedule.t_max)))
        cond = cond.replace(hints=(), image_prompts=())
        if getattr(self.adapter, "edits", False):  # the base alone does not
            cond = cond.replace(image=None)
        base = self.base.init(key, x, time, cond)["params"]
        others = {}
        if o.terms or hasattr(getattr(o, "method", None), "init"):
            others = {name: own for name, own in o.init(key, batch).items() if name != "network"}
        return {OWN: self.adapter.init(jax.random.fold_in(key, 0), base), **others}

    def loss(self, params: Params, context: Context, batch: Batch, key: Array) -> Measured:
        """That of the objective for the network with the adapter, whose teacher is by default the
        network without it."""
        if context.train and hasattr(self.adapter, "dropped"):
            key, own = jax.random.split(key)
            params = {**params, OWN: self.adapter.dropped(params[OWN], own)}
        frozen = context.frozen
        whole = partial(self._whole, frozen=frozen)
        averages = {name: whole(average) for name, average in (context.ema or {}).items()}
        # The base is also what a student of few steps learns from, if it has no other teacher.
        frozen = {TEACHER: {"network": frozen[BASE]}} | frozen
        context = context._replace(frozen=frozen, ema=averages)
        return self.objective.loss(whole(params), context, batch, key)

    def levels(self, key: Array, index: Array) -> NoiseLevel:
        """The objective's."""
        return self.objective.levels(key, index)

    def network_params(self, params: Params, frozen: Any = None) -> Params:
        """The pipeline's parameters with the adapter in them."""
        return self.part(self._whole(params, frozen)["network"])

    def _whole(self, params: Params, frozen: Any) -> Params:
        terms = {name: own for name, own in params.items() if name != OWN}
        return {"network": self.adapter.merge(frozen[BASE], params[OWN]), **terms}
