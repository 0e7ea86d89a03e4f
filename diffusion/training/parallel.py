"""How a training step lies over the devices: two layouts behind one interface.

``pmap`` (the default) is data parallelism. The state lies whole on every device; the batch is cut
along its first axis, one piece per device; ``pmean`` averages the gradients over the devices, and
each makes the same update.

``fsdp`` (fully sharded data parallelism; ZeRO-3 of Rajbhandari et al., 2020) is for models whose
state one device cannot hold. Parameters, optimiser state and averages are cut leaf by leaf along
an axis that the number of devices divides. The step is one program over the whole batch under
``jax.jit``; XLA gathers a layer's parameters where they are used and scatters their gradients.

Both compute the same update from the same noise, which depends on an example's place in the global
batch alone. (A dropout mask inside the network is drawn per piece, so it differs, and so does what
an objective makes of the mean of a piece: the adaptive weight of an adversarial loss.) Both work
over the devices of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.levels import Array
from diffusion.sharding import examples_stay

AXIS = "data"
NAMES = ("pmap", "fsdp")
SMALL = 2**14
"""Leaves of fewer elements lie whole on every device under fsdp: gathering them costs more time
than they cost memory."""

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for what runs once."""

Batch = Mapping[str, Array]
Body = Callable[[Any, Any, Batch, Array], tuple[Any, Any]]  # (state, frozen, batch, key)


class Layout(NamedTuple):
    """What differs between the layouts.

    Attributes:
      name: of the layout.
      mesh: one axis of all devices.
      shardings: pytree of arrays or shapes -> where each leaf lies.
      compile: (state, frozen, batch, key) -> (state, metrics), jitted; the state is donated.
      mean: within the body, the mean of a pytree over the pieces that are computed apart.
      keep: within the body, gradients laid out as their parameters are.
      split: within the body, (batch, n) -> the batch's leaves as n pieces [n, B / n, ...].
      tracing: context in which the body calls networks on examples; takes their number.
    """

    name: str
    mesh: Mesh
    shardings: Callable[[Any], Any]
    compile: Callable[[Body], Callable]
    mean: Callable[[Any], Any]
    keep: Callable[[Any], Any]
    split: Callable[[Batch, int], dict[str, Array]]
    tracing: Callable[[int], AbstractContextManager]


def make(name: str = "pmap", devices: Sequence[jax.Device] | None = None) -> Layout:
    """The layout of that name over these devices (default: all, of all processes)."""
    if name not in NAMES:
        raise ValueError(f"unknown parallel={name!r}; choose one of {', '.join(NAMES)}")
    # A process's devices side by side, so that its share of the batch is one slice.
    devices = sorted(jax.devices(), key=lambda d: d.process_index) if devices is None else devices
    mesh = Mesh(np.asarray(devices), (AXIS,))
    return (pmap if name == "pmap" else fsdp)(mesh)


def pmap(mesh: Mesh) -> Layout:
    """Data parallelism: the state whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())

    def compile(body: Body) -> Callable:
        if jax.process_count() == 1:
            axes = {"in_axes": (None, None, 0, None), "out_axes": None}
            mapped = jax.pmap(body, axis_name=AXIS, devices=mesh.devices.tolist(), **axes)

            # jit around it: the same program without pmap's own dispatch in Python, 0.1 ms a step.
            def step(state, frozen, batch, key):
                return mapped(state, frozen, split(batch, mesh.size), key)
        else:
            # What pmap does itself, without its conversion of each leaf from an array of this
            # process to one of all processes and back, at each step.
            over, rest = PartitionSpec(AXIS), PartitionSpec()
            step = jax.shard_map(
                body, mesh=mesh, in_specs=(rest, rest, over, rest), out_specs=rest, check_vma=False
            )
        return jax.jit(step, donate_argnums=0)

    return Layout(
        name="pmap",
        mesh=mesh,
        shardings=lambda tree: jax.tree.map(lambda _: whole, tree),
        compile=compile,
        mean=lambda tree: lax.pmean(tree, AXIS) if mesh.size > 1 else tree,
        keep=lambda tree: tree,
        split=split,
        tracing=lambda size: nullcontext(),
    )


def fsdp(mesh: Mesh) -> Layout:
    """Fully sharded: each leaf of the state cut over the devices (see ``spec``)."""
    examples = NamedSharding(mesh, PartitionSpec(AXIS))

    def shardings(tree: Any) -> Any:
        return jax.tree.map(lambda x: NamedSharding(mesh, spec(x.shape, mesh.size)), tree)

    def keep(tree: Any) -> Any:
        return jax.tree.map(lax.with_sharding_constraint, tree, shardings(tree))

    def compile(body: Body) -> Callable:
        def step(*args):
            return keep(body(*args))

        return jax.jit(step, donate_argnums=0)

    def pieces(batch: Batch, count: int) -> dict[str, Array]:
        """Each device's share is cut, so that no example leaves its device."""
        shares = split(batch, mesh.size * count)
        within = NamedSharding(mesh, PartitionSpec(None, AXIS))

        def turn(x: Array) -> Array:
            x = x.reshape(mesh.size, count, *x.shape[1:]).swapaxes(0, 1)
            return lax.with_sharding_constraint(
                x.reshape(count, mesh.size * x.shape[2], *x.shape[3:]), within
            )

        return {name: turn(x) for name, x in shares.items()}

    return Layout(
        name="fsdp",
        mesh=mesh,
        shardings=shardings,
        compile=compile,
        mean=lambda tree: tree,  # the loss is the mean over the whole batch already
        keep=keep,
        split=pieces,
        tracing=lambda size: examples_stay(examples, size),
    )


