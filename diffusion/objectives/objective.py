"""The contract of objectives: four functions say everything that training needs to know.

An objective is anything with these members; nothing has to be inherited from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from diffusion.levels import Array

Params = Any
Batch = Mapping[str, Array]
Metrics = dict[str, Any]
Measured = tuple[Array, Metrics]  # the loss, of a batch () or of each example [B], and metrics
Loss = Callable[[Params, Batch], Measured]


class Weighted(NamedTuple):
    """A metric of some of the examples: a weighted mean over a piece of a batch, as its halves.

    Both are averaged over devices, pieces and steps, and divided only then, so that pieces count by
    the weight that they hold.

    Attributes:
      total: () mean of weight times value; [K] of K kinds of examples, which are logged with 1 to K
        after their name.
      weight: () or [K] mean of the weight.
    """

    total: Array
    weight: Array


class Context(NamedTuple):
    """What a loss depends on besides the parameters, the batch and the key.

    It holds a Python flag, so that compiled functions make it inside, from its traced parts.

    Attributes:
      frozen: parameters that are not trained (a teacher, an encoder), by name; or None.
      ema: the averages of the parameters by name, through which no gradient flows; None where
        there are none, and then the parameters themselves stand for their average.
      step: () the number of steps done before.
      train: whether this is training; False for the loss on held-out data.
    """

    frozen: Any = None
    ema: Mapping[str, Params] | None = None
    step: Array | int = 0
    train: bool = True


class Tools(Protocol):
    """The parts of a step (``training.step``), which make it exact and guarded in every layout."""

    def context(self, state: Any, frozen: Any) -> Context:
        """The context of a training loss."""

    def gradients(self, loss: Loss, params: Params, batch: Batch) -> tuple[Params, Metrics]:
        """The gradient and the metrics of ``loss``, means over pieces and devices."""

    def updated(self, state: Any, grads: Params) -> Any:
        """The state after one update of its parameters, with optimiser, averages and count."""

    def finish(self, old: Any, new: Any, grads: Any, metrics: Metrics) -> tuple[Any, Mapping]:
        """The new state, or the old one where loss or gradients are not finite; and metrics."""


class Objective(Protocol):
    """What training minimises, and what it yields.

    Two members may be absent: ``extra(key, batch)`` gives what an own step keeps in
    ``TrainState.extra``, such as a discriminator with its optimiser's state; ``levels(key, index)``
    gives the noise levels of a step's examples, for messages about a step that failed.

    Attributes:
      step: None for one gradient step on ``loss``, or an own step
        ``(tools, state, frozen, batch, key) -> (state, metrics)`` made of ``Tools``; ``key`` is the
        step's own.
    """

    step: Callable | None = None

    def init(self, key: Array, batch: Batch) -> Params:
        """The initial parameters; of the batch only shapes and dtypes matter. Traceable."""

    def loss(self, params: Params, context: Context, batch: Batch, key: Array) -> Measured:
        """The mean loss over a batch, which may be a piece of the whole one, and metrics.

        What is drawn for an example depends on ``key`` and on ``batch["index"]``, its place in the
        global batch (by default its place in this one), not on the device it lies on.
        """

    def network_params(self, params: Params, frozen: Any = None) -> Params:
        """{"network": ...}: what samplers need, without the heads that only training has."""


def network_alone(params: Params, frozen: Any = None) -> Params:
    """{"network": ...}: the ``network_params`` of an objective that trains the network as it is."""
    return {"network": params["network"]}
