"""Memory per device of training large models, by layout and number of devices, by counting.

    python benchmarks/memory.py --json=runs/benchmarks/memory.json

Nothing is allocated. Parameters, gradients, Adam's moments and the average are counted from
``jax.eval_shape`` and each layout's rule for dividing leaves. Activations are what differentiation
keeps from the forward to the backward pass, in the precision they are computed in, from the
abstract evaluation of ``jax.vjp``, with XLA's attention. The models that --compile names are also
compiled, for four virtual CPU devices: the compiler's memory analysis must agree on the state, and
gives the temporary memory of a step. The CPU's compiler computes bfloat16 in float32 and fuses
less, so that this is more than a GPU needs.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
sys.path.insert(0, str(Path(__file__).parent.parent))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import report
from jax.sharding import NamedSharding, PartitionSpec

from diffusion import denoiser, ema, predictions, schedules
from diffusion.models import unet
from diffusion.models.dit import DiT, preset
from diffusion.objectives.denoising import Denoising
from diffusion.training import optimizers, parallel
from diffusion.training.state import TrainState, create
from diffusion.training.step import make_train_step

GIB = 2**30
CAPACITIES = (16, 24, 80, 141)  # GiB of a device
FULL = 0.9  # the share of it that can be used
PER_PARAMETER = 20  # bytes in float32: the parameter, its gradient, two moments, one average
EMAS = {"ema": ema.constant(0.9999)}


class Case(NamedTuple):
    """A model and the batch it is trained with.

    Attributes:
      objective: with the network.
      example: name -> (shape without the batch axis, dtype).
    """

    objective: Denoising
    example: Mapping[str, tuple[tuple[int, ...], Any]]

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of that number of examples."""
        return {
            name: jax.ShapeDtypeStruct((size, *shape), dtype)
            for name, (shape, dtype) in (self.example | {"index": ((), jnp.int32)}).items()
        }


def dit_xl2(remat: bool) -> Case:
    """DiT-XL/2 on the latents of 256 x 256 images, in bfloat16."""
    network = DiT(
        **preset("XL/2"),
        num_classes=1000,
        dtype=jnp.bfloat16,
        scan=True,
        remat=remat,
        attention_implementation="xla",
    )
    return Case(_objective(network), {"x": ((32, 32, 4), jnp.float32), "label": ((), jnp.int32)})


def sdxl(remat: bool) -> Case:
    """SDXL's U-Net on the latents of 1024 x 1024 images, in bfloat16, with embeddings of text."""
    example = {"x": (128, 128, 4), "context": (77, 2048), "pooled": (1280,), "time_ids": (6,)}
    return Case(
        _objective(unet.sdxl(dtype=jnp.bfloat16, remat=remat, attention_implementation="xla")),
        {name: (shape, jnp.float32) for name, shape in example.items()},
    )


MODELS = {"DiT-XL/2": dit_xl2, "SDXL": sdxl}


def _objective(network: nn.Module) -> Denoising:
    return Denoising(
        network=network,
        schedule=schedules.linear(),
        prediction=predictions.eps,
        c_noise=denoiser.thousand_t,
    )


ADAMW = optimizers.make("adamw", 1e-4)


def abstract(case: Case) -> TrainState:
    """The shapes of a state under AdamW with one average."""
    return jax.eval_shape(
        lambda key, batch: create(case.objective, ADAMW, EMAS, key, batch),
        jax.random.key(0),
        case.batch(1),
    )


def state_bytes(shapes: TrainState, devices: int = 1) -> dict[str, int]:
    """The memory that a step needs for any batch; gradients are divided as parameters are."""
    parts = {
        "parameters": parallel.bytes_per_device(shapes.params, devices),
        "gradients": parallel.bytes_per_device(shapes.params, devices),
        "moments": parallel.bytes_per_device(shapes.opt_state, devices),
        "average": parallel.bytes_per_device(shapes.ema, devices),
    }
    return parts | {"sum": sum(parts.values())}


def activation_bytes(case: Case, params: Any) -> int:
    """What the backward pass keeps of one example, besides the parameters themselves.

    Also what is kept once whatever the batch, such as parameters in the precision they are used in:
    so the difference of two batches counts.
    """

    def kept(count: int) -> int:
        def backward(params, batch, key):
            return jax.vjp(lambda p: case.objective.loss(p, None, batch, key)[0], params)[1]

        residuals = jax.eval_shape(backward, params, case.batch(count), jax.random.key(0))
        return sum(
            int(np.prod(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(residuals)
            if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
        )

    return kept(2) - kept(1)


def analyse(case: Case, layout: str, devices: int, per_device: int) -> Any:
    """The compiler's memory analysis of the step, per device."""
    chosen = jax.devices()[:devices]
    place = parallel.make(layout, chosen)
    step = make_train_step(case.objective, ADAMW, EMAS, parallel=layout, devices=chosen)
    examples = NamedSharding(place.mesh, PartitionSpec(parallel.AXIS))
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=examples)
        for name, x in case.batch(devices * per_device).items()
    }
    state = parallel.template(place, abstract(case))
    return step.lower(state, None, batch, jax.random.key(0)).compile().memory_analysis()


