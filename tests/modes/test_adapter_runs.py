"""Training of adapters, as commands: what is trained, what stays, and what a run draws after."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_runs
from commands import command
from flax.traverse_util import flatten_dict

from diffusion import pipelines
from diffusion.modes import train
from diffusion.pipelines.adapters import attach
from diffusion.pipelines.from_run import open_run
from diffusion.runs import averages

QUICK = {
    "config.optimizer.name": "sgd",
    "config.optimizer.learning_rate": 0.5,
    "config.optimizer.weight_decay": 0.0,
    "config.optimizer.warmup": 0,
    "config.ema": "constant(decay=0.5)",
    "config.train.batch_size": 8,
    "config.train.sample_every": 0,
    "config.train.log_every": 1,
    "config.train.checkpoint_every": 2,
    "config.sampler.steps": 2,
    "config.sampler.batch_size": 4,
    "config.samples.columns": 2,
}
WITHOUT_DATA = ("--config.model.name=pretrained",)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Runs to adapt, by kind, and the options that name their data."""
    folder = tmp_path_factory.mktemp("bases")
    digits, captioned = tiny_runs.digits(), tiny_runs.captioned(folder)
    tiny_runs.trained(digits, folder / "digits")
    tiny_runs.trained(captioned, folder / "captioned")
    return {
        "digits": (folder / "digits", {"config.data.name": "digits"}),
        "captioned": (
            folder / "captioned",
            {
                "config.data.dir": folder / "pairs.npz",
                "config.data.size": 8,
                "config.data.held_out": 0.2,
            },
        ),
    }


def adapt(base, workdir, adapter, **others):
    """Runs the command that trains an adapter; (error, printed)."""
    path, data = base
    options = QUICK | data | {"config.model.path": path, "config.objective.adapter": adapter}
    options |= {f"config.{name}": value for name, value in others.items()}
    given = [f"--{name}={value}" for name, value in options.items()]
    return command(*given, f"--workdir={workdir}", config="configs/finetune_lora.py")


@pytest.mark.parametrize(
    ("kind", "adapter", "what"),
    [
        ("digits", "full('mid_block')", "mid_block"),
        ("captioned", "full('text/encoder')", "text/encoder"),
        ("digits", "lora(rank=2, dora=True)", r"to_(q|k|v|out_0)/kernel"),
        ("captioned", "lora(rank=2, targets='all', alpha=1)", r"kernel"),
    ],
)
def test_only_the_adapter_changes(bases, kind, adapter, what, tmp_path):
    path, _ = bases[kind]
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    error, printed = adapt(bases[kind], tmp_path / "run", adapter, **{"train.steps": 2})
    assert error is None, printed
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    kept, step, _ = averages.parameters(tmp_path / "run", "params", "newest")
    assert step == 2 and set(kept) == {"adapter"}
    (_, base), (_, adapted) = pipelines.load(path), pipelines.load(tmp_path / "run")
    base, adapted = (flatten_dict(tree["network"], sep="/") for tree in (base, adapted))
    changed = {name for name in base if not np.array_equal(base[name], adapted[name])}
    assert changed and all(re.search(what, name) for name in changed)
    assert (tmp_path / "run" / "samples.png").exists()
    if "lora" in adapter:  # the run and its file are adapters of the base
        for adapters in (tmp_path / "run", tmp_path / "run" / "adapter.safetensors"):
            _, params = pipelines.load(path, adapters=str(adapters))
            again = flatten_dict(params["network"], sep="/")
            for name in adapted:
                np.testing.assert_allclose(again[name], adapted[name], atol=1e-6)
    error, printed = command(
        "--mode=sample", f"--workdir={tmp_path / 'run'}", "--config.samples.count=2", config=None
    )
    assert error is None, printed


def test_a_word_is_learned_where_captions_have_it(bases, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "new.npz", images=images, caption=["<s>", "red <s>"] * 4)
    rows = {}
    for steps in (1, 3):
        options = {"data.dir": tmp_path / "new.npz", "train.steps": steps}
        adapter = "textual_inversion('<s>', init='red')"
        error, printed = adapt(bases["captioned"], tmp_path / f"{steps}", adapter, **options)
        assert error is None, printed
        kept, *_ = averages.parameters(tmp_path / f"{steps}", "params", "newest")
        rows[steps] = kept["adapter"]["0"]
    assert np.all(rows[1] != rows[3])


