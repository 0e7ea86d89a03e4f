"""What a run left, damaged: refused in a plain sentence, and what is whole stays."""

import json
import shutil

import numpy as np
import pytest
from commands import assert_names, assert_nothing_lost, command, contents

from diffusion.runs import restore, snapshots
from diffusion.runs import workdir as workdirs

TINY = ["--config.model.mlp.width=8", "--config.model.mlp.depth=1", "--config.train.batch_size=8"]
TINY += ["--config.train.checkpoint_every=2", "--config.optimizer.warmup=1"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of 4 steps with checkpoints of 2 and 4; pictures are not what is tested here."""
    folder = tmp_path_factory.mktemp("done") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.config.results.Samples.finish", lambda *_: None)
        error, _ = command(f"--workdir={folder}", *TINY, "--config.train.steps=4")
    assert error is None
    return folder


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def go_on(run, *arguments):
    return command(f"--workdir={run}", *TINY, "--config.train.steps=6", *arguments)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def absent(path):
    path.unlink()


DAMAGE = [cut, flipped, emptied, absent]


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["manifest.json", "about.json", "largest"])
def test_every_checkpoint(run, file, damage, mode):
    for folder in (run / "checkpoints").iterdir():
        data = (p for p in folder.rglob("*") if p.is_file() and "ema" in str(p))
        largest = max(data, key=lambda p: p.stat().st_size)
        damage(largest if file == "largest" else folder / file)
    before = contents(run)
    error, _ = go_on(run, f"--mode={mode}")
    assert_names(error, "no checkpoint is whole", run / "checkpoints")
    assert_nothing_lost(run, before)


CONFIGS = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "bytes": lambda text: "\x00\x01\udcff",
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize("change", CONFIGS)
def test_the_config(run, change, mode):
    file = run / "config.json"
    file.write_bytes(CONFIGS[change](file.read_text()).encode(errors="surrogateescape"))
    before = contents(run)
    error, _ = go_on(run, f"--mode={mode}")
    assert_names(error, file, "damaged")
    assert_nothing_lost(run, before)


@pytest.mark.parametrize("change", [*CONFIGS, "another version"])
def test_the_model(run, change):
    file = run / "model.json"
    text = file.read_text()
    made = CONFIGS.get(change, lambda text: text.replace('"format": 1', '"format": 0'))(text)
    file.write_bytes(made.encode(errors="surrogateescape"))
    before = contents(run)
    error, _ = command(f"--workdir={run}", "--mode=sample", config=None)
    assert_names(error, file, "damaged" if change in CONFIGS else "another version")
    assert_nothing_lost(run, before)


@pytest.mark.parametrize("field, value", [("seed", 3), ("model.mlp.width", 16)])
def test_another_config(run, field, value):
    before = contents(run)
    error, _ = go_on(run, f"--config.{field}={value}")
    assert_names(error, run, "another configuration")
    assert field in error and str(value) in error
    assert_nothing_lost(run, before)


@pytest.mark.parametrize("text", ["many\n", "", "\udcff"])
def test_the_mark_of_a_run_that_is_done(run, text):
    (run / "done").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(run)
    error, _ = go_on(run)
    assert_names(error, run / "done", "number")
    assert_nothing_lost(run, before)


def test_another_checkpoint_than_there_is(run):
    error, _ = go_on(run, "--mode=sample", "--config.sampler.checkpoint=3")
    assert_names(error, "no checkpoint of step 3", "[2, 4]")


def test_the_newest_checkpoint_and_the_log(run, monkeypatch):
    """The run goes on from the checkpoint before, having said so."""
    monkeypatch.setattr("diffusion.config.results.Samples.finish", lambda *_: None)
    cut(run / "checkpoints" / "4" / "about.json")
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 4, "lo\xff\xfe\n[]\n3\nnull\n')
    before = {k: v for k, v in contents(run / "checkpoints").items() if k.parts[0] == "4"}
    error, printed = go_on(run, "--config.train.log_every=1")
    assert error is None
    assert "the checkpoint of step 4 is damaged: about.json" in printed
    assert "going on after step 2 of 6" in printed
    assert_nothing_lost(run / "checkpoints", before, moved=[("4", "damaged_4")])
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [3, 4, 5, 6]


def test_what_others_put_into_a_run(run):
    """Copies, names and numbers that are not the run's own are passed over."""
    newest = max(workdirs.steps(run))
    (run / "checkpoints" / "²").mkdir()
    assert max(workdirs.steps(run)) == newest
    about = run / "checkpoints" / str(newest) / "about.json"
    about.write_text(json.dumps({"best": "loss", "metrics": {"loss": "low"}}))
    assert restore.ranked(run, [newest]) == []
    folder = run / "snapshots"
    folder.mkdir()
    tree = {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float32)}
    snapshots._write(folder / "step_000000010_0.05.safetensors", tree)
    shutil.copy(folder / "step_000000010_0.05.safetensors", folder / "step_10 (copy).safetensors")
    (only,) = snapshots.listed(run)
    assert only.step == 10 and len(snapshots.read(only)) == 2
    data = only.path.read_bytes()
    only.path.write_bytes(data.replace(b'"b":{', b'"c":{', 1))
    with pytest.raises(ValueError, match="its checksums are not those of its tensors"):
        snapshots.read(only)
