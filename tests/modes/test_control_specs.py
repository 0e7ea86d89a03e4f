"""--mode=generate with --config.control: from a photograph to a picture, its map beside it."""

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import tiny_runs
from commands import command, succeed
from PIL import Image
from tiny_encoders import randomise

QUICK = {
    "model.name": "pretrained",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.5,
    "optimizer.weight_decay": 0.0,
    "optimizer.warmup": 0,
    "train.steps": 2,
    "train.batch_size": 8,
    "train.sample_every": 0,
    "train.checkpoint_every": 2,
    "sampler.steps": 2,
    "samples.columns": 2,
    "data.name": "digits",
    "data.hint": "soft_edges()",
    "objective.adapter": "controlnet(hint_widths=(8,))",
}


def generate(path, control, workdir, **others):
    """(error, printed) of the command."""
    given = {"model.path": path, "control": control, "sampler.steps": 3} | others
    flags = [f"--config.{name}={value}" for name, value in given.items()]
    return command("--mode=generate", *flags, f"--workdir={workdir}", config=None)


def pixels(path):
    return np.asarray(Image.open(path), np.int16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A photograph, a pipeline and a net for it as diffusers saves them."""
    folder = tmp_path_factory.mktemp("control")
    photograph = np.full((40, 60, 3), 255, np.uint8)
    photograph[10:30, 15:40] = 0
    Image.fromarray(photograph).save(folder / "x.png")
    unet = tiny.whole(folder=folder / "base").unet
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    randomise(net, 3).save_pretrained(folder / "net")
    return folder


def test_from_photograph_to_picture(place, tmp_path):
    canny = f"canny(net='{place / 'net'}', image='{place / 'x.png'}')"
    prompt = {"samples.prompt": "a cat", "samples.count": 2}
    error, printed = generate(place / "base", canny, tmp_path, **prompt)
    assert error is None, printed
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {"000000.png", "000001.png", "000000_canny.png"}
    assert set(np.unique(pixels(tmp_path / "000000_canny.png"))) == {0, 255}
    net = place / "net"
    two = f"""('canny(net="{net}", image="{place / "x.png"}")', 'tile(net="{net}", end=0.7)')"""
    prompt |= {"samples.count": 1, "samples.image": place / "x.png"}
    error, printed = generate(place / "base", two, tmp_path, **prompt)
    assert error is None, printed
    made = {path.name for path in tmp_path.glob("000002*.png")}
    assert made == {"000002.png", "000002_canny.png", "000002_tile.png"}


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("cany(net='net')", "config.control: unknown 'cany'"),
        ("canny(net='base/unet', image='x.png')", "UNet2DConditionModel; expected ControlNetModel"),
        ("canny(net='net')", 'canny needs image="x.png"'),
        ("canny(net='net', image='x.png', start=0.6, end=0.5)", "start=0.6 must be below end=0.5"),
    ],
)
def test_mistakes_as_commands(place, tmp_path, control, message, monkeypatch):
    monkeypatch.chdir(place)
    error, _ = generate("base", control, tmp_path / "out", **{"samples.prompt": "a cat"})
    assert error is not None and message in error and "config.control" in error
    assert not (tmp_path / "out").exists()


def test_nets_that_runs_trained(place, tmp_path):
    tiny_runs.trained(tiny_runs.digits(), tmp_path / "base")
    options = QUICK | {"model.path": tmp_path / "base"}
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    succeed(*flags, f"--workdir={tmp_path / 'run'}", config="configs/finetune_lora.py")
    spec = f"soft_edges(net='{tmp_path / 'run'}', image='{place / 'x.png'}')"
    off = f"{spec[:-1]}, scale=0.0)"
    own = f"soft_edges(image='{place / 'x.png'}')"
    label, made = {"samples.labels": 3}, []
    for name, control in (("base", spec), ("run", own), ("base", off)):
        out = tmp_path / f"out{len(made)}"
        error, printed = generate(tmp_path / name, control, out, **label)
        assert error is None, f"{error}\n{printed}"
        made.append(pixels(out / "000000.png"))
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).max() > 2
    for control, message in (
        ("()", "has 1 ControlNet of its own"),
        (spec, "takes no other net"),
    ):
        error, _ = generate(tmp_path / "run", control, tmp_path / "no", **label)
        assert error is not None and message in error, error
    error, _ = generate(tmp_path / "base", spec.replace("run'", "base'"), tmp_path / "no", **label)
    assert "this run trained no ControlNet" in error
    error, _ = generate(place / "base", spec, tmp_path / "no", **{"samples.prompt": "a cat"})
    assert "does not fit a U-Net" in error
