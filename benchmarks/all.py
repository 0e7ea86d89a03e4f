"""All measurements for a CPU, one after the other.

    python benchmarks/all.py

Every script writes its own file in runs/benchmarks. On a GPU: ``gpu.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

# Script -> seconds after which it starts no further case.
SCRIPTS = {"networks": 420, "samplers": 200, "decode": 180, "cold": 0, "peak_memory": 150}
LONG = ("training", "data", "memory", "inception", "feature_statistics", "adapters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny cases, to try the scripts")
    parser.add_argument("--with_long", action="store_true", help=f"also {', '.join(LONG)}")
    arguments = parser.parse_args()
    failed = []
    for name in (*SCRIPTS, *(LONG if arguments.with_long else ())):
        options = [f"--limit={SCRIPTS[name]}"] if name in SCRIPTS else []
        options += ["--small"] if arguments.small and name in SCRIPTS else []
        command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), *options]
        if name in LONG:
            command.append(f"--json=runs/benchmarks/{name}.json")
        began = time.monotonic()
        if subprocess.run(command).returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
