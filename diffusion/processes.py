"""Several processes that train one model together, on one machine or many.

Each runs the same program on its own devices and its own share of every batch. JAX's coordination
service, in process 0, connects them and notices when one has ended.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.levels import Array

# Seconds for which processes wait for each other at the start, for a sign of life of another, and
# for the others at the end, where process 0 may still evaluate.
CONNECT_TIMEOUT, HEARTBEAT_TIMEOUT, SHUTDOWN_TIMEOUT = 300, 100, 7 * 24 * 3600


def detected(environment: Mapping[str, str] = os.environ) -> str:
    """The cluster that started several processes of this program (SLURM's ``srun``, Open MPI's
    ``mpirun`` or an indexed job of Kubernetes), "" if there is none."""

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdigit() else 0

    if count("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return "slurm"
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "ompi"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "k8s"
    return ""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = CONNECT_TIMEOUT,
    heartbeat: int = HEARTBEAT_TIMEOUT,
) -> int:
    """Joins the other processes, if there are any; must come before JAX's devices are used.

    Args:
      coordinator: HOST:PORT at which process 0 can be reached from all others.
      process_id: number of this process, from 0. Without the first three a cluster is looked for.
      timeout: seconds to wait for the others; then the program ends with a message.
      heartbeat: seconds without a sign of life after which a process counts as dead.

    Returns:
      The number of processes.
    """
    given = "--coordinator", "--num_processes", "--process_id"
    values = coordinator, num_processes, process_id
    missing = [name for name, value in zip(given, values) if value is None]
    cluster = ""
    if len(missing) == 3:
        cluster = detected()
        if not cluster:
            return 1
        where = f"the processes that {cluster} started"
    elif missing:
        raise ValueError(
            f"{' and '.join(missing)} missing: give all of {', '.join(given)}, or none of them on "
            "SLURM, Open MPI and Kubernetes"
        )
    else:
        _check(coordinator, num_processes, process_id)
        if num_processes == 1:
            return 1
        where = f"all {num_processes} processes at {coordinator}"

    def give_up():
        who = "this process" if process_id is None else f"process {process_id}"
        report(
            f"error: {who} waited {timeout} s for {where}, and they did not all connect. Is each "
            "running, with the same --coordinator and --num_processes and its own --process_id? "
            "Can process 0's host and port be reached from all of them?"
        )
        os._exit(1)

    timer = threading.Timer(timeout, give_up)  # JAX itself would abort with C++'s stack trace
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=cluster or "deactivate",
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{cluster} started several processes, and JAX cannot find out how to connect them "
            f"({error}); give {', '.join(given)}"
        ) from error
    finally:
        timer.cancel()
    return jax.process_count()


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator must be HOST:PORT, such as 10.0.0.1:12345, got {coordinator!r}"
        )
    if num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must lie in 0..{num_processes - 1}, below --num_processes, "
            f"got {process_id}"
        )


class Agreement:
    """A flag that every process may raise and all read at the same step.

    ``mesh`` has one axis, of all processes' devices. Reading the flag waits for the others.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
        whole = NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(lambda flags: flags.max(), out_shardings=whole)
        self._local = mesh.local_mesh.size

    def __call__(self, flag: int) -> Array:
        """The largest of all processes' numbers, () int32."""
        flags = np.full(self._local, flag, np.int32)
        return self._any(jax.make_array_from_process_local_data(self._sharding, flags))


def local(tree: Any) -> Any:
    """The arrays as process 0 can use them alone; all processes must call it.

    Arrays that are sharded over the devices of several processes are gathered one by one, to the
    host of process 0; meanwhile each needs its whole size on every device. Others are not copied.
    """

    def take(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if x.is_fully_replicated:
            mesh = x.sharding.mesh.local_mesh
            shards = [shard.data for shard in x.addressable_shards]
            sharding = NamedSharding(mesh, PartitionSpec())
            return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)
        whole = multihost_utils.process_allgather(x, tiled=True)
        return whole if jax.process_index() == 0 else None

    return jax.tree.map(take, tree)


def leave(error: BaseException) -> None:
    """Ends this process at once, if there are others: they would wait for it for ever."""
    if not jax.distributed.is_initialized():
        return
    if isinstance(error, jax.errors.JaxRuntimeError):
        report(
            f"error in process {jax.process_index()}: {error}\n"
            "If another process ended, its own message has the reason: this one cannot go on "
            "alone. The same commands continue from the last checkpoint."
        )
    elif isinstance(error, ValueError | OSError | ArithmeticError | MemoryError):
        report(f"error in process {jax.process_index()}: {error}")
    else:
        report("".join(traceback.format_exception(error)))
    if jax.process_index() == 0:
        time.sleep(2)  # the others end at once with process 0: time for their own messages
    os._exit(1)


def report(message: str) -> None:
    """Prints a line on stderr, at once."""
    print(message, file=sys.stderr, flush=True)