def compile_step(case: Case, layout: str, devices: int, per_device: int) -> dict[str, float]:
    """GiB per device: the state as counted and as compiled, and a step's temporary memory."""
    began = time.perf_counter()
    found = analyse(case, layout, devices, per_device)
    counted = parallel.bytes_per_device(abstract(case), devices if layout == "fsdp" else 1)
    return {
        "counted": (counted + parallel.bytes_per_device(case.batch(per_device))) / GIB,
        "arguments": found.argument_size_in_bytes / GIB,
        "temporary": found.temp_size_in_bytes / GIB,
        "seconds": time.perf_counter() - began,
    }


def largest(
    state: Sequence[Mapping[str, Any]], kept: Mapping[str, float], capacity: int, devices: int
) -> dict[str, float]:
    """The largest models that fit into devices of each size, of which ``FULL`` is used.

    Parameters, in 10^9, whose state and gradients leave a fifth of that to activations; and, for
    each model, how many examples' activations (with remat) fit beside state and gradients, at most:
    the block that is being recomputed comes on top.
    """
    usable = FULL * capacity
    found = {}
    for layout in parallel.NAMES:
        share = devices if layout == "fsdp" else 1
        found[f"{layout}: 10^9 parameters"] = 0.8 * usable * GIB * share / PER_PARAMETER / 1e9
    for row in state:
        if row["devices"] == devices:
            fitting = math.floor((usable - row["sum"]) / kept[row["model"]])
            found[f"{row['layout']}: examples of {row['model']}"] = max(0, fitting)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 4, 8, 64])
    parser.add_argument("--compile", nargs="*", default=["DiT-XL/2"], choices=[*MODELS])
    parser.add_argument("--per_device", type=int, default=8, help="examples, when compiled")
    parser.add_argument("--json", default="", help="where to write the results")
    arguments = parser.parse_args()
    rows = []
    for name, make in MODELS.items():
        shapes = abstract(make(remat=True))
        for layout in parallel.NAMES:
            for devices in arguments.devices:
                parts = state_bytes(shapes, devices if layout == "fsdp" else 1)
                parts = {part: count / GIB for part, count in parts.items()}
                rows.append({"model": name, "layout": layout, "devices": devices, **parts})
    columns = {"model": "model", "layout": "layout", "devices": "devices"}
    columns |= {"parameters": "parameters", "gradients": "gradients", "moments": "Adam's moments"}
    columns |= {"average": "average", "sum": "sum"}
    print("State and gradients, GiB per device:\n" + report.table(rows, columns), flush=True)

    kept = []
    for name, make in MODELS.items():
        for remat in (False, True):
            size = activation_bytes(make(remat), abstract(make(remat)).params)
            kept.append({"model": name, "remat": remat, "kept": size / GIB})
    columns = {"model": "model", "remat": "remat", "kept": "GiB per example"}
    print("\nActivations kept for the backward pass:\n" + report.table(kept, columns), flush=True)

    compiled = []
    for name in arguments.compile:
        for layout, remat in (("pmap", True), ("fsdp", True), ("fsdp", False)):
            compiled.append({"model": name, "layout": layout, "devices": 4, "remat": remat})
            compiled[-1] |= compile_step(MODELS[name](remat), layout, 4, arguments.per_device)
    columns = {"model": "model", "layout": "layout", "devices": "devices", "remat": "remat"}
    columns |= {"counted": "state, counted", "arguments": "state, compiled"}
    columns |= {"temporary": f"{arguments.per_device} examples, gradients", "seconds": "took [s]"}
    print("\nCompiled, GiB per device:\n" + report.table(compiled, columns), flush=True)

    each = {row["model"]: row["kept"] for row in kept if row["remat"]}
    jobs = [
        {"capacity": capacity, "devices": devices, **largest(rows, each, capacity, devices)}
        for capacity in CAPACITIES
        for devices in arguments.devices
    ]
    print("\nLargest jobs:\n" + report.table(jobs, {key: key for key in jobs[0]}))
    if arguments.json:
        about = report.environment("jax", "jaxlib", "flax", "optax")
        tables = {"state": rows, "activations": kept, "compiled": compiled, "largest": jobs}
        report.save(arguments.json, about, [{"table": k, "rows": v} for k, v in tables.items()])


if __name__ == "__main__":
    main()
