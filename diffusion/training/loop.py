"""The training loop: data in, steps, and now and then a line, a picture, a checkpoint.

The host never waits for the step it has just started. It runs a few steps ahead of the devices
and reads a step's metrics when they have long been there; only checkpoints and hooks wait.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import ema as ema_lib
from diffusion import processes
from diffusion.runs import checkpoints as checkpoints_lib
from diffusion.runs import storage
from diffusion.runs.logging import Logger, Silent
from diffusion.training import diagnosis, flops
from diffusion.training import parallel as parallel_lib
from diffusion.training.meter import Meter
from diffusion.training.optimizers import Optimizer
from diffusion.training.state import TrainState, create
from diffusion.training.step import make_train_step

RUN_AHEAD = 8  # steps; bounds the batches held on the devices
RUN_AHEAD_TOGETHER = 2  # of several processes, which also learn so much later that one must stop

Hook = tuple[int, Callable[[TrainState, int], None]]
Validate = tuple[int, Callable[[TrainState, int], Mapping[str, float]]]


class NonFiniteError(ArithmeticError):
    """Loss or gradients were not finite, in too many steps."""


def fit(
    *,
    objective: Any,
    optimizer: Optimizer,
    emas: Mapping[str, ema_lib.Profile],
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    steps: int,
    workdir: str | os.PathLike,
    seed: int = 0,
    frozen: Any = None,
    initial_params: Callable[[Any, Callable[[], Any]], Any] | None = None,
    accumulate: int = 1,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    keep: int | None = 3,
    keep_best: int = 0,
    best: str = "loss",
    about: Mapping[str, Any] | None = None,
    started: Callable[[int], None] | None = None,
    hooks: Sequence[Hook] = (),
    validate: Validate | None = None,
    max_skipped: int = 10,
    peak: float | None = None,
    logger: Logger | None = None,
    devices: Sequence[jax.Device] | None = None,
    parallel: str = "pmap",
) -> TrainState:
    """Trains until ``steps`` steps are done, going on from the newest checkpoint in ``workdir``.

    On the CPU a run that was stopped and goes on has the same parameters to the bit, and the same
    lines in ``metrics.jsonl``, as one that never stopped: keys and data depend on the step alone.

    Args:
      emas: averages' profiles by name (``ema.constant``, ``ema.power_function``).
      batches: start_step -> iterator over the batches of start_step, start_step + 1, ...; leaves
        [B, ...], B a multiple of devices x accumulate.
      steps: updates in all, those of earlier runs included.
      seed: for the initial parameters and all training noise.
      frozen: parameters that the loss needs and that are not trained.
      initial_params: (shapes, random) -> what training begins with (a pretrained model), given the
        shapes of the parameters and a function that makes random ones; not called when a run goes
        on.
      accumulate, devices, parallel: see ``make_train_step``.
      log_every: steps per line of the log, which holds means over them.
      checkpoint_every: steps between checkpoints; the last step has one in any case.
      keep, keep_best, best, about: see ``Checkpoints``; a checkpoint's metrics are the last that
        were logged before it.
      started: called with the steps done before, once the state is there and fits.
      hooks: pairs (every, function(state, step)), called after every so many steps and after the
        last one (only then if ``every`` is 0). The state is not theirs to keep: the next step
        takes its memory.
      validate: such a pair whose function gives numbers by name, for the log.
      max_skipped: how many steps in a row may be skipped because loss or gradients were not finite.
      peak: FLOP/s that one device is capable of, for the log's share of it.

    Raises:
      NonFiniteError: too many steps in a row had a loss or gradient that was not finite; names the
        step, its noise levels and the examples.
      SaveError: the last checkpoint could not be saved. (Failures of earlier ones are reported, and
        training goes on.)
      KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, with a checkpoint saved; among
        several processes in all of them, whichever received it.
    """
    for name, value in {"log_every": log_every, "checkpoint_every": checkpoint_every}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    several = jax.process_count() > 1
    if jax.process_index() > 0:
        logger = Silent(workdir)
    logger = Logger(workdir) if logger is None else logger
    step_fn = make_train_step(
        objective, optimizer, emas, accumulate=accumulate, devices=devices, parallel=parallel
    )
    layout = parallel_lib.make(parallel, devices)
    init_key, run_key = jax.random.split(jax.random.key(seed))

    checkpoints = checkpoints_lib.Checkpoints(
        workdir, keep=keep, keep_best=keep_best, best=best, about=about, say=logger.text
    )
    try:
        start = checkpoints.latest() or 0
        data = batches(start)
        batch = _next(data, start)

        def example():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)

        def initial(key, params=None):
            return create(objective, optimizer, emas, key, example(), params)

        def init(key):
            return objective.init(key, example())

        if start:
            shapes = jax.eval_shape(initial, init_key)
            state, interval = checkpoints.restore(parallel_lib.template(layout, shapes))
        else:
            given = None
            if initial_params is not None:
                random = partial(parallel_lib.initialise, layout, init, init_key)
                given = initial_params(jax.eval_shape(init, init_key), random)
                given = parallel_lib.place(layout, given)
            state, interval = parallel_lib.initialise(layout, initial, init_key, given), {}
            del given
        if start >= steps:
            checkpoints.finish()
            logger.text(f"{workdir}: already done, {start} of {steps} steps")
            return state
        if started is not None:
            started(start)
        checkpoints.prune()  # a full disk may want room first
        logger.rewind(start)
        if start:
            logger.text(f"{workdir}: going on after step {start} of {steps}")
        frozen, key = parallel_lib.place(layout, (frozen, run_key))
        batch = parallel_lib.place_batch(layout, batch)
        places = layout.mesh.devices.tolist()
        size = len(next(iter(batch.values())))
        meter = Meter(
            logger,
            start,
            steps,
            log_every,
            size,
            interval,
            flops=flops.of(step_fn.trace(state, frozen, batch, key).jaxpr) / size,
            peak=peak and peak * len(places),
            devices=layout.mesh.local_devices,
        )
        pending = deque()
        ahead = RUN_AHEAD_TOGETHER if several else RUN_AHEAD
        agree, agreed = processes.Agreement(layout.mesh) if several else None, 0

        def drain(keep_pending: int = 0):
            nonlocal agreed
            while len(pending) > keep_pending:
                done, metrics, stop = pending.popleft()
                values, agreed = metrics.fetched(), max(agreed, int(stop))
                if values.pop("finite"):
                    meter.add(done, values)
                    continue
                said = _non_finite(done, values, meter.skip(done), max_skipped)
                logger.text(said)
                if meter.skipped_in_a_row > max_skipped:
                    again = next(batches(done - 1))
                    found = diagnosis.examine(
                        objective, state.params, frozen, state.ema, again, run_key, done - 1
                    )
                    raise NonFiniteError(_too_many(said, found, checkpoints.latest()))

        def report(state, step):
            meter.judged(step, validate[1](state, step))

        def read(step):
            return parallel_lib.place_batch(layout, _next(data, step))

        with deferred_signals() as stopped, meter, ThreadPoolExecutor(1) as reader:
            for step in range(start + 1, steps + 1):
                began = time.perf_counter()
                # The next batch goes to the devices while they work on this one. In a thread, since
                # a CPU's step occupies this one.
                coming = reader.submit(read, step) if step < steps else None
                state, metrics = step_fn(state, frozen, batch, key)
                wanted = 0 if agree is None else agree(stopped[0] if stopped else 0)
                pending.append((step, metrics, wanted))
                if coming:
                    asked = time.perf_counter()
                    batch = coming.result()
                    meter.waited(time.perf_counter() - asked)
                if step == start + 1:
                    drain()
                    meter.compiled(time.perf_counter() - began)
                drain(ahead)
                due = [f for every, f in hooks if step == steps or (every and step % every == 0)]
                judged = validate and (step == steps or (validate[0] and step % validate[0] == 0))
                if due or judged:
                    drain()
                    with meter.paused():
                        for hook in [report, *due] if judged else due:
                            try:
                                hook(state, step)
                            except Exception as error:  # a hook's fault must not cost training
                                if not storage.disk_full(error):
                                    checkpoints.save(state, meter.interval(), meter.latest)
                                    raise
                                why = storage.reason(error, workdir)
                                logger.text(f"step {step}: something was not written: {why}")
                # Read once, since a signal may come at any moment; among several processes at the
                # same place in each, so that all stop at the same step.
                stop = agreed if several else int(stopped[0]) if stopped else 0
                if step % checkpoint_every == 0 or step == steps or stop:
                    drain()
                    with meter.paused():
                        checkpoints.save(state, meter.interval(), meter.latest)
                if stop:
                    break
        if stop and step < steps:
            checkpoints.finish()
            logger.text(f"stopped by {signal.Signals(stop).name}; checkpoint saved at step {step}")
            if stop == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + stop)
        checkpoints.finish()
        return state
    except NonFiniteError:  # in all processes at once
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # of which the caller knows what to say
            processes.leave(error)
        raise
    finally:
        checkpoints.close()
        logger.close()


@contextmanager
def deferred_signals() -> Iterator[list[signal.Signals]]:
    """A list that a SIGINT or SIGTERM is put on; a second one acts at once."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can handle signals
        return
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.getsignal(name) for name in names}

    def restore():
        for name in names:
            signal.signal(name, before[name])

    def receive(number, _):
        received.append(signal.Signals(number))
        restore()
        # Not print, which must not be entered twice.
        os.write(2, b"\nstopping after this step with a checkpoint; once more to stop at once\n")

    for name in names:
        signal.signal(name, receive)
    try:
        yield received
    finally:
        restore()


def _next(data: Iterator[Mapping[str, np.ndarray]], step: int) -> Mapping[str, np.ndarray]:
    try:
        return next(data)
    except StopIteration:
        raise ValueError(f"the data ended after step {step}; batches must go on") from None


def _non_finite(step: int, values: Mapping[str, float], row: int, most: int) -> str:
    numbers = ", ".join(f"{name} {values[name]:.4g}" for name in ("loss", "gradient_norm"))
    return f"step {step} was not finite ({numbers}): skipped, {row} in a row (max_skipped={most})"


def _too_many(said: str, found: Sequence[str], last_saved: int | None) -> str:
    saved = "no checkpoint yet" if last_saved is None else f"last good checkpoint: {last_saved}"
    advice = (
        "Where the data are whole, a lower learning rate, longer warm-up or clipping (clip_norm) "
        "may help; as it is, the run would come to this step again."
    )
    return "\n  ".join([f"{said}; {saved}. There:", *found, advice])
