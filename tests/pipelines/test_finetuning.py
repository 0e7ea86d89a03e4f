"""Fine-tuning a tiny random pipeline, from diffusers' folder to diffusers' folder."""

import json

import diffusers
import jax
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from configs import finetune_text_to_image
from diffusion import pretrained
from diffusion.conditioning import from_batch
from diffusion.config import latents, pretrained_network
from diffusion.config.data import make_images, make_source
from diffusion.config.experiment import build
from diffusion.data.batches import batches as pipeline_batches
from diffusion.pipelines.conditioners import FrozenEncoder
from diffusion.training.loop import fit

CAPTIONS = ["a red cat", "a blue cat", "a red house", "a blue house", "a red sea", "a blue sea"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pipeline, its folder, and a config that fine-tunes it, with its cache computed."""
    folder = tmp_path_factory.mktemp("tuning")
    pipeline = tiny.whole()
    pipeline.unet = tiny.unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    pipeline.save_pretrained(folder / "pipeline")
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    np.savez(folder / "pairs.npz", images=images, caption=np.array(2 * CAPTIONS))
    c = finetune_text_to_image.get_config()
    c.model.path = str(folder / "pipeline")
    c.data.update(dir=str(folder / "pairs.npz"), cache=str(folder / "cache"), size=16, tokens=16)
    c.data.held_out = 0.2
    c.model.remat = False
    c.optimizer.warmup = 0
    c.train.update(steps=2, batch_size=8, accumulate=1, log_every=1)
    c.sampler.update(steps=2, batch_size=8)
    latents.compute(c.data, lambda split: make_images(c.data, split))
    return pipeline, folder, c


def test_cached_latents_and_embeddings_are_diffusers(made):
    pipeline, _, c = made
    train = make_source(c.data, "train")
    batch = train.read(np.arange(4))
    images = torch.from_numpy(make_images(c.data, "train").read(np.arange(4))["x"])
    tokens = pipeline.tokenizer(
        list(train.captions[:4]), padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        moments = pipeline.vae.encode(images.permute(0, 3, 1, 2)).latent_dist
        context = pipeline.text_encoder(tokens.input_ids)
    scale = pipeline.vae.config.scaling_factor
    for ours, theirs in (
        (batch["x"], scale * moments.mean.permute(0, 2, 3, 1)),
        (batch["x_std"], scale * moments.std.permute(0, 2, 3, 1)),
        (batch["context"], context.last_hidden_state),
        (batch["pooled"], context.pooler_output),
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    assert set(batch) == {"x", "x_std", "context", "pooled"}
    # Captions of the cache need no encoder; others give what the encoder does.
    looked_up = train.encode([train.captions[0], ""])
    np.testing.assert_array_equal(looked_up["context"][0], batch["context"][0])
    encoder = FrozenEncoder(c.data.text_encoder)
    tokens = make_images(c.data, "train").encode(["", "a green cat"])["tokens"]
    new = train.encode(["", "a green cat"])
    np.testing.assert_allclose(new["context"], encoder(tokens)["context"], atol=1e-5)
    np.testing.assert_allclose(looked_up["context"][1], new["context"][0], atol=1e-5)


def test_two_steps_give_a_pipeline_that_diffusers_runs(made, tmp_path):
    pipeline, _, c = made
    c = c.copy_and_resolve_references()
    c.objective.update(schedule="zero_terminal_snr(scaled_linear)", prediction="v")
    c.objective.update(weighting="min_snr", noise="gaussian(offset=0.1, perturbation=0.1)")
    c.optimizer.update(name="sgd", learning_rate=1e-2, weight_decay=0.0, clip_norm=0.0)
    experiment = build(c)
    state = fit(
        objective=experiment.objective,
        optimizer=experiment.optimizer,
        emas={},
        batches=lambda start: pipeline_batches(experiment.train, 8, 0, start),
        steps=2,
        workdir=tmp_path,
        initial_params=pretrained_network.initial(c),
        devices=jax.devices()[:1],
    )
    pretrained_network.export(c, state.params, tmp_path / "pipeline")
    _, info = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "pipeline" / "unet", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tuned = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    tuned.set_progress_bar_config(disable=True)
    assert isinstance(tuned.scheduler, diffusers.DDIMScheduler)
    assert tuned.scheduler.config.prediction_type == "v_prediction"
    assert tuned.scheduler.config.rescale_betas_zero_snr
    with torch.no_grad():
        images = tuned("a red cat", num_inference_steps=2, height=16, width=16, output_type="np")
    assert np.isfinite(images.images).all()
    # The U-Net is what training left, the text encoder and the autoencoder are as they were.
    written = pretrained.load(tmp_path / "pipeline", "unet").params
    jax.tree.map(np.testing.assert_array_equal, written, state.params["network"])
    before, after = (dict(p.unet.named_parameters()) for p in (pipeline, tuned))
    assert before.keys() == after.keys()
    assert np.mean([not torch.equal(before[k], after[k]) for k in before]) > 0.9
    for part in ("vae", "text_encoder"):
        old, new = (getattr(p, part).state_dict() for p in (pipeline, tuned))
        assert all(torch.equal(old[k], new[k]) for k in old)


def test_training_begins_with_the_pipelines_network(made):
    """The objective's denoiser with the loaded parameters is diffusers' network."""
    pipeline, _, c = made
    c = c.copy_and_resolve_references()
    c.model.remat = True
    experiment = build(c)
    params = pretrained_network.initial(c)(None, None)
    assert experiment.objective.network.remat
    batch = experiment.train.read(np.arange(2))
    batch = {name: value for name, value in batch.items() if name != "x_std"}
    time = np.array([999.0, 10.0], np.float32)
    ours = jax.jit(experiment.objective.network.apply)(
        {"params": params["network"]},
        batch["x"],
        time,
        from_batch(batch),
    )
    with torch.no_grad():
        theirs = pipeline.unet(
            tiny.torch_image(batch["x"]), torch.tensor(time), torch.tensor(batch["context"])
        ).sample
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("objective.schedule", "linear", r"config\.objective\.schedule='linear' is not the pipe"),
        ("objective.prediction", "flow", r"config\.objective\.prediction='flow': .* one of eps"),
        ("objective.c_noise", "thousand_t", r"config\.objective\.c_noise='thousand_t' is not"),
        ("model.path", "", r"config\.model\.path must name"),
        ("data.cache", "", r"config\.data\.cache must name a folder"),
        ("data.cache", "nowhere", r"config\.data\.cache='nowhere'.*--mode=cache"),
        ("data.size", 8, r"config\.data\.cache.*size: 16 there, 8 here"),
    ],
)
def test_what_does_not_fit_is_named(made, field, value, message):
    c = made[2].copy_and_resolve_references()
    c.update_from_flattened_dict({field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(c)


def test_another_autoencoder_makes_the_cache_another(made, tmp_path):
    _, folder, c = made
    c = c.copy_and_resolve_references()
    diffusers.AutoencoderKL.from_pretrained(folder / "pipeline" / "vae").save_pretrained(tmp_path)
    c.data.autoencoder = str(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scaling_factor": 2.0}))
    with pytest.raises(ValueError, match=r"autoencoder: '.*' there, '.*' here"):
        make_source(c.data, "train")
