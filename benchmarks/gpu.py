"""All measurements of one GPU, in one command and ten minutes.

    python benchmarks/gpu.py

It needs an NVIDIA GPU, ``torch`` with CUDA and ``diffusers`` (without the two only our side is
measured), and no network: weights are random. It writes results.json, report.md and log.txt to
runs/benchmarks/gpu; results.json has the results of every part as soon as they exist. Parts run in
the order of their importance, each in a process of its own with a limit to its time. When
--minutes are over, no further part starts, and a running part is ended; what it has written stays.
--small tries all parts on tiny networks, on a CPU too; --parts=attention,sd runs only these.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import report

HERE = Path(__file__).parent

# Part -> (seconds at most, script and arguments). {small} becomes --small, or nothing.
PARTS = {
    "attention": (45, "attention.py {small}"),
    "dit train": (200, "networks.py --only=DiT --does=train --apart {small} {turns}"),
    "dit forward": (60, "networks.py --only=DiT --does=forward --apart {small} {turns}"),
    "cifar10 train": (100, "networks.py --only=CIFAR;tiny_U --does=train {small} {turns}"),
    "sd": (180, "networks.py --only=SD_1.5;SDXL;tiny_SD --does=forward {small} {turns}"),
    "sampler": (80, "samplers.py --only=CIFAR;SD_1.5;tiny {small} {turns}"),
    "decode": (60, "decode.py {small} {turns}"),
    "overhead": (60, "training.py --part=loop --pairs=5 --seconds=2 {small}"),
    "cold": (90, "cold.py --repetitions=1 {small}"),
    "memory": (90, "peak_memory.py {small}"),
    "profile dit": (60, "profile_step.py --only=DiT --does=train {small}"),
    "profile sd": (60, "profile_step.py --only=SD_1.5;tiny_SD --does=forward {small}"),
    "flags": (120, "flags.py {small}"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="in all")
    parser.add_argument("--out", default=f"{report.RESULTS}/gpu", help="folder")
    parser.add_argument("--parts", default="", help=f"some of {', '.join(PARTS)}; by default all")
    parser.add_argument("--turns", default="", help="further arguments of timed parts")
    parser.add_argument("--small", action="store_true", help="tiny cases, to try the script")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.parts.split(",") if name] or list(PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise SystemExit(f"--parts: unknown {unknown}; choose from {', '.join(PARTS)}")
    if not report.has_gpu() and not arguments.small:
        raise SystemExit("there is no GPU here; --small tries the script on a CPU")
    Run(Path(arguments.out), chosen, arguments).go()


class Run:
    """The parts, one after the other, and their results so far."""

    def __init__(self, out: Path, chosen: list[str], arguments: argparse.Namespace):
        self.out, self.chosen, self.arguments = out, chosen, arguments
        self.began = time.monotonic()
        self.parts: dict[str, dict[str, Any]] = {}
        self.about = report.environment("jax", "jaxlib", "flax", "torch", "diffusers", "triton")
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("w")

    def go(self) -> None:
        """Runs the parts."""
        with tempfile.TemporaryDirectory() as folder:
            for name in self.chosen:
                left = 60 * self.arguments.minutes - (time.monotonic() - self.began)
                if left < 15:
                    self.parts[name] = {"status": "not run: the time was over"}
                else:
                    self.run(name, Path(folder) / f"{name.replace(' ', '_')}.json", left)
                self.write()
                print(f"{name}: {self.parts[name]['status']}", flush=True)
        print((self.out / "report.md").read_text())
        print(f"results: {self.out}", flush=True)

    def run(self, name: str, path: Path, left: float) -> None:
        """One part, whose results are gathered while it runs."""
        limit, line = PARTS[name]
        small = "--small" if self.arguments.small else ""
        words = line.format(small=small, turns=self.arguments.turns).split()
        script, *options = [word.replace("_", " ") if "only" in word else word for word in words]
        limit = min(limit if not self.arguments.small else 600, left)
        if script != "training.py":  # which starts no case shortly before its end
            options.append(f"--limit={0.6 * limit:.0f}")
        command = [sys.executable, str(HERE / script), *options, f"--json={path}"]
        began = time.monotonic()
        self.parts[name] = {"status": "running", "command": " ".join(command)}
        self.say(f"--- {name}: {' '.join(command)}")
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its own processes end with it
        )
        reader = threading.Thread(target=self.read, args=(process,))
        reader.start()
        status = "done"
        while process.poll() is None:
            time.sleep(0.5)
            self.gather(name, path)
            if time.monotonic() - began > limit:
                status = f"ended after {limit:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reader.join(5)
        if status == "done" and process.returncode:
            status = f"failed with {process.returncode}: see log.txt"
        self.gather(name, path, always=True)
        self.parts[name] |= {"status": status, "seconds": time.monotonic() - began}

    def read(self, process: subprocess.Popen) -> None:
        """Copies what a part prints to the log."""
        for line in process.stdout:
            self.say(line.rstrip("\n"))

    def say(self, text: str) -> None:
        """Writes a line to the log, with the time."""
        self.log.write(f"[{time.monotonic() - self.began:5.0f}] {text}\n")
        self.log.flush()

    def gather(self, name: str, path: Path, always: bool = False) -> None:
        """Takes the results that a part has written, if there are new ones."""
        if path.exists():
            found = json.loads(path.read_text())
            if always or len(found["rows"]) != len(self.parts[name].get("rows", [])):
                self.parts[name] |= {
                    "rows": found["rows"],
                    "notes": found["environment"].get("notes", []),
                }
                self.write()

    def write(self) -> None:
        """Writes results.json and report.md."""
        report.save_json(
            self.out / "results.json", {"environment": self.about, "parts": self.parts}
        )
        lines = [f"# {', '.join(self.about['devices'])}", json.dumps(self.about["versions"]), ""]
        for name, part in self.parts.items():
            lines += [f"## {name}: {part['status']}", *part.get("notes", []), ""]
            rows = part.get("rows", [])
            if rows:
                lines += [report.table(rows, shown(rows)), ""]
        (self.out / "report.md").write_text("\n".join(lines))


def shown(rows: list[Mapping[str, Any]]) -> dict[str, str]:
    """Columns: everything that is a word or a number."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {
        key: key
        for key in keys
        if all(isinstance(row.get(key, ""), str | int | float) for row in rows)
    }


def environment() -> dict[str, str]:
    """Variables of every part; compiled code is kept between the parts."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    for name, folder in (
        ("JAX_COMPILATION_CACHE_DIR", "jax"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("TRITON_CACHE_DIR", "triton"),
    ):
        own[name] = os.environ.get(name, str(Path(tempfile.gettempdir()) / "compiled" / folder))
    return own


if __name__ == "__main__":
    main()
