"""Runs killed at many points, and started again by the same command."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from linear_run import lines

from diffusion.runs import workdir as workdirs

HERE = Path(__file__).parent
# Kills while it writes any file, its log, a snapshot, a checkpoint; and after some time.
KILLS = {"": 4, "metrics.jsonl": 3, "snapshots/": 4, "checkpoints/": 6, "time": 5}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a run; gives how it ended."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, HERE.parents[:2])),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with subprocess.Popen(
        [sys.executable, str(HERE / "zygote.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as zygote:

        def ask(workdir, **kill):
            zygote.stdin.write(json.dumps({"workdir": str(workdir), **kill}) + "\n")
            zygote.stdin.flush()
            return json.loads(zygote.stdout.readline())

        yield ask
        zygote.stdin.close()


def contents(workdir):
    """All that a run should leave the same: parameters, losses, snapshots, which checkpoints."""
    with np.load(workdir / "result.npz") as arrays:
        found = {name: arrays[name].tobytes() for name in arrays}
    found |= {path.name: path.read_bytes() for path in (workdir / "snapshots").iterdir()}
    steps = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    return found | {"log": lines(workdir), "checkpoints": steps}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """What a run that was never stopped leaves, and how it ended."""
    straight, again = tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("again")
    assert start(straight)["status"] == 0  # compiles
    ended = start(again)
    expected = contents(straight)
    assert contents(again) == expected and len(expected["log"]) == 5
    return expected, ended


def test_killed_anywhere_and_started_again_is_the_same_to_the_bit(start, whole, tmp_path):
    expected, whole = whole
    rng = random.Random(0)
    kills = [place for place, count in KILLS.items() for _ in range(count)]
    rng.shuffle(kills)
    runs = killed = 0
    workdir = tmp_path / "0"
    while kills:
        place = kills.pop()
        if place == "time":
            kill = {"seconds": rng.uniform(0.1, 0.9) * whole["seconds"]}
        else:
            kill = {"path": place, "event": rng.randint(1, max(whole["counts"][place] // 2, 1))}
        ended = start(workdir, **kill)
        if ended["status"] == 0:  # it was done before
            kills.insert(0, place)
        else:
            assert ended["status"] == -signal.SIGKILL
            killed += 1
        if ended["status"] == 0 or not kills or killed % 7 == 0:
            if ended["status"] != 0:
                assert start(workdir)["status"] == 0
            assert contents(workdir) == expected, f"after {kill}"
            runs += 1
            workdir = tmp_path / str(runs)
    assert killed == sum(KILLS.values()) >= 20


def test_terminated_it_saves_and_goes_on_the_same_to_the_bit(start, whole, tmp_path):
    steps = []
    # While a snapshot is written, then in the background, while a checkpoint is.
    for place, event in (("snapshots/", 1), ("checkpoints/", 12)):
        ended = start(tmp_path, path=place, event=event, by=signal.SIGTERM)
        assert ended["status"] == 128 + signal.SIGTERM
        steps += workdirs.steps(tmp_path)[-1:]
    assert 5 == steps[0] < steps[1] < 14
    assert start(tmp_path)["status"] == 0
    found, expected = contents(tmp_path), dict(whole[0])
    found.pop("checkpoints"), expected.pop("checkpoints")  # there were more to choose the best from
    assert found == expected
