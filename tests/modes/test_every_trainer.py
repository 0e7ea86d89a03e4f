"""What trains an adapter, one after another on one tiny model: it stops and goes on to the bit, and
the devices' layout changes nothing. (LoRA and ControlNets do so as commands, test_adapter_runs.)"""

from functools import partial

import jax
import numpy as np
import pytest
import tiny_runs
from commands import command
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from configs import finetune_lora
from diffusion import pipelines, pretrained
from diffusion.config.data import batches
from diffusion.config.experiment import build
from diffusion.models.clip import ClipVision
from diffusion.objectives.adapting import OWN
from diffusion.pipelines import adapters, concepts, description
from diffusion.pretrained.models import shapes
from diffusion.runs import workdir as workdirs
from diffusion.training import parallel
from diffusion.training.loop import fit

VISION = ClipVision(width=16, depth=2, heads=2, hidden=16, size=8, patch=4, projection=12)
UNET = dict(widths=(8, 16), blocks=1, attention=(0, 1), mid_attention=1, num_heads=2, norm_groups=4)
PAIRS, SUBJECT = {"name": "captioned", "held_out": 0.2}, {"name": "subject"}
WORD = SUBJECT | {"subject": {"prompt": "<s>"}, "template": "object"}
PRIOR = SUBJECT | {
    "subject": {"prompt": "black cat", "class_prompt": "red cat", "class_count": 5},
}
INVERSION = "textual_inversion('<s>', 'red', vectors=2)"
CASES = {
    "full": ("pairs.npz", "full('text/')", PAIRS, {}),
    "ip_adapter": ("pairs.npz", "ip_adapter('{}/encoder', 12, tokens=2)", PAIRS, {}),
    "textual_inversion": ("subject", INVERSION, WORD, {}),
    "instruct": ("edits.npz", "instruct()", {"name": "edits", "held_out": 0.3}, {}),
    "dreambooth": (
        "subject",
        "lora(2)",
        PRIOR,
        {"terms": "prior_preservation(weight=0.5)", "weighting": "min_snr"},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of a U-Net of pixels with a text encoder of its own, and data of every kind."""
    folder, rng = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    c = tiny_runs.captioned(folder)
    c.data.autoencoder = c.data.cache = ""
    c.model.name = "unet"
    c.model.unet.update(UNET)
    made = build(c)
    trained(made, folder / "run", 3)  # what begins as zero stands between loss and text
    description.write(folder / "run", made.description)
    workdirs.save_config(folder / "run", c.to_dict())
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes(VISION))
    pretrained.save(folder / "encoder", VISION, params)
    images = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    captions = np.array(["red cat", "blue cat", "black cat"] * 4)
    np.savez(folder / "edits.npz", images=images, edited=255 - images, caption=captions)
    for name, part in (("subject", images[:3]), ("class", images[3:8])):
        (folder / name).mkdir()
        for i, pixels in enumerate(part):
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def config(folder, kind):
    """That of a run that trains ``kind``."""
    data, adapter, of_data, of_objective = CASES[kind]
    c = finetune_lora.get_config()
    c.model.path = str(folder / "run")
    c.objective.adapter = adapter.format(folder)
    c.objective.update(of_objective)
    c.data.update(of_data)
    c.data.update(dir=str(folder / data), size=8)
    if c.data.subject.class_prompt:
        c.data.subject.class_dir = str(folder / "class")
    c.optimizer.update(**tiny_runs.QUICK, weight_decay=0.0)
    c.ema = "constant(decay=0.5)"
    c.train.batch_size = 8
    c.sampler.steps = 2
    return c


def trained(made, workdir, *ends, **options):
    """The state after training that stops at each of ``ends`` and goes on, without pictures."""
    for steps in ends:
        state = fit(
            objective=made.objective,
            optimizer=made.optimizer,
            emas=made.emas,
            batches=partial(batches, made.config, made.train),
            steps=steps,
            workdir=workdir,
            frozen=made.frozen,
            initial_params=made.adaptation and made.adaptation.initial(),
            log_every=1,
            checkpoint_every=1,
            **options,
        )
    return jax.device_get(state)


@pytest.fixture
def compiled_once(tmp_path):
    """Programs that were compiled are kept, as those that main.py compiles are."""
    values = {"jax_compilation_cache_dir": str(tmp_path / "programs")}
    values["jax_persistent_cache_min_compile_time_secs"] = 0.0
    before = {name: getattr(jax.config, name) for name in values}
    for settings in (values, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it would not look at them again
        if settings is values:
            yield


@pytest.mark.parametrize("kind", CASES)
def test_stopped_and_laid_out_otherwise(base, kind, tmp_path, compiled_once, monkeypatch):
    made = build(config(base, kind))
    start = made.adaptation.initial()({OWN: None}, None)
    whole = trained(made, tmp_path / "whole", 2)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, whole.params)
    # Keys' biases change no attention, and the first step moves only one factor of a LoRA.
    assert np.mean(jax.tree.leaves(changed)) > 0.5, changed
    parts = trained(made, tmp_path / "parts", 1, 2)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    if kind == "textual_inversion":  # the run is an adapter as its file is
        description.write(tmp_path / "whole", made.description)
        opened = pipelines.open_any(base / "run")
        taught = adapters.attach(opened, f"{tmp_path / 'whole'}(token='<t>')")
        assert concepts.known_words(taught.pipeline) == ("<t>",)
    monkeypatch.setattr(parallel, "SMALL", 1)
    cut = trained(made, tmp_path / "cut", 2, parallel="fsdp", accumulate=2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def refused(base, workdir, kind, **options):
    """What the error of the command says that trains ``kind``."""
    c = config(base, kind)
    given = {f"config.data.{name}": c.data[name] for name in ("name", "dir", "size", "template")}
    given |= {f"config.data.subject.{name}": value for name, value in c.data.subject.items()}
    given |= {"config.model.path": c.model.path, "config.objective.adapter": c.objective.adapter}
    given |= {f"config.{name}": value for name, value in options.items()}
    flags = (f"--{name}={value}" for name, value in given.items())
    error, _ = command(*flags, f"--workdir={workdir}", config="configs/finetune_lora.py")
    return error


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("textual_inversion", {"data.subject.prompt": "a toy"}, "none of the prompts holds '<s>'"),
        (
            "textual_inversion",
            {"objective.adapter": "textual_inversion('<s>', 'red', vectors=15)"},
            "tokens end before the 15 rows of '<s>'",
        ),
        (
            "textual_inversion",
            {"objective.adapter": "textual_inversion('<s>', 'zebra')"},
            "one token",
        ),
        ("dreambooth", {"data.subject.class_dir": "{}/subject"}, "expected two apart"),
        ("dreambooth", {"data.subject.class_dir": "{}/subject/of"}, "expected two apart"),
    ],
)
def test_mistakes_that_would_teach_nothing(base, tmp_path, kind, options, expected):
    options = {name: value.format(base) for name, value in options.items()}
    error = refused(base, tmp_path / "run", kind, **options)
    assert error is not None and expected in error, error
    assert not (tmp_path / "run" / "checkpoints").exists()
