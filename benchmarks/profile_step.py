"""Where the time of a network's step goes on this device: its longest operations.

    python benchmarks/profile_step.py --only=DiT --does=train

prints a table per case of ``networks.py`` and writes runs/benchmarks/profile_step.json. A few calls
are traced; a training step is ``make_train_step``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import report
import worker

COLUMNS = {
    "case": "network",
    "what": "",
    "milliseconds_per_step": "ms",
    "share": "share",
    "calls_per_step": "calls",
    "name": "operation",
    "origin": "of",
}
CALLS = 3


def main() -> None:
    parser = report.arguments(__doc__, "profile_step")
    parser.add_argument("--does", default="forward", help="forward or train")
    arguments = parser.parse_args()
    import jax
    import ours

    from diffusion import compiler
    from diffusion.modes.profile import operations, origins

    print(compiler.tune())

    with report.Report(arguments, COLUMNS) as output:
        for case, request in worker.requests("networks", arguments):
            if not getattr(case, arguments.does):
                continue
            side = ours.Side(worker.case_of(request))
            command = "step" if arguments.does == "train" else "forward"
            run = side.make(command)
            for _ in range(3):
                jax.block_until_ready(run())
            with tempfile.TemporaryDirectory() as folder:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                with jax.profiler.trace(folder, profiler_options=options):
                    for _ in range(CALLS):
                        jax.block_until_ready(run())
                trace = max(Path(folder).glob("plugins/profile/*/*.xplane.pb"))
                found = operations(trace, CALLS, origins(side.texts[command]()))
            for row in found:
                output.add({"case": case.name, "what": arguments.does} | row)


if __name__ == "__main__":
    main()
