"""Damaged files, full disks, two runs at once."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from linear_run import assert_identical, lines, run

from diffusion.runs import manifest, storage
from diffusion.runs import workdir as workdirs
from diffusion.runs.checkpoints import Checkpoints, SaveError
from diffusion.runs.restore import DamagedError, restore_ema

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run with checkpoints of steps 5 and 10, and its state."""
    workdir = tmp_path_factory.mktemp("done")
    return workdir, run(workdir, 10)


@pytest.fixture
def copy(done, tmp_path):
    return Path(shutil.copytree(done[0], tmp_path / "copy"))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES = {
    truncate: r"has \d+ bytes instead of \d+",
    flip: "was changed",
    Path.unlink: "is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found(copy, damage):
    folder = copy / "checkpoints" / "10"
    assert manifest.damage(folder) == []
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"about.json", "manifest.json", "_METADATA"} <= {path.name for path in files}
    for path in files:
        before = path.read_bytes()
        damage(path)
        (wrong,) = manifest.damage(folder)
        assert wrong.startswith(str(path.relative_to(folder))), wrong
        path.write_bytes(before)
    assert manifest.damage(folder) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(done, copy, damage, capsys):
    name = "opt_state/manifest.ocdbt"
    damage(copy / "checkpoints" / "10" / name)
    state = run(copy, 10)
    text = capsys.readouterr().out
    assert (
        "the checkpoint of step 10 is damaged: " + name in text and "going on from step 5" in text
    )
    assert_identical(state, done[1])
    assert lines(copy) == lines(done[0])
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["10", "5", "damaged_10"]


def test_samples_are_from_the_one_before(done, copy, capsys):
    flip(next((copy / "checkpoints" / "10" / "ema_power").glob("ocdbt*/d/*")))
    average, step = restore_ema(copy, "power")
    assert step == 5 and "Step 5 is taken instead" in capsys.readouterr().out
    assert_identical(average, restore_ema(done[0], "power", step=5)[0])
    assert restore_ema(copy, "constant")[1] == 10  # of which no file is damaged
    with pytest.raises(
        DamagedError, match=r"(?s)the checkpoint is damaged.*10: ema_power.*changed"
    ):
        restore_ema(copy, "power", step=10)
    assert (copy / "checkpoints" / "10").exists()  # a run may be training there


def test_no_checkpoint_is_whole(copy):
    for step in ("5", "10"):
        truncate(copy / "checkpoints" / step / "about.json")
    for _ in range(2):  # nothing was set aside: the second attempt must not begin anew
        with pytest.raises(DamagedError, match=r"(?s)no checkpoint is whole.*10: about.*5: about"):
            run(copy, 20)
    with pytest.raises(DamagedError, match="no checkpoint is whole"):
        restore_ema(copy, "power")


