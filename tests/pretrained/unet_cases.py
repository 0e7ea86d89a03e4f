"""Configs of diffusers' U-Nets: the published ones, and small ones of every kind."""

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*kinds: str) -> dict:
    """down_block_types and up_block_types, from fine to coarse."""
    return {
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
    }


SD1 = {
    "_class_name": "UNet2DConditionModel",
    **blocks(CROSS, CROSS, CROSS, PLAIN),
    "sample_size": 64,
    "cross_attention_dim": 768,
}
SD2 = {
    **SD1,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    **blocks(PLAIN, CROSS, CROSS),
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = {
    **SDXL,
    **blocks(PLAIN, CROSS, CROSS, PLAIN),
    "block_out_channels": (384, 768, 1536, 1536),
    "attention_head_dim": (6, 12, 24, 24),
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
X4 = {
    "_class_name": "UNet2DConditionModel",
    **blocks(PLAIN, CROSS, CROSS, CROSS),
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "cross_attention_dim": 1024,
    "only_cross_attention": (True, True, True, False),
    "use_linear_projection": True,
    "num_class_embeds": 1000,
}
DDPM = {
    "_class_name": "UNet2DModel",
    **blocks(PLAIN, "Attn{}Block2D", PLAIN, PLAIN),
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
CELEBA_HQ = {
    **DDPM,
    **blocks(PLAIN, PLAIN, PLAIN, PLAIN, "Attn{}Block2D", PLAIN),
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
}
PUBLISHED = {
    "Stable Diffusion 1.5": (SD1, 859_520_964, 686),
    "inpainting": ({**SD1, "in_channels": 9}, 859_535_364, 686),
    "InstructPix2Pix": ({**SD1, "in_channels": 8}, 859_532_484, 686),
    "latent consistency": ({**SD1, "time_cond_proj_dim": 256}, 859_602_884, 687),
    "Stable Diffusion 2.1": (SD2, 865_910_724, 686),
    "SDXL": (SDXL, 2_567_463_684, 1680),
    "SDXL refiner": (REFINER, 2_259_526_660, 1220),
    "x4 upscaler": (X4, 473_398_020, 687),
    "DDPM, CIFAR-10": (DDPM, 35_746_307, None),
    "DDPM, CelebA-HQ": (CELEBA_HQ, 113_673_219, None),
}
"""Config, number of parameters and, where known, of tensors."""

# Few different shapes, which all cases share.
TWO = {"block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 8}
SMALL = {
    "Stable Diffusion 1": {
        **{**SD1, **TWO, **blocks(CROSS, PLAIN), "sample_size": (8, 8)},
        **{"attention_head_dim": 4, "cross_attention_dim": 12},
    },
    # Inpainting, InstructPix2Pix and latent consistency models only have further inputs.
    "many inputs": {
        **{**SD2, **TWO, **blocks(CROSS, CROSS), "in_channels": 9, "time_cond_proj_dim": 6},
        **{"attention_head_dim": (2, 4), "cross_attention_dim": 12, "num_class_embeds": 3},
        **{"transformer_layers_per_block": (1, 2), "time_embedding_dim": 24, "dropout": 0.1},
        "layers_per_block": (1, 2),
    },
    "SDXL": {
        **{**SDXL, **TWO, **blocks(PLAIN, CROSS), "attention_head_dim": (2, 4)},
        **{"transformer_layers_per_block": (1, 2), "cross_attention_dim": 12},
        **{"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 10 + 6 * 8},
    },
    "SDXL refiner": {
        **{**REFINER, **TWO, **blocks(CROSS, PLAIN), "attention_head_dim": (2, 4)},
        **{"transformer_layers_per_block": 2, "cross_attention_dim": 12},
        **{"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 10 + 5 * 8},
    },
    "x4 upscaler": {
        **{**X4, **TWO, **blocks(CROSS, CROSS), "attention_head_dim": 4},
        **{"cross_attention_dim": 12, "only_cross_attention": (True, False)},
        "num_class_embeds": 5,
    },
    "pruned SDXL": {
        **{**SD1, **TWO, **blocks(CROSS, CROSS), "layers_per_block": 2},
        **{"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": ((1, 2), 1)},
        "reverse_transformer_layers_per_block": (1, (2, 1, 1)),
        **{"attention_head_dim": 4, "cross_attention_dim": 12, "freq_shift": 1},
    },
    "no middle": {
        **{**SD1, **TWO, **blocks(PLAIN, CROSS), "mid_block_type": None},
        **{"attention_head_dim": 4, "cross_attention_dim": 12, "downsample_padding": 0},
        **{"resnet_time_scale_shift": "scale_shift", "flip_sin_to_cos": False},
    },
    "DDPM": {
        **{**DDPM, **TWO, "block_out_channels": (16, 16, 32), "sample_size": 8},
        **blocks(PLAIN, "Attn{}Block2D", PLAIN),
    },
    "ADM": {
        **{"_class_name": "UNet2DModel", **TWO, "attention_head_dim": 8, "out_channels": 6},
        "block_out_channels": (16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        **{"downsample_type": "resnet", "upsample_type": "resnet", "num_class_embeds": 5},
        **{"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    },
    "attention only on the way up": {
        **{"_class_name": "UNet2DModel", **TWO, "add_attention": False},
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}
