"""Every field of configs/base.py acts through main.py, in a run here or in a test that is named."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, newest, succeed
from PIL import Image

from configs import base
from diffusion.config import autoencoder
from diffusion.config.ranges import _fields

DATA = {
    "data.name": "folder",
    "data.dir": "pictures",
    "data.size": 8,
    "data.background": (0, 0, 0),
    "data.held_out": 0.25,
    "data.channels": 3,
    "data.crop": "random",
    "data.on_error": "skip",
    "data.flip": True,
    "data.threads": 1,
    "data.prefetch": 2,
    "data.std": 0.6,
}
TRAIN = {
    "seed": 1,
    "train.steps": 2,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup": 0,
    "samples.columns": 2,
    "sampler.steps": 2,
    "sampler.batch_size": 4,
}
UNET = {
    "data.dtype": "bfloat16",
    **{"model.unet.widths": (8,), "model.unet.blocks": 1, "model.unet.norm_groups": 4},
    **{"model.unet.attention": "self", "model.unet.up_attention": 0},
    **{"model.unet.mid_attention": 0, "model.unet.mid_blocks": 1, "model.unet.head_width": 4},
    **{"model.unet.dropout": 0.1, "model.unet.scale_shift": True, "model.unet.remat": True},
    **{"model.unet.resnet_resampling": True, "model.unet.time_cos_first": False},
    **{"model.unet.time_freq_shift": 1.0, "model.unet.time_scale": 2.0},
    **{"model.unet.time_width": 16, "model.unet.norm_eps": 1e-6},
    "objective.schedule": "linear",
    "objective.prediction": "eps",
    "objective.c_noise": "thousand_t",
    "objective.times": "discrete(steps=1000)",
    "objective.stratified": False,
    "objective.weighting": "min_snr(gamma=5)",
    "objective.distance": "pseudo_huber(c=0.03)",
    "objective.coupling": "optimal_transport(group=2)",
    "objective.t_min": 1e-3,
    "objective.label_dropout": 0.2,
    "objective.noise": "gaussian(offset=0.1, perturbation=0.1)",
    "objective.terms": ("uncertainty()",),
    "optimizer.decay": "linear",
    "optimizer.decay_start": 1,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.99,
    "optimizer.eps": 1e-7,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 0.5,
    "ema": "power_function(sigma_rel=0.1)",
    **{"train.accumulate": 2, "train.sample_every": 1, "train.keep": 1, "train.keep_best": 1},
    **{"train.validate_every": 1, "train.validation_count": 8, "train.best": "validation_loss"},
    **{"train.max_skipped": 1, "train.snapshot_every": 1},
    "train.snapshot_sigma_rel": (0.1, 0.2),
    "log.peak_tflops": 1.0,
    "evaluation.metrics": ("memorisation()", "frechet()"),
    **{"evaluation.count": 4, "evaluation.features": "pixels", "evaluation.reference": "train"},
    **{"evaluation.shard": 3, "train.validation_metrics": ("frechet()",)},
    "train.validation_samples": 4,
}
DIT = {
    "data.name": "digits",
    "data.dir": "",
    "data.channels": 0,
    "data.size": 0,
    "model.name": "dit",
    "model.dtype": "bfloat16",
    "parallel": "fsdp",
    **{"model.dit.width": 16, "model.dit.depth": 2, "model.dit.heads": 2, "model.dit.patch": 4},
    **{"model.dit.mlp": "swiglu", "model.dit.mlp_ratio": 2.0, "model.dit.mlp_norm_eps": 1e-5},
    **{"model.dit.norm": "rms", "model.dit.positions": "rotary", "model.dit.qk_norm": True},
    **{"model.dit.remat": True, "model.dit.remat_keeps_products": True, "model.dit.scan": True},
    **{"model.dit.dropout": 0.1, "model.dit.unit_embeddings": True},
    "model.dit.time_freq_shift": 1.0,
    "objective.conditional": False,
    "optimizer.name": "lion",
    "evaluation.metrics": (),
}

AUTOENCODER = {
    "model.name": "autoencoder",
    "objective.name": "autoencoding",
    **{"model.autoencoder.widths": (8,), "model.autoencoder.blocks": 1},
    **{"model.autoencoder.latent_channels": 2, "model.autoencoder.norm_groups": 4},
    **{"model.autoencoder.mid_attention": False, "model.autoencoder.attention": True},
    **{"model.autoencoder.remat": True, "model.autoencoder.dropout": 0.1},
    **{"model.autoencoder.quant_conv": False, "model.autoencoder.post_quant_conv": False},
    **{"autoencoding.distance": "l2", "autoencoding.kl_weight": 1e-4},
    **{"autoencoding.learned_variance": True, "autoencoding.adversary": "hinge"},
    **{"autoencoding.adversary_weight": 0.3, "autoencoding.adversary_start": 1},
    **{"autoencoding.discriminator.width": 8, "autoencoding.discriminator.layers": 1},
    "autoencoding.discriminator.norm": "group",
    **{"autoencoding.perceptual": "lpips.safetensors", "autoencoding.perceptual_weight": 0.5},
}
SAMPLE = {
    **{"sampler.average": "params", "sampler.checkpoint": 2, "sampler.solver": "ddim(eta=0.5)"},
    **{"sampler.grid": "leading", "sampler.steps": 3, "sampler.seed": 7},
    **{"sampler.guidance": "cfg(2), interval(0.1, 5)", "sampler.preview_every": 1},
    "sampler.corrector": "langevin(snr=0.1)",
    **{"sampler.batch_size": 2, "samples.count": 4, "samples.columns": 2, "samples.gif": True},
    **{"samples.labels": (1,), "samples.negative": 0},
}
GENERATE = {
    **{"samples.image": "pictures/a/0.png", "samples.mask": "mask.png", "samples.strength": 0.5},
    **{"samples.height": 16, "samples.width": 8, "samples.labels": (0,), "sampler.steps": 2},
    **{"samples.fit": "pad", "samples.paste": False},
    "sampler.acceleration": "cache(every(2))",
}
INSPECT = {"inspect.count": 4, "inspect.columns": 2}
RUNS = {
    "inspect": DATA | INSPECT,
    "unet": DATA | TRAIN | UNET,
    "sample": SAMPLE,
    "generate": GENERATE,
    "dit": TRAIN | DIT,
    "autoencoder": DATA | TRAIN | AUTOENCODER,
}
ELSEWHERE = {
    "adapters": "pipelines/test_adapters.py",
    "control": "modes/test_control_specs.py",
    "image_prompts": "pipelines/test_image_prompts.py",
    "objective.adapter": "modes/test_adapter_runs.py",
    "optimizer.rates": "modes/test_adapter_runs.py",
    "data.hint": "modes/test_adapter_runs.py",
    "data.template": "config/test_tagged_captions.py",
    **{f"evaluation.{name}": "modes/test_judging.py" for name in ("keep", "part", "samples")},
    "reference.": "modes/test_judging.py",
    "few_steps.": "modes/test_few_step_runs.py",
    "sweep.students": "modes/test_few_step_runs.py",
    **{f"model.{name}.guidance_width": "models/test_two_times.py" for name in ("dit", "mlp")},
    "model.dit.time_scale": "models/test_two_times.py",
    "data.autoencoder": "config/test_text_to_image.py",
    "data.buckets": "modes/test_inspect.py",
    "data.cache": "config/test_text_to_image.py",
    "data.density": "data/test_densities.py",
    "data.num_classes": "data/test_sources.py",
    "data.padding": "config/test_build.py",
    "data.scale": "data/test_sources.py",
    "data.text_encoder": "pipelines/test_finetuning.py",
    **{f"data.{name}": "config/test_tagged_captions.py" for name in ("shuffle_tags", "keep_tags")},
    "data.tag_dropout": "config/test_tagged_captions.py",
    "data.subject.": "modes/test_subjects_and_edits.py",
    "data.token": "config/test_text_to_image.py",
    "data.workers": "modes/test_inspect.py",
    "learn.": "test_main.py",
    "compare.": "modes/test_compare_mode.py",
    "sweep.": "test_main.py",
    "log.wandb": "runs/test_tracking.py",
    "model.family": "modes/test_few_step_commands.py",
    "model.network": "modes/test_few_step_commands.py",
    "model.autoencoder.attention_implementation": "models/test_dit.py",
    "model.dit.attention_implementation": "models/test_dit.py",
    "model.unet.attention_implementation": "models/test_dit.py",
    "model.unet.only_cross_attention": "pretrained/unet_cases.py",
    "model.unet.upcast_attention": "pretrained/unet_cases.py",
    "model.dit.cross_attention": "tiny_runs.py",
    "model.dit.pooled": "tiny_runs.py",
    "model.mlp.": "models/test_mlp.py",
    "model.path": "test_main.py",
    "model.prediction_type": "pretrained/test_single_file.py",
    "model.refiner": "pipelines/test_tasks.py",
    "model.remat": "pipelines/test_finetuning.py",
    "model.revision": "pretrained/test_files.py",
    "model.text.": "config/test_text_to_image.py",
    "model.tile": "modes/test_generate.py",
    "model.tokenizer": "modes/test_generate.py",
    "model.unet.": "models/test_unet.py",
    "model.vae": "modes/test_effects.py",
    "model.variant": "pretrained/test_files.py",
    "objective.dropout": "modes/test_subjects_and_edits.py",
    "profile.": "modes/test_profile.py",
    "sampler.hand_over": "pipelines/test_tasks.py",
    "samples.aesthetic": "pipelines/test_tasks.py",
    "samples.clip_skip": "pipelines/test_prompts.py",
    "samples.emphasis": "modes/test_effects.py",
    "samples.noise_level": "pipelines/test_tasks.py",
    "samples.weighted": "pipelines/test_prompts.py",
    "samples.": "modes/test_generate.py",
    "train.accept_changes": "test_main.py",
    "train.init_": "test_main.py",
}
"""The test file that has the fields of these names, or that begin so."""


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = np.random.default_rng(0)
        for name in "ab":
            (folder / "pictures" / name).mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 256, (10, 12, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
        Image.new("L", (12, 10), 255).save("mask.png")
        yield folder


def words(fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def unet():
    succeed("--workdir=unet", *words(RUNS["unet"]), config="configs/base.py")


def test_every_field_is_exercised():
    missing = []
    for name, default in _fields(base.get_config()):
        if any(name in run and run[name] != default for run in RUNS.values()):
            continue
        files = [path for start, path in ELSEWHERE.items() if name.startswith(start)]
        last = name.rpartition(".")[2]
        if not any(last in (ROOT / "tests" / path).read_text() for path in files):
            missing.append((name, files))
    assert not missing


def test_a_unet_of_a_folder(unet, place):
    workdir = place / "unet"
    assert len(list((workdir / "grids").iterdir())) == 2
    assert (workdir / "samples.png").exists() and (workdir / "evaluation.json").exists()
    assert list((workdir / "snapshots").iterdir())


def test_samples(unet, place):
    succeed("--mode=sample", "--workdir=unet", *words(SAMPLE), config=None)
    drawn = newest(place / "unet" / "samples")
    assert len(list((drawn / "pictures").iterdir())) == 4
    assert (drawn / "trajectory.gif").exists() and len(list((drawn / "previews").iterdir())) > 3


def test_a_picture_is_repainted(unet, place):
    succeed("--mode=generate", "--workdir=unet", *words(GENERATE), config=None)
    assert Image.open(place / "unet" / "generated" / "000000.png").size == (8, 16)


def test_the_data_are_inspected(place):
    fields = words(RUNS["inspect"])
    succeed("--mode=inspect", "--workdir=seen", *fields, config="configs/base.py")
    assert (place / "seen" / "inspect.png").exists()


def test_a_transformer(place):
    succeed("--workdir=dit", *words(RUNS["dit"]), config="configs/base.py")
    assert (place / "dit" / "samples.png").exists()
    assert not (place / "dit" / "evaluation.json").exists()


class Apart(nn.Module):
    """Stands for LPIPS, whose weights are large."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, y):
        return self.param("w", nn.initializers.ones, ()) * jnp.mean((x - y) ** 2, axis=(1, 2, 3))


def test_an_autoencoder(place, monkeypatch):
    monkeypatch.setattr(autoencoder, "LPIPS", Apart)
    monkeypatch.setattr(autoencoder.lpips, "load", lambda path: {"w": jnp.ones(())})
    fields = words(RUNS["autoencoder"])
    succeed("--workdir=autoencoder", *fields, config="configs/base.py")
    assert (place / "autoencoder" / "autoencoder" / "config.json").exists()
    assert '"perceptual"' in (place / "autoencoder" / "metrics.jsonl").read_text()
