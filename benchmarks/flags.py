"""XLA's options against its defaults, on forward passes and a training step.

    python benchmarks/flags.py

prints a table and writes runs/benchmarks/flags.json. Every option has a process of its own, which
takes turns with a process under the defaults; the table gives medians of the ratios.
"""

from __future__ import annotations

import statistics

import report
import worker

FLAGS = (
    "--xla_gpu_experimental_enable_conv_fusion=true",
    "--xla_gpu_force_conv_nhwc=true",
    "--xla_gpu_cudnn_gemm_fusion_level=2",
    "--xla_gpu_enable_cudnn_layer_norm=true",
    "--xla_gpu_exhaustive_tiling_search=true",
    "--xla_gpu_enable_dynamic_slice_fusion=true",
)
COLUMNS = {
    "case": "network",
    "what": "",
    "flags": "option",
    "base": "default [ms]",
    "with": "with it [ms]",
    "gain": "gain [%]",
    "failed": "failed",
}


def main() -> None:
    parser = report.arguments(__doc__, "flags")
    parser.add_argument("--flags", default=";".join(FLAGS), help="options, with ; between them")
    arguments = parser.parse_args()
    arguments.only = arguments.only or ("tiny U-Net" if arguments.small else "SD 1.5;CIFAR")
    with report.Report(arguments, COLUMNS) as output:
        for case, request in worker.requests("networks", arguments):
            if case.forward and not case.train and case.batch not in (1, 4):
                continue
            command = "step" if case.train else "forward"
            with worker.Worker("jax", request) as base:
                for flags in arguments.flags.split(";"):
                    if output.late(flags):
                        continue
                    row = {"case": f"{case.name}, batch {case.batch}", "what": command}
                    output.add(row | compared(base, request, command, flags, arguments.repetitions))


def compared(
    base: worker.Worker, request: dict, command: str, flags: str, repetitions: int
) -> dict[str, object]:
    """Medians in milliseconds, and the gain."""
    try:
        with worker.Worker("jax", request, {"XLA_FLAGS": flags}) as other:
            both = (base, other)
            for process in both:
                process.ask("run", command, times=3)
            calls = max(1, round(0.3 / base.ask("run", command, times=1)))
            pairs = [
                [process.ask("run", command, times=calls) / calls for process in both]
                for _ in range(repetitions)
            ]
    except (worker.Failed, BrokenPipeError) as failure:
        return {"flags": flags, "failed": str(failure)[:200]}
    plain, changed = (statistics.median(column) for column in zip(*pairs))
    gain = 100 * (statistics.median(a / b for a, b in pairs) - 1)
    return {"flags": flags, "base": 1e3 * plain, "with": 1e3 * changed, "gain": gain, "all": pairs}


if __name__ == "__main__":
    main()
