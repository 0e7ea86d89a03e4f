"""Two real processes of two devices each, on the loopback interface, against one of four."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from linear_run import lines
from processes_run import STEPS, run

from diffusion import processes
from diffusion.runs.restore import restore_ema
from diffusion.runs.workdir import steps

ROOT = Path(__file__).parents[2]
TIMEOUT = 180  # seconds; on a quiet machine they take less than ten
SCRIPT = str(Path(__file__).with_name("processes_run.py"))


def start(*arguments):
    devices = os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=2")
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": devices, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def launch(which, workdir):
    """Output and exit code of both; those that take too long are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start(SCRIPT, which, workdir, port, process) for process in (0, 1)]
    end, ended = time.monotonic() + TIMEOUT, []
    for process in both:
        try:
            said, _ = process.communicate(timeout=max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        ended.append((said, process.returncode))
    return ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with four devices: state and log."""
    workdir = tmp_path_factory.mktemp("alone")
    return run(workdir, "pmap"), lines(workdir)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes, of which one was killed and both were started again: folder and output."""
    workdir = tmp_path_factory.mktemp("together")
    first = launch("first", workdir)
    left = steps(workdir / "fsdp")
    return workdir, first, left, launch("second", workdir)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_when_one_is_killed_the_other_ends(together):
    _, ((said, code), (_, killed)), left, _ = together
    assert (code, killed) == (1, -signal.SIGKILL), said
    assert "error in process 0" in said
    assert "If another process ended" in said
    assert left == [4]


@pytest.mark.parametrize("parallel", ["fsdp", "pmap"])
def test_two_processes_train_as_one(parallel, alone, together):
    state, log = alone
    workdir, _, _, ended = together
    assert [code for _, code in ended] == [0, 0], ended
    rows = lines(workdir / parallel)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # one writes, none twice
    assert [row.keys() for row in rows] == [row.keys() for row in log]
    for row, expected in zip(rows, log):
        assert row == pytest.approx(expected, rel=1e-5)
    assert_close(restore_ema(workdir / parallel, "params")[0], state.params)
    assert_close(restore_ema(workdir / parallel, "power")[0], state.ema["power"])


def test_both_stop_at_the_same_step(together):
    first, second = (said for said, _ in together[-1])
    for said in (first, second):
        assert f"stopped with {128 + signal.SIGTERM}" in said  # though one alone had the signal
    assert "stopped by SIGTERM; checkpoint saved at step" in first
    assert "going on after step" in first.split("stopped by SIGTERM")[1]


def test_one_tells(together):
    first, second = (said for said, _ in together[-1])
    assert "going on after step 4 of 10" in first
    assert "step 10/10" in first
    assert "loss" not in second


def test_sharded_parameters_are_gathered_for_the_first(alone, together):
    average = np.load(together[0] / "average.npz")
    assert_close([average[name] for name in average], jax.tree.leaves(alone[0].ema["power"]))


def test_one_process_uses_its_arrays_as_they_are(alone):
    params = alone[0].params
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (processes.local(params), params))))


def test_nobody_to_be_found():
    code = """
import os
from diffusion import processes
os.environ["OMPI_COMM_WORLD_SIZE"] = "2"  # without the address that mpirun 4 gives
try:
    processes.join()
except ValueError as error:
    print(error, flush=True)
processes.join("127.0.0.1:9", 2, 1, timeout=1)
"""
    said, _ = (process := start("-c", code)).communicate(timeout=60)
    assert process.returncode == 1, said
    assert "ompi started several processes, and JAX cannot find out how to connect them" in said
    assert "give --coordinator, --num_processes, --process_id" in said
    assert "error: process 1 waited 1 s for all 2 processes at 127.0.0.1:9" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 2, None), r"--process_id missing: give all of --coordinator"),
        ((None, 2, None), r"--coordinator and --process_id missing"),
        (("host", 2, 0), r"HOST:PORT.*'host'"),
        (("host:99999", 2, 0), r"HOST:PORT.*'host:99999'"),
        (("host:1", 0, 0), r"--num_processes must be at least 1, got 0"),
        (("host:1", 2, 2), r"--process_id must lie in 0\.\.1.*got 2"),
    ],
)
def test_wrong_flags(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*given)


def test_one_process_joins_nobody():
    assert processes.join("host:1", 1, 0) == 1
    assert not jax.distributed.is_initialized()


def test_clusters_are_recognised():
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    assert processes.detected(slurm) == "slurm"
    assert processes.detected(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) == ""
    assert processes.detected({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == ""  # within sbatch
    assert processes.detected({"OMPI_COMM_WORLD_SIZE": "2"}) == "ompi"
    assert processes.detected({"OMPI_COMM_WORLD_SIZE": "1"}) == ""
    kubernetes = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert processes.detected(kubernetes) == ""  # any pod, a notebook's too
    assert processes.detected(kubernetes | {"JOB_COMPLETION_INDEX": "1"}) == "k8s"
