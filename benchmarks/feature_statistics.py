"""Statistics of features: times and peak memory, here and by torch-fidelity's and prdc's functions.

    python benchmarks/feature_statistics.py

prints a table and writes runs/benchmarks/feature_statistics.json. Moments and Fréchet distance,
precision and recall, density and coverage of 10,000 samples and as many real examples, each of
2,048 random features. Every measurement is one call in a fresh process; its peak is of resident
memory, less what the process had with the libraries and the features. The figures of both sides
are compared.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import report

COUNT, SIZE = 10_000, 2048
SMALL = (500, 32)
COLUMNS = {
    "case": "",
    "what": "by",
    "seconds": "[s]",
    "gib": "peak [GiB]",
    "ratio": "time / here",
    "difference": "relative difference",
    "failed": "failed",
}
CASES = {
    "moments, Fréchet": ("here", "NumPy and torch-fidelity"),
    "precision, recall": ("here", "torch-fidelity, in parts", "torch-fidelity, whole"),
    "density, coverage": ("here", "prdc"),
}


def main() -> None:
    parser = report.arguments(__doc__, "feature_statistics")
    parser.add_argument("--one", default="", help="measures this case;side alone, for main")
    arguments = parser.parse_args()
    count, size = SMALL if arguments.small else (COUNT, SIZE)
    if arguments.one:
        print(json.dumps(measured(*arguments.one.split(";"), count, size)))
        return
    with report.Report(arguments, COLUMNS, "torch", "torch-fidelity", "prdc", "scipy") as output:
        for case, sides in CASES.items():
            if not any(part in case for part in arguments.only.split(";")):
                continue
            ours: dict = {}
            for side in sides:
                if side in arguments.skip.split(";") or output.late(f"{case}, {side}"):
                    continue
                found = in_a_process(case, side, arguments.small)
                figures = found.pop("figures", None)
                if side == "here" and figures:
                    ours = {"seconds": found["seconds"], "figures": figures}
                elif ours and figures:
                    found["ratio"] = found["seconds"] / ours["seconds"]
                    pairs = zip(figures, ours["figures"], strict=True)
                    found["difference"] = max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)
                output.add({"case": case, "what": side} | found)


def in_a_process(case: str, side: str, small: bool) -> dict:
    """What ``measured`` finds in a process of its own."""
    command = [sys.executable, __file__, f"--one={case};{side}", *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def measured(case: str, side: str, count: int, size: int) -> dict:
    """Seconds, peak memory and figures of one call."""
    import numpy as np

    rng = np.random.default_rng(0)
    # As of a network, a few directions vary most; samples vary a little less than real examples.
    scale = np.linspace(1, 0.02, size, dtype=np.float32) ** 3
    samples, real = (rng.standard_normal((count, size), np.float32) * scale for _ in range(2))
    samples *= np.float32(0.95)
    call = functions(case, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    figures = call(samples, real)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "gib": peak / 2**20, "figures": [float(f) for f in figures]}


def functions(case: str, side: str):
    """(samples, real) -> figures, with all that it needs imported."""
    if side == "here":
        return here(case)
    if side == "prdc":
        from prdc import compute_prdc

        def prdc(samples, real):
            found = compute_prdc(real, samples, 5)
            return found["density"], found["coverage"]

        return prdc
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        # torch-fidelity imports it, and these functions do not use it.
        stub: ModuleType = MagicMock(__spec__=ModuleSpec(f"torchvision{name}", None))
        sys.modules.setdefault(f"torchvision{name}", stub)
    import torch
    from torch_fidelity import metric_fid, metric_prc

    if case.startswith("moments"):

        def theirs(samples, real):
            import numpy as np

            stats = [{"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)} for x in (samples, real)]
            found = metric_fid.fid_statistics_to_metric(*stats, verbose=False)
            return (found["frechet_inception_distance"],)

        return theirs

    def precision(samples, real):
        given = [torch.from_numpy(x) for x in (samples, real)]
        options = {"prc_neighborhood": 3, "save_cpu_ram": side.endswith("parts")}
        found = metric_prc.prc_features_to_metric(
            *given, prc_batch_size=1000, verbose=False, **options
        )
        return found["precision"], found["recall"]

    return precision


def here(case: str):
    """Ours."""
    from diffusion.evaluation.metrics.density_coverage import density_coverage
    from diffusion.evaluation.metrics.frechet import frechet_from_statistics
    from diffusion.evaluation.metrics.precision_recall import precision_recall
    from diffusion.evaluation.moments import moments

    def cut(x):
        return (x[i : i + 1000] for i in range(0, len(x), 1000))

    return {
        "moments, Fréchet": lambda a, b: (
            frechet_from_statistics(moments(cut(a)), moments(cut(b))),
        ),
        "precision, recall": lambda a, b: [x.mean() for x in precision_recall(a, b)],
        "density, coverage": lambda a, b: [x.mean() for x in density_coverage(a, b)],
    }[case]


if __name__ == "__main__":
    main()