def spec(shape: Sequence[int], devices: int) -> PartitionSpec:
    """Along which axis fsdp cuts an array: the longest that ``devices`` divides, the last of these.

    None where there is no such axis, or fewer than ``SMALL`` elements.
    """
    fitting = [(size, axis) for axis, size in enumerate(shape) if size % devices == 0]
    if math.prod(shape) < SMALL or not fitting:
        return PartitionSpec()
    _, axis = max(fitting)
    return PartitionSpec(*[None] * axis, AXIS)


def bytes_per_device(tree: Any, devices: int = 1) -> int:
    """What a pytree of arrays or shapes takes on one of so many devices under fsdp."""
    return sum(
        math.prod(x.shape) * x.dtype.itemsize // (devices if any(spec(x.shape, devices)) else 1)
        for x in jax.tree.leaves(tree)
    )


def split(batch: Batch, pieces: int) -> dict[str, Array]:
    """Leaves [B, ...] -> [pieces, B / pieces, ...]."""
    check_divisible(batch, pieces)
    return {name: x.reshape(pieces, len(x) // pieces, *x.shape[1:]) for name, x in batch.items()}


def check_divisible(batch: Batch, pieces: int) -> None:
    """Raises ValueError where a leaf's first axis is not a multiple of ``pieces``."""
    for name, leaf in batch.items():
        size = len(leaf)
        if size % pieces:
            raise ValueError(
                f"batch[{name!r}] has {size} examples, which {pieces} pieces (devices x"
                f" accumulation) do not divide; the nearest batch sizes that work: "
                f"{nearest(size, pieces)}"
            )


def nearest(size: int, pieces: int) -> str:
    """The multiples of ``pieces`` around ``size``, in words."""
    return ", ".join(str(n) for n in (size // pieces * pieces, -(-size // pieces) * pieces) if n)


def initialise(layout: Layout, make: Callable[..., Any], *args: Any) -> Any:
    """``make(*args)``, computed where it is to lie: no device ever holds the whole of it."""
    shardings = layout.shardings(jax.eval_shape(make, *args))
    # It runs once: compiling it well would take longer than running it.
    return jax.jit(make, out_shardings=shardings, compiler_options=QUICKLY)(*args)


def place(layout: Layout, tree: Any) -> Any:
    """A pytree that every process has whole, laid over the devices, once for all steps."""
    shardings = layout.shardings(tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x)
            return jax.random.wrap_key_data(put(data, sharding), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def place_batch(layout: Layout, batch: Batch) -> dict[str, jax.Array]:
    """This process's share of a batch -> the global batch, cut over the devices."""
    check_divisible(batch, layout.mesh.local_mesh.size)
    sharding = NamedSharding(layout.mesh, PartitionSpec(AXIS))
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}


def template(layout: Layout, shapes: Any) -> Any:
    """Shapes with the layout's shardings: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        layout.shardings(shapes),
    )
