"""Attention as the networks call it, against float32 and against plain XLA: errors and times.

    python benchmarks/attention.py

prints a table and writes runs/benchmarks/attention.json. "default" is ``attend``: on an NVIDIA GPU
cuDNN's kernel, with 77 keys of text padded to 80; on a CPU products by head, large maps in blocks.
"not filled up" selects cuDNN by name, without padding. Inputs are bfloat16, on a CPU float32.
Errors are ||a - b|| / ||b|| of the output and of the gradients of its sum of squares, b in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import report

SHAPES = {  # B, L, Lk, H, D
    "DiT-XL/2": (32, 256, 256, 16, 72),
    "DDPM, 16 × 16": (64, 256, 256, 1, 256),
    "SD 1.5, 64 × 64": (2, 4096, 4096, 8, 40),
    "SD 1.5, text": (2, 4096, 77, 8, 40),
    "SDXL, 64 × 64": (2, 4096, 4096, 10, 64),
    "SDXL, text": (2, 1024, 77, 20, 64),
}
ON_CPU = {
    "digits' U-Net, 4 × 4": (64, 16, 16, 4, 16),
    "DDPM, 16 × 16": (8, 256, 256, 1, 256),
    "DiT-S/2": (4, 256, 256, 6, 64),
    "SD 1.5, 64 × 64": (1, 4096, 4096, 8, 40),
    "SD 1.5, text": (1, 4096, 77, 8, 40),
}
SMALL = {"self": (2, 64, 64, 2, 8), "text": (2, 64, 77, 2, 8)}
COLUMNS = {
    "case": "map",
    "what": "",
    "xla": "XLA [ms]",
    "default": "default",
    "not filled up": "not filled up",
    "xla_error": "XLA's error",
    "default_error": "default's error",
    "failed": "failed",
}


def main() -> None:
    arguments = report.arguments(__doc__, "attention").parse_args()
    import jax
    import jax.numpy as jnp

    from diffusion import compiler
    from diffusion.models.kernels.attention import attend

    print(compiler.tune())

    with report.Report(arguments, COLUMNS) as output:
        shapes = SMALL if arguments.small else SHAPES if report.has_gpu() else ON_CPU
        for name, (b, length, keys, heads, width) in shapes.items():
            random = [
                jax.random.normal(jax.random.key(i), (b, n, heads, width))
                for i, n in enumerate((length, keys, keys))
            ]
            dtype = jnp.bfloat16 if report.has_gpu() else jnp.float32
            given = [a.astype(dtype) for a in random]
            exact = [a.astype(jnp.float32) for a in given]
            kinds = {"xla": partial(attend, implementation="xla"), "default": attend}
            if report.has_gpu() and keys % 8:
                kinds["not filled up"] = partial(attend, implementation="cudnn")
            for what, of in (("forward", jax.jit), ("gradient", gradient)):
                found = measured(of, kinds, given, exact, arguments)
                output.add({"case": name, "what": what} | found)


def gradient(function: Callable) -> Callable:
    """Of the sum of squares, by q, k and v."""
    import jax
    import jax.numpy as jnp

    def total(q: Any, k: Any, v: Any) -> Any:
        return jnp.sum(function(q, k, v).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(total, (0, 1, 2)))


def measured(
    of: Callable, kinds: dict[str, Callable], given: list, exact: list, arguments: Any
) -> dict[str, Any]:
    """Milliseconds and errors of each kind; what failed, and why."""
    import jax
    import numpy as np

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.asarray(a, np.float32).ravel() for a in jax.tree.leaves(tree)])

    found: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        true = flat(of(kinds["xla"])(*exact))
    calls = {}
    for kind, function in kinds.items():
        try:
            call = of(function)
            error = np.linalg.norm(flat(call(*given)) - true) / np.linalg.norm(true)
            found[f"{kind}_error"] = float(error)
            calls[kind] = partial(call, *given)
        except Exception as problem:
            found["failed"] = f"{kind}: {str(problem).strip().splitlines()[:1]}"
    return found | report.in_turns(calls, arguments.repetitions)


if __name__ == "__main__":
    main()
