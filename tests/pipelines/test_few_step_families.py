"""Few-step families against diffusers with the settings of their authors, and what they refuse."""

from dataclasses import replace

import diffusers
import jax
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from diffusion import pipelines
from diffusion.levels import NoiseLevel
from diffusion.pipelines import guidance, recognition, samplers
from diffusion.pipelines.generation import Generation
from diffusion.pipelines.request import Request
from diffusion.sampling.sample import image_keys, image_noise
from diffusion.sampling.solvers import one_step

PROMPTS = ["a photo of a cat", "the small red house at night"]
KEYS = image_keys(0, range(2))
NOISES = [np.asarray(image_noise(KEYS, (8, 8, 4), fold)) for fold in range(9)]
KINDS = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
BASES = {"sd": "pndm", "xl": "ddim"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind -> (their pipeline, its folder, our parameters)."""
    made = {}
    for kind, cls in KINDS.items():
        folder = tmp_path_factory.mktemp("few") / kind
        theirs = tiny.whole(cls, folder, BASES[kind])
        made[kind] = theirs, folder, pipelines.open_any(folder).load()
    return made


EULER, ANCESTRAL = diffusers.EulerDiscreteScheduler, diffusers.EulerAncestralDiscreteScheduler
LCM, TCD, DDIM = diffusers.LCMScheduler, diffusers.TCDScheduler, diffusers.DDIMScheduler
TRAILING = {"timestep_spacing": "trailing"}
# As the published base models are.
UNCLIPPED = {**TRAILING, "clip_sample": False, "set_alpha_to_one": False}
# kind, family, their class, its fields, arguments of their call, noises that they draw
CASES = [
    ("sd", "lcm_lora()", LCM, {}, {"num_inference_steps": 4}, 3),
    ("sd", "lcm_lora(steps=2)", LCM, {}, {"num_inference_steps": 2, "guidance_scale": 1.5}, 1),
    ("sd", "turbo(steps=4)", ANCESTRAL, TRAILING, {"num_inference_steps": 4}, 4),
    ("sd", "turbo(4, ancestral=False)", EULER, TRAILING, {"num_inference_steps": 4}, 0),
    ("sd", "hyper(steps=4)", DDIM, UNCLIPPED, {"num_inference_steps": 4}, 0),
    ("sd", "hyper_unified(4, eta=0.5)", TCD, {}, {"num_inference_steps": 4, "eta": 0.5}, 3),
    ("sd", "tcd()", TCD, {}, {"num_inference_steps": 4, "eta": 0.3}, 3),
    ("sd", "flash()", LCM, TRAILING, {"num_inference_steps": 4}, 3),
    ("xl", "lightning(steps=4)", EULER, TRAILING, {"num_inference_steps": 4}, 0),
    ("xl", "lightning(steps=1)", EULER, {**TRAILING, "prediction_type": "sample"},
     {"num_inference_steps": 1}, 0),
    ("xl", "dmd2()", LCM, {}, {"timesteps": [999, 749, 499, 249]}, 3),
    ("xl", "dmd2(steps=1)", LCM, {}, {"timesteps": [399]}, 0),
    ("xl", "hyper_unet()", LCM, {}, {"timesteps": [800]}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "family", "cls", "fields", "call", "drawn"), CASES)
def test_pictures_of_every_family(models, kind, family, cls, fields, call, drawn):
    theirs, folder, params = models[kind]
    pipeline = pipelines.open_any(folder, family=family).pipeline
    scale = call.get("guidance_scale")
    given = {} if scale is None else {"guidance": (f"cfg({scale})",)}
    made = Generation(pipeline, PROMPTS, Request(batch_size=2, **given))
    own = type(theirs)(**{**theirs.components, **LEFT_OUT[kind]})
    own.scheduler = cls.from_config(theirs.scheduler.config, **fields)
    own.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 0.0, **call, "height": 16, "width": 16, "output_type": "np"}
    with torch.no_grad(), tiny.noises(*NOISES[1 : drawn + 1]):
        expected = own(PROMPTS, latents=tiny.torch_image(NOISES[0]), **call).images
    found = made.drawer.sampler.timesteps
    np.testing.assert_allclose(found, own.scheduler.timesteps.numpy(), atol=1e-3)
    ours = np.stack([picture for _, picture in made.pictures(params)])
    assert ours.std() > 0.1 and np.mean(np.abs(ours) < 1) > 0.5, "saturated, or flat"
    np.testing.assert_allclose(ours, tiny.numpy_image(expected), atol=1e-3)


LEFT_OUT = {"sd": {"requires_safety_checker": False}, "xl": {"add_watermarker": False}}


@pytest.mark.parametrize(("family", "told"), [("dmd2(steps=1)", 399), ("hyper_unet()", 800)])
def test_one_step_is_told_its_time_by_hand(models, family, told):
    """x_0 = c_skip z + c_out (z - sigma eps(z, k)) / alpha, of noise of deviation 1."""
    theirs, folder, _ = models["xl"]
    sampler = samplers.make(pipelines.open_any(folder, family=family).pipeline)
    product = float(theirs.scheduler.alphas_cumprod[told])
    alpha, sigma = product**0.5, (1 - product) ** 0.5
    skip = 0.25 / ((10 * told) ** 2 + 0.25)
    out = 10 * told / ((10 * told) ** 2 + 0.25) ** 0.5
    level, table = sampler.solver.level, sampler.solver
    np.testing.assert_allclose([level.alpha, level.sigma], [[alpha], [sigma]], rtol=1e-6)
    assert sampler.timesteps == [told] and table.init == 1
    np.testing.assert_allclose(table.A[0, 0, 0], skip, rtol=1e-6)
    np.testing.assert_allclose(table.b[0, 0], out, rtol=1e-6)
    assert np.all(table.noise == 0)


def test_turbo_in_tenths_is_euler_ancestral_at_those_levels(models):
    theirs, folder, _ = models["sd"]
    pipeline = pipelines.open_any(folder, family="turbo(tenths=True)").pipeline
    for steps in (1, 2, 4):
        sampler, index = samplers.make(pipeline, steps=steps), [999, 899, 799, 699][:steps]
        assert list(sampler.timesteps) == index
        products = np.append(theirs.scheduler.alphas_cumprod.numpy()[index].astype(float), 1.0)
        t = np.append((np.array(index) + 1) / 1000, 0)
        expected = one_step.euler_ancestral(NoiseLevel(t, products**0.5, (1 - products) ** 0.5))
        expected = expected._replace(init=(1 - products[0]) ** 0.5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            sampler.solver,
            expected,
        )
    even = pipelines.open_any(folder, family="turbo(steps=4)").pipeline
    assert list(samplers.make(even).timesteps) == [999, 749, 499, 249]


def test_pictures_from_pictures_take_the_last_steps(models):
    pipeline = pipelines.open_any(models["xl"][1], family="dmd2()").pipeline
    assert list(samplers.make(pipeline, strength=0.5).timesteps) == [499, 249]
    with pytest.raises(ValueError, match=r"strength=0\.2 leaves none of the 4 steps"):
        samplers.make(pipeline, strength=0.2)


def test_what_a_family_cannot_do_is_refused(models):
    opened = {name: pipelines.open_any(models[kind][1], family=name).pipeline
              for kind, name in (("xl", "lightning(steps=4)"), ("xl", "lightning(steps=1)"),
                                 ("sd", "lcm_lora()"), ("sd", "hyper_cfg()"))}  # fmt: skip

    def refused(name, message, steps=0, solver="auto", chain="auto"):
        with pytest.raises(ValueError, match=message):
            sampler = samplers.make(opened[name], solver, steps=steps, at="s.")
            guidance.make(opened[name], sampler, chain, at="s.")

    refused(
        "lightning(steps=4)", r"s\.steps=50: lightning\(steps=4\) was distilled for 4 steps", 50
    )
    refused("lightning(steps=1)", r"s\.steps=4: .*distilled for 1 step,", 4)
    refused("lightning(steps=4)", r"s\.guidance='cfg\(5\)': .*expected cfg\(1\)", chain="cfg(5)")
    refused("lightning(steps=4)", r"cfg\(0\): that draws without.*cfg\(1\)", chain="cfg(0)")
    refused("lcm_lora()", r"cfg\(7.5\): it was distilled.*cfg from 1 to 2", chain="cfg(7.5)")
    refused("lcm_lora()", r"s\.solver='turbo\(2\)'.*config\.model\.family", solver="turbo(2)")
    other = "EulerDiscreteScheduler(prediction_type='sample')"
    refused("lightning(steps=4)", "trained to predict epsilon.* no sample", solver=other)
    other = "EulerDiscreteScheduler(prediction_type='epsilon')"
    refused("lightning(steps=1)", "trained to predict sample.* no epsilon", solver=other)
    for name, chain in (("lcm_lora()", "cfg(2)"), ("hyper_cfg()", "cfg(8)"), ("hyper_cfg()", ())):
        guidance.make(opened[name], samplers.make(opened[name]), chain)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("lightnin(4)", "unknown 'lightnin'.*Did you mean 'lightning'"),
        ("lightning(steps=3)", "steps=3: its checkpoints are for 1, 2, 4 and 8 steps"),
        ("lightning()", "is for StableDiffusionXLPipeline, and this is StableDiffusionPipeline"),
        ("lcm()", "networks that take guidance's scale"),
        ("consistency()", "is for ConsistencyModelPipeline"),
        ("tcd(eta=2.0)", r"eta must lie in \[0, 1\]"),
        ("turbo(steps=5)", "steps=5: its checkpoints are for 1 to 4 steps"),
    ],
)
def test_families_that_a_model_is_not_of(models, family, message):
    with pytest.raises(ValueError, match=message):
        pipelines.open_any(models["sd"][1], family=family)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("x/sdxl_lightning_8step_lora.safetensors", "lightning(steps=8)"),
        ("x/sdxl_lightning_1step_unet_x0.safetensors", "lightning(steps=1)"),
        ("Hyper-SDXL-1step-Unet.safetensors", "hyper_unet()"),
        ("Hyper-SDXL-1step-lora.safetensors", "hyper_unified()"),
        ("Hyper-SD15-2steps-lora.safetensors", "hyper(steps=2)"),
        ("Hyper-SDXL-12steps-CFG-lora.safetensors", "hyper_cfg(steps=12)"),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "dmd2(steps=4)"),
        ("dmd2_sdxl_1step_unet_fp16.safetensors", "dmd2(steps=1)"),
        ("latent-consistency/lcm-lora-sdv1-5", "lcm_lora()"),
        ("a/lcm-lora-sdxl/pytorch_lora_weights.safetensors", "lcm_lora()"),
        ("h1t/TCD-SDXL-LoRA", "tcd()"),
        ("jasperai/flash-sdxl", "flash()"),
        ("stabilityai/sdxl-turbo", "turbo()"),
        ("sd_xl_turbo_1.0_fp16.safetensors", "turbo()"),
        ("openai/diffusers-cd_imagenet64_l2", "consistency(second=22)"),
        ("openai/diffusers-ct_cat256", "consistency(second=62)"),
        ("stable-diffusion-xl-base-1.0", ""),
        ("my-turbo-style.safetensors", ""),
    ],
)
def test_published_names(name, family):
    assert recognition.by_name(["", name]) == (family, name if family else "")


def test_files_say_what_they_are(models):
    own = pipelines.open_any(models["sd"][1]).pipeline
    assert own.few_steps is None and own.defaults.guidance == ("cfg(7.5)",)
    for fields, family in (
        ({"_class_name": "LCMScheduler"}, "lcm_lora()"),
        ({"_class_name": "TCDScheduler"}, "tcd()"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}, "turbo()"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, ""),
        ({"_class_name": "EulerDiscreteScheduler", **TRAILING}, ""),
    ):
        assert recognition.by_config(replace(own, scheduler={**own.scheduler, **fields})) == family


def test_a_name_that_says_otherwise_is_refused(models):
    opened = pipelines.open_any(models["xl"][1])
    names = ["sdxl_lightning_8step_lora.safetensors"]
    assert recognition.chosen(opened, "auto", names).pipeline.defaults.steps == 8
    assert recognition.chosen(opened, "", names) is opened
    with pytest.raises(ValueError, match=r"lightning\(4\)'.*is of lightning\(steps=8\)"):
        recognition.chosen(opened, "lightning(4)", names)


def test_turbo_keeps_the_scheduler_of_its_folder(models):
    opened = pipelines.open_any(models["sd"][1])
    scheduler = {**opened.pipeline.scheduler, "_class_name": EULER.__name__, **TRAILING}
    opened = replace(opened, pipeline=replace(opened.pipeline, scheduler=scheduler))
    chosen = recognition.chosen(opened, "auto", ["stabilityai/sd-turbo"]).pipeline
    assert chosen.defaults.solver.startswith("EulerDiscreteScheduler")
    assert chosen.defaults.steps == 1 and chosen.few_steps.side == 512


def test_another_network(models, tmp_path):
    folder = models["sd"][1]
    tiny.unet(7, time_cond_proj_dim=16).save_pretrained(tmp_path / "unet")
    made = pipelines.open_any(folder, network=str(tmp_path / "unet"))
    assert made.pipeline.few_steps.name == "lcm()" and made.pipeline.takes_scale
    assert made.pipeline.defaults.guidance == ("cfg(8.5)",)
    same = tiny.unet(7)
    same.save_pretrained(tmp_path / "same")
    file = tmp_path / "same" / "diffusion_pytorch_model.safetensors"
    alone = pipelines.open_any(folder, network=str(file)).load()["network"]
    whole = pipelines.open_any(folder, network=str(tmp_path / "same")).load()["network"]
    jax.tree.map(np.testing.assert_array_equal, alone, whole)
    kernel = same.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(alone["conv_in"]["kernel"], kernel)
    with pytest.raises(ValueError, match=r"network=.*inputs and outputs are .*'context': .*64"):
        pipelines.open_any(folder, network=str(models["xl"][1] / "unet"))
    pickled = tmp_path / "dmd2_sdxl_4step_unet_fp16.bin"
    pickled.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"network=.*Convert it"):
        pipelines.open_any(folder, network=str(pickled))


def test_an_embedded_scale_leaves_the_negative_without_effect(models, tmp_path):
    tiny.unet(7, time_cond_proj_dim=16).save_pretrained(tmp_path / "unet")
    pipeline = pipelines.open_any(models["sd"][1], network=str(tmp_path / "unet")).pipeline
    sampler = samplers.make(pipeline)
    notes = guidance.make(pipeline, sampler, "cfg(8)", negative="blurry").notes
    assert len(notes) == 1 and "negative='blurry' has no effect" in notes[0]
    assert guidance.make(pipeline, sampler, "cfg(30), clip()").notes == ()
    for chain, message in (
        ((), r"expected cfg\(8.5\)"),
        ("cfg(8), rescale(0.7)", "rescale cannot act"),
        ("cfg(8), interval(0.3, 5)", "interval cannot act"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance.make(pipeline, sampler, chain)


def consistency_model(folder, **fields):
    config = dict(
        sample_size=8, num_class_embeds=10, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=8,
        norm_num_groups=4, attn_norm_num_groups=4, resnet_time_scale_shift="scale_shift",
        downsample_type="resnet", upsample_type="resnet",
    )  # fmt: skip
    network = tiny.randomise(diffusers.UNet2DModel(**config), 3)
    scheduler = diffusers.CMStochasticIterativeScheduler(**fields)
    theirs = diffusers.ConsistencyModelPipeline(network, scheduler)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    return theirs


def test_consistency_models_of_openai(tmp_path):
    folder = tmp_path / "diffusers-cd_imagenet64_l2"
    theirs = consistency_model(folder)
    opened = pipelines.open_any(folder)
    params = opened.load()
    noises = [np.asarray(image_noise(KEYS, (8, 8, 3), fold)) for fold in range(3)]
    for steps, drawn, call in (
        (1, 0, {"num_inference_steps": 1}),
        (2, 2, {"num_inference_steps": None, "timesteps": [22, 0]}),
    ):
        made = Generation(opened.pipeline, [3, 9], Request(batch_size=2, steps=steps))
        assert made.pipeline.few_steps.name == "consistency(second=22)"
        with torch.no_grad(), tiny.noises(*noises[1 : drawn + 1]):
            scaled = tiny.torch_image(noises[0])
            expected = theirs(
                2, class_labels=[3, 9], latents=scaled, output_type="np", **call
            ).images
        ours = np.stack([picture for _, picture in made.pictures(params)])
        assert ours.std() > 0.1 and np.mean(np.abs(ours) < 1) > 0.5
        np.testing.assert_allclose(ours, tiny.numpy_image(expected), atol=1e-3)
    with pytest.raises(ValueError, match=r"cannot follow cfg\(1\.5\)"):
        guidance.make(opened.pipeline, made.drawer.sampler, "cfg(1.5)")
    even = pipelines.open_any(folder.rename(tmp_path / "mine")).pipeline
    assert even.few_steps.name == "consistency()"
    karras = (80 ** (1 / 7) + 20 / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    ratio = samplers.make(even, steps=2).solver.level.ratio
    np.testing.assert_allclose(ratio, [80, karras], rtol=1e-6)
