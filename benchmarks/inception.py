"""Inception-v3's forward pass, here and in PyTorch: a batch of eight pictures of 299 x 299.

    python benchmarks/inception.py

prints a table and writes runs/benchmarks/inception.json; some minutes on a CPU. Both sides have the
same random parameters and pictures, in float32, and take turns. PyTorch's batch norms are folded
into its convolutions, and it runs in inference mode: eager, with ``channels_last``, and compiled.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import report

COLUMNS = {
    "case": "pictures",
    "ours": "here [ms]",
    "eager": "eager",
    "channels_last": "channels_last",
    "compile": "compiled",
    "ratio": "best PyTorch / here",
    "difference": "features differ by",
}
SIDES = ("eager", "channels_last", "compile")


def main() -> None:
    parser = report.arguments(__doc__, "inception")
    parser.set_defaults(batch=8)
    arguments = parser.parse_args()
    from diffusion import compiler

    compiler.tune()
    with report.Report(arguments, COLUMNS, "torch") as output:
        output.add(measured(arguments.batch, 75 if arguments.small else 299, arguments))


def measured(batch: int, side: int, arguments: Any) -> dict[str, Any]:
    """Medians in milliseconds of all sides, which take turns, and how far features differ."""
    import jax
    import numpy as np
    import torch

    from diffusion.models.inception import Inception

    net = Inception()
    x = np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    device = "cuda" if report.has_gpu() else "cpu"
    forward, ours = jax.jit(net.apply), jax.device_put(x)
    calls = {"ours": lambda: forward({"params": params}, ours).features}
    pictures = torch.from_numpy(x).permute(0, 3, 1, 2).to(device)
    theirs = theirs_of(params, device)
    for name in SIDES:
        if name not in arguments.skip.split(";"):
            calls[name] = called(name, theirs, pictures)
    outputs, found = {}, {name: [] for name in calls}
    with torch.inference_mode():
        for name, call in calls.items():
            call(), call()  # compiles
            outputs[name] = np.asarray(finished(call()))
        for _ in range(arguments.repetitions):
            for name, call in calls.items():
                began = time.perf_counter()
                finished(call())
                found[name].append(1e3 * (time.perf_counter() - began))
    medians = {name: statistics.median(times) for name, times in found.items()}
    best = min(time for name, time in medians.items() if name != "ours")
    scale = np.abs(outputs["ours"]).max()
    apart = max(float(np.abs(out - outputs["ours"]).max() / scale) for out in outputs.values())
    about = {"case": f"{batch} of {side} x {side}", "ratio": best / medians["ours"]}
    return about | medians | {"difference": apart, "runs": found}


def finished(output: Any) -> Any:
    """The output, on the host."""
    import numpy as np

    return np.asarray(output.cpu() if hasattr(output, "cpu") else output)


def called(name: str, net: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    """A call of PyTorch's network as ``name`` says."""
    import torch

    if name == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if name == "eager":
        x = x.contiguous()
    if name == "compile":
        net = torch.compile(net)
    return lambda: net(x)


def theirs_of(params: Mapping[str, Any], device: str) -> Callable[[Any], Any]:
    """PyTorch's network with our parameters: pictures [B, 3, H, W] -> features [B, 2048]."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from diffusion.models.inception import EPS, STEM, Layer, blocks

    def unit(holder: Mapping[str, Any], layer: Layer) -> Callable[[Any], Any]:
        kernel, norm = np.asarray(holder["conv"]["kernel"]), holder["bn"]
        factor = np.asarray(norm["scale"]) / np.sqrt(np.asarray(norm["running_var"]) + EPS)
        bias = torch.tensor(np.asarray(norm["bias"]) - np.asarray(norm["running_mean"]) * factor)
        folded = torch.tensor((kernel * factor).transpose(3, 2, 0, 1)).contiguous()
        padding = (0, 0) if layer.padding == "VALID" else [n // 2 for n in kernel.shape[:2]]
        folded, bias = folded.to(device), bias.to(device)
        return lambda x: F.relu(F.conv2d(x, folded, bias, layer.stride, padding), inplace=True)

    def pooled(x: Any, kind: str) -> Any:
        if kind == "mean":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 1, 1) if kind == "max" else F.max_pool2d(x, 3, 2)

    stem = [layer and unit(params[layer.name], layer) for layer in STEM]
    parts = []
    for name, (branches, pool, _) in blocks("max").items():
        chains = [
            [
                [unit(params[name][one.name], one) for one in ([step], step)[type(step) is tuple]]
                for step in chain
            ]
            for chain in branches
        ]
        last = pool != "stride" and unit(params[name]["branch_pool"], Layer("branch_pool", 0))
        parts.append((chains, pool, last))

    def run(x: Any) -> Any:
        for layer in stem:
            x = layer(x) if layer else F.max_pool2d(x, 3, 2)
        for chains, pool, last in parts:
            found = []
            for chain in chains:
                h = x
                for step in chain:
                    h = step[0](h) if len(step) == 1 else torch.cat([one(h) for one in step], 1)
                found.append(h)
            h = pooled(x, pool)
            x = torch.cat([*found, last(h) if last else h], 1)
        return x.mean((2, 3))

    return run


if __name__ == "__main__":
    main()
