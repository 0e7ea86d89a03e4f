"""3 x 3 convolutions and their gradients: XLA's own, and by Winograd's tiles.

    python benchmarks/convolutions.py

prints a table and writes runs/benchmarks/convolutions.json; a minute on a CPU. "y" is the
convolution, "x" and "kernel" are its gradients; "used" is the form that ``three_by_three`` takes
for values alone and, after the slash, where derivatives are taken.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import report

SHAPES = (  # images, pixels per side, channels in, channels out
    *((64, 8, 32, 32), (64, 8, 64, 32), (64, 8, 96, 32), (64, 8, 64, 64)),
    *((64, 4, 64, 64), (64, 4, 96, 64), (64, 4, 128, 64)),
    *((8, 32, 128, 128), (8, 16, 256, 256), (8, 16, 512, 256), (8, 8, 256, 256), (8, 4, 256, 256)),
    *((1, 64, 320, 320), (1, 32, 640, 640), (1, 16, 1280, 1280), (1, 8, 1280, 1280)),
    *((1, 64, 512, 512), (1, 256, 128, 128)),
)
SMALL = ((2, 8, 16, 8),)
COLUMNS = {
    "case": "images, pixels, channels",
    "y": "y [ms]",
    "y, tiles": "by tiles",
    "x": "x [ms]",
    "x, tiles": "by tiles",
    "kernel": "kernel [ms]",
    "kernel, tiles": "by tiles",
    "used": "used",
    "error": "errors up to",
}


def main() -> None:
    arguments = report.arguments(__doc__, "convolutions").parse_args()
    from diffusion import compiler

    print(compiler.tune())
    with report.Report(arguments, COLUMNS) as output:
        for shape in SMALL if arguments.small else SHAPES:
            output.add(measured(*shape, arguments))


def measured(b: int, size: int, c: int, o: int, arguments: Any) -> dict[str, Any]:
    """Milliseconds of both forms of all three, in turns; and whether they agree."""
    import jax
    import numpy as np

    from diffusion.models.kernels import winograd
    from diffusion.models.kernels.convolution import tiles_pay

    shapes = {"x": (b, size, size, c), "kernel": (3, 3, c, o), "y": (b, size, size, o)}
    arrays = {k: jax.random.normal(jax.random.key(i), s) for i, (k, s) in enumerate(shapes.items())}
    operands = {"y": ("x", "kernel"), "x": ("y", "kernel"), "kernel": ("x", "y")}
    calls, error = {}, 0.0
    for of, names in operands.items():
        given = [arrays[name] for name in names]
        directly = jax.jit(lambda a, b, of=of: winograd.directly(a, b, of))
        tiles = jax.jit(lambda a, b, of=of: winograd.compute(a, b, of, differentiated=False))
        expected, out = (np.asarray(function(*given)) for function in (directly, tiles))
        error = max(error, float(np.abs(out - expected).max() / np.abs(expected).max()))
        calls[of], calls[f"{of}, tiles"] = partial(directly, *given), partial(tiles, *given)
    pays = tiles_pay(shapes["x"], o)
    used = [pays, pays and winograd.derivatives_pay(c, o)]
    return {
        "case": f"{b}, {size} × {size}, {c} → {o}",
        "used": " / ".join("tiles" if tiles else "plain" for tiles in used),
        "error": error,
        **report.in_turns(calls, arguments.repetitions),
    }


if __name__ == "__main__":
    main()