HINT = {"data.hint": "soft_edges(sigma=0)"}


@pytest.mark.parametrize(
    ("adapter", "others"),
    [("lora(rank=2, dropout=0.5)", {}), ("controlnet((8,))", HINT)],
)
def test_killed_and_resumed_to_the_bit(bases, tmp_path, adapter, others):
    for name, ends in {"whole": (4,), "parts": (2, 4)}.items():
        for end in ends:
            options = others | {"train.steps": end}
            error, printed = adapt(bases["digits"], tmp_path / name, adapter, **options)
            assert error is None, printed
    whole, parts = (
        averages.parameters(tmp_path / name, "params", "newest")[0] for name in ("whole", "parts")
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, parts))


def test_a_controlnet_is_shown_held_out_hints(bases, tmp_path):
    run, options = tmp_path / "run", HINT | {"train.steps": 1}
    error, printed = adapt(bases["digits"], run, "controlnet((8,))", **options)
    assert error is None, printed
    assert (run / "samples_hints.png").exists()
    sample = ("--mode=sample", f"--workdir={run}", "--config.samples.count=2")
    error, printed = command(*sample, config=None)
    assert error is None, printed
    error, _ = command(*sample, "--config.data.hint=", config=None)
    assert "data.hint: 'soft_edges(sigma=0)' there" in error


def test_an_adapter_is_trained_on_the_run_of_another(bases, tmp_path):
    """Whose autoencoder is that of its base."""
    adapter, others = "lora(2, targets='attention')", {"train.steps": 1}
    error, printed = adapt(bases["captioned"], tmp_path / "first", adapter, **others)
    assert error is None, printed
    first = tmp_path / "first", bases["captioned"][1]
    error, printed = adapt(first, tmp_path / "second", adapter, **others)
    assert error is None, printed
    _, alone = pipelines.load(tmp_path / "second")
    merged = attach(open_run(tmp_path / "first"), str(tmp_path / "second")).load()
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_base_that_was_trained_on_is_refused(bases, tmp_path):
    path, data = bases["digits"]
    copy = tmp_path / "base"
    shutil.copytree(path, copy)
    adapt((copy, data), tmp_path / "run", "full('mid_block')", **{"train.steps": 1})
    c = tiny_runs.digits()
    c.train.steps = 3
    train.run(c, str(copy))
    error, _ = command("--mode=sample", f"--workdir={tmp_path / 'run'}", config=None)
    assert "whose weights are others now" in error
    error, _ = adapt((copy, data), tmp_path / "run", "full('mid_block')", **{"train.steps": 2})
    assert "are others now" in error and "accept_changes" in error
    described = json.loads((tmp_path / "run" / "model.json").read_text())
    assert described["fields"]["adapter"] == "full('mid_block')"


@pytest.mark.parametrize(
    ("adapter", "others", "expected"),
    [
        ("ful()", {}, "Did you mean 'full'"),
        ("full('(')", {}, "no regular expression"),
        ("full('attn9')", {}, "no parameter has such a path"),
        ("full()", {"model.name": "unet"}, "config.model.name=pretrained"),
        ("full()", {"model.path": "nowhere"}, "nowhere"),
        ("full()", {"objective.prediction": "v"}, "leave it 'auto'"),
        ("full()", {"objective.name": "classification"}, "denoising"),
        ("full()", {"optimizer.rates": "(('nothing', 2.0),)"}, "no parameter's path has 'nothing'"),
        ("full()", {"optimizer.rates": "('text', 2.0)"}, "expected pairs"),
        ("full()", {"data.name": "mnist", "data.dir": "nowhere"}, "nowhere"),
        ("lora(rank=0)", {}, "rank"),
        ("lora(targets='attn9')", {}, "attn9"),
        ("controlnet((8,))", {}, "given hints to follow"),
        ("controlnet((8, 8))", HINT, "16 x 16 are expected"),
        ("controlnet((8,))", {"data.hint": "cany()"}, "Did you mean 'canny'"),
        ("controlnet((8,))", HINT | {"data.flip": True}, "whole pictures"),
        ("textual_inversion('<s>', 'cat')", {}, "no text encoder"),
    ],
)
def test_mistakes(bases, tmp_path, adapter, others, expected):
    error, _ = adapt(bases["digits"], tmp_path / "run", adapter, **others)
    assert error is not None and expected in error, error
    assert not (tmp_path / "run" / "checkpoints").exists()