def test_a_damaged_config_is_told_of(copy):
    workdirs.save_config(copy, {"steps": 1})
    truncate(copy / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is damaged.*starts\.jsonl"):
        workdirs.differences(copy, {"steps": 1})


def full(monkeypatch, refused):
    """A disk that is full for every file whose path ``refused`` says."""
    original = Path.open

    def open_(path, mode="r", *args, **kwargs):
        if set(mode) & set("wax+") and refused(str(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)


def test_a_save_on_a_full_disk_is_told_of_and_made_up_for(done, tmp_path, monkeypatch, capsys):
    full(monkeypatch, lambda path: path.endswith("5/about.json"))
    state = run(tmp_path, 10)
    text = capsys.readouterr().out
    assert "the checkpoint of step 5 could not be saved: the disk is full" in text
    assert "there is no checkpoint yet" in text
    assert_identical(state, done[1])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["10"]


def test_a_last_save_on_a_full_disk_is_an_error(done, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full(patch, lambda path: path.endswith("10/manifest.json"))
        with pytest.raises(
            SaveError, match=r"step 10, the last.*disk is full.*good.*checkpoints/5"
        ):
            run(tmp_path, 10)
    assert_identical(run(tmp_path, 10), done[1])
    assert lines(tmp_path) == lines(done[0])


def test_a_log_on_a_full_disk_is_made_up_for(done, tmp_path, monkeypatch, capsys):
    calls = []

    def refused(path):
        calls.append(path)
        return (
            path.endswith("metrics.jsonl") and sum(p.endswith("metrics.jsonl") for p in calls) < 3
        )

    full(monkeypatch, refused)
    run(tmp_path, 10)
    text = capsys.readouterr().out
    assert "metrics.jsonl cannot be written: the disk is full" in text
    assert "metrics.jsonl is complete again" in text
    assert lines(tmp_path) == lines(done[0])


def test_hooks_on_a_full_disk_cost_no_training(done, tmp_path, capsys):
    def draw(state, step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    seen = []
    state = run(tmp_path, 10, hooks=[(5, draw), (5, lambda state, step: seen.append(step))])
    assert_identical(state, done[1])
    assert seen == [5, 10]
    assert "step 5: something was not written: the disk is full" in capsys.readouterr().out


def test_what_an_appender_holds_back_comes_whole(tmp_path, monkeypatch):
    said, path = [], tmp_path / "log"
    appender = storage.Appender(path, said.append)
    appender.write(b"one\n")
    appender.flush()

    class Full:
        """A disk with room for two bytes more."""

        def __init__(self, file):
            self.file, self.room = file, 2

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def tell(self):
            return self.file.tell()

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room = 0
            return self.file.write(data[:2])

    original = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args, **kw: Full(original(*args, **kw)))
        appender.write(b"two\n")
        appender.flush()
        with open(path, "rb") as file:  # what fitted was taken back
            assert file.read() == b"one\n"
        appender.write(b"three\n")
        appender.flush()
    assert len(said) == 1 and "cannot be written: the disk is full" in said[0]
    appender.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n" and "complete again" in said[1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's
def test_a_disk_that_is_really_full(done, small_disk):
    ballast, saved = small_disk / "ballast", small_disk / "run" / "checkpoints" / "5"

    def fill(state, step):
        if step == 9:
            while not saved.exists():  # which is written meanwhile
                time.sleep(0.01)
            with ballast.open("wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(SaveError, match=r"step 10.*disk is full.*checkpoints/5"):
        run(small_disk / "run", 10, hooks=[(1, fill)])
    ballast.unlink()
    assert_identical(run(small_disk / "run", 10), done[1])
    assert lines(small_disk / "run") == lines(done[0])


def test_two_runs_in_one_workdir(tmp_path):
    script = "import sys, diffusion.runs.workdir as w; w.held(sys.argv[1]).__enter__()"
    other = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    with workdirs.held(tmp_path):
        with workdirs.held(tmp_path):  # the same process may
            pass
        refused = subprocess.run(other, env=environment, capture_output=True, text=True)
        assert "InUseError" in refused.stderr
        assert f"process {os.getpid()} on {os.uname().nodename} trains there" in refused.stderr
    assert subprocess.run(other, env=environment, capture_output=True).returncode == 0


def test_the_best_are_kept(done, tmp_path, capsys):
    state = jax.tree.map(np.asarray, done[1])
    values = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 5.0}
    settings = {"keep": 1, "keep_best": 2, "best": "error", "about": {"config": {"a": 1}}}
    checkpoints = Checkpoints(tmp_path, **settings)
    for step, value in values.items():
        at = jax.device_put(state.replace(step=np.int32(step)))
        checkpoints.save(at, metrics={"error": value})
    checkpoints.close()
    assert workdirs.steps(tmp_path) == [20, 40, 50]
    assert restore_ema(tmp_path, "power", step="best")[1] == 20
    about = json.loads((tmp_path / "checkpoints" / "20" / "about.json").read_text())
    assert about["config"] == {"a": 1} and about["metrics"] == {"error": 1.0}

    highest = Checkpoints(tmp_path, keep=1, keep_best=1, best="-error")
    highest.save(jax.device_put(state.replace(step=np.int32(60))), metrics={"errors": 1.0})
    assert "no 'error' yet (did you mean errors?)" in capsys.readouterr().out
    highest.finish()
    highest.close()
    assert workdirs.steps(tmp_path) == [50, 60]
    for step in ("50", "60"):
        (tmp_path / "checkpoints" / step / "about.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="which is best"):
        restore_ema(tmp_path, "power", step="best")
    with pytest.raises(ValueError, match="keep_best"):
        Checkpoints(tmp_path, keep_best=-1)
