"""Everything that training changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.training.optimizers import Optimizer


@flax.struct.dataclass
class TrainState:
    """The state of a run; its step is also its position in the data.

    Attributes:
      step: () int32, the number of steps done.
      ema: averages of ``params`` by name.
      extra: what the objective's own step keeps besides (a discriminator, its optimiser's state);
        None with the default step.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: dict[str, Any]
    extra: Any = None


def create(
    objective: Any,
    optimizer: Optimizer,
    emas: Iterable[str],
    key: Array,
    batch: Mapping[str, Array],
    params: Any = None,
) -> TrainState:
    """The state at step 0; every average starts at the initial parameters.

    Args:
      objective: with ``init(key, batch) -> params`` and maybe ``extra``, traceable.
      emas: names of the averages (or the dict of profiles).
      batch: an example of a batch; only shapes and dtypes matter.
      params: to begin with, instead of random ones.
    """
    if params is None:
        params = jax.jit(lambda key, batch: objective.init(key, batch))(key, batch)
    else:
        _check(params, jax.eval_shape(objective.init, key, batch))
    # Copies, because a donated buffer may stand in the state only once.
    averages = {name: jax.tree.map(jnp.copy, params) for name in emas}
    make_extra = getattr(objective, "extra", lambda key, batch: None)
    extra = jax.jit(lambda key, batch: make_extra(key, batch))(key, batch)
    opt_state = optimizer.tx.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, averages, extra)


def _check(params: Any, expected: Any) -> None:
    shapes, ours = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (params, expected)
    )
    for name in sorted({*shapes, *ours}):
        if shapes.get(name) != ours.get(name):
            raise ValueError(
                f"the parameters to begin with do not fit: {name} should have shape "
                f"{ours.get(name, 'none: it is not there')}, got {shapes.get(name, 'nothing')}"
            )
