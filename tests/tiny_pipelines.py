"""Small random pipelines, built and run by diffusers."""

import logging
import sys
import warnings
from contextlib import contextmanager

import diffusers
import numpy as np
import torch
from tiny_encoders import clip_text, randomise
from tiny_tokenizer import tiny_tokenizer

logging.getLogger("diffusers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="diffusers")
torch.set_num_threads(1)

SIZE = 16  # pixels; latents are 8 x 8
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "pndm": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True),
    "dpm": diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "euler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "v": diffusers.DDIMScheduler(  # Stable Diffusion 2, with zero terminal SNR
        **BETAS,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "lcm": diffusers.LCMScheduler(**BETAS),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    "heun": diffusers.HeunDiscreteScheduler(**BETAS),
}
STEPS = {"pndm": 3}
"""Four evaluations with each, so that all share what is compiled."""


def unet(seed=1, **fields):
    config = dict(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return randomise(diffusers.UNet2DConditionModel(**(config | fields)), seed)


SDXL = dict(
    use_linear_projection=True,
    transformer_layers_per_block=[1, 1],
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
)


def dit(seed=4):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=2, sample_size=SIZE // 2, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    first, second = (block.norm1.emb for block in randomise(model, seed).transformer_blocks)
    # Sinusoids of hundreds differ by 1e-5 between libraries: nothing should blow that up.
    first.timestep_embedder.linear_1.weight.data /= 4
    second.load_state_dict(first.state_dict())  # as in published files
    model.proj_out_2.weight.data /= 10  # estimates of noise are of order one
    return model


def vae(seed=2, **fields):
    config = dict(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=0.5,
    )
    return randomise(diffusers.AutoencoderKL(**(config | fields)), seed)


def whole(kind="StableDiffusionPipeline", folder=None, scheduler="ddim"):
    """A pipeline with text encoders and tokenizers, also saved where a folder is given."""
    parts = {"vae": vae(), "scheduler": SCHEDULERS[scheduler]}
    if kind == "StableDiffusionXLPipeline":
        added = {"projection_class_embeddings_input_dim": 24 + 6 * 8, "cross_attention_dim": 64}
        parts |= {"unet": unet(**SDXL | added)}
        parts |= {"text_encoder": clip_text(3), "tokenizer": tiny_tokenizer()}
        parts["text_encoder_2"] = clip_text(4, projection=True, hidden_act="gelu")
        parts |= {"tokenizer_2": tiny_tokenizer(pad="!"), "add_watermarker": False}
    else:
        parts |= {"unet": unet(), "text_encoder": clip_text(3), "tokenizer": tiny_tokenizer()}
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    pipeline = getattr(diffusers, kind)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline


@contextmanager
def noises(*given):
    """diffusers draws ``given``'s arrays [B, h, w, C], one after another, instead of noise."""
    queue = [torch.from_numpy(np.array(a, np.float32)).permute(0, 3, 1, 2) for a in given]

    def randn_tensor(shape, *_, dtype=None, **__):
        z = queue.pop(0)
        assert tuple(shape) == tuple(z.shape), (shape, z.shape)
        return z

    loaded = [m for name, m in sys.modules.items() if name.startswith("diffusers.")]
    places = [m for m in loaded if "randn_tensor" in vars(m)]
    before = [m.randn_tensor for m in places]
    for m in places:
        m.randn_tensor = randn_tensor
    try:
        yield
        assert not queue, f"{len(queue)} noises were not drawn"
    finally:
        for m, function in zip(places, before):
            m.randn_tensor = function


def torch_image(images):
    """[B, H, W, C] in [-1, 1] -> torch [B, C, H, W]."""
    return torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2)


def numpy_image(images):
    """What a pipeline gives with output_type="np", [0, 1] -> [-1, 1]."""
    return np.asarray(images) * 2 - 1
