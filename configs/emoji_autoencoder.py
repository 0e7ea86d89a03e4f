"""A small autoencoder of emoji and pixel-art tiles, 32 x 32, for text to image on its latents.

    python main.py --config=configs/emoji_autoencoder.py --workdir=runs/emoji_autoencoder \\
        --config.data.dir=DATA

DATA holds the folders ``emoji`` and ``dcss_tiles`` with .npz files of images and captions. Latents
are 16 x 16 x 4; runs/emoji_autoencoder/autoencoder is what config.data.autoencoder takes.

Hardware: 2 CPU cores that were busy with other work, 23 minutes (64,000 images). Result: the 299
images with held-out captions are reconstructed to 29.7 dB on average.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.name = "emoji_and_tiles"
    c.data.size = 32
    c.objective.name = "autoencoding"
    c.model.name = "autoencoder"
    c.model.autoencoder.update(
        widths=(16, 48), blocks=1, latent_channels=4, mid_attention=False, norm_groups=8
    )
    c.autoencoding.kl_weight = 3e-4  # a decoder that forgives a diffusion model's small errors
    c.optimizer.learning_rate = 3e-3
    c.optimizer.decay = "cosine"
    c.optimizer.b2 = 0.99
    c.ema = "constant(decay=0.99)"
    c.train.steps = 4000
    c.train.batch_size = 16
    c.train.sample_every = 500
    c.train.checkpoint_every = 500
    return c
